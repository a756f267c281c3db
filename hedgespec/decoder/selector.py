"""What decides who drafts in one request, and learns from how it went: numbers only, no models.

A request under way (`row.py`) holds one, and so does a replay of recorded acceptance: they cannot differ.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hedgespec.config import DecodeConfig
from hedgespec.decoder.arms import ARMS, Seconds
from hedgespec.decoder.back_off import BackOff
from hedgespec.delay import DelayQueue
from hedgespec.depth import DepthCorrection
from hedgespec.learners import Learner, make
from hedgespec.metrics import DecodeStats
from hedgespec.records import NOBODY, Choice, Feedback
from hedgespec.selection import select

RAREST = 8
"""Most rounds from one evaluation to the next where they adapt; a power of two, so that the rows of a batch meet."""
RAREST_PLAIN = 64
"""The same while nobody drafts. Each of the rounds emits one token, whose logits are kept until then: no more than of `RAREST`
rounds with drafts."""


def new_learner(config: DecodeConfig, num_drafters: int) -> Learner:
    """A learner over the objective's arms as the configuration has it, at the start of a request.

    Raises: ValueError for an unknown learner, one that does not go with the objective, or a prior of the wrong size; TypeError
    for an option that it does not have.
    """
    arms = ARMS[config.objective]
    prior = None if config.prior is None else np.array(config.prior)
    if prior is not None and prior.shape != (num_drafters,):
        raise ValueError(f"prior: expected shape ({num_drafters},), got {prior.shape}")
    prior = None if prior is None else arms.spread(prior, config.draft_length)
    learner = make(config.learner, arms.count(num_drafters, config.draft_length), prior=prior, **config.learner_options)
    if arms.needs_seconds and learner.feedback != "full":
        raise ValueError(
            f"learner: expected one that hears of all drafters with objective {config.objective!r}, such as normal_hedge, "
            f"hedge or ada_normal_hedge, got {config.learner!r}"
        )
    return learner


@dataclass(frozen=True, slots=True)
class _Round:
    """A round whose tokens are not scored yet."""

    drafter: int | None
    weight: float
    """Probability of its draw."""
    emitted: int
    tested: int
    """Drafted tokens, from the first, each of which is known to have been accepted or not."""
    accepted: int
    """How many of these were accepted."""


class Selector:
    """Selection and learning of one request.

    Args:
        drafters: their names, [N].
        config: the decoder's.
        learner: a fresh one, over the objective's arms.
        state: a `Learner.state_dict()` to go on from.
        own_features: whether each drafter drafts on features of its own, [N], see `hedgespec.depth`; None: none does.
        queue: as yet empty; None makes that of the configuration.

    Raises: ValueError for a state that is not of such a learner.
    """

    def __init__(
        self, drafters: Sequence[str], config: DecodeConfig, learner: Learner, state: Mapping[str, Any] | None = None,
        own_features: Sequence[bool] | None = None, queue: DelayQueue | None = None,
    ) -> None:  # fmt: skip
        self.config, self.learner = config, learner
        self.alive = np.ones(len(drafters), dtype=bool)
        """Which drafters have not failed, [N]."""
        self.arms = ARMS[config.objective](self.alive, config.draft_length)
        if state is not None:
            if self.arms.needs_seconds and state.get("num_drafters") != learner.num_drafters:
                raise ValueError(
                    f"learner_state: expected one over the {learner.num_drafters} arms of objective {config.objective!r} with "
                    f"{len(drafters)} drafters and draft_length {config.draft_length}, got one over {state.get('num_drafters')}"
                )
            learner.load_state_dict(state)
        self.queue = queue or DelayQueue(
            len(drafters), config.draft_length, estimator=config.estimator, loss=config.loss, lengths=self.arms.needs_seconds
        )
        self.waiting: list[Feedback] = []
        """What the queue has completed and the learner has not heard: nothing has a price yet."""
        self.hears_all = learner.feedback == "full"
        self.back_off = BackOff(self.queue, config.back_off if self.hears_all else None)
        """Who is left out of evaluations."""
        self.depths = None
        if config.depth_correction:
            self.depths = DepthCorrection(own_features or [False] * len(drafters), config.draft_length)
        self.stats = DecodeStats(tuple(drafters), config.draft_length)
        self.scores_all = self.hears_all or learner.hears_scores or config.track_regret
        """Whether all drafters are scored."""
        self.every = config.evaluate_every if config.evaluate_every != "adaptive" else 1
        """Rounds from one evaluation to the next."""
        self.chosen = NOBODY
        """What was drawn last."""
        self.may_switch = True
        """Whether anything may be chosen, or only the same again."""
        self.unscored: deque[_Round] = deque()
        self.scored: deque[np.ndarray] = deque()
        """acceptance_prob [N] of the tokens of these rounds as far as they are known; of draft trees [K, N]."""

    def weights(self) -> np.ndarray:
        """The learner's weights [A] of the arms (drafters, unless the objective has others), what those of failed drafters hold
        shared out among the rest; all 0 if none is left."""
        weights = self.learner.weights()
        if self.stats.failures:
            alive = self.arms.alive
            weights = np.where(alive, weights, 0.0)
            weights = weights / weights.sum() if weights.any() else alive / max(alive.sum(), 1)
        return weights

    def select(self, weights: np.ndarray, uniform: float, room: int, measure: Choice | None = None) -> Choice:
        """Who drafts how many tokens in the next round, which may emit `room`. With a learner that hears of all drafters this
        changes only after an evaluation, when all of them are up to date; while one stays, evaluations grow rarer if the
        configuration lets them. `measure` is what is drafted instead where its cost is wanted."""
        if room <= 1 or not weights.any():  # the recovered or bonus token comes on top of the draft
            return NOBODY
        if measure is not None:
            return self._to_measure(measure, weights, uniform, room)
        gone = self.chosen.drafter >= 0 and not self.alive[self.chosen.drafter]
        if self.may_switch or gone:
            chosen = self.arms.choice(select(weights, uniform, self.config.selection))
            if self.config.evaluate_every == "adaptive" and not self.learner.hears_scores:
                rarest = RAREST if chosen.drafter >= 0 else RAREST_PLAIN
                self.every = min(2 * self.every, rarest) if chosen.drafter == self.chosen.drafter else 1
            self.chosen, self.may_switch = chosen, not self.hears_all
            self.back_off.wake(self.chosen.drafter)
        return Choice(self.chosen.drafter, min(self.chosen.draft_length, room - 1))

    def _to_measure(self, measure: Choice, weights: np.ndarray, uniform: float, room: int) -> Choice:
        """That, or where its drafter has failed as much by another one."""
        if measure == NOBODY or not self.alive.any():
            return NOBODY
        drafter = measure.drafter
        if not self.alive[drafter]:
            by_drafter = self.arms.by_drafter(weights)
            by_drafter = by_drafter if by_drafter.sum() > 0 else self.alive
            drafter = select(by_drafter / by_drafter.sum(), uniform)
        return Choice(drafter, min(measure.draft_length, room - 1))

    def evaluation_is_due(self, finished: bool) -> bool:
        """After the round that is under way. At the end of the request, too: what is known by then is learned, for a next
        one to go on from."""
        return self.scores_all and (finished or (self.stats.rounds + 1) % self.every == 0)

    def to_score(self, finished: bool, missed: np.ndarray) -> np.ndarray:
        """Whom the evaluation that is due scores, bool [N], of drafters that have missed so many tokens, int64 [N]; at the end
        of the request everyone."""
        asked = self.back_off.ask(finished, self.arms.by_drafter(self.weights()) > self.learner.negligible, missed)
        self.stats.evaluations += asked
        return asked

    def warm_up(self, acceptance_prob: np.ndarray, seconds: Seconds | None = None) -> None:
        """Lets the learner hear how every drafter fared at the warm start's positions, float64 [N, T], if what it learns of has
        a price, and that is known."""
        if seconds is None and self.arms.needs_seconds:
            return
        columns = acceptance_prob.clip(max=1.0).T
        for position, column in enumerate(columns, -len(columns)):
            losses = self.arms.losses(self.arms.of_prompt(column, position), seconds)
            self.stats.prompt_losses.append(losses)
            self.learner.update(losses)

    def observe(self, acceptance_prob: np.ndarray, acceptance_ratio: np.ndarray, seconds: Seconds | None = None) -> None:
        """Hands the learner every arm's completed losses; where they depend on what rounds cost and that is not known yet, they
        wait. Both: float64 [N, T] of the tokens that come next, NaN throughout for drafters that were not asked; of draft trees
        [K, N, T], by depth."""
        self.scored.extend(np.moveaxis(acceptance_prob, -1, 0))
        if self.depths is not None:
            acceptance_prob, acceptance_ratio = map(self.depths.correct, (acceptance_prob, acceptance_ratio))
        for drafter, first, losses in self.back_off.late(acceptance_prob, acceptance_ratio):
            here = slice(first, first + len(losses))
            self.learner.catch_up(drafter, losses, self.stats.played[here])
            for known, loss in zip(self.stats.losses[here], losses):
                known[drafter] = loss
        self.waiting += self.back_off.push(acceptance_prob, acceptance_ratio)
        self.may_switch = True
        if seconds is not None or not self.arms.needs_seconds:
            for feedback in self.waiting:
                losses = self.arms.losses(feedback, seconds)
                self.stats.record_loss(losses, self.learner.expected_loss(losses))
                if self.hears_all:
                    self.learner.update(losses)
            self.waiting.clear()
        self.back_off.judge(self.alive & (self.arms.by_drafter(self.weights()) <= self.learner.negligible))

    def catch_up(self, drafter: int, acceptance_prob: np.ndarray, acceptance_ratio: np.ndarray) -> None:
        """Takes what a drafter missed, float64 [T], of draft trees [K, T]: all tokens before those that `observe` gets next."""
        self.back_off.catch_up(drafter, acceptance_prob, acceptance_ratio)

    def close(self) -> None:
        """Drops the last losses where they were not complete for all: a sleeper's may wait where the others' did not."""
        while self.stats.losses and np.isnan(self.stats.losses[-1]).any():
            self.stats.losses.pop()
            self.stats.played.pop()

    def end_round(
        self, drafter: int | None, weights: np.ndarray, emitted: int, drafted: int, tested: int, held_back: bool = False
    ) -> None:  # fmt: skip
        """Records a round: who drafted (None: nobody), the weights at its beginning, the tokens it emitted and drafted, and how
        many drafted ones, from the first, are known to have been accepted or not; the last emitted token is one that was
        accepted if the row was `held_back`, see `Row`. A learner that asks for no more hears how
        the drafter fared. Rounds all of whose tokens are scored by now are looked back at."""
        weight = 0.0
        if drafter is not None and self.learner.feedback == "bandit":
            weight = float(weights[drafter])
            if not self.learner.hears_scores:
                self._tell(drafter, weight, 1 - emitted / (self.config.draft_length + 1))
        self.stats.record_round(drafter, self.arms.by_drafter(weights), emitted, drafted)
        if self.scores_all:
            self.unscored.append(_Round(drafter, weight, emitted, tested, min(emitted - 1 + held_back, tested)))
            while self.unscored and self.unscored[0].emitted <= len(self.scored):
                self._look_back(self.unscored.popleft())

    def _look_back(self, past: _Round) -> None:
        """At a round whose tokens are scored by now."""
        scores = [self.scored.popleft() for _ in range(past.emitted)]
        if past.drafter is None:
            return
        chain, deepest = self.config.tree is None, self.config.draft_length - 1
        block = [one[past.drafter] if chain else one[min(depth, deepest), past.drafter] for depth, one in enumerate(scores)]
        if chain and self.alive[past.drafter]:
            predicted, accepted = np.array(block[: past.tested]), past.accepted
            corrected = predicted
            if self.depths is not None:
                corrected = predicted * self.depths.factors[: past.tested, past.drafter]
                self.depths.learn(past.drafter, predicted, accepted)
            self.stats.record_depths(predicted, corrected, accepted)
        if self.learner.hears_scores:
            self._tell(past.drafter, past.weight, 1 - min(float(np.mean(block)), 1.0))

    def _tell(self, drafter: int, weight: float, loss: float) -> None:
        """Lets a bandit hear what the drafter that it drew with this probability lost."""
        losses = np.full(len(self.alive), np.nan)
        losses[drafter] = loss
        self.learner.update(losses, chosen=drafter, chosen_weight=weight)

    def lose(self, drafter: int, cause: str) -> bool:
        """Goes on without a drafter; whether it was there."""
        name = self.stats.drafters[drafter]
        if name in self.stats.failures:
            return False
        self.stats.failures[name] = cause
        self.alive[drafter] = False
        return True
