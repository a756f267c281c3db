"""Self-tests of kernels: "auto" uses a compiled backend only after it agreed with the reference on this device."""

from __future__ import annotations

import importlib
import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import GPU_BACKENDS, HAS_GPU
from torch.utils._python_dispatch import TorchDispatchMode

import hedgespec.decoder
from hedgespec import cli
from hedgespec.cli import doctor
from hedgespec.ops import backends, self_test
from hedgespec.ops.self_test import Case, scattered

COMPILED = [(operation, name) for operation, entries in backends._table.items() for name in entries if name != "reference"]
MARKED = [pytest.param(*each, marks=[pytest.mark.gpu] if HAS_GPU and each[1] in GPU_BACKENDS else []) for each in COMPILED]


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """An empty cache folder, and no setting."""
    monkeypatch.delenv(self_test.VARIABLE)
    monkeypatch.setenv("HEDGESPEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(backends, "_warned", set())
    backends.forget()
    yield tmp_path / "cache"
    backends.forget()


@pytest.fixture
def table(monkeypatch):
    """An empty table, and a function that puts operation "double" into it with a kernel of one's own."""
    monkeypatch.setattr(backends, "_table", {})
    monkeypatch.setattr(backends, "_cases", {})

    def register(kernel, cases=None):
        backends.register("double", "reference", lambda: reference)
        backends.register("double", "cpu", lambda: kernel, devices=("cpu",), dtypes=(torch.float32, torch.bfloat16))
        backends.register_cases("double", cases or (lambda dtype: [Case("numbers", (scattered(5).to(dtype),))]))

    return register


def reference(x):
    return 2 * x


class Kernel:
    """A kernel that counts its calls."""

    def __init__(self, function=reference):
        self.function, self.calls = function, 0

    def __call__(self, x):
        self.calls += 1
        return self.function(x)


def raises(x):
    raise RuntimeError("no kernel image is available\nfor execution on the device")


def mutates(x):
    return x.mul_(2)


def off_at_the_end(x):
    return 2 * x + (torch.arange(len(x)) == len(x) - 1) * 0.01


FAULTS = {
    "a wrong value": (off_at_the_end, r"numbers: result\[4\]: expected -?[\d.]+, got -?[\d.]+ \(1 of 5 differ\)"),
    "NaN": (lambda x: 2 * x * torch.nan, r"got nan \(5 of 5 differ\)"),
    "an exception": (raises, "numbers: RuntimeError: no kernel image is available"),
    "a wrong shape": (lambda x: 2 * x[:4], r"expected shape \[5\], got \[4\]"),
    "integers": (lambda x: (2 * x).long(), "expected a floating-point dtype, got torch.int64"),
    "writing to its input": (mutates, r"argument 0\[0\]"),
    "no result": (lambda x: None, "expected argument 0, result, got argument 0"),
}


def chosen(dtype=torch.float32):
    return backends.resolve("double", "auto", "cpu", dtype)


def files(cache):
    return sorted(cache.rglob("*.json"))


class TestAuto:
    def test_uses_a_kernel_that_agrees_and_tests_it_once(self, table):
        kernel = Kernel()
        table(kernel)
        assert kernel.calls == 0
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert chosen() is chosen() is kernel
        assert kernel.calls == 1

    @pytest.mark.parametrize("fault", FAULTS)
    def test_takes_the_next_backend_and_warns_once(self, table, caplog, fault):
        function, reason = FAULTS[fault]
        table(Kernel(function))
        caplog.set_level(logging.INFO, "hedgespec.ops.backends")
        with pytest.warns(UserWarning, match=f"the cpu kernel of double is not used on cpu for float32: .*{reason}"):
            assert chosen() is reference
        backends._resolved.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert chosen() is reference
        assert "double on cpu: the reference backend; cpu failed its self-test" in caplog.text

    def test_a_named_backend_never_becomes_another_one(self, table):
        kernel = Kernel(raises)
        table(kernel)
        assert backends.resolve("double", "cpu", "cpu", torch.float32) is kernel
        assert kernel.calls == 0

    def test_each_dtype_has_its_own_result(self, table):
        kernel = Kernel(lambda x: 2 * x if x.dtype is torch.float32 else x)
        table(kernel)
        assert chosen() is kernel
        with pytest.warns(UserWarning, match="for bfloat16"):
            assert chosen(torch.bfloat16) is reference
        assert chosen() is kernel
        assert backends.resolve("double", "auto", "cpu") is reference  # any dtype may come

    @pytest.mark.parametrize(
        ("error", "tolerance", "passes"), [(5e-8, 0.0, True), (1e-5, 0.0, False), (1e-5, 1e-4, True), (1e-3, 1e-4, False)]
    )
    def test_one_rounding_of_the_result_is_allowed_beside_the_tolerance(self, error, tolerance, passes):
        case = Case("third", (torch.tensor([1 / 3]),), tolerance=tolerance)
        assert self_test.run(lambda x: 2 * x + error, reference, lambda dtype: [case], torch.float32).passed is passes

    def test_without_memory_nothing_is_kept(self, table, cache):
        def full(x):
            raise torch.OutOfMemoryError("out of memory")

        table(Kernel(full))
        with pytest.warns(UserWarning, match="no memory for the self-test"):
            assert chosen() is reference
        assert files(cache) == []

    def test_contexts_of_the_caller_do_not_matter(self, table):
        seen = []

        def kernel(x):
            seen.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
            return torch.nn.functional.linear(x[:, None], torch.full((1, 1), 2.0))[:, 0]

        class Refuses(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                raise AssertionError(function)

        table(kernel)
        generator = torch.get_rng_state()
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), Refuses():
            assert chosen() is kernel
        assert seen == [(False, False, False)]
        assert torch.equal(generator, torch.get_rng_state())


class TestCapture:
    """Nothing can be waited for while a CUDA graph is captured."""

    @pytest.fixture
    def capture(self, monkeypatch, table):
        """A "GPU" (the CPU is one for once) that captures or not."""
        state = {"capturing": True}
        monkeypatch.setattr(self_test, "capturing", lambda device: state["capturing"])
        return state

    def test_an_untested_kernel_is_not_captured_and_is_tested_afterwards(self, capture, table):
        kernel = Kernel()
        table(kernel)
        with pytest.warns(UserWarning, match="double is first called while a CUDA graph is captured") as caught:
            assert chosen() is chosen() is reference
        assert len(caught) == 1
        assert kernel.calls == 0
        capture["capturing"] = False
        assert chosen() is kernel
        assert kernel.calls == 1

    def test_a_result_on_disk_is_enough(self, capture, table):
        kernel = Kernel()
        table(kernel)
        capture["capturing"] = False
        chosen()
        backends.forget()
        capture["capturing"] = True
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert chosen() is kernel
        assert kernel.calls == 1

    def test_only_cuda_captures(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert self_test.capturing(torch.device("cuda", 0))
        assert not self_test.capturing(torch.device("cpu"))


class TestCache:
    @pytest.fixture
    def kernel(self, table):
        kernel = Kernel()
        table(kernel)
        return kernel

    def again(self, dtype=torch.float32):
        """As another process would."""
        backends.forget()
        return chosen(dtype)

    def test_another_process_reads_the_result(self, kernel, cache):
        chosen()
        assert self.again() is kernel
        assert kernel.calls == 1
        [file] = files(cache)
        held = json.loads(file.read_text())
        assert held["passed"] is True
        assert held["key"]["torch"] == torch.__version__
        assert held["key"]["device"] == self_test.describe_device(torch.device("cpu"))

    def test_a_failure_is_read_too_and_warned_of_in_every_process(self, table, monkeypatch):
        kernel = Kernel(off_at_the_end)
        table(kernel)
        for _ in range(2):
            monkeypatch.setattr(backends, "_warned", set())
            with pytest.warns(UserWarning, match="differ"):
                assert self.again() is reference
        assert kernel.calls == 1

    @pytest.mark.parametrize("what", ["build", "torch", "device", "cases"])
    def test_whatever_it_depends_on_starts_it_again(self, kernel, cache, monkeypatch, what):
        chosen()
        if what == "build":
            monkeypatch.setattr(self_test, "build_of", lambda backend: "another")
        elif what == "torch":
            monkeypatch.setattr(torch, "__version__", "2.99")
        elif what == "device":
            monkeypatch.setattr(self_test, "describe_device", lambda device: "another CPU")
        else:
            monkeypatch.setattr(self_test, "_sources", lambda *functions: ("another file",))
        assert self.again() is kernel
        assert kernel.calls == 2
        assert len(files(cache)) == 2

    @pytest.mark.parametrize(
        "text",
        ["", "{", "[]", "null", '{"passed": true}', '{"key": {}, "passed": true, "reason": ""}', "\udcff"],
    )
    def test_a_damaged_file_is_written_anew(self, kernel, cache, text):
        chosen()
        [file] = files(cache)
        whole = json.loads(file.read_text())
        file.write_bytes(text.encode("utf-8", "surrogateescape"))
        assert self.again() is kernel
        assert kernel.calls == 2
        assert json.loads(file.read_text())["key"] == whole["key"]

    def test_a_value_of_another_type_is_damage(self, kernel, cache):
        chosen()
        [file] = files(cache)
        file.write_text(file.read_text().replace("true", '"yes"'))
        self.again()
        assert kernel.calls == 2

    @pytest.mark.parametrize("place", ["a file", "a file/below", "\0"])
    def test_a_folder_that_cannot_be_written_to_is_no_error(self, kernel, monkeypatch, tmp_path, place):
        (tmp_path / "a file").touch()
        monkeypatch.setattr(self_test, "cache_dir", lambda: tmp_path / place)
        assert chosen() is kernel
        assert self.again() is kernel
        assert kernel.calls == 2

    def test_no_home_is_no_error(self, kernel, monkeypatch):
        def nowhere():
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(self_test, "cache_dir", nowhere)
        assert chosen() is kernel

    def test_a_full_disk_leaves_no_half_file(self, kernel, cache, monkeypatch):
        def full(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(json, "dump", full)
        assert chosen() is kernel
        assert [path for path in cache.rglob("*") if path.is_file()] == []

    def test_0_skips_and_1_always_tests(self, table, monkeypatch):
        kernel = Kernel(off_at_the_end)
        table(kernel)
        monkeypatch.setenv(self_test.VARIABLE, "0")
        assert self.again() is kernel
        assert kernel.calls == 0
        monkeypatch.setenv(self_test.VARIABLE, "1")
        for number in (1, 2):
            monkeypatch.setattr(backends, "_warned", set())
            with pytest.warns(UserWarning, match="differ"):
                assert self.again() is reference
            assert kernel.calls == number

    def test_another_setting_is_refused(self, kernel, monkeypatch):
        monkeypatch.setenv(self_test.VARIABLE, "yes")
        with pytest.raises(ValueError, match=r"HEDGESPEC_SELF_TEST: expected 0 \(skip\) or 1 \(always\), got 'yes'"):
            chosen()

    def test_a_kernel_that_ends_the_process_twice_has_failed(self, table, cache, tmp_path):
        kernel = Kernel()
        table(kernel)

        def crash():  # what a process leaves that ends within its self-test
            script = (
                "import os, torch\nfrom hedgespec import backends\nfrom hedgespec.ops.self_test import _Kept\n"
                f"with _Kept({key!r}).running():\n    os._exit(1)\n"
            )
            assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 1

        chosen()
        [file] = files(cache)
        key = json.loads(file.read_text())["key"]
        file.unlink()
        crash()
        assert self.again() is kernel  # once may have been an interruption
        assert list(cache.rglob("*.running.*")) == []
        file.unlink()
        crash()
        crash()
        with pytest.warns(UserWarning, match="the process ended during the self-test, 2 times"):
            assert self.again() is reference
        assert kernel.calls == 2

    def test_a_process_that_is_still_testing_is_no_crash(self, kernel, cache):
        chosen()
        [file] = files(cache)
        file.unlink()
        for process in (1, os.getppid()):
            file.with_name(f"{file.stem}.running.{self_test._host()}.{process}").touch()
        assert self.again() is kernel

    def test_an_interruption_leaves_no_marker(self, table, cache):
        def interrupted(x):
            raise KeyboardInterrupt

        table(Kernel(interrupted))
        with pytest.raises(KeyboardInterrupt):
            chosen()
        assert [path for path in cache.rglob("*") if path.is_file()] == []


class TestBuild:
    def test_the_native_module_by_its_bytes(self, monkeypatch, tmp_path):
        native = pytest.importorskip("hedgespec._native")
        copy = tmp_path / "module.so"
        copy.write_bytes(Path(native.__file__).read_bytes())
        own = self_test.build_of("cpu")
        monkeypatch.setattr(native, "__file__", str(copy))
        assert self_test.build_of("cpu") == own == self_test.build_of("cuda")
        copy.write_bytes(copy.read_bytes() + b"\0")
        assert self_test.build_of("cpu") != own

    def test_triton_by_its_version_and_the_kernels_sources(self, monkeypatch, tmp_path):
        from hedgespec import triton_kernels

        for folder in triton_kernels.__path__:
            for source in Path(folder).glob("*.py"):
                (tmp_path / source.name).write_bytes(source.read_bytes())
        own = self_test.build_of("triton")
        monkeypatch.setattr(triton_kernels.__spec__, "submodule_search_locations", [str(tmp_path)])
        assert self_test.build_of("triton") == own
        (tmp_path / "verify.py").write_text("# another kernel\n")
        assert self_test.build_of("triton") != own
        monkeypatch.undo()
        monkeypatch.setattr(self_test, "_version", lambda package: "4.0")
        assert self_test.build_of("triton") != own

    def test_the_device(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        assert self_test.describe_device(torch.device("cuda", 1)) == "cuda: GPU 1, sm_90"


class TestCases:
    """The cases of every operation."""

    def test_every_operation_with_a_kernel_has_some(self):
        assert {operation for operation, _ in COMPILED} == backends._cases.keys()
        assert len(COMPILED) >= 14

    @pytest.mark.parametrize(("operation", "name"), MARKED)
    def test_right_kernels_pass(self, operation, name):
        """Where there is no GPU its kernels run in the interpreter and in the emulator."""
        implementation = backends._load(operation, name)
        if isinstance(implementation, ImportError):
            pytest.skip(str(implementation))
        if name == "triton" and operation == "evaluate" and not torch.cuda.is_available():
            pytest.skip("slow in the interpreter: test_evaluate_passes_in_tritons_interpreter")
        device = "cuda" if name in ("cuda", "triton") and torch.cuda.is_available() else "cpu"
        for dtype in [torch.float32] if name == "triton" else backends._table[operation][name].dtypes:
            reference = backends._load(operation, "reference")
            assert self_test.run(implementation, reference, backends._cases[operation], dtype, device) == self_test.Result(True)

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_evaluate_passes_in_tritons_interpreter(self, dtype):
        implementation = backends._load("evaluate", "triton")
        if isinstance(implementation, ImportError) or torch.cuda.is_available():
            pytest.skip("no interpreter")
        reference = backends._load("evaluate", "reference")
        assert self_test.run(implementation, reference, backends._cases["evaluate"], dtype).passed

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_no_uniform_of_verify_is_near_a_step(self, dtype):
        verify = importlib.import_module("hedgespec.ops.verify")

        def wide(value):
            return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

        accepted, recovered = set(), 0
        for case in backends._cases["verify"](dtype):
            options = {name: wide(value) for name, value in case.options.items()}
            target, tokens, draft, uniforms = map(wide, case.arguments)
            exact = verify.verify_reference(target, tokens, draft, uniforms, **options)
            accepted |= set(exact.accepted_length.tolist())
            recovered += int((exact.accepted_length < tokens.shape[1]).sum())
            for shift in (2e-4, -2e-4):
                moved = (uniforms + shift).clamp(0, 1 - 1e-9)
                got = verify.verify_reference(target, tokens, draft, moved, **options)
                assert torch.equal(got.tokens, exact.tokens), case.name
        assert {0, 1, 2} <= accepted  # drafts are rejected at several places
        assert recovered >= 5

    @pytest.mark.parametrize(
        ("operation", "mutate"),
        [
            ("evaluate", lambda run: lambda *a, **o: run(*a, **(o | {"lengths": None}))),
            ("evaluate", lambda run: lambda *a, **o: run(*a, **(o | {"target_threshold": None}))),
            ("evaluate", lambda run: lambda *a, **o: run(*a, **(o | {"drafter_temperature": 1.0}))),
            ("evaluate", lambda run: lambda *a, **o: run(*a, **(o | {"estimator": "exact"}))),
            ("evaluate", lambda run: lambda t, d, *a, **o: run(t, without_the_last(d), *a, **o)),
            ("evaluate", lambda run: lambda t, d, *a, **o: run(without_the_last(t), d, *a, **o)),
            ("verify", lambda run: lambda *a, **o: run(*a, **(o | {"lengths": None}))),
            ("verify", lambda run: lambda *a, **o: run(*a, **(o | {"draft_threshold": None}))),
            ("verify", lambda run: lambda *a, **o: run(*a, **(o | {"draft_temperature": 1.0}))),
            ("verify", lambda run: lambda t, *a, **o: run(without_the_last(t), *a, **o)),
            ("verify", lambda run: lambda t, d, q, u, **o: run(t, d, q, u.flip(-1), **o)),
            ("linear", lambda run: lambda x, w: run(without_the_last(x, 0), w)),
            ("stack_linear", lambda run: lambda x, w, h=None, **o: run(x, w, None if h is None else h.flip(0), **o)),
            ("stack_linear", lambda run: lambda x, *a, **o: run(without_the_last(x, 0), *a, **o)),
            ("stack_rms_norm", lambda run: lambda x, w, eps, which=None: run(x, w, 0.1, which)),
            ("swiglu", lambda run: lambda x: run(x.flip(-1))),
            ("rotary_append", lambda run: lambda q, f, p, *a: run(q, f, p + 1, *a)),
            ("rotary_append", lambda run: lambda q, f, p, s, k, v, *a: run(q, f, p, s, k, v.clone(), *a)),
        ],
    )
    def test_wrong_kernels_fail(self, operation, mutate):
        """The references, spoilt, stand for kernels that ignore an argument or the end of a row."""
        run = backends._load(operation, "reference")
        found = self_test.run(mutate(run), run, backends._cases[operation], torch.float32)
        assert not found.passed
        assert "Error" not in found.reason  # by its values

    def test_values_are_the_same_everywhere(self):
        """A kept result would not hold for other values: they may change with this file, on which it depends, alone."""
        assert self_test._hashed((4,), 0).tolist() == HASHED
        assert self_test.gridded(200, seed=3).unique().tolist() == [each / 8 for each in range(-16, 17) if each]
        values = scattered(1000, low=2, high=3)
        assert 2 <= values.min() < 2.01
        assert 2.99 < values.max() < 3


HASHED = [1793864133, 563776396, 341850096, 827157530]


def without_the_last(tensor, value=-torch.inf):
    tensor = tensor.clone()
    tensor[..., -1] = value
    return tensor


@pytest.mark.gpu
def test_a_first_call_under_capture_keeps_a_backend_that_may_be_captured():
    logits, tokens = torch.randn(1, 2, 33, device="cuda"), torch.zeros(1, 2, dtype=torch.int64, device="cuda")
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    warned = pytest.warns(UserWarning, match="evaluate is first called while a CUDA graph is captured")
    with warned, torch.cuda.graph(graph, stream=stream):
        captured = hedgespec.evaluate(logits, logits[None], tokens).scores
    graph.replay()
    eager = hedgespec.evaluate(logits, logits[None], tokens).scores
    torch.testing.assert_close(captured, eager, atol=1e-5, rtol=0)
    assert backends.resolve("evaluate", "auto", logits.device, logits.dtype) is not backends._load("evaluate", "reference")


class TestReport:
    def test_doctor_shows_results_and_fails_where_one_did(self, table, capsys, monkeypatch):
        table(Kernel(lambda x: 2 * x if x.dtype is torch.float32 else x))
        report = backends.report(self_tests=True)
        found = report["self_tests"]["double"]["cpu"]["cpu"]
        assert found["float32"] == "passed"
        assert found["bfloat16"].startswith("failed: numbers: result[0]")
        text = doctor.describe(report)
        assert "double        cpu        cpu     float32: passed" in text
        assert "double        cpu        cpu     bfloat16: failed: numbers" in text
        assert "1 self-test(s) failed" in text
        backends.forget()
        assert backends.report(self_tests=True)["self_tests"]["double"]["cpu"]["cpu"]["float32"] == "passed (cached)"
        assert cli.main(["doctor"]) == 1
        assert "1 self-test(s) of kernels failed: double cpu cpu bfloat16 failed" in capsys.readouterr().err
        monkeypatch.setenv(self_test.VARIABLE, "0")
        assert cli.main(["doctor"]) == 0
        assert "not tested: HEDGESPEC_SELF_TEST=0" in capsys.readouterr().out

    def test_the_cpu_backends_of_this_machine_pass(self):
        """Really run, as `hedgespec doctor` and the first request do."""
        if "cpu" not in backends.available("evaluate"):
            pytest.skip("the native module is not built")
        tests = backends.report(self_tests=True)["self_tests"]
        results = {operation: entries["cpu"]["cpu"] for operation, entries in tests.items() if "cpu" in entries}
        assert results.keys() == backends._cases.keys()
        assert {result for entries in results.values() for result in entries.values()} == {"passed"}
        for operation, entries in results.items():
            for dtype in entries:
                chosen = backends.resolve(operation, "auto", "cpu", getattr(torch, dtype))
                assert chosen is backends._load(operation, "cpu")

    def test_without_self_tests_none_runs(self, table):
        kernel = Kernel()
        table(kernel)
        assert "self_tests" not in backends.report()
        assert kernel.calls == 0
