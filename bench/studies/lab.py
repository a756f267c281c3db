"""What the studies work with: recorded traces, the zoo, steps that are computed once, and progress."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.progress import track

from hedgespec.experiments.measures import has_full_drafts
from hedgespec.experiments.recording import Trace
from studies.sets import SETS, load_traces, record_set

if TYPE_CHECKING:
    from hedgespec.zoo import Zoo

T = TypeVar("T")


class Lab:
    """The tools of one study.

    Args:
        folder: folder of all studies' results. Traces are stored under `traces`, finished steps under `parts`.
        name: name of the study.
        seeds: number of replays of each learner over each text.
        fresh: compute finished steps again. Traces are kept.
        console: where progress is shown; None is standard output.
    """

    def __init__(self, folder: Path, name: str, *, seeds: int = 20, fresh: bool = False, console: Console | None = None):
        self.folder, self.name, self.seeds, self.console = folder, name, seeds, console or Console()
        self._parts = folder / "parts" / name
        if fresh:
            shutil.rmtree(self._parts, ignore_errors=True)

    @cached_property
    def zoo(self) -> Zoo:
        """The target and its heads. Loaded when something has to be decoded."""
        from hedgespec.zoo import load_zoo

        return load_zoo()

    def traces(self, name: str, full_drafts: int | None = None) -> list[Trace]:
        """Returns a set of `SETS`, recorded first if it is incomplete.

        Args:
            name: name of the set.
            full_drafts: draft length for which a text needs at least two positions with room; None returns all texts.
        """
        folder = self.folder / "traces"
        if len(traces := load_traces(folder, name)) < SETS[name].texts:
            record_set(name, folder, self.zoo, track=lambda items: self.track(items, f"recording {name}"))
            traces = load_traces(folder, name)
        return [trace for trace in traces if full_drafts is None or has_full_drafts(trace, full_drafts)]

    def once(self, key: str, compute: Callable[[], T]) -> T:
        """Returns the value of a step, from the file of an earlier run if there is one. The value must survive JSON.

        Args:
            key: everything that the value depends on, seeds included.
            compute: computes the value.
        """
        path = self._parts / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))["value"]
        text = json.dumps({"key": key, "value": compute()})
        path.parent.mkdir(parents=True, exist_ok=True)
        (scratch := path.with_suffix(".part")).write_text(text, encoding="utf-8")
        scratch.rename(path)
        return json.loads(text)["value"]

    def track(self, items: Sequence[T], description: str) -> Iterator[T]:
        """Yields the items with a progress bar and the time left."""
        return track(items, f"{self.name}: {description}", console=self.console, transient=True)

    def environment(self) -> dict[str, Any]:
        """Returns the date, versions, machine and number of seeds."""
        versions = {name: importlib.metadata.version(name) for name in ("hedgespec", "torch", "transformers", "numpy")}
        return {
            "study": self.name,
            "command": f"python bench/studies/run.py {self.name} --seeds {self.seeds}",
            "date": datetime.date.today().isoformat(),
            "seeds": self.seeds,
            "versions": versions,
            "machine": platform.machine(),
        }


def signature(traces: Sequence[Trace]) -> str:
    """Returns a name for recorded data, for the keys of `Lab.once`."""
    digest = hashlib.sha256()
    for trace in traces:
        for array in (trace.tokens, trace.prompt_prob, trace.prob, trace.drafted):
            digest.update(array.tobytes())
    return f"{len(traces)} texts {digest.hexdigest()[:12]}"
