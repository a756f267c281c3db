"""Whose a row is: rows that move, vanish, come back and are used again."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hedgespec.integrations.vllm.request_tracker import PATIENCE, Tracked, Tracker


def step(tracker: Tracker, *rows, names=None) -> tuple[list[Tracked], list[Tracked]]:
    """Shows the tracker rows (tokens before, new tokens); returns whose they are, and what has ended."""
    tracker.begin_step()
    found = []
    for index, (before, new) in enumerate(rows):
        name = None if names is None else names[index]
        one = tracker.find(np.array(before), name) or tracker.begin(np.array(before), name, None)
        assert one.begins(np.array(before))
        one.append(np.array([*before, *new])[one.length :])
        found.append(one)
    return found, tracker.end_step()


@pytest.fixture
def tracker():
    return Tracker(most=4, ends=frozenset([0]))


def test_a_row_goes_on(tracker):
    [one], _ = step(tracker, ([5, 6], [7]))
    [again], _ = step(tracker, ([5, 6, 7], [8, 9]))
    assert again is one
    assert one.tokens.tolist() == [5, 6, 7, 8, 9]


def test_rows_that_move(tracker):
    first, _ = step(tracker, ([1], [2]), ([3], [4]), ([5], [6]))
    moved, _ = step(tracker, ([5, 6], [7]), ([1, 2], [3]))
    assert moved == [first[2], first[0]]
    back, _ = step(tracker, ([3, 4], [5]), ([5, 6, 7], [8]))
    assert back == [first[1], first[2]]
    assert back[0].missed == 1 and back[1].missed == 0


def test_a_row_used_again_begins_anew(tracker):
    [one], _ = step(tracker, ([1, 2], [3]))
    [other], _ = step(tracker, ([1, 2], [3]))
    assert other is not one
    [third], _ = step(tracker, ([1, 2, 3, 4], [5]))  # begins with what another one was
    assert third not in (one, other)


def test_the_same_text_twice(tracker):
    first, _ = step(tracker, ([1, 2], [3]), ([1, 2], [3]))
    assert first[0] is not first[1]
    second, _ = step(tracker, ([1, 2, 3], [4]), ([1, 2, 3], [5]))
    assert second == first
    third, _ = step(tracker, ([1, 2, 3, 5], [6]), ([1, 2, 3, 4], [6]))
    assert third == [first[1], first[0]]


def test_a_name_decides(tracker):
    [one], _ = step(tracker, ([1, 2], [3]), names=["a"])
    step(tracker, ([9], [9]), names=["b"])
    [again], _ = step(tracker, ([1, 2, 3, 4, 4], [5]), names=["a"])  # it went on unseen
    assert again is one
    [other], gone = step(tracker, ([7, 7], [8]), names=["a"])  # another text of that name
    assert other is not one
    assert one in gone
    [same], _ = step(tracker, ([7, 7, 8], [8]), names=["c"])  # the text of another name
    assert same is not other
    assert {each.name for each in tracker.retain(["c"])} == {"a", "b"}
    assert list(tracker.known.values()) == [same]


def test_who_has_ended(tracker):
    [one], gone = step(tracker, ([1], [0]))
    assert not gone
    _, gone = step(tracker, ([2], [3]))
    assert gone == [one]
    for length in range(PATIENCE + 1):
        _, gone = step(tracker, ([5] * (length + 1), [5]))
        assert bool(gone) == (length == PATIENCE)


def test_not_too_many_wait(tracker):
    first, _ = step(tracker, *([[token], [9]] for token in range(1, 7)))
    _, gone = step(tracker, ([7], [9]))
    assert len(gone) == 2 and set(gone) <= set(first)
    assert len(tracker.known) == 5
    assert len(tracker.clear()) == 5 and not tracker.known


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_request_ever_gets_the_text_of_another(data):
    """Requests of few different tokens, so that many are alike, in rows that come and go."""
    tracker = Tracker(most=100)
    texts: dict[int, list[int]] = {}
    owner: dict[int, Tracked] = {}
    for number in range(12):
        if len(texts) < 5 and data.draw(st.booleans(), f"a new one in {number}"):
            texts[number] = data.draw(st.lists(st.integers(1, 2), min_size=1, max_size=3), "prompt")
        rows = data.draw(st.permutations(sorted(texts)), "rows")[: data.draw(st.integers(0, 4), "how many")]
        new = {request: data.draw(st.lists(st.integers(1, 2), min_size=1, max_size=2), "emitted") for request in rows}
        found, _ = step(tracker, *((texts[request], new[request]) for request in rows))
        assert len(set(map(id, found))) == len(found)
        for request, one in zip(rows, found):
            texts[request] = texts[request] + new[request]
            assert one.tokens.tolist() == texts[request]
            owner[request] = one
