"""`hedgespec zoo train`: held-out prompts, continuations, stores, heads, each only where it is missing, and the acceptance
matrix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from hedgespec.utils.paths import cache_dir
from hedgespec.zoo import EXPERTS, NAMES, STAGES, continuations, corpora, matrix, stores, train
from hedgespec.zoo.storage import load_head
from hedgespec.zoo.target import load_target

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HELD_OUT_PROMPTS = 40
HELD_OUT_CHARACTERS = 250


def run(names: tuple[str, ...] | None = None, stage: str = "all", out: Path | None = None, *, console: Console) -> Path:
    """Reproduces the zoo and returns the folder its heads are in.

    Args:
        names: heads to train, and stores to make, see `hedgespec.zoo.NAMES`; None is all. An expert starts from the generalist.
        stage: one of `STAGES`, or "all".
        out: where heads and matrix go; None is a folder in the cache.
        console: where progress is shown.

    Raises: ValueError for an unknown head or stage; ZooError if a corpus cannot be fetched.
    """
    for name in names or ():
        if name not in NAMES:
            raise ValueError(f"names: expected among {', '.join(NAMES)}, got {name!r}")
    if stage not in (*STAGES, "all"):
        raise ValueError(f"stage: expected all or one of {', '.join(STAGES)}, got {stage!r}")
    folder = out or cache_dir() / "heads"
    folder.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    target, tokenizer = load_target(device=device)
    if stage in ("collect", "all"):
        if not (folder / "prompts.jsonl").exists():
            write_prompts(folder / "prompts.jsonl")
        continuations.collect(target, tokenizer, report=console.print)
    if stage in ("stores", "all"):
        stores.build(folder, tuple(names or NAMES), report=console.print)
    if stage in ("heads", "all"):
        train.train(target, names or NAMES, folder=folder, report=console.print)
    if stage in ("matrix", "all"):
        _matrix(target, tokenizer, folder, console)
    return folder


def write_prompts(path: Path) -> None:
    """The held-out prompts of the mixed stream, a prompt of each domain in turn, cut at a word."""
    found = {
        name: corpora.prompts(corpora.DOMAINS[name], HELD_OUT_PROMPTS, side="held_out", seed=7, characters=HELD_OUT_CHARACTERS)
        for name in EXPERTS
    }
    with path.open("w", encoding="utf-8") as file:
        for number in range(HELD_OUT_PROMPTS):
            for name in EXPERTS:
                document, text = found[name][number]
                domain = corpora.DOMAINS[name]
                entry = {"domain": name, "text": text[: text.rindex(text.split()[-1])].rstrip(), "document": document,
                         "source": domain.source, "licence": domain.licence}  # fmt: skip
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def _matrix(target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, console: Console) -> None:
    """Writes the acceptance matrix, with what the compact storage costs where the uncompressed heads are still there."""
    heads = [load_head(folder / f"{name}.safetensors", target) for name in NAMES]
    texts = matrix.held_out_texts(target, tokenizer, cache_dir() / "held-out.json", report=console.print)
    result = matrix.measure(target, heads, texts)
    result["own_expert_mat"] = _own_mat(result)
    exact = [folder / f"{name}.float.pt" for name in NAMES]
    if all(path.exists() for path in exact):
        for head, path in zip(heads, exact, strict=True):
            head.load_state_dict(torch.load(path, weights_only=True))
        result["own_expert_mat_uncompressed"] = _own_mat(matrix.measure(target, heads, texts))
    matrix.write(result, folder)
    console.print(matrix.table(result), markup=False)


def _own_mat(result: dict) -> float:
    """Mean over domains of what the domain's own expert emits a round."""
    return round(sum(result["emitted_per_round"][name][name] for name in EXPERTS) / len(EXPERTS), 4)
