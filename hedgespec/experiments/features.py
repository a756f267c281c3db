"""What goes past the paper, each option by itself: what it does to the tokens a round, over the same texts and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from hedgespec.config import DecodeConfig
from hedgespec.experiments import Experiment
from hedgespec.experiments.laboratory import Laboratory
from hedgespec.experiments.measures import signature
from hedgespec.experiments.statistics import by_seed, mat, mean_interval, told
from hedgespec.experiments.telling import figure, titled
from hedgespec.experiments.traces import Trace
from hedgespec.metrics import DecodeStats

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SETS = {"greedy": "temperature 0", "sampled": "temperature 1, sampled", "coupled": "temperature 1, coupled"}
DRAFT_LENGTH = 5


@dataclass(frozen=True)
class Feature:
    """One option and the values that are compared, the first of them the default."""

    title: str
    option: str
    values: tuple[Any, ...]
    sets: tuple[str, ...] = tuple(SETS)
    shared: Mapping[str, Any] = field(default_factory=dict)
    """Options that all values are compared under."""


FEATURES = (
    Feature("estimator", "estimator", ("exact", "product"), ("sampled",)),
    Feature("loss", "loss", ("length", "acceptance_rate")),
    Feature("from weights to a drafter", "selection", ("sample", "argmax")),
    Feature("prompt warm start", "warm_start", (32, 0, 8, 64)),
    Feature("rounds between evaluations", "evaluate_every", ("adaptive", 1, 4, 8)),
    Feature("back-off evaluation", "back_off", (None, 1, 2, 4)),
    Feature("back-off, evaluated each round", "back_off", (None, 1, 2, 4), shared={"evaluate_every": 1}),
    Feature("depth correction", "depth_correction", (False, True)),
)


@dataclass(frozen=True)
class Prices:
    """What rounds are taken to cost, in units of a forward over one token."""

    title: str
    draft: float
    """To draft a token."""
    verify: tuple[float, ...]
    """To verify a round, by drafted length 0..K."""

    def seconds(self, drafters: int) -> tuple[np.ndarray, np.ndarray]:
        """As `replay` takes them, for so many drafters."""
        return np.full(drafters, self.draft), np.array(self.verify)

    def of(self, stats: DecodeStats) -> float:
        """Of all rounds of a request."""
        lengths = np.array(stats.lengths)
        return float(self.draft * lengths.sum() + np.array(self.verify)[lengths].sum())


PRICES = (
    Prices("as on the paper's GPU: any round one forward, a drafted token 1/30 of it", 1 / 30, (1.0,) * (DRAFT_LENGTH + 1)),
    Prices("each drafted token makes the forward dearer by 1/8, and costs 1/15", 1 / 15, tuple(1 + k / 8 for k in range(6))),
    Prices("each makes it dearer by 1/2, and costs 1/5", 1 / 5, tuple(1 + k / 2 for k in range(6))),
    Prices("each makes it dearer by 1, and costs 1/2: nothing pays", 1 / 2, tuple(1.0 + k for k in range(6))),
)


OBJECTIVES: dict[str, dict[str, Any]] = {
    "tokens": {},
    "throughput": {"objective": "throughput"},
    "throughput, depth correction": {"objective": "throughput", "depth_correction": True},
}


def measure(lab: Laboratory) -> dict[str, Any]:
    sets = {name: [trace for trace in lab.traces(name) if trace.drafted.shape[1]] for name in SETS}
    return {
        "features": {feature.title: _compare(lab, feature, sets) for feature in lab.track(FEATURES, "features")},
        "depths": {name: _depths(lab, name, traces) for name, traces in sets.items()},
        "prices": [_objectives(lab, prices, sets["greedy"]) for prices in lab.track(PRICES, "objectives")],
    }


def _compare(lab: Laboratory, feature: Feature, sets: Mapping[str, list[Trace]]) -> dict[str, Any]:
    """MAT of every value, what it is less the default's, and how many of the drafters an evaluation scores."""
    of_sets: dict[str, Any] = {}
    for name in feature.sets:
        traces, found = sets[name], {}
        for value in feature.values:
            options = {**feature.shared, feature.option: value}
            config = DecodeConfig(mode=traces[0].mode, draft_length=DRAFT_LENGTH, **options)
            key = f"{signature(traces)} {lab.seeds} {sorted(options.items())}"
            found[str(value)] = lab.once(key, lambda: _mats(traces, config, lab.seeds))  # noqa: B023
        default = np.array(found[str(feature.values[0])]["mat"])
        of_sets[name] = {
            value: {
                "mat": mean_interval(one["mat"]),
                "less_default": mean_interval(np.array(one["mat"]) - default),
                "scored": float(np.mean(one["scored"])),
            }
            for value, one in found.items()
        }
    return {"option": feature.option, "sets": of_sets}


def _mats(traces: Sequence[Trace], config: DecodeConfig, seeds: int) -> dict[str, list[float]]:
    """By seed: MAT, and scored drafters of all that every evaluation might have scored."""
    scored: list[float] = []

    def look(_: Sequence[Trace], stats: Sequence[DecodeStats]) -> float:
        most = sum(len(one.drafters) * one.evaluations.max() for one in stats)
        scored.append(sum(one.evaluations.sum() for one in stats) / most)
        return mat(stats)

    return {"mat": by_seed(traces, config, seeds, look), "scored": scored}


def _depths(lab: Laboratory, name: str, traces: Sequence[Trace]) -> dict[str, list[float]]:
    """Acceptance at each depth over the rounds that reached it, [K]: predicted, corrected, and what came."""
    config = DecodeConfig(mode=traces[0].mode, draft_length=DRAFT_LENGTH, depth_correction=True)

    def look(_: Sequence[Trace], stats: Sequence[DecodeStats]) -> list[list[float]]:
        return [
            np.sum([getattr(one, f"{kind}_by_depth") for one in stats], 0).tolist()
            for kind in ("reached", "predicted", "corrected", "accepted")
        ]

    sums = lab.once(f"depths {signature(traces)} {lab.seeds}", lambda: by_seed(traces, config, lab.seeds, look))
    reached, *others = np.sum(sums, 0)
    return {kind: (of / np.maximum(reached, 1)).tolist() for kind, of in zip(("predicted", "corrected", "accepted"), others)}


def _objectives(lab: Laboratory, prices: Prices, traces: Sequence[Trace]) -> dict[str, Any]:
    """The objectives under the same prices: speed over plain decoding, mean draft length, rounds without a draft."""
    plain = sum(trace.drafted.shape[1] for trace in traces) * prices.verify[0]
    result: dict[str, Any] = {"title": prices.title}
    for name, chosen in OBJECTIVES.items():
        config = DecodeConfig(draft_length=DRAFT_LENGTH, **chosen)
        options = {"seconds": prices.seconds(len(traces[0].drafters))} if config.objective == "throughput" else {}

        def look(_: Sequence[Trace], stats: Sequence[DecodeStats]) -> list[float]:
            lengths = np.concatenate([one.lengths for one in stats])
            return [plain / sum(map(prices.of, stats)), float(lengths.mean()), float((lengths == 0).mean()), mat(stats)]

        key = f"{signature(traces)} {lab.seeds} {name} {prices}"
        found = np.array(lab.once(key, lambda: by_seed(traces, config, lab.seeds, look, **options)))  # noqa: B023
        measures = ("speed", "length", "plain", "mat")
        result[name] = {measure: mean_interval(column) for measure, column in zip(measures, found.T)}
    return result


def tell(result: dict[str, Any]) -> str:
    rows = []
    for title, feature in result["features"].items():
        for number, value in enumerate(next(iter(feature["sets"].values()))):
            cells = []
            for name in SETS:
                found = feature["sets"].get(name, {}).get(value)
                if found is None:
                    cells.append("")
                elif number == 0:
                    cells.append(f"{found['mat']['mean']:.3f}")
                else:
                    cells.append(f"{found['mat']['mean']:.3f}, by {told(found['less_default'], 3)}")
            scored = feature["sets"].get("greedy", {}).get(value)
            share = f"{100 * scored['scored']:.0f}" if scored else ""
            rows.append([title if number == 0 else "", f"`{feature['option']}={value}`", *cells, share])
    parts = [
        titled(
            f"Tokens a round (MAT) over the same texts, means of {result['seeds']} seeds, and by how much more that is than "
            "the default's, which stands first; intervals of 95% over the seeds tell how much is chance in who drafts, "
            "nothing of other texts. Last: the share of drafters that an evaluation scores, at temperature 0.",
            ["", "option", *SETS.values(), "scored, %"],
            rows,
        ),
        titled(
            "Depth correction: of drafted tokens that were looked at, the share predicted to be accepted from the scores, the "
            "same corrected as known at the time, and what was accepted.",
            ["", *(f"depth {depth + 1}" for depth in range(DRAFT_LENGTH))],
            [
                [f"{SETS[name]}: {kind}", *(f"{value:.3f}" for value in values)]
                for name, kinds in result["depths"].items()
                for kind, values in kinds.items()
            ],
        ),
        titled(
            "Objectives, temperature 0, under prices that are made up, in units of a forward over one token: speed over plain "
            "decoding, tokens drafted a round, rounds without a draft, MAT.",
            ["prices", "objective", "x plain", "drafted", "plain, %", "MAT"],
            [
                [
                    one["title"] if objective == "tokens" else "",
                    objective,
                    told(one[objective]["speed"], 3),
                    f"{one[objective]['length']['mean']:.2f}",
                    f"{100 * one[objective]['plain']['mean']:.0f}",
                    f"{one[objective]['mat']['mean']:.2f}",
                ]
                for one in result["prices"]
                for objective in OBJECTIVES
            ],
        ),
    ]
    return "\n".join([*parts, _verdict(result)])


def _verdict(result: dict[str, Any]) -> str:
    """What differs from the defaults beyond chance, and what the objectives do where drafts are dear."""
    above, below = [], []
    for title, feature in result["features"].items():
        for name, values in feature["sets"].items():
            for value, found in values.items():
                more = found["less_default"]
                words = f"`{feature['option']}={value}` ({title}, {SETS[name]}: {more['mean']:+.3f})"
                above += [words] if more["low"] > 0 else []
                below += [words] if more["high"] < 0 else []
    gaps = {
        name: [float(np.sum(kinds[kind]) - np.sum(kinds["accepted"])) for kind in ("predicted", "corrected")]
        for name, kinds in result["depths"].items()
    }
    promised = "; ".join(f"{SETS[name]} {before:.2f}, corrected {after:.2f}" for name, (before, after) in gaps.items())
    gains = [one["throughput"]["speed"]["mean"] / one["tokens"]["speed"]["mean"] for one in result["prices"]]
    first, last = result["prices"][0], result["prices"][-1]
    dear = last["throughput"]
    return (
        f"Above its default beyond chance: {', '.join(above) or 'nothing'}. Below: {', '.join(below) or 'nothing'}. Summed "
        f'over the depths, scores promise more acceptance than comes by: {promised}. Objective "throughput" has '
        f'{", ".join(f"{gain:.2f}" for gain in gains)} times the speed of "tokens" under the four prices: where drafts cost '
        f"next to nothing it drafts {first['throughput']['length']['mean']:.1f} tokens a round, and where nothing pays "
        f"{100 * dear['plain']['mean']:.0f}% of its rounds are plain, at {dear['speed']['mean']:.2f} times plain decoding's "
        "speed.\n"
    )


def draw(result: dict[str, Any]) -> Figure:
    rows = [
        (f"{title}: {value}", name, found["less_default"])
        for title, feature in result["features"].items()
        for name, values in feature["sets"].items()
        for value, found in list(values.items())[1:]
    ]
    labels = list(dict.fromkeys(label for label, _, _ in rows))
    made, [axes] = figure(1)
    made.set_size_inches(10, 1.5 + 0.4 * len(labels))
    for place, name in enumerate(SETS):
        own = [(labels.index(label) + 0.22 * (place - 1), one) for label, of, one in rows if of == name]
        reach = [[one["mean"] - one["low"] for _, one in own], [one["high"] - one["mean"] for _, one in own]]
        axes.errorbar([one["mean"] for _, one in own], [at for at, _ in own], xerr=reach, fmt="o", capsize=3, label=SETS[name])
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set(xlabel="tokens a round (MAT) less the default's")
    axes.legend()
    return made


EXPERIMENT = Experiment(
    "features",
    "What goes past the paper, option by option",
    "Each option of `DecodeConfig` by itself, the others at their defaults: what it does to the tokens a round. The text's "
    "distribution depends on none of them. Recorded acceptance, replayed; what an option saves in time is measured live, by "
    "the benchmarks below.",
    measure,
    tell,
    draw,
)
