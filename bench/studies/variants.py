"""Alternatives to HedgeSpec's own selection and learning that the studies compare. None of them is part of the library.

Three need no code in a replay: they change what the learner is given.

- `product`: the paper's estimate of the accepted length, as a change of the trace;
- `acceptance_rate`: another loss, as a change of the trace with a learner that undoes its scale;
- `ArgmaxNormalHedge`: the drafter with the largest weight in place of a draw, as a learner.

The others learn at other times or from other numbers. `StudySelector` is the plain algorithm, written once more for replays:
with no change it makes every choice that `hedgespec`'s own selector makes, which a test checks. `CutShort`, `DepthCorrection`
and `BackOff` each override one part of it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from hedgespec import learners
from hedgespec.config import DecodeConfig
from hedgespec.experiments.recording import Trace
from hedgespec.experiments.replay import replay
from hedgespec.learners import NormalHedge
from hedgespec.records import NO_DRAFT, Choice
from hedgespec.selection.select import select
from hedgespec.stats import DecodeStats

Array = NDArray[np.float64]

# Changes of what the learner is given


def product(trace: Trace) -> Trace:
    """Returns a trace over which the learner gets the paper's estimate of the accepted length.

    The exact estimate 1 + sum_k prod_{j<k-1} ratio[t+j] * prob[t+k-1] with every ratio replaced by its mean, prob, is
    1 + sum_k prod_{j<k} prob[t+j]. Which drafted tokens are accepted does not depend on it.
    """
    return replace(trace, ratio=trace.prob)


class RescaledNormalHedge(NormalHedge):
    """NormalHedge on losses (K - g) / (K + 1), of which it learns 1 - g; see `acceptance_rate`."""

    def __init__(self, num_drafters: int, draft_length: int) -> None:
        self.draft_length = draft_length
        super().__init__(num_drafters)

    def _learn(self, losses, chosen, chosen_weight) -> None:
        super()._learn((self.draft_length + 1) * losses - (self.draft_length - 1), chosen, chosen_weight)


def acceptance_rate(trace: Trace, config: DecodeConfig, seed: int) -> DecodeStats:
    """Replays NormalHedge on the loss 1 - acceptance_prob, known as soon as a position is scored.

    With every ratio 0 the delay queue's loss is (K - prob) / (K + 1) at once, which `RescaledNormalHedge` scales back. The warm
    start's losses, 1 - prompt_prob, are put on the same scale.
    """
    length = config.draft_length
    changed = replace(trace, ratio=np.zeros_like(trace.ratio), prompt_prob=(trace.prompt_prob + 1) / (length + 1))
    return replay(changed, config, seed=seed, learner=RescaledNormalHedge(len(trace.drafters), length))


class ArgmaxNormalHedge(NormalHedge):
    """NormalHedge that always selects the drafter with the largest weight. It learns as NormalHedge does."""

    def weights(self) -> Array:
        return np.eye(self.num_drafters)[self._weights.argmax()]


class ForgetfulNormalHedge(NormalHedge):
    """NormalHedge on discounted regrets, which makes old losses count less. No bound is claimed.

    Args:
        num_drafters: N >= 1.
        keep: factor of the regrets at each position, in (0, 1); it looks back over about 1 / (1 - keep) positions.
    """

    def __init__(self, num_drafters: int, keep: float) -> None:
        self.keep = keep
        super().__init__(num_drafters)

    def _learn(self, losses, chosen, chosen_weight) -> None:
        self.regrets *= self.keep
        super()._learn(losses, chosen, chosen_weight)


# The plain algorithm, and changes of when and what it learns


def complete_length(prob: Array, ratio: Array) -> Array | None:
    """Returns the exact expected length of a round less 1, [N], or None if it is not known yet.

    Args:
        prob: [K, N], acceptance_prob at depth 0..K-1 of a draft; NaN from the first unknown position on.
        ratio: the same of acceptance_ratio.
    """
    known = len(prob) - int(np.isnan(prob[:, 0]).sum())
    if known < len(prob) and np.count_nonzero(ratio[:known].prod(axis=0)):
        return None
    accepted = prob[known - 1]
    for k in range(known - 2, -1, -1):
        accepted = accepted * ratio[k] + prob[k]
    return accepted


class StudySelector:
    """Selection and learning of one replayed request, for learners with full information.

    Args:
        trace: the text that is replayed.
        config: as for `replay`; either objective, no tree.
    """

    full_feedback = True
    MAX_EVERY, MAX_EVERY_PLAIN = 8, 64
    """Most rounds between evaluations with `evaluate_every="adaptive"`, and while no tokens are drafted."""

    def __init__(self, trace: Trace, config: DecodeConfig) -> None:
        self.config, self.length, self.count = config, config.draft_length, len(trace.drafters)
        self.prices = config.objective == "throughput"
        self.learner = self.new_learner(self.count * self.length + 1 if self.prices else self.count)
        self.stats = DecodeStats(trace.drafters, self.length)
        positions = trace.prob.shape[1]
        self.prob, self.ratio = np.full((2, positions + self.length, self.length, self.count), np.nan)
        """What was scored, by position, depth and drafter; NaN where not known yet."""
        self.scored = self.next = 0
        """Number of scored positions, and of positions whose loss the learner has."""
        self.emitted, self.heard = np.ones(self.count * self.length + 1), 1
        """Objective "throughput": sum of each arm's expected tokens, and number of terms."""
        self.every, self.may_switch, self.chosen = (
            1 if config.evaluate_every == "adaptive" else config.evaluate_every,
            True,
            NO_DRAFT,
        )

    def new_learner(self, count: int) -> learners.Learner:
        """Returns the learner over drafters, or over arms with objective "throughput"."""
        return learners.make(self.config.learner, count)

    def weights(self) -> Array:
        """Returns the learner's weights."""
        return self.learner.weights()

    def select(self, weights: Array, uniform: float, room: int) -> Choice:
        """Returns the drafter and draft length of the next round. They change only after an evaluation."""
        if room <= 1:
            return NO_DRAFT
        if self.may_switch:
            chosen = self._choice(select(weights, uniform))
            if self.config.evaluate_every == "adaptive":
                most = self.MAX_EVERY if chosen.drafter >= 0 else self.MAX_EVERY_PLAIN
                self.every = min(2 * self.every, most) if chosen.drafter == self.chosen.drafter else 1
            self.chosen, self.may_switch = chosen, False
        return Choice(self.chosen.drafter, min(self.chosen.draft_length, room - 1))

    def _choice(self, arm: int) -> Choice:
        if not self.prices:
            return Choice(arm, self.length)
        drafter, length = divmod(arm, self.length)
        return Choice(drafter, length + 1) if drafter < self.count else NO_DRAFT

    def warm_up(self, acceptance_prob: Array, seconds=None) -> None:
        """Learns 1 - acceptance_prob at the prompt's last positions, float64 [N, M]."""
        for column in acceptance_prob.clip(max=1.0).T:
            powers = column ** np.arange(1, self.length + 1)[:, None]
            self.learner.update(self._losses(1 - column, 1 + powers.cumsum(axis=0), seconds))

    def evaluation_is_due(self, finished: bool) -> bool:
        """Returns whether the round in progress ends with an evaluation."""
        return finished or (self.stats.rounds + 1) % self.every == 0

    def observe(self, acceptance_prob: Array, acceptance_ratio: Array, seconds=None) -> None:
        """Learns the losses that become complete with the positions scored now, float64 [N, T] each."""
        self._store(acceptance_prob, acceptance_ratio)
        while self.next < self.scored:
            here = slice(self.next, self.next + self.length)
            prob, ratio = (np.diagonal(one[here]).T for one in (self.prob, self.ratio))
            accepted = complete_length(prob, ratio)
            if accepted is None:
                break
            emitted, survival = np.ones((2, self.count))
            lengths = []
            for k in range(self.length if self.prices else 0):
                emitted = emitted + survival * np.nan_to_num(prob[k])
                survival = survival * np.nan_to_num(ratio[k])
                lengths.append(emitted)
            losses = (self.length - accepted) / (self.length + 1)
            self.learner.update(self._losses(losses, np.array(lengths), seconds))
            self.next += 1
        self.may_switch = True

    def _store(self, acceptance_prob: Array, acceptance_ratio: Array) -> None:
        new = slice(self.scored, self.scored + acceptance_prob.shape[1])
        for kept, scores in ((self.prob, acceptance_prob), (self.ratio, acceptance_ratio)):
            kept[new] = np.minimum(self.corrected(scores), 1.0).transpose(2, 0, 1)
        self.scored = new.stop

    def corrected(self, acceptance: Array) -> Array:
        """Returns acceptance [N, T] as it is at each depth of a draft, [K, N, T]."""
        return np.broadcast_to(acceptance, (self.length, *acceptance.shape))

    def _losses(self, losses: Array, lengths: Array, seconds) -> Array:
        """Returns the loss of every arm; `lengths`: expected tokens of drafts of 1..K tokens, [K, N].

        With objective "throughput" it is (K + min(C / c - L, K)) / 2K for an arm that costs C and emits L tokens, c being the
        least cost per token of an arm so far, as in `hedgespec`'s own arms.
        """
        if not self.prices:
            return losses
        draft, verify = seconds
        costs = np.append((draft[:, None] * np.arange(1, self.length + 1) + verify[1:]).ravel(), verify[0])
        emitted = np.append(lengths.T.ravel(), 1.0)
        self.emitted += emitted
        self.heard += 1
        per_token = (costs * self.heard / self.emitted).min()
        return ((self.length + np.minimum(costs / per_token - emitted, self.length)) / (2 * self.length)).clip(0.0, 1.0)

    def end_round(self, drafter: int | None, weights: Array, emitted: int, drafted: int, tested: int) -> None:
        """Records the round."""
        by_drafter = weights[:-1].reshape(-1, self.length).sum(axis=1) if self.prices else weights
        self.stats.record_round(drafter, by_drafter, emitted, drafted)


def cut_short(prob: Array, ratio: Array, draft_length: int) -> Array:
    """Returns the expected length from each position [N, T] of one round, summed over the positions of that round only, [N,
    T]."""
    length = np.zeros((len(prob), prob.shape[1] + 1))
    for position in reversed(range(prob.shape[1])):
        length[:, position] = prob[:, position] + ratio[:, position] * length[:, position + 1]
    return 1 + np.minimum(length[:, :-1], draft_length)


class CutShort(StudySelector):
    """Learns at once: the loss of a position sums over what its round revealed (`evaluate_every` 1), not over K positions."""

    def observe(self, acceptance_prob: Array, acceptance_ratio: Array, seconds=None) -> None:
        lengths = cut_short(acceptance_prob, acceptance_ratio, self.length)
        for loss in (1.0 - lengths / (self.length + 1)).clip(0).T:
            self.learner.update(loss)
        self.may_switch = True


class DepthCorrection(StudySelector):
    """Multiplies scored acceptance by factors by depth that are learned from the rounds of the request.

    An EAGLE head reads the target's features where it is scored, and its own from the second token of a draft on, so it is
    scored better than it drafts. With `accepted` and `predicted` summed over the rounds that reached depth k,

        factors[k, i] = (accepted[k, i] + OWN * pooled[k]) / (predicted[k, i] + OWN)
        pooled[k] = (sum_i accepted[k, i] + POOLED) / (sum_i predicted[k, i] + POOLED)

    Depth 0 and drafters without features of their own keep factor 1.
    """

    POOLED, OWN = 8.0, 32.0
    """Weights of the prior factors 1 (of a depth) and `pooled` (of a drafter), in acceptances."""

    def __init__(self, trace: Trace, config: DecodeConfig) -> None:
        super().__init__(trace, config)
        self.own_features = np.array(trace.own_features)
        self.predicted, self.accepted = np.zeros((2, self.length, self.count))
        self.by_depth = {name: np.zeros(self.length) for name in ("reached", "predicted", "corrected", "accepted")}
        """Sums over the rounds that reached a depth, [K]: rounds, predicted and corrected acceptance, accepted tokens."""
        self._raw: deque[Array] = deque()
        self._rounds: deque[tuple[int | None, int, int]] = deque()

    @property
    def factors(self) -> Array:
        """[K, N]."""
        accepted, predicted = self.accepted, self.predicted
        pooled = (accepted.sum(1, keepdims=True) + self.POOLED) / (predicted.sum(1, keepdims=True) + self.POOLED)
        factors = np.where(self.own_features, (accepted + self.OWN * pooled) / (predicted + self.OWN), 1.0)
        factors[0] = 1.0
        return factors

    def corrected(self, acceptance: Array) -> Array:
        return self.factors[:, :, None] * acceptance

    def observe(self, acceptance_prob: Array, acceptance_ratio: Array, seconds=None) -> None:
        self._raw.extend(acceptance_prob.T)
        super().observe(acceptance_prob, acceptance_ratio, seconds)

    def end_round(self, drafter: int | None, weights: Array, emitted: int, drafted: int, tested: int) -> None:
        super().end_round(drafter, weights, emitted, drafted, tested)
        self._rounds.append((drafter, emitted, tested))
        while self._rounds and self._rounds[0][1] <= len(self._raw):
            drafter, emitted, tested = self._rounds.popleft()
            scores = [self._raw.popleft() for _ in range(emitted)]
            if drafter is not None:
                self._learn(drafter, np.array([score[drafter] for score in scores[:tested]]), min(emitted - 1, tested))

    def _learn(self, drafter: int, predicted: Array, accepted: int) -> None:
        """Takes in a round: acceptance_prob at each depth that was reached, [k], and how many tokens were accepted."""
        depths = len(predicted)
        self.by_depth["reached"][:depths] += 1
        self.by_depth["predicted"][:depths] += predicted
        self.by_depth["corrected"][:depths] += predicted * self.factors[:depths, drafter]
        self.by_depth["accepted"][:accepted] += 1
        if self.own_features[drafter]:
            self.predicted[:depths, drafter] += predicted
            self.accepted[:accepted, drafter] += 1.0


class LateNormalHedge(NormalHedge):
    """NormalHedge that can take one drafter's losses after the others'."""

    def expected(self, losses: Array) -> float:
        """Returns the expected loss [N] under the weights. Unknown losses (NaN) are left out and the weights renormalised."""
        known = ~np.isnan(losses)
        if known.all():
            return float(self._weights.dot(losses))
        weights = self._weights if self._weights[known].any() else self.prior
        total = weights[known].sum() if weights[~known].any() else 1.0
        return float(weights.dot(np.where(known, losses, 0.0)) / total)

    def add(self, drafter: int, regrets: list[float]) -> None:
        """Adds regrets of one drafter, one after another."""
        for regret in regrets:
            self.regrets[drafter] += regret
        self._weights = self._weigh()


class BackOff(StudySelector):
    """Scores drafters without weight ever more rarely; their losses reach the learner late. Objective "tokens", NormalHedge.

    A drafter whose weight was 0 after `patience` evaluations in a row is left out of the next evaluation, and if its weight is
    still 0 when it has caught up, of the next 2, 4, 8 and at most 16. It catches up on everything it missed: no loss is
    guessed.

    Args:
        trace, config: as for `StudySelector`.
        patience: >= 1.
    """

    MAX_SLEEP, MAX_MISSED = 16, 128
    """Most evaluations in a row, and most positions, that a drafter is left out of."""

    def __init__(self, trace: Trace, config: DecodeConfig, patience: int) -> None:
        super().__init__(trace, config)
        self.patience = patience
        self.idle, self.sleep, self.left, self.evaluations = np.zeros((4, self.count), dtype=np.int64)
        """By drafter: evaluations in a row without weight, evaluations its sleep lasts, how many of them are left, and
        evaluations it was part of."""
        self.known, self.known_before, self.heard_of, self.until = np.zeros((4, self.count), dtype=np.int64)
        """By drafter: positions it is scored on, now and when it fell asleep; and the first position whose loss the learner
        lacks, which is below `until` for a drafter with late losses."""
        self.seen = np.ones((trace.prob.shape[1], self.count), dtype=bool)
        """Whether a drafter was part of the evaluation of a position."""
        self.played: list[float] = []
        self.finished = False

    def new_learner(self, count: int) -> LateNormalHedge:
        return LateNormalHedge(count)

    def select(self, weights: Array, uniform: float, room: int) -> Choice:
        choosing = self.may_switch and room > 1
        choice = super().select(weights, uniform, room)
        if choosing:
            for counter in (self.idle, self.sleep, self.left):
                counter[self.chosen.drafter] = 0
        return choice

    def evaluation_is_due(self, finished: bool) -> bool:
        self.finished = finished
        return super().evaluation_is_due(finished)

    def observe(self, acceptance_prob: Array, acceptance_ratio: Array, seconds=None) -> None:
        begin, end = self.scored, self.scored + acceptance_prob.shape[1]
        asked = self._ask(end)
        late = self.heard_of < self.until
        self._store(acceptance_prob, acceptance_ratio)
        self.known[asked] = end
        for drafter in np.flatnonzero(late):
            self._deliver(drafter)
        for drafter in np.flatnonzero(~asked):
            if self.heard_of[drafter] >= self.until[drafter]:
                self.heard_of[drafter], self.known_before[drafter] = self.next, self.known[drafter]
            self.until[drafter] = end
        self.seen[begin:end] = asked
        while self.next < self.scored and (losses := self._complete(self.next)) is not None:
            expected = self.learner.expected(losses)
            self.learner.update(np.where(np.isnan(losses), expected, losses))
            self.played.append(expected)
            self.next += 1
        self.may_switch = True
        self._judge(asked)

    def _ask(self, end: int) -> NDArray[np.bool_]:
        """Returns who is part of the evaluation up to position `end`, bool [N]."""
        asked = self.finished | (self.weights() > 0) | (self.left == 0) | (end - self.known > self.MAX_MISSED)
        self.left = np.where(asked, 0, self.left - 1)
        self.evaluations += asked
        return asked

    def _judge(self, asked: NDArray[np.bool_]) -> None:
        """Puts drafters without weight to sleep, or back to sleep for longer."""
        light = asked & (self.weights() <= 0)
        self.idle = np.where(asked, np.where(light, self.idle + 1, 0), self.idle)
        self.sleep = np.where(asked & ~light, 0, self.sleep)
        fallen = light & ((self.sleep > 0) | (self.idle >= self.patience))
        self.sleep = np.where(fallen, np.clip(2 * self.sleep, 1, self.MAX_SLEEP), self.sleep)
        self.left = np.where(fallen, self.sleep, self.left)

    def _loss(self, drafter: int, position: int) -> float | None:
        """Returns the loss of a drafter at a position as far as it is scored, or None."""
        if self.heard_of[drafter] < self.until[drafter] and self.known[drafter] == self.known_before[drafter]:
            return None  # asleep: its losses wait until it is scored again
        here = slice(position, min(position + self.length, self.known[drafter]))
        prob, ratio = (np.full((self.length, 1), np.nan) for _ in range(2))
        for padded, scores in ((prob, self.prob), (ratio, self.ratio)):
            padded[: here.stop - here.start, 0] = scores[here, 0, drafter]
        accepted = complete_length(prob, ratio) if here.stop > here.start else None
        return None if accepted is None else float((self.length - accepted[0]) / (self.length + 1))

    def _deliver(self, drafter: int) -> None:
        """Gives the learner a drafter's late losses that are complete by now."""
        regrets = []
        while self.heard_of[drafter] < self.next and (loss := self._loss(drafter, self.heard_of[drafter])) is not None:
            regrets.append(self.played[self.heard_of[drafter]] - loss)
            self.heard_of[drafter] += 1
        if regrets:
            self.learner.add(drafter, regrets)

    def _complete(self, position: int) -> Array | None:
        """Returns the losses at a position, NaN where a sleeper's is not complete, or None as long as anyone else's is not."""
        end = min(position + self.length, self.scored)
        if end < position + self.length:
            ratio = np.where(self.seen[position:end], self.ratio[position:end, 0], 0.0)
            if ratio.prod(axis=0).any():
                return None
        losses = np.full(self.count, np.nan)
        for drafter in range(self.count):
            late = self.heard_of[drafter] < self.until[drafter]
            if late and self.heard_of[drafter] != position and position < self.until[drafter]:
                continue
            loss = self._loss(drafter, position)
            if loss is None:
                continue
            losses[drafter] = loss
            if late:
                self.heard_of[drafter] = position + 1
        return losses
