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

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from bench_cadence import record
from bench_decoder import DRAFT_LENGTH, TIE, batches_of, circumstances, gap_between, positive
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers.utils import logging as transformers_logging

from hedgespec.config import DecodeConfig, Tree
from hedgespec.decoder import Decoder
from hedgespec.metrics import DecodeStats, profiled
from hedgespec.zoo import NAMES, load_prompts, load_zoo

SHAPES = ("chain", "2", "4,2,1,1,1", "4/8", "8/16", "8/32")


def config_of(shape: str) -> DecodeConfig:
    if shape in ("chain", "argmax"):
        return DecodeConfig(draft_length=DRAFT_LENGTH, mode="argmax" if shape == "argmax" else "sampled")
    mode, counts = ("sampled", shape.removeprefix("sampled:")) if shape.startswith("sampled:") else ("argmax", shape)
    counts, _, size = counts.partition("/")
    branching = tuple(map(int, counts.split(",")))
    tree = Tree(branching if len(branching) > 1 else branching[0], int(size) if size else None)
    return DecodeConfig(draft_length=DRAFT_LENGTH, mode=mode, tree=tree)


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="SHAPE", help=f"default {' '.join(SHAPES)}")
    parser.add_argument("--drafters", nargs="+", default=list(NAMES), choices=NAMES, metavar="HEAD", help="default all")
    parser.add_argument("--prompts", type=positive, default=24, help="default 24")
    parser.add_argument("--max-new-tokens", type=positive, default=80, help="of each text, default 80")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy and compares the texts")
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; a GPU is waited for after every stage")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where raw figures go")
    options = parser.parse_args()
    if options.max_new_tokens < 2:
        parser.error("--max-new-tokens: expected at least 2, without a round there is nothing to report")
    try:
        configs = {shape: config_of(shape) for shape in options.shapes}
    except (TypeError, ValueError) as error:
        parser.error(f"--shapes: {error}")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    console = Console()
    zoo = load_zoo(options.drafters, device=options.device)
    decoders = {shape: Decoder(zoo.target, zoo.drafters, config) for shape, config in configs.items()}
    works = batches_of(zoo, load_prompts()[: options.prompts], 1, options.seed)
    requests: dict[str, list[dict]] = {shape: [] for shape in decoders}
    order, gaps = list(decoders), []

    with torch.inference_mode(), profiled(zoo.target.device):
        for decoder in decoders.values():
            decoder.generate(works[0].ids, max_new_tokens=8)  # what is compiled or allocated once is not measured
        for number, work in enumerate(track(works, "prompts", console=console, transient=True)):
            prompt, texts = work.ids[0], {}
            for shape in order[number % len(order) :] + order[: number % len(order)]:
                out = decoders[shape].generate(
                    work.ids, max_new_tokens=options.max_new_tokens, temperature=options.temperature, seed=work.seed
                )
                texts[shape] = out.sequences[0, len(prompt) :].tolist()
                of = record(work.prompts[0].domain, out.stats[0])
                requests[shape].append(of | {"lengths": lengths(out.stats[0])})
            if options.temperature == 0:
                first = texts[order[0]]
                gaps += [gap_between(zoo.target, prompt, first, text) for text in texts.values() if text != first]
    rows = [summary(shape, requests[shape]) for shape in order]
    for row in rows:
        row["times_first"] = row["tokens_per_second"] / rows[0]["tokens_per_second"]
    show(rows, console)
    if options.json is not None:
        figures = {**circumstances(zoo.target), "temperature": options.temperature, "drafters": options.drafters}
        figures |= {"gaps_of_texts_that_differ": gaps, "shapes": rows}
        options.json.write_text(json.dumps(figures, indent=1))
    if gaps:
        console.print(f"texts that differ from the first shape's: {len(gaps)}, logits apart by at most {max(gaps):.0e}")
    return 1 if any(gap > TIE for gap in gaps) else 0


if __name__ == "__main__":
    sys.exit(main())
