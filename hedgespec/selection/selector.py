"""Chooses the drafter of every round of one request, and learns from the outcome. Works on numbers only.

A request under way (`hedgespec.decoder.row.Row`) holds one `Selector`, and so does a replay of recorded acceptance, so both
make the same decisions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hedgespec.config import DecodeConfig
from hedgespec.learners import Learner, make
from hedgespec.records import NO_DRAFT, Choice, Feedback
from hedgespec.selection.arms import ARMS, Seconds
from hedgespec.selection.delay import DelayQueue
from hedgespec.selection.select import select
from hedgespec.stats import DecodeStats

MAX_EVALUATE_EVERY = 8
"""Largest adaptive number of rounds between two evaluations. A power of two, so that the rows of a batch are evaluated in the
same rounds."""
MAX_EVALUATE_EVERY_PLAIN = 64
"""The same while nobody drafts. Such a round emits one token, whose logits are kept until the evaluation."""


def new_learner(config: DecodeConfig, num_drafters: int) -> Learner:
    """Returns a fresh learner over the arms of `config.objective`.

    Raises:
        TypeError: `config.learner` is a function that returned something else than a learner.
        ValueError: an unknown learner, one over another number of arms, or one that does not support the objective.
    """
    if num_drafters == 0:
        return make("fixed", 1)  # nothing is ever chosen
    arms = ARMS[config.objective]
    count = arms.count(num_drafters, config.draft_length)
    learner = make(config.learner, count) if isinstance(config.learner, str) else config.learner(count)
    if not isinstance(learner, Learner):
        raise TypeError(f"learner: expected a function that returns a hedgespec.learners.Learner, got {learner!r}")
    if learner.num_drafters != count:
        raise ValueError(f"learner: expected one over {count} arms, got one over {learner.num_drafters}")
    if arms.needs_seconds and learner.feedback != "full":
        raise ValueError(
            f"learner: expected one with full feedback for objective {config.objective!r}, such as normal_hedge, hedge or "
            f"ada_normal_hedge, got {learner.name!r}"
        )
    return learner


@dataclass(frozen=True, slots=True)
class _Round:
    """A round whose tokens are not scored yet."""

    drafter: int | None
    weight: float
    """Probability with which the drafter was drawn."""
    emitted: int
    tested: int
    """Number of leading draft tokens that are known to have been accepted or rejected."""
    accepted: int
    """Number of these that were accepted."""


class Selector:
    """Selection and learning of one request.

    Args:
        drafters: names of the N drafters.
        config: the decoder's configuration.
        learner: a fresh learner over the arms of `config.objective`.
        state: a `Learner.state_dict()` to continue from; None starts fresh.

    Raises:
        ValueError: a state that does not fit the learner.
    """

    def __init__(
        self, drafters: Sequence[str], config: DecodeConfig, learner: Learner, state: Mapping[str, Any] | None = None
    ) -> None:
        self.config, self.learner = config, learner
        self.alive = np.ones(len(drafters), dtype=bool)
        """bool [N]: which drafters have not failed."""
        self.arms = ARMS[config.objective](self.alive, config.draft_length)
        if state is not None:
            if self.arms.needs_seconds and state.get("num_drafters") != learner.num_drafters:
                raise ValueError(
                    f"learner_state: expected one over the {learner.num_drafters} arms of objective {config.objective!r} with "
                    f"{len(drafters)} drafters and draft_length {config.draft_length}, got one over {state.get('num_drafters')}"
                )
            learner.load_state_dict(state)
        self.queue = DelayQueue(max(len(drafters), 1), config.draft_length, lengths=self.arms.needs_seconds)
        self.unpriced: list[Feedback] = []
        """Completed losses that wait until the costs of a round are known."""
        self.full_feedback = learner.feedback == "full"
        self.stats = DecodeStats(tuple(drafters), config.draft_length)
        self.needs_scores = self.full_feedback or learner.hears_scores
        """Whether the drafters are scored at all."""
        self.every = config.evaluate_every if config.evaluate_every != "adaptive" else 1
        """Rounds from one evaluation to the next."""
        self.chosen = NO_DRAFT
        """The last choice that was drawn."""
        self.may_switch = True
        """Whether the next round may draw again; if not, it repeats the last choice."""
        self.unscored_rounds: deque[_Round] = deque()
        self.scored: deque[np.ndarray] = deque()
        """acceptance_prob of the scored tokens of these rounds, [N] a token; of draft trees [K, N]."""

    def weights(self) -> np.ndarray:
        """Returns the weights of the arms, float64 [A]. The weight of failed drafters is shared among the others; if none is
        left, all weights are 0."""
        if not self.alive.size:
            return np.zeros(0)
        weights = self.learner.weights()
        if self.stats.failures:
            alive = self.arms.alive
            weights = np.where(alive, weights, 0.0)
            weights = weights / weights.sum() if weights.any() else alive / max(alive.sum(), 1)
        return weights

    def select(self, weights: np.ndarray, uniform: float, room: int, measure: Choice | None = None) -> Choice:
        """Draws the drafter and the draft length of the next round.

        With full feedback the drafter changes only after an evaluation, when all drafters have consumed the same tokens. With
        `evaluate_every="adaptive"` evaluations become rarer while the same drafter is drawn.

        Args:
            weights: `self.weights()`.
            uniform: random number in [0, 1).
            room: tokens that the round may emit.
            measure: a choice to make instead, because its cost is to be measured.
        """
        if room <= 1 or not weights.any():  # the recovered or bonus token comes on top of the draft
            return NO_DRAFT
        if measure is not None:
            return self._to_measure(measure, weights, uniform, room)
        failed = self.chosen.drafter >= 0 and not self.alive[self.chosen.drafter]
        if self.may_switch or failed:
            chosen = self.arms.choice(select(weights, uniform))
            if self.config.evaluate_every == "adaptive" and not self.learner.hears_scores:
                limit = MAX_EVALUATE_EVERY if chosen.drafter >= 0 else MAX_EVALUATE_EVERY_PLAIN
                self.every = min(2 * self.every, limit) if chosen.drafter == self.chosen.drafter else 1
            self.chosen, self.may_switch = chosen, not self.full_feedback
        return Choice(self.chosen.drafter, min(self.chosen.draft_length, room - 1))

    def _to_measure(self, measure: Choice, weights: np.ndarray, uniform: float, room: int) -> Choice:
        """Returns `measure`, with another drafter if its own has failed."""
        if measure == NO_DRAFT or not self.alive.any():
            return NO_DRAFT
        drafter = measure.drafter
        if not self.alive[drafter]:
            by_drafter = self.arms.by_drafter(weights)
            by_drafter = by_drafter if by_drafter.sum() > 0 else self.alive
            drafter = select(by_drafter / by_drafter.sum(), uniform)
        return Choice(drafter, min(measure.draft_length, room - 1))

    def evaluation_is_due(self, finished: bool) -> bool:
        """Returns whether the drafters are scored after the round under way: every `every` rounds, and at the end of a request,
        so that its learner state is complete."""
        return self.needs_scores and (finished or (self.stats.rounds + 1) % self.every == 0)

    def warm_up(self, acceptance_prob: np.ndarray, seconds: Seconds | None = None) -> None:
        """Updates the learner with every drafter's acceptance_prob at the last prompt positions, float64 [N, T]. Does nothing
        if the losses depend on costs that are not known yet."""
        if seconds is None and self.arms.needs_seconds:
            return
        columns = acceptance_prob.clip(max=1.0).T
        for position, column in enumerate(columns, -len(columns)):
            feedback = self.arms.of_prompt(column, position)
            losses = self.arms.losses(feedback, seconds)
            self.arms.update(feedback)
            self.stats.prompt_losses.append(losses)
            self.learner.update(losses)

    def observe(self, acceptance_prob: np.ndarray, acceptance_ratio: np.ndarray, seconds: Seconds | None = None) -> None:
        """Updates the learner with the losses that the next scored tokens complete.

        Args:
            acceptance_prob, acceptance_ratio: float64 [N, T], of the tokens that follow those of the last call; of draft trees
                [K, N, T], by depth.
            seconds: costs of a round. Losses that depend on them wait while it is None.
        """
        self.scored.extend(np.moveaxis(acceptance_prob, -1, 0))
        self.unpriced += self.queue.push(acceptance_prob, acceptance_ratio)
        self.may_switch = True
        if seconds is None and self.arms.needs_seconds:
            return
        for feedback in self.unpriced:
            losses = self.arms.losses(feedback, seconds)
            self.arms.update(feedback)
            self.stats.record_loss(losses, self.learner.expected_loss(losses))
            if self.full_feedback:
                self.learner.update(losses)
        self.unpriced.clear()

    def end_round(
        self, drafter: int | None, weights: np.ndarray, emitted: int, drafted: int, tested: int, held_back: bool = False
    ) -> None:  # fmt: skip
        """Records a round, and updates a bandit.

        Args:
            drafter: index of the drafter; None if none drafted.
            weights: float64 [A], the weights at the beginning of the round.
            emitted: tokens that the round emitted.
            drafted: tokens that it drafted.
            tested: number of leading draft tokens that are known to have been accepted or rejected.
            held_back: whether the last emitted token is an accepted one, see `Row.held_back`.
        """
        weight = 0.0
        if drafter is not None and self.learner.feedback == "bandit":
            weight = float(weights[drafter])
            if not self.learner.hears_scores:
                self._update_bandit(drafter, weight, 1 - emitted / (self.config.draft_length + 1))
        self.stats.record_round(drafter, self.arms.by_drafter(weights), emitted, drafted)
        if self.needs_scores:
            self.unscored_rounds.append(_Round(drafter, weight, emitted, tested, min(emitted - 1 + held_back, tested)))
            while self.unscored_rounds and self.unscored_rounds[0].emitted <= len(self.scored):
                self._complete_round(self.unscored_rounds.popleft())

    def _complete_round(self, past: _Round) -> None:
        """Uses the scores of a round whose tokens are all scored by now."""
        scores = [self.scored.popleft() for _ in range(past.emitted)]
        if past.drafter is None:
            return
        chain, deepest = self.config.tree is None, self.config.draft_length - 1
        block = [one[past.drafter] if chain else one[min(depth, deepest), past.drafter] for depth, one in enumerate(scores)]
        if chain and self.alive[past.drafter]:
            self.stats.record_depths(np.array(block[: past.tested]), past.accepted)
        if self.learner.hears_scores:
            self._update_bandit(past.drafter, past.weight, 1 - min(float(np.mean(block)), 1.0))

    def _update_bandit(self, drafter: int, weight: float, loss: float) -> None:
        """Updates a bandit with the loss of the drafter that it drew with probability `weight`."""
        losses = np.full(len(self.alive), np.nan)
        losses[drafter] = loss
        self.learner.update(losses, chosen=drafter, chosen_weight=weight)

    def drop(self, drafter: int, cause: str) -> bool:
        """Takes a drafter out of the request. Returns whether it was still in."""
        name = self.stats.drafters[drafter]
        if name in self.stats.failures:
            return False
        self.stats.failures[name] = cause
        self.alive[drafter] = False
        return True
