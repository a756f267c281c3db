"""A drafter that knows the target's texts, for tests in which drafts have to be accepted and rejected."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Oracle:
    """Proposes the next token of the known text that begins with what is verified; every fourth token it ranks second.

    Args:
        texts: token ids of whole texts, without padding.
        vocab_size: the target's.
    """

    aux_layers = ()
    draft_to_target = None

    def __init__(self, texts: Sequence[Sequence[int]], vocab_size: int, name: str = "oracle"):
        self.texts, self.vocab_size, self.name = [list(text) for text in texts], vocab_size, name

    def session(self) -> _Session:
        return _Session(self)


class _Session:
    def __init__(self, oracle: Oracle):
        self.oracle = oracle
        self.tokens: list[int] = []
        self.verified = 0

    def consume(self, tokens: torch.Tensor, features: None, logits_to_keep: int) -> torch.Tensor:
        del self.tokens[self.verified :]
        rows = []
        for token in tokens.tolist():
            self.tokens.append(token)
            rows.append(self._logits())
        self.verified = len(self.tokens)
        return torch.stack(rows[-logits_to_keep:])

    def step(self, token: torch.Tensor) -> torch.Tensor:
        self.tokens.append(int(token))
        return self._logits()

    def _logits(self) -> torch.Tensor:
        logits, end = torch.zeros(self.oracle.vocab_size), len(self.tokens)
        known = self.tokens[: max(self.verified, 1)]
        text = next((text for text in self.oracle.texts if text[: len(known)] == known and len(text) > end), None)
        if text is None:
            return logits
        logits[text[end]] = 5.0
        logits[(text[end] + 1) % self.oracle.vocab_size] = 6.0 if end % 4 == 3 else 4.0
        return logits
