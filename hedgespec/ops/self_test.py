"""Self-tests of compiled kernels: a kernel has to agree with its reference on this device before "auto" uses it.

An operation contributes cases (`backends.register_cases`). The first time that "auto" would pick a compiled backend on a
device, the cases run on it and on the reference in float64, which takes milliseconds once a kernel is compiled. The result is
kept in memory and in the folder `self-tests` of the cache, one small JSON file for each operation, backend, device, dtype and
build. A file that is damaged, or a folder that cannot be written to, only means that the test runs again.

`HEDGESPEC_SELF_TEST=0` uses kernels untested, `HEDGESPEC_SELF_TEST=1` tests them in every process, whatever was kept.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hedgespec.utils.paths import cache_dir

VARIABLE = "HEDGESPEC_SELF_TEST"
MAX_UNFINISHED = 2
"""Processes that may end during a self-test before the kernel counts as failed: one may have been interrupted."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Case:
    """One call of an operation's implementation, with tensors on the CPU."""

    name: str
    """What the case is about; part of the message when it fails."""
    arguments: tuple[Any, ...]
    """Positional arguments, as the implementation takes them: checked already. Tensors are copied before they are used."""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Keyword arguments, likewise."""
    tolerance: float = 0.0
    """Largest absolute error of a floating-point result, beside one rounding to its dtype. Integers must be equal."""


Cases = Callable[[torch.dtype], Iterable[Case]]
"""Cases of an operation for logits, or activations, of a dtype."""


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of a self-test."""

    passed: bool
    """Whether "auto" may use the kernel."""
    reason: str = ""
    """Why it failed, or why it was not tested; empty if it was tested and passed."""
    cached: bool = False
    """Whether it was read from disk."""

    def __str__(self) -> str:
        if not self.passed:
            return f"failed: {self.reason}"
        return f"passed{' (cached)' if self.cached else ''}" if not self.reason else self.reason


# Values for cases. They come from integer arithmetic alone, hence are the same under every version of torch, and no random
# number generator is touched.


def scattered(*shape: int, seed: int = 0, low: float = -1.0, high: float = 1.0) -> torch.Tensor:
    """Numbers spread irregularly and evenly over [low, high), float64 of this shape."""
    return low + (high - low) * _hashed(shape, seed).double() / 2**31


def gridded(*shape: int, seed: int = 0) -> torch.Tensor:
    """Multiples of 1/8 in [-2, 2] without 0, float64: exact in every dtype, as are their products and sums in float32."""
    steps = _hashed(shape, seed) % 32 - 16
    return (steps + (steps >= 0)).double() / 8


def _hashed(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Integers in [0, 2**31), int64."""
    count = 1
    for size in shape:
        count *= size
    values = (torch.arange(count, device="cpu") + 1 + 7919 * (seed + 1)) * 2654435761 % 2**32
    for shift, factor in ((16, 73244475), (15, 73244475), (16, 1)):
        values = (values ^ values >> shift) * factor % 2**32
    return (values >> 1).reshape(shape)


# One self-test.


def run(
    implementation: Callable, reference: Callable, cases: Cases, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Result:
    """Runs the cases on an implementation and compares results, and tensors it was given, with the reference in float64.

    The work runs on the device's current stream and is waited for. Autocast, inference mode, gradients and dispatch modes of
    the caller have no effect on it.

    Args:
        implementation: what is tested; gets tensors on `device`.
        reference: the operation in plain torch; gets the same on the CPU, floating-point tensors as float64.
        cases: makes the cases.
        dtype: what they are made for.
        device: where the implementation runs.

    Returns: a `Result`. An exception of the implementation is a failure.

    Raises: torch.OutOfMemoryError, which says nothing about the implementation.
    """
    device = torch.device(device)
    with _undisturbed(device):
        for case in cases(dtype):
            given = _Call(case, device)
            try:
                # Before the reference, whose freed memory might hold the right answers where the kernel writes none.
                got = given.call(implementation)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a kernel that raises is a kernel that fails
                first = next(iter(str(error).splitlines()), "")
                return Result(False, f"{case.name}: {type(error).__name__}: {first}")
            exact = _Call(case, torch.device("cpu"), wide=True).call(reference)
            if problem := _difference(got, exact, case.tolerance):
                return Result(False, f"{case.name}: {problem}")
    return Result(True)


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Contexts of the caller that would change what operations do are left for a while."""
    from torch.utils._python_dispatch import _disable_current_modes

    on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast(device.type, enabled=False),
        _disable_current_modes(),
        on_device,
    ):
        yield


class _Call:
    """A case's arguments, copied to a device; with `wide` floating-point tensors become float64."""

    def __init__(self, case: Case, device: torch.device, wide: bool = False):
        def copy(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            value = value.to(device, copy=True)
            return value.double() if wide and value.is_floating_point() else value

        self.arguments = [copy(value) for value in case.arguments]
        self.options = {name: copy(value) for name, value in case.options.items()}

    def call(self, function: Callable) -> dict[str, torch.Tensor]:
        """The tensors of the result and, as the call leaves them, of the arguments, on the CPU."""
        found = dict(_named_tensors("result", function(*self.arguments, **self.options)))
        for name, value in [*enumerate(self.arguments), *self.options.items()]:
            found |= dict(_named_tensors(f"argument {name}", value))
        return {name: tensor.cpu() for name, tensor in found.items()}


def _named_tensors(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _named_tensors(f"{name}.{field.name}", getattr(value, field.name))
    elif isinstance(value, tuple | list):
        for place, one in enumerate(value):
            yield from _named_tensors(f"{name}[{place}]", one)


def _difference(got: Mapping[str, torch.Tensor], exact: Mapping[str, torch.Tensor], tolerance: float) -> str | None:
    """What differs, or None."""
    if missing := exact.keys() ^ got.keys():
        return f"expected {', '.join(sorted(exact))}, got {', '.join(sorted(got))} (differing: {', '.join(sorted(missing))})"
    for name, right in exact.items():
        ours = got[name]
        if ours.shape != right.shape:
            return f"{name}: expected shape {list(right.shape)}, got {list(ours.shape)}"
        if ours.is_floating_point() != right.is_floating_point():
            return f"{name}: expected a {'floating-point' if right.is_floating_point() else 'whole'} dtype, got {ours.dtype}"
        if right.is_floating_point():
            most = tolerance + torch.finfo(ours.dtype).eps * right.abs()
            same = (ours.double() - right).abs() <= most
            same |= (ours == right) | (ours.isnan() & right.isnan())  # infinities, NaN
        else:
            same = ours == right
        if not same.all():
            place = (~same).nonzero()[0].tolist()
            wrong, shown = (~same).sum().item(), f"{name}{place}" if place else name
            return (
                f"{shown}: expected {right[tuple(place)].item():.8g}, got {ours[tuple(place)].item():.8g} "
                f"({wrong} of {same.numel()} differ)"
            )
    return None


# Results that are kept.

_known: dict[tuple, Result] = {}
_lock = threading.RLock()


def forget() -> None:
    """Drops the results held in memory; those on disk stay."""
    _known.clear()


def wanted() -> str | None:
    """Returns the setting: "0" to skip self-tests, "1" to run them whatever is cached, None for once a device and build.

    Raises: ValueError for anything else in `HEDGESPEC_SELF_TEST`.
    """
    value = os.environ.get(VARIABLE) or None
    if value not in (None, "0", "1"):
        raise ValueError(f"{VARIABLE}: expected 0 (skip) or 1 (always), got {value!r}")
    return value


def result(
    operation: str,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    implementation: Callable,
    reference: Callable,
    cases: Cases,
) -> Result | None:
    """The result of an implementation's self-test: from memory, from disk, or by running it now.

    Args:
        operation, backend: of the implementation.
        device: where it would run, with an index if there are several.
        dtype: of the logits or activations.
        implementation, reference, cases: as for `run`; cases are made for the dtype.

    Returns: None where a test would be needed and cannot run, as a CUDA graph is being captured.
    """
    setting = wanted()
    if setting == "0":
        return Result(True, f"not tested: {VARIABLE}=0")
    place = describe_device(device)
    memory = (operation, backend, place, dtype)
    if memory in _known:
        return _known[memory]
    with _lock:
        if memory in _known:  # another thread was quicker
            return _known[memory]
        key = {
            "operation": operation,
            "backend": backend,
            "device": place,
            "dtype": str(dtype).removeprefix("torch."),
            "build": build_of(backend),
            "cases": _hash_of_files(_sources(implementation, reference, cases)),
            "torch": torch.__version__,
        }
        kept = _Kept(key)
        found = None if setting == "1" else kept.read()
        if found is None:
            if capturing(device):
                return None
            found = _run_now(kept, implementation, reference, cases, dtype, device)
        _known[memory] = found
        return found


def _run_now(
    kept: _Kept, implementation: Callable, reference: Callable, cases: Cases, dtype: torch.dtype, device: torch.device
) -> Result:
    began = time.perf_counter()
    with kept.running():
        try:
            found = run(implementation, reference, cases, dtype, device)
        except torch.OutOfMemoryError as error:
            return Result(False, f"no memory for the self-test: {next(iter(str(error).splitlines()), '')}")
    milliseconds = 1000 * (time.perf_counter() - began)
    _log.info("self-test of %(operation)s, %(backend)s on %(device)s, %(dtype)s", kept.key)
    _log.info("%s, %.1f ms", found, milliseconds)
    kept.write(found, milliseconds)
    return found


_DISK_ERRORS = (OSError, ValueError, RuntimeError)
"""Raised by reading and writing: RuntimeError without a home folder, ValueError for a damaged file or an impossible path."""


class _Kept:
    """A result on disk. No error of reading or writing leaves it."""

    def __init__(self, key: dict[str, str]):
        self.key = key
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        self._name = f"{key['operation']}-{key['backend']}-{key['dtype']}-{digest}"

    @property
    def path(self) -> Path:
        return cache_dir() / "self-tests" / f"{self._name}.json"

    def read(self) -> Result | None:
        """The result, or None where there is none that can be read."""
        try:
            held = json.loads(self.path.read_text(encoding="utf-8"))
            if held["key"] == self.key and isinstance(held["passed"], bool) and isinstance(held["reason"], str):
                return Result(held["passed"], held["reason"], cached=True)
        except (*_DISK_ERRORS, KeyError, TypeError):
            pass
        unfinished = self._unfinished()
        if len(unfinished) < MAX_UNFINISHED:
            return None
        found = Result(False, f"the process ended during the self-test, {len(unfinished)} times")
        self.write(found, 0.0)
        return found

    def write(self, found: Result, milliseconds: float) -> None:
        """Replaces the file as a whole, so that no other process reads half of it."""
        held = {"key": self.key, "passed": found.passed, "reason": found.reason, "milliseconds": round(milliseconds, 1)}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            number, temporary = tempfile.mkstemp(dir=self.path.parent, suffix=".tmp")
            try:
                with os.fdopen(number, "w", encoding="utf-8") as file:
                    json.dump(held, file, indent=1)
                os.replace(temporary, self.path)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
            for marker in self._unfinished():
                marker.unlink(missing_ok=True)
        except _DISK_ERRORS as error:
            _log.info("the result of a self-test cannot be kept: %s", error)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Leaves a marker if the process ends meanwhile, as it does where a kernel crashes it."""
        marker = None
        try:
            marker = self.path.with_name(f"{self._name}.running.{_host()}.{os.getpid()}")
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()
        except _DISK_ERRORS:
            pass
        try:
            yield
        finally:
            try:
                if marker is not None:
                    marker.unlink(missing_ok=True)
            except _DISK_ERRORS:
                pass

    def _unfinished(self) -> list[Path]:
        """Markers of processes of this machine that are gone."""
        try:
            markers = list(self.path.parent.glob(f"{self._name}.running.{_host()}.*"))
        except _DISK_ERRORS:
            return []
        return [marker for marker in markers if not _is_alive(marker.suffix[1:])]


def _host() -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in socket.gethostname())


def _is_alive(process: str) -> bool:
    """Whether a process of this number is there. This one is not: it has not begun."""
    if not process.isdecimal() or int(process) == os.getpid():
        return False
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it belongs to someone else
        return True
    return True


# What a result depends on.


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, during which nothing may be waited for."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def describe_device(device: torch.device) -> str:
    """The kind of device, as results are kept for it: the GPU's name and capability, or the CPU's model and features."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"cuda: {torch.cuda.get_device_name(device)}, sm_{major}{minor}"
    return _describe_cpu() if device.type == "cpu" else str(device)


@functools.cache
def _describe_cpu() -> str:
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    except OSError:  # not Linux
        pass
    model = fields.get("model name") or platform.processor() or platform.machine()
    features = fields.get("flags") or fields.get("Features") or ""
    return f"cpu: {model}, {platform.machine()}, features {hashlib.sha256(features.encode()).hexdigest()[:12]}"


def build_of(backend: str) -> str:
    """What tells one build of a backend's kernels from another: a hash of the native module, or of the Triton sources."""
    if backend in ("cpu", "cuda"):
        try:
            from hedgespec import _native
        except ImportError:
            return "none"
        return f"native {_hash_of_files((_native.__file__,))}"
    if backend == "triton":
        spec = importlib.util.find_spec("hedgespec.triton_kernels")
        folders = (spec.submodule_search_locations if spec is not None else None) or ()

        files = sorted(str(file) for folder in folders for file in Path(folder).glob("*.py"))
        interpreted = " interpreted" if os.environ.get("TRITON_INTERPRET") == "1" else ""
        return f"triton {_version('triton')}{interpreted} {_hash_of_files(tuple(files))}"
    return backend


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _sources(*functions: Callable) -> tuple[str, ...]:
    """The files in which functions are written, as far as they are known, and this one."""
    files = {__file__}
    for function in functions:
        code = getattr(getattr(function, "__wrapped__", function), "__code__", None)
        if code is not None:
            files.add(code.co_filename)
    return tuple(sorted(files))


def _hash_of_files(files: tuple[str, ...]) -> str:
    whole = hashlib.sha256()
    for file in files:
        whole.update(_hash_of_file(file, _modified(file)))
    return whole.hexdigest()[:16]


def _modified(file: str) -> int:
    try:
        return os.stat(file).st_mtime_ns
    except OSError:
        return 0


@functools.cache
def _hash_of_file(file: str, modified: int) -> bytes:
    try:
        return hashlib.sha256(Path(file).read_bytes()).digest()
    except OSError:
        return b"none"
