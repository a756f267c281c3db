"""What goes past the paper, each option by itself: what it does to the tokens a round, over the same texts and seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from hedgespec.config import DecodeConfig
from hedgespec.experiments import Experiment
from hedgespec.experiments.laboratory import Laboratory
from hedgespec.experiments.statistics import by_seed, mat, mean_interval, told

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SETS = {"greedy": "temperature 0", "sampled": "temperature 1, sampled", "coupled": "temperature 1, coupled"}


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
    Feature("how a drafter follows from the weights", "selection", ("sample", "argmax")),
    Feature("prompt warm start", "warm_start", (32, 0, 8, 64)),
    Feature("rounds between evaluations", "evaluate_every", ("adaptive", 1, 4, 8)),
)


def measure(lab: Laboratory) -> dict[str, Any]:
    result: dict[str, Any] = {"features": {}}
    for feature in lab.track(FEATURES, "features"):
        of_sets: dict[str, Any] = {}
        for name in feature.sets:
            traces = [trace for trace in lab.traces(name) if trace.drafted.shape[1]]
            found: dict[str, Any] = {}
            for value in feature.values:
                options = {**feature.shared, feature.option: value}
                config = DecodeConfig(mode=traces[0].mode, **options)
                key = f"{name} {len(traces)} {lab.seeds} {sorted(options.items())}"
                found[str(value)] = lab.once(key, lambda: by_seed(traces, config, lab.seeds, lambda _, stats: mat(stats)))  # noqa: B023
            default = np.array(found[str(feature.values[0])])
            of_sets[name] = {
                value: {"mat": mean_interval(mats), "less_default": mean_interval(np.array(mats) - default)}
                for value, mats in found.items()
            }
        result["features"][feature.title] = {"option": feature.option, "sets": of_sets}
    return result


def tell(result: dict[str, Any]) -> str:
    lines = [
        f"Tokens a round (MAT) over the same texts, replayed with {result['seeds']} seeds; intervals of 95% over the seeds, "
        "which tell how much is chance in the choice of drafters and nothing of other texts. The first value of each option "
        "is the default. In brackets: what another value changes.",
        "",
        "| | option | " + " | ".join(SETS.values()) + " |",
        "|---" * (2 + len(SETS)) + "|",
    ]
    for title, feature in result["features"].items():
        values = list(next(iter(feature["sets"].values())))
        for number, value in enumerate(values):
            cells = []
            for name in SETS:
                found = feature["sets"].get(name, {}).get(value)
                cell = "" if found is None else told(found["mat"], 3)
                if number and found is not None:
                    cell = f"{found['mat']['mean']:.3f} [{told(found['less_default'], 3)}]"
                cells.append(cell)
            lines.append(f"| {title if number == 0 else ''} | `{feature['option']}={value}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(result: dict[str, Any]) -> Figure:
    from matplotlib import pyplot

    rows = [
        (f"{feature['option']}={value}", name, found["less_default"])
        for feature in result["features"].values()
        for name, values in feature["sets"].items()
        for value, found in list(values.items())[1:]
    ]
    labels = list(dict.fromkeys(label for label, _, _ in rows))
    figure, axes = pyplot.subplots(figsize=(9, 1.5 + 0.45 * len(labels)), layout="constrained")
    for place, name in enumerate(SETS):
        own = [(labels.index(label) + 0.22 * (place - 1), one) for label, of, one in rows if of == name]
        reach = [[one["mean"] - one["low"] for _, one in own], [one["high"] - one["mean"] for _, one in own]]
        axes.errorbar([one["mean"] for _, one in own], [at for at, _ in own], xerr=reach, fmt="o", capsize=3, label=SETS[name])
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set(xlabel="tokens a round (MAT) less the default's")
    axes.legend()
    return figure


EXPERIMENT = Experiment(
    "features",
    "What goes past the paper, option by option",
    "Each option of `DecodeConfig` by itself, the others at their defaults: what it does to the tokens a round. The text's "
    "distribution depends on none of them. Recorded acceptance, replayed.",
    measure,
    tell,
    draw,
)
