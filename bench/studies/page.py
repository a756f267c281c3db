"""The tables of docs/results.md. The text of that page is written by hand; its tables come from the recorded results.

A table stands between two comments, `<!-- table NAME/KEY -->` and `<!-- end -->`. NAME is a study (its tables are listed in
`Study.tables`, and KEY `source` is its command, date and versions), `options` (a result of bench/bench_options.py) or `goals`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench_options import table_of
from table import markdown

from studies import NAMES, load

BLOCK = re.compile(r"<!-- table (?P<key>\S+) -->\n(?P<table>.*?)<!-- end -->\n", re.DOTALL)
Result = dict[str, Any]


def renew(page: Path, folder: Path) -> None:
    """Replaces the tables of a page by those of the recorded results. Args: the page, and the folder of the studies'
    results."""
    page.write_text(render(page.read_text(encoding="utf-8"), tables_of(folder)), encoding="utf-8")


def render(text: str, tables: Mapping[str, str]) -> str:
    """Returns the text of a page with its tables replaced. Raises: ValueError for a table that does not exist."""

    def block(found: re.Match[str]) -> str:
        if found["key"] not in tables:
            raise ValueError(f"table: expected one of {', '.join(tables)}, got {found['key']!r}")
        return f"<!-- table {found['key']} -->\n\n{tables[found['key']]}\n<!-- end -->\n"

    return BLOCK.sub(block, text)


def unsupported_figures(text: str) -> list[str]:
    """Returns the decimal figures in a page's prose that do not occur in a table of the same section (a `## ` heading)."""
    found = []
    for section in re.split(r"(?m)^## ", text):
        shown = set(re.findall(r"\d+\.\d+", "".join(block["table"] for block in BLOCK.finditer(section))))
        prose = re.sub(r"`[^`]*`|\(http\S*\)|arXiv \S+", "", BLOCK.sub("", section))
        found += [figure for figure in re.findall(r"\d+\.\d+", prose) if figure not in shown]
    return found


def tables_of(folder: Path) -> dict[str, str]:
    """Returns all tables by key, of every result in the folder of the studies and in `decoder` beside it."""
    results = {name: json.loads(path.read_text()) for name in NAMES if (path := folder / f"{name}.json").exists()}
    tables = {"goals": goals(results)}
    for name, result in results.items():
        source = f"`{result['command']}`, {result['date']}, torch {result['versions']['torch']}.\n"
        tables |= {f"{name}/source": source} | {f"{name}/{key}": table for key, table in load(name).tables(result).items()}
    for path in sorted((folder.parent / "decoder").glob("*.json")):
        result = json.loads(path.read_text())
        if "option" in result:
            tables[f"options/{path.stem}"] = options_table(result)
    return tables


def options_table(result: Result) -> str:
    """Returns the command and the table of one result of bench/bench_options.py."""
    source = f"`{result['command'].partition(' --json')[0]}`, {result['date']}.\n"
    return f"{source}\n{table_of(result['option'], result['rows'])}"


# Goals


def goals(results: Mapping[str, Result]) -> str:
    """Returns the table of the project's goals: whether each is met, and what was measured."""
    rows = [goal(results[name]) for name, goal in GOALS if name in results]
    return markdown(["goal", "", "measured"], [[text, "met" if met else "missed", measured] for text, met, measured in rows])


def _speed(result: Result) -> tuple[str, bool, str]:
    live, mean = result["live"], result["mean"]
    ours, throughput = (live[f"{method}_over_generalist"]["mean"] for method in ("hedgespec", "throughput"))
    most = mean["best_of_each_request"] / mean["generalist"]
    return (
        "HedgeSpec has 1.461 times the generalist's tokens/s",
        max(ours, throughput) >= 1.461,
        f'{ours:.2f}; {throughput:.2f} with objective "throughput"; the best drafter of each text has {most:.2f} times the '
        "generalist's tokens per round",
    )


def _best_fixed(result: Result) -> tuple[str, bool, str]:
    shares = {domain: row["of_best_fixed"]["mean"] for domain, row in result["domains"].items()}
    measured = ", ".join(f"{domain} {share:.3f}" for domain, share in shares.items())
    return "its tokens per round are 0.98 of the best fixed drafter's in every domain", min(shares.values()) >= 0.98, measured


def _bandits(result: Result) -> tuple[str, bool, str]:
    met, measured = True, []
    for name, of_set in result["sets"].items():
        rows = of_set["learners"]
        ours, others = rows["normal_hedge"]["mat"], [rows[one]["mat"] for one in ("ucb", "exp3")]
        met &= all(ours["low"] > other["high"] for other in others)
        measured.append(f"{name} {ours['mean']:.2f} against " + " and ".join(f"{other['mean']:.2f}" for other in others))
    goal = "its tokens per round exceed UCBSpec's and EXP3Spec's, 95% intervals apart, without a warm start"
    return goal, met, "; ".join(measured)


def _pools(result: Result) -> tuple[str, bool, str]:
    rows = result["wide"]["learners"]
    slope = rows["normal_hedge"]["slope_in_log"]
    titles = {"normal_hedge": "NormalHedge", "ucb": "UCBSpec", "exp3": "EXP3Spec"}
    measured = ", ".join(
        f"{title} {rows[method]['regret'][0]['mean']:.1f} to {rows[method]['regret'][-1]['mean']:.1f}"
        for method, title in titles.items()
        if method in rows
    )
    return "its regret is flat from 2 drafters to 64, the bandits' grows", slope["low"] <= 0 <= slope["high"], measured


def _first_pick(result: Result) -> tuple[str, bool, str]:
    rows = result["warm"]["greedy"]["warm_starts"]
    warm, cold = ({key: rows[most][key]["mean"] for key in ("picked", "of_best")} for most in ("32", "0"))
    return (
        "the first drafter is the best for 80% of requests, and the first 32 tokens have 0.97 of its tokens per round",
        warm["picked"] >= 0.8 and warm["of_best"] >= 0.97,
        f"{warm['picked']:.0%}, {warm['of_best']:.3f}; without the warm start {cold['picked']:.0%}, {cold['of_best']:.3f}",
    )


GOALS = (
    ("baseline", _speed),
    ("baseline", _best_fixed),
    ("selection", _bandits),
    ("pool-size", _pools),
    ("open-questions", _first_pick),
)
"""The study that each goal is measured by, and the goal with whether it is met and the figures."""
