"""What a request cost and what selection did: MAT, picks, weights over time, regret, time by stage."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

STAGES = ("prefill", "select", "draft", "verify", "evaluate", "learn")


@dataclass
class DecodeStats:
    """Statistics of one request. Sizes: N drafters; [R] marks one entry a round, [F] one entry a completed loss."""

    drafters: tuple[str, ...]
    draft_length: int
    emitted_tokens: int = 0
    """Tokens of the continuation, the first one (from the prompt's own forward) included."""
    choices: list[int] = field(default_factory=list)
    """Drafter that drafted, [R]; -1 for a round in which none did."""
    emitted_by_round: list[int] = field(default_factory=list)
    """Tokens a round emitted, accepted and recovered or bonus, [R]."""
    weights: list[np.ndarray] = field(default_factory=list)
    """The weights each round's drafter was drawn from, failed drafters' share handed to the others, [R] of float64 [N]."""
    losses: list[np.ndarray] = field(default_factory=list)
    """Completed losses in the order the learner took them, [F] of float64 [N]."""
    played: list[float] = field(default_factory=list)
    """Expected loss under the weights that the learner held when it took each of them, [F]."""
    seconds_by_stage: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    """Wall time of each stage while the request was under way; of a batch the time of all its rows together."""
    drafter_cache_bytes: int = 0
    """Memory of the EAGLE heads' keys and values at the request's end, of a batch all its rows' together."""
    failures: dict[str, str] = field(default_factory=dict)
    """Drafters that were taken out of the request, with the cause."""
    learner_state: dict[str, Any] = field(default_factory=dict)
    """The learner's `state_dict()` at the end, for a next request to go on from."""
    seconds: float = 0.0
    """Wall time from the batch's beginning to the request's end, `on_tokens` included."""

    def record_round(self, drafter: int | None, weights: np.ndarray, emitted: int) -> None:
        self.choices.append(-1 if drafter is None else drafter)
        self.weights.append(weights)
        self.emitted_by_round.append(emitted)

    def record_loss(self, losses: np.ndarray, weights: np.ndarray) -> None:
        self.losses.append(losses)
        self.played.append(float(weights @ losses))

    @property
    def rounds(self) -> int:
        """Target forwards after the prompt's."""
        return len(self.choices)

    @property
    def mean_accepted_tokens(self) -> float:
        """MAT: mean tokens emitted per target forward; NaN before the first round."""
        return float(np.mean(self.emitted_by_round)) if self.emitted_by_round else float("nan")

    @property
    def picks(self) -> np.ndarray:
        """Rounds each drafter drafted, int64 [N]."""
        return np.bincount([choice for choice in self.choices if choice >= 0], minlength=len(self.drafters))

    @property
    def regret(self) -> np.ndarray:
        """Cumulative loss of the learner's weights less that of the drafter that is best in the end, float64 [F]."""
        if not self.losses:
            return np.zeros(0)
        cumulative = np.cumsum(self.losses, axis=0)
        return np.cumsum(self.played) - cumulative[:, cumulative[-1].argmin()]

    def late_choices(self, after_tokens: int) -> np.ndarray:
        """Drafters of the rounds that began once `after_tokens` tokens were emitted, int64; rounds without one left out."""
        choices = np.asarray(self.choices, dtype=np.int64)
        began = 1 + np.concatenate([[0], np.cumsum(self.emitted_by_round)[:-1]]) if self.choices else np.zeros(0)
        return choices[(began >= after_tokens) & (choices >= 0)]

    def to_dict(self) -> dict:
        """Plain numbers, for JSON; what is not defined yet is None."""
        return {
            "drafters": list(self.drafters),
            "draft_length": self.draft_length,
            "rounds": self.rounds,
            "emitted_tokens": self.emitted_tokens,
            "mean_accepted_tokens": self.mean_accepted_tokens if self.rounds else None,
            "picks": self.picks.tolist(),
            "final_weights": self.weights[-1].tolist() if self.weights else [],
            "regret": float(self.regret[-1]) if self.losses else 0.0,
            "seconds": self.seconds,
            "seconds_by_stage": self.seconds_by_stage,
            "drafter_cache_bytes": self.drafter_cache_bytes,
            "failures": self.failures,
        }


@contextmanager
def timed(requests: Sequence[DecodeStats], stage: str) -> Iterator[None]:
    """Adds the wall time of the block to a stage of each request; an asynchronous device is not waited for."""
    began = time.perf_counter()
    try:
        yield
    finally:
        seconds = time.perf_counter() - began
        for stats in requests:
            stats.seconds_by_stage[stage] += seconds


def plot_weights(traces: Sequence[tuple[str, DecodeStats]], path: Path) -> None:
    """Draws the weights over a stream of requests, titled in order, rounds left to right, as a stacked area.

    Raises: ImportError if matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    traces = [(title, stats) for title, stats in traces if stats.weights]
    names = traces[0][1].drafters
    figure, axes = pyplot.subplots(figsize=(14, 4), layout="constrained")
    weights = np.concatenate([np.asarray(stats.weights) for _, stats in traces])
    edges = np.cumsum([0, *(stats.rounds for _, stats in traces)])
    axes.stackplot(np.arange(len(weights)), weights.T, labels=names, step="post", colors=pyplot.cm.tab10.colors)
    for edge in edges:
        axes.axvline(edge, color="black", linewidth=0.8)
    axes.set_xticks((edges[:-1] + edges[1:]) / 2, [title for title, _ in traces], rotation=45, ha="right")
    axes.set(xlim=(0, len(weights) - 1), ylim=(0, 1), ylabel="weight", xlabel="requests, and the rounds within each")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
