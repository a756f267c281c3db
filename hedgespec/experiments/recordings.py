"""Which texts are recorded with which pools, and how: each set once, a file a text, so that an interrupted run goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hedgespec.drafters import Drafter
from hedgespec.drafters.ngram import NGramDrafter
from hedgespec.experiments.traces import Trace, record
from hedgespec.zoo import GENERALIST, NAMES, Prompt, Zoo, head_path, load_prompts
from hedgespec.zoo.storage import load_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FRAMES = (
    "A colleague sent me this, and I would like to read on:\n\n{}",
    "Here is the beginning of a page that turned up in the archive.\n\n{}",
    "As promised in my last letter, what you asked me for:\n\n{}",
    "Notes from this morning, to be continued tomorrow.\n\n{}",
)
"""Words around a prompt that say nothing of its domain."""
NOISE = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.4)
"""Of the wide pool's heads: standard deviation of what is added to each weight, over that of the matrix's weights."""
EXIT_LAYERS = (2, 26)
"""Layers of the target that the mixed pool's small language models have."""


@dataclass(frozen=True)
class Recording:
    """One set of traces."""

    pool: str
    """A name in `POOLS`."""
    texts: int
    """Of the zoo's mixed stream the first so many prompts."""
    max_new_tokens: int
    mode: str = "sampled"
    temperature: float = 0.0
    depth: int = 5
    """Longest draft that can be replayed."""
    reworded: bool = False
    """Whether `FRAMES` stand around the prompts."""


RECORDINGS = {
    "greedy": Recording("zoo", 48, 128, depth=8),
    "coupled": Recording("zoo", 18, 96, mode="coupled", temperature=1.0),
    "sampled": Recording("zoo", 18, 96, temperature=1.0),
    "reworded": Recording("zoo", 18, 96, reworded=True),
    "mixed": Recording("mixed", 18, 96),
    "wide": Recording("wide", 18, 96),
}


def zoo_pool(zoo: Zoo) -> list[Drafter]:
    """The zoo's seven heads."""
    return list(zoo.drafters)


def mixed_pool(zoo: Zoo) -> list[Drafter]:
    """The heads, small language models and prompt lookup.

    No trained small model with the target's tokenizer is at hand: the target's own first layers stand in, a few, which are
    cheap and seldom right, and nearly all, which are mostly right and nearly as slow as the target.
    """
    from hedgespec.drafters.causal_lm import CausalLMDrafter

    small = [CausalLMDrafter(first_layers(zoo.target, count), zoo.target, f"first {count} layers") for count in EXIT_LAYERS]
    return [*zoo.drafters, *small, NGramDrafter(zoo.target.config.vocab_size)]


def wide_pool(zoo: Zoo) -> list[Drafter]:
    """64 drafters: the heads, each of them with noise of eight strengths on its weights, and prompt lookup."""
    noisy = [with_noise(name, strength, zoo.target) for strength in NOISE for name in NAMES]
    return [*zoo.drafters, *noisy, NGramDrafter(zoo.target.config.vocab_size)]


POOLS: dict[str, Callable[[Zoo], list[Drafter]]] = {"zoo": zoo_pool, "mixed": mixed_pool, "wide": wide_pool}


def first_layers(target: PreTrainedModel, depth: int) -> PreTrainedModel:
    """The target's first layers under its own norm and head, as a model that shares its weights."""
    config = target.config.__class__.from_dict(target.config.to_dict() | {"num_hidden_layers": depth})
    with torch.device("meta"):
        small = type(target)(config)
    for name in ("embed_tokens", "norm", "rotary_emb"):
        setattr(small.model, name, getattr(target.model, name))
    small.model.layers, small.lm_head = target.model.layers[:depth], target.lm_head
    small.generation_config = target.generation_config.__class__.from_dict(target.generation_config.to_dict())
    return small.eval()


def with_noise(name: str, strength: float, target: PreTrainedModel) -> Drafter:
    """One of the zoo's heads with noise on its weights; its token head stays."""
    head = load_head(head_path(name), target)
    random = torch.Generator().manual_seed(NAMES.index(name) + 1000 * round(100 * strength))
    for path, weight in head.named_parameters():
        if weight.ndim == 2 and not path.startswith("lm_head"):
            noise = torch.randn(weight.shape, generator=random).to(weight)
            weight.data.add_(noise, alpha=strength * float(weight.std()))
    head.name = f"{name} {strength:g}"
    return head


def prompts_of(recording: Recording) -> list[Prompt]:
    """The prompts of a set, in order."""
    prompts = load_prompts()[: recording.texts]
    if not recording.reworded:
        return prompts
    frames = [FRAMES[number // len(NAMES) % len(FRAMES)] for number in range(len(prompts))]
    return [Prompt(**{**vars(one), "text": frame.format(one.text)}) for one, frame in zip(prompts, frames)]


def load_traces(folder: Path, name: str) -> list[Trace]:
    """The recorded traces of a set, in order; fewer than it has where it is not complete."""
    paths = [folder / name / f"{number:03d}.npz" for number in range(RECORDINGS[name].texts)]
    return [Trace.load(path) for path in paths if path.exists()]


def record_set(name: str, folder: Path, zoo: Zoo, *, track: Callable[[Sequence], Iterable] = list) -> None:
    """Records what is missing of a set.

    Args:
        name: one of `RECORDINGS`.
        folder: of all sets; this one's files are under its name.
        zoo: loaded whole.
        track: wraps what is iterated over, for a progress bar.
    """
    recording = RECORDINGS[name]
    paths = [folder / name / f"{number:03d}.npz" for number in range(recording.texts)]
    missing = [number for number, path in enumerate(paths) if not path.exists()]
    if not missing:
        return
    drafters, prompts = POOLS[recording.pool](zoo), prompts_of(recording)
    writer = next(drafter for drafter in zoo.drafters if drafter.name == GENERALIST)
    for number in track(missing):
        ids = zoo.tokenizer(prompts[number].text, return_tensors="pt").input_ids[0].to(zoo.target.device)
        trace = record(
            zoo.target, drafters, ids, domain=prompts[number].domain, number=number, seed=number, mode=recording.mode,
            temperature=recording.temperature, max_new_tokens=recording.max_new_tokens, depth=recording.depth, writer=writer,
        )  # fmt: skip
        trace.save(paths[number])
