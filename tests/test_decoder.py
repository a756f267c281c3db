"""The decoder against algorithm.py, against the target's own generate, and against bad input."""

from __future__ import annotations

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from helpers.decoding import VOCABULARY, Broken, as_functions, pool, prompt_of, target, tiny_head, tiny_llama  # noqa: F401  fixtures
from helpers.learners import ScoredFixedLearner

from hedgespec import algorithm
from hedgespec.config import DecodeConfig, Tree
from hedgespec.decoder import Decoder
from hedgespec.drafters.ngram import NGramDrafter
from hedgespec.errors import VocabularyMismatchError
from hedgespec.learners import NAMES, NormalHedge
from hedgespec.ops.sampling import NUCLEUS, Sampling
from hedgespec.selection.selector import Selector


@pytest.mark.parametrize("mode", ["sampled", "argmax"])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_equals_the_algorithm(target, mode, temperature):
    drafters = pool(target)
    config = DecodeConfig(draft_length=3, proposal=mode, evaluate_every=1, warm_start=0, backend="reference")
    for seed in range(3):
        prompt = prompt_of(seed)
        out = Decoder(target, drafters, config).generate(prompt, max_new_tokens=30, temperature=temperature, seed=seed)
        with torch.inference_mode():
            trace = algorithm.decode(
                *as_functions(target, drafters), prompt[0].tolist(), max_new_tokens=30, draft_length=3,
                temperature=temperature, random=np.random.default_rng(seed), proposal=mode,
            )  # fmt: skip
        assert out.sequences[0].tolist() == trace.tokens
        assert out.stats[0].choices == trace.choices
        assert out.stats[0].emitted_by_round == trace.emitted
        np.testing.assert_allclose(out.stats[0].weights, trace.weights, atol=1e-9)


@pytest.mark.parametrize("learner", NAMES)
def test_temperature_0_is_the_targets_own_text(target, learner):
    decoder = Decoder(target, pool(target), DecodeConfig(learner=learner, draft_length=4))
    for seed in range(4):
        prompt = prompt_of(seed, length=1 + 3 * seed)
        expected = target.generate(prompt, max_new_tokens=25, do_sample=False)
        out = decoder.generate(prompt, max_new_tokens=25, seed=seed)
        assert out.sequences.tolist() == expected.tolist()
        assert sum(out.stats[0].emitted_by_round) + 1 == out.stats[0].emitted_tokens == 25
        assert out.stats[0].picks.sum() == sum(choice >= 0 for choice in out.stats[0].choices)


def test_sampled_text_has_the_targets_distribution(target):
    """Two tokens after a prompt, 300 seeded runs, against the target's own product of probabilities."""
    scipy_stats = pytest.importorskip("scipy.stats")
    prompt = prompt_of(5, length=4)
    for mode in ("sampled", "argmax"):
        decoder = Decoder(target, [tiny_head(target, 1), NGramDrafter(VOCABULARY)], DecodeConfig(draft_length=2, proposal=mode))
        runs = [decoder.generate(prompt, max_new_tokens=3, temperature=0.6, top_k=2, seed=seed) for seed in range(300)]
        seen: dict[tuple[int, ...], int] = {}
        for run in runs:
            key = tuple(run.sequences[0, 4:6].tolist())
            seen[key] = seen.get(key, 0) + 1
        expected = {}
        for first, p_first in _top_k(target, prompt):
            for second, p_second in _top_k(target, torch.cat([prompt, torch.tensor([[first]])], 1)):
                expected[first, second] = p_first * p_second * len(runs)
        assert set(seen) <= set(expected)
        counts = [seen.get(key, 0) for key in expected]
        assert scipy_stats.chisquare(counts, list(expected.values())).pvalue > 1e-4


@torch.inference_mode()
def _top_k(target, prompt, k: int = 2, temperature: float = 0.6):
    values, ids = target(prompt).logits[0, -1].topk(k)
    return list(zip(ids.tolist(), (values / temperature).softmax(-1).tolist()))


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("shape", [{}, {"tree": Tree(2)}, {"tree": Tree(3, size=12), "proposal": "argmax"}], ids=str)
def test_a_gpu_emits_what_the_cpu_emits(compile, overlap, shape):
    """float64, so that another order of sums does not turn a tie."""
    outputs = []
    prompts, mask = torch.cat([prompt_of(0), prompt_of(1)]), torch.ones(2, 11, dtype=torch.int64)
    mask[1, :4] = 0
    for device in ("cpu", "cuda"):
        target = tiny_llama(seed=0, layers=4).to(device)
        drafters = [tiny_head(target, 1).to(device), tiny_head(target, 2).to(device), NGramDrafter(VOCABULARY)]
        config = DecodeConfig(backend="reference", compile=compile and device == "cuda", **shape)
        decoder = Decoder(target, drafters, config)
        decoder.overlaps = overlap
        options = {"attention_mask": mask.to(device), "max_new_tokens": 30}
        sampled = decoder.generate(prompts.to(device), temperature=0.7, seed=0, **options).sequences
        dropped_in = target.generate(
            prompts.to(device), do_sample=False, repetition_penalty=1.2, custom_generate=decoder, **options
        )
        outputs.append((sampled.tolist(), dropped_in.tolist()))
    assert outputs[0] == outputs[1]


def test_eos_ends_the_text_and_is_its_last_token(target):
    prompt = prompt_of(0)
    full = target.generate(prompt, max_new_tokens=30, do_sample=False)[0].tolist()
    eos = full[20]
    out = Decoder(target, pool(target)).generate(prompt, max_new_tokens=30, eos_token_id=eos)
    assert out.sequences[0].tolist() == full[: full.index(eos, 11) + 1]


def test_rows_that_end_early_are_filled_up(target, monkeypatch):
    """Ragged prompts, each row with its own end; what fills up is asked for, or the target's own, or else 0."""
    prompts = torch.cat([prompt_of(seed) for seed in range(3)])
    mask = torch.ones_like(prompts)
    for row, padding in enumerate((0, 4, 2)):
        mask[row, :padding] = 0
    decoder = Decoder(target, pool(target))

    def generate(**options):
        return decoder.generate(prompts, attention_mask=mask, max_new_tokens=30, **options).sequences[:, 11:].tolist()

    whole = generate()
    eos = whole[0][4]
    ends = [text.index(eos) + 1 if eos in text else 30 for text in whole]
    assert min(ends) < max(ends)
    for own, given, filler in ((None, None, 0), (7, None, 7), (7, VOCABULARY - 1, VOCABULARY - 1)):
        monkeypatch.setattr(target.generation_config, "pad_token_id", own)
        expected = [text[:end] + [filler] * (max(ends) - end) for text, end in zip(whole, ends)]
        assert generate(eos_token_id=eos, pad_token_id=given) == expected


def test_tokens_stream_as_they_are_emitted(target):
    streamed = []
    out = Decoder(target, pool(target)).generate(
        prompt_of(1), max_new_tokens=17, on_tokens=lambda row, tokens: streamed.append(tokens)
    )
    assert [token for tokens in streamed for token in tokens] == out.sequences[0, 11:].tolist()
    assert [len(tokens) for tokens in streamed[1:]] == out.stats[0].emitted_by_round


def test_seed_decides_and_state_goes_on(target):
    decoder = Decoder(target, pool(target))
    first, again = (decoder.generate(prompt_of(2), max_new_tokens=20, temperature=1.0, seed=3) for _ in range(2))
    assert first.sequences.tolist() == again.sequences.tolist()
    state = json.loads(json.dumps(first.stats[0].learner_state))
    following = decoder.generate(prompt_of(3), max_new_tokens=20, seed=0, learner_state=state)
    learner = decoder.new_learner()
    learner.load_state_dict(state)
    np.testing.assert_array_equal(following.stats[0].weights[0], learner.weights())


def test_a_learner_that_asks_for_nothing_scores_nobody_unless_told_to(target):
    quiet = Decoder(target, pool(target), DecodeConfig(learner="fixed")).generate(prompt_of(1), max_new_tokens=20)
    assert not quiet.stats[0].losses
    told = Decoder(target, pool(target), DecodeConfig(learner=ScoredFixedLearner))
    stats = told.generate(prompt_of(1), max_new_tokens=20).stats[0]
    assert len(stats.losses) == len(stats.regret) > 0


def test_a_slower_cadence_scores_the_same_later(target):
    """The fixed learner's rounds do not depend on the losses: the same losses come out in the same order."""
    runs = {}
    for every in (1, 3, 7):
        config = DecodeConfig(learner=ScoredFixedLearner, evaluate_every=every, draft_length=3)
        runs[every] = Decoder(target, pool(target), config).generate(prompt_of(6), max_new_tokens=60, temperature=1.0, seed=0)
    for every in (3, 7):
        assert runs[every].sequences.tolist() == runs[1].sequences.tolist()
        np.testing.assert_allclose(runs[every].stats[0].losses, runs[1].stats[0].losses, atol=1e-12)
    learning = Decoder(target, pool(target), DecodeConfig(evaluate_every=5)).generate(prompt_of(6), max_new_tokens=60, seed=0)
    stats = learning.stats[0]
    assert stats.rounds > 10
    for round in range(1, stats.rounds):
        if round % 5:  # neither what is known nor who drafts
            assert np.array_equal(stats.weights[round], stats.weights[round - 1])
            assert stats.choices[round] in (stats.choices[round - 1], -1)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("every", ["adaptive", 3])
@pytest.mark.parametrize(
    ("shape", "temperature"),
    [({}, 1.0), ({"proposal": "argmax"}, 0.7), ({"proposal": "coupled"}, 1.0), ({"tree": Tree(2)}, 1.0), ({}, 0.0)],
    ids=str,
)
def test_meta_sd_hears_what_the_chosen_drafters_block_scored(target, monkeypatch, shape, temperature, every, overlap):
    """Each round's weights are UCB1's over the rounds that were scored before it, none left out and none twice."""
    scored, original = {}, Selector.observe

    def observe(selector, prob, ratio, seconds):
        scored.setdefault(id(selector), []).append((len(selector.stats.choices), np.array(prob)))
        original(selector, prob, ratio, seconds)

    monkeypatch.setattr(Selector, "observe", observe)
    decoder = Decoder(target, pool(target), DecodeConfig(draft_length=3, learner="meta_sd", evaluate_every=every, **shape))
    decoder.overlaps = overlap
    prompts = torch.cat([prompt_of(1), prompt_of(2)])
    out = decoder.generate(prompts, max_new_tokens=40, temperature=temperature, seed=0)
    for stats, evaluations in zip(out.stats, scored.values(), strict=True):
        if not overlap:
            step, rounds = 1 if every == "adaptive" else every, range(stats.rounds)
            assert [round for round, _ in evaluations] == [r for r in rounds if (r + 1) % step == 0 or r == rounds[-1]]
        probs = np.concatenate([prob for _, prob in evaluations], axis=-1)
        known = np.repeat([round for round, _ in evaluations], [prob.shape[-1] for _, prob in evaluations])
        ends = np.cumsum(stats.emitted_by_round)
        rewards, past = [[] for _ in stats.drafters], 0
        for now in range(stats.rounds):
            while past < now and known[ends[past] - 1] < now:  # its last token was scored in a round before
                chosen, emitted = stats.choices[past], stats.emitted_by_round[past]
                if chosen >= 0:
                    own = probs[..., chosen, ends[past] - emitted : ends[past]]
                    block = own if own.ndim == 1 else own[np.minimum(range(emitted), 2), range(emitted)]
                    rewards[chosen].append(block.mean())
                past += 1
            total = sum(map(len, rewards))
            index = [float(not one) for one in rewards]
            if all(rewards):
                index = [np.mean(one) + math.sqrt(2 * math.log(total) / len(one)) for one in rewards]
            assert index[stats.weights[now].argmax()] == pytest.approx(max(index), abs=1e-12)
        drafted = sum(choice >= 0 for choice in stats.choices)
        assert sum(stats.learner_state["counts"]) == drafted  # at the end all rounds are heard of


@pytest.mark.parametrize("drafter", range(4))
def test_regret_of_always_the_same_drafter_is_what_it_lost_more_than_the_best(target, drafter):
    config = DecodeConfig(learner=partial(ScoredFixedLearner, drafter=drafter))
    decoder = Decoder(target, pool(target), config)
    stats = decoder.generate(prompt_of(4), max_new_tokens=40, temperature=1.0, seed=0).stats[0]
    lost = np.sum(stats.losses, axis=0)
    assert stats.regret[-1] == pytest.approx(lost[drafter] - lost.min())
    assert lost.max() - lost.min() > 1  # the drafters differ, and so do these regrets


def _raise(logits):
    raise RuntimeError("out of order")


@pytest.mark.parametrize("fault", [_raise, lambda logits: logits * math.nan, lambda logits: logits[:, :-3]])
def test_a_failing_drafter_never_fails_a_request(target, fault):
    prompt = prompt_of(0)
    expected = target.generate(prompt, max_new_tokens=30, do_sample=False)
    for drafters in ([Broken(fault)], [tiny_head(target, 1), Broken(fault), NGramDrafter(VOCABULARY)]):
        with pytest.warns(UserWarning, match="broken is out of this request"):
            out = Decoder(target, drafters).generate(prompt, max_new_tokens=30, seed=0)
        assert out.sequences.tolist() == expected.tolist()
        assert list(out.stats[0].failures) == ["broken"]
        assert out.stats[0].choices[-2] != [drafter.name for drafter in drafters].index("broken")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, ValueError, "input_ids: expected prompts of shape"),
        ({"input_ids": torch.zeros(1, 2, 3, dtype=torch.int64)}, ValueError, "input_ids: expected prompts of shape"),
        ({"input_ids": torch.zeros(1, 3)}, TypeError, "input_ids: expected an int64 tensor"),
        ({"input_ids": torch.full((1, 3), VOCABULARY)}, ValueError, "input_ids: expected ids in 0..52, got 53"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens: expected at least 1"),
        ({"temperature": -0.5}, ValueError, "temperature: expected a finite number >= 0"),
        ({"top_k": 0}, ValueError, "top_k: expected at least 1"),
        ({"top_p": 1.5}, ValueError, "top_p: expected a number in"),
        ({"min_p": -1.0}, ValueError, "min_p: expected a number in"),
    ],
)
def test_bad_requests_are_refused(target, arguments, error, message):
    call = {"input_ids": prompt_of(0), "max_new_tokens": 30} | arguments
    with pytest.raises(error, match=message):
        Decoder(target, [NGramDrafter(VOCABULARY)]).generate(**call)


@pytest.mark.parametrize(
    "options",
    [{}, {"objective": "throughput"}, {"proposal": "coupled"}, {"tree": Tree(2)}, {"learner": "ucb_spec"}],
    ids=lambda options: "".join(map(str, options.values())) or "defaults",
)
def test_without_drafters_decoding_is_plain(target, options):
    decoder, prompt = Decoder(target, [], DecodeConfig(**options)), prompt_of(0)
    out = decoder.generate(prompt, max_new_tokens=12, temperature=0)
    expected = target.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False)
    assert torch.equal(out.sequences, expected)
    assert out.stats[0].choices == [-1] * 11
    assert out.stats[0].tokens_per_round == 1.0
    assert (decoder.generate(prompt, max_new_tokens=12, temperature=1.0, seed=1).sequences[0, prompt.shape[1] :]).numel() == 12


def test_bad_pools_and_configurations_are_refused(target):
    lookup = NGramDrafter(VOCABULARY)
    with pytest.raises(ValueError, match="drafters: expected distinct names"):
        Decoder(target, [lookup, lookup])
    with pytest.raises(VocabularyMismatchError, match="drafter ngram"):
        Decoder(target, [NGramDrafter(VOCABULARY + 1)])
    with pytest.raises(ValueError, match="name: expected one of"):
        Decoder(target, [lookup], DecodeConfig(learner="oracle"))
    with pytest.raises(ValueError, match="learner: expected one over 1 arms, got one over 2"):
        Decoder(target, [lookup], DecodeConfig(learner=lambda arms: NormalHedge(arms + 1)))
    with pytest.raises(TypeError, match="learner: expected a function that returns a hedgespec.learners.Learner, got 1"):
        Decoder(target, [lookup], DecodeConfig(learner=lambda arms: arms))
    with pytest.raises(TypeError, match="learner: expected a name, or a function that returns a learner, got 3"):
        DecodeConfig(learner=3)
    with pytest.raises(ValueError, match="draft_length: expected at least 1"):
        DecodeConfig(draft_length=0)
    with pytest.raises(ValueError, match="evaluate_every: expected at least 1"):
        DecodeConfig(evaluate_every=0)
    with pytest.raises(TypeError, match="draft_length: expected an int"):
        DecodeConfig(draft_length=2.5)
    with pytest.raises(ValueError, match="proposal: expected one of"):
        DecodeConfig(proposal="tree")
    with pytest.raises(TypeError, match="evaluate_every: expected an int or \"adaptive\", got 'often'"):
        DecodeConfig(evaluate_every="often")
    with pytest.raises(ValueError, match="drafter_window: expected at least 16 or None, got 3"):
        DecodeConfig(drafter_window=3)
    with pytest.raises(TypeError, match="compile: expected a bool, got 'yes'"):
        DecodeConfig(compile="yes")


@pytest.mark.parametrize("vocabulary", [VOCABULARY, 4 * NUCLEUS + 1])
@pytest.mark.parametrize("spread", [0.1, 3.0])  # with and without a nucleus among the first few
@pytest.mark.parametrize(
    "option",
    [{"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.2}, {"top_k": 5, "top_p": 0.7, "min_p": 0.1}, {"top_p": 0.7, "min_p": 0.1}],
)
def test_thresholds_keep_what_transformers_keeps(option, spread, vocabulary):
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(20, vocabulary, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * spread
    logits[:, 7] = -math.inf
    scores = logits / 0.7
    for name, warper in (("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper), ("min_p", MinPLogitsWarper)):
        if name in option:
            scores = warper(option[name])(None, scores)
    threshold = Sampling(temperature=0.7, **option).threshold(logits)
    assert ((logits >= threshold[:, None]) == scores.isfinite()).all()


def test_a_row_without_mass_has_a_threshold_all_the_same():
    logits = torch.full((2, 5), -math.inf)
    logits[1, 3] = 0.0
    assert Sampling(1.0, top_k=4, top_p=0.5, min_p=0.1).threshold(logits).tolist() == [-math.inf, 0.0]


def test_options_that_keep_all_make_no_threshold():
    assert Sampling(1.0, top_p=1.0, min_p=0.0).threshold(torch.zeros(1, 5)) is None
    assert Sampling(0.0, top_k=3).threshold(torch.zeros(1, 5)) is None
