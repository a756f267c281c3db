"""Runs studies: `python bench/studies/run.py NAME [NAME ...]`, or `all`; `page` only renews the tables of docs/results.md.

Each study writes NAME.json (all figures), NAME.md (its tables) and NAME.svg. An interrupted run continues where it stopped:
recorded texts (under `traces`) and finished steps (under `parts`) are not computed again. `all` ends by renewing the tables of
docs/results.md; its text is written by hand. Needs scipy, scikit-learn and matplotlib: `pip install -e ".[experiments]"`.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parents[1]
if str(BENCH) not in sys.path:
    sys.path.insert(0, str(BENCH))

from rich.console import Console  # noqa: E402

from studies import NAMES, Study, load, page  # noqa: E402
from studies.lab import Lab  # noqa: E402
from studies.plots import save  # noqa: E402

RESULTS = BENCH / "results" / "experiments"
PACKAGES = {"scipy": "scipy", "sklearn": "scikit-learn", "matplotlib": "matplotlib"}
"""What the studies import beyond HedgeSpec's dependencies, and its name for pip."""
DIGITS = 7
"""Significant digits of the figures in NAME.json."""


def run(study: Study, folder: Path, *, seeds: int, fresh: bool, console: Console) -> None:
    """Measures one study and writes its files."""
    lab = Lab(folder, study.name, seeds=seeds, fresh=fresh, console=console)
    write(study, rounded({**lab.environment(), **study.measure(lab)}), folder)


def write(study: Study, result: dict[str, Any], folder: Path) -> None:
    """Writes NAME.json, NAME.md and NAME.svg of a result."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / study.name
    stem.with_suffix(".json").write_text(to_json(result) + "\n", encoding="utf-8")
    tables = "\n".join(f"{key}\n\n{table}" for key, table in study.tables(result).items())
    stem.with_suffix(".md").write_text(f"# {study.title}\n\n{tables}", encoding="utf-8")
    save(study.draw(result), stem.with_suffix(".svg"))


def rounded(value: Any) -> Any:
    """Returns a JSON value with every float rounded to `DIGITS` significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return [rounded(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def to_json(value: Any, indent: int = 0) -> str:
    """Returns JSON in which a list or dictionary without further lists or dictionaries is one line."""
    nested = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if not any(isinstance(inner, (dict, list)) for inner in nested):
        return json.dumps(value)
    pad = "\n" + " " * (indent + 1)
    named = [f"{json.dumps(key)}: " for key in value] if isinstance(value, dict) else [""] * len(value)
    inner = f",{pad}".join(name + to_json(one, indent + 1) for name, one in zip(named, nested, strict=True))
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return f"{opening}{pad}{inner}\n{' ' * indent}{closing}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("names", metavar="NAME", nargs="+", choices=(*NAMES, "all", "page"), help=f"{', '.join(NAMES)}, all, or page")
    add("--out", metavar="FOLDER", type=Path, default=RESULTS, help="folder of results and traces, default %(default)s")
    add("--seeds", metavar="N", type=int, default=20, help="replays of each learner over each text, default %(default)s")
    add("--fresh", action="store_true", help="compute finished steps again; recorded texts are kept")
    add("--page", metavar="FILE", type=Path, default=BENCH.parent / "docs" / "results.md", help="default %(default)s")
    options = parser.parse_args(arguments)
    if options.seeds < 2:
        parser.error(f"--seeds: expected at least 2, got {options.seeds}")
    if missing := [name for module, name in PACKAGES.items() if find_spec(module) is None]:
        parser.error(f"the studies need {', '.join(missing)}: pip install -e '.[experiments]'")
    console = Console(stderr=True)
    names = list(NAMES) if "all" in options.names else [name for name in options.names if name != "page"]
    for number, name in enumerate(names, start=1):
        console.print(f"study {number} of {len(names)}: {name}")
        run(load(name), options.out, seeds=options.seeds, fresh=options.fresh, console=console)
        print(options.out / f"{name}.md")
    if {"all", "page"} & set(options.names):
        page.renew(options.page, options.out)
        print(options.page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
