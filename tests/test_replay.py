"""A replay makes the decoder's choices: recorded acceptance against decoding with models, round for round."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.tiny_models import random_prompt, tiny_llama, tiny_pool
from helpers.traces import random_trace, trace_of

from hedgespec.config import DecodeConfig, Tree
from hedgespec.decoder import Decoder
from hedgespec.experiments.recording import Trace, record
from hedgespec.experiments.replay import alone, replay
from hedgespec.learners import NormalHedge
from hedgespec.zoo import load_prompts, load_zoo

LENGTH, TOKENS = 3, 20
MODES = {"sampled": 0.0, "coupled": 1.0}
"""Modes in which the text does not depend on who drafts, and the temperature."""
CONFIGS = [
    {"learner": "normal_hedge"},
    {"learner": "hedge"},
    {"learner": "ucb"},
    {"learner": "exp3"},
    {"learner": "meta_sd"},
    {"learner": "uniform"},
    {"learner": "normal_hedge", "evaluate_every": 2},
    {"learner": "normal_hedge", "evaluate_every": "adaptive"},
]
"""Learners, and how late they learn."""


@pytest.fixture(scope="module")
def target():
    return tiny_llama(seed=0, layers=4)


@pytest.fixture(scope="module")
def drafters(target):
    return tiny_pool(target)


@pytest.fixture(scope="module", params=MODES)
def recorded(request, target, drafters) -> list[Trace]:
    mode = request.param
    return [
        record(target, drafters, random_prompt(seed, length)[0], domain="none", number=seed, seed=seed, mode=mode,
               temperature=MODES[mode], max_new_tokens=TOKENS, depth=LENGTH + 1)
        for seed, length in ((0, 11), (1, 40))
    ]  # fmt: skip


def live(trace: Trace, target, drafters, config: DecodeConfig, seed: int | None = None, overlaps: bool = False, **arguments):
    """Decodes the trace's text and returns the statistics."""
    prompt = torch.from_numpy(trace.tokens[: trace.prompt_length])
    decoder = Decoder(target, drafters, config)
    decoder.overlaps = overlaps
    out = decoder.generate(
        prompt, max_new_tokens=trace.max_new_tokens, temperature=trace.temperature, seed=trace.seed if seed is None else seed,
        **arguments,
    )  # fmt: skip
    assert out.sequences[0].tolist() == trace.tokens.tolist()
    return out.stats[0]


def assert_same(stats, expected, tolerance: float = 0.0) -> None:
    assert stats.choices == expected.choices
    assert stats.lengths == expected.lengths
    assert stats.emitted_by_round == expected.emitted_by_round
    assert stats.emitted_tokens == expected.emitted_tokens
    assert stats.evaluations == expected.evaluations
    for name in ("weights", "losses", "played", "prompt_losses"):
        np.testing.assert_allclose(getattr(stats, name), getattr(expected, name), rtol=0, atol=tolerance)


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("options", CONFIGS, ids=lambda options: " ".join(map(str, options.values())))
def test_a_replay_is_what_the_decoder_did(options, overlaps, recorded, target, drafters):
    trace = recorded[0]
    config = DecodeConfig(draft_length=LENGTH, proposal=trace.mode, warm_start=0, **{"evaluate_every": 1, **options})
    expected = live(trace, target, drafters, config, overlaps=overlaps)
    again = replay(trace, config, latency=int(overlaps))
    assert_same(again, expected)
    assert again.learner_state == expected.learner_state
    assert len(again.emitted_by_round) > LENGTH


@pytest.mark.parametrize("warm_start", [8, 32])
def test_a_replay_learns_from_the_prompt_as_the_decoder_does(warm_start, recorded, target, drafters):
    """Acceptance at temperature 1 is not 0 or 1, and other forwards round otherwise."""
    for trace in recorded:
        config = DecodeConfig(draft_length=LENGTH, proposal=trace.mode, warm_start=warm_start)
        expected = live(trace, target, drafters, config)
        assert len(expected.prompt_losses) == min(warm_start, trace.prompt_length - 1)
        assert_same(replay(trace, config), expected, 1e-5)


def test_a_replay_continues_from_a_state(recorded, target, drafters):
    config = DecodeConfig(draft_length=LENGTH, proposal=recorded[0].mode)
    first, second = recorded
    state = live(first, target, drafters, config).learner_state
    assert_same(replay(second, config, state=state), live(second, target, drafters, config, learner_state=state))


def test_a_replay_with_part_of_the_pool(recorded, target, drafters):
    config = DecodeConfig(draft_length=LENGTH, proposal=recorded[0].mode, warm_start=0)
    part = recorded[0].of([2, 0])
    assert_same(replay(part, config), live(recorded[0], target, [drafters[2], drafters[0]], config))


@pytest.mark.parametrize("length", [1, LENGTH + 1])
def test_alone_is_a_decoder_with_one_drafter(length, recorded, target, drafters):
    trace = recorded[0]
    for number, drafter in enumerate(drafters):
        config = DecodeConfig(draft_length=length, proposal=trace.mode, learner="fixed", warm_start=0)
        assert alone(trace, number, length) == live(trace, target, [drafter], config).emitted_by_round


def test_the_seed_is_that_of_the_draws(recorded, target, drafters):
    """At temperature 0 a request's seed decides the draws alone; in mode coupled it decides the text, too."""
    trace = recorded[0]
    config = DecodeConfig(draft_length=LENGTH, proposal=trace.mode, learner="uniform")
    if trace.temperature == 0:
        assert_same(replay(trace, config, seed=9), live(trace, target, drafters, config, seed=9))
    assert replay(trace, config, seed=trace.seed).choices == replay(trace, config).choices
    assert replay(trace, config, seed=9).choices != replay(trace, config).choices


@pytest.mark.parametrize("count", [1, 2])
def test_texts_too_short_to_draft(count):
    trace = trace_of(np.ones((2, count - 1)), depth=2)
    stats = replay(trace, DecodeConfig(draft_length=2))
    assert (stats.choices, stats.emitted_tokens) == ([-1] * (count - 1), count)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_replay_is_what_the_zoo_did(mode):
    zoo = load_zoo()
    ids = zoo.tokenizer(load_prompts()[1].text, return_tensors="pt").input_ids[0]
    trace = record(zoo.target, zoo.drafters, ids, domain="sql", number=0, seed=3, mode=mode, temperature=MODES[mode],
                   max_new_tokens=24, depth=5)  # fmt: skip
    for warm_start in (0, 32):
        config = DecodeConfig(proposal=mode, warm_start=warm_start)
        expected = live(trace, zoo.target, zoo.drafters, config)
        assert_same(replay(trace, config), expected, 1e-5 if warm_start else 0.0)


def test_sampled_proposals_are_accepted_with_their_probabilities():
    ratio = np.array([[0.9, 0.8, 0.5, 1.0, 0.3, 0.2, 0.1, 0.0]])
    trace = trace_of(ratio, temperature=1.0, depth=4)
    accepted = np.array([alone(trace, 0, 3, seed=seed)[0] - 1 for seed in range(800)])
    law = np.cumprod(ratio[0, :3])
    for depth, share in enumerate(law, start=1):
        assert abs((accepted >= depth).mean() - share) < 4 * math.sqrt(share * (1 - share) / len(accepted))


def test_every_token_is_emitted_once_whatever_the_latency():
    trace = trace_of(np.random.default_rng(0).random((3, 40)), temperature=1.0, depth=4)
    for latency in (0, 1, 5, 100):
        stats = replay(trace, DecodeConfig(draft_length=4, evaluate_every=3), latency=latency)
        assert sum(stats.emitted_by_round) + 1 == stats.emitted_tokens == 41
        assert len(stats.losses) == 37  # of those after which four more positions are known
        late = np.array(stats.weights)[: latency + 1]
        assert (late == late[0]).all()


def test_a_learner_in_place_of_the_configurations():
    class Stubborn(NormalHedge):
        def weights(self):
            return np.eye(self.num_drafters)[2]

    trace = random_trace(0, ("a", "b", "c"), ("x",))
    stats = replay(trace, DecodeConfig(draft_length=2, warm_start=0), learner=Stubborn(3))
    assert {choice for choice in stats.choices if choice >= 0} == {2}
    assert stats.learner_state["regrets"][0] > 0  # it still learns


def test_what_cannot_be_replayed_is_refused():
    trace = trace_of(np.full((2, 9), 0.5), temperature=1.0, depth=4)
    with pytest.raises(ValueError, match="proposal: expected the trace's, 'sampled', got 'coupled'"):
        replay(trace, DecodeConfig(proposal="coupled", draft_length=2))
    with pytest.raises(ValueError, match="seconds: expected them with objective 'throughput' alone"):
        replay(trace, DecodeConfig(objective="throughput", draft_length=2))
    with pytest.raises(ValueError, match="tree: expected None"):
        replay(trace, DecodeConfig(tree=Tree(2), draft_length=2))
    with pytest.raises(ValueError, match="draft_length: expected at most the trace's depth 4, got 5"):
        replay(trace, DecodeConfig())
    greedy = trace_of(np.ones((2, 9)), depth=4)
    assert replay(greedy, DecodeConfig(proposal="coupled", draft_length=2)).emitted_by_round == [3, 3, 3]
