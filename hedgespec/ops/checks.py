"""Checks of arguments that the operations share: each error names the argument, what was expected and what came.

Values are looked at on the CPU only: elsewhere looking would wait for the device.
"""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from hedgespec.device import Kept

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""The dtypes of logits, in the order of how few backends take them: of two, the later decides which backend runs."""
WIDE = (torch.float32, torch.float64)
_FEW = 64


def wrong(name: str, expected: object, got: object, error: type[Exception] = ValueError) -> Exception:
    """The exception to raise."""
    return error(f"{name}: expected {expected}, got {got}")


def check_logits(name: str, logits: Tensor | None, dims: str, ndim: int | None) -> torch.Size:
    """Floating-point logits of `ndim` dimensions (None: at least one) over a vocabulary of at least 1; returns their shape."""
    if not isinstance(logits, Tensor):
        raise wrong(name, "a torch.Tensor", type(logits).__name__, TypeError)
    if logits.dtype not in FLOATING:
        raise wrong(name, _either(FLOATING), logits.dtype, TypeError)
    shape = logits.shape
    if (len(shape) != ndim if ndim is not None else not shape) or shape[-1] == 0:
        raise wrong(name, f"shape {dims} with a vocabulary of at least 1", list(shape))
    return shape


def check_tensor(
    name: str,
    tensor: Tensor | None,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...],
    device: torch.device,
    *,
    like: str = "the target's logits",
) -> None:
    """A tensor of one of `dtypes`, with this shape, on this device, which is that of the argument called `like`."""
    if not isinstance(tensor, Tensor):
        raise wrong(name, "a torch.Tensor", type(tensor).__name__, TypeError)
    if tensor.dtype not in dtypes:
        raise wrong(name, _either(dtypes), tensor.dtype, TypeError)
    if tensor.shape != shape:
        raise wrong(name, f"shape {list(shape)}", list(tensor.shape))
    if tensor.device != device:
        raise wrong(name, f"device {device}, like {like}", tensor.device)


def check_ids(name: str, ids: Tensor, highest: int) -> None:
    """Integers [n] or [m, n] in 0..highest."""
    count = ids.numel()
    if not ids.is_cpu or count == 0:
        return
    if count <= _FEW:  # lists are quicker than reductions
        values = ids.tolist()
        if ids.ndim > 1:
            values = [each for row in values for each in row]
        low, high = min(values), max(values)
    else:
        low, high = (bound.item() for bound in ids.aminmax())
    if low < 0 or high > highest:
        raise wrong(name, f"values in 0..{highest}", low if low < 0 else high)


def check_uniforms(name: str, uniforms: Tensor) -> None:
    """Numbers in [0, 1)."""
    count = uniforms.numel()
    if not uniforms.is_cpu or count == 0:
        return
    # Lists are quicker than reductions. Of many the smallest and the largest will do, and both are NaN if one is.
    values = uniforms.flatten().tolist() if count <= _FEW else [bound.item() for bound in uniforms.aminmax()]
    for value in values:
        if not 0 <= value < 1:  # written so that NaN fails
            raise wrong(name, "values in [0, 1)", value)


def check_temperature(name: str, temperature: float | Tensor, shape: tuple[int, ...], device: torch.device) -> float | Tensor:
    """A finite number >= 0 or a tensor of them; as a number where the rows are seen to share one, for that is quicker."""
    if type(temperature) is float and 0 <= temperature < math.inf:
        return temperature
    if not isinstance(temperature, Tensor):
        if isinstance(temperature, bool) or not isinstance(temperature, Real):
            raise wrong(name, f"a number or a torch.Tensor of shape {list(shape)}", type(temperature).__name__, TypeError)
        if not 0 <= temperature < math.inf:
            raise wrong(name, "a finite number >= 0", temperature)
        return temperature
    check_tensor(name, temperature, FLOATING, shape, device)
    if not temperature.is_cpu or temperature.numel() == 0:
        return temperature
    low, high = (bound.item() for bound in temperature.aminmax())
    if not 0 <= low <= high < math.inf:
        raise wrong(name, "finite values >= 0", high if low >= 0 else low)
    return low if low == high else temperature


_checked_maps = WeakTensorKeyDictionary()


def check_map(
    name: str, ids: Tensor, shape: tuple[int, ...], device: torch.device, vocabulary: int, *, distinct: bool
) -> Tensor:
    """A map [..., Vd] from draft ids to target ids in 0..vocabulary-1, and its contiguous int32 copy for kernels.

    The values of a map are looked at, on any device, when it is first seen and again after torch wrote to it: maps are few
    and long-lived, and sorting N of them each round would cost more than scoring. Inference tensors keep no version, so
    they are checked every time. The copy is complete when this returns, for any stream (`transfer.Kept`).
    """
    check_tensor(name, ids, (torch.int64, torch.int32), shape, device)
    seen = None if ids.is_inference() else (ids._version, vocabulary, distinct)
    if seen is not None:
        known, kept = _checked_maps.get(ids, (None, None))
        if known == seen:
            return kept.get()
    if ids.numel():
        low, high = (bound.item() for bound in ids.aminmax())
        if low < 0 or high >= vocabulary:
            raise wrong(name, f"values in 0..{vocabulary - 1}", low if low < 0 else high)
    if distinct:
        ordered = ids.sort(-1).values
        repeated = ordered[..., 1:][ordered[..., 1:] == ordered[..., :-1]]
        if repeated.numel():
            raise wrong(name, "distinct ids for each drafter", f"{repeated[0].item()} twice")
    narrow = ids.to(torch.int32).contiguous()
    if seen is not None:
        # A map that is narrow already would keep its own entry alive: the value would be the key.
        _checked_maps[ids] = seen, Kept(narrow.clone() if narrow is ids else narrow)
    return narrow


def rarer(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    """Of two dtypes the one that fewer backends take: a backend that takes it takes the commoner beside it."""
    return one if one is other else max(one, other, key=FLOATING.index)


def _either(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(map(str, dtypes))
