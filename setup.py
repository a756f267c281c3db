"""The package map and the build of the native module hedgespec._native, which CMakeLists.txt describes and CMake builds.

A machine that cannot build the module still installs the package: it then runs on its other backends. pip does not show what a
successful build prints, so the outcome is also written to hedgespec/_native_build.json, which `hedgespec doctor` and the first
import of `hedgespec.ops.backends` read; a failure is printed to the terminal too, where there is one.

Environment variables:
    HEDGESPEC_REQUIRE_NATIVE=1: a failed build fails the installation, with the compiler's output.
    HEDGESPEC_CUDA=1: the same, and the CUDA kernels are required. HEDGESPEC_CUDA=0: they are left out.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections import deque
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NATIVE = "hedgespec._native"
RECORD = "_native_build.json"
CUDA = {"0": "OFF", "1": "ON"}.get(os.environ.get("HEDGESPEC_CUDA", ""), "AUTO")
REQUIRE_NATIVE = os.environ.get("HEDGESPEC_REQUIRE_NATIVE", "0") not in ("", "0") or CUDA == "ON"


class BuildFailedError(Exception):
    """The native module cannot be built on this machine; the message names the step, `output` ends with the tool's error."""

    def __init__(self, message: str, output: str = "") -> None:
        super().__init__(message)
        self.output = output


def find_tool(name):
    """Returns the path of a build tool; the folder of this Python comes first, so that a venv need not be activated."""
    path = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if path is None:
        raise BuildFailedError(f"{name} was not found")
    return path


def run(step, *command):
    """Runs a command and passes its output on; raises BuildFailedError with the last lines of it if the command fails."""
    last_lines = deque(maxlen=40)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace"
    ) as process:
        for line in process.stdout:
            sys.stdout.write(line)
            last_lines.append(line)
    sys.stdout.flush()
    if process.returncode:
        raise BuildFailedError(f"CMake could not {step} it", "".join(last_lines))


def tell(message):
    """Prints a message to stderr, and to the terminal if that is somewhere else: pip keeps a build's output to itself."""
    print(message, file=sys.stderr, flush=True)
    if not sys.stderr.isatty():
        try:
            with open("/dev/tty", "w") as terminal:
                terminal.write(f"\n{message}\n")
        except OSError:
            pass  # no terminal: `hedgespec doctor` and the warning at import remain


class BuildNative(build_ext):
    """Builds the module with CMake and Ninja, records the outcome beside it and reports it."""

    def build_extension(self, ext):
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        # Otherwise a failed build would leave, and install, the module of an earlier one.
        module.unlink(missing_ok=True)
        try:
            self.run_cmake(module.parent)
        except (ImportError, BuildFailedError) as error:
            if REQUIRE_NATIVE:
                raise RuntimeError(f"{NATIVE} was not built, and the environment asks for it: {error}") from error
            record = {"built": False, "reason": str(error), "output": getattr(error, "output", "")}
            tell(
                f"hedgespec: WARNING: the native module {NATIVE} was NOT built ({error}). HedgeSpec is installed without its "
                "cpu and cuda backends and will be slower. `hedgespec doctor` shows the reason and what to do."
            )
        else:
            cuda = (Path(self.build_temp).resolve() / "cuda.txt").read_text()
            record = {"built": True, "cuda": cuda}
            print(f"hedgespec: built {NATIVE}. CPU kernels: built. CUDA kernels: {cuda}", file=sys.stderr)
        module.parent.mkdir(parents=True, exist_ok=True)
        (module.parent / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    def run_cmake(self, destination):
        if not (ROOT / "CMakeLists.txt").is_file() or not (ROOT / "csrc").is_dir():
            raise RuntimeError(f"{ROOT} has no CMakeLists.txt or no csrc: this is not a complete source tree of HedgeSpec")
        import pybind11

        cmake, build = find_tool("cmake"), Path(self.build_temp).resolve()
        # --fresh: a cache left by an isolated build names tools that are gone with its environment.
        run(
            "configure", cmake, "--fresh", "-G", "Ninja", "-S", ROOT, "-B", build,
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            f"-DCMAKE_INSTALL_PREFIX={destination}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DHEDGESPEC_CUDA={CUDA}",
        )  # fmt: skip
        run("compile", cmake, "--build", build, "--target", "install")

    def copy_extensions_to_source(self):
        """An editable installation: the record goes beside the module, and an earlier module goes if there is no new one."""
        super().copy_extensions_to_source()
        name = Path(self.get_ext_filename(NATIVE))
        built, in_source = Path(self.build_lib, name), ROOT / name
        if not built.exists():
            in_source.unlink(missing_ok=True)
        shutil.copyfile(built.parent / RECORD, in_source.parent / RECORD)


setup(
    # triton_kernels is installed under another name: a top-level package triton_kernels belongs to Triton itself.
    packages=[*find_packages(include=["hedgespec", "hedgespec.*"]), "hedgespec.triton_kernels"],
    package_dir={"hedgespec.triton_kernels": "triton_kernels"},
    ext_modules=[Extension(NATIVE, sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative},
)
