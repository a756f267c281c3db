"""What drafting and verifying cost, measured while decoding."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from statistics import median

import numpy as np
from numpy.typing import NDArray

WINDOW = 31
"""Measurements of a kind that are kept, the newest."""
FEWEST = 3
"""Measurements of a kind that tell something. The very first, in which memory is allocated and kernels are compiled, is none of
them."""
SHORTEST = 1e-9
"""Seconds of a round on a clock too coarse to see it."""

_MEASURING = threading.Lock()
"""One measurement at a time; a lock of its own would keep a decoder from being copied."""


class Costs:
    """Seconds to draft a token, by drafter, and to verify a round, by drafted length, for every size of the batch.

    A cost is the median of its last `WINDOW` measurements, and where there are fewer than five the largest with two above it:
    a clock is disturbed upwards only, and an arm that looks dear by accident would not be measured again. Sizes share with
    those up to the next power of two, or else a batch whose rows end one by one would never be done with measuring.

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
        self._asked: dict[int, list[int]] = {}
        """By size of the batch: how often `length_to_measure` said each length, [K+1]."""

    def __reduce__(self):
        return Costs, (self.num_drafters, self.draft_length, self.clock)

    def drafted(self, rows: int, drafter: int, seconds_per_token: float) -> None:
        """Takes note of a draft in a batch of so many rows."""
        _note(self._drafted, (_size(rows), drafter), seconds_per_token)

    def verified(self, rows: int, length: int, seconds: float) -> None:
        """Takes note of a verification in a batch whose longest draft had `length` tokens, 0..K."""
        _note(self._verified, (_size(rows), length), seconds)

    def length_to_measure(self, rows: int, most: int) -> int | None:
        """A length 0..`most` that a batch of so many rows is to draft next, since it has not been measured often enough; None:
        any. Each is asked for `FEWEST` + 1 times in the life of a decoder, in turns."""
        with _MEASURING:
            asked = self._asked.setdefault(_size(rows), [0] * (self.draft_length + 1))
            length = min(range(min(most, self.draft_length) + 1), key=asked.__getitem__)
            if asked[length] > FEWEST:
                return None
            asked[length] += 1
            return length

    def of(self, rows: int) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
        """Seconds to draft a token [N] and to verify a round by drafted length [K+1] in a batch of so many rows; None while
        plain decoding, or all drafting, is not measured.

        A drafter that is not measured yet gets the median of those that are, so that it is tried; a length what lies between
        the measured ones beside it. A shorter round costs no more than a longer one.
        """
        size = _size(rows)
        with _MEASURING:
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


def _size(rows: int) -> int:
    """The next power of two."""
    return 1 << (rows - 1).bit_length()


def _note(windows: dict[tuple[int, int], deque[float]], key: tuple[int, int], seconds: float) -> None:
    with _MEASURING:
        if key not in windows:
            windows[key] = deque(maxlen=WINDOW)  # and the first measurement goes no further
        else:
            windows[key].append(seconds)


def _typical(window: deque[float] | None) -> float:
    """NaN where nothing is told yet."""
    if window is None or (count := len(window)) < FEWEST:
        return np.nan
    return sorted(window)[min((count - 1) // 2, count - FEWEST)]
