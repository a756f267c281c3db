"""The QPM-D delay queue: a loss waits until it is complete, and losses leave in the order of their positions."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from hedgespec.records import Feedback
from hedgespec.utils.scalars import integer

_ROUNDING = 1e-5
"""How far above 1 a value may come in, for callers whose float32 sums are not clamped."""


class DelayQueue:
    """Converts the acceptance of each drafter at each verified position into the losses of the learner.

    A round that starts at position t with drafter i emits, in expectation,

        L = 1 + sum_{k=1..K} prod_{j<k-1} acceptance_ratio[i, t+j] * acceptance_prob[i, t+k-1]

    tokens, and its loss is 1 - L / (K + 1). In a draft tree the factors of position t+j are those of a node at depth j. The sum
    reads K positions, while a round reveals only as many as it emits, and a sum that ends there would favour drafters whose
    drafts end early. So every position opens a pending loss. The loss is complete once K positions are known, or once the
    running product of every drafter is 0, which makes the rest of the sum 0. The learner then receives a stream without delay
    in its own clock.

    Args:
        num_drafters: N >= 1.
        draft_length: K >= 1.
        lengths: whether `Feedback.lengths` is computed as well: the sums of the first 1..K terms, which are the expected
            lengths of shorter drafts.

    Raises:
        TypeError: num_drafters or draft_length is not an int.
        ValueError: a value outside its range.

    Source: Joulani, Gyorgy, Szepesvari, "Online Learning under Delayed Feedback", ICML 2013; losses arXiv 2510.20064. The
    estimator, which is unbiased for the emitted length, and the early completion are ours.

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
        lengths: bool = False,
    ) -> None:
        num_drafters, draft_length = integer("num_drafters", num_drafters, 1), integer("draft_length", draft_length, 1)
        self.num_drafters, self.draft_length, self.lengths = num_drafters, draft_length, lengths
        self._reset()

    def _reset(self) -> None:
        self._seen = np.empty((2, 0, self.num_drafters))
        """acceptance_prob and acceptance_ratio at the positions whose losses are pending, oldest first; [2, T, K, N] where they
        are known by depth."""
        self._position = 0
        """Of the loss that leaves next."""

    @property
    def pending(self) -> int:
        """Losses still waiting for positions."""
        return self._seen.shape[1]

    def push(
        self, acceptance_prob: NDArray[np.floating] | torch.Tensor, acceptance_ratio: NDArray[np.floating] | torch.Tensor
    ) -> list[Feedback]:
        """Take the next verified positions and return the losses they complete, oldest first.

        Args:
            acceptance_prob: [N, T] for T >= 0 positions in order, floating, in [0, 1], on the CPU. [K, N, T] where it depends
                on the depth at which a draft, or a draft tree, has the position.
            acceptance_ratio: the same, given the tokens that were emitted.

        Raises:
            TypeError: not floating.
            ValueError: another shape or range.
        """
        probs, ratios = self._check("acceptance_prob", acceptance_prob), self._check("acceptance_ratio", acceptance_ratio)
        if probs.shape != ratios.shape:
            raise ValueError(f"acceptance_ratio: expected shape {probs.shape} as acceptance_prob, got {ratios.shape}")
        pending, new = self._seen.shape[1], probs.shape[-1]
        if new == 0:
            return []
        shape = probs.shape[:-1]
        if pending and self._seen.shape[2:] != shape:
            raise ValueError(f"acceptance_prob: expected the dimensions {self._seen.shape[2:]} of what is pending, got {shape}")
        seen = np.empty((2, pending + new, *shape))
        if pending:
            seen[:, :pending] = self._seen
        by_position = (1, 0) if len(shape) == 1 else (2, 0, 1)
        seen[0, pending:] = probs.transpose(by_position)
        seen[1, pending:] = ratios.transpose(by_position)
        # One pass for both. argmin and argmax stop at a NaN, which then compares false; they cost a fifth of min and max.
        flat = seen.ravel()
        lowest, highest = flat.item(flat.argmin()), flat.item(flat.argmax())
        if not (lowest >= 0 and highest <= 1 + _ROUNDING):
            raise ValueError(_out_of_range(probs, ratios))
        if highest > 1:
            np.minimum(seen, 1.0, out=seen)
        losses, lengths = self._complete(seen, lowest) if seen.ndim == 3 else self._complete_by_depth(seen)
        first, complete = self._position, len(losses)
        self._seen, self._position = seen[:, complete:], first + complete
        told = [None] * complete if lengths is None else lengths
        return [Feedback(row, position, sums) for position, (row, sums) in enumerate(zip(losses, told), first)]

    def close(self) -> int:
        """End the request: drop what is pending, never guessed, and say how many that was. Position 0 comes next."""
        dropped = self.pending
        self._reset()
        return dropped

    def _complete(self, seen: NDArray[np.float64], lowest: float) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        """The losses [complete, N] of the oldest positions in `seen` [2, positions, N], whose smallest entry is `lowest`, and
        the lengths [complete, K, N] if they are asked for."""
        probs, ratios = seen
        last, positions = self.draft_length - 1, len(probs)
        complete = max(positions - last, 0)
        if lowest == 0:
            # From the newest back: an older position's product has more factors, so the first that is 0 ends the search.
            product = 1.0
            for position in range(positions - 1, complete - 1, -1):
                product = product * ratios[position]
                if not np.count_nonzero(product):
                    complete = position + 1
                    break
            if complete + last > positions:  # what such a sum still lacks is multiplied by 0, so anything finite will do
                unknown = np.zeros((last, self.num_drafters))
                probs, ratios = np.concatenate((probs, unknown)), np.concatenate((ratios, unknown))
        # The sum from its inner end, L - 1 = prob_1 + ratio_1 * (prob_2 + ratio_2 * (...)): two operations a term, not three.
        accepted = probs[last : last + complete]
        for k in range(last - 1, -1, -1):
            accepted = accepted * ratios[k : k + complete]
            accepted += probs[k : k + complete]
        lengths = self._lengths(probs, ratios, complete) if self.lengths else None
        return (self.draft_length - accepted) / (self.draft_length + 1), lengths

    def _lengths(self, probs: NDArray[np.float64], ratios: NDArray[np.float64], complete: int) -> NDArray[np.float64]:
        """1 + the sums of the first 1..K terms, [complete, K, N], of positions [at least complete + K - 1, N]."""
        lengths = np.empty((complete, self.draft_length, self.num_drafters))
        emitted, survival = np.ones((complete, self.num_drafters)), np.ones((complete, self.num_drafters))
        for k in range(self.draft_length):
            emitted += survival * probs[k : k + complete]
            survival *= ratios[k : k + complete]
            lengths[:, k] = emitted
        return lengths

    def _complete_by_depth(self, seen: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        """`_complete` of `seen` [2, positions, K, N]: a loss reads the position j after its own at depth j."""
        probs, ratios = seen
        losses, lengths = [], []
        for position in range(len(probs)):
            known = min(self.draft_length, len(probs) - position)
            at = np.arange(known)
            ratio = ratios[position + at, at]
            if known < self.draft_length and np.count_nonzero(ratio.prod(axis=0)):
                break
            prob = probs[position + at, at]
            accepted = prob[-1]
            for k in range(known - 2, -1, -1):  # in the order of `_complete`, so that one acceptance has one loss
                accepted = accepted * ratio[k] + prob[k]
            losses.append((self.draft_length - accepted) / (self.draft_length + 1))
            if self.lengths:
                unknown = np.zeros((self.draft_length - known, self.num_drafters))  # multiplied by 0, as in `_complete`
                lengths.append(self._lengths(np.concatenate((prob, unknown)), np.concatenate((ratio, unknown)), 1)[0])
        return np.array(losses).reshape(-1, self.num_drafters), np.array(lengths) if self.lengths else None

    def _check(self, name: str, values: NDArray[np.floating] | torch.Tensor) -> NDArray[np.floating]:
        """The values as an array [N, T] or [K, N, T], their range not looked at yet."""
        values = np.asarray(values)
        if values.dtype.kind != "f":
            raise TypeError(f"{name}: expected a floating dtype, got {values.dtype}")
        count = self.num_drafters
        if values.shape[:-1] not in ((count,), (self.draft_length, count)):
            raise ValueError(f"{name}: expected shape ({count}, T) or ({self.draft_length}, {count}, T), got {values.shape}")
        return values


def _out_of_range(prob: NDArray[np.floating], ratio: NDArray[np.floating]) -> str:
    """Which of the two is not in [0, 1], NaN included."""
    wide = prob.astype(np.float64)  # as it was looked at
    prob_fits = ((wide >= 0) & (wide <= 1 + _ROUNDING)).all()
    name, values = ("acceptance_ratio", ratio) if prob_fits else ("acceptance_prob", prob)
    return f"{name}: expected values in [0, 1], got {values}"
