"""Proposal modes against each other on real text: `python bench/bench_modes.py --json FILE`.

The same held-out prompts of the zoo's mixed stream and the same seeds, decoded by the whole pool in each mode in turns, each
prompt starting with another one. Before that the first prompt is decoded in mode "coupled" by each drafter alone: the run fails
if a text differs from the whole pool's.

    MAT                tokens a round, over all rounds
    +-                 its standard error, of the requests
    less first         MAT less that of the mode named first, mean over the pairs of requests of one prompt and seed, and the
                       standard error of this mean
    tokens/s           by the time of the requests together
    x first            these over those of the mode named first
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import torch
from bench_cadence import record
from bench_decoder import DRAFT_LENGTH, Work, batches_of, positive
from in_turns import add_times_first, in_turns, parsed, parser_of, told
from rich.console import Console
from rich.table import Table

from hedgespec.config import CHOICES, DecodeConfig
from hedgespec.decoder import Decoder
from hedgespec.zoo import NAMES, load_prompts, load_zoo


def mat(requests: list[dict]) -> float:
    """Each first token comes with the prompt, before any round."""
    return sum(one["emitted_tokens"] - 1 for one in requests) / sum(one["rounds"] for one in requests)


def summary(mode: str, requests: list[dict], first: list[dict]) -> dict:
    own, others = (np.array([mat([one]) for one in some]) for some in (requests, first))
    tokens, rounds = (np.array([one[key] for one in requests]) for key in ("emitted_tokens", "rounds"))
    ratio = mat(requests)
    apart = tokens - 1 - ratio * rounds  # of a ratio of sums, to first order
    return {
        "mode": mode,
        "mat": ratio,
        "mat_standard_error": float(np.sqrt((apart**2).sum() * len(rounds) / (len(rounds) - 1)) / rounds.sum()),
        "less_first": float((own - others).mean()),
        "less_first_standard_error": float((own - others).std(ddof=1) / np.sqrt(len(own))),
        "tokens_per_second": float(tokens.sum() / sum(one["seconds"] for one in requests)),
        "requests": requests,
    }


def show(rows: list[dict], console: Console) -> None:
    table = Table(title=f"{len(rows[0]['requests'])} requests by mode", title_justify="left", box=None)
    for column in ("mode", "MAT", "+-", "less first", "tokens/s", "x first"):
        table.add_column(column, justify="left" if column == "mode" else "right")
    for row in rows:
        table.add_row(
            row["mode"], f"{row['mat']:.3f}", f"{row['mat_standard_error']:.3f}",
            f"{row['less_first']:+.3f} +- {row['less_first_standard_error']:.3f}", f"{row['tokens_per_second']:.1f}",
            f"{row['times_first']:.2f}",
        )  # fmt: skip
    console.print(table)


@torch.inference_mode()
def check(zoo, work: Work, config: DecodeConfig, options: argparse.Namespace) -> None:
    """Raises where the coupled text is not the same for every drafter."""
    arguments = {"max_new_tokens": options.max_new_tokens, "temperature": options.temperature, "seed": work.seed}
    texts = {
        " ".join(drafter.name for drafter in drafters): Decoder(zoo.target, drafters, config)
        .generate(work.ids, **arguments)
        .sequences[0, work.ids.shape[1] :]
        .tolist()
        for drafters in [zoo.drafters, *([drafter] for drafter in zoo.drafters)]
    }
    if len(set(map(tuple, texts.values()))) > 1:
        raise AssertionError(f"coupled texts differ: {texts}")


def main() -> int:
    parser = parser_of(__doc__, prompts=12, max_new_tokens=48)
    parser.add_argument("--modes", nargs="+", default=list(CHOICES["mode"]), choices=CHOICES["mode"], help="default all")
    parser.add_argument("--drafters", nargs="+", default=list(NAMES), choices=NAMES, metavar="HEAD", help="default all")
    parser.add_argument("--temperature", type=float, default=1.0, help="default 1")
    parser.add_argument("--seeds", type=positive, default=3, help="texts of each prompt, default 3")
    options = parsed(parser)
    if options.prompts * options.seeds < 2:
        parser.error("--prompts: expected at least 2 requests, one has no standard error")
    console, zoo = Console(), load_zoo(options.drafters, device=options.device)
    configs = {mode: DecodeConfig(draft_length=DRAFT_LENGTH, proposal=mode) for mode in options.modes}
    some = load_prompts()[: options.prompts]
    works = [work for turn in range(options.seeds) for work in batches_of(zoo, some, 1, options.seed + turn * len(some))]
    requests: dict[str, list[dict]] = {mode: [] for mode in configs}
    check(zoo, works[0], DecodeConfig(draft_length=DRAFT_LENGTH, proposal="coupled"), options)
    arguments = {"max_new_tokens": options.max_new_tokens, "temperature": options.temperature}
    for work, outputs in in_turns(zoo, configs, works, console, **arguments):
        for mode, out in outputs.items():
            requests[mode].append(record(work.prompts[0].domain, out.stats[0]))
    # A text that ends with its first token has no round.
    whole = [number for number in range(len(works)) if all(of[number]["rounds"] for of in requests.values())]
    requests = {mode: [of[number] for number in whole] for mode, of in requests.items()}
    rows = [summary(mode, of, requests[options.modes[0]]) for mode, of in requests.items()]
    add_times_first(rows)
    show(rows, console)
    return told(options, zoo, console, [], {"modes": rows})


if __name__ == "__main__":
    sys.exit(main())
