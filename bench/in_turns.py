"""What the benchmarks of one option of the decoder share: its values in turns over the same texts, and what is told of them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from bench_decoder import TIE, Work, circumstances, gap_between, positive
from rich.console import Console
from rich.progress import track
from transformers.utils import logging as transformers_logging

from hedgespec.config import DecodeConfig
from hedgespec.decoder import DecodeOutput, Decoder
from hedgespec.metrics import profiled
from hedgespec.zoo import Zoo


def parser_of(description: str, *, prompts: int = 24, max_new_tokens: int = 80) -> argparse.ArgumentParser:
    """A parser with the options that all have, and their defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--prompts", type=positive, default=prompts, help="default %(default)s")
    add("--max-new-tokens", type=positive, default=max_new_tokens, help="of each text, default %(default)s")
    add("--seed", type=int, default=0, help="of the first prompt")
    add("--device", default="cpu", help="cpu or cuda; a GPU is waited for after every stage")
    add("--json", type=Path, metavar="FILE", help="where raw figures go")
    return parser


def add_temperature(parser: argparse.ArgumentParser) -> None:
    words = "0, the default, is greedy and compares the texts"
    parser.add_argument("--temperature", type=float, default=0.0, help=words)


def parsed(parser: argparse.ArgumentParser, fewest: int = 2) -> argparse.Namespace:
    """The options, of which the most new tokens are at least `fewest`; from then on transformers is quiet."""
    options = parser.parse_args()
    if options.max_new_tokens < fewest:
        parser.error(f"--max-new-tokens: expected at least {fewest}, without a round there is nothing to report")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    return options


def in_turns(
    zoo: Zoo, configs: Mapping[Hashable, Any], works: list[Work], console: Console, **arguments
) -> Iterator[tuple[Work, dict[Hashable, DecodeOutput]]]:
    """Of each work what the decoder of every configuration makes of it, each work starting with another one; in place of a
    configuration there may be what decodes."""
    decoders = {
        name: Decoder(zoo.target, zoo.drafters, config) if isinstance(config, DecodeConfig) else config
        for name, config in configs.items()
    }
    order = list(decoders)
    with torch.inference_mode(), profiled(zoo.target.device):
        for decoder in decoders.values():
            decoder.generate(works[0].ids, max_new_tokens=8)  # what is compiled or allocated once is not measured
        for number, work in enumerate(track(works, "texts", console=console, transient=True)):
            turn = number % len(order)
            found = {
                name: decoders[name].generate(work.ids, seed=work.seed, **arguments) for name in order[turn:] + order[:turn]
            }
            yield work, {name: found[name] for name in order}


def gaps_of(zoo: Zoo, work: Work, outputs: Mapping[Hashable, DecodeOutput]) -> list[float]:
    """How far the logits are apart where texts differ from the first configuration's."""
    prompt = work.ids[0]
    first, *others = (out.sequences[0, len(prompt) :].tolist() for out in outputs.values())
    return [gap_between(zoo.target, prompt, first, text) for text in others if text != first]


def add_times_first(rows: list[dict]) -> None:
    """Tokens a second over those of the first."""
    for row in rows:
        row["times_first"] = row["tokens_per_second"] / rows[0]["tokens_per_second"]


def told(options: argparse.Namespace, zoo: Zoo, console: Console, gaps: list[float], figures: dict[str, Any]) -> int:
    """Writes the figures; returns the exit code, 1 where texts differ by more than a tie of logits."""
    if options.json is not None:
        everything = {**circumstances(zoo.target), "gaps_of_texts_that_differ": gaps, **figures}
        options.json.write_text(json.dumps(everything, indent=1))
    if gaps:
        console.print(f"texts that differ from the first's: {len(gaps)}, logits apart by at most {max(gaps):.0e}")
    return 1 if any(gap > TIE for gap in gaps) else 0
