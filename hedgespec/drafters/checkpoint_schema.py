"""The schema of a head's config.json: every key that `checkpoints.py` reads, its type and its range.

`read_config` compares a whole configuration with the tables below and returns all faults at once. Keys that are in no table are
not read, whatever they hold; null is the same as an absent key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

MOST = 2**31 - 1
"""Largest size or id."""


@dataclass(frozen=True)
class Kind:
    """The values that a key may have."""

    expected: str
    """Description for errors, after "expected"."""
    holds: Callable[[Any], bool]


def _int(low: int) -> Kind:
    def holds(value: Any) -> bool:
        return type(value) is int and low <= value <= MOST

    return Kind(f"an integer in {low}..{MOST}", holds)


def _number(low: float, high: float, *, above: bool = False) -> Kind:
    def holds(value: Any) -> bool:
        return type(value) in (int, float) and (low < value if above else low <= value) and value <= high

    return Kind(f"a number {'above' if above else 'from'} {low:g}{' up to' if above else ' to'} {high:g}", holds)


def _is_layers(value: Any) -> bool:
    return isinstance(value, list) and all(_int(0).holds(one) for one in value) and len(set(value)) == len(value)


SIZE = _int(1)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("a text", lambda value: isinstance(value, str))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
LAYERS = Kind("a list of distinct aux layers >= 0", _is_layers)
POSITIVE = _number(0, 1e12, above=True)
ANY_NUMBER = _number(-1e12, 1e12)

ROPE: dict[str, Kind] = {
    "rope_type": TEXT, "type": TEXT, "rope_theta": POSITIVE, "partial_rotary_factor": POSITIVE,
    "factor": _number(0, 1e6, above=True), "original_max_position_embeddings": _number(1, MOST), "low_freq_factor": POSITIVE,
    "high_freq_factor": POSITIVE, "attention_factor": POSITIVE, "beta_fast": POSITIVE, "beta_slow": POSITIVE,
    "mscale": ANY_NUMBER, "mscale_all_dim": ANY_NUMBER, "truncate": FLAG,
}  # fmt: skip
"""Keys of `rope_parameters` and `rope_scaling`."""
EAGLE: dict[str, Kind] = {
    "eagle_aux_hidden_state_layer_ids": LAYERS, "use_aux_hidden_state": FLAG, "norm_before_fc": FLAG,
}  # fmt: skip
"""Keys of `eagle_config`."""
HEAD: dict[str, Kind] = {
    "hidden_size": SIZE, "num_attention_heads": SIZE, "num_key_value_heads": SIZE, "head_dim": SIZE, "intermediate_size": SIZE,
    "target_hidden_size": SIZE, "vocab_size": SIZE, "draft_vocab_size": SIZE, "max_position_embeddings": SIZE,
    "hidden_act": TEXT, "rms_norm_eps": _number(0, 1), "logit_scale": ANY_NUMBER, "rope_theta": POSITIVE,
    "partial_rotary_factor": POSITIVE, "rope_parameters": OBJECT, "rope_scaling": OBJECT, "sliding_window": _int(0),
    "use_sliding_window": FLAG, "attention_bias": FLAG, "norm_before_residual": FLAG, "norm_output": FLAG,
    "norm_before_fc": FLAG, "fc_norm": FLAG, "use_aux_norm": FLAG, "eagle_aux_hidden_state_layer_ids": LAYERS,
    "eagle_config": OBJECT,
}  # fmt: skip
"""Keys of config.json and of `transformer_layer_config`."""
FILE: dict[str, Kind] = HEAD | {
    "speculators_model_type": TEXT, "speculators_config": OBJECT, "transformer_layer_config": OBJECT,
}  # fmt: skip
"""Keys of config.json."""
NESTED: dict[str, dict[str, Kind]] = {
    "transformer_layer_config": HEAD, "eagle_config": EAGLE, "rope_parameters": ROPE, "rope_scaling": ROPE,
}  # fmt: skip
"""Key of an object -> its keys."""
SIZES = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")
"""Keys without which no shape can be checked."""


@dataclass(frozen=True)
class HeadSettings:
    """The valid values of a config.json. Keys that are absent, null or at fault are left out."""

    values: dict[str, Any]
    """By key; a value of config.json itself has precedence over one of its `transformer_layer_config`."""
    faults: tuple[str, ...]
    """One for each key of a wrong type or range, with its place in the file."""
    unjudged: bool
    """Whether a size is among the faults."""
    is_speculators: bool
    """Whether the file was written by the `speculators` library."""
    unread: tuple[str, ...] = field(default=())
    """Unknown keys of rotary positions, with their places in the file."""


def read_config(config: Mapping[str, Any]) -> HeadSettings:
    """Compares a configuration with the schema.

    Args:
        config: the object in config.json.

    Returns: the valid values, and every fault.
    """
    faults: list[str] = []
    unread: list[str] = []
    sizes: list[str] = []

    def read(found: Mapping[str, Any], table: Mapping[str, Kind], place: str) -> dict[str, Any]:
        """Returns the valid entries of one object."""
        kept: dict[str, Any] = {}
        for key, value in found.items():
            if value is None:
                continue
            if key not in table:
                if table is ROPE and isinstance(value, dict):
                    faults.append(f"expected positions of one kind, got {place.rstrip('.')} for {key}")
                elif table is ROPE:
                    unread.append(f"{place}{key}")
            elif not table[key].holds(value):
                faults.append(f"expected {table[key].expected} as {place}{key} in config.json, got {_shown(value)}")
                sizes.extend({key} & set(SIZES))
            else:
                kept[key] = read(value, NESTED[key], f"{place}{key}.") if key in NESTED else value
        return kept

    own = read(config, FILE, "")
    layer = own.pop("transformer_layer_config", {})
    speculators = config.get("speculators_model_type") is not None or "speculators_config" in config
    return HeadSettings(layer | own, tuple(faults), bool(sizes), speculators, tuple(unread))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
