"""Retrieval from a corpus: the table against a dictionary, its file, and the drafter that looks things up."""

from __future__ import annotations

import math
import pickle
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from hedgespec.drafters.datastore import FORMAT, VERSION, Datastore, DatastoreDrafter
from hedgespec.errors import CheckpointError, VocabularyMismatchError

TOKEN = st.integers(0, 3)
CORPUS = [[1, 2, 3, 4, 1, 2, 5, 1, 2, 3], [9, 2, 5]]


def dictionary(sequences: list[list[int]], max_ngram: int) -> dict[tuple[int, ...], int]:
    """What most often follows each n-gram, ties to the smallest id."""
    counts: dict[tuple[int, ...], Counter] = defaultdict(Counter)
    for sequence in sequences:
        for end in range(1, len(sequence)):
            for start in range(max(0, end - max_ngram), end):
                counts[tuple(sequence[start:end])][sequence[end]] += 1
    return {ngram: min(count, key=lambda token: (-count[token], token)) for ngram, count in counts.items()}


def looked_up(table: dict[tuple[int, ...], int], context: list[int], max_ngram: int) -> int:
    suffixes = (tuple(context[start:]) for start in range(max(0, len(context) - max_ngram), len(context)))
    return next((table[suffix] for suffix in suffixes if suffix in table), -1)


@settings(max_examples=100, deadline=None)
@given(
    sequences=st.lists(st.lists(TOKEN, max_size=20), max_size=4),
    contexts=st.lists(st.lists(st.integers(0, 4), max_size=8), max_size=8),
    max_ngram=st.integers(1, 5),
)
def test_the_longest_match_wins_as_in_a_dictionary(sequences, contexts, max_ngram):
    datastore, table = Datastore.build(sequences, max_ngram), dictionary(sequences, max_ngram)
    found = datastore.next_tokens(contexts)
    assert found.dtype == np.int64
    assert found.tolist() == [looked_up(table, context, max_ngram) for context in contexts]
    assert len(datastore) <= len(table)


def test_what_the_shorter_suffixes_say_anyway_is_left_out():
    text = np.arange(100)  # every token follows from the last
    datastore = Datastore.build([text], 6)
    assert len(datastore) == 99
    assert datastore.next_tokens([text[:50], [7], [99], []]).tolist() == [50, 8, -1, -1]


def test_a_long_text_has_the_hashes_of_its_parts():
    random = np.random.default_rng(0)
    text = random.integers(0, 20, 3000).tolist()
    datastore, table = Datastore.build([text], 4), dictionary([text], 4)
    contexts = [text[end - 9 : end] for end in range(9, 3000, 7)]
    assert datastore.next_tokens(contexts).tolist() == [looked_up(table, context, 4) for context in contexts]


@pytest.mark.parametrize(
    ("sequences", "max_ngram", "message"),
    [
        ([[1, 2]], 0, "max_ngram: expected 1..64, got 0"),
        ([[1, -2]], 2, "sequences: expected ids in 0.*got -2..1"),
        ([[1, 2**31]], 2, "sequences: expected ids in 0..2147483647"),
        ([[1.5]], 2, "sequences: expected integer ids.*float64"),
        ([[[1, 2]]], 2, r"sequences: expected integer ids.*\(1, 2\)"),
    ],
)
def test_what_cannot_be_counted_is_refused(sequences, max_ngram, message):
    with pytest.raises(ValueError, match=message):
        Datastore.build(sequences, max_ngram)


# The file


@pytest.mark.parametrize("corpus", [CORPUS, []], ids=["some", "none"])
def test_a_datastore_survives_its_file(corpus, tmp_path):
    built = Datastore.build(corpus, 3)
    built.save(tmp_path / "store.safetensors")
    read = Datastore.load(tmp_path / "store.safetensors")
    assert read.max_ngram == 3
    assert np.array_equal(read.hashes, built.hashes) and np.array_equal(read.tokens, built.tokens)
    contexts = [[1, 2], [4, 1, 2], [9], [3]]
    assert read.next_tokens(contexts).tolist() == built.next_tokens(contexts).tolist()


def spoilt(change: dict, **metadata: str) -> tuple[dict, dict]:
    """Tensors and metadata of a file, changed; None leaves a tensor out."""
    built = Datastore.build(CORPUS, 3)
    tensors = {"hashes": built.hashes, "tokens": built.tokens} | change
    told = {"format": FORMAT, "version": VERSION, "max_ngram": "3"} | metadata
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}, told


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (spoilt({}, format="hedgespec-zoo-1"), "expected format hedgespec-datastore, got hedgespec-zoo-1"),
        (spoilt({}, version="2"), "expected version 1, got 2"),
        (spoilt({}, max_ngram="0"), "expected max_ngram as an integer in 1..64, got '0'"),
        (spoilt({}, max_ngram="65"), "expected max_ngram as an integer in 1..64, got '65'"),
        (spoilt({}, max_ngram="three"), "expected max_ngram as an integer in 1..64, got 'three'"),
        (spoilt({"tokens": None}), "expected tensors hashes of uint64 and tokens of int32"),
        (spoilt({"tokens": np.zeros(3)}), "expected tensors.*'tokens': 'float64'"),
        (spoilt({"tokens": np.zeros(3, np.int32)}), r"expected hashes and tokens \[E\]"),
        (spoilt({"hashes": np.arange(9, 0, -1, np.uint64), "tokens": np.zeros(9, np.int32)}), "expected ascending hashes"),
        (spoilt({"hashes": np.arange(9, dtype=np.uint64), "tokens": np.full(9, -1, np.int32)}), "ids >= 0"),
    ],
)
def test_a_file_that_is_no_table_is_refused(contents, message, tmp_path):
    tensors, metadata = contents
    save_file(tensors, tmp_path / "store.safetensors", metadata=metadata)
    with pytest.raises(CheckpointError, match=message):
        Datastore.load(tmp_path / "store.safetensors")


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    path = tmp_path / "store.safetensors"
    with pytest.raises(CheckpointError, match="found none at .*store"):
        Datastore.load(path)
    Datastore.build(CORPUS).save(path)
    whole = path.read_bytes()
    for contents in (b"", b"noise" * 50, whole[:-4], pickle.dumps(CORPUS)):
        path.write_bytes(contents)
        with pytest.raises(CheckpointError, match="expected a datastore in a safetensors file"):
            Datastore.load(path)


# The drafter


def likeliest(logits: torch.Tensor) -> list[int]:
    """The tokens of one-hot rows."""
    assert ((logits == 0) | (logits == -math.inf)).all() and (logits == 0).sum(-1).eq(1).all()
    return logits.argmax(-1).tolist()


def test_a_session_says_what_the_table_says_and_else_the_last_token_again():
    session = DatastoreDrafter(Datastore.build(CORPUS, 3), 12, name="code").session()
    # 8: nothing, so again; 1: 2; 1 2: 3 twice, 5 once; 4 1 2: 5
    assert likeliest(session.consume(torch.tensor([8, 1, 2]), None, 3)) == [8, 2, 3]
    assert likeliest(session.consume(torch.tensor([4, 1, 2]), None, 1)) == [5]
    assert likeliest(session.step(torch.tensor([5]))[None]) == [1]
    assert likeliest(session.step(torch.tensor([11]))[None]) == [11]
    assert likeliest(session.consume(torch.tensor([3]), None, 1)) == [4]  # what was drafted is forgotten
    assert session.verified == 7


def test_the_text_may_come_in_any_parts():
    random = np.random.default_rng(0)
    text = torch.from_numpy(random.integers(0, 4, 60))
    drafter = DatastoreDrafter(Datastore.build([random.integers(0, 4, 300)], 4), 4)
    expected = likeliest(drafter.session().consume(text, None, 60))
    session, said = drafter.session(), []
    for part in text.split([1, 2, 1, 7, 30, 19]):
        said += likeliest(session.consume(part, None, len(part)))
        session.step(torch.tensor([3]))
    assert said == expected


def test_ids_beyond_the_vocabulary_are_refused():
    datastore = Datastore.build(CORPUS)
    DatastoreDrafter(datastore, 6)
    with pytest.raises(VocabularyMismatchError, match="drafter code: expected ids below the target's 5, got 5"):
        DatastoreDrafter(datastore, 5, "code")
    DatastoreDrafter(Datastore.build([]), 1)
