"""The target's own continuations of a domain's prompts, with the features a head learns from, cached in shards.

A head drafts what the target says next, so it is trained on what the target does say: three rows in five are continued
greedily, the others sampled at temperature 1. The hidden states are kept as they are computed: no second forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from hedgespec.utils.paths import cache_dir
from hedgespec.zoo.corpora import DOMAINS, Domain, prompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH = 64
GREEDY_IN_FIVE = 3


def aux_layers(num_hidden_layers: int) -> tuple[int, int, int]:
    """The three layers whose *input* an EAGLE-3 head reads by default: `(2, n // 2, n - 3)`."""
    return 2, num_hidden_layers // 2, num_hidden_layers - 3


@torch.inference_mode()
def continue_prompts(
    model: PreTrainedModel, prompt_ids: torch.Tensor, new_tokens: int, *, seed: int
) -> dict[str, torch.Tensor]:
    """Continues `prompt_ids` [B, P] by `new_tokens` and returns what training needs, L = P + new_tokens:

    tokens int32 [B, L]; length int32 [B] (tokens up to and with the end of the text); aux bfloat16 [B, L-1, 3*H], the
    inputs of the three aux layers; last float16 [B, L-1, H], the normed final hidden state; log_normalizer float32
    [B, L-1], logsumexp of the target's logits; best int32 [B, L-1], their argmax. Index t of these belongs to p(x_{t+1}).
    """
    from transformers import DynamicCache

    from hedgespec.runtime.compat import cache_argument

    device = model.device
    prompt_ids = prompt_ids.to(device)
    generator = torch.Generator(device).manual_seed(seed)
    greedy = torch.arange(len(prompt_ids), device=device) % 5 < GREEDY_IN_FIVE
    layers = aux_layers(model.config.num_hidden_layers)
    ends = torch.tensor(sorted({0, model.config.eos_token_id}), device=device)  # 0 is <|endoftext|>, between documents
    cache = DynamicCache(config=model.config)
    with_cache: dict[Any, Any] = {cache_argument(model.model.forward): cache, "use_cache": True}
    kept: dict[str, list[torch.Tensor]] = {name: [] for name in ("aux", "last", "log_normalizer", "best")}
    tokens = prompt_ids
    fresh = prompt_ids
    for _ in range(new_tokens):
        hidden = model.model(fresh, **with_cache, output_hidden_states=True).hidden_states
        kept["aux"].append(torch.cat([hidden[layer] for layer in layers], -1).bfloat16())
        kept["last"].append(hidden[-1].half())
        for position in range(fresh.shape[1]):  # one position at a time bounds the memory of the logits
            logits = model.lm_head(hidden[-1][:, position])
            kept["log_normalizer"].append(logits.logsumexp(-1, keepdim=True))
            kept["best"].append(logits.argmax(-1, keepdim=True).int())
        fresh = kept["best"][-1].long()
        fresh[~greedy] = torch.multinomial(logits[~greedy].softmax(-1), 1, generator=generator)
        tokens = torch.cat([tokens, fresh], 1)
    made = {name: torch.cat(parts, 1).contiguous().cpu() for name, parts in kept.items()}
    ended = torch.isin(tokens, ends)
    ended[:, : prompt_ids.shape[1]] = False
    length = torch.where(ended.any(1), ended.int().argmax(1) + 1, tokens.shape[1])
    return made | {"tokens": tokens.int().cpu(), "length": length.int().cpu()}


def prompt_batches(tokenizer: PreTrainedTokenizerBase, domain: Domain, count: int) -> list[torch.Tensor]:
    """About `count` training prompts as rectangular batches of token ids; chat prompts are grouped by their length."""
    if domain.chat:
        by_length: dict[int, list[list[int]]] = {}
        for _, text in prompts(domain, 560, side="train"):
            ids = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"]
            by_length.setdefault(len(ids), []).append(ids)
        rows = [ids for length in sorted(by_length) for ids in by_length[length]]
        groups = [by_length[length] for length in by_length if len(by_length[length]) >= BATCH // 2]
        return [torch.tensor(group[:BATCH]) for group in groups][: -(-count // BATCH)] if groups else [torch.tensor(rows[:1])]
    rows = []
    for _, text in prompts(domain, 2 * count, side="train", characters=7 * domain.prompt_tokens):
        ids = tokenizer(text)["input_ids"][: domain.prompt_tokens]
        if len(ids) == domain.prompt_tokens:
            rows.append(ids)
    return list(torch.tensor(rows[:count]).split(BATCH))


def shards(name: str) -> list[Path]:
    """The finished shards of a domain, in order."""
    return sorted((cache_dir() / "continuations").glob(f"{name}-*.safetensors"))


def collect(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompts_per_domain: int = 448,
    new_tokens: int = 128,
    domains: Sequence[str] = tuple(DOMAINS),
    report: Callable[[str], None] = print,
) -> None:
    """Writes every missing shard, a batch of each domain in turn, so that an interrupted run leaves all domains alike."""
    folder = cache_dir() / "continuations"
    folder.mkdir(parents=True, exist_ok=True)
    batches = {name: prompt_batches(tokenizer, DOMAINS[name], prompts_per_domain) for name in domains}
    for number in range(max(map(len, batches.values()))):
        for name in domains:
            group = batches[name]
            path = folder / f"{name}-{number:03d}.safetensors"
            if number < len(group) and not path.exists():
                made = continue_prompts(model, group[number], new_tokens, seed=1000 * number + list(DOMAINS).index(name))
                save_file(made, scratch := path.with_suffix(".part"))
                scratch.rename(path)
                report(f"{path.stem}: {tuple(made['tokens'].shape)} tokens")


def load(name: str) -> list[dict[str, torch.Tensor]]:
    """All shards of a domain."""
    return [load_file(path) for path in shards(name)]
