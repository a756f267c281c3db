"""What plain decoding of the same batch does beyond one forward a token, so that every row gets plain decoding's text.

Some targets read their whole text again once it is long enough (Phi-3 and others, where the rotary factors change), and some
prepare the inputs of their forward with code of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache

from hedgespec.decoder.request import Request
from hedgespec.decoder.row import Row
from hedgespec.errors import ContextError
from hedgespec.runtime.plain_inputs import PlainInputs
from hedgespec.runtime.target import TargetSession

if TYPE_CHECKING:
    from hedgespec.decoder import Decoder


@dataclass(frozen=True)
class PlainBatch:
    """Properties of all requests of a call, on which plain decoding of each of them depends."""

    width: int
    """Length of the prompts, padding included."""
    padding: int
    """Padding of the longest prompt."""
    audits: bool
    """Whether the target's own code prepares the inputs of its forward, so that every token must be checked."""

    @classmethod
    def of(cls, requests: Sequence[Request], audits: bool) -> PlainBatch:
        """Returns the properties of some requests."""
        return cls(max(len(request.prompt) for request in requests), min(request.padding for request in requests), audits)


class PlainDecoding:
    """Repeats for a batch what plain decoding would do with the target.

    Args:
        decoder: the decoder.
        session: the batch's view of the target.
        rows: the rows, before their first token.
        batch: properties of all requests of the call.
    """

    def __init__(self, decoder: Decoder, session: TargetSession, rows: Sequence[Row], batch: PlainBatch) -> None:
        self.session, self.batch = session, batch
        self.reread_at, self.rereads_all = decoder.reread_at, decoder.rereads_all
        self.table, self.target_name = decoder.table, type(decoder.target).__name__
        self._inputs: dict[int, PlainInputs] = {}
        for row in rows if batch.audits else ():
            prompt = row.request.prompt
            mask = (torch.arange(len(prompt), device=prompt.device) >= row.request.padding).long()[None]
            self._inputs[row.index] = PlainInputs(decoder.target, prompt[None], mask, reread_at=self.reread_at)

    def check_table(self, rows: Sequence[Row]) -> None:
        """Refuses to read a token past the target's table of positions, where plain decoding fails.

        Raises:
            ContextError: a row has as many tokens as the table has positions.
        """
        if self.table is not None and (longest := max(row.length for row in rows)) > self.table:
            raise ContextError(
                f"target: expected a text of at most {self.table} tokens to go on from, since {self.target_name} has as many "
                f"positions, got {longest}"
            )

    def room(self, row: Row) -> int:
        """Returns how many tokens a round may emit for a row, the one that follows the draft included.

        No draft reaches past the positions that the target was made for, since it may hold a table of that size, nor past the
        point where the target reads its text again.
        """
        room = row.room
        if self.session.context is not None and row.length <= self.session.context:
            room = min(room, self.session.context + 1 - row.length)
        if self.reread_at is not None and (left := self.reread_at - row.request.padding - row.length) > 0:
            room = min(room, left)
        return room

    def drops(self, past: DynamicCache) -> bool:
        """Returns whether plain decoding would read the prompts again instead of using what a cache holds of them."""
        return self.reread_at is not None and past.get_seq_length() < self.reread_at <= self.batch.width

    def read_again(self, rows: Sequence[Row]) -> None:
        """Computes the keys and values of the rows anew for which plain decoding does so before their next token."""
        if self.reread_at is None or self.batch.width >= self.reread_at:
            return
        due = [row.request.padding + row.length == self.reread_at for row in rows]
        if any(due) and not self.rereads_all:
            raise ValueError(
                f"target: expected {self.target_name} to read its text again where its rotary factors change, at "
                f"{self.reread_at} tokens, but the installed transformers lets it go on from the last token alone; 5.20 and "
                "newer do not"
            )
        if any(due):
            texts = [row.tokens[: row.length - 1] if now else None for row, now in zip(rows, due)]
            self.session.reread(texts, self.reread_at - self.batch.padding)

    def check_inputs(self, rows: Sequence[Row]) -> None:
        """Compares the inputs that the target's own code prepares for each emitted token with what its forward was given.

        Raises:
            ValueError: they differ.
        """
        for row in rows if self._inputs else ():
            inputs = self._inputs[row.index]
            for width in range(inputs.width, row.seen.shape[1]):
                inputs.check(row.seen[:, :width])
