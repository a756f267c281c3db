"""The CUDA kernels without a GPU: run by the emulator in tests/emulator against the reference, and compiled by nvcc.

What only a GPU can show (speed, the memory model of its copy engine) is left to `pytest -m gpu`.
"""

from __future__ import annotations

import ctypes
import itertools
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from hedgespec.ops import native
from hedgespec.ops.evaluate import evaluate_reference
from hedgespec.ops.verify import verify

HERE = Path(__file__).resolve().parent
EMULATOR, SOURCES = HERE / "emulator", HERE.parent / "csrc"
sys.path.insert(0, str(EMULATOR))

import build  # noqa: E402

CUDA_SOURCES = sorted(SOURCES.glob("*.cu"))
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")

pytest.importorskip("pybind11")
pytestmark = pytest.mark.skipif(not build.compiler(), reason="no C++ compiler")

INF = float("inf")

# Of the emulator: capability, multiprocessors, bytes of a block's shared memory, largest and smallest cluster. Between them
# they make the kernels go every way they have.
DEVICES = {
    "H200": "90,132,232448,16,1",
    "clusters of 1": "90,5,232448,1,1",
    "clusters of 2": "90,4,232448,2,2",
    "clusters of 4": "90,12,232448,4,4",
    "clusters of 8": "90,8,232448,8,8",
    "clusters of 16": "90,32,232448,16,16",
    "little shared memory": "90,8,36000,4,4",
    "A100": "80,108,166912,1,1",
}


class Emulated:
    """evaluate_cuda on CPU tensors, by a build of the emulator: the workspace has its exact size and must be left zeroed."""

    def __init__(self, threads: int | None = build.SMALL):
        self.module = build.module(threads)
        self.library = ctypes.CDLL(self.module.__file__)
        self.evaluate = native.evaluator(self.module, self.launch)

    def launch(self, parameters: object, device: torch.device) -> None:
        workspace = torch.zeros(self.module.evaluate_cuda_workspace_bytes(parameters), dtype=torch.uint8)
        self.module.evaluate_cuda(parameters, workspace.data_ptr(), 0)
        assert not workspace.any()

    @property
    def launched(self) -> tuple[int, int]:
        """Blocks, and blocks of a cluster, of the last launch."""
        return tuple((ctypes.c_int * 2).in_dll(self.library, "hedgespec_emulated_launch"))


@pytest.fixture(scope="session")
def emulated() -> Emulated:
    return Emulated()


@pytest.fixture(params=DEVICES.values(), ids=DEVICES.keys())
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HEDGESPEC_EMULATED_DEVICE", request.param)
    return request.param


def as_double(value: object) -> object:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def check(emulated: Emulated, *arguments: torch.Tensor, **options: object) -> None:
    """The kernel equals the reference in float64 on the same (already rounded) logits."""
    expected = evaluate_reference(*map(as_double, arguments), **{name: as_double(value) for name, value in options.items()})
    result = emulated.evaluate(*arguments, **options)
    for field in fields(expected):
        want, got = getattr(expected, field.name), getattr(result, field.name)
        assert (want is None) == (got is None), field.name
        if want is not None:
            torch.testing.assert_close(got.double(), want, rtol=0, atol=5e-6, equal_nan=True)


def example(drafters=2, batch=2, positions=3, vocabulary=333, draft_vocabulary=None, target=torch.float32, draft=torch.float32):
    """Random arguments; with `draft_vocabulary`, a map too."""
    arguments = [
        (torch.randn(batch, positions, vocabulary) * 3).to(target),
        (torch.randn(drafters, batch, positions, draft_vocabulary or vocabulary) * 3).to(draft),
        torch.randint(vocabulary, (batch, positions)),
    ]
    if draft_vocabulary is None:
        return arguments, {}
    maps = torch.stack([torch.randperm(vocabulary)[:draft_vocabulary] for _ in range(drafters)])
    arguments[2][0, 0] = maps[0, -1]
    return arguments, {"draft_to_target": maps.int()}


@pytest.mark.usefixtures("poisoned_empty")
class TestEvaluate:
    @pytest.mark.parametrize("vocabulary", [1, 2, 7, 8, 33, 1031, 4099])
    def test_vocabularies(self, emulated, device, vocabulary):
        arguments, options = example(vocabulary=vocabulary)
        check(emulated, *arguments, **options, top_k=min(3, vocabulary))

    @pytest.mark.parametrize("drafters", range(1, 10))
    def test_drafters(self, emulated, device, drafters):
        arguments, _ = example(drafters=drafters, positions=2, vocabulary=72)
        check(emulated, *arguments)

    def test_dtypes(self, emulated, device):
        for dtypes in itertools.product((torch.float32, torch.bfloat16, torch.float16), repeat=2):
            for vocabulary in (136, 137):
                arguments, _ = example(batch=1, positions=2, vocabulary=vocabulary, target=dtypes[0], draft=dtypes[1])
                check(emulated, *arguments, top_k=2)

    @pytest.mark.parametrize(("vocabulary", "draft_vocabulary"), [(37, 1), (37, 12), (37, 37), (1500, 1031), (700, 512)])
    def test_reduced_vocabularies(self, emulated, device, vocabulary, draft_vocabulary):
        arguments, options = example(vocabulary=vocabulary, draft_vocabulary=draft_vocabulary, draft=torch.bfloat16)
        for temperature in (1.0, 0.0):
            options |= {"target_temperature": temperature, "top_k": min(4, draft_vocabulary)}
            check(emulated, *arguments, **options)

    @pytest.mark.parametrize("target_temperature", [0.0, 0.7, torch.tensor([0.0, 1.3])])
    @pytest.mark.parametrize("drafter_temperature", [0.0, 2.0, torch.tensor([0.4, 0.0])])
    def test_temperatures(self, emulated, device, target_temperature, drafter_temperature):
        arguments, _ = example()
        arguments[2][:, ::2] = arguments[0].argmax(-1)[:, ::2]
        check(emulated, *arguments, target_temperature=target_temperature, drafter_temperature=drafter_temperature)

    @pytest.mark.parametrize("temperature", [1e-30, 1e30, 3e38])
    def test_extreme_temperatures(self, emulated, device, temperature):
        arguments, _ = example()
        check(emulated, *arguments, target_temperature=temperature, drafter_temperature=temperature)

    @pytest.mark.parametrize("temperature", [1e-45, 1e-38])
    def test_temperatures_past_the_range_of_float32_stay_finite(self, emulated, device, temperature):
        arguments, _ = example()
        result = emulated.evaluate(*arguments, target_temperature=temperature, drafter_temperature=temperature)
        assert ((result.scores >= 0) & (result.scores <= 1)).all()

    @pytest.mark.parametrize("shift", [-1e4, 1e4])
    def test_logits_of_any_size(self, emulated, device, shift):
        arguments, _ = example()
        check(emulated, arguments[0] + shift, arguments[1] + shift, arguments[2])

    def test_lowest_logits_are_masks_too(self, emulated, device):
        arguments, _ = example()
        lowest = torch.finfo(torch.float32).min
        arguments[0][..., ::2] = lowest
        arguments[1][..., 1::3] = lowest
        check(emulated, *arguments, top_k=5)

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_thresholds_and_minus_infinity(self, emulated, device, temperature):
        arguments, options = example(batch=3)
        arguments[0][..., ::3] = -INF
        arguments[1][..., 1::3] = -INF
        arguments[0][0, 0] = arguments[1][0, 1] = -INF  # rows without any mass
        options["target_threshold"] = arguments[0].topk(5, -1).values[..., -1]
        options["drafter_threshold"] = arguments[1].topk(3, -1).values[..., -1]
        options["target_threshold"][2, 0] = options["drafter_threshold"][0, 2, 1] = 100.0  # above every logit
        options |= {"target_temperature": temperature, "drafter_temperature": temperature}
        check(emulated, *arguments, **options, top_k=4)

    def test_ties_go_to_the_lowest_id(self, emulated, device):
        tied = torch.zeros(1, 1, 3000)
        tied[..., 100] = -1.0
        for token in (0, 1, 5, 2999):
            for temperature in (0.0, 1.0):
                temperatures = {"target_temperature": temperature, "drafter_temperature": 0.0}
                check(emulated, tied, tied[None], torch.tensor([[token]]), **temperatures, top_k=3)

    @pytest.mark.parametrize("top_k", [1, 7, 32])
    def test_candidates(self, emulated, device, top_k):
        arguments, _ = example(vocabulary=500)
        arguments[1] = arguments[1].round()  # with ties among and beyond the candidates
        arguments[2] = arguments[1][0].topk(top_k, -1).indices[..., -1]
        check(emulated, *arguments, top_k=top_k)
        check(emulated, *arguments, top_k=top_k, drafter_temperature=0.0)

    def test_ragged_rows_ignore_what_lies_past_their_length(self, emulated, device):
        arguments, options = example(batch=4, positions=5)
        options["lengths"] = torch.tensor([0, 2, 5, 1])
        past = torch.arange(5) >= options["lengths"][:, None]
        arguments[2][past] = 0
        expected = evaluate_reference(*map(as_double, arguments), **options, top_k=2, draft_length=2)
        arguments[0][past] = float("nan")
        arguments[1][:, past] = float("nan")
        arguments[2][past] = -1
        result = emulated.evaluate(*arguments, **options, top_k=2, draft_length=2)
        for field in fields(expected):
            got, want = getattr(result, field.name), getattr(expected, field.name)
            torch.testing.assert_close(got.double(), want, rtol=0, atol=5e-6, equal_nan=True)

    @pytest.mark.parametrize("token", [-1, -(2**62), 333, 2**40])
    def test_tokens_outside_of_the_vocabulary_are_no_addresses(self, emulated, device, token):
        arguments, _ = example()
        inside = emulated.evaluate(*arguments, top_k=3)
        arguments[2][:] = token
        outside = emulated.evaluate(*arguments, top_k=3)
        for ratio in ("acceptance_ratio", "argmax_acceptance_ratio", "top_k_acceptance_ratio"):
            assert (getattr(outside, ratio) == 0).all()
        for prob in ("acceptance_prob", "argmax_acceptance_prob", "top_k_acceptance_prob"):
            assert torch.equal(getattr(outside, prob), getattr(inside, prob))

    def test_lengths_outside_of_the_range_are_brought_into_it(self, emulated, device):
        arguments, _ = example(batch=3)
        wild = emulated.evaluate(*arguments, lengths=torch.tensor([-5, 2, 1 << 40]), draft_length=2)
        tame = emulated.evaluate(*arguments, lengths=torch.tensor([0, 2, 3]), draft_length=2)
        assert torch.equal(wild.acceptance_prob, tame.acceptance_prob)
        torch.testing.assert_close(wild.length_losses, tame.length_losses, rtol=0, atol=0, equal_nan=True)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("vocabulary", [200, 203])
    def test_rows_at_any_address(self, emulated, device, vocabulary, dtype):
        (target, draft, tokens), _ = example(vocabulary=vocabulary, target=dtype, draft=dtype)
        expected = emulated.evaluate(target, draft, tokens, top_k=3)
        for offset in (1, 3, 8):
            shifted = []
            for logits in (target, draft):
                wide = torch.full((*logits.shape[:-1], vocabulary + 13), float("nan"), dtype=dtype)
                wide[..., offset : offset + vocabulary] = logits
                shifted.append(wide[..., offset : offset + vocabulary])
            result = emulated.evaluate(*shifted, tokens, top_k=3)
            assert torch.equal(result.scores, expected.scores)

    @pytest.mark.parametrize(
        ("mode", "estimator", "draft_length"),
        [("sampled", "exact", 1), ("sampled", "product", 9), ("argmax", "exact", 3), ("top_k", "product", 3)],
    )
    def test_losses(self, emulated, device, mode, estimator, draft_length):
        arguments, _ = example(drafters=2, batch=3, positions=7, vocabulary=24)
        arguments[2] = arguments[0].argmax(-1)
        lengths = torch.tensor([7, 4, 0])
        options = {"mode": mode, "estimator": estimator, "draft_length": draft_length, "top_k": 3}
        check(emulated, *arguments, **options)
        check(emulated, *arguments, **options, lengths=lengths)

    def test_more_pairs_than_records(self, emulated, device):
        arguments, _ = example(drafters=5, batch=4, positions=9, vocabulary=16)
        check(emulated, *arguments, draft_length=4)

    @pytest.mark.parametrize("seed", range(3))
    def test_any_order_of_threads(self, emulated, device, seed, monkeypatch):
        monkeypatch.setenv("HEDGESPEC_EMULATED_SEED", str(seed + 1))
        arguments, options = example(drafters=3, vocabulary=900, draft_vocabulary=601, target=torch.bfloat16)
        check(emulated, *arguments, **options, top_k=3, draft_length=2)

    def test_launches_of_any_shapes_share_a_workspace(self, emulated, device):
        workspace = torch.zeros(1 << 20, dtype=torch.uint8)
        run = native.evaluator(emulated.module, lambda p, _: emulated.module.evaluate_cuda(p, workspace.data_ptr(), 0))
        for drafters, vocabulary, top_k in ((1, 3000, 5), (6, 40, 2), (2, 700, 32), (1, 3000, 5)):
            arguments, _ = example(drafters=drafters, vocabulary=vocabulary)
            options = {"top_k": top_k, "draft_length": 2}
            expected = evaluate_reference(*map(as_double, arguments), **options)
            losses = run(*arguments, **options).length_losses
            torch.testing.assert_close(losses.double(), expected.length_losses, rtol=0, atol=5e-6, equal_nan=True)


@pytest.mark.slow
def test_real_blocks(monkeypatch):
    """Blocks of as many threads as on a GPU; and the way each device and shape goes."""
    emulated = Emulated(threads=None)
    for name, vocabulary, cluster in (("clusters of 2", 20011, 2), ("clusters of 4", 40000, 4), ("A100", 9000, 1)):
        monkeypatch.setenv("HEDGESPEC_EMULATED_DEVICE", DEVICES[name])
        arguments, _ = example(batch=1, positions=1, vocabulary=vocabulary, target=torch.bfloat16)
        check(emulated, *arguments, top_k=3)
        assert emulated.launched[1] == cluster

    monkeypatch.setenv("HEDGESPEC_EMULATED_DRY", "1")

    def planned(description, drafters, batch, positions, vocabulary, dtype=1, draft_vocabulary=None, top_k=0):
        monkeypatch.setenv("HEDGESPEC_EMULATED_DEVICE", description)
        shape = (drafters, batch, positions, draft_vocabulary or vocabulary)
        nothing = (0, dtype, (0, 0, 0)), (0, dtype, (0, 0, 0, 0)), (0,) * 5, (1.0, 0), (1.0, 0)
        rest = (top_k, 0, False, 0, 0, 0, 0)
        parameters = emulated.module.EvaluateParams(shape, vocabulary, *itertools.chain(*nothing), *rest)
        emulated.module.evaluate_cuda(parameters, 0, 0)
        return emulated.launched

    h200 = DEVICES["H200"]
    assert planned("90,132,232448,8,1", 7, 1, 9, 151936) == (128, 8)  # what the comment at plan_clusters says
    assert planned(h200, 7, 1, 9, 151936) in ((128, 8), (128, 16))
    assert planned(h200, 7, 1, 9, 262144)[1] == 16  # a row that 8 blocks cannot hold
    assert planned("90,132,232448,8,1", 7, 1, 9, 262144)[1] == 1  # splits
    assert planned(h200, 7, 1, 9, 400000)[1] == 1  # a row that 16 blocks cannot hold
    assert planned(h200, 7, 1, 9, 128256, dtype=0)[1] in (8, 16)
    assert planned(h200, 7, 64, 9, 8192) == (132, 1)  # many short rows: no exchange pays
    for top_k in (8, 32):
        assert planned(h200, 9, 1, 9, 128256, draft_vocabulary=32000, top_k=top_k)[1] in (8, 16)
    assert planned("120,170,101376,8,1", 7, 1, 9, 49152)[1] == 8  # consumer Blackwell has less shared memory
    assert planned(DEVICES["A100"], 7, 1, 9, 151936) == (9 * 8 * 16, 1)


FAULTS = {  # of emulator/faults.cu: the sanitizer it takes, and what is said
    0: ("", "right"),
    1: ("", "not made of 16-byte units"),
    2: ("", "before any cluster barrier"),
    3: ("", "copy in flight"),
    4: ("address", "heap-buffer-overflow"),
    5: ("", "deadlock"),
    6: ("thread", "data race"),
    7: ("", "block that has ended"),
    8: ("thread", "data race"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_the_emulator_sees_faults(fault, tmp_path):
    sanitizer, message = FAULTS[fault]
    program = tmp_path / "faults"
    flags = ["-std=c++20", "-O1", "-x", "c++", "-Wno-unknown-pragmas", "-DHEDGESPEC_EMULATED", f"-DFAULT={fault}"]
    flags += [f"-I{EMULATOR}", f"-I{SOURCES}"] + ([f"-fsanitize={sanitizer}"] if sanitizer else [])
    subprocess.run([build.compiler(), *flags, EMULATOR / "faults.cu", "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert message in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="preloads the sanitizer's runtime")
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitizers(sanitizer):
    done = subprocess.run([sys.executable, EMULATOR / "sanitized.py", sanitizer], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the path")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", CUDA_SOURCES, ids=lambda source: source.name)
def test_kernels_compile_without_spills(source, architecture, tmp_path):
    flags = ["-std=c++20", "-O3", "-cubin", f"-arch={architecture}", "-Xptxas", "-v", "-o", str(tmp_path / "kernel.cubin")]
    done = subprocess.run(["nvcc", *flags, str(source)], capture_output=True, text=True, check=False)
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    figures = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert figures, report
    assert all(figure == ("0", "0", "0") for figure in figures), report


def misaligned(logits: torch.Tensor, offset: int) -> torch.Tensor:
    """The same logits, rows starting `offset` elements after a multiple of what a copy engine can address."""
    width = -(-(logits.shape[-1] + offset) // 16) * 16 + offset
    wide = torch.full((*logits.shape[:-1], width), torch.nan, dtype=logits.dtype)
    wide[..., offset : offset + logits.shape[-1]] = logits
    return wide[..., offset : offset + logits.shape[-1]]


@pytest.mark.parametrize("mapped", [False, True])
def test_verify_on_every_kind_of_device(device, mapped):
    """Uniforms away from every step, by the reference's own account: another rounding changes nothing."""
    generator = torch.Generator().manual_seed(0)
    for vocabulary in (33, 2111):
        draft_vocabulary = vocabulary // 2 if mapped else vocabulary
        target = torch.randn(6, 4, vocabulary, generator=generator)
        draft = torch.randn(6, 3, draft_vocabulary, generator=generator)
        ids = torch.randperm(vocabulary, generator=generator)[:draft_vocabulary] if mapped else None
        drawn = torch.randint(draft_vocabulary, (6, 3), generator=generator)
        arguments = dict(
            draft_tokens=drawn if ids is None else ids[drawn],
            uniforms=torch.rand(6, 4, generator=generator).double(),
            draft_to_target=ids,
            lengths=torch.tensor([3, 3, 3, 2, 1, 0]),
        )
        expected = verify(target.double(), draft_logits=draft.double(), **arguments, backend="reference")
        for offset in (0, 3):
            verdict = verify(misaligned(target, offset), draft_logits=misaligned(draft, offset), **arguments, backend="cuda")
            assert torch.equal(verdict.tokens, expected.tokens)
            assert torch.equal(verdict.accepted_length, expected.accepted_length)
