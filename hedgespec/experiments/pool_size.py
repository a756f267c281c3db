"""Does a larger pool cost anything?"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hedgespec import learners
from hedgespec.config import DecodeConfig
from hedgespec.decoder import Decoder
from hedgespec.experiments import Experiment
from hedgespec.experiments.laboratory import Laboratory
from hedgespec.experiments.measures import losses, regret, rounds_alone, signature
from hedgespec.experiments.statistics import mat, mean_interval, told
from hedgespec.experiments.telling import band, called, figure, look, table
from hedgespec.experiments.traces import Trace, replay

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COMPARED = ("normal_hedge", "normal_hedge warm", "hedge", "ucb", "exp3", "meta_sd", "uniform")
LOOKUP = "ngram"
"""What the prompt lookup of the wide pool is called."""
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
    key = f"{name}, {signature(traces)}"
    alone = laboratory.once(f"rounds alone of {key}", lambda: [rounds_alone(trace, length) for trace in traces])
    best = {
        domain: int(np.sum([rounds for trace, rounds in zip(traces, alone) if trace.domain == domain], axis=0).argmin())
        for domain in dict.fromkeys(trace.domain for trace in traces)
    }
    known = [losses(trace, length) for trace in traces]

    def runs(config: DecodeConfig, size: int) -> list[dict[str, float]]:
        found = []
        for seed in range(seeds):
            requests, ends = [], []
            for trace, loss in zip(traces, known):
                chosen = order(trace, best[trace.domain], np.random.default_rng((seed, trace.number)))[:size]
                # No place of its own for the best.
                chosen = np.random.default_rng((seed, trace.number, size)).permutation(chosen).tolist()
                requests.append(stats := replay(trace.of(chosen), config, seed=1000 * seed + trace.number))
                curve = regret(stats, loss[:, chosen])
                ends.append(float(curve[-1]) if len(curve) else 0.0)
            found.append({"mat": mat(requests), "regret": float(np.mean(ends))})
        return found

    rows: dict[str, list[Any]] = {}
    work = [(way, size) for way in COMPARED if way.split()[0] in learners.NAMES for size in sizes]
    for way, size in laboratory.track(work, f"pools, {name}"):
        learner, _, warm = way.partition(" ")
        config = DecodeConfig(learner=learner, warm_start=DecodeConfig.warm_start if warm else 0, evaluate_every=1)
        step = f"{seeds} seeds, {size} of {key} by {order.__name__}, {config}"
        rows.setdefault(way, []).append(laboratory.once(step, lambda config=config, size=size: runs(config, size)))
    names = traces[0].drafters
    return {
        "texts": len(traces),
        "sizes": sizes,
        "best": {domain: names[which] for domain, which in best.items()},
        "best_of_texts": dict(Counter(names[int(np.argmin(rounds))] for rounds in alone)),
        "learners": {way: _told(found, sizes) for way, found in rows.items()},
    }


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
    decoder, ids = Decoder(zoo.target, zoo.drafters), torch.from_numpy(trace.tokens[: trace.prompt_length])
    decoder.generate(ids, max_new_tokens=8)  # what is made once is not measured
    live = decoder.generate(ids, max_new_tokens=trace.max_new_tokens, seed=0).stats[0]
    began = time.perf_counter()
    again = replay(trace, DecodeConfig(), seed=0)
    seconds = time.perf_counter() - began
    return (live.seconds / live.rounds) / (seconds / again.rounds)


def tell(result: dict[str, Any]) -> str:
    parts = [
        f"Regret of a text, as in the comparison of learners. Intervals: 95% over {result['seeds']} seeds, each with pools of "
        "its own, the smaller ones parts of the larger. Slopes: least squares in each seed. All learners hear after every "
        "round, and of the prompt only where it says so.\n"
    ]
    for name, title in (("zoo", "The zoo's heads, pools drawn at random"),
                        ("wide", "64 drafters, every pool with the best of the text's domain")):  # fmt: skip
        found = result[name]
        head = ["regret", *(f"N = {size}" for size in found["sizes"]), "slope in N", "slope in ln N"]
        rows = [
            [called(way), *(told(one) for one in row["regret"]), told(row["slope"], 3), told(row["slope_in_log"])]
            for way, row in found["learners"].items()
        ]
        mats = [[called(way), *(told(one) for one in row["mat"])] for way, row in found["learners"].items()]
        parts += [f"**{title}** ({found['texts']} texts)\n", table(head, rows), table(["MAT", *head[1:-2]], mats)]
    return "\n".join(
        [*parts, _verdict(result["wide"]), _lookup(result["wide"]), _beside_the_paper(result["zoo"]), _speed(result)]
    )


def _verdict(found: dict[str, Any]) -> str:
    first, last = found["sizes"][0], found["sizes"][-1]
    rows = found["learners"]
    flat = [called(way) for way, row in rows.items() if row["slope_in_log"]["low"] <= 0 <= row["slope_in_log"]["high"]]
    grown = [
        f"{called(way)} from {row['regret'][0]['mean']:.2f} to {row['regret'][-1]['mean']:.2f}" for way, row in rows.items()
    ]
    slope = {way: row["slope_in_log"]["mean"] for way, row in rows.items()}
    kept = {way: row["mat"][-1]["mean"] / row["mat"][0]["mean"] for way, row in rows.items()}
    return (
        f"From N = {first} to {last} the regret of a text goes, for {'; '.join(grown)}. Goal, regret flat in N within noise "
        f"(the interval of its slope in ln N holds 0): {'met by ' + ', '.join(flat) if flat else 'met by none'}. "
        f"NormalHedge's slope is {slope['normal_hedge'] / slope['ucb']:.2f} of UCBSpec's, with the warm start "
        f"{slope['normal_hedge warm'] / slope['ucb']:.2f}. From the smallest pool to the largest UCBSpec keeps "
        f"{kept['ucb']:.3f} of its tokens a round, NormalHedge {kept['normal_hedge']:.3f}, with the warm start "
        f"{kept['normal_hedge warm']:.3f}."
    )


def _lookup(found: dict[str, Any]) -> str:
    """Who is best, and what the warm start makes of it."""
    cold, warm = (found["learners"][way]["regret"][-1]["mean"] for way in ("normal_hedge", "normal_hedge warm"))
    best = ", ".join(f"{domain} {name}" for domain, name in found["best"].items())
    return (
        f"The best of their domains: {best}. Prompt lookup (ngram), which is right where a text repeats itself, is better than "
        f"all others on {found['best_of_texts'].get(LOOKUP, 0)} of the {found['texts']} texts. NormalHedge's regret at "
        f"N = {found['sizes'][-1]} is {cold:.2f}, and with the warm start, which hears of the prompt alone, {warm:.2f}."
    )


def _beside_the_paper(found: dict[str, Any]) -> str:
    row, bandits = found["learners"]["normal_hedge"]["regret"], ("ucb", "exp3")
    others = ", ".join(f"{called(one)} {found['learners'][one]['regret'][-1]['mean']:.2f}" for one in bandits)
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
            for way, row in found["learners"].items():
                band(axis, found["sizes"], row[word], label=called(way), marker="o", markersize=3, **look(way))
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
