"""Full information against bandits: what it gains to learn from the loss of every drafter, and from the prompt.

Learners are replayed over the mixed stream of all domains, each request from the start: greedy, sampled, and coupled to the
target's noise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from table import interval, markdown

from hedgespec import learners
from hedgespec.config import DecodeConfig
from hedgespec.experiments.measures import mean_interval, over_seeds, request_measures, rounds_alone
from hedgespec.experiments.replay import replay
from studies import Study
from studies.lab import Lab, signature
from studies.plots import BANDITS, FULL, LEARNERS, band, bars, figure, style_of, title_of
from studies.sets import SETS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLES = {"greedy": "temperature 0", "sampled": "temperature 1, sampled", "coupled": "temperature 1, coupled"}
WARM = DecodeConfig.warm_start
PAPER = {"generalist": 5.69, "ucb": 5.09, "exp3": 4.86, "normal_hedge": 7.15}
"""Tokens per round on Llama-3.1-8B, arXiv 2510.20064, the main table."""


def measure(lab: Lab) -> dict[str, Any]:
    return {"sets": {name: _measure(lab, name) for name in TITLES}}


def _measure(lab: Lab, name: str) -> dict[str, Any]:
    """Returns the measures of every learner over one set of texts."""
    traces, mode, length = lab.traces(name), SETS[name].mode, DecodeConfig.draft_length
    key = f"{name}, {signature(traces)}, {lab.seeds} seeds"
    alone = lab.once(
        f"rounds alone of {key}, draft_length {length}", lambda: [rounds_alone(trace, length, lab.seeds) for trace in traces]
    )
    measures = request_measures(traces, length, alone)
    found = {}
    methods = [(learner, 0) for learner in LEARNERS if learner in learners.NAMES] + [(learner, WARM) for learner in FULL]
    for learner, warm in lab.track(methods, f"learners, {name}"):
        config = DecodeConfig(learner=learner, proposal=mode, warm_start=warm, evaluate_every=1)
        runs = lab.once(
            f"{key}, {config}",
            lambda config=config: over_seeds(traces, lab.seeds, lambda trace, seed: replay(trace, config, seed=seed), measures),
        )
        curve = [mean_interval(values) for values in zip(*(run["curve"] for run in runs))]
        found[f"{learner} warm" if warm else learner] = {
            **{measure: mean_interval([run[measure] for run in runs]) for measure in ("mat", "regret", "held_after")},
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


def tables(result: dict[str, Any]) -> dict[str, str]:
    made = {}
    for name, found in result["sets"].items():
        rows = [
            [title_of(method), interval(row["mat"]), interval(row["regret"]), interval(row["held_after"], 1)]
            for method, row in found["learners"].items()
        ]
        rows += [
            ["best fixed drafter of the set", f"{found['best_fixed']:.2f}", "", ""],
            ["best drafter of each text", f"{found['best_of_each_request']:.2f}", "", ""],
        ]
        made[name] = markdown(["", "tokens per round", "regret of a text", "found after, tokens"], rows)
    return made | {"bandits": _bandits(result), "paper": _paper(result)}


def _bandits(result: dict[str, Any]) -> str:
    """Returns NormalHedge's tokens per round over the best bandit's, and how many texts need fewer rounds than with any
    bandit."""
    rows = []
    for name, found in result["sets"].items():
        own = found["learners"]
        bandits = [method for method in BANDITS if method in own]
        best = max(bandits, key=lambda method: own[method]["mat"]["mean"])
        ratios = [
            f"{own[method]['mat']['mean'] / own[best]['mat']['mean']:.2f}" for method in ("normal_hedge", "normal_hedge warm")
        ]
        fewer = sum(
            ours < min(others)
            for ours, *others in zip(*(own[one]["rounds"] for one in ("normal_hedge", *bandits)), strict=True)
        )
        rows.append([TITLES[name], title_of(best), *ratios, f"{fewer} of {found['texts']}"])
    head = [
        "",
        "best bandit",
        "NormalHedge over it",
        "with warm start",
        "texts with fewer rounds than any bandit, no warm start",
    ]
    return markdown(head, rows)


def _paper(result: dict[str, Any]) -> str:
    found = result["sets"]["greedy"]["learners"]
    ours = {learner: found[learner]["mat"]["mean"] for learner in ("ucb", "exp3", "normal_hedge")}
    rows = [
        [
            LEARNERS[learner],
            *(f"{number:.2f}" for mat in (PAPER, ours) for number in (mat[learner], mat["normal_hedge"] / mat[learner])),
        ]
        for learner in ours
    ]
    return markdown(
        ["tokens per round", "paper, Llama-3.1-8B", "HedgeSpec over it", "here, temperature 0", "HedgeSpec over it"], rows
    )


def draw(result: dict[str, Any]) -> Figure:
    made, axes = figure(len(result["sets"]), 2)
    for (name, found), above, below in zip(result["sets"].items(), axes, axes[len(result["sets"]) :]):
        rows = found["learners"]
        for method, row in rows.items():
            curve = [dict(zip(row["curve"], values)) for values in zip(*row["curve"].values())]
            band(above, range(1, len(curve) + 1), curve, label=title_of(method), **style_of(method))
        above.set(title=f"regret along the text, {TITLES[name]}", xlabel="position, tokens", ylabel="regret, mean of the texts")
        for place, (method, row) in enumerate(rows.items()):
            hatch = "//" if method.endswith("warm") else ""
            bars(below, [place], [row["mat"]], color=style_of(method)["color"], hatch=hatch, edgecolor="white")
        for key, label, style in (("best_fixed", "best fixed", ":"), ("best_of_each_request", "best of each text", "--")):
            below.axhline(found[key], color="black", linestyle=style, linewidth=1, label=label)
        below.set_xticks(range(len(rows)), [title_of(method) for method in rows], rotation=45, ha="right")
        below.set(title=TITLES[name], ylabel="tokens per round", ylim=(1, None))
        below.legend(fontsize="x-small", loc="lower right")
    axes[0].legend(fontsize="x-small")
    return made


STUDY = Study("selection", "Full information against bandits", measure, tables, draw)
