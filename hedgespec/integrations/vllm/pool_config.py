"""Reads the pool of drafters of an engine: a JSON object, in a file or in an environment variable.

    {"drafters": [{"name": "small", "type": "causal_lm", "model": "/models/small"},
                  {"name": "lookup", "type": "ngram", "max_ngram": 3},
                  {"name": "sql", "type": "datastore", "path": "/stores/sql.safetensors"}],
     "learner": "normal_hedge", "objective": "throughput", "log_every": 60}

It may also have the keys in `LEARNING`, `seed`, and `log_every`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from hedgespec.config import DecodeConfig
from hedgespec.errors import PoolError
from hedgespec.learners import Learner, make
from hedgespec.selection.arms import ARMS
from hedgespec.selection.selector import new_learner

VARIABLE = "HEDGESPEC_POOL"
"""The environment variable that holds the pool: a path, or the JSON itself."""
LEARNING = ("learner", "learner_options", "prior", "objective", "evaluate_every", "warm_start")
"""Keys of a pool that configure selection: fields of `DecodeConfig`, and options and prior of the learner."""
TOKENS_ONLY = MappingProxyType({"warm_start": 4, "evaluate_every": 1})
"""Defaults for engines that show only tokens. The warm start is short, because tokens of the prompt say little about the
drafters, and nothing about prompt lookup; every round is evaluated, because that costs little. Measured in docs/engines.md."""
OPTIONS: dict[str, dict[str, type]] = {
    "causal_lm": {"model": str, "dtype": str, "max_cache_tokens": int},
    "ngram": {"max_ngram": int},
    "datastore": {"path": str},
    "drafter": {"factory": str, "options": dict},
    "eagle3": {"model": str},
}
"""Options of each type of drafter."""
NEEDED = {"causal_lm": ("model",), "datastore": ("path",), "drafter": ("factory",), "eagle3": ("model",)}
"""Options without a default."""


@dataclass(frozen=True)
class DrafterEntry:
    """One drafter of the pool."""

    name: str
    type: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pool:
    """The drafters and options of an engine."""

    drafters: tuple[DrafterEntry, ...]
    decode: DecodeConfig
    seed: int
    """Seed of the draws of drafters."""
    log_every: float
    """Seconds between two lines in the log; 0 for none."""
    source: str
    """Place where it was found, for messages."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(entry.name for entry in self.drafters)


def read_pool(
    draft_length: int, types: tuple[str, ...], *, defaults: Mapping[str, Any] = MappingProxyType({}),
    environment: Mapping[str, str] = os.environ, seed: int = 0,
) -> Pool:  # fmt: skip
    """Returns the pool in the environment variable `HEDGESPEC_POOL`, or in the file that it names.

    Args:
        draft_length: K, the engine's number of speculative tokens.
        types: types of drafters that the engine can run.
        defaults: values of keys in `LEARNING` that the pool leaves out; other keys have the defaults of `DecodeConfig`.
        environment: the environment variables.
        seed: the seed if the pool has none.

    Raises: PoolError, a ValueError, that names the place and the fault.
    """
    given = environment.get(VARIABLE, "").strip()
    if not given:
        raise PoolError(
            f"{VARIABLE}: expected a path to a JSON file, or JSON, that describes the pool of drafters, got nothing"
        )
    if given.startswith("{"):
        source, text = VARIABLE, given
    else:
        source = given
        try:
            text = Path(given).expanduser().read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise PoolError(f"{VARIABLE}: expected a readable JSON file, or JSON, got {given} ({error})") from error
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise PoolError(f"{source}: expected JSON, got an error in line {error.lineno}: {error.msg}") from error
    if not isinstance(found, dict):
        raise PoolError(f"{source}: expected a JSON object, got {type(found).__name__}")
    known = {"drafters", "seed", "log_every", *LEARNING}
    if strange := sorted(set(found) - known):
        raise PoolError(f"{source}: expected keys among {', '.join(sorted(known))}, got {', '.join(strange)}")
    drafters = _entries(found.get("drafters"), types, source)
    return Pool(
        drafters, _decode(found, draft_length, len(drafters), source, defaults), _number(found, "seed", seed, int, source),
        _number(found, "log_every", 60.0, (int, float), source), source,
    )  # fmt: skip


def _entries(found: Any, types: tuple[str, ...], source: str) -> tuple[DrafterEntry, ...]:
    if not isinstance(found, list) or not found:
        raise PoolError(f"{source}: drafters: expected a list of at least one drafter, got {found!r}")
    entries = tuple(_entry(one, f"{source}: drafters[{index}]", types) for index, one in enumerate(found))
    names = [entry.name for entry in entries]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise PoolError(f"{source}: drafters: expected distinct names, got {', '.join(twice)} more than once")
    return entries


def _entry(found: Any, where: str, types: tuple[str, ...]) -> DrafterEntry:
    if not isinstance(found, dict):
        raise PoolError(f"{where}: expected an object, got {found!r}")
    kind = found.get("type")
    if kind not in types:
        raise PoolError(f"{where}: type: expected one of {', '.join(types)}, got {kind!r}")
    name = found.get("name", kind)
    if not isinstance(name, str) or not name:
        raise PoolError(f"{where}: name: expected a text, got {name!r}")
    options = {key: value for key, value in found.items() if key not in ("name", "type")}
    allowed = OPTIONS[kind]
    if strange := sorted(set(options) - set(allowed)):
        raise PoolError(
            f"{where}: expected options among {', '.join(sorted(allowed))} for type {kind}, got {', '.join(strange)}"
        )
    for needed in NEEDED.get(kind, ()):
        if needed not in options:
            raise PoolError(f"{where}: {needed}: expected one for type {kind}, got none")
    for key, value in options.items():
        if not isinstance(value, allowed[key]) or isinstance(value, bool):
            raise PoolError(f"{where}: {key}: expected {allowed[key].__name__}, got {value!r}")
    return DrafterEntry(name, kind, options)


def _decode(found: dict, draft_length: int, count: int, source: str, defaults: Mapping[str, Any]) -> DecodeConfig:
    given = {**defaults, **{key: found[key] for key in LEARNING if key in found}}
    prior, options = given.pop("prior", None), given.pop("learner_options", {})
    try:
        if prior is not None or options:
            given["learner"] = _learner(given, draft_length, count, prior, options)
        config = DecodeConfig(draft_length=draft_length, proposal="argmax", **given)
        new_learner(config, count)
    except (TypeError, ValueError) as error:
        raise PoolError(f"{source}: {error}") from error
    return config


def _learner(given: Mapping[str, Any], draft_length: int, count: int, prior: Any, options: Any) -> Callable[[int], Learner]:
    """Returns a function that makes the learner of the pool, with its options and its prior over the drafters."""
    arms = ARMS.get(given.get("objective", DecodeConfig.objective))
    name = given.get("learner", DecodeConfig.learner)
    if not isinstance(options, Mapping):
        raise TypeError(f"learner_options: expected an object, got {options!r}")
    if prior is not None:
        prior = np.array(prior, dtype=np.float64)
        if prior.shape != (count,):
            raise ValueError(f"prior: expected shape ({count},), got {prior.shape}")
        prior = prior if arms is None else arms.spread(prior, draft_length)
    return partial(make, name, prior=prior, **options)


def _number(found: dict[str, Any], key: str, default: float, kind: Any, source: str) -> Any:
    value: Any = found.get(key, default)
    if not isinstance(value, kind) or isinstance(value, bool) or value < 0:
        raise PoolError(f"{source}: {key}: expected a number of at least 0, got {value!r}")
    return value
