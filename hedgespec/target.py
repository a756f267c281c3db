"""The target as the decoder sees it: logits, a KV cache that rolls back, and the hidden states that heads read."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence

import torch

from hedgespec.cache import RaggedCache, RowBuffer

ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")
"""Layer types whose state is keys and values, and so can be rolled back."""
MASKABLE = ("sdpa", "eager")
"""Attention implementations that take a mask of their own for every row."""


def check_target(model) -> None:
    """Refuses what cannot be decoded speculatively: an encoder-decoder, a recurrent state, a cache of the model's own kind.

    Raises: ValueError.
    """
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        raise ValueError(f"target: expected a decoder-only model, got the encoder-decoder {type(model).__name__}")
    strange = sorted(set(getattr(config, "layer_types", None) or ()) - set(ATTENTION))
    if strange or getattr(model, "_is_stateful", False):
        state = f"layers of type {', '.join(strange)}" if strange else "a recurrent state"
        raise ValueError(
            f"target: expected attention layers with a key-value cache, got {type(model).__name__} with {state}, "
            "which cannot take back a rejected token"
        )
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise ValueError(f"target: expected a model that takes past_key_values, got {type(model).__name__}")


def device_of(model) -> torch.device:
    """Where the model reads its tokens, which `model.device` cannot tell while accelerate keeps the embeddings elsewhere."""
    if model.device.type != "meta":
        return model.device
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    if getattr(hook, "execution_device", None) is None:
        raise ValueError("target: expected weights, or accelerate's hooks that fetch them, got a model on the meta device")
    return torch.device(hook.execution_device)


def rows_may_differ(model) -> bool:
    """Whether one forward can serve rows of different lengths: it takes a position and a mask for each.

    Biases of ALiBi come from the slots' own numbers, or from a mask of another shape than ours.
    """
    config = model.config.get_text_config(decoder=True)
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    return config._attn_implementation in MASKABLE and takes_positions and not getattr(config, "alibi", False)


class TargetSession:
    """A batch's view of the target: rows advance together, each at its own position.

    Args:
        model: a transformers causal language model in eval mode.
        aux_layers: the `Drafter.aux_layers` of every drafter; empty ones are ignored.
        batch: B, rows; 1 unless `rows_may_differ`.
    """

    def __init__(self, model, aux_layers: Iterable[tuple[int, ...]], batch: int = 1):
        self.model = model
        self.cache = RaggedCache(batch)
        self.aux_layers = [layers for layers in dict.fromkeys(aux_layers) if layers]
        self.features = [{layers: RowBuffer() for layers in self.aux_layers} for _ in range(batch)]
        """By row and layers: the hidden states, concatenated, at the position before each token that the session was given
        (zeros before the first)."""
        self._chunk: dict[tuple[int, ...], torch.Tensor] = {}
        self._arguments = set(inspect.signature(model.forward).parameters)

    def forward(self, tokens: torch.Tensor, logits_to_keep: int) -> torch.Tensor:
        """Reads `tokens` int64 [B, T] behind what is cached of each row; `keep` then says how many of them count.

        Returns: logits [B, logits_to_keep, V] of the last positions.
        """
        lengths, count = self.cache.lengths, tokens.shape[1]
        positions = self.cache.slots(count, tokens.device)
        arguments = {}
        if "position_ids" in self._arguments:
            arguments["position_ids"] = positions
        if "logits_to_keep" in self._arguments:
            arguments["logits_to_keep"] = logits_to_keep
        if min(lengths) != max(lengths):
            arguments["attention_mask"] = self._masks(positions, max(lengths) + count)
        out = self.model(
            tokens, past_key_values=self.cache, use_cache=True, output_hidden_states=bool(self.aux_layers), **arguments
        )
        if self.cache.layers and self.cache.written != count:
            raise ValueError(
                f"target: expected keys and values for the {count} tokens it read, got {self.cache.written} from "
                f"{type(self.model).__name__}: prompts of its own cannot be told from tokens"
            )
        for layers in self.aux_layers:
            states = [out.hidden_states[layer].to(tokens.device) for layer in layers]
            self._chunk[layers] = torch.cat(states, -1)
        return out.logits[:, -logits_to_keep:].to(tokens.device)

    def keep(self, counts: Sequence[int]) -> None:
        """Keeps the first `counts[b]` tokens of row b's last forward and forgets the others."""
        for row, count in enumerate(counts):
            self.cache.lengths[row] += count
            for layers, chunk in self._chunk.items():
                buffer = self.features[row][layers]
                if not len(buffer):
                    buffer.append(chunk.new_zeros(1, chunk.shape[2]))
                buffer.append(chunk[row, :count])

    def select(self, rows: Sequence[int]) -> None:
        """Goes on with these rows only."""
        self.cache.select(rows)
        self.features = [self.features[row] for row in rows]

    def _masks(self, positions: torch.Tensor, end: int) -> torch.Tensor | dict[str, torch.Tensor]:
        """Who may look at which of the slots 0..end-1, as the model would make it if all rows were at one position.

        A model with several kinds of layers takes a mask for each. positions: [B, T].
        """
        config = self.model.config.get_text_config(decoder=True)
        kinds = getattr(config, "layer_types", None)
        if kinds:
            return {kind: self._mask(kind, config, positions, end) for kind in dict.fromkeys(kinds)}
        if getattr(config, "sliding_window", None) is not None:
            return self._mask("sliding_attention", config, positions, end)
        if getattr(config, "attention_chunk_size", None) is not None:
            return self._mask("chunked_attention", config, positions, end)
        return self._mask("full_attention", config, positions, end)

    def _mask(self, kind: str, config, positions: torch.Tensor, end: int) -> torch.Tensor:
        """[B, 1, T, end]: True or 0 where a query sees a key, False or the least number where it does not."""
        queries, slots = positions[:, None, :, None], torch.arange(end, device=positions.device)
        mask = slots <= queries
        if kind == "sliding_attention":
            mask &= slots > queries - config.sliding_window
        elif kind == "chunked_attention":
            mask &= slots // config.attention_chunk_size == queries // config.attention_chunk_size
        if config._attn_implementation == "sdpa":
            return mask
        return torch.zeros_like(mask, dtype=self.model.dtype).masked_fill(~mask, torch.finfo(self.model.dtype).min)
