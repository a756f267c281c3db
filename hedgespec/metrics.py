"""What a request cost and what selection did: MAT, picks, weights over time, regret, time by stage."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

STAGES = ("prefill", "select", "draft", "verify", "evaluate", "learn")


@dataclass
class DecodeStats:
    """Statistics of one request; one entry a round where a list is named after rounds.

    Sizes: N drafters, R rounds, F losses that completed.
    """

    drafters: tuple[str, ...]
    draft_length: int
    emitted_tokens: int = 0
    """Tokens of the continuation, the first one (from the prompt's own forward) included."""
    choices: list[int] = field(default_factory=list)
    """Drafter that drafted, [R]; -1 for a round in which none did."""
    emitted_by_round: list[int] = field(default_factory=list)
    """Tokens a round emitted, accepted and recovered or bonus, [R]."""
    weights: list[np.ndarray] = field(default_factory=list)
    """The learner's weights when each round was drawn, [R] of float64 [N]."""
    losses: list[np.ndarray] = field(default_factory=list)
    """Completed losses in the order the learner took them, [F] of float64 [N]."""
    played: list[float] = field(default_factory=list)
    """Expected loss of the learner's weights on each of them, [F]."""
    seconds_by_stage: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    failures: dict[str, str] = field(default_factory=dict)
    """Drafters that were taken out of the request, with the cause."""
    learner_state: dict = field(default_factory=dict)
    """The learner's `state_dict()` at the end, for a next request to go on from."""
    seconds: float = 0.0

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

    def pick_share(self, drafter: int, after_tokens: int = 0) -> float:
        """Share of rounds drafted by `drafter` among those that began after `after_tokens` tokens; NaN if there are none."""
        began = 1 + np.cumsum([0, *self.emitted_by_round[:-1]]) if self.choices else np.zeros(0)
        choices = np.asarray(self.choices)
        late = choices[(began >= after_tokens) & (choices >= 0)]
        return float(np.mean(late == drafter)) if late.size else float("nan")

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the time of the block to a stage."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds_by_stage[stage] += time.perf_counter() - began

    def to_dict(self) -> dict:
        """Plain numbers, for JSON."""
        return {
            "drafters": list(self.drafters),
            "rounds": self.rounds,
            "emitted_tokens": self.emitted_tokens,
            "mean_accepted_tokens": self.mean_accepted_tokens,
            "picks": self.picks.tolist(),
            "final_weights": self.weights[-1].tolist() if self.weights else [],
            "regret": float(self.regret[-1]) if self.losses else 0.0,
            "seconds": self.seconds,
            "seconds_by_stage": self.seconds_by_stage,
            "failures": self.failures,
        }
