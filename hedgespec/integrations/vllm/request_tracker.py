"""Which request a row of an engine's step belongs to, where the engine's rows move, vanish and come back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

State = TypeVar("State")

PATIENCE = 64
"""Steps that a request without a name may be away before it is taken to have ended."""


class Tracked(Generic[State]):
    """A request and its text."""

    def __init__(self, key: int, name: str | None, tokens: NDArray[np.integer], state: State) -> None:
        self.key, self.name, self.state = key, name, state
        """A number of its own, the engine's name for it, if it tells one, and what the owner keeps with it."""
        self.length = 0
        self._tokens = np.empty(max(64, 2 * len(tokens)), dtype=np.int64)
        self.row = -1
        """Where it was last."""
        self.step = -1
        """When."""
        self.missed = 0
        """Steps without a row that it had just before the last one with a row."""
        self.append(tokens)

    @property
    def tokens(self) -> NDArray[np.int64]:
        """Its verified tokens, int64 [length], prompt included."""
        return self._tokens[: self.length]

    def append(self, tokens: NDArray[np.integer]) -> None:
        """Verified tokens that follow."""
        end = self.length + len(tokens)
        if end > len(self._tokens):
            self._tokens = np.concatenate((self.tokens, np.empty(end, dtype=np.int64)))
        self._tokens[self.length : end] = tokens
        self.length = end

    def begins(self, tokens: NDArray[np.integer]) -> bool:
        """Whether that text begins with this one's."""
        return self.length <= len(tokens) and np.array_equal(self.tokens, tokens[: self.length])


class Tracker(Generic[State]):
    """Finds the request of every row.

    Engines reuse rows, move them, drop a request's row while it is preempted or waits for its turn, and give it another one
    later. Where the engine tells a name for each row that is the request, provided that its text goes on from what is known.
    Where it does not, the text itself is: a row goes on with the request whose tokens are, one for one, those that the row had
    before this step, looked for first where the row was last. Two requests of the same text cannot be told apart that way, nor
    need they be: whatever is learned from one's text is true of the other's. A row that fits nothing known begins a new
    request, so nothing learned ever passes to another text.

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
        """The rows asked for from here on are of one step."""
        self.step += 1
        self._seen: list[Tracked[State] | None] = []

    def find(self, before: NDArray[np.integer], name: str | None) -> Tracked[State] | None:
        """The request of the next row.

        Args:
            before: the row's tokens before what this step emitted, [P].
            name: the engine's, if it tells one.
        Returns: None where it is new. The text of what is returned begins `before`; without names it is `before`.
        """
        row = len(self._seen)
        found = self._named(before, name) if name is not None else self._nameless(before, row)
        self._see(found)
        return found

    def begin(self, before: NDArray[np.integer], name: str | None, state: State) -> Tracked[State]:
        """A new request in the row that was just asked for."""
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
        """Requests that are taken to have ended, in the order they came; they are known no more. A name that has another text
        now ends what had it before."""
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
        """The requests with a name that is none of these; they are known no more."""
        alive = set(names)
        return self._forget([one for one in self.known.values() if one.name is not None and one.name not in alive])

    def clear(self) -> list[Tracked[State]]:
        """All requests; none is known any more."""
        return self._forget(list(self.known.values()))

    def _forget(self, gone: list[Tracked[State]]) -> list[Tracked[State]]:
        for one in gone:
            del self.known[one.key]
            if one.name is not None and self._by_name.get(one.name) is one:
                del self._by_name[one.name]
        return gone

    def away(self, steps: int) -> list[Tracked[State]]:
        """Requests without a row for just so many steps."""
        return [one for one in self.known.values() if self.step - one.step == steps]
