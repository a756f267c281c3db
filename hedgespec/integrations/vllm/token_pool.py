"""Selection and drafting for the requests of an engine that shows only token ids.

The engine treats drafts as one-hot distributions and verifies them itself. A drafted token d at a verified position is accepted
with its probability under the target, and the emitted token x is drawn from the same distribution, so 1[x = d] has this
probability as its mean. Every drafter can therefore be scored at every emitted token without the target's logits: 1[x = d] is
the acceptance_ratio of `hedgespec.evaluate` with proposal "argmax" (docs/notation.md, "Scores and losses").
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from hedgespec.config import DecodeConfig
from hedgespec.integrations.vllm.drafters import TokenDrafter
from hedgespec.integrations.vllm.request_learner import EngineClock, RequestLearner, Tally
from hedgespec.integrations.vllm.request_tracker import Tracked, Tracker
from hedgespec.selection.arms import Seconds
from hedgespec.selection.costs import Costs

CACHED = 8
"""Steps for which drafters keep the state of a request without a row. If it returns later, they read it again."""


class _Request:
    """What is kept of a request, for N drafters."""

    def __init__(self, learner: RequestLearner, count: int, prompt: int, warm: int) -> None:
        self.learner = learner
        self.prompt = prompt
        """Number of tokens of the prompt."""
        self.scored = max(prompt - warm, 1)
        """Index of the first token that is still to be scored."""
        self.taken = [0] * count
        """Number of verified tokens that each drafter has consumed."""
        self.guesses = [np.empty(0, dtype=np.int64) for _ in range(count)]
        """Each drafter's proposals for the unscored tokens that it has consumed and for the next one, int64."""
        self.draft: list[int] = []
        """The last draft that was passed to the engine."""

    @property
    def is_due(self) -> bool:
        """Whether all drafters are to be scored now, as they always are after the prompt."""
        return self.learner.needs_scores and (self.learner.evaluation_is_due or self.scored <= self.prompt)

    def forget(self) -> None:
        """Notes that the drafters have discarded the request."""
        self.taken = [0] * len(self.taken)
        self.guesses = [np.empty(0, dtype=np.int64) for _ in self.guesses]


class TokenProposer:
    """Drafts for the requests of an engine, each of which has its own learner.

    Args:
        drafters: the pool, N >= 1; names distinct.
        config: K and the learner, see `DecodeConfig`; a draft is a chain, its mode "argmax".
        max_length: most tokens that a request may have.
        max_requests: most requests that are kept while they have no row.
        ends: ids that end a sequence.
        seed: seed of the draws of drafters.
        warn: is called with a message when a drafter fails.
        clock: returns seconds, for objective "throughput".

    Raises: ValueError for a learner that does not fit the pool.
    """

    def __init__(
        self, drafters: Sequence[TokenDrafter], config: DecodeConfig, *, max_length: int, max_requests: int = 256,
        ends: Iterable[int] = (), seed: int = 0, warn: Callable[[str], None] = print, clock: Callable[[], float] | None = None,
    ) -> None:  # fmt: skip
        self.drafters, self.config, self.max_length, self.warn = tuple(drafters), config, max_length, warn
        self.tally = Tally([drafter.name for drafter in drafters])
        self.tracker: Tracker[_Request] = Tracker(max_requests, frozenset(ends))
        self.costs: Costs | None = None
        if config.objective == "throughput":
            self.costs = Costs(len(drafters), config.draft_length, *([] if clock is None else [clock]))
            self.timer = EngineClock(self.costs)
        self._random = np.random.default_rng(seed)
        self._learner()  # raises here if the learner does not fit

    def _learner(self) -> RequestLearner:
        return RequestLearner(self.tally, self.config, self._random)

    def propose(
        self, tokens: Sequence[NDArray[np.integer]], emitted: Sequence[int], names: Sequence[str] | None = None
    ) -> list[list[int]]:
        """Runs one step of the engine.

        Args:
            tokens: for each row all its verified tokens, [L_b >= 1], prompt included. The arrays are not kept.
            emitted: for each row how many of its last tokens are new in this step; 0 while its prompt is being read.
            names: the engine's names of the requests, if known. Without them every step of a request must be passed here.
        Returns: the drafts, 0..K tokens each.
        """
        known = names if names is not None else [None] * len(tokens)
        self.tracker.begin_step()
        rows = [self._row(text, new, name) for text, new, name in zip(tokens, emitted, known, strict=True)]
        active = [row for row in rows if row is not None]
        self._end(self.tracker.end_step())
        self._let_go(self.tracker.away(CACHED))
        if self.costs is not None:
            self.timer.enter(len(tokens))
        self._learn(active)
        drafts = self._draft(active)
        if self.costs is not None and len(active) == len(tokens):
            self.timer.leave(len(tokens), max(map(len, drafts), default=0))
        remaining = iter(drafts)
        return [[] if row is None else next(remaining) for row in rows]

    def retain(self, names: Sequence[str]) -> None:
        """Ends all requests except those with these names."""
        self._end(self.tracker.retain(names))

    def close(self) -> None:
        """Ends all requests."""
        self._end(self.tracker.clear())

    @property
    def requests(self) -> int:
        """Number of requests of which anything is kept."""
        return len(self.tracker.known)

    def _row(self, text: NDArray[np.integer], emitted: int, name: str | None) -> tuple[Tracked[_Request], int] | None:
        """Returns the request of a row and the number of its new tokens; None if the engine emitted none."""
        before = text[: len(text) - emitted]
        found = self.tracker.find(before, name)
        if emitted == 0:
            if found is not None:  # it was preempted, and its prompt is being read again
                found.state.draft = []
            return None
        if found is None:
            state = _Request(self._learner(), len(self.drafters), len(before), self.config.warm_start)
            found = self.tracker.begin(before, name, state)
        request = found.state
        if found.length != len(before) or found.missed:  # the engine verified another draft than the last one
            request.draft = []
        new = len(text) - found.length
        found.append(text[found.length :])
        return found, new

    def _learn(self, active: Sequence[tuple[Tracked[_Request], int]]) -> None:
        """Scores the requests that are due, and updates the learners."""
        due = [one for one, _ in active if one.state.is_due]
        for drafter in range(len(self.drafters)):
            self._bring_up(drafter, due)
        seconds = None if self.costs is None else self.costs.of(len(active))
        for one in due:
            self._score(one, seconds)
        for one, new in active:
            self._end_round(one, new)

    def _score(self, one: Tracked[_Request], seconds: Seconds | None) -> None:
        request, text = one.state, one.tokens
        first, last = request.scored, one.length
        scores = np.zeros((len(self.drafters), last - first))
        for drafter in np.flatnonzero(request.learner.alive):
            guesses = request.guesses[drafter]
            known = guesses[len(guesses) - 1 - (last - first) : len(guesses) - 1]  # the last one is for the next token
            scores[drafter] = known == text[first:last]
            request.guesses[drafter] = guesses[-1:]
        request.scored = last
        # The first token comes with the prompt's forward and cannot be drafted.
        warm = max(min(request.prompt + 1, last) - first, 0)
        request.learner.warm_up(scores[:, :warm], seconds)
        if last - first > warm:
            request.learner.scored(scores[:, warm:], scores[:, warm:], seconds)

    def _end_round(self, one: Tracked[_Request], new: int) -> None:
        request = one.state
        if one.length - new > request.prompt:
            drafted, came = request.draft, one.tokens[one.length - new :].tolist()
            right = next((place for place, (ours, theirs) in enumerate(zip(drafted, came)) if ours != theirs), len(drafted))
            request.learner.end_round(new, len(drafted), min(right, new - 1))

    def _bring_up(self, drafter: int, some: Sequence[Tracked[_Request]]) -> None:
        """Lets a drafter consume the tokens of these requests that it lacks."""
        some = [one for one in some if one.state.learner.alive[drafter] and one.state.taken[drafter] < one.length]
        if not some:
            return
        new = [one.tokens[one.state.taken[drafter] :] for one in some]
        # Proposals from the next token to be scored to the one after the last token.
        keep = [
            one.length + 1 - max(one.state.taken[drafter] + 1, one.state.scored) if one.state.learner.needs_scores else 1
            for one in some
        ]
        with self._quarantine(drafter, some):
            guesses = self.drafters[drafter].extend([one.key for one in some], new, keep)
            for one, guess in zip(some, guesses, strict=True):
                if one.state.learner.needs_scores:
                    one.state.guesses[drafter] = np.concatenate((one.state.guesses[drafter], guess))
                one.state.taken[drafter] = one.length

    def _draft(self, active: Sequence[tuple[Tracked[_Request], int]]) -> list[list[int]]:
        """Returns the drafts of the active requests."""
        some = [one for one, _ in active]
        rooms = [self.max_length - one.length for one in some]
        measure = self.costs.to_measure(len(some), max(rooms) - 1) if self.costs is not None and some else None
        choices = [one.state.learner.choose(room, measure) for one, room in zip(some, rooms)]
        for one in some:
            one.state.draft = []
        for drafter in sorted({choice.drafter for choice in choices if choice.draft_length}):
            own = [(one, choice.draft_length) for one, choice in zip(some, choices) if choice.drafter == drafter]
            self._bring_up(drafter, [one for one, _ in own])
            own = [(one, length) for one, length in own if one.state.learner.alive[drafter]]
            if not own:
                continue
            requests, lengths = zip(*own)
            began = self.costs.clock() if self.costs is not None else 0.0
            with self._quarantine(drafter, requests):
                drafts = self.drafters[drafter].draft([one.key for one in requests], lengths)
                for one, draft, length in zip(requests, drafts, lengths, strict=True):
                    one.state.draft = [int(token) for token in draft[:length]]
                if self.costs is not None:
                    self.costs.drafted(len(some), drafter, (self.costs.clock() - began) / max(lengths))
        return [one.state.draft for one in some]

    @contextmanager
    def _quarantine(self, drafter: int, some: Sequence[Tracked[_Request]]) -> Iterator[None]:
        """Drops a drafter that raises from these requests, which continue without it."""
        try:
            yield
        except Exception as error:
            cause = f"{type(error).__name__}: {error}"
            first = [one.state.learner.drop(drafter, cause) for one in some]
            if any(first):
                self.warn(f"drafter {self.drafters[drafter].name} failed and is out of the requests at hand: {cause}")
            self._drop(drafter, some)

    def _drop(self, drafter: int, some: Iterable[Tracked[_Request]]) -> None:
        try:
            self.drafters[drafter].drop([one.key for one in some])
        except Exception as error:
            self.warn(f"drafter {self.drafters[drafter].name} failed to forget: {type(error).__name__}: {error}")

    def _let_go(self, some: Sequence[Tracked[_Request]]) -> None:
        """Lets the drafters discard the state of requests."""
        if some:
            for drafter in range(len(self.drafters)):
                self._drop(drafter, some)
            for one in some:
                one.state.forget()

    def _end(self, gone: Sequence[Tracked[_Request]]) -> None:
        self._let_go(gone)
        for one in gone:
            one.state.learner.close()
