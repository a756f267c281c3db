"""All drafters of a batch: which of them run together, what they draft, and their teacher-forced logits."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from hedgespec.config import DecodeConfig
from hedgespec.decoder.chain_drafting import draft_chains, processed_logits
from hedgespec.decoder.groups import DrafterGroup, StackedHeads, UnstackedDrafters
from hedgespec.decoder.row import Row, draft_width, no_draft
from hedgespec.decoder.tree_drafting import draft_trees
from hedgespec.device import index_of
from hedgespec.drafters import Drafter
from hedgespec.drafters.stack import HeadStack
from hedgespec.ops.sampling import Sampling
from hedgespec.records import Choice, Draft

T = TypeVar("T")


@dataclass
class GroupLogits:
    """Teacher-forced logits of the drafters of one group."""

    group: DrafterGroup
    logits: torch.Tensor
    """[n, R, T, Vd] for each row's last `count` tokens, T the longest count; undefined before and after a row's own."""


class Pool:
    """The drafters of a batch.

    Args:
        drafters: the N drafters.
        stacks: the heads that are stacked, as (indices, stack).
        rows: the B rows, before their first token.
        config: the decoder's configuration.
        sampling: how drafts are sampled.
        one_hot: whether proposals are the most likely tokens.
    """

    def __init__(self, drafters: Sequence[Drafter], stacks: Sequence[tuple[list[int], HeadStack]], rows: Sequence[Row],
                 config: DecodeConfig, sampling: Sampling, one_hot: bool):  # fmt: skip
        self.drafters, self.rows, self.config = drafters, list(rows), config
        self.sampling, self.one_hot = sampling, one_hot
        self.groups: list[DrafterGroup] = [
            StackedHeads(members, stack, len(rows), config.drafter_window, config.compile) for members, stack in stacks
        ]
        stacked = {index for members, _ in stacks for index in members}
        shapes: dict[tuple[int, bool], list[int]] = {}
        for index, drafter in enumerate(drafters):
            if index not in stacked:
                shapes.setdefault((draft_width(drafter), drafter.draft_to_target is not None), []).append(index)
        self.groups += [UnstackedDrafters(members, [drafters[one] for one in members], rows) for members in shapes.values()]

    @property
    def cache_bytes(self) -> int:
        """Bytes of the stacked heads' keys and values."""
        return sum(group.cache_bytes for group in self.groups)

    def keep_rows(self, places: Sequence[int]) -> None:
        """Continues with the rows at these places of the batch only."""
        self.rows = [self.rows[place] for place in places]
        for group in self.groups:
            group.keep_rows(places)

    def teacher_forced_logits(self, rows: Sequence[Row]) -> list[GroupLogits]:
        """Lets all drafters consume the verified tokens of some rows. Returns their logits for the tokens in each row's
        `backlog`, by group."""
        counts = [row.backlog.count for row in rows]
        found = []
        for number in range(len(self.groups)):
            logits = self._or_unstacked(number, lambda group: group.teacher_forced_logits(rows, counts))
            found.append(GroupLogits(self.groups[number], logits))
        return found

    def draft(self, choices: Sequence[Choice], uniforms: torch.Tensor, noise: torch.Tensor | None = None,
              clock: Callable[[], float] | None = None) -> list[Draft]:  # fmt: skip
        """Drafts with the chosen drafter of each row. A row's draft is empty where none is chosen or its drafter fails.

        Args:
            choices: for each of the B rows.
            uniforms: floating [B, K]; uniforms[b, k] draws the k-th token of row b. For a tree see `draft_trees`.
            noise: float32 [B, at least K, V], added to the logits first, see `perturb`; None adds nothing.
            clock: returns seconds, once the device is done; called around the draft of each group. None measures nothing.
        """
        drafts = [no_draft(row) for row in self.rows]
        for number, group in enumerate(self.groups):
            places = [place for place, choice in enumerate(choices) if choice.drafter in group.members]
            if not places:
                continue
            at = index_of(places, self.rows, uniforms.device)
            rows, chosen = [self.rows[place] for place in places], [choices[place] for place in places]
            arguments = rows, chosen, uniforms[at], None if noise is None else noise[at]
            began = clock() if clock else 0.0
            found = self._or_unstacked(number, self._draft_with, *arguments)
            if clock:
                each = (clock() - began) / max(1, *(draft.tokens.shape[0] for draft in found))
                found = [replace(draft, seconds_per_token=each) for draft in found]
            for place, draft in zip(places, found):
                drafts[place] = draft
        return drafts

    def _draft_with(self, group: DrafterGroup, rows: Sequence[Row], choices: Sequence[Choice], uniforms: torch.Tensor,
                    noise: torch.Tensor | None) -> list[Draft]:  # fmt: skip
        process = None if rows[0].request.process_drafts is None else processed_logits
        if self.config.tree is None:
            return draft_chains(group, rows, choices, uniforms, self.sampling, self.one_hot, process, noise)
        return draft_trees(
            group, rows, choices, uniforms, self.sampling, self.one_hot, self.config.tree, self.config.draft_length, process,
            noise,
        )  # fmt: skip

    def _or_unstacked(self, number: int, call: Callable[..., T], *arguments: Any) -> T:
        """Calls a group. If a stack fails, its heads run one by one from then on, and those that fail are dropped."""
        try:
            return call(self.groups[number], *arguments)
        except Exception as error:
            members = self.groups[number].members
            if isinstance(self.groups[number], UnstackedDrafters):
                raise
            warnings.warn(f"stacked heads run one by one from now on: {type(error).__name__}: {error}", stacklevel=1)
        self.groups[number] = None  # frees its memory, which may be what is missing
        self.groups[number] = UnstackedDrafters(members, [self.drafters[index] for index in members], self.rows)
        return call(self.groups[number], *arguments)
