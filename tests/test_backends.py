"""The table of backends: auto says what it chose, and a name never becomes another one."""

from __future__ import annotations

import logging

import pytest
import torch

from hedgespec.cli import doctor
from hedgespec.errors import BackendUnavailableError
from hedgespec.ops import backends


def missing():
    raise ImportError("No module named 'absent'")


@pytest.fixture
def table(monkeypatch):
    """An empty table; {"op": reference everywhere, cpu on the CPU in float32, cuda missing}."""
    monkeypatch.setattr(backends, "_table", {})
    backends.forget()
    backends.register("op", "reference", lambda: "reference".upper)
    backends.register("op", "cpu", lambda: "cpu".upper, devices=("cpu",), dtypes=(torch.float32,))
    backends.register("op", "cuda", missing, devices=("cuda",))
    yield
    backends.forget()


@pytest.mark.usefixtures("table")
class TestResolve:
    @pytest.mark.parametrize(
        ("device", "dtype", "chosen"),
        [
            ("cpu", torch.float32, "CPU"),
            ("cpu", None, "CPU"),
            ("cpu", torch.float64, "REFERENCE"),
            ("cuda", torch.float32, "REFERENCE"),
            ("mps", torch.float32, "REFERENCE"),
        ],
    )
    def test_auto_picks_by_device_and_dtype(self, device, dtype, chosen):
        assert backends.resolve("op", "auto", device, dtype)() == chosen

    def test_auto_says_once_what_it_chose_and_why_not_better(self, caplog):
        with caplog.at_level(logging.INFO, "hedgespec.ops.backends"):
            for _ in range(3):
                backends.resolve("op", "auto", "cuda", torch.float32)
        assert caplog.messages == ["op on cuda: the reference backend; cuda cannot run here: No module named 'absent'"]

    def test_a_name_is_what_runs(self):
        assert backends.resolve("op", "reference", "cpu", torch.float32)() == "REFERENCE"

    def test_unavailable_keeps_the_cause_and_says_how_to_get_it(self):
        with pytest.raises(BackendUnavailableError, match=r"absent.*to get it: .*nvcc") as caught:
            backends.resolve("op", "cuda", "cuda")
        assert isinstance(caught.value.__cause__, ImportError)

    def test_a_backend_the_operation_does_not_have(self):
        with pytest.raises(BackendUnavailableError, match="op has no triton backend; it has reference, cpu, cuda"):
            backends.resolve("op", "triton", "cpu")

    def test_wrong_device(self):
        with pytest.raises(ValueError, match="backend: 'cpu' takes tensors on cpu, got tensors on cuda"):
            backends.resolve("op", "cpu", "cuda")

    def test_wrong_dtype(self):
        with pytest.raises(TypeError, match="backend: 'cpu' takes float32 logits, got float64"):
            backends.resolve("op", "cpu", "cpu", torch.float64)

    def test_unknown_name(self):
        with pytest.raises(ValueError, match=r"backend: expected 'auto' or one of .*, got 'gpu'"):
            backends.resolve("op", "gpu", "cpu")

    def test_only_import_errors_mean_unavailable(self):
        def broken():
            raise ZeroDivisionError

        backends.register("op", "triton", broken)
        with pytest.raises(ZeroDivisionError):
            backends.resolve("op", "triton", "cpu")

    def test_registering_again_replaces_what_was_resolved(self):
        backends.resolve("op", "auto", "cpu")
        backends.register("op", "cpu", lambda: "new".upper, devices=("cpu",))
        assert backends.resolve("op", "auto", "cpu")() == "NEW"

    def test_available(self):
        assert backends.available("op") == ("reference", "cpu")

    def test_report_and_its_text(self):
        report = backends.report()
        assert report["operations"]["op"]["cpu"] == "available"
        assert "No module named 'absent'" in report["operations"]["op"]["cuda"]
        assert report["versions"]["torch"] == torch.__version__
        text = doctor.describe(report)
        for word in ("torch", "cpu:", "native module", "op            cuda       unavailable"):
            assert word in text


def test_register_rejects_an_unknown_backend():
    with pytest.raises(ValueError, match="backend: expected one of reference, cpu, triton, cuda, got 'gpu'"):
        backends.register("op", "gpu", missing)


def test_doctor_without_the_native_module():
    report = backends.report() | {"native": {"built": False, "why": "not built: no such module"}}
    assert "not built: no such module" in doctor.describe(report)
