"""One option of the decoder at several values on real text: `python bench/bench_options.py --option OPTION --values VALUE ...`

The same held-out prompts of the zoo's mixed stream are decoded with each value in turns. An option is any field of
`DecodeConfig`. For example

    --option evaluate_every --values 1 2 4 8 16 adaptive         rounds between evaluations
    --option warm_start --values 0 8 16 32 64 --hindsight        the first drafter against the best in hindsight
    --option mode --values sampled argmax coupled --temperature 1 --seeds 3
    --option objective --values tokens throughput --plain --warm-up 96      and --pool "heads + lookup" or shuffled
    --option tree --values chain 2 4,2,1,1,1 4/8 8/16            shapes of drafts, see below

and `--set NAME=VALUE ...` sets further fields for all values. A value of `tree` is `chain`; `argmax`, a chain of most probable
tokens; `C` or `C,C,..`, a static tree with so many children by depth; `C/M`, a dynamic tree of the M most probable nodes; or
`sampled:C,C,..`, a static tree whose children are samples.

At temperature 0 every text is compared with that of the first value: the run fails if one differs by more than a tie of logits.
The figures, over all requests:

    tokens per round   and its standard error over the requests
    less first         mean difference to the first value over pairs of requests of one prompt and seed, and its standard error
    x first, x plain   tokens per second over those of the first value, and (--plain) of plain `generate`
    regret             expected loss under the weights each position's round drew from, less the best fixed drafter's; a mean
    scoring, verify    share of the time of the drafters' passes and comparison, and of the target's forward
    drafted, undrafted tokens drafted per round, and share of the rounds without a draft
    predicted          what the losses of the drafters that drafted predict for their rounds, in tokens; `realised`: what the
                       same rounds emitted
    first pick         (--hindsight) share of the requests whose first drafter is the best in hindsight, or equal to it
    of best            (--hindsight) tokens per round over the first 32 tokens, relative to the best drafter's
    prompt             median time of the prompt's stage over the first value's
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from interleave import (
    DRAFT_LENGTH,
    TIE,
    common_parser,
    decoder_method,
    environment_info,
    generate_method,
    interleaved,
    positive,
    prompt_batches,
    text_gaps,
    texts_of,
    write_json,
)
from rich.console import Console
from table import markdown
from transformers.utils import logging as transformers_logging

from hedgespec.config import DecodeConfig, Tree
from hedgespec.decoder import Decoder
from hedgespec.drafters.ngram import NGramDrafter
from hedgespec.experiments.measures import best_of, expected_regret, tokens_within, weights_by_position
from hedgespec.stats import DecodeStats, profiled
from hedgespec.zoo import GENERALIST, NAMES, Zoo, head_path, load_prompts, load_zoo
from hedgespec.zoo.replay import fixed_rounds, read
from hedgespec.zoo.storage import load_head

PLAIN = "plain"
POOLS = ("heads", "heads + lookup", "shuffled")
SCORING = ("evaluate", "drafter_forward")
BEGINNING = 32
"""Tokens that count as the beginning of a request."""
COLUMNS = {
    "mat": ("tokens per round", "{:.3f}"),
    "mat_standard_error": ("+-", "{:.3f}"),
    "less_first": ("less first", "{:+.3f}"),
    "less_first_standard_error": ("+-", "{:.3f}"),
    "tokens_per_second": ("tokens/s", "{:.1f}"),
    "times_first": ("x first", "{:.2f}"),
    "times_plain": ("x plain", "{:.2f}"),
    "regret_in_force": ("regret", "{:.2f}"),
    "scoring_share": ("scoring", "{:.0%}"),
    "verify_share": ("verify", "{:.0%}"),
    "draft_length": ("drafted", "{:.2f}"),
    "plain_share": ("undrafted", "{:.0%}"),
    "predicted": ("predicted", "{:.3f}"),
    "realised": ("realised", "{:.3f}"),
    "first_pick": ("first pick", "{:.0%}"),
    "of_best": ("of best", "{:.3f}"),
    "prompt_ms_over_first": ("prompt", "{:.2f}"),
}
"""Columns of the table: key of a row, heading and format."""


# Configurations


def value_of(text: str) -> Any:
    """Returns a number, True, False, None or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def config_of(option: str, value: str, shared: dict[str, Any]) -> DecodeConfig:
    """Returns the configuration of one value. Raises: TypeError or ValueError for a value that the option does not take."""
    options = {"draft_length": DRAFT_LENGTH} | shared
    if option != "tree":
        return DecodeConfig(**options | {option: value_of(value)})
    if value in ("chain", "argmax"):
        return DecodeConfig(**options | {"proposal": "argmax" if value == "argmax" else "sampled"})
    mode, counts = ("sampled", value.removeprefix("sampled:")) if value.startswith("sampled:") else ("argmax", value)
    counts, _, size = counts.partition("/")
    branching = tuple(map(int, counts.split(",")))
    tree = Tree(branching if len(branching) > 1 else branching[0], int(size) if size else None)
    return DecodeConfig(**options | {"proposal": mode, "tree": tree})


def pool_of(name: str, zoo: Zoo) -> Zoo:
    """Returns the zoo with the drafters of a pool. The pool "shuffled" is one head whose output is right by accident only."""
    if name == "shuffled":
        head = load_head(head_path(GENERALIST), zoo.target)
        head.draft_to_target = head.draft_to_target[torch.randperm(len(head.draft_to_target))]
        return replace(zoo, drafters=[head])
    lookup = [NGramDrafter(zoo.target.config.vocab_size)] if name == "heads + lookup" else []
    return replace(zoo, drafters=[*zoo.drafters, *lookup])


# Figures of one request


def request_figures(stats: DecodeStats, seconds: float, domain: str, draft_length: int) -> dict[str, Any]:
    """Returns the figures of one request that `summary` needs."""
    losses = np.asarray(stats.losses)
    by_drafter = len(losses) and losses.shape[1] == len(stats.drafters)  # objective "throughput" has losses of its own
    starts = np.cumsum([0, *stats.emitted_by_round[:-1]])
    pairs = [
        ((draft_length + 1) * (1 - float(losses[start][drafter])), emitted)
        for start, drafter, emitted in zip(starts, stats.choices, stats.emitted_by_round)
        if by_drafter and start < len(losses) and drafter >= 0
    ]
    return {
        "domain": domain,
        "seconds": seconds,
        "emitted_tokens": stats.emitted_tokens,
        "rounds": stats.rounds,
        "drafted": sum(stats.lengths),
        "undrafted": stats.lengths.count(0),
        "regret_in_force": expected_regret(weights_by_position(stats), losses) if by_drafter else None,
        "seconds_by_stage": stats.seconds_by_stage,
        "predicted_and_realised": np.sum(pairs, axis=0).tolist() if pairs else None,
        "compared_rounds": len(pairs),
    }


def hindsight_figures(stats: DecodeStats, alone: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Returns how the first drafter and the first tokens compare with the best drafter's. Args: `alone`: tokens by round of
    each drafter alone, [N]."""
    best = best_of(np.array([np.mean(rounds) for rounds in alone]))
    leader = DecodeStats(stats.drafters, stats.draft_length, emitted_by_round=list(alone[best[0]]))
    return {
        "picked_best": bool(stats.choices[0] in best),
        "weight_on_best": float(stats.weights[0][best].sum()),
        "beginning": tokens_within(stats, slice(0, BEGINNING)),
        "best_beginning": tokens_within(leader, slice(0, BEGINNING)),
    }


# Figures of one value


def summary(value: str, requests: list[dict[str, Any]], first: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the row of one value.

    Args:
        value: of the option, or `PLAIN`.
        requests: figures of its requests; plain decoding has no rounds.
        first: figures of the same requests with the first value.
    """
    seconds, tokens, rounds = (sum(one[key] for one in requests) for key in ("seconds", "emitted_tokens", "rounds"))
    row: dict[str, Any] = {"value": value, "tokens_per_second": tokens / seconds, "requests": requests}
    if value == PLAIN:
        return row | {"mat": 1.0, "plain_share": 1.0, "draft_length": 0.0}
    own, others = (
        np.array([(one["emitted_tokens"] - 1) / one["rounds"] for one in some]) for some in (requests, first)
    )  # the first token comes with the prompt, before any round
    row |= _with_error("mat", requests) | {
        "less_first": float((own - others).mean()),
        "less_first_standard_error": float((own - others).std(ddof=1) / np.sqrt(len(own))),
        "draft_length": sum(one["drafted"] for one in requests) / rounds,
        "plain_share": sum(one["undrafted"] for one in requests) / rounds,
        "scoring_share": sum(one["seconds_by_stage"][stage] for one in requests for stage in SCORING) / seconds,
        "verify_share": sum(one["seconds_by_stage"]["verify"] for one in requests) / seconds,
        "prompt_ms": 1e3 * float(np.median([one["seconds_by_stage"]["prompt"] for one in requests])),
    }
    if all(one["regret_in_force"] is not None for one in requests):
        row["regret_in_force"] = float(np.mean([one["regret_in_force"] for one in requests]))
    if pairs := [one["predicted_and_realised"] for one in requests if one["predicted_and_realised"]]:
        row |= zip(
            ("predicted", "realised"), (np.sum(pairs, axis=0) / sum(one["compared_rounds"] for one in requests)).tolist()
        )
    if all("picked_best" in one for one in requests):
        (own_tokens, own_rounds), (best_tokens, best_rounds) = (
            np.sum([one[key] for one in requests], axis=0) for key in ("beginning", "best_beginning")
        )
        row |= {
            "first_pick": float(np.mean([one["picked_best"] for one in requests])),
            "weight_on_best": float(np.mean([one["weight_on_best"] for one in requests])),
            "of_best": float(own_tokens / own_rounds / (best_tokens / best_rounds)),
        }
    return row


def _with_error(name: str, requests: list[dict[str, Any]]) -> dict[str, float]:
    """Returns tokens per round with the standard error of this ratio of sums, to first order."""
    tokens, rounds = (np.array([one[key] for one in requests]) for key in ("emitted_tokens", "rounds"))
    ratio = (tokens - 1).sum() / rounds.sum()
    apart = tokens - 1 - ratio * rounds
    error = np.sqrt((apart**2).sum() * len(rounds) / (len(rounds) - 1)) / rounds.sum()
    return {name: float(ratio), f"{name}_standard_error": float(error)}


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Adds each row's speed over plain decoding's, if there is any, and speed and prompt time over the first value's."""
    plain = next((row for row in rows if row["value"] == PLAIN), None)
    first = next(row for row in rows if row["value"] != PLAIN)
    for row in rows:
        row["times_first"] = row["tokens_per_second"] / first["tokens_per_second"]
        if plain is not None:
            row["times_plain"] = row["tokens_per_second"] / plain["tokens_per_second"]
        if "prompt_ms" in row:
            row["prompt_ms_over_first"] = row["prompt_ms"] / first["prompt_ms"]


def table_of(option: str, rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a Markdown table, with the columns that any row has."""
    shown = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    cells = [
        [row["value"], *("" if row.get(key) is None else COLUMNS[key][1].format(row[key]) for key in shown)] for row in rows
    ]
    return markdown([option, *(COLUMNS[key][0] for key in shown)], cells)


# Running


def measure(zoo: Zoo, configs: dict[str, DecodeConfig], options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Decodes all prompts with all values. Returns the rows, and how far logits are apart where texts differ."""
    decoders = {value: Decoder(zoo.target, zoo.drafters, config) for value, config in configs.items()}
    methods = [decoder_method(value, decoder, options.temperature) for value, decoder in decoders.items()]
    if options.plain:
        methods.insert(0, generate_method(PLAIN, zoo.target, options.temperature))
    prompts = load_prompts()[: options.prompts]
    batches = [batch for turn in range(options.seeds)
               for batch in prompt_batches(zoo, prompts, 1, options.seed + turn * len(prompts))]  # fmt: skip
    for decoder in decoders.values() if options.warm_up else ():
        decoder.generate(batches[-1].ids, max_new_tokens=options.warm_up, eos_token_id=(), seed=options.seed)
    requests: dict[str, list[dict[str, Any]]] = {method.name: [] for method in methods}
    gaps: list[float] = []
    for batch, results in interleaved(methods, batches, options.max_new_tokens, console):
        texts = {name: texts_of(batch, result, zoo.target) for name, (result, _) in results.items()}
        first, *others = texts.values()
        if options.temperature == 0:
            gaps += [gap for other in others for gap in text_gaps(zoo.target, batch, first, other)]
        decoded = [result.stats[0] for result, _ in results.values() if result.stats]
        if any(stats.rounds == 0 for stats in decoded):
            continue  # the text ended with its first token
        alone = rounds_alone(zoo, batch.ids[0], next(iter(results.values()))[0].sequences[0]) if options.hindsight else None
        for name, (result, seconds) in results.items():
            domain = batch.prompts[0].domain
            if not result.stats:
                figures = {"domain": domain, "seconds": seconds, "emitted_tokens": len(texts[name][0]), "rounds": 0}
            else:
                figures = request_figures(result.stats[0], seconds, domain, configs[name].draft_length)
                figures |= hindsight_figures(result.stats[0], alone) if alone else {}
            requests[name].append(figures)
    first = requests[next(iter(configs))]
    if len(first) < 2:
        raise ValueError(f"prompts: expected at least 2 texts with a round, for a standard error, got {len(first)}")
    rows = [summary(name, found, first) for name, found in requests.items()]
    add_ratios(rows)
    return {"gaps_of_texts_that_differ": gaps, "rows": rows}


def rounds_alone(zoo: Zoo, prompt: torch.Tensor, text: torch.Tensor) -> list[list[int]]:
    """Returns the tokens by round that each drafter alone would have emitted over a greedy text, [N]."""
    whole = read(zoo.target, text, len(prompt), zoo.drafters)
    return [fixed_rounds(drafter, whole, DRAFT_LENGTH) for drafter in zoo.drafters]


def parse() -> tuple[argparse.Namespace, dict[str, DecodeConfig]]:
    """Returns the arguments, and the configurations by value."""
    parser = common_parser(__doc__)
    add = parser.add_argument
    add("--option", required=True, metavar="OPTION", choices=[field.name for field in fields(DecodeConfig)], help="see above")
    add("--values", required=True, nargs="+", metavar="VALUE", help="the first is what the others are compared with")
    add("--set", nargs="+", default=[], metavar="NAME=VALUE", help="further fields of DecodeConfig")
    add("--pool", choices=POOLS, default=POOLS[0], help="default %(default)s")
    add("--drafters", nargs="+", default=list(NAMES), choices=NAMES, metavar="HEAD", help="heads of the pool, default all")
    add("--seeds", type=positive, default=1, help="texts of each prompt, default 1")
    add("--plain", action="store_true", help="also decode with plain generate")
    add("--hindsight", action="store_true", help="compare the beginning with the best drafter in hindsight; temperature 0")
    add("--warm-up", type=int, default=0, metavar="TOKENS", help="decode a text untimed before; objective throughput needs it")
    options = parser.parse_args()
    if options.hindsight and options.temperature:
        parser.error("--hindsight: expected temperature 0")
    shared = {}
    for text in options.set:
        name, equals, value = text.partition("=")
        if not equals:
            parser.error(f"--set: expected NAME=VALUE, got {text!r}")
        shared[name] = value_of(value)
    try:
        configs = {value: config_of(options.option, value, shared) for value in options.values}
    except (TypeError, ValueError) as error:
        parser.error(f"--values: {error}")
    return options, configs


def main() -> int:
    options, configs = parse()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    console = Console(stderr=True)
    torch.manual_seed(options.seed)
    zoo = pool_of(options.pool, load_zoo(options.drafters, device=options.device))
    with torch.inference_mode(), profiled(zoo.target.device):
        found = measure(zoo, configs, options, console)
    print(table_of(options.option, found["rows"]))
    gaps = found["gaps_of_texts_that_differ"]
    if gaps:
        print(f"texts that differ from the first's: {len(gaps)}, logits apart by at most {max(gaps):.0e}")
    pool = {"pool": options.pool, "drafters": [drafter.name for drafter in zoo.drafters]}
    write_json(options.json, {**environment_info(zoo.target), "option": options.option, **pool, **found})
    return 1 if any(gap > TIE for gap in gaps) else 0


if __name__ == "__main__":
    sys.exit(main())
