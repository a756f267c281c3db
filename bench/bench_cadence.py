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
import sys
from collections.abc import Hashable, Mapping

import numpy as np
from bench_decoder import DRAFT_LENGTH, batches_of, cadence
from in_turns import add_temperature, add_times_first, gaps_of, in_turns, parsed, parser_of, told
from rich.console import Console
from rich.table import Table

from hedgespec.config import DecodeConfig
from hedgespec.metrics import DecodeStats
from hedgespec.zoo import Zoo, load_prompts, load_zoo

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


def requests_of(
    zoo: Zoo, configs: Mapping[Hashable, DecodeConfig], options: argparse.Namespace, console: Console
) -> tuple[dict[Hashable, list[dict]], list[float]]:
    """By configuration the record of every prompt, and how far logits are apart where texts differ."""
    works = batches_of(zoo, load_prompts()[: options.prompts], 1, options.seed)
    requests: dict[Hashable, list[dict]] = {name: [] for name in configs}
    gaps: list[float] = []
    arguments = {"max_new_tokens": options.max_new_tokens, "temperature": options.temperature}
    for work, outputs in in_turns(zoo, configs, works, console, **arguments):
        for name, out in outputs.items():
            requests[name].append(record(work.prompts[0].domain, out.stats[0]))
        if options.temperature == 0:
            gaps += gaps_of(zoo, work, outputs)
    return requests, gaps


COLUMNS = ("MAT", "regret in force", "regret", "tokens/s", "x first")


def cells(row: dict) -> list[str]:
    """Of `COLUMNS`."""
    return [f"{row['mat']:.3f}", f"{row['regret_in_force']:.2f}", f"{row['regret']:.2f}", f"{row['tokens_per_second']:.1f}",
            f"{row['times_first']:.2f}"]  # fmt: skip


def show(rows: list[dict], console: Console) -> None:
    table = Table(title=f"{len(rows[0]['requests'])} requests by cadence", title_justify="left", box=None)
    for column in ("m", *COLUMNS, "scoring, %"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(str(row["evaluate_every"]), *cells(row), f"{100 * row['scoring_share']:.0f}")
    console.print(table)


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--evaluate-every", type=cadence, nargs="+", default=[1, 2, 4, 8, 16], metavar="m", help="default 1 2 4 8 16"
    )
    add_temperature(parser)
    options = parsed(parser)
    try:
        configs = {every: DecodeConfig(draft_length=DRAFT_LENGTH, evaluate_every=every) for every in options.evaluate_every}
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    console, zoo = Console(), load_zoo(device=options.device)
    requests, gaps = requests_of(zoo, configs, options, console)
    rows = [summary(every, of) for every, of in requests.items()]
    add_times_first(rows)
    show(rows, console)
    return told(options, zoo, console, gaps, {"cadences": rows})


if __name__ == "__main__":
    sys.exit(main())
