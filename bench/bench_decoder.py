"""The decoder end to end against what else one could run: `python bench/bench_decoder.py --json FILE`.

Every method decodes the same held-out prompts of the zoo's mixed stream, batch by batch in turns:

    plain               the target's own `generate`
    assistant           `generate(assistant_model=...)` with a small language model. None with the target's tokenizer is
                        available, so it is the target's own first layers with its final norm and head: untrained as a model, it
                        seldom agrees with the target, and the row says little about trained assistants
    early exit          `generate(assistant_early_exit=...)`, which is transformers' way to the same
    prompt lookup       `generate(prompt_lookup_num_tokens=...)`
    FlashSpec           the package `flashspec` (Apache-2.0), if it is installed: its prompt lookup, alone or before the small
                        language model
    generalist          HedgeSpec with one drafter
    own expert          HedgeSpec with one drafter: that of the prompt's domain, which is not known beforehand
    HedgeSpec           the whole pool and a learner
    HedgeSpec + lookup  the same with an n-gram drafter in the pool

All models draft five tokens per round. How many layers, how many tokens a lookup, and which of FlashSpec's strategies: the
fastest on a few prompts that are not measured. A method that refuses batches has a `-` in the table.

At temperature 0 every text is compared with plain generate's of the same batch. Rounding differs between a forward over one
token and one over several, so two logits closer than `TIE` may fall the other way. The run fails if a difference is no such
tie, or if more than 2% of a method's texts (and more than one) differ.

The figures: tokens per second over all texts; tokens per forward of the target, including the forwards over prompts; and, of
HedgeSpec, the share of time by stage. Ratios are meaningful on a busy machine, tokens per second are not.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence

import numpy as np
import torch
from interleave import (
    DRAFT_LENGTH,
    TIE,
    Method,
    PromptBatch,
    Result,
    common_parser,
    count_forwards,
    decoder_method,
    environment_info,
    generate_method,
    interleaved,
    positive,
    prompt_batches,
    text_gaps,
    texts_of,
    timed,
    write_json,
)
from rich.console import Console
from rich.table import Table
from studies.sets import first_layers
from transformers.utils import logging as transformers_logging

from hedgespec.config import DecodeConfig
from hedgespec.decoder import Decoder, eos_of
from hedgespec.drafters.ngram import NGramDrafter
from hedgespec.learners import make
from hedgespec.stats import STAGES
from hedgespec.zoo import GENERALIST, NAMES, Zoo, load_prompts, load_zoo

METHODS = ("plain", "assistant", "early exit", "prompt lookup", "FlashSpec")
METHODS += ("generalist", "own expert", "HedgeSpec", "HedgeSpec + lookup")
DEPTHS = (1, 8, 26)
"""Layers of the target that are tried as a small language model."""
LOOKUPS = (5, 10)
"""Tokens of a prompt lookup that are tried."""
CALIBRATION_PROMPTS, CALIBRATION_TOKENS = 2, 16


class Baselines:
    """Other ways to decode with the zoo's target.

    Args:
        zoo: the target.
        temperature: of the target.
    """

    def __init__(self, zoo: Zoo, temperature: float) -> None:
        self.target, self.temperature = zoo.target, temperature
        # The assistant is asked for as many tokens as its own generation config says; an early exit's is the target's.
        self.target.generation_config.num_assistant_tokens = DRAFT_LENGTH
        self.small = {depth: first_layers(zoo.target, depth) for depth in DEPTHS}

    def plain(self) -> Method:
        return generate_method("plain", self.target, self.temperature)

    def _assisted(self, name: str, note: str, **options) -> Method:
        return generate_method(
            name, self.target, self.temperature, note=note, takes_batches=False, counts_forwards=True, **options
        )

    def assistants(self) -> dict[int, Method]:
        return {
            depth: self._assisted("assistant", f"{depth} of its layers", assistant_model=small)
            for depth, small in self.small.items()
        }

    def early_exits(self) -> dict[int, Method]:
        return {depth: self._assisted("early exit", f"after {depth} layers", assistant_early_exit=depth) for depth in DEPTHS}

    def lookups(self) -> dict[int, Method]:
        return {count: self._assisted("prompt lookup", f"{count} tokens", prompt_lookup_num_tokens=count) for count in LOOKUPS}

    def flashspec(self, depth: int) -> dict[str, Method]:
        """Returns FlashSpec's strategies. Raises: ImportError if it is not installed."""
        from flashspec import BanditConfig, FlashSpecConfig, SamplingConfig
        from flashspec.engine import HuggingFaceDrafter, NgramDrafter

        logging.getLogger("flashspec").setLevel(logging.ERROR)  # it warns of every engine with a single strategy
        place, dtype = self.target.device, self.target.dtype
        small = HuggingFaceDrafter("small", place, dtype, temperature=self.temperature or 1.0, model=self.small[depth])
        single = BanditConfig(n_arms=1)
        strategies = {"lookup": [NgramDrafter()], f"lookup, then {depth} layers": [small]}

        def method(name: str, drafters: list) -> Method:
            def run(batch: PromptBatch, max_new_tokens: int) -> Result:
                from flashspec import SpeculativeEngine
                from flashspec.engine import TargetModel

                sampling = SamplingConfig(temperature=self.temperature, seed=batch.seed)
                config = FlashSpecConfig(device=str(place), bandit=single, sampling=sampling)
                engine = SpeculativeEngine(config, drafters, TargetModel("target", place, dtype, model=self.target))
                forwards: list[None] = []
                handle = count_forwards(self.target, forwards)
                try:
                    out = engine.generate(batch.ids, max_new_tokens, eos_token_ids=sorted(eos_of(self.target)))
                finally:
                    handle.remove()
                text = out.output_ids[:, : out.n_tokens_generated].to(batch.ids.device)
                return Result(torch.cat([batch.ids, text], 1), [len(forwards)])

            return Method("FlashSpec", run, name, False)  # it takes no mask, so no prompts of different lengths

        return {name: method(name, drafters) for name, drafters in strategies.items()}


def hedgespec_methods(zoo: Zoo, temperature: float, evaluate_every: int | str) -> list[Method]:
    """Returns HedgeSpec with one drafter, with the domain's expert, with the whole pool, and with prompt lookup beside it."""
    fixed = DecodeConfig(draft_length=DRAFT_LENGTH, learner="fixed")
    learned = DecodeConfig(draft_length=DRAFT_LENGTH, evaluate_every=evaluate_every)
    experts = {
        name: make("fixed", len(NAMES), prior=np.eye(len(NAMES))[index]).state_dict() for index, name in enumerate(NAMES)
    }
    lookup = NGramDrafter(zoo.target.config.vocab_size)
    [generalist] = [drafter for drafter in zoo.drafters if drafter.name == GENERALIST]

    def method(name: str, drafters: Sequence, config: DecodeConfig, **options) -> Method:
        return decoder_method(name, Decoder(zoo.target, drafters, config), temperature, **options)

    def own_experts(batch: PromptBatch) -> list[dict]:
        return [experts[prompt.domain] for prompt in batch.prompts]

    return [
        method("generalist", [generalist], fixed),
        method("own expert", zoo.drafters, fixed, states=own_experts, note="in hindsight"),
        method("HedgeSpec", zoo.drafters, learned, note=f"{len(NAMES)} drafters"),
        method("HedgeSpec + lookup", [*zoo.drafters, lookup], learned, note=f"{len(NAMES) + 1} drafters"),
    ]


def fastest_of(candidates: dict, batches: list[PromptBatch], target, max_new_tokens: int) -> tuple[object, dict[object, float]]:
    """Returns the key of the fastest candidate, and the tokens per second of all, in turns on the same prompts."""
    tokens, seconds = dict.fromkeys(candidates, 0), dict.fromkeys(candidates, 0.0)
    for method in candidates.values():
        method.run(batches[0], 4)
    for batch in batches:
        for key, method in candidates.items():
            result, took = timed(method, batch, max_new_tokens)
            tokens[key] += sum(len(text) for text in texts_of(batch, result, target))
            seconds[key] += took
    speeds = {key: tokens[key] / seconds[key] for key in candidates}
    return max(speeds, key=speeds.get), speeds


def measure(
    methods: list[Method], batches: list[PromptBatch], target, max_new_tokens: int, compares: bool, console: Console
) -> list[dict]:
    """Returns the figures of each method with those of its batches, plain first."""
    found: dict[str, list[dict]] = {method.name: [] for method in methods}
    gaps: dict[str, list[float]] = {method.name: [] for method in methods}
    for batch, results in interleaved(methods, batches, max_new_tokens, console):
        texts = {name: texts_of(batch, result, target) for name, (result, _) in results.items()}
        for name, (result, seconds) in results.items():
            tokens = [len(text) for text in texts[name]]
            found[name].append({
                "domains": [prompt.domain for prompt in batch.prompts], "tokens": tokens, "seconds": seconds,
                "forwards": tokens if result.forwards is None else result.forwards,
                "seconds_by_stage": result.seconds_by_stage, "picks": [stats.picks.tolist() for stats in result.stats] or None,
            })  # fmt: skip
            gaps[name] += text_gaps(target, batch, texts["plain"], texts[name]) if compares else []
    rows = [summary(method, found[method.name], gaps[method.name] if compares else None) for method in methods]
    for row in rows:
        row["times_plain"] = row["tokens_per_second"] / rows[0]["tokens_per_second"]
    return rows


def summary(method: Method, batches: list[dict], gaps: list[float] | None) -> dict:
    """Returns the figures of one method over its batches."""
    tokens, forwards = (sum(sum(batch[key]) for batch in batches) for key in ("tokens", "forwards"))
    seconds = sum(batch["seconds"] for batch in batches)
    stages = {stage: sum(batch["seconds_by_stage"][stage] for batch in batches) for stage in batches[0]["seconds_by_stage"]}
    if stages:
        stages["other"] = seconds - sum(stages.values())
    return {
        "way": method.name, "note": method.note, "tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds,
        "mat": tokens / forwards, "texts": sum(len(batch["tokens"]) for batch in batches),
        "gaps_of_texts_that_differ": gaps, "seconds_by_stage": stages, "batches": batches,
    }  # fmt: skip


def wrong_texts(row: dict) -> bool:
    """Returns whether more texts differ, or by more, than ties allow."""
    gaps = row["gaps_of_texts_that_differ"] or []
    return any(gap > TIE for gap in gaps) or len(gaps) > max(1, 0.02 * row["texts"])


def show(size: int, rows: list[dict], left_out: list[Method], console: Console) -> None:
    """Prints the speeds and the shares of time for one batch size."""
    speeds = Table(title=f"batches of {size}, {rows[0]['texts']} texts in all", title_justify="left", box=None)
    shares = Table(title="share of time by stage, %", title_justify="left", box=None)
    for table, columns in (
        (speeds, ("method", "", "tokens/s", "x plain", "tokens per forward", "differ")),
        (shares, ("method", *STAGES, "other")),
    ):
        for number, column in enumerate(columns):
            table.add_column(column, justify="right" if number and column else "left")
    for row in rows:
        gaps = row["gaps_of_texts_that_differ"]
        differ = "" if gaps is None else str(len(gaps))
        if gaps:
            differ += f", by {max(gaps):.0e}" + (" [red]WRONG[/]" if wrong_texts(row) else "")
        speeds.add_row(row["way"], row["note"], f"{row['tokens_per_second']:.1f}", f"{row['times_plain']:.2f}",
                       f"{row['mat']:.2f}", differ)  # fmt: skip
        if stages := row["seconds_by_stage"]:
            shares.add_row(row["way"], *(f"{100 * stages[stage] / row['seconds']:.0f}" for stage in (*STAGES, "other")))
    for method in left_out:
        speeds.add_row(method.name, method.note, *"----")
    console.print(speeds)
    if left_out:
        console.print("-: takes batches of 1 only")
    if any(row["gaps_of_texts_that_differ"] for row in rows):
        console.print("differ: texts other than plain's, and how far the logits of the first other token are apart at most")
    console.print(shares)


def parser_of_benchmark():
    parser = common_parser(__doc__)
    add = parser.add_argument
    add("--batch", type=positive, nargs="+", default=[1, 4, 16], metavar="B", help="batch sizes, default 1 4 16")
    add("--evaluate-every", default="adaptive", metavar="m", help="rounds between evaluations, default adaptive")
    add("--only", nargs="+", choices=METHODS, metavar="METHOD", help="these methods (and plain) only")
    return parser


def candidates_of(baselines: Baselines, wanted: Callable[[str], bool], calibrate: Callable[[str, dict], object],
                  console: Console) -> None:  # fmt: skip
    """Calibrates the wanted baselines."""
    depth = calibrate("assistant", baselines.assistants()) if wanted("assistant") else DEPTHS[0]
    if wanted("early exit"):
        calibrate("early exit", baselines.early_exits())
    if wanted("prompt lookup"):
        calibrate("prompt lookup", baselines.lookups())
    if wanted("FlashSpec"):
        try:
            candidates = baselines.flashspec(depth)
        except ImportError as error:
            console.print(f"FlashSpec is left out: {error}")
        else:
            calibrate("FlashSpec", candidates)


def main() -> int:
    parser = parser_of_benchmark()
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    console, prompts = Console(), load_prompts()
    most = max(-(-options.prompts // size) * size for size in options.batch)
    if most > len(prompts) - CALIBRATION_PROMPTS:
        parser.error(f"--prompts: expected at most {len(prompts) - CALIBRATION_PROMPTS} in whole batches, got {most}")
    every = int(options.evaluate_every) if options.evaluate_every.isdigit() else options.evaluate_every
    zoo = load_zoo(device=options.device)
    baselines = Baselines(zoo, options.temperature)
    held_out = prompt_batches(zoo, prompts[-CALIBRATION_PROMPTS:], 1, options.seed)
    methods, calibration = [baselines.plain()], {}

    def wanted(name: str) -> bool:
        return options.only is None or name in options.only

    def calibrate(name: str, candidates: dict) -> object:
        tokens = min(CALIBRATION_TOKENS, options.max_new_tokens)
        chosen, speeds = fastest_of(candidates, held_out, zoo.target, tokens)
        calibration[name] = {str(key): speed for key, speed in speeds.items()}
        tried = ", ".join(f"{candidates[key].note} {speed:.1f}" for key, speed in speeds.items())
        console.print(f"{name}, tokens/s on {len(held_out)} other prompts: {tried}", highlight=False)
        methods.append(candidates[chosen])
        return chosen

    runs = {}
    with torch.inference_mode():
        candidates_of(baselines, wanted, calibrate, console)
        methods += [method for method in hedgespec_methods(zoo, options.temperature, every) if wanted(method.name)]
        for size in options.batch:
            batches = prompt_batches(zoo, prompts[: -(-options.prompts // size) * size], size, options.seed)
            able = [method for method in methods if method.takes_batches or size == 1]
            runs[size] = measure(able, batches, zoo.target, options.max_new_tokens, options.temperature == 0, console)
            show(size, runs[size], [method for method in methods if method not in able], console)
    by_size = {str(size): rows for size, rows in runs.items()}
    figures = {"calibration_tokens_per_second": calibration, "batch_sizes": by_size}
    write_json(options.json, {**environment_info(zoo.target), **figures})
    wrong = [f"{row['way']} in batches of {size}" for size, rows in runs.items() for row in rows if wrong_texts(row)]
    if wrong:
        console.print(f"[red]texts differ from plain generate's by more than ties allow: {', '.join(wrong)}[/]")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
