"""Made-up traces, and small sets of them for the studies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hedgespec.experiments.recording import Trace
from hedgespec.stats import DecodeStats

GOOD, BAD = 0.8, 0.35
"""Acceptance of the drafter that is best for a text, and of all others."""


def drafts_of(ratio: np.ndarray, depth: int) -> np.ndarray:
    """Returns [N, T, D]: `ratio` [N, T] read on from each position, 0 after the first 0. A drafter of these drafts reads its
    own features as well as the target's."""
    after = np.pad(ratio, ((0, 0), (0, depth)))
    drafted = np.stack([after[:, d : d + ratio.shape[1]] for d in range(depth)], axis=-1)
    dead = np.cumprod(np.pad(drafted, ((0, 0), (0, 0), (1, 0)), constant_values=1.0)[..., :-1], axis=-1) == 0
    return np.where(dead, 0.0, drafted)


def trace_of(ratio: np.ndarray, prob: np.ndarray | None = None, *, depth: int = 8, **fields) -> Trace:
    """Returns a trace with this acceptance_ratio [N, T]; acceptance_prob is the same unless given."""
    count, positions = ratio.shape
    values = {
        "domain": "python", "number": 0, "mode": "sampled", "temperature": 0.0, "seed": 0, "max_new_tokens": positions + 1,
        "prompt_length": 9, "drafters": tuple(f"drafter {index}" for index in range(count)), "own_features": (True,) * count,
        "tokens": np.arange(10 + positions), "prompt_prob": np.full((count, 8), 0.5), "ratio": ratio,
        "prob": ratio if prob is None else prob, "drafted": drafts_of(ratio, depth),
    }  # fmt: skip
    return Trace(**values | fields)


def random_trace(
    number: int, drafters: Sequence[str], domains: Sequence[str], *, mode: str = "sampled", temperature: float = 0.0,
    positions: int = 24, depth: int = 8,
) -> Trace:  # fmt: skip
    """Returns a text for which the drafter `number % len(domains)` is accepted more often than the others.

    Acceptance is 0 or 1 unless proposals are sampled; then acceptance_prob and acceptance_ratio differ.
    """
    random, best = np.random.default_rng(number), number % len(domains)
    chance = np.full((len(drafters), 1), BAD)
    chance[best] = GOOD
    if mode == "sampled" and temperature > 0:
        prob = np.clip(chance + random.normal(0, 0.1, (len(drafters), positions)), 0, 1)
        ratio = np.clip(prob + random.normal(0, 0.2, prob.shape), 0, 1)
    else:
        prob = ratio = (random.random((len(drafters), positions)) < chance).astype(float)
    return trace_of(
        ratio, prob, depth=depth, drafters=tuple(drafters), domain=domains[best], number=number, seed=number, mode=mode,
        temperature=temperature, prompt_prob=np.repeat(chance, 8, axis=1),
        own_features=tuple(index % 3 != 2 for index in range(len(drafters))),
    )  # fmt: skip


def stats_of(choices: list[int], emitted: list[int], drafters: int = 3) -> DecodeStats:
    """Returns the statistics of a request with these drafters and emitted tokens by round."""
    stats = DecodeStats(tuple("abcdefg"[:drafters]), 2)
    stats.choices, stats.emitted_by_round = choices, emitted
    return stats
