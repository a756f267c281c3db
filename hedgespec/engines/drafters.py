"""Drafters for an engine that runs requests in batches of its own and shows nothing of its target but token ids.

Requests come and go at every step. After a step the engine has new verified tokens of some requests: `extend` takes them in and
says at each position what the drafter would have drafted there, which is all that a learner needs of a drafter that it did not
choose; `draft` is for those that it chose.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch

from hedgespec.drafters import Drafter, DrafterSession
from hedgespec.drafters.ngram import NGramDrafter, NGramIndex

NOTHING = -1
"""Stands where a drafter has no token to say."""


class TokenDrafter(Protocol):
    """A drafter that runs from tokens alone, with its state of every request of an engine; requests are named by integer keys.

    In all methods: ValueError for arguments of different lengths, a key twice, no tokens, a negative number, or a draft of a
    request that is not known. Nothing has changed then.
    """

    name: str
    """Shown in statistics; distinct within a pool."""

    def extend(self, keys: Sequence[int], tokens: Sequence[np.ndarray], keep: Sequence[int]) -> list[np.ndarray]:
        """Takes in verified tokens that follow what each request has; a key not known yet begins a request. Forgets what was
        drafted.

        Args:
            keys: B of them, distinct.
            tokens: of each request, int32 or int64 [T_b], T_b >= 1.
            keep: of each request, after how many of these tokens, the last ones, to say the next.

        Returns: of each request the drafter's (argmax) token after each of its last min(keep_b, T_b) tokens, int64
            [min(keep_b, T_b)]; -1 where it has nothing to say.
        """

    def draft(self, keys: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
        """Up to so many tokens each behind the request's verified ones, greedily, fewer where it has nothing to say. Nothing
        drafted is kept: a later `extend` or `draft` begins from the verified tokens again."""

    def drop(self, keys: Iterable[int]) -> None:
        """Forgets these requests; unknown keys are fine."""

    @property
    def requests(self) -> int:
        """How many requests it holds state of."""


_Request = TypeVar("_Request")


class _ByKey(Generic[_Request]):
    """What the drafters share: requests by their keys, and arguments that have been checked."""

    def __init__(self, name: str):
        self.name = name
        self._requests: dict[int, _Request] = {}

    def extend(self, keys: Sequence[int], tokens: Sequence[np.ndarray], keep: Sequence[int]) -> list[np.ndarray]:
        _check(keys, "tokens", tokens)
        _check(keys, "keep", keep)
        tokens = [np.asarray(one) for one in tokens]
        for one in tokens:
            if one.ndim != 1 or one.size == 0 or one.dtype.kind not in "iu":
                raise ValueError(f"tokens: expected at least one integer id of each request, [T], got {one.dtype} {one.shape}")
        _check_counts("keep", keep)
        for key in keys:
            if key not in self._requests:
                self._requests[key] = self._begin()
        found = [self._requests[key] for key in keys]
        return self._extend(found, tokens, [min(count, len(one)) for count, one in zip(keep, tokens)])

    def draft(self, keys: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
        _check(keys, "lengths", lengths)
        _check_counts("lengths", lengths)
        if unknown := [key for key in keys if key not in self._requests]:
            raise ValueError(f"keys: expected requests that were extended, got {unknown[0]}")
        return self._draft([self._requests[key] for key in keys], lengths)

    def drop(self, keys: Iterable[int]) -> None:
        for key in keys:
            self._requests.pop(key, None)

    @property
    def requests(self) -> int:
        return len(self._requests)

    def _begin(self) -> _Request:
        """A fresh request."""
        raise NotImplementedError

    def _extend(self, requests: list[_Request], tokens: list[np.ndarray], keep: list[int]) -> list[np.ndarray]:
        """`extend`, with keep_b <= T_b."""
        raise NotImplementedError

    def _draft(self, requests: list[_Request], lengths: Sequence[int]) -> list[list[int]]:
        raise NotImplementedError


class NGrams(_ByKey[NGramIndex]):
    """Prompt lookup: what followed the latest occurrence of the longest matching n-gram of the request's own text.

    Args:
        max_ngram: longest match tried, >= 1.
        name: shown in statistics.

    Raises: ValueError for max_ngram < 1.

    Source: Saxena, "Prompt Lookup Decoding", 2023.
    """

    def __init__(self, max_ngram: int = 3, name: str = "ngram"):
        super().__init__(name)
        self.max_ngram = NGramDrafter(1, max_ngram).max_ngram

    def _begin(self) -> NGramIndex:
        return NGramIndex(self.max_ngram)

    def _extend(self, requests, tokens, keep):
        said = []
        for index, new, count in zip(requests, tokens, keep):
            first = len(new) - count
            proposals = []
            for place, token in enumerate(new.tolist()):
                index.append(token)
                if place >= first:
                    proposals.append(_or_nothing(index.propose()))
            said.append(np.array(proposals, np.int64))
        return said

    def _draft(self, requests, lengths):
        drafts = []
        for index, length in zip(requests, lengths):
            drafted: list[int] = []
            while len(drafted) < length and (token := index.propose(drafted)) is not None:
                drafted.append(token)
            drafts.append(drafted)
        return drafts


class _Session:
    """A request's session, what it said last, and what was drafted since: a session takes back drafts only when it reads on."""

    def __init__(self, session: DrafterSession):
        self.session = session
        self.drafted: list[int] = []
        """Its first token follows from the verified ones; the session has taken in all but the last."""


class Sessions(_ByKey[_Session]):
    """Any drafter of the decoder that needs tokens only, one request after the other.

    Args:
        drafter: whose `aux_layers` are empty.
        device: where it reads its tokens.

    Raises: ValueError for a drafter that reads the target's hidden states.
    """

    def __init__(self, drafter: Drafter, device: torch.device | str = "cpu"):
        if drafter.aux_layers:
            raise ValueError(
                f"drafter: expected one that runs from tokens alone, got {drafter.name}, which reads the target's hidden states "
                f"of the layers {', '.join(map(str, drafter.aux_layers))}"
            )
        super().__init__(drafter.name)
        self.drafter, self.device = drafter, torch.device(device)

    def _begin(self) -> _Session:
        return _Session(self.drafter.session())

    @torch.no_grad()
    def _extend(self, requests, tokens, keep):
        said = []
        for request, new, count in zip(requests, tokens, keep):
            given = torch.as_tensor(new, dtype=torch.int64, device=self.device)
            proposals = self._targets(request.session.prefill(given, None, max(1, count)))
            request.drafted = proposals[-1:]
            said.append(np.array(proposals[len(proposals) - count :], np.int64))
        return said

    @torch.no_grad()
    def _draft(self, requests, lengths):
        for request, length in zip(requests, lengths):
            while len(request.drafted) < length:
                last = torch.tensor(request.drafted[-1:], device=self.device)
                request.drafted += self._targets(request.session.step(last)[None])
        return [request.drafted[:length] for request, length in zip(requests, lengths)]

    def _targets(self, logits: torch.Tensor) -> list[int]:
        """The target's ids of the likeliest tokens, of logits [T, Vd]."""
        best = logits.argmax(-1)
        return (best if self.drafter.draft_to_target is None else self.drafter.draft_to_target.to(best.device)[best]).tolist()


def _check(keys: Sequence[int], name: str, values: Sequence) -> None:
    if len(values) != len(keys):
        raise ValueError(f"{name}: expected one for each of the {len(keys)} keys, got {len(values)}")
    if len(set(keys)) < len(keys):
        raise ValueError(f"keys: expected distinct ones, got {list(keys)}")


def _check_counts(name: str, counts: Sequence[int]) -> None:
    if counts and min(counts) < 0:
        raise ValueError(f"{name}: expected numbers >= 0, got {min(counts)}")


def _or_nothing(token: int | None) -> int:
    return NOTHING if token is None else token
