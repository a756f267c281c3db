"""verify against the torch reference: `pytest bench/bench_verify.py`, on a GPU with `--device cuda` (times per call).

Each shape first asserts that all give the same tokens, then times them in the same run and prints `speedup`: the
reference's fastest call over a kernel's, taking turns. The kernel does not look past a rejection, so both ends are timed:
a draft rejected at its first token and one accepted whole. Set OMP_NUM_THREADS to choose the threads.
"""

from __future__ import annotations

import pytest
import torch

from hedgespec.ops import backends
from hedgespec.ops.verify import sample, verify

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
def test_verify(benchmark, capsys, device, fastest_on, shape, case, dtype):
    arguments = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in inputs(shape, dtype, case).items()
    }
    expected = verify(**arguments, backend="reference")
    assert expected.accepted_length.item() == (0 if "rejected" in case else DRAFT_LENGTH)
    own = {"cpu": ("cpu",)}.get(device.type, ("triton", "cuda"))
    kernels = [name for name in backends.available("verify") if name in own]
    assert kernels, f"no kernel for {device}"
    for name in kernels:
        assert torch.equal(verify(**arguments, backend=name).tokens, expected.tokens)

    def call(name):
        return lambda given: verify(**given, backend=name)

    torch_time, *times = fastest_on([arguments], *(call(name) for name in ("reference", *kernels)))
    for name, own_time in zip(kernels, times):
        benchmark.extra_info[f"{name}_speedup"] = round(torch_time / own_time, 3)
        with capsys.disabled():
            print(
                f"\nK={DRAFT_LENGTH} V={shape[0]} Vd={shape[1]} {str(dtype)[6:]}, {case}, {name}: {own_time * 1e3:.3f} ms, "
                f"{torch_time / own_time:.2f} x the torch reference ({torch_time * 1e3:.3f} ms)"
            )
    benchmark.pedantic(call(kernels[0]), args=(arguments,), rounds=5, warmup_rounds=1)


def test_overhead_on_small_inputs(benchmark, device):
    """Validation, dispatch and launch: the whole call on logits too small to matter."""
    arguments = inputs((64, 64), torch.float32, "sampled, all accepted")
    benchmark(verify, **{key: each.to(device) if isinstance(each, torch.Tensor) else each for key, each in arguments.items()})
