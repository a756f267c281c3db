"""The pool's file: what it may hold, and what is said of what it may not."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hedgespec.config import DecodeConfig
from hedgespec.errors import PoolError
from hedgespec.integrations.vllm.pool_config import TOKENS_ONLY, VARIABLE, read_pool

TYPES = ("causal_lm", "ngram", "datastore", "drafter")
LOOKUP = {"type": "ngram", "name": "lookup"}


def read(found, types=TYPES, length=4):
    text = found if isinstance(found, str) else json.dumps(found)
    return read_pool(length, types, environment={VARIABLE: text})


def test_json_and_a_file(tmp_path):
    drafters = [LOOKUP, {"type": "causal_lm", "model": "m", "dtype": "float32"}]
    learning = {"learner": "hedge", "learner_options": {"eta": 0.3}, "prior": [0.75, 0.25], "objective": "throughput"}
    told = {"drafters": drafters, **learning, "seed": 3, "log_every": 0.5}
    (path := tmp_path / "pool.json").write_text(json.dumps(told))
    for pool in (read(told), read(str(path))):
        assert pool.names == ("lookup", "causal_lm")
        assert pool.drafters[1].options == {"model": "m", "dtype": "float32"}
        learner = pool.decode.learner(2 * 4 + 1)
        assert (learner.name, learner.eta, pool.decode.draft_length) == ("hedge", 0.3, 4)
        np.testing.assert_allclose(learner.prior, np.append(np.repeat([0.75, 0.25], 4), 0.5) / 4.5)
        assert (pool.decode.proposal, pool.decode.objective, pool.seed, pool.log_every) == ("argmax", "throughput", 3, 0.5)
    assert read(str(path)).source == str(path)


def test_what_is_left_out():
    pool = read({"drafters": [LOOKUP]})
    assert (pool.decode.learner, pool.decode.objective, pool.log_every) == ("normal_hedge", "tokens", 60)
    assert (pool.decode.warm_start, pool.decode.evaluate_every) == (DecodeConfig.warm_start, DecodeConfig.evaluate_every)
    told = {"drafters": [LOOKUP], "warm_start": 9}
    pool = read_pool(2, TYPES, defaults=TOKENS_ONLY, environment={VARIABLE: json.dumps(told)})
    assert (pool.decode.warm_start, pool.decode.evaluate_every) == (9, 1)
    assert read_pool(2, TYPES, environment={VARIABLE: json.dumps({"drafters": [LOOKUP]})}, seed=7).seed == 7


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ("", "HEDGESPEC_POOL: expected a path to a JSON file, or JSON, that describes the pool of drafters, got nothing"),
        ("no/such/file.json", "expected a readable JSON file, or JSON, got no/such/file.json"),
        ("{", "HEDGESPEC_POOL: expected JSON, got an error in line 1"),
        ({"drafters": []}, "drafters: expected a list of at least one drafter, got \\[\\]"),
        ({}, "drafters: expected a list of at least one drafter, got None"),
        ({"drafters": ["lookup"]}, "drafters\\[0\\]: expected an object, got 'lookup'"),
        ({"drafters": [{"type": "magic"}]}, "drafters\\[0\\]: type: expected one of causal_lm, .*, got 'magic'"),
        ({"drafters": [LOOKUP, LOOKUP]}, "expected distinct names, got lookup more than once"),
        ({"drafters": [LOOKUP | {"name": 3}]}, "name: expected a text, got 3"),
        ({"drafters": [LOOKUP | {"max_ngrams": 3}]}, "expected options among max_ngram for type ngram, got max_ngrams"),
        ({"drafters": [LOOKUP | {"max_ngram": "3"}]}, "max_ngram: expected int, got '3'"),
        ({"drafters": [LOOKUP | {"max_ngram": True}]}, "max_ngram: expected int, got True"),
        ({"drafters": [{"type": "causal_lm"}]}, "drafters\\[0\\]: model: expected one for type causal_lm, got none"),
        ({"drafters": [LOOKUP], "lerner": "ucb"}, "expected keys among .*, got lerner"),
        ({"drafters": [LOOKUP], "learner": "magic"}, "normal_hedge.*got 'magic'"),
        ({"drafters": [LOOKUP], "learner_options": {"magic": 1}}, "magic"),
        ({"drafters": [LOOKUP], "learner": "ucb", "objective": "throughput"}, "learner: expected one with full feedback"),
        ({"drafters": [LOOKUP], "prior": [0.5, 0.5]}, "prior: expected shape"),
        ({"drafters": [LOOKUP], "log_every": -1}, "log_every: expected a number of at least 0, got -1"),
        ({"drafters": [LOOKUP], "seed": 0.5}, "seed: expected a number of at least 0, got 0.5"),
        ("[1]", "expected a readable JSON file, or JSON, got"),
    ],
)  # fmt: skip
def test_mistakes(found, message):
    with pytest.raises(PoolError, match=message):
        read(found)


def test_a_file_that_holds_a_list(tmp_path):
    (path := tmp_path / "pool.json").write_text("[1]")
    with pytest.raises(PoolError, match="expected a JSON object, got list"):
        read(str(path))
