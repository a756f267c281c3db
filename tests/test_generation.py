"""The lean forward and the batched decoding loop, against transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hedgespec.zoo import generation
from hedgespec.zoo.generation import Job, Llama, generate


@pytest.fixture(scope="module")
def target():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=24, intermediate_size=40, num_hidden_layers=5, num_attention_heads=6, num_key_value_heads=2,
        initializer_range=0.3, eos_token_id=2, bos_token_id=None, pad_token_id=None, rope_theta=500.0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def llama(target):
    return Llama(target, torch.float32)


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 60, (3 + number * 5 % 17,), generator=generator).tolist() for number in range(count)]


@torch.inference_mode()
def test_reading_and_steps_give_transformers_logits(target, llama):
    texts = prompts(5)
    lengths = torch.tensor([len(text) for text in texts])
    padded = torch.zeros(5, int(lengths.max()), dtype=torch.long)
    for row, text in enumerate(texts):
        padded[row, : len(text)] = torch.tensor(text)
    slots = torch.tensor([3, 0, 1, 4, 2])
    cache = llama.cache(6, 24)
    hidden = llama.read(padded, lengths, cache, slots)
    order = slots.argsort()
    for _ in range(3):
        logits = llama.head(hidden)
        for row, text in enumerate(texts):
            torch.testing.assert_close(logits[row], target(torch.tensor([text])).logits[0, -1], rtol=1e-4, atol=1e-4)
        fresh = torch.randint(3, 60, (5,), generator=torch.Generator().manual_seed(len(texts[0])))
        for text, token in zip(texts, fresh.tolist(), strict=True):
            text.append(token)
        hidden = llama.step(fresh[order], lengths[order], cache)[slots]
        lengths = lengths + 1


@torch.inference_mode()
def test_states_of_every_token(target, llama):
    texts = torch.tensor(prompts(2)[1:] * 2)
    final, kept = llama.read(texts, torch.full((2,), texts.shape[1]), states_of=(1, 3, 5))
    expected = target(texts, output_hidden_states=True).hidden_states
    for layer in (1, 3, 5):
        torch.testing.assert_close(kept[layer], expected[layer], rtol=1e-4, atol=1e-4)
    assert torch.equal(final, kept[5])


@pytest.mark.parametrize("slots", [1, 3, 16])
def test_greedy_texts_are_transformers_own(target, llama, slots):
    """More jobs than slots, of unequal length and limit: slots are freed, filled up and moved."""
    jobs = [Job(text, 4 + number % 9, label=number) for number, text in enumerate(prompts(12))]
    done = list(generate(llama, jobs, slots=slots, ends=(2,), seed=0))
    assert sorted(job.label for job in done) == list(range(12))
    for job in done:
        ids = torch.tensor([job.tokens])
        expected = target.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=job.max_new_tokens, do_sample=False, pad_token_id=2
        )
        assert job.new == expected[0, len(job.tokens) :].tolist()
    assert any(job.new[-1] == 2 for job in done), "no text ended early: the test shows less than it should"


def test_equal_prompts_are_read_once_and_sampled_apart(llama, monkeypatch):
    reads = []
    read = llama.read
    monkeypatch.setattr(
        llama, "read", lambda tokens, *rest, **options: reads.append(len(tokens)) or read(tokens, *rest, **options)
    )
    done = list(generate(llama, [Job([5, 6, 7], 6, 1.0) for _ in range(8)], slots=8, ends=(2,), seed=0))
    assert reads == [1]
    assert len({tuple(job.new) for job in done}) > 4


def test_samples_follow_the_targets_distribution(target, llama):
    text = prompts(1)[0]
    logits = target(torch.tensor([text])).logits[0, -1]
    for temperature, top_p in ((1.0, 1.0), (0.7, 1.0), (1.0, 0.8)):
        expected = (logits / temperature).softmax(-1)
        if top_p < 1:
            ordered, names = expected.sort(descending=True)
            kept = names[ordered.cumsum(-1) - ordered < top_p]
            expected = torch.zeros(60).index_put((kept,), expected[kept] / expected[kept].sum())
        jobs = [Job(text, 1, temperature, top_p) for _ in range(6000)]
        drawn = torch.tensor([job.new[0] for job in generate(llama, jobs, slots=2000, ends=(2,), seed=1)])
        found = drawn.bincount(minlength=60) / 6000
        assert (found - expected).abs().sum() / 2 < 0.06
        assert set(drawn.tolist()) <= set(expected.nonzero()[:, 0].tolist())


def test_bfloat16_is_close(target, llama):
    half = Llama(target, torch.bfloat16)
    texts = torch.tensor(prompts(2)[1:])
    with torch.inference_mode():
        exact, rounded = (each.head(each.read(texts, torch.tensor([texts.shape[1]]))).float() for each in (llama, half))
    assert (exact - rounded).abs().max() < 0.1 * exact.abs().max()


def test_the_dtype_is_measured(monkeypatch):
    clock = iter([0.0, 1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 5.0, 5.0, 7.0, 7.0, 9.0])
    monkeypatch.setattr(generation.time, "perf_counter", lambda: next(clock))
    assert generation.faster_dtype() is torch.float32


def test_other_models_are_refused(target):
    scaled = LlamaForCausalLM(LlamaConfig(**target.config.to_dict() | {"rope_parameters": {
        "rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}}))  # fmt: skip
    with pytest.raises(ValueError, match="model: expected positions that are not scaled"):
        Llama(scaled)
    with pytest.raises(ValueError, match="model: expected a Llama model without biases, got one of type gpt2"):
        Llama(GPT2LMHeadModel(GPT2Config(vocab_size=10, n_embd=8, n_layer=1, n_head=2)))
