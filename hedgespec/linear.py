"""Linear layers for the few rows of a round: the operation, and a view of a model that uses it.

A chain of K drafts sends K + 1 rows through every weight matrix of the target, and an evaluation as few through those of
every drafter. General matrix products are made for many rows; on a CPU they take twice the time of reading the weights.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from hedgespec import backends
from hedgespec.wrappers import is_compiled

MOST_ROWS = 24
"""Rows up to which the CPU kernel pays: a round of four requests with five drafts each. Beyond, the vendor's library is at home
(measured on AVX2; at 24 rows it takes from 0.9 to 2.2 times the kernel's time, by shape, and 1.4 over a forward)."""


def linear(x: torch.Tensor, weight: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """x @ weight.T

    Args:
        x: [..., inner], floating point.
        weight: [columns, inner], of the same dtype and device.
        backend: "auto", or a name from `hedgespec.backends.BACKENDS`. "cpu" computes in float32 from float32 and needs a
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
    return backends.resolve("linear", backend, x.device.type, x.dtype)(x, weight)


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


def _load_reference():
    return functional.linear


def _load_cpu():
    from hedgespec import _native  # noqa: F401  (the backend is there if this import works)

    return _linear_cpu


backends.register("linear", "reference", _load_reference)
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
            traced = torch._C._len_torch_dispatch_stack() > 0
            return torch.ops.hedgespec.few_row_linear(x, weight) if traced else _quick()(x, weight)
        return functional.linear(x, weight)


def _quick():
    """What "auto" means for float32 on a CPU; looked up anew each time, since the table remembers."""
    return backends.resolve("linear", "auto", "cpu", torch.float32)


def few_row_view(model: nn.Module) -> nn.Module:
    """The same model, weights shared, with its bias-free linear layers as `FewRowLinear`.

    Modules are copied shallowly with their own dictionaries, so the original is not touched: neither its classes, nor its
    submodules, nor its hooks. Layers of other types (quantised, adapted) stay what they are. What `torch.compile` has put
    around modules, or in place of their forward, is left out: it would run the original modules.
    """
    if is_compiled(model):
        model = model._orig_mod
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
