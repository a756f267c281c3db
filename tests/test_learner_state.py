"""A learner's state in a file: what is read back is what was written, and nothing else is taken for it."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from helpers.decoding import VOCABULARY, prompt_of, target, tiny_head  # noqa: F401  a fixture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hedgespec
from hedgespec import learners
from hedgespec.config import DecodeConfig
from hedgespec.decoder import Decoder
from hedgespec.decoder.learner_state import FORMAT, VERSION, load_learner_state, save_learner_state
from hedgespec.drafters.ngram import NGramDrafter
from hedgespec.errors import LearnerStateError
from hedgespec.stats import DecodeStats

NAMES = ("one", "two", "three")
REQUEST = {"max_new_tokens": 24, "temperature": 1.0, "seed": 3}


class Pool:
    """As much of a decoder as a state is compared with."""

    def __init__(self, learner: str = "normal_hedge", names=NAMES, **options):
        self.drafters, self.learner, self.options = [NGramDrafter(5, name=name) for name in names], learner, options

    config = DecodeConfig()

    def new_learner(self) -> learners.Learner:
        return learners.make(self.learner, len(self.drafters), **self.options)


def state_after(pool: Pool, losses) -> dict:
    learner = pool.new_learner()
    for chosen, row in enumerate(losses):
        learner.update(row, chosen % 3, 0.5)
    return learner.state_dict()


def finished(state: dict, names=NAMES) -> DecodeStats:
    return DecodeStats(names, 4, learner_state=state)


@pytest.mark.parametrize("name", learners.NAMES)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(losses=st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), max_size=8))
def test_weights_after_the_file_are_the_same_to_the_last_bit(name, losses, tmp_path):
    pool, path = Pool(name), tmp_path / "state.json"
    state = state_after(pool, losses)
    save_learner_state(path, finished(state))
    read = load_learner_state(path, pool)
    assert read == state
    kept, other = pool.new_learner(), pool.new_learner()
    kept.load_state_dict(state)
    other.load_state_dict(read)
    assert kept.weights().tobytes() == other.weights().tobytes()


def test_the_file_says_what_it_is(tmp_path):
    save_learner_state(tmp_path / "state.json", finished(state_after(Pool(), [])))
    saved = json.loads((tmp_path / "state.json").read_text())
    assert {name: saved[name] for name in ("format", "version", "drafters")} == {
        "format": "hedgespec-learner-state", "version": 1, "drafters": list(NAMES)
    }  # fmt: skip
    assert saved["state"]["name"] == "normal_hedge"
    assert hedgespec.load_learner_state is load_learner_state and hedgespec.save_learner_state is save_learner_state


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "state.json"
    save_learner_state(path, finished(state_after(Pool(), [])))
    before = path.read_bytes()

    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        save_learner_state(path, finished(state_after(Pool(), [[0.1, 0.2, 0.3]])))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["state.json"]
    with pytest.raises(LearnerStateError, match="stats: expected those of a finished request"):
        save_learner_state(path, finished({}))


def test_a_link_stays_a_link(tmp_path):
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "state.json")
    save_learner_state(link, finished(state_after(Pool(), [])))
    assert link.is_symlink() and (tmp_path / "state.json").exists()


GOOD = {"format": FORMAT, "version": VERSION, "drafters": list(NAMES), "state": state_after(Pool(), [[0.1, 0.9, 0.5]])}


def with_state(**fields) -> dict:
    return {**GOOD, "state": {**GOOD["state"], **fields}}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "as JSON"),
        ("{", "as JSON"),
        (b"\xff\xfe{}", "as JSON"),
        ("[" * 100_000, "as JSON"),
        ("null", "a JSON object, got null"),
        ([GOOD], "a JSON object, got list"),
        ({}, f"format '{FORMAT}', got None"),
        ({**GOOD, "format": "hedgespec-zoo-1"}, "format .* got 'hedgespec-zoo-1'"),
        ({**GOOD, "version": 2}, "version 1, got 2; a newer one"),
        ({**GOOD, "version": 0}, "version 1, got 0"),
        ({**GOOD, "version": "1"}, "version as int, got str"),
        ({**GOOD, "version": True}, "version as int, got bool"),
        ({**GOOD, "drafters": "one"}, "drafters as list, got str"),
        ({**GOOD, "drafters": ["one", "two", "four"]}, "drafters .*'three'.* got .*'four'"),
        ({**GOOD, "drafters": ["two", "one", "three"]}, r"in this order, got \['two', 'one', 'three'\]"),
        ({**GOOD, "drafters": ["one", "two"]}, r"got \['one', 'two'\]"),
        ({**GOOD, "state": None}, "state as dict, got null"),
        *(({field: value for field, value in GOOD.items() if field != left}, f"none called {left}")
          for left in ("version", "drafters", "state")),
        ({**GOOD, "state": {}}, "'regrets'.* missing"),
        ({**GOOD, "state": state_after(Pool("hedge"), [])}, "expected name 'normal_hedge', got 'hedge'"),
        (with_state(name="ucb"), "expected name 'normal_hedge', got 'ucb'"),
        (with_state(num_drafters=2), "expected num_drafters 3, got 2"),
        (with_state(regrets=[0.0, 0.0]), "expected regrets finite, of shape"),
        (with_state(regrets=[[0.0] * 3]), "expected regrets finite, of shape"),
        (with_state(regrets=[0.0, float("nan"), 0.0]), "NaN is no JSON number"),
        (with_state(regrets=[0.0, -float("inf"), 0.0]), "-Infinity is no JSON number"),
        (json.dumps(with_state(regrets=["x", 0.0, 0.0])).replace('"x"', "1e999"), "expected regrets finite"),
        (with_state(regrets=["1", "2", "3"]), "expected regrets as numbers"),
        (with_state(regrets=[None, 0.0, 0.0]), "expected regrets as numbers"),
        (with_state(regrets=[True, False, True]), "expected regrets as numbers"),
        (with_state(regrets=[[0.0], 0.0, 0.0]), "expected regrets as numbers"),
        (with_state(regrets=[10**400, 0, 0]), "expected regrets as numbers"),
        (with_state(regrets={"0": 1.0}), "expected regrets as numbers"),
        (with_state(prior=["a", "b", "c"]), "expected prior as numbers"),
        (with_state(prior=[0.5, 0.5]), "prior: expected shape"),
        (with_state(prior=[0.5, 0.7, -0.2]), "prior: expected finite non-negative"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, str) else "",
)  # fmt: skip
def test_what_is_no_state_of_this_decoder_is_refused(text, words, tmp_path):
    path = tmp_path / "state.json"
    path.write_bytes(text if isinstance(text, bytes) else (text if isinstance(text, str) else json.dumps(text)).encode())
    with pytest.raises(LearnerStateError, match=words) as refused:
        load_learner_state(path, Pool())
    assert str(refused.value).startswith(f"{path}: ")


def test_no_file_is_refused(tmp_path):
    with pytest.raises(LearnerStateError, match=r"none\.json: expected a learner's state, found no file"):
        load_learner_state(tmp_path / "none.json", Pool())


@pytest.mark.parametrize(
    ("pool", "fields", "words"),
    [
        (Pool("hedge", eta=0.5), {"eta": 0.25}, "expected eta 0.5, got 0.25"),
        (Pool("hedge"), {"rounds": -1}, "expected rounds of at least 0"),
        (Pool("hedge"), {"rounds": 0.5}, "expected rounds a count"),
        (Pool("ucb"), {"counts": [1.0, -1.0, 2.0]}, "expected counts of at least 0"),
        (Pool("ada_normal_hedge"), {"absolute_regrets": [1.0, -1.0, 2.0]}, "expected absolute_regrets of at least 0"),
        (Pool("fixed", drafter=1), {"drafter": 2}, "expected drafter 1, got 2"),
    ],
    ids=lambda value: value.learner if isinstance(value, Pool) else "",
)
def test_other_options_and_numbers_out_of_range_are_refused(pool, fields, words, tmp_path):
    path = tmp_path / "state.json"
    save_learner_state(path, finished({**state_after(pool, []), **fields}))
    with pytest.raises(LearnerStateError, match=words):
        load_learner_state(path, pool)


@pytest.mark.parametrize("learner", ["normal_hedge", "ada_normal_hedge", "meta_sd", "exp3"])
def test_a_tenants_requests_through_files_are_as_if_never_saved(target, learner, tmp_path):
    drafters = [tiny_head(target, 1), tiny_head(target, 2), NGramDrafter(VOCABULARY)]
    decoder, path, handed = Decoder(target, drafters, DecodeConfig(draft_length=3, learner=learner)), tmp_path / "tenant", None
    for number in range(4):
        read = load_learner_state(path, decoder) if number else None
        through, straight = (
            decoder.generate(prompt_of(number), learner_state=state, **REQUEST) for state in (read, handed)
        )  # fmt: skip
        assert through.sequences.tolist() == straight.sequences.tolist()
        assert np.array(through.stats[0].weights).tobytes() == np.array(straight.stats[0].weights).tobytes()
        handed = straight.stats[0].learner_state
        save_learner_state(path, through.stats[0])


def test_a_folder_or_what_is_no_path_as_the_file(tmp_path):
    stats = finished(state_after(Pool(), []))
    with pytest.raises(LearnerStateError, match=r"expected a file with a learner's state, got a folder"):
        load_learner_state(tmp_path, Pool())
    with pytest.raises(LearnerStateError, match=r"expected a file to write a learner's state to, got a folder"):
        save_learner_state(tmp_path, stats)
    for wrong in (None, 3, [], stats):
        with pytest.raises(TypeError, match="path: expected a str or a path, got"):
            load_learner_state(wrong, Pool())
        with pytest.raises(TypeError, match="path: expected a str or a path, got"):
            save_learner_state(wrong, stats)
    with pytest.raises(LearnerStateError, match="stats: expected those of a finished request"):
        save_learner_state(tmp_path / "state.json", [stats])
    assert not list(tmp_path.iterdir())
