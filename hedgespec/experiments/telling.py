"""How results are told and drawn: Markdown tables, and what learners are called and coloured throughout."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEARNERS = {
    "normal_hedge": "NormalHedge", "hedge": "Hedge", "ada_normal_hedge": "AdaNormalHedge", "ucb": "UCBSpec",
    "exp3": "EXP3Spec", "meta_sd": "MetaSD", "uniform": "uniform draw",
}  # fmt: skip
"""What learners are called, those that hear of all drafters first."""
FULL = ("normal_hedge", "hedge", "ada_normal_hedge")
BANDITS = ("ucb", "exp3", "meta_sd")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is words, the others are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def titled(title: str, head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table under a line that says what it shows."""
    return f"{title}\n\n{table([*map(str, head)], [[*map(str, row)] for row in rows])}"


def figure(columns: int, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure and its axes from left to right, row by row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    made, axes = pyplot.subplots(rows, columns, figsize=(5.6 * columns, 4.4 * rows), layout="constrained", squeeze=False)
    return made, list(axes.flat)


def called(way: str) -> str:
    """What a learner is called, `NAME` or, with the warm start, `NAME warm`."""
    learner, _, warm = way.partition(" ")
    return LEARNERS[learner] + (", warm start" if warm else "")


def look(way: str) -> dict[str, Any]:
    """Its colour and line, the same in every figure."""
    learner, _, warm = way.partition(" ")
    return {"color": f"C{list(LEARNERS).index(learner)}", "linestyle": "--" if warm else "-"}


def band(axes: Axes, places: ArrayLike, intervals: Sequence[dict[str, float]], **look: Any) -> None:
    """A line through means within a band from low to high."""
    mean, low, high = (np.array([interval[name] for interval in intervals]) for name in ("mean", "low", "high"))
    [line] = axes.plot(places, mean, **look)
    axes.fill_between(places, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def bars(axes: Axes, places: ArrayLike, intervals: Sequence[dict[str, float]], **look: Any) -> None:
    """Bars with whiskers from low to high."""
    mean, low, high = (np.array([interval[name] for interval in intervals]) for name in ("mean", "low", "high"))
    axes.bar(places, mean, yerr=[mean - low, high - mean], error_kw={"elinewidth": 1, "capsize": 2}, **look)
