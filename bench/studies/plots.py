"""Figures: axes, error bands and bars, and one name, colour and line style for each learner."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hedgespec.experiments.measures import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEARNERS = {
    "normal_hedge": "NormalHedge", "hedge": "Hedge", "ada_normal_hedge": "AdaNormalHedge", "ucb": "UCBSpec",
    "exp3": "EXP3Spec", "meta_sd": "MetaSD", "uniform": "uniform draw",
}  # fmt: skip
"""Titles of the learners, those with full information first."""
FULL = ("normal_hedge", "hedge", "ada_normal_hedge")
BANDITS = ("ucb", "exp3", "meta_sd")


def title_of(method: str) -> str:
    """Returns the title of a learner's name, `NAME` or, with the warm start, `NAME warm`."""
    learner, _, warm = method.partition(" ")
    return LEARNERS[learner] + (", warm start" if warm else "")


def style_of(method: str) -> dict[str, str]:
    """Returns the colour and line style of a learner, the same in every figure."""
    learner, _, warm = method.partition(" ")
    return {"color": f"C{list(LEARNERS).index(learner)}", "linestyle": "--" if warm else "-"}


def figure(columns: int, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """Returns a figure and its axes from left to right, row by row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    made, axes = pyplot.subplots(rows, columns, figsize=(5.6 * columns, 4.4 * rows), layout="constrained", squeeze=False)
    return made, list(axes.flat)


def bounds(intervals: Sequence[Interval]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the means, lows and highs."""
    return tuple(np.array([interval[name] for interval in intervals]) for name in ("mean", "low", "high"))


def band(axes: Axes, places: Sequence[float], intervals: Sequence[Interval], **style) -> None:
    """Draws a line through the means within a band from low to high."""
    mean, low, high = bounds(intervals)
    [line] = axes.plot(places, mean, **style)
    axes.fill_between(places, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def bars(axes: Axes, places: Sequence[float], intervals: Sequence[Interval], **style) -> None:
    """Draws bars with error bars from low to high."""
    mean, low, high = bounds(intervals)
    axes.bar(places, mean, yerr=[mean - low, high - mean], error_kw={"elinewidth": 1, "capsize": 2}, **style)


def save(made: Figure, path: Path) -> None:
    """Writes an SVG file that depends on the figure alone: no date, no random identifiers, coordinates to 0.01 points."""
    import matplotlib
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": path.stem, "svg.fonttype": "none"}):
        made.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(made)
    text = re.sub(r"-?\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", path.read_text(encoding="utf-8"))
    path.write_text(text, encoding="utf-8")
