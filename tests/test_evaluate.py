"""Evaluation: every backend equals loops written from the definitions, and the exact estimator is exact."""

from __future__ import annotations

import inspect
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import GPU_BACKENDS, HAS_GPU, TOLERANCES, anywhere
from hypothesis import given, settings
from hypothesis import strategies as st

from hedgespec import evaluate as public_evaluate
from hedgespec.ops import backends
from hedgespec.ops.evaluate import evaluate_reference, expected_accepted_length, length_loss, multi_draft_acceptance
from hedgespec.records import Evaluation

evaluate = anywhere(public_evaluate)

INF = math.inf
FIELDS = ("acceptance_prob", "acceptance_ratio", "argmax_acceptance_prob", "argmax_acceptance_ratio")


# The definitions once more, in loops over Python floats: what this file trusts.


def distribution(logits: list[float], temperature: float, threshold: float) -> list[float]:
    kept = [logit if logit >= threshold else -INF for logit in logits]
    highest = max(kept)
    if highest == -INF:
        return [0.0] * len(kept)
    if temperature == 0:
        return [1.0 if i == kept.index(highest) else 0.0 for i in range(len(kept))]
    weights = [math.exp((logit - highest) / temperature) for logit in kept]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def score(target, draft, draft_logits: list[float], token: int, ids: list[int], top_k: int) -> tuple[float, ...]:
    """The 4 + 2 top_k numbers of one drafter at one position; draft id j means target id ids[j]; masked draft logits are
    -inf."""
    if not any(target) or not any(draft):
        return (0.0,) * (4 + 2 * top_k)
    spread = dict(zip(ids, draft, strict=True))
    draft_prob, target_prob = spread.get(token, 0.0), target[token]
    ratio = min(1.0, draft_prob / target_prob) if target_prob else float(draft_prob > 0)
    proposal = ids[draft_logits.index(max(draft_logits))]
    prob = math.fsum(min(target[v], q) for v, q in spread.items())
    order = sorted(range(len(ids)), key=lambda i: (-draft_logits[i], i))
    in_trees = []
    for count in range(1, top_k + 1):
        candidates = [ids[i] for i in order[:count] if draft_logits[i] > -INF]
        in_trees += [math.fsum(target[v] for v in candidates), float(token in candidates)]
    return prob, ratio, target[proposal], float(token == proposal), *in_trees


def brute_force(target_logits, drafter_logits, tokens, **options) -> torch.Tensor:
    """`evaluate` by the loops above; float64 [4 + 2k, N, B, T]."""
    drafters, batch, positions, draft_vocabulary = drafter_logits.shape
    top_k = min(options.get("top_k") or 0, draft_vocabulary)
    lengths = options.get("lengths")
    temperatures = [
        torch.as_tensor(options.get(f"{side}_temperature", 1.0), dtype=torch.float64).expand(batch).tolist()
        for side in ("target", "drafter")
    ]
    out = torch.zeros(4 + 2 * top_k, drafters, batch, positions, dtype=torch.float64)
    for n, b, t in itertools.product(range(drafters), range(batch), range(positions)):
        if lengths is not None and t >= lengths[b]:
            continue
        thresholds = [options.get("target_threshold"), options.get("drafter_threshold")]
        target_floor = -INF if thresholds[0] is None else thresholds[0][b, t].item()
        draft_floor = -INF if thresholds[1] is None else thresholds[1][n, b, t].item()
        ids = options["draft_to_target"][n].tolist() if "draft_to_target" in options else range(draft_vocabulary)
        draft_logits = [logit if logit >= draft_floor else -INF for logit in drafter_logits[n, b, t].tolist()]
        target = distribution(target_logits[b, t].tolist(), temperatures[0][b], target_floor)
        draft = distribution(draft_logits, temperatures[1][b], draft_floor)
        scores = score(target, draft, draft_logits, tokens[b, t].item(), list(ids), top_k)
        out[:, n, b, t] = torch.tensor(scores, dtype=torch.float64)
    return out


def stacked(result: Evaluation) -> torch.Tensor:
    """The scores under their names, [4 + 2k, N, B, T]."""
    scores = [getattr(result, field) for field in FIELDS]
    if result.top_k_acceptance_prob is not None:
        scores += itertools.chain(*zip(result.top_k_acceptance_prob, result.top_k_acceptance_ratio))
    return torch.stack(scores)


def example(drafters=2, batch=2, positions=3, vocabulary=37, draft_vocabulary=None, spread=3.0):
    """Random arguments in float64; with `draft_vocabulary`, a map too."""
    arguments = [
        torch.randn(batch, positions, vocabulary, dtype=torch.float64) * spread,
        torch.randn(drafters, batch, positions, draft_vocabulary or vocabulary, dtype=torch.float64) * spread,
        torch.randint(vocabulary, (batch, positions)),
    ]
    if draft_vocabulary is None:
        return arguments, {}
    maps = torch.stack([torch.randperm(vocabulary)[:draft_vocabulary] for _ in range(drafters)])
    return arguments, {"draft_to_target": maps}


def as_dtype(arguments, dtype):
    target_logits, drafter_logits, tokens = arguments
    return [target_logits.to(dtype), drafter_logits.to(dtype), tokens]


def dtypes_of(backend: str) -> list[torch.dtype]:
    if backend == "cpu":
        return [torch.float32, torch.bfloat16]
    return [torch.float32, torch.bfloat16, torch.float16] + ([torch.float64] if backend == "reference" else [])


def check(arguments, options, backend):
    """`backend` equals the loops at every dtype it takes."""
    for dtype in dtypes_of(backend):
        rounded = as_dtype(arguments, dtype)
        result = stacked(evaluate(*rounded, **options, backend=backend))
        assert result.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
        expected = brute_force(*as_dtype(rounded, torch.float64), **options)
        torch.testing.assert_close(result.double(), expected, rtol=0, atol=TOLERANCES[dtype])


# Every option, on every backend, against the loops.


@pytest.mark.parametrize("positions", [1, 3])
@pytest.mark.parametrize("vocabulary", [1, 2, 7, 8, 33, 1031])
def test_equals_the_definition(backend, vocabulary, positions):
    check(*example(drafters=2, positions=positions, vocabulary=vocabulary), backend)


@pytest.mark.parametrize(("vocabulary", "draft_vocabulary"), [(37, 1), (37, 12), (37, 37), (1500, 1031)])
def test_reduced_vocabulary(backend, vocabulary, draft_vocabulary):
    arguments, options = example(vocabulary=vocabulary, draft_vocabulary=draft_vocabulary)
    arguments[2][0, 0] = options["draft_to_target"][0, -1]  # at least one emitted token that a drafter knows
    check(arguments, options, backend)


def test_token_outside_the_draft_vocabulary_has_ratio_zero(backend):
    arguments, _ = example(drafters=1, batch=1, positions=1, vocabulary=5, draft_vocabulary=2)
    arguments[2][:] = 3
    result = evaluate(*as_dtype(arguments, torch.float32), draft_to_target=torch.tensor([[0, 4]]), backend=backend)
    assert result.acceptance_ratio.item() == 0
    assert result.acceptance_prob.item() > 0
    assert result.argmax_acceptance_ratio.item() == 0


@pytest.mark.parametrize("target_temperature", [0.0, 0.7, torch.tensor([0.0, 1.3])])
@pytest.mark.parametrize("drafter_temperature", [0, 2.0, torch.tensor([0.4, 0.0])])
@pytest.mark.parametrize("draft_vocabulary", [None, 12])
def test_temperatures(backend, target_temperature, drafter_temperature, draft_vocabulary):
    arguments, options = example(draft_vocabulary=draft_vocabulary)
    best = arguments[0].argmax(-1)
    arguments[2][:, ::2] = best[:, ::2]  # half of the tokens are ones that a point mass can emit
    options |= {"target_temperature": target_temperature, "drafter_temperature": drafter_temperature}
    check(arguments, options, backend)


@pytest.mark.parametrize("temperature", [1e-30, 1e-3, 1e30])
def test_extreme_temperatures_stay_finite(backend, temperature):
    arguments, _ = example()
    result = evaluate(
        *as_dtype(arguments, torch.float32),
        target_temperature=temperature,
        drafter_temperature=temperature,
        backend=backend,
    )
    assert ((stacked(result) >= 0) & (stacked(result) <= 1)).all()


@pytest.mark.parametrize("top_k", [1, 3, 32])
@pytest.mark.parametrize("draft_vocabulary", [None, 12])
def test_top_k(backend, top_k, draft_vocabulary):
    arguments, options = example(draft_vocabulary=draft_vocabulary)
    arguments[1][0, 0] = arguments[1][0, 0].round() / 2  # ties, also across the border
    arguments[1][1, :, :, ::2] = -INF  # for the largest k fewer candidates than asked for
    options |= {"top_k": top_k, "drafter_threshold": arguments[1].float().sort(-1).values[..., -10]}
    options["drafter_temperature"] = 0.0 if top_k == 3 else 1.0  # which must not matter
    check(arguments, options, backend)


@pytest.mark.parametrize("draft_vocabulary", [None, 12])
def test_prefixes_are_what_fewer_candidates_make(backend, poisoned_empty, draft_vocabulary):
    """Every number of candidates in one call: as in a call that asks for no more than these, and never less than one fewer."""
    arguments, options = example(batch=3, positions=4, draft_vocabulary=draft_vocabulary)
    arguments[1][0] = arguments[1][0].round()
    arguments[1][1, 0, 0] = -INF
    arguments[1][1, 1] = arguments[1][1, 1].masked_fill(torch.arange(arguments[1].shape[-1]) > 2, -INF)
    arguments[2] = arguments[0].argmax(-1)
    options |= {"lengths": torch.tensor([4, 0, 2]), "target_temperature": torch.tensor([0.0, 1.0, 0.8])}
    options["target_threshold"] = arguments[0].float().topk(9, -1).values[..., -1]
    arguments = as_dtype(arguments, torch.float32)
    whole = evaluate(*arguments, **options, top_k=9, backend=backend)
    assert whole.scores.shape == (4 + 2 * 9, 2, 3, 4)
    for of_prefixes in (whole.top_k_acceptance_prob, whole.top_k_acceptance_ratio):
        assert of_prefixes.shape == (9, 2, 3, 4)
        assert (of_prefixes.diff(dim=0) >= 0).all()
        assert (of_prefixes[:, :, 1] == 0).all() and (of_prefixes[:, :, 2, 2:] == 0).all()
    for top_k in (1, 2, 5, 8):
        fewer = evaluate(*arguments, **options, top_k=top_k, backend=backend)
        torch.testing.assert_close(fewer.scores, whole.scores[: 4 + 2 * top_k], rtol=0, atol=2e-7)
    one = whole.scores[4:6]  # the likeliest token is the argmax mode's proposal
    torch.testing.assert_close(one, whole.scores[2:4], rtol=0, atol=TOLERANCES[torch.float32])


def test_more_candidates_than_draft_ids_are_as_many_as_there_are(backend):
    arguments, options = example(draft_vocabulary=5)
    arguments = as_dtype(arguments, torch.float32)
    result = evaluate(*arguments, **options, top_k=32, draft_length=2, mode="top_k", backend=backend)
    expected = evaluate(*arguments, **options, top_k=5, draft_length=2, mode="top_k", backend=backend)
    assert result.scores.shape == (4 + 2 * 5, 2, 2, 3)
    assert torch.equal(result.scores, expected.scores)
    torch.testing.assert_close(result.length_losses, expected.length_losses, rtol=0, atol=0, equal_nan=True)


def test_the_last_prefix_is_all_the_candidates():
    """What one pair of numbers for all k candidates is, from torch's own topk."""
    (target_logits, drafter_logits, tokens), _ = example()
    result = evaluate(target_logits, drafter_logits, tokens, top_k=6, backend="reference")
    candidates = drafter_logits.topk(6).indices
    mass = target_logits.softmax(-1).expand_as(drafter_logits).gather(-1, candidates).sum(-1)
    torch.testing.assert_close(result.top_k_acceptance_prob[-1], mass, rtol=0, atol=1e-12)
    is_in = (candidates == tokens[..., None]).any(-1)
    assert torch.equal(result.top_k_acceptance_ratio[-1], is_in.double())


def test_top_k_over_blocks(backend):
    """The candidates lie anywhere in rows of several blocks, in rising and falling order."""
    arguments, options = example(drafters=3, batch=1, positions=1, vocabulary=4500)
    arguments[1][1] = arguments[1][1].sort(-1).values
    arguments[1][2] = arguments[1][2].sort(-1, descending=True).values
    check(arguments, options | {"top_k": 7}, backend)


@pytest.mark.parametrize("estimator", ["exact", "product"])
@pytest.mark.parametrize("mode", ["sampled", "argmax", "top_k"])
@pytest.mark.parametrize("draft_length", [1, 3, 6])
def test_lengths_and_losses(backend, poisoned_empty, mode, estimator, draft_length):
    arguments, _ = example(batch=4, positions=5, spread=1.0)
    lengths = torch.tensor([5, 0, 2, 3])
    arguments[2] = arguments[0].argmax(-1)  # ratios that are not all 0 in any mode
    arguments = as_dtype(arguments, torch.float32)
    options = {"lengths": lengths, "top_k": 4}
    result = evaluate(*arguments, **options, draft_length=draft_length, estimator=estimator, mode=mode, backend=backend)
    scores = brute_force(*as_dtype(arguments, torch.float64), **options)
    torch.testing.assert_close(stacked(result).double(), scores, rtol=0, atol=TOLERANCES[torch.float32])

    prob, ratio = scores[{"sampled": 0, "argmax": 2, "top_k": -2}[mode] :][:2]
    assert result.expected_accepted_length.shape == (2, 4)
    assert result.length_losses.shape == (2, 4, 5, draft_length)
    for b, t, k in itertools.product(range(4), range(5), range(1, draft_length + 1)):
        losses = result.length_losses[:, b, t, k - 1].double()
        if t + k > lengths[b]:
            assert losses.isnan().all()
            continue
        window = slice(t, t + k)
        expected = expected_accepted_length(prob[:, b, window], ratio[:, b, window], k, estimator)[:, 0]
        torch.testing.assert_close(losses, length_loss(expected, k), rtol=0, atol=2e-5)
        if t == 0 and k == draft_length:
            torch.testing.assert_close(result.expected_accepted_length[:, b].double(), expected, rtol=0, atol=5e-5)
    assert result.expected_accepted_length[:, lengths < draft_length].isnan().all()


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_logits_of_any_size(backend, shift):
    arguments, _ = example()
    shifted = [arguments[0].float() + shift, arguments[1].float() + shift, arguments[2]]
    result = stacked(evaluate(*shifted, backend=backend)).double()
    expected = brute_force(*as_dtype(shifted, torch.float64))
    torch.testing.assert_close(result, expected, rtol=0, atol=TOLERANCES[torch.float32])


@pytest.mark.parametrize("jump", [30.0, 3e3, 3e7])
def test_logits_that_rise_from_block_to_block(backend, jump):
    """What a kernel takes for the highest logit is far too low when the next block comes, or far too high."""
    (target_logits, drafter_logits, _), _ = example(drafters=4, batch=1, positions=1, vocabulary=6500)
    steps = torch.arange(6500) // 1100
    target_logits += steps * jump
    drafter_logits += steps * torch.tensor([jump, -jump, 0.0, jump])[:, None, None, None]
    drafter_logits[3, ..., :3000] = -INF
    tokens = target_logits.argmax(-1)  # the loops' probabilities of most others underflow
    arguments = [target_logits.float(), drafter_logits.float(), tokens]
    result = stacked(evaluate(*arguments, backend=backend)).double()
    expected = brute_force(*as_dtype(arguments, torch.float64))
    torch.testing.assert_close(result, expected, rtol=0, atol=TOLERANCES[torch.float32])


def test_few_drafters_many_threads(backend):
    """Threads share a row where there are more of them than drafters."""
    if backend in GPU_BACKENDS:
        pytest.skip("threads are the CPU's")
    for drafters, draft_vocabulary in ((1, None), (2, None), (2, 9000)):
        arguments, options = example(drafters, 1, 1, vocabulary=20_000, draft_vocabulary=draft_vocabulary)
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(5)
            result = stacked(evaluate(*as_dtype(arguments, torch.float32), **options, backend=backend)).double()
        finally:
            torch.set_num_threads(before)
        expected = brute_force(*as_dtype(as_dtype(arguments, torch.float32), torch.float64), **options)
        torch.testing.assert_close(result, expected, rtol=0, atol=TOLERANCES[torch.float32])


def test_thresholds_mask(backend):
    arguments, options = example()
    options["target_threshold"] = arguments[0].float().topk(5, -1).values[..., -1]
    options["drafter_threshold"] = arguments[1].float().topk(3, -1).values[..., -1]
    rounded = as_dtype(arguments, torch.float32)
    result = stacked(evaluate(*rounded, **options, backend=backend)).double()
    expected = brute_force(*as_dtype(rounded, torch.float64), **options)
    torch.testing.assert_close(result, expected, rtol=0, atol=TOLERANCES[torch.float32])


def test_minus_infinity_is_no_mass(backend):
    arguments, _ = example()
    arguments[0][:, :, ::3] = -INF
    arguments[1][:, :, :, 1::3] = -INF
    check(arguments, {}, backend)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_row_without_mass_scores_zero(backend, side, temperature):
    arguments, _ = example()
    arguments[side][:] = -INF
    options = {"target_temperature": temperature, "drafter_temperature": temperature}
    assert (stacked(evaluate(*as_dtype(arguments, torch.float32), **options, backend=backend)) == 0).all()
    check(arguments, options, backend)


def test_token_that_the_target_cannot_emit(backend):
    target_logits = torch.tensor([[[0.0, -INF, -INF]]])
    drafter_logits = torch.tensor([[[[0.0, 0.0, -INF]]]])
    for token, ratio in ((1, 1.0), (2, 0.0)):
        result = evaluate(target_logits, drafter_logits, torch.tensor([[token]]), backend=backend)
        assert result.acceptance_ratio.item() == ratio


def test_ratio_survives_underflow(backend):
    """Both probabilities are below the smallest float32; their quotient is e^-2."""
    target_logits, drafter_logits = torch.tensor([[[0.0, -200.0]]]), torch.tensor([[[[0.0, -202.0]]]])
    result = evaluate(target_logits, drafter_logits, torch.tensor([[1]]), backend=backend)
    assert result.acceptance_ratio.item() == pytest.approx(math.exp(-2), rel=1e-5)


def test_ties_go_to_the_lowest_id(backend):
    tied = torch.zeros(1, 1, 3000)  # several blocks of the native loops
    for temperature in (0.0, 1.0):
        temperatures = {"target_temperature": temperature, "drafter_temperature": 0.0}
        result = evaluate(tied, tied[None], torch.tensor([[0]]), **temperatures, backend=backend)
        assert result.argmax_acceptance_ratio.item() == 1
        assert result.acceptance_prob.item() == pytest.approx(1 if temperature == 0 else 1 / 3000)


def test_ragged_rows_ignore_what_lies_past_their_length(backend, poisoned_empty):
    arguments, _ = example(batch=3, positions=5)
    lengths = torch.tensor([0, 2, 5])
    past = torch.arange(5) >= lengths[:, None]
    arguments[2][past] = -1
    expected = brute_force(*arguments, lengths=lengths)
    arguments[0][past] = math.nan
    arguments[1][:, past] = math.nan
    result = stacked(evaluate(*as_dtype(arguments, torch.float32), lengths=lengths, backend=backend))
    assert (result[:, :, past] == 0).all()
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=TOLERANCES[torch.float32])


@pytest.mark.parametrize(("batch", "positions"), [(0, 3), (2, 0)])
def test_empty(backend, batch, positions):
    arguments, _ = example(batch=batch, positions=positions)
    result = evaluate(*as_dtype(arguments, torch.float32), backend=backend)
    assert stacked(result).shape == (4, 2, batch, positions)
    assert result.top_k_acceptance_prob is result.expected_accepted_length is result.length_losses is None
    options = {"top_k": 2, "draft_length": 2, "mode": "top_k"}
    result = evaluate(*as_dtype(arguments, torch.float32), **options, backend=backend)
    assert stacked(result).shape == (8, 2, batch, positions)
    assert result.top_k_acceptance_prob.shape == result.top_k_acceptance_ratio.shape == (2, 2, batch, positions)
    assert result.length_losses.shape == (2, batch, positions, 2)
    assert result.expected_accepted_length.shape == (2, batch)
    assert result.expected_accepted_length.isnan().all()


def test_strides_are_free(backend, poisoned_empty):
    arguments, options = example(draft_vocabulary=20)
    target_logits, drafter_logits, tokens = as_dtype(arguments, torch.float32)
    expected = stacked(evaluate(target_logits, drafter_logits, tokens, **options, backend=backend))
    permuted = (
        target_logits.transpose(0, 1).contiguous().transpose(0, 1),
        drafter_logits.permute(2, 1, 3, 0).contiguous().permute(3, 1, 0, 2),
        tokens.T.contiguous().T,
    )
    options["draft_to_target"] = options["draft_to_target"].T.contiguous().T
    assert torch.equal(stacked(evaluate(*permuted, **options, backend=backend)), expected)


def test_mixed_dtypes(backend):
    (target_logits, drafter_logits, tokens), _ = example()
    mixed = [target_logits.bfloat16(), drafter_logits.float(), tokens]
    expected = brute_force(*as_dtype(mixed, torch.float64))
    torch.testing.assert_close(stacked(evaluate(*mixed, backend=backend)).double(), expected, rtol=0, atol=5e-6)


def test_many_rows_and_threads_agree_with_one(backend):
    if backend in GPU_BACKENDS:
        pytest.skip("threads are the CPU's")
    arguments, options = example(drafters=4, batch=5, positions=7, vocabulary=4099, draft_vocabulary=513)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(stacked(evaluate(*as_dtype(arguments, torch.float32), **options, backend=backend)))
    finally:
        torch.set_num_threads(before)
    assert torch.allclose(results[0], results[1], atol=1e-6)
    assert torch.allclose(results[0], results[2], atol=1e-6)


# Properties.

shapes = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 40), st.integers(0, 2**31))


def holds_for_all(backend, check) -> None:
    """Fewer examples where a call takes a tenth of a second: in the interpreter and in the emulator."""
    examples = 5 if backend in GPU_BACKENDS and not HAS_GPU else 30
    settings(max_examples=examples, deadline=None)(given(shapes)(check))()


def test_scores_are_probabilities_and_follow_the_drafters(backend):
    def check(shape):
        *sizes, seed = shape
        torch.manual_seed(seed)
        arguments, _ = example(*sizes, spread=10.0)
        target_logits, drafter_logits, tokens = as_dtype(arguments, torch.float32)
        result = stacked(evaluate(target_logits, drafter_logits, tokens, backend=backend))
        assert ((result >= 0) & (result <= 1)).all()
        order = torch.randperm(sizes[0])
        permuted = stacked(evaluate(target_logits, drafter_logits[order], tokens, backend=backend))
        assert torch.equal(permuted, result[:, order])

    holds_for_all(backend, check)


def test_a_drafter_like_the_target_is_always_accepted(backend):
    def check(shape):
        *sizes, seed = shape
        torch.manual_seed(seed)
        (target_logits, _, tokens), _ = example(*sizes)
        target_logits = target_logits.float()
        result = evaluate(target_logits, target_logits.expand(sizes[0], -1, -1, -1), tokens, backend=backend)
        for field in (result.acceptance_prob, result.acceptance_ratio):
            torch.testing.assert_close(field, torch.ones_like(field), rtol=0, atol=TOLERANCES[torch.float32])

    holds_for_all(backend, check)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_expected_ratio_is_the_prob(temperature):
    """E over x ~ p of the ratio, in both modes."""
    vocabulary = 11
    target_logits, drafter_logits = torch.randn(1, 1, vocabulary).double(), torch.randn(5, 1, 1, vocabulary).double()
    result = evaluate(
        target_logits.expand(1, vocabulary, -1),
        drafter_logits.expand(-1, 1, vocabulary, -1),
        torch.arange(vocabulary)[None],
        target_temperature=temperature,
        drafter_temperature=0.5,
        backend="reference",
    )
    target = torch.tensor(distribution(target_logits[0, 0].tolist(), temperature, -INF), dtype=torch.float64)
    for mode in ("", "argmax_"):
        ratio, prob = getattr(result, f"{mode}acceptance_ratio"), getattr(result, f"{mode}acceptance_prob")
        torch.testing.assert_close((ratio * target).sum(-1), prob[..., 0], rtol=0, atol=1e-12)


# Several samples at a node, by enumeration: all draws, each accepted or rejected, with the recursion as it is written.


def rejection_by_rejection(target: list[float], draft: list[float], samples: int) -> tuple[list[float], list[float]]:
    """Of every token the probability that an accepted child is it, and that it is drawn from the residual that is left."""
    accepted, recovered = [0.0] * len(target), [0.0] * len(target)
    for children in itertools.product(range(len(target)), repeat=samples):
        reached, residual = math.prod(draft[child] for child in children), target
        for child in children:
            if reached == 0:
                break
            accept = min(1.0, residual[child] / draft[child])
            accepted[child] += reached * accept
            reached *= 1 - accept
            left = [max(0.0, p - q) for p, q in zip(residual, draft)]
            residual = [mass / math.fsum(left) for mass in left] if any(left) else residual
        recovered = [mass + reached * p for mass, p in zip(recovered, residual)]
    return accepted, recovered


def agrees_with_enumeration(target_logits, drafter_logits, samples, **options) -> torch.Tensor:
    """multi_draft_acceptance for every emitted token against the recursion: [V] and [Vd] logits of one node, in float64."""
    vocabulary = len(target_logits)
    ids = options.get("draft_to_target", torch.arange(vocabulary)[None])[0].tolist()
    target = distribution(target_logits.tolist(), options.get("target_temperature", 1.0), -INF)
    draft = [0.0] * vocabulary
    for at, mass in zip(ids, distribution(drafter_logits.tolist(), options.get("drafter_temperature", 1.0), -INF)):
        draft[at] = mass
    result = multi_draft_acceptance(
        target_logits.expand(1, vocabulary, -1),
        drafter_logits.expand(1, 1, vocabulary, -1),
        torch.arange(vocabulary)[None],
        samples,
        **options,
    )[:, 0, 0]  # [2m, V]: the position is the token
    for count in range(1, samples + 1):
        accepted, recovered = rejection_by_rejection(target, draft, count)
        prob, ratio = result[2 * count - 2 :][:2]
        emitted = [one + other for one, other in zip(accepted, recovered)]
        assert emitted == pytest.approx(target, abs=1e-12)  # lossless
        assert prob.tolist() == pytest.approx([math.fsum(accepted)] * vocabulary, abs=1e-12)
        given_token = [mass / p if p else float(q > 0) for mass, p, q in zip(accepted, target, draft)]
        assert ratio.tolist() == pytest.approx(given_token, abs=1e-12)
    return result


@pytest.mark.parametrize("spread", [0.3, 1.0, 4.0])
@pytest.mark.parametrize(("vocabulary", "samples"), [(1, 3), (2, 5), (3, 4), (4, 3), (5, 3)])
def test_samples_are_accepted_as_the_recursion_says(vocabulary, samples, spread):
    for _ in range(5):
        target_logits, drafter_logits = torch.randn(2, vocabulary).double() * spread
        agrees_with_enumeration(target_logits, drafter_logits, samples)


@pytest.mark.parametrize("target_temperature", [0.0, 0.6])
@pytest.mark.parametrize("drafter_temperature", [0.0, 1.7])
def test_samples_with_temperatures_and_a_map(target_temperature, drafter_temperature):
    temperatures = {"target_temperature": target_temperature, "drafter_temperature": drafter_temperature}
    for ids in ([0, 1, 2, 3], [3, 0], [2]):
        target_logits, drafter_logits = torch.randn(4).double(), torch.randn(len(ids)).double()
        agrees_with_enumeration(target_logits, drafter_logits, 3, draft_to_target=torch.tensor([ids]), **temperatures)


def test_samples_where_masses_vanish():
    even = torch.zeros(4).double()
    same = agrees_with_enumeration(even, even, 3)
    torch.testing.assert_close(same, torch.ones_like(same), rtol=0, atol=1e-12)  # q covers p: no residual to divide
    left, right = torch.tensor([0.0, 1.0, -INF, -INF]).double(), torch.tensor([-INF, -INF, 1.0, 0.0]).double()
    disjoint = agrees_with_enumeration(left, right, 3)
    assert (disjoint[::2] == 0).all()
    assert disjoint[1::2].tolist() == [[0.0, 0.0, 1.0, 1.0]] * 3  # what the target cannot emit, the drafter can propose
    within = agrees_with_enumeration(left, even, 3)
    assert (within[::2].diff(dim=0) > 0).all()
    nothing = torch.full((4,), -INF).double()
    for rows in ((nothing, even), (even, nothing), (nothing, nothing)):
        arguments = rows[0].view(1, 1, 4), rows[1].view(1, 1, 1, 4), torch.tensor([[1]])
        assert (multi_draft_acceptance(*arguments, 3) == 0).all()


def test_samples_of_a_point_mass_target_are_tries():
    drafter_logits = torch.randn(6).double()
    hit = drafter_logits.softmax(-1)[2].item()
    target_logits = torch.zeros(1, 1, 6).double().index_fill(-1, torch.tensor([2]), 1.0)
    result = multi_draft_acceptance(
        target_logits, drafter_logits.view(1, 1, 1, 6), torch.tensor([[2]]), 8, target_temperature=0.0
    )
    tries = [1 - (1 - hit) ** count for count in range(1, 9)]
    assert result[::2].flatten().tolist() == pytest.approx(tries, abs=1e-12)
    assert result[1::2].flatten().tolist() == pytest.approx(tries, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("draft_vocabulary", [None, 12])
def test_one_sample_is_the_sampled_mode(dtype, draft_vocabulary):
    arguments, options = example(batch=3, positions=4, draft_vocabulary=draft_vocabulary)
    arguments[0][0, 1] = arguments[1][1, 0, 2] = -INF
    options["target_threshold"] = arguments[0].float().topk(9, -1).values[..., -1]
    options["drafter_threshold"] = arguments[1].float().topk(7, -1).values[..., -1]
    options["target_temperature"], options["drafter_temperature"] = torch.tensor([0.0, 1.0, 0.8]), torch.tensor([1.0, 0.0, 2.0])
    options["lengths"] = torch.tensor([4, 3, 0])
    past = torch.arange(4) >= options["lengths"][:, None]
    arguments[2][0] = arguments[0][0].argmax(-1)
    arguments = as_dtype(arguments, dtype)
    arguments[0][past], arguments[2][past] = math.nan, -1
    arguments[1][:, past] = math.nan
    result = multi_draft_acceptance(*arguments, 4, **options)
    assert result.shape == (8, 2, 3, 4) and result.dtype is (dtype if dtype is torch.float64 else torch.float32)
    assert torch.equal(result[:2], evaluate_reference(*arguments, **options).scores[:2])
    assert ((result >= 0) & (result <= 1)).all() and (result[:, :, past] == 0).all()
    assert (result[::2].diff(dim=0) >= 0).all() and (result[1::2].diff(dim=0) >= 0).all()
    precise = multi_draft_acceptance(*as_dtype(arguments, torch.float64), 4, **options)
    torch.testing.assert_close(result.double(), precise, rtol=0, atol=TOLERANCES[dtype])
    for sample_count in (1, 3):
        assert torch.equal(multi_draft_acceptance(*arguments, sample_count, **options), result[: 2 * sample_count])


def test_expected_ratio_of_samples_is_their_prob():
    vocabulary, (target_logits, drafter_logits) = 50, torch.randn(2, 50).double() * 2
    result = multi_draft_acceptance(
        target_logits.expand(1, vocabulary, -1),
        drafter_logits.expand(1, 1, vocabulary, -1),
        torch.arange(vocabulary)[None],
        6,
    )[:, 0, 0]
    expected = (result[1::2] * target_logits.softmax(-1)).sum(-1)
    torch.testing.assert_close(expected, result[::2, 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("batch", "positions"), [(0, 3), (2, 0)])
def test_samples_of_nothing(batch, positions):
    arguments, _ = example(batch=batch, positions=positions)
    assert multi_draft_acceptance(*arguments, 2).shape == (4, 2, batch, positions)


def test_samples_of_a_reduced_vocabulary_need_no_room_for_the_whole():
    """No tensor of N x B x T x V."""
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            made = result if isinstance(result, (tuple, list)) else (result,)
            sizes.extend(each.untyped_storage().nbytes() for each in made if isinstance(each, torch.Tensor))
            return result

    arguments, options = example(drafters=20, batch=2, positions=4, vocabulary=2000, draft_vocabulary=10)
    with Watch():
        multi_draft_acceptance(*as_dtype(arguments, torch.float32), 3, **options)
    assert max(sizes) <= 20 * 2000 * 8  # the index of the maps; every drafter at the target's width would be 4 times that


# The estimators, by enumeration: every tree of 4 tokens to depth 3 under 200 random pairs of target and drafter.

DEPTH, BRANCH, PAIRS = 3, 4, 200


@pytest.fixture(scope="module")
def trees():
    """Target and drafter probabilities on every path: [PAIRS, 64 paths, DEPTH, 4] each, and the paths [64, DEPTH]."""
    generator = torch.Generator().manual_seed(7)
    paths = torch.tensor(list(itertools.product(range(BRANCH), repeat=DEPTH)))
    sides = []
    for _ in range(2):
        nodes = [torch.randn(PAIRS, BRANCH**d, BRANCH, generator=generator).double() * 1.5 for d in range(DEPTH)]
        prefix = [(paths[:, :d] * BRANCH ** torch.arange(d - 1, -1, -1)).sum(-1) for d in range(DEPTH)]
        sides.append(torch.stack([nodes[d][:, prefix[d]] for d in range(DEPTH)], 2).log_softmax(-1))
    return sides[0], sides[1], paths


def true_expected_length(target: torch.Tensor, proposal: torch.Tensor, paths: torch.Tensor) -> torch.Tensor:
    """1 + sum_k P(the first k drafted tokens are accepted), [PAIRS]: path x is drafted and accepted with prod min(p, q)
    in sampled mode, and with prod p in argmax mode, where the proposal is a point mass: min(p, 1) on its token."""
    on_path = torch.minimum(target, proposal).gather(-1, paths[None, :, :, None].expand(PAIRS, -1, -1, 1))[..., 0]
    reach = on_path.cumprod(-1)  # each prefix of length k is shared by BRANCH ** (DEPTH - k) paths
    return 1 + sum(reach[:, :, k].sum(-1) / BRANCH ** (DEPTH - 1 - k) for k in range(DEPTH))


@pytest.mark.parametrize("mode", ["sampled", "argmax"])
def test_exact_is_unbiased_and_product_is_not(trees, mode):
    target, draft, paths = trees
    rows = PAIRS * len(paths)
    result = evaluate(
        target.reshape(rows, DEPTH, BRANCH),
        draft.reshape(1, rows, DEPTH, BRANCH),
        paths.repeat(PAIRS, 1),
        backend="reference",
    )
    prefix = "" if mode == "sampled" else "argmax_"
    prob, ratio = getattr(result, f"{prefix}acceptance_prob"), getattr(result, f"{prefix}acceptance_ratio")
    proposal = draft.exp()
    if mode == "argmax":
        proposal = torch.zeros_like(draft).scatter(-1, draft.argmax(-1, keepdim=True), 1.0)
    truth = true_expected_length(target.exp(), proposal, paths)
    emitted = target.gather(-1, paths[None, :, :, None].expand(PAIRS, -1, -1, 1))[..., 0].sum(-1).exp()  # [PAIRS, 64]
    bias = {}
    for estimator in ("exact", "product"):
        length = expected_accepted_length(prob, ratio, DEPTH, estimator).reshape(PAIRS, len(paths))
        bias[estimator] = ((emitted * length).sum(-1) - truth).abs().max().item()
    assert bias["exact"] < 1e-12
    assert bias["product"] > 0.01


def test_estimators_on_numbers():
    prob, ratio = np.array([0.5, 0.4, 0.2]), np.array([1.0, 0.3, 0.9])
    exact = [1 + 0.5 + 1.0 * 0.4, 1 + 0.4 + 0.3 * 0.2]
    product = [1 + 0.5 + 0.5 * 0.4, 1 + 0.4 + 0.4 * 0.2]
    np.testing.assert_allclose(expected_accepted_length(prob, ratio, 2), exact)
    np.testing.assert_allclose(expected_accepted_length(prob, ratio, 2, "product"), product)


@pytest.mark.parametrize("estimator", ["exact", "product"])
def test_all_lengths_are_the_shorter_drafts(estimator):
    prob, ratio = torch.rand(2, 3, 7), torch.rand(2, 3, 7)
    every = expected_accepted_length(prob, ratio, 4, estimator, all_lengths=True)
    assert every.shape == (2, 3, 4, 4)
    for length in range(1, 5):
        alone = expected_accepted_length(prob, ratio, length, estimator)[..., :4]
        torch.testing.assert_close(every[..., length - 1], alone)
    of_numpy = expected_accepted_length(prob.numpy(), ratio.numpy(), 4, estimator, all_lengths=True)
    np.testing.assert_allclose(of_numpy, every.numpy(), rtol=1e-6)


@given(st.integers(1, 6), st.integers(0, 4), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_expected_length_and_loss_stay_in_range(draft_length, more, seed):
    random = np.random.default_rng(seed)
    prob, ratio = random.random((3, draft_length + more)), random.random((3, draft_length + more))
    for estimator in ("exact", "product"):
        length = expected_accepted_length(prob, ratio, draft_length, estimator)
        assert length.shape == (3, more + 1)
        assert ((length >= 1) & (length <= draft_length + 1)).all()
        loss = length_loss(length, draft_length)
        assert ((loss >= 0) & (loss <= draft_length / (draft_length + 1))).all()


def test_length_loss_at_its_ends():
    assert length_loss(np.array([1.0, 4.0]), 3).tolist() == [0.75, 0.0]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([0.5], np.ones(1), 1), TypeError, "acceptance_prob: expected a torch tensor or a NumPy array, got list"),
        ((np.ones(2), torch.ones(2), 1), TypeError, "acceptance_ratio: expected ndarray, .* got Tensor"),
        ((np.ones(2, int), np.ones(2), 1), TypeError, "acceptance_prob: expected a floating-point dtype, got int64"),
        ((np.ones(2), np.ones(3), 1), ValueError, r"acceptance_ratio: expected .* shape \(2,\), got \(3,\)"),
        ((np.ones(2), np.ones(2), 3), ValueError, r"acceptance_prob: .* draft_length = 3 .* got shape \(2,\)"),
        ((np.ones(2), np.ones(2), 0), ValueError, "draft_length: expected at least 1, got 0"),
        ((np.ones(2), np.ones(2), 1.0), TypeError, "draft_length: expected an int, got float"),
        ((np.ones(2), np.ones(2), 1, "best"), ValueError, "estimator: expected one of exact, product, got 'best'"),
    ],
)
def test_bad_acceptance(arguments, error, message):
    with pytest.raises(error, match=message):
        expected_accepted_length(*arguments)


# Bad input: argument, expected, got.


def bad(message, error=ValueError, **changes):
    return pytest.param(changes, error, message, id=message)


LOGITS, DRAFTS, TOKENS = torch.zeros(2, 3, 5), torch.zeros(4, 2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
MAP = torch.arange(5).repeat(4, 1)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        bad("target_logits: expected a torch.Tensor, got list", TypeError, target_logits=[1.0]),
        bad("target_logits: expected torch.float32 or .* got torch.int64", TypeError, target_logits=LOGITS.long()),
        bad(r"target_logits: expected shape \[B, T, V\] .* got \[2, 5\]", target_logits=LOGITS[:, 0]),
        bad(r"target_logits: .* vocabulary of at least 1, got \[2, 3, 0\]", target_logits=LOGITS[..., :0]),
        bad("drafter_logits: expected torch.float32 or .* got torch.int32", TypeError, drafter_logits=DRAFTS.int()),
        bad(r"drafter_logits: expected shape \[N, B, T, Vd\] .* got \[2, 3, 5\]", drafter_logits=DRAFTS[0]),
        bad(r"drafter_logits: expected shape \[N >= 1, 2, 3, Vd\].* got \[4, 1, 3, 5\]", drafter_logits=DRAFTS[:, :1]),
        bad(r"drafter_logits: expected shape \[N >= 1, .* got \[0, 2, 3, 5\]", drafter_logits=DRAFTS[:0]),
        bad("drafter_logits: expected a vocabulary of 5, .* got 4", drafter_logits=DRAFTS[..., :4]),
        bad("drafter_logits: expected device cpu, .* got meta", drafter_logits=DRAFTS.to("meta")),
        bad("tokens: expected torch.int64, got torch.int32", TypeError, tokens=TOKENS.int()),
        bad(r"tokens: expected shape \[2, 3\], got \[2, 2\]", tokens=TOKENS[:, :2]),
        bad(r"tokens: expected values in 0..4, got 5", tokens=TOKENS + 5),
        bad(r"tokens: expected values in 0..4, got -1", tokens=TOKENS - 1),
        bad("tokens: expected device cpu, like the target's logits, got meta", tokens=TOKENS.to("meta")),
        bad("lengths: expected torch.int64, got torch.float32", TypeError, lengths=torch.ones(2)),
        bad(r"lengths: expected shape \[2\], got \[3\]", lengths=torch.ones(3, dtype=torch.int64)),
        bad("lengths: expected values in 0..3, got 4", lengths=torch.tensor([1, 4])),
        bad("draft_to_target: expected torch.int64 or torch.int32, got torch.int16", TypeError, draft_to_target=MAP.short()),
        bad(r"draft_to_target: expected shape \[4, 5\], got \[3, 5\]", draft_to_target=MAP[:3]),
        bad("draft_to_target: expected values in 0..4, got 5", draft_to_target=MAP + 1),
        bad("draft_to_target: expected values in 0..4, got -1", draft_to_target=MAP - 1),
        bad("draft_to_target: expected distinct ids for each drafter, got 0 twice", draft_to_target=MAP * 0),
        bad("target_temperature: expected a finite number >= 0, got -1.0", target_temperature=-1.0),
        bad("drafter_temperature: expected a finite number >= 0, got nan", drafter_temperature=math.nan),
        bad("target_temperature: expected a number or .* got str", TypeError, target_temperature="hot"),
        bad("drafter_temperature: expected finite values >= 0, got inf", drafter_temperature=torch.tensor([1, INF])),
        bad(r"target_temperature: expected shape \[2\], got \[3\]", target_temperature=torch.ones(3)),
        bad("target_temperature: expected torch.float32 .* got torch.int64", TypeError, target_temperature=TOKENS[:, 0]),
        bad(r"target_threshold: expected shape \[2, 3\], got \[3\]", target_threshold=torch.ones(3)),
        bad(r"drafter_threshold: expected shape \[4, 2, 3\], got \[2, 3\]", drafter_threshold=torch.ones(2, 3)),
        bad("top_k: expected 1..32, got 0", top_k=0),
        bad("top_k: expected 1..32, got 33", top_k=33),
        bad("top_k: expected an int, got float", TypeError, top_k=2.0),
        bad("top_k: expected a number of candidates in mode 'top_k', got None", mode="top_k"),
        bad("draft_length: expected at least 1, got 0", draft_length=0),
        bad("draft_length: expected an int, got bool", TypeError, draft_length=True),
        bad("estimator: expected one of exact, product, got 'best'", estimator="best"),
        bad("mode: expected one of sampled, argmax, top_k, got 'tree'", mode="tree"),
        bad("backend: expected 'auto' or one of .* got 'fast'", backend="fast"),
    ],
)
def test_bad_input(changes, error, message):
    arguments = {"target_logits": LOGITS, "drafter_logits": DRAFTS, "tokens": TOKENS} | changes
    with pytest.raises(error, match=message):
        evaluate(**arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        bad("samples: expected at least 1, got 0", samples=0),
        bad("samples: expected an int, got float", TypeError, samples=2.0),
        bad("drafter_logits: expected a vocabulary of 5, .* got 4", drafter_logits=DRAFTS[..., :4]),
        bad(r"tokens: expected values in 0..4, got 5", tokens=TOKENS + 5),
        bad("lengths: expected values in 0..3, got 4", lengths=torch.tensor([1, 4])),
        bad("draft_to_target: expected distinct ids for each drafter, got 0 twice", draft_to_target=MAP * 0),
        bad("target_temperature: expected a finite number >= 0, got -1.0", target_temperature=-1.0),
        bad(r"drafter_threshold: expected shape \[4, 2, 3\], got \[2, 3\]", drafter_threshold=torch.ones(2, 3)),
    ],
)
def test_bad_input_of_samples(changes, error, message):
    arguments = {"target_logits": LOGITS, "drafter_logits": DRAFTS, "tokens": TOKENS, "samples": 2} | changes
    with pytest.raises(error, match=message):
        multi_draft_acceptance(**arguments)


def test_a_map_is_checked_again_once_written_to():
    ids = MAP.clone()
    evaluate(LOGITS, DRAFTS, TOKENS, draft_to_target=ids)
    ids[0, 0] = 99
    with pytest.raises(ValueError, match=r"draft_to_target: expected values in 0..4, got 99"):
        evaluate(LOGITS, DRAFTS, TOKENS, draft_to_target=ids)


def test_a_map_is_checked_again_for_another_target():
    evaluate(LOGITS, DRAFTS, TOKENS, draft_to_target=MAP)
    with pytest.raises(ValueError, match=r"draft_to_target: expected values in 0..3, got 4"):
        evaluate(LOGITS[..., :4], DRAFTS, TOKENS, draft_to_target=MAP)


def test_inference_mode_maps_are_checked_too():
    with torch.inference_mode():
        evaluate(LOGITS, DRAFTS, TOKENS, draft_to_target=MAP.clone())
        with pytest.raises(ValueError, match="draft_to_target"):
            evaluate(LOGITS, DRAFTS, TOKENS, draft_to_target=MAP + 1)


def test_backends_share_one_signature():
    public = dict(inspect.signature(public_evaluate).parameters)
    del public["backend"]
    for name in backends.available("evaluate"):
        device = "cuda" if HAS_GPU and name in GPU_BACKENDS else "cpu"
        assert dict(inspect.signature(backends.resolve("evaluate", name, device)).parameters) == public
    assert dict(inspect.signature(evaluate_reference).parameters) == public
