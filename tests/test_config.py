"""Documented defaults against the code, and what a configuration makes of numbers of any kind."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from hedgespec import decoder
from hedgespec.cli import parser
from hedgespec.config import DecodeConfig, Tree
from hedgespec.decoder import Decoder
from hedgespec.drafters.datastore import MAX_NGRAM, Datastore
from hedgespec.drafters.ngram import NGramDrafter
from hedgespec.integrations.transformers import processors
from hedgespec.integrations.vllm.pool_config import TOKENS_ONLY, read_pool
from hedgespec.ops.sampling import Sampling

ROOT = Path(__file__).parent.parent


def stated(documented: type) -> dict[str, str]:
    """The default that a class's docstring states for each argument."""
    text = inspect.getdoc(documented)
    arguments = re.search(r"^Args:\n(.*?)(?:\n\n|\Z)", text, re.DOTALL | re.MULTILINE)[1]
    entries = re.split(r"\n(?=    \w+: )", arguments)
    found = {}
    for entry in entries:
        name, words = " ".join(entry.split()).split(": ", 1)
        default = re.search(r"Default: ([^ ]+)\.$", words)
        found[name] = default[1] if default else ""
    return found


@pytest.mark.parametrize("documented", [DecodeConfig, Sampling, Tree])
def test_docstrings_state_the_defaults_of_the_code(documented):
    expected = {}
    for field in dataclasses.fields(documented):
        value = field.default_factory() if field.default is dataclasses.MISSING and field.name != "branching" else field.default
        expected[field.name] = (
            "" if value is dataclasses.MISSING else json.dumps(value) if isinstance(value, str) else repr(value)
        )
    assert stated(documented) == expected


def test_prose_states_the_defaults_of_the_code():
    config, pages = DecodeConfig(), {page.stem: page.read_text() for page in (ROOT / "docs").glob("*.md")}
    usage, engines, trees = (" ".join(pages[name].split()) for name in ("usage", "engines", "trees"))
    rows = dict(re.findall(r"^\| `(\w+)` \| `?(.+?)`? \|", pages["usage"], flags=re.MULTILINE))
    for field in dataclasses.fields(config):
        shown = rows[field.name].strip('"')
        assert shown == str(getattr(config, field.name)), field.name
    assert f"`{config.learner}` | every drafter's loss | the default" in usage
    assert config.tree is None and "A chain is the default" in trees
    assert f"`evaluate_every` is {TOKENS_ONLY['evaluate_every']}; use" in engines
    assert f"`warm_start` is {TOKENS_ONLY['warm_start']}: of" in engines
    pool = read_pool(4, ("ngram",), environment={"HEDGESPEC_POOL": '{"drafters": [{"name": "a", "type": "ngram"}]}'})
    assert f"(default {pool.log_every:g}, 0 for none)" in engines
    assert f"`max_ngram`: default {inspect.signature(NGramDrafter).parameters['max_ngram'].default} |" in engines
    module = " ".join(decoder.__doc__.split())
    assert f'`evaluate_every="{config.evaluate_every}"` and `warm_start={config.warm_start}`' in module
    assert "`DecodeConfig(evaluate_every=1, warm_start=0)`" in module


def test_the_command_line_has_the_defaults_of_the_code():
    parsed = parser._parser().parse_args(["generate", "x"])
    for name in ("draft_length", "proposal", "learner", "objective", "evaluate_every", "warm_start"):
        assert getattr(parsed, name) == getattr(DecodeConfig(), name)
    assert parsed.temperature == Sampling().temperature
    assert parsed.max_new_tokens == inspect.signature(Decoder.generate).parameters["max_new_tokens"].default
    built = parser._parser().parse_args(["datastore", "x", "y", "--tokenizer", "z"])
    assert built.max_ngram == MAX_NGRAM == inspect.signature(Datastore.build).parameters["max_ngram"].default


# Numbers of any kind


KINDS = [
    np.int64, np.uint8, np.array, lambda value: np.array([value]), torch.tensor, lambda value: torch.tensor([value]),
    lambda value: torch.tensor(value, dtype=torch.int32),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_integers_of_any_kind_are_kept_as_ints(kind):
    given = {"draft_length": 4, "evaluate_every": 2, "warm_start": 8, "drafter_window": 64}
    config = DecodeConfig(**{name: kind(value) for name, value in given.items()})
    assert config == DecodeConfig(**given)
    assert all(type(getattr(config, name)) is int for name in given)
    if np.ndim(kind(3)) == 0:  # else it is a sequence
        assert Tree(kind(3), kind(9)) == Tree(3, 9)
        hash(Tree(kind(3), kind(9)))
    assert DecodeConfig(tree=Tree([kind(2)] * 5)).tree == Tree((2,) * 5)


@pytest.mark.parametrize("branching", [[4, 2, 1, 1, 1], np.array([4, 2, 1, 1, 1]), torch.tensor([4, 2, 1, 1, 1])])
def test_branching_may_be_any_sequence(branching):
    assert Tree(branching) == Tree((4, 2, 1, 1, 1))


WRONG = ("1", 1.5, None, True, np.bool_(True), np.float64(2), torch.tensor(2.0), torch.tensor([1, 2]), [1], {}, 1j)


@pytest.mark.parametrize("name", ["draft_length", "evaluate_every", "warm_start", "drafter_window"])
def test_what_is_no_integer_is_refused(name):
    for value in WRONG:
        if value is None and name == "drafter_window":
            continue
        with pytest.raises(TypeError, match=rf'{name}: expected an int( or None| or "adaptive")?, got'):
            DecodeConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "expected", "wrong"),
    [
        ("compile", "a bool", (0, 1, "false", torch.tensor(True))),
        *((name, "a str", (3, None, ["tokens"], torch.zeros(2))) for name in ("proposal", "objective", "backend")),
        ("learner", "a name, or a function that returns a learner", (3, None, ["normal_hedge"])),
    ],
)  # fmt: skip
def test_other_options_of_another_type_are_refused(name, expected, wrong):
    for value in wrong:
        with pytest.raises(TypeError, match=f"{name}: expected {expected}"):
            DecodeConfig(**{name: value})
    if expected.startswith("a bool"):
        assert getattr(DecodeConfig(**{name: np.bool_(True)}), name) is True


@pytest.mark.parametrize("kind", [float, np.float32, np.float64, torch.tensor, lambda value: torch.tensor([value])])
def test_sampling_keeps_plain_numbers(kind):
    found = Sampling(kind(0.5), np.int64(5), kind(0.25), kind(0.125))
    assert found == Sampling(0.5, 5, 0.25, 0.125)
    assert [type(value) for value in dataclasses.astuple(found)] == [float, int, float, float]
    assert Sampling(1) == Sampling(1.0)


def test_sampling_refuses_what_is_no_number():
    for name in ("temperature", "top_p", "min_p"):
        for value in ("1", True, torch.tensor([0.5, 0.5]), [0.5], 1j):
            with pytest.raises(TypeError, match=f"{name}: expected a number"):
                Sampling(**{name: value})
    for value in (1.5, "5", True, torch.tensor(1.0)):
        with pytest.raises(TypeError, match="top_k: expected an int or None"):
            Sampling(top_k=value)
    for name in ("temperature", "top_p", "min_p"):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            Sampling(**{name: float("nan")})
    assert processors.Sampling is Sampling
