"""Verify a draft: how many drafted tokens the target accepts, and the one token that follows them.

Accepting d with probability min(1, p(d) / q(d)) and recovering a rejection from max(0, p - q) makes every emitted
token the target's own sample, whatever the drafter proposed. Drafting and verifying share one inverse CDF, so `sample`
lives here too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hedgespec.ops.backends import register, register_cases, register_kernels, resolve
from hedgespec.ops.checks import (
    FLOATING,
    WIDE,
    check_ids,
    check_logits,
    check_map,
    check_temperature,
    check_tensor,
    check_uniforms,
    rarer,
    wrong,
)  # fmt: skip
from hedgespec.ops.self_test import Case, scattered
from hedgespec.ops.tree_mask import ancestry
from hedgespec.records import Verdict

MODES = ("sampled", "argmax")


def verify(
    target_logits: Tensor,
    draft_tokens: Tensor,
    draft_logits: Tensor | None,
    uniforms: Tensor,
    *,
    mode: str = "sampled",
    lengths: Tensor | None = None,
    draft_to_target: Tensor | None = None,
    target_temperature: float | Tensor = 1.0,
    draft_temperature: float | Tensor = 1.0,
    target_threshold: Tensor | None = None,
    draft_threshold: Tensor | None = None,
    backend: str = "auto",
) -> Verdict:
    """Accept a prefix of the draft, then emit a recovered token (after a rejection) or a bonus token (after none).

    Per row, with p and q the target's and the proposal's distributions at each position::

        accepted_length = (u[:K] * q(d) < p(d)).cumprod(-1).sum()
        next token      = the smallest v with cumsum(w)[v] > u[K] * sum(w)
        w               = p at the bonus position, max(0, p - q) at a rejected one

    The proposal is softmax(draft_logits) in mode "sampled" and a point mass on the drafted token in mode "argmax",
    where acceptance becomes u < p(d) and w becomes p without d. At target temperature 0, p is a point mass on the
    argmax: a drafted token is accepted where it equals the argmax, and the argmax is emitted; proposal and uniforms do
    not matter.

    Exact for tokens drawn from these very draft_logits, temperature and threshold, with uniforms independent of those
    that drew them. A drafted token the proposal cannot produce has q = 0 and is accepted wherever p > 0. Where rounding
    leaves a rejection without residual (q covers p), w is p. An emitted token always has p > 0.

    Distributions are computed in the logits' dtype (float32 for half types), the comparison and the inverse CDF in
    float64. Backends round them differently: a uniform within rounding of a step may fall on either side of it. Shapes
    and dtypes are checked always, values only on the CPU, where looking waits for no device. Logits are processed already
    and may hold -inf, not NaN or +inf; a row without any mass has no defined token.

    Args:
        target_logits: floating [B, K+1, V]; row k scores the position of drafted token k, row K the bonus position.
        draft_tokens: int64 [B, K], target ids in [0, V); K = 0 samples from the target. Ignored past a row's length.
        draft_logits: floating [B, K, Vd], what the tokens were drawn from; Vd = V unless draft_to_target is given. None
            where no proposal distribution is needed: mode "argmax", the number 0 as target temperature, or K = 0.
        uniforms: float32 or float64 [B, K+1] in [0, 1); column k tests drafted token k, the last column, whatever the
            row's length, draws the token that follows.
        mode: how the tokens were proposed, "sampled" from draft_logits or their "argmax".
        lengths: int64 [B] in 0..K, drafted tokens of each row; None means K. The bonus of a row is at its own length.
        draft_to_target: int64 [Vd] or [B, Vd] in [0, V), target id of each draft id; ids that repeat add up.
        target_temperature: >= 0, a number or floating [B]; 0 is a point mass on the argmax, ties to the lowest id.
        draft_temperature: likewise for the proposal.
        target_threshold: floating [B, K+1]; a logit below it is masked, compared as given, before the temperature.
        draft_threshold: floating [B, K], likewise for draft_logits.
        backend: "auto" or a name from the backend table.

    Returns:
        Verdict of accepted_length int64 [B] and tokens int64 [B, K+1], padded with -1.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device, value or mode.
        BackendUnavailableError: the named backend cannot run here.

    Source: Leviathan, Kalman, Matias, "Fast Inference from Transformers via Speculative Decoding", 2023, Algorithm 1;
        a reduced draft vocabulary as in EAGLE-3, 2025.
    """
    batch, positions, vocabulary = check_logits("target_logits", target_logits, "[B, K+1, V]", 3)
    draft_length = positions - 1
    if draft_length < 0:
        raise wrong("target_logits", "shape [B, K+1, V] with K >= 0", list(target_logits.shape))
    device = target_logits.device
    check_tensor("draft_tokens", draft_tokens, (torch.int64,), (batch, draft_length), device)
    check_tensor("uniforms", uniforms, WIDE, (batch, positions), device)
    check_uniforms("uniforms", uniforms)
    if mode not in MODES:
        raise wrong("mode", f"one of {', '.join(MODES)}", repr(mode))
    if lengths is None:
        check_ids("draft_tokens", draft_tokens, vocabulary - 1)
    else:
        check_tensor("lengths", lengths, (torch.int64,), (batch,), device)
        if device.type == "cpu":
            check_ids("lengths", lengths, draft_length)
            check_ids("draft_tokens", draft_tokens[_drafted(draft_length, lengths)], vocabulary - 1)
    target_temperature = check_temperature("target_temperature", target_temperature, (batch,), device)
    draft_temperature = check_temperature("draft_temperature", draft_temperature, (batch,), device)
    if target_threshold is not None:
        check_tensor("target_threshold", target_threshold, FLOATING, (batch, positions), device)
    if draft_threshold is not None:
        check_tensor("draft_threshold", draft_threshold, FLOATING, (batch, draft_length), device)

    if draft_logits is not None:
        draft_vocabulary = check_logits("draft_logits", draft_logits, "[B, K, Vd]", 3)[-1]
        if draft_to_target is None:
            draft_vocabulary = vocabulary
        else:
            draft_to_target = _check_draft_map(draft_to_target, batch, draft_vocabulary, device, vocabulary)
        check_tensor("draft_logits", draft_logits, FLOATING, (batch, draft_length, draft_vocabulary), device)
    elif mode == "sampled" and draft_length > 0 and not _is_zero(target_temperature):
        raise wrong("draft_logits", 'a tensor in mode "sampled" with a target temperature above 0', None)

    draft_dtype = target_logits.dtype if draft_logits is None else draft_logits.dtype
    run = resolve("verify", backend, device, rarer(target_logits.dtype, draft_dtype))
    return run(
        target_logits,
        draft_tokens,
        draft_logits,
        uniforms,
        mode=mode,
        lengths=lengths,
        draft_to_target=draft_to_target,
        target_temperature=target_temperature,
        draft_temperature=draft_temperature,
        target_threshold=target_threshold,
        draft_threshold=draft_threshold,
    )


def sample(logits: Tensor, uniforms: Tensor, *, temperature: float | Tensor = 1.0, threshold: Tensor | None = None) -> Tensor:
    """Draw one token a row by inverse CDF: the smallest v with cumsum(softmax(logits / temperature))[v] > u * total.

    The conventions are those of `verify`: what this draws from draft_logits, `verify` with the same temperature and
    threshold corrects exactly. A token of probability 0 is never drawn.

    Args:
        logits: floating [..., V].
        uniforms: float32 or float64 [...] or [..., S] in [0, 1), S independent draws; not read at temperature 0.
        temperature: >= 0, a number or floating [...]; 0 takes the argmax, ties to the lowest id.
        threshold: floating [...]; a logit, before temperature, below it is masked.

    Returns:
        Token ids of uniforms' shape, int64, in [0, V).

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or value.
    """
    check_logits("logits", logits, "[..., V]", None)
    rows, device = logits.shape[:-1], logits.device
    several = isinstance(uniforms, Tensor) and uniforms.ndim == logits.ndim
    check_tensor("uniforms", uniforms, WIDE, (*rows, uniforms.shape[-1]) if several else rows, device)
    check_uniforms("uniforms", uniforms)
    if threshold is not None:
        check_tensor("threshold", threshold, FLOATING, rows, device)
    temperature = check_temperature("temperature", temperature, rows, device)
    if _is_zero(temperature):
        best = logits.argmax(-1)
        return best[..., None].expand(uniforms.shape) if several else best
    drawn = _inverse_cdf(_distribution(logits, temperature, threshold), uniforms if several else uniforms[..., None])
    return drawn if several else drawn[..., 0]


def verify_tree(
    target_logits: Tensor,
    draft_tokens: Tensor,
    parents: Tensor,
    draft_logits: Tensor | None,
    uniforms: Tensor,
    *,
    depth: int,
    mode: str = "argmax",
    origins: Tensor | None = None,
    draft_to_target: Tensor | None = None,
    target_temperature: float | Tensor = 1.0,
    draft_temperature: float | Tensor = 1.0,
    target_threshold: Tensor | None = None,
    draft_threshold: Tensor | None = None,
    backend: str = "auto",
) -> Verdict:
    """Accept a path of a draft tree from its root down, then emit a recovered token (where it ends early) or a bonus token.

    At each node the children are tried one after another, each against what is left of the target's p. In mode "argmax"
    they are distinct and were chosen without chance: the i-th is accepted with probability p(c_i) / (1 - p(c_1) - ... -
    p(c_{i-1})), and after the last the rest of p without them is drawn from. That is one draw x ~ p, which goes to the child
    x where there is one: accepted with probability p(C), and one uniform for a node. In mode "sampled" they are independent
    draws from q (multi-draft) and rejection is recursive::

        p_1 = p;   accept c_i where u * q(c_i) < p_i(c_i);   p_{i+1} = max(0, p_i - q), normalised

    where p_i = max(0, p - a_i q) / b_i with a_1 = 0, b_1 = 1, a_{i+1} = a_i + b_i, b_i = sum_v max(0, p - a_i q). A chain is
    a tree whose nodes have one child. Where rounding leaves nothing of p_i, p is drawn from.

    Args:
        target_logits: floating [B, M+1, V]; row 0 scores what follows the root, row i + 1 what follows node i.
        draft_tokens: int64 [B, M], target ids in [0, V), or -1 for a node that is none.
        parents: int64 [B, M], of each node its parent among the nodes before it, or -1 for the root.
        draft_logits: floating [B, P, Vd], what children were drawn from; mode "sampled" only, else None.
        uniforms: float32 or float64 in [0, 1). Mode "argmax": [B, depth + 1], one for the node at each depth. Mode "sampled":
            [B, depth * S + 1], S for the children of the node at each depth, in order, and the last draws the token that
            follows; S is at least the number of a node's children.
        depth: of the deepest node, D >= 1.
        mode: how children were proposed, "argmax" (the likeliest, or any distinct tokens) or "sampled".
        origins: int64 [B, P], the nodes whose children were drawn from `draft_logits`, -1 for the root, -2 for none.
        draft_to_target, target_temperature, draft_temperature, draft_threshold, backend: as in `verify`. Mode "argmax" runs on
            the backends of `verify`, mode "sampled" has the reference only.
        target_threshold: floating [B, M+1].

    Returns:
        Verdict of accepted_length int64 [B], tokens int64 [B, D+1] and path int64 [B, D], the accepted nodes, padded with -1.

    Raises: as `verify`.

    Source: mode "argmax": sequential rejection without replacement, as in Miao et al., "SpecInfer", 2023, for proposals of
        one token each. Mode "sampled": recursive rejection, ibid. and Sun et al., "SpecTr", 2023; the closed form is ours.
    """
    batch, positions, vocabulary = check_logits("target_logits", target_logits, "[B, M+1, V]", 3)
    nodes, device = positions - 1, target_logits.device
    if nodes < 0:
        raise wrong("target_logits", "shape [B, M+1, V] with M >= 0", list(target_logits.shape))
    if mode not in MODES:
        raise wrong("mode", f"one of {', '.join(MODES)}", repr(mode))
    if not isinstance(depth, int) or depth < 1:
        raise wrong("depth", "an int of at least 1", depth)
    for name, ids, highest in (("draft_tokens", draft_tokens, vocabulary - 1), ("parents", parents, nodes - 1)):
        check_tensor(name, ids, (torch.int64,), (batch, nodes), device)
        check_ids(name, ids + 1, highest + 1)
    if mode == "argmax":
        expected = (batch, depth + 1)
    else:
        width = uniforms.shape[-1] if isinstance(uniforms, Tensor) and uniforms.ndim else 0
        expected = (batch, max(width - 1, 0) // depth * depth + 1)
    check_tensor("uniforms", uniforms, WIDE, expected, device)
    check_uniforms("uniforms", uniforms)
    if target_threshold is not None:
        check_tensor("target_threshold", target_threshold, FLOATING, (batch, positions), device)
    target_temperature = check_temperature("target_temperature", target_temperature, (batch,), device)
    if mode == "argmax":
        return _verify_chosen(
            target_logits, draft_tokens, parents, uniforms, depth, target_temperature, target_threshold, backend
        )
    _, rows, draft_vocabulary = check_logits("draft_logits", draft_logits, "[B, P, Vd]", 3)
    assert draft_logits is not None  # or the line above had raised
    check_tensor("draft_logits", draft_logits, FLOATING, (batch, rows, draft_vocabulary), device)
    check_tensor("origins", origins, (torch.int64,), (batch, rows), device)
    if draft_to_target is not None:
        draft_to_target = _check_draft_map(draft_to_target, batch, draft_vocabulary, device, vocabulary)
        draft_to_target = draft_to_target.long().expand(batch, draft_vocabulary)
    elif draft_vocabulary != vocabulary:
        raise wrong("draft_logits", f"a vocabulary of {vocabulary}, the target's, or a draft_to_target map", draft_vocabulary)
    draft_temperature = check_temperature("draft_temperature", draft_temperature, (batch,), device)
    if draft_threshold is not None:
        check_tensor("draft_threshold", draft_threshold, FLOATING, (batch, rows), device)
    run = resolve("verify_tree", backend, device, rarer(target_logits.dtype, draft_logits.dtype))
    return run(
        target_logits, draft_tokens, parents, draft_logits, uniforms, depth, origins, draft_to_target,
        target_temperature, draft_temperature, target_threshold, draft_threshold,
    )  # fmt: skip


def _check_draft_map(
    draft_to_target: Tensor, batch: int, draft_vocabulary: int, device: torch.device, vocabulary: int
) -> Tensor:
    """`check_map` of a map that all rows share, or of one for each."""
    per_row = isinstance(draft_to_target, Tensor) and draft_to_target.dim() == 2
    shape = (batch, draft_vocabulary) if per_row else (draft_vocabulary,)
    return check_map("draft_to_target", draft_to_target, shape, device, vocabulary, distinct=False)


def _verify_chosen(
    target_logits: Tensor,
    draft_tokens: Tensor,
    parents: Tensor,
    uniforms: Tensor,
    depth: int,
    temperature: float | Tensor,
    threshold: Tensor | None,
    backend: str,
) -> Verdict:
    """Draws a token at every node, whether it is reached or not: one call, and nothing that the host has to know."""
    batch, positions, vocabulary = target_logits.shape
    level = ancestry(parents, depth)[0].clamp(max=depth)
    drawn = verify(
        target_logits.reshape(batch * positions, 1, vocabulary),
        draft_tokens.new_empty(batch * positions, 0),
        None,
        uniforms.gather(1, level).reshape(-1, 1),
        target_temperature=temperature.repeat_interleave(positions) if isinstance(temperature, Tensor) else temperature,
        target_threshold=None if threshold is None else threshold.reshape(-1, 1),
        backend=backend,
    ).tokens.view(batch, positions)
    here, alive = parents.new_zeros(batch, 1), torch.ones(batch, 1, dtype=torch.bool, device=parents.device)
    path = []
    for _ in range(depth):
        child = (parents + 1 == here) & (draft_tokens == drawn.gather(1, here))
        found, first = child.max(1, keepdim=True) if child.shape[1] else (alive & False, here)
        alive = alive & found
        path.append(torch.where(alive, first, -1))
        here = torch.where(alive, first + 1, here)
    return _walked(draft_tokens, torch.cat(path, 1), drawn.gather(1, here))


def _verify_sampled(
    target_logits: Tensor,
    draft_tokens: Tensor,
    parents: Tensor,
    draft_logits: Tensor,
    uniforms: Tensor,
    depth: int,
    origins: Tensor,
    draft_to_target: Tensor | None,
    target_temperature: float | Tensor,
    draft_temperature: float | Tensor,
    target_threshold: Tensor | None,
    draft_threshold: Tensor | None,
) -> Verdict:
    """The recursion in float64, all rows at once; waits for no device."""
    batch, nodes = draft_tokens.shape
    rows = torch.arange(batch, device=parents.device)
    children = (uniforms.shape[1] - 1) // depth
    here, alive = torch.zeros_like(rows), torch.ones_like(rows, dtype=torch.bool)
    path, final = [], None
    for level in range(depth + 1):
        at = None if target_threshold is None else target_threshold[rows, here]
        p = _distribution(target_logits[rows, here], target_temperature, at).double()
        final = p if final is None else torch.where(alive[:, None], p, final)
        if level == depth or nodes == 0:
            break
        origin = origins + 1 == here[:, None]
        known, row = origin.max(1)
        at = None if draft_threshold is None else draft_threshold[rows, row]
        q = _spread(_distribution(draft_logits[rows, row], draft_temperature, at).double(), draft_to_target, p)
        siblings = (parents + 1 == here[:, None]) & (draft_tokens >= 0) & known[:, None]
        rank = siblings.cumsum(1)
        scale, rest = p.new_zeros(batch, 1), p.new_ones(batch, 1)  # a_i and b_i
        going, chosen = alive & False, torch.zeros_like(rows)
        for child in range(children):
            exists, node = (siblings & (rank == child + 1)).max(1)
            tried = (alive & exists & ~going)[:, None]
            token = draft_tokens[rows, node].clamp(min=0)[:, None]
            draft_prob, residual = q.gather(1, token), (p - scale * q).clamp(min=0)
            u = uniforms[:, level * children + child, None].double()
            accepted = tried & (u * draft_prob * rest < residual.gather(1, token)) & (rest > 0)
            going, chosen = going | accepted[:, 0], torch.where(accepted[:, 0], node, chosen)
            rejected = tried & ~accepted
            scale = torch.where(rejected, scale + rest, scale)
            rest = torch.where(rejected, (p - scale * q).clamp(min=0).sum(1, keepdim=True), rest)
        residual = (p - scale * q).clamp(min=0)
        left = torch.where(residual.amax(1, keepdim=True) > 0, residual, p)
        final = torch.where((alive & ~going)[:, None], left, final)
        alive = alive & going
        path.append(torch.where(alive, chosen, -1))
        here = torch.where(alive, chosen + 1, here)
    path += [torch.full_like(rows, -1)] * (depth - len(path))
    assert final is not None
    return _walked(draft_tokens, torch.stack(path, 1), _inverse_cdf(final, uniforms[:, -1:]))


def _walked(draft_tokens: Tensor, path: Tensor, following: Tensor) -> Verdict:
    """The tokens of the accepted nodes `path` [B, D], then the token that follows [B, 1], then -1."""
    accepted = (path >= 0).sum(1)
    padded = functional.pad(draft_tokens, (0, 1), value=-1)  # where there is no node
    tokens = functional.pad(padded.gather(1, torch.where(path >= 0, path, draft_tokens.shape[1])), (0, 1), value=-1)
    return Verdict(accepted, tokens.scatter(1, accepted[:, None], following), path)


def verify_reference(
    target_logits: Tensor,
    draft_tokens: Tensor,
    draft_logits: Tensor | None,
    uniforms: Tensor,
    *,
    mode: str = "sampled",
    lengths: Tensor | None = None,
    draft_to_target: Tensor | None = None,
    target_temperature: float | Tensor = 1.0,
    draft_temperature: float | Tensor = 1.0,
    target_threshold: Tensor | None = None,
    draft_threshold: Tensor | None = None,
) -> Verdict:
    """`verify` in plain torch, arguments already checked. Waits for no device."""
    batch, draft_length = draft_tokens.shape
    if lengths is None:
        lengths = draft_tokens.new_full((batch,), draft_length)
    drafted = _drafted(draft_length, lengths)
    draft_tokens = draft_tokens.masked_fill(~drafted, 0)  # what pads a short row need not be a token

    if _is_zero(target_temperature):
        best = target_logits.argmax(-1)
        accepted_length = _leading((best[:, :draft_length] == draft_tokens) & drafted)
        return _verdict(draft_tokens, accepted_length, best.gather(1, accepted_length[:, None])[:, 0])

    target_probs = _distribution(target_logits, _per_position(target_temperature), target_threshold)
    rows = torch.arange(batch, device=draft_tokens.device)
    draft_ids: Tensor | None = None
    if draft_length == 0:
        return _verdict(draft_tokens, torch.zeros_like(lengths), _inverse_cdf(target_probs[:, 0], uniforms)[:, 0])

    if mode == "argmax":
        draft_probs, draft_ids = torch.ones_like(target_probs[:, :-1, :1]), draft_tokens[..., None]
    else:
        assert draft_logits is not None
        draft_probs = _distribution(draft_logits, _per_position(draft_temperature), draft_threshold)
        if draft_to_target is not None:
            shared = draft_to_target.dim() == 1
            draft_ids = (draft_to_target if shared else draft_to_target[:, None]).long().expand(draft_probs.shape)

    draft_prob = _prob_of(draft_tokens, draft_probs, draft_ids)
    target_prob = _prob_of(draft_tokens, target_probs[:, :-1], None)
    accepted_length = _leading(_accepts(uniforms[:, :-1], draft_prob, target_prob) & drafted)

    stopped = accepted_length.clamp(max=draft_length - 1)  # the rejected position; a bonus row has none and reads any
    target_row = target_probs[rows, accepted_length]
    draft_row = _spread(draft_probs[rows, stopped], None if draft_ids is None else draft_ids[rows, stopped], target_row)
    weights = _next_weights(target_row, draft_row, accepted_length < lengths)
    return _verdict(draft_tokens, accepted_length, _inverse_cdf(weights, uniforms[:, -1:])[:, 0])


def _accepts(uniforms: Tensor, draft_prob: Tensor, target_prob: Tensor) -> Tensor:
    """u * q < p, strict: u = 0 must not accept what the target never says. float64 holds float32 products exactly."""
    return uniforms.double() * draft_prob.double() < target_prob.double()


def _leading(accepted: Tensor) -> Tensor:
    """Length of the run of True that each row starts with, int64 [B]."""
    return accepted.cumprod(-1).sum(-1)


def _next_weights(target_probs: Tensor, draft_probs: Tensor, rejected: Tensor) -> Tensor:
    """Unnormalised law [B, V] of the token after the accepted ones: the residual where rejected, else the target's."""
    residual = (target_probs - draft_probs).clamp(min=0)
    recovers = rejected[:, None] & (residual.amax(-1, keepdim=True) > 0)
    return torch.where(recovers, residual, target_probs)


def _inverse_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The smallest v with cumsum(weights)[v] > u * total; [..., V] and [..., S] to int64 [..., S]; always a positive weight.

    The cumulative sum steps up only at positive weights, so the first value above any threshold below the total is one.
    The total itself, which u * total may round up to, is first reached at the last positive weight.
    """
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    total = cumulative[..., -1:].contiguous()
    drawn = torch.searchsorted(cumulative, uniforms.double() * total, right=True)
    drawn = torch.minimum(drawn, torch.searchsorted(cumulative, total)).clamp(max=weights.shape[-1] - 1)
    if weights.device.type != "cpu":
        # A parallel scan associates its sums differently from one id to the next and may step where no weight lies.
        drawn = torch.where(weights.gather(-1, drawn) > 0, drawn, weights.argmax(-1, keepdim=True))
    return drawn


def _distribution(logits: Tensor, temperature: float | Tensor, threshold: Tensor | None) -> Tensor:
    """softmax(logits / temperature) over what the threshold leaves; float32 or wider; a point mass at temperature 0."""
    if logits.dtype not in WIDE:
        logits = logits.float()
    if threshold is not None:
        logits = logits.masked_fill(logits < threshold[..., None], -math.inf)
    if not isinstance(temperature, Tensor) and temperature == 1:
        return logits.softmax(-1)
    if _is_zero(temperature):
        return _point_mass(logits)
    # The maximum goes first: a small temperature must not overflow. One below the smallest normal number acts as that.
    centred = logits - logits.amax(-1, keepdim=True)
    smallest = torch.finfo(logits.dtype).tiny
    if not isinstance(temperature, Tensor):
        return centred.div_(max(temperature, smallest)).softmax(-1)
    temperature = temperature[..., None]
    warm = centred.div_(temperature.to(logits.dtype).clamp(min=smallest)).softmax(-1)
    return torch.where(temperature == 0, _point_mass(logits), warm)


def _point_mass(logits: Tensor) -> Tensor:
    """All probability on the first argmax."""
    return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1)


def _prob_of(tokens: Tensor, probs: Tensor, ids: Tensor | None) -> Tensor:
    """Probability [B, K] of each token under probs [B, K, W] over ids [B, K, W]; ids None means 0..W-1."""
    if ids is None:
        return probs.gather(-1, tokens[..., None])[..., 0]
    return (probs * (ids == tokens[..., None])).sum(-1)


def _spread(probs: Tensor, ids: Tensor | None, like: Tensor) -> Tensor:
    """probs [B, W] over ids [B, W] as a dense row [B, V]; ids None means it is one already."""
    return probs if ids is None else probs.new_zeros(like.shape).scatter_add_(-1, ids, probs)


def _verdict(draft_tokens: Tensor, accepted_length: Tensor, following: Tensor) -> Verdict:
    """The accepted prefix of each row, then the token that follows, then -1."""
    accepted = functional.pad(_drafted(draft_tokens.shape[1], accepted_length), (0, 1))
    tokens = functional.pad(draft_tokens, (0, 1)).masked_fill(~accepted, -1)
    return Verdict(accepted_length, tokens.scatter(1, accepted_length[:, None], following[:, None]))


def _drafted(draft_length: int, lengths: Tensor) -> Tensor:
    """bool [B, K]: which columns lie within each row's length."""
    return torch.arange(draft_length, device=lengths.device) < lengths[:, None]


def _per_position(temperature: float | Tensor) -> float | Tensor:
    """A row's temperature [B], shaped to serve all its positions [B, 1]."""
    return temperature[:, None] if isinstance(temperature, Tensor) else temperature


def _is_zero(temperature: float | Tensor) -> bool:
    """Known to be 0 for every row without asking a device."""
    return not isinstance(temperature, Tensor) and temperature == 0


def _self_test_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Small calls of `verify_reference`. No uniform is near a step, so that every right implementation emits the same tokens
    (a test moves the uniforms to see that)."""

    def case(
        name: str,
        target: Tensor,
        tokens: Tensor,
        draft: Tensor | None,
        seed: int,
        target_dtype: torch.dtype = dtype,
        **options: Any,
    ) -> Case:
        uniforms = scattered(*target.shape[:2], seed=seed, low=0.0).to(options.pop("uniforms_dtype", torch.float32))
        arguments = target.to(target_dtype), tokens, None if draft is None else draft.to(dtype), uniforms
        return Case(name, arguments, options)

    target = 3 * scattered(4, 5, 257, seed=1)
    draft = target[:, :4] + 0.7 * scattered(4, 4, 257, seed=2)
    tokens = draft.argmax(-1)
    yield case("one token", scattered(1, 2, 1), tokens[:1, :1] * 0, scattered(1, 1, 1), 3)
    yield case("odd vocabulary", target, tokens, draft, 4, lengths=torch.tensor([4, 2, 0, 3]))
    yield case("argmax", target, target[:, :4].argmax(-1), None, 5, mode="argmax", target_temperature=0.06)
    if dtype is not torch.float32:
        yield case("target in float32", target, tokens, draft, 6, target_dtype=torch.float32)

    wide = scattered(3, 1, 9001, seed=7)
    places = [0, 1023, 1024, 4095, 4096, 8191, 8192, 9000]  # the ends, and around sizes that blocks may have
    wide[..., places] += 10 + scattered(8, seed=8)
    yield case("no draft, wide vocabulary", wide, tokens[:3, :0], None, 9)
    wide = wide.view(1, 3, 9001)
    yield case("wide vocabulary", wide, wide[:, :2].argmax(-1), wide[:, :2] + scattered(1, 2, 9001, seed=10), 11)

    ids = torch.arange(37, device="cpu") * 11 % 101
    few = 2 * scattered(3, 3, 37, seed=12)
    reduced = 0.5 * scattered(3, 4, 101, seed=13)
    reduced[:, :3, ids] += 1.5 * few
    yield case(
        "reduced vocabulary", reduced, ids[few.argmax(-1)], few, 14, draft_to_target=ids.int(), draft_temperature=0.8,
        target_threshold=torch.full((3, 4), -1.0), draft_threshold=torch.full((3, 3), 0.25),
    )  # fmt: skip
    maps = torch.stack([ids, (ids + 50) % 101, (ids + 64) % 101])
    reduced = (reduced - 1).scatter_add(2, maps[:, None].expand(few.shape), 1.5 * few)
    yield case(
        "a map of each row", reduced, maps.gather(1, few.argmax(-1)), few, 15, draft_to_target=maps.int(),
        target_temperature=torch.tensor([0.7, 0.0, 1.5]), draft_temperature=torch.tensor([1.0, 2.0, 0.0]),
        uniforms_dtype=torch.float64,
    )  # fmt: skip

    tied = torch.zeros(2, 3, 70, dtype=torch.float64, device="cpu")
    tied[:, :, [3, 69]] = 2.0
    yield case("ties at temperature 0", tied, torch.tensor([[3, 69], [0, 3]]), None, 16, target_temperature=0.0)
    extreme = 4 * scattered(2, 3, 65, seed=17)
    extreme[0, :, 64], extreme[1, :, ::2] = 3e4, -math.inf
    drafted = extreme[:, :2].flip(-1)
    yield case("extreme logits", extreme, torch.tensor([[64, 0], [1, 64]]), drafted, 18, target_temperature=1.5)


register_kernels("verify", verify_reference)
register_cases("verify", _self_test_cases)
register("verify_tree", "reference", lambda: _verify_sampled)
