"""Experiments over small made-up traces in which it is known who drafts best, and what they measure with, by hand."""

from __future__ import annotations

import functools
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_decoder import prompt_of, tiny_head, tiny_llama

from hedgespec import experiments
from hedgespec.config import DecodeConfig
from hedgespec.experiments import baseline, measures, pool_size, recordings, report, statistics, telling
from hedgespec.experiments.laboratory import Laboratory
from hedgespec.experiments.recordings import (
    FRAMES,
    RECORDINGS,
    Recording,
    first_layers,
    load_traces,
    prompts_of,
    record_set,
)  # fmt: skip
from hedgespec.experiments.traces import Trace, record, replay
from hedgespec.metrics import DecodeStats
from hedgespec.zoo import EXPERTS, GENERALIST, NAMES

REPLAYED = ("baseline", "selection", "pool-size", "delay", "features")
TEXTS, TOKENS, DEPTH = 4, 24, 8
GOOD, BAD = 0.9, 0.3
"""Chance that a drafter is accepted: that of the text's domain, and any other."""


def make_trace(number: int, recording: Recording, drafters: tuple[str, ...], tokens: int = TOKENS) -> Trace:
    """A text of a domain whose expert is accepted far more often than all others; certain unless proposals are sampled."""
    random = np.random.default_rng(number)
    good = number % len(EXPERTS)
    prob = np.full((len(drafters), tokens), BAD)
    prob[good] = GOOD
    sampled = recording.mode == "sampled" and recording.temperature > 0
    ratio = prob if sampled else (random.random(prob.shape) < prob).astype(float)
    after = np.pad(ratio, ((0, 0), (0, recording.depth)))
    drafted = np.stack([after[:, d : d + tokens] for d in range(recording.depth)], -1)
    drafted[np.cumprod(drafted, -1) == 0] = 0
    return Trace(
        EXPERTS[good], number, recording.mode, recording.temperature, number, tokens + 1, 9, drafters,
        (True,) * len(drafters), np.arange(10 + tokens),
        np.repeat(prob[:, :1], 8, 1), prob if sampled else ratio, ratio, drafted,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Of experiments, with every set that the replayed ones need."""
    path = tmp_path_factory.mktemp("experiments")
    with pytest.MonkeyPatch.context() as patch:
        for name, recording in [(name, RECORDINGS[name]) for name in ("greedy", "sampled", "coupled", "wide")]:
            small = Recording(recording.pool, TEXTS, TOKENS, recording.mode, recording.temperature, recording.depth)
            patch.setitem(RECORDINGS, name, small)
            drafters = tuple(f"{one} {noise}" for noise in range(2) for one in NAMES) if recording.pool == "wide" else NAMES
            for number in range(TEXTS):
                make_trace(number, small, drafters).save(path / "traces" / name / f"{number:03d}.npz")
        yield path


def decode_nothing(patch: pytest.MonkeyPatch) -> None:
    speeds = {"plain": 1.0, "generalist": 1.2, "hedgespec_mat": 2.2, "generalist_mat": 2.0, "same": True, "domain": "sql"}
    speeds |= {"throughput": 1.3, "throughput_length": 2.0}
    patch.setattr(baseline._Live, "decode", lambda _, number: {**speeds, "hedgespec": 1.5 + number})
    patch.setattr(pool_size, "_live_over_replay", lambda laboratory: 50.0)


@pytest.fixture(scope="module")
def result_of(folder):
    """What an experiment wrote, each run once."""

    @functools.cache
    def run(name: str) -> dict:
        with pytest.MonkeyPatch.context() as patch:
            decode_nothing(patch)
            experiments.run([name], folder, seeds=2)
        return json.loads((folder / f"{name}.json").read_text())

    return run


@pytest.fixture
def replays(monkeypatch) -> list[str]:
    """Learners of the replays that are run, one by one."""
    seen = []

    def counted(trace, config, **options):
        seen.append(config.learner)
        return replay(trace, config, **options)

    for module in (statistics, pool_size):
        monkeypatch.setattr(module, "replay", counted)
    return seen


# Running


@pytest.mark.parametrize("name", REPLAYED)
def test_four_files_tell_the_result_and_a_second_run_computes_nothing(name, folder, result_of, replays):
    result = result_of(name)
    assert (result["experiment"], result["seeds"], result["command"]) == (name, 2, f"hedgespec experiment {name} --seeds 2")
    told = (folder / f"{name}.md").read_text()
    assert "| --- |" in told and "nan" not in told and "NaN" not in json.dumps(result)
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (folder / f"{name}.svg").read_text()
    experiment = experiments.load(name)
    assert (experiment.name, experiment.tell(result)) == (name, told)  # the file alone tells it again
    replays.clear()
    again = experiment.measure(Laboratory(folder, name, seeds=2))
    assert json.loads(json.dumps(again)) == {key: result[key] for key in again}
    assert replays == []


def test_what_a_step_depends_on_is_computed_anew(folder, replays, monkeypatch, tmp_path):
    decode_nothing(monkeypatch)
    shutil.copytree(folder / "traces" / "greedy", tmp_path / "traces" / "greedy")
    first = baseline.measure(Laboratory(tmp_path, "baseline", seeds=2))
    assert len(replays) == 2 * TEXTS
    baseline.measure(Laboratory(tmp_path, "baseline", seeds=3))
    assert len(replays) == 5 * TEXTS
    assert baseline.measure(Laboratory(tmp_path, "baseline", seeds=2, fresh=True)) == first
    assert len(replays) == 7 * TEXTS
    make_trace(1, RECORDINGS["greedy"], NAMES, TOKENS - 1).save(tmp_path / "traces" / "greedy" / "000.npz")
    baseline.measure(Laboratory(tmp_path, "baseline", seeds=2))
    assert len(replays) == 9 * TEXTS


def test_a_step_that_was_interrupted_is_done_again(tmp_path):
    laboratory = Laboratory(tmp_path, "any")
    with pytest.raises(KeyboardInterrupt):
        laboratory.once("key", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert laboratory.once("key", lambda: {"a": (1, 2)}) == {"a": [1, 2]}  # as JSON has it, the first time too
    assert laboratory.once("key", lambda: 1 / 0) == {"a": [1, 2]}
    assert Laboratory(tmp_path, "other").once("key", lambda: 3) == 3
    assert Laboratory(tmp_path, "any", fresh=True).once("key", lambda: 4) == 4


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="seeds: expected at least 2, got 1"):
        experiments.run(["delay"], tmp_path, seeds=1)
    with pytest.raises(ValueError, match="name: expected one of baseline, .*, got 'alchemy'"):
        experiments.run(["alchemy"], tmp_path)
    assert list(tmp_path.iterdir()) == []


REPOSITORY = Path(__file__).parent.parent
RESULTS = REPOSITORY / "bench" / "results" / "experiments"
TITLES = {"normal_hedge": "NormalHedge", "hedge": "Hedge", "ada_normal_hedge": "AdaNormalHedge", "ucb": "UCBSpec",
          "exp3": "EXP3Spec", "meta_sd": "MetaSD"}  # fmt: skip


def tables_of(text: str) -> list[dict[str, list[str]]]:
    """The tables of Markdown text, a row's cells by the first of them."""
    blocks = re.findall(r"(?:^\|.*\n)+", text + "\n", flags=re.MULTILINE)
    rows = [[[cell.strip() for cell in line.strip().strip("|").split("|")] for line in block.splitlines()] for block in blocks]
    return [{cells[0]: cells[1:] for cells in table} for table in rows]


def check_selection(told: str, result: dict) -> None:
    """Every learner's interval of MAT and of regret stands in the table of its set."""
    tables = [table for table in tables_of(told) if "NormalHedge" in table and table.get("", [""])[0] == "MAT"]
    assert len(tables) == len(result["sets"])
    for table, of_set in zip(tables, result["sets"].values()):
        for learner, title in TITLES.items():
            for place, measure in ((0, "mat"), (1, "regret")):
                one = of_set["learners"][learner][measure]
                assert table[title][place] == f"{one['mean']:.2f} ({one['low']:.2f} to {one['high']:.2f})", (learner, measure)


def test_tables_have_the_numbers_of_the_result(result_of):
    """Read out of the Markdown again, by another way than they were written."""
    check_selection(experiments.load("selection").tell(result_of("selection")), result_of("selection"))
    result = result_of("baseline")
    [table] = [table for table in tables_of(experiments.load("baseline").tell(result)) if "python" in table]
    for domain, row in result["domains"].items():
        cells = [cell.strip("*") for cell in table[domain]]
        fixed = [f"{row['fixed'][name]:.2f}" for name in (*EXPERTS, GENERALIST)]
        assert cells[: len(fixed)] == fixed


def test_the_documentation_has_the_numbers_that_were_measured():
    docs = (REPOSITORY / "docs" / "results.md").read_text()
    section = docs.partition("## Full information against bandits\n")[2].partition("\n## ")[0]
    check_selection(section, json.loads((RESULTS / "selection.json").read_text()))
    assert docs == report.compose(RESULTS, REPOSITORY / "docs"), "hedgespec experiment report writes it anew"


def test_the_report_tells_what_was_measured(folder, result_of, tmp_path):
    with pytest.raises(ValueError, match="the results of an experiment"):
        report.write(tmp_path, tmp_path / "results.md")
    for name in ("delay", "baseline"):
        result_of(name)
    (folder / "docs").mkdir()
    report.write(folder, folder / "docs" / "results.md")
    text = (folder / "docs" / "results.md").read_text()
    assert text.index(f"## {experiments.load('baseline').title}\n") < text.index(f"## {experiments.load('delay').title}\n")
    assert "](../delay.svg)" in text
    assert (folder / "delay.md").read_text().strip() in text


# What they find


def test_baseline_finds_the_expert_of_every_domain(result_of):
    result = result_of("baseline")
    assert list(result["domains"]) == list(EXPERTS[:TEXTS])
    for domain, row in result["domains"].items():
        assert row["best_fixed_name"] == domain
        assert row["best_fixed"] == max(row["fixed"].values()) == row["best_of_each_request"]
        assert row["generalist"] == row["fixed"][GENERALIST] < row["hedgespec"]["mean"] <= row["best_fixed"]
        assert sum(row["shares"]) == pytest.approx(1) and max(row["shares"]) == row["shares"][NAMES.index(domain)]
        assert row["of_best_fixed"]["mean"] == pytest.approx(row["hedgespec"]["mean"] / row["best_fixed"])
    live = result["live"]
    assert live["texts"] == TEXTS
    by_hand = math.prod((1.5 + number) / 1.2 for number in range(TEXTS)) ** (1 / TEXTS)
    assert live["hedgespec_over_generalist"]["mean"] == pytest.approx(by_hand)
    assert live["mat_over_generalist"]["mean"] == pytest.approx(1.1)
    assert live["time_of_a_round_over_generalist"] == pytest.approx(1.1 / by_hand)


def test_selection_tells_learners_from_bandits(result_of):
    for name, found in result_of("selection")["sets"].items():
        rows = found["learners"]
        assert {"normal_hedge", "ucb", "exp3", "uniform", "normal_hedge warm", "hedge warm"} <= set(rows)
        assert "ucb warm" not in rows
        assert rows["uniform"]["mat"]["mean"] < rows["normal_hedge"]["mat"]["mean"] < found["best_of_each_request"] + 1
        assert (
            rows["normal_hedge warm"]["regret"]["mean"] < rows["normal_hedge"]["regret"]["mean"] < rows["ucb"]["regret"]["mean"]
        )
        assert rows["normal_hedge warm"]["held_after"]["mean"] < TOKENS / 2 < rows["uniform"]["held_after"]["mean"], name
        for row in rows.values():
            assert row["curve"]["mean"][-1] == pytest.approx(row["regret"]["mean"])


def test_pools_hold_the_best_and_are_nested(result_of):
    trace = make_trace(0, RECORDINGS["wide"], NAMES)
    for seed in range(5):
        order = pool_size._best_first(trace, 4, np.random.default_rng(seed))
        assert order[0] == 4 and sorted(order) == list(range(7))
        assert sorted(pool_size._any_order(trace, 4, np.random.default_rng(seed))) == list(range(7))
    result = result_of("pool-size")
    assert (result["zoo"]["sizes"], result["wide"]["sizes"]) == ([2, 3, 4, 5, 6, 7], [2, 4, 8])
    assert result["live_over_replay"] == 50
    assert result["zoo"]["best"] == {domain: domain for domain in EXPERTS[:TEXTS]}
    assert result["zoo"]["best_of_texts"] == {domain: 1 for domain in EXPERTS[:TEXTS]}
    wide = result["wide"]["learners"]
    uniform = [interval["mean"] for interval in wide["uniform"]["regret"]]
    assert uniform[0] < uniform[-1]
    assert wide["uniform"]["slope_in_log"]["mean"] == pytest.approx(np.polyfit(np.log([2, 4, 8]), uniform, 1)[0])
    assert wide["normal_hedge"]["regret"][-1]["mean"] < uniform[-1] / 2


def test_delay_costs_and_is_set_beside_the_theory(result_of):
    result = result_of("delay")
    rows = {sweep: {row["value"]: row for row in found["normal_hedge"]} for sweep, found in result["sweeps"].items()}
    assert set(rows["evaluate_every"]) == {1, 2, 4, 8, 16, "adaptive"}
    assert rows["latency"][0]["regret"] == rows["evaluate_every"][1]["regret"] == rows["draft_length"][5]["regret"]
    assert rows["latency"][16]["regret"]["mean"] > rows["latency"][0]["regret"]["mean"]
    assert rows["latency"][16]["mat"]["mean"] < rows["latency"][0]["mat"]["mean"]
    theory = [row["theory"] for row in rows["latency"].values()]
    assert np.allclose(np.array(theory) / theory[0], np.sqrt([1, 2, 3, 5, 9, 17]))
    lengths = rows["draft_length"]
    assert lengths[1]["mat"]["mean"] < lengths[5]["mat"]["mean"]
    assert rows["evaluate_every"]["adaptive"]["theory"] is None
    regrets = np.array([row["regret"]["mean"] for row in rows["latency"].values()])
    fitted = np.linalg.lstsq(np.array(theory)[:, None], regrets, rcond=None)[0][0]
    assert result["fits"]["latency"]["normal_hedge"]["constant"] == pytest.approx(fitted)


# Decoding, with tiny models


@pytest.fixture(scope="module")
def zoo() -> SimpleNamespace:
    target = tiny_llama(seed=0, layers=4)
    drafters = [tiny_head(target, 1), tiny_head(target, 2)]
    drafters[1].name = GENERALIST
    return SimpleNamespace(target=target, drafters=drafters)


def recorded(zoo, number: int) -> Trace:
    return record(zoo.target, zoo.drafters, prompt_of(number)[0], domain="sql", number=number, seed=0, mode="sampled",
                  temperature=0.0, max_new_tokens=12, depth=5)  # fmt: skip


def test_all_ways_are_decoded_in_turns(zoo, tmp_path, monkeypatch):
    monkeypatch.setattr(baseline, "LIVE_TOKENS", 12)
    laboratory = Laboratory(tmp_path, "baseline")
    laboratory.zoo = zoo
    trace = recorded(zoo, 0)
    found = baseline._Live(laboratory, [trace]).decode(0)
    assert found["same"] and found["domain"] == "sql"
    assert all(found[way] > 0 for way in ("plain", "generalist", "hedgespec", "throughput"))
    assert found["hedgespec_mat"] == replay(trace, DecodeConfig(), seed=0).mean_accepted_tokens
    assert found["generalist_mat"] == 11 / measures.rounds_alone(trace, 5)[1]


def test_a_decoded_round_is_compared_with_a_replayed_one(zoo, tmp_path, monkeypatch):
    """By clocks that are made up: what is decoded first is not measured, and times are of a round."""
    laboratory, trace = Laboratory(tmp_path, "pool-size"), recorded(zoo, 0)
    laboratory.zoo = zoo
    monkeypatch.setattr(laboratory, "traces", lambda name: [trace])
    monkeypatch.setattr(pool_size, "time", SimpleNamespace(perf_counter=iter([100.0, 102.0]).__next__))
    monkeypatch.setattr(pool_size, "replay", lambda *arguments, **options: SimpleNamespace(rounds=4))
    asked = []

    def generate(decoder, ids, *, max_new_tokens, seed=None):
        asked.append(max_new_tokens)
        assert ids.tolist() == trace.tokens[: trace.prompt_length].tolist()
        return SimpleNamespace(stats=[SimpleNamespace(seconds=1000.0 if len(asked) == 1 else 12.0, rounds=6)])

    monkeypatch.setattr(pool_size.Decoder, "generate", generate)
    assert pool_size._live_over_replay(laboratory) == (12 / 6) / (2 / 4)
    assert asked[1:] == [trace.max_new_tokens]


# What is measured, by hand


def stats_of(choices: list[int], emitted: list[int]) -> DecodeStats:
    stats = DecodeStats(("a", "b", "c"), 2)
    stats.choices, stats.emitted_by_round = choices, emitted
    return stats


def test_regret_is_that_of_the_drafters_that_drafted():
    losses = np.array([[0.5, 0.0, 0.25], [0.5, 0.25, 0.0], [0.0, 0.5, 0.25], [0.5, 0.25, 0.0]])  # c is best: 0.5 of 1.5, 1
    stats = stats_of([0, 1, 2], [2, 1, 3])  # the last two positions have no loss yet
    assert measures.regret(stats, losses).tolist() == [0.25, 0.75, 1.0, 1.0]
    assert measures.regret(stats_of([0, -1], [3, 1]), losses)[-1] == 1.0 - 0.5  # nobody drafted the last position
    assert measures.regret(stats_of([], []), losses[:0]).tolist() == []


def test_losses_are_what_a_learner_hears():
    for name in ("greedy", "sampled"):
        trace = make_trace(2, RECORDINGS[name], NAMES)
        for length in (1, 5):
            stats = replay(trace, DecodeConfig(draft_length=length))
            assert np.array_equal(measures.losses(trace, length), stats.losses)


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


def test_rounds_alone():
    trace = make_trace(0, RECORDINGS["greedy"], NAMES)
    by_hand = []
    for accepted in trace.ratio:
        at = rounds = 0
        while at < TOKENS:
            run = accepted[at : at + 3].tolist()
            at, rounds = at + (run.index(0) if 0 in run else 3) + 1, rounds + 1
        by_hand.append(rounds)
    assert measures.rounds_alone(trace, 3, seeds=5) == by_hand
    sampled = make_trace(0, RECORDINGS["sampled"], NAMES)
    assert any(rounds % 1 for rounds in measures.rounds_alone(sampled, 3, seeds=5))


def test_signature_names_what_was_recorded():
    one, two = (make_trace(number, RECORDINGS["greedy"], NAMES) for number in (0, 1))
    assert measures.signature([one]) == measures.signature([make_trace(0, RECORDINGS["greedy"], NAMES)])
    assert len({measures.signature(traces) for traces in ([one], [two], [one, two], [one.of([0, 1])])}) == 4


def test_intervals():
    interval = statistics.mean_interval([1.0, 3.0])
    assert interval == pytest.approx({"mean": 2.0, "low": 2 - 12.7062, "high": 2 + 12.7062}, abs=1e-4)
    assert statistics.told(interval, 1) == "2.0 (-10.7 to 14.7)"
    assert statistics.mean_interval([2.0, 2.0, 2.0]) == {"mean": 2.0, "low": 2.0, "high": 2.0}
    assert statistics.mat([stats_of([0], [3]), stats_of([0, 1], [2, 1])]) == 2.0
    assert math.isnan(statistics.mat([]))


def test_table():
    assert telling.table(["a", "b"], [["x", "1"]]) == "| a | b |\n| --- | ---: |\n| x | 1 |\n"


# What is recorded


def test_a_set_is_recorded_once_and_goes_on_where_it_was(zoo, tmp_path, monkeypatch):
    monkeypatch.setitem(RECORDINGS, "greedy", Recording("zoo", 2, 12))
    monkeypatch.setattr(recordings, "prompts_of", lambda _: [SimpleNamespace(domain="sql", text=seed) for seed in (0, 1)])
    zoo.tokenizer = lambda text, return_tensors: SimpleNamespace(input_ids=prompt_of(text))
    asked = []

    def track(items):
        asked.append(list(items))
        return items

    record_set("greedy", tmp_path, zoo, track=track)
    first = load_traces(tmp_path, "greedy")
    assert [trace.number for trace in first] == [0, 1] and asked == [[0, 1]]
    np.testing.assert_array_equal(first[0].tokens, recorded(zoo, 0).tokens)
    (tmp_path / "greedy" / "001.npz").unlink()
    record_set("greedy", tmp_path, zoo, track=track)
    record_set("greedy", tmp_path, zoo, track=track)
    assert asked == [[0, 1], [1]]
    np.testing.assert_array_equal(load_traces(tmp_path, "greedy")[1].drafted, first[1].drafted)


def test_first_layers_say_what_the_target_says_after_them(zoo):
    small, ids = first_layers(zoo.target, 2), prompt_of(3)
    hidden = zoo.target(ids, output_hidden_states=True).hidden_states[2]
    expected = zoo.target.lm_head(zoo.target.model.norm(hidden))
    torch.testing.assert_close(small(ids).logits, expected)
    assert small.lm_head is zoo.target.lm_head and len(zoo.target.model.layers) == 4


def test_reworded_prompts_stand_in_their_frames():
    plain, framed = (prompts_of(Recording("zoo", 30, 12, reworded=reworded)) for reworded in (False, True))
    assert [one.domain for one in plain] == [one.domain for one in framed]
    words = [frame.split("{}")[0] for frame in FRAMES]
    assert {next(one for one in words if prompt.text == one + was.text) for prompt, was in zip(framed, plain)} == set(words)
