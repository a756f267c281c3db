"""Reads the documentation: its code, commands, names and links; and small models that its examples run on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import hedgespec
from hedgespec.drafters.datastore import Datastore
from hedgespec.drafters.eagle import EagleConfig, EagleHead
from hedgespec.drafters.ngram import NGramDrafter

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "LICENSE-THIRD-PARTY.md", *sorted((ROOT / "docs").glob("*.md")))
MOST_NEW_TOKENS = 12
"""Examples that ask for more tokens get this many, so that they run quickly."""

_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: Path
    language: str
    code: str
    line: int
    """Lines of the page before the first line of the code."""


def blocks(page: Path, language: str) -> list[Block]:
    """Returns the fenced blocks of a page in one language, in order."""
    text = page.read_text()
    found = [
        Block(page, match[1], match[2], text.count("\n", 0, match.start(2)))
        for match in _FENCE.finditer(text)
        if match[1] == language
    ]
    return found


def prose(page: Path) -> str:
    """Returns the page without its fenced blocks."""
    return _FENCE.sub("", page.read_text())


def run(block: Block, namespace: dict[str, Any]) -> None:
    """Executes a block in a namespace. A traceback points at the line of the page."""
    code = re.sub(r"max_new_tokens=(\d+)", lambda found: f"max_new_tokens={min(int(found[1]), MOST_NEW_TOKENS)}", block.code)
    exec(compile("\n" * block.line + code, str(block.page), "exec"), namespace)


def commands(page: Path) -> Iterator[str]:
    """Yields every command line of console blocks and of indented blocks, continued lines joined, prompts removed."""
    console = "\n".join(block.code for block in blocks(page, "console"))
    indented = "\n".join(line[4:] for line in prose(page).splitlines() if re.match(r" {4}\S", line))
    for line in re.sub(r"\\\n\s*", "", f"{console}\n{indented}").splitlines():
        yield from (part.strip() for part in re.split(r"&&|;", line.removeprefix("$ ").partition("  #")[0]))


def slug(heading: str) -> str:
    """Returns the anchor of a heading, as GitHub and MkDocs make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)}


def links(page: Path) -> list[tuple[str, str]]:
    """Returns the targets of relative links and pictures as (path, anchor); either may be empty."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    return [tuple(target.partition("#")[::2]) for target in targets if "://" not in target and not target.startswith("mailto:")]


# Models


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer with one token a byte, a padding token and an end-of-sequence token: 258 ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: place for place, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def tiny_llama(seed: int = 0, layers: int = 4, vocab_size: int = 258) -> LlamaForCausalLM:
    """Returns a random Llama in float32. It has no end-of-sequence id, so texts have the length that is asked for."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.25, eos_token_id=None, bos_token_id=None,
        pad_token_id=256,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tiny_head(target: LlamaForCausalLM, seed: int) -> EagleHead:
    """Returns a random EAGLE-3 head for the target."""
    generator = torch.Generator().manual_seed(seed)
    config = EagleConfig(
        hidden_size=32, target_hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=48,
        vocab_size=258, draft_vocab_size=200, aux_layers=(1, 2, 3),
    )  # fmt: skip
    ids = torch.randperm(258, generator=generator)[:200].sort().values
    head = EagleHead(config, target.get_input_embeddings(), ids, name=f"head-{seed}")
    for weight in head.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.3, generator=generator)
    return head.requires_grad_(False).eval()


def prepare(folder: Path) -> dict[str, Any]:
    """Writes the files that pages name as path/to/... below a folder, and returns the names that pages assume."""
    tokenizer, target = byte_tokenizer(), tiny_llama()
    places = folder / "path" / "to"
    small = tiny_llama(seed=7, layers=1)
    for name, model in (("model", target), ("small-model", small)):
        model.save_pretrained(places / name)
        tokenizer.save_pretrained(places / name)
    heads = [tiny_head(target, 1), tiny_head(target, 2)]
    hedgespec.save_drafter(heads[0], places / "eagle3-head", target=target)
    Datastore.build([tokenizer("SELECT name FROM customers;").input_ids]).save(places / "code.safetensors")
    return {
        "__name__": "page", "target": target, "model": target, "tokenizer": tokenizer,
        "drafters": [*heads, NGramDrafter(target.config.vocab_size)],
        "prompt": tokenizer("SELECT name", return_tensors="pt").input_ids,
    }  # fmt: skip
