"""Small targets, drafters and prompts that the tests of the decoder share."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hedgespec.drafters.causal_lm import CausalLMDrafter
from hedgespec.drafters.eagle import EagleConfig, EagleHead
from hedgespec.drafters.ngram import NGramDrafter

VOCABULARY, WIDTH, DRAFT_VOCABULARY = 53, 16, 29
AUX = (1, 2, 3)


@pytest.fixture(scope="module")
def target():
    return tiny_llama(seed=0, layers=4)


def tiny_llama(seed: int, layers: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.25, eos_token_id=None, bos_token_id=None,
        pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def tiny_head(target, seed: int) -> EagleHead:
    generator = torch.Generator().manual_seed(seed)
    config = EagleConfig(WIDTH, WIDTH, 4, 2, 4, 24, VOCABULARY, DRAFT_VOCABULARY, AUX)
    ids = torch.randperm(VOCABULARY, generator=generator)[:DRAFT_VOCABULARY].sort().values
    head = EagleHead(config, target.get_input_embeddings(), ids, name=f"head-{seed}").double()
    for weight in head.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.3, generator=generator)
    return head.requires_grad_(False).eval()


def pool(target):
    """Heads over two draft vocabularies' worth of maps, a small language model, and prompt lookup."""
    small = CausalLMDrafter(tiny_llama(seed=7, layers=1), target, name="small")
    return [tiny_head(target, 1), tiny_head(target, 2), small, NGramDrafter(VOCABULARY)]


def prompt_of(seed: int, length: int = 11) -> torch.Tensor:
    return torch.randint(VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))


def as_functions(target, drafters):
    """The models as algorithm.py wants them: everything computed anew, from the start, every time."""

    def target_logits(tokens):
        return target(torch.tensor([tokens])).logits[0, -1]

    def of(drafter):
        def logits(verified, drafted):
            features = None
            if drafter.aux_layers:
                hidden = target(torch.tensor([verified]), output_hidden_states=True).hidden_states
                at = torch.cat([hidden[layer][0] for layer in drafter.aux_layers], -1)
                features = torch.cat([torch.zeros_like(at[:1]), at[:-1]])
            session = drafter.session()
            row = session.consume(torch.tensor(verified), features, 1)[-1]
            for token in drafted:
                row = session.step(torch.tensor([token]))
            if drafter.draft_to_target is None:
                return row
            return torch.full((VOCABULARY,), -math.inf, dtype=row.dtype).index_put((drafter.draft_to_target,), row)

        return logits

    return target_logits, [of(drafter) for drafter in drafters]


class Broken(NGramDrafter):
    """Fails, or returns nonsense, once it has taken in some tokens."""

    def __init__(self, fault):
        super().__init__(VOCABULARY, name="broken")
        self.fault = fault

    def session(self):
        session = super().session()
        consume = session.consume

        def faulty(tokens, features, logits_to_keep):
            logits = consume(tokens, features, logits_to_keep)
            return self.fault(logits) if session.verified > 15 else logits

        session.consume = faulty
        return session
