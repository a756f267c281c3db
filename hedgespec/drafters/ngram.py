"""Prompt lookup: what followed the last time the same few tokens were seen.

Source: Saxena, "Prompt Lookup Decoding", 2023.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from hedgespec.utils.scalars import integer, text


class NGramDrafter:
    """Proposes, with certainty, the token that followed the latest occurrence of the longest matching n-gram.

    Where nothing matches it proposes the last token again, so that it always has a proposal; being one-hot, it is exact in
    either mode.

    Args:
        vocab_size: the target's.
        max_ngram: longest match tried, >= 1.
        name: shown in statistics.

    Raises: TypeError for an argument of another type; ValueError for vocab_size < 1 or max_ngram < 1.
    """

    aux_layers: tuple[int, ...] = ()
    draft_to_target: torch.Tensor | None = None

    def __init__(self, vocab_size: int, max_ngram: int = 3, name: str = "ngram"):
        self.vocab_size, self.max_ngram = integer("vocab_size", vocab_size, 1), integer("max_ngram", max_ngram, 1)
        self.name = text("name", name)

    def session(self) -> NGramSession:
        return NGramSession(self)


class NGramSession:
    """One request's index, and what was drafted since."""

    def __init__(self, drafter: NGramDrafter):
        self.drafter = drafter
        self.index = NGramIndex(drafter.max_ngram)
        self.drafted: list[int] = []
        self.verified = 0

    def consume(self, tokens: torch.Tensor, features: torch.Tensor | None, logits_to_keep: int) -> torch.Tensor:
        self.drafted.clear()
        proposals = []
        for token in tokens.tolist():
            self.index.append(token)
            proposals.append(self._proposal(token))
        self.verified += len(proposals)
        return one_hot(proposals[-logits_to_keep:], self.drafter.vocab_size, tokens.device)

    def step(self, token: torch.Tensor) -> torch.Tensor:
        self.drafted.append(int(token))
        return one_hot([self._proposal(self.drafted[-1])], self.drafter.vocab_size, token.device)[0]

    def _proposal(self, last: int) -> int:
        found = self.index.propose(self.drafted)
        return last if found is None else found


def one_hot(proposals: Sequence[int], vocab_size: int, device: torch.device) -> torch.Tensor:
    """Logits [n, vocab_size] that propose these n tokens with certainty."""
    logits = torch.full((len(proposals), vocab_size), -math.inf, device=device)
    logits[range(len(proposals)), proposals] = 0.0
    return logits


class NGramIndex:
    """What followed the latest occurrence of every n-gram of a text that grows.

    Args:
        max_ngram: longest n-gram, >= 1.
    """

    def __init__(self, max_ngram: int):
        self.max_ngram = integer("max_ngram", max_ngram, 1)
        self._last: list[int] = []
        self._follows: dict[tuple[int, ...], int] = {}

    def append(self, token: int) -> None:
        """Takes in the text's next token, which now is what follows the n-grams that end before it."""
        last = self._last
        for start in range(len(last)):
            self._follows[tuple(last[start:])] = token
        last.append(token)
        del last[: -self.max_ngram]

    def propose(self, drafted: Sequence[int] = ()) -> int | None:
        """What followed the longest n-gram that ends the text with `drafted` behind it; None where none was seen before."""
        last = tuple([*self._last, *drafted[-self.max_ngram :]][-self.max_ngram :])
        for start in range(len(last)):
            if (found := self._follows.get(last[start:])) is not None:
                return found
        return None
