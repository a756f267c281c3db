"""Every key of a head's config.json with every wrong type, at every place: one CheckpointError that names the key."""

from __future__ import annotations

import itertools
import json
import math
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoint_cases import CASES, LLAMA3, spoil, target, tensors_of, write  # noqa: F401  fixtures
from safetensors.torch import save_file

from hedgespec.drafters.checkpoint_schema import EAGLE, FILE, FLAG, HEAD, LAYERS, OBJECT, ROPE, SIZE, TEXT, read_config
from hedgespec.drafters.checkpoints import inspect_drafter, load_drafter
from hedgespec.errors import CheckpointError

VALUES: tuple[Any, ...] = (
    "8", "false", "abc", "", 4, -1, 0, 0.5, 1e300, -2.5, math.nan, math.inf, True, False, [], [1, None, 6], [1, 2, 2], ["a"],
    [-1], [[1]], {}, {"a": 1}, [{}], 10**30,
)  # fmt: skip
"""Everything that JSON, and Python's reader of it, can hold."""
RIGHT: dict[Any, Any] = {SIZE: 8, FLAG: True, TEXT: "abc", OBJECT: {}, LAYERS: [1, 2, 5]}
PLACES = [
    *(((), table, key) for table in (FILE,) for key in table),
    *((("transformer_layer_config",), HEAD, key) for key in HEAD),
    *((("eagle_config",), EAGLE, key) for key in EAGLE),
    *(((name,), ROPE, key) for name in ("rope_scaling", "rope_parameters") for key in ROPE),
    *((("transformer_layer_config", "rope_scaling"), ROPE, key) for key in ROPE),
]


@pytest.fixture(scope="module")
def head(target, tmp_path_factory):
    folder = tmp_path_factory.mktemp("schema")
    tensors = tensors_of(CASES["official"], target)
    write(folder, CASES["official"], tensors)
    return folder, tensors


def set_at(folder: Path, place: tuple[str, ...], key: str, value: Any, **more: Any) -> None:
    config = json.loads(json.dumps(CASES["official"].config | more))
    inner = config
    for name in place:
        inner = inner.setdefault(name, {})
    inner[key] = value
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(("place", "table", "key"), PLACES, ids=lambda one: one if isinstance(one, str) else "")
def test_every_key_with_every_wrong_value_is_named_in_a_checkpoint_error(head, target, place, table, key):
    folder, wrong = head[0], 0
    for value in VALUES:
        set_at(folder, place, key, value)
        if table[key].holds(value):  # the right type: whatever else is wrong with it is told the same way
            with suppress(CheckpointError):
                load_drafter(folder, target)
            continue
        wrong += 1
        with pytest.raises(CheckpointError) as caught:
            load_drafter(folder, target)
        name = ".".join((*place, key))
        assert f"expected {table[key].expected} as {name} in config.json, got " in str(caught.value)
    assert wrong >= 8


def test_all_faults_come_in_one_error(head, target):
    folder, tensors = head
    config = {"rope_theta": "abc", "rope_scaling": LLAMA3 | {"factor": "8"}, "norm_before_residual": "false",
              "eagle_aux_hidden_state_layer_ids": [1, None, 6], "hidden_act": 3, "eagle_config": []}  # fmt: skip
    write(folder, CASES["official"], {name: one for name, one in tensors.items() if name != "norm.weight"})
    (folder / "config.json").write_text(json.dumps(CASES["official"].config | config))
    with pytest.raises(CheckpointError) as caught:
        load_drafter(folder, target)
    for word in (
        "rope_theta in config.json, got 'abc'", "rope_scaling.factor in config.json, got '8'", "norm.weight is missing",
        "expected true or false as norm_before_residual in config.json, got 'false'", "got [1, None, 6]",
        "expected a text as hidden_act in config.json, got 3", "expected an object as eagle_config in config.json, got []",
    ):  # fmt: skip
        assert word in str(caught.value)
    assert "found none" not in str(caught.value)  # the factor is there
    assert len(inspect_drafter(folder).faults) == 7
    write(folder, CASES["official"], tensors)


@pytest.mark.parametrize("seed", range(4))
def test_random_configurations_raise_nothing_else(head, target, seed):
    """Several keys at once, right ones among them, so that what comes after the schema is reached as well."""
    folder, draw = head[0], random.Random(seed)
    for _ in range(60):
        config: dict[str, Any] = {"rope_scaling": dict(LLAMA3)} if draw.random() < 0.5 else {}
        for place, table, key in draw.sample(PLACES, 4):
            inner = config
            for name in place:
                inner = inner.setdefault(name, {}) if isinstance(inner, dict) else None
            if isinstance(inner, dict):
                inner[key] = draw.choice([*VALUES, RIGHT.get(table[key], 2.0), None])
        rope = {
            "rope_type": draw.choice(["linear", "llama3", "yarn", "default", "longrope"]),
            "factor": draw.choice([0.1, 4, 1e6]),
        }
        if draw.random() < 0.5:
            config["rope_parameters"] = rope | {draw.choice([*ROPE]): draw.choice([1e-3, 1, 7.5, 1e12])}
        (folder / "config.json").write_text(json.dumps(CASES["official"].config | config))
        with suppress(CheckpointError):
            load_drafter(folder, target)


SHAPES = ((), (0,), (1,), (3,), (0, 0), (1, 1), (2, 3, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_tensors_of_any_shape_raise_nothing_else(head, target, dtype):
    folder, tensors = head
    (folder / "config.json").write_text(json.dumps(CASES["official"].config))
    for name, shape in itertools.product(tensors, SHAPES):
        save_file(tensors | {name: torch.ones(shape).to(dtype)}, folder / "model.safetensors")
        with pytest.raises(CheckpointError):
            load_drafter(folder, target)


@pytest.mark.parametrize("name", ["embed_tokens.weight", "midlayer.self_attn.q_norm.weight", "fc.bias", "input_norm.weight"])
def test_optional_tensors_of_any_shape_raise_nothing_else(head, target, name):
    folder, tensors = head
    (folder / "config.json").write_text(json.dumps(CASES["official"].config))
    for shape in SHAPES:
        save_file(tensors | {name: torch.ones(shape)}, folder / "model.safetensors")
        with pytest.raises(CheckpointError):
            load_drafter(folder, target)


@pytest.mark.parametrize("path", [None, 3, 1.5, [], {}, b"folder"])
def test_a_path_of_another_type_is_refused(target, path):
    with pytest.raises(CheckpointError, match="path: expected a folder, a file or a repository of the hub, got"):
        load_drafter(path, target)
    with pytest.raises(CheckpointError, match="path: expected a folder"):
        inspect_drafter(path)


def test_null_is_an_absent_key_and_unknown_keys_are_not_read(head, target):
    folder, tensors = head
    save_file(tensors, folder / "model.safetensors")
    for key in FILE:
        if key not in ("num_attention_heads", "num_key_value_heads"):
            set_at(folder, (), key, None, strange=[1, {"x": None}])
            load_drafter(folder, target)
    set_at(folder, ("rope_scaling",), "short_factor", [1.0], rope_scaling=dict(LLAMA3))
    head_ = load_drafter(folder, target)
    assert any("rope_scaling.short_factor" in one for one in head_.assumed)
    hash(head_.config)  # stacks are kept by it


def test_a_file_goes_before_its_layer_config():
    read = read_config({"hidden_size": 8, "transformer_layer_config": {"hidden_size": 4, "head_dim": 2}})
    assert read.values == {"hidden_size": 8, "head_dim": 2}
    assert not read.faults and not read.is_speculators


def test_aux_layers_may_be_numbers_of_any_kind(head, target):
    import numpy as np

    folder, tensors = head
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CASES["official"].config))
    for given in (np.array([2, 4, 6]), torch.tensor([2, 4, 6]), [torch.tensor(2), np.int64(4), 6]):
        layers = load_drafter(folder, target, aux_layers=given).aux_layers
        assert layers == (2, 4, 6) and all(type(one) is int for one in layers)
    for given in ("2,4,6", [2, None, 6], [2.5, 4, 6], [True, 4, 6], {2: 4}):
        with pytest.raises(TypeError, match="aux_layers: expected an int or a sequence of ints or None, got"):
            load_drafter(folder, target, aux_layers=given)
    with pytest.raises(ValueError, match="aux_layers: expected at least 0"):
        load_drafter(folder, target, aux_layers=(-1, 2, 4))
    with pytest.raises(TypeError, match="name: expected a str or None, got 3"):
        load_drafter(folder, target, name=3)
