"""What a model's positions allow: tables that end, and rotary embeddings whose factors follow the length of the text.

transformers' rotary embeddings of type "longrope" and "dynamic" choose their factors by the greatest position of a forward. In
plain decoding that is the length of the batch's longest text so far. A forward of speculative decoding holds drafted tokens and
rows of different progress, so its greatest position says something else. `follow` makes these embeddings take, for every token,
the length that plain decoding would have had in the forward that read this token.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from types import MethodType

import torch
from torch import nn

from hedgespec.transfer import to_device

TABLES = (
    "wpe", "embed_positions", "position_embedding", "position_embeddings", "positions_embed", "pos_embed", "pos_encoding",
    "word_pos_embeddings",
)  # fmt: skip
"""Names by which models hold a table with an entry for every position."""
CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx")
"""Names by which configurations tell how many positions a model was made for."""


def context_of(model) -> int | None:
    """Returns how many positions the model was made for; None if its configuration does not say."""
    config = model.config.get_text_config(decoder=True)
    found = (getattr(config, name, None) for name in CONTEXT)
    return next((one for one in found if isinstance(one, int) and not isinstance(one, bool)), None)


def table_size(model) -> int | None:
    """Returns the number of positions for which the model has an entry in a table; None if it has no such table.

    Plain decoding fails at the first token past the table. Rotary and ALiBi positions have no end.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    sizes = []
    for module in (decoder if isinstance(decoder, nn.Module) else model).modules():
        for name in TABLES:
            table = module._modules.get(name)
            if isinstance(table, nn.Embedding):
                sizes.append(table.num_embeddings - int(getattr(table, "offset", 0)))
                continue
            table = module._buffers.get(name, module._parameters.get(name, vars(module).get(name)))
            if isinstance(table, torch.Tensor) and table.ndim == 2:
                sizes.append(table.shape[0])
    return min(sizes, default=None)


def length_dependent(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the rotary embeddings whose factors follow the text's length, by their names in the model.

    Raises: ValueError if the configuration asks for such factors and no embedding of a known form has them.
    """
    found = {name: module for name, module in model.named_modules() if any(map(_follows, _rope_types(module)))}
    config = model.config.get_text_config(decoder=True)
    if not found and any(map(_follows, _declared(config))):
        raise ValueError(
            f"target: expected rotary embeddings of transformers' own form where their factors follow the text's length, got "
            f"{type(model).__name__} with rope type {', '.join(map(str, _declared(config)))}"
        )
    return found


def _follows(rope_type) -> bool:
    return isinstance(rope_type, str) and (rope_type == "longrope" or "dynamic" in rope_type)


def _rope_types(module: nn.Module) -> list:
    rope_type = getattr(module, "rope_type", None)
    return list(rope_type.values()) if isinstance(rope_type, dict) else [rope_type]


def _declared(config) -> list:
    """Returns the rope types that a configuration asks for, one for each type of layers."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(parameters, dict):
        return []
    nested = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    return [one.get("rope_type", one.get("type")) for one in nested]


class Lengths:
    """For every token of the forward under way, the length of the text in the plain forward that would read it."""

    def __init__(self):
        self.values: torch.Tensor | None = None
        """int64 [B, T]; None: the embeddings do what they do by themselves."""
        self.spans: list[tuple[int, int]] = []
        """By row, the first and the last of its values, known without waiting for a device; those of filling may be others."""
        self.fixed = False
        """Whether the forward is captured, so that what runs must not depend on the spans. Not with type "dynamic"."""


class FollowedRotary(nn.Module):
    """A rotary embedding that takes its factors from `Lengths` instead of the greatest position it is called with.

    It runs the embedding once for each different length that matters, with one position more that makes the embedding choose
    this length's factors, and picks every token's own result. Within the length for which factors are constant that is one run.

    Args:
        rotary: of a view of its own (`hedgespec.linear.few_row_view`): the embedding keeps state in itself.
        lengths: shared by all embeddings of the view.
    """

    def __init__(self, rotary: nn.Module, lengths: Lengths):
        super().__init__()
        self.rotary, self.lengths = rotary, lengths
        for name, buffer in rotary._buffers.items():  # which it overwrites in place
            rotary._buffers[name] = None if buffer is None else buffer.clone()
        self.training = rotary.training

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("rotary"), name)

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, *args, **kwargs):
        layer_type = kwargs.get("layer_type", args[0] if args else None)
        boundary, steps = boundary_of(self.rotary, layer_type)
        lengths = self.lengths
        if boundary is None or lengths.values is None:
            return self.rotary(x, position_ids, *args, **kwargs)
        if lengths.fixed:
            distinct = {boundary, boundary + 1}
        elif steps:
            distinct = {max(length, boundary) for first, last in lengths.spans for length in range(first, last + 1)}
        else:
            distinct = {boundary + (length > boundary) for span in lengths.spans for length in span}
        values = lengths.values.clamp(min=boundary, max=None if steps else boundary + 1)
        result = None
        for length in sorted(distinct):
            most = None if length > boundary and not steps else length - 1
            found = self._at(length, most, x, position_ids, args, kwargs, resets=steps)
            result = found if result is None else _where(values == length, found, result)
        return result

    def _at(self, length: int, most: int | None, x: torch.Tensor, position_ids: torch.Tensor, args: tuple, kwargs: dict,
            resets: bool):  # fmt: skip
        """Returns what the embedding returns where `length` is the length of the text, for positions up to `most`."""
        if resets and getattr(self.rotary, "max_seq_len_cached", length) != length:
            self.rotary(x, torch.zeros_like(position_ids[..., :1]), *args, **kwargs)  # it forgets greater lengths
        last = torch.full_like(position_ids[..., :1], length - 1)
        found = self.rotary(
            x, torch.cat([position_ids if most is None else position_ids.clamp(max=most), last], -1), *args, **kwargs
        )
        if isinstance(found, torch.Tensor):
            return found[..., :-1, :]
        return tuple(one[..., :-1, :] for one in found)


def _where(chosen: torch.Tensor, found, other):
    """Returns `found` for the chosen tokens, bool [B, T], and `other` for the rest: tensors [.., B, T, D] or [B, 1, T, D]."""
    if not isinstance(found, torch.Tensor):
        return tuple(_where(chosen, one, rest) for one, rest in zip(found, other))
    mask = chosen[..., None] if found.ndim < 4 or found.shape[-3] == len(chosen) else chosen[:, None, :, None]
    return torch.where(mask, found, other)


def boundary_of(rotary: nn.Module, layer_type: str | None = None) -> tuple[int | None, bool]:
    """Returns the greatest length up to which factors are constant (None: always) and whether they change at every length past
    it, as of type "dynamic", or only once, as of type "longrope"."""
    rope_type, config = rotary.rope_type, rotary.config
    parameters = getattr(config, "rope_parameters", None) or {}
    if isinstance(rope_type, dict):
        rope_type, parameters = rope_type.get(layer_type), parameters.get(layer_type) or {}
    if not _follows(rope_type):
        return None, False
    if rope_type == "longrope":
        own = parameters.get("original_max_position_embeddings")
        return int(getattr(config, "original_max_position_embeddings", None) if own is None else own), False
    return int(rotary.original_max_seq_len), True


def boundaries(rotaries: Iterator[nn.Module] | Sequence[nn.Module]) -> list[tuple[int, bool]]:
    """Returns `boundary_of` for every type of layers of these rotary embeddings, those without a boundary left out."""
    found = []
    for rotary in rotaries:
        kinds = rotary.rope_type if isinstance(rotary.rope_type, dict) else [None]
        found += [boundary_of(rotary, kind) for kind in kinds]
    return [(boundary, steps) for boundary, steps in found if boundary is not None]


def follow(view: nn.Module) -> Lengths:
    """Replaces the length-dependent rotary embeddings of a view by followed ones.

    Args:
        view: of `hedgespec.linear.few_row_view`; the model that it views is not touched.

    Returns: what the embeddings take their lengths from.

    Raises: ValueError if a module has a forward of its own that would go past the view.
    """
    lengths = Lengths()
    for name in length_dependent(view):
        parent, _, child = name.rpartition(".")
        holder = view.get_submodule(parent)
        holder._modules[child] = FollowedRotary(holder._modules[child], lengths)
        path = name.split(".")
        for depth in range(len(path)):
            _rebind(view.get_submodule(".".join(path[:depth])))
        _rebind(holder._modules[child].rotary)
    return lengths


def _rebind(module: nn.Module) -> None:
    """Makes the hook of accelerate that wraps a viewed module's forward call the view."""
    wrapped, plain = vars(module).get("forward"), vars(module).get("_old_forward")
    if wrapped is None:
        return
    if not (isinstance(wrapped, functools.partial) and wrapped.args and isinstance(plain, MethodType)):
        raise ValueError(
            f"target: expected forwards as their classes have them where rotary factors follow the text's length, got "
            f"{type(module).__name__} with another ({wrapped!r})"
        )
    vars(module)["_old_forward"] = MethodType(plain.__func__, module)
    rebound = functools.partial(wrapped.func, module, *wrapped.args[1:], **wrapped.keywords)
    vars(module)["forward"] = functools.update_wrapper(rebound, plain)


def plain_lengths(positions: torch.Tensor, offsets: Sequence[int], floors: Sequence[int]) -> torch.Tensor:
    """Returns the length of the batch's longest text in the plain forward that reads each token, int64 [B, T].

    Args:
        positions: of the tokens, int64 [B, T].
        offsets: by how much each row's text is shorter than the longest, [B]. Rows of plain decoding keep this difference.
        floors: length of the longest text when each row's prompt was read, [B].
    """
    offset, floor = to_device([offsets, floors], positions.device)[..., None]
    return torch.maximum(positions + offset + 1, floor)
