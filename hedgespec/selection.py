"""Selection: from the learner's weights to the drafter, or the arm, of the next round."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from hedgespec.scalars import real


def select(weights: ArrayLike, uniform: float, rule: Literal["sample", "argmax"] = "sample") -> int:
    """sample: the first i with cumsum(weights)[i] > uniform * sum(weights). argmax: the first i of the largest weight.

    Sampling is what the regret bounds assume. What has weight 0 is never picked.

    Args:
        weights: probability of each drafter, or each arm, [N], non-negative, sum 1.
        uniform: random number in [0, 1); argmax does not look at it.
        rule: how to pick.

    Raises:
        ValueError: a rule that does not exist, or a value outside its range.

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
    if rule == "sample":
        # Strictly greater, so flat steps (weight 0) are skipped, at 0 as well. Scaled by the total as it was rounded,
        # so the last step is always above: a float64 below 1 times a normal total rounds to less than that total.
        picked = cumulative.searchsorted(float(uniform) * total, side="right")
    elif rule == "argmax":
        picked = weights.argmax()
    else:
        raise ValueError(f"rule: expected 'sample' or 'argmax', got {rule!r}")
    return int(picked)
