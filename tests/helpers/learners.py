"""Learners for tests."""

from __future__ import annotations

from hedgespec.learners import FixedLearner, Uniform


class ScoredFixedLearner(FixedLearner):
    """Always picks the same drafter, and receives the losses of all: the decoder then scores every drafter."""

    feedback = "full"


class ScoredUniform(Uniform):
    """Always draws from the prior, and receives the losses of all drafters."""

    feedback = "full"
