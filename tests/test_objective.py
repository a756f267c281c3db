"""Objective "throughput": which drafter, how long a draft, or none, by clocks that are made up."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.batches import batch_of, pool
from helpers.decoding import VOCABULARY, Broken, prompt_of, tiny_head, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st

from hedgespec import learners
from hedgespec.config import DecodeConfig, Tree
from hedgespec.decoder import Decoder
from hedgespec.decoder import pool as pool_module
from hedgespec.decoder.batch import Batch
from hedgespec.decoder.pool import Pool
from hedgespec.decoder.row import Row
from hedgespec.drafters.causal_lm import CausalLMDrafter
from hedgespec.drafters.ngram import NGramDrafter
from hedgespec.records import Choice, Feedback
from hedgespec.runtime.target import TargetSession
from hedgespec.selection.arms import Drafters, DraftersAndLengths
from hedgespec.selection.costs import FEWEST, Costs
from hedgespec.selection.selector import MAX_EVALUATE_EVERY, MAX_EVALUATE_EVERY_PLAIN, NO_DRAFT, Selector

FULL = ("normal_hedge", "hedge", "ada_normal_hedge")
K = 3
FLAT, STEEP = (10.0, 10.0, 10.0, 10.0), (10.0, 13.0, 16.0, 19.0)
"""Seconds to verify a round by drafted length."""
MEASURING = (K + 1) * (FEWEST + 1)
"""Rounds that measure lengths."""
quick = settings(max_examples=60, deadline=None)


@pytest.fixture(scope="module")
def target():
    return tiny_llama(seed=0, layers=4)


@pytest.fixture(scope="module")
def small():
    return tiny_llama(seed=0, layers=1)


class Flawed:
    """The target itself, but wrong about every `period`-th token of the text; 0: about none."""

    aux_layers, draft_to_target, vocab_size = (), None, VOCABULARY

    def __init__(self, target, period: int):
        self.target, self.period, self.name = target, period, f"flawed-{period}"

    def session(self):
        return FlawedSession(CausalLMDrafter(self.target, self.target, name=self.name).session(), self.period)


class FlawedSession:
    def __init__(self, session, period: int):
        self.session, self.period, self.drafted = session, period, 0

    @property
    def verified(self) -> int:
        return self.session.verified

    def consume(self, tokens, features, logits_to_keep):
        logits = self.session.consume(tokens, features, logits_to_keep)
        self.drafted = 0
        return self._spoil(logits, self.verified - len(logits) + 1)

    def step(self, token):
        self.drafted += 1
        return self._spoil(self.session.step(token)[None], self.verified + self.drafted)[0]

    def _spoil(self, logits, first: int):
        """Logits for the tokens of the text that come at `first` and behind it."""
        wrong = torch.tensor([self.period > 0 and at % self.period == 0 for at in range(first, first + len(logits))])
        return torch.where(wrong[:, None], logits.roll(1, -1), logits)


class Clock:
    def __init__(self, outliers: float = 0.0):
        self.seconds, self.outliers, self.random = 0.0, outliers, np.random.default_rng(0)

    def __call__(self) -> float:
        return self.seconds

    def spend(self, seconds: float) -> None:
        self.seconds += seconds * (50 if self.random.random() < self.outliers else 1)


@pytest.fixture
def priced(monkeypatch):
    """Makes decoders by whose clocks a drafted token and a verification take as long as is said, whatever they took."""
    draft_chains, forward, at_work = pool_module.draft_chains, TargetSession.forward, []

    def slow_draft(group, rows, choices, *rest):
        drafts = draft_chains(group, rows, choices, *rest)
        if at_work:
            clock, draft, _ = at_work[-1]
            clock.spend(max(draft[choice.drafter] for choice in choices) * max(len(one.tokens) for one in drafts))
        return drafts

    def slow_forward(session, tokens, *rest, **options):
        if at_work:
            clock, _, verify = at_work[-1]
            clock.spend(verify[min(tokens.shape[1] - 1, K)])
        return forward(session, tokens, *rest, **options)

    monkeypatch.setattr(pool_module, "draft_chains", slow_draft)
    monkeypatch.setattr(TargetSession, "forward", slow_forward)

    def make(target, drafters, draft, verify, outliers: float = 0.0, **options) -> Decoder:
        decoder = Decoder(target, drafters, DecodeConfig(**{"draft_length": K, "objective": "throughput"} | options))
        decoder.costs.clock = Clock(outliers)
        at_work.append((decoder.costs.clock, draft, verify))
        return decoder

    return make


CASES = {  # periods of flaws, seconds a drafted token, seconds of verification; who drafts how many tokens in the end
    "long drafts pay": ((0, 2), (1.0, 1.0), FLAT, Choice(0, 3)),
    "short drafts pay": ((2, 1), (2.0, 2.0), FLAT, Choice(0, 1)),
    "a bit longer ones do": ((3, 1), (1.0, 1.0), FLAT, Choice(0, 2)),
    "nothing pays": ((3, 2), (9.0, 9.0), STEEP, NO_DRAFT),
    "nothing is right": ((1, 1), (0.1, 0.1), STEEP, NO_DRAFT),
    "the dear one is better and loses": ((0, 4), (30.0, 1.0), FLAT, Choice(1, 3)),
    "the dear one is better and wins": ((0, 2), (1.5, 1.0), FLAT, Choice(0, 3)),
}


@pytest.mark.parametrize("outliers", [0.0, 0.08])
@pytest.mark.parametrize("case", CASES)
def test_what_pays_is_what_is_done(small, priced, case, outliers):
    """A first request measures and learns, the second starts with the costs known. Both texts are the target's own."""
    periods, draft, verify, expected = CASES[case]
    drafters = [Flawed(small, period) for period in periods]
    drafters[1].name += "-b"
    decoder = priced(small, drafters, draft, verify, outliers)
    asked, to_measure = [], decoder.costs.to_measure
    decoder.costs.to_measure = lambda *arguments: asked.append(to_measure(*arguments)) or asked[-1]
    for prompt, tokens, settled in ((prompt_of(0), 220, 30), (prompt_of(1), 160, 20)):
        asked.clear()
        out = decoder.generate(prompt, max_new_tokens=tokens, seed=3)
        assert out.sequences.tolist() == small.generate(prompt, max_new_tokens=tokens, do_sample=False).tolist()
        stats = out.stats[0]
        rounds = list(zip(stats.choices, stats.lengths, asked, strict=True))[:-2]  # the last ones have no room
        done = [(drafter, length) for drafter, length, measured in rounds if measured is None][settled:]
        assert len(done) > 10
        assert done.count((expected.drafter, expected.draft_length)) >= 0.9 * len(done)
    assert done[-1] == (expected.drafter, expected.draft_length)


def test_falling_back_is_soon_and_costs_little(small, priced, monkeypatch):
    """Drafters are scored ever more rarely while nobody drafts, and the rounds are the plain ones."""
    calls = []
    forward = Pool.teacher_forced_logits
    monkeypatch.setattr(Pool, "teacher_forced_logits", lambda *arguments: calls.append(1) or forward(*arguments))
    drafters = [Flawed(small, 1), NGramDrafter(VOCABULARY, name="lookup")]
    decoder = priced(small, drafters, (5.0, 5.0), STEEP, warm_start=0)
    decoder.generate(prompt_of(0), max_new_tokens=60, seed=0)
    calls.clear()
    stats = decoder.generate(prompt_of(1), max_new_tokens=230, seed=0).stats[0]
    assert any(stats.lengths[:12]) and sum(map(bool, stats.lengths[12:])) <= 3 * K  # those that measure again
    # The prompt, a few while drafters are tried, then after rounds 1, 2, 4 .. 64 of plain decoding and each 64th, and the end.
    assert len(calls) <= 1 + 12 + int(math.log2(MAX_EVALUATE_EVERY_PLAIN)) + 1 + 230 // MAX_EVALUATE_EVERY_PLAIN + 1
    assert stats.weights[-1].sum() < 1e-3  # what lacks to 1 is plain decoding's


def test_scores_wait_for_a_bounded_number_of_tokens(small, priced, monkeypatch):
    counts = []
    observe = Selector.observe
    monkeypatch.setattr(
        Selector, "observe", lambda self, prob, ratio, seconds: (
            counts.append(prob.shape[1]), observe(self, prob, ratio, seconds)
        )[1],
    )  # fmt: skip
    decoder = priced(small, [Flawed(small, 1)], (5.0,), STEEP)
    decoder.generate(prompt_of(1), max_new_tokens=240, seed=0)
    assert max(counts) == MAX_EVALUATE_EVERY_PLAIN


def test_rounds_with_drafts_are_scored_as_often_as_ever():
    selector = selector_of(2)
    weights = np.array([0.5, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0])  # one drafter, two lengths
    seen = []
    for round in range(40):
        selector.select(weights, round % 2 * 0.6, 100)
        selector.may_switch = True
        seen.append(selector.every)
    assert seen[:5] == [1, 2, 4, 8, 8] and max(seen) == MAX_EVALUATE_EVERY
    plain = np.eye(7)[6]
    for _ in range(20):
        selector.select(plain, 0.0, 100)
        selector.may_switch = True
        seen.append(selector.every)
    assert seen[40:48] == [1, 2, 4, 8, 16, 32, 64, 64] and max(seen) == MAX_EVALUATE_EVERY_PLAIN
    selector.select(weights, 0.0, 100)
    assert selector.every == 1


# A world without models: drafter i is accepted with a fixed probability.

WORLDS = {  # acceptance, seconds a drafted token, seconds of verification
    "long drafts pay": ((0.9, 0.5), (1, 1), FLAT),
    "short drafts pay": ((0.6, 0.5), (3, 3), (10, 12, 14, 16)),
    "nothing pays": ((0.1, 0.2), (3, 3), STEEP),
    "dear": ((0.8, 0.7), (10, 0.5), FLAT),
    "many": ((0.5, 0.55, 0.6, 0.4, 0.45, 0.5, 0.3), (1,) * 7, FLAT),
}


def rates(acceptance, draft, verify) -> np.ndarray:
    """Tokens a second, [N, K+1]."""
    lengths = np.array([[sum(one**j for j in range(k + 1)) for k in range(K + 1)] for one in acceptance])
    return lengths / (np.outer(draft, range(K + 1)) + verify)


@pytest.mark.parametrize("learner", FULL)
@pytest.mark.parametrize("world", WORLDS)
def test_learners_find_the_arm_with_most_tokens_a_second(world, learner):
    """By a clock of which every tenth reading is 50 times too long."""
    acceptance, draft, verify = (np.array(each, dtype=float) for each in WORLDS[world])
    count, random, clock = len(acceptance), np.random.default_rng(0), Clock(outliers=0.1)
    costs = Costs(count, K, clock)
    selector = selector_of(count, K, learner)
    unscored, chosen, rate = [], [], rates(acceptance, draft, verify)
    for _ in range(500):
        weights, measure = selector.weights(), costs.to_measure(1, K)
        choice = selector.select(weights, random.random(), 10**6, measure)
        if measure is None:
            chosen.append(choice)
        tokens = random.random((K + 1, count)) < acceptance
        accepted = int(tokens[: choice.draft_length, choice.drafter].cumprod().sum())
        if choice.draft_length:
            before = clock()
            clock.spend(draft[choice.drafter])
            costs.drafted(1, choice.drafter, clock() - before)
        before = clock()
        clock.spend(verify[choice.draft_length])
        costs.verified(1, choice.draft_length, clock() - before)
        unscored.append(tokens[: accepted + 1].T)
        if selector.evaluation_is_due(False):
            ratio = np.concatenate(unscored, 1).astype(float)
            selector.observe(np.repeat(acceptance[:, None], ratio.shape[1], 1), ratio, costs.of(1))
            unscored.clear()
        drafted = choice.draft_length
        selector.end_round(choice.drafter if drafted else None, weights, accepted + 1, drafted, min(accepted + 1, drafted))
    stats = selector.stats
    assert len(chosen) >= 500 - (3 * max(K + 1, count) + MEASURING + FEWEST * count)
    assert np.mean([rate[choice.drafter, choice.draft_length] for choice in chosen[-200:]]) > 0.94 * rate.max()
    assert stats.regret[-1] < 0.1 * len(stats.losses)
    if world == "nothing pays":
        assert set(chosen[40:]) == {NO_DRAFT}


# Losses


def losses_of(lengths, draft, verify, before=()) -> np.ndarray:
    """Written apart: loops, and the mean of all positions so far."""
    per_arm = []
    for sums in [*before, lengths]:
        per_arm.append([sums[k, i] for i in range(sums.shape[1]) for k in range(len(sums))] + [1.0])
    most = len(lengths)
    costs = [draft[i] * (k + 1) + verify[k + 1] for i in range(len(draft)) for k in range(most)] + [verify[0]]
    mean = np.mean([[1.0] * len(costs), *per_arm], axis=0)
    cheapest = min(cost / one for cost, one in zip(costs, mean))
    return np.array([(most + min(cost / cheapest - one, most)) / (2 * most) for cost, one in zip(costs, per_arm[-1])])


@st.composite
def positions(draw):
    """[K, N] lengths of a few positions, and seconds."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count, most = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    terms = (random.random((6, most, count)) * (random.random((6, most, count)) < 0.7)).cumprod(axis=1)
    scale = 10.0 ** draw(st.integers(-6, 3))
    return 1 + terms.cumsum(axis=1), scale * random.random(count) ** 4 * 10, scale * (0.1 + np.sort(random.random(most + 1)))


def arms_of(count: int, most: int) -> DraftersAndLengths:
    return DraftersAndLengths(np.ones(count, dtype=bool), most)


@quick
@given(world=positions())
def test_losses_are_the_formula_and_lie_between_0_and_1(world):
    lengths, draft, verify = world
    arms, scaled = (arms_of(len(draft), len(verify) - 1) for _ in range(2))
    for number, sums in enumerate(lengths):
        feedback = Feedback(None, number, sums)
        losses = arms.losses(feedback, (draft, verify))
        np.testing.assert_allclose(losses, losses_of(sums, draft, verify, lengths[:number]), atol=1e-9)
        assert np.array_equal(arms.losses(feedback, (draft, verify)), losses)  # asking changes nothing
        assert losses.shape == (len(draft) * (len(verify) - 1) + 1,)
        assert losses.min() >= 0 and losses.max() <= 1
        np.testing.assert_allclose(scaled.losses(feedback, (1e3 * draft, 1e3 * verify)), losses, atol=1e-9)
        arms.update(feedback)
        scaled.update(feedback)


@quick
@given(world=positions())
def test_equal_costs_leave_the_order_of_the_tokens_objective(world):
    lengths, draft, verify = world
    arms = arms_of(len(draft), len(verify) - 1)
    for number, sums in enumerate(lengths):
        losses = arms.losses(Feedback(None, number, sums), (np.zeros(len(draft)), np.full(len(verify), 3.0)))
        arms.update(Feedback(None, number, sums))
        emitted = np.append(sums.T.ravel(), 1.0)
        np.testing.assert_array_equal(np.argsort(-emitted, kind="stable"), np.argsort(losses.round(12), kind="stable"))


def test_mean_losses_rank_the_best_arms_first_as_tokens_a_second_do():
    """And tokens a round do not: the dear one has most of these."""
    random, draft, verify = np.random.default_rng(0), np.array([4.0, 0.5]), np.array(FLAT)
    arms, total = arms_of(2, K), 0.0
    for number in range(4000):
        accepted = (random.random((K, 2)) < (0.8, 0.7)).cumprod(axis=0)
        feedback = Feedback(None, number, 1.0 + accepted.cumsum(axis=0))
        total = total + arms.losses(feedback, (draft, verify))
        arms.update(feedback)
    rate = rates((0.8, 0.7), draft, verify)
    assert total.argmin() == K + 2 and rate[1].argmax() == K and rate.max() == rate[1, K]


def test_a_dear_drafter_does_not_squeeze_the_others():
    lengths = 1 + np.full((K, 3), 0.8).cumprod(axis=0).cumsum(axis=0)
    few = arms_of(2, K).losses(Feedback(None, 0, lengths[:, :2]), (np.array([1.0, 2.0]), np.array(FLAT)))
    more = arms_of(3, K).losses(Feedback(None, 0, lengths), (np.array([1.0, 2.0, 1e6]), np.array(FLAT)))
    np.testing.assert_allclose(np.delete(more, [6, 7, 8]), few, atol=1e-12)
    assert more[6:9].tolist() == [1.0, 1.0, 1.0]


def test_a_failed_drafter_sets_no_price():
    """Or else plain decoding would be measured against what nobody can do."""
    alive = np.array([True, False])
    arms, lengths = DraftersAndLengths(alive, K), np.ones((K, 2))
    lengths[:, 1] = 4.0
    losses = arms.losses(Feedback(None, 0, lengths), (np.ones(2), np.array(FLAT)))
    assert losses[-1] == 0.5  # plain decoding is the best there is: it costs what it is worth


# The selector


def selector_of(count: int, most: int = K, learner: str = "normal_hedge", **arguments) -> Selector:
    config = DecodeConfig(draft_length=most, objective="throughput", learner=learner)
    made = learners.make(learner, count * most + 1)
    return Selector([f"drafter-{number}" for number in range(count)], config, made, **arguments)


def test_arms_are_drafters_with_lengths_and_last_nobody():
    arms = arms_of(2, 3)
    assert [arms.choice(arm) for arm in range(7)] == [*(Choice(i, k) for i in (0, 1) for k in (1, 2, 3)), Choice(-1, 0)]
    assert arms.by_drafter(np.arange(7.0)).tolist() == [3.0, 12.0]
    of_drafters = Drafters(np.ones(2, dtype=bool), 3)
    assert [of_drafters.choice(arm) for arm in range(2)] == [Choice(0, 3), Choice(1, 3)]
    assert of_drafters.by_drafter(np.arange(2.0)).tolist() == [0.0, 1.0]


def test_a_draft_fits_the_room():
    for room, length in ((1, 0), (2, 1), (3, 2), (4, 3), (50, 3)):
        selector = selector_of(2)
        choice = selector.select(np.eye(7)[5], 0.3, room)
        assert choice == (Choice(1, length) if length else NO_DRAFT)
        assert selector.select(np.full(7, 1 / 7), 0.3, room, Choice(1, 3)) == choice


def test_what_is_measured_leaves_the_choice_alone():
    selector = selector_of(2)
    weights = np.array([0, 0.25, 0, 0, 0.25, 0, 0.5])
    assert selector.select(weights, 0.1, 100) == Choice(0, 2)
    for measured in (Choice(0, 3), Choice(1, 1), NO_DRAFT):
        assert selector.select(weights, 0.9, 100, measured) == measured
    assert selector.select(weights, 0.9, 100) == Choice(0, 2)  # nothing was evaluated since


def test_failed_drafters_are_no_arms():
    selector = selector_of(2)
    selector.select(np.eye(7)[1], 0.0, 100)
    selector.drop(0, "gone")
    weights = selector.weights()
    np.testing.assert_allclose(weights, [0, 0, 0, 0.25, 0.25, 0.25, 0.25])
    assert selector.select(weights, 0.0, 100) == Choice(1, 1)  # though nothing was evaluated since
    assert selector.select(weights, 0.0, 100, Choice(0, 2)) == Choice(1, 2)
    assert selector.select(np.eye(7)[6], 0.0, 100, Choice(0, 2)) == Choice(1, 2)
    selector.drop(1, "gone too")
    assert selector.weights().tolist() == [0, 0, 0, 0, 0, 0, 1]
    for measured in (None, Choice(0, 2)):
        assert selector.select(selector.weights(), 0.0, 100, measured) == NO_DRAFT


def test_what_is_known_before_the_costs_waits_for_them():
    random = np.random.default_rng(0)
    prob, ratio, seconds = random.random((2, 12)), random.random((2, 12)), (np.ones(2), np.array(STEEP))
    patient, informed = selector_of(2), selector_of(2)
    patient.observe(prob[:, :7], ratio[:, :7])
    assert not patient.stats.losses and patient.may_switch
    np.testing.assert_array_equal(patient.weights(), np.full(7, 1 / 7))
    patient.observe(prob[:, 7:], ratio[:, 7:], seconds)
    informed.observe(prob, ratio, seconds)
    np.testing.assert_allclose(patient.stats.losses, informed.stats.losses, atol=1e-15)
    np.testing.assert_array_equal(patient.weights(), informed.weights())
    assert len(patient.stats.losses) == 10 and patient.stats.losses[0].shape == (7,)
    assert patient.stats.regret.shape == (10,)


def test_losses_are_measured_by_every_position_that_was_learned_of_once():
    """Positions of the prompt and of the text, whether they had to wait for the costs or not."""
    random, seconds = np.random.default_rng(0), (np.array([1.0, 3.0]), np.array(STEEP))
    prompt, prob, ratio = random.random((2, 5)), random.random((2, 9)), random.random((2, 9))
    selector = selector_of(2)
    selector.warm_up(prompt, seconds)
    selector.observe(prob[:, :6], ratio[:, :6])
    selector.observe(prob[:, 6:], ratio[:, 6:], seconds)
    powers = prompt[None] ** np.arange(1, K + 1)[:, None, None]  # [K, N, T]
    lengths = [1 + powers[:, :, at].cumsum(axis=0) for at in range(5)]
    for at in range(9 - K + 1):
        alive = np.cumprod([np.ones(2), *ratio[:, at : at + K - 1].T], axis=0)
        lengths.append(1 + (alive * prob[:, at : at + K].T).cumsum(axis=0))
    expected = [losses_of(one, *seconds, lengths[:number]) for number, one in enumerate(lengths)]
    np.testing.assert_allclose([*selector.stats.prompt_losses, *selector.stats.losses], expected, atol=1e-12)


def test_a_prompt_stands_for_lengths_by_powers():
    prob, seconds = np.array([[0.5, 0.9], [0.2, 0.0]]), (np.ones(2), np.array(STEEP))
    cold, warm = selector_of(2), selector_of(2)
    cold.warm_up(prob)
    assert not cold.stats.prompt_losses
    np.testing.assert_array_equal(cold.weights(), np.full(7, 1 / 7))
    warm.warm_up(prob, seconds)
    lengths = [np.array([[1 + sum(one**j for j in range(1, k + 1)) for one in column] for k in (1, 2, 3)]) for column in prob.T]
    expected = [losses_of(sums, *seconds, lengths[:number]) for number, sums in enumerate(lengths)]
    np.testing.assert_allclose(warm.stats.prompt_losses, expected, atol=1e-12)
    own = learners.make("normal_hedge", 7)
    for losses in expected:
        own.update(losses)
    np.testing.assert_allclose(warm.weights(), own.weights(), atol=1e-9)


# The decoder


def test_a_warm_start_falls_back_before_the_first_round(target, priced):
    decoder = priced(target, [Flawed(target, 1)], (5.0,), STEEP)
    first = decoder.generate(prompt_of(1), max_new_tokens=40, seed=0).stats[0]
    assert first.prompt_losses == []  # nothing has a price yet
    assert first.lengths[:MEASURING] == [0, 1, 2, 3] * (FEWEST + 1)
    again = decoder.generate(prompt_of(2), max_new_tokens=20, seed=0).stats[0]
    assert len(again.prompt_losses) == 10 and set(again.lengths) == {0}
    assert again.to_dict()["lengths"] == again.lengths
    assert again.prompt_losses[0].shape == (K + 1,)


@pytest.mark.parametrize(
    "options", [{}, {"evaluate_every": 3}, {"proposal": "argmax"}, {"learner": "hedge"}, {"warm_start": 0}], ids=str
)
def test_greedy_text_is_the_targets_own_by_the_real_clock(target, options):
    """Stacks, others and prompt lookup, in rows of unequal lengths."""
    config = DecodeConfig(draft_length=K, objective="throughput", **options)
    decoder, expected = Decoder(target, pool(target, True), config), None
    for _ in range(2):
        out = decoder.generate(**batch_of(4), max_new_tokens=40, seed=1)
        expected = expected or target.generate(**batch_of(4), max_new_tokens=40, do_sample=False).tolist()
        assert out.sequences.tolist() == expected
        for stats in out.stats:
            assert not stats.failures and len(stats.lengths) == stats.rounds
            assert all(0 <= emitted - 1 <= drafted for emitted, drafted in zip(stats.emitted_by_round, stats.lengths))
            assert [choice >= 0 for choice in stats.choices] == [length > 0 for length in stats.lengths]
            assert all(len(weights) == 7 and 0 <= weights.sum() <= 1 + 1e-9 for weights in stats.weights)
    assert decoder.costs.of(4) is not None and len(out.stats[0].losses) > 0


@pytest.mark.parametrize(("draft", "verify"), [((0.1, 0.1, 0.1), FLAT), ((9.0, 0.1, 9.0), STEEP), ((99.0, 99.0, 99.0), STEEP)])
def test_coupled_a_seeds_text_is_the_same_by_any_clock(target, priced, draft, verify):
    request = {"max_new_tokens": 60, "temperature": 0.9, "seed": 4}
    drafters = [tiny_head(target, 1), tiny_head(target, 2), Flawed(target, 2)]
    plain = Decoder(target, drafters[:1], DecodeConfig(proposal="coupled"))
    expected = plain.generate(prompt_of(1), **request).sequences.tolist()
    decoder = priced(target, drafters, draft, verify, 0.1, proposal="coupled")
    for _ in range(2):
        assert decoder.generate(prompt_of(1), **request).sequences.tolist() == expected


def test_a_round_takes_as_many_uniforms_whatever_is_drafted(target, priced, monkeypatch):
    taken = []
    uniforms = Row.uniforms
    monkeypatch.setattr(Row, "uniforms", lambda row, count: taken.append(count) or uniforms(row, count))
    decoder = priced(target, [Flawed(target, 3), Flawed(target, 1)], (1.0, 1.0), STEEP)
    stats = decoder.generate(prompt_of(1), max_new_tokens=60, temperature=0.8, seed=0).stats[0]
    assert taken == [1] + [1 + K + (K + 1)] * stats.rounds
    assert set(stats.lengths) == {0, 1, 2, 3}


def test_a_failing_drafter_never_fails_a_request(target):
    expected = target.generate(prompt_of(0), max_new_tokens=40, do_sample=False).tolist()
    for drafters in ([Broken(lambda logits: 1 / 0)], [tiny_head(target, 1), Broken(lambda logits: logits * math.nan)]):
        decoder = Decoder(target, drafters, DecodeConfig(draft_length=K, objective="throughput"))
        with pytest.warns(UserWarning, match="broken is out of this request"):
            out = decoder.generate(prompt_of(0), max_new_tokens=40, seed=0)
        assert out.sequences.tolist() == expected
        assert list(out.stats[0].failures) == ["broken"]
        assert out.stats[0].weights[-1][[drafter.name for drafter in drafters].index("broken")] == 0


def test_costs_are_of_all_requests_and_a_copy_measures_anew(target, priced):
    decoder = priced(target, [Flawed(target, 2)], (2.0,), STEEP)
    decoder.generate(prompt_of(0), max_new_tokens=60, seed=0)
    draft, verify = decoder.costs.of(1)
    assert draft.tolist() == [2.0] and verify.tolist() == list(STEEP)
    assert copy.deepcopy(decoder).costs.of(1) is None
    assert Decoder(target, [NGramDrafter(VOCABULARY)]).costs is None


def test_rows_that_draft_together_are_charged_what_all_took(target, priced):
    """Of the longest draft among them; a part that drafts apart is not charged for another."""
    decoder = priced(target, [tiny_head(target, 1), tiny_head(target, 2), NGramDrafter(VOCABULARY)], (2.0, 2.0, 0.5), STEEP)
    decoder.generate(**batch_of(3), max_new_tokens=80, seed=0)
    draft, verify = decoder.costs.of(3)
    assert draft.tolist() == [2.0, 2.0, 0.5] and verify.tolist() == list(STEEP)


def test_a_device_is_waited_for_before_the_clock_is_read(monkeypatch):
    done = []
    stream = SimpleNamespace(synchronize=lambda: done.append("waited"))
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: done.append(device) or stream)
    costs = Costs(1, 1, lambda: done.append("read") or 1.5)
    gpu = torch.device("cuda", 1)
    assert Batch._now(SimpleNamespace(device=gpu, costs=costs)) == 1.5
    assert done == [gpu, "waited", "read"]
    done.clear()
    Batch._now(SimpleNamespace(device=torch.device("cpu"), costs=costs))
    assert done == ["read"]


def test_a_prior_of_drafters_is_spread_over_their_lengths():
    arms = DraftersAndLengths(np.ones(2, dtype=bool), 2)
    spread = arms.spread(np.array([3.0, 1.0]), 2)
    np.testing.assert_allclose(spread / spread.sum(), [0.3, 0.3, 0.1, 0.1, 0.2])


def test_a_state_goes_on_and_another_objectives_is_refused(target):
    drafters = [tiny_head(target, 1), NGramDrafter(VOCABULARY)]
    arms, tokens = (Decoder(target, drafters, DecodeConfig(draft_length=K, objective=one)) for one in ("throughput", "tokens"))
    state = arms.generate(prompt_of(0), max_new_tokens=60, seed=0).stats[0].learner_state
    again = arms.generate(prompt_of(1), max_new_tokens=10, seed=0, learner_state=state).stats[0]
    learner = arms.new_learner()
    learner.load_state_dict(state)
    np.testing.assert_allclose(again.weights[0], learner.weights()[:-1].reshape(2, K).sum(1))
    with pytest.raises(
        ValueError, match="learner_state: expected one over the 7 arms of objective 'throughput' with 2 drafters"
    ):
        arms.generate(prompt_of(0), max_new_tokens=4, learner_state=tokens.new_learner().state_dict())
    with pytest.raises(ValueError, match="state: expected num_drafters 2, got 7"):
        tokens.generate(prompt_of(0), max_new_tokens=4, learner_state=state)


def test_what_does_not_go_with_it_is_refused(target):
    with pytest.raises(ValueError, match="objective: expected one of"):
        DecodeConfig(objective="speed")
    with pytest.raises(ValueError, match="tree: expected None with objective 'throughput'"):
        DecodeConfig(objective="throughput", tree=Tree(2))
    lookup = NGramDrafter(VOCABULARY)
    for learner in ("ucb", "exp3", "fixed", "uniform"):
        with pytest.raises(ValueError, match=f"learner: expected one with full feedback .* got '{learner}'"):
            Decoder(target, [lookup], DecodeConfig(objective="throughput", learner=learner))
