"""Records of one step of an engine and its EAGLE heads, for `eagle_proposer.py`.

Sizes: B rows of the step, A of them with new tokens, T such tokens, H the width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from hedgespec.integrations.vllm.head_pool import ABSTAINS


@dataclass
class Step:
    """What the engine did in the current step."""

    names: list[str]
    """Names of the B requests."""
    emitted: list[list[int]]
    """Tokens that each request emitted; empty while its prompt is being read."""
    lengths: list[int]
    """Number of tokens of each request, the emitted ones included."""
    drafted: list[int]
    """Number of drafted tokens of each request that were verified."""
    rows: torch.Tensor | None = None
    """int64: rows of the target's forward without those of rejected tokens; None: all."""


@dataclass(eq=False)
class HeadResult:
    """What one head computed in a step."""

    proposals: torch.Tensor
    """int64 [T]: the head's argmax token after each new token of the active rows, row after row."""
    finite: torch.Tensor
    """bool [T]: whether its output there was finite."""
    prompt: torch.Tensor
    """[positions]: its acceptance_prob at the positions of the warm start."""
    features: torch.Tensor | None = None
    """[A, H]: its hidden states at the last tokens, from which it drafts; None if it failed or nothing is active."""

    @classmethod
    def empty(cls, tokens: int, positions: int, device: torch.device) -> HeadResult:
        """Returns the result of a head that proposed nothing."""
        proposals = torch.full((tokens,), ABSTAINS, device=device)
        return cls(proposals, torch.zeros(tokens, dtype=torch.bool, device=device), torch.zeros(positions, device=device))


@dataclass(eq=False)
class Reading:
    """What all heads computed in a step."""

    offsets: NDArray[np.int64]
    """int64 [A + 1]: start of the tokens of each active row among the T new ones, and T."""
    warm: dict[int, range]
    """Row of a new request -> positions of the warm start."""
    results: list[HeadResult] = field(default_factory=list)
    """Results of the heads, in the pool's order."""
    positions: torch.Tensor | None = None
    """[A]: positions of the last tokens."""
