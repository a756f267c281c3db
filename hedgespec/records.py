"""Frozen records that the stages of a round exchange: Choice, Draft, Verdict, Evaluation, Feedback."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class Choice:
    """The selection for one round."""

    drafter: int
    """Index of the drafter, 0..N-1; -1 if none drafts."""
    draft_length: int
    """Tokens to draft; 0 if none drafts."""


NO_DRAFT = Choice(drafter=-1, draft_length=0)
"""Plain decoding: the round emits one token."""


@dataclass(frozen=True, slots=True)
class Draft:
    """The draft of one row."""

    tokens: torch.Tensor
    """int64 [K]: draft tokens, ids of the target's vocabulary. In a tree one for each node; -1 marks no node."""
    logits: torch.Tensor | None
    """The drafter's logits before temperature and threshold, [K, Vd]; None where the proposal is one-hot or the draft empty. In
    a tree [P, Vd]: row p is what the children of node `origins[p]` were sampled from."""
    draft_to_target: torch.Tensor | None = None
    """int64 [Vd]: the target's id of each draft id. None where the logits are over the target's vocabulary."""
    usable: torch.Tensor | None = None
    """int64 scalar: number of leading tokens whose logits had a finite maximum, the draft length if all had; later tokens must
    be discarded. In a tree 0 if the logits of any node had none, else the draft length. None if no drafter ran."""
    parents: torch.Tensor | None = None
    """int64 [K], trees only: index of each node's parent, which precedes it; -1 for the root, the last verified token."""
    widths: torch.Tensor | None = None
    """int64 [K], dynamic trees only: number of children at each depth along the path of first children."""
    origins: torch.Tensor | None = None
    """int64 [P], trees of samples only: the node whose children were sampled from each row of `logits`; -1 for the root."""
    seconds_per_token: float = 0.0
    """Time of the group's draft divided by its longest draft, where it is measured."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the target made of a draft."""

    accepted_length: torch.Tensor
    """Drafted tokens accepted, int64 [B], each 0..K."""
    tokens: torch.Tensor
    """Emitted tokens, int64 [B, K+1]: the accepted ones, then the recovered or bonus token, then -1."""
    path: torch.Tensor | None = None
    """Of a draft tree: the accepted nodes, int64 [B, K], then -1."""


PROPOSAL_MODES = ("sampled", "argmax", "top_k")
"""How a drafter proposes. `Evaluation.scores` holds acceptance_prob and acceptance_ratio of each, in this order; of the last
for every number of candidates from 1 to `top_k`."""


def score_row(mode: str, top_k: int | None) -> int:
    """The row of `Evaluation.scores` with the acceptance_prob of a mode, in "top_k" that of all k candidates; the row after
    it is the acceptance_ratio."""
    return 2 * PROPOSAL_MODES.index(mode) + (2 * (top_k - 1) if mode == "top_k" and top_k is not None else 0)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Every drafter at every position, for every proposal mode."""

    scores: torch.Tensor
    """[M, N, B, T] in [0, 1], 0 past a row's length: acceptance_prob and acceptance_ratio of the sampled mode, of the argmax
    mode and, where `top_k` = k was given (M = 4 + 2k instead of 4), of the top-k mode for 1, 2, .. k candidates. The
    properties below are views of it."""
    expected_accepted_length: torch.Tensor | None = None
    """[N, B]: expected tokens, in [1, K+1], of a round of K drafts from the row's first position; NaN where the row is
    shorter than K. None where `draft_length` was not given."""
    length_losses: torch.Tensor | None = None
    """[N, B, T, K]: at [..., t, k-1] the loss 1 - L / (k+1) of a round that drafts k tokens from position t; NaN where that
    would end past the row's length."""

    @property
    def acceptance_prob(self) -> torch.Tensor:
        """Sampled mode, [N, B, T]: sum_v min(target_prob(v), draft_prob(v)) = 1 - total variation."""
        return self.scores[0]

    @property
    def acceptance_ratio(self) -> torch.Tensor:
        """Sampled mode: min(1, draft_prob(x) / target_prob(x)) for the emitted token x."""
        return self.scores[1]

    @property
    def argmax_acceptance_prob(self) -> torch.Tensor:
        """Argmax mode: target_prob(d) for the drafter's likeliest token d."""
        return self.scores[2]

    @property
    def argmax_acceptance_ratio(self) -> torch.Tensor:
        """Argmax mode: 1 where x = d, else 0."""
        return self.scores[3]

    @property
    def top_k_acceptance_prob(self) -> torch.Tensor | None:
        """Top-k mode (a tree's node), [k, N, B, T]: at c-1 the target's mass on the drafter's c likeliest tokens, as nodes of
        one tree have different numbers of children."""
        return self.scores[4::2] if len(self.scores) > 4 else None

    @property
    def top_k_acceptance_ratio(self) -> torch.Tensor | None:
        """Top-k mode, [k, N, B, T]: at c-1 1 where x is one of these c, else 0."""
        return self.scores[5::2] if len(self.scores) > 4 else None


@dataclass(frozen=True, slots=True)
class Feedback:
    """One complete loss vector on its way from the delay queue to the learner."""

    losses: np.ndarray
    """Loss of every drafter, float64 [N], in [0, 1]."""
    position: int
    """Verified position (0 = first drafted position of the request; below 0 one of the prompt) whose loss this is."""
    lengths: np.ndarray | None = None
    """Where they are asked for: expected emitted tokens of a round of each drafter that drafts 1..K tokens from the position,
    float64 [K, N], in [1, k+1] at k-1."""
