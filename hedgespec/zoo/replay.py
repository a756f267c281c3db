"""What one drafter alone would have done on a text that is known already.

At temperature 0 the text does not depend on who drafts, so a fixed drafter's rounds follow from the text and its features
without another forward of the target: drafts are compared with what was emitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hedgespec.drafters import Drafter
from hedgespec.ops.evaluate import evaluate
from hedgespec.runtime.target import TargetSession

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Text:
    """A prompt with the target's continuation, and what the target computed over it."""

    tokens: torch.Tensor
    """int64 [L]."""
    prompt_length: int
    logits: torch.Tensor
    """[L - P, V]: row t scores token P + t."""
    features: dict[tuple[int, ...], torch.Tensor]
    """By `Drafter.aux_layers`: [L, width], row t at the position before token t."""


@torch.inference_mode()
def read(target: PreTrainedModel, tokens: torch.Tensor, prompt_length: int, drafters: Sequence[Drafter]) -> Text:
    """One forward of the target over a whole text."""
    session = TargetSession(target, (drafter.aux_layers for drafter in drafters))
    [logits] = session.forward(tokens[None, :-1], len(tokens) - prompt_length)
    session.keep([len(tokens) - 1])
    return Text(tokens, prompt_length, logits, {layers: rows[:] for layers, rows in session.features[0].items()})


@torch.inference_mode()
def fixed_rounds(drafter: Drafter, text: Text, draft_length: int) -> list[int]:
    """Tokens emitted by each round, [R], if `drafter` alone had drafted this greedy text. The first token has no round."""
    session = drafter.session()
    features = text.features.get(drafter.aux_layers)
    length, emitted = text.prompt_length + 1, []
    while length < len(text.tokens):
        new = slice(session.verified, length)
        row = session.consume(text.tokens[new], None if features is None else features[new], 1)[-1]
        accepted, room = 0, min(draft_length, len(text.tokens) - length - 1)
        while accepted < room:
            token = row.argmax()
            if drafter.draft_to_target is not None:
                token = drafter.draft_to_target[token]
            if token != text.tokens[length + accepted]:
                break
            accepted += 1
            if accepted < room:
                row = session.step(token.view(1))
        emitted.append(accepted + 1)
        length += accepted + 1
    return emitted


@torch.inference_mode()
def teacher_forced(drafters: Sequence[Drafter], text: Text, temperature: float) -> torch.Tensor:
    """acceptance_prob [N, L - P - 1] at every token of the continuation after the first, along the text itself."""
    start = text.prompt_length + 1
    prob = []
    for drafter in drafters:
        features = text.features.get(drafter.aux_layers)
        logits = drafter.session().consume(
            text.tokens[:-1], None if features is None else features[:-1], len(text.tokens) - start
        )
        mapping = drafter.draft_to_target
        result = evaluate(
            text.logits[None, 1:], logits[None, None], text.tokens[None, start:],
            draft_to_target=None if mapping is None else mapping[None],
            target_temperature=temperature, drafter_temperature=temperature,
        )  # fmt: skip
        prob.append(result.acceptance_prob[0, 0])
    return torch.stack(prob)
