"""Statistics of a request, from rounds and losses put in by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from hedgespec.metrics import STAGES, DecodeStats, plot_weights, timed


@pytest.fixture
def stats():
    stats = DecodeStats(("a", "b", "c"), draft_length=4)
    for drafter, emitted in ((0, 3), (2, 1), (2, 5), (None, 1)):
        stats.record_round(drafter, np.full(3, 1 / 3), emitted)
    stats.emitted_tokens = 11  # the first came before the rounds
    for losses in ([0.5, 0.1, 0.3], [0.4, 0.6, 0.0]):
        stats.record_loss(np.array(losses), np.array([0.5, 0.0, 0.5]))
    return stats


def test_counts(stats):
    assert stats.rounds == 4
    assert stats.mean_accepted_tokens == 2.5
    assert stats.picks.tolist() == [1, 0, 2]


def test_late_choices_are_of_rounds_that_began_late_enough(stats):
    """The rounds began after 1, 4, 5 and 10 tokens; in the last none drafted."""
    assert stats.late_choices(0).tolist() == [0, 2, 2]
    assert stats.late_choices(4).tolist() == [2, 2]
    assert stats.late_choices(5).tolist() == [2]
    assert stats.late_choices(6).size == 0


def test_regret_is_against_the_drafter_that_is_best_in_the_end(stats):
    np.testing.assert_allclose(stats.regret, [0.4 - 0.3, 0.4 + 0.2 - 0.3 - 0.0])


def test_nothing_yet():
    stats = DecodeStats(("a",), draft_length=4)
    assert math.isnan(stats.mean_accepted_tokens)
    assert stats.picks.tolist() == [0]
    assert stats.regret.size == stats.late_choices(0).size == 0


def test_time_goes_to_its_stage_even_when_it_fails(stats):
    with pytest.raises(RuntimeError), timed([stats], "draft"):
        raise RuntimeError
    assert stats.seconds_by_stage["draft"] > 0
    assert [stage for stage, seconds in stats.seconds_by_stage.items() if seconds] == ["draft"]
    assert tuple(stats.seconds_by_stage) == STAGES


def test_to_dict_is_json(stats):
    assert json.loads(json.dumps(stats.to_dict()))["picks"] == [1, 0, 2]


def test_the_plot_is_drawn(stats, tmp_path):
    pytest.importorskip("matplotlib")
    plot_weights([("first", stats), ("empty", DecodeStats(("a", "b", "c"), 4)), ("second", stats)], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
