"""Linear layers for the few rows of a round: the operation, and a view of a model that uses it.

A chain of K drafts sends K + 1 rows through every weight matrix of the target, and an evaluation as few through those of
every drafter. General matrix products are made for many rows; on a CPU they take twice the time of reading the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn import functional

from hedgespec.ops import backends
from hedgespec.ops.self_test import Case, gridded

MOST_ROWS = 24
"""Rows up to which the CPU kernel pays: a round of four requests with five drafts each. Beyond, the vendor's library is at home
(measured on AVX2; at 24 rows it takes from 0.9 to 2.2 times the kernel's time, by shape, and 1.4 over a forward)."""


def linear(x: torch.Tensor, weight: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """x @ weight.T

    Args:
        x: [..., inner], floating point.
        weight: [columns, inner], of the same dtype and device.
        backend: "auto", or a name from `hedgespec.ops.backends.BACKENDS`. "cpu" computes in float32 from float32 and needs a
            contiguous weight; no gradient passes through it.

    Returns: [..., columns].

    Raises:
        TypeError: dtypes that differ, or that the backend does not take.
        ValueError: shapes or devices that do not fit.
        BackendUnavailableError: a backend asked for by name that cannot run here.
    """
    if x.dtype != weight.dtype:
        raise TypeError(f"x: expected {weight.dtype} as weight, got {x.dtype}")
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x: expected [..., inner] for a weight [columns, inner], got {list(x.shape)} and {list(weight.shape)}"
        )
    if x.device != weight.device:
        raise ValueError(f"x: expected device {weight.device} as weight, got {x.device}")
    return backends.resolve("linear", backend, x.device, x.dtype)(x, weight)


def _linear_cpu(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`linear` by csrc/linear_cpu.cpp. Arguments are taken as checked."""
    from hedgespec import _native

    columns, inner = weight.shape
    rows = x.reshape(-1, inner)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    weight = weight.contiguous()
    out = x.new_empty(*x.shape[:-1], columns)
    shape, strides = (1, rows.shape[0], columns, inner), (0, rows.stride(0))
    _native.linear(shape, rows.data_ptr(), strides, 0, weight.data_ptr(), 0, 0, out.data_ptr(), torch.get_num_threads())
    return out


# What tracers and fake tensors see of it: a launcher that takes addresses is invisible to them. A call by this name costs a
# few microseconds more.
_LIBRARY = torch.library.Library("hedgespec", "DEF")
_LIBRARY.define("few_row_linear(Tensor x, Tensor weight) -> Tensor")
_LIBRARY.impl("few_row_linear", lambda x, weight: _quick()(x, weight), "CPU")
_LIBRARY.impl("few_row_linear", lambda x, weight: x.new_empty(*x.shape[:-1], len(weight)), "Meta")


def _load_reference() -> Callable:
    return functional.linear


def _load_cpu() -> Callable:
    from hedgespec import _native  # noqa: F401  (the backend is there if this import works)

    return _linear_cpu


def _self_test_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Small products whose every sum is exact in float32."""
    for rows, columns, inner in ((1, 1, 1), (0, 3, 5), (3, 17, 37), (MOST_ROWS, 40, 64), (7, 131, 100)):
        x, weight = gridded(rows, inner, seed=1).to(dtype), gridded(columns, inner, seed=2).to(dtype)
        yield Case(f"{rows} rows, {columns} columns of {inner}", (x, weight))
    yield Case("more dimensions", (gridded(2, 3, 9, seed=3).to(dtype), gridded(5, 9, seed=4).to(dtype)))


backends.register("linear", "reference", _load_reference)
backends.register_cases("linear", _self_test_cases)
backends.register("linear", "cpu", _load_cpu, devices=("cpu",), dtypes=(torch.float32,))


class FewRowLinear(nn.Linear):
    """`nn.Linear` without a bias that takes the quick path where there is one: few rows, float32, on a CPU, no gradient."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        if (
            x.numel() <= MOST_ROWS * x.shape[-1]
            and x.dtype is torch.float32 is weight.dtype
            and not torch.is_grad_enabled()
            and x.device.type == "cpu"
        ):
            traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
            return torch.ops.hedgespec.few_row_linear(x, weight) if traced else _quick()(x, weight)
        return functional.linear(x, weight)


def _quick() -> Callable:
    """What "auto" means for float32 on a CPU; looked up anew each time, since the table remembers."""
    return backends.resolve("linear", "auto", "cpu", torch.float32)


def is_compiled(module: nn.Module) -> bool:
    """Returns whether the module is what `torch.compile(module)` returns."""
    return isinstance(module, nn.Module) and isinstance(module._modules.get("_orig_mod"), nn.Module)


def few_row_view(model: nn.Module) -> nn.Module:
    """The same model, weights shared, with its bias-free linear layers as `FewRowLinear`.

    Modules are copied shallowly with their own dictionaries, so the original is not touched: neither its classes, nor its
    submodules, nor its hooks. Layers of other types (quantised, adapted) stay what they are. What `torch.compile` has put
    around modules, or in place of their forward, is left out: it would run the original modules.
    """
    if is_compiled(model):
        inside = model._orig_mod
        assert isinstance(inside, nn.Module)
        model = inside
    view = object.__new__(type(model))
    # Hooks, buffers, parameters: what is added to one must not show in the other.
    vars(view).update((name, value.copy() if isinstance(value, dict) else value) for name, value in vars(model).items())
    vars(view).pop("_compiled_call_impl", None)
    compiled = getattr(vars(view).get("forward"), "_torchdynamo_orig_callable", None)
    if getattr(compiled, "__func__", None) is type(model).forward:
        del vars(view)["forward"]
    for name, child in view._modules.items():
        view._modules[name] = None if child is None else few_row_view(child)
    if type(view) is nn.Linear and view.bias is None:
        view.__class__ = FewRowLinear
    return view
