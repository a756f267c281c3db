"""Statistics of a request, from rounds and losses put in by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from rich.console import Console

from hedgespec.stats import STAGES, DecodeStats, plot_profile, plot_weights, profile_table, profiled, timed


@pytest.fixture
def stats():
    stats = DecodeStats(("a", "b", "c"), draft_length=4)
    for drafter, emitted, drafted in ((0, 3, 4), (2, 1, 4), (2, 5, 4), (None, 1, 0)):
        stats.record_round(drafter, np.full(3, 1 / 3), emitted, drafted)
    stats.emitted_tokens = 11  # the first came before the rounds
    for losses in ([0.5, 0.1, 0.3], [0.4, 0.6, 0.0]):
        stats.record_loss(np.array(losses), float(np.dot(losses, [0.5, 0.0, 0.5])))
    return stats


def test_counts(stats):
    assert stats.rounds == 4
    assert stats.tokens_per_round == 2.5
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
    assert math.isnan(stats.tokens_per_round)
    assert stats.picks.tolist() == [0]
    assert stats.regret.size == stats.late_choices(0).size == 0


def test_time_goes_to_its_stage_even_when_it_fails(stats):
    with pytest.raises(RuntimeError), timed([stats], "draft"):
        raise RuntimeError
    assert stats.seconds_by_stage["draft"] > 0
    assert [stage for stage, seconds in stats.seconds_by_stage.items() if seconds] == ["draft"]
    assert tuple(stats.seconds_by_stage) == STAGES


def test_spans_follow_one_another_and_are_of_every_request():
    both = [DecodeStats(("a",), 4), DecodeStats(("a",), 4)]
    for stage in ("prompt", "select", "draft", "select", "learn"):
        with timed(both, stage):
            pass
    for stats in both:
        assert [[stage for stage, *_ in part] for part in stats.spans_by_round] == [
            ["prompt"], ["select", "draft"], ["select", "learn"],
        ]  # fmt: skip
        times = [time for _, start, end in stats.spans for time in (start, end)]
        assert times == sorted(times) and times[0] >= 0


def test_the_device_is_waited_for_at_both_ends_of_a_stage_only_while_profiled(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waits.append)
    stats, device = DecodeStats(("a",), 4), torch.device("cuda", 1)

    def waits_for(stage: str) -> list:
        waits.clear()
        with timed([stats], stage):
            waits.append("work")
        return list(waits)

    assert waits_for("draft") == ["work"]
    with profiled(device):
        assert waits_for("draft") == [device, "work", device]
    assert waits_for("draft") == ["work"]
    with profiled(torch.device("cpu")):
        assert waits_for("draft") == ["work"]
    with pytest.raises(RuntimeError), profiled(device):
        raise RuntimeError
    assert waits_for("draft") == ["work"]


@pytest.fixture
def told(stats):
    """Four rounds in 100 ms, of which no stage accounts for 12."""
    spans = [("prompt", 20), ("select", 1), ("draft", 20), ("verify", 30)]
    spans += [("drafter_forward", 9), ("evaluate", 4), ("learn", 4)]
    at = 0.0
    for stage, milliseconds in spans:
        stats.spans.append((stage, at, at + milliseconds / 1e3))
        at += milliseconds / 1e3
    stats.seconds = 0.1
    return stats


def rows_of(table) -> dict[str, list[str]]:
    console = Console(width=80)
    with console.capture() as captured:
        console.print(table)
    lines = [line.split() for line in captured.get().splitlines()]
    return {words[0]: words[1:] for words in lines}


def test_the_profile_tells_milliseconds_a_round_share_and_sum(told):
    assert rows_of(profile_table([told])) == {
        "time": ["by", "stage", "over", "4", "rounds"],
        "stage": ["ms", "a", "round", "share,", "%", "ms"],
        "prompt": ["20.0", "20.0"],  # it is no part of a round
        "select": ["0.250", "1.0", "1.0"],
        "draft": ["5.000", "20.0", "20.0"],
        "verify": ["7.500", "30.0", "30.0"],
        "evaluate": ["1.000", "4.0", "4.0"],
        "drafter_forward": ["2.250", "9.0", "9.0"],
        "learn": ["1.000", "4.0", "4.0"],
        "rest": ["3.000", "12.0", "12.0"],
        "total": ["20.000", "100.0", "100.0"],
    }
    twice = rows_of(profile_table([told, told]))
    assert twice["draft"] == ["5.000", "20.0", "40.0"] and twice["time"][3] == "8"


def test_a_profile_without_rounds_has_nothing_a_round():
    stats = DecodeStats(("a",), 4, spans=[("prompt", 0.0, 0.5)], seconds=1.0)
    rows = rows_of(profile_table([stats]))
    assert rows["prompt"] == rows["rest"] == ["50.0", "500.0"]


def test_the_profile_is_drawn_to_scale(told, tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    close, figures = pyplot.close, []
    monkeypatch.setattr(pyplot, "close", lambda figure: figures.append(figure) or close(figure))
    plot_profile([("first", told), ("second", told)], tmp_path / "profile.png")
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")
    assert not pyplot.get_fignums()  # a figure left open would stay in memory
    [axes] = figures[0].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["first", "second"]
    named = {bars.get_label(): bars for bars in axes.collections if not bars.get_label().startswith("_")}
    assert set(named) == {*STAGES, "rest"}
    extent = {name: bars.get_paths()[0].get_extents().intervalx.tolist() for name, bars in named.items()}
    expected = {"prompt": [0, 20], "select": [20, 21], "draft": [21, 41], "verify": [41, 71], "drafter_forward": [71, 80],
                "evaluate": [80, 84], "learn": [84, 88], "rest": [0, 100]}  # fmt: skip
    for name, milliseconds in expected.items():
        assert extent[name] == pytest.approx(milliseconds), name


def test_to_dict_is_json(stats):
    told = json.loads(json.dumps(stats.to_dict()))
    assert (told["picks"], told["lengths"]) == ([1, 0, 2], [4, 4, 4, 0])


def test_the_plot_of_weights_stacks_each_drafters_share(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    close, figures = pyplot.close, []
    monkeypatch.setattr(pyplot, "close", lambda figure: figures.append(figure) or close(figure))
    first, second = (DecodeStats(("a", "b", "c"), 4) for _ in range(2))
    weights = [[0.5, 0.25, 0.25], [0.0, 0.0, 1.0], [0.1, 0.7, 0.2]]
    for stats, row in ((first, weights[0]), (first, weights[1]), (second, weights[2])):
        stats.record_round(0, np.array(row), 2, 4)
    plot_weights([("first", first), ("empty", DecodeStats(("a", "b", "c"), 4)), ("second", second)], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert not pyplot.get_fignums()
    [axes] = figures[0].axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["first", "second"]
    assert axes.get_xticks().tolist() == [1.0, 2.5]  # in the middle of rounds 0 to 2 and 2 to 3
    assert [area.get_label() for area in axes.collections] == ["a", "b", "c"]
    tops = np.cumsum(weights, axis=1).T
    for number, area in enumerate(axes.collections):
        bottom = tops[number - 1] if number else np.zeros(3)
        corners = area.get_paths()[0].vertices
        drawn = {round: sorted(corners[corners[:, 0] == round][:, 1].round(6)) for round in range(3)}
        for round in range(3):
            assert {bottom[round].round(6), tops[number][round].round(6)} <= set(drawn[round]), (number, round)
