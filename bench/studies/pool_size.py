"""The cost of more drafters to choose from.

Learners are replayed with random parts of the zoo, and with 2 to 64 drafters (the zoo's heads, the same with noise of eight
strengths on their weights, and prompt lookup) of which one is the best of the text's domain and the rest is random.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from table import interval, markdown

from hedgespec import learners
from hedgespec.config import DecodeConfig
from hedgespec.decoder import Decoder
from hedgespec.experiments.measures import losses, mean_interval, regret, rounds_alone, tokens_per_round
from hedgespec.experiments.recording import Trace
from hedgespec.experiments.replay import replay
from studies import Study
from studies.lab import Lab, signature
from studies.plots import band, figure, style_of, title_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COMPARED = ("normal_hedge", "normal_hedge warm", "hedge", "ucb", "exp3", "meta_sd", "uniform")
ZOO_SIZES, WIDE_SIZES = (2, 3, 4, 5, 6, 7), (2, 4, 8, 16, 32, 64)
Order = Callable[[Trace, int, np.random.Generator], list[int]]
"""Returns all drafters in the order in which pools take them, given the text and the best drafter of its domain."""


def measure(lab: Lab) -> dict[str, Any]:
    return {
        "zoo": _measure(lab, "greedy", ZOO_SIZES, any_order),
        "wide": _measure(lab, "wide", WIDE_SIZES, best_first),
        "live_over_replay": lab.once(f"live over replay, {DecodeConfig()}", lambda: live_over_replay(lab)),
    }


def any_order(trace: Trace, best: int, random: np.random.Generator) -> list[int]:
    return random.permutation(len(trace.drafters)).tolist()


def best_first(trace: Trace, best: int, random: np.random.Generator) -> list[int]:
    """Returns an order in which every pool contains the best drafter: a larger pool has more drafters to tell it from."""
    return [best, *random.permutation([one for one in range(len(trace.drafters)) if one != best]).tolist()]


def _measure(lab: Lab, name: str, sizes: Sequence[int], order: Order) -> dict[str, Any]:
    """Returns, by learner, tokens per round and regret per request at each size, and the slopes of the regret in N and ln N.

    The pools of one seed are nested.
    """
    traces, length = lab.traces(name), DecodeConfig.draft_length
    sizes = [size for size in sizes if size <= len(traces[0].drafters)]
    key = f"{name}, {signature(traces)}"
    alone = lab.once(f"rounds alone of {key}", lambda: [rounds_alone(trace, length) for trace in traces])
    best = {
        domain: int(np.sum([rounds for trace, rounds in zip(traces, alone) if trace.domain == domain], axis=0).argmin())
        for domain in dict.fromkeys(trace.domain for trace in traces)
    }
    known = [losses(trace, length) for trace in traces]

    def runs(config: DecodeConfig, size: int) -> list[dict[str, float]]:
        found = []
        for seed in range(lab.seeds):
            requests, ends = [], []
            for trace, loss in zip(traces, known):
                chosen = order(trace, best[trace.domain], np.random.default_rng((seed, trace.number)))[:size]
                # The best drafter must not be recognisable by its index.
                chosen = np.random.default_rng((seed, trace.number, size)).permutation(chosen)
                requests.append(stats := replay(trace.of(chosen), config, seed=1000 * seed + trace.number))
                curve = regret(stats, loss[:, chosen])
                ends.append(float(curve[-1]) if len(curve) else 0.0)
            found.append({"mat": tokens_per_round(requests), "regret": float(np.mean(ends))})
        return found

    rows: dict[str, list] = {}
    work = [(method, size) for method in COMPARED if method.split()[0] in learners.NAMES for size in sizes]
    for method, size in lab.track(work, f"pools, {name}"):
        learner, _, warm = method.partition(" ")
        config = DecodeConfig(learner=learner, warm_start=DecodeConfig.warm_start if warm else 0, evaluate_every=1)
        step = f"{lab.seeds} seeds, {size} of {key} by {order.__name__}, {config}"
        rows.setdefault(method, []).append(lab.once(step, lambda config=config, size=size: runs(config, size)))
    names = traces[0].drafters
    return {
        "texts": len(traces),
        "sizes": sizes,
        "best": {domain: names[which] for domain, which in best.items()},
        "best_of_texts": dict(Counter(names[int(np.argmin(rounds))] for rounds in alone)),
        "learners": {method: _summary(found, sizes) for method, found in rows.items()},
    }


def _summary(found: list[list[dict[str, float]]], sizes: Sequence[int]) -> dict[str, Any]:
    """Returns intervals by size, and of the slopes that least squares finds in each seed."""
    regrets = np.array([[run["regret"] for run in runs] for runs in found])
    return {
        "mat": [mean_interval([run["mat"] for run in runs]) for runs in found],
        "regret": [mean_interval(values) for values in regrets],
        "slope": mean_interval(np.polyfit(sizes, regrets, 1)[0]),
        "slope_in_log": mean_interval(np.polyfit(np.log(sizes), regrets, 1)[0]),
    }


def live_over_replay(lab: Lab) -> float:
    """Returns the time of a decoded round over that of a replayed one, on one text."""
    trace, zoo = lab.traces("greedy")[0], lab.zoo
    decoder, ids = Decoder(zoo.target, zoo.drafters), torch.from_numpy(trace.tokens[: trace.prompt_length])
    decoder.generate(ids, max_new_tokens=8)  # the first call includes one-off work
    live = decoder.generate(ids, max_new_tokens=trace.max_new_tokens, seed=0).stats[0]
    began = time.perf_counter()
    again = replay(trace, DecodeConfig(), seed=0)
    seconds = time.perf_counter() - began
    return (live.seconds / live.rounds) / (seconds / again.rounds)


def tables(result: dict[str, Any]) -> dict[str, str]:
    made = {}
    for name in ("zoo", "wide"):
        found = result[name]
        sizes = [f"N = {size}" for size in found["sizes"]]
        made[f"{name}-regret"] = markdown(["regret of a text", *sizes, "slope in N", "slope in ln N"], [
            [title_of(method), *map(interval, row["regret"]), interval(row["slope"], 3), interval(row["slope_in_log"])]
            for method, row in found["learners"].items()
        ])  # fmt: skip
        made[f"{name}-tokens"] = markdown(
            ["tokens per round", *sizes],
            [[title_of(method), *(interval(one) for one in row["mat"])] for method, row in found["learners"].items()],
        )
    wide = result["wide"]
    slopes = {method: row["slope_in_log"]["mean"] for method, row in wide["learners"].items()}
    made["wide-growth"] = markdown(["64 drafters", "slope in ln N over UCBSpec's", "tokens per round kept from N = 2 to 64"], [
        [title_of(method), f"{slopes[method] / slopes['ucb']:.2f}",
         f"{wide['learners'][method]['mat'][-1]['mean'] / wide['learners'][method]['mat'][0]['mean']:.3f}"]
        for method in slopes
    ])  # fmt: skip
    made["wide-best"] = markdown(
        ["domain of the 64 drafters' texts", "best drafter"], [[domain, name] for domain, name in wide["best"].items()]
    )
    return made


def draw(result: dict[str, Any]) -> Figure:
    made, axes = figure(2, 2)
    titles = {"zoo": "the zoo's heads, random pools", "wide": "64 drafters, pools with the domain's best"}
    for (name, title), above, below in zip(titles.items(), axes, axes[2:]):
        found = result[name]
        for axis, key, label in ((above, "regret", "regret of a text"), (below, "mat", "tokens per round")):
            for method, row in found["learners"].items():
                band(axis, found["sizes"], row[key], label=title_of(method), marker="o", markersize=3, **style_of(method))
            axis.set_xscale("log", base=2)
            axis.set_xticks(found["sizes"], found["sizes"])
            axis.set(title=f"{label}, {title}", xlabel="drafters N", ylabel=label)
        above.set_ylim(min(0, above.get_ylim()[0]), None)
    axes[0].legend(fontsize="small")
    return made


STUDY = Study("pool-size", "The size of the pool", measure, tables, draw)
