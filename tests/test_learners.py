"""Learners: one contract for all of them, then each against its own formula, written a second time."""

from __future__ import annotations

import json
from math import e, exp, log, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hedgespec import learners
from hedgespec.learners import EXP3Spec, Hedge, MetaSD, NormalHedge, UCBSpec, make

FULL = tuple(name for name in learners.NAMES if make(name, 1).feedback == "full")
BANDIT = tuple(name for name in learners.NAMES if make(name, 1).feedback == "bandit")
NEEDS_POSITIVE_PRIOR = ("normal_hedge", "hedge", "ada_normal_hedge", "exp3")

every_learner = pytest.mark.parametrize("name", learners.NAMES)
full_learners = pytest.mark.parametrize("name", FULL)
quick = settings(max_examples=25, deadline=None)
unit = st.floats(0, 1)


@st.composite
def streams(draw, max_drafters=8, max_rounds=12):
    """A prior, the losses of some rounds, and who was chosen in each."""
    n = draw(st.integers(1, max_drafters))
    prior = draw(st.none() | st.lists(st.floats(1e-3, 1), min_size=n, max_size=n))
    losses = draw(st.lists(st.lists(unit, min_size=n, max_size=n), max_size=max_rounds))
    chosen = draw(st.lists(st.integers(0, n - 1), min_size=len(losses), max_size=len(losses)))
    return prior, np.array(losses).reshape(-1, n), chosen


def feed(learner, losses, chosen):
    for row, drafter in zip(losses, chosen):
        learner.update(row, drafter, 0.5)
    return learner


def at(learner, **state):
    """The learner, put into a state no short stream would reach."""
    learner.load_state_dict({**learner.state_dict(), **state})
    return learner


def assert_simplex(weights, n):
    assert weights.dtype == np.float64 and weights.shape == (n,)
    assert (weights >= 0).all() and weights.sum() == pytest.approx(1, abs=1e-12)


# The contract


@every_learner
@quick
@given(stream=streams())
def test_weights_lie_on_the_simplex(name, stream):
    prior, losses, chosen = stream
    learner = make(name, losses.shape[1], prior)
    assert_simplex(learner.weights(), losses.shape[1])
    for row, drafter in zip(losses, chosen):
        learner.update(row, drafter, 0.25)
        assert_simplex(learner.weights(), losses.shape[1])


@every_learner
@quick
@given(stream=streams(), cut=st.integers(0, 12))
def test_a_saved_state_continues_identically(name, stream, cut):
    prior, losses, chosen = stream
    learner = feed(make(name, losses.shape[1], prior), losses[:cut], chosen[:cut])
    other = make(name, losses.shape[1])
    other.load_state_dict(json.loads(json.dumps(learner.state_dict())))
    for row, drafter in zip(losses[cut:], chosen[cut:]):
        learner.update(row, drafter, 0.5)
        other.update(row, drafter, 0.5)
        assert learner.weights().tobytes() == other.weights().tobytes()
    assert learner.state_dict() == other.state_dict()


@pytest.mark.parametrize("name", (*FULL, "exp3"))
@quick
@given(stream=streams(), seed=st.integers(0, 2**32 - 1))
def test_the_order_of_the_drafters_does_not_matter(name, stream, seed):
    prior, losses, chosen = stream
    n = losses.shape[1]
    order = np.random.default_rng(seed).permutation(n)
    place = order.argsort()  # drafter i of the original is drafter place[i] of the shuffled pool
    original = feed(make(name, n, prior), losses, chosen)
    shuffled = feed(make(name, n, None if prior is None else np.array(prior)[order]), losses[:, order], place[chosen])
    np.testing.assert_allclose(shuffled.weights(), original.weights()[order], rtol=1e-9, atol=1e-12)


@full_learners
@quick
@given(stream=streams(max_drafters=4))
def test_drafters_that_tie_weigh_the_same(name, stream):
    _, losses, chosen = stream
    doubled = feed(make(name, 2 * losses.shape[1]), np.hstack([losses, losses]), chosen).weights()
    first, second = np.split(doubled, 2)
    np.testing.assert_allclose(first, second, rtol=1e-12)


@every_learner
def test_one_drafter_always_has_all_the_weight(name):
    learner = make(name, 1)
    for loss in (0.0, 1.0, 0.3, 1.0):
        learner.update([loss], chosen=0)
        assert learner.weights().tolist() == [1.0]


@every_learner
def test_weights_are_the_callers_to_keep(name):
    learner = make(name, 3)
    before = learner.weights().tolist()
    learner.weights()[:] = 7.0
    assert learner.weights().tolist() == before


@pytest.mark.parametrize("name", (*FULL, "exp3", "uniform"))
def test_learners_start_from_the_normalised_prior(name):
    np.testing.assert_allclose(make(name, 3).weights(), 1 / 3, rtol=1e-12)
    np.testing.assert_allclose(make(name, 3, [4, 1, 3]).weights(), [0.5, 0.125, 0.375], rtol=1e-12)


@full_learners
@pytest.mark.parametrize("size", (1e300, 1e150, 1.0, 1e-300, 5e-324))
def test_no_state_is_too_large_or_small(name, size):
    regrets = size * np.array([1.0, 0.5, 0.0, -1.0, 1.0])
    states = {
        "normal_hedge": {"regrets": regrets},
        "hedge": {"cumulative_losses": -regrets},
        "ada_normal_hedge": {"regrets": regrets, "absolute_regrets": abs(regrets)},
    }
    with np.errstate(over="raise", invalid="raise"):
        weights = at(make(name, 5), **states[name]).weights()
    assert_simplex(weights, 5)
    assert weights[0] == weights[4] == weights.max()
    assert weights[3] == weights.min()


@every_learner
def test_wrong_losses_are_refused_and_change_nothing(name):
    learner = make(name, 3)
    before = learner.state_dict()
    wrong = [[0.1, 0.2], [[0.1, 0.2, 0.3]]]
    if learner.feedback != "none":
        wrong += [[0.1, value, 0.2] for value in (-0.01, 1.01, float("inf"))]
        wrong += [[float("nan")] * 3, [float("nan"), 1.01, float("nan")]]
    if learner.feedback == "bandit":
        wrong += [[0.1, float("nan"), 0.2]]
    for losses in wrong:
        with pytest.raises(ValueError, match="losses: expected"):
            learner.update(losses, chosen=1, chosen_weight=0.5)
    assert learner.state_dict() == before


@every_learner
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(name):
    learner = feed(make(name, 3), [[0.1, 0.9, 0.5]], [1])
    before = learner.state_dict()
    other = "uniform" if name == "fixed" else "fixed"
    wrong = {
        "name": make(other, 3).state_dict(),
        "num_drafters": make(name, 4).state_dict(),
        "prior": {**before, "prior": [0.5, 0.5]},
        "missing": {"name": name, "num_drafters": 3},
    }
    wrong |= {field: {**before, field: [float("nan")] * 3} for field in learner.STATE}
    if "rounds" in learner.STATE:
        wrong["rounds"] = {**before, "rounds": 1.5}
    for said, state in wrong.items():
        with pytest.raises(ValueError, match=said):
            learner.load_state_dict(state)
    assert learner.state_dict() == before


@every_learner
def test_priors_are_checked(name):
    wrong = ([0.5, 0.5], [[1, 1, 1]], [1, -1, 1], [0, 0, 0], [1, float("nan"), 1], [1, float("inf"), 1])
    for prior in wrong:
        with pytest.raises(ValueError, match="prior: expected"):
            make(name, 3, prior)
    if name in NEEDS_POSITIVE_PRIOR:
        with pytest.raises(ValueError, match="every entry positive"):
            make(name, 3, [1, 0, 1])
    else:
        assert make(name, 3, [1, 0, 1]).weights()[1] == 0


def test_make_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"name: expected one of .*normal_hedge.*got 'no_such'"):
        make("no_such", 2)
    with pytest.raises(ValueError, match="num_drafters: expected at least 1, got 0"):
        make("hedge", 0)
    with pytest.raises(TypeError, match=r"hedge takes \('eta',\), got \['drafter', 'rate'\]"):
        make("hedge", 2, rate=1, drafter=1)
    with pytest.raises(TypeError, match="normal_hedge takes none"):
        make("normal_hedge", 2, eta=1.0)
    with pytest.raises(ValueError, match="eta: expected"):
        make("hedge", 2, eta=0.0)
    with pytest.raises(ValueError, match=r"drafter: expected 0\.\.1, got 2"):
        make("fixed", 2, drafter=2)


# Full information


def bisected_normal_hedge(prior, regrets):
    """The defining equation as it stands, solved for c by bisection; only for regrets of ordinary size."""
    positive = [max(r, 0.0) for r in regrets]
    largest = max(positive)
    if largest == 0:
        return list(prior)
    low, high = largest**2 / (2 * (1 + log(1 / min(prior)))), largest**2 / 2
    for _ in range(200):
        c = (low + high) / 2
        if sum(pi * exp(r * r / (2 * c)) for pi, r in zip(prior, positive)) > e:
            low = c
        else:
            high = c
    weights = [pi * r / c * exp(r * r / (2 * c)) for pi, r in zip(prior, positive)]
    return [w / sum(weights) for w in weights]


@settings(max_examples=120, deadline=None)
@given(data=st.data(), n=st.integers(1, 9), size=st.sampled_from((1e-3, 1.0, 50.0, 1e4)))
def test_normal_hedge_solves_its_equation(data, n, size):
    regrets = size * np.array(data.draw(st.lists(st.floats(-1, 1, width=32), min_size=n, max_size=n)))
    prior = np.array(data.draw(st.lists(st.floats(1e-6, 1), min_size=n, max_size=n)))
    learner = at(NormalHedge(n, prior), regrets=regrets)
    expected = bisected_normal_hedge((prior / prior.sum()).tolist(), regrets.tolist())
    np.testing.assert_allclose(learner.weights(), expected, rtol=1e-9, atol=1e-12)


@quick
@given(regrets=st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=7), power=st.sampled_from((-200, 100, 290)))
def test_normal_hedge_depends_on_ratios_of_regrets_only(regrets, power):
    scaled = [r * 10.0**power for r in regrets]
    n = len(regrets)
    np.testing.assert_allclose(
        at(NormalHedge(n), regrets=scaled).weights(), at(NormalHedge(n), regrets=regrets).weights(), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("name", ("normal_hedge", "ada_normal_hedge"))
def test_no_positive_regret_means_the_prior(name):
    for regrets in ([-1.0, -2.0, -1.5], [-1e300, -1.0, -7.0]):
        learner = make(name, 3, [1, 2, 5])
        state = {"regrets": regrets, **({"absolute_regrets": np.abs(regrets)} if name != "normal_hedge" else {})}
        np.testing.assert_allclose(at(learner, **state).weights(), [0.125, 0.25, 0.625], rtol=1e-15)
    np.testing.assert_array_equal(at(NormalHedge(2, [1, 3]), regrets=[0.0, 0.0]).weights(), [0.25, 0.75])


def test_regrets_are_counted_with_the_weights_in_force():
    losses = np.random.default_rng(0).random((20, 4))
    learner, regrets = NormalHedge(4, [1, 2, 3, 4]), np.zeros(4)
    for row in losses:
        regrets += learner.weights() @ row - row
        learner.update(row)
    np.testing.assert_allclose(learner.regrets, regrets, rtol=1e-13, atol=1e-15)


def test_hedge_matches_its_formula():
    losses = np.random.default_rng(1).random((30, 5))
    prior = np.array([0.1, 0.2, 0.3, 0.15, 0.25])
    fixed, decreasing = Hedge(5, prior, eta=0.7), Hedge(5, prior)
    for t, row in enumerate(losses, start=1):
        fixed.update(row)
        decreasing.update(row)
        total = losses[:t].sum(axis=0)
        for learner, eta in ((fixed, 0.7), (decreasing, sqrt(8 * log(5) / (t + 1)))):
            weights = prior * np.exp(-eta * total)
            np.testing.assert_allclose(learner.weights(), weights / weights.sum(), rtol=1e-12)


def test_a_state_with_other_options_is_refused():
    for learner, state in (
        (Hedge(2, eta=0.5), Hedge(2).state_dict()),
        (make("fixed", 2, drafter=0), make("fixed", 2, drafter=1).state_dict()),
    ):
        with pytest.raises(ValueError, match="state: expected (eta|drafter)"):
            learner.load_state_dict(state)


def test_ada_normal_hedge_matches_its_formula():
    def phi(regret, scale):
        return exp(max(regret, 0.0) ** 2 / (3 * scale))

    losses = np.random.default_rng(2).random((40, 4)) * [1, 0.8, 0.9, 0.6]
    prior = np.array([0.4, 0.3, 0.2, 0.1])
    learner, regrets, scales = make("ada_normal_hedge", 4, prior), np.zeros(4), np.zeros(4)
    for row in losses:
        instantaneous = learner.weights() @ row - row
        regrets += instantaneous
        scales += abs(instantaneous)
        learner.update(row)
        weights = prior * [(phi(r + 1, c + 1) - phi(r - 1, c + 1)) / 2 for r, c in zip(regrets, scales)]
        np.testing.assert_allclose(learner.weights(), weights / weights.sum(), rtol=1e-10)


# Losses that are unknown for some drafters


@full_learners
@quick
@given(stream=streams(max_rounds=20), cut=st.integers(0, 20))
def test_an_unknown_loss_leaves_the_regret_as_it_is(name, stream, cut):
    """Written once more, for any weights: the expected loss is over the drafters whose losses are known."""
    prior, losses, _ = stream
    learner, n = make(name, losses.shape[1], prior), losses.shape[1]
    if n == 1:
        return
    regrets, spread, total = np.zeros(n), np.zeros(n), np.zeros(n)
    for t, row in enumerate(losses):
        known = np.arange(n) != 0 if t >= cut else np.ones(n, dtype=bool)
        weights = learner.weights() if learner.weights()[known].any() else learner.prior
        expected = float((weights[known] * row[known]).sum() / weights[known].sum())
        given_losses = np.where(known, row, np.nan)
        assert learner.expected_loss(given_losses) == pytest.approx(expected, abs=1e-12)
        learner.update(given_losses)
        regrets += np.where(known, expected - row, 0)
        spread += np.where(known, abs(expected - row), 0)
        total += np.where(known, row, expected)
    state = {"regrets": regrets, "absolute_regrets": spread, "cumulative_losses": total}
    for field in set(learner.STATE) & state.keys():
        np.testing.assert_allclose(getattr(learner, field), state[field], atol=1e-12)
    assert json.loads(json.dumps(learner.state_dict())) == learner.state_dict()
    assert_simplex(learner.weights(), n)


HORIZON, POOL = 1000, 7


def punish_the_favourite(weights, t, rng):
    return np.eye(POOL)[weights.argmax()]


def coin_flips(weights, t, rng):
    return rng.integers(0, 2, POOL).astype(float)


def one_better(weights, t, rng):
    return np.where(np.arange(POOL) == 3, 0.2, 0.8) * rng.random(POOL)


def best_changes_half_way(weights, t, rng):
    return np.where(np.arange(POOL) == (1 if t < HORIZON // 2 else 5), 0.0, 1.0)


def fool_the_leader_follower(weights, t, rng):
    losses = np.ones(POOL)
    losses[:2] = (0.5, 0.0) if t == 0 else (t % 2, 1 - t % 2)
    return losses


def normal_hedge_bound(n, horizon):
    """Leading term of Chaudhuri, Freund, Hsu 2009, Theorem 1, at the best action: at this horizon the whole bound is
    above what even the uniform learner suffers, so it could not fail."""
    return sqrt(3 * (1 + log(n)) * horizon)


def hedge_bound(n, horizon):
    """Cesa-Bianchi, Lugosi 2006, Theorem 2.3: eta_t = sqrt(8 ln N / t)."""
    return 2 * sqrt(horizon / 2 * log(n)) + sqrt(log(n) / 8)


def ada_normal_hedge_bound(n, horizon):
    """Luo, Schapire 2015, Theorem 1, uniform prior, one comparator, C_T <= T."""
    return sqrt(3 * horizon * (log(n) + log(2.5 + 1.5 * log(1 + horizon)) + log(1 + log(n))))


@pytest.mark.parametrize(
    "adversary",
    (punish_the_favourite, coin_flips, one_better, best_changes_half_way, fool_the_leader_follower),
    ids=lambda adversary: adversary.__name__,
)
@pytest.mark.parametrize(
    ("name", "options", "bound"),
    (
        ("normal_hedge", {}, normal_hedge_bound(POOL, HORIZON)),
        ("hedge", {}, hedge_bound(POOL, HORIZON)),
        # Cesa-Bianchi, Lugosi 2006, Theorem 2.2: the fixed rate for a known horizon.
        ("hedge", {"eta": sqrt(8 * log(POOL) / HORIZON)}, sqrt(HORIZON / 2 * log(POOL))),
        ("ada_normal_hedge", {}, ada_normal_hedge_bound(POOL, HORIZON)),
    ),
    ids=("normal_hedge", "hedge", "hedge_fixed_eta", "ada_normal_hedge"),
)
def test_regret_stays_under_the_theorem(name, options, bound, adversary):
    learner, rng = make(name, POOL, **options), np.random.default_rng(3)
    suffered, totals = 0.0, np.zeros(POOL)
    for t in range(HORIZON):
        weights = learner.weights()
        losses = adversary(weights, t, rng)
        learner.update(losses)
        suffered += weights @ losses
        totals += losses
    assert suffered - totals.min() <= bound


# Bandits


@pytest.mark.parametrize("name", BANDIT)
def test_bandits_read_the_chosen_loss_only(name):
    rng = np.random.default_rng(4)
    complete, masked = make(name, 4), make(name, 4)
    for _ in range(30):
        losses, chosen = rng.random(4), int(rng.integers(4))
        complete.update(losses, chosen, 0.3)
        masked.update(np.where(np.arange(4) == chosen, losses, np.nan), chosen, 0.3)
    assert complete.state_dict() == masked.state_dict()


@pytest.mark.parametrize("name", BANDIT)
def test_bandits_check_the_choice(name):
    learner = make(name, 2)
    for chosen in (None, -1, 2):
        with pytest.raises(ValueError, match=r"chosen: .*0\.\.1"):
            learner.update([0.5, 0.5], chosen)
    for weight in (0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="chosen_weight: expected"):
            learner.update([0.5, 0.5], 1, weight)


def test_ucb_plays_each_once_then_follows_its_index():
    means, rng = (0.3, 0.5, 0.4, 0.35), np.random.default_rng(5)
    learner, rewards = UCBSpec(4), [[] for _ in means]
    for t in range(400):
        played = int(learner.weights().argmax())
        assert learner.weights().tolist() == np.eye(4)[played].tolist()
        if t < 4:
            assert played == t
        else:
            index = [sum(r) / len(r) + sqrt(2 * log(t) / len(r)) for r in rewards]
            assert index[played] == pytest.approx(max(index), rel=1e-12)
        reward = means[played] * rng.random() * 2
        rewards[played].append(reward)
        learner.update([1 - reward] * 4, played)
    assert learner.counts.argmax() == 1


def test_meta_sd_is_ucb_on_other_losses():
    rng, ucb, meta = np.random.default_rng(7), UCBSpec(3, [1, 2, 1]), MetaSD(3, [1, 2, 1])
    for _ in range(50):
        assert meta.weights().tolist() == ucb.weights().tolist()
        losses, chosen = rng.random(3), int(ucb.weights().argmax())
        for learner in (ucb, meta):
            learner.update(losses, chosen)
    assert MetaSD.hears_scores and not UCBSpec.hears_scores
    with pytest.raises(ValueError, match="state: expected name 'meta_sd', got 'ucb'"):
        meta.load_state_dict(ucb.state_dict())


def test_ucb_opens_by_prior_and_breaks_ties_by_index():
    learner, played = UCBSpec(3, [1, 2, 2]), []
    for _ in range(4):
        played.append(int(learner.weights().argmax()))
        learner.update([0.5] * 3, played[-1])
    assert played == [1, 2, 0, 0]


def test_exp3_matches_its_formula():
    rng, learner, estimates = np.random.default_rng(6), EXP3Spec(3, [1, 1, 2]), np.zeros(3)
    for t in range(1, 60):
        weights = np.array([0.25, 0.25, 0.5]) * np.exp(-sqrt(log(3) / (3 * t)) * estimates)
        weights /= weights.sum()
        np.testing.assert_allclose(learner.weights(), weights, rtol=1e-11)
        chosen, losses = int(rng.choice(3, p=weights)), rng.random(3)
        estimates[chosen] += losses[chosen] / weights[chosen]
        learner.update(losses, chosen)


def test_exp3_weights_late_feedback_with_the_probability_of_the_draw():
    learner = EXP3Spec(2)
    drawn_with = learner.weights()[0]
    for _ in range(5):  # meanwhile the weights move on
        learner.update([0.0, 1.0], chosen=1, chosen_weight=0.5)
    assert abs(learner.weights()[0] - drawn_with) > 0.1
    learner.update([0.8, 0.0], chosen=0, chosen_weight=drawn_with)
    assert learner.loss_estimates[0] == 0.8 / drawn_with


def test_exp3_estimates_are_unbiased():
    losses, start = np.array([0.9, 0.1, 0.4]), feed(EXP3Spec(3), [[0.3, 0.6, 0.2]] * 3, [0, 1, 1])
    expectation = np.zeros(3)
    for chosen, probability in enumerate(start.weights()):
        learner = at(EXP3Spec(3), **start.state_dict())
        learner.update(losses, chosen)
        expectation += probability * (learner.loss_estimates - start.loss_estimates)
    np.testing.assert_allclose(expectation, losses, rtol=1e-12)


def test_exp3_survives_extreme_estimates():
    for estimates in ([1e300, 0.0, 5.0], [1e300, 1e300, 1e300]):
        assert_simplex(at(EXP3Spec(3), loss_estimates=estimates).weights(), 3)


# Baselines


def test_baselines_never_learn():
    fixed, preferred, uniform = make("fixed", 3, drafter=2), make("fixed", 3, [1, 3, 2]), make("uniform", 3, [2, 1, 1])
    for learner in (fixed, preferred, uniform):
        learner.update([1.0, float("nan"), 0.0])
    assert fixed.weights().tolist() == [0, 0, 1]
    assert preferred.weights().tolist() == [0, 1, 0]
    assert uniform.weights().tolist() == [0.5, 0.25, 0.25]
