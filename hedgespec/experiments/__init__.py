"""The claims this project rests on, each measured by one command: `hedgespec experiment NAME`.

An experiment is a module here with an `EXPERIMENT`: what it measures, as numbers that JSON can hold, and how they are told and
drawn. Most replay learners over recorded acceptance (`traces.py`, `recordings.py`), which takes no model once it is recorded.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hedgespec.files import replacing, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

    from hedgespec.experiments.laboratory import Laboratory

NAMES = (
    "baseline", "selection", "pool-size", "delay", "estimator", "shift", "heterogeneous", "open-questions", "features",
)  # fmt: skip
"""What can be run, in the order in which docs/results.md tells it."""
PACKAGES = {"scipy": "scipy", "sklearn": "scikit-learn", "matplotlib": "matplotlib"}
"""What experiments need beside the package's own dependencies: modules, and what pip calls them."""


@dataclass(frozen=True)
class Experiment:
    """What a module of this package offers."""

    name: str
    title: str
    """A few words, the heading in docs/results.md."""
    question: str
    """What is asked, and how the answer is found, in a short paragraph of Markdown."""
    measure: Callable[[Laboratory], dict[str, Any]]
    """Numbers, lists, strings and dictionaries of them. Long steps go through `Laboratory.once`."""
    tell: Callable[[dict[str, Any]], str]
    """The result as Markdown: tables, beside the paper's figures where it has some, and a sentence or two on what agrees, what
    does not and why; every number in them comes from the result."""
    draw: Callable[[dict[str, Any]], Figure]
    """The result as a figure."""


def load(name: str) -> Experiment:
    """The experiment of this name. Raises ValueError for one that does not exist."""
    if name not in NAMES:
        raise ValueError(f"name: expected one of {', '.join(NAMES)}, got {name!r}")
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}").EXPERIMENT


def run(names: Iterable[str], folder: Path, *, seeds: int = 20, fresh: bool = False, console: Console | None = None) -> None:
    """Runs experiments and writes NAME.json, NAME.md, NAME.png and NAME.svg of each under a folder.

    What an interrupted run had finished is not done again: recorded traces, under `traces`, and long steps, under `parts`.

    Args:
        names: of `NAMES`.
        folder: where everything goes.
        seeds: runs of each learner over each text, >= 2.
        fresh: forget the long steps that are done; traces stay.
        console: where progress goes.

    Raises: ValueError for an argument outside its range; ImportError where a package of the extra `experiments` is missing.
    """
    if seeds < 2:
        raise ValueError(f"seeds: expected at least 2, got {seeds}")
    if missing := [name for module, name in PACKAGES.items() if find_spec(module) is None]:
        raise ImportError(f"experiments need {', '.join(missing)}: pip install 'hedgespec[experiments]'")
    from hedgespec.experiments.laboratory import Laboratory

    experiments = [load(name) for name in names]
    for experiment in experiments:
        laboratory = Laboratory(folder, experiment.name, seeds=seeds, fresh=fresh, console=console)
        result = {**laboratory.circumstances(), **experiment.measure(laboratory)}
        write(experiment, result, folder)
        laboratory.console.print(f"{experiment.name}: {folder / experiment.name}.md", soft_wrap=True)


def write(experiment: Experiment, result: dict[str, Any], folder: Path) -> None:
    """The four files of a result."""
    from matplotlib import pyplot

    stem = folder / experiment.name
    stem.parent.mkdir(parents=True, exist_ok=True)
    write_text(stem.with_suffix(".json"), json.dumps(result, indent=1) + "\n")
    write_text(stem.with_suffix(".md"), experiment.tell(result))
    figure = experiment.draw(result)
    for suffix in (".png", ".svg"):
        with replacing(stem.with_suffix(suffix)) as fresh:
            figure.savefig(fresh, dpi=110)
    pyplot.close(figure)
