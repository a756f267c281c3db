"""Which of an engine's EAGLE heads drafts in each request, learned from what all of them would have drafted: numbers only.

The engine takes drafts as they are, one-hot: a head's draft at a verified position is its argmax there, one token, which is
called its word here. So a word and what the target thinks of it are all there is to know of a head at a position, the numbers
of `hedgespec.evaluate` for mode "argmax" being p[word] and 1[word = x]; no head's logits need to be held beside another's. Of
each request only the words for the token that comes next are kept from step to step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from hedgespec.config import DecodeConfig
from hedgespec.integrations.vllm.request_learner import RequestLearner, Tally
from hedgespec.records import NO_DRAFT, Choice
from hedgespec.selection.arms import Seconds

SILENT = -1
"""Stands where a head has no word."""


class _Request:
    """What is kept of a request between two steps. N heads."""

    def __init__(self, learner: RequestLearner) -> None:
        self.learner = learner
        self.words = np.empty(0, dtype=np.int64)
        """What the heads say comes next, [N]."""
        self.place = -1
        """In the text, of the token they speak of."""
        self.unscored: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []
        """What the learner will hear at the next evaluation."""


class HeadLearning:
    """The learners of all requests of an engine, by the engine's names of the requests.

    Args:
        heads: their names, N >= 1, distinct.
        config: K and the learner; drafts are argmax chains. `evaluate_every` "adaptive" is 1 here: the heads have read the
            tokens anyway, so a rarer evaluation would save nothing.
        seed: of the draws of heads.
        warn: is told once a head that it is out, and why.

    Raises: ValueError for a learner that does not go with the pool.
    """

    def __init__(self, heads: Sequence[str], config: DecodeConfig, seed: int, warn: Callable[[str], None] = print) -> None:
        self.config = replace(config, evaluate_every=1) if config.evaluate_every == "adaptive" else config
        self.tally, self.warn = Tally(heads), warn
        self.requests: dict[str, _Request] = {}
        self.lost: dict[int, str] = {}
        """Heads that failed, in no request's part alone: they have missed tokens, and are out of all requests for good."""
        self._random = np.random.default_rng(seed)
        hears_all = self._learner().selector.full_feedback  # and says now if anything is wrong with it
        self.warm = self.config.warm_start if hears_all else 0
        """Positions of a prompt that a learner wants to hear of."""

    def _learner(self) -> RequestLearner:
        return RequestLearner(self.tally, self.config, self._random)

    def is_new(self, name: str) -> bool:
        """Whether nothing is known of that request."""
        return name not in self.requests

    def begin(self, name: str, prompt: NDArray[np.float64] | None = None, seconds: Seconds | None = None) -> None:
        """A request whose prompt is read.

        Args:
            name: the engine's.
            prompt: acceptance of the heads at the prompt's last positions, float64 [N, T]; None or T = 0: not looked at.
            seconds: what drafting and verifying cost, for objective "throughput".
        """
        request = self.requests[name] = _Request(self._learner())
        for head, cause in self.lost.items():
            request.learner.lose(head, cause)
        if prompt is not None:
            request.learner.warm_up(prompt, seconds)

    def words(self, name: str, place: int) -> NDArray[np.int64] | None:
        """What the heads said comes at that place of the text, [N]; None where they were not asked: the engine has gone on
        without drafting since, as it does in steps where a text of the batch nears the end of the context."""
        request = self.requests[name]
        return request.words if request.place == place else None

    def hear(self, name: str, place: int, words: NDArray[np.int64], sound: NDArray[np.bool_]) -> None:
        """Takes what the heads say comes at that place, [N], and whether they have been sound in this step, [N]."""
        request = self.requests[name]
        request.words, request.place = words, place
        for head in np.flatnonzero(~sound & request.learner.alive):
            if request.learner.lose(int(head), "not finite"):
                self.warn(f"drafter {self.tally.drafters[head]} said what is not finite and is out of the request")

    def learn(
        self, name: str, acceptance_prob: NDArray[np.float64], acceptance_ratio: NDArray[np.float64], drafted: int,
        seconds: Seconds | None = None,
    ) -> None:  # fmt: skip
        """Ends a round that emitted T tokens, the first of which was drafted by `words`, if any was.

        Args:
            name: the request's.
            acceptance_prob, acceptance_ratio: of all heads at these tokens, float64 [N, T >= 1].
            drafted: tokens that came before the engine, 0..K.
            seconds: what drafting and verifying cost, for objective "throughput".
        """
        request, emitted = self.requests[name], acceptance_prob.shape[1]
        learner = request.learner
        if learner.needs_scores:
            request.unscored.append((acceptance_prob, acceptance_ratio))
            if learner.evaluation_is_due:
                prob, ratio = (np.concatenate(parts, axis=1) for parts in zip(*request.unscored))
                learner.scored(prob, ratio, seconds)
                request.unscored.clear()
        learner.end_round(emitted, drafted, min(emitted - 1, drafted))  # the last token is recovered, or the bonus

    def choose(self, name: str, room: int, measure: Choice | None = None) -> Choice:
        """Who drafts in the request's next round, which may emit `room` tokens."""
        choice = self.requests[name].learner.choose(room, measure)
        return NO_DRAFT if choice.drafter in self.lost else choice

    def lose(self, head: int, cause: str) -> None:
        """Goes on without a head, in all requests."""
        if head not in self.lost:
            self.lost[head] = cause
            self.warn(f"drafter {self.tally.drafters[head]} failed and is out for good: {cause}")
        for request in self.requests.values():
            request.learner.lose(head, cause)

    def forget(self, names: Iterable[str]) -> None:
        """These requests have ended; unknown names are fine."""
        for name in names:
            request = self.requests.pop(name, None)
            if request is not None:
                request.learner.close()
