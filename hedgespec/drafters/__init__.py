"""The protocol of drafters, which propose the tokens that the target may emit next.

A drafter holds weights and can serve many requests; the state of one request, such as a key-value cache, is a session.
`consume` runs a session over verified tokens and returns the logits that the drafter is scored on; `step` consumes one
drafted token. The next `consume` discards what was drafted.
"""

from __future__ import annotations

import warnings
from typing import Any, Protocol

import torch


class DrafterSession(Protocol):
    """The state of one request in a drafter."""

    verified: int
    """Number of verified tokens consumed so far."""

    def consume(self, tokens: torch.Tensor, features: torch.Tensor | None, logits_to_keep: int) -> torch.Tensor:
        """Consumes the verified tokens that follow the last call's, and discards what was drafted since.

        Args:
            tokens: int64 [T], T >= 1.
            features: [T, num_aux * Ht], the target's hidden states at the position before each token; None for a
                drafter without `aux_layers`. The row of a request's first token is ignored.
            logits_to_keep: number of last positions whose logits are returned, 1..T.
        Returns: [logits_to_keep, Vd], the logits for the token after each of them.
        """

    def step(self, token: torch.Tensor) -> torch.Tensor:
        """Consumes one drafted token, int64 [1], the target's id, and returns the logits [Vd] for the next one."""


class Drafter(Protocol):
    """Weights that can draft for a target."""

    # Properties, so that a checker accepts plain attributes, class attributes and a module's buffers alike.

    @property
    def name(self) -> str:
        """Name in statistics; distinct within a pool."""

    @property
    def vocab_size(self) -> int:
        """The drafter proposes target ids in 0..vocab_size-1 only."""

    @property
    def draft_to_target(self) -> torch.Tensor | None:
        """int64 [Vd], the target's id of each draft id; None if draft ids are target ids."""

    @property
    def aux_layers(self) -> tuple[int, ...]:
        """Layers of the target whose inputs the drafter reads; the number of its layers stands for the output of the final
        norm. Empty for a drafter that needs tokens only."""

    def session(self) -> DrafterSession:
        """Returns the state of a new request."""


def open_session(drafter: Drafter) -> DrafterSession:
    """Returns a new session of the drafter.

    For one release a session may define `consume` under its old name, `prefill`; this warns with a DeprecationWarning.
    """
    session = drafter.session()
    if not hasattr(session, "consume") and hasattr(session, "prefill"):
        warnings.warn(
            f"drafter {drafter.name}: the method `prefill` of a session is now `consume`; the old name goes with the next "
            "release",
            DeprecationWarning,
            stacklevel=2,
        )
        return _RenamedSession(session)
    return session


class _RenamedSession:
    """A session whose `consume` is called `prefill`."""

    def __init__(self, session: Any):
        self._session = session
        self.verified = session.verified

    def consume(self, tokens: torch.Tensor, features: torch.Tensor | None, logits_to_keep: int) -> torch.Tensor:
        logits = self._session.prefill(tokens, features, logits_to_keep)
        self.verified = self._session.verified
        return logits

    def step(self, token: torch.Tensor) -> torch.Tensor:
        return self._session.step(token)
