"""What a request cost and what selection did: MAT, picks, weights over time, regret, time by stage."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hedgespec.utils.files import replacing

if TYPE_CHECKING:
    import torch
    from rich.table import Table

STAGES = ("prompt", "select", "draft", "verify", "drafter_forward", "evaluate", "learn")
"""Stages by which the time of a request is reported: reading the prompt, then the stages of a round. `drafter_forward` is the
pass of all drafters over the verified tokens; `evaluate` compares their logits with the target's. Time outside all stages,
mostly `on_tokens`, is reported as the rest."""


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
    lengths: list[int] = field(default_factory=list)
    """Tokens a round drafted, of a tree its nodes, [R]; 0 for one in which none did."""
    weights: list[np.ndarray] = field(default_factory=list)
    """The weights at each round's beginning, from which its drafter was drawn unless that of the round before stayed; failed
    drafters' share handed to the others, [R] of float64 [N]. With objective "throughput" a drafter's weight is that of all its
    lengths, and what lacks to 1 is plain decoding's."""
    losses: list[np.ndarray] = field(default_factory=list)
    """Completed losses in the order of the learner's updates, [F] of float64 [N]; with objective "throughput" [A], one for each
    arm (drafter, length) and the last one for plain decoding, A = N * draft_length + 1."""
    played: list[float] = field(default_factory=list)
    """Expected loss under the learner's weights at each of these updates, [F]."""
    evaluations: int = 0
    """Evaluations of all drafters, the warm start's not counted."""
    prompt_losses: list[np.ndarray] = field(default_factory=list)
    """What the learner took from the prompt before the first round, see `DecodeConfig.warm_start`: one entry a position, as
    in `losses`. They are no part of `losses`, `played` and `regret`."""
    reached_by_depth: np.ndarray = field(init=False, repr=False)
    """Rounds in which the drafted token at each depth was looked at, all before it accepted, and whose drafter was scored, [K].
    This and what follows is of chains, not of trees."""
    predicted_by_depth: np.ndarray = field(init=False, repr=False)
    """Sum over these rounds of the drafter's acceptance_prob at that position of the verified text, float64 [K]."""
    accepted_by_depth: np.ndarray = field(init=False, repr=False)
    """How many of these rounds' tokens at that depth were accepted, [K]."""
    began: float = field(default_factory=time.perf_counter, repr=False)
    """When the request did, by `time.perf_counter`."""
    spans: list[tuple[str, float, float]] = field(default_factory=list, repr=False)
    """Every stage while the request was under way, in order: name, start and end in seconds after `began`. They do not overlap.
    Of a batch it is the time of all its rows together."""
    drafter_cache_bytes: int = 0
    """Memory of the EAGLE heads' keys and values at the request's end, of a batch all its rows' together."""
    failures: dict[str, str] = field(default_factory=dict)
    """Drafters that were taken out of the request, with the cause."""
    learner_state: dict[str, Any] = field(default_factory=dict)
    """The learner's `state_dict()` at the end, for a next request to go on from."""
    seconds: float = 0.0
    """Wall time from the batch's beginning to the request's end, `on_tokens` included."""

    def __post_init__(self) -> None:
        for name in ("reached", "predicted", "accepted"):
            setattr(self, f"{name}_by_depth", np.zeros(self.draft_length))

    def record_round(self, drafter: int | None, weights: np.ndarray, emitted: int, drafted: int) -> None:
        self.choices.append(-1 if drafter is None else drafter)
        self.weights.append(weights)
        self.emitted_by_round.append(emitted)
        self.lengths.append(drafted)

    def record_loss(self, losses: np.ndarray, played: float) -> None:
        self.losses.append(losses)
        self.played.append(played)

    def record_depths(self, predicted: np.ndarray, accepted: int) -> None:
        """Records a round whose draft was tested at `len(predicted)` depths.

        Args:
            predicted: acceptance_prob of the drafter at each of these depths, [k].
            accepted: number of tokens accepted.
        """
        self.reached_by_depth[: len(predicted)] += 1
        self.predicted_by_depth[: len(predicted)] += predicted
        self.accepted_by_depth[:accepted] += 1

    @property
    def rounds(self) -> int:
        """Target forwards after the prompt's."""
        return len(self.choices)

    @property
    def tokens_per_round(self) -> float:
        """MAT: mean tokens emitted per target forward; NaN before the first round."""
        return float(np.mean(self.emitted_by_round)) if self.emitted_by_round else float("nan")

    @property
    def picks(self) -> np.ndarray:
        """Rounds each drafter drafted, int64 [N]."""
        return np.bincount([choice for choice in self.choices if choice >= 0], minlength=len(self.drafters))

    @property
    def regret(self) -> np.ndarray:
        """Cumulative loss of the learner's weights less that of the drafter, or arm, that is best in the end, float64 [F]."""
        if not self.losses:
            return np.zeros(0)
        cumulative = np.cumsum(self.losses, axis=0)
        return np.cumsum(self.played) - cumulative[:, cumulative[-1].argmin()]

    @property
    def seconds_by_stage(self) -> dict[str, float]:
        """Wall time of each of `STAGES`."""
        totals = dict.fromkeys(STAGES, 0.0)
        for stage, start, end in self.spans:
            totals[stage] += end - start
        return totals

    @property
    def spans_by_round(self) -> list[list[tuple[str, float, float]]]:
        """The prompt's spans, then those of each round, which begins with its selection."""
        parts: list[list[tuple[str, float, float]]] = [[]]
        for span in self.spans:
            if span[0] == "select":
                parts.append([])
            parts[-1].append(span)
        return parts

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
            "tokens_per_round": self.tokens_per_round if self.rounds else None,
            "picks": self.picks.tolist(),
            "lengths": self.lengths,
            "evaluations": self.evaluations,
            "final_weights": self.weights[-1].tolist() if self.weights else [],
            "regret": float(self.regret[-1]) if self.losses else 0.0,
            "seconds": self.seconds,
            "seconds_by_stage": self.seconds_by_stage,
            "drafter_cache_bytes": self.drafter_cache_bytes,
            "prompt_losses": len(self.prompt_losses),
            "by_depth": {name: getattr(self, f"{name}_by_depth").tolist() for name in ("reached", "predicted", "accepted")},
            "failures": self.failures,
        }


_wait: ContextVar[Callable[[], None]] = ContextVar("wait", default=lambda: None)
"""What `timed` calls before it looks at the clock."""


@contextmanager
def timed(requests: Sequence[DecodeStats], stage: str) -> Iterator[None]:
    """Records the block as a span of each request. An asynchronous device is waited for within `profiled` only.

    Blocks do not nest: the times of stages add up.
    """
    wait = _wait.get()
    wait()
    start = time.perf_counter()
    try:
        yield
    finally:
        wait()
        end = time.perf_counter()
        for stats in requests:
            stats.spans.append((stage, start - stats.began, end - stats.began))


@contextmanager
def profiled(device: torch.device) -> Iterator[None]:
    """Within it, each stage is charged for what the device does, not for the time it takes to queue that.

    On an accelerator the host waits for the device at both ends of a stage, which costs speed. On a CPU nothing changes.
    """
    import torch

    if device.type == "cpu":
        yield
        return
    token = _wait.set(partial(torch.accelerator.synchronize, device))
    try:
        yield
    finally:
        _wait.reset(token)


def profile_table(requests: Sequence[DecodeStats]) -> Table:
    """Time by stage over requests that ran one at a time, as a table: milliseconds a round, share of the whole, and in all."""
    from rich.table import Table

    rounds, total = sum(stats.rounds for stats in requests), sum(stats.seconds for stats in requests)
    seconds = {stage: sum(stats.seconds_by_stage[stage] for stats in requests) for stage in STAGES}
    seconds["rest"] = total - sum(seconds.values())
    table = Table("stage", title=f"time by stage over {rounds} rounds", title_justify="left", box=None)
    for column in ("ms a round", "share, %", "ms"):
        table.add_column(column, justify="right")
    for stage, spent in (*seconds.items(), ("total", total)):
        in_rounds = total - seconds["prompt"] if stage == "total" else spent
        a_round = f"{1e3 * in_rounds / rounds:.3f}" if rounds and stage != "prompt" else ""
        table.add_row(stage, a_round, f"{100 * spent / total:.1f}", f"{1e3 * spent:.1f}", style="bold" * (stage == "total"))
    return table


def plot_profile(traces: Sequence[tuple[str, DecodeStats]], path: Path) -> None:
    """Draws where the time of requests went, a flame chart each under its title: the request, its rounds, their stages.

    Raises: ImportError if matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def bars(level: float, spans: Sequence[tuple[float, float]], **look: Any) -> None:
        axes.broken_barh([(1e3 * start, 1e3 * (end - start)) for start, end in spans], (level, 1), **look)

    figure, axes = pyplot.subplots(figsize=(14, 1.5 + 0.8 * len(traces)), layout="constrained")
    for lane, (_, stats) in enumerate(traces):
        top = 3.5 * lane
        rounds = [(part[0][1], part[-1][2]) for part in stats.spans_by_round if part]
        bars(top, [(0, stats.seconds)], color="tab:gray")
        bars(top + 1, rounds[::2], color="silver")
        bars(top + 1, rounds[1::2], color="gainsboro")
        bars(top + 2, [(0, stats.seconds)], color="whitesmoke", label="rest" if lane == 0 else None)
        for number, stage in enumerate(STAGES):
            spans = [(start, end) for name, start, end in stats.spans if name == stage]
            bars(top + 2, spans, color=pyplot.cm.tab10(number), label=stage if lane == 0 else None)
    axes.set_yticks([3.5 * lane + 1.5 for lane in range(len(traces))], [title for title, _ in traces])
    axes.invert_yaxis()
    axes.set(xlabel="ms; from above: the request, its prompt and rounds, their stages")
    axes.set_xlim(0, 1e3 * max(stats.seconds for _, stats in traces))
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    with replacing(path) as fresh:
        figure.savefig(fresh, dpi=110)
    pyplot.close(figure)


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
    axes.stackplot(np.arange(len(weights)), weights.T, labels=names, step="post", colors=pyplot.get_cmap("tab10")(range(10)))
    for edge in edges:
        axes.axvline(edge, color="black", linewidth=0.8)
    axes.set_xticks((edges[:-1] + edges[1:]) / 2, [title for title, _ in traces], rotation=45, ha="right")
    axes.set(xlim=(0, len(weights) - 1), ylim=(0, 1), ylabel="weight", xlabel="requests, and the rounds within each")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    with replacing(path) as fresh:
        figure.savefig(fresh, dpi=110)
    pyplot.close(figure)
