"""Drafters that have been hopeless for long are evaluated ever more rarely. What they miss is never guessed: it comes late.

Numbers only, no models: who sleeps, for how long, and the losses that sleepers owe.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from hedgespec.delay import DelayQueue
from hedgespec.records import Feedback

LONGEST_SLEEP = 16
"""Most evaluations in a row that a drafter is left out of; a power of two."""
MOST_MISSED = 128
"""Tokens that a drafter may miss, above which it catches up whatever its schedule: the target's logits are kept that long."""


@dataclass
class _Debt:
    """The losses that the learner has not heard of a drafter, though it has heard those of others."""

    queue: DelayQueue
    """Of this drafter alone: it completes what the others' queue did not wait for."""
    next: int
    """Position of the first such loss."""
    until: int = 0
    """Position from which on the others' queue knows the drafter again."""
    found: deque[float] = field(default_factory=deque)
    """Complete ones, from `next` on."""


class BackOff:
    """Who sleeps in one request, and what comes late of it. Ours.

    A drafter whose weight was negligible at `patience` evaluations in a row is left out of the next 1, and if it still is when
    it has caught up, of the next 2, 4, .. `LONGEST_SLEEP`. So one that becomes the best has missed no more evaluations than it
    was hopeless for, and at most `LONGEST_SLEEP`, when it is scored again, on all of them.

    Args:
        queue: of the request, as yet empty.
        patience: >= 1; None: nobody sleeps.
    """

    def __init__(self, queue: DelayQueue, patience: int | None) -> None:
        self.queue, self.patience = queue, patience
        count = queue.num_drafters
        self.idle = np.zeros(count, dtype=np.int64)
        """Evaluations in a row after which each drafter's weight was negligible, [N]."""
        self.sleep = np.zeros(count, dtype=np.int64)
        """Evaluations that each one's sleep lasts, [N]; 0: it is awake."""
        self.left = np.zeros(count, dtype=np.int64)
        """How many of them are to come, [N]."""
        self._asked: list[np.ndarray] = []
        """Whom evaluations under way are to judge, the oldest first."""
        self._debts: dict[int, _Debt] = {}

    def ask(self, everyone: bool, heavy: np.ndarray, missed: np.ndarray) -> np.ndarray:
        """Whom the next evaluation scores, bool [N].

        Args:
            everyone: all of them.
            heavy: bool [N], whose weight is not negligible by now.
            missed: int64 [N], tokens on which each is not scored yet.
        """
        if self.patience is None:
            return np.ones(len(self.idle), dtype=bool)
        asked = everyone | heavy | (self.left == 0) | (missed > MOST_MISSED)
        self.left = np.where(asked, 0, self.left - 1)
        self._asked.append(asked.copy())
        return asked

    def judge(self, light: np.ndarray) -> None:
        """Who goes to sleep, or on sleeping, once an evaluation has been learned from: whose weight is negligible, bool [N]."""
        if self.patience is None:
            return
        asked = self._asked.pop(0)
        light = asked & light
        self.idle = np.where(asked, np.where(light, self.idle + 1, 0), self.idle)
        self.sleep = np.where(asked & ~light, 0, self.sleep)
        fallen = light & ((self.sleep > 0) | (self.idle >= self.patience))
        self.sleep = np.where(fallen, np.clip(2 * self.sleep, 1, LONGEST_SLEEP), self.sleep)
        self.left = np.where(fallen, self.sleep, self.left)
        for later in self._asked:  # it began before they fell asleep, and is none that they have slept for
            later &= ~fallen

    def wake(self, drafter: int) -> None:
        """The next evaluation scores it."""
        self.idle[drafter] = self.sleep[drafter] = self.left[drafter] = 0

    def catch_up(self, drafter: int, acceptance_prob: np.ndarray, acceptance_ratio: np.ndarray) -> None:
        """What a drafter missed, all of it: float64 [T], or [K, T] by depth."""
        debt = self._debts[drafter]
        found = debt.queue.push(acceptance_prob[..., None, :], acceptance_ratio[..., None, :])
        debt.found += [float(one.losses[0]) for one in found]

    def late(self, acceptance_prob: np.ndarray, acceptance_ratio: np.ndarray) -> Iterator[tuple[int, int, list[float]]]:
        """The late losses that are complete by the positions that `push` takes next, once: drafter, position of the first, [T].

        Args: as of `push`, to which they go afterwards.
        """
        for drafter, debt in self._debts.items():
            if not np.isnan(acceptance_prob[..., drafter, :]).any():
                if gap := self.queue.positions - debt.queue.positions:  # a drafter lost in the meantime accepted nothing
                    nothing = np.zeros((*acceptance_prob.shape[:-2], gap))
                    self.catch_up(drafter, nothing, nothing)
                self.catch_up(drafter, acceptance_prob[..., drafter, :], acceptance_ratio[..., drafter, :])
            if count := min(len(debt.found), self.queue.next_position - debt.next):
                yield drafter, debt.next, [debt.found.popleft() for _ in range(count)]
                debt.next += count
        self._debts = {drafter: debt for drafter, debt in self._debts.items() if debt.next < debt.until}

    def push(self, acceptance_prob: np.ndarray, acceptance_ratio: np.ndarray) -> Iterator[Feedback]:
        """`DelayQueue.push` for float64 [N, T] or [K, N, T], NaN throughout for sleepers, for whom no loss waits; losses
        that come late are NaN."""
        asleep = np.isnan(acceptance_prob).any(-1).reshape(-1, len(self.idle)).any(0)
        for drafter in np.flatnonzero(asleep).tolist():
            if drafter not in self._debts:
                self._debts[drafter] = _Debt(self.queue.of(drafter), self.queue.next_position)
            self._debts[drafter].until = self.queue.positions + acceptance_prob.shape[-1]
        if asleep.any():  # taken to accept nothing, so that products are 0
            acceptance_prob, acceptance_ratio = np.nan_to_num(acceptance_prob), np.nan_to_num(acceptance_ratio)
        for feedback in self.queue.push(acceptance_prob, acceptance_ratio):
            losses = feedback.losses
            for drafter, debt in self._debts.items():
                if debt.found and debt.next == feedback.position:
                    losses[drafter] = debt.found.popleft()
                    debt.next += 1
                elif feedback.position < debt.until:
                    losses[drafter] = np.nan
            yield feedback
