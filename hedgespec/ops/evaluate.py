"""Evaluation: what every drafter would have been worth at positions whose tokens are already emitted.

One call compares all N drafters with the target and yields, for every proposal mode, the two numbers a loss is made of:

    acceptance_prob    the probability that the drafter's proposal is accepted, given what came before
    acceptance_ratio   the same, given also the token that was really emitted

`expected_accepted_length` turns them into the expected tokens of a round, and `length_loss` that into a loss; with
`draft_length` the same call yields those too. `multi_draft_acceptance` yields the two numbers for nodes with several samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from hedgespec.ops.backends import register, register_cases, register_kernels, resolve
from hedgespec.ops.checks import (
    FLOATING,
    check_ids,
    check_logits,
    check_map,
    check_temperature,
    check_tensor,
    rarer,
    wrong,
)  # fmt: skip
from hedgespec.ops.self_test import Case, scattered
from hedgespec.records import PROPOSAL_MODES, Evaluation, score_row

Array = TypeVar("Array", torch.Tensor, np.ndarray)

ESTIMATORS = ("exact", "product")
MODES = PROPOSAL_MODES
MOST_CANDIDATES = 32
"""The largest `top_k`."""


def evaluate(
    target_logits: torch.Tensor,
    drafter_logits: torch.Tensor,
    tokens: torch.Tensor,
    *,
    lengths: torch.Tensor | None = None,
    draft_to_target: torch.Tensor | None = None,
    target_temperature: float | torch.Tensor = 1.0,
    drafter_temperature: float | torch.Tensor = 1.0,
    target_threshold: torch.Tensor | None = None,
    drafter_threshold: torch.Tensor | None = None,
    top_k: int | None = None,
    draft_length: int | None = None,
    estimator: str = "exact",
    mode: str = "sampled",
    backend: str = "auto",
) -> Evaluation:
    """Scores all N drafters against the target in one call, and on a GPU in one launch.

        p, q = (target_logits / target_temperature).softmax(-1), (drafter_logits / drafter_temperature).softmax(-1)
        acceptance_prob = torch.minimum(p, q).sum(-1);  acceptance_ratio = (q[x] / p[x]).clamp(max=1)

    Where a definition is needed: temperature 0 is a point mass on the argmax; ties go to the lowest id (for a drafter,
    the lowest draft id); a token the target cannot emit (target_prob 0) has ratio 1 if the drafter can propose it, else
    0; a row without any mass (every logit -inf or under its threshold) scores 0. The top-k candidates are the likeliest
    tokens with a logit above -inf and not under the threshold, at any drafter temperature. NaN and +inf logits are not
    supported. No gradient is promised.

    Args:
        target_logits: [B, T, V] float32, bfloat16, float16 or float64. Strides are free; logits whose last
            dimension is not contiguous are copied first.
        drafter_logits: [N, B, T, Vd], N >= 1, the same dtypes; Vd = V unless `draft_to_target` is given.
        tokens: [B, T] int64, the emitted tokens, in 0..V-1 (anything past a row's length).
        lengths: [B] int64, in 0..T: valid positions of each row; None: all T. Later positions are filled with 0.
        draft_to_target: [N, Vd] int64 or int32: the target id that each draft id means, in 0..V-1, distinct for each
            drafter. Checked when first seen, and again after torch wrote to it.
        target_temperature: a finite float >= 0, or [B] of them.
        drafter_temperature: likewise.
        target_threshold: [B, T] floating point: target logits below it are masked out, which is how top-k, top-p and
            min-p come in. In units of the logits as they are handed in, before the temperature.
        drafter_threshold: [N, B, T], likewise.
        top_k: k, most candidates at a tree's node, 1..MOST_CANDIDATES (Vd if that is fewer); adds the two top-k outputs,
            each for 1, 2, .. k candidates.
        draft_length: K >= 1, tokens drafted in a round; adds `expected_accepted_length` and `length_losses`.
        estimator: "exact" or "product", as in the function `expected_accepted_length`.
        mode: the proposals whose acceptance the losses are made of: "sampled", "argmax" or "top_k" (all k candidates).
        backend: "auto", or a name from `hedgespec.ops.backends.BACKENDS`.

    Shapes, dtypes and devices are checked always, values (tokens, lengths, temperatures) only on the CPU, where looking
    waits for no device. On a GPU a token outside the vocabulary scores as one that nobody can emit.

    Returns:
        An `Evaluation` in float64 if any logits are float64, else in float32.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or value.
        BackendUnavailableError: a backend asked for by name that cannot run here.

    Source: arXiv 2510.20064, section 3 (acceptance_prob is its gamma); the ratios and the other modes are ours.
    """
    draft_to_target, target_temperature, drafter_temperature = _check_inputs(
        target_logits, drafter_logits, tokens, lengths, draft_to_target, target_temperature, drafter_temperature,
        target_threshold, drafter_threshold,
    )  # fmt: skip
    if top_k is not None:
        _check_count("top_k", top_k, MOST_CANDIDATES)
        top_k = min(top_k, drafter_logits.shape[-1])
    if draft_length is not None:
        _check_count("draft_length", draft_length)
    if estimator not in ESTIMATORS:
        raise wrong("estimator", f"one of {', '.join(ESTIMATORS)}", repr(estimator))
    if mode not in MODES:
        raise wrong("mode", f"one of {', '.join(MODES)}", repr(mode))
    if mode == "top_k" and top_k is None:
        raise wrong("top_k", "a number of candidates in mode 'top_k'", None)

    device = "cpu" if target_logits.is_cpu else target_logits.device  # a string is found quicker
    run = resolve("evaluate", backend, device, rarer(target_logits.dtype, drafter_logits.dtype))
    return run(
        target_logits,
        drafter_logits,
        tokens,
        lengths=lengths,
        draft_to_target=draft_to_target,
        target_temperature=target_temperature,
        drafter_temperature=drafter_temperature,
        target_threshold=target_threshold,
        drafter_threshold=drafter_threshold,
        top_k=top_k,
        draft_length=draft_length,
        estimator=estimator,
        mode=mode,
    )


def _check_inputs(
    target_logits: torch.Tensor,
    drafter_logits: torch.Tensor,
    tokens: torch.Tensor,
    lengths: torch.Tensor | None,
    draft_to_target: torch.Tensor | None,
    target_temperature: float | torch.Tensor,
    drafter_temperature: float | torch.Tensor,
    target_threshold: torch.Tensor | None,
    drafter_threshold: torch.Tensor | None,
) -> tuple[torch.Tensor | None, float | torch.Tensor, float | torch.Tensor]:
    """Raises what `evaluate` says; returns the map and the temperatures as implementations take them."""
    batch, positions, vocabulary = check_logits("target_logits", target_logits, "[B, T, V]", 3)
    drafters, rows, columns, draft_vocabulary = check_logits("drafter_logits", drafter_logits, "[N, B, T, Vd]", 4)
    if rows != batch or columns != positions or drafters == 0:
        raise wrong(
            "drafter_logits",
            f"shape [N >= 1, {batch}, {positions}, Vd], as target_logits has [B, T] = [{batch}, {positions}]",
            list(drafter_logits.shape),
        )
    device = target_logits.device
    if drafter_logits.device != device:
        raise wrong("drafter_logits", f"device {device}, like the target's logits", drafter_logits.device)
    check_tensor("tokens", tokens, (torch.int64,), (batch, positions), device)
    if lengths is None:
        check_ids("tokens", tokens, vocabulary - 1)
    else:
        check_tensor("lengths", lengths, (torch.int64,), (batch,), device)
        if lengths.is_cpu:
            check_ids("lengths", lengths, positions)
            check_ids("tokens", tokens[_within(lengths, positions)], vocabulary - 1)
    if draft_to_target is not None:
        shape = (drafters, draft_vocabulary)
        draft_to_target = check_map("draft_to_target", draft_to_target, shape, device, vocabulary, distinct=True)
    elif draft_vocabulary != vocabulary:
        raise wrong("drafter_logits", f"a vocabulary of {vocabulary}, the target's, or a draft_to_target map", draft_vocabulary)
    target_temperature = check_temperature("target_temperature", target_temperature, (batch,), device)
    drafter_temperature = check_temperature("drafter_temperature", drafter_temperature, (batch,), device)
    if target_threshold is not None:
        check_tensor("target_threshold", target_threshold, FLOATING, (batch, positions), device)
    if drafter_threshold is not None:
        check_tensor("drafter_threshold", drafter_threshold, FLOATING, (drafters, batch, positions), device)
    return draft_to_target, target_temperature, drafter_temperature


def evaluate_reference(
    target_logits: torch.Tensor,
    drafter_logits: torch.Tensor,
    tokens: torch.Tensor,
    *,
    lengths: torch.Tensor | None = None,
    draft_to_target: torch.Tensor | None = None,
    target_temperature: float | torch.Tensor = 1.0,
    drafter_temperature: float | torch.Tensor = 1.0,
    target_threshold: torch.Tensor | None = None,
    drafter_threshold: torch.Tensor | None = None,
    top_k: int | None = None,
    draft_length: int | None = None,
    estimator: str = "exact",
    mode: str = "sampled",
) -> Evaluation:
    """`evaluate` in plain torch: float64 where any logits are, else float32. Arguments are taken as checked."""
    laws = _laws(
        target_logits, drafter_logits, tokens, lengths, draft_to_target, target_temperature, drafter_temperature,
        target_threshold, drafter_threshold,
    )  # fmt: skip
    positions, dtype, valid = tokens.shape[1], laws.log_ratio.dtype, laws.valid
    has_mass, has_target = laws.draft.isfinite().any(-1), laws.target.isfinite().any(-1)
    target_probs = laws.target.exp().expand(len(drafter_logits), -1, -1, -1)
    ids = None if draft_to_target is None else draft_to_target.long()[:, None, None].expand_as(laws.draft)
    proposals = laws.best if ids is None else ids.gather(-1, laws.best)
    scores = [
        torch.minimum(laws.shared, laws.draft.exp()).sum(-1).clamp(max=1),
        laws.log_ratio.clamp(max=0).exp(),
        target_probs.gather(-1, proposals)[..., 0].where(has_mass, 0),
        ((proposals[..., 0] == laws.emitted) & has_mass & has_target).to(dtype),
    ]
    if top_k is not None:
        kept = drafter_logits.to(dtype)
        if drafter_threshold is not None:
            kept = kept.masked_fill(kept < drafter_threshold.to(dtype)[..., None], -math.inf)
        best, candidates = (part[..., :top_k] for part in kept.sort(dim=-1, descending=True, stable=True))
        candidates, usable = candidates if ids is None else ids.gather(-1, candidates), best > -math.inf
        mass = target_probs.gather(-1, candidates).where(usable, 0).cumsum(-1).clamp(max=1)
        is_emitted = (candidates == laws.emitted[..., None]) & usable & has_target[..., None]
        is_in = is_emitted.to(dtype).cumsum(-1)  # 0 or 1, as candidates are distinct
        scores += torch.stack([mass, is_in], -1).flatten(-2).unbind(-1)
    stacked = torch.stack([score.where(valid, 0) for score in scores])
    if draft_length is None:
        return Evaluation(stacked)
    prob, ratio = stacked[score_row(mode, top_k) :][:2].masked_fill(~valid, math.nan)
    prob, ratio = (torch.nn.functional.pad(score, (0, draft_length), value=math.nan) for score in (prob, ratio))
    expected = expected_accepted_length(prob, ratio, draft_length, estimator, all_lengths=True)
    whole = expected[:, :, 0, -1]  # padded by K, so there is a first position even where T = 0
    losses = 1 - expected[:, :, :positions] / torch.arange(2, draft_length + 2, dtype=dtype, device=expected.device)
    return Evaluation(stacked, whole, losses)


def multi_draft_acceptance(
    target_logits: torch.Tensor,
    drafter_logits: torch.Tensor,
    tokens: torch.Tensor,
    samples: int,
    *,
    lengths: torch.Tensor | None = None,
    draft_to_target: torch.Tensor | None = None,
    target_temperature: float | torch.Tensor = 1.0,
    drafter_temperature: float | torch.Tensor = 1.0,
    target_threshold: torch.Tensor | None = None,
    drafter_threshold: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Acceptance of a node whose children are samples of the drafter, verified one after another by recursive rejection.

        residual = p
        for child in q.multinomial(samples, replacement=True):
            if rand() * q[child] < residual[child]: return child  # accepted
            residual = (residual - q).clamp(min=0);  residual /= residual.sum()
        return residual.multinomial(1)  # distributed as p, with the children

    Before child i, which is reached with probability c_i, the residual is max(0, p - a_i q) / c_i, where a_1 = 0, c_1 = 1
    and a_{i+1} = a_i + c_i. So of j samples one is accepted with probability sum_v min(p(v), a_{j+1} q(v)), and given the
    emitted token x with min(1, a_{j+1} q(x) / p(x)). One sample is the sampled mode of `evaluate`.

    Args:
        samples: m >= 1, most children of a node.
        The rest: see `evaluate`; where a definition is needed it is the one there. There is the reference backend only.

    Returns:
        [2m, N, B, T] on the logits' device, in float64 if any logits are float64, else in float32: row 2(j-1) is the
        acceptance_prob of j samples and the row after it their acceptance_ratio; 0 past a row's length.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or value.
        BackendUnavailableError: a backend asked for by name that there is not.

    Source: SpecInfer, arXiv 2305.09781, for the verification; the closed form is ours.
    """
    draft_to_target, target_temperature, drafter_temperature = _check_inputs(
        target_logits, drafter_logits, tokens, lengths, draft_to_target, target_temperature, drafter_temperature,
        target_threshold, drafter_threshold,
    )  # fmt: skip
    _check_count("samples", samples)
    dtype = rarer(target_logits.dtype, drafter_logits.dtype)
    run = resolve("multi_draft_acceptance", backend, target_logits.device, dtype)
    laws = _laws(
        target_logits, drafter_logits, tokens, lengths, draft_to_target, target_temperature, drafter_temperature,
        target_threshold, drafter_threshold,
    )  # fmt: skip
    return run(laws, samples)


def _multi_draft_acceptance(laws: _Laws, samples: int) -> torch.Tensor:
    """`multi_draft_acceptance` in plain torch."""
    draft_probs, scores = laws.draft.exp(), []
    proposed, rejected = torch.zeros_like(laws.log_ratio), torch.ones_like(laws.log_ratio)  # a_i, c_i
    for _ in range(samples):
        proposed = proposed + rejected
        prob = torch.minimum(laws.shared, draft_probs * proposed[..., None]).sum(-1).clamp(max=1)
        rejected = 1 - prob
        scores += [prob, (laws.log_ratio + proposed.log()).clamp(max=0).exp()]
    return torch.stack([score.where(laws.valid, 0) for score in scores])


class _Laws(NamedTuple):
    """Target and drafters as distributions, and what the emitted tokens are under them."""

    target: torch.Tensor
    """Log-probabilities [B, T, V], -inf throughout a row without mass."""
    draft: torch.Tensor
    """Likewise, [N, B, T, Vd]."""
    best: torch.Tensor
    """The likeliest draft ids, [N, B, T, 1]."""
    shared: torch.Tensor
    """The target's probabilities of what the draft ids mean, [N, B, T, Vd]; [B, T, V] where they mean themselves."""
    emitted: torch.Tensor
    """Tokens [B, T], -1 past a row's length and for those outside the vocabulary."""
    log_ratio: torch.Tensor
    """log(draft_prob / target_prob) of them, [N, B, T]: -inf where the drafter cannot propose the token or a row has no mass,
    inf where the target cannot emit it."""
    valid: torch.Tensor
    """bool [B, T]."""


def _laws(
    target_logits: torch.Tensor,
    drafter_logits: torch.Tensor,
    tokens: torch.Tensor,
    lengths: torch.Tensor | None,
    draft_to_target: torch.Tensor | None,
    target_temperature: float | torch.Tensor,
    drafter_temperature: float | torch.Tensor,
    target_threshold: torch.Tensor | None,
    drafter_threshold: torch.Tensor | None,
) -> _Laws:
    """In float64 where any logits are, else in float32."""
    _, positions, vocabulary = target_logits.shape
    dtype = torch.promote_types(torch.promote_types(target_logits.dtype, drafter_logits.dtype), torch.float32)
    target, _ = _log_probs(target_logits.to(dtype), target_temperature, target_threshold)
    draft, best = _log_probs(drafter_logits.to(dtype), drafter_temperature, drafter_threshold)
    valid = torch.ones_like(tokens, dtype=torch.bool) if lengths is None else _within(lengths, positions)
    emitted = tokens.where(valid & (tokens >= 0) & (tokens < vocabulary), -1)
    shared, draft_ids = target.exp(), emitted.expand(len(draft), -1, -1)
    if draft_to_target is not None:
        # Outside the draft vocabulary q is 0: nothing is as wide as the target's but the target itself and this index.
        ids = draft_to_target.long()
        index = ids.new_full((len(ids), vocabulary), -1)
        index.scatter_(-1, ids, torch.arange(ids.shape[-1], device=ids.device).expand_as(ids))
        draft_ids = index[:, emitted.clamp(min=0)].where(emitted >= 0, -1)
        shared = shared.expand(len(draft), -1, -1, -1).gather(-1, ids[:, None, None].expand_as(draft))
    log_target = target.gather(-1, emitted.clamp(min=0)[..., None])[..., 0]
    log_draft = draft.gather(-1, draft_ids.clamp(min=0)[..., None])[..., 0]
    possible = (draft_ids >= 0) & log_draft.isfinite() & target.isfinite().any(-1)
    # In logarithms: the quotient stays right where both probabilities underflow.
    log_ratio = (log_draft - log_target).where(possible, -math.inf)
    return _Laws(target, draft, best, shared, emitted, log_ratio, valid)


def _log_probs(
    logits: torch.Tensor, temperature: float | torch.Tensor, threshold: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of [..., B, T, V] logits, -inf throughout a row without mass, and its argmax [..., B, T, 1]."""
    if threshold is not None:
        logits = logits.masked_fill(logits < threshold.to(logits.dtype)[..., None], -math.inf)
    highest, best = logits.max(-1, keepdim=True).values, logits.argmax(-1, keepdim=True)
    # The highest logit goes first, so that no temperature, however small, can overflow.
    if not isinstance(temperature, torch.Tensor) and temperature > 0:
        return ((logits - highest) / temperature).log_softmax(-1).masked_fill_(highest == -math.inf, -math.inf), best
    temperature = torch.as_tensor(temperature, dtype=logits.dtype, device=logits.device).reshape(-1, 1, 1)
    softmax = ((logits - highest) / temperature.where(temperature > 0, 1)).log_softmax(-1)
    point_mass = torch.full_like(logits, -math.inf).scatter(-1, best, 0.0)
    log_probs = softmax.where(temperature > 0, point_mass)
    return log_probs.masked_fill(highest == -math.inf, -math.inf), best


def _within(lengths: torch.Tensor, positions: int) -> torch.Tensor:
    """bool [B, T]: the positions below their row's length."""
    return torch.arange(positions, device=lengths.device) < lengths[:, None]


def expected_accepted_length(
    acceptance_prob: Array,
    acceptance_ratio: Array,
    draft_length: int,
    estimator: str = "exact",
    *,
    all_lengths: bool = False,
) -> Array:
    """Expected tokens of a round (the recovered or bonus token included) from every position it could start at.

        exact:    L[t] = 1 + sum_{k=1..K} prod_{j=0..k-2} acceptance_ratio[t+j] * acceptance_prob[t+k-1]
        product:  L[t] = 1 + sum_{k=1..K} prod_{j=0..k-1} acceptance_prob[t+j]

    `exact` is unbiased for any target and drafter; `product` is the paper's, biased by the covariance of acceptance
    with later acceptance, and less noisy.

    Args:
        acceptance_prob: [..., T] torch or NumPy, floating point, in [0, 1] (not checked), T >= draft_length.
        acceptance_ratio: the same type and shape; `product` does not read it.
        draft_length: tokens drafted in a round, >= 1.
        estimator: "exact" or "product".
        all_lengths: also return the partial sums, which are the expectations for every shorter draft.

    Returns:
        [..., T-K+1] in [1, K+1]; with `all_lengths` [..., T-K+1, K], the last dimension for draft lengths 1..K.

    Raises:
        TypeError: not two torch tensors or two NumPy arrays of a floating-point dtype, or `draft_length` is not an int.
        ValueError: the shapes differ, T < draft_length, draft_length < 1, or an unknown estimator.

    Source: `product` is arXiv 2510.20064, Theorem 3; `exact` is ours.
    """
    _check_acceptance(acceptance_prob, acceptance_ratio, draft_length, estimator)
    starts = acceptance_prob.shape[-1] - draft_length + 1
    survival = acceptance_ratio if estimator == "exact" else acceptance_prob
    alive: Any = 1.0
    length: Any = 1.0
    partial_sums = []
    for k in range(draft_length):
        here = slice(k, k + starts)
        length = length + alive * acceptance_prob[..., here]
        alive = alive * survival[..., here]
        partial_sums.append(length)
    if not all_lengths:
        return length
    stack: Any = torch.stack if isinstance(length, torch.Tensor) else np.stack
    return stack(partial_sums, -1)


def length_loss(expected_length: Array, draft_length: int) -> Array:
    """1 - expected_length / (draft_length + 1): the loss of a drafter, in [0, K / (K + 1)].

    Args:
        expected_length: what `expected_accepted_length` returned, in [1, draft_length + 1].
        draft_length: tokens drafted in a round, >= 1.

    Raises:
        TypeError: `draft_length` is not an int.
        ValueError: draft_length < 1.

    Source: arXiv 2510.20064, the loss f_t.
    """
    _check_count("draft_length", draft_length)
    return 1.0 - expected_length / (draft_length + 1)


def _check_acceptance(acceptance_prob: Array, acceptance_ratio: Array, draft_length: int, estimator: str) -> None:
    for name, values in (("acceptance_prob", acceptance_prob), ("acceptance_ratio", acceptance_ratio)):
        if isinstance(values, torch.Tensor):
            floating = values.is_floating_point()
        elif isinstance(values, np.ndarray):
            floating = np.issubdtype(values.dtype, np.floating)
        else:
            raise TypeError(f"{name}: expected a torch tensor or a NumPy array, got {type(values).__name__}")
        if not floating:
            raise TypeError(f"{name}: expected a floating-point dtype, got {values.dtype}")
    if isinstance(acceptance_prob, torch.Tensor) is not isinstance(acceptance_ratio, torch.Tensor):
        raise TypeError(
            f"acceptance_ratio: expected {type(acceptance_prob).__name__}, like acceptance_prob, "
            f"got {type(acceptance_ratio).__name__}"
        )
    if acceptance_prob.shape != acceptance_ratio.shape:
        raise ValueError(
            f"acceptance_ratio: expected acceptance_prob's shape {tuple(acceptance_prob.shape)}, "
            f"got {tuple(acceptance_ratio.shape)}"
        )
    _check_count("draft_length", draft_length)
    if acceptance_prob.ndim == 0 or acceptance_prob.shape[-1] < draft_length:
        raise ValueError(
            f"acceptance_prob: expected at least draft_length = {draft_length} positions in its last dimension, "
            f"got shape {tuple(acceptance_prob.shape)}"
        )
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator: expected one of {', '.join(ESTIMATORS)}, got {estimator!r}")


def _check_count(name: str, count: int, most: int | None = None) -> None:
    if not isinstance(count, int) or isinstance(count, bool):
        raise wrong(name, "an int", type(count).__name__, TypeError)
    if count < 1 or (most is not None and count > most):
        raise wrong(name, "at least 1" if most is None else f"1..{most}", count)


def _self_test_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Small calls of `evaluate_reference` that contain what a kernel may get wrong; scores are probabilities."""

    def case(
        name: str, target: torch.Tensor, drafters: torch.Tensor, target_dtype: torch.dtype = dtype, **options: Any
    ) -> Case:
        vocabulary = target.shape[-1]
        tokens = (scattered(*target.shape[:2], seed=5, low=0, high=vocabulary)).long()
        tokens[0, 0], tokens[-1, -1] = vocabulary - 1, 0
        return Case(name, (target.to(target_dtype), drafters.to(dtype), tokens), options, tolerance=1e-4)

    odd = 3 * scattered(2, 5, 257, seed=1), 3 * scattered(3, 2, 5, 257, seed=2)
    yield case("one token", scattered(1, 1, 1), scattered(1, 1, 1, 1))
    yield case("odd vocabulary", *odd, lengths=torch.tensor([5, 3]), top_k=4, draft_length=3)
    yield case("target in float32", *odd, target_dtype=torch.float32, draft_length=2, estimator="product", mode="argmax")

    wide, others = scattered(1, 2, 9001, seed=3), scattered(2, 1, 2, 9001, seed=4)
    places = [0, 1023, 1024, 4095, 4096, 8191, 8192, 9000]  # the ends, and around sizes that blocks may have
    wide[..., places] += 10 + scattered(8, seed=6)
    others[..., places] += 10 + scattered(8, seed=7)
    yield case("wide vocabulary", wide, others, target_temperature=0.9, drafter_temperature=1.2, top_k=8)

    ids = (torch.arange(37, device="cpu") * 11 % 101).int()
    maps = torch.stack([ids, (ids + 50) % 101, (ids + 64) % 101])
    yield case(
        "reduced vocabularies", 2 * scattered(2, 4, 101, seed=8), 2 * scattered(3, 2, 4, 37, seed=9),
        draft_to_target=maps, lengths=torch.tensor([2, 4]), top_k=3, draft_length=2, mode="top_k",
    )  # fmt: skip

    tied = torch.zeros(3, 2, 70, dtype=torch.float64, device="cpu")
    tied[1, :, [3, 69]] = 2.0
    tied_drafters = torch.stack([tied, tied.flip(-1)])
    yield case(
        "ties", tied, tied_drafters, top_k=5,
        target_temperature=torch.tensor([0.0, 1.0, 2.5]), drafter_temperature=torch.tensor([1.0, 0.0, 0.0]),
    )  # fmt: skip
    yield case("temperature 0", *odd, target_temperature=0.0, drafter_temperature=0.0)

    extreme, extremes = 4 * scattered(1, 4, 65, seed=10), 4 * scattered(2, 1, 4, 65, seed=11)
    extreme[0, 0, 64], extreme[0, 1, ::2], extreme[0, 2] = 3e4, -math.inf, -math.inf
    extremes[0, 0, 0, 64], extremes[0, 0, 1, 1::2], extremes[1, 0, 1], extremes[1, 0, 3, :60] = 3e4, -math.inf, -math.inf, -3e4
    yield case(
        "extreme logits and thresholds", extreme, extremes, top_k=2, draft_length=2, estimator="product",
        target_threshold=torch.tensor([[-1.0, -math.inf, 0.0, 2.0]]), drafter_threshold=torch.full((2, 1, 4), 0.5),
    )  # fmt: skip


register_kernels("evaluate", evaluate_reference)
register_cases("evaluate", _self_test_cases)
register("multi_draft_acceptance", "reference", lambda: _multi_draft_acceptance)
