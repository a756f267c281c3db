"""EXP3Spec: Hedge on importance-weighted losses, for when only the chosen drafter's loss is seen."""

from __future__ import annotations

from math import log, sqrt

import numpy as np
from numpy.typing import NDArray

from hedgespec.learners.base import Learner, softmax


class EXP3Spec(Learner):
    """loss_estimates[chosen] += losses[chosen] / chosen_weight;  weights ~ prior * exp(-eta_t * loss_estimates).

    eta_t = sqrt(ln N / (N t)) in round t = 1, 2, ... Where the chosen drafter is drawn from the weights, each estimate is
    unbiased for that drafter's loss, provided `chosen_weight` is the probability of the draw and not a later one.

    Args:
        num_drafters: N >= 1.
        prior: [N], every entry positive; None is uniform.

    Source: BanditSpec, arXiv 2505.15141; EXP3 of Auer, Cesa-Bianchi, Freund, Schapire, SIAM J. Comput. 2002.

    >>> learner = EXP3Spec(2)
    >>> learner.update([0.5, 0.0], chosen=0, chosen_weight=0.25)
    >>> learner.loss_estimates.tolist()
    [2.0, 0.0]
    """

    name = "exp3"
    feedback = "bandit"
    loss_estimates: NDArray[np.float64]
    rounds: int
    STATE = ("loss_estimates", "rounds")

    def _learn(self, losses: NDArray[np.float64], chosen: int | None, chosen_weight: float | None) -> None:
        assert chosen is not None and chosen_weight is not None  # `update` sees to it
        self.loss_estimates[chosen] += losses[chosen] / chosen_weight
        self.rounds += 1

    def _weigh(self) -> NDArray[np.float64]:
        eta = sqrt(log(self.num_drafters) / (self.num_drafters * (self.rounds + 1)))
        return softmax(np.log(self.prior) - eta * (self.loss_estimates - self.loss_estimates.min()))
