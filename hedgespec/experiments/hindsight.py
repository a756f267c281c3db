"""What is known of a recorded text once it is over: what each drafter made of it, and how far a learner stayed behind."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hedgespec.evaluate import expected_accepted_length, length_loss
from hedgespec.experiments.traces import Trace, alone
from hedgespec.metrics import DecodeStats


def long_enough(traces: Sequence[Trace], draft_length: int) -> list[Trace]:
    """The texts in which at least two positions have room for a whole draft."""
    return [trace for trace in traces if trace.drafted.shape[1] > draft_length]


def realised_lengths(trace: Trace, draft_length: int) -> np.ndarray:
    """Expected tokens of a round that each drafter really drafts by itself, from each position with room for it, [N, T-K+1]."""
    starts = trace.drafted.shape[1] - draft_length + 1
    return 1 + trace.drafted[:, :starts, :draft_length].cumprod(-1).sum(-1)


def length_losses(trace: Trace, draft_length: int) -> np.ndarray:
    """What a learner that waits for nothing would hear at each of these positions, [T-K+1, N]."""
    return length_loss(expected_accepted_length(trace.prob, trace.ratio, draft_length, "exact"), draft_length).T


def fixed_mats(trace: Trace, draft_length: int, seeds: int) -> np.ndarray:
    """MAT of each drafter alone, [N]: where acceptance is drawn the mean over as many seeds."""
    drawn = trace.mode == "sampled" and trace.temperature > 0
    runs = [[np.mean(alone(trace, drafter, draft_length, seed=seed)) for seed in range(seeds if drawn else 1)]
            for drafter in range(len(trace.drafters))]  # fmt: skip
    return np.mean(runs, axis=1)


def best_of(mats: np.ndarray) -> np.ndarray:
    """The drafters that nobody beats, int64; ties count."""
    return np.flatnonzero(mats >= mats.max() - 1e-9)


def weights_by_position(stats: DecodeStats) -> np.ndarray:
    """The weights in force when each position was drafted, [T, N]."""
    return np.repeat(np.array(stats.weights), stats.emitted_by_round, axis=0)


def tokens_behind(weights: np.ndarray, losses: np.ndarray, draft_length: int) -> float:
    """Regret a position, in tokens a round: how much longer a round of the best drafter is than one of a drafter drawn from the
    weights.

    Args:
        weights: in force at each position, [T, N].
        losses: of the first positions, 1 - length / (K + 1), [at most T, N].
        draft_length: K.
    """
    played = (weights[: len(losses)] * losses).sum(1).mean()
    return float(played - losses.mean(0).min()) * (draft_length + 1)
