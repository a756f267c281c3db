"""The prompt warm start: what the learner hears of a prompt, and that the text does not depend on it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.batches import batch_of, pool
from helpers.decoding import VOCABULARY, Broken, as_functions, prompt_of, tiny_head, tiny_llama
from transformers import DynamicCache, LogitsProcessorList

from hedgespec.config import DecodeConfig, Tree
from hedgespec.decoder import Decoder
from hedgespec.drafters.eagle import EagleHead, EagleSession
from hedgespec.drafters.ngram import NGramDrafter
from hedgespec.drafters.stack_session import StackSession
from hedgespec.learners import make
from hedgespec.runtime.compat import CACHE_NAME

FULL = ("normal_hedge", "hedge", "ada_normal_hedge")
"""Learners that hear of all drafters."""


@pytest.fixture(scope="module")
def target():
    return tiny_llama(seed=0, layers=4)


def decode(target, drafters, request, **options):
    config = DecodeConfig(**{"draft_length": 3, "warm_start": 4} | options)
    return Decoder(target, drafters, config).generate(**{"max_new_tokens": 6, "seed": 0} | request)


@torch.inference_mode()
def losses_from_the_start(target, drafters, text: list[int], positions: int) -> np.ndarray:
    """[T, N]: 1 - sum(min(p, q)) before each of the last tokens of `text`, which ends with the first emitted one; every model
    anew for each of them."""
    target_logits, functions = as_functions(target, drafters)
    losses = []
    for end in range(len(text) - positions, len(text)):
        p = target_logits(text[:end]).softmax(-1)
        q = [logits(text[:end], []).softmax(-1) for logits in functions]
        losses.append([1 - float(torch.minimum(p, one).sum()) for one in q])
    return np.array(losses).reshape(positions, len(drafters))


@pytest.mark.parametrize("learner", FULL)
@pytest.mark.parametrize(
    ("temperature", "shape"), [(0.0, {}), (0.7, {"proposal": "argmax"}), (1.3, {"tree": Tree(2)})], ids=str
)
def test_the_first_weights_are_what_full_forwards_say(target, learner, temperature, shape):
    """Rows of unequal lengths, of which some are shorter than M: each as many positions as it has, its losses and weights, at
    temperature 1 whatever the request's temperature, thresholds, mode and tree."""
    drafters, request = pool(target, True), batch_of(5) | {"temperature": temperature, "top_k": 3}
    out = decode(target, drafters, request, learner=learner, **shape)
    lengths = request["attention_mask"].sum(1).tolist()
    for row, (length, stats) in enumerate(zip(lengths, out.stats)):
        text = out.sequences[row, len(request["input_ids"][row]) - length :][: length + 1].tolist()
        expected = losses_from_the_start(target, drafters, text, min(4, length - 1))
        np.testing.assert_allclose(np.reshape(stats.prompt_losses, expected.shape), expected, atol=1e-12)
        own = make(learner, len(drafters))
        for losses in expected:
            own.update(losses)
        np.testing.assert_allclose(stats.weights[0], own.weights(), atol=1e-9)


@pytest.mark.parametrize("most", [2, 50])
def test_stacked_rows_together_are_each_of_them_alone_and_apart(target, most):
    """Whether M is more than the rows have, or than some of them."""
    request = batch_of(5) | {"temperature": 0.9, "max_new_tokens": 14}
    together, apart = (decode(target, pool(target, stacked), request, warm_start=most) for stacked in (True, False))
    assert together.sequences.tolist() == apart.sequences.tolist()
    for one, other in zip(together.stats, apart.stats):
        assert one.choices == other.choices
        assert len(one.prompt_losses) == len(other.prompt_losses)
        for mine, theirs in zip(one.prompt_losses + one.losses, other.prompt_losses + other.losses):
            np.testing.assert_allclose(mine, theirs, atol=1e-9)
    for row, length in enumerate([11, 3, 7, 1, 9]):
        alone = decode(target, pool(target, True), {"input_ids": prompt_of(row, length)}, warm_start=most).stats[0]
        assert len(alone.prompt_losses) == min(most, length - 1)
        np.testing.assert_allclose(np.array(alone.prompt_losses), np.array(together.stats[row].prompt_losses), atol=1e-9)


@pytest.mark.parametrize("stacked", [True, False])
def test_a_prompt_in_a_cache_counts_from_where_features_are_known(target, stacked):
    drafters = pool(target, stacked)
    prompt = prompt_of(3, 11)
    for held in (5, 9, 10):
        cache = DynamicCache(config=target.config)
        with torch.inference_mode():
            target(prompt[:, :held], **{CACHE_NAME: cache})
        out = target.generate(
            prompt, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, **{CACHE_NAME: cache},
            custom_generate=Decoder(target, drafters, DecodeConfig(draft_length=3, warm_start=4)),
        )  # fmt: skip
        assert out.sequences.tolist() == target.generate(prompt, max_new_tokens=6, do_sample=False).tolist()
        [stats] = out.hedgespec
        assert len(stats.prompt_losses) == min(4, 11 - held - 1)
        assert all(np.ptp(losses) > 0 for losses in stats.prompt_losses)  # of held 10 there are none
        # Drafters that read tokens only are compared as without a cache.
        whole = decode(target, drafters, {"input_ids": prompt}).stats[0]
        for mine, theirs in zip(stats.prompt_losses[::-1], whole.prompt_losses[::-1]):
            np.testing.assert_allclose(mine[[1, -1]], theirs[[1, -1]], atol=1e-9)


def test_a_window_bounds_the_warm_start(target):
    prompt = prompt_of(1, 60)
    out = decode(target, pool(target, True), {"input_ids": prompt}, warm_start=50, drafter_window=16)
    assert len(out.stats[0].prompt_losses) == 15
    assert out.sequences.tolist() == target.generate(prompt, max_new_tokens=6, do_sample=False).tolist()


def test_only_the_asked_positions_logits_are_made(target, monkeypatch):
    """Of target and heads, however long the prompts, equal or not."""
    widths = []
    head, forward = target.lm_head.forward, StackSession._forward
    monkeypatch.setattr(target.lm_head, "forward", lambda states: widths.append(states.shape[1]) or head(states))

    def noted(self, *arguments, **options):
        hidden, logits = forward(self, *arguments, **options)
        widths.append(logits.shape[-2])
        return hidden, logits

    monkeypatch.setattr(StackSession, "_forward", noted)
    heads = [tiny_head(target, seed) for seed in (1, 2)]
    decode(target, heads, {"input_ids": torch.cat([prompt_of(0, 40), prompt_of(1, 40)])})
    decode(target, heads, batch_of(5))
    assert max(widths) == 5  # M + 1: a head's last logits begin the draft


@pytest.mark.parametrize("learner", ["normal_hedge", "hedge", "ucb", "fixed"])
def test_greedy_text_is_the_targets_own(target, learner):
    request = batch_of(5) | {"max_new_tokens": 24}
    expected = target.generate(**batch_of(5), max_new_tokens=24, do_sample=False).tolist()
    out = decode(target, pool(target, True), request, learner=learner, warm_start=32)
    assert out.sequences.tolist() == expected
    heard = [len(stats.prompt_losses) for stats in out.stats]
    assert heard == ([10, 2, 6, 0, 8] if learner in FULL else [0] * 5)


def test_regret_and_losses_are_the_texts_alone(target):
    """Of one drafter, whose rounds do not depend on what the learner heard."""
    request = {"input_ids": prompt_of(2), "max_new_tokens": 30, "temperature": 1.0}
    cold, warm = (decode(target, [tiny_head(target, 1)], request, warm_start=most).stats[0] for most in (0, 8))
    assert len(cold.prompt_losses) == 0
    assert len(warm.prompt_losses) == 8
    np.testing.assert_allclose(cold.losses, warm.losses, atol=1e-12)
    np.testing.assert_allclose(cold.regret, warm.regret, atol=1e-12)
    assert warm.to_dict()["prompt_losses"] == 8


def test_sampled_text_keeps_the_targets_law(target):
    """One token after the first, which a draft proposes, 400 seeded runs against the target's own probabilities."""
    scipy_stats = pytest.importorskip("scipy.stats")
    prompt = prompt_of(5, length=6)
    decoder = Decoder(target, [tiny_head(target, 1), NGramDrafter(VOCABULARY)], DecodeConfig(draft_length=1, warm_start=5))
    runs = decoder.generate(prompt.repeat(400, 1), max_new_tokens=3, temperature=0.6, top_k=2, seed=0).sequences[:, 6:8]
    expected = {}
    with torch.inference_mode():
        for first, p_first in top_2(target, prompt):
            for second, p_second in top_2(target, torch.cat([prompt, torch.tensor([[first]])], 1)):
                expected[first, second] = p_first * p_second * len(runs)
    seen = [tuple(run) for run in runs.tolist()]
    assert set(seen) <= set(expected)
    assert scipy_stats.chisquare([seen.count(key) for key in expected], list(expected.values())).pvalue > 1e-4


def top_2(target, prompt):
    values, ids = target(prompt).logits[0, -1].topk(2)
    return list(zip(ids.tolist(), (values / 0.6).softmax(-1).tolist()))


def test_a_given_state_goes_on_as_it_is(target):
    drafters = pool(target, True)
    decoder = Decoder(target, drafters, DecodeConfig(draft_length=3, warm_start=4))
    learner = decoder.new_learner()
    learner.update(np.linspace(0, 1, len(drafters)))
    out = decoder.generate(prompt_of(1), max_new_tokens=8, learner_state=learner.state_dict(), seed=0)
    assert out.stats[0].prompt_losses == []
    np.testing.assert_array_equal(out.stats[0].weights[0], learner.weights())


def test_processors_see_no_prompt_position(target):
    """Neither those with a state nor those without; the rows begin as without a warm start."""
    seen = []

    def processor(tokens, logits):
        seen.append(tokens.shape[1])
        return logits

    decoder = Decoder(target, pool(target, True), DecodeConfig(draft_length=3, warm_start=4))
    options = {"max_new_tokens": 10, "do_sample": False, "repetition_penalty": 1.2}
    out = target.generate(
        prompt_of(1), logits_processor=LogitsProcessorList([processor]), return_dict_in_generate=True,
        custom_generate=decoder, **options,
    )  # fmt: skip
    assert seen == list(range(11, 21))
    assert out.hedgespec[0].prompt_losses == []
    assert out.sequences.tolist() == target.generate(prompt_of(1), **options).tolist()


@pytest.mark.parametrize("fault", [lambda logits: 1 / 0, lambda logits: logits * math.nan])
def test_a_drafter_that_fails_over_the_prompt_leaves(target, fault):
    """`Broken` fails once it has taken in 15 tokens: within the prompt."""
    prompt = prompt_of(0, 20)
    drafters = [tiny_head(target, 1), Broken(fault), NGramDrafter(VOCABULARY)]
    with pytest.warns(UserWarning, match="broken is out of this request"):
        out = decode(target, drafters, {"input_ids": prompt, "max_new_tokens": 12})
    assert out.sequences.tolist() == target.generate(prompt, max_new_tokens=12, do_sample=False).tolist()
    assert list(out.stats[0].failures) == ["broken"]
    assert 1 not in out.stats[0].choices
    assert out.stats[0].weights[0][1] == 0
    assert {losses[1] for losses in out.stats[0].prompt_losses} == {1.0}


@pytest.mark.parametrize("stacked", [True, False])
def test_a_head_unsound_at_a_position_of_the_prompt_leaves(target, monkeypatch, stacked):
    """At one that only the warm start looks at, and in one row of two."""
    heads = [tiny_head(target, seed) for seed in (1, 2)]
    if stacked:
        forward = StackSession._forward

        def faulty(self, now, *arguments, **options):
            hidden, logits = forward(self, now, *arguments, **options)
            if logits.ndim == 4 and logits.shape[2] == 5 and len(now.places) == 2:
                logits[1, 1, 2] = math.nan
            return hidden, logits

        monkeypatch.setattr(StackSession, "_forward", faulty)
    else:
        for head in heads:
            head.__class__ = type("Apart", (EagleHead,), {})
        consume = EagleSession.consume

        def faulty(self, tokens, *arguments):
            logits = consume(self, tokens, *arguments)
            if self.head.name == "head-2" and len(logits) == 5 and tokens[0] == prompts[1, 0]:
                logits[2] = math.nan
            return logits

        monkeypatch.setattr(EagleSession, "consume", faulty)
    prompts = torch.cat([prompt_of(0), prompt_of(1)])
    assert prompts[0, 0] != prompts[1, 0]
    with pytest.warns(UserWarning, match="head-2 is out of this request"):
        out = decode(target, heads, {"input_ids": prompts, "max_new_tokens": 12})
    assert out.sequences.tolist() == target.generate(prompts, max_new_tokens=12, do_sample=False).tolist()
    assert [list(stats.failures) for stats in out.stats] == [[], ["head-2"]]
    assert all(len(stats.prompt_losses) == 4 for stats in out.stats)


@pytest.mark.parametrize(("value", "error"), [(-1, ValueError), (2.5, TypeError), (True, TypeError), ("all", TypeError)])
def test_bad_values_are_refused(value, error):
    with pytest.raises(error, match="warm_start: expected"):
        DecodeConfig(warm_start=value)
