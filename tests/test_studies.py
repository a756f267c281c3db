"""The studies of bench/studies over small made-up texts for which it is known which drafter is best."""

from __future__ import annotations

import functools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.tiny_models import random_prompt, tiny_head, tiny_llama
from helpers.traces import drafts_of, random_trace, trace_of
from rich.console import Console

from hedgespec.config import DecodeConfig
from hedgespec.experiments import measures
from hedgespec.experiments.recording import record
from hedgespec.experiments.replay import alone, replay
from hedgespec.learners import AdaNormalHedge, NormalHedge
from hedgespec.zoo import EXPERTS, GENERALIST, NAMES, load_prompts

pytest.importorskip("sklearn", reason="the studies need scikit-learn")
pytest.importorskip("matplotlib", reason="the studies need matplotlib")

import studies
from studies import baseline, estimator, heterogeneous, lab, open_questions, pool_size, run, sets, shift, variants

TEXTS, POSITIONS, K = 8, 24, 5
MIXED = (*NAMES, "first 2 layers", "first 26 layers", "ngram")
WIDE = tuple(f"{name} {noise}" for noise in range(2) for name in NAMES)
QUIET = Console(quiet=True)


def trace_in(name: str, number: int, positions: int = POSITIONS):
    """A made-up text of a set."""
    trace_set = sets.SETS[name]
    drafters = {"zoo": NAMES, "mixed": MIXED, "wide": WIDE}[trace_set.pool]
    return random_trace(number, drafters, EXPERTS, mode=trace_set.mode, temperature=trace_set.temperature, positions=positions)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The studies' folder with small sets of texts."""
    path = tmp_path_factory.mktemp("studies")
    with pytest.MonkeyPatch.context() as patch:
        for name, trace_set in sets.SETS.items():
            patch.setitem(sets.SETS, name, replace(trace_set, texts=TEXTS))
            for number in range(TEXTS):
                trace_in(name, number).save(path / "traces" / name / f"{number:03d}.npz")
        patch.setattr(heterogeneous, "LIVE_TEXTS", 0)
        yield path


def decode_nothing(patch: pytest.MonkeyPatch) -> None:
    """Replaces what decodes with models by made-up speeds."""
    speeds = {"plain": 1.0, "generalist": 1.2, "hedgespec_mat": 2.2, "generalist_mat": 2.0, "same": True, "domain": "sql"}
    speeds |= {"throughput": 1.3, "throughput_length": 2.0}
    patch.setattr(baseline.Live, "decode", lambda _, number: {**speeds, "hedgespec": 1.5 + number})
    patch.setattr(pool_size, "live_over_replay", lambda lab: 50.0)


@pytest.fixture(scope="module")
def result_of(folder):
    """Returns what a study wrote; each is run once."""

    @functools.cache
    def result(name: str) -> dict:
        with pytest.MonkeyPatch.context() as patch:
            decode_nothing(patch)
            run.run(studies.load(name), folder, seeds=2, fresh=False, console=QUIET)
        return json.loads((folder / f"{name}.json").read_text())

    return result


@pytest.fixture
def replays(monkeypatch) -> list[str]:
    """Learners of the replays of the baseline, one by one."""
    seen = []

    def counted(trace, config, **options):
        seen.append(config.learner)
        return replay(trace, config, **options)

    monkeypatch.setattr(baseline, "replay", counted)
    return seen


# Running


@pytest.mark.parametrize("name", studies.NAMES)
def test_a_study_writes_its_result_tables_and_figure(name, folder, result_of):
    result = result_of(name)
    assert (result["study"], result["seeds"]) == (name, 2)
    assert result["command"] == f"python bench/studies/run.py {name} --seeds 2"
    assert "NaN" not in json.dumps(result)
    study = studies.load(name)
    assert study.name == name
    for table in study.tables(result).values():  # from the file alone
        lines = table.splitlines()
        assert len(lines) > 2 and lines[1].startswith("| --- |") and len({line.count("|") for line in lines}) == 1
        assert "nan" not in table and table in (folder / f"{name}.md").read_text()
    svg = (folder / f"{name}.svg").read_text()
    assert "<svg" in svg and "<dc:date>" not in svg


def test_a_figure_depends_on_the_result_alone(folder, result_of, tmp_path):
    result = result_of("delay")
    run.write(studies.load("delay"), result, tmp_path)
    assert (tmp_path / "delay.svg").read_text() == (folder / "delay.svg").read_text()
    assert (tmp_path / "delay.json").read_text() == (folder / "delay.json").read_text()


def test_what_a_step_depends_on_is_computed_anew_and_nothing_else(folder, replays, monkeypatch, tmp_path):
    decode_nothing(monkeypatch)
    shutil.copytree(folder / "traces" / "greedy", tmp_path / "traces" / "greedy")

    def measured(**options):
        return baseline.measure(lab.Lab(tmp_path, "baseline", **{"seeds": 2, "console": QUIET, **options}))

    first = measured()
    assert len(replays) == 2 * TEXTS
    assert measured() == first and len(replays) == 2 * TEXTS
    measured(seeds=3)
    assert len(replays) == 5 * TEXTS
    assert measured(fresh=True) == first
    assert len(replays) == 7 * TEXTS
    trace_in("greedy", 1, POSITIONS - 1).save(tmp_path / "traces" / "greedy" / "000.npz")
    measured()
    assert len(replays) == 9 * TEXTS


def test_a_step_that_was_interrupted_is_done_again(tmp_path):
    laboratory = lab.Lab(tmp_path, "any")
    with pytest.raises(KeyboardInterrupt):
        laboratory.once("key", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert laboratory.once("key", lambda: {"a": (1, 2)}) == {"a": [1, 2]}  # as JSON has it, the first time too
    assert laboratory.once("key", lambda: 1 / 0) == {"a": [1, 2]}
    assert lab.Lab(tmp_path, "other").once("key", lambda: 3) == 3
    assert lab.Lab(tmp_path, "any", fresh=True).once("key", lambda: 4) == 4


def test_signature_names_what_was_recorded():
    one, two = (trace_in("greedy", number) for number in (0, 1))
    assert lab.signature([one]) == lab.signature([trace_in("greedy", 0)])
    assert len({lab.signature(traces) for traces in ([one], [two], [one, two], [one.of([0, 1])])}) == 4


def test_the_command(folder, result_of, monkeypatch, capsys, tmp_path):
    result_of("delay")
    page = tmp_path / "results.md"
    page.write_text("# Results\n\n<!-- table delay/latency -->\nold\n<!-- end -->\n")
    assert run.main(["page", "--out", str(folder), "--page", str(page)]) == 0
    assert studies.load("delay").tables(result_of("delay"))["latency"] in page.read_text()
    for arguments, words in ((["alchemy"], "alchemy"), (["delay", "--seeds", "1"], "--seeds: expected at least 2, got 1")):
        with pytest.raises(SystemExit, match="2"):
            run.main(arguments)
        assert words in capsys.readouterr().err
    monkeypatch.setattr(run, "find_spec", lambda module: None if module == "sklearn" else module)
    with pytest.raises(SystemExit, match="2"):
        run.main(["delay"])
    assert "scikit-learn" in capsys.readouterr().err
    with pytest.raises(ValueError, match="name: expected one of baseline, .*, got 'alchemy'"):
        studies.load("alchemy")


def test_json_is_readable_and_rounded():
    value = {"a": [1.23456789012, 2], "b": {"c": [], "d": [{"e": 1e-17}]}}
    text = run.to_json(run.rounded(value))
    assert json.loads(text) == {"a": [1.234568, 2], "b": {"c": [], "d": [{"e": 1e-17}]}}
    assert text.splitlines()[1] == ' "a": [1.234568, 2],'


# Baseline, selection, pool size, delay


def test_baseline_finds_the_expert_of_every_domain(result_of):
    result = result_of("baseline")
    assert list(result["domains"]) == list(EXPERTS)
    for domain, row in result["domains"].items():
        assert row["best_fixed_name"] == domain
        assert row["best_fixed"] == max(row["fixed"].values()) == row["best_of_each_request"]
        assert row["generalist"] == row["fixed"][GENERALIST] < row["hedgespec"]["mean"] <= row["best_fixed"]
        assert sum(row["shares"]) == pytest.approx(1) and max(row["shares"]) == row["shares"][NAMES.index(domain)]
        assert row["of_best_fixed"]["mean"] == pytest.approx(row["hedgespec"]["mean"] / row["best_fixed"], rel=1e-6)
    live = result["live"]
    assert live["texts"] == TEXTS
    by_hand = math.prod((1.5 + number) / 1.2 for number in range(TEXTS)) ** (1 / TEXTS)
    assert live["hedgespec_over_generalist"]["mean"] == pytest.approx(by_hand, rel=1e-6)
    assert live["mat_over_generalist"]["mean"] == pytest.approx(1.1)
    assert live["time_of_a_round_over_generalist"] == pytest.approx(1.1 / by_hand, rel=1e-6)


def test_selection_tells_learners_from_bandits(result_of):
    for name, found in result_of("selection")["sets"].items():
        rows = found["learners"]
        assert {"normal_hedge", "ucb", "exp3", "uniform", "normal_hedge warm", "hedge warm"} <= set(rows)
        assert "ucb warm" not in rows
        assert rows["uniform"]["mat"]["mean"] < rows["normal_hedge"]["mat"]["mean"], name
        warm, cold, bandit = (rows[one]["regret"]["mean"] for one in ("normal_hedge warm", "normal_hedge", "ucb"))
        assert warm < cold < bandit
        assert rows["normal_hedge warm"]["held_after"]["mean"] < rows["uniform"]["held_after"]["mean"]
        for row in rows.values():
            assert row["curve"]["mean"][-1] == pytest.approx(row["regret"]["mean"])


def test_pools_contain_the_best_and_are_nested(result_of):
    trace = trace_in("greedy", 0)
    for seed in range(5):
        order = pool_size.best_first(trace, 4, np.random.default_rng(seed))
        assert order[0] == 4 and sorted(order) == list(range(7))
        assert sorted(pool_size.any_order(trace, 4, np.random.default_rng(seed))) == list(range(7))
    result = result_of("pool-size")
    assert (result["zoo"]["sizes"], result["wide"]["sizes"]) == ([2, 3, 4, 5, 6, 7], [2, 4, 8])
    assert result["live_over_replay"] == 50
    assert result["zoo"]["best"] == {domain: domain for domain in EXPERTS}
    assert result["zoo"]["best_of_texts"] == {domain: 1 + (domain in EXPERTS[: TEXTS - len(EXPERTS)]) for domain in EXPERTS}
    wide = result["wide"]["learners"]
    uniform = [interval["mean"] for interval in wide["uniform"]["regret"]]
    assert uniform[0] < uniform[-1]
    assert wide["uniform"]["slope_in_log"]["mean"] == pytest.approx(np.polyfit(np.log([2, 4, 8]), uniform, 1)[0], rel=1e-5)
    assert wide["normal_hedge"]["regret"][-1]["mean"] < uniform[-1] / 2


def test_delay_costs_and_is_compared_with_the_theory(result_of):
    result = result_of("delay")
    rows = {sweep: {row["value"]: row for row in found["normal_hedge"]} for sweep, found in result["sweeps"].items()}
    assert set(rows["evaluate_every"]) == {1, 2, 4, 8, 16, "adaptive"}
    assert rows["latency"][0]["regret"] == rows["evaluate_every"][1]["regret"] == rows["draft_length"][5]["regret"]
    assert rows["latency"][16]["regret"]["mean"] > rows["latency"][0]["regret"]["mean"]
    theory = [row["theory"] for row in rows["latency"].values()]
    assert np.allclose(np.array(theory) / theory[0], np.sqrt([1, 2, 3, 5, 9, 17]))
    assert rows["draft_length"][1]["mat"]["mean"] < rows["draft_length"][5]["mat"]["mean"]
    assert rows["evaluate_every"]["adaptive"]["theory"] is None
    regrets = np.array([row["regret"]["mean"] for row in rows["latency"].values()])
    fitted = np.linalg.lstsq(np.array(theory)[:, None], regrets, rcond=None)[0][0]
    assert result["fits"]["latency"]["normal_hedge"]["constant"] == pytest.approx(fitted, rel=1e-5)


# Estimators


def test_enumeration_finds_exact_and_steadied_unbiased_and_product_biased():
    found = estimator.enumerated(50, 4, 3)
    bias = {name: np.abs(of["bias"]).max() for name, of in found.items()}
    assert bias["exact"] < 1e-12 and bias["steadied"] < 1e-12 and bias["product"] > 0.05
    assert found["product"]["spread"] < found["steadied"]["spread"] < found["exact"]["spread"]


def test_steadied_without_a_guess_is_exact_and_does_not_move_where_ratios_are_their_mean():
    prob, ratio = np.random.default_rng(0).random((2, 2, 9))
    exact = estimator.predicted(prob, ratio, 4, "exact")
    np.testing.assert_allclose(estimator.steadied(prob, ratio, 4, np.zeros((2, 6))), exact)
    product = estimator.predicted(prob, ratio, 4, "product")
    np.testing.assert_allclose(estimator.steadied(prob, prob, 4, np.full((2, 6), 0.7)), product)


def test_a_sum_cut_short_prefers_drafts_that_stop_early():
    trace = estimator.stops_early(4)
    np.testing.assert_array_equal(trace.drafted, drafts_of(trace.ratio, K))
    lengths = measures.realised_lengths(trace, K).mean(1)
    exact = estimator.predicted(trace.prob, trace.ratio, K, "exact").mean(1)
    cut = estimator.mean_cut_short(trace, 0, None)
    assert lengths[1] > lengths[0] and exact[1] > exact[0] and cut[0] > cut[1]
    config = DecodeConfig(draft_length=K, warm_start=0, evaluate_every=1)
    cut_short, waited = (estimator.fed(trace, config, feed, 0).learner_state["regrets"] for feed in ("cut short", "exact"))
    assert cut_short[0] > cut_short[1] and waited[1] > waited[0]
    case = estimator.made_up(2)
    assert case["waited for"][1] > case["waited for"][0] and case["cut short"][0] > case["cut short"][1]
    assert case["mat"][0] == 2.0  # every round of the first emits two, though half of all positions promise one


def test_agreement_by_hand():
    mats = np.array([1.0, 2.0, 2.0])
    assert estimator.agreement(np.array([0.1, 0.2, 0.3]), mats) == (1.0, 1.0)
    assert estimator.agreement(np.array([0.3, 0.2, 0.3]), mats) == (0.25, 0.5)
    assert estimator.agreement(np.zeros(2), np.ones(2)) == (1.0, 1.0)


def test_depths_see_what_own_features_cost():
    trace = trace_of(np.ones((1, 30)))
    rows = estimator.depths([replace(trace, drafted=trace.drafted * 0.5)] * 2)
    assert rows[0]["forced"]["mean"] == pytest.approx(1.0) and rows[0]["drafted"]["mean"] == pytest.approx(0.5)
    assert rows[2]["gap"]["mean"] == pytest.approx(0.5) and rows[2]["reached"] == pytest.approx(2 * 28 * 0.25)


def test_at_temperature_zero_the_estimates_are_equal(result_of):
    found = result_of("estimator")["sets"]
    for name in ("greedy", "coupled"):
        assert found[name]["replayed"]["product"]["of_best_less_exact"]["mean"] == 0
    assert found["sampled"]["replayed"]["product"]["behind_less_exact"]["mean"] != 0


# Shift


def test_joined_texts_are_those_texts_one_after_another():
    texts = [trace_in("greedy", number) for number in range(3)]
    trace = shift.joined(texts)
    assert trace.prob.shape == (len(NAMES), 3 * POSITIONS) and trace.max_new_tokens == 3 * POSITIONS + 1
    assert len(trace.tokens) == trace.prompt_length + 1 + 3 * POSITIONS and trace.domain == "python + sql + math"
    for drafter in range(len(NAMES)):
        rounds = alone(trace, drafter, K)
        ends = np.cumsum(rounds)
        for seam in (POSITIONS, 2 * POSITIONS):  # the bonus token may cross it, no drafted one does
            assert not ((ends - rounds < seam) & (ends - 1 > seam)).any()
        first = int((ends < POSITIONS).sum())
        assert rounds[:first] == alone(replace(texts[0], max_new_tokens=1000), drafter, K)[:first]


def test_tokens_until_a_drafter_is_selected():
    stats = replay(trace_of(np.ones((1, 9))), DecodeConfig(draft_length=2, learner="fixed"))
    assert stats.emitted_by_round == [3, 3, 3]
    stats.choices = [0, 1, 2]
    assert shift.tokens_until(stats, np.array([2]), slice(3, 9)) == 3
    assert shift.tokens_until(stats, np.array([0]), slice(3, 9)) == 6


def test_the_router_knows_plain_prompts_and_rewordings_keep_them():
    prompts = load_prompts()
    router = shift.train_router(prompts[shift.HELD_OUT :])
    test = prompts[: shift.HELD_OUT]
    found = shift.rewordings(test)
    assert np.mean(router.predict(found["as it is"]) == [one.domain for one in test]) > 0.9
    assert all(len(texts) == len(test) for texts in found.values())
    assert all(one.text in framed for one, framed in zip(test, found["framed"]))
    decoys = found["after a line of another domain"]
    assert not any(text.startswith(shift.DECOYS[one.domain]) for one, text in zip(test, decoys))


def test_a_router_that_errs_is_worse_than_hedgespec():
    class Wrong:
        def predict(self, texts):
            return ["sql"] * len(texts)

    traces = [trace_in("greedy", number) for number in range(6)]
    mats = {one.number: measures.tokens_per_round_alone(one, K) for one in traces}
    of = shift.routed("greedy", traces, mats, Wrong(), 2)
    assert of["misrouted"] == pytest.approx(5 / 6) and of["over_router_misrouted"] > 1.2 and of["over_wrong"]["mean"] > 1.2
    assert of["of_best"]["hedgespec"]["mean"] > of["of_best"]["router"]["mean"]


# Heterogeneous pools


def test_the_pool_is_measured_by_its_parts(result_of):
    result = result_of("heterogeneous")
    assert [of["drafters"] for of in result["replayed"]["pools"].values()] == [7, 8, 10]
    assert sum(result["replayed"]["picks"].values()) == pytest.approx(1, abs=0.1)
    assert result["live"] == {"texts": 0, "tokens": heterogeneous.LIVE_TOKENS, "rows": {}}


def test_decoded_rows_are_summed_tabulated_and_drawn(result_of):
    def row(seconds: float, picks: dict[str, int]) -> dict:
        return {"tokens": 48, "seconds": seconds, "rounds": 20, "emitted": 47, "picks": picks, "drafted": 100}

    texts = [{heterogeneous.TOKENS: row(2.0, {"sql": 15, "ngram": 5}), "ngram": row(1.0, {"ngram": 20}),
              heterogeneous.THROUGHPUT: row(0.8, {"sql": 0, "ngram": 20}), heterogeneous.PLAIN: {"tokens": 48, "seconds": 1.6},
              heterogeneous.EXPERT: row(1.2, {"sql": 20})}] * 2  # fmt: skip
    rows = heterogeneous.summed(texts)
    assert list(rows) == [heterogeneous.PLAIN, heterogeneous.EXPERT, "ngram", heterogeneous.TOKENS, heterogeneous.THROUGHPUT]
    assert rows[heterogeneous.TOKENS]["times_plain"]["mean"] == pytest.approx(0.8)
    assert rows[heterogeneous.TOKENS]["mat"] == 2.35 and rows[heterogeneous.TOKENS]["picks"] == {"sql": 0.75, "ngram": 0.25}
    assert rows["ngram"]["draft_length"] == 5 and rows["ngram"]["tokens_per_second"] == 48
    result = result_of("heterogeneous") | {"live": {"texts": 2, "tokens": 48, "rows": rows}}
    assert "sql 75%, ngram 25%" in heterogeneous.tables(result)["live"]
    heterogeneous.draw(result)


# Open questions


def test_a_beginning_is_the_text_so_far():
    trace = trace_in("greedy", 1)
    short = open_questions.beginning_of(trace, 20)
    config = DecodeConfig(draft_length=K)
    whole, cut = replay(trace, config), replay(short, config)
    begun = int((np.cumsum([0, *whole.emitted_by_round[:-1]]) < 20 - K - 1).sum())
    assert short.prob.shape[1] == 20 and whole.emitted_by_round[:begun] == cut.emitted_by_round[:begun]


def test_a_warm_start_identifies_the_expert(result_of):
    rows = result_of("open-questions")["warm"]["greedy"]["warm_starts"]
    assert rows["0"]["weight"]["mean"] == pytest.approx(1 / len(NAMES), abs=0.1) and rows["32"]["weight"]["mean"] > 0.8


def test_changes_of_ada_normal_hedge_change_one_thing():
    losses = np.random.default_rng(0).random((30, 3)) * [0.5, 0.7, 0.9]
    plain = open_questions.weights_along(AdaNormalHedge(3), losses)
    scaled = open_questions.weights_along(open_questions.ScaledAdaNormalHedge(3), losses)
    np.testing.assert_array_equal(plain, scaled)
    for name in list(open_questions.LEARNERS)[3:]:
        changed = open_questions.weights_along(open_questions.LEARNERS[name](3), losses)
        assert np.abs(changed - plain).max() > 0.01
        np.testing.assert_allclose(changed.sum(1), 1)
    ahead = open_questions.LEARNERS["0 unless ahead"](3)
    open_questions.weights_along(ahead, losses)
    assert (ahead.weights()[ahead.regrets <= 0] == 0).all()


# Features


def test_features_compare_each_value_with_the_default(result_of):
    result = result_of("features")
    for feature in result["features"].values():
        for values in feature["sets"].values():
            default, *others = values.values()
            assert default["less_default"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
            for other in others:
                assert other["less_default"]["mean"] == pytest.approx(other["mat"]["mean"] - default["mat"]["mean"], abs=1e-5)
    backed_off = result["features"]["back-off, evaluated each round"]["sets"]["greedy"]
    assert backed_off["1"]["scored"] < 0.8 and backed_off["None"]["scored"] == 1
    for kinds in result["depths"].values():
        assert kinds["predicted"][0] == kinds["corrected"][0]
    cheap, *_, dear = result["prices"]
    assert cheap["throughput"]["speed"]["mean"] > 1 and dear["tokens"]["speed"]["mean"] < 1
    assert dear["throughput"]["speed"]["mean"] > dear["tokens"]["speed"]["mean"]


# Variants


SETS = ("greedy", "sampled", "coupled")


def config_for(trace, **options) -> DecodeConfig:
    return DecodeConfig(draft_length=K, proposal=trace.mode, **options)


def close_race(name: str, number: int):
    """A text on which no drafter is better than the others for long, so that the learner changes its choice."""
    random = np.random.default_rng(number)
    prob, ratio = random.random((2, 4, 60))
    if name != "sampled":
        prob = ratio = np.round(prob)
    mode, temperature = sets.SETS[name].mode, sets.SETS[name].temperature
    return trace_of(ratio, prob, mode=mode, temperature=temperature, prompt_prob=random.random((4, 6)), seed=number)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize(
    "options",
    [{}, {"evaluate_every": 1, "warm_start": 0}, {"learner": "hedge", "evaluate_every": 3}, {"objective": "throughput"}],
    ids=str,
)
def test_the_plain_study_selector_is_hedgespecs(name, options):
    switches = 0
    for number in range(3):
        trace = close_race(name, number)
        config = config_for(trace, **options)
        seconds = (np.full(len(trace.drafters), 0.05), np.array([1.0, 1.1, 1.2, 1.3, 1.4, 1.5]))
        seconds = seconds if config.objective == "throughput" else None
        expected = replay(trace, config, seconds=seconds)
        found = replay(trace, config, seconds=seconds, selector=variants.StudySelector(trace, config))
        assert (found.choices, found.lengths) == (expected.choices, expected.lengths)
        np.testing.assert_allclose(found.weights, expected.weights, atol=1e-12)
        switches += len(set(found.choices)) > 1
    assert switches


def test_product_gives_the_learner_products_of_probabilities():
    prob, ratio = np.random.default_rng(0).random((2, 3, 12))
    trace = trace_of(ratio, prob, temperature=1.0)
    losses = measures.losses(variants.product(trace), 2)
    np.testing.assert_allclose(losses[0], 1 - (1 + prob[:, 0] + prob[:, 0] * prob[:, 1]) / 3)
    config = config_for(trace, learner="fixed")
    assert replay(variants.product(trace), config).emitted_by_round == replay(trace, config).emitted_by_round


def test_acceptance_rate_learns_at_once():
    trace = trace_in("sampled", 1)
    config = config_for(trace, evaluate_every=1, warm_start=4)
    stats = variants.acceptance_rate(trace, config, 3)
    learner = NormalHedge(len(trace.drafters))
    for column in (*trace.prompt_prob[:, -4:].T, *trace.prob[:, : sum(stats.emitted_by_round[:2])].T):
        learner.update(1 - column)
    np.testing.assert_allclose(stats.weights[2], learner.weights(), atol=1e-9)


def test_argmax_selects_the_largest_weight_and_learns_the_same():
    learner, plain = variants.ArgmaxNormalHedge(3), NormalHedge(3)
    for loss in np.random.default_rng(0).random((5, 3)):
        learner.update(loss)
        plain.update(loss)
        assert learner.weights().tolist() == (np.arange(3) == plain.weights().argmax()).tolist()
        np.testing.assert_array_equal(learner.regrets, plain.regrets)


def test_a_learner_that_forgets_changes_its_mind_sooner():
    losses = np.repeat([[0.0, 0.3], [0.3, 0.0]], 60, axis=0)
    learners = NormalHedge(2), variants.ForgetfulNormalHedge(2, 0.9)
    kept, forgotten = (open_questions.weights_along(learner, losses) for learner in learners)
    assert kept[59, 0] > 0.9 and forgotten[59, 0] > 0.9
    assert kept[90, 1] < 0.1 and forgotten[90, 1] > 0.9


def test_a_sum_cut_short_by_hand():
    prob, ratio = np.array([[0.5, 0.4, 0.2]]), np.array([[1.0, 0.3, 0.9]])
    by_hand = [[1 + 0.5 + 0.4 + 0.3 * 0.2, 1 + 0.4 + 0.3 * 0.2, 1.2]]
    np.testing.assert_allclose(variants.cut_short(prob, ratio, 5), by_hand)
    everything = np.ones((1, 4))
    assert variants.cut_short(everything, everything, 3).tolist() == [[4.0, 4.0, 3.0, 2.0]]


def test_depth_correction_learns_factors_below_one_where_drafts_fall_short():
    """All drafters are right on verified tokens, and wrong from the second token on in their own drafts."""
    trace = trace_of(np.ones((3, 200)), own_features=(True, True, False))
    drafted = trace.drafted.copy()
    drafted[:, :, 1:] = 0
    trace = replace(trace, drafted=drafted)
    config = config_for(trace, warm_start=0, evaluate_every=1)
    selector = variants.DepthCorrection(trace, config)
    replay(trace, config, selector=selector)
    factors = selector.factors
    assert (factors[0] == 1).all() and (factors[1, :2] < 0.9).all() and (factors[:, 2] == 1).all()
    by_depth = selector.by_depth
    assert by_depth["predicted"][1] == by_depth["reached"][1] > by_depth["corrected"][1] > by_depth["accepted"][1] == 0
    learned = variants.DepthCorrection(trace_of(np.ones((2, 3)), own_features=(True, False)), DecodeConfig(draft_length=2))
    learned._learn(0, np.array([0.5, 0.8]), 1)
    assert learned.factors.round(3).tolist() == [[1.0, 1.0], [0.887, 1.0]]


@pytest.mark.parametrize("patience", [1, 4])
@pytest.mark.parametrize("every", [1, "adaptive"])
@pytest.mark.parametrize("name", SETS)
def test_back_off_ends_with_the_same_regrets_and_scores_fewer_drafters(name, every, patience):
    """With the best drafter given no choice is left to chance, and late losses change nothing but when they are learned."""
    trace = trace_in(name, 2, positions=150)
    config = config_for(trace, evaluate_every=every)
    selector = variants.BackOff(trace, config, patience)
    stats = replay(trace, config, selector=selector)
    assert selector.evaluations.max() == stats.evaluations
    assert (selector.known == trace.prob.shape[1]).all()  # at the end all have caught up
    if every == 1:
        assert selector.evaluations.min() < 0.8 * selector.evaluations.max()
    heard = np.where(selector.heard_of < selector.until, selector.heard_of, selector.next)
    losses = measures.losses(trace, K)
    for drafter in range(len(trace.drafters)):  # each drafter's regret is that of the losses the learner has by now
        count = int(heard[drafter])
        expected = sum(selector.played[:count]) - losses[:count, drafter].sum()
        assert selector.learner.regrets[drafter] + _warm(trace, config, drafter) == pytest.approx(expected, abs=1e-9)


def _warm(trace, config, drafter: int) -> float:
    """The regret that the warm start leaves, with the sign that takes it out."""
    learner = NormalHedge(len(trace.drafters))
    warm = min(config.warm_start, trace.prompt_prob.shape[1])
    for column in trace.prompt_prob[:, -warm:].T:
        learner.update(1 - column)
    return -learner.regrets[drafter]


# Decoding, with tiny models


@pytest.fixture(scope="module")
def zoo() -> SimpleNamespace:
    target = tiny_llama(seed=0, layers=4)
    drafters = [tiny_head(target, 1), tiny_head(target, 2)]
    drafters[1].name = GENERALIST
    return SimpleNamespace(target=target, drafters=drafters)


def recorded(zoo, number: int):
    return record(zoo.target, zoo.drafters, random_prompt(number)[0], domain="sql", number=number, seed=0, mode="sampled",
                  temperature=0.0, max_new_tokens=12, depth=5)  # fmt: skip


def test_all_methods_are_decoded_in_turns(zoo, tmp_path, monkeypatch):
    monkeypatch.setattr(baseline, "LIVE_TOKENS", 12)
    laboratory = lab.Lab(tmp_path, "baseline")
    laboratory.zoo = zoo
    trace = recorded(zoo, 0)
    found = baseline.Live(laboratory, [trace]).decode(0)
    assert found["same"] and found["domain"] == "sql"
    assert all(found[method] > 0 for method in ("plain", "generalist", "hedgespec", "throughput"))
    assert found["hedgespec_mat"] == np.mean(replay(trace, DecodeConfig(), seed=0).emitted_by_round)
    assert found["generalist_mat"] == 11 / measures.rounds_alone(trace, 5)[1]


def test_a_set_is_recorded_once_and_continues_where_it_stopped(zoo, tmp_path, monkeypatch):
    monkeypatch.setitem(sets.SETS, "greedy", sets.TraceSet("zoo", 2, 12))
    monkeypatch.setattr(sets, "prompts_of", lambda _: [SimpleNamespace(domain="sql", text=seed) for seed in (0, 1)])
    zoo.tokenizer = lambda text, return_tensors: SimpleNamespace(input_ids=random_prompt(text))
    asked = []

    def track(items):
        asked.append(list(items))
        return items

    sets.record_set("greedy", tmp_path, zoo, track=track)
    first = sets.load_traces(tmp_path, "greedy")
    assert [trace.number for trace in first] == [0, 1] and asked == [[0, 1]]
    np.testing.assert_array_equal(first[0].tokens, recorded(zoo, 0).tokens)
    (tmp_path / "greedy" / "001.npz").unlink()
    sets.record_set("greedy", tmp_path, zoo, track=track)
    sets.record_set("greedy", tmp_path, zoo, track=track)
    assert asked == [[0, 1], [1]]
    np.testing.assert_array_equal(sets.load_traces(tmp_path, "greedy")[1].drafted, first[1].drafted)


def test_first_layers_are_the_targets(zoo):
    small, ids = sets.first_layers(zoo.target, 2), random_prompt(3)
    hidden = zoo.target(ids, output_hidden_states=True).hidden_states[2]
    expected = zoo.target.lm_head(zoo.target.model.norm(hidden))
    torch.testing.assert_close(small(ids).logits, expected)
    assert small.lm_head is zoo.target.lm_head and len(zoo.target.model.layers) == 4


def test_reworded_prompts_are_framed():
    plain, framed = (sets.prompts_of(sets.TraceSet("zoo", 30, 12, reworded=reworded)) for reworded in (False, True))
    assert [one.domain for one in plain] == [one.domain for one in framed]
    words = [frame.split("{}")[0] for frame in sets.FRAMES]
    assert {next(one for one in words if prompt.text == one + was.text) for prompt, was in zip(framed, plain)} == set(words)
