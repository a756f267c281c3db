"""The target as the decoder sees it: logits, a KV cache that rolls back, and the hidden states that heads read."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import DynamicCache

from hedgespec.cache import RowBuffer


class TargetSession:
    """One request's view of the target.

    Args:
        model: a transformers causal language model in eval mode.
        aux_layers: the `Drafter.aux_layers` of every drafter; empty ones are ignored.
    """

    def __init__(self, model, aux_layers: Iterable[tuple[int, ...]]):
        self.model = model
        self.cache = DynamicCache(config=model.config)
        self.features = {layers: RowBuffer() for layers in aux_layers if layers}
        """Row t of a buffer: the hidden states, concatenated, at the position before token t (zeros for token 0)."""
        self._fresh = 0

    def forward(self, tokens: torch.Tensor, logits_to_keep: int) -> torch.Tensor:
        """Reads `tokens` int64 [T] behind what is cached; returns logits [logits_to_keep, V] of its last positions."""
        out = self.model(
            tokens[None],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=logits_to_keep,
            output_hidden_states=bool(self.features),
        )
        for layers, buffer in self.features.items():
            if not len(buffer):
                width = sum(out.hidden_states[layer].shape[-1] for layer in layers)
                buffer.append(out.hidden_states[0].new_zeros(1, width))
            buffer.append(torch.cat([out.hidden_states[layer][0] for layer in layers], -1))
        self._fresh = tokens.shape[0]
        return out.logits[0]

    def keep(self, count: int) -> None:
        """Keeps the first `count` tokens of the last forward and rolls the others back."""
        if (surplus := self._fresh - count) > 0:
            self.cache.crop(-surplus)
            for buffer in self.features.values():
                buffer.drop(surplus)
        self._fresh = count
