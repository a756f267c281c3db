"""The proposer over what vLLM asked of it in a real run (`tests/vllm/record_calls.py`), and over made-up texts."""

from __future__ import annotations

import json
import sys
import types
from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.learners import ArgmaxEXP3, ArgmaxNormalHedge, ScoredFixedLearner

from hedgespec.config import DecodeConfig
from hedgespec.errors import EngineError, PoolError
from hedgespec.integrations.vllm.drafters import NGrams
from hedgespec.integrations.vllm.pool_config import VARIABLE
from hedgespec.integrations.vllm.token_pool import TokenProposer
from hedgespec.integrations.vllm.token_proposer import HedgeSpecProposer
from hedgespec.learners import FixedLearner

RECORDED = json.loads((Path(__file__).parent / "data" / "vllm_calls.json").read_text())


def texts_of(recorded: dict) -> dict[str, list[int]]:
    """All of every request's text."""
    texts = {name: list(tokens) for name, tokens in recorded["prompts"].items()}
    for call in recorded["calls"]:
        for name, length, new in zip(call["names"], call["lengths"], call["emitted"]):
            texts[name] = texts[name][: length - len(new)] + new
            assert len(texts[name]) == length or not new
    return texts


TEXTS = texts_of(RECORDED)


class Oracle:
    """A drafter that knows how texts go on, and is right in so many of ten places; it draws nothing from keys."""

    def __init__(self, right: int, texts=None, name: str = "oracle"):
        self.name, self.right = f"{name} {right}", right
        self.texts = [list(text) for text in texts or TEXTS.values()]
        self.known: dict[int, list[int]] = {}
        self.calls: list[str] = []

    def _after(self, text: list[int]) -> int:
        for whole in self.texts:
            if len(whole) > len(text) and whole[: len(text)] == text:
                return whole[len(text)] if (7 * len(text) + sum(text)) % 10 < self.right else 1
        return -1

    def extend(self, keys, tokens, keep):
        self.calls.append("extend")
        found = []
        for key, new, count in zip(keys, tokens, keep, strict=True):
            assert len(new) > 0
            text = self.known.setdefault(key, [])
            told = []
            for token in np.asarray(new).tolist():
                text.append(token)
                told.append(self._after(text))
            found.append(np.array(told[len(told) - min(count, len(told)) :], dtype=np.int64))
        return found

    def draft(self, keys, lengths):
        self.calls.append("draft")
        drafts = []
        for key, length in zip(keys, lengths, strict=True):
            text, draft = list(self.known[key]), []
            while len(draft) < length and (token := self._after(text)) >= 0:
                text.append(token)
                draft.append(token)
            drafts.append(draft)
        return drafts

    def drop(self, keys):
        for key in keys:
            self.known.pop(key, None)

    @property
    def requests(self):
        return len(self.known)


def proposer(drafters, **options) -> TokenProposer:
    own = {key: options.pop(key) for key in ("max_length", "max_requests", "ends", "seed", "warn", "clock") if key in options}
    config = DecodeConfig(
        **{"draft_length": 3, "proposal": "argmax", "learner": ArgmaxNormalHedge, "evaluate_every": 1} | options
    )
    return TokenProposer(drafters, config, **{"max_length": 256} | own)


def rows_of(call: dict, only: str | None = None) -> tuple[list[str], list[np.ndarray], list[int]]:
    rows = [
        (name, np.array(TEXTS[name][:length], dtype=np.int32), len(new))
        for name, length, new in zip(call["names"], call["lengths"], call["emitted"])
        if only in (None, name)
    ]
    return [list(column) for column in zip(*rows)] if rows else [[], [], []]


def replay(made: TokenProposer, named: bool, only: str | None = None) -> dict[str, list[list[int]]]:
    """Drafts by request, one entry a step in which it had a row; checks that no request has another's key."""
    drafts, keys, names_of = defaultdict(list), defaultdict(set), defaultdict(set)
    for call in RECORDED["calls"]:
        names, tokens, emitted = rows_of(call, only)
        found = made.propose(tokens, emitted, names if named else None)
        for name, draft, new in zip(names, found, emitted):
            drafts[name].append(draft)
            assert new or not draft
        for one in made.tracker.known.values():
            if one.step == made.tracker.step:
                keys[names[one.row]].add(one.key)
                names_of[one.key].add(names[one.row])
                assert one.tokens.tolist() == tokens[one.row].tolist()
        if named and only is None:
            made.retain(call["alive"])
            assert {one.name for one in made.tracker.known.values()} <= set(call["alive"])
    assert all(len(each) == 1 for each in keys.values())
    alike = {name for name, text in RECORDED["prompts"].items() if list(RECORDED["prompts"].values()).count(text) > 1}
    assert all(len(each) == 1 or each <= alike for each in names_of.values())
    return drafts


def test_the_recording_holds_what_it_is_for():
    calls = RECORDED["calls"]
    last = {}
    chunks = moves = waits = aborted = 0
    for call in calls:
        chunks += sum(not new for new in call["emitted"])
        for row, name in enumerate(call["names"]):
            moves += name in last and last[name] != row
            last[name] = row
        waits += sum(name in last and name not in call["names"] for name in call["alive"])
        aborted += any(name not in call["alive"] for name in ("3", "5") if name in last)
    assert chunks and moves and waits and aborted
    assert len(set(last.values())) < len(last)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("options", [{}, {"learner": ArgmaxEXP3}, {"evaluate_every": 4}, {"evaluate_every": "adaptive"}])
def test_a_request_among_others_is_drafted_for_as_if_alone(named, options):
    def pool():
        return [Oracle(3), Oracle(8), NGrams(name="lookup")]

    together = replay(proposer(pool(), **options), named)
    for name in RECORDED["prompts"]:
        if name in together:
            [(_, alone)] = replay(proposer(pool(), **options), named, name).items()
            assert together[name] == alone, name


@pytest.mark.parametrize("named", [True, False])
def test_the_best_drafter_drafts(named):
    made = proposer([Oracle(1), Oracle(9), Oracle(4)])
    replay(made, named)
    tally = made.tally
    assert tally.picks.argmax() == 1 and tally.picks[1] > 0.8 * tally.rounds
    rates = tally.acceptance / tally.scored
    assert rates == pytest.approx([0.1, 0.9, 0.4], abs=0.1)
    assert len(set(tally.scored.tolist())) == 1  # all are scored on all text


def test_the_tally_counts_what_came_of_the_drafts():
    made = proposer([Oracle(6)])
    last, expected = {}, [0, 0, 0]
    for call in RECORDED["calls"]:
        names, tokens, emitted = rows_of(call)
        for name in set(last) - set(call["names"]):
            last[name] = []  # what was drafted for one that waits is not verified
        drafts = made.propose(tokens, emitted, names)
        for name, new, draft in zip(names, call["emitted"], drafts):
            if handed := last.get(name):
                right = 0  # the last token is the target's own
                while right < min(len(handed), len(new) - 1) and handed[right] == new[right]:
                    right += 1
                expected = [expected[0] + 1, expected[1] + len(handed), expected[2] + right]
            last[name] = draft if new else []
    assert [made.tally.rounds, made.tally.drafted[0], made.tally.accepted[0]] == expected


def test_nothing_is_left():
    drafters = [Oracle(5), NGrams(name="lookup")]
    for named in (True, False):
        made = proposer(drafters, max_requests=3)
        replay(made, named)
        assert made.requests <= 3 + 8
        made.close()
        assert made.requests == 0 and all(drafter.requests == 0 for drafter in drafters)
        assert made.tally.requests >= len(RECORDED["prompts"]) - 2


def test_cadence_changes_no_score():
    rare, often = (proposer([Oracle(3), Oracle(6)], evaluate_every=every, learner=ScoredFixedLearner) for every in (5, 1))
    for made in (rare, often):
        replay(made, True)
    # What a request's last rounds emitted may be waiting for an evaluation that never came.
    assert (often.tally.scored >= rare.tally.scored).all() and (rare.tally.scored > 0.6 * often.tally.scored).all()
    assert rare.tally.acceptance / rare.tally.scored == pytest.approx(often.tally.acceptance / often.tally.scored, abs=0.06)


def test_a_learner_that_does_not_ask_is_not_told():
    drafters = [Oracle(3), Oracle(6)]
    made = proposer(drafters, learner=partial(FixedLearner, drafter=1))
    replay(made, True)
    assert made.tally.scored.tolist() == [0, 0] and made.tally.picks[0] == 0
    assert drafters[0].calls == []


class Broken(Oracle):
    def __init__(self, where: str, after: int):
        super().__init__(10, name=f"broken in {where}")
        self.where, self.after = where, after

    def _fail(self, where):
        self.after -= where == self.where
        if where == self.where and self.after < 0:
            raise RuntimeError("out of luck")

    def extend(self, *arguments):
        self._fail("extend")
        return super().extend(*arguments)

    def draft(self, *arguments):
        self._fail("draft")
        return super().draft(*arguments)

    def drop(self, keys):
        self._fail("drop")
        super().drop(keys)


@pytest.mark.parametrize("where", ["extend", "draft", "drop"])
@pytest.mark.parametrize("after", [0, 7])
def test_a_drafter_that_fails_fails_no_request(where, after):
    warned = []
    made = proposer([Broken(where, after), Oracle(7)], warn=warned.append)
    drafts = replay(made, True)
    assert set(drafts) <= set(TEXTS)
    assert all("broken in" in one and "out of luck" in one for one in warned) and warned
    if where != "drop":
        assert len(warned) == 1
        assert made.tally.failures == {f"broken in {where} 10": "RuntimeError: out of luck"}
        assert made.tally.picks[1] > 0


def test_room():
    made = proposer([Oracle(10, [range(2, 40)])], max_length=12)
    text = np.arange(2, 40)
    lengths = []
    for length in range(5, 13):
        [draft] = made.propose([text[:length]], [1])
        lengths.append(len(draft))
    assert lengths == [3, 3, 3, 3, 2, 1, 0, 0]


def test_the_warm_start_hears_the_prompt():
    text = list(range(2, 60))
    fast, slow = (proposer([Oracle(0, [text]), Oracle(10, [text])], warm_start=warm) for warm in (16, 0))
    for made in (fast, slow):
        made.propose([np.array(text[:31])], [1])
    [fast], [slow] = fast.tracker.known.values(), slow.tracker.known.values()
    assert fast.state.learner.selector.weights()[1] == 1
    assert len(fast.state.learner.selector.stats.prompt_losses) == 16 + 1
    assert len(slow.state.learner.selector.stats.prompt_losses) == 1  # the first token alone
    assert not fast.state.learner.selector.stats.losses


class Clock:
    """Drafting a token takes `draft` seconds, verifying one `verify` seconds beside a second for the forward."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Slow(Oracle):
    def __init__(self, clock, seconds, right, texts):
        super().__init__(right, texts)
        self.clock, self.seconds = clock, seconds

    def draft(self, keys, lengths):
        self.clock.now += self.seconds * max(lengths)
        return super().draft(keys, lengths)


@pytest.mark.parametrize(("seconds", "expected"), [(0.01, 1.0), (5.0, 0.0)])
def test_throughput_drafts_where_it_pays(seconds, expected):
    text = list(range(2, 902))
    clock = Clock()
    made = proposer([Slow(clock, seconds, 9, [text])], objective="throughput", clock=clock, max_length=2000)
    length, emitted, drafts = 5, 1, []
    while length < 850:
        [draft] = made.propose([np.array(text[:length])], [emitted])
        drafts.append(draft)
        right = next((place for place, token in enumerate(draft) if text[length + place] != token), len(draft))
        emitted = right + 1
        length += emitted
        clock.now += 1.0 + 0.01 * len(draft)
    late = drafts[len(drafts) // 2 :]
    assert np.mean([bool(draft) for draft in late]) == pytest.approx(expected, abs=0.15)


@pytest.fixture
def fake_vllm(monkeypatch):
    """As much of vLLM as the proposer reads when it is made; version and rank may be set."""
    module, distributed = types.ModuleType("vllm"), types.ModuleType("vllm.distributed")
    module.__version__, module.rank = "0.32.0", 0
    distributed.get_tensor_model_parallel_rank = lambda: module.rank
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.distributed", distributed)
    return module


def config_of(length: int = 3):
    model = types.SimpleNamespace(seed=0, max_model_len=256, hf_config=types.SimpleNamespace(eos_token_id=[2, 0]))
    return types.SimpleNamespace(
        model_config=model,
        scheduler_config=types.SimpleNamespace(max_num_seqs=8),
        speculative_config=types.SimpleNamespace(num_speculative_tokens=length),
    )


def pool(monkeypatch, *drafters, **more):
    monkeypatch.setenv(VARIABLE, json.dumps({"drafters": list(drafters), **more}))


def test_what_vllm_calls(fake_vllm, monkeypatch):
    pool(monkeypatch, {"type": "ngram", "name": "lookup"})
    made = HedgeSpecProposer(config_of())
    monkeypatch.setattr("hedgespec.integrations.vllm.token_proposer.check_sampling", lambda device: None)
    made.load_model(torch.nn.Linear(1, 1))
    table = np.zeros((8, 256), dtype=np.int32)
    table[0, :9] = [5, 6, 7, 8, 9, 5, 6, 7, 8]
    table[1, :4] = [5, 6, 7, 5]
    counts = np.array([9, 4] + [0] * 6)
    assert made.propose([[8], []], counts, table, slot_mappings=None) == [[9, 5, 6], []]
    assert made.report()["kept_requests"] == 1
    made.runner = types.SimpleNamespace(requests={"b": None}, input_batch=types.SimpleNamespace(req_ids=["a", "b"]))
    assert made.propose([[8], [5]], counts, table) == [[9, 5, 6], [6, 7, 5]]
    assert {one.name for one in made.core.tracker.known.values() if one.name} == {"b"}
    made.runner.requests.clear()
    made.forget()
    assert not [one for one in made.core.tracker.known.values() if one.name]


def test_other_ranks_hand_in_nothing(fake_vllm, monkeypatch):
    fake_vllm.rank = 1
    pool(monkeypatch, {"type": "ngram"})
    made = HedgeSpecProposer(config_of())
    made.load_model(torch.nn.Linear(1, 1))
    assert made.propose([[8], []], np.array([3, 3]), np.ones((2, 256), dtype=np.int32)) == [[], []]
    assert made.core is None and made.report() == {}


def test_mistakes_are_named(fake_vllm, monkeypatch):
    pool(monkeypatch, {"type": "ngram"})
    with pytest.raises(EngineError, match="num_speculative_tokens: expected at least 1, got None"):
        HedgeSpecProposer(config_of(None))
    fake_vllm.__version__ = "0.99.1"
    with pytest.raises(EngineError, match="expected vLLM 0.32.x or 0.33.x, got 0.99.1"):
        HedgeSpecProposer(config_of())
    fake_vllm.__version__ = "0.33.0"
    pool(monkeypatch, {"type": "eagle3", "model": "x"})
    with pytest.raises(PoolError, match="type: expected one of causal_lm, ngram, datastore, drafter, got 'eagle3'"):
        HedgeSpecProposer(config_of())
    for drafter, message in [
        ({"type": "causal_lm", "model": "no/such/model", "name": "small"}, "drafter small: "),
        ({"type": "causal_lm", "model": "m", "dtype": "floaty"}, "dtype: expected the name of a torch dtype, got 'floaty'"),
        ({"type": "drafter", "factory": "nothing"}, "factory: expected module.function, got 'nothing'"),
        ({"type": "ngram", "max_ngram": 0}, "max_ngram: expected at least 1, got 0"),
    ]:
        pool(monkeypatch, drafter)
        made = HedgeSpecProposer(config_of())
        made.model_config.dtype = torch.float32
        with pytest.raises(PoolError, match=message):
            made.load_model(torch.nn.Linear(1, 1))


def test_a_drafter_of_ones_own(fake_vllm, monkeypatch):
    factory = {"factory": "hedgespec.drafters.ngram.NGramDrafter", "options": {"vocab_size": 300, "max_ngram": 2}}
    pool(monkeypatch, {"type": "drafter", "name": "mine", **factory})
    monkeypatch.setattr("hedgespec.integrations.vllm.token_proposer.check_sampling", lambda device: None)
    made = HedgeSpecProposer(config_of())
    made.load_model(torch.nn.Linear(1, 1))
    table = np.array([[5, 6, 7, 8, 5]], dtype=np.int32)
    assert made.propose([[5]], np.array([5]), table) == [[6, 7, 8]]
    assert made.report()["drafters"] == ["mine"]
