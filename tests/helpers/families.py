"""Small models of every architecture family, and their own texts."""

from __future__ import annotations

import copy

import torch
import transformers

from hedgespec.drafters.causal_lm import CausalLMDrafter
from hedgespec.drafters.eagle import EagleConfig, EagleHead
from hedgespec.drafters.ngram import NGramDrafter

VOCABULARY, WIDTH, WINDOW = 61, 32, 8
NEW_TOKENS = 24
PADDING = (0, 5, 9, 2)
PROMPT = 13
"""Prompts of 13, 8, 4 and 11 tokens: beyond the window and within it, and all of them grow beyond."""

TINY = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3, "eos_token_id": None,
    "bos_token_id": None, "pad_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
OLD = {
    "vocab_size": VOCABULARY, "n_layer": 3, "n_head": 4, "initializer_range": 0.3, "eos_token_id": None, "bos_token_id": None,
    "tie_word_embeddings": False,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES = {
    "Llama": {},
    "Qwen2": {},
    "Qwen2, sliding": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "Qwen3": {"head_dim": 8},
    "Mistral": {"sliding_window": WINDOW},
    "Gemma": {"head_dim": 8},
    "Gemma2": {"head_dim": 8, "sliding_window": WINDOW},
    "Gemma3Text": {"head_dim": 8, "sliding_window": WINDOW, "layer_types": ALTERNATING},
    "Phi": {},
    "Phi3": {"sliding_window": WINDOW},
    "GPTNeoX": {"num_key_value_heads": None},
    "GPT2": OLD | {"n_embd": WIDTH, "n_positions": 512},
    "Mixtral": EXPERTS,
    "Qwen3Moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "GptOss": EXPERTS | {"head_dim": 8, "sliding_window": WINDOW, "layer_types": ALTERNATING},
    "Bloom": OLD | {"hidden_size": WIDTH},
    "Falcon": {"alibi": True, "intermediate_size": None, "num_key_value_heads": None},
    "DeepseekV3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
    },
    "Llama4Text": {
        "head_dim": 8,
        "attention_chunk_size": WINDOW,
        "num_local_experts": 2,
        "intermediate_size_mlp": 32,
        "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
        "no_rope_layers": [1, 0, 1],
    },
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": WIDTH, "init_std": 0.3, "intermediate_size": None},
}
"""By the name of the configuration, what differs from TINY; those of OLD have names of their own for everything.
Biases of ALiBi (Bloom, Falcon), values narrower than keys (DeepseekV3) and chunks in a window's place (Llama4) among them."""
SEEDS = {"Bloom": 7}
ONE_BY_ONE = {"Bloom", "Falcon"}
"""Targets that take no positions, or biases in their stead: a forward cannot serve rows of different lengths."""


def tiny(family: str, attention: str | None = None):
    """A model whose greedy texts are no short loops: the last token alone must not decide, so embeddings are small."""
    own = FAMILIES[family]
    options = own if OLD.keys() <= own.keys() else TINY | own
    config_class = getattr(transformers, family.partition(",")[0] + "Config")
    config = config_class(**{name: value for name, value in options.items() if value is not None or name.endswith("_token_id")})
    torch.manual_seed(SEEDS.get(family, 1))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).float().eval()
    model.get_input_embeddings().weight.data *= 0.2
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def pool(target):
    """A head that reads hidden states, a language model of the same family that often agrees, and prompt lookup."""
    head = EagleHead(EagleConfig(WIDTH, WIDTH, 4, 2, 8, 48, VOCABULARY, 40, (0, 1, 2)), target.get_input_embeddings(),
                     torch.arange(7, 47), name="head")  # fmt: skip
    twin = copy.deepcopy(target)
    random = torch.Generator().manual_seed(1)
    for weight in (weight for weight in head.parameters() if weight.ndim == 2):
        weight.data = 0.3 * torch.randn(weight.shape, generator=random)
    for weight in (weight for weight in twin.parameters() if weight.ndim >= 2):
        weight.data += 0.03 * weight.data.std() * torch.randn(weight.shape, generator=random)
    return [head.requires_grad_(False).eval(), CausalLMDrafter(twin, target, name="twin"), NGramDrafter(VOCABULARY)]


def padded_prompts(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(1, VOCABULARY, (len(PADDING), PROMPT), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(PROMPT) >= torch.tensor(PADDING)[:, None]).long()
    return ids * mask, mask


def own_texts(model, ids, mask) -> list[list[int]]:
    """What the model's own generate continues every row with, alone."""
    texts = []
    for row, seen in zip(ids, mask.bool()):
        prompt = row[seen][None]
        text = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS, do_sample=False)
        texts.append(text[0, prompt.shape[1] :].tolist())
    return texts


def texts_of(*lengths: int) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(3)
    return [torch.randint(VOCABULARY, (length,), generator=random) for length in lengths]
