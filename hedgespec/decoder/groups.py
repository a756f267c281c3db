"""Groups of drafters that run together: equal EAGLE heads as one stack, any other drafter with one session for each row.

Both groups have the same methods. `teacher_forced_logits` lets all drafters of the group consume the verified tokens,
`begin_draft` brings the drafter of each row up to date and returns the logits of its first draft token, and `draft_next` (in a
tree `draft_level`) continues the draft.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce

import numpy as np
import torch

from hedgespec.decoder.row import Row, draft_width
from hedgespec.device import to_device
from hedgespec.drafters import Drafter, DrafterSession, open_session
from hedgespec.drafters.eagle import EagleHead
from hedgespec.drafters.stack import HeadStack
from hedgespec.drafters.stack_weights import is_plain, kind_of

NON_FINITE_LOGITS = "expected logits with a finite maximum, got NaN, +inf or -inf throughout"
"""The maximum of a row of logits shows all three."""


class StackedHeads:
    """EAGLE heads of one shape, stacked, for the rows of a batch.

    Args:
        members: indices of the heads in the pool.
        stack: their weights.
        batch: B, number of rows.
        window, captured: see `HeadStack.session`.
    """

    branching: int | None = None
    """Tokens that a drafter can continue from at one depth of a tree; None: any number."""

    def __init__(self, members: Sequence[int], stack: HeadStack, batch: int, window: int | None, captured: bool):
        self.members, self.maps, self.map_of = list(members), stack.maps, stack.map_of
        self.layers = stack.config.aux_layers
        self.session = stack.session(batch, window, captured=captured)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the heads' keys and values."""
        return self.session.cache_bytes

    def keep_rows(self, places: Sequence[int]) -> None:
        """Continues with the rows at these places of the batch only."""
        self.session.keep_rows(places)

    def teacher_forced_logits(self, rows: Sequence[Row], counts: Sequence[int]) -> torch.Tensor:
        """Consumes all verified tokens of some rows.

        Args:
            rows: R rows.
            counts: for each row the number of verified tokens that the heads have not been scored on.

        Returns: [n, R, T, Vd], the logits of the n heads for each row's last `counts` tokens, T the longest count.
        """
        places = [row.place for row in rows]
        return self.session.score(places, *self._unread(rows, self.session.scored[places]), counts)

    def begin_draft(self, rows: Sequence[Row], members: Sequence[int]) -> tuple[list[int], torch.Tensor]:
        """Begins a draft in some rows, in each with one head of the group.

        Returns: which of the rows draft, as indices into `rows`, and the logits [R', Vd] for their first tokens.
        """
        places = [row.place for row in rows]
        consumed = self.session.consumed[members, places]
        return list(range(len(rows))), self.session.begin_draft(places, members, *self._unread(rows, consumed))

    def draft_next(self, chosen: Sequence[int], tokens: torch.Tensor) -> tuple[list[int], torch.Tensor]:
        """Consumes one draft token int64 [R] of each row that continues.

        Args:
            chosen: the rows that continue, as indices among those that drafted last.
            tokens: their draft tokens.

        Returns: as `begin_draft`.
        """
        return list(range(len(chosen))), self.session.draft_next(chosen, tokens)

    def draft_level(
        self, drafting: Sequence[int], tokens: torch.Tensor, parents: torch.Tensor
    ) -> tuple[Sequence[int], torch.Tensor]:
        """Consumes the next depth of the trees of all rows that drafted last.

        Args:
            drafting: indices of the rows that continue; stacked heads ignore it and continue all.
            tokens: int64 [R, F].
            parents: int64 [R, F], the parent of each token, see `StackSession.draft_level`.

        Returns: which rows continue, and the logits [R', F, Vd] that follow.
        """
        return range(len(tokens)), self.session.draft_level(tokens, parents)

    def _unread(self, rows: Sequence[Row], consumed: np.ndarray) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        parts = [row.unread(count, self.layers) for row, count in zip(rows, consumed.tolist())]
        return [tokens for tokens, _ in parts], [features for _, features in parts]


class UnstackedDrafters:
    """Drafters whose logits have the same shape, each with one session for each row.

    A session that raises takes its drafter out of that row only.

    Args:
        members: indices of the drafters in the pool.
        drafters: the drafters.
        rows: rows of the batch.
    """

    branching = 1
    """See `StackedHeads.branching`: a session consumes one token after another."""
    cache_bytes = 0
    """Unknown for sessions of any kind."""

    def __init__(self, members: Sequence[int], drafters: Sequence[Drafter], rows: Sequence[Row]):
        self.members, self.drafters, self.rows = list(members), list(drafters), list(rows)
        self.maps = self.map_of = None
        if drafters[0].draft_to_target is not None:
            own = [drafter.draft_to_target for drafter in drafters]
            self.maps = torch.stack([one.to(rows[0].tokens.device) for one in own if one is not None])
            self.map_of = list(self.maps)
        self.sessions: dict[tuple[int, int], DrafterSession] = {}
        """By (row index, member)."""
        self.pending_logits: dict[tuple[int, int], list[torch.Tensor]] = {}
        """By (row index, member): logits in chunks [T, Vd], for every token that the drafter is not scored on and for the
        next one."""
        for row in rows:
            for member, drafter in enumerate(self.drafters):
                with row.isolate_failures(self.members[member]):
                    self.sessions[row.index, member] = open_session(drafter)
        self._drafting: list[tuple[Row, int]] = []
        self._places: dict[int, int] = {}
        """In a tree: index into `_drafting` of each row that drafts."""

    def keep_rows(self, places: Sequence[int]) -> None:
        """Continues with the rows at these places of the batch only."""
        self.rows = [self.rows[place] for place in places]
        left = {row.index for row in self.rows}
        for held in (self.sessions, self.pending_logits):
            for key in [key for key in held if key[0] not in left]:
                del held[key]

    def teacher_forced_logits(self, rows: Sequence[Row], counts: Sequence[int]) -> torch.Tensor:
        """See `StackedHeads.teacher_forced_logits`; zeros for drafters that were dropped."""
        known: dict[tuple[int, int], torch.Tensor] = {}
        for place, (row, count) in enumerate(zip(rows, counts)):
            for member, drafter in enumerate(self.members):
                if not row.alive[drafter]:
                    continue
                with row.isolate_failures(drafter):
                    self._consume(row, member, count)
                    logits = torch.cat(self.pending_logits[row.index, member])
                    known[member, place], self.pending_logits[row.index, member] = logits[:-1], [logits[-1:]]
        width = draft_width(self.drafters[0])
        dtype = reduce(torch.promote_types, (logits.dtype for logits in known.values()), torch.float32)
        out = rows[0].tokens.new_zeros(len(self.members), len(rows), max(counts), width, dtype=dtype)
        for (member, place), logits in known.items():
            out[member, place, : len(logits)] = logits
        return out

    def begin_draft(self, rows: Sequence[Row], members: Sequence[int]) -> tuple[list[int], torch.Tensor]:
        """See `StackedHeads.begin_draft`."""
        self._drafting = list(zip(rows, members))
        going, logits = self._each(lambda row, member, place: self._consume(row, member, row.backlog.count))
        self._places = {row: place for place, row in enumerate(going)}
        return going, logits

    def draft_next(self, chosen: Sequence[int], tokens: torch.Tensor) -> tuple[list[int], torch.Tensor]:
        """See `StackedHeads.draft_next`."""
        self._drafting = [self._drafting[place] for place in chosen]

        def one(row: Row, member: int, place: int) -> torch.Tensor:
            logits = self.sessions[row.index, member].step(tokens[place : place + 1])
            return self._checked(member, logits[None], 1)

        return self._each(one)

    def draft_level(
        self, drafting: Sequence[int], tokens: torch.Tensor, parents: torch.Tensor
    ) -> tuple[list[int], torch.Tensor]:
        """See `StackedHeads.draft_level`, with F = 1: the parent of every token is the last one consumed."""
        standing = [self._places[row] for row in drafting]
        answered, logits = self.draft_next(standing, tokens[to_device(drafting, tokens.device), 0])
        going = [drafting[place] for place in answered]
        self._places = {row: place for place, row in enumerate(going)}
        return going, logits[:, None]

    def _each(self, ask: Callable[[Row, int, int], torch.Tensor]) -> tuple[list[int], torch.Tensor]:
        """Calls `ask` for every row that drafts. Returns the rows that did not fail, which alone continue, and the last row of
        each answer, stacked."""
        going, answers = [], []
        for place, (row, member) in enumerate(self._drafting):
            with row.isolate_failures(self.members[member]):
                answers.append(ask(row, member, place)[-1])
                going.append(place)
        self._drafting = [self._drafting[place] for place in going]
        return going, torch.stack(answers) if answers else torch.empty(0)

    def _consume(self, row: Row, member: int, unscored: int) -> torch.Tensor:
        """Runs a session over the verified tokens that it lacks, in one chunk. Returns the last chunk of its logits, [.., Vd].

        Of a fresh session only the logits of the unscored tokens and the last ones are kept.
        """
        session, chunks = self.sessions[row.index, member], self.pending_logits.setdefault((row.index, member), [])
        tokens, features = row.unread(session.verified, self.drafters[member].aux_layers)
        if len(tokens):
            before = session.verified
            keep = len(tokens) if before else unscored + 1
            logits = self._checked(member, session.consume(tokens, features, keep), keep)
            if session.verified != before + len(tokens):
                raise ValueError(
                    f"expected consume to add its {len(tokens)} tokens to `verified`, {before} before, got {session.verified}"
                )
            if not row.selector.needs_scores:
                chunks.clear()  # the earlier ones are never asked for
            chunks.append(logits)
        return chunks[-1]

    def _checked(self, member: int, logits: torch.Tensor, rows: int) -> torch.Tensor:
        """Returns the logits [rows, Vd]; raises if a session returned anything else."""
        width = draft_width(self.drafters[member])
        if logits.shape != (rows, width):
            raise ValueError(f"expected logits of shape {(rows, width)}, got {tuple(logits.shape)}")
        if not logits.is_floating_point():
            raise TypeError(f"expected floating-point logits, got {logits.dtype}")
        if logits.device != self.rows[0].tokens.device:
            raise ValueError(f"expected logits on {self.rows[0].tokens.device}, got them on {logits.device}")
        if not all(map(math.isfinite, logits.amax(-1).tolist())):
            raise ValueError(NON_FINITE_LOGITS)
        return logits


DrafterGroup = StackedHeads | UnstackedDrafters


def stacks_of(drafters: Sequence[Drafter]) -> list[tuple[list[int], HeadStack]]:
    """Stacks the EAGLE heads among the drafters, one stack for each shape. Returns their indices and the stacks."""
    kinds: dict[tuple, dict[int, EagleHead]] = {}
    for index, drafter in enumerate(drafters):
        if is_plain(drafter):
            kinds.setdefault(kind_of(drafter), {})[index] = drafter
    return [(list(heads), HeadStack(list(heads.values()))) for heads in kinds.values()]
