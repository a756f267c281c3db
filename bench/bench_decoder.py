"""The decoder end to end against what else one could run: `python bench/bench_decoder.py --json FILE`.

Every way decodes the same held-out prompts of the zoo's mixed stream, batch by batch in turns, each batch starting with
another way, so that what disturbs one disturbs all:

    plain               the target's own `generate`
    assistant           `generate(assistant_model=...)` with a small language model. There is none with the target's tokenizer
                        at hand, so it is the target's own first layers with its final norm and head: untrained as a model,
                        it agrees with the target seldom, and the row says little of assistants that were trained
    early exit          `generate(assistant_early_exit=...)`, which is transformers' way to the same
    prompt lookup       `generate(prompt_lookup_num_tokens=...)`
    FlashSpec           the package `flashspec` (Apache-2.0), if it is installed: its prompt lookup, alone or before the
                        small language model
    generalist          HedgeSpec with one drafter
    own expert          HedgeSpec with one drafter: that of the prompt's domain, which no one knows beforehand
    HedgeSpec           the whole pool and a learner
    HedgeSpec + lookup  the same with an n-gram drafter in the pool

All models draft five tokens a round. How many layers, how many tokens a lookup, and which of FlashSpec's strategies: whatever
is fastest on a few prompts that are not measured.
Where a way refuses batches the table has a `-`.

At temperature 0 every text is compared with plain generate's of the same batch. Rounding differs between a forward over one
token and one over several, so two logits closer than `TIE` may fall the other way. The run fails if a difference is no such
tie, or if more than 2% of a way's texts (and more than one) differ.

The figures: tokens a second over all texts; MAT, here tokens a forward of the target, those over prompts included; and, of
HedgeSpec, the share of time by stage. Ratios mean something on a busy machine, tokens a second do not.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import logging
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from hedgespec.experiments.recordings import first_layers
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers.utils import logging as transformers_logging

from hedgespec.config import DecodeConfig
from hedgespec.decoder import Decoder, eos_of
from hedgespec.drafters.ngram import NGramDrafter
from hedgespec.learners import make
from hedgespec.metrics import STAGES
from hedgespec.zoo import GENERALIST, NAMES, Prompt, Zoo, load_prompts, load_zoo

WAYS = ("plain", "assistant", "early exit", "prompt lookup", "FlashSpec")
WAYS += ("generalist", "own expert", "HedgeSpec", "HedgeSpec + lookup")
DRAFT_LENGTH = 5
DEPTHS = (1, 8, 26)
"""Layers of the target that are tried as a small language model."""
LOOKUPS = (5, 10)
"""Tokens of a prompt lookup that are tried."""
CALIBRATION_PROMPTS, CALIBRATION_TOKENS = 2, 16
TIE = 1e-3
"""Difference of two logits below which either may be the larger one after rounding, float32."""


@dataclass(frozen=True)
class Work:
    """A batch of prompts, padded on the left."""

    prompts: Sequence[Prompt]
    ids: torch.Tensor
    mask: torch.Tensor
    seed: int


@dataclass(frozen=True)
class Done:
    """What a way made of a batch."""

    sequences: torch.Tensor
    """Prompts and continuations [B, L]; what follows the end of a text does not count."""
    forwards: list[int] | None = None
    """The target's forwards for each row; None where every token has its own."""
    stages: dict[str, float] = field(default_factory=dict)
    """Seconds."""
    picks: list[list[int]] | None = None
    """Rounds by drafter of each row."""


@dataclass(frozen=True)
class Way:
    name: str
    run: Callable[[Work, int], Done]
    """Called with the batch and the most tokens to emit."""
    note: str = ""
    takes_batches: bool = True


class Rivals:
    """Ways of others to decode with the zoo's target."""

    def __init__(self, zoo: Zoo, temperature: float):
        self.target, self.temperature = zoo.target, temperature
        sampled = {"do_sample": True, "temperature": temperature, "top_k": 0}
        self.sampling = {"do_sample": False} if temperature == 0 else sampled
        # The assistant is asked for as many tokens as its own generation config says; an early exit's is the target's.
        self.target.generation_config.num_assistant_tokens = DRAFT_LENGTH
        self.small = {depth: first_layers(zoo.target, depth) for depth in DEPTHS}

    def generate(self, counts_forwards: bool, **options) -> Callable[[Work, int], Done]:
        def run(work: Work, max_new_tokens: int) -> Done:
            torch.manual_seed(work.seed)
            with counted(self.target) as forwards:
                sequences = self.target.generate(
                    work.ids, attention_mask=work.mask, max_new_tokens=max_new_tokens, **self.sampling, **options
                )
            return Done(sequences, [len(forwards)] if counts_forwards else None)

        return run

    def plain(self) -> Way:
        return Way("plain", self.generate(False))

    def assistants(self) -> dict[int, Way]:
        return {
            depth: Way("assistant", self.generate(True, assistant_model=small), f"{depth} of its layers", False)
            for depth, small in self.small.items()
        }

    def early_exits(self) -> dict[int, Way]:
        return {
            depth: Way("early exit", self.generate(True, assistant_early_exit=depth), f"after {depth} layers", False)
            for depth in DEPTHS
        }

    def lookups(self) -> dict[int, Way]:
        return {
            count: Way("prompt lookup", self.generate(True, prompt_lookup_num_tokens=count), f"{count} tokens", False)
            for count in LOOKUPS
        }

    def flashspec(self, depth: int) -> dict[str, Way]:
        """Raises ImportError if it is not installed."""
        from flashspec import BanditConfig, FlashSpecConfig, SamplingConfig
        from flashspec.engine import HuggingFaceDrafter, NgramDrafter

        logging.getLogger("flashspec").setLevel(logging.ERROR)  # it warns of every engine with a single strategy
        place, dtype = self.target.device, self.target.dtype
        small = HuggingFaceDrafter("small", place, dtype, temperature=self.temperature or 1.0, model=self.small[depth])
        single = BanditConfig(n_arms=1)
        strategies = {"lookup": [NgramDrafter()], f"lookup, then {depth} layers": [small]}

        def way(name: str, drafters: list) -> Way:
            def run(work: Work, max_new_tokens: int) -> Done:
                from flashspec import SpeculativeEngine
                from flashspec.engine import TargetModel

                sampling = SamplingConfig(temperature=self.temperature, seed=work.seed)
                config = FlashSpecConfig(device=str(place), bandit=single, sampling=sampling)
                engine = SpeculativeEngine(config, drafters, TargetModel("target", place, dtype, model=self.target))
                with counted(self.target) as forwards:
                    out = engine.generate(work.ids, max_new_tokens, eos_token_ids=sorted(eos_of(self.target)))
                text = out.output_ids[:, : out.n_tokens_generated].to(work.ids.device)
                return Done(torch.cat([work.ids, text], 1), [len(forwards)])

            return Way("FlashSpec", run, name, False)  # it takes no mask, so no prompts of different lengths

        return {name: way(name, drafters) for name, drafters in strategies.items()}


def hedgespec_ways(zoo: Zoo, temperature: float, evaluate_every: int | str) -> list[Way]:
    def way(name: str, drafters: Sequence, config: DecodeConfig, states: Callable[[Work], list[dict] | None], note="") -> Way:
        decoder = Decoder(zoo.target, drafters, config)

        def run(work: Work, max_new_tokens: int) -> Done:
            out = decoder.generate(
                work.ids, attention_mask=work.mask, max_new_tokens=max_new_tokens, temperature=temperature, seed=work.seed,
                learner_state=states(work),
            )  # fmt: skip
            assert not any(stats.failures for stats in out.stats), [stats.failures for stats in out.stats]
            # A stage's time is added to every row under way, and the row that ended last was under way in all of it.
            stages = {stage: max(stats.seconds_by_stage[stage] for stats in out.stats) for stage in STAGES}
            forwards = [1 + stats.rounds for stats in out.stats]
            return Done(out.sequences, forwards, stages, [stats.picks.tolist() for stats in out.stats])

        return Way(name, run, note)

    fixed, learned = (
        DecodeConfig(draft_length=DRAFT_LENGTH, learner="fixed"),
        DecodeConfig(draft_length=DRAFT_LENGTH, evaluate_every=evaluate_every),
    )
    experts = {
        name: make("fixed", len(NAMES), prior=np.eye(len(NAMES))[index]).state_dict() for index, name in enumerate(NAMES)
    }
    lookup = NGramDrafter(zoo.target.config.vocab_size)
    [generalist] = [drafter for drafter in zoo.drafters if drafter.name == GENERALIST]
    return [
        way("generalist", [generalist], fixed, lambda work: None),
        way(
            "own expert", zoo.drafters, fixed, lambda work: [experts[prompt.domain] for prompt in work.prompts], "in hindsight"
        ),
        way("HedgeSpec", zoo.drafters, learned, lambda work: None, f"{len(NAMES)} drafters"),
        way("HedgeSpec + lookup", [*zoo.drafters, lookup], learned, lambda work: None, f"{len(NAMES) + 1} drafters"),
    ]


@contextmanager
def counted(target) -> Iterator[list]:
    """A list that grows with every forward through all of the target's layers."""
    forwards: list[None] = []
    layers = len(target.model.layers)

    def count(model, args) -> None:
        if model.config.num_hidden_layers == layers:  # an early exit sets fewer
            forwards.append(None)

    handle = target.register_forward_pre_hook(count)
    try:
        yield forwards
    finally:
        handle.remove()


def texts_of(work: Work, done: Done, ends: frozenset[int]) -> list[list[int]]:
    """The continuations, each up to the token that ends it."""
    texts = done.sequences[:, work.ids.shape[1] :].tolist()
    for text in texts:
        last = next((place for place, token in enumerate(text) if token in ends), len(text) - 1)
        del text[last + 1 :]
    return texts


def gap_between(target, prompt: torch.Tensor, text: list[int], other: list[int]) -> float:
    """How far the target's logits of the first tokens that differ are apart; infinite where one text only ends earlier."""
    place = next((place for place, (one, two) in enumerate(zip(text, other)) if one != two), None)
    if place is None:
        return float("inf")
    before = torch.cat([prompt, torch.tensor(text[:place], dtype=torch.int64, device=prompt.device)])
    logits = target(before[None], logits_to_keep=1).logits[0, -1]
    return abs(float(logits[text[place]] - logits[other[place]]))


def timed(way: Way, work: Work, max_new_tokens: int) -> tuple[Done, float]:
    def wait() -> None:
        if work.ids.device.type == "cuda":
            torch.cuda.synchronize()

    wait()
    began = time.perf_counter()
    done = way.run(work, max_new_tokens)
    wait()
    return done, time.perf_counter() - began


def batches_of(zoo: Zoo, prompts: Sequence[Prompt], size: int, seed: int) -> list[Work]:
    batches = []
    for first in range(0, len(prompts), size):
        chunk = prompts[first : first + size]
        encoded = zoo.tokenizer([prompt.text for prompt in chunk], return_tensors="pt", padding=True, padding_side="left")
        device = zoo.target.device
        batches.append(Work(chunk, encoded.input_ids.to(device), encoded.attention_mask.to(device), seed + first))
    return batches


def best_of(candidates: dict, works: list[Work], ends: frozenset[int], max_new_tokens: int) -> tuple[object, dict]:
    """The key of the fastest candidate, and the tokens a second of all, in turns on the same prompts."""
    tokens, seconds = dict.fromkeys(candidates, 0), dict.fromkeys(candidates, 0.0)
    for way in candidates.values():
        way.run(works[0], 4)
    for work in works:
        for key, way in candidates.items():
            done, took = timed(way, work, max_new_tokens)
            tokens[key] += sum(len(text) for text in texts_of(work, done, ends))
            seconds[key] += took
    speeds = {key: tokens[key] / seconds[key] for key in candidates}
    return max(speeds, key=speeds.get), speeds


def measure(ways: list[Way], works: list[Work], target, max_new_tokens: int, compares: bool, console: Console) -> list[dict]:
    """Raw figures and their sums of each way, plain first."""
    ends = eos_of(target)
    batches: dict[str, list[dict]] = {way.name: [] for way in ways}
    gaps: dict[str, list[float]] = {way.name: [] for way in ways}
    for way in ways:
        way.run(works[0], min(8, max_new_tokens))  # what is compiled or allocated once is not measured
    for number, work in enumerate(track(works, f"batches of {len(works[0].prompts)}", console=console, transient=True)):
        texts = {}
        for way in ways[number % len(ways) :] + ways[: number % len(ways)]:
            done, seconds = timed(way, work, max_new_tokens)
            texts[way.name] = texts_of(work, done, ends)
            tokens = [len(text) for text in texts[way.name]]
            batches[way.name].append({
                "domains": [prompt.domain for prompt in work.prompts], "tokens": tokens, "seconds": seconds,
                "forwards": tokens if done.forwards is None else done.forwards, "seconds_by_stage": done.stages,
                "picks": done.picks,
            })  # fmt: skip
        for name, own in texts.items() if compares else ():
            for ids, mask, text, plain in zip(work.ids, work.mask, own, texts["plain"]):
                if text != plain:
                    gaps[name].append(gap_between(target, ids[mask.bool()], plain, text))
    rows = [summary(way, batches[way.name], gaps[way.name] if compares else None) for way in ways]
    for row in rows:
        row["times_plain"] = row["tokens_per_second"] / rows[0]["tokens_per_second"]
    return rows


def summary(way: Way, batches: list[dict], gaps: list[float] | None) -> dict:
    tokens, forwards = (sum(sum(batch[key]) for batch in batches) for key in ("tokens", "forwards"))
    seconds = sum(batch["seconds"] for batch in batches)
    stages = {stage: sum(batch["seconds_by_stage"][stage] for batch in batches) for stage in batches[0]["seconds_by_stage"]}
    if stages:
        stages["other"] = seconds - sum(stages.values())
    return {
        "way": way.name, "note": way.note, "tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds,
        "mat": tokens / forwards, "texts": sum(len(batch["tokens"]) for batch in batches),
        "gaps_of_texts_that_differ": gaps, "seconds_by_stage": stages, "batches": batches,
    }  # fmt: skip


def wrong_texts(row: dict) -> bool:
    gaps = row["gaps_of_texts_that_differ"] or []
    return any(gap > TIE for gap in gaps) or len(gaps) > max(1, 0.02 * row["texts"])


def show(size: int, rows: list[dict], left_out: list[Way], console: Console) -> None:
    speeds = Table(title=f"batches of {size}, {rows[0]['texts']} texts in all", title_justify="left", box=None)
    shares = Table(title="share of time by stage, %", title_justify="left", box=None)
    for table, columns in (
        (speeds, ("way", "", "tokens/s", "x plain", "MAT", "differ")),
        (shares, ("way", *STAGES, "other")),
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
    for way in left_out:
        speeds.add_row(way.name, way.note, *"----")
    console.print(speeds)
    if left_out:
        console.print("-: takes batches of 1 only")
    if any(row["gaps_of_texts_that_differ"] for row in rows):
        console.print("differ: texts other than plain's, and how far the logits of the first other token are apart at most")
    console.print(shares)


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def circumstances(target) -> dict:
    """When, how, with what and on what this script runs."""
    return {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "versions": {"python": platform.python_version()}
        | {name: version_of(name) for name in ("hedgespec", "torch", "transformers", "flashspec")},
        "machine": {
            "architecture": platform.machine(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if target.device.type == "cuda" else "cpu",
            "dtype": str(target.dtype).removeprefix("torch."),
        },
    }


def cadence(text: str) -> int | str:
    """A number of rounds, or what else `DecodeConfig` takes."""
    return int(text) if text.removeprefix("-").isdigit() else text


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--batch", type=positive, nargs="+", default=[1, 4, 16], metavar="B", help="batch sizes, default 1 4 16"
    )
    parser.add_argument("--prompts", type=positive, default=24, help="prompts, rounded up to whole batches; default 24")
    parser.add_argument("--max-new-tokens", type=positive, default=80, help="of each text, default 80")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy and compares the texts")
    parser.add_argument(
        "--evaluate-every", type=cadence, default="adaptive", metavar="m", help="rounds between evaluations, default adaptive"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=WAYS, metavar="WAY", help="these ways (and plain) only")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where raw figures go")
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    console = Console()

    prompts = load_prompts()
    most = max(-(-options.prompts // size) * size for size in options.batch)
    if most > len(prompts) - CALIBRATION_PROMPTS:
        parser.error(f"--prompts: expected at most {len(prompts) - CALIBRATION_PROMPTS} in whole batches, got {most}")
    zoo = load_zoo(device=options.device)
    rivals = Rivals(zoo, options.temperature)
    works = batches_of(zoo, prompts[-CALIBRATION_PROMPTS:], 1, options.seed)
    ways, calibration = [rivals.plain()], {}

    def wanted(name: str) -> bool:
        return options.only is None or name in options.only

    def add_best(name: str, candidates: dict) -> object:
        chosen, speeds = best_of(candidates, works, eos_of(zoo.target), min(CALIBRATION_TOKENS, options.max_new_tokens))
        calibration[name] = {str(key): speed for key, speed in speeds.items()}
        tried = ", ".join(f"{candidates[key].note} {speed:.1f}" for key, speed in speeds.items())
        console.print(f"{name}, tokens/s on {len(works)} other prompts: {tried}", highlight=False)
        ways.append(candidates[chosen])
        return chosen

    with torch.inference_mode():
        depth = add_best("assistant", rivals.assistants()) if wanted("assistant") else DEPTHS[0]
        if wanted("early exit"):
            add_best("early exit", rivals.early_exits())
        if wanted("prompt lookup"):
            add_best("prompt lookup", rivals.lookups())
        if wanted("FlashSpec"):
            try:
                candidates = rivals.flashspec(depth)
            except ImportError as error:
                console.print(f"FlashSpec is left out: {error}")
            else:
                add_best("FlashSpec", candidates)
        hedgespec = hedgespec_ways(zoo, options.temperature, options.evaluate_every)
        ways += [way for way in hedgespec if wanted(way.name)]
        runs = {}
        for size in options.batch:
            works = batches_of(zoo, prompts[: -(-options.prompts // size) * size], size, options.seed)
            able = [way for way in ways if way.takes_batches or size == 1]
            rows = measure(able, works, zoo.target, options.max_new_tokens, options.temperature == 0, console)
            runs[size] = rows
            show(size, rows, [way for way in ways if way not in able], console)
    if options.json is not None:
        options.json.write_text(json.dumps({
            **circumstances(zoo.target),
            "calibration_tokens_per_second": calibration,
            "batch_sizes": {str(size): rows for size, rows in runs.items()},
        }, indent=1))  # fmt: skip
    wrong = [f"{row['way']} in batches of {size}" for size, rows in runs.items() for row in rows if wrong_texts(row)]
    if wrong:
        console.print(f"[red]texts differ from plain generate's by more than ties allow: {', '.join(wrong)}[/]")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
