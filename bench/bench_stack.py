"""N heads stacked against the same heads one after another, and a round with N drafters against a round with one.

    pytest bench/bench_stack.py [--device cuda]

On the CPU the heads are the zoo's seven, in float32, and the rounds those of its mixed stream. On a GPU they are seven heads
of the size of those for Llama-3.1-8B, in bfloat16 with random weights, their passes captured as CUDA graphs.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hedgespec.config import DecodeConfig
from hedgespec.decoder import Decoder
from hedgespec.drafters.eagle import EagleConfig, EagleHead
from hedgespec.drafters.stack import HeadStack
from hedgespec.zoo import GENERALIST, load_prompts, load_zoo

CONTEXT = 200
"""Tokens that are taken in before."""
LLAMA = EagleConfig(4096, 4096, 32, 8, 128, 14336, 128_256, 32_000, (2, 16, 29), rope_theta=500_000.0)
HEADS = 7


@pytest.fixture(scope="module")
def heads(device):
    if device.type == "cpu":
        return load_zoo().drafters
    torch.manual_seed(0)
    ids = torch.arange(LLAMA.draft_vocab_size, device=device)
    with torch.device(device):
        embedding = nn.Embedding(LLAMA.vocab_size, LLAMA.hidden_size, dtype=torch.bfloat16)
        made = [EagleHead(LLAMA, embedding, ids, name=f"head-{number}").to(torch.bfloat16) for number in range(HEADS)]
    for head in made:
        for weight in head.parameters():
            nn.init.normal_(weight, mean=float(weight.ndim == 1), std=0.02)
        head.lm_head = made[0].lm_head
    return [head.requires_grad_(False) for head in made]


@pytest.fixture
def text(heads, device):
    config, dtype = heads[0].config, heads[0].fc.weight.dtype
    features = torch.randn(CONTEXT + 64, len(config.aux_layers) * config.target_hidden_size, device=device, dtype=dtype)
    return torch.randint(config.vocab_size, (CONTEXT + 64,), device=device), features


def synchronised(device, call):
    def run():
        found = call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return found

    return run


def report(benchmark, capsys, name, ways, times, call):
    own = times[0]
    benchmark.extra_info |= {"milliseconds": round(own * 1e3, 2)}
    benchmark.extra_info |= {way: round(other / own, 2) for way, other in zip(list(ways)[1:], times[1:])}
    with capsys.disabled():
        others = ", ".join(f"{way} {other / own:.2f}" for way, other in zip(list(ways)[1:], times[1:]))
        print(f"\n{name}: {next(iter(ways))} {own * 1e3:.2f} ms; times that: {others}")
    benchmark.pedantic(call, rounds=2)


def close(found, expected):
    tolerance = 0.1 if expected.dtype is torch.bfloat16 else 1e-4
    torch.testing.assert_close(found, expected, atol=tolerance * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("count", [1, 3, 6, 12, 24])
@torch.inference_mode()
def test_pass(benchmark, capsys, device, fastest, heads, text, count):
    """All heads take in what a round has verified."""
    tokens, features = text
    stack, new = HeadStack(heads), slice(CONTEXT, CONTEXT + count)
    together = stack.session(1, captured=True)
    together.score([0], [tokens[:CONTEXT]], [features[:CONTEXT]])
    apart = [head.session() for head in heads]
    for session in apart:
        session.prefill(tokens[:CONTEXT], features[:CONTEXT], 1)
    given = together.given.clone()

    def stacked():
        together.scored[:] = together.taken[:] = CONTEXT
        together.given.copy_(given)
        return together.score([0], [tokens[new]], [features[new]])

    def in_turn():
        for session in apart:
            session.verified = CONTEXT
        return torch.stack([session.prefill(tokens[new], features[new], count) for session in apart])

    weights = list(stack.weights.values())
    ways = {"stacked": stacked, "in turn": in_turn, "reading the weights": lambda: sum(weight.sum() for weight in weights)}
    stacked()
    close(together.given[:, 0], in_turn()[:, -1])
    times = fastest(*(synchronised(device, way) for way in ways.values()), seconds=3.0)
    report(benchmark, capsys, f"{len(heads)} heads, {count} tokens", ways, times, stacked)


@pytest.mark.parametrize("batch", [1, 4, 16])
@torch.inference_mode()
def test_draft(benchmark, capsys, device, fastest, heads, text, batch):
    """Each row of a batch drafts four tokens with a head of its own, once it has taken in three."""
    tokens, features = text
    rows, new = list(range(batch)), slice(CONTEXT, CONTEXT + 3)
    chosen = [row % len(heads) for row in rows]
    together = HeadStack(heads).session(batch, captured=True)
    together.score(rows, [tokens[:CONTEXT]] * batch, [features[:CONTEXT]] * batch)
    apart = [heads[head].session() for head in chosen]
    for session in apart:
        session.prefill(tokens[:CONTEXT], features[:CONTEXT], 1)

    def by_index():
        together.taken[:] = CONTEXT
        logits = together.lead(rows, chosen, [tokens[new]] * batch, [features[new]] * batch)
        for step in range(4):
            logits = together.step(rows, tokens[step : step + 1].expand(batch))
        return logits

    def row_by_row():
        found = []
        for session in apart:
            session.verified = CONTEXT
            session.prefill(tokens[new], features[new], 1)
            found.append([session.step(tokens[step : step + 1]) for step in range(4)][-1])
        return torch.stack(found)

    ways = {"by index": by_index, "row by row": row_by_row}
    close(by_index(), row_by_row())
    times = fastest(*(synchronised(device, way) for way in ways.values()), seconds=3.0)
    report(benchmark, capsys, f"batch of {batch}, 4 drafts", ways, times, by_index)


@pytest.mark.parametrize("every", [1, "adaptive"])
def test_round(benchmark, capsys, device, every):
    """A round with all of the zoo's drafters against one with the generalist, prompts apart, prompt by prompt in turn."""
    zoo = load_zoo(dtype="float32" if device.type == "cpu" else "bfloat16", device=device.type)
    alone = [drafter for drafter in zoo.drafters if drafter.name == GENERALIST]
    compiled = device.type == "cuda"
    ways = {
        "7 drafters": Decoder(zoo.target, zoo.drafters, DecodeConfig(evaluate_every=every, compile=compiled)),
        "1 drafter": Decoder(zoo.target, alone, DecodeConfig(learner="fixed", compile=compiled)),
    }
    rounds, seconds = dict.fromkeys(ways, 0), dict.fromkeys(ways, 0.0)
    for number, prompt in enumerate(load_prompts()[:9]):
        ids = zoo.tokenizer(prompt.text, return_tensors="pt").input_ids.to(device)
        for name, decoder in ways.items():
            [stats] = decoder.generate(ids, max_new_tokens=48).stats
            if number >= 3:  # the first few warm up
                rounds[name] += stats.rounds
                seconds[name] += stats.seconds - stats.seconds_by_stage["prompt"]
    each = {name: seconds[name] / rounds[name] for name in ways}
    benchmark.extra_info |= {"milliseconds": round(each["7 drafters"] * 1e3, 2)}
    benchmark.extra_info |= {"7 drafters over 1": round(each["7 drafters"] / each["1 drafter"], 3)}
    with capsys.disabled():
        print(f"\nround, evaluate_every={every}: 7 drafters {each['7 drafters'] / each['1 drafter']:.3f} times 1 drafter's")
    benchmark.pedantic(lambda: ways["7 drafters"].generate(ids, max_new_tokens=2), rounds=1)
