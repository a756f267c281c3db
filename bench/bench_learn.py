"""What learning and selection cost on the host: `pytest bench/bench_learn.py`, with `--benchmark-json FILE` for the figures.

Each part first agrees with hedgespec/algorithm.py, or with the definition in its own docstring where the page has none. Then it
is timed over requests of `STEPS` steps, so that every state they go through counts. `us` is the time of one step
in microseconds, `goal_us` what it may cost; `speedup`, where the page computes the same: its time over ours, in turns.
"""

from __future__ import annotations

import numpy as np
import pytest

from hedgespec import algorithm
from hedgespec.learners import NAMES, make
from hedgespec.selection.delay import DelayQueue
from hedgespec.selection.select import select

STEPS = 16
DRAFT_LENGTH, EMITTED = 5, 3
"""A round's drafted tokens, and how many positions it verifies."""
UPDATE_GOAL_US = {7: 20, 64: 60}
"""Of NormalHedge, the default, by number of drafters: the update and the weights it makes."""
ROUND_GOAL_US = 20
"""Of selection and the queue together, with seven drafters."""

pools = pytest.mark.parametrize("drafters", UPDATE_GOAL_US, ids="N{}".format)


def tell(benchmark, capsys, what: str, seconds: float, goal_us: float | None = None, speedup: float | None = None) -> None:
    figures = {"us": round(seconds * 1e6, 2), "goal_us": goal_us, "speedup": speedup and round(speedup, 2)}
    benchmark.extra_info |= {key: figure for key, figure in figures.items() if figure is not None}
    with capsys.disabled():
        print(f"\n{what}: " + ", ".join(f"{key} {figure}" for key, figure in benchmark.extra_info.items()))


@pools
@pytest.mark.parametrize("name", NAMES)
def test_update(benchmark, capsys, fastest, name, drafters):
    """One loss vector of drafters that are equally good, which keeps many of them ahead and NormalHedge busy."""
    losses = np.random.default_rng(0).random((STEPS, drafters))
    learner = make(name, drafters)
    for row in losses:
        learner.update(row, chosen=0, chosen_weight=0.5)
        assert abs(learner.weights().sum() - 1) < 1e-12
        if name == "normal_hedge":
            np.testing.assert_allclose(learner.weights(), algorithm.normal_hedge(learner.regrets), rtol=1e-9, atol=1e-12)

    def ours():
        learner = make(name, drafters)
        for row in losses:
            learner.update(row, chosen=0, chosen_weight=0.5)
            learner.weights()

    def page():
        regrets = np.zeros(drafters)
        for row in losses:
            regrets += algorithm.normal_hedge(regrets) @ row - row

    whole, made, *pages = fastest(ours, lambda: make(name, drafters), *([page] if name == "normal_hedge" else []), seconds=3)
    own = whole - made
    compared = (UPDATE_GOAL_US[drafters], pages[0] / own) if pages else ()
    tell(benchmark, capsys, f"{name}, {drafters} drafters", own / STEPS, *compared)
    benchmark.pedantic(ours, rounds=2)


def page_losses(prob: np.ndarray, ratio: np.ndarray) -> list[np.ndarray]:
    """The losses that hedgespec/algorithm.py completes on the way through a trace [N, L]."""
    losses = []
    for t in range(prob.shape[1]):
        g, a = (seen[:, t : t + DRAFT_LENGTH].T for seen in (prob, ratio))
        if len(g) < DRAFT_LENGTH and a.prod(axis=0).any():
            break
        survival = np.concatenate([np.ones((1, len(prob))), a[:-1].cumprod(axis=0)])
        losses.append(1 - (1 + (survival * g).sum(axis=0)) / (DRAFT_LENGTH + 1))
    return losses


def trace(drafters: int, temperature: int) -> tuple[np.ndarray, np.ndarray]:
    """acceptance_prob and acceptance_ratio at all positions of a request; at temperature 0 each is 0 or 1."""
    prob, ratio = np.random.default_rng(1).random((2, drafters, STEPS * EMITTED))
    return (prob, ratio) if temperature else ((ratio > 0.5).astype(float), (ratio > 0.5).astype(float))


@pools
@pytest.mark.parametrize("temperature", (1, 0), ids="temperature{}".format)
def test_queue_and_selection(benchmark, capsys, fastest, drafters, temperature):
    """One push of a round's positions and one selection."""
    prob, ratio = trace(drafters, temperature)
    rounds = [np.ascontiguousarray([prob[:, at : at + EMITTED], ratio[:, at : at + EMITTED]])
              for at in range(0, prob.shape[1], EMITTED)]  # fmt: skip
    queue = DelayQueue(drafters, DRAFT_LENGTH)
    completed = [feedback.losses for scores in rounds for feedback in queue.push(*scores)]
    np.testing.assert_allclose(completed, page_losses(prob, ratio), atol=1e-14)
    weights, uniforms = np.random.default_rng(2).dirichlet(np.ones(drafters)), np.linspace(0, 1, STEPS, endpoint=False)
    for uniform in uniforms:
        assert select(weights, uniform) == np.flatnonzero(weights.cumsum() > uniform)[0]

    def pushes():
        queue = DelayQueue(drafters, DRAFT_LENGTH)
        for scores in rounds:
            queue.push(*scores)

    def selections():
        for uniform in uniforms:
            select(weights, uniform)

    push, selection, page = fastest(pushes, selections, lambda: page_losses(prob, ratio), seconds=5)
    benchmark.extra_info |= {"push_us": round(push / STEPS * 1e6, 2), "select_us": round(selection / STEPS * 1e6, 2)}
    goal = ROUND_GOAL_US if drafters == 7 else None
    tell(benchmark, capsys, f"{drafters} drafters, temperature {temperature}", (push + selection) / STEPS, goal, page / push)
    benchmark.pedantic(pushes, rounds=2)
