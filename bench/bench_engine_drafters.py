"""Drafters of an engine over 16 requests, together against one by one: `python bench/bench_engine_drafters.py --json FILE`.

The language model has 2 layers of width 576 and a vocabulary of 49152. Every request has read a prompt of its own length. Each
pair first gives the same drafts and is then timed in turns; `speedup` is the time of one by one over that of all together.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from table import markdown
from transformers import LlamaConfig, LlamaForCausalLM

from hedgespec.drafters.datastore import Datastore
from hedgespec.integrations.vllm.drafters import CausalLMs

REQUESTS, NEW, DRAFTED, VOCABULARY = 16, 3, 4, 49152
PROMPTS = [100 + 7 * request for request in range(REQUESTS)]
CORPUS = 1_000_000
"""Tokens of the datastore's corpus."""


def in_turns(together: Callable[[], object], alone: Callable[[], object], seconds: float) -> dict[str, float]:
    """Returns the fastest time of each call in milliseconds, and their ratio."""
    best = [float("inf")] * 2
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        for number, call in enumerate((together, alone)):
            start = time.perf_counter()
            call()
            best[number] = min(best[number], time.perf_counter() - start)
    return {"together_ms": 1e3 * best[0], "one_by_one_ms": 1e3 * best[1], "speedup": best[1] / best[0]}


def language_model(device: str, seconds: float) -> dict[str, dict[str, float]]:
    """Returns the times of reading new tokens and of drafting."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=576, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=2**20,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().to(device)
    keys = range(REQUESTS)
    pair = []
    for _ in range(2):
        random, drafter = np.random.default_rng(0), CausalLMs(model, VOCABULARY)
        drafter.extend(keys, [random.integers(0, VOCABULARY, length) for length in PROMPTS], [1] * REQUESTS)
        pair.append(drafter)
    together, alone = pair
    drafts = together.draft(keys, [DRAFTED] * REQUESTS)
    if drafts != [alone.draft([key], [DRAFTED])[0] for key in keys]:
        raise AssertionError("the drafts of all requests together are not those of each alone")
    random = np.random.default_rng(1)
    tokens = [random.integers(0, VOCABULARY, NEW) for _ in keys]
    return {
        "language model, draft": in_turns(
            lambda: together.draft(keys, [DRAFTED] * REQUESTS), lambda: [alone.draft([key], [DRAFTED]) for key in keys], seconds
        ),
        "language model, extend": in_turns(
            lambda: together.extend(keys, tokens, [NEW] * REQUESTS),
            lambda: [alone.extend([key], [tokens[key]], [NEW]) for key in keys],
            seconds,
        ),
    }


def datastore(seconds: float) -> dict[str, dict[str, float]]:
    """Returns the times of looking up the next token."""
    random = np.random.default_rng(0)
    text = np.minimum(random.zipf(1.3, CORPUS), VOCABULARY - 1)
    store = Datastore.build([text])
    contexts = [text[start : start + 20].tolist() for start in random.integers(0, CORPUS - 20, REQUESTS)]
    if store.next_tokens(contexts).tolist() != [int(store.next_tokens([one])[0]) for one in contexts]:
        raise AssertionError("the tokens of all requests together are not those of each alone")
    found = in_turns(lambda: store.next_tokens(contexts), lambda: [store.next_tokens([one]) for one in contexts], seconds / 8)
    return {"datastore, next token": found | {"entries": len(store)}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda, default cpu")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each pair, default 4")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where all figures go")
    options = parser.parse_args()
    found = language_model(options.device, options.seconds) | datastore(options.seconds)
    rows = [[name, f"{one['together_ms']:.3f}", f"{one['speedup']:.2f}"] for name, one in found.items()]
    print(markdown([f"{REQUESTS} requests", "ms together", "speedup"], rows))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
