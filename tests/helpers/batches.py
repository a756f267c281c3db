"""A pool of drafters of every kind, and batches of it."""

from __future__ import annotations

from dataclasses import replace

import torch

from hedgespec.drafters.causal_lm import CausalLMDrafter
from hedgespec.drafters.eagle import EagleHead
from hedgespec.drafters.ngram import NGramDrafter
from helpers.decoding import VOCABULARY, prompt_of, tiny_head, tiny_llama


class Apart(EagleHead):
    """A head that is not stacked: a class of its own may do what it likes."""


def other_head(target, seed: int) -> EagleHead:
    """A head of another shape."""
    like = tiny_head(target, seed)
    head = EagleHead(replace(like.config, intermediate_size=20, aux_layers=(2, 3)), like.embedding, like.draft_to_target)
    head.name = f"other-{seed}"
    generator = torch.Generator().manual_seed(seed)
    for weight in head.double().parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.3, generator=generator)
    return head.requires_grad_(False).eval()


def pool(target, stacked: bool):
    heads = [tiny_head(target, 1), other_head(target, 2), tiny_head(target, 3), other_head(target, 4), tiny_head(target, 5)]
    if not stacked:
        for head in heads:
            head.__class__ = Apart
    small = CausalLMDrafter(tiny_llama(seed=7, layers=1), target, name="small")
    return [heads[0], small, *heads[1:], NGramDrafter(VOCABULARY)]


def batch_of(count: int) -> dict:
    """Prompts of different lengths, padded on the left."""
    lengths = [11, 3, 7, 1, 9][:count]
    ids = torch.zeros(count, max(lengths), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, -length:], mask[row, -length:] = prompt_of(row, length)[0], 1
    return {"input_ids": ids, "attention_mask": mask}
