"""The few-row product on the CPU against torch's: `pytest bench/bench_linear.py`. Set OMP_NUM_THREADS to choose the threads.

The weights cycle through more matrices than the caches hold, as in a forward of a model, so that they come from memory.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from hedgespec.ops.linear import linear

SHAPES = [(576, 576), (1536, 576), (576, 1536), (4096, 576), (49152, 576)]
"""columns, inner: the zoo's target, and a head's output rows."""
BYTES = 100_000_000


@pytest.mark.parametrize("rows", [1, 2, 4, 6, 8, 16, 24])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "{}x{}".format(*shape))
def test_linear(benchmark, capsys, fastest, shape, rows):
    torch.manual_seed(0)
    weights = [torch.randn(shape) for _ in range(max(1, BYTES // (4 * shape[0] * shape[1])))]
    x = torch.randn(rows, shape[1])
    torch.testing.assert_close(linear(x, weights[0], backend="cpu"), functional.linear(x, weights[0]), atol=1e-3, rtol=1e-4)

    def ours():
        for weight in weights:
            linear(x, weight, backend="cpu")

    def torchs():
        for weight in weights:
            functional.linear(x, weight)

    def reading():
        for weight in weights:
            weight.sum()

    own, library, floor = fastest(ours, torchs, reading)
    benchmark.extra_info |= {"speedup": library / own, "over_reading": own / floor}
    with capsys.disabled():
        print(f"\n{rows} rows, weight {shape}: {library / own:.2f} x torch's speed, {own / floor:.2f} x the time of reading")
    benchmark.pedantic(ours, rounds=2)
