"""Learns for each request of an engine which EAGLE head drafts. Numbers only, without models.

The engine verifies drafts as one-hot distributions, so a head proposes one token at a position, its argmax d. With proposal
"argmax" its scores (`hedgespec.evaluate`) are p[d] and 1[d = x], where p is the target's distribution and x the emitted token.
The proposed token and its probability are therefore all that is needed of a head at a position, and no logits are kept. From
step to step only the proposals for the next token of each request are kept.
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

ABSTAINS = -1
"""The proposal of a head that has none."""


class _Request:
    """What is kept of a request between two steps, for N heads."""

    def __init__(self, learner: RequestLearner) -> None:
        self.learner = learner
        self.proposals = np.empty(0, dtype=np.int64)
        """int64 [N]: the heads' tokens at `place`."""
        self.place = -1
        """Index of the token that the proposals are for."""
        self.unscored: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []
        """Scores for the next evaluation."""


class HeadLearning:
    """The learners of all requests of an engine, by name of the request.

    Args:
        heads: N >= 1 distinct names.
        config: K and the learner; drafts are argmax chains. `evaluate_every` "adaptive" is 1 here, because the heads have
            consumed the tokens anyway.
        seed: seed of the draws of heads.
        warn: is called with a message when a head is dropped.

    Raises: ValueError for a learner that does not fit the pool.
    """

    def __init__(self, heads: Sequence[str], config: DecodeConfig, seed: int, warn: Callable[[str], None] = print) -> None:
        self.config = replace(config, evaluate_every=1) if config.evaluate_every == "adaptive" else config
        self.tally, self.warn = Tally(heads), warn
        self.requests: dict[str, _Request] = {}
        self.lost: dict[int, str] = {}
        """Head -> cause, of the heads that failed. They lack tokens from then on, so they are dropped from all requests."""
        self._random = np.random.default_rng(seed)
        full_feedback = self._learner().selector.full_feedback  # raises here if the learner does not fit
        self.warm = self.config.warm_start if full_feedback else 0
        """Number of prompt positions that a learner uses."""

    def _learner(self) -> RequestLearner:
        return RequestLearner(self.tally, self.config, self._random)

    def is_new(self, name: str) -> bool:
        """Returns whether the request is unknown."""
        return name not in self.requests

    def begin(self, name: str, prompt: NDArray[np.float64] | None = None, seconds: Seconds | None = None) -> None:
        """Starts a request after its prompt was read.

        Args:
            name: the engine's name of the request.
            prompt: float64 [N, T], acceptance_prob of the heads at the prompt's last positions; None or T = 0: no warm start.
            seconds: measured costs, for objective "throughput".
        """
        request = self.requests[name] = _Request(self._learner())
        for head, cause in self.lost.items():
            request.learner.drop(head, cause)
        if prompt is not None:
            request.learner.warm_up(prompt, seconds)

    def proposals(self, name: str, place: int) -> NDArray[np.int64] | None:
        """Returns the heads' proposals for the token at index `place`, int64 [N]. None if there are none because the engine ran
        steps without drafting, as it does when a row of the batch is near the end of the context."""
        request = self.requests[name]
        return request.proposals if request.place == place else None

    def propose(self, name: str, place: int, proposals: NDArray[np.int64], finite: NDArray[np.bool_]) -> None:
        """Stores the heads' proposals for the token at index `place`, int64 [N].

        Heads whose output was not finite in this step (`finite`, bool [N]) are dropped from the request.
        """
        request = self.requests[name]
        request.proposals, request.place = proposals, place
        for head in np.flatnonzero(~finite & request.learner.alive):
            if request.learner.drop(int(head), "not finite"):
                self.warn(f"drafter {self.tally.drafters[head]} returned values that are not finite and is out of the request")

    def learn(
        self, name: str, acceptance_prob: NDArray[np.float64], acceptance_ratio: NDArray[np.float64], drafted: int,
        seconds: Seconds | None = None,
    ) -> None:  # fmt: skip
        """Ends a round that emitted T tokens, and scores the heads on them.

        Args:
            name: name of the request.
            acceptance_prob, acceptance_ratio: float64 [N, T >= 1], scores of all heads at these tokens.
            drafted: number of drafted tokens that the engine verified, 0..K.
            seconds: measured costs, for objective "throughput".
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
        """Returns head and draft length of the request's next round, which may emit up to `room` tokens."""
        choice = self.requests[name].learner.choose(room, measure)
        return NO_DRAFT if choice.drafter in self.lost else choice

    def drop(self, head: int, cause: str) -> None:
        """Drops a head from all requests, those to come included."""
        if head not in self.lost:
            self.lost[head] = cause
            self.warn(f"drafter {self.tally.drafters[head]} failed and is out of all requests: {cause}")
        for request in self.requests.values():
            request.learner.drop(head, cause)

    def forget(self, names: Iterable[str]) -> None:
        """Ends these requests. Unknown names are ignored."""
        for name in names:
            request = self.requests.pop(name, None)
            if request is not None:
                request.learner.close()
