"""N heads stacked against the same heads one after another: `pytest bench/bench_stack.py [--device cuda]`.

On the CPU the heads are the zoo's seven, in float32. On a GPU they are seven heads of the size of those for Llama-3.1-8B, in
bfloat16 with random weights, their passes captured as CUDA graphs. `bench_round.py` times whole rounds.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hedgespec.drafters.eagle import EagleConfig, EagleHead
from hedgespec.drafters.stack import HeadStack
from hedgespec.zoo import load_zoo

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
        session.consume(tokens[:CONTEXT], features[:CONTEXT], 1)
    given = together.given.clone()

    def stacked():
        together.scored[:] = together.taken[:] = CONTEXT
        together.given.copy_(given)
        return together.score([0], [tokens[new]], [features[new]])

    def in_turn():
        for session in apart:
            session.verified = CONTEXT
        return torch.stack([session.consume(tokens[new], features[new], count) for session in apart])

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
        session.consume(tokens[:CONTEXT], features[:CONTEXT], 1)

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
            session.consume(tokens[new], features[new], 1)
            found.append([session.step(tokens[step : step + 1]) for step in range(4)][-1])
        return torch.stack(found)

    ways = {"by index": by_index, "row by row": row_by_row}
    close(by_index(), row_by_row())
    times = fastest(*(synchronised(device, way) for way in ways.values()), seconds=3.0)
    report(benchmark, capsys, f"batch of {batch}, 4 drafts", ways, times, by_index)
