"""Drafters for the requests of an engine: prompt lookup, datastores, any drafter of the decoder, and `CausalLMs`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from hedgespec.drafters import Drafter, DrafterSession, open_session
from hedgespec.drafters.datastore import Datastore, check_vocabulary
from hedgespec.drafters.ngram import NGramDrafter, NGramIndex
from hedgespec.integrations.vllm.causal_lms import CausalLMs
from hedgespec.integrations.vllm.token_drafter import NOTHING, KeyedDrafter, TokenDrafter

__all__ = ["NOTHING", "CausalLMs", "Datastores", "NGrams", "Sessions", "TokenDrafter"]


class NGrams(KeyedDrafter[NGramIndex]):
    """Prompt lookup: proposes the token that followed the latest occurrence of the longest matching n-gram of the request.

    Args:
        max_ngram: longest n-gram, >= 1.
        name: shown in statistics.

    Raises: ValueError for max_ngram < 1.

    Source: Saxena, "Prompt Lookup Decoding", 2023.
    """

    def __init__(self, max_ngram: int = 3, name: str = "ngram"):
        super().__init__(name)
        self.max_ngram = NGramDrafter(1, max_ngram).max_ngram

    def _begin(self) -> NGramIndex:
        return NGramIndex(self.max_ngram)

    def _extend(self, requests: list[NGramIndex], tokens: list[np.ndarray], keep: list[int]) -> list[np.ndarray]:
        answers = []
        for index, new, count in zip(requests, tokens, keep):
            first = len(new) - count
            proposals = []
            for place, token in enumerate(new.tolist()):
                index.append(token)
                if place >= first:
                    proposals.append(_or_nothing(index.propose()))
            answers.append(np.array(proposals, np.int64))
        return answers

    def _draft(self, requests: list[NGramIndex], lengths: Sequence[int]) -> list[list[int]]:
        drafts = []
        for index, length in zip(requests, lengths):
            drafted: list[int] = []
            while len(drafted) < length and (token := index.propose(drafted)) is not None:
                drafted.append(token)
            drafts.append(drafted)
        return drafts


@dataclass(eq=False)
class _Tail:
    """A request: its last verified tokens, as many as the longest n-gram has."""

    tokens: list[int] = field(default_factory=list)


class Datastores(KeyedDrafter[_Tail]):
    """Retrieval from a corpus, with one lookup for all requests of a step.

    Args:
        datastore: a store of the target's token ids.
        vocab_size: the target's.
        name: shown in statistics.

    Raises: VocabularyMismatchError if the datastore has ids beyond the vocabulary.
    """

    def __init__(self, datastore: Datastore, vocab_size: int, name: str = "datastore"):
        super().__init__(name)
        check_vocabulary(datastore, vocab_size, name)
        self.datastore = datastore

    def _begin(self) -> _Tail:
        return _Tail()

    def _extend(self, requests: list[_Tail], tokens: list[np.ndarray], keep: list[int]) -> list[np.ndarray]:
        contexts, longest = [], self.datastore.max_ngram
        for request, new, count in zip(requests, tokens, keep):
            text = [*request.tokens, *new[-(longest + count) :].tolist()]
            contexts += [text[max(0, end - longest) : end] for end in range(len(text) - count + 1, len(text) + 1)]
            request.tokens = text[-longest:]
        return np.split(self.datastore.next_tokens(contexts), np.cumsum(keep)[:-1]) if requests else []

    def _draft(self, requests: list[_Tail], lengths: Sequence[int]) -> list[list[int]]:
        drafts: list[list[int]] = [[] for _ in requests]
        going = [place for place, length in enumerate(lengths) if length]
        while going:
            found = self.datastore.next_tokens([[*requests[place].tokens, *drafts[place]] for place in going])
            for place, token in zip(going, found.tolist()):
                if token != NOTHING:
                    drafts[place].append(token)
            going = [place for place, token in zip(going, found) if token != NOTHING and len(drafts[place]) < lengths[place]]
        return drafts


class _Session:
    """A request: its session and what the session drafted since it last consumed verified tokens.

    A session discards drafted tokens only when it consumes verified ones, so a repeated `draft` continues from here.
    """

    def __init__(self, session: DrafterSession):
        self.session = session
        self.drafted: list[int] = []
        """Its first token follows from the verified ones; the session has consumed all except the last."""


class Sessions(KeyedDrafter[_Session]):
    """Any drafter of the decoder that needs tokens only; it runs one request after another.

    Args:
        drafter: a drafter without `aux_layers`.
        device: the device of its tokens.

    Raises: ValueError for a drafter that reads the target's hidden states.
    """

    def __init__(self, drafter: Drafter, device: torch.device | str = "cpu"):
        if drafter.aux_layers:
            raise ValueError(
                f"drafter: expected one that runs from tokens alone, got {drafter.name}, which reads the target's hidden "
                f"states of the layers {', '.join(map(str, drafter.aux_layers))}"
            )
        super().__init__(drafter.name)
        self.drafter, self.device = drafter, torch.device(device)

    def _begin(self) -> _Session:
        return _Session(open_session(self.drafter))

    @torch.no_grad()
    def _extend(self, requests: list[_Session], tokens: list[np.ndarray], keep: list[int]) -> list[np.ndarray]:
        answers = []
        for request, new, count in zip(requests, tokens, keep):
            given = torch.as_tensor(new, dtype=torch.int64, device=self.device)
            proposals = self._targets(request.session.consume(given, None, max(1, count)))
            request.drafted = proposals[-1:]
            answers.append(np.array(proposals[len(proposals) - count :], np.int64))
        return answers

    @torch.no_grad()
    def _draft(self, requests: list[_Session], lengths: Sequence[int]) -> list[list[int]]:
        for request, length in zip(requests, lengths):
            while len(request.drafted) < length:
                last = torch.tensor(request.drafted[-1:], device=self.device)
                request.drafted += self._targets(request.session.step(last)[None])
        return [request.drafted[:length] for request, length in zip(requests, lengths)]

    def _targets(self, logits: torch.Tensor) -> list[int]:
        """Returns the target's ids of the argmax of logits [T, Vd]."""
        best = logits.argmax(-1)
        return (best if self.drafter.draft_to_target is None else self.drafter.draft_to_target.to(best.device)[best]).tolist()


def _or_nothing(token: int | None) -> int:
    return NOTHING if token is None else token
