"""What the launchers of kernels share, compiled or Triton's: arguments made ready to be pointed at, and empty outputs."""

from __future__ import annotations

import torch

from hedgespec.records import Evaluation

_SMALLEST = torch.finfo(torch.float32).tiny


def dense_vocabulary(logits: torch.Tensor) -> torch.Tensor:
    """The logits, their last dimension contiguous."""
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


def as_float32(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Contiguous and in float32, as kernels read what belongs to a row."""
    return None if tensor is None else tensor.to(torch.float32).contiguous()


def split_temperature(temperature: float | torch.Tensor) -> tuple[float, torch.Tensor | None]:
    """Temperature for all rows, or else for each."""
    if type(temperature) is float:  # asking whether it is a tensor takes longer
        return temperature, None
    return (0.0, as_float32(temperature)) if isinstance(temperature, torch.Tensor) else (float(temperature), None)


def not_quite_zero(temperature: float | torch.Tensor) -> float | torch.Tensor:
    """A number above 0 that float32 would round to 0 is not a point mass: ties share, as they do in float64."""
    if isinstance(temperature, torch.Tensor) or temperature == 0:
        return temperature
    return max(temperature, _SMALLEST)


def empty_evaluation(
    drafters: int, batch: int, positions: int, top_k: int | None, draft_length: int | None, device: torch.device
) -> Evaluation:
    """The outputs of `evaluate` for a kernel to fill, float32; already right where there is no row to evaluate."""
    scores = torch.empty(4 + 2 * (top_k or 0), drafters, batch, positions, dtype=torch.float32, device=device)
    if draft_length is None:
        return Evaluation(scores)
    whole = torch.empty((drafters, batch), dtype=torch.float32, device=device)
    losses = torch.empty((drafters, batch, positions, draft_length), dtype=torch.float32, device=device)
    if positions == 0:
        whole.fill_(torch.nan)
    return Evaluation(scores, whole, losses)
