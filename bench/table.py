"""A Markdown table of what benchmarks wrote: python bench/table.py FILE.json [FILE.json ...]"""

from __future__ import annotations

import json
import sys


def rows(path: str) -> list[str]:
    with open(path) as file:
        recorded = json.load(file)
    machine = recorded["machine_info"]
    lines = [f"{path}: {recorded['datetime'][:10]}, {machine.get('cpu', {}).get('brand_raw', machine['machine'])}", ""]
    lines += ["| benchmark | figures |", "|---|---|"]
    for benchmark in recorded["benchmarks"]:
        figures = benchmark["extra_info"] or {"fastest_us": round(benchmark["stats"]["min"] * 1e6, 2)}
        lines.append(f"| {benchmark['name']} | {', '.join(f'{key} {value}' for key, value in figures.items())} |")
    return lines


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    print("\n\n".join("\n".join(rows(path)) for path in sys.argv[1:]))
