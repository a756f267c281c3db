"""What `generate` returns: scores and logits by step, and the cache that a caller passed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import DynamicCache
from transformers.generation import GenerateDecoderOnlyOutput

from hedgespec.decoder import Row
from hedgespec.stats import DecodeStats


@dataclass
class HedgeSpecOutput(GenerateDecoderOnlyOutput):
    """The output of `generate` with `return_dict_in_generate`, with the statistics of the decoding.

    In a batch, `scores` and `logits` are 0 for the steps after a row's end. `attentions` and `hidden_states` are None.
    """

    hedgespec: list[DecodeStats] | None = None
    """B statistics, one a row."""


def by_step(rows: list[list[torch.Tensor]]) -> tuple[torch.Tensor, ...]:
    """Turns lists of [1, V] by row and step into [B, V] by step."""
    return tuple(at_step(rows, step) for step in range(max(len(row) for row in rows)))


def at_step(rows: list[list[torch.Tensor]], step: int) -> torch.Tensor:
    """Returns one step of all rows, [B, V]; 0 for a row that ended before it."""
    nothing = torch.zeros_like(rows[0][0])
    return torch.cat([row[step] if step < len(row) else nothing for row in rows])


def store(cache: DynamicCache, rows: list[Row]) -> None:
    """Writes the rows' keys and values into a cache as `generate` does: a column for every token except the last."""
    columns = max(row.seen.shape[1] for row in rows) - 1
    while len(cache.layers) < len(rows[0].cache):
        cache.layers.append(cache.layer_class_to_replicate())
    for layer_idx, layer in enumerate(cache.layers):
        buffers = []
        for part in (0, 1):
            first = rows[0].cache[layer_idx][part]
            states = first.new_zeros(len(rows), first.shape[0], columns, first.shape[2])
            for place, row in enumerate(rows):
                own = row.cache[layer_idx][part][:, : row.length - 1]  # tokens that were cut off are left out
                states[place, :, row.request.padding : row.request.padding + own.shape[1]] = own
            buffers.append(states)
        layer.is_initialized = False  # older versions of transformers would keep the length and write zeros
        layer.reset()
        layer.update(*buffers)
