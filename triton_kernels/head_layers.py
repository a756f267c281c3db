"""The layer operations of stacked heads in Triton: products whose rows choose their head, norms, SwiGLU, rotation and caches.

Where every head has rows of its own the products are the vendor's batched one: it reads each weight once and needs no help.
Ids that nobody has looked at on a GPU are brought into their range, and what would be written outside a cache is not written.
Nothing here waits for the device or depends on values in its shapes, so every launcher may be captured in a CUDA graph.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from hedgespec.triton_kernels import _common
from hedgespec.triton_kernels._common import Config
from torch.nn import functional

HALF_PI = tl.constexpr(math.pi / 2)


@triton.jit
def _head_of(which, row, present, heads):
    return tl.minimum(tl.maximum(tl.load(which + row, mask=present, other=0), 0), heads - 1)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["which", "index"])
def stack_linear_kernel(
    x,  # [R, inner]
    weight,  # [N, columns, inner], or the table [U, inner]
    which,  # [R]
    index,  # [N, columns], or None
    out,  # [R, columns]
    heads,
    rows,
    columns,
    inner,
    table_rows,
    x_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """COLUMNS columns of one head for all of its rows.

    The program of the first row of each head does the work of the others. It reads its weights from memory for the first and,
    a few tens of kilobytes, from the first-level cache for the next: with few rows that costs less than sorting them would.
    Rows follow each other in the grid, so that programs that run together are at one place of the table, whatever the head.
    """
    program = tl.program_id(0).to(tl.int64)
    first = program % rows
    head = _head_of(which, first, True, heads)
    lanes = tl.arange(0, ROWS)
    same = (lanes < first) & (_head_of(which, lanes, lanes < first, heads) == head)
    if tl.max(same.to(tl.int32), 0) == 0:
        ids = program // rows * COLUMNS + tl.arange(0, COLUMNS)
        inside = ids < columns
        at = head * columns + ids
        if index is not None:
            at = tl.minimum(tl.maximum(tl.load(index + at, mask=inside, other=0), 0), table_rows - 1)
        at = tl.where(inside, at, 0)
        places = tl.arange(0, INNER)
        for row in tl.range(first, rows):
            if _head_of(which, row, True, heads) == head:
                sums = tl.zeros([COLUMNS, INNER], tl.float32)
                for start in tl.range(0, inner, INNER):
                    k = start + places
                    present = k < inner
                    values = tl.load(x + row * x_stride + k, mask=present, other=0.0).to(tl.float32)
                    mask = inside[:, None] & present[None, :]
                    weights = tl.load(weight + at[:, None] * inner + k[None, :], mask=mask, other=0.0).to(tl.float32)
                    sums += weights * values[None, :]
                tl.store(out + row * columns + ids, tl.sum(sums, 1), mask=inside)


@triton.jit(do_not_specialize=["eps", "rows"], do_not_specialize_on_alignment=["which"])
def stack_rms_norm_kernel(
    x, weight, which, out, eps, heads, rows, width, stride_head, stride_row, BLOCK: tl.constexpr
):  # fmt: skip
    """One row; read twice where it is longer than a block, the second time from the cache."""
    program = tl.program_id(0).to(tl.int64)
    if which is None:
        head = program // rows
        x += head * stride_head + program % rows * stride_row
    else:
        head = _head_of(which, program, True, heads)
        x += program * stride_row
    lanes = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, width, BLOCK):
        values = tl.load(x + start + lanes, mask=start + lanes < width, other=0.0).to(tl.float32)
        squares += values * values
    scale = 1.0 / tl.sqrt_rn(tl.sum(squares, 0) / width + eps)
    for start in tl.range(0, width, BLOCK):
        ids = start + lanes
        values = tl.load(x + ids, mask=ids < width, other=0.0).to(tl.float32)
        weights = tl.load(weight + head * width + ids, mask=ids < width, other=0.0).to(tl.float32)
        tl.store(out + program * width + ids, values * scale * weights, mask=ids < width)


@triton.jit
def swiglu_kernel(gate_up, out, blocks, width, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    ids = program % blocks * BLOCK + tl.arange(0, BLOCK)
    gate_up += row * 2 * width + ids
    gate = tl.load(gate_up, mask=ids < width, other=0.0).to(tl.float32)
    up = tl.load(gate_up + width, mask=ids < width, other=0.0).to(tl.float32)
    tl.store(out + row * width + ids, gate / (1.0 + tl.exp(-gate)) * up, mask=ids < width)


@triton.jit
def _cosine_sine(angle):
    """Both, in float32, of any angle below 2^31.

    The library's would keep an array in local memory for large angles. Here the quarter turns are taken off in float64, and
    Taylor's series is exact to float32 in what remains, -pi/4 .. pi/4.
    """
    wide = angle.to(tl.float64)
    turns = tl.floor(wide / HALF_PI + 0.5)
    rest = (wide - turns * HALF_PI).to(tl.float32)
    square = rest * rest
    sine = square * (1 / 362880) - (1 / 5040)
    sine = sine * square + (1 / 120)
    sine = sine * square - (1 / 6)
    sine = sine * square * rest + rest
    cosine = square * (-1 / 3628800) + (1 / 40320)
    cosine = cosine * square - (1 / 720)
    cosine = cosine * square + (1 / 24)
    cosine = cosine * square - 0.5
    cosine = cosine * square + 1.0
    quarter = turns.to(tl.int64) & 3
    odd = (quarter & 1) == 1
    first, second = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    return (
        tl.where((quarter == 1) | (quarter == 2), -first, first),
        tl.where(quarter >= 2, -second, second),
    )


@triton.jit(
    do_not_specialize=["rows", "steps", "batch", "capacity"],
    do_not_specialize_on_alignment=["frequency", "positions", "slots", "batch_rows", "which"],
)
def rotary_append_kernel(
    qkv,  # [N, R, T, A + 2 KV, D], or with `which` [R, T, ...]
    frequency,  # [D/2]
    positions,  # [R], and the next three
    slots,
    batch_rows,
    which,
    keys,  # [N, B, KV, C, D]
    values,
    queries,  # [N, R, A, T, D], or with `which` [R, A, T, D]
    heads,
    rows,
    steps,
    batch,
    capacity,
    attention_heads,
    kv_heads,
    half,
    stride_head,
    stride_batch,
    stride_kv_head,
    stride_slot,
    PARTS: tl.constexpr,
    HALF: tl.constexpr,
):
    """PARTS of a token's attention heads: queries, keys and values in this order."""
    every = attention_heads + 2 * kv_heads
    blocks = tl.cdiv(every, PARTS)
    program = tl.program_id(0).to(tl.int64)
    token = program // blocks  # of all heads
    part = program % blocks * PARTS + tl.arange(0, PARTS)
    step = token % steps
    group = token // steps  # a row of a head
    row = group % rows
    head = group // rows
    if which is not None:
        head = tl.load(which + row)
    slot = tl.load(slots + row) + step
    batch_row = tl.load(batch_rows + row)
    fits = (head >= 0) & (head < heads) & (slot >= 0) & (slot < capacity) & (batch_row >= 0) & (batch_row < batch)

    lanes = tl.arange(0, HALF)
    known = lanes < half
    steady = tl.load(frequency + lanes, mask=known, other=0.0)
    cosine, sine = _cosine_sine((tl.load(positions + row) + step).to(tl.float32) * steady)
    at = qkv + (token * every + part[:, None]) * (2 * half) + lanes[None, :]
    mask = (part < every)[:, None] & known[None, :]
    low = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(at + half, mask=mask, other=0.0).to(tl.float32)
    rotated_low = low * cosine[None, :] - high * sine[None, :]
    rotated_high = high * cosine[None, :] + low * sine[None, :]

    at = queries + ((group * attention_heads + part[:, None]) * steps + step) * (2 * half) + lanes[None, :]
    mask = (part < attention_heads)[:, None] & known[None, :]
    tl.store(at, rotated_low, mask=mask)
    tl.store(at + half, rotated_high, mask=mask)
    place = head * stride_head + batch_row * stride_batch + slot * stride_slot
    kv_head = part - attention_heads
    at = keys + place + kv_head[:, None] * stride_kv_head + lanes[None, :]
    mask = ((kv_head >= 0) & (kv_head < kv_heads) & fits)[:, None] & known[None, :]
    tl.store(at, rotated_low, mask=mask)
    tl.store(at + half, rotated_high, mask=mask)
    kv_head -= kv_heads
    at = values + place + kv_head[:, None] * stride_kv_head + lanes[None, :]
    mask = ((kv_head >= 0) & (kv_head < kv_heads) & fits)[:, None] & known[None, :]
    tl.store(at, low, mask=mask)
    tl.store(at + half, high, mask=mask)


def stack_linear_triton(
    x: torch.Tensor, weight: torch.Tensor, which: torch.Tensor | None = None, *, index: torch.Tensor | None = None
) -> torch.Tensor:
    """`stack_linear`, with float32 sums. Arguments are taken as checked."""
    if which is None:
        if index is None:
            return torch.bmm(x, weight.transpose(1, 2))
        # The whole table for the rows of all heads: it is read once, and the columns nobody wants cost little beside that.
        every = functional.linear(x, weight)
        return every.gather(2, index.unsqueeze(1).expand(-1, every.shape[1], -1))
    x, weight, which = x if x.stride(1) == 1 else x.contiguous(), weight.contiguous(), which.contiguous()
    index = None if index is None else index.contiguous()
    heads, columns = (weight if index is None else index).shape[:2]
    rows, inner = x.shape
    out = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    if out.numel():
        block = 8
        launch = _common.launcher(stack_linear_kernel, -(-columns // block) * rows, Config(block, 4), x.device)
        launch(
            x, weight, which, index, out, heads, rows, columns, inner, weight.shape[0], x.stride(0),
            ROWS=_common.position_bucket(rows), COLUMNS=block, INNER=min(512, _common.power_of_two(inner)),
        )  # fmt: skip
    return out


def stack_rms_norm_triton(x: torch.Tensor, weight: torch.Tensor, eps: float, which: torch.Tensor | None = None) -> torch.Tensor:
    """`stack_rms_norm`, in float32. Arguments are taken as checked."""
    x, weight = x if x.stride(-1) == 1 else x.contiguous(), weight.contiguous()
    heads, width = weight.shape
    rows = x.shape[-2]
    shape = (heads, rows, width) if which is None else (rows, width)
    out = torch.empty(shape, dtype=x.dtype, device=x.device)
    if out.numel():
        stride_head = 0 if which is not None or x.shape[0] == 1 else x.stride(0)
        block = min(4096, _common.power_of_two(width))
        launch = _common.launcher(stack_rms_norm_kernel, out.numel() // width, Config(block, 8), x.device)
        launch(
            x, weight, None if which is None else which.contiguous(), out, eps, heads, rows, width, stride_head, x.stride(-2),
            BLOCK=block,
        )  # fmt: skip
    return out


def swiglu_triton(gate_up: torch.Tensor) -> torch.Tensor:
    """`swiglu`, in float32. Arguments are taken as checked."""
    gate_up = gate_up.contiguous()
    width = gate_up.shape[-1] // 2
    out = torch.empty((*gate_up.shape[:-1], width), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        block = min(1024, _common.power_of_two(width))
        blocks = -(-width // block)
        launch = _common.launcher(swiglu_kernel, out.numel() // width * blocks, Config(block, 4), gate_up.device)
        launch(gate_up, out, blocks, width, BLOCK=block)
    return out


def rotary_append_triton(
    qkv: torch.Tensor,
    frequency: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: torch.Tensor,
    which: torch.Tensor | None = None,
) -> torch.Tensor:
    """`rotary_append`, in float32. Arguments are taken as checked."""
    heads, batch, kv_heads, capacity, head_dim = keys.shape
    *leading, steps, width = qkv.shape
    attention_heads, half = width // head_dim - 2 * kv_heads, head_dim // 2
    queries = torch.empty((*leading, attention_heads, steps, head_dim), dtype=qkv.dtype, device=qkv.device)
    if queries.numel():
        parts = 8
        blocks = -(-(attention_heads + 2 * kv_heads) // parts)
        launch = _common.launcher(rotary_append_kernel, math.prod(leading) * steps * blocks, Config(parts, 4), qkv.device)
        launch(
            qkv.contiguous(), frequency.contiguous(), positions.contiguous(), slots.contiguous(), rows.contiguous(),
            None if which is None else which.contiguous(), keys, values, queries, heads, leading[-1], steps, batch, capacity,
            attention_heads, kv_heads, half, *keys.stride()[:4], PARTS=parts, HALF=_common.power_of_two(half),
        )  # fmt: skip
    return queries
