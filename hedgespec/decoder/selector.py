"""What decides who drafts in one request, and learns from how it went: numbers only, no models.

A request under way (`row.py`) holds one, and so does a replay of recorded acceptance: they cannot differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hedgespec.config import DecodeConfig
from hedgespec.decoder.back_off import BackOff
from hedgespec.delay import DelayQueue
from hedgespec.learners import Learner
from hedgespec.metrics import DecodeStats
from hedgespec.records import Choice
from hedgespec.selection import select

RAREST = 8
"""Most rounds from one evaluation to the next where they adapt; a power of two, so that the rows of a batch meet."""
NOBODY = Choice(drafter=-1, draft_length=0)


class Selector:
    """Selection and learning of one request.

    Args:
        drafters: their names, [N].
        config: the decoder's.
        learner: a fresh one.
        state: a `Learner.state_dict()` to go on from.
    """

    def __init__(
        self, drafters: Sequence[str], config: DecodeConfig, learner: Learner, state: Mapping[str, Any] | None = None
    ) -> None:
        self.config, self.learner = config, learner
        if state is not None:
            learner.load_state_dict(state)
        self.queue = DelayQueue(len(drafters), config.draft_length, estimator=config.estimator, loss=config.loss)
        self.stats = DecodeStats(tuple(drafters), config.draft_length)
        self.hears_all = learner.feedback == "full"
        self.scores_all = self.hears_all or config.track_regret
        """Whether all drafters are scored."""
        self.back_off = BackOff(self.queue, config.back_off if self.hears_all else None)
        """Who is left out of evaluations."""
        self.alive = np.ones(len(drafters), dtype=bool)
        """Which drafters have not failed, [N]."""
        self.every = config.evaluate_every if config.evaluate_every != "adaptive" else 1
        """Rounds from one evaluation to the next."""
        self.chosen = -1
        """Drafter of the last round."""
        self.may_switch = True
        """Whether every drafter may be chosen, or only the same again."""

    def weights(self) -> np.ndarray:
        """The learner's weights [N], what failed drafters hold shared out among the others; all 0 if all failed."""
        weights = self.learner.weights()
        if self.stats.failures:
            weights = np.where(self.alive, weights, 0.0)
            weights = weights / weights.sum() if weights.any() else self.alive / max(self.alive.sum(), 1)
        return weights

    def select(self, weights: np.ndarray, uniform: float, room: int) -> Choice:
        """The drafter of the next round, which may emit `room` tokens. With a learner that hears of all drafters it changes
        only after an evaluation, when all of them are up to date; while one stays, evaluations grow rarer if the
        configuration lets them."""
        if room <= 1 or not weights.any():  # the recovered or bonus token comes on top of the draft
            return NOBODY
        if self.may_switch or not self.alive[self.chosen]:
            chosen = select(weights, uniform, draft_length=self.config.draft_length, rule=self.config.selection).drafter
            if self.config.evaluate_every == "adaptive":
                self.every = min(2 * self.every, RAREST) if chosen == self.chosen else 1
            self.chosen, self.may_switch = chosen, not self.hears_all
            self.back_off.wake(chosen)
        return Choice(self.chosen, min(self.config.draft_length, room - 1))

    def evaluation_is_due(self, finished: bool) -> bool:
        """After the round that is under way. At the end of the request, too: what is known by then is learned, for a next
        one to go on from."""
        return self.scores_all and (finished or (self.stats.rounds + 1) % self.every == 0)

    def to_score(self, finished: bool, missed: np.ndarray) -> np.ndarray:
        """Whom the evaluation that is due scores, bool [N], of drafters that have missed so many tokens, int64 [N]; at the end
        of the request everyone."""
        asked = self.back_off.ask(finished, self.weights() > self.learner.negligible, missed)
        self.stats.evaluations += asked
        return asked

    def warm_up(self, acceptance_prob: np.ndarray) -> None:
        """Lets the learner hear how every drafter fared at the warm start's positions, float64 [N, T]."""
        for losses in 1.0 - acceptance_prob.clip(max=1.0).T:
            self.stats.prompt_losses.append(losses)
            self.learner.update(losses)

    def observe(self, acceptance_prob: np.ndarray, acceptance_ratio: np.ndarray) -> None:
        """Hands the learner every drafter's completed losses. Both: float64 [N, T] of the tokens that come next, NaN throughout
        for drafters that were not asked; of draft trees [K, N, T], by depth."""
        for drafter, first, losses in self.back_off.late(acceptance_prob, acceptance_ratio):
            here = slice(first, first + len(losses))
            self.learner.catch_up(drafter, losses, self.stats.played[here])
            for known, loss in zip(self.stats.losses[here], losses):
                known[drafter] = loss
        for losses in self.back_off.push(acceptance_prob, acceptance_ratio):
            self.stats.record_loss(losses, self.learner.expected_loss(losses))
            if self.hears_all:
                self.learner.update(losses)
        self.back_off.judge(self.alive & (self.weights() <= self.learner.negligible))
        self.may_switch = True

    def catch_up(self, drafter: int, acceptance_prob: np.ndarray, acceptance_ratio: np.ndarray) -> None:
        """Takes what a drafter missed, float64 [T], of draft trees [K, T]: all tokens before those that `observe` gets next."""
        self.back_off.catch_up(drafter, acceptance_prob, acceptance_ratio)

    def close(self) -> None:
        """Drops the last losses where they were not complete for all: a sleeper's may wait where the others' did not."""
        while self.stats.losses and np.isnan(self.stats.losses[-1]).any():
            self.stats.losses.pop()
            self.stats.played.pop()

    def end_round(self, drafter: int | None, weights: np.ndarray, emitted: int) -> None:
        """Records a round: who drafted (None: nobody), the weights at its beginning, and the tokens it emitted. A learner that
        asks for no more hears how the drafter fared."""
        if drafter is not None and self.learner.feedback == "bandit":
            losses = np.full(len(self.alive), np.nan)
            losses[drafter] = 1 - emitted / (self.config.draft_length + 1)
            self.learner.update(losses, chosen=drafter, chosen_weight=float(weights[drafter]))
        self.stats.record_round(drafter, weights, emitted)

    def lose(self, drafter: int, cause: str) -> bool:
        """Goes on without a drafter; whether it was there."""
        name = self.stats.drafters[drafter]
        if name in self.stats.failures:
            return False
        self.stats.failures[name] = cause
        self.alive[drafter] = False
        return True
