"""Draft trees against chains on real text: `python bench/bench_tree.py --json FILE`.

The same held-out prompts of the zoo's mixed stream, decoded by the whole pool with each shape of draft in turns, each prompt
starting with another one. At temperature 0 the texts are compared, as in bench/bench_decoder.py: the run fails if one differs
by more than a tie of logits. A shape is

    chain              one token after another, from the drafter's distribution (at temperature 0 its likeliest)
    argmax             a chain of the likeliest tokens
    C or C,C,..        a static tree, children by depth, the likeliest tokens
    C/M                a dynamic one: the likeliest M nodes
    sampled:C,C,..     a static tree whose children are samples

and of each is told

    MAT                tokens a round, over all rounds
    predicted          what the losses of the drafters that drafted say the rounds would emit, over the rounds they tell of: the
                       losses are teacher-forced, while a head drafts on its own features
    realised           what these rounds emitted
    x first            tokens a second over those of the shape named first
    verify, %          share of the time that the target's forward takes
"""

from __future__ import annotations

import sys

import numpy as np
from bench_cadence import record
from bench_decoder import DRAFT_LENGTH, batches_of
from in_turns import add_temperature, add_times_first, gaps_of, in_turns, parsed, parser_of, told
from rich.console import Console
from rich.table import Table

from hedgespec.config import DecodeConfig, Tree
from hedgespec.metrics import DecodeStats
from hedgespec.zoo import NAMES, load_prompts, load_zoo

SHAPES = ("chain", "2", "4,2,1,1,1", "4/8", "8/16", "8/32")


def config_of(shape: str) -> DecodeConfig:
    if shape in ("chain", "argmax"):
        return DecodeConfig(draft_length=DRAFT_LENGTH, proposal="argmax" if shape == "argmax" else "sampled")
    mode, counts = ("sampled", shape.removeprefix("sampled:")) if shape.startswith("sampled:") else ("argmax", shape)
    counts, _, size = counts.partition("/")
    branching = tuple(map(int, counts.split(",")))
    tree = Tree(branching if len(branching) > 1 else branching[0], int(size) if size else None)
    return DecodeConfig(draft_length=DRAFT_LENGTH, proposal=mode, tree=tree)


def lengths(stats: DecodeStats) -> list[tuple[float, int]]:
    """Of each full round whose first position has its losses: what the drafter's says, and what was emitted."""
    starts = np.cumsum([0, *stats.emitted_by_round[:-1]])
    return [
        ((DRAFT_LENGTH + 1) * (1 - float(stats.losses[start][drafter])), emitted)
        for start, drafter, emitted in zip(starts, stats.choices, stats.emitted_by_round)
        if start < len(stats.losses) and drafter >= 0
    ]


def summary(shape: str, requests: list[dict]) -> dict:
    seconds, tokens, rounds = (sum(request[key] for request in requests) for key in ("seconds", "emitted_tokens", "rounds"))
    pairs = np.array([pair for request in requests for pair in request["lengths"]])
    return {
        "shape": shape,
        "mat": (tokens - len(requests)) / rounds,
        "predicted": float(pairs[:, 0].mean()),
        "realised": float(pairs[:, 1].mean()),
        "realised_standard_error": float(pairs[:, 1].std(ddof=1) / np.sqrt(len(pairs))),
        "tokens_per_second": tokens / seconds,
        "verify_share": sum(request["seconds_by_stage"]["verify"] for request in requests) / seconds,
        "requests": requests,
    }


def show(rows: list[dict], console: Console) -> None:
    table = Table(title=f"{len(rows[0]['requests'])} requests by shape of the draft", title_justify="left", box=None)
    for column in ("shape", "MAT", "predicted", "realised", "+-", "tokens/s", "x first", "verify, %"):
        table.add_column(column, justify="left" if column == "shape" else "right")
    for row in rows:
        table.add_row(
            row["shape"], *(f"{row[key]:.3f}" for key in ("mat", "predicted", "realised", "realised_standard_error")),
            f"{row['tokens_per_second']:.1f}", f"{row['times_first']:.2f}", f"{100 * row['verify_share']:.0f}",
        )  # fmt: skip
    console.print(table)


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="SHAPE", help=f"default {' '.join(SHAPES)}")
    parser.add_argument("--drafters", nargs="+", default=list(NAMES), choices=NAMES, metavar="HEAD", help="default all")
    add_temperature(parser)
    options = parsed(parser)
    try:
        configs = {shape: config_of(shape) for shape in options.shapes}
    except (TypeError, ValueError) as error:
        parser.error(f"--shapes: {error}")
    console, zoo = Console(), load_zoo(options.drafters, device=options.device)
    works = batches_of(zoo, load_prompts()[: options.prompts], 1, options.seed)
    requests: dict[str, list[dict]] = {shape: [] for shape in configs}
    gaps: list[float] = []
    arguments = {"max_new_tokens": options.max_new_tokens, "temperature": options.temperature}
    for work, outputs in in_turns(zoo, configs, works, console, **arguments):
        for shape, out in outputs.items():
            of = record(work.prompts[0].domain, out.stats[0])
            requests[shape].append(of | {"lengths": lengths(out.stats[0])})
        if options.temperature == 0:
            gaps += gaps_of(zoo, work, outputs)
    rows = [summary(shape, of) for shape, of in requests.items()]
    add_times_first(rows)
    show(rows, console)
    figures = {"temperature": options.temperature, "drafters": options.drafters, "shapes": rows}
    return told(options, zoo, console, gaps, figures)


if __name__ == "__main__":
    sys.exit(main())
