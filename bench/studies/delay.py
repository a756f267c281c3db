"""The cost of late feedback.

Losses wait for K verified positions, and longer if drafters are scored while the next round runs or not after every round.
Learners are replayed over greedy texts with scores that come 0 to 16 rounds late, with drafts of 1 to 8 tokens, and scored
every 1 to 16 rounds, beside the theory's `sqrt((K+1)^3 (1+d) ln N / T)` with d rounds of delay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from table import interval, markdown

from hedgespec.config import DecodeConfig
from hedgespec.experiments.measures import mean_interval, over_seeds, request_measures
from hedgespec.experiments.replay import replay
from studies import Study
from studies.lab import Lab, signature
from studies.plots import LEARNERS, band, figure, style_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LATENCIES = (0, 1, 2, 4, 8, 16)
LENGTHS = (1, 2, 3, 4, 5, 6, 7, 8)
CADENCES = (1, 2, 4, 8, 16, "adaptive")
COMPARED = ("normal_hedge", "hedge")
SWEEPS = {
    "latency": "rounds until a round's scores are learned from",
    "draft_length": "draft length K, tokens",
    "evaluate_every": "rounds from one scoring to the next",
}


def measure(lab: Lab) -> dict[str, Any]:
    traces = lab.traces("greedy")
    drafters = len(traces[0].drafters)
    points = [("latency", value) for value in LATENCIES] + [("draft_length", value) for value in LENGTHS]
    points += [("evaluate_every", value) for value in CADENCES]
    sweeps: dict[str, Any] = {name: {learner: [] for learner in COMPARED} for name in SWEEPS}
    work = [(learner, *point) for learner in COMPARED for point in points]
    for learner, sweep, value in lab.track(work, "delays"):
        latency = value if sweep == "latency" else 0
        options = {"warm_start": 0, "evaluate_every": 1} | ({sweep: value} if sweep != "latency" else {})
        config = DecodeConfig(learner=learner, **options)
        runs = lab.once(
            f"{signature(traces)}, {lab.seeds} seeds, {config}, latency {latency}",
            lambda config=config, latency=latency: over_seeds(
                traces, lab.seeds, lambda trace, seed: replay(trace, config, seed=seed, latency=latency),
                request_measures(traces, config.draft_length),
            ),
        )  # fmt: skip
        sweeps[sweep][learner].append({
            "value": value,
            "mat": mean_interval([run["mat"] for run in runs]),
            "regret": mean_interval([run["regret_a_position"] for run in runs]),
            "theory": _theory(sweep, value, runs[0]["positions"], drafters),
        })  # fmt: skip
    fits = {name: {learner: _fit(rows) for learner, rows in found.items()} for name, found in sweeps.items()}
    return {"texts": len(traces), "drafters": drafters, "sweeps": sweeps, "fits": fits}


def _theory(sweep: str, value: int | str, positions: float, drafters: int) -> float | None:
    """Returns sqrt((K+1)^3 (1+d) ln N / T) in tokens per round; None for the adaptive cadence, whose delay varies."""
    if value == "adaptive":
        return None
    length = value if sweep == "draft_length" else DecodeConfig.draft_length
    later = {"latency": value, "draft_length": 0, "evaluate_every": value - 1}[sweep]
    return float(np.sqrt((length + 1) ** 3 * (1 + later) * np.log(drafters) / positions))


def _fit(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Returns the least-squares factor of the theory's curve, and the share of the regret's variance that it then explains."""
    theory, regret = np.array([(row["theory"], row["regret"]["mean"]) for row in rows if row["theory"] is not None]).T
    constant = float(theory @ regret / (theory @ theory))
    left = ((regret - constant * theory) ** 2).sum() / ((regret - regret.mean()) ** 2).sum()
    return {"constant": constant, "explained": float(1 - left)}


def tables(result: dict[str, Any]) -> dict[str, str]:
    made = {}
    for sweep, title in SWEEPS.items():
        found, fits = result["sweeps"][sweep], result["fits"][sweep]
        head, columns = [title], []
        for learner, rows in found.items():
            head += [f"{LEARNERS[learner]}: tokens per round", "regret", "theory"]
            theory = ["" if row["theory"] is None else f"{fits[learner]['constant'] * row['theory']:.3f}" for row in rows]
            columns += [[interval(row["mat"]) for row in rows], [interval(row["regret"], 3) for row in rows], theory]
        values = [row["value"] for row in found[COMPARED[0]]]
        made[sweep] = markdown(head, zip(values, *columns))
    return made | {"summary": _summary(result)}


def _summary(result: dict[str, Any]) -> str:
    """Returns, for NormalHedge and each sweep from its first value to its last number, what changes and what the theory
    explains."""
    rows = []
    for sweep, title in SWEEPS.items():
        numbers = [row for row in result["sweeps"][sweep]["normal_hedge"] if row["theory"] is not None]
        first, last = numbers[0], numbers[-1]
        grown = [last["regret"]["mean"] / first["regret"]["mean"], last["theory"] / first["theory"]]
        rows.append([
            f"{title}, {first['value']} to {last['value']}", f"{last['mat']['mean'] / first['mat']['mean']:.3f}",
            *(f"{one:.1f}" for one in grown), f"{100 * result['fits'][sweep]['normal_hedge']['explained']:.0f}",
        ])  # fmt: skip
    head = [
        "NormalHedge",
        "tokens per round, ratio",
        "regret, ratio",
        "theory's bound, ratio",
        "variance of the regret explained, %",
    ]
    return markdown(head, rows)


def draw(result: dict[str, Any]) -> Figure:
    made, axes = figure(3, 2)
    for (sweep, title), above, below in zip(SWEEPS.items(), axes, axes[3:]):
        for learner, rows in result["sweeps"][sweep].items():
            numbers = [row for row in rows if row["value"] != "adaptive"]
            places, style = [row["value"] for row in numbers], {"color": style_of(learner)["color"]}
            constant = result["fits"][sweep][learner]["constant"]
            band(above, places, [row["regret"] for row in numbers], label=LEARNERS[learner], marker="o", markersize=3, **style)
            theory = [constant * row["theory"] for row in numbers]
            above.plot(places, theory, linestyle=":", label=f"{LEARNERS[learner]}, theory's shape", **style)
            band(below, places, [row["mat"] for row in numbers], label=LEARNERS[learner], marker="o", markersize=3, **style)
            for row in [row for row in rows if row["value"] == "adaptive"]:
                for axis, key in ((above, "regret"), (below, "mat")):
                    label = f"{LEARNERS[learner]}, adaptive"
                    axis.axhline(row[key]["mean"], linestyle="-.", label=label, linewidth=1, **style)
        name = sweep.replace("_", " ")
        above.set(title=f"regret by {name}", xlabel=title, ylabel="regret, tokens per round", ylim=(0, None))
        below.set(title=f"tokens per round by {name}", xlabel=title, ylabel="tokens per round")
        above.legend(fontsize="x-small")
    return made


STUDY = Study("delay", "Late feedback", measure, tables, draw)
