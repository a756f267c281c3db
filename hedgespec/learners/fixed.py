"""The baselines that never learn: one drafter for good, and a draw from the prior."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hedgespec.learners.base import Learner
from hedgespec.utils.scalars import integer


class FixedLearner(Learner):
    """Always the same drafter.

    Args:
        num_drafters: N >= 1.
        prior: [N]; None is uniform.
        drafter: index of the drafter, 0..N-1; None is the prior's largest entry, the lowest index on a tie.

    Raises:
        TypeError: drafter is no int.
        ValueError: drafter outside 0..N-1.

    >>> FixedLearner(3, drafter=1).weights().tolist()
    [0.0, 1.0, 0.0]
    """

    name = "fixed"
    feedback = "none"
    needs_positive_prior = False
    OPTIONS = ("drafter",)

    def __init__(self, num_drafters: int, prior: ArrayLike | None = None, *, drafter: int | None = None) -> None:
        num_drafters = integer("num_drafters", num_drafters, 1)
        self.drafter = None if drafter is None else integer("drafter", drafter, 0, num_drafters - 1)
        super().__init__(num_drafters, prior)

    def _learn(self, losses: NDArray[np.float64], chosen: int | None, chosen_weight: float | None) -> None:
        pass

    def _weigh(self) -> NDArray[np.float64]:
        weights = np.zeros(self.num_drafters)
        weights[self.prior.argmax() if self.drafter is None else self.drafter] = 1.0
        return weights


class Uniform(Learner):
    """Always the prior, which is uniform unless given.

    Args:
        num_drafters: N >= 1.
        prior: [N]; None is uniform.

    >>> Uniform(4).weights().tolist()
    [0.25, 0.25, 0.25, 0.25]
    """

    name = "uniform"
    feedback = "none"
    needs_positive_prior = False

    def _learn(self, losses: NDArray[np.float64], chosen: int | None, chosen_weight: float | None) -> None:
        pass

    def _weigh(self) -> NDArray[np.float64]:
        return self.prior.copy()
