"""What a caller asks of the decoder for one row of a batch, and how a batch of prompts becomes rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from hedgespec.target import context_of, device_of

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
    learner_state: dict | None = None
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

    @property
    def is_processed(self) -> bool:
        """Whether the caller changes the target's logits."""
        return self.process is not None or self.processed_together

    def check_context(self, target) -> None:
        """Raises ValueError where prompt and continuation do not fit the target's context."""
        context = context_of(target)
        length = len(self.prompt) - self.padding
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, got {self.max_new_tokens}")
        if context is not None and self.max_new_tokens >= context:
            raise ValueError(f"max_new_tokens: expected less than the target's context of {context}, got {self.max_new_tokens}")
        if context is not None and length + self.max_new_tokens > context:
            raise ValueError(
                f"input_ids: expected a prompt of at most {context - self.max_new_tokens} tokens, so that "
                f"{self.max_new_tokens} more fit the target's context of {context}, got {length}"
            )


def generator(seed: int | None, row: int) -> np.random.Generator:
    """The uniforms of a row; those of row 0 do not depend on how many there are."""
    return np.random.default_rng(seed if seed is None or row == 0 else [seed, row])


def eos_of(target, eos_token_id: int | Sequence[int] | None = None) -> frozenset[int]:
    """The ids that end a text: those given, or else those of the target's generation config."""
    if eos_token_id is None:
        eos_token_id = target.generation_config.eos_token_id
    if eos_token_id is None:
        return frozenset()
    return frozenset([eos_token_id] if isinstance(eos_token_id, int) else eos_token_id)


def states_of(learner_state: dict | Sequence[dict] | None, rows: int) -> Sequence[dict | None]:
    """A learner's state for each row, of one for all, or of one for each. Raises ValueError for another number."""
    states = learner_state if isinstance(learner_state, Sequence) else [learner_state] * rows
    if len(states) != rows:
        raise ValueError(f"learner_state: expected one for each of {rows} rows, got {len(states)}")
    return states


def rows_of(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, target) -> list[tuple[torch.Tensor, int]]:
    """The rows of a batch of prompts, each int64 [padding + P] on the target's device, and the length of its padding.

    Raises: TypeError or ValueError for ids that are no prompts of the target, or a mask that is not left padding.
    """
    if not isinstance(input_ids, torch.Tensor) or input_ids.dtype != torch.int64:
        raise TypeError(f"input_ids: expected an int64 tensor, got {getattr(input_ids, 'dtype', type(input_ids).__name__)}")
    rows = input_ids[None] if input_ids.ndim == 1 else input_ids
    if rows.ndim != 2 or 0 in rows.shape:
        raise ValueError(f"input_ids: expected prompts of shape [B, P] or [P] with B, P >= 1, got {tuple(input_ids.shape)}")
    vocabulary = target.config.get_text_config(decoder=True).vocab_size
    low, high = (bound.item() for bound in rows.aminmax())
    if low < 0 or high >= vocabulary:
        raise ValueError(f"input_ids: expected ids in 0..{vocabulary - 1}, got {low if low < 0 else high}")
    padding = [0] * len(rows)
    if attention_mask is not None:
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
