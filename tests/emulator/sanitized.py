"""The CUDA kernels under a sanitizer: address,undefined for addresses, thread for races.

    python tests/emulator/sanitized.py address,undefined
    python tests/emulator/sanitized.py thread

Without torch, whose threads a sanitizer would watch too: a script of its own, which the tests run. It starts itself again with
the sanitizer's runtime preloaded. `evaluate` is compared with the CPU's kernel of the same build.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import build
import numpy as np

DEVICES = {  # of the emulator: capability, multiprocessors, bytes of shared memory, largest and smallest cluster
    "clusters of 1": "90,3,232448,1,1",
    "clusters of 2": "90,4,232448,2,2",
    "clusters of 8": "90,16,232448,8,8",
    "clusters of 4, little shared memory": "90,8,32000,4,4",
    "splits": "80,108,166912,1,1",
}


def address(array: np.ndarray | None) -> int:
    return 0 if array is None else array.ctypes.data


def narrowed(logits: np.ndarray, dtype: int) -> np.ndarray:
    """float32 as the bits of one of the kernels' dtypes: float32, bfloat16, float16."""
    if dtype == 1:
        return (logits.view(np.uint32) >> 16).astype(np.uint16)
    return logits.astype(np.float16).view(np.uint16) if dtype == 2 else logits


class Case:
    """Arguments of one evaluation, kept alive, each in memory of its exact size."""

    def __init__(
        self,
        drafters,
        batch,
        positions,
        vocabulary,
        draft_vocabulary=None,
        dtypes=(0, 0),
        top_k=0,
        draft_length=0,
        ragged=False,
        thresholds=False,
        offset=0,
    ):
        random = np.random.default_rng(0)
        self.shape = (drafters, batch, positions, draft_vocabulary or vocabulary)
        self.vocabulary, self.dtypes, self.top_k, self.draft_length = vocabulary, dtypes, top_k, draft_length
        self.logits = []
        for shape, dtype in (((batch, positions, vocabulary), dtypes[0]), (self.shape, dtypes[1])):
            values = narrowed((random.standard_normal(int(np.prod(shape))) * 3).astype(np.float32), dtype)
            shifted = np.empty(values.size + offset, values.dtype)  # rows that begin at odd addresses
            shifted[offset:] = values
            self.logits.append(shifted[offset:])
        self.lengths = np.arange(batch, dtype=np.int64) % (positions + 1) if ragged else None
        self.tokens = random.integers(vocabulary, size=(batch, positions))
        if ragged:
            self.tokens[np.arange(positions) >= self.lengths[:, None]] = -1
        self.map = None
        if draft_vocabulary:
            maps = [random.permutation(vocabulary)[:draft_vocabulary] for _ in range(drafters)]
            self.map = np.stack(maps).astype(np.int32)
        self.thresholds = None
        if thresholds:
            shapes = (batch, positions), self.shape[:3]
            self.thresholds = [random.standard_normal(shape).astype(np.float32) for shape in shapes]
        self.temperatures = [np.linspace(0, 2, batch, dtype=np.float32), np.linspace(1, 0, batch, dtype=np.float32)]

    def run(self, module, launch):
        drafters, batch, positions, draft_vocabulary = self.shape
        planes = np.full((4 + 2 * self.top_k, drafters, batch, positions), np.nan, np.float32)
        whole = np.full((drafters, batch), -1, np.float32)
        losses = np.full((drafters, batch, positions, self.draft_length), -1, np.float32)
        vocabulary = self.vocabulary
        parameters = module.EvaluateParams(
            self.shape,
            vocabulary,
            address(self.logits[0]),
            self.dtypes[0],
            (positions * vocabulary, vocabulary, 1),
            address(self.logits[1]),
            self.dtypes[1],
            (batch * positions * draft_vocabulary, positions * draft_vocabulary, draft_vocabulary, 1),
            address(self.tokens),
            address(self.lengths),
            address(self.map),
            address(self.thresholds and self.thresholds[0]),
            address(self.thresholds and self.thresholds[1]),
            0.0,
            address(self.temperatures[0]),
            0.0,
            address(self.temperatures[1]),
            self.top_k,
            self.draft_length,
            False,
            2 + 2 * self.top_k if self.top_k else 0,  # losses are made of what the last lane of many writes
            address(planes),
            address(whole) if self.draft_length else 0,
            address(losses) if self.draft_length else 0,
        )
        launch(parameters)
        return planes, whole, losses


HALVES = {"dtypes": (1, 1), "top_k": 5, "draft_length": 2, "ragged": True, "thresholds": True}
REDUCED = {"draft_vocabulary": 777, "dtypes": (1, 0), "top_k": 3, "draft_length": 3}
CASES = {
    "plain": {"vocabulary": 1031, "drafters": 3, "batch": 2, "positions": 3},
    "halves, everything": {"vocabulary": 1200, "drafters": 2, "batch": 3, "positions": 3} | HALVES,
    "reduced vocabulary": {"vocabulary": 1500, "drafters": 4, "batch": 2, "positions": 2} | REDUCED,
    "odd addresses": {"vocabulary": 777, "drafters": 2, "batch": 2, "positions": 2, "dtypes": (0, 1), "offset": 3},
    "many pairs": {"vocabulary": 40, "drafters": 9, "batch": 4, "positions": 9, "draft_length": 4, "top_k": 2},
}


def evaluate(module) -> None:
    for (device, description), (name, arguments) in itertools.product(DEVICES.items(), CASES.items()):
        os.environ["HEDGESPEC_EMULATED_DEVICE"] = description
        case = Case(**arguments)

        def launch(parameters):
            workspace = np.zeros(max(module.evaluate_cuda_workspace_bytes(parameters), 1), np.uint8)
            module.evaluate_cuda(parameters, address(workspace), 0)
            assert not workspace.any(), "the workspace is not left zeroed"

        planes, whole, losses = case.run(module, launch)
        case.draft_length = 0
        expected, _, _ = case.run(module, lambda parameters: module.evaluate_cpu(parameters, 1))
        error = np.abs(planes - expected).max()
        assert error < 5e-6, f"{device}, {name}: off by {error}"
        assert not (whole == -1).any() or not arguments.get("draft_length"), "losses that nobody wrote"
        assert not (losses == -1).any(), "losses that nobody wrote"
        print(f"evaluate, {device}: {name}", flush=True)


def main() -> None:
    (sanitizer,) = sys.argv[1:]
    if "HEDGESPEC_SANITIZED" in os.environ:
        evaluate(build.module(sanitize=sanitizer))
        return
    build.build(sanitizer)
    names = {"address,undefined": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}[sanitizer]
    paths = [subprocess.check_output([build.compiler(), f"-print-file-name={name}"], text=True).strip() for name in names]
    environment = os.environ | {
        "HEDGESPEC_SANITIZED": "1",
        "LD_PRELOAD": " ".join(paths),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1 report_thread_leaks=0",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    sys.exit(subprocess.run([sys.executable, Path(__file__), sanitizer], env=environment).returncode)


if __name__ == "__main__":
    main()
