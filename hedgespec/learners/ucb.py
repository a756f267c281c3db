"""UCBSpec: a bandit that trusts each drafter as far as its own rounds allow."""

from __future__ import annotations

from math import log

import numpy as np
from numpy.typing import NDArray

from hedgespec.learners.base import Learner


class UCBSpec(Learner):
    """argmax(reward_sums / counts + sqrt(2 ln t / counts)), as a one-hot; t = rounds so far = sum(counts).

    Every drafter has one round first, in order of falling prior; ties go to the lowest index. The reward is
    1 - losses[chosen] = emitted tokens / (draft_length + 1).

    Args:
        num_drafters: N >= 1.
        prior: [N], only orders the first N rounds; None is uniform, which is index order.

    Source: BanditSpec, arXiv 2505.15141; the index is UCB1 of Auer, Cesa-Bianchi, Fischer, Machine Learning 2002.

    >>> learner = UCBSpec(2)
    >>> learner.update([0.5, 0.0], chosen=0)
    >>> learner.weights().tolist()
    [0.0, 1.0]
    """

    name = "ucb"
    feedback = "bandit"
    needs_positive_prior = False
    counts: NDArray[np.float64]
    reward_sums: NDArray[np.float64]
    STATE = ("counts", "reward_sums")
    NON_NEGATIVE = ("counts", "reward_sums")

    def _learn(self, losses: NDArray[np.float64], chosen: int | None, chosen_weight: float | None) -> None:
        self.counts[chosen] += 1.0
        self.reward_sums[chosen] += 1.0 - losses[chosen]

    def _weigh(self) -> NDArray[np.float64]:
        if self.counts.all():
            index = self.reward_sums / self.counts + np.sqrt(2.0 * log(self.counts.sum()) / self.counts)
        else:
            index = np.where(self.counts == 0.0, self.prior, -1.0)
        weights = np.zeros(self.num_drafters)
        weights[index.argmax()] = 1.0
        return weights
