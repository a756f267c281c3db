"""The experiments from `estimator` on over small made-up texts, and what they compute, by hand."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hedgespec import experiments
from hedgespec.config import DecodeConfig
from hedgespec.delay import DelayQueue
from hedgespec.evaluate import expected_accepted_length
from hedgespec.experiments import estimator, heterogeneous, hindsight, open_questions, shift
from hedgespec.experiments.laboratory import Laboratory
from hedgespec.experiments.recordings import RECORDINGS
from hedgespec.experiments.statistics import ratio_interval
from hedgespec.experiments.traces import Trace, alone, replay
from hedgespec.learners import AdaNormalHedge, NormalHedge
from hedgespec.zoo import EXPERTS, NAMES, load_prompts

pytest.importorskip("sklearn", reason="experiments need scikit-learn")
pytest.importorskip("matplotlib", reason="experiments need matplotlib")
TEXTS, POSITIONS, DEPTH = 8, 24, 8
MIXED = (*NAMES, "first 2 layers", "first 26 layers", "ngram")
K = 5


def drafted_of(ratio: np.ndarray, depth: int = DEPTH) -> np.ndarray:
    """As if a drafter's own features were as good as the target's: `ratio` read from each position on, [N, T, D]."""
    after = np.pad(ratio, ((0, 0), (0, depth)))
    drafted = np.stack([after[:, d : d + ratio.shape[1]] for d in range(depth)], axis=-1)
    dead = np.cumprod(np.pad(drafted, ((0, 0), (0, 0), (1, 0)), constant_values=1.0)[..., :-1], axis=-1) == 0
    return np.where(dead, 0.0, drafted)


def trace_of(ratio: np.ndarray, prob: np.ndarray | None = None, **options) -> Trace:
    count, positions = ratio.shape
    values = {"domain": "python", "number": 0, "mode": "sampled", "temperature": 0.0, "seed": 0} | options
    return Trace(
        **{"max_new_tokens": positions + 1, "prompt_length": 9, "drafters": NAMES[:count], "own_features": (True,) * count,
           "tokens": np.arange(10 + positions), "prompt_prob": np.full((count, 8), 0.5), "ratio": ratio,
           "prob": ratio if prob is None else prob, "drafted": drafted_of(ratio), **values}
    )  # fmt: skip


def random_trace(number: int, name: str) -> Trace:
    """A text of a domain whose expert is accepted more often than the others, as a recording of the set would have it."""
    recording, random = RECORDINGS[name], np.random.default_rng(number)
    drafters = MIXED if recording.pool == "mixed" else NAMES
    chance = np.full((len(drafters), 1), 0.35)
    chance[number % len(EXPERTS)] = 0.8
    if recording.mode == "sampled" and recording.temperature > 0:
        prob = np.clip(chance + random.normal(0, 0.1, (len(drafters), POSITIONS)), 0, 1)
        ratio = np.clip(prob + random.normal(0, 0.2, prob.shape), 0, 1)
    else:
        prob = ratio = (random.random((len(drafters), POSITIONS)) < chance).astype(float)
    return trace_of(ratio, prob, drafters=drafters, domain=EXPERTS[number % len(EXPERTS)], number=number, seed=number,
                    mode=recording.mode, temperature=recording.temperature, drafted=drafted_of(ratio, recording.depth),
                    prompt_prob=np.repeat(chance, 8, axis=1))  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Of all experiments, with small sets of traces."""
    path = tmp_path_factory.mktemp("experiments")
    with pytest.MonkeyPatch.context() as patch:
        for name, recording in RECORDINGS.items():
            patch.setitem(RECORDINGS, name, replace(recording, texts=TEXTS))
        for name, number in itertools.product(("greedy", "coupled", "sampled", "reworded", "mixed"), range(TEXTS)):
            random_trace(number, name).save(path / "traces" / name / f"{number:03d}.npz")
        patch.setattr(heterogeneous, "LIVE_TEXTS", 0)
        patch.setattr(shift, "LEARNERS", ("normal_hedge", "hedge", "ada_normal_hedge"))
        yield path


@pytest.fixture(scope="module")
def results(folder) -> dict[str, dict]:
    names = ("estimator", "shift", "heterogeneous", "open-questions")
    experiments.run(names, folder, seeds=2)
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in names}


@pytest.mark.parametrize("name", ["estimator", "shift", "heterogeneous", "open-questions"])
def test_an_experiment_tells_and_draws_what_it_measured(name, folder, results):
    told = (folder / f"{name}.md").read_text()
    assert told.startswith(experiments.load(name).tell(results[name])[:40]) and "| ---" in told
    tables = [part.splitlines() for part in told.split("\n\n") if part.startswith("|")]
    assert len(tables) >= 2 and all(len({line.count("|") for line in lines}) == 1 for lines in tables)
    assert "nan" not in told.lower().replace("finance", "")
    from matplotlib.pyplot import close

    figure = experiments.load(name).draw(results[name])
    live = {"speed, decoded live"} if name == "heterogeneous" else set()  # of which there is nothing here
    assert {axes.get_title() for axes in figure.axes if not axes.has_data()} == live
    for axes in figure.axes:
        assert axes.get_title() or axes.get_label() == "<colorbar>"
        assert all(np.isfinite(np.asarray(line.get_ydata(), dtype=float)).any() for line in axes.lines)
    close(figure)
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (folder / f"{name}.svg").read_text()


def test_what_is_done_is_not_done_again(folder, results, monkeypatch):
    for module in (estimator, heterogeneous, open_questions):
        monkeypatch.setattr(module, "replay", lambda *_, **__: pytest.fail("replayed again"))
    for name in results:
        if name != "shift":
            again = experiments.load(name).measure(Laboratory(folder, name, seeds=2))
            assert all(results[name][key] == value for key, value in again.items())


def test_ratio_interval_by_hand():
    interval = ratio_interval([1.0, 3.0], [2.0, 2.0])
    assert interval == {"mean": 1.0, "low": 0.5, "high": 1.5}
    assert ratio_interval([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == {"mean": 2.0, "low": 2.0, "high": 2.0}


# Hindsight


def test_realised_lengths_are_what_drafts_would_emit():
    ratio = np.array([[1.0, 1.0, 0.0, 1.0, 1.0, 1.0]])
    assert hindsight.realised_lengths(trace_of(ratio), 3).tolist() == [[3.0, 2.0, 1.0, 4.0]]
    [mat] = hindsight.fixed_mats(trace_of(ratio), 3, 1)
    assert mat == np.mean(alone(trace_of(ratio), 0, 3)) == 3.0


def test_the_best_are_all_that_nobody_beats():
    assert hindsight.best_of(np.array([2.0, 1.0, 2.0])).tolist() == [0, 2]


def test_tokens_behind_by_hand():
    losses = np.array([[0.5, 0.0], [0.5, 0.25]])
    weights = np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    assert hindsight.tokens_behind(weights, losses, 3) == pytest.approx(4 * (0.4375 - 0.125))


def test_weights_of_a_round_hold_for_all_its_positions():
    trace = random_trace(0, "greedy")
    stats = replay(trace, DecodeConfig(draft_length=K, warm_start=0))
    weights = hindsight.weights_by_position(stats)
    assert weights.shape == (POSITIONS, len(NAMES))
    assert np.array_equal(weights[stats.emitted_by_round[0]], stats.weights[1])


# Estimators


def test_enumeration_finds_exact_and_steadied_unbiased_and_product_biased():
    found = estimator.enumerated(50, 4, 3)
    bias = {name: np.abs(of["bias"]).max() for name, of in found.items()}
    assert bias["exact"] < 1e-12 and bias["steadied"] < 1e-12 and bias["product"] > 0.05
    assert found["product"]["spread"] < found["steadied"]["spread"] < found["exact"]["spread"]


def test_steadied_without_a_guess_is_exact_and_does_not_move_where_ratios_are_their_mean():
    random = np.random.default_rng(0)
    prob, ratio = random.random((2, 9)), random.random((2, 9))
    exact = expected_accepted_length(prob, ratio, 4)
    np.testing.assert_allclose(estimator.steadied(prob, ratio, 4, np.zeros((2, 6))), exact)
    np.testing.assert_allclose(
        estimator.steadied(prob, prob, 4, np.full((2, 6), 0.7)), expected_accepted_length(prob, prob, 4, "product")
    )


def test_a_sum_cut_short_by_hand():
    prob, ratio = np.array([[0.5, 0.4, 0.2]]), np.array([[1.0, 0.3, 0.9]])
    np.testing.assert_allclose(estimator.cut_short(prob, ratio, 5), [[1 + 0.5 + 0.4 + 0.3 * 0.2, 1 + 0.4 + 0.3 * 0.2, 1.2]])
    everything = np.ones((1, 4))
    assert estimator.cut_short(everything, everything, 3).tolist() == [[4.0, 4.0, 3.0, 2.0]]


def test_a_sum_cut_short_prefers_who_stops_early_and_the_queue_does_not():
    trace = estimator.stops_early(4)
    np.testing.assert_array_equal(trace.drafted, drafted_of(trace.ratio, K))
    mats = hindsight.realised_lengths(trace, K).mean(1)
    exact = estimator.predicted(trace.prob, trace.ratio, K, "exact").mean(1)
    cut = estimator.heard_cut_short(trace, 0, None)
    assert mats[1] > mats[0] and exact[1] > exact[0] and cut[0] > cut[1]
    config = DecodeConfig(draft_length=K, warm_start=0, evaluate_every=1)
    heard = replay(trace, config, queue=estimator.CutShort(2, K)).learner_state["regrets"]
    waited = replay(trace, config).learner_state["regrets"]
    assert heard[0] > heard[1] and waited[1] > waited[0]
    case = estimator.made_up(2)
    assert case["waited for"][1] > case["waited for"][0] and case["cut short"][0] > case["cut short"][1]
    assert case["mat"][0] == 2.0  # every round of the first emits two, though half of all positions promise one


def test_the_queue_cut_short_hands_out_every_position_at_once():
    queue = estimator.CutShort(1, 3)
    first = queue.push(np.array([[1.0, 0.5]]), np.array([[1.0, 0.0]]))
    [second] = queue.push(np.array([[0.25]]), np.array([[1.0]]))
    assert [one.position for one in (*first, second)] == [0, 1, 2]
    np.testing.assert_allclose([one.losses[0] for one in (*first, second)], [1 - 2.5 / 4, 1 - 1.5 / 4, 1 - 1.25 / 4])
    assert isinstance(queue, DelayQueue)


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


def test_at_temperature_zero_estimates_are_one(results):
    for name in ("greedy", "coupled"):
        replayed = results["estimator"]["sets"][name]["replayed"]
        assert replayed["product"]["of_best_less_exact"]["mean"] == 0
    assert results["estimator"]["sets"]["sampled"]["replayed"]["product"]["behind_less_exact"]["mean"] != 0


# Shift


def test_joined_texts_are_those_texts_one_after_another():
    texts = [random_trace(number, "greedy") for number in range(3)]
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


def test_rounds_within_and_tokens_until_by_hand():
    stats = replay(trace_of(np.ones((1, 9))), DecodeConfig(draft_length=2, learner="fixed"))
    assert stats.emitted_by_round == [3, 3, 3]
    assert shift.within(stats, slice(2, 9)) == (6, 2)
    stats.choices = [0, 1, 2]
    assert shift.tokens_until(stats, np.array([2]), slice(3, 9)) == 3
    assert shift.tokens_until(stats, np.array([0]), slice(3, 9)) == 6


def test_one_that_forgets_changes_its_mind_sooner():
    losses = np.repeat([[0.0, 0.3], [0.3, 0.0]], 60, axis=0)
    kept, forgotten = (open_questions.weights_along(make(2), losses) for make in (NormalHedge, shift.ForgetfulNormalHedge))
    assert kept[59, 0] > 0.9 and forgotten[59, 0] > 0.9
    assert kept[90, 1] < 0.1 and forgotten[90, 1] > 0.9


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


def test_a_router_that_errs_is_worse_than_hedgespec(monkeypatch):
    class Wrong:
        def predict(self, texts):
            return ["sql"] * len(texts)

    traces = [random_trace(number, "greedy") for number in range(6)]
    mats = {one.number: hindsight.fixed_mats(one, K, 1) for one in traces}
    of = shift.routed("greedy", traces, mats, Wrong(), 2)
    assert of["misrouted"] == pytest.approx(5 / 6) and of["over_router_misrouted"] > 1.2 and of["over_wrong"]["mean"] > 1.2
    assert of["of_best"]["hedgespec"]["mean"] > of["of_best"]["router"]["mean"]


# Heterogeneous


def test_the_pool_is_told_by_its_parts(results):
    pools = results["heterogeneous"]["replayed"]["pools"]
    assert [of["drafters"] for of in pools.values()] == [7, 8, 10]
    assert sum(results["heterogeneous"]["replayed"]["picks"].values()) == pytest.approx(1, abs=0.1)
    assert results["heterogeneous"]["live"] == {"texts": 0, "tokens": heterogeneous.LIVE_TOKENS, "rows": {}}


def test_a_live_result_is_summed_told_and_drawn(results):
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
    result = results["heterogeneous"] | {"live": {"texts": 2, "tokens": 48, "rows": rows}}
    told = heterogeneous.tell(result)
    assert "sql 75%, ngram 25%" in told and "is ahead of it with 2.00" in told and "does not pay" in told
    heterogeneous.draw(result)


# Open questions


def test_a_beginning_is_the_text_so_far():
    trace = random_trace(1, "greedy")
    short = open_questions.beginning_of(trace, 20)
    config = DecodeConfig(draft_length=K)
    whole, cut = replay(trace, config), replay(short, config)
    begun = int((np.cumsum([0, *whole.emitted_by_round[:-1]]) < 20 - K - 1).sum())
    assert short.prob.shape[1] == 20 and whole.emitted_by_round[:begun] == cut.emitted_by_round[:begun]


def test_a_warm_start_tells_the_expert(results):
    rows = results["open-questions"]["warm"]["greedy"]["warm_starts"]
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
    normal, louder = NormalHedge(3), NormalHedge(3)
    np.testing.assert_allclose(  # which has no unit
        open_questions.weights_along(normal, losses), open_questions.weights_along(louder, losses / 4), atol=1e-6
    )
