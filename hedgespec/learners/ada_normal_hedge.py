"""AdaNormalHedge: NormalHedge's potential with a scale of its own for every drafter."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hedgespec.learners.base import Learner, softmax


class AdaNormalHedge(Learner):
    """weights ~ prior * (phi(R + 1, C + 1) - phi(R - 1, C + 1)) / 2  with phi(R, C) = exp(max(R, 0)^2 / 3C).

    R = sum of r and C = sum of |r| over the instantaneous regrets r = weights @ losses - losses. A drafter whose loss
    hardly differs from the average keeps a small C, and regret to it grows with sqrt(C), not sqrt(T). While no R
    exceeds -1 the weights are the prior.

    Args:
        num_drafters: N >= 1.
        prior: [N], every entry positive; None is uniform.

    Source: Luo, Schapire, "Achieving All with No Parameters: AdaNormalHedge", COLT 2015, arXiv 1502.05934.

    >>> learner = AdaNormalHedge(2)
    >>> learner.update([0.0, 1.0])
    >>> learner.weights().round(4).tolist()
    [0.9191, 0.0809]
    """

    name = "ada_normal_hedge"
    feedback = "full"
    regrets: NDArray[np.float64]
    absolute_regrets: NDArray[np.float64]
    STATE = ("regrets", "absolute_regrets")
    NON_NEGATIVE = ("absolute_regrets",)

    def _learn(self, losses: NDArray[np.float64], chosen: int | None, chosen_weight: float | None) -> None:
        instantaneous = self._weights.dot(losses) - losses
        self.regrets += instantaneous
        self.absolute_regrets += np.abs(instantaneous)

    def _weigh(self) -> NDArray[np.float64]:
        regrets, scale = self.regrets, 3.0 * (self.absolute_regrets + 1.0)
        if regrets.max() <= -1.0:
            return self.prior.copy()
        up, down = np.maximum(regrets + 1.0, 0.0), np.maximum(regrets - 1.0, 0.0)
        # phi(up) - phi(down) = exp(a) * (1 - exp(-(a - b))): only logarithms are ever large. a - b is
        # (up - down)(up + down) / 3C, with up - down written out because a large regret would round it away.
        exponent = up * (up / scale)
        difference = np.clip(regrets + 1.0, 0.0, 2.0) * ((up + down) / scale)
        with np.errstate(divide="ignore"):  # log 0 = -inf is what a drafter of no weight should get
            return softmax(np.log(self.prior) + exponent + np.log(-np.expm1(-difference)))
