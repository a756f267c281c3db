"""What one step of an engine and its EAGLE heads yields, for `eagle_proposer.py`: containers of numbers and tensors."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from hedgespec.integrations.vllm.head_pool import SILENT


@dataclass
class Step:
    """What the engine did in the step that is under way, as far as the proposer was told."""

    names: list[str]
    """Of the requests, [B]."""
    emitted: list[list[int]]
    """What each emitted; nothing where its prompt is still being read."""
    lengths: list[int]
    """Tokens of each, with these."""
    drafted: list[int]
    """Drafted tokens that were verified."""
    rows: torch.Tensor | None = None
    """Of the target's forward, those that are no rejected draft's, int64 [T]; None: all."""


@dataclass(eq=False)
class HeadResult:
    """What one head said in a step."""

    words: torch.Tensor
    """After each new token of the active rows, row after row, int64 [T]."""
    sound: torch.Tensor
    """Whether its output there was finite, bool [T]."""
    prompt: torch.Tensor
    """Its acceptance at the prompts' positions of the warm start, [positions]."""
    features: torch.Tensor | None = None
    """It goes on from these after the last tokens, [A, H]."""

    @classmethod
    def silent(cls, tokens: int, positions: int, device: torch.device) -> HeadResult:
        words = torch.full((tokens,), SILENT, device=device)
        return cls(words, torch.zeros(tokens, dtype=torch.bool, device=device), torch.zeros(positions, device=device))


@dataclass(eq=False)
class Reading:
    """What all heads said in a step."""

    offsets: NDArray[np.int64]
    """Where the tokens of each active row begin among all of them, and where the last one's end, [A + 1]."""
    warm: dict[int, range]
    """Of new requests, by row: places for the warm start."""
    said: list[HeadResult] = field(default_factory=list)
    """Of each head."""
    positions: torch.Tensor | None = None
    """Of the last tokens, [A]."""
