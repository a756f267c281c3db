"""The record of the native build: what setup.py writes where the build fails, and who reads it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import sysconfig
import tomllib
import warnings
from pathlib import Path

import pytest

import hedgespec
from hedgespec.cli import doctor
from hedgespec.ops import backends, native_build

ROOT = Path(__file__).parent.parent


@pytest.fixture
def record(tmp_path, monkeypatch):
    """Replaces the record by one of these fields; returns its path."""
    path = tmp_path / "_native_build.json"
    monkeypatch.setattr(native_build, "RECORD", path)

    def write(**fields: object) -> Path:
        path.write_text(json.dumps(fields))
        return path

    return write


def no_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `from hedgespec import _native` raise ImportError."""
    monkeypatch.setitem(sys.modules, "hedgespec._native", None)
    monkeypatch.delattr("hedgespec._native", raising=False)


def test_no_record_and_a_damaged_one_are_no_error(record, tmp_path):
    assert native_build.read() is None
    native_build.warn_if_failed()
    for damaged in ("", "[1]", "{}", '{"built": true, "colour": 1}'):
        (tmp_path / "_native_build.json").write_text(damaged)
        assert native_build.read() is None


def test_a_successful_build_does_not_warn(record):
    record(built=True, cuda="not asked for")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        native_build.warn_if_failed()


def test_a_failed_build_warns_when_the_backends_are_imported(record, monkeypatch):
    record(built=False, reason="ninja was not found")
    spec = importlib.util.find_spec("hedgespec.ops.backends")
    with pytest.warns(RuntimeWarning, match=r"ninja was not found.*hedgespec doctor.*C\+\+20 comp.*REQUIRE") as caught:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))  # a second copy of the module: the real one stays
    assert len(caught) == 1


def test_doctor_ends_with_why_the_build_failed_and_the_remedy(record, monkeypatch):
    record(built=False, reason="CMake could not compile it", output="evaluate_cpu.cpp:1: error: no\nninja: stopped\n")
    no_module(monkeypatch)
    report = backends.report()
    assert report["native"]["built"] is False
    *_, last = doctor.describe(report).partition("WARNING")
    assert "CMake could not compile it" in last
    assert "  | evaluate_cpu.cpp:1: error: no\n  | ninja: stopped\n" in last
    assert last.rstrip().endswith(native_build.how_to_rebuild())


def test_doctor_tells_a_module_that_was_built_and_cannot_be_loaded(record, monkeypatch):
    record(built=True, cuda="not asked for")
    no_module(monkeypatch)
    text = doctor.describe(backends.report())
    assert "built at installation, but it cannot be loaded" in text
    assert "WARNING" not in text


def test_doctor_says_why_there_are_no_cuda_kernels():
    report = backends.report()
    native = {"built": True, "compiler": "GCC", "openmp": True, "instruction_set": "avx2", "cuda": ""}
    report["native"] = native | {"cuda_build": "no working CUDA compiler was found"}
    assert "CUDA kernels not built: no working CUDA compiler was found" in doctor.describe(report)


class Setup:
    """A source tree with the project's setup.py, whose build of the native module fails at once: its cmake is `false`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "hedgespec").mkdir(parents=True)
        (folder / "hedgespec" / "__init__.py").write_text("")
        (folder / "triton_kernels").mkdir()
        (folder / "triton_kernels" / "__init__.py").write_text("")
        (folder / "csrc").mkdir()
        (folder / "CMakeLists.txt").write_text("")
        (folder / "setup.py").write_text((ROOT / "setup.py").read_text())
        self.tools = folder / "tools"
        self.tools.mkdir()
        for name in ("cmake", "ninja"):
            tool = self.tools / name
            tool.write_text("#!/bin/sh\necho the compiler is absent\nexit 1\n")
            tool.chmod(0o755)

    def build(self, *options: str, **environment: str) -> subprocess.CompletedProcess:
        """Runs `setup.py build_ext`, with the failing tools first on the path."""
        program = (
            "import sys, sysconfig, runpy; path = sysconfig.get_path; "
            f"sysconfig.get_path = lambda name, *rest: {str(self.tools)!r} if name == 'scripts' else path(name, *rest); "
            "sys.argv = ['setup.py', 'build_ext', *sys.argv[1:]]; runpy.run_path('setup.py', run_name='__main__')"
        )
        return subprocess.run(
            [sys.executable, "-c", program, *options],
            cwd=self.folder, env={"PATH": "/usr/bin:/bin"} | environment, capture_output=True, text=True, check=False,
        )  # fmt: skip

    def record(self, folder: Path) -> dict:
        return json.loads((folder / "_native_build.json").read_text())


@pytest.fixture
def source(tmp_path) -> Setup:
    pytest.importorskip("setuptools", reason="the build tools come with the extra dev")
    pytest.importorskip("pybind11")
    return Setup(tmp_path / "source")


class TestSetup:
    def test_a_failed_build_installs_records_why_and_says_so(self, source):
        done = source.build("--build-lib", "lib")
        assert done.returncode == 0, done.stderr
        assert "WARNING: the native module hedgespec._native was NOT built (CMake could not configure it)" in done.stderr
        assert source.record(source.folder / "lib" / "hedgespec") == {
            "built": False, "reason": "CMake could not configure it", "output": "the compiler is absent\n",
        }  # fmt: skip

    def test_it_fails_where_the_module_is_required(self, source):
        done = source.build("--build-lib", "lib", HEDGESPEC_REQUIRE_NATIVE="1")
        assert done.returncode != 0
        assert "the compiler is absent" in done.stdout
        assert "the environment asks for it: CMake could not configure it" in done.stderr

    def test_a_failed_build_leaves_no_earlier_module(self, source):
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        earlier = [source.folder / "lib" / "hedgespec" / f"_native{suffix}", source.folder / "hedgespec" / f"_native{suffix}"]
        for module in earlier:
            module.parent.mkdir(parents=True, exist_ok=True)
            module.write_text("of an earlier build")
        done = source.build("--build-lib", "lib", "--inplace")
        assert done.returncode == 0, done.stderr
        assert not any(module.exists() for module in earlier)
        assert source.record(source.folder / "hedgespec")["built"] is False

    @pytest.mark.parametrize("missing", ["csrc", "CMakeLists.txt"])
    def test_sources_that_are_missing_are_no_reason_to_go_on(self, source, missing):
        path = source.folder / missing
        path.rmdir() if path.is_dir() else path.unlink()
        done = source.build("--build-lib", "lib")
        assert done.returncode != 0
        assert "not a complete source tree" in done.stderr


def test_the_version_is_written_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "hedgespec.__version__"}
    assert backends.report()["versions"]["hedgespec"] == hedgespec.__version__
