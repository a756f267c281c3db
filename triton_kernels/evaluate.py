"""Evaluation as one Triton launch: every drafter against the target at every position."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from hedgespec.triton_kernels import _common
from hedgespec.triton_kernels._common import (
    NEVER,
    NO_ID,
    SLOT,
    Config,
    accumulate,
    arrive,
    first_of_highest,
    known_token,
    load_logits,
    merge_slots,
    multiple_of_16,
    read_length,
    read_temperature,
    read_threshold,
    reciprocal,
    reduce_lanes,
    row_of,
    store_slot,
)

from hedgespec.ops.launch import as_float32, dense_vocabulary, empty_evaluation, split_temperature
from hedgespec.records import Evaluation, score_row

_GROUP = tl.constexpr(30)
"""Drafters that share one word of arrivals."""
_TARGET = tl.constexpr(1 << 30)
"""The target's bit in each of them."""
_LOWEST_KEY = tl.constexpr(-(2**63))
_HIGHEST_KEY = tl.constexpr(2**63 - 1)
_STARTS = tl.constexpr(64)
"""Positions whose losses are computed side by side."""


@triton.jit
def _keys(logits, ids):
    """int64 that order as candidates do: by value, then the lower id first. -inf is the lowest of all."""
    bits = tl.where(logits == 0.0, 0.0, logits).to(tl.int32, bitcast=True)  # 0.0 and -0.0 tie
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    return tl.where(logits > NEVER, (ordered << 32) | (ids ^ NO_ID).to(tl.int64), _LOWEST_KEY)


@triton.jit
def _no_candidates(COUNT: tl.constexpr, LANES: tl.constexpr):
    """COUNT free places, each with a key of its own below every candidate's; the lanes past them never give way."""
    lanes = tl.arange(0, LANES).to(tl.int64)
    return tl.where(lanes < COUNT, lanes + (_LOWEST_KEY + 1), _HIGHEST_KEY)


@triton.jit
def _keep_best(kept, keys):
    """Takes into `kept` those of `keys` that belong there, each in the place of the worst."""
    best, worst = tl.max(keys, 0), tl.min(kept, 0)
    while best > worst:
        kept = tl.where(kept == worst, best, kept)
        keys = tl.where(keys == best, _LOWEST_KEY, keys)
        best, worst = tl.max(keys, 0), tl.min(kept, 0)
    return kept


@triton.jit
def _log_probs(logits, ids, highest, scale, log_total, best, cold):
    """Log-probabilities in the dtype of `scale`. The highest logit goes first, so that no temperature can overflow."""
    warm = (logits - highest) * scale - log_total
    return tl.where(cold, tl.where(ids == best, 0.0, NEVER), warm)


@triton.jit
def _length_losses(prob, ratio, whole, losses, length, positions, draft_length, PRODUCT: tl.constexpr):
    """The losses of rounds that start at each position of one row, and the expected length of one from its first.

    L = 1 + sum_k prod_{j < k} survival[j] * prob[k], where survival is the ratio, or the prob with PRODUCT.

    Source: with PRODUCT arXiv 2510.20064, Theorem 3; else ours, as `expected_accepted_length` in hedgespec/ops/evaluate.py.
    """
    lanes = tl.arange(0, _STARTS)
    unknown = tl.full([_STARTS], float("nan"), tl.float32)
    for first in tl.range(0, positions, _STARTS):
        starts = first + lanes
        alive = tl.full([_STARTS], 1.0, tl.float32)
        expected = tl.full([_STARTS], 1.0, tl.float32)
        for k in tl.range(0, draft_length):
            known = starts + k < length
            acceptance = tl.load(prob + starts + k, mask=known, other=0.0, cache_modifier=".cg")
            expected += alive * acceptance
            if PRODUCT:
                alive *= acceptance
            else:
                alive *= tl.load(ratio + starts + k, mask=known, other=0.0, cache_modifier=".cg")
            loss = tl.where(known, 1.0 - expected / (k + 2), unknown)
            tl.store(losses + starts.to(tl.int64) * draft_length + k, loss, mask=starts < positions)
        tl.store(whole + lanes * 0, tl.where(draft_length <= length, expected, unknown), mask=starts == 0)


@triton.jit(
    do_not_specialize=[
        "drafters", "batch", "positions", "vocabulary", "draft_vocabulary",
        "target_stride_batch", "target_stride_position",
        "drafter_stride_drafter", "drafter_stride_batch", "drafter_stride_position",
        "target_blocks", "drafter_blocks", "target_splits", "drafter_splits", "draft_length",
    ],
    do_not_specialize_on_alignment=[
        "target_logits", "drafter_logits", "tokens", "lengths", "draft_to_target", "target_threshold",
        "drafter_threshold", "target_temperatures", "drafter_temperatures", "scores", "whole", "losses",
    ],
)  # fmt: skip
def evaluate_kernel(
    target_logits,  # [B, T, V]
    drafter_logits,  # [N, B, T, Vd]
    tokens,  # [B, T]
    lengths,  # [B] or None
    draft_to_target,  # [N, Vd] or None
    target_threshold,  # [B, T] or None
    drafter_threshold,  # [N, B, T] or None
    target_temperatures,  # [B] or None
    drafter_temperatures,  # [B] or None
    scores,  # [4 + 2 TOP_K, N, B, T]
    whole,  # [N, B] or None
    losses,  # [N, B, T, K] or None
    counters,  # zeroed; [B, T], [N, B, T], [B, T, words] and [N, B]
    slots,  # [B, T, target_splits] and [N, B, T, drafter_splits] of 8 words, then the drafters' candidates
    target_temperature: tl.float32,
    drafter_temperature: tl.float32,
    drafters: tl.int32,
    batch: tl.int32,
    positions: tl.int32,
    vocabulary: tl.int32,
    draft_vocabulary: tl.int32,
    target_stride_batch: tl.int64,
    target_stride_position: tl.int64,
    drafter_stride_drafter: tl.int64,
    drafter_stride_batch: tl.int64,
    drafter_stride_position: tl.int64,
    target_blocks: tl.int32,  # in a slice
    drafter_blocks: tl.int32,
    target_splits: tl.int32,
    drafter_splits: tl.int32,
    draft_length: tl.int32,
    TOP_K: tl.constexpr,  # 0: not asked for
    CANDIDATES: tl.constexpr,  # the power of two that holds TOP_K
    PLANE: tl.constexpr,  # which of the scores the losses are made of
    PRODUCT: tl.constexpr,
    TARGET_ALIGNED: tl.constexpr,
    DRAFTER_ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    MOST: tl.constexpr,
):
    vocabulary = multiple_of_16(vocabulary, TARGET_ALIGNED)
    draft_vocabulary = multiple_of_16(draft_vocabulary, DRAFTER_ALIGNED)
    lanes = tl.arange(0, BLOCK)

    # The target's programs come first: everything waits for them. Programs are few enough for 32 bits, in which dividing
    # is far cheaper; what they address is not.
    program = tl.program_id(0)
    rows = batch * positions
    target_slots = rows * target_splits
    is_target = program < target_slots
    place = tl.where(is_target, program, program - target_slots)
    splits = tl.where(is_target, target_splits, drafter_splits)
    split = place % splits
    pair = place // splits
    row = pair % rows
    own = pair // rows  # 0 for the target
    b = row // positions
    t = row % positions
    length = read_length(lengths, b, positions)
    alive = t < length

    target_heat = read_temperature(target_temperature, target_temperatures, b)
    drafter_heat = read_temperature(drafter_temperature, drafter_temperatures, b)
    target_scale, drafter_scale = reciprocal(target_heat), reciprocal(drafter_heat)
    target_cold, drafter_cold = target_heat == 0.0, drafter_heat == 0.0
    target_floor = read_threshold(target_threshold, row, alive)
    target_offset = b.to(tl.int64) * target_stride_batch + t.to(tl.int64) * target_stride_position
    target_row = row_of(target_logits, target_offset, TARGET_ALIGNED)
    drafter_offset = b.to(tl.int64) * drafter_stride_batch + t.to(tl.int64) * drafter_stride_position
    keys = (slots + tl.num_programs(0).to(tl.int64) * SLOT).to(tl.pointer_type(tl.int64))

    # Statistics of this program's slice. Past a row's length nothing is read, for nobody promised what lies there.
    blocks = tl.where(is_target, target_blocks, drafter_blocks)
    start = split * blocks * BLOCK
    highest = tl.full([BLOCK], NEVER, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    best = tl.full([BLOCK], NO_ID, tl.int32)
    if alive:
        if is_target:
            for first in tl.range(start, tl.minimum(start + blocks * BLOCK, vocabulary), BLOCK, num_stages=3):
                ids = first + lanes
                logits = load_logits(target_row, ids, ids < vocabulary, target_floor)
                best = tl.where(logits > highest, ids, best)
                highest, total = accumulate(highest, total, logits, target_scale)
            top, sum_of_lanes = reduce_lanes(highest, total, target_scale)
            store_slot(slots, program, top, sum_of_lanes, first_of_highest(highest, best, top))
        else:
            drafter_row = row_of(drafter_logits, drafter_offset + own.to(tl.int64) * drafter_stride_drafter, DRAFTER_ALIGNED)
            drafter_floor = read_threshold(drafter_threshold, pair, alive)
            if TOP_K > 0:
                kept = _no_candidates(TOP_K, CANDIDATES)
            for first in tl.range(start, tl.minimum(start + blocks * BLOCK, draft_vocabulary), BLOCK, num_stages=3):
                ids = first + lanes
                logits = load_logits(drafter_row, ids, ids < draft_vocabulary, drafter_floor)
                best = tl.where(logits > highest, ids, best)
                highest, total = accumulate(highest, total, logits, drafter_scale)
                if TOP_K > 0:
                    kept = _keep_best(kept, _keys(logits, ids))
            top, sum_of_lanes = reduce_lanes(highest, total, drafter_scale)
            store_slot(slots, program, top, sum_of_lanes, first_of_highest(highest, best, top))
            if TOP_K > 0:
                places = tl.arange(0, CANDIDATES)
                tl.store(keys + place.to(tl.int64) * TOP_K + places, kept, mask=places < TOP_K)

    # Who goes on: of a drafter's programs and the target's the last, wherever it comes from. Each side has a counter of
    # its own; the last of a side then sets that side's bit, and who finds the other's bit set has everything before it.
    # A row past its length has nothing to meet for: its drafter's first program writes the zeros.
    target_counters = counters
    drafter_counters = target_counters + rows
    arrivals = drafter_counters + drafters * rows
    words = (drafters + _GROUP - 1) // _GROUP
    length_counters = arrivals + rows * words

    goes_on = (split == 0) & (is_target == 0)
    if alive:
        goes_on = arrive(tl.where(is_target, target_counters + row, drafter_counters + pair), splits)
    if goes_on:
        first_word = own // _GROUP
        last_word = first_word + 1
        if is_target:
            first_word = first_word * 0
            last_word = words
            if alive == 0:
                last_word = first_word
        for word in tl.range(first_word, last_word):
            members = tl.minimum(drafters - word * _GROUP, _GROUP)
            bit = tl.where(is_target, _TARGET, 1 << (own % _GROUP))
            due = bit
            if alive:
                arrival = arrivals + row * words + word
                before = tl.atomic_or(arrival, bit, sem="acq_rel", scope="gpu")
                if (before | bit) == (((1 << members) - 1) | _TARGET):
                    tl.store(arrival, 0)
                tl.debug_barrier()
                due = tl.where(is_target, before, tl.where((before & _TARGET) != 0, bit, 0))
            for member in tl.range(0, members):
                if ((due >> member) & 1) != 0:
                    n = word * _GROUP + member
                    cell = rows * n + row
                    drafter_row = row_of(drafter_logits, drafter_offset + drafter_stride_drafter * n, DRAFTER_ALIGNED)
                    drafter_floor = read_threshold(drafter_threshold, cell, alive)
                    first_slot = cell * drafter_splits
                    if draft_to_target is not None:
                        drafter_map = draft_to_target + draft_vocabulary.to(tl.int64) * n
                    target_top, target_total, target_best = merge_slots(
                        slots, row * target_splits, tl.where(alive, target_splits, 0), target_scale, MOST
                    )
                    drafter_top, drafter_total, drafter_best = merge_slots(
                        slots, target_slots + first_slot, tl.where(alive, drafter_splits, 0), drafter_scale, MOST
                    )
                    has_mass = (target_top > NEVER) & (drafter_top > NEVER)
                    # Rows without mass compute on with harmless numbers, and their scores are dropped at the end.
                    target_log_total = tl.where(has_mass, tl.log(tl.where(has_mass, target_total, 1.0)), 0.0)
                    drafter_log_total = tl.where(has_mass, tl.log(tl.where(has_mass, drafter_total, 1.0)), 0.0)
                    target_top, drafter_top = tl.where(has_mass, target_top, 0.0), tl.where(has_mass, drafter_top, 0.0)
                    token = known_token(tl.load(tokens + row, mask=alive, other=-1), vocabulary)

                    # The overlap, sum over v of min(p, q) as exp(min(log p, log q)): one exponential for the two. It is
                    # over the draft vocabulary, outside of which q is 0.
                    overlap = tl.zeros([BLOCK], tl.float32)
                    emitted = tl.full([BLOCK], NEVER, tl.float32)
                    for first in tl.range(0, tl.where(has_mass, draft_vocabulary, 0), BLOCK):
                        draft_ids = first + lanes
                        present = draft_ids < draft_vocabulary
                        draft = load_logits(drafter_row, draft_ids, present, drafter_floor)
                        ids = draft_ids
                        if draft_to_target is not None:
                            at = drafter_map + draft_ids
                            ids = tl.load(at, mask=present, other=0)
                            emitted = tl.where(ids == token, tl.maximum(emitted, draft), emitted)
                        target = load_logits(target_row, ids, present, target_floor)
                        overlap += tl.exp(
                            tl.minimum(
                                _log_probs(
                                    target, ids, target_top, target_scale,
                                    target_log_total.to(tl.float32), target_best, target_cold,
                                ),
                                _log_probs(
                                    draft, draft_ids, drafter_top, drafter_scale,
                                    drafter_log_total.to(tl.float32), drafter_best, drafter_cold,
                                ),
                            )
                        )  # fmt: skip
                    prob = tl.minimum(tl.sum(overlap, 0), 1.0)

                    # The emitted token and the likeliest one, in float64 and in logarithms: the ratio stays right where
                    # both probabilities underflow.
                    inside = has_mass & (token >= 0)
                    emitted_target = load_logits(target_row, token, inside, target_floor)
                    proposal = tl.where(has_mass, drafter_best, 0)
                    if draft_to_target is not None:
                        proposal = tl.load(drafter_map + proposal)
                        emitted_draft = tl.max(emitted, 0)
                    else:
                        emitted_draft = load_logits(drafter_row, token, inside, drafter_floor)
                    log_target = _log_probs(
                        emitted_target.to(tl.float64), token, target_top,
                        target_scale.to(tl.float64), target_log_total, target_best, target_cold,
                    )  # fmt: skip
                    log_draft = _log_probs(
                        emitted_draft.to(tl.float64), token, drafter_top,
                        drafter_scale.to(tl.float64), drafter_log_total, proposal, drafter_cold,
                    )  # fmt: skip
                    can_draft = log_draft > NEVER
                    quotient = tl.where(can_draft, tl.minimum(log_draft - log_target, 0.0), 0.0)
                    ratio = tl.where(can_draft, tl.exp(quotient), 0.0)
                    proposed = load_logits(target_row, proposal, has_mass, target_floor)
                    argmax_prob = tl.exp(
                        _log_probs(
                            proposed.to(tl.float64), proposal, target_top,
                            target_scale.to(tl.float64), target_log_total, target_best, target_cold,
                        )
                    )  # fmt: skip

                    plane = drafters.to(tl.int64) * rows
                    at = scores + cell
                    tl.store(at, tl.where(has_mass, prob, 0.0))
                    tl.store(at + plane, tl.where(has_mass, ratio, 0.0).to(tl.float32))
                    tl.store(at + plane * 2, tl.where(has_mass, argmax_prob, 0.0).to(tl.float32))
                    tl.store(at + plane * 3, tl.where(has_mass & (proposal == token), 1.0, 0.0))

                    if TOP_K > 0:
                        kept = _no_candidates(TOP_K, CANDIDATES)
                        count = tl.where(has_mass, drafter_splits * TOP_K, 0)
                        for first in tl.range(0, count, CANDIDATES):
                            places = first + tl.arange(0, CANDIDATES)
                            slice_keys = tl.load(
                                keys + first_slot.to(tl.int64) * TOP_K + places,
                                mask=places < count,
                                other=_LOWEST_KEY,
                                cache_modifier=".cg",
                            )
                            # A free place of a slice is no candidate.
                            slice_keys = tl.where(slice_keys > _LOWEST_KEY + CANDIDATES, slice_keys, _LOWEST_KEY)
                            kept = _keep_best(kept, slice_keys)
                        usable = (kept > _LOWEST_KEY + CANDIDATES) & (kept < _HIGHEST_KEY)
                        ids = tl.where(usable, (kept & 0x7FFFFFFF).to(tl.int32) ^ NO_ID, 0)
                        if draft_to_target is not None:
                            ids = tl.load(drafter_map + ids, mask=usable, other=0)
                        candidates = load_logits(target_row, ids, usable, target_floor)
                        probs = tl.exp(
                            _log_probs(
                                candidates, ids, target_top, target_scale,
                                target_log_total.to(tl.float32), target_best, target_cold,
                            )
                        )  # fmt: skip
                        probs = tl.where(usable, probs, 0.0)
                        hits = (usable & (ids == token)).to(tl.float32)
                        # Keys are distinct, so nothing is sorted: what is no worse than a candidate is the prefix that ends
                        # with it. All prefixes are added up in one order, so rounding leaves none above the next.
                        is_place = kept < _HIGHEST_KEY
                        ranked = tl.where(is_place, kept, _LOWEST_KEY)
                        within = ranked[None, :] >= ranked[:, None]
                        size = tl.sum(within.to(tl.int32), 1)
                        mass = tl.sum(tl.where(within, probs[None, :], 0.0), 1)
                        hit = tl.max(tl.where(within, hits[None, :], 0.0), 1)
                        of_prefix = at + plane * (2 + 2 * size)
                        tl.store(of_prefix, tl.minimum(mass, 1.0), mask=is_place)
                        tl.store(of_prefix + plane, hit, mask=is_place)

                    # The losses need every position of the row: the last program there makes them.
                    if losses is not None:
                        line = batch.to(tl.int64) * n + b
                        if arrive(length_counters + line, positions):
                            prob_row = scores + plane * PLANE + line * positions
                            _length_losses(
                                prob_row,
                                prob_row + plane,
                                whole + line,
                                losses + line * positions * draft_length,
                                length,
                                positions,
                                draft_length,
                                PRODUCT,
                            )


CONFIGS = (Config(2048, 8), Config(4096, 8), Config(4096, 16), Config(1024, 4))
"""What HEDGESPEC_TRITON_TUNE=1 tries."""


def evaluate_triton(
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
    """`evaluate` as one Triton launch, in float32. Arguments are taken as checked."""
    target_logits, drafter_logits = dense_vocabulary(target_logits), dense_vocabulary(drafter_logits)
    drafters, batch, positions, draft_vocabulary = drafter_logits.shape
    vocabulary, device = target_logits.shape[2], target_logits.device
    result = empty_evaluation(drafters, batch, positions, top_k, draft_length, device)
    if tokens.numel():
        target_strides, drafter_strides = _common.strides_of(target_logits), _common.strides_of(drafter_logits)
        shared_target, target_temperatures = split_temperature(target_temperature)
        shared_drafter, drafter_temperatures = split_temperature(drafter_temperature)
        tensors = (
            target_logits,
            drafter_logits,
            tokens.contiguous(),
            None if lengths is None else lengths.contiguous(),
            draft_to_target,
            as_float32(target_threshold),
            as_float32(drafter_threshold),
            target_temperatures,
            drafter_temperatures,
            result.scores,
            result.expected_accepted_length,
            result.length_losses,
        )
        rows = batch * positions
        words = -(-drafters // _GROUP.value)
        counters = 4 * (rows * (1 + drafters + words) + drafters * batch)

        def run(config: Config) -> None:
            target_blocks, drafter_blocks = slices(drafters, rows, vocabulary, draft_vocabulary, config.block, device)
            target_splits = _common.splits(vocabulary, target_blocks, config.block)
            drafter_splits = _common.splits(draft_vocabulary, drafter_blocks, config.block)
            drafter_slots = drafters * rows * drafter_splits
            programs = rows * target_splits + drafter_slots
            # Two buffers: the counters are zero between launches, whatever the shape, and the rest never is.
            launch = _common.launcher(evaluate_kernel, programs, config, device)
            launch(
                *tensors,
                _common.scratch(device, counters, "triton evaluate counters").view(torch.int32),
                _common.scratch(
                    device, programs * _common.SLOT_BYTES + drafter_slots * (top_k or 0) * 8, "triton evaluate slots"
                ).view(torch.float32),
                shared_target,
                shared_drafter,
                drafters,
                batch,
                positions,
                vocabulary,
                draft_vocabulary,
                *target_strides,
                *drafter_strides,
                target_blocks,
                drafter_blocks,
                target_splits,
                drafter_splits,
                draft_length or 0,
                TOP_K=top_k or 0,
                CANDIDATES=_common.power_of_two(top_k or 1),
                PLANE=score_row(mode, top_k),
                PRODUCT=estimator == "product",
                TARGET_ALIGNED=_common.aligned(target_logits, target_strides),
                DRAFTER_ALIGNED=_common.aligned(drafter_logits, drafter_strides),
                BLOCK=config.block,
                MOST=_common.MOST_SPLITS,
            )

        bucket = (
            "evaluate",
            device,
            target_logits.dtype,
            drafters,
            batch,
            _common.position_bucket(positions),
            vocabulary,
            draft_vocabulary,
            top_k,
        )
        run(_common.tuned(bucket, configuration(drafters, batch, positions, vocabulary, device), CONFIGS, run, device))
    return result


def configuration(drafters: int, batch: int, positions: int, vocabulary: int, device: torch.device) -> Config:
    """The heuristic: what is left when the slices are done is one program a drafter and position, so where those are too
    few to fill the GPU each is made as wide as it gets."""
    pairs = drafters * batch * _common.position_bucket(positions)
    widest = Config(4096, 16) if pairs <= 2 * _common.processors(device) else Config(2048, 8)
    return Config(min(widest.block, max(64, _common.power_of_two(vocabulary))), widest.warps)


def slices(
    drafters: int, rows: int, vocabulary: int, draft_vocabulary: int, block: int, device: torch.device
) -> tuple[int, int]:
    """Blocks in a slice of the target's rows and of the drafters'.

    As many slices as make four programs for each processor. The target's are half as long where they can be, so that its
    programs finish first and the merging falls to the drafters' programs, many side by side, and not to the target's last.
    """
    wanted = -(-4 * _common.processors(device) // (rows * (drafters + 1)))
    drafter_blocks = _common.slice_blocks(draft_vocabulary, wanted, block)
    if wanted == 1:
        return _common.slice_blocks(vocabulary, 1, block), drafter_blocks
    return _common.slice_blocks(vocabulary, -(-2 * vocabulary // (drafter_blocks * block)), block), drafter_blocks
