"""Processors and criteria that see all rows of a batch at once, and what is recorded of every row."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import StoppingCriteriaList

from hedgespec.decoder import Row
from hedgespec.integrations.transformers.processors import through
from hedgespec.integrations.transformers.results import at_step


class BatchSteps:
    """Calls the processors and criteria of a batch with all its rows, as plain decoding does (a `Together` of the decoder).

    If a criterion has end-of-sequence ids, a row that has ended is padded while the others continue. Otherwise, as in
    `generate`, tokens are added to it until all rows have ended.

    Args:
        prompts: int64 [B, P], padded on the left.
        room: most tokens to emit.
        criteria: all criteria of the call.
        pad: id that follows the end of a row.
        recorders: B recorders, one a row.
        processors: all processors, if some of them see the rows together; None if rows are processed one by one.
    """

    def __init__(self, prompts: torch.Tensor, room: int, criteria: StoppingCriteriaList, pad: int,
                 recorders: list[Recorder], processors: list | None):  # fmt: skip
        self.processes = processors is not None
        self._processors, self._criteria, self._recorders = processors, criteria, recorders
        self._tokens = torch.cat([prompts, prompts.new_zeros(len(prompts), room)], 1)
        self._count = prompts.shape[1]
        """Columns of `_tokens` that the criteria have seen."""
        self._pads, self._pad = any(hasattr(one, "eos_token_id") for one in criteria), pad
        self._ended = torch.zeros(len(prompts), dtype=torch.bool, device=prompts.device)
        self._scores: list[torch.Tensor] = []
        """Processed logits [B, V] of the steps that the criteria have seen, if they are kept."""

    def process(self, rows: Sequence[Row], logits: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Returns the processed logits [1, V] of these rows. Other rows have logits of 0."""
        batch = len(self._tokens)
        together = torch.zeros(batch, logits[0].shape[1], dtype=torch.float32, device=logits[0].device)
        places = torch.tensor([row.index for row in rows], device=together.device)
        together[places] = torch.cat(list(logits)).float()
        given = together.clone()
        processed = through(self._processors or (), self._seen(), together)
        for row in rows:
            own = slice(row.index, row.index + 1)
            self._recorders[row.index].record(given[own], processed[own])
        return list(processed[places].split(1))

    def _seen(self) -> torch.Tensor:
        """Returns the first `_count` columns of the batch, int64 [B, _count], contiguous as `generate` has them."""
        return self._tokens[:, : self._count].contiguous()

    def stop(self, rows: Sequence[Row]) -> None:
        """Calls the criteria for every column that is complete by now, and cuts the rows that have ended."""
        if self._ended.all():
            return
        first, known = self._count, self._tokens.shape[1] - rows[0].request.max_new_tokens + max(row.emitted for row in rows)
        texts = torch.stack([row.padded[first:known] for row in rows])
        ended = self._ended.tolist()
        while not all(ended):
            step = self._count + 1 - (self._tokens.shape[1] - rows[0].request.max_new_tokens)
            if any(row.emitted < step and not (self._pads and done) for row, done in zip(rows, ended)):
                return
            column = texts[:, self._count - first]
            self._tokens[:, self._count] = column.masked_fill(self._ended, self._pad) if self._pads else column
            self._count += 1
            scores = None
            if self._recorders[0].keeps_scores:
                self._scores.append(at_step([one.scores for one in self._recorders], step - 1))
                scores = tuple(self._scores)
            self._ended |= self._criteria(self._seen(), scores)
            before, ended = ended, self._ended.tolist()
            for row, was, done in zip(rows, before, ended):
                if (done and not was) if self._pads else all(ended):
                    row.cut(step)


class Recorder:
    """Keeps the logits of a row that `generate` returns: the target's (`logits`), and the processed ones (`scores`)."""

    def __init__(self, keeps_scores: bool, keeps_logits: bool):
        self.keeps_scores, self.keeps_logits = bool(keeps_scores), bool(keeps_logits)
        self.keeps = self.keeps_scores or self.keeps_logits
        self.scores: list[torch.Tensor] = []
        self.logits: list[torch.Tensor] = []

    def process(self, processors: list) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """Returns a function (tokens, logits) -> logits that applies the processors and records both."""

        def process(tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            given = logits.to(torch.float32, copy=True)
            processed = through(processors, tokens, given.clone() if self.keeps_logits else given)
            self.record(given, processed)
            return processed

        return process

    def record(self, logits: torch.Tensor, scores: torch.Tensor) -> None:
        """Keeps the logits [1, V] of a step, unprocessed and processed."""
        if self.keeps_logits:
            self.logits.append(logits)
        if self.keeps_scores:
            self.scores.append(scores)

    def cut(self, count: int) -> None:
        """Keeps the first `count` steps only."""
        del self.logits[count:], self.scores[count:]


def stopping(criteria: list, recorder: Recorder) -> Callable[[torch.Tensor], bool]:
    """Returns a function tokens -> bool that calls the criteria for a single row."""
    together = StoppingCriteriaList(criteria)
    return lambda tokens: bool(together(tokens, tuple(recorder.scores) if recorder.keeps_scores else None)[0])
