"""Hedge: exponential weights on cumulative losses."""

from __future__ import annotations

from math import inf, log, sqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hedgespec.learners.base import Learner, softmax
from hedgespec.utils.scalars import real


class Hedge(Learner):
    """weights ~ prior * exp(-eta * cumulative_losses).

    Args:
        num_drafters: N >= 1.
        prior: [N], every entry positive; None is uniform.
        eta: learning rate > 0. None, the default, decreases it: sqrt(8 ln N / t) for round t = 1, 2, ..., which needs
            no horizon and at most doubles the bound. For a known horizon T the best fixed rate is sqrt(8 ln N / T).

    Raises:
        TypeError: eta is no number.
        ValueError: eta is not positive and finite.

    Source: Freund, Schapire, JCSS 1997; rates and bounds: Cesa-Bianchi, Lugosi, "Prediction, Learning, and Games",
    2006, Theorems 2.2 and 2.3.

    >>> learner = Hedge(2, eta=1.0)
    >>> learner.update([0.0, 1.0])
    >>> learner.weights().round(4).tolist()
    [0.7311, 0.2689]
    """

    name = "hedge"
    feedback = "full"
    OPTIONS = ("eta",)
    cumulative_losses: NDArray[np.float64]
    rounds: int
    STATE = ("cumulative_losses", "rounds")

    def __init__(self, num_drafters: int, prior: ArrayLike | None = None, *, eta: float | None = None) -> None:
        self.eta = None if eta is None else real("eta", eta, otherwise=" or None")
        if self.eta is not None and not 0 < self.eta < inf:
            raise ValueError(f"eta: expected a positive finite number or None, got {eta}")
        super().__init__(num_drafters, prior)

    def _learn(self, losses: NDArray[np.float64], chosen: int | None, chosen_weight: float | None) -> None:
        self.cumulative_losses += losses
        self.rounds += 1

    def _weigh(self) -> NDArray[np.float64]:
        eta = sqrt(8.0 * log(self.num_drafters) / (self.rounds + 1)) if self.eta is None else self.eta
        return softmax(np.log(self.prior) - eta * (self.cumulative_losses - self.cumulative_losses.min()))
