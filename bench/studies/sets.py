"""The recorded sets of texts: which prompts are decoded with which pool, and how. Each text is one file, recorded once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from hedgespec.drafters import Drafter
from hedgespec.drafters.causal_lm import CausalLMDrafter
from hedgespec.drafters.ngram import NGramDrafter
from hedgespec.experiments.recording import Trace, record
from hedgespec.zoo import GENERALIST, NAMES, Prompt, Zoo, head_path, load_prompts
from hedgespec.zoo.storage import load_head

FRAMES = (
    "A colleague sent me this, and I would like to read on:\n\n{}",
    "Here is the beginning of a page that turned up in the archive.\n\n{}",
    "As promised in my last letter, what you asked me for:\n\n{}",
    "Notes from this morning, to be continued tomorrow.\n\n{}",
)
"""Text put around the prompts of a reworded set. It is unrelated to their domains."""
NOISE = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.4)
"""Standard deviations of the noise on the wide pool's heads, relative to that of each weight matrix."""
EXIT_LAYERS = (2, 26)
"""Number of layers of the target in each small language model of the mixed pool."""


@dataclass(frozen=True)
class TraceSet:
    """One set of traces."""

    pool: str
    """A name in `POOLS`."""
    texts: int
    """Number of prompts, the first ones of the zoo's mixed stream."""
    max_new_tokens: int
    mode: str = "sampled"
    temperature: float = 0.0
    depth: int = 5
    """Longest draft that can be replayed."""
    reworded: bool = False
    """Whether the prompts are framed by `FRAMES`."""


SETS = {
    "greedy": TraceSet("zoo", 48, 128, depth=8),
    "coupled": TraceSet("zoo", 18, 96, mode="coupled", temperature=1.0),
    "sampled": TraceSet("zoo", 18, 96, temperature=1.0),
    "reworded": TraceSet("zoo", 18, 96, reworded=True),
    "mixed": TraceSet("mixed", 18, 96),
    "wide": TraceSet("wide", 18, 96),
}


def zoo_pool(zoo: Zoo) -> list[Drafter]:
    """Returns the zoo's heads."""
    return list(zoo.drafters)


def mixed_pool(zoo: Zoo) -> list[Drafter]:
    """Returns the heads, two small language models and prompt lookup.

    No trained small model with the target's tokenizer is available. The target's own first layers are used instead: 2 layers
    are cheap and seldom right, 26 layers are mostly right and nearly as slow as the target.
    """
    small = [CausalLMDrafter(first_layers(zoo.target, count), zoo.target, f"first {count} layers") for count in EXIT_LAYERS]
    return [*zoo.drafters, *small, NGramDrafter(zoo.target.config.vocab_size)]


def wide_pool(zoo: Zoo) -> list[Drafter]:
    """Returns 64 drafters: the heads, each head with eight strengths of noise on its weights, and prompt lookup."""
    noisy = [with_noise(name, strength, zoo.target) for strength in NOISE for name in NAMES]
    return [*zoo.drafters, *noisy, NGramDrafter(zoo.target.config.vocab_size)]


POOLS: dict[str, Callable[[Zoo], list[Drafter]]] = {"zoo": zoo_pool, "mixed": mixed_pool, "wide": wide_pool}


def first_layers(target, depth: int):
    """Returns a model of the target's first layers with its final norm and output matrix. It shares the target's weights."""
    config = target.config.__class__.from_dict(target.config.to_dict() | {"num_hidden_layers": depth})
    with torch.device("meta"):
        small = type(target)(config)
    for name in ("embed_tokens", "norm", "rotary_emb"):
        setattr(small.model, name, getattr(target.model, name))
    small.model.layers, small.lm_head = target.model.layers[:depth], target.lm_head
    small.generation_config = target.generation_config.__class__.from_dict(target.generation_config.to_dict())
    return small.eval()


def with_noise(name: str, strength: float, target) -> Drafter:
    """Returns one of the zoo's heads with Gaussian noise on its weight matrices, the output matrix excepted."""
    head = load_head(head_path(name), target)
    random = torch.Generator().manual_seed(NAMES.index(name) + 1000 * round(100 * strength))
    for path, weight in head.named_parameters():
        if weight.ndim == 2 and not path.startswith("lm_head"):
            noise = torch.randn(weight.shape, generator=random).to(weight)
            weight.data.add_(noise, alpha=strength * float(weight.std()))
    head.name = f"{name} {strength:g}"
    return head


def prompts_of(trace_set: TraceSet) -> list[Prompt]:
    """Returns the prompts of a set, in order."""
    prompts = load_prompts()[: trace_set.texts]
    if not trace_set.reworded:
        return prompts
    return [replace(prompt, text=frame_of(number).format(prompt.text)) for number, prompt in enumerate(prompts)]


def frame_of(number: int) -> str:
    """Returns the frame of a reworded set's prompt. Consecutive prompts of all domains share one."""
    return FRAMES[number // len(NAMES) % len(FRAMES)]


def load_traces(folder: Path, name: str) -> list[Trace]:
    """Returns the recorded traces of a set, in order. There are fewer than the set has if recording is not finished."""
    return [Trace.load(path) for path in _paths(folder, name) if path.exists()]


def record_set(name: str, folder: Path, zoo: Zoo, *, track: Callable[[Sequence], Sequence] = list) -> None:
    """Records the missing traces of a set.

    Args:
        name: a name in `SETS`.
        folder: folder of all sets. The files of this one go under its name.
        zoo: the target and all heads.
        track: wraps the sequence that is iterated over, for a progress bar.
    """
    trace_set, paths = SETS[name], _paths(folder, name)
    missing = [number for number, path in enumerate(paths) if not path.exists()]
    if not missing:
        return
    drafters, prompts = POOLS[trace_set.pool](zoo), prompts_of(trace_set)
    writer = next(drafter for drafter in zoo.drafters if drafter.name == GENERALIST)
    for number in track(missing):
        ids = zoo.tokenizer(prompts[number].text, return_tensors="pt").input_ids[0].to(zoo.target.device)
        trace = record(
            zoo.target, drafters, ids, domain=prompts[number].domain, number=number, seed=number, mode=trace_set.mode,
            temperature=trace_set.temperature, max_new_tokens=trace_set.max_new_tokens, depth=trace_set.depth, writer=writer,
        )  # fmt: skip
        trace.save(paths[number])


def _paths(folder: Path, name: str) -> list[Path]:
    return [folder / name / f"{number:03d}.npz" for number in range(SETS[name].texts)]
