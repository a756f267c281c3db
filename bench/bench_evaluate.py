"""evaluate on the CPU against what one would write in torch: `pytest bench/bench_evaluate.py` (times per call).

Each shape first asserts that both give the same acceptance_prob, then times them in the same run and prints `speedup`:
torch's fastest call over ours, the two taking turns. Set OMP_NUM_THREADS to choose the threads.
"""

from __future__ import annotations

import pytest
import torch

from hedgespec.evaluate import evaluate

# drafters, positions, target vocabulary, draft vocabulary
SHAPES = [(7, 1, 49152, 4096), (7, 6, 49152, 4096), (7, 6, 49152, 49152), (7, 9, 151936, 151936)]


def eager(target_logits, drafter_logits, draft_to_target):
    target, draft = target_logits.softmax(-1), drafter_logits.softmax(-1)
    if draft_to_target is not None:
        ids = draft_to_target[:, None, None, :].expand_as(draft)
        target = target.expand(len(ids), -1, -1, -1).gather(-1, ids)
    return torch.minimum(target, draft).sum(-1)


def inputs(shape, dtype):
    drafters, positions, vocabulary, draft_vocabulary = shape
    torch.manual_seed(0)
    target_logits = (torch.randn(1, positions, vocabulary) * 3).to(dtype)
    drafter_logits = (torch.randn(drafters, 1, positions, draft_vocabulary) * 3).to(dtype)
    maps = torch.stack([torch.randperm(vocabulary)[:draft_vocabulary].sort().values for _ in range(drafters)])
    tokens = torch.randint(vocabulary, (1, positions))
    return target_logits, drafter_logits, tokens, None if draft_vocabulary == vocabulary else maps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "N{}-T{}-V{}-Vd{}".format(*shape))
def test_evaluate(benchmark, capsys, fastest, shape, dtype):
    target_logits, drafter_logits, tokens, maps = inputs(shape, dtype)

    def ours():
        return evaluate(target_logits, drafter_logits, tokens, draft_to_target=maps, backend="cpu")

    def torchs():
        return eager(target_logits, drafter_logits, maps)

    expected = eager(target_logits.double(), drafter_logits.double(), maps).float()
    torch.testing.assert_close(ours().acceptance_prob, expected, rtol=0, atol=5e-6)
    own_time, eager_time = fastest(ours, torchs)
    benchmark.extra_info["speedup"] = eager_time / own_time
    with capsys.disabled():
        print(
            f"\nN={shape[0]} T={shape[1]} V={shape[2]} Vd={shape[3]} {dtype}, {torch.get_num_threads()} thread(s): "
            f"cpu {own_time * 1e3:.3f} ms, torch eager {eager_time * 1e3:.3f} ms, speedup {eager_time / own_time:.2f}"
        )
    benchmark(ours)


def test_overhead_on_small_inputs(benchmark):
    """Validation, dispatch and launch: the whole call on logits too small to matter."""
    target_logits, drafter_logits, tokens, _ = inputs((7, 2, 64, 64), torch.float32)
    benchmark(evaluate, target_logits, drafter_logits, tokens, backend="cpu")
