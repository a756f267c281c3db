"""Builds the native module with its CUDA kernels emulated on the CPU: csrc/*.cu as plain C++ (see cuda_emulator.h).

`module()` imports it. On the command line this file builds and prints the path:

    python tests/emulator/build.py [--sanitize address,undefined | --sanitize thread]

A sanitized module needs the sanitizer's runtime in the process from its start (LD_PRELOAD): see sanitized.py.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from filelock import FileLock

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[1] / "csrc"

SMALL = 64
"""Threads of a block: what threads do together shows with two warps, and a small block starts eight times as fast."""

# What the module's bindings name and csrc/ does not have (yet).
_STUBS = {
    operation: f"""
#include "hedgespec.h"
#include <stdexcept>
namespace hedgespec {{
std::size_t {operation}_cuda_workspace_bytes(const {operation.capitalize()}Params&) {{ return 0; }}
void {operation}_cuda(const {operation.capitalize()}Params&, void*, void*) {{
  throw std::runtime_error("csrc/{operation}.cu is missing");
}}
}}  // namespace hedgespec
"""
    for operation in ("evaluate", "verify")
}


def compiler() -> str | None:
    """The C++ compiler, or None."""
    return shutil.which(os.environ.get("CXX", "g++"))


def build(sanitize: str = "", threads: int | None = SMALL) -> Path:
    """The path of the module, built unless the cache has it.

    Args:
        sanitize: what goes to -fsanitize.
        threads: of a block, in kernels that leave it open; None: as on a GPU.
    """
    import pybind11

    name = f"_emulated_{threads or 'real'}"

    sources = sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.cu")])
    headers = sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cuh"), *HERE.glob("*.h")])
    flags = [
        "-std=c++20",
        "-fPIC",
        "-g1",
        "-O1" if sanitize else "-O2",
        "-Wall",
        "-Wextra",
        "-Wno-unknown-pragmas",
        "-Wno-psabi",
        "-fno-math-errno",
        "-fopenmp-simd",
        f"-DHEDGESPEC_MODULE={name}",
        "-DHEDGESPEC_EMULATED",
        '-DHEDGESPEC_CUDA="emulated"',
        *([f"-DHEDGESPEC_THREADS={threads}"] if threads else []),
        *([f"-fsanitize={sanitize}", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined"] if sanitize else []),
        f"-I{HERE}",
        f"-I{SOURCES}",
        f"-I{pybind11.get_include()}",
        f"-I{sysconfig.get_path('include')}",
    ]
    shared = "\0".join([compiler() or "", *flags]).encode() + b"".join(path.read_bytes() for path in headers)
    base = Path(os.environ.get("HEDGESPEC_CACHE") or Path.home() / ".cache" / "hedgespec") / "emulated"
    base.mkdir(parents=True, exist_ok=True)
    with FileLock(base / "lock"):  # test processes side by side want the same objects
        return _linked(base, name, sources, sanitize, flags, shared)


def _linked(base: Path, name: str, sources: list[Path], sanitize: str, flags: list[str], shared: bytes) -> Path:
    """The module's path, compiled and linked as far as the cache lacks it."""
    present = {path.stem for path in sources if path.suffix == ".cu"}
    texts = [(path.name, path.read_bytes()) for path in sources]
    texts += [(f"{operation}_stub.cpp", text.encode()) for operation, text in _STUBS.items() if operation not in present]
    with ThreadPoolExecutor(os.cpu_count()) as workers:
        objects = list(workers.map(lambda text: _compiled(base, *text, flags, shared), texts))
    digest = hashlib.sha256("\0".join(path.stem for path in objects).encode()).hexdigest()[:16]
    folder = base / digest
    result = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not result.exists():
        folder.mkdir(exist_ok=True)
        link = ["-shared", *([f"-fsanitize={sanitize}"] if sanitize else []), *map(str, objects)]
        _run([compiler(), *link, "-o", f"{result}.{os.getpid()}"])
        os.replace(f"{result}.{os.getpid()}", result)
    return result


def _compiled(base: Path, name: str, text: bytes, flags: list[str], shared: bytes) -> Path:
    """The object file of one source, from the cache where nothing it depends on has changed."""
    digest = hashlib.sha256(shared + name.encode() + text).hexdigest()[:16]
    result = base / f"{name}.{digest}.o"
    if not result.exists():
        source = base / f"{digest}.{os.getpid()}.cpp"
        # The line directive makes messages name the real file.
        source.write_bytes(f'#line 1 "{SOURCES / name}"\n'.encode() + text)
        _run([compiler(), *flags, "-c", str(source), "-o", f"{result}.{os.getpid()}"])
        os.replace(f"{result}.{os.getpid()}", result)
        source.unlink()
    return result


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    if done.stderr:
        print(done.stderr, file=sys.stderr)


@functools.cache
def module(threads: int | None = SMALL, sanitize: str = "") -> ModuleType:
    """The built module, imported."""
    path = build(sanitize, threads)
    spec = importlib.util.spec_from_file_location(path.name.partition(".")[0], path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sanitize", default="", help="what goes to -fsanitize")
    parser.add_argument("--real", action="store_true", help="blocks of as many threads as on a GPU")
    arguments = parser.parse_args()
    print(build(arguments.sanitize, None if arguments.real else SMALL))
