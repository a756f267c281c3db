"""Mode "coupled": the noise, what it makes of two laws, and texts that are the same whatever drafts them.

The noise and the sampler are written once more here, one number and one token after another, in plain Python.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from conftest import HAS_GPU
from helpers.batches import batch_of
from helpers.batches import pool as mixed_pool
from helpers.decoding import DRAFT_VOCABULARY, VOCABULARY, Broken, as_functions, pool, prompt_of, tiny_head, tiny_llama
from helpers.learners import ScoredFixedLearner, ScoredUniform
from helpers.markov import BAD_WORDS, MIXED, SMALLEST_P_VALUE, Bias, V, direct, through_generate
from helpers.markov import chain as markov
from helpers.markov import pool as markov_pool
from scipy import stats
from transformers import LogitsProcessor, LogitsProcessorList

from hedgespec import Tree, algorithm
from hedgespec.config import DecodeConfig
from hedgespec.decoder import Decoder, Request
from hedgespec.drafters.causal_lm import CausalLMDrafter
from hedgespec.drafters.ngram import NGramDrafter
from hedgespec.learners import NAMES
from hedgespec.ops.gumbel import gumbel, perturb
from hedgespec.ops.sampling import Sampling

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def target():
    return tiny_llama(seed=0, layers=4)


# The noise.


def splitmix(state: int):
    """Numbers of SplitMix64 as its authors list it, endlessly."""
    while True:
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        yield z ^ (z >> 31)


def noise_at(key: int, position: int, vocabulary: int) -> list[float]:
    """A position's noise: a generator that the key starts gives the state of the position's own, which gives its tokens'."""
    key %= 2**64
    of_key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    of_key = (of_key ^ (of_key >> 27)) * 0x94D049BB133111EB % 2**64
    positions = splitmix(of_key ^ (of_key >> 31))
    for _ in range(position + 1):
        state = next(positions)
    tokens = splitmix(state)
    return [-math.log(-math.log((next(tokens) // 2**12 + 0.5) / 2**52)) for _ in range(vocabulary)]


@pytest.mark.parametrize("device", DEVICES)
def test_the_noise_is_that_of_the_generator(device):
    keys, positions = [0, 1, 5, 2**53 - 1, 2**64 - 1, -1], [0, 3, 1000, 7, 2, 2]
    found = gumbel(keys, positions, 300, device)
    expected = torch.tensor([noise_at(*each, 300) for each in zip(keys, positions)], dtype=torch.float64).float()
    assert (found.device.type, found.dtype, found.shape) == (device, torch.float32, (6, 300))
    assert torch.equal(found[4], found[5])  # the same 64 bits
    torch.testing.assert_close(found.cpu(), expected, rtol=2e-7, atol=1e-9)  # of logarithms, one in 2^28 rounds elsewhere


@pytest.mark.parametrize("device", DEVICES)
def test_the_noise_does_not_depend_on_what_is_asked_for_with_it(device):
    keys, positions = [3, 3, 4, 3], [11, 12, 11, 11]
    together = gumbel(keys, positions, 1001, device)
    for row, each in enumerate(zip(keys, positions)):
        assert torch.equal(gumbel(*([one] for one in each), 1001, device)[0], together[row])
        assert torch.equal(gumbel(*([one] for one in each), 37, device)[0], together[row, :37])
    assert gumbel([], [], 7, device).shape == (0, 7)


def test_the_noise_is_gumbels_and_independent():
    """By 3 x 40 x 2000: its quantiles, and pairs of neighbours among keys, positions and tokens on a grid of 16 x 16."""
    keys = [0, 1, 2]
    noise = torch.stack([gumbel([key] * 40, range(40), 2000) for key in keys]).double().numpy()
    assert np.isfinite(noise).all()
    assert stats.kstest(noise.ravel(), "gumbel_r").pvalue > SMALLEST_P_VALUE
    u = np.exp(-np.exp(-noise))
    for axis, lag in ((0, 1), (0, 2), (1, 1), (1, 2), (1, 7), (2, 1), (2, 2), (2, 64)):
        one, other = np.take(u, range(u.shape[axis] - lag), axis), np.take(u, range(lag, u.shape[axis]), axis)
        counts = np.histogram2d(one.ravel(), other.ravel(), bins=16, range=[[0, 1]] * 2)[0]
        assert stats.chisquare(counts.ravel()).pvalue > SMALLEST_P_VALUE


def test_the_noise_draws_what_is_rare():
    """Of 2^20 numbers the largest and the smallest are where they belong: no token is out of reach."""
    noise = gumbel([9] * 16, range(16), 2**16)
    assert 11 < float(noise.max()) < 30
    assert -4 < float(noise.min()) < -2


def test_what_the_noise_refuses():
    for arguments, match in [
        (([1, 2], [3], 5), "positions: expected one for each of 2 keys, got 1"),
        (([1], [-1], 5), "positions: expected values of at least 0, got -1"),
        (([1], [1], 0), "vocabulary: expected at least 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=match):
            gumbel(*arguments)


# Logits with noise on top.


def laws(count: int, size: int, spread: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(2, count, size, generator=random)
    return logits[0], logits[0] + torch.linspace(0, 2, count)[:, None] * logits[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1e-30])
def test_perturbed_logits(dtype, temperature):
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 6, generator=random).to(dtype)
    logits[0, 1, 2] = logits[2, 3, :] = -math.inf
    noise, threshold = gumbel([1] * 4, range(4), 9), torch.randn(3, 4, generator=random).to(dtype) - 1
    mapping = torch.stack([torch.randperm(9, generator=random)[:6] for _ in range(3)])
    found = perturb(logits, noise, temperature=temperature, threshold=threshold, draft_to_target=mapping[:, None])
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for row in range(3):
        for place in range(4):
            kept = logits[row, place].double().masked_fill(logits[row, place] < threshold[row, place], -math.inf)
            best = kept.max() if kept.max() > -math.inf else 0.0
            expected = (kept - best) / temperature + noise[place, mapping[row]]
            own = found[row, place].double()
            assert torch.equal(own == -math.inf, kept == -math.inf)
            finite = own.isfinite()
            own, expected = own[finite], expected[finite]  # up to a constant
            if finite.any():
                torch.testing.assert_close(own - own.max(), expected - expected.max(), rtol=1e-6, atol=2e-6)


def test_what_perturb_refuses():
    logits, noise = torch.zeros(2, 3, 5), torch.zeros(3, 5)
    good = {"logits": logits, "noise": noise, "temperature": 1.0}
    perturb(**good)
    mapped = good | {"noise": torch.zeros(3, 9), "draft_to_target": torch.zeros(2, 1, 5, dtype=torch.int32)}
    perturb(**mapped)
    for wrong, error, match in [
        (good | {"logits": logits.long()}, TypeError, "logits: expected"),
        (good | {"noise": noise.double()}, TypeError, "noise: expected torch.float32"),
        (good | {"noise": None}, TypeError, "noise: expected"),
        (good | {"noise": torch.zeros(3, 6)}, ValueError, "noise: expected shape"),
        (good | {"noise": torch.zeros(2, 5)}, ValueError, "noise: expected leading dimensions that go with"),
        (good | {"noise": torch.zeros(1, 1, 3, 5)}, ValueError, "noise: expected leading dimensions that go with"),
        (good | {"temperature": 0.0}, ValueError, "temperature: expected a finite number > 0"),
        (good | {"temperature": math.inf}, ValueError, "temperature: expected a finite number > 0"),
        (good | {"temperature": torch.ones(2)}, TypeError, "temperature: expected a number"),
        (good | {"threshold": torch.zeros(3)}, ValueError, "threshold: expected shape"),
        (good | {"threshold": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "threshold: expected"),
        (mapped | {"draft_to_target": torch.zeros(5)}, TypeError, "draft_to_target: expected"),
        (mapped | {"draft_to_target": torch.zeros(4, dtype=torch.int64)}, ValueError, "draft_to_target: expected shape"),
        (
            mapped | {"draft_to_target": torch.zeros(3, 1, 5, dtype=torch.int64)},
            ValueError,
            "draft_to_target: expected leading",
        ),
    ]:
        with pytest.raises(error, match=match):
            perturb(**wrong)


def test_an_argmax_is_a_draw():
    target_logits, _ = laws(6, 7, 1.5)
    target_logits[0, 3] = -math.inf
    noise = gumbel([5] * 20_000, range(20_000), 7)
    for logits in target_logits:
        drawn = perturb(logits.expand(len(noise), -1), noise, temperature=0.8).argmax(-1)
        law = (logits.double() / 0.8).softmax(-1).numpy()
        counts, possible = np.bincount(drawn, minlength=7), law > 0
        assert not counts[~possible].any()
        assert stats.chisquare(counts[possible], law[possible] * len(noise)).pvalue > SMALLEST_P_VALUE


@pytest.mark.parametrize("mapped", [False, True])
def test_two_laws_agree_as_often_as_they_must(mapped):
    """Between (1 - TV) / (1 + TV) and 1 - TV, and as the closed form says."""
    size, draws = 8, 20_000
    target_logits, draft_logits = laws(12, size, 1.0, seed=3)
    mapping = torch.tensor([6, 0, 3, 5]) if mapped else torch.arange(size)
    noise = gumbel([7] * draws, range(draws), size)
    for own, other in zip(target_logits, draft_logits[:, : len(mapping)]):
        x = perturb(own.expand(draws, -1), noise, temperature=1.0).argmax(-1)
        picks = perturb(other.expand(draws, -1), noise, temperature=1.0, draft_to_target=mapping if mapped else None)
        rate = float((mapping[picks.argmax(-1)] == x).double().mean())
        p, q = own.double().softmax(-1), torch.zeros(size, dtype=torch.float64)
        q[mapping] = other.double().softmax(-1)
        apart = float((p - q).abs().sum() / 2)
        error = 5 * math.sqrt(0.25 / draws)
        assert (1 - apart) / (1 + apart) - error <= rate <= 1 - apart + error
        closed = sum(1 / float(torch.maximum(p / p[v], q / q[v]).sum()) for v in range(size) if p[v] > 0 and q[v] > 0)
        assert rate == pytest.approx(closed, abs=error)


# Texts.


def key_of(seed: int, row: int = 0) -> int:
    return int(np.random.default_rng([seed, row] if row else seed).random() * 2**53)


@torch.inference_mode()
def naive(target, prompt, count: int, key: int, temperature: float, top_k: int | None = None, process=None) -> list[int]:
    """Plain sampling, a token at a time, from whole forwards."""
    tokens = list(prompt)
    for _ in range(count):
        logits = target(torch.tensor([tokens])).logits[:, -1]
        if process is not None:
            logits = process(torch.tensor([tokens]), logits.float())
        logits = logits[0].double()
        if top_k is not None:
            logits[logits < logits.sort().values[-top_k]] = -math.inf
        noise = noise_at(key, len(tokens), len(logits))
        scores = [float(one) + extra for one, extra in zip((logits / temperature).log_softmax(-1), noise)]
        tokens.append(scores.index(max(scores)))
    return tokens


def every_pool(target) -> dict[str, list]:
    everyone = pool(target)
    return {
        "everyone": everyone,
        "one head": everyone[:1],
        "another": [tiny_head(target, 8)],
        "a language model": everyone[2:3],
        "itself": [CausalLMDrafter(target, target, name="itself")],
        "prompt lookup": [NGramDrafter(VOCABULARY)],
        "stacks and others": mixed_pool(target, True),
        "apart": mixed_pool(target, False),
    }


assert len(NAMES) >= 5  # or else not every draft length has its turn
CONFIGS = [
    *(
        {"learner": learner, "draft_length": 1 + number % 5, "evaluate_every": (1, 3, 8)[number % 3]}
        for number, learner in enumerate(NAMES)
    ),
    {"learner": ScoredFixedLearner, "evaluate_every": 2},
    {"drafter_window": 16, "backend": "reference"},
    {"objective": "throughput", "draft_length": 2},
    *({"draft_length": 3, "tree": tree} for tree in (Tree((3, 2, 1)), Tree(3, size=9), Tree(1), Tree(2, size=3))),
]


def test_a_seeds_text_is_the_plain_samplers_whatever_drafts(target):
    options = {"max_new_tokens": 16, "temperature": 0.8, "top_k": 20, "seed": 6}
    prompt = prompt_of(1)
    expected = naive(target, prompt[0].tolist(), 16, key_of(6), 0.8, 20)
    accepted = {}
    for name, drafters in every_pool(target).items():
        out = Decoder(target, drafters, DecodeConfig(proposal="coupled")).generate(prompt, **options)
        assert out.sequences[0].tolist() == expected, name
        assert not out.stats[0].failures
        accepted[name] = out.stats[0].tokens_per_round
    assert accepted["itself"] > 4  # what draws from the target's law draws the target's tokens
    assert 1 < accepted["everyone"] < 5
    for config in CONFIGS:
        out = Decoder(target, pool(target), DecodeConfig(proposal="coupled", **config)).generate(prompt, **options)
        assert out.sequences[0].tolist() == expected, config
        assert not out.stats[0].failures


def test_rounds_are_those_of_greedy_decoding_with_the_noise_on_top(target):
    """algorithm.py at temperature 0, of models that add the noise: choices, lengths and weights too."""
    drafters, prompt, temperature = pool(target), prompt_of(4), 0.7

    def noisy(key, logits_of):
        def logits(*tokens):
            noise = torch.tensor(noise_at(key, sum(map(len, tokens)), VOCABULARY)).float()
            return logits_of(*tokens) / temperature + noise

        return logits

    config = DecodeConfig(draft_length=3, proposal="coupled", evaluate_every=1, warm_start=0)
    out = Decoder(target, drafters, config).generate(prompt, max_new_tokens=30, temperature=temperature, seed=1)
    random = np.random.default_rng(1)
    key = int(random.random() * 2**53)
    with torch.inference_mode():
        of_target, of_drafters = as_functions(target, drafters)
        trace = algorithm.decode(
            noisy(key, of_target), [noisy(key, one) for one in of_drafters], prompt[0].tolist(), max_new_tokens=30,
            draft_length=3, temperature=0.0, random=random,
        )  # fmt: skip
    assert out.sequences[0].tolist() == trace.tokens
    assert out.stats[0].choices == trace.choices
    assert out.stats[0].emitted_by_round == trace.emitted
    np.testing.assert_allclose(out.stats[0].weights, trace.weights, atol=1e-9)
    assert len(set(trace.choices)) > 1


@pytest.mark.parametrize("tree", [None, Tree((2, 2, 1))])
def test_a_row_says_the_same_in_any_company(target, tree):
    decoder = Decoder(target, mixed_pool(target, True), DecodeConfig(draft_length=3, proposal="coupled", tree=tree))
    batch = batch_of(4)
    prompts = [ids[mask > 0] for ids, mask in zip(batch["input_ids"], batch["attention_mask"])]

    def texts(*rows: int) -> list[list[int]]:
        requests = [Request(prompts[row], 0, 8 + 4 * row, np.random.default_rng(row)) for row in rows]
        with torch.inference_mode():
            return [row.sequence.tolist() for row in decoder.decode(requests, Sampling(0.9))]

    alone = [texts(row)[0] for row in range(4)]
    for row, text in enumerate(alone):
        assert text == naive(target, prompts[row].tolist(), 8 + 4 * row, key_of(row), 0.9)
    assert texts(0, 1, 2, 3) == alone
    assert texts(3, 1) == [alone[3], alone[1]]
    padded = decoder.generate(**batch, max_new_tokens=12, temperature=0.9, seed=5).sequences
    for row, prompt in enumerate(prompts):  # positions are those in the row's own text
        assert padded[row].tolist()[-12:] == naive(target, prompt.tolist(), 12, key_of(5, row), 0.9)[-12:]


def test_a_text_goes_on_as_it_would_have(target):
    decoder = Decoder(target, pool(target), DecodeConfig(proposal="coupled"))
    arguments = {"temperature": 1.0, "seed": 2}
    whole = decoder.generate(prompt_of(3), max_new_tokens=30, **arguments).sequences
    assert decoder.generate(whole[:, :20], max_new_tokens=21, **arguments).sequences.tolist() == whole.tolist()


def test_a_state_and_a_failure_leave_the_text_alone(target):
    arguments = {"max_new_tokens": 30, "temperature": 1.0, "seed": 2}
    config = DecodeConfig(proposal="coupled", warm_start=0)
    first = Decoder(target, pool(target), config).generate(prompt_of(3), **arguments)
    state = first.stats[0].learner_state
    again = Decoder(target, pool(target), config).generate(prompt_of(3), learner_state=state, **arguments)
    assert not np.array_equal(again.stats[0].weights[0], first.stats[0].weights[0])
    assert again.sequences.tolist() == first.sequences.tolist()
    drafters = [Broken(lambda logits: logits * math.nan), tiny_head(target, 1)]
    with pytest.warns(UserWarning, match="broken is out of this request"):
        out = Decoder(target, drafters, config).generate(prompt_of(3), **arguments)
    assert out.sequences.tolist() == first.sequences.tolist()


def test_seeds_differ_and_none_is_fresh(target):
    decoder = Decoder(target, pool(target), DecodeConfig(proposal="coupled"))
    arguments = {"max_new_tokens": 10, "temperature": 1.0}
    texts = [decoder.generate(prompt_of(0), seed=seed, **arguments).sequences.tolist() for seed in (0, 1, 2, None, None)]
    assert len({str(text) for text in texts}) == 5
    rows = decoder.generate(prompt_of(0).expand(4, -1), seed=0, **arguments).sequences.tolist()
    assert len({str(row) for row in rows}) == 4
    assert rows[:1] == texts[0]


@pytest.mark.parametrize("config", [{}, {"tree": Tree(2), "draft_length": 3}, {"evaluate_every": 1}])
def test_temperature_0_is_greedy(target, config):
    expected = target.generate(**batch_of(3), max_new_tokens=20, do_sample=False)
    out = Decoder(target, mixed_pool(target, True), DecodeConfig(proposal="coupled", **config)).generate(
        **batch_of(3), max_new_tokens=20, seed=3
    )
    assert out.sequences.tolist() == expected.tolist()
    argmax = Decoder(target, mixed_pool(target, True), DecodeConfig(proposal="argmax", **config)).generate(
        **batch_of(3), max_new_tokens=20, seed=3
    )
    assert [one.choices for one in out.stats] == [one.choices for one in argmax.stats]


@pytest.mark.parametrize("processed", [False, True])
@pytest.mark.parametrize("tree", [None, Tree((3, 2, 2))])
def test_losses_are_what_the_rounds_were_worth(tree, processed):
    """These drafters are as good drafting as teacher-forced, so a round emits what its first position's loss says: no chance
    is left. One has a vocabulary of its own."""
    model = markov(seed=0)
    config = DecodeConfig(draft_length=3, proposal="coupled", learner=ScoredUniform, evaluate_every=2, tree=tree)
    decoder, names = Decoder(model, markov_pool(model, *MIXED), config), set()
    prompt = torch.randint(3, (4, 6), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    biased = {"logits_processor": LogitsProcessorList([Bias(stateless=True)])} if processed else {}
    out = model.generate(
        prompt, do_sample=True, max_new_tokens=50, temperature=0.9, top_k=5, return_dict_in_generate=True,
        custom_generate=decoder, **biased,
    )  # fmt: skip
    for one in out.hedgespec:
        assert not one.failures
        starts = np.cumsum([0, *one.emitted_by_round])
        for start, chosen, emitted in zip(starts, one.choices, one.emitted_by_round):
            if start < len(one.losses) and start + 4 < 49:  # the last rounds draft less
                assert (1 - one.losses[start][chosen]) * 4 == pytest.approx(emitted)
                names.add((chosen, emitted > 1))
    assert names >= {(drafter, True) for drafter in range(4)} | {(1, False), (3, False)}


@pytest.mark.parametrize("processed", [False, True])
@pytest.mark.parametrize("tree", [None, Tree((2, 2, 1)), Tree(2, size=5)])
def test_the_targets_own_law_is_accepted_throughout(tree, processed):
    model = markov(seed=0)
    config = DecodeConfig(draft_length=3, proposal="coupled", learner="fixed", tree=tree)
    decoder = Decoder(model, [CausalLMDrafter(model, model, name="itself")], config)
    biased = {"logits_processor": LogitsProcessorList([Bias(stateless=True)])} if processed else {}
    out = model.generate(
        torch.tensor([[0, 1]]), do_sample=True, max_new_tokens=33, temperature=0.9, return_dict_in_generate=True,
        top_k=0, custom_generate=decoder, **biased,
    )  # fmt: skip
    assert out.hedgespec[0].emitted_by_round == [4] * 8


# Laws.


@pytest.mark.parametrize("tree", [None, Tree((3, 2))])
def test_text_has_the_targets_distribution(tree):
    chain = markov(seed=0)
    config = DecodeConfig(draft_length=2 if tree else 4, proposal="coupled", tree=tree)
    assert min(direct(chain, markov_pool(chain, *MIXED), config, 60, temperature=0.8, top_k=5)) > SMALLEST_P_VALUE


@pytest.mark.parametrize("stateless", [False, True])
def test_processors_shape_the_distribution(stateless):
    chain = markov(seed=0)
    config = DecodeConfig(draft_length=3, proposal="coupled")
    found = through_generate(chain, markov_pool(chain, *MIXED), config, 24, 48, temperature=1.2, top_k=4, stateless=stateless)
    assert min(found) > SMALLEST_P_VALUE


# The drop-in.


class Stateful(LogitsProcessor):
    """Adds what depends on how often it was called."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        return scores + torch.linspace(0, self.calls % 5, scores.shape[1])


@pytest.mark.parametrize("kind", ["none", "stateless", "stateful", "both"])
@pytest.mark.parametrize("tree", [None, Tree((2, 2, 1))])
def test_generate_says_the_same_for_every_pool(kind, tree):
    model = markov(seed=0)
    prompt = torch.randint(V, (1, 6), generator=torch.Generator().manual_seed(1))
    texts = []
    for names, length in ((MIXED, 3), (("good",), 3), (("reduced", "lm"), 3), (("ngram",), 3), (MIXED, 1), (MIXED, 5)):
        if tree is not None and length != 3:
            continue

        def processors() -> LogitsProcessorList:
            own = [Bias(stateless=True)] if kind in ("stateless", "both") else []
            return LogitsProcessorList(own + ([Stateful()] if kind in ("stateful", "both") else []))

        config = DecodeConfig(draft_length=length, proposal="coupled", tree=tree)
        decoder, given = Decoder(model, markov_pool(model, *names), config), processors()
        torch.manual_seed(11)
        out = model.generate(
            prompt, do_sample=True, max_new_tokens=18, top_k=4, temperature=0.9, logits_processor=given,
            return_dict_in_generate=True, custom_generate=decoder,
        )  # fmt: skip
        assert not out.hedgespec[0].failures
        assert all(one.calls == 18 for one in given if isinstance(one, Stateful))
        texts.append(out.sequences[0].tolist())
    torch.manual_seed(11)
    key = key_of(int(torch.randint(2**62, ())))
    given = processors()

    def process(tokens, logits):
        for one in given:
            logits = one(tokens, logits)
        return logits

    assert texts == [naive(model, prompt[0].tolist(), 18, key, 0.9, 4, process)] * len(texts)


def test_scores_kept_are_without_noise():
    """And what is recorded changes no text."""
    model = markov(seed=0)
    decoder = Decoder(model, markov_pool(model, *MIXED), DecodeConfig(proposal="coupled"))
    prompt, outs = torch.tensor([[2, 5]]), []
    for scores in (False, True):
        torch.manual_seed(4)
        outs.append(model.generate(
            prompt, do_sample=True, max_new_tokens=12, top_k=4, bad_words_ids=BAD_WORDS, output_scores=scores,
            return_dict_in_generate=True, custom_generate=decoder,
        ))  # fmt: skip
    assert outs[0].sequences.tolist() == outs[1].sequences.tolist()
    row = model(outs[1].sequences[:, :-1]).logits[0, -1]
    kept = outs[1].scores[-1][0]
    finite = kept.isfinite()
    torch.testing.assert_close(kept[finite], row[finite])


# Options.


def test_the_option(target):
    with pytest.raises(ValueError, match=r"proposal: expected one of \('sampled', 'argmax', 'coupled'\), got 'couple'"):
        DecodeConfig(proposal="couple")
    assert DecodeConfig(proposal="coupled", tree=Tree(2, size=5)).proposal == "coupled"
    assert DecodeConfig().proposal == "sampled"


@pytest.mark.parametrize("mode", ["sampled", "argmax"])
def test_other_modes_make_no_noise(target, mode, monkeypatch):
    def never(*arguments, **options):
        raise AssertionError("noise was made")

    monkeypatch.setattr("hedgespec.decoder.noise.gumbel", never)
    monkeypatch.setattr("hedgespec.decoder.noise.perturb", never)
    monkeypatch.setattr("hedgespec.decoder.chain_drafting.perturb", never)
    for temperature in (0.0, 1.0):
        out = Decoder(target, pool(target), DecodeConfig(proposal=mode)).generate(
            prompt_of(0), max_new_tokens=8, temperature=temperature, seed=0
        )
        assert not out.stats[0].failures


def test_noise_is_made_once_a_position(target, monkeypatch):
    asked: list[tuple[int, int]] = []

    def counting(keys, positions, *rest):
        asked.extend(zip(keys, positions))
        return gumbel(keys, positions, *rest)

    monkeypatch.setattr("hedgespec.decoder.noise.gumbel", counting)
    decoder = Decoder(target, pool(target), DecodeConfig(draft_length=4, proposal="coupled", evaluate_every=3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoder.generate(**batch_of(3), max_new_tokens=20, temperature=1.0, seed=0)
    assert len(asked) == len(set(asked))
    assert len({key for key, _ in asked}) == 3


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="no CUDA device")
def test_a_gpu_says_the_same(target):
    import copy

    texts = []
    for device in ("cpu", "cuda"):
        model = copy.deepcopy(target).to(device)
        decoder = Decoder(model, [tiny_head(model, 1).to(device), NGramDrafter(VOCABULARY)], DecodeConfig(proposal="coupled"))
        out = decoder.generate(prompt_of(1).to(device), max_new_tokens=30, temperature=0.9, seed=4)
        assert not out.stats[0].failures
        texts.append(out.sequences.tolist())
    assert texts[0] == texts[1]
    assert DRAFT_VOCABULARY < VOCABULARY
