"""Verification of a drafted chain as one Triton launch: the accepted prefix, and the token that follows it."""

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
    merge_tops,
    multiple_of_16,
    read_length,
    read_temperature,
    read_threshold,
    reciprocal,
    reduce_lanes,
    row_of,
    store_slot,
)
from torch import Tensor

from hedgespec.ops.launch import as_float32, dense_vocabulary, not_quite_zero, split_temperature
from hedgespec.records import Verdict


@triton.jit
def _probs(logits, ids, highest, scale, share, best, cold):
    """Probabilities in float32; `share` is one over the sum of exponentials, 0 for a row without mass.

    The same steps for target and proposal, so that where one covers the other their difference is exactly 0.
    """
    warm = tl.exp((logits - highest) * scale) * share
    return tl.where(cold, tl.where(ids == best, 1.0, 0.0), warm)


@triton.jit
def _prob_of_one(logit, highest, scale, total):
    """Probability, in float64, of tokens with these logits; 0 for a row without mass."""
    usable = (total > 0.0) & (logit > NEVER)
    distance = tl.where(usable, logit.to(tl.float64) - highest, 0.0)
    return tl.where(usable, tl.exp(distance * scale) / tl.where(usable, total, 1.0), 0.0)


@triton.jit
def _load_column(slots, column: tl.constexpr, present, other):
    # .cg: other programs wrote these, and a first-level cache would not know.
    return tl.load(slots + column, mask=present, other=other, cache_modifier=".cg")


@triton.jit
def _pick(values, places, place):
    """values[place]"""
    return tl.sum(tl.where(places == place, values, 0), 0)


@triton.jit(
    do_not_specialize=[
        "batch", "draft_length", "vocabulary", "draft_vocabulary",
        "target_stride_batch", "target_stride_position", "draft_stride_batch", "draft_stride_position", "map_stride_batch",
        "target_blocks", "draft_blocks", "target_splits", "draft_splits",
    ],
    do_not_specialize_on_alignment=[
        "target_logits", "draft_tokens", "draft_logits", "uniforms", "lengths", "draft_to_target", "target_threshold",
        "draft_threshold", "target_temperatures", "draft_temperatures", "accepted_length", "tokens",
    ],
)  # fmt: skip
def verify_kernel(
    target_logits,  # [B, K+1, V]
    draft_tokens,  # [B, K]
    draft_logits,  # [B, K, Vd], or None: the proposal is a point mass on the drafted token
    uniforms,  # [B, K+1]
    lengths,  # [B] or None
    draft_to_target,  # [Vd] or [B, Vd], or None
    target_threshold,  # [B, K+1] or None
    draft_threshold,  # [B, K] or None
    target_temperatures,  # [B] or None
    draft_temperatures,  # [B] or None
    accepted_length,  # [B]
    tokens,  # [B, K+1]
    counters,  # [B], zeroed
    spread,  # [B, V] zeroed, where there is a map
    slots,  # [B, (K+1) * target_splits + K * draft_splits] of 8 words, then [B, TILES] float64
    target_temperature: tl.float32,
    draft_temperature: tl.float32,
    batch: tl.int32,
    draft_length: tl.int32,
    vocabulary: tl.int32,
    draft_vocabulary: tl.int32,
    target_stride_batch: tl.int64,
    target_stride_position: tl.int64,
    draft_stride_batch: tl.int64,
    draft_stride_position: tl.int64,
    map_stride_batch: tl.int64,
    target_blocks: tl.int32,  # in a slice
    draft_blocks: tl.int32,
    target_splits: tl.int32,
    draft_splits: tl.int32,
    PLACES: tl.constexpr,  # a power of two that holds K+1
    TILES: tl.constexpr,  # a power of two that holds the blocks of a target row
    TARGET_ALIGNED: tl.constexpr,
    DRAFT_ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    MOST: tl.constexpr,
):
    vocabulary = multiple_of_16(vocabulary, TARGET_ALIGNED)
    lanes = tl.arange(0, BLOCK)
    program = tl.program_id(0)
    target_slots = (draft_length + 1) * target_splits
    row_slots = target_slots
    if draft_logits is not None:
        draft_vocabulary = multiple_of_16(draft_vocabulary, DRAFT_ALIGNED)
        row_slots += draft_length * draft_splits
    b = program // row_slots
    place = program % row_slots
    is_target = place < target_slots
    place = tl.where(is_target, place, place - target_slots)
    splits = tl.where(is_target, target_splits, draft_splits)
    k = place // splits
    split = place % splits
    length = read_length(lengths, b, draft_length)

    target_heat = read_temperature(target_temperature, target_temperatures, b)
    target_scale, target_cold = reciprocal(target_heat), target_heat == 0.0
    draft_heat = read_temperature(draft_temperature, draft_temperatures, b)
    draft_scale, draft_cold = reciprocal(draft_heat), draft_heat == 0.0
    wide = b.to(tl.int64)
    target_rows = wide * target_stride_batch
    first_position = wide * (draft_length + 1)
    first_token = wide * draft_length
    if draft_to_target is not None:
        draft_to_target += wide * map_stride_batch
        spread += wide * vocabulary

    # Statistics of this program's slice, and with a map the exponentials of the draft ids that mean the drafted token, each
    # taken against the highest of them: a single one gives the same probability as a lookup does where there is no map.
    highest = tl.full([BLOCK], NEVER, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    best = tl.full([BLOCK], NO_ID, tl.int32)
    if is_target:
        if k <= length:
            floor = read_threshold(target_threshold, first_position + k, True)
            row = row_of(target_logits, target_rows + k.to(tl.int64) * target_stride_position, TARGET_ALIGNED)
            start = split * target_blocks * BLOCK
            for first in tl.range(start, tl.minimum(start + target_blocks * BLOCK, vocabulary), BLOCK, num_stages=3):
                ids = first + lanes
                logits = load_logits(row, ids, ids < vocabulary, floor)
                best = tl.where(logits > highest, ids, best)
                highest, total = accumulate(highest, total, logits, target_scale)
            top, whole = reduce_lanes(highest, total, target_scale)
            store_slot(slots, program, top, whole, first_of_highest(highest, best, top))
    elif draft_logits is not None:  # noqa: SIM102 (this is settled while compiling, what follows is not)
        if k < length:
            floor = read_threshold(draft_threshold, first_token + k, True)
            row = row_of(draft_logits, wide * draft_stride_batch + k.to(tl.int64) * draft_stride_position, DRAFT_ALIGNED)
            start = split * draft_blocks * BLOCK
            drafted = known_token(tl.load(draft_tokens + first_token + k), vocabulary)
            hit_highest = tl.full([BLOCK], NEVER, tl.float32)
            hit_total = tl.zeros([BLOCK], tl.float32)
            for first in tl.range(start, tl.minimum(start + draft_blocks * BLOCK, draft_vocabulary), BLOCK, num_stages=3):
                ids = first + lanes
                present = ids < draft_vocabulary
                logits = load_logits(row, ids, present, floor)
                best = tl.where(logits > highest, ids, best)
                highest, total = accumulate(highest, total, logits, draft_scale)
                if draft_to_target is not None:
                    meaning = tl.load(draft_to_target + ids, mask=present, other=-1)
                    hits = tl.where(meaning == drafted, logits, NEVER)
                    hit_highest, hit_total = accumulate(hit_highest, hit_total, hits, draft_scale)
            top, whole = reduce_lanes(highest, total, draft_scale)
            store_slot(slots, program, top, whole, first_of_highest(highest, best, top))
            if draft_to_target is not None:
                top, whole = reduce_lanes(hit_highest, hit_total, draft_scale)
                at = slots + program.to(tl.int64) * SLOT
                tl.store(at + 3, top)
                tl.store(at + 4, whole)

    if arrive(counters + b, row_slots):
        # The chain, all positions side by side, in float64.
        places = tl.arange(0, PLACES)
        parts = tl.arange(0, MOST)
        drafted_here = places < length
        drafted = known_token(tl.load(draft_tokens + first_token + places, mask=drafted_here, other=-1), vocabulary)
        uniform = tl.load(uniforms + first_position + places, mask=drafted_here, other=0.0).to(tl.float64)

        wide_scale = target_scale.to(tl.float64)
        at = slots + (wide * row_slots + places[:, None] * target_splits + parts[None, :]) * SLOT
        given = (places[:, None] <= length) & (parts[None, :] < target_splits)
        tops = _load_column(at, 0, given, NEVER)
        totals = _load_column(at, 1, given, 0.0)
        bests = _load_column(at.to(tl.pointer_type(tl.int32)), 2, given, NO_ID)
        target_tops, target_totals = merge_tops(tops, totals, wide_scale, 1)
        is_top = (tops == target_tops[:, None]) & (tops > NEVER)
        target_bests = tl.min(tl.where(is_top, bests, NO_ID), 1)

        inside = drafted >= 0
        vocabulary_ids = tl.where(inside, drafted, 0)
        logit = tl.load(
            target_logits + target_rows + places.to(tl.int64) * target_stride_position + vocabulary_ids,
            mask=inside,
            other=NEVER,
        ).to(tl.float32)
        if target_threshold is not None:
            floors = tl.load(target_threshold + first_position + places, mask=inside, other=NEVER)
            logit = tl.where(logit >= floors, logit, NEVER)
        target_prob = _prob_of_one(logit, target_tops, wide_scale, target_totals)
        target_prob = tl.where(target_cold, tl.where(drafted == target_bests, 1.0, 0.0), target_prob)
        draft_prob = tl.full([PLACES], 1.0, tl.float64)
        if draft_logits is not None:
            wide_scale = draft_scale.to(tl.float64)
            first_slot = wide * row_slots + target_slots
            at = slots + (first_slot + places[:, None] * draft_splits + parts[None, :]) * SLOT
            given = drafted_here[:, None] & (parts[None, :] < draft_splits)
            tops = _load_column(at, 0, given, NEVER)
            totals = _load_column(at, 1, given, 0.0)
            bests = _load_column(at.to(tl.pointer_type(tl.int32)), 2, given, NO_ID)
            draft_tops, draft_totals = merge_tops(tops, totals, wide_scale, 1)
            is_top = (tops == draft_tops[:, None]) & (tops > NEVER)
            draft_bests = tl.min(tl.where(is_top, bests, NO_ID), 1)
            proposals = draft_bests
            if draft_to_target is not None:
                hit_highest = _load_column(at, 3, given, NEVER)
                hit_total = _load_column(at, 4, given, 0.0)
                hit_tops, hit_totals = merge_tops(hit_highest, hit_total, wide_scale, 1)
                draft_prob = _prob_of_one(hit_tops, draft_tops, wide_scale, draft_totals) * hit_totals
                proposals = tl.load(draft_to_target + draft_bests, mask=draft_bests < NO_ID, other=-1)
            else:
                logit = tl.load(
                    draft_logits + wide * draft_stride_batch + places.to(tl.int64) * draft_stride_position + vocabulary_ids,
                    mask=inside,
                    other=NEVER,
                ).to(tl.float32)
                if draft_threshold is not None:
                    floors = tl.load(draft_threshold + first_token + places, mask=inside, other=NEVER)
                    logit = tl.where(logit >= floors, logit, NEVER)
                draft_prob = _prob_of_one(logit, draft_tops, wide_scale, draft_totals)
            draft_prob = tl.where(draft_cold, tl.where(drafted == proposals, 1.0, 0.0), draft_prob)

        # Strict: a uniform of 0 must not accept what the target never says.
        accepts = drafted_here & (uniform * draft_prob < target_prob)
        stop = tl.min(tl.where(accepts, PLACES, places), 0)
        rejected = stop < length

        # The token that follows: the smallest v with cumsum(w)[v] > u * total.
        following = tl.minimum(_pick(target_bests, places, stop), vocabulary - 1)
        if target_cold == 0:
            target_top, target_total = _pick(target_tops, places, stop), _pick(target_totals, places, stop)
            target_share = (1.0 / target_total).to(tl.float32)
            row = row_of(target_logits, target_rows + stop.to(tl.int64) * target_stride_position, TARGET_ALIGNED)
            floor = read_threshold(target_threshold, first_position + stop, True)
            refused = _pick(drafted, places, stop)
            if draft_logits is not None:
                draft_best = _pick(draft_bests, places, stop)
                draft_top, draft_total = _pick(draft_tops, places, stop), _pick(draft_totals, places, stop)
                draft_share = tl.where(draft_total > 0.0, 1.0 / tl.where(draft_total > 0.0, draft_total, 1.0), 0.0)
                draft_share = draft_share.to(tl.float32)
                draft_top = tl.where(draft_total > 0.0, draft_top, 0.0)
                draft_row = row_of(
                    draft_logits, wide * draft_stride_batch + stop.to(tl.int64) * draft_stride_position, DRAFT_ALIGNED
                )
                draft_floor = read_threshold(draft_threshold, first_token + stop, rejected)
                if draft_to_target is not None:
                    # The proposal is brought onto target ids; those that repeat add up.
                    for first in tl.range(0, tl.where(rejected, draft_vocabulary, 0), BLOCK):
                        ids = first + lanes
                        present = ids < draft_vocabulary
                        logits = load_logits(draft_row, ids, present, draft_floor)
                        probs = _probs(logits, ids, draft_top, draft_scale, draft_share, draft_best, draft_cold)
                        meaning = tl.load(draft_to_target + ids, mask=present, other=0)
                        tl.atomic_add(spread + meaning, probs, mask=present & (probs > 0.0), sem="relaxed", scope="gpu")
                    tl.debug_barrier()

            # First the weight of every tile, then which tile, then where in it. Twice at most: where no residual is left
            # because the proposal covers the target, the target's own distribution takes its place.
            sums = (slots + tl.num_programs(0).to(tl.int64) * SLOT).to(tl.pointer_type(tl.float64)) + wide * TILES
            tiles = (vocabulary + BLOCK - 1) // BLOCK
            draw = tl.load(uniforms + first_position + draft_length).to(tl.float64)
            residual = rejected
            weight = draw * 0.0
            chosen = tiles * 0
            before = draw * 0.0
            step = tiles * 0
            # One loop for both, tile after tile and then the chosen one again: the weights are worked out in one place, so
            # that they are the same to the last bit when they are looked at again.
            while step <= tiles:
                tile = tl.where(step < tiles, step, chosen)
                candidates = tile * BLOCK + lanes
                within = candidates < vocabulary
                scores = load_logits(row, candidates, within, floor)
                weights = _probs(scores, candidates, target_top, target_scale, target_share, following, target_cold)
                if draft_logits is not None:
                    if draft_to_target is not None:
                        proposed = tl.load(spread + candidates, mask=within & residual, other=0.0, cache_modifier=".cg")
                    else:
                        scores = load_logits(draft_row, candidates, within & residual, draft_floor)
                        proposed = _probs(scores, candidates, draft_top, draft_scale, draft_share, draft_best, draft_cold)
                        proposed = tl.where(residual, proposed, 0.0)
                    weights = tl.maximum(weights - proposed, 0.0)
                else:
                    weights = tl.where(residual & (candidates == refused), 0.0, weights)
                heavy = weights.to(tl.float64)
                if step < tiles:
                    here = tl.sum(heavy, 0)
                    tl.store(sums + tile, here)
                    weight += here
                    step += 1
                    if step == tiles:
                        if (weight == 0.0) & residual:
                            residual = residual & (weight > 0.0)
                            step = step * 0
                        else:
                            tl.debug_barrier()
                            columns = tl.arange(0, TILES)
                            every = tl.load(sums + columns, mask=columns < tiles, other=0.0, cache_modifier=".cg")
                            reached = (tl.cumsum(every, 0) > draw * weight) & (every > 0.0)
                            chosen = tl.min(tl.where(reached, columns, NO_ID), 0)
                            # Rounding may leave none above the threshold: then the last that has any weight.
                            last = tl.max(tl.where(every > 0.0, columns, 0), 0)
                            chosen = tl.where(chosen < NO_ID, chosen, last)
                            before = tl.sum(tl.where(columns < chosen, every, 0.0), 0)
                else:
                    reached = (tl.cumsum(heavy, 0) + before > draw * weight) & (weights > 0.0)
                    following = tl.min(tl.where(reached, candidates, NO_ID), 0)
                    last = tl.max(tl.where(weights > 0.0, candidates, 0), 0)
                    following = tl.where(following < NO_ID, following, last)
                    step += 1

            if draft_to_target is not None and draft_logits is not None:
                tl.debug_barrier()  # everybody has read the row that is now zeroed again
                for first in tl.range(0, tl.where(rejected, draft_vocabulary, 0), BLOCK):
                    ids = first + lanes
                    present = ids < draft_vocabulary
                    meaning = tl.load(draft_to_target + ids, mask=present, other=0)
                    tl.store(spread + meaning, tl.zeros([BLOCK], tl.float32), mask=present)

        tl.store(accepted_length + b, stop.to(tl.int64))
        emitted = tl.where(places < stop, drafted, tl.where(places == stop, following, -1))
        tl.store(tokens + first_position + places, emitted.to(tl.int64), mask=places <= draft_length)


CONFIGS = (Config(4096, 16), Config(4096, 8), Config(2048, 8))
"""What HEDGESPEC_TRITON_TUNE=1 tries."""


def verify_triton(
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
    """`verify` as one Triton launch: softmax in float32, the comparison and the inverse CDF in float64."""
    batch, positions, vocabulary = target_logits.shape
    draft_length, device = positions - 1, target_logits.device
    accepted_length = torch.empty(batch, dtype=torch.int64, device=device)
    tokens = torch.empty((batch, positions), dtype=torch.int64, device=device)
    if batch == 0:
        return Verdict(accepted_length, tokens)

    always_cold = not isinstance(target_temperature, Tensor) and target_temperature == 0
    if mode == "argmax" or always_cold or draft_length == 0:
        draft_logits = None  # not looked at
    target_logits = dense_vocabulary(target_logits)
    target_strides, draft_strides, map_stride = _common.strides_of(target_logits), [0, 0], 0
    draft_vocabulary, draft_aligned, spread = 0, False, None
    if draft_logits is None:
        draft_to_target = draft_threshold = None
        draft_temperature = 1.0
    else:
        draft_logits = dense_vocabulary(draft_logits)
        draft_vocabulary, draft_strides = draft_logits.shape[2], _common.strides_of(draft_logits)
        draft_aligned = _common.aligned(draft_logits, draft_strides)
    if draft_to_target is not None:
        map_stride = draft_vocabulary if draft_to_target.dim() == 2 else 0
        spread = _common.scratch(device, batch * vocabulary * 4, "triton verify spread").view(torch.float32)
    shared_target, target_temperatures = split_temperature(not_quite_zero(target_temperature))
    shared_draft, draft_temperatures = split_temperature(not_quite_zero(draft_temperature))
    tensors = (
        target_logits,
        draft_tokens.contiguous(),
        draft_logits,
        uniforms.contiguous(),
        None if lengths is None else lengths.contiguous(),
        draft_to_target,
        as_float32(target_threshold),
        as_float32(draft_threshold),
        target_temperatures,
        draft_temperatures,
        accepted_length,
        tokens,
    )

    places = _common.position_bucket(positions)
    most = max(1, min(_common.MOST_SPLITS, 1024 // places))  # all slices of all positions are merged side by side

    def run(config: Config) -> None:
        rows = batch * (positions + (0 if draft_logits is None else draft_length))
        wanted = min(-(-4 * _common.processors(device) // rows), most)
        target_blocks = _common.slice_blocks(vocabulary, wanted, config.block)
        draft_blocks = _common.slice_blocks(draft_vocabulary, wanted, config.block)
        target_splits = _common.splits(vocabulary, target_blocks, config.block)
        draft_splits = 0 if draft_logits is None else _common.splits(draft_vocabulary, draft_blocks, config.block)
        programs = batch * (positions * target_splits + draft_length * draft_splits)
        tiles = _common.power_of_two(-(-vocabulary // config.block))
        # Buffers of their own: counters and spread rows are zero between launches, whatever the shape; the slots never are.
        launch = _common.launcher(verify_kernel, programs, config, device)
        launch(
            *tensors,
            _common.scratch(device, batch * 4, "triton verify counters").view(torch.int32),
            spread,
            _common.scratch(device, programs * _common.SLOT_BYTES + batch * tiles * 8, "triton verify slots").view(
                torch.float32
            ),
            shared_target,
            shared_draft,
            batch,
            draft_length,
            vocabulary,
            draft_vocabulary,
            *target_strides,
            *draft_strides,
            map_stride,
            target_blocks,
            max(draft_blocks, 1),
            target_splits,
            max(draft_splits, 1),
            PLACES=places,
            TILES=tiles,
            TARGET_ALIGNED=_common.aligned(target_logits, target_strides),
            DRAFT_ALIGNED=draft_aligned,
            BLOCK=config.block,
            MOST=most,
        )

    bucket = ("verify", device, target_logits.dtype, batch, places, vocabulary, draft_vocabulary)
    run(_common.tuned(bucket, configuration(vocabulary), CONFIGS, run, device))
    return Verdict(accepted_length, tokens)


def configuration(vocabulary: int) -> Config:
    """The heuristic: as wide as it gets, for what is left when the slices are done is one program a row."""
    return Config(min(4096, max(64, _common.power_of_two(vocabulary))), 16)
