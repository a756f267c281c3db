"""Measures of replayed requests, against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from helpers.traces import random_trace, stats_of, trace_of

from hedgespec.config import DecodeConfig
from hedgespec.experiments import measures
from hedgespec.experiments.replay import alone, replay

DRAFTERS, DOMAINS = ("a", "b", "c"), ("x", "y")


# Intervals


def test_mean_interval_is_students():
    interval = measures.mean_interval([1.0, 3.0])
    assert interval == pytest.approx({"mean": 2.0, "low": 2 - 12.7062, "high": 2 + 12.7062}, abs=1e-4)
    assert measures.mean_interval([2.0, 2.0, 2.0]) == {"mean": 2.0, "low": 2.0, "high": 2.0}


def test_ratio_interval_resamples_texts():
    assert measures.ratio_interval([1.0, 3.0], [2.0, 2.0]) == {"mean": 1.0, "low": 0.5, "high": 1.5}
    assert measures.ratio_interval([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == {"mean": 2.0, "low": 2.0, "high": 2.0}


def test_every_text_has_seeds_of_its_own():
    traces = [random_trace(number, DRAFTERS, DOMAINS) for number in (0, 7)]
    seeds = []
    found = measures.over_seeds(traces, 2, lambda trace, seed: seeds.append(seed) or stats_of([0], [trace.number]), len)
    assert found == [2, 2] and seeds == [0, 7, 1000, 1007]


# Tokens per round


def test_tokens_per_round_weighs_rounds_alike():
    assert measures.tokens_per_round([stats_of([0], [3]), stats_of([0, 1], [2, 1])]) == 2.0
    assert math.isnan(measures.tokens_per_round([]))


def test_tokens_within_counts_rounds_that_begin_there():
    stats = stats_of([0, 0, 0], [3, 3, 3])
    assert measures.tokens_within(stats, slice(2, 9)) == (6, 2)
    assert measures.tokens_within(stats, slice(0, 1)) == (3, 1)


def test_rounds_alone():
    trace = random_trace(0, DRAFTERS, DOMAINS)
    by_hand = []
    for accepted in trace.ratio:
        at = rounds = 0
        while at < len(accepted):
            run = accepted[at : at + 3].tolist()
            at, rounds = at + (run.index(0) if 0 in run else 3) + 1, rounds + 1
        by_hand.append(rounds)
    assert measures.rounds_alone(trace, 3, seeds=5) == by_hand
    sampled = random_trace(0, DRAFTERS, DOMAINS, temperature=1.0)
    assert any(rounds % 1 for rounds in measures.rounds_alone(sampled, 3, seeds=5))


def test_tokens_per_round_alone():
    trace = trace_of(np.array([[1.0, 1.0, 0.0, 1.0, 1.0, 1.0]]))
    [mat] = measures.tokens_per_round_alone(trace, 3)
    assert mat == np.mean(alone(trace, 0, 3)) == 3.0
    sampled = random_trace(0, DRAFTERS, DOMAINS, temperature=1.0)
    expected = [np.mean([np.mean(alone(sampled, 1, 3, seed=seed)) for seed in range(4)])]
    assert measures.tokens_per_round_alone(sampled, 3, seeds=4)[1:2].tolist() == expected


def test_the_best_are_all_that_none_exceeds():
    assert measures.best_of(np.array([2.0, 1.0, 2.0])).tolist() == [0, 2]


def test_full_drafts_need_two_positions_with_room():
    assert [measures.has_full_drafts(trace_of(np.ones((1, count))), 3) for count in (3, 4)] == [False, True]


# Losses and regret


def test_realised_lengths_are_what_drafts_would_emit():
    trace = trace_of(np.array([[1.0, 1.0, 0.0, 1.0, 1.0, 1.0]]))
    assert measures.realised_lengths(trace, 3).tolist() == [[3.0, 2.0, 1.0, 4.0]]


def test_losses_by_hand():
    prob, ratio = np.array([[0.5, 0.25, 0.5]]), np.array([[1.0, 0.5, 1.0]])
    losses = measures.losses(trace_of(ratio, prob), 2)
    np.testing.assert_allclose(losses[:, 0], [1 - (1 + 0.5 + 1.0 * 0.25) / 3, 1 - (1 + 0.25 + 0.5 * 0.5) / 3])


def test_losses_are_what_a_learner_gets():
    for temperature in (0.0, 1.0):
        trace = random_trace(2, DRAFTERS, DOMAINS, temperature=temperature)
        for length in (1, 5):
            stats = replay(trace, DecodeConfig(draft_length=length))
            assert np.array_equal(measures.losses(trace, length), stats.losses)


def test_regret_is_that_of_the_drafters_that_drafted():
    losses = np.array([[0.5, 0.0, 0.25], [0.5, 0.25, 0.0], [0.0, 0.5, 0.25], [0.5, 0.25, 0.0]])  # c is best: 0.5 of 1.5, 1
    stats = stats_of([0, 1, 2], [2, 1, 3])  # the last two positions have no loss yet
    assert measures.regret(stats, losses).tolist() == [0.25, 0.75, 1.0, 1.0]
    assert measures.regret(stats_of([0, -1], [3, 1]), losses)[-1] == 1.0 - 0.5  # nobody drafted the last position
    assert measures.regret(stats_of([], []), losses[:0]).tolist() == []


def test_expected_regret_and_tokens_behind_by_hand():
    losses = np.array([[0.5, 0.0], [0.5, 0.25]])
    weights = np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    assert measures.expected_regret(weights, losses) == pytest.approx(0.5 + 0.375 - 0.25)
    assert measures.tokens_behind(weights, losses, 3) == pytest.approx(4 * (0.4375 - 0.125))


def test_weights_of_a_round_hold_for_all_its_positions():
    trace = random_trace(0, DRAFTERS, DOMAINS)
    stats = replay(trace, DecodeConfig(warm_start=0))
    weights = measures.weights_by_position(stats)
    assert weights.shape == (trace.prob.shape[1], len(DRAFTERS))
    assert np.array_equal(weights[stats.emitted_by_round[0]], stats.weights[1])


@pytest.mark.parametrize(
    ("choices", "best", "expected"),
    [
        ([0] * 5, [0], 0),
        ([1, 2, 0, 0, 0], [0], 4),
        ([1, 2, 0, 0, 0], [0, 2], 2),
        ([0, 0, 0, 0, 1], [0], 10),  # the last round is wrong: the whole text
        ([1, *[0] * 8, 1, *[0] * 2], [0], 2),  # from the second round on 10 of 11
        ([0, 1, 0, -1], [0], 4),
    ],
)
def test_tokens_until_the_best_drafter_holds_the_text(choices, best, expected):
    assert measures.tokens_until_held(stats_of(choices, [2] * len(choices)), best) == expected


def test_measures_of_requests():
    traces = [random_trace(number, DRAFTERS, DOMAINS) for number in range(3)]
    config = DecodeConfig(draft_length=3, warm_start=0)
    alone_ = [measures.rounds_alone(trace, 3) for trace in traces]
    requests = [replay(trace, config) for trace in traces]
    found = measures.request_measures(traces, 3, alone_)(requests)
    curves = [measures.regret(stats, measures.losses(trace, 3)) for stats, trace in zip(requests, traces)]
    assert found["mat"] == measures.tokens_per_round(requests) and found["rounds"] == [stats.rounds for stats in requests]
    assert found["regret"] == pytest.approx(np.mean([curve[-1] for curve in curves]))
    assert found["curve"][-1] == pytest.approx(found["regret"]) and len(found["curve"]) == max(map(len, curves))
    assert found["regret_a_position"] == pytest.approx(4 * sum(curve[-1] for curve in curves) / sum(map(len, curves)))
    assert found["domains"]["x"]["mat"] == measures.tokens_per_round([requests[0], requests[2]])
    assert sum(found["domains"]["y"]["shares"]) == pytest.approx(1)
    held = [measures.tokens_until_held(stats, np.flatnonzero(np.array(rounds) == min(rounds)))
            for stats, rounds in zip(requests, alone_)]  # fmt: skip
    assert found["held_after"] == np.mean(held)
