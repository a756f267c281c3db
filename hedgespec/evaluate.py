"""Evaluation: what every drafter would have been worth at positions whose tokens are already emitted.

One call compares all N drafters with the target and yields, for both proposal modes, the two numbers a loss is made of:

    acceptance_prob    the probability that the drafter's proposal is accepted, given what came before
    acceptance_ratio   the same, given also the token that was really emitted

`expected_accepted_length` turns them into the expected tokens of a round, and `length_loss` that into a loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch.utils.weak import WeakTensorKeyDictionary

from hedgespec import backends

Array = TypeVar("Array", torch.Tensor, np.ndarray)

ESTIMATORS = ("exact", "product")

_LOGITS_DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
"""In the order of how few backends take them."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Every drafter at every position, for both proposal modes; float [N, B, T] in [0, 1], 0 past a row's length."""

    acceptance_prob: torch.Tensor
    """Sampled mode: sum_v min(target_prob(v), draft_prob(v)) = 1 - total variation."""
    acceptance_ratio: torch.Tensor
    """Sampled mode: min(1, draft_prob(x) / target_prob(x)) for the emitted token x."""
    argmax_acceptance_prob: torch.Tensor
    """Argmax mode: target_prob(d) for the drafter's likeliest token d."""
    argmax_acceptance_ratio: torch.Tensor
    """Argmax mode: 1 where x = d, else 0."""


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
    backend: str = "auto",
) -> Evaluation:
    """Scores all N drafters against the target in one call.

        p, q = (target_logits / target_temperature).softmax(-1), (drafter_logits / drafter_temperature).softmax(-1)
        acceptance_prob = torch.minimum(p, q).sum(-1);  acceptance_ratio = (q[x] / p[x]).clamp(max=1)

    Where a definition is needed: temperature 0 is a point mass on the argmax; ties in an argmax go to the lowest id
    (for a drafter, the lowest draft id); a token the target cannot emit (target_prob 0) has ratio 1 if the drafter can
    propose it, else 0; a row without any mass (every logit -inf or under its threshold) scores 0. NaN and +inf logits
    are not supported. No gradient is promised.

    Args:
        target_logits: [B, T, V] float32, bfloat16, float16 or float64. Strides are free; logits whose last
            dimension is not contiguous are copied first.
        drafter_logits: [N, B, T, Vd], N >= 1, the same dtypes; Vd = V unless `draft_to_target` is given.
        tokens: [B, T] int64, the emitted tokens, in 0..V-1 (anything past a row's length).
        lengths: [B] int64, in 0..T: valid positions of each row; None: all T. Later positions are filled with 0.
        draft_to_target: [N, Vd] int64: the target id that each draft id means, in 0..V-1, distinct for each drafter.
            Checked when first seen, and again after torch wrote to it.
        target_temperature: a finite float >= 0, or [B] of them.
        drafter_temperature: likewise.
        target_threshold: [B, T] floating point: target logits below it are masked out, which is how top-k, top-p and
            min-p come in. In units of the logits as they are handed in, before the temperature.
        drafter_threshold: [N, B, T], likewise.
        backend: "auto", or a name from `hedgespec.backends.BACKENDS`.

    Returns:
        An `Evaluation` in float64 if any logits are float64, else in float32.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or value.
        BackendUnavailableError: a backend asked for by name that cannot run here.

    Source: arXiv 2510.20064, section 3 (acceptance_prob is its gamma); the ratios and the argmax mode are ours.
    """
    _check_logits(target_logits, drafter_logits)
    drafters, batch, positions, draft_vocabulary = drafter_logits.shape
    vocabulary, device = target_logits.shape[-1], target_logits.device
    _check_tensor("tokens", tokens, torch.int64, (batch, positions), device)
    if lengths is not None:
        _check_tensor("lengths", lengths, torch.int64, (batch,), device)
        _check_range("lengths", lengths, positions)
        _check_range("tokens", tokens[_within(lengths, positions)], vocabulary - 1)
    else:
        _check_range("tokens", tokens, vocabulary - 1)
    if draft_to_target is not None:
        _check_tensor("draft_to_target", draft_to_target, torch.int64, (drafters, draft_vocabulary), device)
        _check_map(draft_to_target, vocabulary)
    elif draft_vocabulary != vocabulary:
        raise ValueError(
            f"drafter_logits: expected a vocabulary of {vocabulary}, the target's, or a draft_to_target map; "
            f"got {draft_vocabulary}"
        )
    _check_temperature("target_temperature", target_temperature, batch, device)
    _check_temperature("drafter_temperature", drafter_temperature, batch, device)
    if target_threshold is not None:
        _check_tensor("target_threshold", target_threshold, None, (batch, positions), device)
    if drafter_threshold is not None:
        _check_tensor("drafter_threshold", drafter_threshold, None, (drafters, batch, positions), device)

    # Of two dtypes the rarer decides: a backend that takes it takes the commoner beside it.
    dtype = max(target_logits.dtype, drafter_logits.dtype, key=_LOGITS_DTYPES.index)
    run = backends.resolve("evaluate", backend, device.type, dtype)
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
    )


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
) -> Evaluation:
    """`evaluate` in plain torch: float64 where any logits are, else float32. Arguments are taken as checked."""
    vocabulary = target_logits.shape[-1]
    dtype = torch.promote_types(torch.promote_types(target_logits.dtype, drafter_logits.dtype), torch.float32)
    target_log_probs, _ = _log_probs(target_logits.to(dtype), target_temperature, target_threshold)
    draft_log_probs, proposals = _log_probs(drafter_logits.to(dtype), drafter_temperature, drafter_threshold)
    has_mass = draft_log_probs.isfinite().any(-1)
    if draft_to_target is not None:
        ids = draft_to_target[:, None, None, :].expand_as(draft_log_probs)
        proposals = ids.gather(-1, proposals)
        everywhere_else = draft_log_probs.new_full((*draft_log_probs.shape[:-1], vocabulary), -math.inf)
        draft_log_probs = everywhere_else.scatter(-1, ids, draft_log_probs)

    target_probs = target_log_probs.exp()
    if lengths is not None:
        valid = _within(lengths, tokens.shape[1])
        tokens = tokens.where(valid, 0)
    emitted = tokens[..., None]
    log_target, log_draft = target_log_probs.gather(-1, emitted), _gather(draft_log_probs, emitted)
    has_target = target_log_probs.isfinite().any(-1)

    # In logarithms: the quotient stays right where both probabilities underflow.
    ratio = (log_draft - log_target[..., 0]).clamp(max=0).exp().where(log_draft.isfinite() & has_target, 0)
    scores = (
        torch.minimum(target_probs, draft_log_probs.exp()).sum(-1).clamp(max=1),
        ratio,
        _gather(target_probs.expand_as(draft_log_probs), proposals).where(has_mass, 0),
        ((proposals[..., 0] == tokens) & has_mass & has_target).to(dtype),
    )
    return Evaluation(*scores) if lengths is None else Evaluation(*(score.where(valid, 0) for score in scores))


def _log_probs(
    logits: torch.Tensor, temperature: float | torch.Tensor, threshold: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of [..., B, T, V] logits, -inf throughout a row without mass, and its argmax [..., B, T, 1]."""
    temperature = torch.as_tensor(temperature, dtype=logits.dtype, device=logits.device).reshape(-1, 1, 1)
    if threshold is not None:
        logits = logits.masked_fill(logits < threshold.to(logits.dtype)[..., None], -math.inf)
    highest, best = logits.max(-1, keepdim=True).values, logits.argmax(-1, keepdim=True)
    # The highest logit goes first, so that no temperature, however small, can overflow.
    softmax = ((logits - highest) / temperature.where(temperature > 0, 1)).log_softmax(-1)
    point_mass = torch.full_like(logits, -math.inf).scatter(-1, best, 0.0)
    log_probs = softmax.where(temperature > 0, point_mass)
    return log_probs.masked_fill(highest == -math.inf, -math.inf), best


def _gather(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """values[n, b, t, ids[(n,) b, t]] for [N, B, T, V] values."""
    return values.gather(-1, ids.expand(*values.shape[:-1], 1))[..., 0]


def _within(lengths: torch.Tensor, positions: int) -> torch.Tensor:
    """bool [B, T]: the positions below their row's length."""
    return torch.arange(positions, device=lengths.device) < lengths[:, None]


def _evaluate_cpu(
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
) -> Evaluation:
    """`evaluate` by csrc/evaluate_cpu.cpp. Arguments are taken as checked."""
    from hedgespec import _native

    # Every tensor whose address is handed over must keep a name until the call returns.
    target_logits, drafter_logits = _dense_vocabulary(target_logits), _dense_vocabulary(drafter_logits)
    shape = drafter_logits.shape
    out = torch.empty((4, *shape[:3]), dtype=torch.float32)
    tokens = tokens.contiguous()
    lengths = lengths if lengths is None else lengths.contiguous()
    draft_to_target = draft_to_target if draft_to_target is None else draft_to_target.contiguous()
    target_threshold, drafter_threshold = _float32(target_threshold), _float32(drafter_threshold)
    target_shared, target_temperature = _split_temperature(target_temperature)
    drafter_shared, drafter_temperature = _split_temperature(drafter_temperature)
    _native.evaluate(
        target_logits.data_ptr(),
        target_logits.dtype is torch.bfloat16,
        target_logits.stride(),
        drafter_logits.data_ptr(),
        drafter_logits.dtype is torch.bfloat16,
        drafter_logits.stride(),
        shape,
        target_logits.shape[-1],
        tokens.data_ptr(),
        _address(lengths),
        _address(draft_to_target),
        _address(target_threshold),
        _address(drafter_threshold),
        target_shared,
        _address(target_temperature),
        drafter_shared,
        _address(drafter_temperature),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return Evaluation(*out.unbind(0))


def _dense_vocabulary(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.stride(-1) == 1 else logits.contiguous()


def _float32(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(torch.float32).contiguous()


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _split_temperature(temperature: float | torch.Tensor) -> tuple[float, torch.Tensor | None]:
    return (0.0, _float32(temperature)) if isinstance(temperature, torch.Tensor) else (temperature, None)


def _load_reference() -> Callable[..., Evaluation]:
    return evaluate_reference


def _load_cpu() -> Callable[..., Evaluation]:
    from hedgespec import _native  # noqa: F401  (the backend is there if this import works)

    return _evaluate_cpu


backends.register("evaluate", "reference", _load_reference)
backends.register("evaluate", "cpu", _load_cpu, devices=("cpu",), dtypes=(torch.float32, torch.bfloat16))


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
    alive, length, partial_sums = 1.0, 1.0, []
    for k in range(draft_length):
        here = slice(k, k + starts)
        length = length + alive * acceptance_prob[..., here]
        alive = alive * survival[..., here]
        partial_sums.append(length)
    if not all_lengths:
        return length
    return torch.stack(partial_sums, -1) if isinstance(length, torch.Tensor) else np.stack(partial_sums, -1)


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
    _check_draft_length(draft_length)
    return 1.0 - expected_length / (draft_length + 1)


def _check_acceptance(acceptance_prob: Array, acceptance_ratio: Array, draft_length: int, estimator: str) -> None:
    for name, values in (("acceptance_prob", acceptance_prob), ("acceptance_ratio", acceptance_ratio)):
        if isinstance(values, torch.Tensor):
            floating = values.is_floating_point()
        elif isinstance(values, np.ndarray):
            floating = np.issubdtype(values.dtype, np.floating)
        else:
            raise TypeError(f"{name}: expected a torch tensor or a NumPy array; got {type(values).__name__}")
        if not floating:
            raise TypeError(f"{name}: expected a floating-point dtype; got {values.dtype}")
    if isinstance(acceptance_prob, torch.Tensor) is not isinstance(acceptance_ratio, torch.Tensor):
        raise TypeError(
            f"acceptance_ratio: expected {type(acceptance_prob).__name__}, like acceptance_prob; "
            f"got {type(acceptance_ratio).__name__}"
        )
    if acceptance_prob.shape != acceptance_ratio.shape:
        raise ValueError(
            f"acceptance_ratio: expected acceptance_prob's shape {tuple(acceptance_prob.shape)}; "
            f"got {tuple(acceptance_ratio.shape)}"
        )
    _check_draft_length(draft_length)
    if acceptance_prob.ndim == 0 or acceptance_prob.shape[-1] < draft_length:
        raise ValueError(
            f"acceptance_prob: expected at least draft_length = {draft_length} positions in its last dimension; "
            f"got shape {tuple(acceptance_prob.shape)}"
        )
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator: expected one of {', '.join(ESTIMATORS)}; got {estimator!r}")


def _check_draft_length(draft_length: int) -> None:
    if not isinstance(draft_length, int) or isinstance(draft_length, bool):
        raise TypeError(f"draft_length: expected an int; got {type(draft_length).__name__}")
    if draft_length < 1:
        raise ValueError(f"draft_length: expected at least 1; got {draft_length}")


def _check_logits(target_logits: torch.Tensor, drafter_logits: torch.Tensor) -> None:
    for name, logits, dims, ndim in (
        ("target_logits", target_logits, "[B, T, V]", 3),
        ("drafter_logits", drafter_logits, "[N, B, T, Vd]", 4),
    ):
        if not isinstance(logits, torch.Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor; got {type(logits).__name__}")
        if logits.dtype not in _LOGITS_DTYPES:
            raise TypeError(f"{name}: expected float64, float32, bfloat16 or float16; got {logits.dtype}")
        if logits.ndim != ndim or logits.shape[-1] == 0:
            raise ValueError(f"{name}: expected shape {dims} with a vocabulary of at least 1; got {tuple(logits.shape)}")
    if drafter_logits.shape[1:3] != target_logits.shape[:2] or drafter_logits.shape[0] == 0:
        batch, positions, _ = target_logits.shape
        raise ValueError(
            f"drafter_logits: expected shape [N >= 1, {batch}, {positions}, Vd], as target_logits has [B, T] = "
            f"[{batch}, {positions}]; got {tuple(drafter_logits.shape)}"
        )
    if drafter_logits.device != target_logits.device:
        raise ValueError(f"drafter_logits: expected device {target_logits.device}; got {drafter_logits.device}")


def _check_tensor(
    name: str, tensor: torch.Tensor, dtype: torch.dtype | None, shape: tuple[int, ...], device: torch.device
) -> None:
    """Checks a tensor argument; `dtype` None means any floating-point dtype."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor; got {type(tensor).__name__}")
    if tensor.dtype is not dtype if dtype is not None else not tensor.is_floating_point():
        raise TypeError(f"{name}: expected {dtype or 'a floating-point dtype'}; got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}; got {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, like target_logits; got {tensor.device}")


def _check_range(name: str, values: torch.Tensor, highest: int) -> None:
    if values.numel() == 0:
        return
    low, high = (bound.item() for bound in values.aminmax())
    if low < 0 or high > highest:
        raise ValueError(f"{name}: expected values in 0..{highest}; got {low if low < 0 else high}")


_checked_maps = WeakTensorKeyDictionary()


def _check_map(draft_to_target: torch.Tensor, vocabulary: int) -> None:
    # Sorting N maps each round would cost more than scoring. Inference tensors keep no version: checked every time.
    seen = None if draft_to_target.is_inference() else (draft_to_target._version, vocabulary)
    if seen is not None and _checked_maps.get(draft_to_target) == seen:
        return
    _check_range("draft_to_target", draft_to_target, vocabulary - 1)
    ids = draft_to_target.sort(-1).values
    repeated = ids[:, 1:][ids[:, 1:] == ids[:, :-1]]
    if repeated.numel():
        raise ValueError(f"draft_to_target: expected distinct ids for each drafter; got {repeated[0].item()} twice")
    if seen is not None:
        _checked_maps[draft_to_target] = seen


def _check_temperature(name: str, temperature: float | torch.Tensor, batch: int, device: torch.device) -> None:
    if isinstance(temperature, torch.Tensor):
        _check_tensor(name, temperature, None, (batch,), device)
        usable = temperature.isfinite() & (temperature >= 0)
        if not usable.all():
            raise ValueError(f"{name}: expected finite values >= 0; got {temperature[~usable][0].item()}")
    elif not isinstance(temperature, (int, float)) or isinstance(temperature, bool):
        raise TypeError(f"{name}: expected a float or a torch.Tensor of shape [{batch}]; got {type(temperature).__name__}")
    elif not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"{name}: expected a finite value >= 0; got {temperature}")
