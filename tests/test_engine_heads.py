"""Learning which head drafts, by words alone."""

from __future__ import annotations

import numpy as np
import pytest

from hedgespec.config import DecodeConfig
from hedgespec.integrations.vllm.head_pool import ABSTAINS, HeadLearning
from hedgespec.learners import NormalHedge
from hedgespec.records import NO_DRAFT

HEADS = ("good", "bad", "worse")


def learning(**config) -> tuple[HeadLearning, list[str]]:
    warned: list[str] = []
    return HeadLearning(HEADS, DecodeConfig(draft_length=3, proposal="argmax", **config), seed=0, warn=warned.append), warned


def round_of(good: int, tokens: int) -> np.ndarray:
    """The first head is right everywhere, the second at so many tokens, the third nowhere."""
    scores = np.zeros((3, tokens))
    scores[0], scores[1, :good] = 1, 1
    return scores


def test_the_best_head_is_followed_and_counted():
    heads, _ = learning()
    heads.begin("a")
    drafted = []
    for _ in range(60):
        choice = heads.choose("a", 4)
        drafted.append(choice.drafter)
        emitted = 4 if choice.drafter == 0 else 1
        scores = round_of(1, emitted)
        heads.learn("a", scores, scores, choice.draft_length)
    assert drafted[-20:] == [0] * 20
    tally = heads.tally
    assert tally.rounds == 60 and tally.picks.tolist() == [drafted.count(head) for head in range(3)]
    assert tally.accepted.tolist() == [3 * drafted.count(0), 0, 0] and tally.drafted.sum() == 180
    assert (tally.scored == tally.emitted).all() and tally.acceptance[0] == tally.emitted
    heads.forget(["a", "unknown"])
    assert not heads.requests and tally.requests == 1 and heads.is_new("a")


def test_a_prompt_is_heard_first():
    heads, _ = learning(warm_start=16)
    assert heads.warm == 16
    heads.begin("a", np.array([[0.0] * 16, [0.0] * 16, [1.0] * 16]))
    assert all(heads.choose("a", 4).drafter == 2 for _ in range(10))
    assert learning(learner="exp3")[0].warm == 0  # it hears of its own drafts only


def test_words_are_of_a_place():
    heads, _ = learning()
    heads.begin("a")
    assert heads.proposals("a", 7) is None
    heads.propose("a", 7, np.array([5, 6, ABSTAINS]), np.ones(3, dtype=bool))
    assert heads.proposals("a", 7).tolist() == [5, 6, ABSTAINS]
    assert heads.proposals("a", 8) is None  # the engine went on without asking


def test_evaluations_may_be_rarer():
    heads, _ = learning(evaluate_every=3)
    heads.begin("a")
    scored = []
    for _ in range(7):
        heads.choose("a", 4)
        heads.learn("a", round_of(1, 2), round_of(1, 2), 3)
        scored.append(int(heads.tally.scored[0]))
    assert scored == [0, 0, 6, 6, 6, 12, 12]
    assert learning()[0].config.evaluate_every == 1  # "adaptive" saves nothing here


def test_a_head_that_is_not_finite_is_out_of_its_request():
    heads, warned = learning()
    heads.begin("a")
    heads.begin("b")
    for _ in range(2):
        heads.propose("a", 3, np.arange(3), np.array([False, True, True]))
    assert warned == ["drafter good returned values that are not finite and is out of the request"]
    assert all(heads.choose("a", 4).drafter != 0 for _ in range(20))
    assert any(heads.choose("b", 4).drafter == 0 for _ in range(20))
    assert heads.tally.failures == {"good": "not finite"}


def test_a_head_that_fails_is_out_of_all():
    heads, warned = learning()
    heads.begin("a")
    for head in (0, 0, 1):
        heads.drop(head, "no memory")
    heads.begin("b")
    assert warned == [f"drafter {name} failed and is out of all requests: no memory" for name in HEADS[:2]]
    assert {heads.choose(name, 4).drafter for name in "ab" for _ in range(20)} == {2}
    heads.drop(2, "no memory")
    assert heads.choose("a", 4) == NO_DRAFT
    heads.learn("a", np.zeros((3, 1)), np.zeros((3, 1)), 0)  # the text goes on
    assert heads.tally.emitted == 1 and heads.tally.rounds == 0


def test_rounds_without_a_draft():
    heads, _ = learning()
    heads.begin("a")
    assert heads.choose("a", 1) == NO_DRAFT
    heads.learn("a", round_of(1, 1), round_of(1, 1), 0)
    assert heads.tally.rounds == 0 and heads.tally.emitted == 1 and heads.tally.scored.tolist() == [1, 1, 1]


def test_mistakes_are_told_at_once():
    with pytest.raises(ValueError, match="got 'magic'"):
        learning(learner="magic")
    with pytest.raises(ValueError, match="learner: expected one over 3 arms, got one over 2"):
        learning(learner=lambda arms: NormalHedge(2))
