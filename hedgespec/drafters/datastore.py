"""Retrieval from a corpus: what most often followed the longest suffix of the text that the corpus knows.

Source: He et al., "REST: Retrieval-Based Speculative Decoding", arXiv 2311.08252, for the idea; its suffix arrays and trees of
drafts are left for tables and chains.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from hedgespec.drafters.checkpoint_files import read_safetensors
from hedgespec.drafters.ngram import one_hot
from hedgespec.errors import CheckpointError, VocabularyMismatchError
from hedgespec.utils.files import replacing, write_tensors
from hedgespec.utils.scalars import integer, shown, text

FORMAT, VERSION = "hedgespec-datastore", "1"
MAX_NGRAM = 6
"""By default."""
LONGEST = 64
"""What may be asked for."""
TENSORS = {"hashes": np.uint64, "tokens": np.int32}


class Datastore:
    """A table from n-grams to the token that follows each most often, ties to the smallest id.

    N-grams are known by hashes of 64 bits: that two of a corpus of 10^8 share one is less likely than 1 in 10^3, and a wrong
    draft would be all that comes of it. `build` and `load` make one.

    Args:
        hashes: uint64 [E], ascending, of n-grams of every length.
        tokens: int32 [E], what follows each.
        max_ngram: tokens of the longest.
    """

    def __init__(self, hashes: np.ndarray, tokens: np.ndarray, max_ngram: int):
        self.hashes, self.tokens, self.max_ngram = hashes, tokens, integer("max_ngram", max_ngram, 1, LONGEST)

    def __len__(self) -> int:
        """Entries."""
        return len(self.hashes)

    @classmethod
    def build(cls, sequences: Iterable[Sequence[int] | np.ndarray], max_ngram: int = MAX_NGRAM) -> Datastore:
        """Counts what follows every n-gram of 1..max_ngram tokens within a sequence.

        An entry that says what the table would say without it, by the n-gram's own suffixes, is left out.

        Args:
            sequences: of token ids >= 0; one of fewer than two tokens adds nothing.
            max_ngram: 1..64.

        Raises: TypeError for a max_ngram that is no int; ValueError for a negative id, a sequence that is not one of integers,
        or a max_ngram outside its range.
        """
        max_ngram = integer("max_ngram", max_ngram, 1, LONGEST)
        texts = [np.asarray(sequence) for sequence in sequences]
        for sequence in texts:
            if sequence.size and (sequence.ndim != 1 or sequence.dtype.kind not in "iu"):
                raise ValueError(f"sequences: expected integer ids [T] in each, got {sequence.dtype} {sequence.shape}")
            if sequence.size and (sequence.min() < 0 or sequence.max() >= 2**31):
                raise ValueError(f"sequences: expected ids in 0..{2**31 - 1}, got {sequence.min()}..{sequence.max()}")
        corpus = np.concatenate([np.empty(0, np.int64), *(sequence.ravel().astype(np.int64) for sequence in texts)])
        depth = np.concatenate([np.empty(0, np.int64), *(np.arange(len(sequence)) for sequence in texts)])
        at = np.flatnonzero(depth[1:])  # the last tokens of n-grams that something follows
        hashes, tokens = [np.empty(0, np.uint64)], [np.empty(0, np.int32)]
        sums = np.zeros(len(at), np.uint64)
        said = np.full(len(at), -1)  # at each of these places, by the longest n-gram so far
        for order in range(1, max_ngram + 1):
            long_enough = depth[at] >= order - 1
            at, sums, said = at[long_enough], sums[long_enough], said[long_enough]
            sums = sums + _mixed(corpus[at - (order - 1)], order)
            keys, best, place = _most_frequent(_mixed(sums, order), corpus[at + 1])
            first = np.empty(len(keys), np.int64)
            first[place] = np.arange(len(place))  # some occurrence of each: they all say the same by their suffixes
            new = best != said[first]
            hashes.append(keys[new])
            tokens.append(best[new].astype(np.int32))
            said = best[place]
        all_hashes, all_tokens = np.concatenate(hashes), np.concatenate(tokens)
        ascending = np.argsort(all_hashes, kind="stable")
        return cls(all_hashes[ascending], all_tokens[ascending], max_ngram)

    def next_tokens(self, contexts: Sequence[Sequence[int] | np.ndarray]) -> np.ndarray:
        """What follows the longest known suffix of each text.

        Args:
            contexts: B texts of token ids >= 0; of each the last `max_ngram` tokens are looked at.

        Returns: int64 [B]; -1 where nothing matches.
        """
        last = np.full((len(contexts), self.max_ngram), -1, np.int64)
        for row, context in enumerate(contexts):
            tail = context[-self.max_ngram :]
            last[row, : len(tail)] = tail[::-1]
        found = np.full(len(contexts), -1, np.int64)
        if not len(self):
            return found
        orders = np.arange(1, self.max_ngram + 1)
        wanted = _mixed(np.cumsum(_mixed(last, orders), 1, dtype=np.uint64), orders)
        places = np.minimum(np.searchsorted(self.hashes, wanted), len(self) - 1)
        hits = (self.hashes[places] == wanted) & (last >= 0)
        rows = np.flatnonzero(hits.any(1))
        longest = self.max_ngram - 1 - hits[rows, ::-1].argmax(1)
        found[rows] = self.tokens[places[rows, longest]]
        return found

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, whole or not at all.

        Raises: OSError if it cannot be written.
        """
        metadata = {"format": FORMAT, "version": VERSION, "max_ngram": str(self.max_ngram)}
        with replacing(path) as fresh:
            write_tensors(save_file, {"hashes": self.hashes, "tokens": self.tokens}, fresh, metadata)

    @classmethod
    def load(cls, path: str | Path) -> Datastore:
        """Reads what `save` wrote.

        Raises: CheckpointError if the file is missing, corrupt, of another format or version, or no table.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise CheckpointError(f"path: expected a datastore in a safetensors file, got {shown(path)}")
        metadata, tensors = read_safetensors(path, "np", "a datastore in a safetensors file")
        if metadata.get("format") != FORMAT:
            raise CheckpointError(f"{path}: expected format {FORMAT}, got {metadata.get('format')}")
        if metadata.get("version") != VERSION:
            raise CheckpointError(f"{path}: expected version {VERSION}, got {metadata.get('version')}")
        length = metadata.get("max_ngram", "")
        if length not in map(str, range(1, LONGEST + 1)):
            raise CheckpointError(f"{path}: expected max_ngram as an integer in 1..{LONGEST}, got {length!r}")
        if {name: tensor.dtype for name, tensor in tensors.items()} != TENSORS:
            found = {name: str(tensor.dtype) for name, tensor in tensors.items()}
            raise CheckpointError(f"{path}: expected tensors hashes of uint64 and tokens of int32, got {found}")
        hashes, tokens = tensors["hashes"], tensors["tokens"]
        if hashes.ndim != 1 or hashes.shape != tokens.shape:
            raise CheckpointError(f"{path}: expected hashes and tokens [E], got {hashes.shape} and {tokens.shape}")
        if (hashes[1:] < hashes[:-1]).any() or (tokens < 0).any():
            raise CheckpointError(f"{path}: expected ascending hashes and ids >= 0, got others")
        return cls(hashes, tokens, int(length))


def is_datastore(path: str | Path) -> bool:
    """Whether that is a file which says it holds one."""
    try:
        with safe_open(path, "np") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (OSError, SafetensorError):
        return False


def _mixed(values: np.ndarray, salts: int | np.ndarray) -> np.ndarray:
    """Hashes uint64 of integers, others for every salt: the finaliser of SplitMix64.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    hashed = values.astype(np.uint64) + np.asarray(salts, np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    hashed = (hashed ^ (hashed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashed = (hashed ^ (hashed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashed ^ (hashed >> np.uint64(31))


def _most_frequent(keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distinct keys [E], ascending, each one's most frequent value, ties to the smallest, and which of them each key is."""
    distinct, place = np.unique(keys, return_inverse=True)
    order = np.lexsort((values, place))
    key, value = place[order], values[order]
    starts = np.flatnonzero(np.r_[True, (key[1:] != key[:-1]) | (value[1:] != value[:-1])][: len(key)])
    counts = np.diff(np.r_[starts, len(key)])
    key, value = key[starts], value[starts]
    order = np.lexsort((value, -counts, key))
    best = order[np.flatnonzero(np.r_[True, key[order][1:] != key[order][:-1]][: len(key)])]
    return distinct, value[best], place


class DatastoreDrafter:
    """Proposes, with certainty, what a datastore says.

    Where nothing matches it proposes the last token again, so that it always has a proposal; being one-hot, it is exact in
    either mode.

    Args:
        datastore: of texts in the target's tokens.
        vocab_size: the target's.
        name: shown in statistics.

    Raises: TypeError for an argument of another type; VocabularyMismatchError for a datastore that says ids beyond the
    vocabulary.
    """

    aux_layers: tuple[int, ...] = ()
    draft_to_target: torch.Tensor | None = None

    def __init__(self, datastore: Datastore, vocab_size: int, name: str = "datastore"):
        if not isinstance(datastore, Datastore):
            raise TypeError(f"datastore: expected a Datastore, got {shown(datastore)}; Datastore.load reads a file")
        self.datastore, self.vocab_size, self.name = datastore, integer("vocab_size", vocab_size, 1), text("name", name)
        check_vocabulary(datastore, self.vocab_size, name)

    def session(self) -> DatastoreSession:
        return DatastoreSession(self)


class DatastoreSession:
    """One request's last tokens."""

    def __init__(self, drafter: DatastoreDrafter):
        self.drafter = drafter
        self.last: list[int] = []
        """Verified, as many as the longest n-gram has."""
        self.drafted: list[int] = []
        self.verified = 0

    def consume(self, tokens: torch.Tensor, features: torch.Tensor | None, logits_to_keep: int) -> torch.Tensor:
        text, longest = [*self.last, *tokens.tolist()], self.drafter.datastore.max_ngram
        ends = range(len(text) - logits_to_keep + 1, len(text) + 1)
        self.last = text[-longest:]
        self.drafted.clear()
        self.verified += len(tokens)
        return self._proposed([text[max(0, end - longest) : end] for end in ends], tokens.device)

    def step(self, token: torch.Tensor) -> torch.Tensor:
        self.drafted.append(int(token))
        return self._proposed([[*self.last, *self.drafted]], token.device)[0]

    def _proposed(self, contexts: list[list[int]], device: torch.device) -> torch.Tensor:
        found = self.drafter.datastore.next_tokens(contexts).tolist()
        proposals = [context[-1] if token < 0 else token for token, context in zip(found, contexts)]
        return one_hot(proposals, self.drafter.vocab_size, device)


def check_vocabulary(datastore: Datastore, vocab_size: int, name: str) -> None:
    """Raises: VocabularyMismatchError that names the drafter `name` if the datastore says ids beyond the vocabulary."""
    highest = int(datastore.tokens.max(initial=-1))
    if highest >= vocab_size:
        raise VocabularyMismatchError(f"drafter {name}: expected ids below the target's {vocab_size}, got {highest}")
