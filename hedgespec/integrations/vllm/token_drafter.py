"""The protocol of drafters in an engine that runs requests in batches of its own and shows only token ids.

Requests may start and end at every step. After a step the engine has new verified tokens of some requests. `extend` consumes
them and returns, for each position, the token that the drafter would have drafted there; a learner scores a drafter by these
tokens whether or not it was chosen. `draft` drafts for the requests that chose this drafter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np

NOTHING = -1
"""The token of a drafter that abstains."""


class TokenDrafter(Protocol):
    """A drafter that needs tokens only and holds the state of every request of an engine. Requests have integer keys.

    All methods raise ValueError for arguments of different lengths, duplicate keys, no tokens, a negative number, or a draft of
    an unknown request. They change nothing then.
    """

    name: str
    """Shown in statistics; distinct within a pool."""

    def extend(self, keys: Sequence[int], tokens: Sequence[np.ndarray], keep: Sequence[int]) -> list[np.ndarray]:
        """Consumes verified tokens that follow those of the last call; an unknown key starts a request. Discards drafts.

        Args:
            keys: B distinct keys.
            tokens: for each request int32 or int64 [T_b], T_b >= 1.
            keep: for each request, for how many of its last new tokens the token that follows is returned.

        Returns: for each request int64 [min(keep_b, T_b)], the drafter's argmax token after each of its last tokens; -1 where
            it abstains.
        """

    def draft(self, keys: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
        """Drafts greedily behind the verified tokens: up to `lengths` tokens for each request, fewer if the drafter abstains.
        Drafts are not kept: a later `extend` or `draft` starts from the verified tokens again."""

    def drop(self, keys: Iterable[int]) -> None:
        """Discards the state of these requests. Unknown keys are ignored."""

    @property
    def requests(self) -> int:
        """Number of requests that it holds state of."""


_Request = TypeVar("_Request")


class KeyedDrafter(Generic[_Request]):
    """Base class of the drafters: holds the requests by key and checks the arguments. Subclasses define `_begin`, `_extend` and
    `_draft`."""

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
        """Returns the state of a new request."""
        raise NotImplementedError

    def _extend(self, requests: list[_Request], tokens: list[np.ndarray], keep: list[int]) -> list[np.ndarray]:
        """`extend`, with keep_b <= T_b."""
        raise NotImplementedError

    def _draft(self, requests: list[_Request], lengths: Sequence[int]) -> list[list[int]]:
        raise NotImplementedError


def _check(keys: Sequence[int], name: str, values: Sequence) -> None:
    if len(values) != len(keys):
        raise ValueError(f"{name}: expected one for each of the {len(keys)} keys, got {len(values)}")
    if len(set(keys)) < len(keys):
        raise ValueError(f"keys: expected distinct ones, got {list(keys)}")


def _check_counts(name: str, counts: Sequence[int]) -> None:
    if counts and min(counts) < 0:
        raise ValueError(f"{name}: expected numbers >= 0, got {min(counts)}")
