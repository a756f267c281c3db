"""Identifies the request of every row of an engine's step, while rows move, disappear and return."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

State = TypeVar("State")

PATIENCE = 64
"""Steps without a row after which a request without a name counts as ended."""


class Tracked(Generic[State]):
    """A request and its tokens."""

    def __init__(self, key: int, name: str | None, tokens: NDArray[np.integer], state: State) -> None:
        self.key, self.name, self.state = key, name, state
        """A unique number, the engine's name of the request or None, and the owner's state."""
        self.length = 0
        self._tokens = np.empty(max(64, 2 * len(tokens)), dtype=np.int64)
        self.row = -1
        """Its row in step `step`."""
        self.step = -1
        """The last step in which it had a row; -1 for none."""
        self.missed = 0
        """Number of steps without a row directly before `step`."""
        self.append(tokens)

    @property
    def tokens(self) -> NDArray[np.int64]:
        """int64 [length]: its verified tokens, prompt included."""
        return self._tokens[: self.length]

    def append(self, tokens: NDArray[np.integer]) -> None:
        """Appends verified tokens."""
        end = self.length + len(tokens)
        if end > len(self._tokens):
            self._tokens = np.concatenate((self.tokens, np.empty(end, dtype=np.int64)))
        self._tokens[self.length : end] = tokens
        self.length = end

    def begins(self, tokens: NDArray[np.integer]) -> bool:
        """Returns whether `tokens` begins with the tokens of this request."""
        return self.length <= len(tokens) and np.array_equal(self.tokens, tokens[: self.length])


class Tracker(Generic[State]):
    """Finds the request of every row.

    Engines reuse and move rows. A request that is preempted or waits has no row, and gets another one later. If the engine
    gives names, a row belongs to the request of its name, provided that its tokens continue those of the request. Without
    names, a row belongs to the request whose tokens are exactly those that the row had before this step; the request that had
    this row last is tried first. Two requests with equal tokens cannot be distinguished then, but what is learned from one is
    true of the other. A row that fits no request starts a new one, so that nothing learned passes to another sequence.

    Args:
        most: requests that are kept at once, >= 1, rows of one step not counted: those longest away go first.
        ends: ids that end a text. A nameless request whose row vanishes after one of them has ended.
    """

    def __init__(self, most: int, ends: frozenset[int] = frozenset()) -> None:
        self.most, self.ends = most, ends
        self.step = 0
        self.known: dict[int, Tracked[State]] = {}
        """By key."""
        self._by_name: dict[str, Tracked[State]] = {}
        self._rows: list[Tracked[State] | None] = []
        """Of the last step."""
        self._next = 0

    def begin_step(self) -> None:
        """Starts a step; `find` is then called for every row, in order."""
        self.step += 1
        self._seen: list[Tracked[State] | None] = []

    def find(self, before: NDArray[np.integer], name: str | None) -> Tracked[State] | None:
        """Returns the request of the next row, or None for a new one.

        Args:
            before: [P], the row's tokens without those that this step emitted.
            name: the engine's name of the request, or None.
        Returns: a request whose tokens are a prefix of `before`; without names, equal to `before`.
        """
        row = len(self._seen)
        found = self._named(before, name) if name is not None else self._nameless(before, row)
        self._see(found)
        return found

    def begin(self, before: NDArray[np.integer], name: str | None, state: State) -> Tracked[State]:
        """Adds a new request in the row of the last call of `find`."""
        tracked = Tracked(self._next, name, before, state)
        self._next += 1
        self.known[tracked.key] = tracked
        if name is not None:
            self._by_name[name] = tracked
        self._seen.pop()
        self._see(tracked)
        return tracked

    def _see(self, tracked: Tracked[State] | None) -> None:
        if tracked is not None:
            tracked.missed = self.step - tracked.step - 1 if tracked.step >= 0 else 0
            tracked.row, tracked.step = len(self._seen), self.step
        self._seen.append(tracked)

    def _named(self, before: NDArray[np.integer], name: str) -> Tracked[State] | None:
        found = self._by_name.get(name)
        return found if found is not None and found.begins(before) else None

    def _nameless(self, before: NDArray[np.integer], row: int) -> Tracked[State] | None:
        here = self._rows[row] if row < len(self._rows) else None
        if here is not None and self._fits(here, before):
            return here
        latest_first = sorted(self.known.values(), key=lambda one: -one.step)
        return next((one for one in latest_first if self._fits(one, before)), None)

    def _fits(self, one: Tracked[State], before: NDArray[np.integer]) -> bool:
        free = one.step < self.step and one.key in self.known and one.name is None
        return free and one.length == len(before) and one.begins(before)

    def end_step(self) -> list[Tracked[State]]:
        """Ends a step. Returns the requests that count as ended, oldest first, and removes them. A request also ends if its
        name now belongs to another sequence."""
        self._rows = self._seen
        gone = []
        for one in self.known.values():
            away = self.step - one.step
            if one.name is not None:
                over = self._by_name.get(one.name) is not one
            else:
                over = away > PATIENCE or (away > 0 and one.length > 0 and int(one.tokens[-1]) in self.ends)
            if over:
                gone.append(one)
        waiting = [one for one in self.known.values() if one.step < self.step and one not in gone]
        waiting.sort(key=lambda one: one.step)
        gone += waiting[: max(len(waiting) - self.most, 0)]
        return self._forget(gone)

    def retain(self, names: Sequence[str]) -> list[Tracked[State]]:
        """Removes and returns the requests whose name is not among these; requests without a name stay."""
        alive = set(names)
        return self._forget([one for one in self.known.values() if one.name is not None and one.name not in alive])

    def clear(self) -> list[Tracked[State]]:
        """Removes and returns all requests."""
        return self._forget(list(self.known.values()))

    def _forget(self, gone: list[Tracked[State]]) -> list[Tracked[State]]:
        for one in gone:
            del self.known[one.key]
            if one.name is not None and self._by_name.get(one.name) is one:
                del self._by_name[one.name]
        return gone

    def away(self, steps: int) -> list[Tracked[State]]:
        """Returns the requests that have had no row for exactly this number of steps."""
        return [one for one in self.known.values() if self.step - one.step == steps]
