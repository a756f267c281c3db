"""Key-value caches that append in place and roll back by bookkeeping: nothing is copied except when a buffer grows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from hedgespec.device import to_device

States = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of a layer, [B, heads, T, head_dim] each."""


class KVCache:
    """Keys and values of one attention layer, [1, kv_heads, length, head_dim], in buffers that double when full."""

    def __init__(self, num_heads: int, head_dim: int, *, dtype: torch.dtype, device: torch.device | str, capacity: int = 256):
        self._keys = torch.empty(1, num_heads, capacity, head_dim, dtype=dtype, device=device)
        self._values = torch.empty_like(self._keys)
        self.length = 0

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes T new positions behind the current length and returns views of all, [1, kv_heads, length, head_dim]."""
        end = self.length + keys.shape[2]
        if end > (capacity := self._keys.shape[2]):
            capacity = max(end, 2 * capacity)
            self._keys, self._values = grown(self._keys, 2, capacity), grown(self._values, 2, capacity)
        self._keys[:, :, self.length : end] = keys
        self._values[:, :, self.length : end] = values
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]

    def rollback(self, length: int) -> None:
        """Forgets every position from `length` on; what they held is overwritten by the next append."""
        assert 0 <= length <= self.length, (length, self.length)
        self.length = length


class RowBuffer:
    """Rows [length, width] in a buffer that doubles when full; width, dtype and device are the first rows' own."""

    def __init__(self, capacity: int = 256):
        self._rows: torch.Tensor | None = None
        self._capacity = capacity
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: slice) -> torch.Tensor:
        assert self._rows is not None, "nothing was appended yet"
        return self._rows[: self._length][index]

    def append(self, rows: torch.Tensor) -> None:
        end = self._length + rows.shape[0]
        if self._rows is None:
            self._rows = rows.new_empty(max(end, self._capacity), rows.shape[1])
        elif end > self._rows.shape[0]:
            self._rows = grown(self._rows, 0, max(end, 2 * self._rows.shape[0]))
        self._rows[self._length : end] = rows
        self._length = end


class RaggedCache(Cache):
    """A target's keys and values for B rows of different lengths: the token at position t of a row lies in slot t.

    Every forward writes T slots behind each row's own length, and `lengths` moves on by what is kept of them: rolling back
    is bookkeeping, and what was dropped is overwritten. A slot at or past a row's length is finite, and has to be masked.

    Args:
        batch: B, rows.
    """

    def __init__(self, batch: int):
        self.lengths = [0] * batch
        self.written = 0
        """Slots that the last forward wrote in every row."""
        self.fixed: torch.Tensor | None = None
        """Slots int64 [B, T] that a forward of fixed shapes writes; it reads the whole buffers, and no number of the host's."""
        self._slots: tuple[tuple, torch.Tensor] | None = None
        super().__init__(layers=[])

    @property
    def capacity(self) -> int:
        """C: slots of a row, a power of two from 256 on; 0 before the first token."""
        return self.layers[0].keys.shape[2] if self.layers else 0

    def make_room(self, count: int) -> None:
        """Sees to `count` slots behind every row."""
        for layer in self.layers:
            layer.make_room(layer.keys, layer.values, max(self.lengths) + count)

    def slots(self, count: int, device: torch.device) -> torch.Tensor:
        """The next `count` slots of every row, int64 [B, count]: the positions of the tokens that will be written there.

        Asked for by every layer of a forward, and put on a device once.
        """
        key = (count, device, *self.lengths)
        if self._slots is None or self._slots[0] != key:
            slots = to_device(self.lengths, device)[:, None] + torch.arange(count, device=device)
            self._slots = key, slots
        return self._slots[1]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> States:
        while len(self.layers) <= layer_idx:
            self.layers.append(_RaggedLayer(self))
        self.written = key_states.shape[2]
        return self.layers[layer_idx].update(key_states, value_states)

    def gather(self, paths: Sequence[Sequence[int]]) -> None:
        """Moves what the last forward wrote so that of each row its tokens at these places, ascending, stand first."""
        longest = max(map(len, paths))
        if all(list(path) == list(range(len(path))) for path in paths):
            return
        places = [[*path, *range(len(path), longest)] for path in paths]  # whatever fills up is forgotten
        for device in {layer.keys.device for layer in self.layers}:
            first = to_device(self.lengths, device)[:, None]
            sources, targets = first + to_device(places, device), first + torch.arange(longest, device=device)
            rows = torch.arange(len(paths), device=device)[:, None]
            for layer in self.layers:
                if layer.keys.device == device:
                    for states in (layer.keys, layer.values):
                        states[rows, :, targets] = states[rows, :, sources]

    def select(self, rows: Sequence[int]) -> None:
        """Keeps these rows, in this order."""
        self.lengths[:] = [self.lengths[row] for row in rows]
        for layer in self.layers:
            index = to_device(rows, layer.keys.device)
            layer.keys, layer.values = layer.keys.index_select(0, index), layer.values.index_select(0, index)

    def row(self, row: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Copies of one row's keys and values by layer, [heads, length, head_dim]."""
        length = self.lengths[row]
        return [(layer.keys[row, :, :length].clone(), layer.values[row, :, :length].clone()) for layer in self.layers]

    def load(self, past: DynamicCache, rows: Sequence[int], padding: Sequence[int], lengths: Sequence[int]) -> None:
        """Copies in what a cache holds of some of its rows: `lengths` tokens of each, from slot `padding` on."""
        self.layers = [_RaggedLayer(self) for _ in past.layers]
        for layer, source in zip(self.layers, past.layers):
            gone = source.get_seq_length() - source.keys.shape[2]  # a sliding window forgets: no query will look there
            for place, (row, first, count) in enumerate(zip(rows, padding, lengths, strict=True)):
                start = max(gone, first)
                held = slice(start - gone, first + count - gone)
                layer.put(place, start - first, source.keys[row, :, held], source.values[row, :, held])
        self.lengths[:] = lengths


class _RaggedLayer(DynamicLayer):
    """One layer of a `RaggedCache`, whatever the layer's window: the mask knows it, and every token may still be needed."""

    is_initialized: bool

    def __init__(self, cache: RaggedCache):
        super().__init__()
        self.cache = cache

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object) -> States:
        lengths, count = self.cache.lengths, key_states.shape[2]
        if self.cache.fixed is not None:
            self._write(self.cache.fixed.to(self.keys.device), key_states, value_states)
            return self.keys, self.values
        first, end = min(lengths), max(lengths) + count
        self.make_room(key_states, value_states, end)
        if end - first == count:  # all rows are at one position
            self.keys[:, :, first:end], self.values[:, :, first:end] = key_states, value_states
        else:
            self._write(self.cache.slots(count, key_states.device), key_states, value_states)
        return self.keys[:, :, :end], self.values[:, :, :end]

    def _write(self, slots: torch.Tensor, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        rows = torch.arange(len(slots), device=slots.device)[:, None]
        self.keys[rows, :, slots], self.values[rows, :, slots] = key_states.transpose(1, 2), value_states.transpose(1, 2)

    def put(self, row: int, slot: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Writes slots of one row from `slot` on, [heads, T, head_dim]."""
        end = slot + keys.shape[1]
        self.make_room(keys[None], values[None], end)
        self.keys[row, :, slot:end], self.values[row, :, slot:end] = keys, values

    def get_seq_length(self) -> int:
        return max(self.cache.lengths)

    def make_room(self, key_states: torch.Tensor, value_states: torch.Tensor, end: int) -> None:
        if not self.is_initialized:
            self.keys, self.values = (
                states.new_empty(len(self.cache.lengths), states.shape[1], 0, states.shape[3])
                for states in (key_states, value_states)
            )
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        if end > self.keys.shape[2]:
            capacity = capacity_for(end)
            self.keys, self.values = grown(self.keys, 2, capacity), grown(self.values, 2, capacity)


class RowCache(Cache):
    """Keys and values of many requests, each in a row of its own, of which every forward takes some.

    As in `RaggedCache` the token at position t of a row lies in slot t, and rolling back is bookkeeping; here the rows' lengths
    are the caller's. Nothing is copied where a forward takes neighbouring rows in their order.
    """

    def __init__(self) -> None:
        self.rows = self.capacity = 0
        """How many rows there are, and slots of each."""
        self._taken: slice | torch.Tensor = slice(0, 0)
        self._slots: slice | torch.Tensor = slice(0, 0)
        self._end = self._length = 0
        super().__init__(layers=[])

    def take(self, rows: Sequence[int], lengths: Sequence[int], slots: torch.Tensor, end: int) -> None:
        """Says what the next forward is about.

        Args:
            rows: B of them, ascending.
            lengths: tokens of each row that it looks back on.
            slots: where the T tokens that it reads of each row go, int64 [B, T]; what fills up a shorter row may share one.
            end: slots that it looks at; those of its tokens at or past `end` have to fit into the capacity all the same.
        """
        neighbours = rows[-1] - rows[0] == len(rows) - 1
        self._taken = slice(rows[0], rows[-1] + 1) if neighbours else to_device(rows, slots.device)
        self._length = max(lengths)
        alike = neighbours and self._length == min(lengths)  # then the slots are neighbours too
        self._slots = slice(self._length, self._length + slots.shape[1]) if alike else slots
        self._end = end

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> States:
        while len(self.layers) <= layer_idx:
            self.layers.append(_RowLayer(self))
        return self.layers[layer_idx].update(key_states, value_states)

    def rebuild(self, kept: Sequence[int], rows: int, capacity: int) -> None:
        """Makes place for `rows` of `capacity` slots. The first of them are those of `kept`, in this order, short of what does
        not fit; the others are free."""
        if not rows:
            self.layers.clear()
        for layer in self.layers:
            layer.keys, layer.values = (_moved(states, kept, rows, capacity) for states in (layer.keys, layer.values))
        self.rows, self.capacity = rows, capacity


class _RowLayer(DynamicLayer):
    """One layer of a `RowCache`."""

    is_initialized: bool

    def __init__(self, cache: RowCache):
        super().__init__()
        self.cache = cache

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object) -> States:
        cache = self.cache
        if not self.is_initialized:
            self.keys, self.values = (
                states.new_zeros(cache.rows, states.shape[1], cache.capacity, states.shape[3])
                for states in (key_states, value_states)
            )
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        return self._put(self.keys, key_states), self._put(self.values, value_states)

    def _put(self, held: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Writes the forward's tokens [B, heads, T, head_dim], and what it looks at, [B, heads, end, head_dim]."""
        cache = self.cache
        rows, slots = cache._taken, cache._slots
        if isinstance(slots, slice):
            held[rows, :, slots] = states
        else:
            slots = slots.to(held.device)
            numbers = torch.arange(cache.rows, device=held.device)[rows] if isinstance(rows, slice) else rows.to(held.device)
            held[numbers[:, None], :, slots] = states.transpose(1, 2)
        seen = held[:, :, : cache._end]
        return seen[rows] if isinstance(rows, slice) else seen.index_select(0, rows.to(held.device))

    def get_seq_length(self) -> int:
        return self.cache._length


def _moved(states: torch.Tensor, kept: Sequence[int], rows: int, capacity: int) -> torch.Tensor:
    """The rows `kept` as the first of `rows`, of `capacity` slots each; zeros where there is nothing to keep, as in `grown`."""
    fresh = states.new_zeros(rows, states.shape[1], capacity, states.shape[3])
    held = min(capacity, states.shape[2])
    fresh[: len(kept), :, :held] = states[:, :, :held].index_select(0, to_device(kept, states.device).long())
    return fresh


def capacity_for(end: int) -> int:
    """Slots of a buffer that has to hold `end`: few sizes, since what is captured is captured for each."""
    return max(256, 1 << (end - 1).bit_length())


def grown(buffer: torch.Tensor, dim: int, capacity: int) -> torch.Tensor:
    """The buffer with room for `capacity` along `dim`.

    Zeros, since a masked slot has weight 0, and 0 times what memory happens to hold need not be 0.
    """
    shape = list(buffer.shape)
    shape[dim] = capacity
    larger = buffer.new_zeros(shape)
    larger.narrow(dim, 0, buffer.shape[dim]).copy_(buffer)
    return larger
