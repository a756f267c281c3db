"""Tiny random models in float64: a target, EAGLE heads for it, and a pool of all kinds of drafters."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hedgespec.drafters import Drafter
from hedgespec.drafters.causal_lm import CausalLMDrafter
from hedgespec.drafters.eagle import EagleConfig, EagleHead
from hedgespec.drafters.ngram import NGramDrafter

VOCABULARY, WIDTH, DRAFT_VOCABULARY = 53, 16, 29
AUX_LAYERS = (1, 2, 3)


def tiny_llama(seed: int, layers: int) -> LlamaForCausalLM:
    """Returns a Llama with so many layers and without special tokens."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.25, eos_token_id=None, bos_token_id=None,
        pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def tiny_head(target: LlamaForCausalLM, seed: int) -> EagleHead:
    """Returns an EAGLE head with a draft vocabulary of its own."""
    generator = torch.Generator().manual_seed(seed)
    config = EagleConfig(WIDTH, WIDTH, 4, 2, 4, 24, VOCABULARY, DRAFT_VOCABULARY, AUX_LAYERS)
    ids = torch.randperm(VOCABULARY, generator=generator)[:DRAFT_VOCABULARY].sort().values
    head = EagleHead(config, target.get_input_embeddings(), ids, name=f"head-{seed}").double()
    for weight in head.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.3, generator=generator)
    return head.requires_grad_(False).eval()


def tiny_pool(target: LlamaForCausalLM) -> list[Drafter]:
    """Returns two heads with different vocabularies, a small language model and prompt lookup."""
    small = CausalLMDrafter(tiny_llama(seed=7, layers=1), target, name="small")
    return [tiny_head(target, 1), tiny_head(target, 2), small, NGramDrafter(VOCABULARY)]


def random_prompt(seed: int, length: int = 11) -> torch.Tensor:
    """Returns random tokens, int64 [1, length]."""
    return torch.randint(VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))
