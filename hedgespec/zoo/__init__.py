"""The embedded default: a real target, seven trained heads, and held-out prompts of six domains.

>>> zoo = load_zoo()                                          # doctest: +SKIP
>>> decoder = hedgespec.Decoder(zoo.target, zoo.drafters)     # doctest: +SKIP
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hedgespec.drafters.eagle import EagleHead
from hedgespec.zoo.storage import load_head
from hedgespec.zoo.target import load_target

FOLDER = Path(__file__).parent
GENERALIST = "generalist"
EXPERTS = ("python", "sql", "math", "scripture", "legal", "french")
DTYPES = ("float64", "float32", "bfloat16", "float16")
NAMES = (*EXPERTS, GENERALIST)
"""The zoo's heads: an expert a domain, and the generalist."""


@dataclass(frozen=True)
class Zoo:
    """The target with its tokenizer, and the heads asked for."""

    target: Any
    """A transformers causal language model in the dtype asked for, in eval mode."""
    tokenizer: Any
    drafters: list[EagleHead]


@dataclass(frozen=True)
class Prompt:
    """One held-out prompt of the mixed stream."""

    domain: str
    text: str
    document: str
    source: str
    licence: str


def load_zoo(drafters: Sequence[str] = NAMES, *, dtype: str = "float32", device: str = "cpu") -> Zoo:
    """Loads the zoo, preparing its target on the first call (a download of 93 MB, under a minute).

    Args:
        drafters: names of heads, see `NAMES`.
        dtype: the target's and the heads', a torch dtype by name.
        device: where they go.

    Raises: ValueError for an unknown head or dtype; CheckpointError for a head that is missing or corrupt; ZooError if the
    target cannot be prepared.
    """
    for name in drafters:
        if name not in NAMES:
            raise ValueError(f"drafters: expected names among {', '.join(NAMES)}, got {name!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    target, tokenizer = load_target(dtype=dtype, device=device)
    return Zoo(target, tokenizer, [load_head(head_path(name), target) for name in drafters])


def head_path(name: str) -> Path:
    """The file of one of the zoo's heads."""
    return FOLDER / "heads" / f"{name}.safetensors"


def load_prompts(domain: str | None = None) -> list[Prompt]:
    """The held-out prompts of one domain, or of all: the mixed stream, a prompt of each domain in turn."""
    lines = (FOLDER / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [Prompt(**json.loads(line)) for line in lines]
    if domain is not None and domain not in {prompt.domain for prompt in prompts}:
        raise ValueError(f"domain: expected one of {', '.join(EXPERTS)}, got {domain!r}")
    return [prompt for prompt in prompts if domain in (None, prompt.domain)]
