"""Callbacks of a caller that see all rows of a batch at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from hedgespec.decoder.row import Row


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
