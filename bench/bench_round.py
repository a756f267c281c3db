"""A round with all of the zoo's drafters against a round with the generalist alone: `python bench/bench_round.py --json FILE`.

The prompts of the mixed stream are decoded with both in turns, once with drafters evaluated after every round and once with the
adaptive cadence. Times are milliseconds of a round, the prompt's stage left out; on a GPU the decoder captures its forwards.
"""

from __future__ import annotations

import sys

import torch
from interleave import Method, common_parser, decoder_method, environment_info, interleaved, prompt_batches, write_json
from rich.console import Console
from table import markdown

from hedgespec.config import DecodeConfig
from hedgespec.decoder import Decoder
from hedgespec.zoo import GENERALIST, Zoo, load_prompts, load_zoo

WARM_UP = 3
"""Prompts at the beginning that are not counted."""
CADENCES = (1, "adaptive")


def methods_of(zoo: Zoo, evaluate_every: int | str, temperature: float) -> list[Method]:
    """Returns the whole pool and the generalist alone."""
    alone = [drafter for drafter in zoo.drafters if drafter.name == GENERALIST]
    compiled = zoo.target.device.type == "cuda"
    pool = Decoder(zoo.target, zoo.drafters, DecodeConfig(evaluate_every=evaluate_every, compile=compiled))
    fixed = Decoder(zoo.target, alone, DecodeConfig(learner="fixed", compile=compiled))
    return [decoder_method("pool", pool, temperature), decoder_method("one drafter", fixed, temperature)]


def main() -> int:
    parser = common_parser(__doc__, prompts=9, max_new_tokens=48)
    options = parser.parse_args()
    if options.prompts <= WARM_UP:
        parser.error(f"--prompts: expected more than {WARM_UP}, which are not counted, got {options.prompts}")
    zoo = load_zoo(dtype="float32" if options.device == "cpu" else "bfloat16", device=options.device)
    batches = prompt_batches(zoo, load_prompts()[: options.prompts], 1, options.seed)
    rows = []
    for every in CADENCES:
        rounds, seconds = {"pool": 0, "one drafter": 0}, {"pool": 0.0, "one drafter": 0.0}
        methods = methods_of(zoo, every, options.temperature)
        with torch.inference_mode():
            for number, (_, results) in enumerate(interleaved(methods, batches, options.max_new_tokens, Console(stderr=True))):
                for name, (result, _) in results.items() if number >= WARM_UP else ():
                    [stats] = result.stats
                    rounds[name] += stats.rounds
                    seconds[name] += stats.seconds - stats.seconds_by_stage["prompt"]
        each = {name: 1e3 * seconds[name] / rounds[name] for name in rounds}
        ratio = each["pool"] / each["one drafter"]
        rows.append({"evaluate_every": every, "pool_ms": each["pool"], "one_drafter_ms": each["one drafter"], "ratio": ratio})
    head = ["evaluate_every", f"{len(zoo.drafters)} drafters, ms", "1 drafter, ms", "ratio"]
    print(markdown(head, [[row["evaluate_every"], *(f"{row[key]:.2f}" for key in list(row)[1:])] for row in rows]))
    write_json(options.json, {**environment_info(zoo.target), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
