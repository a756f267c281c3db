"""Drafters of an engine over 16 requests, together against one by one: `pytest bench/bench_engine_drafters.py [--device cuda]`.

The language model has 2 layers of width 576 and a vocabulary of 49152; every request has read a prompt of its own length.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hedgespec.drafters.datastore import Datastore
from hedgespec.engines.drafters import CausalLMs

REQUESTS, NEW, DRAFTED, V = 16, 3, 4, 49152
PROMPTS = [100 + 7 * request for request in range(REQUESTS)]
CORPUS = 1_000_000
"""Tokens of the datastore's."""


@pytest.fixture(scope="module")
def model(device) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V, hidden_size=576, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=2**20,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().to(device)


def filled(model, random: np.random.Generator) -> CausalLMs:
    drafter = CausalLMs(model, V)
    drafter.extend(range(REQUESTS), [random.integers(0, V, length) for length in PROMPTS], [1] * REQUESTS)
    return drafter


@pytest.mark.parametrize("work", ["extend", "draft"])
def test_language_model(benchmark, capsys, fastest, model, work):
    together, alone = (filled(model, np.random.default_rng(0)) for _ in range(2))
    keys, random = range(REQUESTS), np.random.default_rng(1)
    tokens = [random.integers(0, V, NEW) for _ in keys]
    drafts = together.draft(keys, [DRAFTED] * REQUESTS)
    assert drafts == [alone.draft([key], [DRAFTED])[0] for key in keys]

    def batched(drafter=together):
        if work == "extend":
            return drafter.extend(keys, tokens, [NEW] * REQUESTS)
        return drafter.draft(keys, [DRAFTED] * REQUESTS)

    def one_by_one():
        for key in keys:
            if work == "extend":
                alone.extend([key], [tokens[key]], [NEW])
            else:
                alone.draft([key], [DRAFTED])

    quick, slow = fastest(batched, one_by_one, seconds=4.0)
    benchmark.extra_info |= {"speedup": slow / quick}
    with capsys.disabled():
        print(f"\n{work}: {1e3 * quick:.2f} ms together, {slow / quick:.2f} x as fast as one by one")
    benchmark.pedantic(batched, rounds=2)


def test_datastore(benchmark, capsys, fastest):
    random = np.random.default_rng(0)
    text = np.minimum(random.zipf(1.3, CORPUS), V - 1)
    datastore = Datastore.build([text])
    contexts = [text[start : start + 20].tolist() for start in random.integers(0, CORPUS - 20, REQUESTS)]
    assert datastore.next_tokens(contexts).tolist() == [int(datastore.next_tokens([one])[0]) for one in contexts]
    quick, slow = fastest(
        lambda: datastore.next_tokens(contexts), lambda: [datastore.next_tokens([one]) for one in contexts], seconds=0.5
    )
    benchmark.extra_info |= {"speedup": slow / quick, "entries": len(datastore)}
    with capsys.disabled():
        print(f"\n{len(datastore)} entries: {1e6 * quick:.0f} us together, {slow / quick:.2f} x as fast as one by one")
    benchmark.pedantic(lambda: datastore.next_tokens(contexts), rounds=2)
