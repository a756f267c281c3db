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
        self._reset()

    def _reset(self) -> None:
        self._pending = np.empty((2, 0, self.num_drafters))
        """Lengths and products so far; row j is the j-th oldest pending loss."""
        self._position = 0
        """Of the loss that leaves next."""

    @property
    def pending(self) -> int:
        """Losses still waiting for positions."""
        return self._pending.shape[1]

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
        losses = self._extend(probs, ratios) if self.loss == "length" else 1.0 - probs
        first, self._position = self._position, self._position + len(losses)
        return [Feedback(losses=row, position=position) for position, row in enumerate(losses, first)]

    def close(self) -> int:
        """End the request: drop what is pending, never guessed, and say how many that was. Position 0 comes next."""
        dropped = self.pending
        self._reset()
        return dropped

    def _extend(self, probs: NDArray[np.float64], ratios: NDArray[np.float64]) -> NDArray[np.float64]:
        """Extend every pending loss, and a new one a position, by positions [T, N]; what is complete then, [complete, N]."""
        opened, most = self.pending, self.draft_length
        state = np.ones((2, opened + len(probs), self.num_drafters))
        state[:, :opened] = self._pending
        lengths, products = state
        for newest, (prob, ratio) in enumerate(zip(probs, ratios), start=opened):
            rows = slice(max(newest - most + 1, 0), newest + 1)  # those before have had their K positions
            length, product = lengths[rows], products[rows]
            if self.estimator == "exact":
                length += product * prob
                product *= ratio
            else:
                product *= prob
                length += product
        # Products grow with their row: a newer one has the same factors and fewer, all at most 1. So what is complete is
        # always the oldest rows, the order needs no care, and the first product above 0 ends the search.
        complete = max(len(lengths) - most + 1, 0)
        while complete < len(lengths) and not np.count_nonzero(products[complete]):
            complete += 1
        self._pending = state[:, complete:]
        return 1.0 - lengths[:complete] / (most + 1)

    def _read(self, name: str, values: NDArray[np.floating] | torch.Tensor) -> NDArray[np.float64]:
        """One validated row a position: [N, T] -> float64 [T, N]."""
        values = np.asarray(values)
        if values.dtype.kind != "f":
            raise TypeError(f"{name}: expected a floating dtype, got {values.dtype}")
        if values.ndim != 2 or len(values) != self.num_drafters:
            raise ValueError(f"{name}: expected shape ({self.num_drafters}, T), got {values.shape}")
        flat = values.ravel()
        # argmin stops at a NaN, which then compares false; on so few numbers it costs a fifth of min.
        if flat.size and not (flat[flat.argmin()] >= 0 and flat[flat.argmax()] <= 1 + _ROUNDING):
            raise ValueError(f"{name}: expected values in [0, 1], got {values}")
        return np.minimum(values.T, 1.0, dtype=np.float64)
