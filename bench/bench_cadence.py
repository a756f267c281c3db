"""Regret and time against how often the drafters are scored: `python bench/bench_cadence.py --json FILE`.

The same held-out prompts of the zoo's mixed stream, decoded by the whole pool with each cadence m (`evaluate_every`) in turns,
each prompt starting with another one, so that what disturbs one disturbs all. At temperature 0 the texts are compared, as in
bench/bench_decoder.py: the run fails if one differs by more than a tie of logits.

    MAT                tokens a round, over all rounds
    regret in force    a request's loss beyond the best fixed drafter's over all its positions, mean over the requests; the loss
                       of a position is that under the weights its own round drew from: what a slower cadence costs
    regret             the same under the weights the learner held when the loss reached it (`DecodeStats.regret`). It sees the
                       same stream whatever the cadence, so this hardly moves
    x first            tokens a second over those of the cadence named first
    scoring, %         share of the time that evaluate and prefill take
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from bench_decoder import DRAFT_LENGTH, TIE, batches_of, cadence, circumstances, gap_between, positive
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers.utils import logging as transformers_logging

from hedgespec.config import DecodeConfig
from hedgespec.decoder import Decoder
from hedgespec.metrics import DecodeStats, profiled
from hedgespec.zoo import load_prompts, load_zoo

SCORING = ("evaluate", "prefill")


def regret_in_force(stats: DecodeStats) -> float:
    """Loss under the weights each position's round drew from, less the best fixed drafter's."""
    if not stats.losses:
        return 0.0
    losses = np.asarray(stats.losses)
    weights = np.repeat(stats.weights, stats.emitted_by_round, axis=0)[: len(losses)]
    return float((weights * losses).sum() - losses.sum(0).min())


def record(domain: str, stats: DecodeStats) -> dict:
    assert not stats.failures, stats.failures
    return {"domain": domain, "regret_in_force": regret_in_force(stats), **stats.to_dict()}


def summary(every: int | str, requests: list[dict]) -> dict:
    seconds, tokens, rounds = (sum(request[key] for request in requests) for key in ("seconds", "emitted_tokens", "rounds"))
    scoring = sum(request["seconds_by_stage"][stage] for request in requests for stage in SCORING)
    return {
        "evaluate_every": every,
        "mat": (tokens - len(requests)) / rounds,  # each first token comes with the prompt, before any round
        "regret_in_force": float(np.mean([request["regret_in_force"] for request in requests])),
        "regret": float(np.mean([request["regret"] for request in requests])),
        "tokens_per_second": tokens / seconds,
        "scoring_share": scoring / seconds,
        "requests": requests,
    }


def show(rows: list[dict], console: Console) -> None:
    table = Table(title=f"{len(rows[0]['requests'])} requests by cadence", title_justify="left", box=None)
    for column in ("m", "MAT", "regret in force", "regret", "tokens/s", "x first", "scoring, %"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(str(row["evaluate_every"]), f"{row['mat']:.3f}", f"{row['regret_in_force']:.2f}",
                      f"{row['regret']:.2f}", f"{row['tokens_per_second']:.1f}", f"{row['times_first']:.2f}",
                      f"{100 * row['scoring_share']:.0f}")  # fmt: skip
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--evaluate-every", type=cadence, nargs="+", default=[1, 2, 4, 8, 16], metavar="m", help="default 1 2 4 8 16"
    )
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
        configs = {every: DecodeConfig(draft_length=DRAFT_LENGTH, evaluate_every=every) for every in options.evaluate_every}
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    console = Console()
    zoo = load_zoo(device=options.device)
    decoders = {every: Decoder(zoo.target, zoo.drafters, config) for every, config in configs.items()}
    works = batches_of(zoo, load_prompts()[: options.prompts], 1, options.seed)
    requests: dict[int | str, list[dict]] = {every: [] for every in decoders}
    order, gaps = list(decoders), []

    with torch.inference_mode(), profiled(zoo.target.device):
        for decoder in decoders.values():
            decoder.generate(works[0].ids, max_new_tokens=8)  # what is compiled or allocated once is not measured
        for number, work in enumerate(track(works, "prompts", console=console, transient=True)):
            prompt, texts = work.ids[0], {}
            for every in order[number % len(order) :] + order[: number % len(order)]:
                out = decoders[every].generate(
                    work.ids, max_new_tokens=options.max_new_tokens, temperature=options.temperature, seed=work.seed
                )
                texts[every] = out.sequences[0, len(prompt) :].tolist()
                requests[every].append(record(work.prompts[0].domain, out.stats[0]))
            if options.temperature == 0:
                first = texts[order[0]]
                gaps += [gap_between(zoo.target, prompt, first, text) for text in texts.values() if text != first]
    rows = [summary(every, requests[every]) for every in order]
    for row in rows:
        row["times_first"] = row["tokens_per_second"] / rows[0]["tokens_per_second"]
    show(rows, console)
    if options.json is not None:
        figures = {**circumstances(zoo.target), "gaps_of_texts_that_differ": gaps, "cadences": rows}
        options.json.write_text(json.dumps(figures, indent=1))
    if gaps:
        console.print(f"texts that differ from the first cadence's: {len(gaps)}, logits apart by at most {max(gaps):.0e}")
    return 1 if any(gap > TIE for gap in gaps) else 0


if __name__ == "__main__":
    sys.exit(main())
