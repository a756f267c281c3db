"""Checkpoints of heads in every format, with a small target."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY, DRAFTED, WIDTH, LAYERS = 40, 25, 16, 8
HEADS, KV, INNER = 4, 2, 20


@pytest.fixture(scope="module")
def target():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3, eos_token_id=None, bos_token_id=None,
        pad_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval().requires_grad_(False)


@dataclass
class Case:
    """A format: how its files name things, and what its configuration leaves open."""

    config: dict[str, Any]
    layer: str
    """Prefix of the layer's tensors."""
    norms: dict[str, int]
    """Names of norms outside the layer, and their widths."""
    width: int = WIDTH
    head_dim: int = WIDTH // HEADS
    layers: tuple[int, ...] = (2, LAYERS // 2, LAYERS - 3)
    prefix: str = ""
    fc: str = "fc"
    fc_bias: bool = False
    in_layer: tuple[str, ...] = ("input_layernorm", "hidden_norm")
    biases: tuple[str, ...] = ()
    embedding: str = "none"
    """none, the target's, or own."""
    output: str = "own"
    mapped: bool = True
    residual_normed: bool = False
    feeds_norm: bool = False
    first: bool = False
    """EAGLE-1 or -2."""
    frequency: Any = None
    """Of pair j as a function of (j, theta), and the factor of cosine and sine."""
    theta: float = 10000.0
    eps: float = 1e-6
    extra: dict[str, torch.Tensor] = field(default_factory=dict)
    final: str = "norm"


def plain(config: dict[str, Any]) -> dict[str, Any]:
    return {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": WIDTH, "num_attention_heads": HEADS,
            "num_key_value_heads": KV, "intermediate_size": INNER, "num_hidden_layers": 7, "vocab_size": VOCABULARY,
            "hidden_act": "silu"} | config  # fmt: skip


def speculators(kind: str, layer: dict[str, Any], **config) -> dict[str, Any]:
    return {"speculators_model_type": kind, "transformer_layer_config": plain(layer), "speculators_config": {"algorithm": kind},
            **config}  # fmt: skip


def llama3(j: int, size: int, theta: float, factor=8.0, low=1.0, high=4.0, context=32) -> float:
    frequency = theta ** (-2 * j / size)
    wave = 2 * math.pi / frequency
    if wave < context / high:
        return frequency
    if wave > context / low:
        return frequency / factor
    share = (context / wave - low) / (high - low)
    return (1 - share) * frequency / factor + share * frequency


def yarn(j: int, size: int, theta: float, factor=4.0, context=32) -> float:
    def place(turns):
        return size * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(place(32)), 0), min(math.ceil(place(1)), size - 1)
    share = min(max((j - low) / (high - low), 0), 1)
    frequency = theta ** (-2 * j / size)
    return frequency / factor * share + frequency * (1 - share)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
CASES = {
    "official": Case(plain({"rms_norm_eps": 1e-5, "draft_vocab_size": DRAFTED}), "midlayer.", {"norm": WIDTH}, eps=1e-5),
    "official, whole vocabulary": Case(
        plain({"head_dim": 6, "rope_theta": 500.0}), "model.midlayer.", {"norm": WIDTH}, head_dim=6, theta=500.0,
        prefix="model.", output="none", mapped=False, embedding="target",
        extra={"model.midlayer.self_attn.rotary_emb.inv_freq": torch.ones(3)},
    ),
    "SpecForge": Case(
        plain({"hidden_size": 12, "target_hidden_size": WIDTH, "head_dim": 6, "draft_vocab_size": DRAFTED, "norm_output": True,
               "rope_parameters": {"rope_theta": 300.0, **LLAMA3}, "use_aux_norm": True, "use_cache": True,
               "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 7]}}),
        "midlayer.", {"norm": 12, "aux_norm_low": WIDTH, "aux_norm_mid": WIDTH, "aux_norm_high": WIDTH}, width=12, head_dim=6,
        layers=(1, 3, 7), embedding="own", feeds_norm=True, theta=300.0, frequency=(llama3, 1.0),
    ),
    "speculators": Case(
        speculators("eagle3", {"attention_bias": True, "mlp_bias": True, "rope_theta": 700.0}, draft_vocab_size=DRAFTED,
                    norm_before_fc=True, eagle_aux_hidden_state_layer_ids=[0, 5]),
        "layers.0.", {"norm": WIDTH, "input_norm": 2 * WIDTH}, layers=(0, 5), embedding="own", residual_normed=True,
        biases=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
                "mlp.down_proj"), theta=700.0,
    ),
    "speculators of Qwen3": Case(
        speculators("eagle3", {"model_type": "qwen3", "head_dim": 8, "rope_scaling": {"type": "yarn", "factor": 4.0},
                               "max_position_embeddings": 32}, norm_before_residual=False, fc_norm=True),
        "layers.0.", {"norm": WIDTH, "fc_norm.0": WIDTH, "fc_norm.1": WIDTH, "fc_norm.2": WIDTH}, head_dim=8,
        in_layer=("input_layernorm", "hidden_norm", "self_attn.q_norm", "self_attn.k_norm"), embedding="target",
        frequency=(yarn, 0.1 * math.log(4.0) + 1),
    ),
    "EAGLE-1": Case(
        plain({"rope_scaling": {"type": "linear", "factor": 2.0}}), "layers.0.", {}, layers=(LAYERS,), fc_bias=True,
        in_layer=(), embedding="target", output="none", mapped=False, first=True,
        frequency=(lambda j, size, theta: theta ** (-2 * j / size) / 2, 1.0),
    ),
    "EAGLE-2 of Qwen2": Case(
        plain({"rms_norm_eps": 1e-5, "qkv_bias": True}), "layers.0.", {}, layers=(LAYERS,), in_layer=(), output="none",
        mapped=False, first=True, biases=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), eps=1e-5,
    ),
    "speculators of EAGLE": Case(
        speculators("eagle", {}, layernorms=True, fusion_bias=True), "transformer.",
        {"embedding_layernorm": WIDTH, "pre_lm_head_layernorm": WIDTH}, layers=(LAYERS,), fc="fusion_fc", fc_bias=True,
        in_layer=("input_layernorm",), mapped=False, first=True, final="pre_lm_head_layernorm",
    ),
}  # fmt: skip


def tensors_of(case: Case, target, seed: int = 0, own_embedding: bool = True) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)

    def some(*shape: int, mean: float = 0.0) -> torch.Tensor:
        return mean + 0.3 * torch.randn(shape, generator=random, dtype=torch.float64)

    width, size, layer = case.width, case.head_dim, case.layer
    read = 2 * width if not case.first else width
    tensors = {f"{case.prefix}{case.fc}.weight": some(width, 2 * width if case.first else len(case.layers) * WIDTH)}
    if case.fc_bias:
        tensors[f"{case.fc}.bias"] = some(width)
    rows = {
        "self_attn.q_proj": (HEADS * size, read), "self_attn.k_proj": (KV * size, read), "self_attn.v_proj": (KV * size, read),
        "self_attn.o_proj": (width, HEADS * size), "mlp.gate_proj": (INNER, width), "mlp.up_proj": (INNER, width),
        "mlp.down_proj": (width, INNER),
    }  # fmt: skip
    for name, shape in rows.items():
        tensors[f"{layer}{name}.weight"] = some(*shape)
        if name in case.biases:
            tensors[f"{layer}{name}.bias"] = some(shape[0])
    for name in (*case.in_layer, "post_attention_layernorm"):
        tensors[f"{layer}{name}.weight"] = some(size if name.startswith("self_attn") else width, mean=1)
    tensors |= {f"{case.prefix}{name}.weight": some(wide, mean=1) for name, wide in case.norms.items()}
    if case.output == "own":
        tensors["lm_head.weight"] = some(DRAFTED if case.mapped else VOCABULARY, width)
    if case.mapped:
        ids = torch.randperm(VOCABULARY, generator=random)[:DRAFTED].sort().values
        tensors |= {"d2t": ids - torch.arange(DRAFTED), "t2d": torch.zeros(VOCABULARY).index_fill(0, ids, 1).bool()}
    if case.embedding == "own" and (own_embedding or width != WIDTH):
        tensors[f"{case.prefix}embed_tokens.weight"] = some(VOCABULARY, width)
    elif case.embedding != "none":
        tensors[f"{case.prefix}embed_tokens.weight"] = target.get_input_embeddings().weight.clone()
    return tensors | {name: one.clone() for name, one in case.extra.items()}


def write(folder: Path, case: Case, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(case.config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def spoil(official, config: dict[str, Any] | None = None, **tensors: torch.Tensor | None) -> Path:
    """The official head with other settings and tensors; None takes one away. A dot in a name is written __."""
    folder, given = official
    for name, tensor in tensors.items():
        key = name.replace("__", ".")
        given = {**given, key: tensor} if tensor is not None else {one: given[one] for one in given if one != key}
    changed = {**CASES["official"].config, **(config or {})}
    return write(folder, replace(CASES["official"], config=changed), given)
