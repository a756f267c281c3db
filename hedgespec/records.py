"""The frozen records that travel between the stages of a round: Choice, Draft, Verdict, Feedback."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class Choice:
    """What selection decided for one round."""

    drafter: int
    """Index of the drafter that drafts, 0..N-1; -1 where none does."""
    draft_length: int
    """Tokens to draft this round; 0 where none drafts."""


@dataclass(frozen=True, slots=True)
class Draft:
    """What the chosen drafter proposes."""

    tokens: torch.Tensor
    """Proposed token ids in the target's vocabulary, int64 [B, K]."""
    logits: torch.Tensor | None
    """The drafter's logits, before temperature and threshold, [B, K, Vd]; None where the proposal is one-hot or empty."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the target made of a draft."""

    accepted_length: torch.Tensor
    """Drafted tokens accepted, int64 [B], each 0..K."""
    tokens: torch.Tensor
    """Emitted tokens, int64 [B, K+1]: the accepted ones, then the recovered or bonus token, then -1."""


@dataclass(frozen=True, slots=True)
class Feedback:
    """One complete loss vector on its way from the delay queue to the learner."""

    losses: np.ndarray
    """Loss of every drafter, float64 [N], in [0, 1]."""
    position: int
    """Verified position (0 = first drafted position of the request) whose loss this is."""
