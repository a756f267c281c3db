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

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from bench_decoder import DRAFT_LENGTH, TIE, batches_of, circumstances, gap_between, positive
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers.utils import logging as transformers_logging

from hedgespec.config import CHOICES, DecodeConfig
from hedgespec.decoder import Decoder
from hedgespec.metrics import DecodeStats, profiled
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--warm-start", type=int, nargs="+", default=[0, 8, 16, 32, 64], metavar="M", help="default 0 8 16 32 64"
    )
    parser.add_argument("--selection", choices=CHOICES["selection"], default="sample", help="default sample")
    parser.add_argument("--prompts", type=positive, default=24, help="default 24")
    parser.add_argument("--max-new-tokens", type=positive, default=41, help="of each text, default 41")
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; a GPU is waited for after every stage")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where raw figures go")
    options = parser.parse_args()
    if options.max_new_tokens < 3:
        parser.error("--max-new-tokens: expected at least 3, without a draft there is nothing to report")
    try:
        configs = {
            most: DecodeConfig(draft_length=DRAFT_LENGTH, selection=options.selection, warm_start=most)
            for most in options.warm_start
        }
    except ValueError as error:
        parser.error(str(error))
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    console = Console()
    zoo = load_zoo(device=options.device)
    decoders = {most: Decoder(zoo.target, zoo.drafters, config) for most, config in configs.items()}
    works = batches_of(zoo, load_prompts()[: options.prompts], 1, options.seed)
    requests: dict[int, list[dict]] = {most: [] for most in decoders}
    order, gaps = list(decoders), []

    with torch.inference_mode(), profiled(zoo.target.device):
        for decoder in decoders.values():
            decoder.generate(works[0].ids, max_new_tokens=8)  # what is compiled or allocated once is not measured
        for number, work in enumerate(track(works, "prompts", console=console, transient=True)):
            prompt = work.ids[0]
            outputs = {
                most: decoders[most].generate(work.ids, max_new_tokens=options.max_new_tokens, seed=work.seed)
                for most in order[number % len(order) :] + order[: number % len(order)]
            }
            text = outputs[order[0]].sequences[0]
            if len(text) < len(prompt) + 3:
                continue  # it ended at once
            alone = hindsight(zoo, text, len(prompt))
            for most, out in outputs.items():
                requests[most].append(record(work.prompts[0].domain, out.stats[0], alone))
                first, own = (one[len(prompt) :].tolist() for one in (text, out.sequences[0]))
                if own != first:
                    gaps.append(gap_between(zoo.target, prompt, first, own))
    rows = [summary(most, requests[most]) for most in order]
    show(rows, console)
    if options.json is not None:
        figures = {**circumstances(zoo.target), "gaps_of_texts_that_differ": gaps, "warm_starts": rows}
        options.json.write_text(json.dumps(figures, indent=1))
    if gaps:
        console.print(f"texts that differ from the first M's: {len(gaps)}, logits apart by at most {max(gaps):.0e}")
    return 1 if any(gap > TIE for gap in gaps) else 0


if __name__ == "__main__":
    sys.exit(main())
