"""Random calls of the CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer.

    python tests/fuzz_native.py [--calls 100000] [--seed 0]

Builds the native module with GCC's sanitizers in a temporary folder and runs itself once more with their library loaded
first. Every call goes through the public functions, with shapes, strides, dtypes and values at the edges of what they
allow; results must be in range, and what the sanitizers find ends the run with their report. Needs cmake, ninja and g++.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1 -O1"


def build(folder: Path) -> Path:
    """The module with sanitizers, compiled for the same instruction sets as the one that is installed."""
    import pybind11

    subprocess.run(
        [
            "cmake", "-G", "Ninja", "-S", ROOT, "-B", folder, "-DCMAKE_BUILD_TYPE=None", f"-DCMAKE_CXX_FLAGS={FLAGS}",
            "-DHEDGESPEC_CUDA=OFF", f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    subprocess.run(["cmake", "--build", folder], check=True, stdout=subprocess.DEVNULL)
    return next(folder.glob("_native*.so"))


def load(path: Path) -> None:
    """Makes this build of the module the one that the package uses."""
    spec = importlib.util.spec_from_file_location("hedgespec._native", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["hedgespec._native"] = module
    spec.loader.exec_module(module)


def fuzz(calls: int, seed: int) -> None:
    import torch

    from hedgespec.ops.evaluate import MODES, evaluate
    from hedgespec.ops.head_layers import rotary_append, stack_linear, stack_rms_norm, swiglu
    from hedgespec.ops.linear import linear
    from hedgespec.ops.verify import verify

    torch.set_num_threads(2)
    rng = random.Random(seed)
    torch.manual_seed(seed)

    def size(*edges: int) -> int:
        return rng.choice(edges) if rng.random() < 0.5 else rng.randint(1, rng.choice((4, 70, 300)))

    def logits(*shape: int) -> torch.Tensor:
        """Exactly as large as needed, or a strided view whose end is the end of its memory."""
        offset, spread = rng.choice((0.0, 0.0, 1e4, -1e4, 3e37)), rng.choice((0.1, 3.0, 30.0, 1e4))
        tensor = (torch.randn(shape) * spread + offset).to(rng.choice((torch.float32, torch.bfloat16)))
        for _ in range(rng.choice((0, 0, 1, 2))):
            tensor[..., torch.rand(shape[-1]) < rng.random()] = -math.inf
        if rng.random() < 0.3:
            tensor = tensor.transpose(0, 1).contiguous().transpose(0, 1)
        if rng.random() < 0.1:
            tensor = tensor.repeat_interleave(2, -1)[..., 1::2]
        return tensor

    def temperature(batch: int):
        if rng.random() < 0.6:
            return rng.choice((0, 1.0, 0.7, 1e-30, 1e30, 1e-45))
        return torch.tensor([rng.choice((0.0, 1.0, 0.3, 1e-20, 1e20)) for _ in range(batch)])

    def threshold(values: torch.Tensor):
        if rng.random() < 0.7:
            return None
        return values.float().nan_to_num(neginf=-1e38).quantile(rng.random(), -1) if values.numel() < 1e6 else None

    def some_lengths(batch: int, longest: int):
        return None if rng.random() < 0.5 else torch.tensor([rng.randint(0, longest) for _ in range(batch)])

    def maps(count: int, draft: int, vocabulary: int) -> torch.Tensor:
        rows = torch.stack([torch.randperm(vocabulary)[:draft] for _ in range(count)])
        return rows.to(rng.choice((torch.int32, torch.int64)))

    def one_evaluate() -> None:
        drafters, batch, positions = rng.randint(1, 5), rng.randint(1, 3), rng.randint(1, 4)
        vocabulary = size(1, 2, 15, 16, 17, 63, 64, 65, 1023, 2047, 2048, 2049, 4100)
        draft = rng.randint(1, vocabulary) if rng.random() < 0.5 else None
        target_logits, drafter_logits = (
            logits(batch, positions, vocabulary),
            logits(drafters, batch, positions, draft or vocabulary),
        )
        tokens, lengths = torch.randint(vocabulary, (batch, positions)), some_lengths(batch, positions)
        if lengths is not None:
            tokens[torch.arange(positions) >= lengths[:, None]] = rng.choice((-1, 2**62))
        top_k = rng.choice((None, 1, 5, 32))
        result = evaluate(
            target_logits, drafter_logits, tokens, lengths=lengths,
            draft_to_target=None if draft is None else maps(drafters, draft, vocabulary),
            target_temperature=temperature(batch), drafter_temperature=temperature(batch),
            target_threshold=threshold(target_logits), drafter_threshold=threshold(drafter_logits),
            top_k=top_k, draft_length=rng.choice((None, 1, 3, 6)), estimator=rng.choice(("exact", "product")),
            mode=rng.choice(MODES if top_k else MODES[:2]), backend="cpu",
        )  # fmt: skip
        assert len(result.scores) == 4 + 2 * min(top_k or 0, draft or vocabulary)
        assert ((result.scores >= 0) & (result.scores <= 1)).all(), result.scores
        if top_k is not None:
            for of_prefixes in (result.top_k_acceptance_prob, result.top_k_acceptance_ratio):
                assert (of_prefixes.diff(dim=0) >= 0).all(), of_prefixes

    def one_verify() -> None:
        batch, draft_length = rng.randint(1, 3), rng.randint(0, 5)
        vocabulary = size(1, 2, 15, 16, 17, 64, 65, 1023, 1025, 2049, 4100)
        draft = rng.randint(1, vocabulary) if rng.random() < 0.5 else None
        target_logits = logits(batch, draft_length + 1, vocabulary)
        target_logits[..., rng.randrange(vocabulary)] = 0.0  # some mass in every row
        draft_logits = logits(batch, draft_length, draft or vocabulary)
        map_rows = rng.choice((1, batch))
        draft_to_target = None if draft is None else maps(map_rows, draft, vocabulary)[: 1 if map_rows == 1 else batch]
        if draft_to_target is not None and rng.random() < 0.2:
            draft_to_target[:] = draft_to_target[:, :1]  # ids that repeat add up
        lengths, tokens = some_lengths(batch, draft_length), torch.randint(vocabulary, (batch, draft_length))
        if lengths is not None:
            tokens[torch.arange(draft_length) >= lengths[:, None]] = -1
        uniforms = torch.rand(batch, draft_length + 1, dtype=rng.choice((torch.float32, torch.float64)))
        uniforms[torch.rand_like(uniforms) < 0.2] = 0.0
        uniforms = uniforms ** rng.choice((1, 8))
        verdict = verify(
            target_logits, tokens, draft_logits, uniforms, mode=rng.choice(("sampled", "argmax")), lengths=lengths,
            draft_to_target=draft_to_target if draft_to_target is None or len(draft_to_target) > 1 else draft_to_target[0],
            target_temperature=temperature(batch), draft_temperature=temperature(batch), backend="cpu",
        )  # fmt: skip
        most = torch.full((batch,), draft_length) if lengths is None else lengths
        assert ((verdict.accepted_length >= 0) & (verdict.accepted_length <= most)).all(), verdict
        emitted = torch.arange(draft_length + 1) <= verdict.accepted_length[:, None]
        assert ((verdict.tokens >= 0) == emitted).all() and (verdict.tokens < vocabulary).all(), verdict

    def one_linear() -> None:
        inner, columns = size(1, 7, 8, 9, 64), size(1, 15, 16, 17)
        linear(torch.randn(rng.randint(0, 17), inner), torch.randn(columns, inner), backend="cpu")

    def one_stack() -> None:
        heads, rows, columns, inner = rng.randint(1, 5), rng.randint(0, 9), size(1, 11, 12, 13), size(1, 7, 8, 9)
        which = torch.randint(heads, (rows,)) if rng.random() < 0.5 else None
        leading = (rows,) if which is not None else (heads, rows)
        x, index = torch.randn(*leading, inner), None
        if rng.random() < 0.2 and which is None:
            x = torch.randn(rows, inner).expand(heads, -1, -1)
        if rng.random() < 0.5:
            index = torch.randint(size(1, 300), (heads, columns))
            index = index.sort(-1).values if rng.random() < 0.7 else index
        weight = torch.randn(heads, columns, inner) if index is None else torch.randn(int(index.max()) + 1, inner)
        assert stack_linear(x, weight, which, index=index, backend="cpu").shape == (*leading, columns)
        stack_rms_norm(x, torch.randn(heads, inner), 1e-5, which, backend="cpu")
        swiglu(torch.randn(*leading, 2 * inner) * rng.choice((1, 1e3, 1e30)), backend="cpu")
        steps, batch, capacity, head_dim = (
            rng.randint(0, 5),
            rows + rng.randint(0, 2),
            rng.randint(5, 9),
            2 * rng.randint(1, 20),
        )
        attention_heads, kv_heads = rng.randint(1, 4), rng.randint(1, 3)
        keys, values = torch.zeros(2, heads, batch, kv_heads, capacity, head_dim)
        qkv = torch.randn(*leading, steps, (attention_heads + 2 * kv_heads) * head_dim)
        slots, frequency = torch.randint(capacity - steps + 1, (rows,)), torch.rand(head_dim // 2)
        rotary_append(qkv, frequency, slots * 1000, slots, keys, values, torch.randperm(batch)[:rows], which, backend="cpu")
        assert (values != 0).any(-1).sum() == qkv.numel() // qkv.shape[-1] * kv_heads

    start = time.monotonic()
    for call in range(calls):
        try:
            rng.choices((one_evaluate, one_verify, one_linear, one_stack), (6, 5, 1, 2))[0]()
        except Exception:
            print(f"call {call} of seed {seed}", file=sys.stderr)
            raise
        if (call + 1) % 10_000 == 0:
            print(f"{call + 1} calls, {time.monotonic() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--module", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.module:
        load(options.module)
        fuzz(options.calls, options.seed)
        return
    folder = Path(tempfile.mkdtemp())
    try:
        module = build(folder)
        compiler = shutil.which("g++") or "g++"
        library = subprocess.run([compiler, "-print-file-name=libasan.so"], check=True, capture_output=True, text=True)
        environment = os.environ | {
            "LD_PRELOAD": library.stdout.strip(),
            # Python itself leaks by design; and torch's allocator asks for memory it can do without.
            "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        }
        command = [sys.executable, __file__, f"--calls={options.calls}", f"--seed={options.seed}", f"--module={module}"]
        sys.exit(subprocess.run(command, env=environment, check=False).returncode)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
