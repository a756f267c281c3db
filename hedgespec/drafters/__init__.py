"""What a drafter is: something that, token by token, says what the target may say next.

A drafter holds weights and can serve many requests; a request's state (its KV cache) is a session. A session is fed
every verified token by `prefill`, which is also how it is evaluated, and drafts ahead of them by `step`; the next
`prefill` forgets what was drafted.
"""

from __future__ import annotations

from typing import Protocol

import torch


class DrafterSession(Protocol):
    """One request's view of a drafter."""

    verified: int
    """How many verified tokens the session has taken in."""

    def prefill(self, tokens: torch.Tensor, features: torch.Tensor | None, logits_to_keep: int) -> torch.Tensor:
        """Takes in the verified tokens that follow the last call's, forgetting whatever was drafted since.

        Args:
            tokens: int64 [T], T >= 1.
            features: [T, num_aux * Ht], the target's hidden states at the position before each token; None for a
                drafter without `aux_layers`. The row of a request's first token is not read.
            logits_to_keep: how many of the last positions' logits to return, 1..T.
        Returns: [logits_to_keep, Vd], the logits for the token after each.
        """

    def step(self, token: torch.Tensor) -> torch.Tensor:
        """Takes in one drafted token, as the target's id, int64 [1], and returns the logits [Vd] for the next."""


class Drafter(Protocol):
    """Weights that can draft for a target."""

    # Properties, so that a checker accepts plain attributes, class attributes and a module's buffers alike.

    @property
    def name(self) -> str:
        """Shown in statistics; distinct within a pool."""

    @property
    def vocab_size(self) -> int:
        """Ids the drafter can name, in the target's numbering, lie in 0..vocab_size-1."""

    @property
    def draft_to_target(self) -> torch.Tensor | None:
        """int64 [Vd], the target's id of each draft id; None where Vd is the target's V."""

    @property
    def aux_layers(self) -> tuple[int, ...]:
        """Layers of the target whose inputs the drafter reads, the number of its layers standing for what its final norm gives;
        empty for a drafter that needs tokens only."""

    def session(self) -> DrafterSession:
        """A fresh request."""
