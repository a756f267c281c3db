"""Layer operations of N equal-shaped heads at once: one launch for all of them, reading and writing every head's own state.

Each operation has two forms. Without `which` every head works on its own rows, as in prefill and evaluation: x [N, R, ...].
With `which` each of R rows belongs to one head of the N, as in a batch whose requests draft with different heads: x [R, ...].
Values of `which`, slots and rows are looked at on the CPU only. No gradient passes through the kernels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

from hedgespec.ops import backends
from hedgespec.ops.checks import FLOATING, check_ids, check_tensor, wrong
from hedgespec.ops.linear import MOST_ROWS
from hedgespec.ops.self_test import Case, gridded, scattered

# The operations: each checks its arguments, then hands them to a backend.


def stack_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    which: torch.Tensor | None = None,
    *,
    index: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """x @ weight.transpose(1, 2), or with `which` row by row x[r] @ weight[which[r]].T

    With `index` the heads' weights are rows of one table, weight[n] = table[index[n]]: draft vocabularies over one output
    matrix, which is read once for all heads. No kernel copies a weight, as long as it is contiguous.

    Args:
        x: [N, R, inner], floating point; may be expanded. With `which` [R, inner].
        weight: [N, columns, inner], of the same dtype and device. With `index` the table, [U, inner].
        which: int64 [R], in 0..N-1: the head of each row.
        index: int64 [N, columns], in 0..U-1. Quickest on a CPU where each row of it ascends.
        backend: "auto", or a name from `hedgespec.ops.backends.BACKENDS`. "cpu" computes in float32 from float32.

    Returns: [N, R, columns]; with `which` [R, columns].

    Raises:
        TypeError: dtypes that differ or do not fit, or that the backend does not take.
        ValueError: shapes, devices or values that do not fit.
        BackendUnavailableError: a backend asked for by name that cannot run here.
    """
    dtype, device, shape = x.dtype, x.device, weight.shape
    if dtype not in FLOATING:
        raise wrong("x", "a floating-point dtype", dtype, TypeError)
    if weight.dtype is not dtype:
        raise wrong("weight", f"{dtype} as x", weight.dtype, TypeError)
    if weight.device != device:
        raise wrong("weight", f"device {device} as x", weight.device)
    if index is None:
        if len(shape) != 3:
            raise wrong("weight", "[N, columns, inner]", list(shape))
        heads = shape[0]
    else:
        if len(shape) != 2:
            raise wrong("weight", "a table [U, inner] where there is an index", list(shape))
        _check_index(index, shape[0], device)
        heads = index.shape[0]
    _check_rows("x", x, 2, heads, shape[-1], which)
    if backend == "auto" and device.type == "cpu" and _many_rows(x, which, index):
        backend = "reference"
    return backends.resolve("stack_linear", backend, device, dtype)(x, weight, which, index=index)


def stack_rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, which: torch.Tensor | None = None, *, backend: str = "auto"
) -> torch.Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight[:, None], or with `which` row by row * weight[which[r]]; in float32 or wider

    Args:
        x: [N, R, H] or, for all heads the same, [1, R, H]; floating point. With `which` [R, H].
        weight: [N, H], of the same dtype and device.
        eps: what is added to the mean square.
        which: int64 [R], in 0..N-1: the head of each row.
        backend: "auto", or a name from `hedgespec.ops.backends.BACKENDS`.

    Returns: [N, R, H], with `which` [R, H]; x's dtype.

    Raises: as `stack_linear`.
    """
    dtype, device = x.dtype, x.device
    if dtype not in FLOATING:
        raise wrong("x", "a floating-point dtype", dtype, TypeError)
    if weight.dtype is not dtype:
        raise wrong("weight", f"{dtype} as x", weight.dtype, TypeError)
    if weight.device != device:
        raise wrong("weight", f"device {device} as x", weight.device)
    if weight.ndim != 2:
        raise wrong("weight", "[N, H]", list(weight.shape))
    heads, width = weight.shape
    if which is None and x.ndim == 3 and x.shape[0] == 1:
        heads = 1
    _check_rows("x", x, 2, heads, width, which)
    return backends.resolve("stack_rms_norm", backend, device, dtype)(x, weight, eps, which)


def swiglu(gate_up: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """silu(gate_up[..., :I]) * gate_up[..., I:]

    Args:
        gate_up: [..., 2 I], floating point.
        backend: "auto", or a name from `hedgespec.ops.backends.BACKENDS`.

    Returns: [..., I].

    Raises: as `stack_linear`.
    """
    dtype = gate_up.dtype
    if dtype not in FLOATING:
        raise wrong("gate_up", "a floating-point dtype", dtype, TypeError)
    if gate_up.ndim == 0 or gate_up.shape[-1] % 2:
        raise wrong("gate_up", "[..., 2 I]", list(gate_up.shape))
    return backends.resolve("swiglu", backend, gate_up.device, dtype)(gate_up)


def rotary_append(
    qkv: torch.Tensor,
    frequency: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: torch.Tensor,
    which: torch.Tensor | None = None,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """Rotates queries and keys by their positions, writes keys and values into the caches in place, returns the queries.

    keys[n, rows[r], :, slots[r] + t] = rotate(key of token t of row r, positions[r] + t), values likewise unrotated, for
    every head n or, with `which`, for n = which[r]. The rotation is that of halves: low * cos - high * sin and
    high * cos + low * sin for angles position * frequency. Rolling back needs no call: slots are overwritten.

    Args:
        qkv: [N, R, T, (A + 2 KV) D], floating point: A query heads, KV key heads, KV value heads. With `which` [R, T, ...].
        frequency: float32 [D/2].
        positions: int64 [R], at least 0: of the first token of each row.
        slots: int64 [R], in 0..C-T: where its key and value go.
        keys, values: [N, B, KV, C, D] with the same strides, D contiguous; of qkv's dtype and device.
        rows: int64 [R], in 0..B-1, distinct among those of a head; where T = 1 they may repeat at distinct slots.
        which: int64 [R], in 0..N-1: the head of each row.
        backend: "auto", or a name from `hedgespec.ops.backends.BACKENDS`.

    Returns: rotated queries, [N, R, A, T, D]; with `which` [R, A, T, D].

    Raises: as `stack_linear`.
    """
    dtype, device = qkv.dtype, qkv.device
    if dtype not in FLOATING:
        raise wrong("qkv", "a floating-point dtype", dtype, TypeError)
    shape = keys.shape
    if len(shape) != 5:
        raise wrong("keys", "[N, B, KV, C, D]", list(shape))
    heads, batch, kv_heads, capacity, head_dim = shape
    for name, cache in (("keys", keys), ("values", values)):
        check_tensor(name, cache, (dtype,), shape, device, like="qkv")
    strides = keys.stride()
    if strides[4] != 1 and head_dim > 1:
        raise wrong("keys", "a contiguous last dimension", f"strides {strides}")
    if values.stride() != strides:
        raise wrong("values", f"strides {strides} as keys", values.stride())
    _check_rows("qkv", qkv, 3, heads, None, which)
    count, steps, width = qkv.shape[-3:]
    if head_dim % 2 or width % head_dim or width <= 2 * kv_heads * head_dim:
        expected = f"[..., (A + 2 KV) D] with A > 0, KV = {kv_heads} and D = {head_dim}, D even"
        raise wrong("qkv", expected, list(qkv.shape))
    check_tensor("frequency", frequency, (torch.float32,), (head_dim // 2,), device, like="qkv")
    for name, ids in (("positions", positions), ("slots", slots), ("rows", rows)):
        check_tensor(name, ids, (torch.int64,), (count,), device, like="qkv")
    if device.type == "cpu":
        check_ids("slots", slots, capacity - steps)
        check_ids("rows", rows, batch - 1)
        if count > 1:
            of_heads = itertools.repeat(0) if which is None else which.tolist()
            places = list(zip(of_heads, rows.tolist(), slots.tolist() if steps == 1 else itertools.repeat(0)))
            if len(set(places)) < count:
                raise wrong("rows", "distinct rows" + (" or slots" if steps == 1 else ""), places)
    rotate = backends.resolve("rotary_append", backend, device, dtype)
    return rotate(qkv, frequency, positions, slots, keys, values, rows, which)


def _check_rows(name: str, x: torch.Tensor, dims: int, heads: int, width: int | None, which: torch.Tensor | None) -> None:
    """`x` has `dims` dimensions, the last `width` wide, after one for the heads unless `which` says each row's."""
    shape = x.shape
    if which is None:
        if len(shape) != dims + 1 or shape[0] != heads or width not in (None, shape[-1]):
            raise wrong(name, f"[{heads}, {'R' if dims == 2 else 'R, T'}, {width or 'width'}]", list(shape))
        return
    if len(shape) != dims or width not in (None, shape[-1]):
        raise wrong(name, f"[{'R' if dims == 2 else 'R, T'}, {width or 'width'}] where there is `which`", list(shape))
    check_tensor("which", which, (torch.int64,), shape[:1], x.device, like=name)
    check_ids("which", which, heads - 1)


_checked_indices = WeakTensorKeyDictionary()


def _check_index(index: torch.Tensor, rows: int, device: torch.device) -> None:
    """An index [N, columns] into a table of `rows` rows. Its values are looked at on the CPU, once and after torch wrote to
    it: an index is long-lived. Inference tensors keep no version, so they are checked every time."""
    if index.dtype is not torch.int64:
        raise wrong("index", torch.int64, index.dtype, TypeError)
    if index.ndim != 2:
        raise wrong("index", "[N, columns]", list(index.shape))
    if index.device != device:
        raise wrong("index", f"device {device}", index.device)
    seen = None if index.is_inference() else (index._version, rows)
    if seen is None or _checked_indices.get(index) != seen:
        check_ids("index", index, rows - 1)
        if seen is not None:
            _checked_indices[index] = seen


def _many_rows(x: torch.Tensor, which: torch.Tensor | None, index: torch.Tensor | None) -> bool:
    """Whether some head has more rows than the CPU kernel is quick for, where torch's general product is at home.

    With an index it is not: it would multiply with the whole table, for every head.
    """
    if index is not None or x.shape[-2] <= MOST_ROWS:
        return False
    return which is None or torch.bincount(which).max().item() > MOST_ROWS


# The references.


def stack_linear_reference(
    x: torch.Tensor, weight: torch.Tensor, which: torch.Tensor | None = None, *, index: torch.Tensor | None = None
) -> torch.Tensor:
    """`stack_linear` in plain torch, in x's dtype."""
    if index is not None:
        columns = index[:, None] if which is None else index[which]
        every = functional.linear(x, weight)
        return every.gather(-1, columns.expand(*every.shape[:-1], -1))
    if which is None:
        return torch.bmm(x, weight.transpose(1, 2))
    if x.device.type != "cpu":
        # Looking at `which` would wait for the device: the one place where weights are copied, for want of a kernel.
        return torch.bmm(weight[which], x[:, :, None])[:, :, 0]
    out = x.new_empty(x.shape[0], weight.shape[1])
    for head in set(which.tolist()):
        own = which == head
        out[own] = functional.linear(x[own], weight[head])
    return out


def stack_rms_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float, which: torch.Tensor | None = None
) -> torch.Tensor:
    """`stack_rms_norm` in plain torch, in float32, or in float64 for float64."""
    wide = x if x.dtype is torch.float64 else x.float()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normal * (weight[:, None] if which is None else weight[which])).to(x.dtype)


def swiglu_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """`swiglu` in plain torch, in its argument's dtype."""
    gate, up = gate_up.chunk(2, -1)
    return functional.silu(gate) * up


def rotary_append_reference(
    qkv: torch.Tensor,
    frequency: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: torch.Tensor,
    which: torch.Tensor | None = None,
) -> torch.Tensor:
    """`rotary_append` in plain torch: angles in float32 whatever the dtype, as heads are trained, the rest in qkv's dtype."""
    kv_heads, head_dim = keys.shape[2], keys.shape[4]
    states = qkv.unflatten(-1, (-1, head_dim))  # [..., R, T, A + 2 KV, D]
    steps = torch.arange(qkv.shape[-2], device=qkv.device)
    angle = (positions[:, None] + steps)[..., None, None] * frequency
    cos, sin = angle.cos().to(qkv.dtype), angle.sin().to(qkv.dtype)
    low, high = states[..., :-kv_heads, :].chunk(2, -1)
    rotated = torch.cat([low * cos - high * sin, high * cos + low * sin], -1)
    at = slots[:, None] + steps
    for cache, new in ((keys, rotated[..., -kv_heads:, :]), (values, states[..., -kv_heads:, :])):
        if which is None:
            cache[:, rows[:, None], :, at] = new.movedim(0, 2)  # indexed dimensions come first
        else:
            cache[which[:, None], rows[:, None], :, at] = new
    return rotated[..., :-kv_heads, :].transpose(-3, -2)


# The self-tests.


def _stack_linear_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Small products whose every sum is exact in float32. In half types the vendor's library may round partial sums."""
    tolerance = 0.0 if dtype is torch.float32 else 0.25
    which = torch.tensor([2, 0, 2, 1, 0])
    index = torch.tensor([[0, 4, 9, 30], [1, 2, 3, 4], [30, 8, 8, 0]])
    for rows, columns, inner in ((1, 1, 1), (3, 17, 37), (5, 70, 129)):
        weight, x = gridded(3, columns, inner, seed=1).to(dtype), gridded(3, rows, inner, seed=2).to(dtype)
        yield Case(f"{rows} rows a head, {columns} columns of {inner}", (x, weight), tolerance=tolerance)
        own = gridded(5, inner).to(dtype)
        yield Case(f"rows of heads, {columns} columns of {inner}", (own, weight, which), tolerance=tolerance)
    table, x = gridded(31, 40, seed=3).to(dtype), gridded(3, 5, 40, seed=4).to(dtype)
    yield Case("rows of a table", (x, table), {"index": index}, tolerance)
    yield Case("rows of heads and of a table", (x[0], table, which), {"index": index}, tolerance)


def _stack_rms_norm_cases(dtype: torch.dtype) -> Iterator[Case]:
    which = torch.tensor([2, 0, 2, 1, 0])
    for width in (1, 33, 4100):  # the last is wider than a block
        x, weight = scattered(3, 5 if width < 99 else 2, width, seed=1).to(dtype), (1 + scattered(3, width, seed=2)).to(dtype)
        yield Case(f"every head, {width} wide", (x, weight, 1e-5), tolerance=1e-4)
        yield Case(f"rows shared, {width} wide", (x[:1], weight, 1e-5), tolerance=1e-4)
        yield Case(f"rows of heads, {width} wide", (x[0], weight, 1e-6, which[: x.shape[1]]), tolerance=1e-4)
    yield Case("zeros and large values", (torch.stack([x[0] * 0, x[1] * 1000]), weight[:2], 1e-6), tolerance=1e-3)


def _swiglu_cases(dtype: torch.dtype) -> Iterator[Case]:
    for shape in ((2, 3, 2), (5, 2 * 33), (3, 2 * 1025)):
        yield Case(f"shape {list(shape)}", (3 * scattered(*shape).to(dtype),), tolerance=1e-4)
    yield Case("large values", (torch.tensor([[-3e4, -90.0, 90.0, 200.0, 1.5, 1.5, 1.5, 2.0]]).to(dtype),), tolerance=1e-2)


def _rotary_append_cases(dtype: torch.dtype) -> Iterator[Case]:
    heads, batch, kv_heads, capacity, head_dim, attention_heads = 2, 3, 2, 8, 6, 4
    frequency = torch.tensor([1.0, 0.1, 0.01])
    keys, values = (gridded(heads, batch, kv_heads, capacity, head_dim, seed=seed).to(dtype) for seed in (1, 2))
    width = (attention_heads + 2 * kv_heads) * head_dim
    every = gridded(heads, 2, 3, width, seed=3).to(dtype)
    positions, slots, rows = torch.tensor([0, 700]), torch.tensor([5, 0]), torch.tensor([2, 0])
    yield Case("every head", (every, frequency, positions, slots, keys, values, rows), tolerance=2e-3)
    one = gridded(3, 1, width, seed=4).to(dtype)
    positions, slots, rows, which = (torch.tensor(each) for each in ([3, 4, 99], [1, 2, 7], [1, 1, 1], [1, 1, 0]))
    yield Case("rows of heads", (one, frequency, positions, slots, keys, values, rows, which), tolerance=2e-3)


for _reference, _cases in (
    (stack_linear_reference, _stack_linear_cases),
    (stack_rms_norm_reference, _stack_rms_norm_cases),
    (swiglu_reference, _swiglu_cases),
    (rotary_append_reference, _rotary_append_cases),
):
    _operation = _reference.__name__.removesuffix("_reference")
    backends.register_kernels(_operation, _reference, stem="head_layers", cpu_dtypes=(torch.float32,), cuda=False)
    backends.register_cases(_operation, _cases)
