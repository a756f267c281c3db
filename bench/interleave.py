"""Shared by the decoder's benchmarks: methods that decode the same prompts in turns, comparison of texts, JSON output."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from hedgespec.decoder import Decoder, eos_of
from hedgespec.stats import STAGES, DecodeStats
from hedgespec.zoo import Prompt, Zoo

DRAFT_LENGTH = 5
TIE = 1e-3
"""Difference of two logits below which either may be the larger one after rounding, float32."""


@dataclass(frozen=True)
class PromptBatch:
    """A batch of B prompts, padded on the left."""

    prompts: Sequence[Prompt]
    ids: torch.Tensor
    """int64 [B, P]."""
    mask: torch.Tensor
    """int64 [B, P], 0 where padded."""
    seed: int


@dataclass(frozen=True)
class Result:
    """What a method made of a batch."""

    sequences: torch.Tensor
    """int64 [B, L], prompts and continuations. Tokens after the end of a text do not count."""
    forwards: list[int] | None = None
    """The target's forwards for each row; None if every token has its own."""
    stats: list[DecodeStats] = field(default_factory=list)
    """Statistics of each row, if HedgeSpec decoded it."""

    @property
    def seconds_by_stage(self) -> dict[str, float]:
        """Time of each stage. It is added to all rows in progress, so the row that ended last has all of it."""
        return {stage: max(stats.seconds_by_stage[stage] for stats in self.stats) for stage in STAGES} if self.stats else {}


@dataclass(frozen=True)
class Method:
    """One way to decode."""

    name: str
    run: Callable[[PromptBatch, int], Result]
    """Decodes a batch, at most so many new tokens."""
    note: str = ""
    takes_batches: bool = True


def decoder_method(name: str, decoder: Decoder, temperature: float, *, note: str = "",
                   states: Callable[[PromptBatch], list[dict] | None] = lambda batch: None) -> Method:  # fmt: skip
    """Returns a method that decodes with HedgeSpec. A drafter that fails is an error.

    Args:
        name: of the method.
        decoder: HedgeSpec's decoder.
        temperature: of the target.
        note: shown beside the name.
        states: returns the rows' learner states to continue from, or None.
    """

    def run(batch: PromptBatch, max_new_tokens: int) -> Result:
        out = decoder.generate(
            batch.ids, attention_mask=batch.mask, max_new_tokens=max_new_tokens, temperature=temperature, seed=batch.seed,
            learner_state=states(batch),
        )  # fmt: skip
        if failures := [stats.failures for stats in out.stats if stats.failures]:
            raise AssertionError(f"{name}: drafters failed: {failures}")
        return Result(out.sequences, [1 + stats.rounds for stats in out.stats], out.stats)

    return Method(name, run, note)


def generate_method(name: str, target, temperature: float, *, note: str = "", takes_batches: bool = True,
                    counts_forwards: bool = False, **options: Any) -> Method:  # fmt: skip
    """Returns a method that decodes with transformers' `generate`.

    Args:
        name, note, takes_batches: of the method.
        target: the model.
        temperature: 0 is greedy.
        counts_forwards: count the target's forwards; otherwise every token has its own.
        options: further arguments of `generate`.
    """
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}

    def run(batch: PromptBatch, max_new_tokens: int) -> Result:
        torch.manual_seed(batch.seed)
        forwards: list[None] = []
        handle = count_forwards(target, forwards)
        try:
            sequences = target.generate(
                batch.ids, attention_mask=batch.mask, max_new_tokens=max_new_tokens, **sampling, **options
            )
        finally:
            handle.remove()
        return Result(sequences, [len(forwards)] if counts_forwards else None)

    return Method(name, run, note, takes_batches)


def count_forwards(target, forwards: list[None]):
    """Appends to the list at every forward through all layers of the target, until the returned handle is removed."""
    layers = len(target.model.layers)

    def count(model, arguments) -> None:
        if model.config.num_hidden_layers == layers:  # an early exit sets fewer
            forwards.append(None)

    return target.register_forward_pre_hook(count)


def prompt_batches(zoo: Zoo, prompts: Sequence[Prompt], size: int, seed: int) -> list[PromptBatch]:
    """Returns the prompts in batches of a size. Each batch has another seed."""
    batches = []
    for first in range(0, len(prompts), size):
        chunk = prompts[first : first + size]
        encoded = zoo.tokenizer([prompt.text for prompt in chunk], return_tensors="pt", padding=True, padding_side="left")
        device = zoo.target.device
        batches.append(PromptBatch(chunk, encoded.input_ids.to(device), encoded.attention_mask.to(device), seed + first))
    return batches


def interleaved(
    methods: Sequence[Method], batches: Sequence[PromptBatch], max_new_tokens: int, console: Console
) -> Iterator[tuple[PromptBatch, dict[str, tuple[Result, float]]]]:
    """Decodes every batch with every method and yields the results with their seconds, by method.

    Each batch starts with another method, so that what disturbs one disturbs all. Every method first decodes a few tokens
    untimed, which includes compilation and allocation.
    """
    for method in methods:
        method.run(batches[0], min(8, max_new_tokens))
    for number, batch in enumerate(track(batches, f"batches of {len(batches[0].prompts)}", console=console, transient=True)):
        turn = number % len(methods)
        found = {method.name: timed(method, batch, max_new_tokens) for method in [*methods[turn:], *methods[:turn]]}
        yield batch, {method.name: found[method.name] for method in methods}


def timed(method: Method, batch: PromptBatch, max_new_tokens: int) -> tuple[Result, float]:
    """Returns a method's result and its seconds, the device's work included."""

    def wait() -> None:
        if batch.ids.device.type == "cuda":
            torch.cuda.synchronize()

    wait()
    began = time.perf_counter()
    result = method.run(batch, max_new_tokens)
    wait()
    return result, time.perf_counter() - began


# Texts


def texts_of(batch: PromptBatch, result: Result, target) -> list[list[int]]:
    """Returns the continuations, each up to the token that ends it."""
    ends = eos_of(target)
    texts = result.sequences[:, batch.ids.shape[1] :].tolist()
    for text in texts:
        last = next((place for place, token in enumerate(text) if token in ends), len(text) - 1)
        del text[last + 1 :]
    return texts


def text_gaps(target, batch: PromptBatch, expected: list[list[int]], found: list[list[int]]) -> list[float]:
    """Returns `gap_between` for every row whose texts differ."""
    rows = zip(batch.ids, batch.mask, expected, found)
    return [gap_between(target, ids[mask.bool()], text, other) for ids, mask, text, other in rows if text != other]


def gap_between(target, prompt: torch.Tensor, text: list[int], other: list[int]) -> float:
    """Returns the difference of the target's logits of the first tokens that differ; infinity if one text only ends earlier.

    Args:
        target: the model.
        prompt: int64 [P].
        text, other: two different continuations.
    """
    place = next((place for place, (one, two) in enumerate(zip(text, other)) if one != two), None)
    if place is None:
        return float("inf")
    before = torch.cat([prompt, torch.tensor(text[:place], dtype=torch.int64, device=prompt.device)])
    logits = target(before[None], logits_to_keep=1).logits[0, -1]
    return abs(float(logits[text[place]] - logits[other[place]]))


# Command line and output


def common_parser(description: str | None, *, prompts: int = 24, max_new_tokens: int = 80) -> argparse.ArgumentParser:
    """Returns a parser with the arguments of all these benchmarks."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--prompts", type=positive, default=prompts, help="default %(default)s")
    add("--max-new-tokens", type=positive, default=max_new_tokens, help="of each text, default %(default)s")
    add("--temperature", type=float, default=0.0, help="default 0, which is greedy and compares the texts")
    add("--seed", type=int, default=0, help="of the first prompt, default 0")
    add("--device", default="cpu", help="cpu or cuda, default cpu")
    add("--json", type=Path, metavar="FILE", help="where all figures go")
    return parser


def positive(text: str) -> int:
    """Parses an integer >= 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def environment_info(target) -> dict[str, Any]:
    """Returns the date, the command, versions and the machine."""
    return {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "versions": {"python": platform.python_version()}
        | {name: _version_of(name) for name in ("hedgespec", "torch", "transformers", "flashspec")},
        "machine": {
            "architecture": platform.machine(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if target.device.type == "cuda" else "cpu",
            "dtype": str(target.dtype).removeprefix("torch."),
        },
    }


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def write_json(path: Path | None, figures: dict[str, Any]) -> None:
    """Writes figures to a file, if there is one to write to."""
    if path is not None:
        path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
