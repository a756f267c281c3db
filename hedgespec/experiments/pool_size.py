"""Does a larger pool cost anything?"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hedgespec import learners
from hedgespec.config import DecodeConfig
from hedgespec.decoder import Decoder
from hedgespec.experiments import Experiment
from hedgespec.experiments.laboratory import Laboratory
from hedgespec.experiments.measures import losses, regret, rounds_alone, signature
from hedgespec.experiments.statistics import mat, mean_interval, told
from hedgespec.experiments.telling import LEARNERS, band, colour, figure, table
from hedgespec.experiments.traces import Trace, replay

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COMPARED = ("normal_hedge", "hedge", "ucb", "exp3", "meta_sd", "uniform")
ZOO_SIZES, WIDE_SIZES = (2, 3, 4, 5, 6, 7), (2, 4, 8, 16, 32, 64)
Pool = Callable[[Trace, int, np.random.Generator], list[int]]
"""Drafters of a text in the order in which pools take them: text, its domain's best drafter, randomness."""


def measure(laboratory: Laboratory) -> dict[str, Any]:
    return {
        "zoo": _measure(laboratory, "greedy", ZOO_SIZES, _any_order),
        "wide": _measure(laboratory, "wide", WIDE_SIZES, _best_first),
        "live_over_replay": laboratory.once(f"live over replay, {DecodeConfig()}", lambda: _live_over_replay(laboratory)),
    }


def _any_order(trace: Trace, best: int, random: np.random.Generator) -> list[int]:
    return random.permutation(len(trace.drafters)).tolist()


def _best_first(trace: Trace, best: int, random: np.random.Generator) -> list[int]:
    """So that every pool has it: what grows is what has to be told from it."""
    return [best, *random.permutation([one for one in range(len(trace.drafters)) if one != best]).tolist()]


def _measure(laboratory: Laboratory, name: str, sizes: Sequence[int], order: Pool) -> dict[str, Any]:
    """By learner: MAT and regret per request at each size, slopes of regret in N and ln N. A seed's pools are nested."""
    traces, length, seeds = laboratory.traces(name), DecodeConfig.draft_length, laboratory.seeds
    sizes = [size for size in sizes if size <= len(traces[0].drafters)]
    key = f"{name}, {signature(traces)}, {seeds} seeds, pools of {sizes} by {order.__name__}"
    alone = laboratory.once(f"rounds alone of {key}", lambda: [rounds_alone(trace, length) for trace in traces])
    best = {
        domain: int(np.sum([rounds for trace, rounds in zip(traces, alone) if trace.domain == domain], axis=0).argmin())
        for domain in {trace.domain for trace in traces}
    }

    def runs(config: DecodeConfig, size: int) -> list[dict[str, float]]:
        found = []
        for seed in range(seeds):
            requests, ends = [], []
            for trace in traces:
                random = np.random.default_rng((seed, trace.number))
                chosen = order(trace, best[trace.domain], random)[:size]
                pool = trace.of(np.random.default_rng((seed, trace.number, size)).permutation(chosen))
                requests.append(stats := replay(pool, config, seed=1000 * seed + trace.number))
                curve = regret(stats, losses(pool, length))
                ends.append(float(curve[-1]) if len(curve) else 0.0)
            found.append({"mat": mat(requests), "regret": float(np.mean(ends))})
        return found

    rows = {}
    work = [(learner, size) for learner in COMPARED if learner in learners.NAMES for size in sizes]
    for learner, size in laboratory.track(work, f"pools, {name}"):
        config = DecodeConfig(learner=learner, warm_start=0, evaluate_every=1)
        found = laboratory.once(f"{key}, {config}, {size}", lambda config=config, size=size: runs(config, size))
        rows.setdefault(learner, []).append(found)
    return {"texts": len(traces), "sizes": sizes, "learners": {learner: _told(found, sizes) for learner, found in rows.items()}}


def _told(found: list[list[dict[str, float]]], sizes: Sequence[int]) -> dict[str, Any]:
    """Intervals by size, and of the slopes that least squares finds in each seed."""
    regrets = np.array([[run["regret"] for run in runs] for runs in found])
    return {
        "mat": [mean_interval([run["mat"] for run in runs]) for runs in found],
        "regret": [mean_interval(values) for values in regrets],
        "slope": mean_interval(np.polyfit(sizes, regrets, 1)[0]),
        "slope_in_log": mean_interval(np.polyfit(np.log(sizes), regrets, 1)[0]),
    }


def _live_over_replay(laboratory: Laboratory) -> float:
    """Time that the decoder takes for a text over that of its replay."""
    trace, zoo = laboratory.traces("greedy")[0], laboratory.zoo
    decoder = Decoder(zoo.target, zoo.drafters)
    decoder.generate(zoo.tokenizer("Warm.", return_tensors="pt").input_ids.to(zoo.target.device), max_new_tokens=8)
    ids = zoo.tokenizer(zoo.tokenizer.decode(trace.tokens[: trace.prompt_length]), return_tensors="pt").input_ids
    live = decoder.generate(ids.to(zoo.target.device), max_new_tokens=trace.max_new_tokens, seed=0).stats[0]
    began = time.perf_counter()
    again = replay(trace, DecodeConfig(), seed=0)
    seconds = time.perf_counter() - began
    return (live.seconds / live.rounds) / (seconds / again.rounds)


def tell(result: dict[str, Any]) -> str:
    parts = [
        f"Regret of a text, as in the comparison of learners. Intervals: 95% over {result['seeds']} seeds, each with pools of "
        "its own, the smaller ones parts of the larger. Slopes: least squares in each seed. No warm start, all learners hear "
        "after every round.\n"
    ]
    for name, title in (("zoo", "The zoo's heads, pools drawn at random"),
                        ("wide", "64 drafters, every pool with the best of the text's domain")):  # fmt: skip
        found = result[name]
        head = ["regret", *(f"N = {size}" for size in found["sizes"]), "slope in N", "slope in ln N"]
        rows = [
            [LEARNERS[learner], *(told(one) for one in row["regret"]), told(row["slope"], 3), told(row["slope_in_log"])]
            for learner, row in found["learners"].items()
        ]
        mats = [[LEARNERS[learner], *(told(one) for one in row["mat"])] for learner, row in found["learners"].items()]
        parts += [f"**{title}** ({found['texts']} texts)\n", table(head, rows), table(["MAT", *head[1:-2]], mats)]
    return "\n".join([*parts, _verdict(result["wide"]), _beside_the_paper(result["zoo"]), _speed(result)])


def _verdict(found: dict[str, Any]) -> str:
    first, last = found["sizes"][0], found["sizes"][-1]
    rows, sentences = found["learners"], []
    for learner, row in rows.items():
        ends, slope = (row["regret"][0]["mean"], row["regret"][-1]["mean"]), row["slope_in_log"]
        flat = "not told from 0" if slope["low"] <= 0 <= slope["high"] else f"{slope['mean']:+.2f}"
        sentences.append(f"{LEARNERS[learner]} from {ends[0]:.2f} to {ends[1]:.2f} (slope in ln N {flat})")
    return f"From N = {first} to {last} the regret of a text goes, for {'; '.join(sentences)}."


def _beside_the_paper(found: dict[str, Any]) -> str:
    row, bandits = found["learners"]["normal_hedge"]["regret"], ("ucb", "exp3")
    others = ", ".join(f"{LEARNERS[one]} {found['learners'][one]['regret'][-1]['mean']:.2f}" for one in bandits)
    return (
        f"The paper finds HedgeSpec's regret near zero from N = 2 to 7; here NormalHedge's is {row[0]['mean']:.2f} at "
        f"N = {found['sizes'][0]} and {row[-1]['mean']:.2f} at N = {found['sizes'][-1]} ({others})."
    )


def _speed(result: dict[str, Any]) -> str:
    return f"A replayed round takes 1/{result['live_over_replay']:.0f} of the time of a decoded one (one text, measured once)."


def draw(result: dict[str, Any]) -> Figure:
    made, axes = figure(2, 2)
    titles = {"zoo": "the zoo's heads, random pools", "wide": "64 drafters, pools with the domain's best"}
    for (name, title), above, below in zip(titles.items(), axes, axes[2:]):
        found = result[name]
        for axis, word, label in ((above, "regret", "regret of a text"), (below, "mat", "MAT, tokens a round")):
            for learner, row in found["learners"].items():
                band(axis, found["sizes"], row[word], color=colour(learner), label=LEARNERS[learner], marker="o", markersize=3)
            axis.set_xscale("log", base=2)
            axis.set_xticks(found["sizes"], found["sizes"])
            axis.set(title=f"{label.partition(',')[0]}, {title}", xlabel="drafters N", ylabel=label)
        above.set_ylim(min(0, above.get_ylim()[0]), None)
    axes[0].legend(fontsize="small")
    return made


EXPERIMENT = Experiment(
    "pool-size",
    "The size of the pool",
    "What does it cost to have more drafters to choose from? Bandits have to try each; learners that hear of all of them "
    "need not. Learners are replayed with random parts of the zoo, and with 2 to 64 drafters (the zoo's heads, the same with "
    "noise of eight strengths on their weights, and prompt lookup) of which one is the best of the text's domain and the "
    "rest is random.",
    measure, tell, draw,
)  # fmt: skip
