"""What goes past the paper, one change at a time: its effect on the tokens per round over the same texts and seeds.

Options of `DecodeConfig` are replayed as they are. What HedgeSpec no longer has (the estimate "product", the loss
"acceptance_rate", selection by the largest weight, back-off evaluation, depth correction) comes from `studies.variants`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from table import interval, markdown

from hedgespec.config import DecodeConfig
from hedgespec.experiments.measures import mean_interval, over_seeds, tokens_per_round
from hedgespec.experiments.recording import Trace
from hedgespec.experiments.replay import replay
from hedgespec.stats import DecodeStats
from studies import Study
from studies.lab import Lab, signature
from studies.plots import figure
from studies.variants import ArgmaxNormalHedge, BackOff, DepthCorrection, acceptance_rate, product

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SETS = {"greedy": "temperature 0", "sampled": "temperature 1, sampled", "coupled": "temperature 1, coupled"}
DRAFT_LENGTH = 5
Run = Callable[[Trace, DecodeConfig, int], tuple[DecodeStats, float]]
"""Replays a text with a seed; returns its statistics and the scored drafters over those that every evaluation could have
scored."""


def plain(trace: Trace, config: DecodeConfig, seed: int) -> tuple[DecodeStats, float]:
    """Replays HedgeSpec as it is."""
    return replay(trace, config, seed=seed), 1.0


def _product(trace: Trace, config: DecodeConfig, seed: int) -> tuple[DecodeStats, float]:
    return replay(product(trace), config, seed=seed), 1.0


def _acceptance_rate(trace: Trace, config: DecodeConfig, seed: int) -> tuple[DecodeStats, float]:
    return acceptance_rate(trace, config, seed), 1.0


def _argmax(trace: Trace, config: DecodeConfig, seed: int) -> tuple[DecodeStats, float]:
    return replay(trace, config, seed=seed, learner=ArgmaxNormalHedge(len(trace.drafters))), 1.0


def _depth_correction(trace: Trace, config: DecodeConfig, seed: int) -> tuple[DecodeStats, float]:
    return replay(trace, config, seed=seed, selector=DepthCorrection(trace, config)), 1.0


@dataclass(frozen=True)
class _BackOff:
    patience: int

    def __call__(self, trace: Trace, config: DecodeConfig, seed: int) -> tuple[DecodeStats, float]:
        selector = BackOff(trace, config, self.patience)
        return replay(trace, config, seed=seed, selector=selector), selector.evaluations


@dataclass(frozen=True)
class Feature:
    """One change and its values; the first value is HedgeSpec's default."""

    title: str
    option: str
    values: Mapping[str, tuple[Run, dict[str, Any]]]
    """By value: how a text is replayed, and options of `DecodeConfig`."""
    sets: tuple[str, ...] = tuple(SETS)


def _options(title: str, option: str, *values: Any) -> Feature:
    return Feature(title, option, {str(value): (plain, {option: value}) for value in values})


def _back_off(title: str, **options: Any) -> Feature:
    runs = {"None": plain} | {str(patience): _BackOff(patience) for patience in (1, 2, 4)}
    return Feature(title, "back_off", {value: (run, options) for value, run in runs.items()})


FEATURES = (
    Feature("estimator", "estimator", {"exact": (plain, {}), "product": (_product, {})}, ("sampled",)),
    Feature("loss", "loss", {"length": (plain, {}), "acceptance_rate": (_acceptance_rate, {})}),
    Feature("from weights to a drafter", "selection", {"sample": (plain, {}), "argmax": (_argmax, {})}),
    _options("prompt warm start", "warm_start", 32, 0, 8, 64),
    _options("rounds between evaluations", "evaluate_every", "adaptive", 1, 4, 8),
    _back_off("back-off evaluation"),
    _back_off("back-off, evaluated each round", evaluate_every=1),
    Feature("depth correction", "depth_correction", {"False": (plain, {}), "True": (_depth_correction, {})}),
)


@dataclass(frozen=True)
class Prices:
    """Assumed costs of a round, in units of a forward over one token."""

    title: str
    draft: float
    """Cost of a drafted token."""
    verify: tuple[float, ...]
    """Cost of verifying a round, by drafted length 0..K."""

    def seconds(self, drafters: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the costs as `replay` takes them."""
        return np.full(drafters, self.draft), np.array(self.verify)

    def of(self, stats: DecodeStats) -> float:
        """Returns the cost of all rounds of a request."""
        lengths = np.array(stats.lengths)
        return float(self.draft * lengths.sum() + np.array(self.verify)[lengths].sum())


PRICES = (
    Prices("as on the paper's GPU: any round one forward, a drafted token 1/30 of it", 1 / 30, (1.0,) * (DRAFT_LENGTH + 1)),
    Prices("each drafted token makes the forward dearer by 1/8, and costs 1/15", 1 / 15, tuple(1 + k / 8 for k in range(6))),
    Prices("each makes it dearer by 1/2, and costs 1/5", 1 / 5, tuple(1 + k / 2 for k in range(6))),
    Prices("each makes it dearer by 1, and costs 1/2: nothing pays", 1 / 2, tuple(1.0 + k for k in range(6))),
)
OBJECTIVES = {
    "tokens": ("tokens", None),
    "throughput": ("throughput", None),
    "throughput, depth correction": ("throughput", DepthCorrection),
}
"""By row: the objective, and what selects in place of HedgeSpec's own selector."""


def measure(lab: Lab) -> dict[str, Any]:
    sets = {name: [trace for trace in lab.traces(name) if trace.drafted.shape[1]] for name in SETS}
    return {
        "features": {feature.title: _compare(lab, feature, sets) for feature in lab.track(FEATURES, "features")},
        "depths": {name: _depths(lab, traces) for name, traces in sets.items()},
        "prices": [_objectives(lab, prices, sets["greedy"]) for prices in lab.track(PRICES, "objectives")],
    }


def _compare(lab: Lab, feature: Feature, sets: Mapping[str, list[Trace]]) -> dict[str, Any]:
    """Returns the tokens per round of every value, the difference to the default's, and the share of scored drafters."""
    of_sets: dict[str, Any] = {}
    for name in feature.sets:
        traces, found = sets[name], {}
        for value, (run, options) in feature.values.items():
            config = DecodeConfig(proposal=traces[0].mode, draft_length=DRAFT_LENGTH, **options)
            key = f"{signature(traces)} {lab.seeds} {feature.option}={value} {sorted(options.items())}"
            found[value] = lab.once(key, lambda: _tokens_by_seed(traces, config, run, lab.seeds))  # noqa: B023
        default = np.array(next(iter(found.values()))["mat"])
        of_sets[name] = {
            value: {
                "mat": mean_interval(one["mat"]),
                "less_default": mean_interval(np.array(one["mat"]) - default),
                "scored": float(np.mean(one["scored"])),
            }
            for value, one in found.items()
        }
    return {"option": feature.option, "sets": of_sets}


def _tokens_by_seed(traces: Sequence[Trace], config: DecodeConfig, run: Run, seeds: int) -> dict[str, list[float]]:
    """Returns, by seed, tokens per round and the share of drafters that the evaluations scored."""
    evaluated: list[np.ndarray] = []

    def replayed(trace: Trace, seed: int) -> DecodeStats:
        stats, evaluations = run(trace, config, seed)
        evaluated.append(np.broadcast_to(evaluations, len(trace.drafters)))
        return stats

    def measure(requests: list[DecodeStats]) -> tuple[float, float]:
        most = sum(len(one) * one.max() for one in evaluated)
        share = sum(one.sum() for one in evaluated) / most
        evaluated.clear()
        return tokens_per_round(requests), float(share)

    mats, scored = zip(*over_seeds(traces, seeds, replayed, measure))
    return {"mat": list(mats), "scored": list(scored)}


def _depths(lab: Lab, traces: Sequence[Trace]) -> dict[str, list[float]]:
    """Returns the acceptance at each depth over the rounds that reached it, [K]: predicted, corrected, and realised."""
    config = DecodeConfig(proposal=traces[0].mode, draft_length=DRAFT_LENGTH)

    def sums() -> list[list[float]]:
        total = np.zeros((4, DRAFT_LENGTH))

        def run(trace: Trace, seed: int) -> DecodeStats:
            selector = DepthCorrection(trace, config)
            stats = replay(trace, config, seed=seed, selector=selector)
            total[:] += list(selector.by_depth.values())
            return stats

        over_seeds(traces, lab.seeds, run, len)
        return total.tolist()

    reached, *others = np.array(lab.once(f"depths {signature(traces)} {lab.seeds}", sums))
    return {kind: (of / np.maximum(reached, 1)).tolist() for kind, of in zip(("predicted", "corrected", "accepted"), others)}


def _objectives(lab: Lab, prices: Prices, traces: Sequence[Trace]) -> dict[str, Any]:
    """Returns, by objective under the same prices, speed over plain decoding, mean draft length, rounds without a draft."""
    undrafted = sum(trace.drafted.shape[1] for trace in traces) * prices.verify[0]
    result: dict[str, Any] = {"title": prices.title}

    def measure(requests: list[DecodeStats]) -> list[float]:
        lengths = np.concatenate([stats.lengths for stats in requests])
        speed = undrafted / sum(map(prices.of, requests))
        return [speed, float(lengths.mean()), float((lengths == 0).mean()), tokens_per_round(requests)]

    for name, (objective, selector) in OBJECTIVES.items():
        config = DecodeConfig(draft_length=DRAFT_LENGTH, objective=objective)
        seconds = prices.seconds(len(traces[0].drafters)) if objective == "throughput" else None

        def run(trace: Trace, seed: int, config=config, selector=selector, seconds=seconds) -> DecodeStats:
            return replay(trace, config, seed=seed, seconds=seconds, selector=selector and selector(trace, config))

        key = f"{signature(traces)} {lab.seeds} {name} {prices}"
        found = np.array(lab.once(key, lambda run=run: over_seeds(traces, lab.seeds, run, measure)))
        result[name] = {kind: mean_interval(column) for kind, column in zip(("speed", "length", "plain", "mat"), found.T)}
    return result


def tables(result: dict[str, Any]) -> dict[str, str]:
    rows = []
    for title, feature in result["features"].items():
        for number, value in enumerate(next(iter(feature["sets"].values()))):
            cells = []
            for name in SETS:
                found = feature["sets"].get(name, {}).get(value)
                mean = "" if found is None else f"{found['mat']['mean']:.3f}"
                cells.append(mean if number == 0 or not mean else f"{mean}, by {interval(found['less_default'], 3)}")
            scored = feature["sets"].get("greedy", {}).get(value)
            share = f"{100 * scored['scored']:.0f}" if scored else ""
            rows.append([f"{title}: `{feature['option']}={value}`", *cells, share])
    return {
        "features": markdown(["change", *SETS.values(), "scored, %"], rows),
        "depths": markdown(["acceptance of drafted tokens", *(f"depth {depth + 1}" for depth in range(DRAFT_LENGTH))], [
            [f"{SETS[name]}: {kind}", *(f"{value:.3f}" for value in values)]
            for name, kinds in result["depths"].items() for kind, values in kinds.items()
        ]),
        "prices": markdown(
            ["prices, objective", "speed over plain", "drafted", "rounds without a draft, %", "tokens per round"],
            [[f"{one['title']}; {objective}", interval(one[objective]["speed"], 3), f"{one[objective]['length']['mean']:.2f}",
              f"{100 * one[objective]['plain']['mean']:.0f}", f"{one[objective]['mat']['mean']:.2f}"]
             for one in result["prices"] for objective in OBJECTIVES],
        ),
    }  # fmt: skip


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
    axes.set(xlabel="tokens per round less the default's")
    axes.legend()
    return made


STUDY = Study("features", "What goes past the paper, one change at a time", measure, tables, draw)
