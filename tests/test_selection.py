"""Selection: the inverse of the cumulative weights, strict at both ends."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hedgespec.selection.select import select

LAST = np.nextafter(1.0, 0.0)
"""The largest float64 below 1."""

quick = settings(max_examples=80, deadline=None)
pools = st.lists(st.sampled_from((0.0, 0.0, 1e-300, 1e-17, 0.1, 0.3, 1.0)), min_size=1, max_size=12)


def test_sampling_inverts_the_cumulative_weights():
    weights = [0.25, 0.5, 0.25]
    picks = [select(weights, u) for u in (0.0, np.nextafter(0.25, 0), 0.25, np.nextafter(0.75, 0), 0.75, LAST)]
    assert picks == [0, 0, 1, 1, 2, 2]


@quick
@given(pool=pools, uniform=st.sampled_from((0.0, LAST, np.float32(1 - 2**-24))) | st.floats(0, 1, exclude_max=True))
def test_a_drafter_without_weight_is_never_picked(pool, uniform):
    assume(sum(pool) > 0.05)
    weights = np.array(pool) / sum(pool)
    assert weights[select(weights, uniform)] > 0


@quick
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 200))
def test_the_last_uniform_picks_a_drafter_whatever_the_rounding(seed, n):
    weights = np.random.default_rng(seed).dirichlet(np.ones(n))
    assert 0 <= select(weights, LAST) < n
    assert select(np.append(weights, 0.0), LAST) < n


def test_frequencies_are_the_weights():
    weights = [0.2, 0.0, 0.5, 0.3]
    steps = 1000  # an even grid of uniforms picks each drafter in exact proportion
    picks = [select(weights, (i + 0.5) / steps) for i in range(steps)]
    assert [Fraction(picks.count(i), steps) for i in range(4)] == [Fraction(n, 10) for n in (2, 0, 5, 3)]


def test_wrong_arguments_are_refused():
    for uniform in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="uniform: expected"):
            select([1.0], uniform)
    for weights in ([0.5, 0.6], [1.5, -0.5], [float("nan"), 1.0], [0.0, 0.0], [], [[1.0]]):
        with pytest.raises(ValueError, match="weights: expected"):
            select(weights, 0.5)
