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
    regrets: NDArray[np.float64]
    STATE = ("regrets",)

    def _learn(self, losses: NDArray[np.float64], chosen: int | None, chosen_weight: float | None) -> None:
        self.regrets += self._weights.dot(losses) - losses

    def _weigh(self) -> NDArray[np.float64]:
        # A handful of floats: Python's outrun the overhead of NumPy's calls, and only drafters ahead cost an exponential.
        prior, regrets = self.prior.tolist(), self.regrets.tolist()
        largest = max(regrets)
        if largest <= 0:
            return self.prior.copy()
        # Only ratios to the leader enter, so no regret is too large to square: with s = largest^2 / 2c,
        # exp(r^2 / 2c) = exp(s) * exp(s * (ratio^2 - 1)), and both exp(s) and 1 / c fall out of the weights.
        ratios = [regret / largest if regret > 0 else 0.0 for regret in regrets]
        ahead = [(share, ratio * ratio - 1.0) for share, ratio in zip(prior, ratios) if ratio]
        behind = sum([share for share, ratio in zip(prior, ratios) if not ratio]), -1.0
        s = _scale([*ahead, behind], prior[regrets.index(largest)])
        weights = [share * ratio * exp(s * (ratio * ratio - 1.0)) if ratio else 0.0 for share, ratio in zip(prior, ratios)]
        total = sum(weights)
        return np.array([weight / total for weight in weights])


def _scale(terms: list[tuple[float, float]], leader_prior: float) -> float:
    """The s that solves s + log(sum(share * exp(s * gap))) = 1, for terms (share, gap), gap in [-1, 0] and 0 at the leader.

    s lies in [1, 1 - log(leader_prior)]. The left side is convex and increases, so Newton's method from the right end
    walks down to the root without overshooting; there its slope is at least 1 / s, so the root is well conditioned.
    """
    s = 1.0 - log(leader_prior)
    while True:
        total = slope = 0.0
        for share, gap in terms:
            growth = share * exp(s * gap)
            total += growth
            slope += growth * gap
        step = (s + log(total) - 1.0) / (1.0 + slope / total)
        s -= step
        if step <= 1e-8 * s:  # the error is quadratic in the step: what is left is below rounding
            return s
