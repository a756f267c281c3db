"""What the Triton kernels share: reading a row, the statistics of a softmax in slices, and how launchers pick sizes.

A row of logits is cut into slices, one program each, so that few rows still fill a GPU. Each program leaves the statistics
of its slice in a slot of the workspace, and the program that arrives last at a counter merges them and goes on alone. The
last one to arrive, and not a second pass of everybody: Triton has neither clusters nor a barrier for the grid, and spinning
for the others would need a promise that they run at the same time. Nobody waits, the order of arrival changes no result,
and one launch does it all.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from hedgespec.ops.workspace import workspace

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

SLOT = tl.constexpr(8)
"""32-bit words of a slot: highest logit, sum of exponentials, its argmax, highest hit, sum of the hits' exponentials."""
SLOT_BYTES = 32
REGISTERS = 128
"""The most that a thread takes: sixteen warps fit on a processor. Left to itself the compiler takes more, or spills."""
MOST_SPLITS = 64
"""The most slices of a row: the slots that one program merges side by side."""
NO_ID = tl.constexpr(2**31 - 1)
NEVER = tl.constexpr(-math.inf)

# Temperatures, other than 0, are brought into this range in every kernel: within it neither the temperature nor its
# reciprocal leaves float32's normal numbers, where 0 * inf would be NaN.
COLDEST = tl.constexpr(2.0**-126)
WARMEST = tl.constexpr(2.0**125)


@triton.jit
def read_temperature(shared, per_row, row):
    """The row's temperature, float32; 0 is a point mass."""
    temperature = shared
    if per_row is not None:
        temperature = tl.load(per_row + row)
    return temperature


@triton.jit
def reciprocal(temperature):
    """What logits, with the highest taken off, are multiplied by. Without meaning for a point mass."""
    return 1.0 / tl.minimum(tl.maximum(temperature, COLDEST), WARMEST)


@triton.jit
def read_length(lengths, row, most):
    """The row's length, brought into 0..most: nobody has looked at it on a GPU."""
    length = most
    if lengths is not None:
        length = tl.minimum(tl.maximum(tl.load(lengths + row), 0), most).to(tl.int32)
    return length


@triton.jit
def known_token(tokens, vocabulary):
    """Tokens in 32 bits, -1 for those outside the vocabulary: nobody has looked for them on a GPU, and nobody emits them."""
    return tl.where((tokens >= 0) & (tokens < vocabulary), tokens, -1).to(tl.int32)


@triton.jit
def read_threshold(thresholds, row, present):
    """The logit below which row `row` is masked out; -inf where nothing is."""
    threshold = NEVER
    if thresholds is not None:
        threshold = tl.load(thresholds + row, mask=present, other=NEVER)
    return threshold


@triton.jit
def multiple_of_16(number, KNOWN: tl.constexpr):
    """The number itself, in a form that shows the compiler that it is a multiple of 16.

    Letting Triton specialise the argument would do the same, at the price of compiling anew when others change.
    """
    if KNOWN:
        number = number // 16 * 16
    return number


@triton.jit
def row_of(logits, offset, ALIGNED: tl.constexpr):
    """Where a row starts: with ALIGNED at a multiple of 16 bytes, so that loads may be 128 bits wide."""
    row = logits + offset
    if ALIGNED:
        row = tl.multiple_of(row, 16)
    return row


@triton.jit
def load_logits(row, ids, present, threshold):
    """Logits in float32, -inf where masked out. Upcast at once: arithmetic in half types would round every step."""
    logits = tl.load(row + ids, mask=present, other=NEVER).to(tl.float32)
    return tl.where(logits >= threshold, logits, NEVER)


@triton.jit
def accumulate(highest, total, logits, scale):
    """Takes logits into a running maximum and a running sum of exp((logit - maximum) * scale), lane by lane.

    One exponential serves both cases: the old sum is scaled down to a new maximum, or the new term to the old one.
    """
    higher = logits > highest
    term = tl.exp(-tl.abs(logits - highest) * scale)  # NaN where both are -inf; read in neither case
    total = tl.where(higher, total * term + 1.0, tl.where(logits > NEVER, total + term, total))
    return tl.where(higher, logits, highest), total


@triton.jit
def reduce_lanes(highest, total, scale):
    """A maximum and a sum from those of the lanes."""
    top = tl.max(highest, 0)
    return top, tl.sum(tl.where(highest > NEVER, total * tl.exp((highest - top) * scale), 0.0), 0)


@triton.jit
def first_of_highest(highest, best, top):
    """Of the lanes at the top the lowest id."""
    return tl.min(tl.where((highest == top) & (highest > NEVER), best, NO_ID), 0)


@triton.jit
def store_slot(slots, slot, top, total, best):
    at = slots + slot.to(tl.int64) * SLOT
    tl.store(at, top)
    tl.store(at + 1, total)
    tl.store(at.to(tl.pointer_type(tl.int32)) + 2, best)


@triton.jit
def merge_tops(highest, total, scale, axis: tl.constexpr):
    """The maximum of slices and the sum of their sums, each brought to that maximum, in float64."""
    top = tl.max(highest, axis)
    above = tl.expand_dims(top, axis)
    weight = tl.where(highest > NEVER, tl.exp((highest.to(tl.float64) - above) * scale), 0.0)
    return top, tl.sum(total * weight, axis)


@triton.jit
def merge_slots(slots, first, count, scale, MOST: tl.constexpr):
    """A row from the slots of its slices: highest logit, sum of exponentials (float64) and first argmax."""
    lanes = tl.arange(0, MOST)
    at = slots + (first.to(tl.int64) + lanes) * SLOT
    present = lanes < count
    # .cg: other programs wrote these, and a first-level cache would not know.
    highest = tl.load(at, mask=present, other=NEVER, cache_modifier=".cg")
    total = tl.load(at + 1, mask=present, other=0.0, cache_modifier=".cg")
    best = tl.load(at.to(tl.pointer_type(tl.int32)) + 2, mask=present, other=NO_ID, cache_modifier=".cg")
    top, whole = merge_tops(highest, total, scale, 0)
    return top, whole, first_of_highest(highest, best, top)


@triton.jit
def arrive(counter, expected):
    """Whether this program is the last of `expected` at `counter`, which it then leaves at 0.

    The barriers make one program of many threads: what all of them stored is released by the one thread that adds, and
    what it acquires is seen by all of them.
    """
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == expected - 1
    if last:
        tl.store(counter, 0)
    tl.debug_barrier()
    return last


class Config(NamedTuple):
    """What of a kernel's shape may be chosen."""

    block: int
    """Logits that a program reads at a time."""
    warps: int


def power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


def position_bucket(positions: int) -> int:
    """Lengths that share a configuration: a round's all do, or drafts of 3, 4 and 5 tokens would compile anew."""
    return max(16, power_of_two(positions))


def slice_blocks(vocabulary: int, wanted: int, block: int) -> int:
    """Blocks in each of about `wanted` slices of a row; few enough slices to be merged at once."""
    return -(-vocabulary // (min(wanted, MOST_SPLITS) * block))


def splits(vocabulary: int, blocks: int, block: int) -> int:
    """Slices of a row."""
    return -(-vocabulary // (blocks * block))


@lru_cache(maxsize=16)
def processors(device: torch.device) -> int:
    """How many programs run side by side for each one that fits: streaming multiprocessors; 1 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def strides_of(logits: torch.Tensor) -> list[int]:
    """Element strides of all dimensions but the last; 0 where there is one index only, whatever torch says of it."""
    return [stride if size > 1 else 0 for size, stride in zip(logits.shape[:-1], logits.stride())]


def aligned(logits: torch.Tensor, strides: list[int]) -> bool:
    """Whether rows start at multiples of 16 bytes and end at multiples of 16 logits, so that loads may be 128 bits wide."""
    return logits.data_ptr() % 16 == 0 and all(length % 16 == 0 for length in (*strides, logits.shape[-1]))


def scratch(device: torch.device, size: int, purpose: str) -> torch.Tensor:
    """At least `size` bytes that start at zero and that this stream alone uses."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return workspace(device, stream, size, purpose)


def launcher(kernel, programs: int, config: Config, device: torch.device) -> Callable[..., None]:
    """The kernel as a function of its arguments. Triton launches on the current device, which need not be the tensors'."""

    def launch(*args, **constants) -> None:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            kernel[(programs,)](*args, **constants, num_warps=config.warps, maxnreg=REGISTERS)

    return launch


_tuned: dict[tuple, Config] = {}


def tuned(bucket: tuple, default: Config, candidates: tuple[Config, ...], run: Callable[[Config], None], device) -> Config:
    """The bucket's configuration: measured once if HEDGESPEC_TRITON_TUNE=1 asks for it, else `default`.

    Measuring runs every candidate a few times, which changes nothing but the outputs that the caller is about to write.
    It cannot be done while a graph is captured; such a call takes what is known.
    """
    wanted = os.environ.get("HEDGESPEC_TRITON_TUNE") == "1" and device.type == "cuda"
    if not wanted or bucket in _tuned or torch.cuda.is_current_stream_capturing():
        return _tuned.get(bucket, default)
    _tuned[bucket] = min(candidates, key=lambda config: _milliseconds(lambda: run(config)))
    return _tuned[bucket]


def _milliseconds(run: Callable[[], None], repeats: int = 10) -> float:
    """Best of a few, in milliseconds, after a first one that compiles."""
    run()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return min(times)
