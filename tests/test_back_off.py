"""Drafters that sleep: when, what they are spared, and that what they missed comes late and whole."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decoder import prompt_of, tiny_head, tiny_llama
from test_pool import batch_of, pool

from hedgespec.config import DecodeConfig, Tree
from hedgespec.decoder import Decoder
from hedgespec.decoder.back_off import LONGEST_SLEEP, MOST_MISSED, BackOff
from hedgespec.decoder.pool import Heads, Singles
from hedgespec.decoder.row import Row
from hedgespec.decoder.selector import Selector
from hedgespec.delay import DelayQueue
from hedgespec.drafters.ngram import NGramDrafter
from hedgespec.drafters.stack import StackSession
from hedgespec.learners import make


@pytest.fixture(scope="module")
def target():
    return tiny_llama(seed=0, layers=4)


# The schedule


def test_sleeps_double_up_to_the_longest():
    """Drafter 1 is hopeless from the first evaluation on, drafter 0 never, drafter 2 has weight now and then."""
    back_off, asked = BackOff(DelayQueue(3, 2), 3), []
    for number in range(100):
        asked.append(back_off.ask(False, np.zeros(3, dtype=bool), np.zeros(3)))
        back_off.judge(np.array([False, True, number % 3 > 0]))
    asked = np.array(asked)
    assert asked[:, [0, 2]].all()
    left_out = np.diff(np.flatnonzero(asked[:, 1])) - 1
    assert left_out.tolist() == [0, 0, 1, 2, 4, 8, 16, 16, 16, 16]
    assert LONGEST_SLEEP == 16


def test_who_has_weight_is_awake_at_once_and_falls_asleep_after_as_long_again():
    back_off, asked = BackOff(DelayQueue(2, 2), 2), []
    for number in range(24):
        asked.append(back_off.ask(False, np.zeros(2, dtype=bool), np.zeros(2))[1])
        back_off.judge(np.array([False, number != 8]))
    # Scored twice, then it sleeps 1, 2; found to have weight at the evaluation after 4 more it would not have been asked for.
    assert [int(one) for one in asked[:14]] == [1, 1, 0, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0]
    back_off, asked = BackOff(DelayQueue(2, 2), 2), []
    for number in range(12):
        asked.append(back_off.ask(False, np.zeros(2, dtype=bool), np.zeros(2))[1])
        back_off.judge(np.array([False, number != 6]))
    assert [int(one) for one in asked] == [1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 1, 0]


def test_everyone_is_asked_at_the_end_and_who_has_weight_or_missed_much_or_was_drawn_before():
    def asleep():
        back_off = BackOff(DelayQueue(2, 2), 1)
        for _ in range(7):
            back_off.ask(False, np.zeros(2, dtype=bool), np.zeros(2))
            back_off.judge(np.array([False, True]))
        return back_off

    nobody, little = np.zeros(2, dtype=bool), np.array([3, MOST_MISSED])
    assert asleep().ask(False, nobody, little).tolist() == [True, False]
    assert asleep().ask(True, nobody, little).all()
    assert asleep().ask(False, np.array([False, True]), little).all()
    assert asleep().ask(False, nobody, little + 1).all()
    woken = asleep()
    woken.wake(1)
    assert woken.ask(False, nobody, little).all()


def test_an_evaluation_that_was_under_way_is_none_that_was_slept_for():
    """Overlapped, one begins before the one before it is learned from."""
    back_off, asked = BackOff(DelayQueue(2, 2), 1), []
    for number in range(12):
        asked.append(int(back_off.ask(False, np.zeros(2, dtype=bool), np.zeros(2))[1]))
        if number:
            back_off.judge(np.array([False, True]))
    # Put to sleep by the first while the second is under way; then each sleep ends before the next, twice as long, begins.
    assert asked == [1, 1, 0, 1, 1, 0, 0, 1, 1, 0, 0, 0]


# Selection and learning, without models


def drive(config, prob, ratio, sizes, lost=None):
    """A request whose evaluations cover `sizes` tokens, [N, T] or [K, N, T]; who was asked, the selector, and its weights.

    `lost`: (drafter, evaluation) at which it leaves.
    """
    count = prob.shape[-2]
    selector = Selector([str(i) for i in range(count)], config, make(config.learner, count, **config.learner_options))
    missed, at, masks, weights = np.zeros(count, dtype=np.int64), 0, [], []
    for number, size in enumerate(sizes):
        missed += size
        asked = selector.to_score(number == len(sizes) - 1, missed)
        if lost is not None and lost[1] == number:
            selector.lose(lost[0], "broken")
        seen = [one[..., at : at + size].copy() for one in (prob, ratio)]
        for drafter in np.flatnonzero(asked & selector.alive & (missed > size)).tolist():
            before = slice(at + size - missed[drafter], at)
            selector.catch_up(drafter, prob[..., drafter, before], ratio[..., drafter, before])
        for one in seen:
            one[..., ~asked, :] = np.nan
            one[..., ~selector.alive, :] = 0
        selector.observe(*seen)
        missed[asked] = 0
        masks.append(asked)
        weights.append(selector.learner.weights())
        at += size
    learned = len(selector.stats.losses)
    selector.close()
    return np.array(masks), selector, weights, learned


@st.composite
def worlds(draw):
    """Draft length, acceptance of drafters of different skill at every position, by depth or not, and sizes of evaluations."""
    count, length, by_depth = draw(st.integers(2, 5)), draw(st.integers(1, 5)), draw(st.booleans())
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (length, count, sum(sizes)) if by_depth else (count, sum(sizes))
    skill = rng.random((count, 2))[:, (np.arange(sum(sizes)) >= draw(st.integers(0, 100))).astype(int)]
    prob, ratio = (np.where(rng.random(shape) < skill, rng.random(shape), 0) for _ in range(2))
    return length, prob, ratio, sizes


@settings(max_examples=150, deadline=None)
@given(world=worlds(), learner=st.sampled_from(["normal_hedge", "hedge", "ada_normal_hedge"]), patience=st.integers(1, 3),
       loss=st.sampled_from(["length", "acceptance_rate"]), estimator=st.sampled_from(["exact", "product"]))  # fmt: skip
def test_in_the_end_every_loss_is_known_and_is_what_it_always_was(world, learner, patience, loss, estimator):
    length, prob, ratio, sizes = world
    options = {"draft_length": length, "loss": loss, "estimator": estimator, "learner": learner}
    _, always, _, _ = drive(DecodeConfig(**options), prob, ratio, sizes)
    masks, backed, _, learned = drive(DecodeConfig(**options, back_off=patience), prob, ratio, sizes)
    np.testing.assert_array_equal(backed.stats.losses, always.stats.losses)
    assert len(backed.stats.played) == len(always.stats.played)
    assert learned - len(always.stats.losses) <= (length - 1 if loss == "length" else 0)
    assert masks[-1].all() and masks.any(1).all()
    assert (masks.sum(0) == backed.stats.evaluations).all()
    assert np.isfinite(backed.stats.regret).all()


def hopeless(count, positions, seed=0):
    """One drafter is far better than all others throughout."""
    rng = np.random.default_rng(seed)
    skill = np.r_[0.9, rng.uniform(0.05, 0.3, count - 1)]
    return tuple((skill[:, None] * rng.uniform(0.8, 1.0, (count, positions))) for _ in range(2))


@pytest.mark.parametrize("learner", ["normal_hedge", "ada_normal_hedge"])
@pytest.mark.parametrize("patience", [1, 4])
@pytest.mark.parametrize("length", [1, 4])
def test_who_never_had_weight_was_not_missed(learner, patience, length):
    """The learner ends in the very state, bit for bit, with a fraction of the scoring."""
    sizes = [3] * 80
    prob, ratio = hopeless(5, sum(sizes))
    options = {"draft_length": length, "learner": learner}
    _, always, weights, _ = drive(DecodeConfig(**options), prob, ratio, sizes)
    masks, backed, others, learned = drive(DecodeConfig(**options, back_off=patience), prob, ratio, sizes)
    assert learned == len(always.stats.losses)  # ratios above 0: no loss is complete early, no tail to differ by
    assert backed.learner.state_dict() == always.learner.state_dict()
    assert backed.stats.played == always.stats.played
    np.testing.assert_array_equal(others, weights)
    assert masks[:, 0].all()
    assert (masks[:, 1:].sum(0) <= patience + 12).all()  # ada_normal_hedge leaves them some weight at first
    assert (masks[:, 1:].sum(0) >= 5).all()


@pytest.mark.parametrize("learner", ["normal_hedge", "hedge", "ada_normal_hedge"])
def test_one_that_becomes_the_best_is_found_within_a_sleep(learner):
    """Always evaluating it gets weight at some evaluation; backing off at most a sleep and one evaluation later."""
    sizes, shift = [3] * 300, 120
    prob, ratio = hopeless(4, sum(sizes))
    for one in (prob, ratio):
        one[[0, 2], 3 * shift :] = one[[2, 0], 3 * shift :]
    options = {"draft_length": 3, "learner": learner}
    _, always, weights, _ = drive(DecodeConfig(**options), prob, ratio, sizes)
    masks, backed, others, _ = drive(DecodeConfig(**options, back_off=3), prob, ratio, sizes)

    def found(weights):
        return int(np.flatnonzero(np.array(weights)[shift:, 2] > 0.5)[0]) + shift

    assert not masks[shift - 30 : shift, 2].all()
    assert np.diff(np.flatnonzero(masks[:, 2])).max() <= LONGEST_SLEEP + 1
    assert found(weights) <= found(others) <= found(weights) + LONGEST_SLEEP + 1
    assert masks[found(others) :, 2].all()
    assert backed.stats.regret[-1] <= always.stats.regret[-1] + 3 * (LONGEST_SLEEP + 1)


def test_no_more_is_missed_than_is_kept():
    sizes = [20] * 60
    prob, ratio = hopeless(3, sum(sizes))
    masks, *_ = drive(DecodeConfig(draft_length=2, back_off=1), prob, ratio, sizes)
    longest = np.diff(np.flatnonzero(masks[:, 1])).max()
    assert longest == MOST_MISSED // 20 + 1


@pytest.mark.parametrize("when", range(0, 40, 3))
def test_a_drafter_may_be_lost_asleep_or_awake(when):
    """What is not known of it by then counts as nothing accepted, as of any lost one."""
    sizes = [3] * 40
    prob, ratio = hopeless(4, sum(sizes))
    for drafter in range(4):
        config = DecodeConfig(draft_length=4, back_off=1)
        _, selector, _, _ = drive(config, prob, ratio, sizes, lost=(drafter, when))
        losses = np.array(selector.stats.losses)
        assert np.isfinite(losses).all() and len(losses) >= sum(sizes) - 3
        gone = 3 * when
        np.testing.assert_array_equal(losses[gone:, drafter], 4 / 5)
        _, always, _, _ = drive(DecodeConfig(draft_length=4), prob, ratio, sizes)
        others = np.delete(losses, drafter, 1)
        np.testing.assert_array_equal(others, np.delete(always.stats.losses, drafter, 1)[: len(others)])


@pytest.mark.parametrize("learner", ["ucb", "exp3", "uniform", "fixed"])
def test_without_an_effect_where_the_learner_does_not_hear_of_all(target, learner):
    config = DecodeConfig(draft_length=3, learner=learner, track_regret=True, back_off=1)
    stats = Decoder(target, pool(target, True), config).generate(prompt_of(1), max_new_tokens=30, seed=0).stats[0]
    assert len(set(stats.evaluations.tolist())) == 1


def test_wrong_values_are_refused():
    for value in (0, -1):
        with pytest.raises(ValueError, match=f"back_off: expected at least 1 or None, got {value}"):
            DecodeConfig(back_off=value)
    for value in (1.0, True, "adaptive"):
        with pytest.raises(TypeError, match="back_off: expected an int or None, got"):
            DecodeConfig(back_off=value)


# With models


class Passes:
    """Counts what drafters were asked for: (drafter, row) pairs scored, by kind of part, the prompts' left out."""

    def __init__(self, monkeypatch):
        self.by_drafter: Counter[tuple[int, int]] = Counter()
        self.subsets = 0
        for part in (Heads, Singles):
            self._watch(monkeypatch, part)

    def _watch(self, monkeypatch, part):
        score = part.score

        def watched(itself, rows, counts, members):
            for row in rows:
                if row.stats.rounds or row.length > row.prompt_length + 1:
                    self.by_drafter.update((row.index, itself.members[member]) for member in members)
            self.subsets += len(members) < len(itself.members)
            return score(itself, rows, counts, members)

        monkeypatch.setattr(part, "score", watched)


VARIANTS = {
    "every round": {"evaluate_every": 1},
    "every third": {"evaluate_every": 3},
    "adaptive": {},
    "overlapped": {"evaluate_every": 1, "overlap": True},
    "hedge": {"evaluate_every": 1, "learner": "hedge", "learner_options": {"eta": 4.0}},
    "ada_normal_hedge": {"evaluate_every": 1, "learner": "ada_normal_hedge"},
    "argmax, acceptance rate": {"evaluate_every": 1, "mode": "argmax", "loss": "acceptance_rate"},
    "tree": {"evaluate_every": 1, "tree": Tree((2, 2, 1)), "mode": "argmax"},
    "window": {"evaluate_every": 1, "drafter_window": 16},
    "cold": {"evaluate_every": 1, "warm_start": 0},
}


@pytest.mark.parametrize(
    ("variant", "stacked"), [*((variant, True) for variant in VARIANTS), ("every round", False), ("tree", False)]
)
def test_the_text_is_the_targets_own_and_the_losses_are_those_of_always_evaluating(target, monkeypatch, variant, stacked):
    """Rows with sleepers of their own, two stacks of unequal heads and two other drafters: at temperature 0 texts are the
    same, so losses have to be. Nobody who sleeps is computed."""
    options, request = VARIANTS[variant], batch_of(3) | {"max_new_tokens": 40, "seed": 3}
    always = Decoder(target, pool(target, stacked), DecodeConfig(draft_length=3, **options)).generate(**request)
    passes = Passes(monkeypatch)
    backed = Decoder(target, pool(target, stacked), DecodeConfig(draft_length=3, back_off=1, **options)).generate(**request)
    plain = target.generate(**batch_of(3), max_new_tokens=40, do_sample=False)
    assert backed.sequences.tolist() == always.sequences.tolist() == plain.tolist()
    for index, (one, other) in enumerate(zip(backed.stats, always.stats)):
        assert not one.failures
        if variant != "window":  # which is a little wider where one sleeps
            np.testing.assert_allclose(one.losses, other.losses, atol=1e-9)
        assert np.isfinite(one.losses).all() and len(one.losses) == len(one.played)
        assert [passes.by_drafter[index, drafter] for drafter in range(7)] == one.evaluations.tolist()
        assert len(set(other.evaluations.tolist())) == 1
    if variant not in ("every third", "adaptive"):  # of so short a text they evaluate little
        assert sum(one.evaluations.sum() for one in backed.stats) < 0.95 * sum(one.evaluations.sum() for one in always.stats)
        assert passes.subsets
        assert len({tuple(one.evaluations.tolist()) for one in backed.stats}) > 1


@pytest.mark.parametrize("tree", [None, Tree((2, 1, 1))], ids=["chain", "tree"])
def test_coupled_texts_and_losses_are_the_same(target, tree):
    request = batch_of(3) | {"max_new_tokens": 40, "temperature": 0.8, "seed": 1}
    config = {"draft_length": 3, "mode": "coupled", "evaluate_every": 1, "tree": tree}
    always, backed = (
        Decoder(target, pool(target, True), DecodeConfig(**config, back_off=back_off)).generate(**request)
        for back_off in (None, 1)
    )
    assert backed.sequences.tolist() == always.sequences.tolist()
    for one, other in zip(backed.stats, always.stats):
        np.testing.assert_allclose(one.losses, other.losses, atol=1e-9)
        assert one.evaluations.sum() < other.evaluations.sum()


def test_processed_texts_are_the_same(target):
    """Logits that the caller processes are processed for a late evaluation as for a prompt one."""
    options = {"do_sample": False, "max_new_tokens": 40, "repetition_penalty": 1.3, "return_dict_in_generate": True}
    found = []
    for back_off in (None, 1):
        decoder = Decoder(target, pool(target, True), DecodeConfig(draft_length=3, evaluate_every=1, back_off=back_off))
        found.append(target.generate(prompt_of(2), custom_generate=decoder, **options))
    assert found[0].sequences.tolist() == found[1].sequences.tolist()
    always, backed = (out.hedgespec[0] for out in found)
    np.testing.assert_allclose(backed.losses, always.losses, atol=1e-9)
    assert backed.evaluations.sum() < always.evaluations.sum()


def test_the_targets_logits_are_kept_for_sleepers_and_no_longer(target, monkeypatch):
    kept, were_scored = [], Row.were_scored

    def watched(row, drafters):
        were_scored(row, drafters)
        kept.append(sum(map(len, row.unscored)))
        assert kept[-1] == row.missed.max()
        assert all(one.untyped_storage().nbytes() == one.nbytes for one in row.unscored)  # and nothing else with them

    monkeypatch.setattr(Row, "were_scored", watched)
    config = DecodeConfig(draft_length=3, evaluate_every=1, back_off=1)
    out = Decoder(target, pool(target, True), config).generate(prompt_of(1, 5), max_new_tokens=200, seed=0)
    assert kept[-1] == 0
    assert 16 < max(kept) <= MOST_MISSED + 4
    assert out.sequences.tolist() == target.generate(prompt_of(1, 5), max_new_tokens=200, do_sample=False).tolist()


def test_a_sleeper_that_fails_when_it_catches_up_is_lost_alone(target, monkeypatch):
    drafters = [tiny_head(target, 1), tiny_head(target, 2), NGramDrafter(tiny_llama(seed=0, layers=1).config.vocab_size)]
    session, slept = drafters[2].session, []

    def watched():
        one = session()
        prefill = one.prefill

        def faulty(tokens, features, keep):
            if one.verified > 20 and len(tokens) > 12:
                slept.append(len(tokens))
                raise RuntimeError("broken")
            return prefill(tokens, features, keep)

        one.prefill = faulty
        return one

    monkeypatch.setattr(drafters[2], "session", watched)
    state = make("normal_hedge", 3)
    for _ in range(50):
        state.update([0.1, 0.2, 0.9])
    config = DecodeConfig(draft_length=3, evaluate_every=1, back_off=1)
    with pytest.warns(UserWarning, match="is out of this request: RuntimeError: broken"):
        out = Decoder(target, drafters, config).generate(
            prompt_of(1), max_new_tokens=80, seed=0, learner_state=state.state_dict()
        )
    assert slept and list(out.stats[0].failures) == [drafters[2].name]
    assert out.sequences.tolist() == target.generate(prompt_of(1), max_new_tokens=80, do_sample=False).tolist()
    assert np.isfinite(out.stats[0].losses).all()


def test_stacked_heads_that_fail_together_catch_up_apart(target, monkeypatch):
    """Their sessions begin anew, each with all that it has to be scored on."""
    calls, score = [], StackSession.score

    def faulty(self, *arguments):
        calls.append(arguments[4])
        if len(calls) > 12 and arguments[4] is not None:
            raise RuntimeError("out of memory")
        return score(self, *arguments)

    request = batch_of(2) | {"max_new_tokens": 60, "seed": 0}
    config = DecodeConfig(draft_length=3, evaluate_every=1, back_off=1)
    heads = [tiny_head(target, seed) for seed in (1, 2, 3)]
    always = Decoder(target, heads, DecodeConfig(draft_length=3, evaluate_every=1)).generate(**request)
    monkeypatch.setattr(StackSession, "score", faulty)
    with pytest.warns(UserWarning, match="stacked heads work apart from now on"):
        out = Decoder(target, heads, config).generate(**request)
    assert out.sequences.tolist() == always.sequences.tolist()
    for one, other in zip(out.stats, always.stats):
        assert not one.failures
        np.testing.assert_allclose(one.losses, other.losses, atol=1e-9)


def test_nobody_sleeps_unless_asked_to(target):
    for learner in ("normal_hedge", "hedge"):
        config = DecodeConfig(draft_length=3, learner=learner, evaluate_every=1)
        stats = Decoder(target, pool(target, True), config).generate(prompt_of(1), max_new_tokens=40, seed=0).stats[0]
        assert stats.evaluations.tolist() == [stats.rounds] * 7
        assert stats.to_dict()["evaluations"] == [stats.rounds] * 7


def test_a_sleeper_that_is_drawn_drafts_and_wakes(target, monkeypatch):
    """All that have weight fail: whoever slept takes over, brought up to date."""
    heads = [tiny_head(target, 1), NGramDrafter(tiny_llama(seed=0, layers=1).config.vocab_size)]
    lead, calls = Heads.lead, []

    def faulty(part, rows, members):
        calls.append(1)
        going, logits = lead(part, rows, members)
        return going, logits * torch.nan if len(calls) > 8 else logits

    monkeypatch.setattr(Heads, "lead", faulty)
    state = make("normal_hedge", 2)
    for _ in range(400):
        state.update([0.0, 1.0])
    config = DecodeConfig(draft_length=3, evaluate_every=1, back_off=1)
    with pytest.warns(UserWarning, match="head-1 is out of this request"):
        out = Decoder(target, heads, config).generate(prompt_of(1), max_new_tokens=60, seed=0, learner_state=state.state_dict())
    stats = out.stats[0]
    assert out.sequences.tolist() == target.generate(prompt_of(1), max_new_tokens=60, do_sample=False).tolist()
    assert stats.choices[-3] == 1 and stats.evaluations[1] < stats.rounds
    assert np.isfinite(stats.losses).all()
