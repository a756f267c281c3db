"""The products of N stacked heads in one call against one by one and against torch.bmm.

    pytest bench/bench_head_layers.py [--device cuda]

On the CPU the shapes are those of the zoo's seven heads, in float32; on a GPU those of seven heads over Llama-3.1-8B, in
bfloat16. The weights cycle through more than the caches hold, as they do from layer to layer of a round.
"""

from __future__ import annotations

import pytest
import torch
from conftest import BEYOND_CACHE
from torch.nn import functional

from hedgespec.ops.head_layers import stack_linear

HEADS = 7
SHAPES = {
    "cpu": {"fc": (576, 1728), "qkv": (960, 1152), "o": (576, 576), "gate_up": (2048, 576), "down": (576, 1024)},
    "cuda": {"fc": (4096, 12288), "qkv": (6144, 8192), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)},
}
"""Columns, inner."""
TABLE = {"cpu": (14_000, 4096, 576), "cuda": (128_256, 32_000, 4096)}
"""Rows of the shared output matrix, columns of each head, inner."""
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
LAYERS = ("fc", "qkv", "o", "gate_up", "down")


def copies(make, nbytes: int) -> list:
    """Equal inputs, enough of them to leave no cache warm: a turn of the benchmark takes each once."""
    return [make() for _ in range(max(1, -(-BEYOND_CACHE // nbytes)))]


def compared(benchmark, capsys, device, fastest, fastest_on, inputs, name, calls, expected):
    """Correct first, then the fastest time of each way over the inputs, the first of `calls` being ours."""
    tolerance = (3e-2 if expected.dtype is torch.bfloat16 else 1e-5) * expected.abs().max().item()
    for call in calls.values():
        torch.testing.assert_close(call(inputs[0]), expected, atol=tolerance, rtol=0)
    calls = calls | {"reading": lambda each: each[1].sum()}
    if device.type == "cuda":
        times = fastest_on(inputs, *calls.values())
    else:
        over = [lambda call=call: [call(each) for each in inputs] for call in calls.values()]
        times = [seconds / len(inputs) for seconds in fastest(*over)]
    own, *others = times
    benchmark.extra_info |= {"microseconds": round(own * 1e6, 1)}
    benchmark.extra_info |= {way: round(other / own, 2) for way, other in zip(list(calls)[1:], others)}
    with capsys.disabled():
        ratios = ", ".join(f"{way} {other / own:.2f}" for way, other in zip(list(calls)[1:], others))
        print(f"\n{name}: ours {own * 1e6:.0f} us; times that of ours: {ratios}")
    benchmark.pedantic(lambda: next(iter(calls.values()))(inputs[0]), rounds=2)


@pytest.mark.parametrize("rows", [1, 2, 6, 12, 24])
@pytest.mark.parametrize("layer", LAYERS)
def test_every_head(benchmark, capsys, device, fastest, fastest_on, layer, rows):
    torch.manual_seed(0)
    columns, inner = SHAPES[device.type][layer]
    options = dict(dtype=DTYPE[device.type], device=device)
    x = torch.randn(HEADS, rows, inner, **options)
    inputs = copies(lambda: (x, torch.randn(HEADS, columns, inner, **options)), HEADS * columns * inner * x.element_size())
    calls = {
        "ours": lambda each: stack_linear(*each, backend="cpu" if device.type == "cpu" else "auto"),
        "one by one": lambda each: torch.stack([functional.linear(own, weight) for own, weight in zip(*each)]),
        "bmm": lambda each: torch.bmm(each[0], each[1].transpose(1, 2)),
    }
    expected = stack_linear(*inputs[0], backend="reference")
    name = f"{HEADS} heads, {layer} {columns}x{inner}, {rows} rows each"
    compared(benchmark, capsys, device, fastest, fastest_on, inputs, name, calls, expected)


@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize("layer", LAYERS)
def test_rows_of_chosen_heads(benchmark, capsys, device, fastest, fastest_on, layer, rows):
    """A drafted token of each request of a batch; reading is of all heads' weights, whoever is chosen."""
    torch.manual_seed(0)
    columns, inner = SHAPES[device.type][layer]
    options = dict(dtype=DTYPE[device.type], device=device)
    x, which = torch.randn(rows, inner, **options), torch.randint(HEADS, (rows,))
    chosen, which = which.tolist(), which.to(device)
    inputs = copies(lambda: (x, torch.randn(HEADS, columns, inner, **options)), HEADS * columns * inner * x.element_size())
    calls = {
        "ours": lambda each: stack_linear(*each, which),
        "one by one": lambda each: torch.stack([functional.linear(x[r], each[1][head]) for r, head in enumerate(chosen)]),
        "bmm of copies": lambda each: torch.bmm(each[1][which], x[:, :, None])[:, :, 0],
    }
    expected = stack_linear(*inputs[0], which, backend="reference")
    name = f"{rows} rows of {len(set(chosen))} heads of {HEADS}, {layer} {columns}x{inner}"
    compared(benchmark, capsys, device, fastest, fastest_on, inputs, name, calls, expected)


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("chosen", [False, True], ids=["every head", "which"])
def test_shared_table(benchmark, capsys, device, fastest, fastest_on, rows, chosen):
    """Output matrices as rows of one table, against matrices of the heads' own; with `which` each row is of the next head."""
    torch.manual_seed(0)
    table_rows, columns, inner = TABLE[device.type]
    options = dict(dtype=DTYPE[device.type], device=device)
    index = torch.stack([torch.randperm(table_rows, device=device)[:columns].sort().values for _ in range(HEADS)])
    which = torch.arange(rows, device=device) % HEADS if chosen else None
    x = torch.randn(*(() if chosen else (HEADS,)), rows, inner, **options)
    inputs = copies(lambda: (x, torch.randn(table_rows, inner, **options)), table_rows * inner * x.element_size())
    inputs = [(x, table, table[index]) for x, table in inputs]
    calls = {
        "ours": lambda each: stack_linear(*each[:2], which, index=index),
        "whole table, then columns": lambda each: stack_linear(*each[:2], which, index=index, backend="reference"),
        "own matrices": lambda each: stack_linear(x, each[2], which),
        "own matrices one by one": (
            (lambda each: torch.stack([functional.linear(x[r], each[2][r % HEADS]) for r in range(rows)]))
            if chosen
            else (lambda each: torch.stack([functional.linear(a, b) for a, b in zip(x, each[2])]))
        ),
    }
    expected = stack_linear(*inputs[0][:2], which, index=index, backend="reference")
    name = f"{HEADS} heads over a table {table_rows}x{inner}, {columns} columns each, {rows} rows{' in all' if chosen else ''}"
    compared(benchmark, capsys, device, fastest, fastest_on, inputs, name, calls, expected)
