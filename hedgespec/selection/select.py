"""Selection: from the learner's weights to the drafter, or the arm, of the next round."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from hedgespec.utils.scalars import real


def select(weights: ArrayLike, uniform: float) -> int:
    """Returns the first i with cumsum(weights)[i] > uniform * sum(weights): one draw from the weights.

    The regret bounds assume this draw. An index of weight 0 is never returned.

    Args:
        weights: probability of each drafter, or each arm, [N], non-negative, sum 1.
        uniform: random number in [0, 1).

    Raises:
        ValueError: a value outside its range.

    >>> select([0.25, 0.0, 0.75], 0.25)
    2
    """
    weights = np.asarray(weights, dtype=np.float64)
    if weights.ndim != 1 or not weights.size:
        raise ValueError(f"weights: expected shape (N,) with N at least 1, got {weights.shape}")
    cumulative = np.add.accumulate(weights)
    total = cumulative.item(-1)
    if not (weights.item(weights.argmin()) >= 0 and abs(total - 1) <= 1e-6):  # written so that NaN fails too
        raise ValueError(f"weights: expected non-negative values with sum 1, got {weights}")
    if type(uniform) is not float:
        uniform = real("uniform", uniform)
    if not 0 <= uniform < 1:
        raise ValueError(f"uniform: expected a number in [0, 1), got {uniform}")
    # Strictly greater, so flat steps (weight 0) are skipped, at 0 as well. Scaled by the total as it was rounded, so the last
    # step is always above: a float64 below 1 times a normal total rounds to less than that total.
    return int(cumulative.searchsorted(float(uniform) * total, side="right"))
