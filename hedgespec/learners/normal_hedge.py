"""NormalHedge: no regret without a learning rate, the learner HedgeSpec uses unless told otherwise."""

from __future__ import annotations

from math import exp, log

import numpy as np
from numpy.typing import NDArray

from hedgespec.learners.base import Learner


class NormalHedge(Learner):
    """regrets += weights @ losses - losses;  weights ~ prior * r / c * exp(r^2 / 2c)  with r = max(regrets, 0).

    c solves sum(prior * exp(r^2 / 2c)) = e. While no regret is positive the weights are the prior.

    Args:
        num_drafters: N >= 1.
        prior: [N], every entry positive; None is uniform.

    Source: Chaudhuri, Freund, Hsu, "A Parameter-free Hedging Algorithm", NIPS 2009, arXiv 0903.2851; the prior is ours.

    >>> learner = NormalHedge(2)
    >>> learner.update([0.0, 1.0])
    >>> learner.weights().tolist()
    [1.0, 0.0]
    """

    name = "normal_hedge"
    feedback = "full"
    STATE = ("regrets",)

    def _learn(self, losses, chosen, chosen_weight) -> None:
        self.regrets += self._weights @ losses - losses

    def _weigh(self) -> NDArray[np.float64]:
        leader = self.regrets.argmax()
        if self.regrets[leader] <= 0:
            return self.prior.copy()
        # Only ratios to the leader enter, so no regret is too large to square: with s = max(r)^2 / 2c,
        # exp(r^2 / 2c) = exp(s) * exp(s * gap), and both exp(s) and 1 / c fall out of the weights.
        ratio = np.maximum(self.regrets, 0.0) / self.regrets[leader]
        gap = ratio * ratio - 1.0
        weights = self.prior * ratio * np.exp(_scale(self.prior, gap, self.prior[leader]) * gap)
        return weights / weights.sum()


def _scale(prior: NDArray[np.float64], gap: NDArray[np.float64], leader_prior: float) -> float:
    """The s that solves s + log(sum(prior * exp(s * gap))) = 1, for gap [N] in [-1, 0], 0 at the leader.

    s lies in [1, 1 - log(leader_prior)]. The left side is convex and increases, so Newton's method from the right end
    walks down to the root without overshooting; there its slope is at least 1 / s, so the root is well conditioned.
    """
    terms = list(zip(prior.tolist(), gap.tolist()))  # a handful of floats: a Python loop outruns NumPy's call overhead
    s = 1.0 - log(leader_prior)
    while True:
        total = slope = 0.0
        for weight, g in terms:
            growth = weight * exp(s * g)
            total += growth
            slope += growth * g
        step = (s + log(total) - 1.0) / (1.0 + slope / total)
        s -= step
        if step <= 1e-8 * s:  # the error is quadratic in the step: what is left is below rounding
            return s
