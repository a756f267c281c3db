"""Small random models of many architectures, and how each is decoded: the list behind docs/compatibility.md."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY, WINDOW = 61, 8
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "initializer_range": 0.3, "init_std": 0.3,
    "eos_token_id": None, "bos_token_id": None, "pad_token_id": 0, "tie_word_embeddings": False,
    "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256, "n_ctx": 256, "n_inner": 48, "rotary_dim": 4,
    "d_model": 32, "ffn_dim": 48, "word_embed_proj_dim": 32, "num_heads": 4, "n_heads": 4, "n_layers": 3, "num_layers": 3,
    "decoder_layers": 3, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "encoder_layers": 1, "attention_heads": 4,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1,
    "moe_num_experts": 4, "moe_topk": 2, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "sliding_window": WINDOW, "attention_window": WINDOW, "window_size": WINDOW, "max_seq_len": 256,
    "attention_chunk_size": WINDOW, "expansion_ratio": 2, "intermediate_size_mlp": 32, "kv_channels": 8,
    "is_decoder": True, "add_cross_attention": False, "layer_types": None, "mlp_layer_types": None,
}  # fmt: skip
"""Options for every configuration that has them."""
LATENT = {"num_key_value_heads": 4, "v_head_dim": 16, "head_dim": None}
"""Latent attention with values wider than keys."""


@dataclass(frozen=True)
class Architecture:
    """A small configuration and what is expected of it."""

    name: str
    """The configuration's `model_type`."""
    options: dict[str, Any] = field(default_factory=dict)
    """What differs from `SMALL`; None leaves an option out."""
    rows: str = "together"
    """How a batch is decoded: "together" in one forward, draft trees too; "one by one", without trees; "unpadded", one by one
    and no padding is taken."""
    dtype: torch.dtype = torch.float64
    """float32 where plain decoding itself gives NaN for a padded batch in float64."""
    seed: int = 1
    spread: float = 0.3
    """Of the embeddings: so small, or so large, that texts are no constant."""
    note: str = ""


def _all(names: str, **common) -> tuple[Architecture, ...]:
    return tuple(Architecture(name, **common) for name in names.split())


ARCHITECTURES = (
    *_all(
        """llama qwen2 qwen3 mistral ministral phi phi3 phimoe gemma gemma3_text cohere cohere2 cohere2_moe olmo olmo2 olmo3
        olmoe flex_olmo granite granitemoe glm glm4 gpt2 gpt_bigcode gptj codegen gpt_neox opt biogpt bert-generation
        stablelm starcoder2 persimmon nemotron smollm3 helium apertus arcee bitnet seed_oss mixtral
        qwen2_moe qwen3_moe gpt_oss jetmoe dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe hunyuan_v1_dense llama4_text afmoe
        aria_text"""
    ),
    *_all("bert big_bird roberta", spread=3.0, seed=2),
    *_all("camembert", spread=3.0, seed=4),
    *_all("gemma2 vaultgemma", dtype=torch.float32),
    Architecture("deepseek_v2", LATENT),
    Architecture("deepseek_v3", LATENT),
    *_all("bloom mpt", rows="one by one", dtype=torch.float32, note="ALiBi"),
    Architecture("falcon", {"alibi": True, "num_key_value_heads": None, "head_dim": None}, "one by one", torch.float32,
                 note="with `alibi=True`"),
    Architecture("gpt_neo", {"attention_types": [[["global", "local", "global"], 1]], "window_size": 4}, "one by one",
                 note="local attention masks by slot"),
    *_all("bart blenderbot", rows="unpadded", note="the decoder alone; positions count padding"),
)  # fmt: skip
QUICK = {"llama", "gemma3_text", "gpt2", "gpt_neo", "bloom", "bart"}
"""Those that are not marked slow."""
REFUSED = {
    "t5": "encoder-decoder", "mamba": "recurrent state", "jamba": "recurrent state", "recurrent_gemma": "recurrent state",
    "qwen3_next": "recurrent state", "rwkv": "recurrent state", "xlnet": "no key-value cache",
    "openai-gpt": "no key-value cache", "cpmant": "prompts of its own before the text",
}  # fmt: skip
"""Architectures that are refused, and why; tests/test_target.py shows it."""


def configuration(architecture: Architecture):
    """Returns the small configuration; raises KeyError if the installed transformers does not know the architecture."""
    kind = CONFIG_MAPPING[architecture.name]
    standard = kind()
    options = {name: value for name, value in SMALL.items() if hasattr(standard, name)} | architecture.options
    options = {name: value for name, value in options.items() if value is not None or name in NONE}
    config = kind(**options)
    config.is_encoder_decoder = False
    config._experts_implementation = "eager"
    return config


NONE = {"eos_token_id", "bos_token_id", "layer_types", "mlp_layer_types"}
"""Options for which None means something."""


def build(architecture: Architecture):
    """Returns a random model in eval mode."""
    config = configuration(architecture)
    torch.manual_seed(architecture.seed)
    model = transformers.AutoModelForCausalLM.from_config(config).to(architecture.dtype).eval()
    for weight in model.parameters():
        if weight.ndim >= 2:
            weight.data = 0.3 * torch.randn(weight.shape, dtype=weight.dtype)
    model.get_input_embeddings().weight.data *= architecture.spread
    settings = model.generation_config
    settings.eos_token_id, settings.bos_token_id, settings.pad_token_id = None, None, 0
    settings.forced_eos_token_id = settings.forced_bos_token_id = None
    return model
