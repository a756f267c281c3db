"""Names of the tensors in a head's checkpoint: what other projects put around them, and which tensors a head consists of."""

from __future__ import annotations

import re
from collections.abc import Mapping

from hedgespec.drafters.checkpoint_files import Files
from hedgespec.drafters.eagle import EagleConfig

NORMS = (
    "input_norm", "fc_norm", "embedding_layernorm", "input_layernorm", "hidden_norm", "q_norm", "k_norm", "norm",
)  # fmt: skip
"""Optional norms, in the order of `EagleConfig.norms`."""
REQUIRED: dict[int, tuple[str, ...]] = {1: (), 3: ("input_layernorm", "hidden_norm", "norm")}
"""Version of EAGLE -> the norms among these that every head of it has."""
KNOWN = re.compile(
    r"((?P<matrix>(fc|embed_tokens|lm_head|layer\.(self_attn|mlp)\.\w+_proj)\.weight)|(?P<map>d2t|t2d)|.*norm(\.\d)?\.weight|.*\.bias)$"
)
"""Plain names whose number of dimensions is known: 2 for a `matrix`, 1 for the others."""
FUSED = {"qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "o_proj": ("self_attn.o_proj",),
         "gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"), "down_proj": ("mlp.down_proj",), "fc": ("fc",)}  # fmt: skip
"""Matrix of `EagleHead` -> the tensors of a checkpoint whose rows it concatenates."""
IN_LAYER = {"input_layernorm": "input_layernorm", "hidden_norm": "hidden_norm", "q_norm": "self_attn.q_norm",
            "k_norm": "self_attn.k_norm", "post_attention_layernorm": "post_attention_layernorm"}  # fmt: skip
"""Norm of `EagleHead` -> its name in the layer of a checkpoint."""
HARMLESS = re.compile(r"(^|\.)(inv_freq|cos_cached|sin_cached)$")
"""Buffers that are ignored, because they are computed from the configuration."""
WRAPPERS = re.compile(r"^((model|module|_orig_mod|drafter|draft_model|ea_layer|eagle_module)\.)+")
LAYER = re.compile(r"^(midlayer|transformer|layers\.(?P<number>\d+))\.")
SYNONYMS = {
    "fusion_fc.weight": "fc.weight", "fusion_fc.bias": "fc.bias", "pre_lm_head_layernorm.weight": "norm.weight",
    "aux_norm_low.weight": "fc_norm.0.weight", "aux_norm_mid.weight": "fc_norm.1.weight",
    "aux_norm_high.weight": "fc_norm.2.weight",
}  # fmt: skip


def plain_name(name: str) -> tuple[str, int | None]:
    """Returns the name of a tensor without its wrappers, and the number of the layer that it is in, or None.

    >>> plain_name("model.layers.0.self_attn.q_proj.weight")
    ('layer.self_attn.q_proj.weight', 0)
    >>> plain_name("fusion_fc.weight")
    ('fc.weight', None)
    """
    name = WRAPPERS.sub("", name)
    found = LAYER.match(name)
    if found:
        return f"layer.{name[found.end() :]}", int(found["number"] or 0)
    return SYNONYMS.get(name, name), None


def version_of(files: Files) -> int | None:
    """Returns 3 for an EAGLE-3 head, 1 for one of EAGLE-1 or -2, and None if the tensors are no EAGLE head."""
    shapes = {plain_name(key)[0]: one.shape for key, one in files.tensors.items()}
    if not {"fc.weight", "layer.self_attn.q_proj.weight"} & shapes.keys() or "layer.self_attn.o_proj.weight" not in shapes:
        return None
    queries, output = (shapes.get(f"layer.self_attn.{one}_proj.weight", (0, 0)) for one in "qo")
    if "layer.hidden_norm.weight" in shapes or any("midlayer." in key for key in files.tensors):
        return 3
    if len(queries) == len(output) == 2 and queries[1] == 2 * output[0]:
        return 3
    return 1 if "fc.weight" in shapes else None


def parts_of(stem: str) -> list[str]:
    """Returns the plain names, without ".weight", of the tensors that a parameter of `EagleHead` is made of.

    >>> parts_of("gate_up_proj")
    ['layer.mlp.gate_proj', 'layer.mlp.up_proj']
    >>> parts_of("fc_norm_1")
    ['fc_norm.1']
    """
    if stem in FUSED:
        return [one if stem == "fc" else f"layer.{one}" for one in FUSED[stem]]
    return [f"layer.{IN_LAYER[stem]}" if stem in IN_LAYER else re.sub(r"^fc_norm_", "fc_norm.", stem)]


def rows_of_parts(config: EagleConfig) -> dict[str, tuple[int, ...]]:
    """Returns the number of rows of every part of the fused matrices."""
    kv, heads = config.num_key_value_heads * config.head_dim, config.num_attention_heads * config.head_dim
    return {"qkv_proj": (heads, kv, kv), "gate_up_proj": (config.intermediate_size,) * 2}


def layer_prefix(origins: Mapping[str, str]) -> str:
    """Returns what precedes the names of the layer's tensors in a file, such as "midlayer."; `origins` maps plain names to
    names in the file."""
    name, origin = next((name, origin) for name, origin in origins.items() if name.startswith("layer."))
    return origin.removesuffix(name.removeprefix("layer."))
