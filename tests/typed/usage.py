"""A user's program, checked by mypy and never run: the public names have the types that their documentation says.

`make types` reads it in strict mode. `assert_type` fails where a name is `Any` to a type checker.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, assert_type

import torch
from torch import nn

import hedgespec
from hedgespec.drafters import Drafter, DrafterSession
from hedgespec.drafters.datastore import Datastore, DatastoreDrafter
from hedgespec.drafters.eagle import EagleHead
from hedgespec.drafters.ngram import NGramDrafter
from hedgespec.learners import Learner
from hedgespec.records import Evaluation, Verdict

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Parrot(nn.Module):
    """A drafter written by a user: plain attributes, a buffer, a session."""

    draft_to_target: torch.Tensor | None

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.name, self.vocab_size = "parrot", vocab_size
        self.aux_layers: tuple[int, ...] = ()
        self.register_buffer("draft_to_target", None)

    def session(self) -> ParrotSession:
        return ParrotSession(self.vocab_size)


class ParrotSession:
    """One request of `Parrot`."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size, self.verified = vocab_size, 0

    def consume(self, tokens: torch.Tensor, features: torch.Tensor | None, logits_to_keep: int) -> torch.Tensor:
        self.verified += len(tokens)
        return nn.functional.one_hot(tokens[-logits_to_keep:], self.vocab_size).float().log()

    def step(self, token: torch.Tensor) -> torch.Tensor:
        return nn.functional.one_hot(token[0], self.vocab_size).float().log()


def drafters_are_drafters(head: EagleHead, store: Datastore) -> list[Drafter]:
    session: DrafterSession = Parrot(61).session()
    return [head, NGramDrafter(61), DatastoreDrafter(store, 61), Parrot(61)] if session.verified == 0 else []


def decode(target: PreTrainedModel, drafters: list[Drafter], prompt: torch.Tensor) -> None:
    config = hedgespec.DecodeConfig(draft_length=5, tree=hedgespec.Tree(2), proposal="argmax")
    decoder = hedgespec.Decoder(target, drafters, config)
    assert_type(decoder, hedgespec.Decoder)
    out = decoder.generate(prompt, max_new_tokens=8, temperature=0.0, seed=0)
    assert_type(out, hedgespec.DecodeOutput)
    assert_type(out.stats, list[hedgespec.DecodeStats])
    hedgespec.save_learner_state("state.json", out.stats[0])
    assert_type(hedgespec.learners.make("hedge", 2), Learner)
    hedgespec.accelerate(target, drafters, config)
    hedgespec.restore(target)


def checkpoints(target: PreTrainedModel, folder: Path) -> None:
    head = hedgespec.load_drafter(folder, target)
    assert_type(head, EagleHead)
    hedgespec.save_drafter(head, folder / "copy")


def kernels(target: torch.Tensor, drafter: torch.Tensor, tokens: torch.Tensor, uniforms: torch.Tensor) -> None:
    assert_type(hedgespec.evaluate(target, drafter, tokens), Evaluation)
    assert_type(hedgespec.verify(target, tokens, drafter[0], uniforms), Verdict)


def errors() -> type[Exception]:
    return hedgespec.errors.CheckpointError
