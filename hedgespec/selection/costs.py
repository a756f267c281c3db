"""What drafting and verifying cost, measured while decoding."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import numpy as np
from numpy.typing import NDArray

from hedgespec.records import NO_DRAFT, Choice

WINDOW = 31
"""Measurements of a kind that are kept, the newest."""
FEWEST = 3
"""Measurements of a kind that tell something. The very first, in which memory is allocated and kernels are compiled, is none of
them."""
AGAIN = 64
"""Rounds after which all is measured once more, and then after twice as many, and so on: what nobody chooses may have been
measured while the machine was busy."""
SHORTEST = 1e-9
"""Seconds of a round on a clock too coarse to see it."""


class Costs:
    """Seconds to draft a token, by drafter, and to verify a round, by drafted length, for every size of the batch.

    A cost is the lower quartile of its last `WINDOW` measurements: a clock is disturbed upwards only, by bursts that fill half
    a window while it is short, and what looks dear by accident is not chosen and hardly measured again. Sizes share with those
    up to the next power of two, or else a batch whose rows end one by one would never be done with measuring.

    Of rows that draft together each drafter is charged what all of them took, over the longest draft: as if all rows did the
    same. Threads may share one; a copy, pickled or deep, begins anew, since it may be meant for another device.

    Args:
        num_drafters: N >= 1.
        draft_length: K >= 1.
        clock: seconds.

    Source: ours.
    """

    def __init__(self, num_drafters: int, draft_length: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.num_drafters, self.draft_length, self.clock = num_drafters, draft_length, clock
        self._drafted: dict[tuple[int, int], deque[float]] = {}
        """Seconds a token by size of the batch and drafter."""
        self._verified: dict[tuple[int, int], deque[float]] = {}
        """Seconds by size of the batch and drafted length."""
        self._plans: dict[int, _Plan] = {}
        """By size of the batch."""
        self._lock = threading.Lock()
        """Threads take turns with the three above."""

    def __reduce__(self) -> tuple[type[Costs], tuple[int, int, Callable[[], float]]]:
        return Costs, (self.num_drafters, self.draft_length, self.clock)

    def drafted(self, rows: int, drafter: int, seconds_per_token: float) -> None:
        """Takes note of a draft in a batch of so many rows."""
        with self._lock:
            _note(self._drafted, (_size(rows), drafter), seconds_per_token)

    def verified(self, rows: int, length: int, seconds: float) -> None:
        """Takes note of a verification in a batch whose longest draft had `length` tokens, 0..K."""
        with self._lock:
            _note(self._verified, (_size(rows), length), seconds)

    def to_measure(self, rows: int, most: int) -> Choice | None:
        """What the next round in a batch of so many rows, which may draft up to `most` tokens, is to draft only to be measured;
        None: nothing. To be asked once a round. Every length 0..K, and every drafter, is measured `FEWEST` + 1 times in turns
        at first, and once more after `AGAIN` rounds, twice as many, and so on."""
        with self._lock:
            plan = self._plans.setdefault(_size(rows), _Plan([0] * (self.draft_length + 1), [0] * self.num_drafters))
            plan.rounds += 1
            often = FEWEST + 1 + (plan.rounds // AGAIN).bit_length()
            length = _least(plan.lengths[: most + 1])
            if plan.lengths[length] >= often:
                if most < 1 or min(plan.drafters) >= often:
                    return None
                length = 1 + _least(plan.lengths[1 : most + 1])
            plan.lengths[length] += 1
            if length == 0:
                return NO_DRAFT
            drafter = _least(plan.drafters)
            plan.drafters[drafter] += 1
            return Choice(drafter, length)

    def of(self, rows: int) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
        """Seconds to draft a token [N] and to verify a round by drafted length [K+1] in a batch of so many rows; None while
        plain decoding, or all drafting, is not measured.

        A drafter that is not measured yet gets the median of those that are, so that it is tried; a length what lies between
        the measured ones beside it. A shorter round costs no more than a longer one.
        """
        size = _size(rows)
        with self._lock:
            verify = np.array([_typical(self._verified.get((size, length))) for length in range(self.draft_length + 1)])
            draft = np.array([_typical(self._drafted.get((size, drafter))) for drafter in range(self.num_drafters)])
            some = [one for (of, _), window in self._drafted.items() if of == size for one in window]
        known = np.flatnonzero(~np.isnan(verify))
        if len(known) < 2 or known[0] > 0:
            return None
        verify = np.interp(range(len(verify)), known, verify[known])
        verify = np.minimum.accumulate(verify[::-1])[::-1]
        tried = draft[~np.isnan(draft)]
        usual = np.median(tried) if len(tried) else median(some or [0.0])
        return np.where(np.isnan(draft), usual, draft), np.maximum(verify, SHORTEST)


@dataclass
class _Plan:
    """What was measured on purpose."""

    lengths: list[int]
    """How often, by length, [K+1]."""
    drafters: list[int]
    """How often, by drafter, [N]."""
    rounds: int = 0
    """In all."""


def _least(counts: list[int]) -> int:
    """The first place of the smallest."""
    return counts.index(min(counts))


def _size(rows: int) -> int:
    """The next power of two."""
    return 1 << (rows - 1).bit_length()


def _note(windows: dict[tuple[int, int], deque[float]], key: tuple[int, int], seconds: float) -> None:
    if key not in windows:
        windows[key] = deque(maxlen=WINDOW)  # and the first measurement goes no further
    else:
        windows[key].append(seconds)


def _typical(window: deque[float] | None) -> float:
    """NaN where nothing is told yet."""
    if window is None or (count := len(window)) < FEWEST:
        return np.nan
    return sorted(window)[(count - 1) // 4]
