"""Coupled sampling: one noise decides what a text says, whoever drafts it.

Every position of a text has Gumbel noise g over the target's tokens. The target says argmax(log p + g), a draw from p; a
drafter proposes argmax(log q + g), which is the same token the oftener the nearer q is to p: with a probability between
(1 - TV) / (1 + TV) and 1 - TV. Logarithms of probabilities are logits but for a constant, so this is greedy decoding of logits
with the noise on top. What drafts, verifies and evaluates at temperature 0 does all of it, trees and kernels included.

Given the noise nothing is left to chance: a drafter's proposal is accepted or not. So acceptance_prob is acceptance_ratio,
1[d = x], and a round's length is known for every drafter as if each had drafted it. The mean over the noise,
sum_v 1 / sum_w max(p(w) / p(v), q(w) / q(v)), takes a sort of the vocabulary for every drafter and position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from hedgespec.device import to_device
from hedgespec.ops.checks import FLOATING, check_logits, check_tensor, wrong

_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_BITS = 2**64 - 1


def gumbel(keys: Sequence[int], positions: Sequence[int], vocabulary: int, device: torch.device | str = "cpu") -> Tensor:
    """Standard Gumbel noise -log(-log u) that depends on key, position and token alone.

        u = (mix(mix(mix(key) + position * step) + token * step) >> 12) / 2^52, in the middle of its cell

    where mix and step are SplitMix64's and position and token count from 1. The integers are the same on every device, and as
    the logarithms are taken in float64, so is nearly every last bit of the answer, whatever is asked for in one call.

    Args:
        keys: of each of n rows, any int; its lowest 64 bits count.
        positions: of each row, >= 0.
        vocabulary: V >= 1.
        device: where the noise is made. It is not waited for.

    Returns: float32 [n, V], finite, in -3.6..36.8.

    Raises: ValueError for a value outside its range, or as many keys as positions are not.

    Source: Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", 2014; a counter-based use of it is ours.
    """
    if len(keys) != len(positions):
        raise wrong("positions", f"one for each of {len(keys)} keys", len(positions))
    if positions and min(positions) < 0:
        raise wrong("positions", "values of at least 0", min(positions))
    if vocabulary < 1:
        raise wrong("vocabulary", "at least 1", vocabulary)
    starts = [_signed(_mix(_mix(key & _BITS) + (position + 1) * _STEP & _BITS)) for key, position in zip(keys, positions)]
    device = torch.device(device)
    z = torch.arange(1, vocabulary + 1, device=device) * _signed(_STEP)
    z = to_device(torch.tensor(starts, dtype=torch.int64), device)[:, None] + z
    # int64 wraps around as uint64 does; its shift to the right copies the sign, which goes.
    z.bitwise_xor_((z >> 30).bitwise_and_(2**34 - 1)).mul_(_signed(_FIRST))
    z.bitwise_xor_((z >> 27).bitwise_and_(2**37 - 1)).mul_(_signed(_SECOND))
    z.bitwise_xor_((z >> 31).bitwise_and_(2**33 - 1))
    # 52 bits and a half are exact in float64 and never 0 or 1: every token can be drawn, in proportion down to 1e-15.
    u = (z >> 12).bitwise_and_(2**52 - 1).double().add_(0.5).mul_(2.0**-52)
    return u.log_().neg_().log_().neg_().float()


def key_of(uniform: float) -> int:
    """The key of a text's noise, of a uniform random number in [0, 1): all of its 53 bits."""
    return int(uniform * 2**53)


def perturb(
    logits: Tensor, noise: Tensor, *, temperature: float, threshold: Tensor | None = None, draft_to_target: Tensor | None = None
) -> Tensor:
    """logits.masked_fill(logits < threshold, -inf) / temperature + noise[draft_to_target], up to a constant for each row.

    With Gumbel noise the argmax is a draw from the softmax of the first summand. Where two laws share the noise, both draw the
    same token with a probability of at least (1 - TV) / (1 + TV).

    Args:
        logits: floating [..., V], Vd in place of V with a map; a row's temperature and threshold are as in `verify`.
        noise: float32 [..., V] over the target's tokens; the leading dimensions go with those of logits.
        temperature: > 0.
        threshold: floating [...], of logits; a logit below it is masked.
        draft_to_target: int64 or int32 [..., Vd] in [0, V), whose leading dimensions go with those of logits.

    Returns: of logits' shape, float32, or float64 where logits are; -inf where a logit is or is masked, and only there.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or value.

    Source: Daliri, Musco, Suresh, "Coupling without Communication and Drafter-Invariant Speculative Decoding", 2024; the
        Gumbel-max trick is older than all of this.
    """
    *rows, width = check_logits("logits", logits, "[..., V]", None)
    _check("noise", noise, (torch.float32,), rows, None if draft_to_target is not None else width, logits.device)
    if isinstance(temperature, bool) or not isinstance(temperature, Real):
        raise wrong("temperature", "a number", type(temperature).__name__, TypeError)
    if not 0 < temperature < math.inf:
        raise wrong("temperature", "a finite number > 0", temperature)
    if threshold is not None:
        check_tensor("threshold", threshold, FLOATING, tuple(rows), logits.device, like="logits")
    if draft_to_target is not None:
        _check("draft_to_target", draft_to_target, (torch.int64, torch.int32), rows, width, logits.device)
        lead = torch.broadcast_shapes(noise.shape[:-1], draft_to_target.shape[:-1])
        noise = noise.expand(*lead, -1).gather(-1, draft_to_target.long().expand(*lead, -1))

    held = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
    if threshold is not None:
        held = held.masked_fill(held < threshold[..., None], -math.inf)
    if temperature != 1:
        # The maximum goes first: a small temperature must not overflow.
        highest = held.amax(-1, keepdim=True)
        held = (held - highest.where(highest > -math.inf, 0)).div_(max(temperature, torch.finfo(held.dtype).tiny))
    return held + noise


def _check(
    name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], rows: Sequence[int], width: int | None, device: torch.device
) -> None:
    """A tensor [..., width] whose leading dimensions are those of logits or 1; any width for None."""
    if isinstance(tensor, Tensor) and tensor.ndim:
        lead = tensor.shape[:-1]
        trailing = rows[len(rows) - len(lead) :] if len(lead) <= len(rows) else None
        if trailing is None or any(one not in (1, row) for one, row in zip(lead, trailing)):
            raise wrong(name, f"leading dimensions that go with those of logits, {list(rows)}", list(tensor.shape))
        shape = (*lead, tensor.shape[-1] if width is None else width)
    else:
        shape = (width or 1,)
    check_tensor(name, tensor, dtypes, shape, device, like="logits")


def _mix(z: int) -> int:
    z = (z ^ z >> 30) * _FIRST & _BITS
    z = (z ^ z >> 27) * _SECOND & _BITS
    return z ^ z >> 31


def _signed(z: int) -> int:
    return z - 2**64 if z >= 2**63 else z
