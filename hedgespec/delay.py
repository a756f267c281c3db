"""The QPM-D delay queue: losses wait until they are complete and leave in the order they came."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from hedgespec.records import Feedback

_ROUNDING = 1e-5
"""How far above 1 a value may come in, for callers whose float32 sums are not clamped."""


class DelayQueue:
    """Turns the acceptance of each drafter at each verified position into losses for the learner.

    A round that started at position t with drafter i would emit, in expectation,

        exact:    L = 1 + sum_{k=1..K} prod_{j<k-1} acceptance_ratio[i, t+j] * acceptance_prob[i, t+k-1]
        product:  L = 1 + sum_{k=1..K} prod_{j<k}   acceptance_prob[i, t+j]

    tokens, and its loss is 1 - L / (K + 1). That takes K positions, while a round reveals only as many as it emits; a
    sum cut short there would flatter drafters that stop early. So each position opens a pending loss, complete once
    K positions are seen, or once every drafter's running product is 0 and the rest of the sum with it. The learner then
    sees a stream without delay in its own clock.

    Args:
        num_drafters: N >= 1.
        draft_length: K >= 1.
        estimator: exact is unbiased for the emitted length; product replaces the emitted tokens' own ratios by their
            mean, with less variance and a bias where acceptance is correlated along the draft.
        loss: length, as above, or acceptance_rate, 1 - acceptance_prob, which needs no waiting (nor the estimator).

    Raises:
        ValueError: a value outside its range or choices.

    Source: Joulani, Gyorgy, Szepesvari, "Online Learning under Delayed Feedback", ICML 2013; losses arXiv 2510.20064;
    the exact estimator and the early completion are ours.

    >>> queue = DelayQueue(1, 2)
    >>> queue.push([[0.5]], [[1.0]])
    []
    >>> [feedback] = queue.push([[0.25]], [[1.0]])
    >>> feedback.position, feedback.losses.round(4).tolist()
    (0, [0.4167])
    """

    def __init__(
        self,
        num_drafters: int,
        draft_length: int,
        *,
        estimator: Literal["exact", "product"] = "exact",
        loss: Literal["length", "acceptance_rate"] = "length",
    ) -> None:
        if num_drafters < 1:
            raise ValueError(f"num_drafters: expected at least 1, got {num_drafters}")
        if draft_length < 1:
            raise ValueError(f"draft_length: expected at least 1, got {draft_length}")
        if estimator not in ("exact", "product"):
            raise ValueError(f"estimator: expected 'exact' or 'product', got {estimator!r}")
        if loss not in ("length", "acceptance_rate"):
            raise ValueError(f"loss: expected 'length' or 'acceptance_rate', got {loss!r}")
        self.num_drafters, self.draft_length = num_drafters, draft_length
        self.estimator, self.loss = estimator, loss
        # Row j is the j-th oldest pending loss; between pushes fewer than K are in use.
        self._lengths = np.empty((draft_length, num_drafters))
        self._products = np.empty((draft_length, num_drafters))
        self._pending = 0
        self._position = 0

    @property
    def pending(self) -> int:
        """Losses still waiting for positions."""
        return self._pending

    def push(
        self, acceptance_prob: NDArray[np.floating] | torch.Tensor, acceptance_ratio: NDArray[np.floating] | torch.Tensor
    ) -> list[Feedback]:
        """Take the next verified positions and return the losses they complete, oldest first.

        Args:
            acceptance_prob: [N, T] for T >= 0 positions in order, floating, in [0, 1], on the CPU.
            acceptance_ratio: the same, given the tokens that were emitted.

        Raises:
            TypeError: not floating.
            ValueError: another shape or range.
        """
        probs = self._read("acceptance_prob", acceptance_prob)
        ratios = self._read("acceptance_ratio", acceptance_ratio)
        if probs.shape != ratios.shape:
            raise ValueError(f"acceptance_ratio: expected shape {probs.T.shape} as acceptance_prob, got {ratios.T.shape}")
        take = self._take if self.loss == "length" else self._take_rate
        return [feedback for prob, ratio in zip(probs, ratios) for feedback in take(prob, ratio)]

    def close(self) -> int:
        """End the request: drop what is pending, never guessed, and say how many that was. Position 0 comes next."""
        dropped, self._pending, self._position = self._pending, 0, 0
        return dropped

    def _take(self, prob: NDArray[np.float64], ratio: NDArray[np.float64]) -> list[Feedback]:
        """Extend every pending loss, and a new one, by one position [N]."""
        opened = self._pending
        self._lengths[opened] = self._products[opened] = 1.0
        lengths, products = self._lengths[: opened + 1], self._products[: opened + 1]
        if self.estimator == "exact":
            lengths += products * prob
            products *= ratio
        else:
            products *= prob
            lengths += products
        # Products grow with their row: an older one has the same factors and more, all at most 1. So what is
        # complete is always the oldest rows, and the order needs no care.
        waiting = min(int(np.count_nonzero(products.any(axis=1))), self.draft_length - 1)
        complete = opened + 1 - waiting
        first = self._position - opened
        losses = 1.0 - lengths[:complete] / (self.draft_length + 1)
        lengths[:waiting], products[:waiting] = lengths[complete:], products[complete:]
        self._pending = waiting
        self._position += 1
        return [Feedback(losses=row, position=first + j) for j, row in enumerate(losses)]

    def _take_rate(self, prob: NDArray[np.float64], ratio: NDArray[np.float64]) -> list[Feedback]:
        self._position += 1
        return [Feedback(losses=1.0 - prob, position=self._position - 1)]

    def _read(self, name: str, values: NDArray[np.floating] | torch.Tensor) -> NDArray[np.float64]:
        """One validated row a position: [N, T] -> float64 [T, N]."""
        values = np.asarray(values)
        if values.dtype.kind != "f":
            raise TypeError(f"{name}: expected a floating dtype, got {values.dtype}")
        if values.ndim != 2 or len(values) != self.num_drafters:
            raise ValueError(f"{name}: expected shape ({self.num_drafters}, T), got {values.shape}")
        if not ((values >= 0) & (values <= 1 + _ROUNDING)).all():  # NaN fails both
            raise ValueError(f"{name}: expected values in [0, 1], got {values}")
        return np.minimum(values.T, 1.0, dtype=np.float64)
