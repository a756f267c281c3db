"""What a replayed text is judged by: tokens a round, regret, and how soon the best drafter has it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hedgespec.delay import DelayQueue
from hedgespec.experiments.statistics import mat
from hedgespec.experiments.traces import Trace, alone
from hedgespec.metrics import DecodeStats

HELD = 0.9
"""Share of the following rounds with which a drafter holds a text."""


def signature(traces: Sequence[Trace]) -> str:
    """Names what was recorded, for the keys of `Laboratory.once`."""
    digest = hashlib.sha256()
    for trace in traces:
        for array in (trace.tokens, trace.prompt_prob, trace.prob, trace.drafted):
            digest.update(array.tobytes())
    return f"{len(traces)} texts {digest.hexdigest()[:12]}"


def losses(trace: Trace, draft_length: int) -> NDArray[np.float64]:
    """Every drafter's loss at each position where it is known, [F, N]: what a learner hears, whoever drafts."""
    found = DelayQueue(len(trace.drafters), draft_length).push(trace.prob, trace.ratio)
    return np.array([one.losses for one in found]).reshape(-1, len(trace.drafters))


def regret(stats: DecodeStats, losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cumulative loss of the drafters that drafted less that of the one that is best in the end, [F].

    A position counts with the drafter of the round that emitted it, so that delay shows. `DecodeStats.regret` is in the
    learner's own clock, which stands still while a loss is on its way. Rounds in which nobody drafted are left out.
    """
    drafter = np.repeat(np.array(stats.choices, dtype=np.int64), stats.emitted_by_round)[: len(losses)]
    losses, drafter = losses[drafter >= 0], drafter[drafter >= 0]
    best = losses[:, losses.sum(0).argmin()]
    return np.cumsum(losses[np.arange(len(losses)), drafter] - best)


def rounds_alone(trace: Trace, draft_length: int, seeds: int = 1) -> list[float]:
    """Rounds that each drafter takes for the text by itself, [N]; a mean over seeds where proposals are sampled."""
    certain = np.isin(trace.drafted, (0.0, 1.0)).all()
    used = range(1 if certain else seeds)
    every = range(len(trace.drafters))
    return [float(np.mean([len(alone(trace, one, draft_length, seed=seed)) for seed in used])) for one in every]


def tokens_until_held(stats: DecodeStats, best: ArrayLike) -> int:
    """Tokens emitted before the first round from which on `HELD` of the rounds are drafted by one of the best drafters; all of
    them where there is none. Rounds in which nobody drafted are left out."""
    choices = np.array(stats.choices, dtype=np.int64)
    right = np.isin(choices, best)[choices >= 0]
    began = np.concatenate([[0], np.cumsum(stats.emitted_by_round)])
    share = np.cumsum(right[::-1])[::-1] / np.arange(len(right), 0, -1)
    held = np.flatnonzero(share >= HELD)
    return int(began[:-1][choices >= 0][held[0]] if len(held) else began[-1])


def judge(traces: Sequence[Trace], draft_length: int, alone: Sequence[Sequence[float]] | None = None) -> Callable[..., dict]:
    """A `measure` for `by_seed`.

    Of all texts: MAT, and each text's rounds. Of a domain: MAT, and each drafter's share of the drafts. Means of a request:
    regret, positions, and, where every text's `rounds_alone` is given, tokens until the best drafter has it. Of a position:
    regret, in tokens a round. And regret along the positions, where a text that has ended keeps what it had.
    """
    known = [losses(trace, draft_length) for trace in traces]
    longest = max(map(len, known))

    def measure(_: Sequence[Trace], requests: Sequence[DecodeStats]) -> dict:
        curves = [regret(stats, loss) for stats, loss in zip(requests, known, strict=True)]
        ends = [float(curve[-1]) if len(curve) else 0.0 for curve in curves]
        padded = [np.pad(curve, (0, longest - len(curve)), mode="edge") for curve in curves if len(curve)]
        positions = sum(map(len, curves))
        domains = {}
        for name in dict.fromkeys(trace.domain for trace in traces):
            among = [stats for stats, trace in zip(requests, traces) if trace.domain == name]
            picks = np.sum([stats.picks for stats in among], axis=0)
            domains[name] = {"mat": mat(among), "shares": (picks / max(picks.sum(), 1)).tolist()}
        result = {
            "mat": mat(requests),
            "rounds": [stats.rounds for stats in requests],
            "regret": float(np.mean(ends)),
            "regret_a_position": (draft_length + 1) * sum(ends) / positions,
            "positions": positions / len(curves),
            "curve": (np.sum(padded, axis=0) / len(curves)).tolist(),
            "domains": domains,
        }
        if alone is not None:
            best = [np.flatnonzero(np.isclose(rounds, min(rounds))) for rounds in alone]
            found = [tokens_until_held(stats, which) for stats, which in zip(requests, best) if stats.rounds]
            result["held_after"] = float(np.mean(found))
        return result

    return measure
