"""Small targets, drafters and prompts that the tests of the decoder share."""

from __future__ import annotations

import math

import pytest
import torch

from hedgespec.drafters.ngram import NGramDrafter
from helpers.tiny_models import AUX_LAYERS as AUX
from helpers.tiny_models import DRAFT_VOCABULARY, VOCABULARY, WIDTH, tiny_head, tiny_llama
from helpers.tiny_models import tiny_pool as pool

__all__ = ["AUX", "DRAFT_VOCABULARY", "VOCABULARY", "WIDTH", "pool", "tiny_head", "tiny_llama"]


@pytest.fixture(scope="module")
def target():
    return tiny_llama(seed=0, layers=4)


def prompt_of(seed: int, length: int = 11) -> torch.Tensor:
    return torch.randint(VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))


def as_functions(target, drafters):
    """The models as algorithm.py wants them: everything computed anew, from the start, every time."""

    def target_logits(tokens):
        return target(torch.tensor([tokens])).logits[0, -1]

    def of(drafter):
        def logits(verified, drafted):
            features = None
            if drafter.aux_layers:
                hidden = target(torch.tensor([verified]), output_hidden_states=True).hidden_states
                at = torch.cat([hidden[layer][0] for layer in drafter.aux_layers], -1)
                features = torch.cat([torch.zeros_like(at[:1]), at[:-1]])
            session = drafter.session()
            row = session.consume(torch.tensor(verified), features, 1)[-1]
            for token in drafted:
                row = session.step(torch.tensor([token]))
            if drafter.draft_to_target is None:
                return row
            return torch.full((VOCABULARY,), -math.inf, dtype=row.dtype).index_put((drafter.draft_to_target,), row)

        return logits

    return target_logits, [of(drafter) for drafter in drafters]


class Broken(NGramDrafter):
    """Fails, or returns nonsense, once it has taken in some tokens."""

    def __init__(self, fault):
        super().__init__(VOCABULARY, name="broken")
        self.fault = fault

    def session(self):
        session = super().session()
        consume = session.consume

        def faulty(tokens, features, logits_to_keep):
            logits = consume(tokens, features, logits_to_keep)
            return self.fault(logits) if session.verified > 15 else logits

        session.consume = faulty
        return session
