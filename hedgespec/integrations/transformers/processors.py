"""Logits processors of a call of `generate`: which of them apply to one row, to drafts, or to the whole batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import (
    EosTokenCriteria,
    PrefixConstrainedLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from hedgespec.ops.sampling import Sampling

STATEFUL = (SynthIDTextWatermarkLogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor)
"""Processors of transformers that keep state from call to call."""
WARPERS = {
    TemperatureLogitsWarper: "temperature",
    TopKLogitsWarper: "top_k",
    TopPLogitsWarper: "top_p",
    MinPLogitsWarper: "min_p",
}
"""Processor -> field of `Sampling`, in the order in which both apply them."""
BY_ROW = ("encoder_input_ids", "generated_ngrams", "prompt_ignore_length")
"""Attributes in which stateless processors hold a value for each row of the batch."""


def split(processors: list) -> tuple[list, Sampling]:
    """Returns the processors without the last ones that a `Sampling` can replace, and that `Sampling`."""
    found: dict[str, Any] = {}
    rest, known = list(processors), list(WARPERS)
    while rest and type(rest[-1]) in known and is_plain_warper(rest[-1]):
        warper = rest.pop()
        del known[known.index(type(warper)) :]
        name = WARPERS[type(warper)]
        found[name] = getattr(warper, name)
    return rest, Sampling(**{"temperature": 1.0} | found)


def is_plain_warper(warper: object) -> bool:
    """Returns whether a warper has the defaults that `Sampling` implements."""
    return getattr(warper, "filter_value", -torch.inf) == -torch.inf and getattr(warper, "min_tokens_to_keep", 1) == 1


def is_stateless(processor: object) -> bool:
    """Returns whether a processor keeps nothing from call to call and treats every row by itself."""
    own = type(processor).__module__ == "transformers.generation.logits_process" and not isinstance(processor, STATEFUL)
    return own or bool(getattr(processor, "stateless", False))


def limits(criteria: StoppingCriteriaList, prompt_length: int) -> tuple[int, frozenset[int]]:
    """Returns the most tokens to emit, and the ids that end a sequence.

    They are read from the criteria, not from the configuration, because a criterion of the caller replaces `generate`'s own of
    the same type.
    """
    room = max(1, criteria.max_length - prompt_length)  # criteria are called after a token, so there is at least one
    eos = (one.eos_token_id.flatten().tolist() for one in criteria if type(one) is EosTokenCriteria)
    return room, frozenset(chain.from_iterable(eos))


def attributes_by_row(processor: object) -> list[str]:
    """Returns the attributes in which a processor of transformers holds something for each row."""
    return [name for name in BY_ROW if hasattr(getattr(processor, name, None), "__len__")]


def is_separable(processor: object, batch: int) -> bool:
    """Returns whether the rows of a batch may be processed one by one: the processor is stateless, and what it holds by row has
    an entry for each row. With `num_return_sequences` it has one for each prompt only."""
    return is_stateless(processor) and all(len(getattr(processor, name)) == batch for name in attributes_by_row(processor))


def for_row(processor: LogitsProcessor, row: int, batch: int) -> LogitsProcessor:
    """Returns a separable processor for calls with only this row of the batch."""
    if batch == 1:
        return processor
    if isinstance(processor, PrefixConstrainedLogitsProcessor):
        # From transformers 5.24 on, the sequences of one prompt (`num_return_sequences`) share a batch id.
        allowed, number = processor._prefix_allowed_tokens_fn, row // processor._num_beams
        return PrefixConstrainedLogitsProcessor(lambda _, tokens: allowed(number, tokens), 1)
    if held := attributes_by_row(processor):
        processor = copy.copy(processor)
        for name in held:
            setattr(processor, name, getattr(processor, name)[row : row + 1])
        if hasattr(processor, "batch_size"):
            processor.batch_size = 1
    return processor


def process_drafts(processors: list) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None:
    """Returns a function (tokens, logits) -> logits that applies the stateless processors to drafters' logits; None if there
    are none."""
    pure = [processor for processor in processors if is_stateless(processor)]
    return (lambda tokens, logits: through(pure, tokens, logits.to(torch.float32, copy=True))) if pure else None


def through(processors: Iterable[Any], tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Applies processors like a `LogitsProcessorList`, without inspecting each signature in every call.

    Raises: ValueError for a processor that changes the shape of its logits.
    """
    for processor in processors:
        processed = processor(tokens, logits)
        if processed.shape != logits.shape:
            raise ValueError(
                f"logits_processor: expected scores of shape {tuple(logits.shape)} from {type(processor).__name__}, "
                f"got {tuple(processed.shape)}"
            )
        logits = processed
    return logits
