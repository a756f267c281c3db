"""Measures of replayed requests: tokens per round, regret, the best drafter in hindsight, and confidence intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hedgespec.experiments.recording import Trace
from hedgespec.experiments.replay import alone
from hedgespec.selection.delay import DelayQueue
from hedgespec.stats import DecodeStats

CONFIDENCE = 0.95
"""Coverage of every interval."""
HELD_SHARE = 0.9
"""Share of the remaining rounds that the best drafters must draft for the text to count as held by them."""
T = TypeVar("T")
Interval = dict[str, float]
"""{"mean", "low", "high"}."""


# Intervals


def mean_interval(values: ArrayLike) -> Interval:
    """Returns the mean of at least two independent values with its 95% confidence interval by Student's t."""
    from scipy import stats

    values = np.asarray(values, dtype=np.float64)
    mean, error = values.mean(), stats.sem(values)
    reach = error * stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)
    return {"mean": float(mean), "low": float(mean - reach), "high": float(mean + reach)}


def ratio_interval(numerators: ArrayLike, denominators: ArrayLike, draws: int = 2000) -> Interval:
    """Returns sum(numerators) / sum(denominators) over independent texts, with its 95% interval by resampling the texts.

    Args:
        numerators: [texts].
        denominators: [texts].
        draws: number of bootstrap samples.
    """
    above, below = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    drawn = np.random.default_rng(0).integers(len(above), size=(draws, len(above)))
    with np.errstate(invalid="ignore", divide="ignore"):
        low, high = np.nanquantile(above[drawn].sum(1) / below[drawn].sum(1), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        return {"mean": float(above.sum() / below.sum()), "low": float(low), "high": float(high)}


def over_seeds(
    traces: Sequence[Trace], seeds: int, run: Callable[[Trace, int], DecodeStats], measure: Callable[[list[DecodeStats]], T]
) -> list[T]:
    """Returns `measure` of all texts together, once for each seed.

    Args:
        traces: the texts.
        seeds: number of seeds.
        run: replays a text with a seed. Each text gets seeds of its own.
        measure: of the statistics of all texts, in order.
    """
    return [measure([run(trace, 1000 * seed + trace.number) for trace in traces]) for seed in range(seeds)]


# Tokens per round


def tokens_per_round(requests: Sequence[DecodeStats]) -> float:
    """Returns emitted tokens over rounds, of all requests together; NaN without a round."""
    rounds = sum(stats.rounds for stats in requests)
    return sum(sum(stats.emitted_by_round) for stats in requests) / rounds if rounds else float("nan")


def tokens_within(stats: DecodeStats, positions: slice) -> tuple[int, int]:
    """Returns the tokens and the number of the rounds that begin at some positions of a text."""
    began = np.cumsum([0, *stats.emitted_by_round[:-1]])
    inside = (began >= positions.start) & (began < positions.stop)
    return int(np.asarray(stats.emitted_by_round)[inside].sum()), int(inside.sum())


def rounds_alone(trace: Trace, draft_length: int, seeds: int = 1) -> list[float]:
    """Returns the number of rounds each drafter needs for the text by itself, [N]; a mean over seeds if proposals are
    sampled."""
    return [float(np.mean([len(run) for run in runs])) for runs in _runs_alone(trace, draft_length, seeds)]


def tokens_per_round_alone(trace: Trace, draft_length: int, seeds: int = 1) -> NDArray[np.float64]:
    """Returns the tokens per round of each drafter by itself, [N]; a mean over seeds if proposals are sampled."""
    return np.array([np.mean([np.mean(run) for run in runs]) for runs in _runs_alone(trace, draft_length, seeds)])


def _runs_alone(trace: Trace, draft_length: int, seeds: int) -> list[list[list[int]]]:
    """Returns the tokens of each round by drafter and seed. One seed is enough if no draw decides anything."""
    certain = np.isin(trace.drafted, (0.0, 1.0)).all()
    return [
        [alone(trace, drafter, draft_length, seed=seed) for seed in range(1 if certain else seeds)]
        for drafter in range(len(trace.drafters))
    ]


def best_of(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Returns the indices of the largest values, ties included."""
    return np.flatnonzero(values >= values.max() - 1e-9)


# Losses and regret


def has_full_drafts(trace: Trace, draft_length: int) -> bool:
    """Returns whether at least two positions of the text have room for a whole draft."""
    return trace.drafted.shape[1] > draft_length


def realised_lengths(trace: Trace, draft_length: int) -> NDArray[np.float64]:
    """Returns the expected tokens of a round that each drafter drafts by itself from each position, [N, T-K+1]."""
    starts = trace.drafted.shape[1] - draft_length + 1
    return 1 + trace.drafted[:, :starts, :draft_length].cumprod(-1).sum(-1)


def losses(trace: Trace, draft_length: int) -> NDArray[np.float64]:
    """Returns the loss of every drafter at each position where it is complete, [F, N], whichever drafter drafts.

    Positions that lack room for a whole draft have a loss only if all drafters are rejected before the text ends, so F may
    exceed T-K+1; `losses(...)[: T-K+1]` are those with room.
    """
    feedback = DelayQueue(len(trace.drafters), draft_length).push(trace.prob, trace.ratio)
    return np.array([one.losses for one in feedback]).reshape(-1, len(trace.drafters))


def regret(stats: DecodeStats, losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the cumulative loss of the drafters that drafted less that of the drafter that is best in the end, [F].

    A position counts with the drafter of the round that emitted it, so delay shows. (`DecodeStats.regret` counts in the order
    in which the learner takes the losses instead.) Positions of rounds without a draft are left out.

    Args:
        stats: of the request.
        losses: [F, N].
    """
    drafter = np.repeat(np.array(stats.choices, dtype=np.int64), stats.emitted_by_round)[: len(losses)]
    losses, drafter = losses[drafter >= 0], drafter[drafter >= 0]
    best = losses[:, losses.sum(0).argmin()]
    return np.cumsum(losses[np.arange(len(losses)), drafter] - best)


def weights_by_position(stats: DecodeStats) -> NDArray[np.float64]:
    """Returns the weights in force when each position was drafted, [T, N]."""
    return np.repeat(np.array(stats.weights), stats.emitted_by_round, axis=0)


def expected_regret(weights: NDArray[np.float64], losses: NDArray[np.float64]) -> float:
    """Returns the cumulative expected loss under the weights less that of the best drafter.

    Args:
        weights: in force at each position, [at least F, N].
        losses: [F, N].
    """
    return float((weights[: len(losses)] * losses).sum() - losses.sum(0).min())


def tokens_behind(weights: NDArray[np.float64], losses: NDArray[np.float64], draft_length: int) -> float:
    """Returns the expected regret per position in tokens per round: how many more tokens a round of the best drafter emits than
    one of a drafter drawn from the weights. Args: as for `expected_regret`, and K."""
    return expected_regret(weights, losses) / len(losses) * (draft_length + 1)


def tokens_until_held(stats: DecodeStats, best: ArrayLike) -> int:
    """Returns the tokens emitted before the best drafters hold the text, or all of its tokens if they never do.

    They hold it from the first round on from which at least `HELD_SHARE` of the rounds are drafted by one of them. Rounds
    without a draft are left out.
    """
    choices = np.array(stats.choices, dtype=np.int64)
    right = np.isin(choices, best)[choices >= 0]
    began = np.concatenate([[0], np.cumsum(stats.emitted_by_round)])
    share = np.cumsum(right[::-1])[::-1] / np.arange(len(right), 0, -1)
    held = np.flatnonzero(share >= HELD_SHARE)
    return int(began[:-1][choices >= 0][held[0]] if len(held) else began[-1])


def request_measures(
    traces: Sequence[Trace], draft_length: int, alone: Sequence[Sequence[float]] | None = None
) -> Callable[[list[DecodeStats]], dict[str, Any]]:
    """Returns a measure for `over_seeds` of the same texts.

    Its dictionary has, of all texts, `mat` (tokens per round) and `rounds` by text; of each domain `mat` and each drafter's
    share of the drafts; as means of a request `regret`, `positions` and, if `alone` is given, `held_after` (tokens until the
    best drafter holds the text); `regret_a_position` in tokens per round; and `curve`, the regret along the positions, in which
    a text that has ended keeps its last value.

    Args:
        traces: the texts.
        draft_length: K.
        alone: `rounds_alone` of every text.
    """
    known = [losses(trace, draft_length) for trace in traces]
    longest = max(map(len, known))

    def measure(requests: list[DecodeStats]) -> dict[str, Any]:
        curves = [regret(stats, loss) for stats, loss in zip(requests, known, strict=True)]
        ends = [float(curve[-1]) if len(curve) else 0.0 for curve in curves]
        padded = [np.pad(curve, (0, longest - len(curve)), mode="edge") for curve in curves if len(curve)]
        positions = sum(map(len, curves))
        domains = {}
        for name in dict.fromkeys(trace.domain for trace in traces):
            among = [stats for stats, trace in zip(requests, traces) if trace.domain == name]
            picks = np.sum([stats.picks for stats in among], axis=0)
            domains[name] = {"mat": tokens_per_round(among), "shares": (picks / max(picks.sum(), 1)).tolist()}
        result = {
            "mat": tokens_per_round(requests),
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
