"""The embedded default: a real target, seven trained heads, and held-out prompts of six domains.

>>> zoo = load_zoo()                                          # doctest: +SKIP
>>> decoder = hedgespec.Decoder(zoo.target, zoo.drafters)     # doctest: +SKIP
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hedgespec.utils.scalars import shown, text
from hedgespec.zoo.target import load_target

if TYPE_CHECKING:
    import torch

    from hedgespec.drafters.eagle import EagleHead

FOLDER = Path(__file__).parent
GENERALIST = "generalist"
EXPERTS = ("python", "sql", "math", "scripture", "legal", "french")
DTYPES = ("float64", "float32", "bfloat16", "float16")
NAMES = (*EXPERTS, GENERALIST)
"""The zoo's heads: an expert a domain, and the generalist."""
STAGES = ("collect", "stores", "heads", "matrix")
"""Parts of `hedgespec zoo train`, in the order in which "all" does them."""


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


def load_zoo(
    drafters: Sequence[str] = NAMES, *, dtype: str | torch.dtype = "float32", device: str | torch.device = "cpu"
) -> Zoo:
    """Loads the zoo, preparing its target on the first call (a download of 93 MB, under a minute).

    Args:
        drafters: names of heads, see `NAMES`.
        dtype: the target's and the heads': a torch dtype, its name, or "auto" for the one the target is stored in (float32).
        device: where they go.

    Raises:
        TypeError: an argument of another type.
        ValueError: an unknown head or dtype.
        CheckpointError: a head, or the cached target, is missing or corrupt.
        ZooError: the target cannot be prepared, for want of space, of a network, or of a package of the extra `zoo`.
    """
    if isinstance(drafters, str) or not isinstance(drafters, Iterable):
        raise TypeError(f"drafters: expected a sequence of names, got {shown(drafters)}")
    drafters = tuple(drafters)
    for name in drafters:
        if name not in NAMES:
            raise ValueError(f"drafters: expected names among {', '.join(NAMES)}, got {name!r}")
    target, tokenizer = load_target(dtype=dtype_name(dtype), device=device)

    from hedgespec.zoo.storage import load_head  # which loads torch; the names above do not need it

    return Zoo(target, tokenizer, [load_head(head_path(name), target) for name in drafters])


def dtype_name(dtype: str | torch.dtype) -> str:
    """Returns "auto" or one of `DTYPES`, whichever way the dtype is given.

    Raises: TypeError or ValueError for anything else.
    """
    if type(dtype).__module__ == "torch" and type(dtype).__name__ == "dtype":
        dtype = str(dtype)
    expected = f"auto, a torch.dtype, or one of {', '.join(DTYPES)}"
    if not isinstance(dtype, str):
        raise TypeError(f"dtype: expected {expected}, got {shown(dtype)}")
    name = dtype.removeprefix("torch.")
    if name not in (*DTYPES, "auto"):
        raise ValueError(f"dtype: expected {expected}, got {dtype!r}")
    return name


def head_path(name: str) -> Path:
    """The file of one of the zoo's heads."""
    return FOLDER / "heads" / f"{name}.safetensors"


def load_prompts(domain: str | None = None) -> list[Prompt]:
    """Returns the held-out prompts of one domain, or of all: the mixed stream, a prompt of each domain in turn.

    Raises: TypeError or ValueError for a domain that is none.
    """
    if domain is not None:
        text("domain", domain, otherwise=" or None")
    lines = (FOLDER / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [Prompt(**json.loads(line)) for line in lines]
    if domain is not None and domain not in {prompt.domain for prompt in prompts}:
        raise ValueError(f"domain: expected one of {', '.join(EXPERTS)}, got {domain!r}")
    return [prompt for prompt in prompts if domain in (None, prompt.domain)]
