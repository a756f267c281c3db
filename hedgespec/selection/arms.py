"""What a learner chooses among, by objective, and what each choice loses: numbers only."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hedgespec.records import NO_DRAFT, Choice, Feedback

Seconds = tuple[NDArray[np.float64], NDArray[np.float64]]
"""To draft a token, by drafter [N], and to verify a round, by drafted length [K+1]."""


class Drafters:
    """Objective "tokens": every drafter is an arm and drafts K tokens; the loss is the delay queue's.

    Args:
        alive: which drafters have not failed, bool [N]; whoever made it keeps it up to date.
        draft_length: K.
    """

    needs_seconds = False
    """Whether losses depend on what rounds cost."""

    def __init__(self, alive: NDArray[np.bool_], draft_length: int) -> None:
        self._alive, self.draft_length = alive, draft_length

    @staticmethod
    def count(num_drafters: int, draft_length: int) -> int:
        """A, how many arms there are."""
        return num_drafters

    @staticmethod
    def spread(prior: NDArray[np.float64], draft_length: int) -> NDArray[np.float64]:
        """A belief in drafters [N] as one in arms, [A]."""
        return prior

    @property
    def alive(self) -> NDArray[np.bool_]:
        """Which arms may be chosen, [A]."""
        return self._alive

    def choice(self, arm: int) -> Choice:
        return Choice(arm, self.draft_length)

    def by_drafter(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Weights of arms [A] summed over each drafter's, [N]."""
        return weights

    def losses(self, feedback: Feedback, seconds: Seconds | None) -> NDArray[np.float64]:
        """Returns the loss of every arm at the position that follows those of `update`, [A], in [0, 1]. Changes nothing."""
        return feedback.losses

    def update(self, feedback: Feedback) -> None:
        """Adds a position to those that later losses are measured by. Call it once for each, after its `losses`."""

    def of_prompt(self, acceptance_prob: NDArray[np.float64], position: int) -> Feedback:
        """What acceptance [N] at a position of the prompt says."""
        return Feedback(1.0 - acceptance_prob, position)


class DraftersAndLengths(Drafters):
    """Objective "throughput": arms (drafter, length 1..K), drafter by drafter, and last plain decoding: A = N * K + 1.

    A round of arm a costs C_a = length * draft_seconds[drafter] + verify_seconds[length] and emits L_a(t) tokens from position
    t, by the same partial sums of which the delay queue's loss has the last; plain decoding costs verify_seconds[0] and emits
    1. To be least are the seconds a token, E[C_a] / E[L_a], a ratio of means, which no mean of losses is. But for the least
    ratio c over the arms, C_a - c * E[L_a] >= 0 with equality for the best arms alone (Dinkelbach). So with c from the arms'
    mean lengths so far,

        loss_a(t) = (K + min(C_a / c - L_a(t), K)) / 2K:

    in units of tokens what arm a costs more than the tokens it emits are worth. No scale of seconds is left, so a drafter that
    is dear does not squeeze the others' differences. 0 <= the loss, as C_a / c >= the mean of L_a >= 1 and L_a <= K + 1; the
    bound from above cuts off only arms whose cost no acceptance could repay. Where all rounds cost the same, losses are in the
    order of -L_a(t), that of the objective "tokens". Switching costs nothing: drafters take in all that is verified whoever
    drafts.

    The mean lengths are over all positions whose losses the learner gets, of the prompt and of the text, and over the position
    of the loss itself: the learner's sums are then of C_a / c - L_a with c from the mean of these same L_a. They begin with one
    position of which no drafter had any token accepted, and are of this request alone.

    Source: Dinkelbach, "On Nonlinear Fractional Programming", Management Science 13, 1967; as a loss of arms it is ours.
    """

    needs_seconds = True

    def __init__(self, alive: NDArray[np.bool_], draft_length: int) -> None:
        super().__init__(alive, draft_length)
        self._emitted = np.ones(self.count(len(alive), draft_length))
        """Expected tokens of each arm summed over the positions so far, [A]."""
        self._positions = 1

    @staticmethod
    def count(num_drafters: int, draft_length: int) -> int:
        return num_drafters * draft_length + 1

    @staticmethod
    def spread(prior: NDArray[np.float64], draft_length: int) -> NDArray[np.float64]:
        """Each drafter's evenly over its lengths; plain decoding gets an even share of all."""
        return np.append(np.repeat(prior, draft_length), np.mean(prior))

    @property
    def alive(self) -> NDArray[np.bool_]:
        return np.append(np.repeat(self._alive, self.draft_length), True)

    def choice(self, arm: int) -> Choice:
        drafter, length = divmod(arm, self.draft_length)
        return Choice(drafter, length + 1) if drafter < len(self._alive) else NO_DRAFT

    def by_drafter(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        return weights[:-1].reshape(-1, self.draft_length).sum(axis=1)

    def losses(self, feedback: Feedback, seconds: Seconds | None) -> NDArray[np.float64]:
        assert seconds is not None  # `needs_seconds`
        draft, verify = seconds
        drafted = np.arange(1, self.draft_length + 1)
        costs = np.append((draft[:, None] * drafted + verify[1:]).ravel(), verify[0])  # C_a
        emitted = self._lengths(feedback)  # L_a(t)
        per_token = (costs * (self._positions + 1) / (self._emitted + emitted))[self.alive].min()  # c
        excess = np.minimum(costs / per_token - emitted, self.draft_length)
        return ((self.draft_length + excess) / (2 * self.draft_length)).clip(0.0, 1.0)

    def update(self, feedback: Feedback) -> None:
        self._emitted += self._lengths(feedback)
        self._positions += 1

    @staticmethod
    def _lengths(feedback: Feedback) -> NDArray[np.float64]:
        """Expected tokens of a round of each arm from the position, [A]."""
        assert feedback.lengths is not None  # the queue is made with `lengths`
        return np.append(feedback.lengths.T.ravel(), 1.0)

    def of_prompt(self, acceptance_prob: NDArray[np.float64], position: int) -> Feedback:
        """Lengths as if every later token were accepted as likely as this one: 1 + g + g^2 + ..."""
        powers = acceptance_prob ** np.arange(1, self.draft_length + 1)[:, None]
        return Feedback(1.0 - acceptance_prob, position, 1.0 + powers.cumsum(axis=0))


ARMS = {"tokens": Drafters, "throughput": DraftersAndLengths}
"""By `DecodeConfig.objective`."""
