"""Several EAGLE-3 heads in vLLM, on the zoo's target and heads. Run with vLLM's Python, alone:

    PYTHONPATH=. python -m pytest tests/vllm/test_vllm_eagle.py

Each engine runs in a process of its own (`eagle_engine.py`), once for all tests of the module.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.vllm

HEADS = ("python", "sql", "scripture", "french")
DRAFT_LENGTH = 5
NARROW = ("k_proj.weight", "v_proj.weight")
TIE = 1e-3
"""Difference of two logits below which either may be the larger one after rounding, float32."""


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> SimpleNamespace:
    """The target's folder, the heads' folders, and prompts of the heads' domains in turns with their domains."""
    from transformers import AutoTokenizer

    from hedgespec.cli import main
    from hedgespec.zoo import load_prompts
    from hedgespec.zoo.target import target_path

    folder = tmp_path_factory.mktemp("heads")
    assert main(["zoo", "export", str(folder)]) in (0, None)
    tokenizer = AutoTokenizer.from_pretrained(target_path())
    by_domain = {name: [prompt for prompt in load_prompts() if prompt.domain == name] for name in HEADS}
    prompts = [by_domain[name][place] for place in range(3) for name in HEADS]
    return SimpleNamespace(
        target=str(target_path()), heads={name: str(folder / name) for name in HEADS},
        prompts=[tokenizer(prompt.text).input_ids[:200] for prompt in prompts], domains=[prompt.domain for prompt in prompts],
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(zoo, tmp_path_factory):
    """Runs an engine and returns what its parts found."""

    def one(who: str, heads=HEADS, parts=("greedy",), **job) -> dict:
        folder = tmp_path_factory.mktemp("run")
        job = {
            "target": zoo.target, "prompts": zoo.prompts, "who": who, "max_new_tokens": 48, "draft_length": DRAFT_LENGTH,
            "parts": parts, "heads": heads if isinstance(heads, dict) else {name: zoo.heads[name] for name in heads},
        } | job  # fmt: skip
        (folder / "job.json").write_text(json.dumps(job))
        command = [
            sys.executable,
            str(Path(__file__).with_name("eagle_engine.py")),
            folder / "job.json",
            folder / "result.json",
        ]
        here = os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": here})
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
        return json.loads((folder / "result.json").read_text())

    return one


@pytest.fixture(scope="module")
def plain(run) -> list[dict]:
    return run("nobody")["greedy"]["requests"]


@pytest.fixture(scope="module")
def pool(run) -> dict:
    """All that is asked of the engine with the whole pool."""
    parts = ("greedy", "again", "abort", "sampled", "not_a_number", "raises")
    return run("hedgespec", parts=parts, engine={"block_size": 32})  # the CPU's default, 128, is longer than the prompts


@pytest.fixture(scope="module")
def alone(run) -> list[dict]:
    """vLLM's own proposer with the first head."""
    return run("vllm", HEADS[:1])["greedy"]["requests"]


@pytest.fixture(scope="module")
def target(zoo):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(zoo.target, dtype=torch.float32).eval()


def assert_same_texts(zoo, target, found: list[dict], expected: list[dict]) -> None:
    """Up to ties of the target's logits, which the shape of a batch may decide; these must be rare."""
    ties = 0
    for prompt, one, other in zip(zoo.prompts, found, expected):
        one, other = one["tokens"], other["tokens"]
        if one == other:
            continue
        place = next(place for place, pair in enumerate(zip(one, other)) if pair[0] != pair[1])
        with torch.inference_mode():
            logits = target(torch.tensor([prompt + one[:place]]), logits_to_keep=1).logits[0, -1]
        assert abs(logits[one[place]] - logits[other[place]]) <= TIE, (one, other)
        ties += 1
    assert ties <= 1


def ratios(request: dict) -> np.ndarray:
    """Whether each head's word was the emitted token, [N, tokens]: from the second token on, as the first has no round."""
    return np.concatenate([np.array(ratio) for _, _, ratio, _ in request["heard"]["rounds"]], axis=1)


def test_texts_are_the_targets(zoo, target, plain, pool):
    assert_same_texts(zoo, target, pool["greedy"]["requests"], plain)


def test_one_head_drafts_as_in_vllm(zoo, run, alone):
    ours = run("hedgespec", HEADS[:1])["greedy"]["requests"]
    assert [(one["tokens"], one["accepted"], one["drafted"]) for one in ours] == [
        (one["tokens"], one["accepted"], one["drafted"]) for one in alone
    ]


def test_scores_are_what_the_head_says_alone(alone, pool):
    """The first token of each of vLLM's rounds is drafted right behind verified tokens, which is where we score."""
    compared = 0
    for theirs, ours in zip(alone, pool["greedy"]["requests"]):
        if theirs["tokens"] != ours["tokens"]:
            continue
        words, place = ratios(ours)[0], 0
        for accepted in theirs["accepted"]:
            if place >= min(len(words), len(theirs["tokens"]) - 1):
                break
            assert words[place] == (accepted > 0)
            compared += 1
            place += accepted + 1
    assert compared > 200


def test_every_token_is_scored_once(pool):
    """The learners heard of all tokens but the first, in order, and of what their own drafts became."""
    for request in pool["greedy"]["requests"]:
        rounds = request["heard"]["rounds"]
        counts = [len(prob[0]) for _, prob, _, _ in rounds]
        places = [place for place, *_ in rounds]
        assert all(place + count == after for place, count, after in zip(places, counts, places[1:]))
        assert sum(counts) >= len(request["tokens"]) - 1  # the last round may go on behind the end of the text
        assert [count - 1 for count in counts] == request["accepted"]
        assert [drafted for *_, drafted in rounds] == request["drafted"]


def test_the_right_head_wins(zoo, pool):
    requests = pool["greedy"]["requests"]
    for domain in HEADS:
        share = np.mean([ratios(one).mean(axis=1) for one, of in zip(requests, zoo.domains) if of == domain], axis=0)
        assert HEADS[int(share.argmax())] == domain, (domain, share)
    report = pool["greedy"]["report"]
    assert report["rounds"] == sum(report["picks"]) == sum(len(one["accepted"]) for one in requests)
    assert sum(report["accepted"]) == sum(sum(one["accepted"]) for one in requests)
    assert sum(report["drafted"]) == DRAFT_LENGTH * report["rounds"]
    assert report["failures"] == {}


def test_prompts_warm_learners_up(zoo, pool):
    """The prompt alone tells most domains apart."""
    best = []
    for request, domain in zip(pool["greedy"]["requests"], zoo.domains):
        prompt = np.array(request["heard"]["prompt"])
        assert (
            prompt.shape[0] == len(HEADS) and 0 < prompt.shape[1] <= 32 and (prompt >= 0).all() and (prompt <= 1 + 1e-6).all()
        )
        best.append(HEADS[int(prompt.mean(axis=1).argmax())] == domain)
    assert np.mean(best) >= 0.75


def test_a_cached_prefix_changes_nothing(zoo, plain, pool, target):
    """A prefix found in the cache has been read by all heads: what they say is the same."""
    first, second = pool["greedy"]["requests"], pool["again"]["requests"]
    assert all(request["cached"] >= 32 for request in second)
    assert_same_texts(zoo, target, second, plain)
    same = differ = 0
    for one, other in zip(first, second):
        if one["tokens"] == other["tokens"]:
            one, other = ratios(one), ratios(other)
            length = min(one.shape[1], other.shape[1])
            same += int((one[:, :length] == other[:, :length]).sum())
            differ += int((one[:, :length] != other[:, :length]).sum())
    assert same > 1000 and differ <= 0.002 * same  # a head's own ties


def test_ended_requests_leave_nothing(plain, pool):
    found = pool["abort"]
    assert sorted(found["texts"]) == [f"abort-{place}" for place in (1, 3, 5)]
    assert all(found["texts"][f"abort-{place}"] == plain[place]["tokens"][:24] for place in (1, 3, 5))
    assert all(found["kept"]) and found["in_the_end"] == 0


def test_sampled_requests_are_scored_with_the_targets_probabilities(pool):
    """Whether a word was emitted has the word's probability as its mean, whatever came before."""
    found = pool["sampled"]
    for kind in ({"temperature": 1.0}, {"temperature": 0.7, "top_k": 20}, {"temperature": 1.0, "top_p": 0.8}):
        requests = [one for one, of in zip(found["requests"], found["kinds"]) if of == kind]
        prob = np.concatenate([np.array(heard[1])[0] for one in requests for heard in one["heard"]["rounds"]])
        assert ((prob >= 0) & (prob <= 1)).all() and 0.02 < prob.mean() < 0.98
        assert not np.isin(prob, (0, 1)).all()
    rounds = [
        heard for one, of in zip(found["requests"], found["kinds"]) if of["temperature"] for heard in one["heard"]["rounds"]
    ]
    gap = np.concatenate([(np.array(prob) - np.array(ratio)).T for _, prob, ratio, _ in rounds])  # [tokens, N]
    assert len(gap) > 250
    assert (abs(gap.mean(axis=0)) < 4 * gap.std(axis=0) / len(gap) ** 0.5).all()
    for one, of in zip(found["requests"], found["kinds"]):
        if not of["temperature"]:
            assert all(heard[1] == heard[2] for heard in one["heard"]["rounds"])


@pytest.mark.parametrize("part", ["not_a_number", "raises"])
def test_a_head_that_fails_is_out(zoo, target, plain, pool, part):
    found = pool[part]
    assert_same_texts(zoo, target, found["requests"], plain)
    assert found["report"]["failures"].get(HEADS[1]) == "not finite"
    if part == "raises":
        assert found["lost"] == {"0": "RuntimeError: out of order"}
        assert found["calls"] == 6  # nobody asks it again
        before, after = pool["not_a_number"]["report"]["picks"], found["report"]["picks"]
        assert after[2] + after[3] > before[2] + before[3]


def test_chunks_of_prompts_preempted_requests_and_the_end_of_the_context(zoo, target, run, plain):
    """Prompts are read in pieces, there is room for a few requests only, so that some are thrown out and read again, and most
    texts end with the context, before which vLLM asks for no drafts. Drafts are of any length, as the objective has it."""
    engine = {"max_model_len": 128, "max_num_batched_tokens": 64, "num_gpu_blocks_override": 14, "block_size": 32}
    found = run("hedgespec", HEADS[:2], engine=engine, pool={"objective": "throughput"})["greedy"]
    assert found["preemptions"] > 0
    lengths = {drafted for request in found["requests"] for *_, drafted in request["heard"]["rounds"]}
    assert lengths == set(range(DRAFT_LENGTH + 1))  # each is measured
    cut = [one | {"tokens": one["tokens"][: len(other["tokens"])]} for one, other in zip(plain, found["requests"])]
    assert any(one["tokens"] != other["tokens"] for one, other in zip(cut, plain))
    assert_same_texts(zoo, target, found["requests"], cut)
    for request, ours in zip(plain, found["requests"]):
        prompt = len(zoo.prompts[plain.index(request)])
        for place, prob, _, _ in ours["heard"]["rounds"]:
            assert prompt < place and place + len(prob[0]) <= 128 + 1
    assert found["report"]["rounds"] > 50 and found["report"]["failures"] == {}


# Mistakes.


def config(tmp_path=None, **changed):
    """As much of vLLM's configuration as is looked at."""
    spec = {
        "method": "eagle3", "disable_padded_drafter_batch": True, "draft_sample_method": "greedy", "num_speculative_tokens": 4,
        "rejection_sample_method": "standard", "parallel_drafting": False, "model": "/heads/python",
    }  # fmt: skip
    parallel = {"tensor_parallel_size": 2, "pipeline_parallel_size": 1, "data_parallel_size": 1, "enable_eplb": False}
    whole = {
        "speculative_config": spec, "parallel_config": parallel, "scheduler_config": {"async_scheduling": False},
        "model_config": {"supports_multimodal_inputs": False, "uses_mrope": False, "seed": 0}, "use_v2_model_runner": False,
    }  # fmt: skip
    for name, value in changed.items():
        owner = next((part for part in whole.values() if isinstance(part, dict) and name in part), whole)
        owner[name] = value
    made = {name: SimpleNamespace(**part) if isinstance(part, dict) else part for name, part in whole.items()}
    return SimpleNamespace(**made)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"method": "eagle"}, "speculative_config: expected method \"eagle3\", got 'eagle'"),
        ({"speculative_config": None}, 'speculative_config: expected method "eagle3", got None'),
        ({"disable_padded_drafter_batch": False}, '"disable_padded_drafter_batch": true, got false'),
        ({"async_scheduling": True}, "async_scheduling: expected --no-async-scheduling"),
        ({"use_v2_model_runner": True}, "VLLM_USE_V2_MODEL_RUNNER: expected 0"),
        ({"draft_sample_method": "probabilistic"}, "draft_sample_method: expected greedy, got probabilistic"),
        ({"data_parallel_size": 2}, "data_parallel_size: expected 1, got 2"),
        ({"uses_mrope": True}, "M-RoPE: expected False, got True"),
    ],
)
def test_configurations_that_are_refused(changed, message):
    from hedgespec.errors import EngineError
    from hedgespec.integrations.vllm.eagle_config import check_config

    check_config(config())
    with pytest.raises(EngineError, match=message):
        check_config(config(**changed))


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        ({"drafters": [{"type": "ngram"}]}, "type: expected one of eagle3, got 'ngram'"),
        ({"drafters": [{"type": "eagle3"}]}, "model: expected one for type eagle3, got none"),
        ({"drafters": [{"type": "eagle3", "model": "/heads/sql"}]}, "expected speculative_config's model /heads/python among"),
        (
            {"drafters": [{"type": "eagle3", "model": "/heads/python"}], "objective": "throughput"},
            "objective: expected tokens with tensor_parallel_size 2, got throughput",
        ),
    ],
)
def test_pools_that_are_refused(monkeypatch, pool, message):
    from hedgespec.errors import PoolError
    from hedgespec.integrations.vllm.eagle_proposer import HedgeSpecEagleProposer

    monkeypatch.setenv("HEDGESPEC_POOL", json.dumps(pool))
    with pytest.raises(PoolError, match=message):
        HedgeSpecEagleProposer(config(), torch.device("cpu"), None)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"eagle_aux_hidden_state_layer_ids": [2, 15, 28]}, r"the layers of the target \(2, 15, 27\) of a, got \(2, 15, 28\)"),
        ({"eagle_aux_hidden_state_layer_ids": None}, "the layers of the target .* of a, got default"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "the layers of the target .* of a, got last"),
        ({"width": 640}, "the hidden size 576 of a, got 640"),
    ],
)
def test_heads_that_read_something_else(changed, message):
    from hedgespec.errors import PoolError
    from hedgespec.integrations.vllm.eagle_config import Head
    from hedgespec.integrations.vllm.eagle_proposer import HedgeSpecEagleProposer

    def head(name, **changed):
        told = SimpleNamespace(**{"width": 576, "eagle_aux_hidden_state_layer_ids": [2, 15, 27]} | changed)
        model = SimpleNamespace(hf_config=told, get_hidden_size=lambda: told.width)
        return Head(name, SimpleNamespace(draft_model_config=model))

    proposer = object.__new__(HedgeSpecEagleProposer)
    proposer.pool, proposer.heads = SimpleNamespace(source="pool.json"), [head("a"), head("b", **changed)]
    proposer.first = proposer.heads[0]
    with pytest.raises(PoolError, match=f"pool.json: drafter b: expected {message}"):
        proposer._check_heads()


@pytest.mark.parametrize(
    ("narrow", "message"),
    [
        (False, "expected a folder with an EAGLE-3 head that vLLM reads, got"),
        (True, "expected heads whose keys and values have one shape"),
    ],
)
def test_heads_that_do_not_load_together(zoo, run, tmp_path, narrow, message):
    python, other = Path(zoo.heads["python"]), tmp_path / "other"
    other.mkdir()
    if narrow:
        told = json.loads((python / "config.json").read_text()) | {"num_key_value_heads": 9}
        (other / "config.json").write_text(json.dumps(told))
        weights = load_file(python / "model.safetensors")
        weights = {name: value.repeat(3, 1) if name.endswith(NARROW) else value for name, value in weights.items()}
        save_file(weights, other / "model.safetensors")
    with pytest.raises(AssertionError, match=message):
        run("hedgespec", {"python": str(python), "other": str(other)})
