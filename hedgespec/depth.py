"""How much less is accepted deep in a draft than scoring says, learned from the rounds of a request: numbers only.

All drafters are scored on the verified text. An EAGLE head reads the target's features there, and from the second token of a
draft on only its own, with which it guesses worse; scored so, it is thought to go further than it does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

POOLED = 8.0
"""Acceptances at factor 1 that the pool's factor of a depth begins with. An acceptance of probability g leaves (1 - g) / n of
squared relative noise after n; 8 weigh as much as a belief, at g = 1/2, that pools lie 1/4 around 1."""
OWN = 32.0
"""Acceptances at the pool's factor that a drafter's own begins with: likewise, that heads lie 1/8 around their pool."""


class DepthCorrection:
    """factors[k, i] = (accepted[k, i] + OWN * pooled[k]) / (predicted[k, i] + OWN), with
    pooled[k] = (sum_i accepted[k, i] + POOLED) / (sum_i predicted[k, i] + POOLED)

    for drafters that draft on features of their own, over the rounds in which depth k was reached, all drafted tokens before
    it accepted: `accepted` counts those whose token was accepted there, `predicted` adds up the acceptance_prob that scoring
    found at the same positions. Depth 0, the first drafted token, reads the target's features, and drafters that read tokens
    only are scored as they draft: 1. Factors are positive, so they make no acceptance 0 that was not.

    A factor is learned from a drafter's own rounds: until it has had some it is the pool's, and of a head that falls off less
    than the others but is not drawn that is never found out.

    Args:
        own_features: whether each drafter drafts on features of its own, [N].
        draft_length: K >= 1.

    Source: ours; the gap is that of arXiv 2510.20064, appendix B.4.

    >>> depths = DepthCorrection([True, False], 2)
    >>> depths.learn(0, [0.5, 0.8], accepted=1)
    >>> depths.factors.round(3).tolist()
    [[1.0, 1.0], [0.887, 1.0]]
    """

    def __init__(self, own_features: Sequence[bool], draft_length: int) -> None:
        self.own_features = np.array(own_features, dtype=bool)
        self.predicted = np.zeros((draft_length, len(self.own_features)))
        self.accepted = np.zeros_like(self.predicted)

    @property
    def factors(self) -> NDArray[np.float64]:
        """By depth and drafter, [K, N], > 0; above 1 where more was accepted than predicted."""
        accepted, predicted = self.accepted, self.predicted
        pooled = (accepted.sum(1, keepdims=True) + POOLED) / (predicted.sum(1, keepdims=True) + POOLED)
        factors = np.where(self.own_features, (accepted + OWN * pooled) / (predicted + OWN), 1.0)
        factors[0] = 1.0
        return factors

    def correct(self, acceptance: NDArray[np.floating]) -> NDArray[np.float64]:
        """minimum(factors * acceptance, 1) of acceptance_prob or acceptance_ratio [N, T], by depth [K, N, T]."""
        return np.minimum(self.factors[:, :, None] * acceptance, 1.0)

    def learn(self, drafter: int, predicted: Sequence[float], accepted: int) -> None:
        """Takes in a round.

        Args:
            drafter: who drafted, 0..N-1.
            predicted: its acceptance_prob at each depth that was reached, [k], k <= K.
            accepted: how many of these tokens were accepted, k or k - 1.
        """
        if self.own_features[drafter]:
            self.predicted[: len(predicted), drafter] += predicted
            self.accepted[:accepted, drafter] += 1.0
