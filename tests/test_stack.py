"""Heads as a stack against the same heads one after another, and what a stack may not do: grow, copy, go stale."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from torch import nn

from hedgespec.drafters.eagle import EagleConfig, EagleHead
from hedgespec.drafters.stack import HeadStack, StackSession, kind_of

VOCABULARY, HEADS, WIDTH = 40, 4, 36
SHAPES = dict(
    hidden_size=16, target_hidden_size=12, num_attention_heads=4, num_key_value_heads=2, head_dim=6, intermediate_size=20,
    vocab_size=VOCABULARY, draft_vocab_size=25, aux_layers=(1, 2, 4), rope_theta=1000.0,
)  # fmt: skip
# Largest absolute error of a logit of size 1, by dtype: sums of up to 36 products, twice as deep as a layer.
CLOSE = {torch.float64: 1e-12, torch.float32: 1e-5}


def pool_of(count: int, dtype: torch.dtype = torch.float64, *, shares: bool = True, mapped: bool = True) -> list[EagleHead]:
    """Heads over one embedding, their output rows slices of one matrix or each their own."""
    generator = torch.Generator().manual_seed(0)
    embedding = nn.Embedding(VOCABULARY, 16).to(dtype).requires_grad_(False)
    config = EagleConfig(**SHAPES | ({} if mapped else {"draft_vocab_size": VOCABULARY}))
    output = torch.randn(VOCABULARY, 16, generator=generator).to(dtype)
    heads = []
    for number in range(count):
        ids = torch.randperm(VOCABULARY, generator=generator)[:25].sort().values
        head = EagleHead(config, embedding, ids if mapped else None, name=f"head-{number}").to(dtype)
        for weight in head.parameters():
            nn.init.normal_(weight, mean=float(weight.ndim == 1), std=0.3, generator=generator)
        if shares:
            head.lm_head.weight.data = output[ids].clone() if mapped else output.clone()
        heads.append(head.requires_grad_(False))
    return heads


def text_of(length: int, dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (length,), generator=generator)
    return tokens, torch.randn(length, WIDTH, generator=generator, dtype=torch.float64).to(dtype)


class Alone:
    """What a head says without a stack and without a past: everything read anew, every time."""

    def __init__(self, heads, texts):
        self.heads, self.texts = heads, texts

    def given(self, head: int, row: int, length: int) -> torch.Tensor:
        """Logits for each of the tokens 2..length of a row."""
        tokens, features = (one[:length] for one in self.texts[row])
        return self.heads[head].session().prefill(tokens, features, length - 1)

    def drafting(self, head: int, row: int, length: int):
        tokens, features = (one[:length] for one in self.texts[row])
        session = self.heads[head].session()
        return session, session.prefill(tokens, features, 1)[0]


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize(("shares", "mapped", "count"), [(True, True, HEADS), (False, True, HEADS), (True, False, 2), (True, True, 1)])
def test_a_stack_is_its_heads_one_after_another(dtype, shares, mapped, count):
    """Random rounds: rows of a batch advance each by as much as was accepted, draft each with a head of its own, some only
    after a while, and all heads catch up now and then."""
    heads = pool_of(count, dtype, shares=shares, mapped=mapped)
    random = np.random.default_rng(0)
    texts = [text_of(150, dtype, seed) for seed in range(3)]
    alone, close = Alone(pool_of(count, dtype, shares=shares, mapped=mapped), texts), dict(atol=CLOSE[dtype], rtol=0)
    session = StackSession(HeadStack(heads), 3)
    lengths = np.array([7, 2, 12])  # prompts and first tokens

    def since(rows, taken):
        news = [[one[have : lengths[row]] for one in texts[row]] for row, have in zip(rows, taken)]
        return [tokens for tokens, _ in news], [features for _, features in news]

    assert session.score([0, 1, 2], *since([0, 1, 2], [0, 0, 0])).shape[2] == 0
    rows = [0, 1, 2]
    for round in range(25):
        drafting = sorted(random.permutation(rows)[: random.integers(1, len(rows) + 1)].tolist())
        who = random.integers(count, size=len(drafting)).tolist()
        places = [rows.index(row) for row in drafting]
        logits = session.lead(places, who, *since(drafting, session.taken[who, places]))
        single = []
        for place, (row, head) in enumerate(zip(drafting, who)):
            reference, expected = alone.drafting(head, row, lengths[row])
            torch.testing.assert_close(logits[place], expected, **close)
            single.append(reference)
        going = list(range(len(drafting)))
        for _ in range(3):
            chosen = sorted(random.permutation(len(going))[: random.integers(1, len(going) + 1)].tolist())
            going = [going[place] for place in chosen]
            tokens = torch.from_numpy(random.integers(VOCABULARY, size=len(going)))
            logits = session.step(chosen, tokens)
            for place, number in enumerate(going):
                torch.testing.assert_close(logits[place], single[number].step(tokens[place : place + 1]), **close)
        lengths[rows] += random.integers(1, 6, size=len(rows))
        if round % 4 != 2:  # else heads that drafted are ahead of the others by then
            some = sorted(random.permutation(rows)[: random.integers(1, len(rows) + 1)].tolist())
            places = [rows.index(row) for row in some]
            before = session.scored[places].copy()
            had = session.score(places, *since(some, before))
            for place, (row, first) in enumerate(zip(some, before)):
                for head in range(count):
                    expected = alone.given(head, row, lengths[row])[first - 2 : -1]
                    torch.testing.assert_close(had[head, place, : len(expected)], expected, **close)
        if round == 15:  # a row has come to its end
            rows = [0, 2]
            session.select(rows)
