"""The package map, and the one native module, hedgespec._native, which CMakeLists.txt describes and CMake builds.

A machine that cannot build it still installs: the package then runs on its other backends, as `hedgespec doctor` says.
In the environment, HEDGESPEC_REQUIRE_NATIVE=1 makes a failed build fail the installation, with the compiler's own words;
HEDGESPEC_CUDA=1 does so where the CUDA kernels cannot be built, and HEDGESPEC_CUDA=0 leaves them out.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NATIVE = "hedgespec._native"
CUDA = {"0": "OFF", "1": "ON"}.get(os.environ.get("HEDGESPEC_CUDA", ""), "AUTO")
REQUIRE_NATIVE = os.environ.get("HEDGESPEC_REQUIRE_NATIVE", "0") not in ("", "0") or CUDA == "ON"


class BuildFailedError(Exception):
    """The native module cannot be built here; the message says at which step."""


def find_tool(name):
    """The path of a build tool, looked for beside this Python first: a virtual environment need not be activated."""
    path = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if path is None:
        raise BuildFailedError(f"{name} was not found")
    return path


def run(step, *command):
    if subprocess.run(command, check=False).returncode:
        raise BuildFailedError(f"CMake could not {step} it, for the reason it gave above")


class BuildNative(build_ext):
    """Builds the module with CMake and Ninja, and ends by saying what was built."""

    def build_extension(self, ext):
        try:
            self.run_cmake(Path(self.get_ext_fullpath(ext.name)).resolve().parent)
        except (ImportError, BuildFailedError) as error:
            if REQUIRE_NATIVE:
                raise RuntimeError(f"{NATIVE} was not built, and the environment asks for it") from error
            print(f"hedgespec: {NATIVE} was NOT built ({error}): installing without the cpu backend", file=sys.stderr)
        else:
            cuda = (Path(self.build_temp).resolve() / "cuda.txt").read_text()
            print(f"hedgespec: built {NATIVE}. CPU kernels: built. CUDA kernels: {cuda}", file=sys.stderr)

    def run_cmake(self, destination):
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


packages = find_packages(include=["hedgespec", "hedgespec.*"])
package_dir = {}
if (ROOT / "triton_kernels" / "__init__.py").exists():
    # Installed under another name: a top-level package called triton_kernels belongs to Triton itself.
    packages.append("hedgespec.triton_kernels")
    package_dir["hedgespec.triton_kernels"] = "triton_kernels"

setup(
    packages=packages,
    package_dir=package_dir,
    ext_modules=[Extension(NATIVE, sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative},
)
