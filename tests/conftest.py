"""Shared by the tests: seeds, the backends an operation has here, tolerances, outputs that show what nobody wrote.

Where there is no GPU, GPU kernels are tested all the same: Triton's in its interpreter, those in CUDA C++ in the emulator of
tests/emulator. Where there is one, they run on it, and their tests are marked gpu.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.version import Version

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported
# Tests count calls and host reads, which must not be those of a kernel's first use; tests/test_self_test.py sets it otherwise.
os.environ["HEDGESPEC_SELF_TEST"] = "0"

from hedgespec.ops import backends  # noqa: E402

GPU_BACKENDS = ("triton", "cuda")

# Largest absolute error of a probability, against float64 on the same (already rounded) logits. Half types are computed
# in float32, hence share its tolerance.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 5e-6, torch.float16: 5e-6}


sys.path.insert(0, str(Path(__file__).parent / "emulator"))


class _Emulated:
    """The native module with its CUDA kernels emulated, built when something of it is first asked for."""

    def __getattr__(self, name: str) -> object:
        return getattr(_emulated_module(), name)


@functools.cache
def _emulated_module():
    import build

    return build.module()


def _emulate_cuda(operation: str) -> None:
    """Registers the emulated kernel as the cuda backend of an operation, for tensors on the CPU."""
    from hedgespec.ops import native

    emulated = _Emulated()

    def launch(parameters: object, device: torch.device) -> None:
        size = getattr(emulated, f"{operation}_cuda_workspace_bytes")(parameters)
        scratch = torch.zeros(size, dtype=torch.uint8)
        getattr(emulated, f"{operation}_cuda")(parameters, scratch.data_ptr(), 0)

    make = {"evaluate": native.evaluator, "verify": native.verifier}[operation]
    narrow = (torch.float32, torch.bfloat16, torch.float16)
    backends.register(operation, "cuda", lambda: make(emulated, launch), devices=("cpu",), dtypes=narrow)


if not HAS_GPU and shutil.which("g++") and importlib.util.find_spec("pybind11"):
    for _operation in ("evaluate", "verify"):
        importlib.import_module(f"hedgespec.ops.{_operation}")
        try:
            _emulate_cuda(_operation)
        except ImportError:  # no native module: then there is nothing to launch with
            break


def _mend_the_interpreter() -> None:
    """Triton before 3.7 cannot take a bound of a loop from a tensor if NumPy is 2.4 or newer."""
    if importlib.util.find_spec("triton") is None or Version(importlib.metadata.version("triton")) >= Version("3.7"):
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def mended(tensor: type, scope: object) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = mended


if not HAS_GPU:
    _mend_the_interpreter()


def anywhere(operation):
    """The operation for tests that write their tensors on the CPU: a GPU backend gets them on the GPU where there is one."""

    def moved(value: object, device: str) -> object:
        return value.to(device) if isinstance(value, torch.Tensor) else value

    @functools.wraps(operation)
    def run(*arguments, backend: str = "auto", **options):
        device = "cuda" if HAS_GPU and backend in GPU_BACKENDS else "cpu"
        if device == "cpu":
            return operation(*arguments, backend=backend, **options)
        arguments = [moved(argument, device) for argument in arguments]
        options = {name: moved(value, device) for name, value in options.items()}
        result = operation(*arguments, backend=backend, **options)
        fields = (field.name for field in dataclasses.fields(result))
        return dataclasses.replace(result, **{name: moved(getattr(result, name), "cpu") for name in fields})

    return run


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`backend` in a test of tests/test_OPERATION.py runs it on every backend registered for OPERATION."""
    if "backend" not in metafunc.fixturenames:
        return
    stem = metafunc.module.__name__.rpartition(".")[2].removeprefix("test_")
    importlib.import_module(f"hedgespec.ops.{stem}")
    operation = getattr(metafunc.module, "OPERATION", stem)  # a stem of several operations names one of them
    registered = backends.report()["operations"][operation]
    metafunc.parametrize(
        "backend",
        [pytest.param(name, marks=_marks(name, state)) for name, state in registered.items()],
    )


def _marks(name: str, state: str) -> list[pytest.MarkDecorator]:
    if state != "available":
        return [pytest.mark.skip(reason=f"{name} is {state}")]
    return [pytest.mark.gpu] if HAS_GPU and name in GPU_BACKENDS else []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_GPU:
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def seeds() -> None:
    """The same random numbers for every test, whatever ran before it."""
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(scope="session", autouse=True)
def threads() -> None:
    """Small tensors: more threads than cores would only wait for each other, within a process and between processes."""
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, min(torch.get_num_threads(), os.cpu_count() or 1) // processes))


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty hands out NaN, so that an output element nobody writes is seen."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
