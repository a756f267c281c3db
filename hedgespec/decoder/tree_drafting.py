"""Drafting of trees: one depth after another, for all rows that draft with the same group of drafters.

Shapes do not depend on the tokens drafted, so the host never waits for the device: a node that does not exist has the token -1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hedgespec.config import Tree
from hedgespec.decoder.chain_drafting import Process
from hedgespec.decoder.groups import DrafterGroup
from hedgespec.decoder.row import Row, no_draft
from hedgespec.device import to_device
from hedgespec.ops.gumbel import perturb
from hedgespec.ops.sampling import Sampling
from hedgespec.ops.verify import sample
from hedgespec.records import Choice, Draft


@dataclass
class _Frontier:
    """The nodes that get children next, F for each of R rows; at first the root alone."""

    logits: torch.Tensor
    """[R, F, Vd], the drafters' logits behind each node."""
    alive: torch.Tensor
    """bool [R, F], whether the node exists and is expanded."""
    numbers: torch.Tensor
    """int64 [R, F], index of the node among all nodes of the tree; -1 for the root."""
    entries: torch.Tensor
    """int64 [R, F], index of the node among those that the drafter has consumed; 0 for the root."""
    scores: torch.Tensor
    """[R, F], log-probability of the path to the node; dynamic trees only."""


class _Trees:
    """The trees of some rows while they are drafted; `draft_trees` has the arguments."""

    def __init__(self, group: DrafterGroup, rows: Sequence[Row], choices: Sequence[Choice], uniforms: torch.Tensor,
                 sampling: Sampling, one_hot: bool, tree: Tree, process: Process | None,
                 noise: torch.Tensor | None) -> None:  # fmt: skip
        self.group, self.rows, self.choices, self.uniforms = group, rows, choices, uniforms
        self.sampling, self.one_hot, self.tree, self.process, self.noise = sampling, one_hot, tree, process, noise
        self.device, self.count = uniforms.device, len(rows)
        self.members = [group.members.index(choice.drafter) for choice in choices]
        self.which = to_device(self.members, self.device)[:, None, None]
        self.limits = to_device([choice.draft_length for choice in choices], self.device)[:, None]
        self.maps = None
        """int64 [R, 1, Vd], the vocabulary map of each row's drafter; None where logits are over the target's vocabulary."""
        if group.maps is not None and process is None:
            self.maps = group.maps[self.which[:, :, 0]]
        self.rule = sampling if noise is None else Sampling()
        self.paths: list[list[list[torch.Tensor]]] = [[[]] for _ in rows]
        """Of each row: the draft tokens on the path to each node of the frontier; with processors only."""
        self.finite = torch.ones(self.count, dtype=torch.bool, device=self.device)
        """bool [R]: whether the logits of all nodes had a finite maximum."""
        self.tokens: list[torch.Tensor] = []
        self.parents: list[torch.Tensor] = []
        self.scores: list[torch.Tensor] = []
        self.origins: list[torch.Tensor] = []
        self.sources: list[torch.Tensor] = []
        """Logits from which the children of the nodes `origins` were sampled."""
        self.known = self.consumed = self.drawn = 0
        """Numbers of nodes, of nodes that the drafter has consumed, and of uniforms used."""

    def draft(self) -> set[int]:
        """Drafts all depths. Returns the rows that have a draft."""
        self.drafting: Sequence[int]
        self.drafting, given = self.group.begin_draft(self.rows, self.members)
        begun, depths = set(self.drafting), max(choice.draft_length for choice in self.choices)
        if not begun:
            return begun
        root = torch.full((self.count, 1), -1, device=self.device)
        self.frontier = _Frontier(
            _everyone(given[:, None], self.drafting, self.count),
            torch.ones(self.count, 1, dtype=torch.bool, device=self.device),
            root, root + 1, torch.zeros(self.count, 1, device=self.device),
        )  # fmt: skip
        for depth in range(depths):
            self._prepare_logits(depth)
            valid = self._add_children(depth)
            self.drafting = [row for row in self.drafting if self.choices[row].draft_length > depth + 1]
            if not self.drafting or not self._consume_children(depth, valid):
                break
        return begun

    def _prepare_logits(self, depth: int) -> None:
        """Applies processors and noise to the logits of the frontier, and marks nodes without a finite maximum."""
        frontier = self.frontier
        finite = frontier.logits.amax(-1).isfinite()
        self.finite, frontier.alive = self.finite & (finite | ~frontier.alive).all(1), frontier.alive & finite
        frontier.logits = torch.where(finite[..., None], frontier.logits, 0.0)
        if self.process is not None:
            logits = _process(self.process, self.rows, self.choices, frontier.logits, frontier.alive, self.paths)
            finite = logits.amax(-1).isfinite()  # false where no token that the drafter can propose is allowed
            frontier.logits, frontier.alive = torch.where(finite[..., None], logits, 0.0), frontier.alive & finite
        if self.noise is not None:
            frontier.logits = perturb(
                frontier.logits, self.noise[:, depth, None], temperature=self.sampling.temperature,
                threshold=self.sampling.threshold(frontier.logits), draft_to_target=self.maps,
            )  # fmt: skip

    def _add_children(self, depth: int) -> torch.Tensor:
        """Adds the children of the frontier to the tree. Returns which of them exist, bool [R, F * children]."""
        frontier, tree = self.frontier, self.tree
        logits, threshold = frontier.logits, self.rule.threshold(frontier.logits)
        self.children = tree.children(depth)
        if self.one_hot:
            self.children = min(self.children, logits.shape[2])
            values, picks = logits.topk(self.children, dim=-1)
            valid = values.isfinite() if threshold is None else values.isfinite() & (values >= threshold[..., None])
        else:
            own = self.uniforms[:, self.drawn : self.drawn + logits.shape[1] * self.children]
            self.drawn += own.shape[1]
            own = own.view(self.count, -1, self.children)
            picks = sample(logits, own, temperature=self.rule.temperature, threshold=threshold)
            valid = torch.ones_like(picks, dtype=torch.bool)
            self.sources.append(logits)
            self.origins.append(frontier.numbers.masked_fill(~frontier.alive, -2))
        valid = (valid & (frontier.alive & (depth < self.limits))[..., None]).flatten(1)
        if tree.size is not None:
            # By the drafter's own probabilities; at temperature 0 by those of temperature 1. With noise as at temperature 0:
            # a token with a larger lead is more likely to lead under the target as well.
            log_probs = (logits.float() / (self.rule.temperature or 1.0)).log_softmax(-1).gather(-1, picks).clamp(max=0)
            frontier.scores = (frontier.scores[..., None] + log_probs).flatten(1).masked_fill(~valid, -torch.inf)
            self.scores.append(frontier.scores)
        if self.maps is not None:
            picks = self.group.maps[self.which, picks]
        self.tokens.append(picks.flatten(1).masked_fill(~valid, -1))
        self.parents.append(frontier.numbers.repeat_interleave(self.children, 1))
        return valid

    def _consume_children(self, depth: int, valid: torch.Tensor) -> bool:
        """Runs the drafters over the children that are expanded next. Returns whether any row continues."""
        frontier, tree, tokens = self.frontier, self.tree, self.tokens[-1]
        numbers = torch.arange(self.known, self.known + tokens.shape[1], device=self.device).expand_as(tokens)
        self.known += tokens.shape[1]
        # All children are expanded or the most likely ones; with a drafter that consumes one token at a time the first one.
        most = self.group.branching or (tokens.shape[1] if tree.size is None else tree.widest)
        if tree.size is not None and most < tokens.shape[1]:
            chosen = frontier.scores.topk(most, dim=-1).indices
        else:
            chosen = (numbers - numbers[:, :1])[:, :most]
        above, tokens = chosen // self.children, tokens.gather(1, chosen)
        if self.process is not None:
            self.paths = _longer(self.paths, above, tokens)
        alive = valid.gather(1, chosen) & (depth + 1 < self.limits)
        self.drafting, given = self.group.draft_level(
            self.drafting, tokens.clamp(min=0), frontier.entries.gather(1, above)
        )  # fmt: skip
        if not self.drafting:
            return False
        entries = torch.arange(self.consumed + 1, self.consumed + 1 + tokens.shape[1], device=self.device).expand_as(tokens)
        self.consumed += tokens.shape[1]
        scores = frontier.scores.gather(1, chosen) if tree.size is not None else frontier.scores
        self.frontier = _Frontier(
            _everyone(given, self.drafting, self.count), alive, numbers.gather(1, chosen), entries, scores
        )
        return True


def draft_trees(group: DrafterGroup, rows: Sequence[Row], choices: Sequence[Choice], uniforms: torch.Tensor,
                sampling: Sampling, one_hot: bool, tree: Tree, draft_length: int, process: Process | None = None,
                noise: torch.Tensor | None = None) -> list[Draft]:  # fmt: skip
    """Drafts a tree for each row.

    Args:
        group: the group that all rows draft with.
        rows: R rows of the batch.
        choices: drafter and draft length of each row; nodes deeper than the draft length do not exist.
        uniforms: floating [R, M], one for each node of the tree. Not read where proposals are one-hot.
        sampling: temperature and filters, the same for all rows.
        one_hot: children are the drafter's most likely tokens, not samples.
        tree: the shape.
        draft_length: K, the largest draft length of any row.
        process: applies the target's logits processors; None where there are none.
        noise: float32 [R, at least K, V], added to the logits by depth, see `perturb`; None adds nothing.
    """
    trees = _Trees(group, rows, choices, uniforms, sampling, one_hot, tree, process, noise)
    begun = trees.draft()
    if not begun:
        return [no_draft(row) for row in rows]
    tokens, parents = torch.cat(trees.tokens, 1), torch.cat(trees.parents, 1)
    if tree.size is not None and tree.size < tokens.shape[1]:
        tokens, parents = _likeliest(tokens, parents, torch.cat(trees.scores, 1), tree.size)
    usable = torch.where(trees.finite, draft_length, 0)
    widths = [None] * len(rows) if tree.size is None else _widths(tokens, parents, draft_length)
    drafts = []
    for place, (row, member) in enumerate(zip(rows, trees.members)):
        if place not in begun:
            drafts.append(no_draft(row))
            continue
        sampled = {}
        if not one_hot:
            mapping = None if trees.maps is None else group.map_of[member]
            sampled = {"draft_to_target": mapping, "origins": torch.cat(trees.origins, 1)[place]}
        logits = None if one_hot else torch.cat([one[place] for one in trees.sources])
        drafts.append(
            Draft(tokens[place], logits, usable=usable[place], parents=parents[place], widths=widths[place], **sampled)
        )
    return drafts


def _everyone(given: torch.Tensor, drafting: Sequence[int], count: int) -> torch.Tensor:
    """Returns the logits [len(drafting), ...] of some rows as those of all `count` rows, NaN for the others."""
    if len(drafting) == count:
        return given
    whole = given.new_full((count, *given.shape[1:]), torch.nan)
    whole[to_device(drafting, given.device)] = given
    return whole


def _process(process: Process, rows: Sequence[Row], choices: Sequence[Choice], logits: torch.Tensor, alive: torch.Tensor,
             paths: Sequence[Sequence[Sequence[torch.Tensor]]]) -> torch.Tensor:  # fmt: skip
    """Applies the rows' processors to logits [R, F, Vd]. Returns [R, F, V], -inf behind a token that ends the text."""
    lifted = logits.new_full((*logits.shape[:2], rows[0].vocabulary), -torch.inf)
    for row, (one, choice, known) in enumerate(zip(rows, choices, alive.tolist())):
        for node, path in enumerate(paths[row]):
            if known[node] and not (path and int(path[-1]) in one.request.eos):
                lifted[row, node] = process(one, choice.drafter, logits[row, node, None], path)[0]
    return lifted


def _longer(paths: list[list[list[torch.Tensor]]], above: torch.Tensor, tokens: torch.Tensor) -> list[list[list[torch.Tensor]]]:
    """Returns the paths of the nodes `tokens` [R, F], whose parents have the indices `above` in `paths`."""
    return [
        [[*paths[row][parent], tokens[row, node, None]] for node, parent in enumerate(parents)]
        for row, parents in enumerate(above.tolist())
    ]


def _likeliest(
    tokens: torch.Tensor, parents: torch.Tensor, scores: torch.Tensor, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the `size` nodes of the highest scores, and their parents' indices among them.

    A parent scores at least as high as its children and precedes them, so it is kept if one of them is.
    """
    kept = scores.sort(dim=1, descending=True, stable=True).indices[:, :size].sort(1).values
    places = torch.full_like(tokens, -1).scatter(1, kept, torch.arange(size, device=tokens.device).expand_as(kept))
    tokens, parents = tokens.gather(1, kept), parents.gather(1, kept)
    parents = torch.where(parents < 0, -1, places.gather(1, parents.clamp(min=0)))
    return tokens, parents.masked_fill(tokens < 0, -1)


def _widths(tokens: torch.Tensor, parents: torch.Tensor, depth: int) -> torch.Tensor:
    """Returns the number of children of the root, of its first child, of that one's first child, ..., int64 [R, depth]."""
    here, counts = torch.full_like(tokens[:, :1], -1), []
    for _ in range(depth):
        child = (parents == here) & (tokens >= 0)
        counts.append(child.sum(1))
        found, first = child.max(1, keepdim=True)
        here = torch.where(found, first, -2)  # no node's parent
    return torch.stack(counts, 1)
