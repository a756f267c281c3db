"""Markdown tables. As a script, a table of what pytest-benchmark wrote: `python bench/table.py FILE.json [FILE.json ...]`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def markdown(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Returns a Markdown table. The first column is aligned left, the others right."""
    lines = [[str(cell) for cell in line] for line in (head, ["---", *["---:"] * (len(head) - 1)], *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def interval(values: Mapping[str, float], digits: int = 2) -> str:
    """Returns {"mean", "low", "high"} as `mean (low to high)`."""
    return f"{values['mean']:.{digits}f} ({values['low']:.{digits}f} to {values['high']:.{digits}f})"


def benchmarks(recorded: dict[str, Any]) -> str:
    """Returns the date, the processor and a table of the figures of one JSON file of pytest-benchmark."""
    machine = recorded["machine_info"]
    processor = machine.get("cpu", {}).get("brand_raw", machine["machine"])
    rows = []
    for benchmark in recorded["benchmarks"]:
        figures = benchmark["extra_info"] or {"fastest_us": round(benchmark["stats"]["min"] * 1e6, 2)}
        rows.append([benchmark["name"], ", ".join(f"{key} {value}" for key, value in figures.items())])
    return f"{recorded['datetime'][:10]}, {processor}\n\n{markdown(['benchmark', 'figures'], rows)}"


def main(paths: Sequence[str]) -> None:
    if not paths:
        sys.exit(__doc__)
    for path in paths:
        with open(path) as file:
            print(f"{path}: {benchmarks(json.load(file))}")


if __name__ == "__main__":
    main(sys.argv[1:])
