"""The target's forward over the few tokens of a round, in turn: plain transformers, the session's view of the model, captured
(compiled layers on a CPU, CUDA graphs on a GPU), on a CPU in one native call, and the reading of all weights.

    python bench/bench_target.py --tokens 1 2 6 --batch 1 4 [--device cuda] [--dtype bfloat16] [--json FILE]

Correctness is asserted first. Times are milliseconds of one forward, the fastest and the median; ratios are within one run.
With --clock cpu they are the process's own time on the processor, which neighbours disturb less: set OMP_NUM_THREADS=1. The
first captured forward, with all that leads to it, is timed too; a second run shows what inductor's cache on disk saves.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from transformers import StaticCache

from hedgespec.ops.linear import few_row_view
from hedgespec.runtime.compat import cache_argument
from hedgespec.runtime.native_forward import NativeForward, available
from hedgespec.runtime.target import Captures, TargetSession
from hedgespec.zoo.target import load_target

TOLERANCE = {"float32": 1e-3, "bfloat16": 1.0}
"""Largest difference of a logit; bfloat16 keeps 8 bits of logits near 30."""
INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
"""By the weights' dtype, as what they are read: the largest of integers is found at the speed of memory."""


@torch.no_grad()
def measure(model, batch: int, count: int, prompt: int, rounds: int, clock, tolerance: float, captured: bool) -> dict:
    device, random = model.device, torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    ids = torch.randint(vocabulary, (batch, prompt), generator=random).to(device)
    tokens = torch.randint(vocabulary, (batch, count), generator=random).to(device)

    def synchronised(function):
        began = clock()
        found = function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return found, 1e3 * (clock() - began)

    past = StaticCache(model.config, max_cache_len=2 * prompt)
    with_cache = {cache_argument(model.forward): past, "use_cache": True}
    model(ids, **with_cache)

    def plain():
        logits = model(tokens, **with_cache).logits
        for layer in past.layers:
            layer.cumulative_length.sub_(count)
        return logits

    views = {"view": {}, "captured": {"captures": Captures(count)} if captured else None}
    views["native"] = {"native": NativeForward(model)} if device.type == "cpu" and available() else None
    sessions = {name: TargetSession(few_row_view(model), [], batch, **how) for name, how in views.items() if how is not None}
    for session in sessions.values():
        session.forward(ids, 1)
        session.keep([prompt] * batch)
    ways = {"plain": plain, **{name: partial(one.forward, tokens, count) for name, one in sessions.items()}}
    expected, row = plain(), {"batch": batch, "tokens": count}
    if captured:
        row["first_captured_s"] = synchronised(ways["captured"])[1] / 1e3
        assert sessions["captured"].captured is not None, "the target was not captured"
    for name, way in ways.items():
        error = (way() - expected).abs().max().item()
        assert error < tolerance, f"{name}: logits differ by {error}"
    ways["reading"] = lambda: [weight.view(INTEGERS[weight.dtype]).max() for weight in model.parameters()]
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(synchronised(way)[1])
    for name, found in times.items():
        row |= {f"{name}_ms": min(found), f"{name}_median_ms": statistics.median(found)}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 6, 8])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--prompt", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--captured", action="store_true", help="on a CPU too, where it takes seconds to compile")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model, _ = load_target(dtype=options.dtype, device=options.device)
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[options.clock]
    rows, threads = [], torch.get_num_threads()
    print(f"torch {torch.__version__}, {options.device}, {options.dtype}, {threads} threads, {options.clock} clock")
    print("rows tokens | ms: fastest (median) of each way | native: x reading, x view, x plain (fastest)")
    for batch in options.batch:
        for count in options.tokens:
            captured = options.captured or options.device != "cpu"
            row = measure(
                model, batch, count, options.prompt, options.rounds, clock, TOLERANCE[options.dtype], captured
            )  # fmt: skip
            rows.append(row)
            names = [name.removesuffix("_median_ms") for name in row if name.endswith("_median_ms")]
            ms = ", ".join(f"{name} {row[f'{name}_ms']:.1f} ({row[f'{name}_median_ms']:.1f})" for name in names)
            best = "native" if "native" in names else "captured"
            ratios = ", ".join(f"{row[f'{best}_ms'] / row[f'{name}_ms']:.2f}" for name in ("reading", "view", "plain"))
            print(f"{batch:4} {count:6} | {ms} | {ratios}", flush=True)
    if options.json:
        recorded = {"threads": threads, "clock": options.clock, "dtype": options.dtype, "rows": rows}
        options.json.write_text(json.dumps(recorded, indent=2) + "\n")


if __name__ == "__main__":
    main()
