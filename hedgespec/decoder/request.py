"""What a caller asks of the decoder for one row of a batch, and how a batch of prompts becomes rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from hedgespec.errors import ContextError
from hedgespec.scalars import integer, integers, shown
from hedgespec.target import device_of

if TYPE_CHECKING:
    from hedgespec.decoder.row import Row

Process = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(tokens int64 [1, L], logits [n, V] for the token after them) -> processed logits [n, V]."""


class Together(Protocol):
    """Callbacks that see all rows of a batch at once, in the order of plain decoding, whose step s emits the s-th token of
    every row. Rows of speculative decoding advance at different rates, so a step is complete once every row has reached it."""

    processes: bool
    """Whether `process` takes the place of every `Request.process`. The rows then advance in step."""

    def process(self, rows: Sequence[Row], logits: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Returns the processed logits, [1, V] for each of `rows`, for the next step.

        Args:
            rows: those that have not ended; all of them have emitted the same number of tokens.
            logits: [1, V] for each of `rows`, the target's for its next token.
        """

    def stop(self, rows: Sequence[Row]) -> None:
        """Ends rows with `Row.cut`. Called after every step if `processes`, else after every round.

        Args:
            rows: all rows of the batch in order, ended ones included.
        """


@dataclass(frozen=True)
class Request:
    """One row of a batch. Functions see its tokens as int64 [1, L], left padding included."""

    prompt: torch.Tensor
    """int64 [padding + P] on the target's device."""
    padding: int
    """Tokens on the left that are not the row's."""
    max_new_tokens: int
    random: np.random.Generator
    """Source of the row's uniforms."""
    eos: frozenset[int] = frozenset()
    learner_state: Mapping[str, Any] | None = None
    process: Process | None = None
    """What the caller makes of the target's logits: called once for every emitted token, in order, like in plain decoding, so
    it may keep state."""
    process_drafts: Process | None = None
    """The part of it that depends on its arguments alone, for the drafters' logits."""
    stop: Callable[[torch.Tensor], bool] | None = None
    """Called after every emitted token: whether it was the last."""
    processed_together: bool = False
    """Whether `Together.process` takes the place of `process`."""
    keep_cache: bool = False
    """Leave the target's keys and values in `Row.cache`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_new_tokens", integer("max_new_tokens", self.max_new_tokens, 1))

    @property
    def is_processed(self) -> bool:
        """Whether the caller changes the target's logits."""
        return self.process is not None or self.processed_together

    def check_context(self, table: int | None, may_end: bool = False) -> None:
        """Refuses a continuation that is certain to go past the target's table of positions, if it has one.

        A text that may end before is begun; it fails with the same error if it gets there, as plain decoding does.

        Args:
            table: the target's positions, if it holds a table of them.
            may_end: whether something else than `eos` and `stop` may end the text.

        Raises: ContextError.
        """
        length = len(self.prompt) - self.padding
        if table is None:
            return
        if length > table:
            raise ContextError(
                f"input_ids: expected a prompt of at most {table} tokens, for as many the target has positions, got {length}"
            )
        # The last token is emitted and not read.
        if length + self.max_new_tokens - 1 > table and not (may_end or self.eos or self.stop is not None):
            raise ContextError(
                f"max_new_tokens: expected at most {table + 1 - length} behind a prompt of {length} tokens, since the target "
                f"has {table} positions, got {self.max_new_tokens}"
            )


def generator(seed: int | None, row: int) -> np.random.Generator:
    """Returns the source of a row's uniforms. That of row 0 does not depend on how many rows there are.

    Raises: TypeError or ValueError for a seed that is not an integer >= 0.
    """
    if seed is not None:
        seed = integer("seed", seed, 0, otherwise=" or None")
    return np.random.default_rng(seed if seed is None or row == 0 else [seed, row])


def eos_of(target, eos_token_id: int | Sequence[int] | torch.Tensor | None = None) -> frozenset[int]:
    """Returns the ids that end a sequence: those given, or else those of the target's generation config.

    An id that the target cannot emit is refused where it is given as an argument. In a generation config it is left as it is:
    some configs have -1 for "none", and transformers itself accepts it.

    Raises: TypeError or ValueError for anything but integers in 0..V-1, alone, in a sequence or in a tensor [n].
    """
    if eos_token_id is not None:
        highest = vocabulary_of(target) - 1
        return frozenset(integers("eos_token_id", eos_token_id, 0, highest, otherwise=" or None"))
    config = getattr(target, "generation_config", None)
    found = getattr(config, "eos_token_id", None)
    return frozenset() if found is None else frozenset(integers("generation_config.eos_token_id", found))


def padding_of(target, pad_token_id: int | torch.Tensor | None = None) -> int:
    """Returns the id that fills up rows: the one given, or else that of the target's generation config, or else 0.

    Raises: TypeError for anything but an integer.
    """
    if pad_token_id is not None:
        return integer("pad_token_id", pad_token_id, otherwise=" or None")
    found = getattr(getattr(target, "generation_config", None), "pad_token_id", None)
    return 0 if found is None else integer("generation_config.pad_token_id", found)


def states_of(learner_state: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None,
              rows: int) -> Sequence[Mapping[str, Any] | None]:  # fmt: skip
    """Returns a learner's state for each row: one for all, or of a sequence one for each.

    Raises: TypeError for what is no state, ValueError for another number of them.
    """
    expected = "learner_state: expected a dict as Learner.state_dict() returns, one for each row, or None"
    if isinstance(learner_state, (str, bytes, os.PathLike)):
        raise TypeError(f"{expected}, got {shown(learner_state)}; hedgespec.load_learner_state reads a file")
    if learner_state is None or isinstance(learner_state, Mapping):
        return [learner_state] * rows
    if not isinstance(learner_state, Sequence):
        raise TypeError(f"{expected}, got {shown(learner_state)}")
    for state in learner_state:
        if state is not None and not isinstance(state, Mapping):
            raise TypeError(f"{expected}, got {shown(state)} in a sequence")
    if len(learner_state) != rows:
        raise ValueError(f"learner_state: expected one for each of {rows} rows, got {len(learner_state)}")
    return learner_state


def vocabulary_of(target) -> int:
    """Returns V, the number of token ids that the target's config names."""
    return target.config.get_text_config(decoder=True).vocab_size


def rows_of(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, target) -> list[tuple[torch.Tensor, int]]:
    """Returns the rows of a batch of prompts, each int64 [padding + P] on the target's device, and the length of its padding.

    Args:
        input_ids: int64 or int32 [B, P] or [P].
        attention_mask: of the same shape, a bool tensor or numbers that are 0 or not; None: no padding.
        target: the model.

    Raises: TypeError or ValueError for ids that are no prompts of the target, or a mask that is not left padding.
    """
    if not isinstance(input_ids, torch.Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"input_ids: expected an int64 tensor, got {getattr(input_ids, 'dtype', type(input_ids).__name__)}")
    input_ids = input_ids.long()
    rows = input_ids[None] if input_ids.ndim == 1 else input_ids
    if rows.ndim != 2 or 0 in rows.shape:
        raise ValueError(f"input_ids: expected prompts of shape [B, P] or [P] with B, P >= 1, got {tuple(input_ids.shape)}")
    vocabulary = vocabulary_of(target)
    low, high = (bound.item() for bound in rows.aminmax())
    if low < 0 or high >= vocabulary:
        raise ValueError(f"input_ids: expected ids in 0..{vocabulary - 1}, got {low if low < 0 else high}")
    padding = [0] * len(rows)
    if attention_mask is not None:
        if not isinstance(attention_mask, torch.Tensor):
            raise TypeError(f"attention_mask: expected a torch.Tensor or None, got {type(attention_mask).__name__}")
        mask = attention_mask[None] if attention_mask.ndim == 1 else attention_mask
        if mask.shape != rows.shape:
            raise ValueError(f"attention_mask: expected shape {tuple(rows.shape)} as input_ids, got {tuple(mask.shape)}")
        mask = mask.bool().cpu()
        padding = (~mask).sum(1).tolist()
        for row, count in enumerate(padding):
            if mask[row, :count].any() or count == mask.shape[1]:
                raise ValueError(
                    "attention_mask: expected zeros on the left and then ones (tokenizers do so with padding_side='left'), "
                    f"got {mask[row].int().tolist()} in row {row}"
                )
    return list(zip(rows.to(device_of(target)), padding, strict=True))
