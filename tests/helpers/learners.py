"""Learners for tests."""

from __future__ import annotations

import numpy as np

from hedgespec.learners import FixedLearner, NormalHedge, Uniform


class ArgmaxNormalHedge(NormalHedge):
    """NormalHedge that always picks the drafter of the largest weight, the first of equal ones."""

    def weights(self) -> np.ndarray:
        return np.eye(self.num_drafters)[self._weights.argmax()]


class ScoredFixedLearner(FixedLearner):
    """Always picks the same drafter, and receives the losses of all: the decoder then scores every drafter."""

    feedback = "full"


class ScoredUniform(Uniform):
    """Always draws from the prior, and receives the losses of all drafters."""

    feedback = "full"
