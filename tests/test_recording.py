"""Recording of acceptance: what a trace holds, saving and loading, and parts of a pool."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.tiny_models import VOCABULARY, random_prompt, tiny_llama, tiny_pool
from helpers.traces import random_trace, trace_of

from hedgespec.experiments.recording import Trace, record

TOKENS, DEPTH = 10, 3


@pytest.fixture(scope="module")
def target():
    return tiny_llama(seed=0, layers=4)


@pytest.fixture(scope="module")
def drafters(target):
    return tiny_pool(target)


def recorded(target, drafters, *, mode: str = "sampled", temperature: float = 0.0, tokens: int = TOKENS, **options) -> Trace:
    arguments = {"domain": "none", "number": 3, "seed": 5, "depth": DEPTH, "max_new_tokens": tokens} | options
    return record(target, drafters, random_prompt(0)[0], mode=mode, temperature=temperature, **arguments)


def full_logits(drafter, logits: torch.Tensor) -> torch.Tensor:
    """A drafter's logits over the target's vocabulary."""
    if drafter.draft_to_target is None:
        return logits
    shape = (*logits.shape[:-1], VOCABULARY)
    return torch.full(shape, -math.inf, dtype=logits.dtype).index_copy(-1, drafter.draft_to_target, logits)


@torch.no_grad()
def test_scores_are_those_of_full_forwards(target, drafters):
    """acceptance_prob and acceptance_ratio of the language model, which reads tokens alone, by their definitions."""
    trace = recorded(target, drafters, temperature=1.0)
    small, tokens = drafters[2], torch.from_numpy(trace.tokens)
    assert trace.drafters[2] == "small"
    target_law = target(tokens[None]).logits[0].softmax(-1)
    draft_law = full_logits(small, small.model(tokens[None]).logits[0]).softmax(-1)
    places = range(trace.prompt_length, len(tokens) - 1)  # the row before each position
    prob = [torch.minimum(target_law[place], draft_law[place]).sum().item() for place in places]
    ratio = [min(1.0, (draft_law[place, tokens[place + 1]] / target_law[place, tokens[place + 1]]).item()) for place in places]
    np.testing.assert_allclose(trace.prob[2], prob, atol=1e-9)
    np.testing.assert_allclose(trace.ratio[2], ratio, atol=1e-9)
    warm = [torch.minimum(target_law[place], draft_law[place]).sum().item() for place in range(trace.prompt_length)]
    count = trace.prompt_prob.shape[1]
    np.testing.assert_allclose(trace.prompt_prob[2], warm[-count:], atol=1e-9)


@torch.no_grad()
def test_drafts_of_a_head_read_its_own_features(target, drafters):
    """From the second token on, a head's draft is what its session steps to, not what scoring on the target's features says."""
    trace = recorded(target, drafters, temperature=1.0, tokens=40)
    assert trace.own_features == (True, True, False, False)
    for index in range(4):
        np.testing.assert_array_equal(trace.drafted[index, :, 0], trace.ratio[index])
    later = trace.drafted[:, :-1, 1]
    reached = trace.ratio[:, :-1] > 0
    for index in (0, 1):
        assert np.abs(later[index] - trace.ratio[index, 1:])[reached[index]].max() > 1e-3
    np.testing.assert_allclose(later[2][reached[2]], trace.ratio[2, 1:][reached[2]], atol=1e-9)
    assert (later[~reached] == 0).all()


def test_a_draft_that_was_rejected_goes_no_further(target, drafters):
    trace = recorded(target, drafters)
    assert set(np.unique(trace.drafted)) <= {0.0, 1.0} and trace.drafted[..., 0].any()
    rejected = np.cumprod(trace.drafted, -1) == 0
    assert (trace.drafted[rejected] == 0).all()


@pytest.mark.parametrize("mode", ["sampled", "coupled"])
def test_the_text_does_not_depend_on_the_writer(target, drafters, mode):
    temperature = 1.0 if mode == "coupled" else 0.0
    one, other = (recorded(target, drafters, mode=mode, temperature=temperature, writer=drafters[index]) for index in (0, 2))
    assert one.tokens.tolist() == other.tokens.tolist()
    np.testing.assert_array_equal(one.drafted, other.drafted)


@pytest.mark.parametrize("tokens", [1, 2])
def test_the_shortest_texts(target, drafters, tokens):
    trace = recorded(target, drafters, tokens=tokens)
    assert trace.prob.shape == trace.ratio.shape == (4, tokens - 1)
    assert trace.drafted.shape == (4, tokens - 1, DEPTH) and len(trace.tokens) == trace.prompt_length + tokens


def test_part_of_a_pool():
    trace = random_trace(1, ("a", "b", "c"), ("x", "y"))
    part = trace.of([2, 0])
    assert (part.drafters, part.own_features) == (("c", "a"), (False, True))
    np.testing.assert_array_equal(part.prob, trace.prob[[2, 0]])
    np.testing.assert_array_equal(part.drafted, trace.drafted[[2, 0]])
    assert part.tokens is trace.tokens


def test_saving_and_loading_is_exact(target, drafters, tmp_path):
    random = np.random.default_rng(0)
    traces = [
        recorded(target, drafters, temperature=1.0),
        trace_of(random.random((2, 9)), domain="räume"),
        trace_of(random.integers(0, 5, (2, 9)) / 4.0, tokens=np.array([70000, *range(18)])),
    ]
    for number, trace in enumerate(traces):
        path = tmp_path / "set" / f"{number}.npz"
        trace.save(path)
        loaded = Trace.load(path)
        for name, value in vars(trace).items():
            found = getattr(loaded, name)
            assert type(found) is type(value)
            if isinstance(value, np.ndarray):
                assert found.dtype == value.dtype
                assert found.tobytes() == value.tobytes()
            else:
                assert found == value
    assert {path.suffix for path in (tmp_path / "set").iterdir()} == {".npz"}


def test_exact_values_are_stored_small(tmp_path):
    path = tmp_path / "trace.npz"
    trace_of(np.ones((2, 9))).save(path)
    with np.load(path) as file:
        assert file["ratio"].dtype == file["tokens"].dtype == np.uint8
