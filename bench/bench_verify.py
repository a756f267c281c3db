"""verify on the CPU against the torch reference: `pytest bench/bench_verify.py` (times per call).

Each shape first asserts that both give the same tokens, then times them in the same run and prints `speedup`: the
reference's fastest call over ours, the two taking turns. The kernel does not look past a rejection, so both ends are timed:
a draft rejected at its first token and one accepted whole. Set OMP_NUM_THREADS to choose the threads.
"""

from __future__ import annotations

import pytest
import torch

from hedgespec.verify import sample, verify

DRAFT_LENGTH = 5
SHAPES = [(49152, 4096), (49152, 49152), (151936, 151936)]  # target vocabulary, draft vocabulary
CASES = {"sampled, all accepted": (1.0, 0.0), "sampled, rejected at once": (1.0, 1 - 2.0**-53), "temperature 0": (0, 0.5)}


def inputs(shape, dtype, case):
    """A drafter close to the target; one whose first token the target finds less likely than the drafter does."""
    vocabulary, draft_vocabulary = shape
    temperature, uniform = CASES[case]
    torch.manual_seed(1)
    target_logits = torch.randn(1, DRAFT_LENGTH + 1, vocabulary) * 3
    known = torch.randperm(vocabulary)[:draft_vocabulary].sort().values
    draft_logits = target_logits[:, :DRAFT_LENGTH, known] + torch.randn(1, DRAFT_LENGTH, draft_vocabulary)
    target_logits, draft_logits = target_logits.to(dtype), draft_logits.to(dtype)
    tokens = known[sample(draft_logits, torch.rand(1, DRAFT_LENGTH))]
    if temperature == 0:
        tokens = target_logits[:, :-1].argmax(-1)
    elif uniform > 0:
        gain = draft_logits[0, 0].float() - target_logits[0, 0, known].float()
        tokens[0, 0] = known[torch.where(gain > 3, draft_logits[0, 0].float(), -torch.inf).argmax()]
    uniforms = torch.full((1, DRAFT_LENGTH + 1), uniform, dtype=torch.float64)
    uniforms[0, -1] = 0.6
    return dict(
        target_logits=target_logits,
        draft_tokens=tokens,
        draft_logits=draft_logits,
        uniforms=uniforms,
        draft_to_target=None if draft_vocabulary == vocabulary else known,
        target_temperature=temperature,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "V{}-Vd{}".format(*shape))
def test_verify(benchmark, capsys, fastest, shape, case, dtype):
    arguments = inputs(shape, dtype, case)
    expected = verify(**arguments, backend="reference")
    assert expected.accepted_length.item() == (0 if "rejected" in case else DRAFT_LENGTH)
    assert torch.equal(verify(**arguments, backend="cpu").tokens, expected.tokens)

    def ours():
        return verify(**arguments, backend="cpu")

    own_time, torch_time = fastest(ours, lambda: verify(**arguments, backend="reference"))
    benchmark.extra_info["speedup"] = torch_time / own_time
    with capsys.disabled():
        print(
            f"\nK={DRAFT_LENGTH} V={shape[0]} Vd={shape[1]} {dtype}, {case}, {torch.get_num_threads()} thread(s): "
            f"cpu {own_time * 1e3:.3f} ms, torch reference {torch_time * 1e3:.3f} ms, speedup {torch_time / own_time:.2f}"
        )
    benchmark(ours)


def test_overhead_on_small_inputs(benchmark):
    """Validation, dispatch and launch: the whole call on logits too small to matter."""
    benchmark(verify, **inputs((64, 64), torch.float32, "sampled, all accepted"), backend="cpu")
