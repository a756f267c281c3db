"""Attention of a stack's heads to the keys and values of a batch, whose rows have different lengths.

Keys and values are [N, B, kv_heads, capacity, head_dim]. On a CPU, where a launch costs little, rows with one head each are run
one by one on views; elsewhere all rows run at once on gathered copies under a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike

from hedgespec.device import to_device


@dataclass
class Rows:
    """Rows of a batch and the head that runs on each, on the host and on the device."""

    places: np.ndarray
    """int64 [R]: rows of the batch."""
    heads: np.ndarray | None
    """int64 [R]: the head of each row; None if all heads run on all rows."""
    positions: np.ndarray
    """int64 [R]: position of the next token, which is the number of tokens consumed, those out of the window included."""
    index: torch.Tensor
    """`places` on the device."""
    which: torch.Tensor | None
    """`heads` on the device."""
    ends: np.ndarray | None = None
    """int64 [R]: number of slots that the last position of the current chunk may attend to."""

    @classmethod
    def at(cls, places: ArrayLike, heads: ArrayLike | None, positions: np.ndarray, device: torch.device) -> Rows:
        places, heads = np.asarray(places), None if heads is None else np.asarray(heads)
        which = None if heads is None else to_device(heads, device)
        return cls(places, heads, positions, to_device(places, device), which)

    def some(self, chosen: Sequence[int]) -> Rows:
        """Returns the rows at these indices. They must have one head each."""
        if len(chosen) == len(self.places):
            return self
        assert self.heads is not None
        return Rows.at(self.places[chosen], self.heads[chosen], self.positions[chosen], self.index.device)


def attend_chain(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor,
                 which: torch.Tensor | None, now: Rows | None) -> torch.Tensor:  # fmt: skip
    """Causal attention of chains.

    Args:
        queries: [N, R, A, T, D], or [R, A, T, D] with one head a row.
        keys, values: of all heads and rows.
        rows: int64 [R], rows of the batch.
        slots: int64 [R], slot of each row's first query; a query attends to all slots up to its own.
        which: int64 [R], the head of each row; None for all heads.
        now: where the rows end, if the host knows; None while a CUDA graph is captured.
    Returns: as `queries`.
    """
    count = queries.shape[-2]
    own = slots[:, None] + torch.arange(count, device=slots.device)
    if now is not None:
        ends = now.ends
        assert ends is not None
        if which is not None and (queries.is_cpu or len(ends) == 1):
            assert now.heads is not None
            each = zip(queries, now.heads.tolist(), now.places.tolist(), ends.tolist(), own[..., None])
            return torch.cat([
                attention(
                    query[None], keys[head, row, None, :, :last], values[head, row, None, :, :last],
                    None if count == 1 else torch.arange(last, device=slots.device) <= until,
                )
                for query, head, row, last, until in each
            ])  # fmt: skip
        end = int(ends.max())
        keys, values = keys[:, :, :, :end], values[:, :, :, :end]
    if which is not None:
        keys, values = keys[which, rows], values[which, rows]
    elif len(rows) < keys.shape[1]:
        keys, values = keys[:, rows].flatten(0, 1), values[:, rows].flatten(0, 1)
    else:  # all rows, which come in order
        keys, values = keys.flatten(0, 1), values.flatten(0, 1)
    mask = torch.arange(keys.shape[2], device=slots.device) <= own[:, None, :, None]
    if which is not None:
        return attention(queries, keys, values, mask)
    mask = mask.repeat(len(queries), 1, 1, 1) if len(rows) > 1 else mask
    return attention(queries.flatten(0, 1), keys, values, mask).unflatten(0, queries.shape[:2])


def attend_tree(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, now: Rows, starts: np.ndarray,
                first: torch.Tensor, lines: torch.Tensor) -> torch.Tensor:  # fmt: skip
    """Attention of the nodes of draft trees to the verified tokens of their rows and to their ancestors.

    Args:
        queries: [R * F, A, 1, D].
        keys, values: of all heads and rows.
        now: the rows, with one head each.
        starts: int64 [R], number of verified slots of each row.
        first: `starts` on the device.
        lines: bool [R, F, E + F], the ancestors of each node, itself included, among the root, which is verified, the E - 1
            nodes of earlier levels, and the F new ones.
    Returns: as `queries`.
    """
    rows, count, known = lines.shape
    assert now.heads is not None and now.which is not None
    queries = queries.unflatten(0, (rows, count))[..., 0, :].transpose(1, 2)
    if queries.is_cpu or rows == 1:
        apart = []
        places = now.heads.tolist(), now.places.tolist(), starts.tolist()
        for query, line, head, row, start in zip(queries, lines, *places):
            mask = F.pad(line[:, 1:], (start, 0), value=True)
            own_keys, own_values = (one[head, row, None, :, : start + known - 1] for one in (keys, values))
            apart.append(attention(query[None], own_keys, own_values, mask))
        attended = torch.cat(apart)
    else:
        end = int(starts.max()) + known - 1
        keys, values = (one[now.which, now.index, :, :end] for one in (keys, values))
        place = torch.arange(end, device=queries.device) - first[:, None] + 1
        drafted = lines.gather(2, place.clamp(0, known - 1)[:, None].expand(-1, count, -1))
        mask = torch.where(place[:, None] < 1, True, drafted & (place < known)[:, None])
        attended = attention(queries, keys, values, mask[:, None])
    return attended.transpose(1, 2).flatten(0, 1)[:, :, None]


def attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Scaled dot-product attention in which several query heads share a key-value head."""
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)
