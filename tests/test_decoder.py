"""The decoder against algorithm.py, against the target's own generate, and against bad input."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hedgespec import algorithm
from hedgespec.config import DecodeConfig, Tree
from hedgespec.decoder import Decoder
from hedgespec.decoder.selector import Selector
from hedgespec.drafters.causal_lm import CausalLMDrafter
from hedgespec.drafters.eagle import EagleConfig, EagleHead
from hedgespec.drafters.ngram import NGramDrafter
from hedgespec.errors import VocabularyMismatchError
from hedgespec.learners import NAMES
from hedgespec.sampling import NUCLEUS, Sampling

VOCABULARY, WIDTH, DRAFT_VOCABULARY = 53, 16, 29
AUX = (1, 2, 3)


@pytest.fixture(scope="module")
def target():
    return tiny_llama(seed=0, layers=4)


def tiny_llama(seed: int, layers: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.25, eos_token_id=None, bos_token_id=None,
        pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def tiny_head(target, seed: int) -> EagleHead:
    generator = torch.Generator().manual_seed(seed)
    config = EagleConfig(WIDTH, WIDTH, 4, 2, 4, 24, VOCABULARY, DRAFT_VOCABULARY, AUX)
    ids = torch.randperm(VOCABULARY, generator=generator)[:DRAFT_VOCABULARY].sort().values
    head = EagleHead(config, target.get_input_embeddings(), ids, name=f"head-{seed}").double()
    for weight in head.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.3, generator=generator)
    return head.requires_grad_(False).eval()


def pool(target):
    """Heads over two draft vocabularies' worth of maps, a small language model, and prompt lookup."""
    small = CausalLMDrafter(tiny_llama(seed=7, layers=1), target, name="small")
    return [tiny_head(target, 1), tiny_head(target, 2), small, NGramDrafter(VOCABULARY)]


def prompt_of(seed: int, length: int = 11) -> torch.Tensor:
    return torch.randint(VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))


def as_functions(target, drafters):
    """The models as algorithm.py wants them: everything computed anew, from the start, every time."""

    def target_logits(tokens):
        return target(torch.tensor([tokens])).logits[0, -1]

    def of(drafter):
        def logits(verified, drafted):
            features = None
            if drafter.aux_layers:
                hidden = target(torch.tensor([verified]), output_hidden_states=True).hidden_states
                at = torch.cat([hidden[layer][0] for layer in drafter.aux_layers], -1)
                features = torch.cat([torch.zeros_like(at[:1]), at[:-1]])
            session = drafter.session()
            row = session.prefill(torch.tensor(verified), features, 1)[-1]
            for token in drafted:
                row = session.step(torch.tensor([token]))
            if drafter.draft_to_target is None:
                return row
            return torch.full((VOCABULARY,), -math.inf, dtype=row.dtype).index_put((drafter.draft_to_target,), row)

        return logits

    return target_logits, [of(drafter) for drafter in drafters]


@pytest.mark.parametrize("mode", ["sampled", "argmax"])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_equals_the_algorithm(target, mode, temperature):
    drafters = pool(target)
    config = DecodeConfig(draft_length=3, mode=mode, evaluate_every=1, warm_start=0, backend="reference")
    for seed in range(3):
        prompt = prompt_of(seed)
        out = Decoder(target, drafters, config).generate(prompt, max_new_tokens=30, temperature=temperature, seed=seed)
        with torch.inference_mode():
            trace = algorithm.decode(
                *as_functions(target, drafters), prompt[0].tolist(), max_new_tokens=30, draft_length=3,
                temperature=temperature, random=np.random.default_rng(seed), mode=mode,
            )  # fmt: skip
        assert out.sequences[0].tolist() == trace.tokens
        assert out.stats[0].choices == trace.choices
        assert out.stats[0].emitted_by_round == trace.emitted
        np.testing.assert_allclose(out.stats[0].weights, trace.weights, atol=1e-9)


@pytest.mark.parametrize("learner", NAMES)
@pytest.mark.parametrize("loss", ["length", "acceptance_rate"])
def test_temperature_0_is_the_targets_own_text(target, learner, loss):
    decoder = Decoder(target, pool(target), DecodeConfig(learner=learner, loss=loss, draft_length=4))
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
        decoder = Decoder(target, [tiny_head(target, 1), NGramDrafter(VOCABULARY)], DecodeConfig(draft_length=2, mode=mode))
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
@pytest.mark.parametrize("shape", [{}, {"tree": Tree(2)}, {"tree": Tree(3, size=12), "mode": "argmax"}], ids=str)
def test_a_gpu_emits_what_the_cpu_emits(compile, overlap, shape):
    """float64, so that another order of sums does not turn a tie."""
    outputs = []
    prompts, mask = torch.cat([prompt_of(0), prompt_of(1)]), torch.ones(2, 11, dtype=torch.int64)
    mask[1, :4] = 0
    for device in ("cpu", "cuda"):
        target = tiny_llama(seed=0, layers=4).to(device)
        drafters = [tiny_head(target, 1).to(device), tiny_head(target, 2).to(device), NGramDrafter(VOCABULARY)]
        config = DecodeConfig(backend="reference", overlap=overlap, compile=compile and device == "cuda", **shape)
        decoder = Decoder(target, drafters, config)
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
    told = Decoder(target, pool(target), DecodeConfig(learner="fixed", track_regret=True))
    stats = told.generate(prompt_of(1), max_new_tokens=20).stats[0]
    assert len(stats.losses) == len(stats.regret) > 0


def test_a_slower_cadence_scores_the_same_later(target):
    """The fixed learner's rounds do not depend on the losses: the same losses come out in the same order."""
    runs = {}
    for every in (1, 3, 7):
        config = DecodeConfig(learner="fixed", track_regret=True, evaluate_every=every, draft_length=3)
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
    [({}, 1.0), ({"mode": "argmax"}, 0.7), ({"mode": "coupled"}, 1.0), ({"tree": Tree(2)}, 1.0), ({}, 0.0)],
    ids=str,
)
def test_meta_sd_hears_what_the_chosen_drafters_block_scored(target, monkeypatch, shape, temperature, every, overlap):
    """Each round's weights are UCB1's over the rounds that were scored before it, none left out and none twice."""
    scored, original = {}, Selector.observe

    def observe(selector, prob, ratio, seconds):
        scored.setdefault(id(selector), []).append((len(selector.stats.choices), np.array(prob)))
        original(selector, prob, ratio, seconds)

    monkeypatch.setattr(Selector, "observe", observe)
    config = DecodeConfig(draft_length=3, learner="meta_sd", evaluate_every=every, overlap=overlap, **shape)
    prompts = torch.cat([prompt_of(1), prompt_of(2)])
    out = Decoder(target, pool(target), config).generate(prompts, max_new_tokens=40, temperature=temperature, seed=0)
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


def test_regret_is_the_learners_loss_less_the_best_drafters(target):
    stats = Decoder(target, pool(target)).generate(prompt_of(4), max_new_tokens=40, temperature=1.0, seed=0).stats[0]
    losses = np.array(stats.losses)
    assert stats.regret[-1] == pytest.approx(sum(stats.played) - losses.sum(0).min())


class Broken(NGramDrafter):
    """Fails, or returns nonsense, once it has taken in some tokens."""

    def __init__(self, fault):
        super().__init__(VOCABULARY, name="broken")
        self.fault = fault

    def session(self):
        session = super().session()
        prefill = session.prefill

        def faulty(tokens, features, logits_to_keep):
            logits = prefill(tokens, features, logits_to_keep)
            return self.fault(logits) if session.verified > 15 else logits

        session.prefill = faulty
        return session


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


def test_bad_pools_and_configurations_are_refused(target):
    lookup = NGramDrafter(VOCABULARY)
    with pytest.raises(ValueError, match="drafters: expected at least 1"):
        Decoder(target, [])
    with pytest.raises(ValueError, match="drafters: expected distinct names"):
        Decoder(target, [lookup, lookup])
    with pytest.raises(VocabularyMismatchError, match="drafter ngram"):
        Decoder(target, [NGramDrafter(VOCABULARY + 1)])
    with pytest.raises(ValueError, match="name: expected one of"):
        Decoder(target, [lookup], DecodeConfig(learner="oracle"))
    with pytest.raises(ValueError, match="prior: expected shape"):
        Decoder(target, [lookup], DecodeConfig(prior=(0.5, 0.5)))
    with pytest.raises(ValueError, match="draft_length: expected at least 1"):
        DecodeConfig(draft_length=0)
    with pytest.raises(ValueError, match="evaluate_every: expected at least 1"):
        DecodeConfig(evaluate_every=0)
    with pytest.raises(TypeError, match="draft_length: expected an int"):
        DecodeConfig(draft_length=2.5)
    with pytest.raises(ValueError, match="mode: expected one of"):
        DecodeConfig(mode="tree")
    with pytest.raises(TypeError, match="evaluate_every: expected an int or \"adaptive\", got 'often'"):
        DecodeConfig(evaluate_every="often")
    with pytest.raises(ValueError, match="drafter_window: expected at least 16 or None, got 3"):
        DecodeConfig(drafter_window=3)
    with pytest.raises(TypeError, match="overlap: expected a bool or None, got 1"):
        DecodeConfig(overlap=1)
    with pytest.raises(TypeError, match="compile: expected a bool, got 'yes'"):
        DecodeConfig(compile="yes")
    with pytest.raises(TypeError, match="depth_correction: expected a bool, got 1"):
        DecodeConfig(depth_correction=1)
    for option in ({"tree": Tree(2)}, {"loss": "acceptance_rate"}):
        with pytest.raises(ValueError, match='depth_correction: expected False, or no tree and loss "length", got tree'):
            DecodeConfig(depth_correction=True, **option)


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
