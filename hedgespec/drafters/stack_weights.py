"""The weights of equal-shaped EAGLE heads, stacked, and which heads can be stacked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import nn

from hedgespec.drafters.eagle import EagleHead, EagleLayer
from hedgespec.ops.head_layers import stack_linear, stack_rms_norm, swiglu
from hedgespec.ops.linear import FewRowLinear


class StackWeights:
    """The weights of N equal-shaped heads, each [N, ...].

    If all output rows are rows of one matrix, as with draft vocabularies that are slices of the target's output matrix, they
    are
    kept once: a table [U, H] of the U ids that any head can propose, and an index [N, Vd] into it.

    Args:
        heads: N >= 1 heads whose `kind_of` is the same.
    """

    def __init__(self, heads: Sequence[EagleHead]):
        self.heads, self.config, self.embed = tuple(heads), heads[0].config, heads[0].embed
        self.weights: dict[str, torch.Tensor] = {}
        """By the heads' parameter names, each [N, ...]; `lm_head.weight` is [U, H] if there is an `index`."""
        self.index: torch.Tensor | None = None
        """int64 [N, Vd]: row of `lm_head.weight` of every draft id; None if every head has a matrix of its own."""
        for name in self.config.shapes:
            if name == "lm_head.weight":
                self.weights[name], self.index = _shared_rows(heads)
            else:
                own = [head.get_parameter(name).detach() for head in heads]
                self.weights[name] = torch.stack(own) if len(own) > 1 else own[0][None]
        device = self.weights["fc.weight"].device
        own_maps = [head.draft_to_target for head in heads if head.draft_to_target is not None]
        self.maps = torch.stack(own_maps).to(device) if own_maps else None
        """int64 [N, Vd]: the target's id of every draft id; None if the vocabularies are the same."""
        self.map_of = None if self.maps is None else list(self.maps)
        """The rows of `maps`."""
        self.frequency = heads[0].rope_frequency.to(device)
        """float32 [D / 2], of the rotary positions."""
        self.query_scale = heads[0].rope_factor ** 2
        """Factor of the rotated queries; it replaces a factor of both queries and keys."""

    def at(self, which: torch.Tensor | None) -> StackLayer:
        """Returns the layer for rows that all heads run on (None), or that one head each runs on: `which`, int64 [R]."""
        return StackLayer(self, which)


class StackLayer(EagleLayer):
    """The layer of a stack, for hidden states [N, R, ...] of all heads, or [R, ...] of the heads `which`."""

    def __init__(self, stack: StackWeights, which: torch.Tensor | None):
        self.stack, self.config, self.which = stack, stack.config, which

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weights, which = self.stack.weights, self.which
        index = self.stack.index if name == "lm_head" else None
        product = stack_linear(x, weights[f"{name}.weight"], which, index=index)
        if name in self.config.biases:
            bias = weights[f"{name}.bias"]
            product = product + (bias[:, None] if which is None else bias[which])
        return product

    def rms(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight, eps, which = self.stack.weights[f"{name}.weight"], self.config.rms_norm_eps, self.which
        if x.ndim == (3 if which is None else 2):
            return stack_rms_norm(x, weight, eps, which)
        parts = x.shape[-2]  # a norm of each attention head
        which = None if which is None else which.repeat_interleave(parts)
        return stack_rms_norm(x.flatten(-3, -2), weight, eps, which).unflatten(-2, (-1, parts))

    def activate(self, gate_up: torch.Tensor) -> torch.Tensor:
        return swiglu(gate_up)


def is_plain(drafter: object) -> TypeGuard[EagleHead]:
    """Returns whether a drafter is an unmodified `EagleHead`: not a subclass, without hooks and wrapped or replaced layers, and
    with weights and a draft vocabulary of the sizes in its configuration."""
    if type(drafter) is not EagleHead:
        return False
    weights, expected = dict(drafter.named_parameters()), drafter.config.shapes
    if drafter.owns_embedding:
        weights.pop("embed_tokens.weight", None)
    mapping = drafter.draft_to_target
    return (
        {name: tuple(weight.shape) for name, weight in weights.items()} == expected
        and (mapping is None or mapping.shape == (drafter.config.draft_vocab_size,))
        and all(
            type(module) in (EagleHead, FewRowLinear, nn.RMSNorm, nn.Linear, nn.Embedding)
            and not (
                module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) or "session" in vars(module)
            )
            for module in drafter.modules()
        )
    )


def kind_of(head: EagleHead) -> tuple:
    """Returns a key that is equal for heads that can be stacked: shapes and variant, dtype, device and embedding."""
    weight = head.fc.weight
    return head.config, weight.dtype, weight.device, id(head.embedding), head.draft_to_target is None


def _shared_rows(heads: Sequence[EagleHead]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns the output rows of all heads: (table [U, H], index [N, Vd]) if they are rows of one matrix, else
    ([N, Vd, H], None)."""
    rows = [head.lm_head.weight.detach() for head in heads]
    if len(heads) == 1:
        return rows[0][None], None
    names = torch.arange(len(rows[0]), device=rows[0].device)
    if heads[0].draft_to_target is None and all(one.data_ptr() == rows[0].data_ptr() for one in rows):  # the target's own
        return rows[0], names.repeat(len(rows), 1)
    ids = [names if head.draft_to_target is None else head.draft_to_target.to(names.device) for head in heads]
    union, index = torch.stack(ids).unique(return_inverse=True)
    table = rows[0].new_empty(len(union), rows[0].shape[1])
    for place, one in zip(index, rows):
        table[place] = one
    if all(torch.equal(table[place], one) for place, one in zip(index, rows)):
        return table, index
    return torch.stack(rows), None
