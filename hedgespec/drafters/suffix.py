"""Retrieval by suffix: what followed the longest suffix of the text that also occurs earlier, in this text or in others.

Sources: Saxena, "Prompt Lookup Decoding", 2023 (drafting from the prompt); Oliaro et al., "SuffixDecoding", arXiv 2411.04975
(matches of any length, earlier outputs).
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hedgespec.drafters.suffix_reference import Continuation
from hedgespec.drafters.suffix_reference import SuffixAutomaton as PythonAutomaton
from hedgespec.errors import CheckpointError
from hedgespec.utils.files import replacing, write_tensors
from hedgespec.utils.scalars import integer, shown, text

try:
    from hedgespec._native import SuffixAutomaton
except ImportError:  # the package was built without its native module
    SuffixAutomaton = PythonAutomaton

FORMAT, VERSION = "hedgespec-suffix-index", "1"
MAX_CANDIDATES = 16
"""Next tokens of a match that get a probability: the most frequent ones."""
LARGEST_ID = 2**31 - 1


class SuffixIndex:
    """Texts of token ids, and the longest suffix of each that also occurs earlier (a suffix automaton, built online).

    Appending a token takes about a microsecond, whatever the size of the index. Several requests, and threads, may share one.

    Args:
        max_tokens: once the index holds more tokens, the oldest texts are dropped until half as many are left. Of a text that
            is still open the end is kept. None: no limit.

    Raises: TypeError, ValueError: max_tokens is not None and not an integer >= 2.
    """

    def __init__(self, max_tokens: int | None = None) -> None:
        self.max_tokens = None if max_tokens is None else integer("max_tokens", max_tokens, 2, otherwise=" or None")
        self._automaton = SuffixAutomaton(self.max_tokens or 0)

    def __len__(self) -> int:
        """Tokens held."""
        return self._automaton.tokens

    def __bool__(self) -> bool:
        """Whether there is an index, empty or not."""
        return True

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self.max_tokens, self._automaton.texts())

    @property
    def nbytes(self) -> int:
        """Memory of the index in bytes; 0 where the native module is missing."""
        return self._automaton.bytes

    def open(self) -> SuffixText:
        """Begins a text of the index, to which tokens are appended as they are emitted."""
        return SuffixText(self._automaton)

    def add(self, tokens: Sequence[int] | np.ndarray | torch.Tensor) -> None:
        """Adds a complete text.

        Args:
            tokens: ids in 0..2^31-1, [T].

        Raises: TypeError, ValueError: `tokens` is anything else.
        """
        written = self.open()
        try:
            written.append(_ids(tokens))
        finally:
            written.close()

    def save(self, path: str | Path) -> None:
        """Writes the texts to a safetensors file, whole or not at all.

        Raises: OSError: the file cannot be written.
        """
        from safetensors.numpy import save_file

        texts = [one for one in self._automaton.texts() if one]
        tensors = {
            "tokens": np.array([token for one in texts for token in one], np.int32),
            "lengths": np.array([len(one) for one in texts], np.int64),
        }
        with replacing(path) as fresh:
            write_tensors(save_file, tensors, fresh, {"format": FORMAT, "version": VERSION})

    @classmethod
    def load(cls, path: str | Path, max_tokens: int | None = None) -> SuffixIndex:
        """Reads what `save` wrote, and indexes it again: about a second for a million tokens.

        Raises: CheckpointError: the file is missing, corrupt, or of another format or version.
        """
        index = cls(max_tokens)
        for tokens in _read(path):
            index.add(tokens)
        return index


class SuffixText:
    """One text of a `SuffixIndex`. It leaves the index open to new tokens until `close`, or until nothing refers to it."""

    def __init__(self, automaton: Any) -> None:
        self._automaton, self._number = automaton, automaton.open()
        self.close = weakref.finalize(self, automaton.close, self._number)
        """Marks the text as complete; it stays in the index."""
        self.close.atexit = False

    def append(self, tokens: list[int], keep: int = 0) -> list[Continuation]:
        """Appends verified tokens. Returns (token, length, count, total) after each of the last `keep` of them, see
        `hedgespec.drafters.suffix_reference.Continuation`."""
        return self._automaton.append(self._number, tokens, keep)

    def candidates(self, drafted: Sequence[int] = (), most: int = MAX_CANDIDATES) -> list[Continuation]:
        """Returns the next tokens after the text and `drafted` behind it, the most frequent first; empty without a match."""
        return self._automaton.all_after(self._number, drafted, most)

    def draft(self, length: int) -> list[Continuation]:
        """Follows the most frequent next tokens, at most `length` of them."""
        return self._automaton.draft(self._number, length)


def _restored(max_tokens: int | None, texts: list[list[int]]) -> SuffixIndex:
    index = SuffixIndex(max_tokens)
    for tokens in texts:
        index.add(tokens)
    return index


def _ids(tokens: Any) -> list[int]:
    """Returns token ids as a list of ints."""
    if isinstance(tokens, torch.Tensor):
        tokens = tokens.cpu().numpy()
    array = np.asarray(tokens)
    if array.size == 0:
        return []
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise TypeError(f"tokens: expected integer ids [T], got {shown(tokens)}")
    if array.min() < 0 or array.max() > LARGEST_ID:
        raise ValueError(f"tokens: expected ids in 0..{LARGEST_ID}, got {array.min()}..{array.max()}")
    return array.tolist()


def is_suffix_index(path: str | Path) -> bool:
    """Returns whether `path` is a file that says it holds a suffix index."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (OSError, SafetensorError):
        return False


def _read(path: str | Path) -> Iterable[np.ndarray]:
    """Yields the texts of a saved index."""
    from safetensors import SafetensorError, safe_open

    expected = "path: expected a suffix index in a safetensors file"
    if not isinstance(path, (str, os.PathLike)):
        raise CheckpointError(f"{expected}, got {shown(path)}")
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
    except FileNotFoundError as error:
        raise CheckpointError(f"{expected}, found none at {path}") from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{expected}, got {path} ({error})") from error
    for name, value in (("format", FORMAT), ("version", VERSION)):
        if metadata.get(name) != value:
            raise CheckpointError(f"{path}: expected {name} {value}, got {metadata.get(name)}")
    found = {name: (str(tensor.dtype), tensor.ndim) for name, tensor in tensors.items()}
    if found != {"tokens": ("int32", 1), "lengths": ("int64", 1)}:
        raise CheckpointError(f"{path}: expected tensors tokens int32 [T] and lengths int64 [D], got {found}")
    tokens, lengths = tensors["tokens"], tensors["lengths"]
    if (lengths < 1).any() or lengths.sum() != len(tokens) or (tokens < 0).any():
        raise CheckpointError(f"{path}: expected ids >= 0 and lengths that sum to {len(tokens)}, got others")
    return np.split(tokens, np.cumsum(lengths)[:-1]) if len(lengths) else []


class SuffixDrafter:
    """Proposes what followed the longest suffix of the text that also occurs earlier, with the frequencies as probabilities.

    Where nothing matches it proposes the last token again, so that it always has a proposal.

    Args:
        vocab_size: the target's.
        index: texts that matches are looked for in beside the request's own, such as earlier requests'; every request that is
            decoded becomes one of them, so share an index only among requests that may learn of each other's texts by the
            speed at which their own are decoded. None: each request sees its own text only.
        min_match: shortest match, in tokens, that it proposes behind, >= 1.
        name: shown in statistics.

    Raises: TypeError for an argument of another type; ValueError for one outside its range.
    """

    aux_layers: tuple[int, ...] = ()
    draft_to_target: torch.Tensor | None = None

    def __init__(self, vocab_size: int, index: SuffixIndex | None = None, *, min_match: int = 1, name: str = "suffix"):
        if index is not None and not isinstance(index, SuffixIndex):
            raise TypeError(f"index: expected a SuffixIndex or None, got {shown(index)}; SuffixIndex.load reads a file")
        self.vocab_size, self.index = integer("vocab_size", vocab_size, 1), index
        self.min_match, self.name = integer("min_match", min_match, 1), text("name", name)

    def session(self) -> SuffixSession:
        return SuffixSession(self)


class SuffixSession:
    """The text of one request in the index, and what was drafted since."""

    def __init__(self, drafter: SuffixDrafter):
        self.drafter = drafter
        self.text = (SuffixIndex() if drafter.index is None else drafter.index).open()
        self.drafted: list[int] = []
        self.verified = 0

    def consume(self, tokens: torch.Tensor, features: torch.Tensor | None, logits_to_keep: int) -> torch.Tensor:
        self.drafted.clear()
        new = tokens.tolist()
        self.text.append(new[: len(new) - logits_to_keep])
        found = []
        for token in new[len(new) - logits_to_keep :]:
            self.text.append([token])
            found.append(self._candidates(token))
        self.verified += len(new)
        return self._logits(found, tokens.device)

    def step(self, token: torch.Tensor) -> torch.Tensor:
        self.drafted.append(int(token))
        return self._logits([self._candidates(self.drafted[-1])], token.device)[0]

    def _candidates(self, last: int) -> list[Continuation]:
        found = self.text.candidates(self.drafted)
        found = [one for one in found if one[1] >= self.drafter.min_match and one[0] < self.drafter.vocab_size]
        return found or [(last, 0, 1, 1)]

    def _logits(self, found: Sequence[Sequence[Continuation]], device: torch.device) -> torch.Tensor:
        """Returns logits [n, V]: the logarithm of the counts, the first candidate slightly ahead of its equals."""
        logits = torch.full((len(found), self.drafter.vocab_size), -math.inf)
        for row, candidates in enumerate(found):
            counts = [one[2] + (0.01 if place == 0 else 0.0) for place, one in enumerate(candidates)]
            logits[row, [one[0] for one in candidates]] = torch.tensor(counts).log()
        return logits.to(device)
