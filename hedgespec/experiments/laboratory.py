"""What experiments work with: recorded traces, the zoo, steps that are done once, and a progress bar."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import platform
import shutil
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.progress import track

from hedgespec.experiments.recordings import RECORDINGS, load_traces, record_set
from hedgespec.experiments.traces import Trace

if TYPE_CHECKING:
    from hedgespec.zoo import Zoo

T = TypeVar("T")


class Laboratory:
    """One experiment's tools.

    Args:
        folder: of all experiments; traces lie under `traces`, finished steps under `parts`.
        name: the experiment's.
        seeds: runs of each learner over each text.
        fresh: forget the steps that are done.
        console: where progress goes; None is standard output.
    """

    def __init__(self, folder: Path, name: str, *, seeds: int = 20, fresh: bool = False, console: Console | None = None):
        self.folder, self.name, self.seeds, self.console = folder, name, seeds, console or Console()
        self._parts = folder / "parts" / name
        if fresh:
            shutil.rmtree(self._parts, ignore_errors=True)

    @cached_property
    def zoo(self) -> Zoo:
        """The target and its heads. Loaded only where something has to be decoded."""
        from hedgespec.zoo import load_zoo

        return load_zoo()

    def traces(self, name: str) -> list[Trace]:
        """A set of `RECORDINGS`, recorded first where it is not complete."""
        folder = self.folder / "traces"
        if len(traces := load_traces(folder, name)) < RECORDINGS[name].texts:
            record_set(name, folder, self.zoo, track=lambda items: self.track(items, f"recording {name}"))
            traces = load_traces(folder, name)
        return traces

    def once(self, key: str, compute: Callable[..., T]) -> T:
        """What `compute` returns, from the file of an earlier run where there is one. It has to survive JSON.

        The key names everything that the value depends on, the seeds included.
        """
        path = self._parts / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))["value"]
        text = json.dumps({"key": key, "value": compute()})
        path.parent.mkdir(parents=True, exist_ok=True)
        (scratch := path.with_suffix(".part")).write_text(text, encoding="utf-8")
        scratch.rename(path)
        return json.loads(text)["value"]

    def track(self, items: Sequence[T], words: str) -> Iterable[T]:
        """The items, with a progress bar."""
        return track(items, words, console=self.console, transient=True)

    def circumstances(self) -> dict[str, Any]:
        """When, with what versions and how many seeds."""
        versions = {name: importlib.metadata.version(name) for name in ("hedgespec", "torch", "transformers", "numpy")}
        return {
            "experiment": self.name,
            "command": f"hedgespec experiment {self.name} --seeds {self.seeds}",
            "date": datetime.date.today().isoformat(),
            "seeds": self.seeds,
            "versions": versions,
            "machine": platform.machine(),
        }
