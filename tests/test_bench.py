"""The benchmarks' shared parts (interleaving, comparison of texts, tables), and the figures of bench_options.py by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import bench_options
import interleave
import numpy as np
import pytest
import table
import torch
from helpers.tiny_models import random_prompt, tiny_llama, tiny_pool
from helpers.traces import stats_of
from rich.console import Console

from hedgespec.config import DecodeConfig, Tree
from hedgespec.decoder import Decoder

BENCH = Path(__file__).parent.parent / "bench"
QUIET = Console(quiet=True)


def batch_of(number: int) -> interleave.PromptBatch:
    ids = random_prompt(number)
    return interleave.PromptBatch([SimpleNamespace(domain="sql", text="")], ids, torch.ones_like(ids), number)


# Tables


def test_markdown_and_intervals():
    assert table.markdown(["a", 1], [["x", 2]]) == "| a | 1 |\n| --- | ---: |\n| x | 2 |\n"
    assert table.interval({"mean": 2.0, "low": -10.71, "high": 14.7}, 1) == "2.0 (-10.7 to 14.7)"


def test_a_table_of_what_pytest_benchmark_wrote():
    recorded = {
        "machine_info": {"machine": "x86_64"},
        "datetime": "2026-12-01T00:00:00",
        "benchmarks": [
            {"name": "one", "extra_info": {"speedup": 2.0}, "stats": {}},
            {"name": "two", "extra_info": {}, "stats": {"min": 1e-5}},
        ],
    }
    told = table.benchmarks(recorded)
    assert told.startswith("2026-12-01, x86_64\n") and "| one | speedup 2.0 |" in told and "| two | fastest_us 10.0 |" in told


# Interleaving


def test_each_batch_starts_with_another_method():
    order = []

    def method(name: str) -> interleave.Method:
        def run(batch, max_new_tokens):
            order.append((name, batch.seed, max_new_tokens))
            return interleave.Result(batch.ids)

        return interleave.Method(name, run)

    found = list(interleave.interleaved([method("a"), method("b")], [batch_of(1), batch_of(2)], 20, QUIET))
    assert order == [("a", 1, 8), ("b", 1, 8), ("a", 1, 20), ("b", 1, 20), ("b", 2, 20), ("a", 2, 20)]
    assert [list(results) for _, results in found] == [["a", "b"]] * 2
    assert all(seconds >= 0 for _, results in found for _, seconds in results.values())


@torch.inference_mode()
def test_texts_that_differ_have_a_gap():
    target, batch = tiny_llama(seed=0, layers=2), batch_of(0)
    logits = target(batch.ids).logits[0, -1]
    best, second = logits.topk(2).indices.tolist()
    gap = float(logits[best] - logits[second])
    assert interleave.text_gaps(target, batch, [[best, 1]], [[second, 1]]) == [pytest.approx(gap)]
    assert interleave.text_gaps(target, batch, [[best, 1]], [[best, 1]]) == []
    assert interleave.text_gaps(target, batch, [[best, 1]], [[best]]) == [float("inf")]


def test_texts_end_with_the_token_that_ends_them():
    target = tiny_llama(seed=0, layers=1)
    target.generation_config.eos_token_id = 7
    ids = torch.tensor([[1, 2], [1, 2]])
    batch = interleave.PromptBatch([], ids, torch.ones_like(ids), 0)
    result = interleave.Result(torch.tensor([[1, 2, 5, 7, 0], [1, 2, 5, 6, 5]]))
    assert interleave.texts_of(batch, result, target) == [[5, 7], [5, 6, 5]]


def test_generate_and_decoder_methods_give_the_same_text():
    target = tiny_llama(seed=0, layers=4)
    decoder = Decoder(target, tiny_pool(target), DecodeConfig(draft_length=2))
    methods = [
        interleave.generate_method("plain", target, 0.0, counts_forwards=True),
        interleave.decoder_method("hedgespec", decoder, 0.0),
    ]
    [(batch, results)] = interleave.interleaved(methods, [batch_of(3)], 9, QUIET)
    texts = [interleave.texts_of(batch, result, target) for result, _ in results.values()]
    assert texts[0] == texts[1] and len(texts[0][0]) == 9
    plain, ours = (result for result, _ in results.values())
    assert plain.forwards == [9] and plain.seconds_by_stage == {}
    assert ours.forwards == [1 + ours.stats[0].rounds] and ours.seconds_by_stage["verify"] > 0


# One option at several values


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("evaluate_every", "4", {"evaluate_every": 4}),
        ("evaluate_every", "adaptive", {"evaluate_every": "adaptive"}),
        ("drafter_window", "None", {"drafter_window": None}),
        ("tree", "chain", {}),
        ("tree", "argmax", {"proposal": "argmax"}),
        ("tree", "4,2,1,1,1", {"proposal": "argmax", "tree": Tree((4, 2, 1, 1, 1))}),
        ("tree", "4/8", {"proposal": "argmax", "tree": Tree(4, 8)}),
        ("tree", "sampled:3,1,1,1,1", {"tree": Tree((3, 1, 1, 1, 1))}),
    ],
)
def test_values_become_configurations(option, value, expected):
    assert bench_options.config_of(option, value, {"warm_start": 8}) == DecodeConfig(
        **{"draft_length": interleave.DRAFT_LENGTH, "warm_start": 8, **expected}
    )


def test_figures_of_a_request_by_hand():
    stats = stats_of([0, 1], [2, 1], drafters=2)
    stats.weights = [np.array([0.5, 0.5]), np.array([0.0, 1.0])]
    stats.losses = [np.array([0.0, 0.5]), np.array([0.5, 0.25])]  # of the first round's positions
    stats.lengths, stats.emitted_tokens = [5, 0], 4
    found = bench_options.request_figures(stats, 2.0, "sql", 5)
    assert (found["seconds"], found["rounds"], found["drafted"], found["undrafted"]) == (2.0, 2, 5, 1)
    assert found["regret_in_force"] == pytest.approx(0.25 + 0.375 - 0.5)
    assert found["predicted_and_realised"] == [6.0, 2] and found["compared_rounds"] == 1


def test_figures_with_losses_of_arms_have_no_regret():
    stats = stats_of([0], [2], drafters=2)
    stats.weights, stats.losses, stats.lengths = [np.array([0.5, 0.5])], [np.zeros(11)], [3]
    found = bench_options.request_figures(stats, 1.0, "sql", 5)
    assert found["regret_in_force"] is None and found["predicted_and_realised"] is None


def test_hindsight_by_hand():
    stats = stats_of([1, 0], [20, 20], drafters=2)
    stats.weights = [np.array([0.25, 0.75])] * 2
    found = bench_options.hindsight_figures(stats, [[2, 2], [3, 3]])
    assert found["picked_best"] and found["weight_on_best"] == 0.75
    assert found["beginning"] == (40, 2) and found["best_beginning"] == (6, 2)


def request(tokens: int, rounds: int, seconds: float, **more) -> dict:
    stages = {"prompt": 0.1, "verify": 0.5, **dict.fromkeys(bench_options.SCORING, 0.1)}
    counts = {"emitted_tokens": tokens, "rounds": rounds, "drafted": 4 * rounds, "undrafted": 1, "compared_rounds": 0}
    figures = {"seconds": seconds, "seconds_by_stage": stages, "regret_in_force": 1.0, "predicted_and_realised": None}
    return counts | figures | more


def test_rows_of_values_by_hand():
    first = [request(11, 5, 1.0), request(21, 5, 1.0)]
    other = [request(11, 4, 0.5), request(21, 4, 0.5, predicted_and_realised=[6.0, 4.0], compared_rounds=2)]
    plain = [{"emitted_tokens": 11, "rounds": 0, "seconds": 2.0}] * 2
    requests = {bench_options.PLAIN: plain, "1": first, "2": other}
    rows = [bench_options.summary(value, found, first) for value, found in requests.items()]
    bench_options.add_ratios(rows)
    assert [row["mat"] for row in rows] == [1.0, 3.0, 3.75]
    assert [row["times_first"] for row in rows] == pytest.approx([5.5 / 16, 1, 2])
    assert [row["times_plain"] for row in rows] == pytest.approx([1, 16 / 5.5, 32 / 5.5])
    assert rows[2]["less_first"] == pytest.approx((0.5 + 1.0) / 2) and rows[2]["less_first_standard_error"] == pytest.approx(
        0.25
    )
    assert (rows[2]["predicted"], rows[2]["realised"]) == (3.0, 2.0) and "predicted" not in rows[1]
    assert rows[1]["mat_standard_error"] == pytest.approx(np.sqrt(2 * 5**2 * 2) / 10)
    told = bench_options.table_of("evaluate_every", rows).splitlines()
    assert told[0].startswith("| evaluate_every | tokens per round |") and len(told) == 5
    assert len({line.count("|") for line in told}) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--option", "estimate", "--values", "1"], "--option"),
        (["--option", "evaluate_every", "--values", "0"], "evaluate_every: expected at least 1"),
        (["--option", "evaluate_every", "--values", "1", "--set", "warm_start"], "--set: expected NAME=VALUE"),
        (
            ["--option", "warm_start", "--values", "1", "--hindsight", "--temperature", "1"],
            "--hindsight: expected temperature 0",
        ),
    ],
)
def test_bad_arguments_are_refused(arguments, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_options.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        bench_options.main()
    assert words in capsys.readouterr().err


SCRIPTS = ["bench_decoder.py", "bench_options.py", "bench_round.py", "bench_engine_drafters.py", "studies/run.py"]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_show_their_help(script):
    done = subprocess.run([sys.executable, BENCH / script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr
