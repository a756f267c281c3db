"""evaluate against what one would write instead, and against merely reading the logits.

    OMP_NUM_THREADS=2 pytest bench/bench_evaluate.py               on the CPU
    pytest bench/bench_evaluate.py --device cuda                   on a GPU: every GPU backend
    pytest bench/bench_evaluate.py -k goal                         the shapes that the project's goals name
    pytest bench/bench_evaluate.py -k candidates                   what the top-k scores add to a call
    pytest bench/bench_evaluate.py --benchmark-json FILE           figures; `python bench/table.py FILE` makes a table

Each shape first asserts that all give the same acceptance_prob, then times them in one run, taking turns:

    eager       torch, a drafter at a time: softmax, softmax, minimum, sum
    batched     torch, all drafters in one expression
    compiled    the batched one under torch.compile (where it is the question: the goal shapes)
    liger       Liger-Kernel's total variation distance on torch's softmaxes (where it runs: GPUs)
    reading     a sum of the logits on the CPU; on a GPU their bytes over the bandwidth of large reductions

`speedup` is the fastest of torch's over ours, `over_reading` our time over reading. The goal shapes are also run on a
peaked distribution, as a model's is; the kernels' time does not depend on the values.
"""

from __future__ import annotations

import functools

import pytest
import torch
from conftest import BEYOND_CACHE

from hedgespec.ops import backends
from hedgespec.ops.evaluate import evaluate

VOCABULARIES = (32000, 49152, 128256, 151936)
SWEEP = dict.fromkeys(
    [(7, 6, v, v) for v in VOCABULARIES]
    + [(n, 6, 49152, 49152) for n in (1, 2, 4, 16, 64)]
    + [(7, t, 49152, 49152) for t in (1, 2, 4, 9, 16)]
    + [(7, 1, 49152, 4096), (7, 6, 49152, 4096), (7, 6, 128256, 32000)]
)
"""drafters, positions, target vocabulary, draft vocabulary"""
GOALS = [(7, 6, 49152, 49152), (7, 9, 151936, 151936)]


def batched(target_logits, drafter_logits, _tokens, draft_to_target):
    target, draft = target_logits.float().softmax(-1), drafter_logits.float().softmax(-1)
    if draft_to_target is not None:
        ids = draft_to_target[:, None, None, :].expand_as(draft)
        target = target.expand(len(ids), -1, -1, -1).gather(-1, ids)
    return torch.minimum(target, draft).sum(-1)


def eager(target_logits, drafter_logits, _tokens, draft_to_target):
    target = target_logits.float().softmax(-1)
    scores = []
    for n, logits in enumerate(drafter_logits):
        kept = target if draft_to_target is None else target[..., draft_to_target[n]]
        scores.append(torch.minimum(kept, logits.float().softmax(-1)).sum(-1))
    return torch.stack(scores)


def liger(target_logits, drafter_logits, _tokens, _map):
    from liger_kernel.ops.tvd import LigerTVDLossFunction

    target = target_logits.float().softmax(-1).flatten(0, 1)
    scores = []
    for logits in drafter_logits:
        draft = logits.float().softmax(-1).flatten(0, 1)
        scores.append(1 - LigerTVDLossFunction.apply(draft, target, None, "none").sum(-1))
    return torch.stack(scores).view(drafter_logits.shape[:3])


def inputs(shape, dtype, device, spread=3.0):
    drafters, positions, vocabulary, draft_vocabulary = shape
    torch.manual_seed(0)
    target_logits = (torch.randn(1, positions, vocabulary) * spread).to(dtype)
    drafter_logits = (torch.randn(drafters, 1, positions, draft_vocabulary) * spread).to(dtype)
    maps = None
    if draft_vocabulary != vocabulary:
        maps = torch.stack([torch.randperm(vocabulary)[:draft_vocabulary].sort().values for _ in range(drafters)])
    given = (target_logits, drafter_logits, torch.randint(vocabulary, (1, positions)), maps)
    return tuple(each if each is None else each.to(device) for each in given)


def copies(given):
    """As many equal sets of inputs as it takes to leave no cache warm; one on the CPU, as it is in use."""
    size = given[0].nbytes + given[1].nbytes
    count = 1 if given[0].device.type == "cpu" else max(1, -(-BEYOND_CACHE // size))
    return [tuple(each if each is None else each.clone() for each in given) for _ in range(count)], size


def compare(shape, dtype, device, fastest_on, request, rivals, spread=3.0):
    given, size = copies(inputs(shape, dtype, device, spread))
    ours = {}
    for name in backends.available("evaluate"):
        if name != "reference" and (name == "cpu") == (device.type == "cpu"):
            ours[name] = functools.partial(call, name)
    assert ours, f"no kernel for {device}"
    wide = tuple(each if each is None or not each.is_floating_point() else each.double() for each in given[0])
    expected = batched(*wide) if wide[1].nbytes < 2**30 else batched(*given[0])
    for contender in (*ours.values(), *(functools.partial(star, rival) for rival in rivals.values())):
        torch.testing.assert_close(contender(given[0]).float(), expected.float(), rtol=0, atol=1e-5)

    named = ours | {name: functools.partial(star, rival) for name, rival in rivals.items()}
    if device.type == "cpu":
        named["reading"] = lambda each: (each[0].sum(), each[1].sum())
    times = dict(zip(named, fastest_on(given, *named.values())))
    if device.type != "cpu":
        times["reading"] = size / request.getfixturevalue("read_bandwidth")
    return given[0], ours, times, size


def call(backend, given):
    target_logits, drafter_logits, tokens, maps = given
    return evaluate(target_logits, drafter_logits, tokens, draft_to_target=maps, backend=backend).acceptance_prob


def star(function, given):
    return function(*given)


def report(shape, dtype, device, ours, times, size, rivals, benchmark, capsys):
    best = min(times[name] for name in rivals)
    for name in ours:
        figures = {
            "speedup": best / times[name],
            "over_reading": times[name] / times["reading"],
            "gigabytes_per_second": size / times[name] / 1e9,
        }
        benchmark.extra_info |= {f"{name}_{key}": round(value, 3) for key, value in figures.items()}
        where = f"{torch.get_num_threads()} thread(s)" if device.type == "cpu" else torch.cuda.get_device_name(device)
        line = f"N={shape[0]} T={shape[1]} V={shape[2]} Vd={shape[3]} {str(dtype)[6:]}, {where}, {name}: "
        line += f"{times[name] * 1e3:.3f} ms, {figures['speedup']:.2f} x the best of torch, "
        line += f"{figures['over_reading']:.2f} x the time of reading ({figures['gigabytes_per_second']:.0f} GB/s); "
        line += ", ".join(f"{rival} {times[rival] / times[name]:.2f}" for rival in rivals)
        with capsys.disabled():
            print("\n" + line)


def rivals_for(device, with_compiled, shape):
    rivals = {"eager": eager, "batched": batched}
    if with_compiled:
        rivals["compiled"] = torch.compile(batched, dynamic=False)
    if device.type == "cuda" and shape[2] == shape[3]:
        try:
            import liger_kernel  # noqa: F401
        except ImportError:
            pass
        else:
            rivals["liger"] = liger
    return rivals


def run(shape, dtype, device, fastest_on, request, benchmark, capsys, with_compiled, spread=3.0):
    rivals = rivals_for(device, with_compiled, shape)
    given, ours, times, size = compare(shape, dtype, device, fastest_on, request, rivals, spread)
    report(shape, dtype, device, ours, times, size, rivals, benchmark, capsys)
    first = next(iter(ours.values()))
    benchmark.pedantic(first, args=(given,), rounds=5, warmup_rounds=1)


def name_of(shape):
    return "N{}-T{}-V{}-Vd{}".format(*shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SWEEP, ids=name_of)
def test_sweep(benchmark, capsys, request, device, fastest_on, shape, dtype):
    run(shape, dtype, device, fastest_on, request, benchmark, capsys, with_compiled=False)


@pytest.mark.parametrize("spread", [3.0, 8.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", GOALS, ids=name_of)
def test_goal(benchmark, capsys, request, device, fastest_on, shape, dtype, spread):
    run(shape, dtype, device, fastest_on, request, benchmark, capsys, with_compiled=True, spread=spread)


@pytest.mark.parametrize("shape", GOALS, ids=name_of)
def test_candidates(benchmark, capsys, device, fastest_on, shape):
    """The scores of 1..k candidates over a call without: what looking for the likeliest adds."""
    given, _ = copies(inputs(shape, torch.bfloat16, device))
    target_logits, drafter_logits, tokens, _ = given[0]
    likeliest = drafter_logits.sort(dim=-1, descending=True, stable=True).indices[..., :32]
    mass = target_logits.float().softmax(-1).expand(drafter_logits.shape).gather(-1, likeliest).cumsum(-1).movedim(-1, 0)

    counts = (1, 4, 8, 32)
    for name in backends.available("evaluate"):
        if name == "reference" or (name == "cpu") != (device.type == "cpu"):
            continue
        found = evaluate(target_logits, drafter_logits, tokens, top_k=32, backend=name).top_k_acceptance_prob
        torch.testing.assert_close(found, mass, rtol=0, atol=1e-5)
        calls = [lambda each, k=k: evaluate(*each[:3], top_k=k, backend=name) for k in (None, *counts)]  # noqa: B023
        without, *times = fastest_on(given, *calls)
        ratios = {k: round(seconds / without, 3) for k, seconds in zip(counts, times)}
        benchmark.extra_info |= {f"{name}_top_{k}_over_none": ratio for k, ratio in ratios.items()}
        with capsys.disabled():
            line = ", ".join(f"top_k={k} {ratio:.2f}" for k, ratio in ratios.items())
            print(f"\n{name_of(shape)} {name}: {without * 1e3:.3f} ms without; times that: {line}")
    benchmark.pedantic(evaluate, args=(target_logits, drafter_logits, tokens), kwargs={"top_k": 4}, rounds=5, warmup_rounds=1)


def test_overhead_on_small_inputs(benchmark, capsys, device):
    """Validation, dispatch and launch: the whole call on logits too small to matter."""
    target_logits, drafter_logits, tokens, _ = inputs((7, 2, 64, 64), torch.float32, device)
    benchmark(evaluate, target_logits, drafter_logits, tokens)
    with capsys.disabled():
        print(f"\none call on small inputs: {benchmark.stats.stats.min * 1e6:.1f} us")
