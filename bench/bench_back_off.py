"""Regret and time where hopeless drafters are scored ever more rarely: `python bench/bench_back_off.py --json FILE`.

As bench/bench_cadence.py, with each value of `back_off` in turns: after how many evaluations in a row without weight a drafter
is left out; `always`, which scores all at every evaluation, comes first. MAT, regrets, x first and scoring are those of
bench_cadence.py, and

    scored, %          of the drafters, how many an evaluation scores; what sleepers catch up on at once counts as one
    scoring, ms        evaluate and prefill, a round
"""

from __future__ import annotations

import sys

import numpy as np
from bench_cadence import COLUMNS, SCORING, cells, requests_of, summary
from bench_decoder import DRAFT_LENGTH, cadence, positive
from in_turns import add_temperature, add_times_first, parsed, parser_of, told
from rich.console import Console
from rich.table import Table

from hedgespec.config import DecodeConfig
from hedgespec.zoo import load_zoo


def patience(text: str) -> int | None:
    return None if text == "always" else positive(text)


def row_of(back_off: int | None, every: int | str, requests: list[dict]) -> dict:
    rounds = sum(request["rounds"] for request in requests)
    scoring = sum(request["seconds_by_stage"][stage] for request in requests for stage in SCORING)
    # Whoever drafts last is scored in every evaluation.
    shares = [np.mean(request["evaluations"]) / max(request["evaluations"]) for request in requests]
    return summary(every, requests) | {
        "back_off": "always" if back_off is None else back_off,
        "scored_share": float(np.mean(shares)),
        "scoring_ms": 1e3 * scoring / rounds,
    }


def show(rows: list[dict], console: Console) -> None:
    title = f"{len(rows[0]['requests'])} requests by back_off, evaluated every {rows[0]['evaluate_every']}"
    table = Table(title=title, title_justify="left", box=None)
    for column in ("back_off", *COLUMNS, "scored, %", "scoring, ms"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(str(row["back_off"]), *cells(row), f"{100 * row['scored_share']:.0f}", f"{row['scoring_ms']:.2f}")
    console.print(table)


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--back-off", type=patience, nargs="+", default=[1, 2, 4, 8], metavar="n", help="beside always; default 1 2 4 8"
    )
    parser.add_argument("--evaluate-every", type=cadence, default=1, metavar="m", help='or "adaptive"; default %(default)s')
    add_temperature(parser)
    options = parsed(parser)
    values = list(dict.fromkeys([None, *options.back_off]))
    every = options.evaluate_every
    configs = {value: DecodeConfig(draft_length=DRAFT_LENGTH, evaluate_every=every, back_off=value) for value in values}
    console, zoo = Console(), load_zoo(device=options.device)
    requests, gaps = requests_of(zoo, configs, options, console)
    rows = [row_of(value, every, of) for value, of in requests.items()]
    add_times_first(rows)
    show(rows, console)
    return told(options, zoo, console, gaps, {"back_offs": rows})


if __name__ == "__main__":
    sys.exit(main())
