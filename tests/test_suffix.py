"""The suffix index against a search through all texts, its two implementations, its file, and its memory limit."""

from __future__ import annotations

import copy
import gc
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from hedgespec.drafters.suffix import FORMAT, VERSION, SuffixDrafter, SuffixIndex, is_suffix_index
from hedgespec.drafters.suffix_reference import SuffixAutomaton as PythonAutomaton
from hedgespec.errors import CheckpointError

native = pytest.importorskip("hedgespec._native").SuffixAutomaton
IMPLEMENTATIONS = {"native": native, "python": PythonAutomaton}
TOKEN = st.integers(0, 3)
STEPS = st.lists(st.tuples(st.integers(0, 2), st.lists(TOKEN, min_size=1, max_size=6)), min_size=1, max_size=12)
"""(text, tokens appended to it), texts interleaved."""


def searched(texts: list[list[int]], text: list[int]) -> tuple[int, Counter]:
    """The length of the longest suffix of `text` that something follows in one of `texts`, and what follows it how often."""
    for length in range(len(text), 0, -1):
        suffix = text[-length:]
        follows = Counter(
            one[end] for one in texts for end in range(length, len(one)) if one[end - length : end] == suffix
        )  # fmt: skip
        if follows:
            return length, follows
    return 0, Counter()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=60, deadline=None)
@given(steps=STEPS, drafted=st.lists(TOKEN, max_size=4))
def test_the_longest_match_and_its_counts_are_those_of_a_search(implementation, steps, drafted):
    automaton, texts = IMPLEMENTATIONS[implementation](0), [[], [], []]
    numbers = [automaton.open() for _ in texts]
    for which, tokens in steps:
        kept = automaton.append(numbers[which], tokens, 1)
        texts[which] += tokens
        assert kept == [automaton.after(numbers[which], [])]
        length, follows = searched(texts, texts[which] + drafted)
        best = automaton.after(numbers[which], drafted)
        everything = automaton.all_after(numbers[which], drafted, 10)
        assert best[1] == length
        assert Counter({token: count for token, _, count, _ in everything}) == follows
        assert all(total == follows.total() for *_, total in everything)
        assert everything[:1] == ([best] if follows else [])
        assert automaton.tokens == sum(map(len, texts))


@settings(max_examples=40, deadline=None)
@given(steps=STEPS, max_tokens=st.integers(2, 12))
def test_both_implementations_say_the_same_also_after_texts_were_dropped(steps, max_tokens):
    automata = [make(max_tokens) for make in IMPLEMENTATIONS.values()]
    for _ in range(3):
        assert len({one.open() for one in automata}) == 1
    for which, tokens in steps:
        kept = [one.append(which, tokens, len(tokens)) for one in automata]
        drafted = [one.draft(which, 5) for one in automata]
        assert kept[0] == kept[1]
        assert drafted[0] == drafted[1]
        assert automata[0].texts() == automata[1].texts()
        assert automata[0].tokens == automata[1].tokens <= max(max_tokens, 6)


def test_the_latest_of_equally_frequent_tokens_comes_first():
    text = SuffixIndex().open()
    text.append([1, 2, 9, 1, 3, 8, 1])
    assert text.candidates() == [(3, 1, 1, 2), (2, 1, 1, 2)]
    assert text.candidates([2]) == [(9, 2, 1, 1)]
    assert text.draft(3) == [(3, 1, 1, 2), (8, 2, 1, 1), (1, 3, 1, 1)]


def test_a_text_finds_what_other_texts_of_the_index_hold():
    index = SuffixIndex()
    index.add([5, 6, 7, 8])
    text = index.open()
    assert text.append([1, 5, 6], keep=3) == [(-1, 0, 0, 0), (6, 1, 1, 1), (7, 2, 1, 1)]
    assert SuffixIndex().open().append([1, 5, 6], keep=1) == [(-1, 0, 0, 0)]


def test_nothing_is_known_behind_the_end_of_a_text_but_by_a_shorter_suffix():
    index = SuffixIndex()
    for tokens in ([2, 3, 4], [1, 2, 3]):
        index.add(tokens)
    text = index.open()
    assert text.append([1, 2, 3], keep=1) == [(4, 2, 1, 1)]  # 1 2 3 ends its text; 2 3 goes on elsewhere


def test_the_oldest_texts_are_dropped_and_of_an_open_one_the_end_stays():
    index = SuffixIndex(max_tokens=8)
    index.add([1, 2, 3])
    text = index.open()
    text.append([4, 5, 6, 7, 8])
    assert len(index) == 8
    text.append([9])
    assert len(index) == 4
    assert text.append([7], keep=1) == [(8, 1, 1, 1)]
    assert text.candidates([2]) == []


def test_a_text_that_nobody_refers_to_is_closed_and_stays():
    index = SuffixIndex(max_tokens=4)
    text = index.open()
    text.append([1, 2])
    del text
    gc.collect()
    other = index.open()
    other.append([3, 4, 5])  # drops the closed text, which an open one would not be
    assert len(index) == 2
    assert index.open().append([1], keep=1) == [(-1, 0, 0, 0)]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["deepcopy", "pickle"])
def test_a_copy_holds_the_same_texts_and_is_independent(copied):
    index = SuffixIndex(100)
    index.add([1, 2, 3])
    other = copied(index)
    index.add([1, 2, 4])
    assert (len(index), len(other), other.max_tokens) == (6, 3, 100)
    assert other.open().append([1, 2], keep=1) == [(3, 2, 1, 1)]


def test_a_file_brings_the_texts_back(tmp_path):
    index = SuffixIndex()
    for tokens in (torch.tensor([1, 2, 3]), np.array([], np.int32), np.array([2, 3, 2**31 - 1], np.uint32)):
        index.add(tokens)
    index.save(tmp_path / "index.safetensors")
    loaded = SuffixIndex.load(tmp_path / "index.safetensors")
    assert is_suffix_index(tmp_path / "index.safetensors")
    assert len(loaded) == 6
    assert loaded.open().append([2, 3], keep=1) == [(2**31 - 1, 2, 1, 1)]
    SuffixIndex().save(tmp_path / "empty.safetensors")
    assert len(SuffixIndex.load(tmp_path / "empty.safetensors")) == 0


def test_files_that_are_no_index_are_refused_with_the_reason(tmp_path):
    good = {"tokens": np.array([1, 2], np.int32), "lengths": np.array([2], np.int64)}
    meta = {"format": FORMAT, "version": VERSION}
    cases = {
        "format": (good, {"format": "other"}, "expected format hedgespec-suffix-index, got other"),
        "version": (good, {**meta, "version": "9"}, "expected version 1, got 9"),
        "names": ({"tokens": good["tokens"]}, meta, "expected tensors tokens int32"),
        "lengths": ({**good, "lengths": np.array([3], np.int64)}, meta, "lengths that sum to 2"),
        "ids": ({**good, "tokens": np.array([1, -2], np.int32)}, meta, "expected ids >= 0"),
    }
    for name, (tensors, metadata, message) in cases.items():
        path = tmp_path / f"{name}.safetensors"
        save_file(tensors, path, metadata=metadata)
        with pytest.raises(CheckpointError, match=message):
            SuffixIndex.load(path)
    (tmp_path / "noise.safetensors").write_bytes(b"noise")
    for path in (tmp_path / "none.safetensors", tmp_path / "noise.safetensors", None):
        with pytest.raises(CheckpointError, match="path: expected a suffix index"):
            SuffixIndex.load(path)
    assert not is_suffix_index(tmp_path / "noise.safetensors")


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        ([[1, 2]], TypeError, "tokens: expected integer ids"),
        ([0.5], TypeError, "tokens: expected integer ids"),
        ([-1], ValueError, "tokens: expected ids in 0..2147483647, got -1..-1"),
        ([2**31], ValueError, "got 2147483648..2147483648"),
    ],
)
def test_other_tokens_are_refused_and_nothing_is_added(tokens, error, message):
    index = SuffixIndex()
    with pytest.raises(error, match=message):
        index.add(tokens)
    assert len(index) == 0


@pytest.mark.parametrize(("max_tokens", "error"), [(1, ValueError), ("many", TypeError), (2.5, TypeError)])
def test_other_limits_are_refused(max_tokens, error):
    with pytest.raises(error, match="max_tokens: expected"):
        SuffixIndex(max_tokens)


def drafted(drafter: SuffixDrafter, prompt: list[int], length: int) -> list[int]:
    """What the drafter proposes behind a prompt, greedily."""
    session, tokens = drafter.session(), []
    logits = session.consume(torch.tensor(prompt), None, 1)[0]
    while len(tokens) < length:
        tokens.append(int(logits.argmax()))
        logits = session.step(torch.tensor(tokens[-1:]))
    return tokens


def test_the_drafter_copies_what_followed_the_longest_match():
    drafter = SuffixDrafter(10)
    assert drafted(drafter, [1, 2, 3, 4, 5, 1, 2, 6, 0, 2, 3], 4) == [4, 5, 1, 2]
    assert drafted(SuffixDrafter(10, min_match=2), [1, 2, 3, 4, 1, 2], 2) == [3, 4]


def test_without_a_match_the_last_token_is_proposed_again():
    assert drafted(SuffixDrafter(10), [1, 2, 3], 2) == [3, 3]
    assert drafted(SuffixDrafter(10, min_match=3), [1, 2, 3, 4, 1, 2], 1) == [2]


def test_the_drafter_gives_frequencies():
    session = SuffixDrafter(6).session()
    logits = session.consume(torch.tensor([1, 2, 1, 2, 1, 3, 1]), None, 3)
    assert session.verified == 7
    assert logits[1].softmax(-1).tolist() == [0, 0, 0, 1, 0, 0]
    torch.testing.assert_close(logits[2].softmax(-1), torch.tensor([0, 0, 2 / 3, 1 / 3, 0, 0]), atol=5e-3, rtol=0)


def test_drafted_tokens_are_forgotten_at_the_next_verified_ones():
    session = SuffixDrafter(10).session()
    session.consume(torch.tensor([1, 2, 3, 1]), None, 1)
    session.step(torch.tensor([2]))
    logits = session.consume(torch.tensor([2, 3]), None, 2)
    assert logits.argmax(-1).tolist() == [3, 1]


def test_requests_that_share_an_index_copy_from_each_other():
    index = SuffixIndex()
    drafter = SuffixDrafter(10, index)
    assert drafted(drafter, [1, 2, 3, 4], 1) == [4]
    assert drafted(drafter, [9, 1, 2], 2) == [3, 4]
    assert drafted(SuffixDrafter(10), [9, 1, 2], 1) == [2]
    assert len(index) == 7


def test_ids_beyond_the_vocabulary_are_not_proposed():
    index = SuffixIndex()
    index.add([1, 2, 30])
    assert drafted(SuffixDrafter(10, index), [1, 2], 1) == [2]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"vocab_size": 0}, ValueError, "vocab_size: expected at least 1"),
        ({"min_match": 0}, ValueError, "min_match: expected at least 1"),
        ({"index": "texts"}, TypeError, "index: expected a SuffixIndex or None"),
        ({"name": 3}, TypeError, "name: expected a str"),
    ],
)
def test_bad_arguments_of_the_drafter_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        SuffixDrafter(**({"vocab_size": 10} | arguments))
