"""Scratch memory on a GPU for kernels whose blocks meet in it: one zeroed buffer for each stream, kept between calls."""

from __future__ import annotations

import torch

_kept: dict[tuple[torch.device, int, str], torch.Tensor] = {}


def workspace(device: torch.device, stream: int, size: int, purpose: str) -> torch.Tensor:
    """At least `size` bytes, uint8, zeroed when they are made; who uses them leaves counters at zero again.

    Launches on one stream follow each other, so they share a buffer; other streams have their own. While a CUDA graph is
    captured the buffer is a fresh one that belongs to the graph: its replays may run beside anything.

    Args:
        device: where; with an index if it is a GPU.
        stream: the handle of the stream that will use it.
        size: bytes.
        purpose: the operation: two operations never share a buffer.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.zeros(size, dtype=torch.uint8, device=device)
    key = device, stream, purpose
    buffer = _kept.get(key)
    if buffer is None or buffer.numel() < size:
        # Memory freed here may be handed out again only to work on this very stream, hence after what still uses it.
        buffer = _kept[key] = torch.zeros(size, dtype=torch.uint8, device=device)
    return buffer
