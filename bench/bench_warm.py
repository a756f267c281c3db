"""The first pick against how much of the prompt the learner hears: `python bench/bench_warm.py --json FILE`.

The same held-out prompts of the zoo's mixed stream, decoded greedily by the whole pool with each M (`warm_start`) in turns,
each prompt starting with another one. On the first M's text every drafter is replayed alone, which tells the best in hindsight.
The texts are compared, as in bench/bench_decoder.py: the run fails if one differs by more than a tie of logits.

    first pick         share of the requests whose first round's drafter is the best in hindsight, or equal to it
    weight             on the drafters that are, at the first round: the share expected of other seeds
    own expert         weight on the expert of the prompt's domain
    MAT                tokens a round, over the rounds that begin within the first 32 tokens
    of best, %         that, of the best fixed drafter's of each request
    prompt, ms         median time of the prompt's stage
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from bench_decoder import DRAFT_LENGTH, batches_of
from in_turns import gaps_of, in_turns, parsed, parser_of, told
from rich.console import Console
from rich.table import Table

from hedgespec.config import CHOICES, DecodeConfig
from hedgespec.metrics import DecodeStats
from hedgespec.zoo import NAMES, load_prompts, load_zoo
from hedgespec.zoo.replay import fixed_rounds, read

FIRST = 32
"""Tokens over which a request's beginning is told."""


def beginning(emitted: list[int]) -> tuple[int, int]:
    """Tokens and number of the rounds that begin within the first tokens."""
    began = np.concatenate([[0], np.cumsum(emitted)[:-1]])
    rounds = int((began < FIRST).sum())
    return sum(emitted[:rounds]), rounds


def hindsight(zoo, text: torch.Tensor, prompt_length: int) -> list[list[int]]:
    """Rounds of each drafter alone."""
    whole = read(zoo.target, text, prompt_length, zoo.drafters)
    return [fixed_rounds(drafter, whole, DRAFT_LENGTH) for drafter in zoo.drafters]


def record(domain: str, stats: DecodeStats, alone: list[list[int]]) -> dict:
    assert not stats.failures, stats.failures
    mat = np.array([np.mean(rounds) for rounds in alone])
    best = np.flatnonzero(mat == mat.max())
    return {
        "domain": domain,
        "prompt_losses": len(stats.prompt_losses),
        "first_pick": NAMES[stats.choices[0]],
        "best": [NAMES[one] for one in best],
        "picked_best": bool(stats.choices[0] in best),
        "weight_on_best": float(stats.weights[0][best].sum()),
        "weight_on_expert": float(stats.weights[0][NAMES.index(domain)]),
        "beginning": beginning(stats.emitted_by_round),
        "best_beginning": beginning(alone[best[0]]),
        "prompt_seconds": stats.seconds_by_stage["prompt"],
    }


def summary(warm_start: int, requests: list[dict]) -> dict:
    def mean(key: str) -> float:
        return float(np.mean([request[key] for request in requests]))

    def mat(key: str) -> float:
        tokens, rounds = np.sum([request[key] for request in requests], axis=0)
        return float(tokens / rounds)

    return {
        "warm_start": warm_start,
        "first_pick": mean("picked_best"),
        "weight_on_best": mean("weight_on_best"),
        "weight_on_expert": mean("weight_on_expert"),
        "mat": mat("beginning"),
        "of_best": mat("beginning") / mat("best_beginning"),
        "prompt_milliseconds": 1e3 * float(np.median([request["prompt_seconds"] for request in requests])),
        "requests": requests,
    }


def show(rows: list[dict], console: Console) -> None:
    table = Table(title=f"{len(rows[0]['requests'])} requests by warm start", title_justify="left", box=None)
    for column in ("M", "first pick, %", "weight, %", "own expert, %", "MAT", "of best, %", "prompt, ms"):
        table.add_column(column, justify="right")
    for row in rows:
        shares = (f"{100 * row[key]:.0f}" for key in ("first_pick", "weight_on_best", "weight_on_expert"))
        table.add_row(str(row["warm_start"]), *shares, f"{row['mat']:.3f}", f"{100 * row['of_best']:.1f}",
                      f"{row['prompt_milliseconds']:.0f}")  # fmt: skip
    console.print(table)


def main() -> int:
    parser = parser_of(__doc__, max_new_tokens=41)
    parser.add_argument(
        "--warm-start", type=int, nargs="+", default=[0, 8, 16, 32, 64], metavar="M", help="default 0 8 16 32 64"
    )
    parser.add_argument("--selection", choices=CHOICES["selection"], default="sample", help="default sample")
    options = parsed(parser, fewest=3)
    try:
        configs = {
            most: DecodeConfig(draft_length=DRAFT_LENGTH, selection=options.selection, warm_start=most)
            for most in options.warm_start
        }
    except ValueError as error:
        parser.error(str(error))
    console, zoo = Console(), load_zoo(device=options.device)
    works = batches_of(zoo, load_prompts()[: options.prompts], 1, options.seed)
    requests: dict[int, list[dict]] = {most: [] for most in configs}
    gaps: list[float] = []
    for work, outputs in in_turns(zoo, configs, works, console, max_new_tokens=options.max_new_tokens):
        text, prompt_length = next(iter(outputs.values())).sequences[0], work.ids.shape[1]
        if len(text) < prompt_length + 3:
            continue  # it ended at once
        alone = hindsight(zoo, text, prompt_length)
        for most, out in outputs.items():
            requests[most].append(record(work.prompts[0].domain, out.stats[0], alone))
        gaps += gaps_of(zoo, work, outputs)
    rows = [summary(most, of) for most, of in requests.items()]
    show(rows, console)
    return told(options, zoo, console, gaps, {"warm_starts": rows})


if __name__ == "__main__":
    sys.exit(main())
