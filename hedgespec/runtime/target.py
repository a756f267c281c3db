"""The target as the decoder sees it: logits, a KV cache that rolls back, and the hidden states that heads read."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from hedgespec.device import to_device
from hedgespec.ops.linear import few_row_view
from hedgespec.runtime import capture, positions
from hedgespec.runtime.cache import RaggedCache, RowBuffer
from hedgespec.runtime.compat import CACHE_NAMES, cache_argument, names_cache
from hedgespec.runtime.native_forward import NativeForward
from hedgespec.runtime.positions import context_of, plain_lengths

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")
"""Layer types whose state is keys and values, and so can be rolled back."""
MASKABLE = ("sdpa", "eager")
"""Attention implementations that take a mask of their own for every row."""


def check_target(model: PreTrainedModel, name: str = "target") -> None:
    """Refuses what cannot be decoded speculatively: an encoder-decoder, a recurrent state, a cache of the model's own kind.

    Raises: ValueError about `name`.
    """
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        raise ValueError(f"{name}: expected a decoder-only model, got the encoder-decoder {type(model).__name__}")
    strange = sorted(set(getattr(config, "layer_types", None) or ()) - set(ATTENTION))
    if strange or getattr(model, "_is_stateful", False):
        state = f"layers of type {', '.join(strange)}" if strange else "a recurrent state"
        raise ValueError(
            f"{name}: expected attention layers with a key-value cache, got {type(model).__name__} with {state}, "
            "which cannot take back a rejected token"
        )
    if not names_cache(model.forward):
        raise ValueError(f"{name}: expected a model that takes {' or '.join(CACHE_NAMES)}, got {type(model).__name__}")


def device_of(model: PreTrainedModel) -> torch.device:
    """Where the model reads its tokens, which `model.device` cannot tell while accelerate keeps the embeddings elsewhere."""
    if model.device.type != "meta":
        return model.device
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    if getattr(hook, "execution_device", None) is None:
        raise ValueError("target: expected weights, or accelerate's hooks that fetch them, got a model on the meta device")
    return torch.device(hook.execution_device)


def rows_may_differ(model: PreTrainedModel) -> bool:
    """Returns whether one forward can serve rows of different lengths: it takes a position and a mask for each.

    Biases of ALiBi come from the slots' own numbers, or from a mask of another shape than ours, and some layers mask by the
    slots' numbers themselves.
    """
    config = model.config.get_text_config(decoder=True)
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    known = config._attn_implementation in MASKABLE and takes_positions and not getattr(config, "alibi", False)
    return known and not windows_by_slot(model)


def windows_by_slot(model: PreTrainedModel) -> bool:
    """Returns whether some layer holds a mask of its own, by slots instead of positions, that hides earlier tokens (GPT-Neo).

    The token at position t must then lie in slot t of a cache as long as the text, which is so for one row without a tree.
    """
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is None or buffer.ndim < 2 or buffer.shape[-1] != buffer.shape[-2] or buffer.shape[-1] < 2:
                continue
            is_mask = buffer.dtype == torch.bool or (buffer.dtype == torch.uint8 and ("bias" in name or "mask" in name))
            if is_mask and buffer.numel() == buffer.shape[-1] ** 2 and not bool(buffer[..., -1, :].all()):
                return True
    return False


def row_masks(
    model: PreTrainedModel, positions: torch.Tensor, end: int, tree: tuple[torch.Tensor, torch.Tensor] | None = None
) -> torch.Tensor | dict[str, torch.Tensor]:
    """Who may look at which of the slots 0..end-1, as the model would make it if all rows were at one position.

    It is what the forward of a model whose `rows_may_differ` takes as `attention_mask`.

    Args:
        model: whose layers they are for.
        positions: of the tokens read, int64 [B, T]; the token at position t of a row lies in slot t.
        end: slots that the forward reads.
        tree: where the tokens are no chain: each row's first slot [B, 1] and who descends from whom, bool [B, T, T].

    Returns: [B, 1, T, end], bool for sdpa, else what is added to the scores, in the model's dtype; of a model with several
        kinds of layers one for each.
    """
    slots = torch.arange(end, device=positions.device)
    keys = slots.expand(len(positions), end)
    seen = slots <= positions[..., None]
    if tree is not None:
        first, lines = tree
        place = (slots - first).clamp(0, positions.shape[1] - 1)  # [B, end]
        drafted = slots >= first
        # What lies behind the row's own tokens has none of these places; it is nobody's ancestor.
        drafted_seen = (
            lines.gather(2, place[:, None].expand(-1, lines.shape[1], -1)) & (slots - first < lines.shape[2])[:, None]
        )
        seen = torch.where(drafted[:, None], drafted_seen, True)
        keys = torch.where(drafted, positions.gather(1, place), slots)
    config = model.config.get_text_config(decoder=True)

    def mask(kind: str) -> torch.Tensor:
        """[B, 1, T, end]: True or 0 where a query sees a key, False or the least number where it does not."""
        visible = seen & _within(kind, config, positions[..., None], keys[:, None])
        if config._attn_implementation == "sdpa":
            return visible[:, None]
        least = torch.finfo(model.dtype).min
        return torch.zeros_like(visible[:, None], dtype=model.dtype).masked_fill(~visible[:, None], least)

    kinds = getattr(config, "layer_types", None)
    if kinds:
        return {kind: mask(kind) for kind in dict.fromkeys(kinds)}
    if getattr(config, "sliding_window", None) is not None:
        return mask("sliding_attention")
    if getattr(config, "attention_chunk_size", None) is not None:
        return mask("chunked_attention")
    return mask("full_attention")


def _within(kind: str, config: PretrainedConfig, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor | bool:
    """Whether a layer of this kind lets a position look at another that precedes it."""
    if kind == "sliding_attention":
        return keys > queries - config.sliding_window
    if kind == "chunked_attention":
        return keys // config.attention_chunk_size == queries // config.attention_chunk_size
    return True


def captures_graphs(model: PreTrainedModel) -> bool:
    """Whether its forwards are captured as CUDA graphs, or else compiled."""
    return device_of(model).type == "cuda"


class CapturedTarget:
    """A view of a target with what was captured of its forwards over a round's tokens, for one session at a time.

    Args:
        model: the target; the view shares its weights.
        compilations: of `hedgespec.runtime.capture.CompiledLayers`.

    Raises: NotCapturable.
    """

    def __init__(self, model: PreTrainedModel, compilations: dict):
        capture.check_plain(model)
        self.model, self.cache = few_row_view(model), RaggedCache(0)
        following = positions.length_dependent(model)
        if any(steps for _, steps in positions.boundaries(following.values())):
            raise capture.NotCapturable("its rotary factors may change with every token")
        self.lengths = positions.follow(self.model) if following else None
        self.graphs = self.layers = None
        if captures_graphs(model):
            self.graphs = capture.CudaGraphs()
        else:
            self.layers = capture.CompiledLayers(self.model, self._state, compilations)

    def _state(self, layer: int) -> list[torch.Tensor]:
        return [self.cache.layers[layer].keys, self.cache.layers[layer].values, self.cache.fixed]

    def __call__(
        self, function: Callable[..., Any], aux_layers: tuple, cache: RaggedCache, *inputs: torch.Tensor
    ) -> Sequence[torch.Tensor]:
        """function(*inputs), which reads `self.model`, writes into `cache` and returns the states of `aux_layers`; the first
        input is the tokens [B, T]."""
        tokens = inputs[0]
        key = (*tokens.shape, len(inputs), cache.capacity, aux_layers)
        if self.graphs is not None:
            self._settle(cache, (len(tokens), cache.capacity))
            return self.graphs(key, function, *inputs)
        self.cache, self.layers.bucket = cache, key
        try:
            return function(*inputs)
        finally:
            self.layers.bucket = None

    def _settle(self, cache: RaggedCache, bucket: tuple[int, int]) -> None:
        """Has a cache in the buffers that the graphs of this many rows and slots know."""
        kept = iter(self.graphs.held(bucket, [one for layer in cache.layers for one in (layer.keys, layer.values)]))
        for layer in cache.layers:
            layer.keys, layer.values = next(kept), next(kept)


class Captures:
    """The captured forwards of a target, kept from request to request. Threads may share one: each session borrows its own.

    Args:
        count: T, tokens of a round; a forward over fewer is filled up to them.
    """

    def __init__(self, count: int):
        self.count = count
        self.compilations: dict = {}
        """By graph and shapes, what was compiled."""
        self._idle: list[CapturedTarget] = []
        self._fingerprint: tuple = ()
        self._warned = False
        self.together = True
        """Whether the model takes rows of different lengths in one forward, as far as its configuration does not tell."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Captures, (self.count,)  # a copy, pickled or deep, begins anew

    def lend(self, model: PreTrainedModel, borrower: object) -> CapturedTarget | None:
        """For as long as `borrower` lives; None, with a warning the first time, where the model cannot be captured."""
        try:
            if not (self.together and rows_may_differ(model)):
                raise capture.NotCapturable("it takes no positions and mask of its own for each row")
            if (found := capture.fingerprint(model)) != self._fingerprint:
                self._fingerprint, self._idle = found, []
            # It goes back to where it came from: the model may have changed meanwhile.
            return capture.lend(self._idle, partial(CapturedTarget, model, self.compilations), borrower)
        except capture.NotCapturable as error:
            self.warn(error)
            return None

    def warn(self, reason: Exception) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"the target runs as it is, not compiled: {reason}", stacklevel=2)


class TargetSession:
    """A batch's view of the target: rows advance together, each at its own position.

    Args:
        model: a transformers causal language model in eval mode.
        aux_layers: the `Drafter.aux_layers` of every drafter; empty ones are ignored.
        batch: B, rows; 1 unless `rows_may_differ`.
        captures: where forwards over a round's tokens are captured; None runs them all as they are.
        context: positions that every forward may use; None: what the model was made for. Forwards past them are not captured,
            and no filling lies there.
        follows: whether rotary factors follow the text's length; None: the session looks for itself.
        offsets: by how much each row's text is shorter than the batch's longest, [B]. Read where the model's rotary factors
            follow the text's length, as is `floor`. None: all are equally long.
        floor: length of the batch's longest prompt.
        native: computes forwards over few tokens; None leaves all to the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        aux_layers: Iterable[tuple[int, ...]],
        batch: int = 1,
        *,
        captures: Captures | None = None,
        context: int | None = None,
        follows: bool | None = None,
        offsets: Sequence[int] | None = None,
        floor: int = 0,
        native: NativeForward | None = None,
    ):
        self.captures, self.captured = captures, None if captures is None else captures.lend(model, self)
        self.lengths: positions.Lengths | None = None
        """Where the model's rotary factors follow the text's length: what they follow."""
        if self.captured is not None:
            self.model, self.lengths = self.captured.model, self.captured.lengths
        elif positions.length_dependent(model) if follows is None else follows:
            self.model = few_row_view(model)
            self.lengths = positions.follow(self.model)
        else:
            self.model = model
        self.native = native if self.captured is None and self.lengths is None else None
        self.offsets = [0] * batch if offsets is None else list(offsets)
        self.floors = [floor] * batch
        self.context = context_of(model) if context is None else context
        self.cache = RaggedCache(batch)
        self.aux_layers = [layers for layers in dict.fromkeys(aux_layers) if layers]
        self.features = [{layers: RowBuffer() for layers in self.aux_layers} for _ in range(batch)]
        """By row and layers: the hidden states, concatenated, at the position before each token that the session was given
        (zeros before the first)."""
        self._chunk: dict[tuple[int, ...], torch.Tensor] = {}
        self._arguments = set(inspect.signature(model.forward).parameters)
        self._with_cache = {cache_argument(model.forward): self.cache, "use_cache": True}

    def forward(
        self,
        tokens: torch.Tensor,
        logits_to_keep: int,
        tree: tuple[torch.Tensor, torch.Tensor] | None = None,
        reach: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Reads `tokens` int64 [B, T] behind what is cached of each row; `keep` then says which of them count.

        Args:
            tree: for tokens that are no chain, their depths and lines of descent, see `hedgespec.ops.tree_mask.ancestry`.
            reach: how many positions each row's own tokens take behind its length, [B], 0..T; tokens further on are filling,
                whose positions are moved to where the model knows them. None: all T.
        Returns: logits [B, logits_to_keep, V] of the last positions.
        """
        lengths, count = self.cache.lengths, tokens.shape[1]
        if self._fits(count):
            try:
                return self._forward_fixed(tokens, tree)[:, :count][:, -logits_to_keep:]
            except capture.NotCapturable as error:  # nothing is lost: it wrote behind the rows' lengths
                self.captures.warn(error)
                self.captured = None
        reach = [count] * len(lengths) if reach is None else reach
        places = self.cache.slots(count, tokens.device)
        first = places[:, :1]
        if tree is not None:
            places = first + tree[0]
        if min(reach) < count and (self.lengths is not None or max(lengths) + count > (self.context or math.inf)):
            last = [max(length + own - 1, 0) for length, own in zip(lengths, reach)]
            places = torch.minimum(places, to_device(last, tokens.device)[:, None])
        if self.native is not None:
            counts = reach if tree is None else [count] * len(lengths)
            if self.native.takes(self.cache, counts, torch.is_grad_enabled()):
                return self._forward_native(tokens, logits_to_keep, counts, None if tree is None else (places - first, tree[1]))
        if self.lengths is not None:
            self.lengths.fixed, self.lengths.values = False, plain_lengths(places, self.offsets, self.floors)
            rows = zip(self.floors, self.offsets, lengths, reach)
            self.lengths.spans = [
                (max(floor, offset + length + 1), max(floor, offset + length + own)) for floor, offset, length, own in rows
            ]
        arguments: dict[str, Any] = {}
        if "position_ids" in self._arguments:
            arguments["position_ids"] = places
        if "logits_to_keep" in self._arguments:
            arguments["logits_to_keep"] = logits_to_keep
        if tree is not None:
            arguments["attention_mask"] = row_masks(self.model, places, max(lengths) + count, (first, tree[1]))
        elif min(lengths) != max(lengths):
            arguments["attention_mask"] = row_masks(self.model, places, max(lengths) + count)
        out = self.model(tokens, **self._with_cache, output_hidden_states=bool(self.aux_layers), **arguments)
        if self.cache.layers and self.cache.written != count:
            raise ValueError(
                f"target: expected keys and values for the {count} tokens it read, got {self.cache.written} from "
                f"{type(self.model).__name__}: prompts of its own cannot be told from tokens"
            )
        for layers in self.aux_layers:
            states = [out.hidden_states[layer].to(tokens.device) for layer in layers]
            self._chunk[layers] = torch.cat(states, -1)
        return out.logits[:, -logits_to_keep:].to(tokens.device)

    def _forward_native(
        self, tokens: torch.Tensor, logits_to_keep: int, counts: Sequence[int], tree: tuple[torch.Tensor, torch.Tensor] | None
    ) -> torch.Tensor:
        """`forward` by `NativeForward`."""
        layers = sorted({layer for group in self.aux_layers for layer in group})
        logits, states = self.native(tokens, self.cache, counts, logits_to_keep, layers, *(tree or ()))
        width = states.shape[2] // max(len(layers), 1)
        for group in self.aux_layers:
            if list(group) == layers:
                self._chunk[group] = states
            else:
                parts = [states.narrow(2, layers.index(layer) * width, width) for layer in group]
                self._chunk[group] = torch.cat(parts, -1)
        return logits

    def reread(self, texts: Sequence[torch.Tensor | None], floor: int) -> None:
        """Computes rows' keys and values once more from their tokens; their hidden states stay what they were.

        Args:
            texts: by row its tokens int64 [length], all that are cached of it; None leaves a row as it is.
            floor: length of the batch's longest text at the point of plain decoding where it reads its texts again.
        """
        held = list(self.cache.lengths)
        longest = max(len(text) for text in texts if text is not None)
        tokens = torch.zeros(len(held), longest, dtype=torch.int64, device=device_of(self.model))
        for row, text in enumerate(texts):
            if text is not None:
                tokens[row, : len(text)], self.cache.lengths[row], self.floors[row] = text, 0, floor
        self.forward(tokens, 1, reach=[0 if text is None else len(text) for text in texts])
        self.cache.lengths[:] = held

    def _fits(self, count: int) -> bool:
        """Whether a captured forward can read them: behind a prompt, and within the positions that the model knows."""
        if self.captured is None or count > self.captures.count or not self.cache.layers:
            return False
        return self.context is None or max(self.cache.lengths) + self.captures.count <= self.context

    def _forward_fixed(self, tokens: torch.Tensor, tree: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        """`forward` at fixed shapes: T tokens a row, the whole capacity of the cache, lengths on the device.

        Returns: logits [B, T, V], those past the tokens given of no meaning.
        """
        spare = self.captures.count - tokens.shape[1]
        self.cache.make_room(self.captures.count)
        rows = [self.cache.lengths] if self.lengths is None else [self.cache.lengths, self.offsets, self.floors]
        inputs = [functional.pad(tokens, (0, spare)), to_device(rows, tokens.device)]
        if tree is not None:
            depths, lines = tree
            inputs += [functional.pad(depths, (0, spare)), functional.pad(lines, (0, spare, 0, spare))]
            inputs[-1].diagonal(dim1=1, dim2=2).fill_(True)  # or a row of the mask would be empty
        logits, *states = self.captured(self._read, tuple(self.aux_layers), self.cache, *inputs)
        self._chunk = dict(zip(self.aux_layers, states, strict=True))
        return logits.clone()  # the next round's forward may write where these are

    def _read(
        self, tokens: torch.Tensor, rows: torch.Tensor, depths: torch.Tensor | None = None, lines: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """Logits [B, T, V], then the hidden states of each of the aux layers. No value on the device decides what runs.

        Args:
            rows: int64 [1, B], the rows' lengths; [3, B] with their offsets and floors where rotary factors follow the length.
        """
        first = rows[0, :, None]
        slots = first + torch.arange(tokens.shape[1], device=tokens.device)
        places, tree = (slots, None) if depths is None else (first + depths, (first, lines))
        mask = row_masks(self.model, places, self.cache.capacity, tree)
        if self.lengths is not None:
            self.lengths.fixed, self.lengths.values = True, torch.maximum(places + rows[1, :, None] + 1, rows[2, :, None])
        self.cache.fixed = slots
        try:
            out = self.model(
                tokens, position_ids=places, attention_mask=mask, **self._with_cache,
                output_hidden_states=bool(self.aux_layers),
            )  # fmt: skip
        finally:
            self.cache.fixed = None
        return [out.logits, *(torch.cat([out.hidden_states[layer] for layer in layers], -1) for layers in self.aux_layers)]

    def keep(self, counts: Sequence[int], paths: Sequence[Sequence[int]] | None = None) -> None:
        """Keeps the first `counts[b]` tokens of row b's last forward and forgets the others.

        Args:
            paths: where that was a tree: of each row the places among its tokens to keep, ascending, at least `counts[b]`.
                Their keys and values move together.
        """
        places: list[Any] = [slice(count) for count in counts]
        if paths is not None:
            paths = [list(path[:count]) for path, count in zip(paths, counts)]
            self.cache.gather(paths)
            places = [to_device(path, device_of(self.model)) for path in paths]
        for row, count in enumerate(counts):
            self.cache.lengths[row] += count
            for layers, chunk in self._chunk.items():
                buffer = self.features[row][layers]
                if not len(buffer):
                    buffer.append(chunk.new_zeros(1, chunk.shape[2]))
                buffer.append(chunk[row, places[row]])

    def select(self, rows: Sequence[int]) -> None:
        """Goes on with these rows only."""
        self.cache.select(rows)
        self.features = [self.features[row] for row in rows]
        self.offsets, self.floors = [self.offsets[row] for row in rows], [self.floors[row] for row in rows]
