"""Key-value caches that append in place and roll back by bookkeeping: nothing is copied except when a buffer grows."""

from __future__ import annotations

import torch


class KVCache:
    """Keys and values of one attention layer, [1, kv_heads, length, head_dim], in buffers that double when full."""

    def __init__(self, num_heads: int, head_dim: int, *, dtype: torch.dtype, device: torch.device | str, capacity: int = 256):
        self._keys = torch.empty(1, num_heads, capacity, head_dim, dtype=dtype, device=device)
        self._values = torch.empty_like(self._keys)
        self.length = 0

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes T new positions behind the current length and returns views of all, [1, kv_heads, length, head_dim]."""
        end = self.length + keys.shape[2]
        if end > self._keys.shape[2]:
            self._keys, self._values = (self._grown(buffer, end) for buffer in (self._keys, self._values))
        self._keys[:, :, self.length : end] = keys
        self._values[:, :, self.length : end] = values
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]

    def rollback(self, length: int) -> None:
        """Forgets every position from `length` on; what they held is overwritten by the next append."""
        assert 0 <= length <= self.length, (length, self.length)
        self.length = length

    @staticmethod
    def _grown(buffer: torch.Tensor, needed: int) -> torch.Tensor:
        capacity = max(needed, 2 * buffer.shape[2])
        larger = buffer.new_empty(1, buffer.shape[1], capacity, buffer.shape[3])
        larger[:, :, : buffer.shape[2]] = buffer
        return larger


class RowBuffer:
    """Rows [length, width] in a buffer that doubles when full; width, dtype and device are the first rows' own."""

    def __init__(self, capacity: int = 256):
        self._rows: torch.Tensor | None = None
        self._capacity = capacity
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: slice) -> torch.Tensor:
        return self._rows[: self._length][index]

    def append(self, rows: torch.Tensor) -> None:
        end = self._length + rows.shape[0]
        if self._rows is None:
            self._rows = rows.new_empty(max(end, self._capacity), rows.shape[1])
        elif end > self._rows.shape[0]:
            larger = rows.new_empty(max(end, 2 * self._rows.shape[0]), rows.shape[1])
            larger[: self._length] = self._rows[: self._length]
            self._rows = larger
        self._rows[self._length : end] = rows
        self._length = end

    def drop(self, count: int) -> None:
        """Forgets the last `count` rows."""
        assert 0 <= count <= self._length, (count, self._length)
        self._length -= count
