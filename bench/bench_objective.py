"""Tokens a round against tokens a second as the objective: `python bench/bench_objective.py --json FILE`.

The same held-out prompts of the zoo's mixed stream, decoded plainly (transformers' `generate`) and with each objective, in
turns, each prompt starting with another one, by three pools: the zoo's heads; these and prompt lookup; and one head whose
output is shuffled, which is right by accident only. At temperature 0 the texts are compared, as in bench/bench_decoder.py: the
run fails if one differs by more than a tie of logits.

    tokens/s           by the time of the requests together, their prompts included
    x plain            these over plain decoding's
    MAT                tokens a round, over all rounds
    length             tokens drafted a round, likewise
    plain, %           rounds in which nobody drafts

Behind them what was measured in the end, in milliseconds: a drafted token by drafter, a verification by drafted length 0..K.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace

import torch
from bench_decoder import DRAFT_LENGTH, Work, batches_of
from in_turns import add_temperature, gaps_of, in_turns, parsed, parser_of, told
from rich.console import Console
from rich.table import Table

from hedgespec.config import CHOICES, DecodeConfig
from hedgespec.decoder import DecodeOutput, Decoder
from hedgespec.drafters.ngram import NGramDrafter
from hedgespec.metrics import DecodeStats
from hedgespec.zoo import GENERALIST, Zoo, head_path, load_prompts, load_zoo
from hedgespec.zoo.storage import load_head

POOLS = ("heads", "heads + lookup", "useless")


class Plain:
    """The target's own `generate`, answering as a decoder does."""

    def __init__(self, target):
        self.target = target

    def generate(self, ids: torch.Tensor, *, max_new_tokens: int, temperature: float = 0.0, seed: int = 0) -> DecodeOutput:
        torch.manual_seed(seed)
        how = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        began = time.perf_counter()
        sequences = self.target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, **how)
        emitted = sequences.shape[1] - ids.shape[1]
        return DecodeOutput(sequences, [DecodeStats((), 0, emitted_tokens=emitted, seconds=time.perf_counter() - began)])


def pool_of(name: str, zoo: Zoo) -> Zoo:
    """The zoo with other drafters."""
    if name == "useless":
        head = load_head(head_path(GENERALIST), zoo.target)
        head.draft_to_target = head.draft_to_target[torch.randperm(len(head.draft_to_target))]
        return replace(zoo, drafters=[head])
    lookup = [NGramDrafter(zoo.target.config.vocab_size)] if name == "heads + lookup" else []
    return replace(zoo, drafters=[*zoo.drafters, *lookup])


def measure(name: str, zoo: Zoo, works: list[Work], options: argparse.Namespace, console: Console) -> tuple[list[dict], list]:
    """A row for plain decoding and each objective, and how far logits are apart where texts differ."""
    ways = {"plain": Plain(zoo.target)}
    for objective in CHOICES["objective"]:
        config = DecodeConfig(draft_length=options.draft_length, objective=objective)
        ways[objective] = Decoder(zoo.target, zoo.drafters, config)
        if options.warm_up:  # costs are of all requests: a first one measures them
            ways[objective].generate(works[-1].ids, max_new_tokens=options.warm_up, eos_token_id=(), seed=options.seed)
    arguments = {"max_new_tokens": options.max_new_tokens, "temperature": options.temperature}
    requests: dict[str, list[dict]] = {way: [] for way in ways}
    gaps: list[float] = []
    for work, outputs in in_turns(zoo, ways, works, console, **arguments):
        for way, out in outputs.items():
            assert not out.stats[0].failures, out.stats[0].failures
            requests[way].append({"domain": work.prompts[0].domain, **out.stats[0].to_dict()})
        gaps += gaps_of(zoo, work, outputs) if options.temperature == 0 else []
    rows = [summary(way, of) for way, of in requests.items()]
    for row in rows:
        costs = getattr(ways[row["objective"]], "costs", None)
        known = costs and costs.of(1)
        row |= {"pool": name, "times_plain": row["tokens_per_second"] / rows[0]["tokens_per_second"]}
        row |= {"draft_seconds": known[0].tolist(), "verify_seconds": known[1].tolist()} if known else {}
    return rows, gaps


def summary(objective: str, requests: list[dict]) -> dict:
    lengths = [length for one in requests for length in one["lengths"]]
    rounds, seconds, tokens = (sum(one[key] for one in requests) for key in ("rounds", "seconds", "emitted_tokens"))
    return {
        "objective": objective,
        "tokens_per_second": tokens / seconds,
        "mat": (tokens - len(requests)) / rounds if rounds else 1.0,  # each first token comes with the prompt, before any round
        "length": sum(lengths) / rounds if rounds else 0.0,
        "plain_share": lengths.count(0) / rounds if rounds else 1.0,
        "requests": requests,
    }


def show(rows: list[dict], console: Console) -> None:
    table = Table(title=f"{len(rows[0]['requests'])} requests by pool and objective", title_justify="left", box=None)
    for column in ("pool", "objective", "tokens/s", "x plain", "MAT", "length", "plain, %"):
        table.add_column(column, justify="left" if column in ("pool", "objective") else "right")
    for row in rows:
        table.add_row(
            row["pool"], row["objective"], f"{row['tokens_per_second']:.1f}", f"{row['times_plain']:.2f}", f"{row['mat']:.3f}",
            f"{row['length']:.2f}", f"{100 * row['plain_share']:.0f}",
        )  # fmt: skip
    console.print(table)
    for row in rows:
        if "draft_seconds" in row:
            drafted, verified = (
                " ".join(f"{1e3 * one:.2f}" for one in row[key]) for key in ("draft_seconds", "verify_seconds")
            )
            console.print(f"{row['pool']}: a drafted token {drafted} ms; a verification {verified} ms")


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--pools", nargs="+", default=list(POOLS), choices=POOLS, metavar="POOL", help="default all")
    parser.add_argument("--draft-length", type=int, default=DRAFT_LENGTH, metavar="K", help="most, default %(default)s")
    parser.add_argument("--warm-up", type=int, default=96, metavar="TOKENS", help="of a text before all, default %(default)s")
    add_temperature(parser)
    options = parsed(parser)
    console, zoo = Console(), load_zoo(device=options.device)
    torch.manual_seed(options.seed)
    works = batches_of(zoo, load_prompts()[: options.prompts], 1, options.seed)
    rows, gaps = [], []
    for name in options.pools:
        found, apart = measure(name, pool_of(name, zoo), works, options, console)
        rows, gaps = rows + found, gaps + apart
    show(rows, console)
    return told(options, zoo, console, gaps, {"pools": rows})


if __name__ == "__main__":
    sys.exit(main())
