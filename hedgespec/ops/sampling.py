"""What the user's top-k, top-p and min-p make of logits: one threshold a row, below which a logit is masked.

A threshold keeps the kernels pure reductions. Where logits tie exactly at the threshold all of them stay.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from hedgespec.utils.scalars import integer, real

NUCLEUS = 1024
"""Tokens among which a nucleus is looked for first: to sort a whole vocabulary takes ten times as long."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; the same for the target and for what drafts in its stead.

    Args:
        temperature: >= 0; 0 is greedy. Default: 0.0.
        top_k: keep the k largest logits, k >= 1; None keeps all. Default: None.
        top_p: of what is left keep the smallest set of mass >= top_p, in (0, 1]; None keeps all. Default: None.
        min_p: of what is left keep probabilities >= min_p times the largest, in [0, 1]; None keeps all. Default: None.

    Raises: TypeError for what is no number; ValueError for a value outside its range.

    Numbers may come as NumPy scalars or as tensors of one element; they are kept as Python's.

    The order (temperature, top-k, top-p, min-p) and the meaning are transformers', ties at the threshold apart.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperature", real("temperature", self.temperature))
        if self.top_k is not None:
            object.__setattr__(self, "top_k", integer("top_k", self.top_k, 1, otherwise=" or None"))
        for name in ("top_p", "min_p"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, real(name, value, otherwise=" or None"))
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature: expected a finite number >= 0, got {self.temperature}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a number in (0, 1], got {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p: expected a number in [0, 1], got {self.min_p}")

    def threshold(self, logits: torch.Tensor) -> torch.Tensor | None:
        """The bound below which a logit is masked, [...] of logits [..., V], before temperature; None where all stay."""
        top_p, min_p = self.top_p if self.top_p != 1 else None, self.min_p or None
        if self.temperature == 0 or (self.top_k, top_p, min_p) == (None, None, None):
            return None
        held, lowest = logits, None
        if self.top_k is not None:
            held = logits.topk(min(self.top_k, logits.shape[-1])).values
            lowest = held[..., -1]
        if top_p is not None:
            lowest = self._nucleus(held, top_p)
        if min_p is not None:
            floor = held.amax(-1) + self.temperature * math.log(min_p)
            lowest = floor if lowest is None else torch.maximum(lowest, floor)
        return lowest

    def _nucleus(self, logits: torch.Tensor, top_p: float) -> torch.Tensor:
        """The lowest of the largest logits of mass top_p, [...] of logits [..., n]."""
        size = logits.shape[-1]
        log_total = (logits.double() / self.temperature).logsumexp(-1, keepdim=True)
        few = NUCLEUS if logits.is_cpu and size > 4 * NUCLEUS else size  # elsewhere, to ask whether they do is to wait
        lowest, mass = self._last(logits.topk(few).values, log_total, top_p)
        if few < size and (short := mass < top_p).any():
            lowest[short], _ = self._last(logits[short].topk(size).values, log_total[short], top_p)
        return lowest

    def _last(self, ordered: torch.Tensor, log_total: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Of logits in order [..., n] the one that completes the mass top_p, and the mass of all, [...]."""
        probs = (ordered.double() / self.temperature - log_total).exp()
        last = (probs.cumsum(-1) - probs < top_p).sum(-1, keepdim=True) - 1
        last = last.clamp(min=0)  # a row without any mass is NaN, hence below nothing
        return ordered.gather(-1, last)[..., 0], probs.sum(-1)
