"""Which implementation of an operation runs: one table, {operation: {reference, cpu, triton, cuda}}.

A stage registers its implementations when it is imported. `"auto"` picks the best one for the device that passes its self-test
there (`self_test.py`) and logs once which one that was; for a kernel that fails the test it warns once and takes the next one.
A backend asked for by name runs or raises: it never becomes another one.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import logging
import os
import platform
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hedgespec.errors import BackendUnavailableError
from hedgespec.ops import native_build, self_test

BACKENDS = ("reference", "cpu", "triton", "cuda")

TRITON_DEVICES = ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)
"""Device types that Triton kernels take; the CPU's only in Triton's interpreter, which is for tests."""

_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
_HOW_TO_GET = {
    "cpu": (
        "it is built when HedgeSpec is installed on a machine with a C++20 compiler; "
        "HEDGESPEC_REQUIRE_NATIVE=1 pip install . shows why a build fails"
    ),
    "triton": "pip install triton, on a machine with a GPU that torch can use",
    "cuda": (
        "it is built when HedgeSpec is installed on a machine with nvcc (HEDGESPEC_CUDA=1 shows why it is not) and runs on "
        "an NVIDIA GPU of compute capability 8.0 or newer"
    ),
}
_log = logging.getLogger(__name__)

native_build.warn_if_failed()


@dataclass(frozen=True, slots=True)
class _Entry:
    load: Callable[[], Callable]
    devices: frozenset[str] | None
    dtypes: frozenset[torch.dtype] | None

    def serves(self, device: str, dtype: torch.dtype | None) -> bool:
        return (self.devices is None or device in self.devices) and (
            self.dtypes is None or dtype is None or dtype in self.dtypes
        )


_table: dict[str, dict[str, _Entry]] = {}
_cases: dict[str, self_test.Cases] = {}
_resolved: dict[tuple, Callable] = {}


def register(
    operation: str,
    backend: str,
    load: Callable[[], Callable],
    *,
    devices: tuple[str, ...] | None = None,
    dtypes: tuple[torch.dtype, ...] | None = None,
) -> None:
    """Adds an implementation to the table.

    Args:
        operation: e.g. "evaluate".
        backend: one of `BACKENDS`.
        load: called without arguments, once, when the backend is first wanted; returns the implementation, or raises
            ImportError where it cannot run. Keep the import of what may be missing in here.
        devices: device types whose tensors it takes; None: any.
        dtypes: logits dtypes it takes; None: any floating-point dtype.

    Raises:
        ValueError: `backend` is not one of `BACKENDS`.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    entry = _Entry(load, None if devices is None else frozenset(devices), None if dtypes is None else frozenset(dtypes))
    _table.setdefault(operation, {})[backend] = entry
    forget()


def register_cases(operation: str, cases: self_test.Cases) -> None:
    """Adds an operation's self-test, which every compiled backend has to pass on a device before "auto" uses it there.

    Args:
        operation: e.g. "evaluate".
        cases: called with a dtype of logits, or activations; returns a few small calls of an implementation. They should
            contain what kernels get wrong: odd sizes and sizes around a block, ties, extreme values, empty dimensions,
            every option. The reference has to give the same answer to each however it rounds.
    """
    _cases[operation] = cases
    forget()


def forget() -> None:
    """Drops what was loaded, resolved and tested in this process; results of self-tests on disk stay."""
    _load.cache_clear()
    _resolved.clear()
    self_test.forget()


def register_kernels(
    operation: str,
    reference: Callable,
    *,
    stem: str | None = None,
    cpu_dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16),
    cuda: bool = True,
) -> None:
    """Adds an operation's reference and its kernels, which go by name: OPERATION_cpu and OPERATION_cuda in `native`,
    OPERATION_triton in `triton_kernels.STEM`.

    Args:
        operation, reference: as for `register`.
        stem: of the file; None: the operation's own name.
        cpu_dtypes: that the CPU's kernel takes.
        cuda: whether there is a kernel in CUDA C++.
    """

    def load_cpu() -> Callable:
        return getattr(importlib.import_module("hedgespec.ops.native"), f"{operation}_cpu")

    def load_cuda() -> Callable:
        native = importlib.import_module("hedgespec.ops.native")
        native.require_cuda()
        return getattr(native, f"{operation}_cuda")

    def load_triton() -> Callable:
        if "cpu" not in TRITON_DEVICES and not torch.cuda.is_available():
            raise ImportError("torch sees no GPU")
        return getattr(importlib.import_module(f"hedgespec.triton_kernels.{stem or operation}"), f"{operation}_triton")

    narrow = (torch.float32, torch.bfloat16, torch.float16)
    register(operation, "reference", lambda: reference)
    register(operation, "cpu", load_cpu, devices=("cpu",), dtypes=cpu_dtypes)
    register(operation, "triton", load_triton, devices=TRITON_DEVICES, dtypes=narrow)
    if cuda:
        register(operation, "cuda", load_cuda, devices=("cuda",), dtypes=narrow)


@functools.cache
def _load(operation: str, backend: str) -> Callable | ImportError:
    """The implementation, or why there is none."""
    try:
        return _table[operation][backend].load()
    except ImportError as error:
        return error


def resolve(operation: str, backend: str, device: torch.device | str, dtype: torch.dtype | None = None) -> Callable:
    """Returns the implementation that runs `operation`.

    The first call for a device and dtype may run self-tests, on the device's current stream, and waits for them.

    Args:
        operation: a registered operation.
        backend: one of `BACKENDS`, or "auto" for the best one that takes this device and dtype and passes its self-test.
        device: of the tensors: "cpu", torch.device("cuda", 0), ...; a GPU without an index is the current one.
        dtype: dtype of the logits; None: does not matter.

    Raises:
        BackendUnavailableError: the backend asked for by name is not there; `__cause__` keeps the ImportError.
        ValueError: an unknown backend, or a backend asked for by name that does not take tensors on this device.
        TypeError: a backend asked for by name that does not take this dtype.
    """
    key = operation, backend, device, dtype
    found = _resolved.get(key)
    if found is not None:
        return found
    if backend != "auto":
        found, final = _resolve_named(operation, backend, torch.device(device).type, dtype), True
    else:
        found, final = _resolve_auto(operation, torch.device(device), dtype)
    if final:
        _resolved[key] = found
    return found


def _resolve_named(operation: str, backend: str, device: str, dtype: torch.dtype | None) -> Callable:
    entries = _table[operation]
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected 'auto' or one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend not in entries:
        raise BackendUnavailableError(f"{operation} has no {backend} backend; it has {', '.join(entries)}")
    entry, found = entries[backend], _load(operation, backend)
    if isinstance(found, ImportError):
        raise BackendUnavailableError(
            f"the {backend} backend of {operation} cannot run here ({found}); to get it: {_HOW_TO_GET[backend]}"
        ) from found
    if entry.devices is not None and not entry.serves(device, None):
        raise ValueError(f"backend: {backend!r} takes tensors on {' or '.join(sorted(entry.devices))}, got tensors on {device}")
    if entry.dtypes is not None and not entry.serves(device, dtype):
        expected = " or ".join(sorted(str(each).removeprefix("torch.") for each in entry.dtypes))
        raise TypeError(f"backend: {backend!r} takes {expected} logits, got {str(dtype).removeprefix('torch.')}")
    return found


def _resolve_auto(operation: str, device: torch.device, dtype: torch.dtype | None) -> tuple[Callable, bool]:
    """The implementation, and whether that is final: not where a self-test is still to run, once a capture is over."""
    passed_over, final = [], True
    for backend in _PREFERENCE.get(device.type, ("reference",)):
        entry = _table[operation].get(backend)
        if entry is None or not entry.serves(device.type, dtype):
            continue
        found = _load(operation, backend)
        if isinstance(found, ImportError):
            passed_over.append(f"; {backend} cannot run here: {found}")
            continue
        if backend != "reference" and operation in _cases:
            tests = {each: _self_test(operation, backend, device, each) for each in _tested_dtypes(entry, dtype)}
            if None in tests.values():
                final = False
                _warn_once(
                    f"{operation} is first called while a CUDA graph is captured, where the self-test of its {backend} kernel "
                    f"cannot run: this graph keeps another backend. Call {operation} once before the capture"
                )
                continue
            failed = next(((each, test.reason) for each, test in tests.items() if test is not None and not test.passed), None)
            if failed is not None:
                reason, name = failed[1], str(failed[0]).removeprefix("torch.")
                passed_over.append(f"; {backend} failed its self-test: {reason}")
                _warn_once(
                    f"the {backend} kernel of {operation} is not used on {device} for {name}: it failed its self-test: "
                    f"{reason}. `hedgespec doctor` lists all self-tests; {self_test.VARIABLE}=1 runs them again"
                )
                continue
        _log.info("%s on %s: the %s backend%s", operation, device, backend, "".join(passed_over))
        return found, final
    raise BackendUnavailableError(f"{operation} has no backend for {dtype} tensors on {device}")


def _tested_dtypes(entry: _Entry, dtype: torch.dtype | None) -> list[torch.dtype]:
    """The dtypes whose self-tests decide about an entry that is to serve `dtype`."""
    if dtype is not None:
        return [dtype]
    return [torch.float32] if entry.dtypes is None else sorted(entry.dtypes, key=str, reverse=True)


def _self_test(operation: str, backend: str, device: torch.device, dtype: torch.dtype) -> self_test.Result | None:
    """The result of a backend's self-test; None while a CUDA graph is captured."""
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    implementation, reference = _load(operation, backend), _load(operation, "reference")
    assert callable(implementation) and callable(reference)
    return self_test.result(operation, backend, device, dtype, implementation, reference, _cases[operation])


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=2)


def available(operation: str) -> tuple[str, ...]:
    """The backends of `operation` that can run on this machine, in the order of `BACKENDS`."""
    return tuple(name for name in BACKENDS if name in _table[operation] and callable(_load(operation, name)))


def report(*, self_tests: bool = False) -> dict[str, Any]:
    """Returns what `hedgespec doctor` shows, as plain data: versions, devices, the native module, backends of every operation.

    Args:
        self_tests: also report self-tests of compiled backends on every device where "auto" would pick them; those without a
            result run now.

    Returns:
        {"versions": {package: version or None}, "devices": [str], "threads": int,
        "native": {"built": bool, ...}, "operations": {operation: {backend: "available" or why not}}} and with `self_tests`
        "self_tests": {operation: {backend: {device: {dtype: "passed", "passed (cached)", "not tested: ..." or "failed: ..."}}}}
    """
    operations: dict[str, dict[str, str]] = {}
    for operation, entries in _table.items():
        operations[operation] = {}
        for backend in (name for name in BACKENDS if name in entries):
            found = _load(operation, backend)
            operations[operation][backend] = (
                f"unavailable: {found}; to get it: {_HOW_TO_GET[backend]}" if isinstance(found, ImportError) else "available"
            )
    whole = {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _REPORTED_PACKAGES},
        "devices": _devices(),
        "threads": torch.get_num_threads(),
        "native": _native_module(),
        "operations": operations,
    }
    if self_tests:
        whole["self_tests"] = {operation: _report_self_tests(operation) for operation in _table}
    return whole


def _report_self_tests(operation: str) -> dict[str, dict[str, dict[str, str]]]:
    """{backend: {device: {dtype: result}}} of the compiled backends that can run here."""
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    found: dict[str, dict[str, dict[str, str]]] = {}
    for backend in available(operation):
        entry = _table[operation][backend]
        for device in map(torch.device, devices):
            if backend == "reference" or operation not in _cases:
                continue
            if backend in _PREFERENCE[device.type] and entry.serves(device.type, None):
                results = {each: _self_test(operation, backend, device, each) for each in _tested_dtypes(entry, None)}
                found.setdefault(backend, {})[str(device)] = {
                    str(each).removeprefix("torch."): str(result) for each, result in results.items()
                }
    return found


_REPORTED_PACKAGES = ("hedgespec", "torch", "transformers", "triton", "numpy", "safetensors", "vllm")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    devices = [f"cpu: {platform.machine()}, {os.cpu_count()} cores, {sys.platform}"]
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        devices.append(f"cuda:{index}: {torch.cuda.get_device_name(index)}, sm_{major}{minor}")
    return devices


def _native_module() -> dict[str, Any]:
    build = native_build.read()
    try:
        from hedgespec import _native
    except ImportError as error:
        if build is None:
            return {"built": False, "why": f"not built: {error}"}
        if build.built:
            return {"built": False, "why": f"built at installation, but it cannot be loaded: {error}"}
        return {"built": False, "why": build.reason, "output": build.output, "remedy": native_build.how_to_rebuild()}
    return {
        "built": True,
        "cuda_build": build.cuda if build else "",
        "instruction_set": _native.instruction_set(),
        "compiler": _native.compiler,
        "openmp": _native.openmp,
        "cuda": _native.cuda,
    }
