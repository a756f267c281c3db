"""Learners for tests."""

from __future__ import annotations

import numpy as np

from hedgespec.learners import EXP3Spec, FixedLearner, NormalHedge, Uniform


class _Argmax:
    """Always picks the drafter of the largest weight, the first of equal ones, so that no draw is random."""

    def weights(self) -> np.ndarray:
        return np.eye(self.num_drafters)[self._weights.argmax()]


class ArgmaxNormalHedge(_Argmax, NormalHedge):
    """NormalHedge without draws."""


class ArgmaxEXP3(_Argmax, EXP3Spec):
    """EXP3Spec without draws."""


class ScoredFixedLearner(FixedLearner):
    """Always picks the same drafter, and receives the losses of all: the decoder then scores every drafter."""

    feedback = "full"


class ScoredUniform(Uniform):
    """Always draws from the prior, and receives the losses of all drafters."""

    feedback = "full"
