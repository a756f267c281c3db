"""The CUDA kernels where there is no GPU: compiled they do not spill, and emulated they hold on every kind of device.

That they compute the right thing is tested with all other backends, in test_evaluate.py and test_verify.py; here are the
choices that only they have: cluster sizes, rings of shared memory, the path without clusters, alignment.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import HAS_GPU, TOLERANCES

from hedgespec.evaluate import evaluate
from hedgespec.verify import verify

CSRC = Path(__file__).parent.parent / "csrc"
SOURCES = sorted(CSRC.glob("*.cu"))
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")

emulated = pytest.mark.skipif(HAS_GPU or shutil.which("g++") is None, reason="needs g++, and no GPU")


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[tuple[str, str], str]:
    """What the compiler says of every source for every architecture."""
    folder = tmp_path_factory.mktemp("cubin")

    def compile_one(source: Path, architecture: str) -> str:
        output = folder / f"{source.stem}.{architecture}.cubin"
        flags = ["-std=c++20", "-O3", "-cubin", f"-arch={architecture}", "-Xptxas", "-v"]
        done = subprocess.run(["nvcc", *flags, str(source), "-o", str(output)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    jobs = [(source, architecture) for source in SOURCES for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(2) as pool:
        texts = pool.map(lambda job: compile_one(*job), jobs)
        return {(source.name, architecture): text for (source, architecture), text in zip(jobs, texts)}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the path")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", [source.name for source in SOURCES])
def test_kernels_compile_without_spills(reports, source, architecture):
    report = reports[source, architecture]
    figures = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert figures, report
    assert all(figure == ("0", "0", "0") for figure in figures), report


def device(
    monkeypatch, capability=90, processors=132, shared_bytes=232448, largest_cluster=16, smallest_cluster=1, seed=0
) -> None:
    description = (capability, processors, shared_bytes, largest_cluster, smallest_cluster)
    monkeypatch.setenv("HEDGESPEC_EMULATED_DEVICE", ",".join(map(str, description)))
    monkeypatch.setenv("HEDGESPEC_EMULATED_SEED", str(seed))


DEVICES = {
    "h200": dict(),
    "ampere": dict(capability=80, processors=108, shared_bytes=166912, largest_cluster=1),
    "ada": dict(capability=89, processors=20, shared_bytes=101376, largest_cluster=1),
    "clusters of 2": dict(largest_cluster=2, smallest_cluster=2),
    "clusters of 4": dict(largest_cluster=4, smallest_cluster=4),
    "clusters of 8": dict(largest_cluster=8, smallest_cluster=8),
    "few processors": dict(processors=4),
    "blackwell": dict(capability=100, processors=148),
    "another order": dict(seed=7),
    "ampere, another order": dict(capability=80, largest_cluster=1, shared_bytes=166912, seed=11),
}


def misaligned(logits: torch.Tensor, offset: int) -> torch.Tensor:
    """The same logits, rows starting `offset` elements after a multiple of what a copy engine can address."""
    width = -(-(logits.shape[-1] + offset) // 16) * 16 + offset
    wide = torch.full((*logits.shape[:-1], width), torch.nan, dtype=logits.dtype)
    wide[..., offset : offset + logits.shape[-1]] = logits
    return wide[..., offset : offset + logits.shape[-1]]


@emulated
@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("mapped", [False, True])
def test_evaluate_on_every_kind_of_device(monkeypatch, poisoned_empty, kind, mapped):
    device(monkeypatch, **DEVICES[kind])
    generator = torch.Generator().manual_seed(0)
    for vocabulary, drafters, dtype in ((33, 9, torch.float32), (2111, 3, torch.bfloat16), (4800, 2, torch.float16)):
        draft_vocabulary = vocabulary // 2 if mapped else vocabulary
        target = (3 * torch.randn(2, 3, vocabulary, generator=generator)).to(dtype)
        draft = (3 * torch.randn(drafters, 2, 3, draft_vocabulary, generator=generator)).to(dtype)
        options = dict(lengths=torch.tensor([3, 2]), top_k=3, draft_length=2)
        if mapped:
            maps = [torch.randperm(vocabulary, generator=generator)[:draft_vocabulary] for _ in range(drafters)]
            options["draft_to_target"] = torch.stack(maps)
        tokens = torch.randint(vocabulary, (2, 3), generator=generator)
        expected = evaluate(target.double(), draft.double(), tokens, **options, backend="reference")
        for offset in (0, 1, 5):
            given = misaligned(target, offset), misaligned(draft, offset)
            result = evaluate(*given, tokens, **options, backend="cuda")
            torch.testing.assert_close(result.scores.double(), expected.scores, rtol=0, atol=TOLERANCES[dtype])
            for field in ("expected_accepted_length", "length_losses"):
                ours, theirs = getattr(result, field).double(), getattr(expected, field)
                torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5, equal_nan=True)


@emulated
@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("mapped", [False, True])
def test_verify_on_every_kind_of_device(monkeypatch, kind, mapped):
    """Uniforms away from every step, by the reference's own account: another rounding changes nothing."""
    device(monkeypatch, **DEVICES[kind])
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
