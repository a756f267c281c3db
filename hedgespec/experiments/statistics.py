"""Means and how far they can be trusted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from hedgespec.config import DecodeConfig
from hedgespec.experiments.traces import Trace, replay
from hedgespec.metrics import DecodeStats

CONFIDENCE = 0.95
T = TypeVar("T")


def mean_interval(values: ArrayLike) -> dict[str, float]:
    """Mean of at least two independent values, and its 95% confidence interval by Student's t: {"mean", "low", "high"}."""
    from scipy import stats

    sample = np.asarray(values, dtype=np.float64)
    mean, error = sample.mean(), stats.sem(sample)
    reach = error * stats.t.ppf((1 + CONFIDENCE) / 2, len(sample) - 1)
    return {"mean": float(mean), "low": float(mean - reach), "high": float(mean + reach)}


def ratio_interval(numerators: ArrayLike, denominators: ArrayLike, draws: int = 2000) -> dict[str, float]:
    """sum(numerators) / sum(denominators) of independent texts, and its 95% interval by resampling the texts."""
    above, below = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    drawn = np.random.default_rng(0).integers(len(above), size=(draws, len(above)))
    with np.errstate(invalid="ignore", divide="ignore"):
        low, high = np.nanquantile(above[drawn].sum(1) / below[drawn].sum(1), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        return {"mean": float(above.sum() / below.sum()), "low": float(low), "high": float(high)}


def mat(requests: Sequence[DecodeStats]) -> float:
    """Tokens emitted over rounds, of all requests together; NaN without a round."""
    rounds = sum(one.rounds for one in requests)
    return sum(sum(one.emitted_by_round) for one in requests) / rounds if rounds else float("nan")


def by_seed(traces: Sequence[Trace], config: DecodeConfig, seeds: int,
            measure: Callable[[Sequence[Trace], Sequence[DecodeStats]], T], **arguments: Any) -> list[T]:  # fmt: skip
    """`measure` of all texts replayed with each of as many seeds; arguments are `replay`'s."""
    values = []
    for seed in range(seeds):
        stats = [replay(trace, config, seed=1000 * seed + trace.number, **arguments) for trace in traces]
        values.append(measure(traces, stats))
    return values


def told(interval: dict[str, float], digits: int = 2) -> str:
    """An interval as `mean (low to high)`."""
    return f"{interval['mean']:.{digits}f} ({interval['low']:.{digits}f} to {interval['high']:.{digits}f})"
