"""Prompt lookup: what followed the last time the same few tokens were seen.

Source: Saxena, "Prompt Lookup Decoding", 2023.
"""

from __future__ import annotations

import math

import torch


class NGramDrafter:
    """Proposes, with certainty, the token that followed the latest occurrence of the longest matching n-gram.

    Where nothing matches it proposes the last token again, so that it always has a proposal; being one-hot, it is exact in
    either mode.

    Args:
        vocab_size: the target's.
        max_ngram: longest match tried, >= 1.
        name: shown in statistics.

    Raises: ValueError for max_ngram < 1.
    """

    aux_layers = ()
    draft_to_target = None

    def __init__(self, vocab_size: int, max_ngram: int = 3, name: str = "ngram"):
        if max_ngram < 1:
            raise ValueError(f"max_ngram: expected at least 1, got {max_ngram}")
        self.vocab_size, self.max_ngram, self.name = vocab_size, max_ngram, name

    def session(self) -> NGramSession:
        return NGramSession(self)


class NGramSession:
    """One request's index from n-grams to the position after their latest occurrence."""

    def __init__(self, drafter: NGramDrafter):
        self.drafter = drafter
        self.tokens: list[int] = []
        self.verified = 0
        self.follows: dict[tuple[int, ...], int] = {}

    def prefill(self, tokens: torch.Tensor, features: None, logits_to_keep: int) -> torch.Tensor:
        del self.tokens[self.verified :]
        proposals = []
        for token in tokens.tolist():
            # The n-grams that end before this token are indexed by where this token stands.
            for length in range(1, min(self.drafter.max_ngram, len(self.tokens)) + 1):
                self.follows[tuple(self.tokens[-length:])] = len(self.tokens)
            self.tokens.append(token)
            proposals.append(self._proposal())
        self.verified = len(self.tokens)
        return self._one_hot(proposals[-logits_to_keep:], tokens.device)

    def step(self, token: torch.Tensor) -> torch.Tensor:
        self.tokens.append(int(token))
        return self._one_hot([self._proposal()], token.device)[0]

    def _proposal(self) -> int:
        for length in range(min(self.drafter.max_ngram, len(self.tokens)), 0, -1):
            if (found := self.follows.get(tuple(self.tokens[-length:]))) is not None:
                return self.tokens[found]
        return self.tokens[-1]

    def _one_hot(self, proposals: list[int], device: torch.device) -> torch.Tensor:
        logits = torch.full((len(proposals), self.drafter.vocab_size), -math.inf, device=device)
        logits[range(len(proposals)), proposals] = 0.0
        return logits
