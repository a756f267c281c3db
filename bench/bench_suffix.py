"""Drafting from what was seen before: `python bench/bench_suffix.py [--data data/zoo] [--json FILE]`.

Replays the greedy answers of a collection, which need no model: a round at a position drafts up to K tokens, of which those
that the answer goes on with are accepted, and emits one more. Printed are tokens a round and drafted tokens a round, by kind of
prompt, for transformers' prompt lookup (`PromptLookupCandidateGenerator` itself), for the latest n-gram of at most three
tokens, and for the suffix index over the request alone and over the answers of the requests before too. Then the time of the
index's operations on the same texts.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from table import markdown
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from hedgespec.drafters.ngram import NGramIndex
from hedgespec.drafters.suffix import SuffixIndex
from hedgespec.zoo.shards import Row, read_folder
from hedgespec.zoo.sources import by_name

Drafting = Callable[[list[int]], list[int]]
"""The whole text so far -> at most K tokens that may follow."""
LENGTHS = (5, 10)


class Latest:
    """The latest occurrence of the longest n-gram of at most three tokens."""

    def __init__(self, length: int, shared: None) -> None:
        self.length, self.index, self.seen = length, NGramIndex(3), 0

    def __call__(self, text: list[int]) -> list[int]:
        for token in text[self.seen :]:
            self.index.append(token)
        self.seen = len(text)
        drafted: list[int] = []
        while len(drafted) < self.length and (token := self.index.propose(drafted)) is not None:
            drafted.append(token)
        return drafted


class Transformers:
    """What `generate(prompt_lookup_num_tokens=K)` drafts: the first occurrence of the last two tokens, or of the last one."""

    def __init__(self, length: int, shared: None) -> None:
        self.generator = PromptLookupCandidateGenerator(num_output_tokens=length, max_matching_ngram_size=2, max_length=2**20)

    def __call__(self, text: list[int]) -> list[int]:
        found, _ = self.generator.get_candidates(torch.tensor([text]))
        return found[0, len(text) :].tolist()


class Suffix:
    """The longest suffix of any length, in the request alone or in a shared index."""

    def __init__(self, length: int, shared: SuffixIndex | None) -> None:
        self.index = SuffixIndex() if shared is None else shared
        self.length, self.text, self.seen = length, self.index.open(), 0

    def __call__(self, text: list[int]) -> list[int]:
        self.text.append(text[self.seen :])
        self.seen = len(text)
        return [token for token, *_ in self.text.draft(self.length)]


def rounds(drafting: Drafting, tokens: Sequence[int], start: int) -> tuple[int, int]:
    """Returns how many rounds the answer `tokens[start:]` takes, and how many tokens they draft."""
    position, count, total = start, 0, 0
    while position < len(tokens):
        drafted = drafting(list(tokens[:position]))
        accepted = 0
        while (
            accepted < len(drafted) and position + accepted < len(tokens) and drafted[accepted] == tokens[position + accepted]
        ):
            accepted += 1
        position, count, total = position + accepted + 1, count + 1, total + len(drafted)
    return count, total


def replayed(rows: Sequence[Row], length: int) -> dict[str, dict[str, tuple[float, float]]]:
    """Returns (tokens a round, drafted a round) by kind of prompt and way of drafting, each a mean over all rounds."""
    history = SuffixIndex()
    ways = {"transformers": (Transformers, None), "3-gram": (Latest, None), "suffix": (Suffix, None),
            "suffix, shared": (Suffix, history)}  # fmt: skip
    sums: dict[str, dict[str, np.ndarray]] = defaultdict(lambda: defaultdict(lambda: np.zeros(3)))
    for row in rows:
        kind = by_name()[row.source].kind
        for name, (make, shared) in ways.items():
            count, drafted = rounds(make(length, shared), row.tokens, row.prompt_length)
            for group in (kind, "all"):
                sums[group][name] += (len(row.tokens) - row.prompt_length, count, drafted)
    return {
        group: {name: (emitted / count, drafted / count) for name, (emitted, count, drafted) in ways.items()}
        for group, ways in sums.items()
    }


def timed(rows: Sequence[Row]) -> dict[str, float]:
    """Returns microseconds of appending a token and of proposing one, and bytes of memory for each token held."""
    index = SuffixIndex()
    count = sum(len(row.tokens) for row in rows)
    began = time.perf_counter()
    for row in rows:
        index.open().append(row.tokens)
    appended = time.perf_counter() - began
    texts = [index.open() for _ in range(256)]
    for text, row in zip(texts, rows):
        text.append(row.tokens[: len(row.tokens) // 2])
    began = time.perf_counter()
    proposed = sum(len(text.draft(8)) for text in texts)
    return {
        "tokens": count,
        "append_us": appended / count * 1e6,
        "propose_us": (time.perf_counter() - began) / max(proposed, 1) * 1e6,
        "bytes_a_token": index.nbytes / len(index),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/zoo"))
    parser.add_argument("--rows", type=int, default=400, help="rows that are replayed, drawn with seed 0")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    everything = list(read_folder(arguments.data).values())
    greedy = [row for row in everything if row.temperature == 0]
    chosen = np.random.default_rng(0).permutation(len(greedy))[: arguments.rows]
    result: dict = {"rows": len(chosen), "tokens_per_round": {}}
    for length in LENGTHS:
        table = replayed([greedy[place] for place in chosen], length)
        result["tokens_per_round"][length] = table
        names = list(table["all"])
        lines = [
            [kind, *(f"{ways[name][0]:.2f} ({ways[name][1]:.1f})" for name in names)] for kind, ways in sorted(table.items())
        ]
        print(f"\nK = {length}: tokens a round (drafted tokens a round)\n")
        print(markdown(["prompts", *names], lines))
    result["index"] = timed(everything)
    print(", ".join(f"{name} {value:.2f}" for name, value in result["index"].items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
