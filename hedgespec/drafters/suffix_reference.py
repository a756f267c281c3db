"""The suffix automaton of `csrc/suffix_automaton.cpp` in Python, for machines without the native module and for its tests.

The fields have the same names there, and every method returns the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

Continuation = tuple[int, int, int, int]
"""(token, length, count, total): the most frequent next token, -1 if nothing matches; tokens that match; how often that token
followed; how often any token followed."""

NOTHING: Continuation = (-1, 0, 0, 0)
MOST_SUFFIXES = 32


@dataclass(slots=True)
class _Edge:
    to: int
    count: int
    when: int


@dataclass(slots=True)
class _State:
    length: int
    link: int
    edges: dict[int, _Edge] = field(default_factory=dict)
    best: int = -1
    """Token of the most frequent edge."""
    total: int = 0


@dataclass(slots=True)
class _Text:
    tokens: list[int] = field(default_factory=list)
    state: int = 0
    open: bool = True


class SuffixAutomaton:
    """See csrc/suffix_automaton.h."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens, self.tokens = max_tokens, 0
        self._texts: dict[int, _Text] = {}
        self._next = 0
        self._clear()

    def _clear(self) -> None:
        self._states, self._now = [_State(0, -1)], 0

    def open(self) -> int:
        self._texts[self._next] = _Text()
        self._next += 1
        return self._next - 1

    def close(self, text: int) -> None:
        if text in self._texts:
            self._texts[text].open = False
            if not self._texts[text].tokens:
                del self._texts[text]

    def append(self, text: int, tokens: Sequence[int], keep: int) -> list[Continuation]:
        own, kept = self._texts[text], []
        for index, token in enumerate(tokens):
            own.state = self._extend(own.state, token)
            own.tokens.append(token)
            if index >= len(tokens) - keep:
                kept.append(self._continuation(*self._match(own)))
        self.tokens += len(tokens)
        if 0 < self.max_tokens < self.tokens:
            self._evict()
        return kept

    def after(self, text: int, drafted: Sequence[int]) -> Continuation:
        return self._continuation(*self._walk(text, drafted))

    def all_after(self, text: int, drafted: Sequence[int], most: int) -> list[Continuation]:
        state, length = self._known(*self._walk(text, drafted))
        if state <= 0:
            return []
        found = self._states[state]
        ranked = sorted(found.edges.items(), key=lambda item: (-item[1].count, -item[1].when))
        return [(token, length, edge.count, found.total) for token, edge in ranked[:most]]

    def draft(self, text: int, count: int) -> list[Continuation]:
        drafted: list[Continuation] = []
        match = self._match(self._texts[text])
        while len(drafted) < count and (following := self._continuation(*match))[0] >= 0:
            drafted.append(following)
            match = self._advance(*match, following[0])
        return drafted

    def texts(self) -> list[list[int]]:
        return [list(text.tokens) for text in self._texts.values()]

    @property
    def bytes(self) -> int:
        """0: Python does not tell."""
        return 0

    def _extend(self, state: int, token: int) -> int:
        self._now += 1
        states = self._states
        states.append(_State(states[state].length + 1, 0))
        current, suffix = len(states) - 1, state
        while suffix >= 0 and token not in states[suffix].edges:
            self._add(suffix, token, _Edge(current, 1, self._now))
            suffix = states[suffix].link
        if suffix < 0:
            return current
        target = states[suffix].edges[token].to
        if states[target].length != states[suffix].length + 1:
            clone = len(states)
            states.append(_State(states[suffix].length + 1, states[target].link))
            for other, edge in states[target].edges.items():
                self._add(clone, other, _Edge(edge.to, edge.count, edge.when))
            one = suffix
            while one >= 0 and states[one].edges[token].to == target:
                states[one].edges[token].to = clone
                one = states[one].link
            states[target].link = target = clone
        states[current].link = target
        for _ in range(MOST_SUFFIXES):
            if suffix < 0:
                break
            self._follow(suffix, token)
            suffix = states[suffix].link
        return current

    def _add(self, state: int, token: int, edge: _Edge) -> None:
        own = self._states[state]
        own.edges[token] = edge
        own.total += edge.count
        best = own.edges.get(own.best)
        if best is None or (edge.count, edge.when) >= (best.count, best.when):
            own.best = token

    def _follow(self, state: int, token: int) -> None:
        own = self._states[state]
        edge = own.edges[token]
        edge.count, edge.when, own.total = edge.count + 1, self._now, own.total + 1
        if edge.count >= own.edges[own.best].count:
            own.best = token

    def _match(self, text: _Text) -> tuple[int, int]:
        link = self._states[text.state].link
        return (0, 0) if link < 0 else (link, self._states[link].length)

    def _walk(self, text: int, drafted: Sequence[int]) -> tuple[int, int]:
        match = self._match(self._texts[text])
        for token in drafted:
            match = self._advance(*match, token)
        return match

    def _advance(self, state: int, length: int, token: int) -> tuple[int, int]:
        while token not in self._states[state].edges:
            if state == 0:
                return 0, 0
            state = self._states[state].link
            length = self._states[state].length
        return self._states[state].edges[token].to, length + 1

    def _known(self, state: int, length: int) -> tuple[int, int]:
        """The longest suffix of the match that something follows."""
        while state > 0 and self._states[state].best < 0:
            state = self._states[state].link
            length = self._states[state].length
        return state, length

    def _continuation(self, state: int, length: int) -> Continuation:
        state, length = self._known(state, length)
        if state <= 0:
            return NOTHING
        found = self._states[state]
        return found.best, length, found.edges[found.best].count, found.total

    def _evict(self) -> None:
        room = self.max_tokens // 2
        for text in reversed(self._texts.values()):
            kept = min(len(text.tokens), room)
            text.tokens = text.tokens[len(text.tokens) - kept :]
            room -= kept
        self._texts = {number: text for number, text in self._texts.items() if text.open or text.tokens}
        self._clear()
        self.tokens = 0
        for text in self._texts.values():
            text.state = 0
            for token in text.tokens:
                text.state = self._extend(text.state, token)
            self.tokens += len(text.tokens)
