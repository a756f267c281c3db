"""Costs: what a clock that is disturbed tells of drafting and verifying."""

from __future__ import annotations

import copy
import pickle
import threading

import numpy as np
import pytest

from hedgespec.records import NO_DRAFT, Choice
from hedgespec.selection.costs import AGAIN, FEWEST, WINDOW, Costs

DRAFT, VERIFY = np.array([0.5, 2.0, 1.0]), 10.0 + np.arange(4)


def measured(rounds: int = 40, outliers: float = 0.0, drafters=(0, 1, 2), lengths=range(4), rows: int = 1) -> Costs:
    """Costs of three drafters and up to three tokens, by a clock of which a share of the readings is 50 times too long; the
    very first of each kind always is."""
    costs, random = Costs(3, 3), np.random.default_rng(0)

    def read(round: int, seconds: float) -> float:
        return seconds * (50 if round == 0 or random.random() < outliers else 1)

    for round in range(rounds):
        for length in lengths:
            costs.verified(rows, length, read(round, VERIFY[length]))
        for drafter in drafters:
            costs.drafted(rows, drafter, read(round, DRAFT[drafter]))
    return costs


@pytest.mark.parametrize("rounds", [FEWEST + 1, 7, 100])
def test_costs_are_what_was_measured_and_the_first_measurement_is_not(rounds):
    draft, verify = measured(rounds).of(1)
    np.testing.assert_array_equal(draft, DRAFT)
    np.testing.assert_array_equal(verify, VERIFY)
    assert draft.dtype == verify.dtype == np.float64


@pytest.mark.parametrize("rounds", [6, 15, 60])
@pytest.mark.parametrize("outliers", [0.05, 0.2])
def test_outliers_do_not_show(rounds, outliers):
    draft, verify = measured(rounds, outliers).of(1)
    np.testing.assert_array_equal(draft, DRAFT)
    np.testing.assert_array_equal(verify, VERIFY)


@pytest.mark.parametrize("burst", [2, 3])
def test_a_burst_at_the_beginning_does_not_show(burst):
    costs = Costs(1, 1)
    for seconds in (0.0, *[50.0] * burst, 1.0):
        costs.verified(1, 0, seconds)
        costs.verified(1, 1, 1.5 * seconds)
        costs.drafted(1, 0, seconds)
    draft, verify = costs.of(1)
    assert (draft.tolist(), verify.tolist()) == ([1.0], [1.0, 1.5])


def test_a_window_slides():
    """Higher costs are told once three quarters of a window are new, lower ones after one."""
    costs = measured(100)
    for after, seconds in ((24, 7.0), (8, 0.5)):
        before = costs.of(1)[0][0]
        for count in range(1, WINDOW + 1):
            costs.drafted(1, 0, seconds)
            assert costs.of(1)[0][0] == (seconds if count >= after else before)


def test_a_drafter_that_is_not_measured_gets_the_median_of_those_that_are():
    assert measured(drafters=(0,)).of(1)[0].tolist() == [0.5, 0.5, 0.5]
    assert measured(drafters=(0, 1)).of(1)[0].tolist() == [0.5, 2.0, 1.25]
    few = measured(drafters=())
    assert few.of(1)[0].tolist() == [0.0, 0.0, 0.0]
    for _ in range(FEWEST):  # of which the first does not count, so that none is measured
        few.drafted(1, 2, 3.0)
    assert few.of(1)[0].tolist() == [3.0, 3.0, 3.0]


def test_lengths_between_measured_ones_are_interpolated():
    assert measured(lengths=(0, 3)).of(1)[1].tolist() == [10.0, 11.0, 12.0, 13.0]
    assert measured(lengths=(0, 1)).of(1)[1].tolist() == [10.0, 11.0, 11.0, 11.0]


def test_a_shorter_round_costs_no_more_than_a_longer_one():
    """All that is measured of a length may be wrong, and it would be avoided from then on."""
    costs = measured()
    for _ in range(WINDOW):
        costs.verified(1, 0, 500.0)
        costs.verified(1, 2, 500.0)
    assert costs.of(1)[1].tolist() == [11.0, 11.0, 13.0, 13.0]


@pytest.mark.parametrize("lengths", [(), (0,), (1, 2, 3)])
def test_nothing_is_known_before_plain_decoding_and_drafting_both_are(lengths):
    assert measured(lengths=lengths).of(1) is None
    assert measured(FEWEST).of(1) is None


def test_a_clock_too_coarse_to_see_anything_makes_all_rounds_alike():
    costs = Costs(2, 2)
    for _ in range(5):
        for length in range(3):
            costs.verified(1, length, 0.0)
    draft, verify = costs.of(1)
    assert draft.tolist() == [0.0, 0.0] and len(set(verify)) == 1 and verify[0] > 0


def test_sizes_of_batches_are_apart_and_share_up_to_a_power_of_two():
    costs = measured(rows=5)
    for rows in (5, 6, 7, 8):
        assert costs.of(rows) is not None
        assert (costs.to_measure(rows, 0) == NO_DRAFT) == (rows < 5 + FEWEST + 1)
    assert all(costs.of(rows) is None for rows in (1, 2, 3, 4, 9, 16))


def test_every_length_and_drafter_is_measured_a_few_times_in_turns_then_ever_more_rarely():
    costs = Costs(2, 3)
    turns = [costs.to_measure(1, 3) for _ in range(1100)]
    first = [NO_DRAFT, Choice(0, 1), Choice(1, 2), Choice(0, 3), NO_DRAFT, Choice(1, 1), Choice(0, 2), Choice(1, 3)]
    assert turns[:16] == first * 2 and FEWEST + 1 == 4
    asked = [round for round, choice in enumerate(turns, 1) if choice is not None]
    assert asked == [*range(1, 17), *(AGAIN * 2**j + number for j in range(5) for number in range(4))]
    assert costs.to_measure(2, 3) == NO_DRAFT


def test_more_drafters_than_lengths_are_all_measured():
    costs = Costs(5, 2)
    turns = [costs.to_measure(1, 2) for _ in range(60)]
    assert all(sum(choice is not None and choice.drafter == drafter for choice in turns) == FEWEST + 1 for drafter in range(5))
    assert turns.count(NO_DRAFT) == FEWEST + 1 and turns[24:] == [None] * 36


def test_no_more_is_drafted_than_there_is_room():
    costs = Costs(1, 3)
    assert [costs.to_measure(1, 1) for _ in range(2 * (FEWEST + 1))] == [NO_DRAFT, Choice(0, 1)] * (FEWEST + 1)
    assert costs.to_measure(1, 1) is None and costs.to_measure(1, 0) is None
    assert [costs.to_measure(1, 2), costs.to_measure(1, 3)] == [Choice(0, 2), Choice(0, 3)]


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_begins_anew(copied):
    costs = measured()
    costs.to_measure(1, 3)
    twin = copied(costs)
    assert twin.of(1) is None and twin.to_measure(1, 3) == NO_DRAFT
    assert (twin.num_drafters, twin.draft_length, twin.clock) == (3, 3, costs.clock)
    twin.verified(1, 0, 1.0)
    np.testing.assert_array_equal(costs.of(1)[1], VERIFY)


def test_threads_may_share_one():
    costs, errors, asked = Costs(3, 3), [], []

    def work():
        try:
            for turn in range(300):
                asked.append(costs.to_measure(1, 3))
                costs.verified(1, turn % 4, VERIFY[turn % 4])
                costs.drafted(1, turn % 3, DRAFT[turn % 3])
                costs.of(1)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(asked) == 2400 and asked.count(NO_DRAFT) == FEWEST + 1 + (2400 // AGAIN).bit_length()
    np.testing.assert_array_equal(costs.of(1)[0], DRAFT)
