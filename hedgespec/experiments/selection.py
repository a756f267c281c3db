"""What does hearing of every drafter bring over hearing of one, and what does the prompt?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hedgespec import learners
from hedgespec.config import DecodeConfig
from hedgespec.experiments import Experiment
from hedgespec.experiments.laboratory import Laboratory
from hedgespec.experiments.measures import HELD, judge, rounds_alone, signature
from hedgespec.experiments.recordings import RECORDINGS
from hedgespec.experiments.statistics import by_seed, mean_interval, told
from hedgespec.experiments.telling import BANDITS, FULL, LEARNERS, band, bars, called, figure, look, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SETS = {"greedy": "temperature 0", "sampled": "temperature 1, sampled", "coupled": "temperature 1, coupled"}
WARM = DecodeConfig.warm_start
PAPER = {"generalist": 5.69, "ucb": 5.09, "exp3": 4.86, "normal_hedge": 7.15}
"""MAT on Llama-3.1-8B, arXiv 2510.20064, the main table."""


def measure(laboratory: Laboratory) -> dict[str, Any]:
    return {"sets": {name: _measure(laboratory, name) for name in SETS}}


def _measure(laboratory: Laboratory, name: str) -> dict[str, Any]:
    """Every learner over one set of texts."""
    traces, mode, length, seeds = laboratory.traces(name), RECORDINGS[name].mode, DecodeConfig.draft_length, laboratory.seeds
    key = f"{name}, {signature(traces)}, {seeds} seeds"
    alone = laboratory.once(
        f"rounds alone of {key}, draft_length {length}", lambda: [rounds_alone(trace, length, seeds) for trace in traces]
    )
    judged = judge(traces, length, alone)
    found = {}
    ways = [(learner, 0) for learner in LEARNERS if learner in learners.NAMES]
    ways += [(learner, WARM) for learner in FULL]
    for learner, warm in laboratory.track(ways, f"learners, {name}"):
        config = DecodeConfig(learner=learner, mode=mode, warm_start=warm, evaluate_every=1)
        runs = laboratory.once(f"{key}, {config}", lambda config=config: by_seed(traces, config, seeds, judged))
        words = ("mat", "regret", "held_after")
        curve = [mean_interval(values) for values in zip(*(run["curve"] for run in runs))]
        found[f"{learner} warm" if warm else learner] = {
            **{word: mean_interval([run[word] for run in runs]) for word in words},
            "rounds": np.mean([run["rounds"] for run in runs], axis=0).tolist(),
            "curve": {bound: [one[bound] for one in curve] for bound in ("mean", "low", "high")},
        }
    emitted = sum(trace.drafted.shape[1] for trace in traces)
    return {
        "texts": len(traces),
        "tokens": emitted / len(traces),
        "best_fixed": emitted / float(np.sum(alone, axis=0).min()),
        "best_of_each_request": emitted / float(np.min(alone, axis=1).sum()),
        "learners": found,
    }


def tell(result: dict[str, Any]) -> str:
    parts = [
        f"Intervals: 95% over {result['seeds']} seeds; at temperature 0 and in coupled mode a bandit that draws nothing does "
        "the same whatever the seed. Regret: the sum over a text's positions of the loss (0 to 1) of the drafter that "
        "drafted there, less that of the drafter that is best over the whole text. *Found after*: tokens before the first "
        f"round from which on {100 * HELD:.0f}% of the rounds are drafted by the drafter that would have needed fewest rounds "
        "alone (any of them, if several would), the whole text where there is no such round. All learners hear after every "
        "round. Without the warm start is the paper's setting.\n"
    ]
    for name, found in result["sets"].items():
        rows = [
            [called(way), told(row["mat"]), told(row["regret"]), told(row["held_after"], 1)]
            for way, row in found["learners"].items()
        ]
        rows += [
            ["best fixed drafter of the set", f"{found['best_fixed']:.2f}", "", ""],
            ["best drafter of each text", f"{found['best_of_each_request']:.2f}", "", ""],
        ]
        parts += [
            f"**{SETS[name]}** ({found['texts']} texts, {found['tokens']:.0f} tokens on average)\n",
            table(["", "MAT", "regret of a text", "found after, tokens"], rows),
        ]
    parts += [_beside_the_paper(result), " ".join(_verdict(found, name) for name, found in result["sets"].items())]
    return "\n".join(parts)


def _beside_the_paper(result: dict[str, Any]) -> str:
    found = result["sets"]["greedy"]["learners"]
    ours = {learner: found[learner]["mat"]["mean"] for learner in ("ucb", "exp3", "normal_hedge")}
    rows = [
        [
            LEARNERS[learner],
            *(f"{number:.2f}" for mat in (PAPER, ours) for number in (mat[learner], mat["normal_hedge"] / mat[learner])),
        ]
        for learner in ours
    ]
    head = ["MAT", "paper, Llama-3.1-8B", "HedgeSpec over it", "ours, temperature 0", "HedgeSpec over it"]
    return table(head, rows)


def _verdict(found: dict[str, Any], name: str) -> str:
    """Whether HedgeSpec's interval lies above each bandit's."""
    rows = found["learners"]
    said = []
    for way in ("normal_hedge", "normal_hedge warm"):
        above = [bandit for bandit in BANDITS if bandit in rows and rows[way]["mat"]["low"] > rows[bandit]["mat"]["high"]]
        others = [bandit for bandit in BANDITS if bandit in rows and bandit not in above]
        words = f"above {' and '.join(LEARNERS[one] for one in above) or 'no bandit'}'s without overlap"
        words += f", but not above {' and '.join(LEARNERS[one] for one in others)}'s" if others else ""
        said.append(f"{'with' if way.endswith('warm') else 'without'} the warm start {words}")
    best = max((row["mat"]["mean"], LEARNERS[one]) for one, row in rows.items() if one in BANDITS)
    cold, warm = rows["normal_hedge"], rows["normal_hedge warm"]
    shorter = sum(
        ours < min(others)
        for ours, *others in zip(*(rows[one]["rounds"] for one in ("normal_hedge", *BANDITS) if one in rows), strict=True)
    )
    return (
        f"At {SETS[name]}, NormalHedge's interval of MAT lies {said[0]}; {said[1]}. It has "
        f"{cold['mat']['mean'] / best[0]:.2f} times the tokens a round of the best bandit ({best[1]}), "
        f"{warm['mat']['mean'] / best[0]:.2f} times with the warm start, which takes its regret from "
        f"{cold['regret']['mean']:.2f} to {warm['regret']['mean']:.2f} and the tokens until the best drafter is found from "
        f"{cold['held_after']['mean']:.0f} to {warm['held_after']['mean']:.0f}. Without it, on {shorter} of {found['texts']} "
        "texts it needs fewer rounds on average than every bandit."
    )


def draw(result: dict[str, Any]) -> Figure:
    made, axes = figure(len(result["sets"]), 2)
    for (name, found), above, below in zip(result["sets"].items(), axes, axes[len(result["sets"]) :]):
        rows = found["learners"]
        for way, row in rows.items():
            curve = [dict(zip(row["curve"], values)) for values in zip(*row["curve"].values())]
            band(above, range(1, len(curve) + 1), curve, label=called(way), **look(way))
        above.set(title=f"regret along the text, {SETS[name]}", xlabel="position, tokens", ylabel="regret, mean of the texts")
        for place, (way, row) in enumerate(rows.items()):
            hatch = "//" if way.endswith("warm") else ""
            bars(below, [place], [row["mat"]], color=look(way)["color"], hatch=hatch, edgecolor="white")
        for word, label, style in (("best_fixed", "best fixed", ":"), ("best_of_each_request", "best of each text", "--")):
            below.axhline(found[word], color="black", linestyle=style, linewidth=1, label=label)
        below.set_xticks(range(len(rows)), [called(way) for way in rows], rotation=45, ha="right")
        below.set(title=f"tokens a round, {SETS[name]}", ylabel="MAT, tokens a round", ylim=(1, None))
        below.legend(fontsize="x-small", loc="lower right")
    axes[0].legend(fontsize="x-small")
    return made


EXPERIMENT = Experiment(
    "selection",
    "Full information against bandits",
    "How much better do learners choose that hear how every drafter would have fared than bandits, which hear of the drafter "
    "they chose? And what does it bring to let them hear the prompt first? Learners are replayed over the mixed stream of all "
    "domains, every request fresh: greedy, sampled, and coupled to the target's noise.",
    measure, tell, draw,
)  # fmt: skip
