"""The claims this project rests on, each measured by one study: `python bench/studies/run.py NAME` (or `all`).

A study is a module here with a `STUDY`. Most of them replay learners over recorded acceptance (`hedgespec.experiments`), which
needs no model once the texts are recorded. docs/results.md reports the results.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from studies.lab import Lab

NAMES = (
    "baseline", "selection", "pool-size", "delay", "estimator", "shift", "heterogeneous", "open-questions", "features",
)  # fmt: skip
"""All studies, in the order of docs/results.md."""


@dataclass(frozen=True)
class Study:
    """One study."""

    name: str
    """One of `NAMES`."""
    title: str
    measure: Callable[[Lab], dict[str, Any]]
    """Returns numbers, strings, lists and dictionaries of them. Long steps go through `Lab.once`."""
    tables: Callable[[dict[str, Any]], dict[str, str]]
    """Returns Markdown tables by key, from a result alone. docs/results.md includes them by these keys."""
    draw: Callable[[dict[str, Any]], Figure]
    """Returns a figure, from a result alone."""


def load(name: str) -> Study:
    """Returns the study of this name. Raises: ValueError if there is none."""
    if name not in NAMES:
        raise ValueError(f"name: expected one of {', '.join(NAMES)}, got {name!r}")
    return importlib.import_module(f"studies.{name.replace('-', '_')}").STUDY
