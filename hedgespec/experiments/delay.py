"""What does it cost to hear late?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hedgespec.config import DecodeConfig
from hedgespec.experiments import Experiment
from hedgespec.experiments.laboratory import Laboratory
from hedgespec.experiments.measures import judge, signature
from hedgespec.experiments.statistics import by_seed, mean_interval, told
from hedgespec.experiments.telling import LEARNERS, band, figure, look, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LATENCIES = (0, 1, 2, 4, 8, 16)
LENGTHS = (1, 2, 3, 4, 5, 6, 7, 8)
CADENCES = (1, 2, 4, 8, 16, "adaptive")
COMPARED = ("normal_hedge", "hedge")
SWEEPS = {
    "latency": "rounds until a round's scores are heard",
    "draft_length": "draft length K, tokens",
    "evaluate_every": "rounds from one scoring to the next",
}


def measure(laboratory: Laboratory) -> dict[str, Any]:
    traces = laboratory.traces("greedy")
    drafters = len(traces[0].drafters)
    points: list[tuple[str, int | str]] = [("latency", value) for value in LATENCIES]
    points += [("draft_length", value) for value in LENGTHS]
    points += [("evaluate_every", value) for value in CADENCES]
    sweeps: dict[str, Any] = {name: {learner: [] for learner in COMPARED} for name in SWEEPS}
    work = [(learner, *point) for learner in COMPARED for point in points]
    for learner, sweep, value in laboratory.track(work, "delays"):
        latency = value if sweep == "latency" else 0
        options: dict[str, Any] = {"warm_start": 0, "evaluate_every": 1} | ({sweep: value} if sweep != "latency" else {})
        config = DecodeConfig(learner=learner, **options)
        runs = laboratory.once(
            f"{signature(traces)}, {laboratory.seeds} seeds, {config}, latency {latency}",
            lambda config=config, latency=latency: by_seed(
                traces, config, laboratory.seeds, judge(traces, config.draft_length), latency=latency
            ),
        )
        sweeps[sweep][learner].append({
            "value": value,
            "mat": mean_interval([run["mat"] for run in runs]),
            "regret": mean_interval([run["regret_a_position"] for run in runs]),
            "theory": _theory(sweep, value, runs[0]["positions"], drafters),
        })  # fmt: skip
    fits = {name: {learner: _fit(rows) for learner, rows in found.items()} for name, found in sweeps.items()}
    return {"texts": len(traces), "drafters": drafters, "sweeps": sweeps, "fits": fits}


def _theory(sweep: str, value: int | str, positions: float, drafters: int) -> float | None:
    """sqrt((K+1)^3 ln N / T), tokens a round, times sqrt(1 + d) where each loss is d rounds of at most K+1 tokens later."""
    if isinstance(value, str):  # adaptive
        return None
    length = value if sweep == "draft_length" else DecodeConfig.draft_length
    later = {"latency": value, "draft_length": 0, "evaluate_every": value - 1}[sweep]
    return float(np.sqrt((length + 1) ** 3 * (1 + later) * np.log(drafters) / positions))


def _fit(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The constant that brings the theory's curve closest, and the part of the regret's variance that it then explains."""
    theory, regret = np.array([(row["theory"], row["regret"]["mean"]) for row in rows if row["theory"] is not None]).T
    constant = float(theory @ regret / (theory @ theory))
    left = ((regret - constant * theory) ** 2).sum() / ((regret - regret.mean()) ** 2).sum()
    return {"constant": constant, "explained": float(1 - left)}


def tell(result: dict[str, Any]) -> str:
    parts = [
        f"{result['texts']} greedy texts, {result['drafters']} drafters; intervals: 95% over {result['seeds']} seeds. Regret "
        "here is a mean over positions, in tokens a round: how many more the drafter that is best over the text was expected "
        "to emit. No warm start. *Theory* is `sqrt((K+1)^3 (1+d) ln N / T)` with d rounds of delay beside the queue's, times "
        "the constant that fits the column before it best.\n"
    ]
    for sweep, words in SWEEPS.items():
        found, fits = result["sweeps"][sweep], result["fits"][sweep]
        head, columns = [words], []
        for learner, rows in found.items():
            name, constant = LEARNERS[learner], fits[learner]["constant"]
            head += [f"{name}: MAT", "regret", "theory"]
            theory = ["" if row["theory"] is None else f"{constant * row['theory']:.3f}" for row in rows]
            columns += [[told(row["mat"]) for row in rows], [told(row["regret"], 3) for row in rows], theory]
        values = [str(row["value"]) for row in found[COMPARED[0]]]
        parts += [table(head, [list(line) for line in zip(values, *columns)])]
    return "\n".join([*parts, _verdict(result)])


def _verdict(result: dict[str, Any]) -> str:
    rows = {sweep: {row["value"]: row for row in found["normal_hedge"]} for sweep, found in result["sweeps"].items()}
    fits = {sweep: found["normal_hedge"] for sweep, found in result["fits"].items()}
    latency, cadence, length = rows["latency"], rows["evaluate_every"], rows["draft_length"]
    last, longest = LATENCIES[-1], LENGTHS[-1]

    def mat(row: dict[str, Any]) -> float:
        return row["mat"]["mean"]

    return (
        f"NormalHedge keeps {mat(latency[1]) / mat(latency[0]):.3f} of its MAT if it hears one round late, as it does where "
        f"scoring overlaps the next round, and {mat(latency[last]) / mat(latency[0]):.3f} if {last}; scored every other round "
        f"it keeps {mat(cadence[2]) / mat(cadence[1]):.3f}, every {CADENCES[-2]} rounds "
        f"{mat(cadence[CADENCES[-2]]) / mat(cadence[1]):.3f}, and where scoring adapts "
        f"{mat(cadence['adaptive']) / mat(cadence[1]):.3f}. From latency 0 to {last} the regret grows "
        f"{latency[last]['regret']['mean'] / latency[0]['regret']['mean']:.1f} times, where the theory's bound grows "
        f"{latency[last]['theory'] / latency[0]['theory']:.1f} times; from K = 1 to {longest} "
        f"{length[longest]['regret']['mean'] / length[1]['regret']['mean']:.1f} times, the bound "
        f"{length[longest]['theory'] / length[1]['theory']:.1f} times. With one constant each, the bound's shape explains "
        f"{100 * fits['latency']['explained']:.0f}% of the regret's variance along latency, "
        f"{100 * fits['draft_length']['explained']:.0f}% along K and {100 * fits['evaluate_every']['explained']:.0f}% along "
        "the cadence (below 0: worse than a constant); it is an upper bound for any losses."
    )


def draw(result: dict[str, Any]) -> Figure:
    made, axes = figure(3, 2)
    for (sweep, words), above, below in zip(SWEEPS.items(), axes, axes[3:]):
        for learner, rows in result["sweeps"][sweep].items():
            numbers = [row for row in rows if row["value"] != "adaptive"]
            places, style = [row["value"] for row in numbers], {"color": look(learner)["color"]}
            constant = result["fits"][sweep][learner]["constant"]
            band(above, places, [row["regret"] for row in numbers], label=LEARNERS[learner], marker="o", markersize=3, **style)
            theory = [constant * row["theory"] for row in numbers]
            above.plot(places, theory, linestyle=":", label=f"{LEARNERS[learner]}, theory's shape", **style)
            band(below, places, [row["mat"] for row in numbers], label=LEARNERS[learner], marker="o", markersize=3, **style)
            for row in [row for row in rows if row["value"] == "adaptive"]:
                for axis, word in ((above, "regret"), (below, "mat")):
                    axis.axhline(
                        row[word]["mean"], linestyle="-.", label=f"{LEARNERS[learner]}, adaptive", linewidth=1, **style
                    )
        above.set(title=f"regret by {sweep.replace('_', ' ')}", xlabel=words, ylabel="regret, tokens a round", ylim=(0, None))
        below.set(title=f"tokens a round by {sweep.replace('_', ' ')}", xlabel=words, ylabel="MAT, tokens a round")
        above.legend(fontsize="x-small")
    return made


EXPERIMENT = Experiment(
    "delay",
    "Late feedback",
    "Losses wait for K verified positions, and longer where drafters are scored while the next round runs or only now and "
    "then. What does that cost? Learners are replayed over greedy texts with scores that come 0 to 16 rounds late, with "
    "drafts of 1 to 8 tokens, and scored every 1 to 16 rounds, and beside them the theory's `sqrt((K+1)^3 ln N / T)`.",
    measure, tell, draw,
)  # fmt: skip
