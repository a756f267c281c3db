"""How draft trees grow: depth after depth, those of all rows that draft with the same part of the pool together.

Shapes do not depend on what is drafted, so the host waits for no device: a node that is none has the token -1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from hedgespec.config import Tree
from hedgespec.coupled import perturb
from hedgespec.decoder.row import Row
from hedgespec.records import Choice, Draft
from hedgespec.sampling import Sampling
from hedgespec.transfer import to_device
from hedgespec.verify import sample

if TYPE_CHECKING:
    from hedgespec.decoder.pool import Heads, Singles

Processed = Callable[[Row, int, torch.Tensor, Sequence[torch.Tensor]], torch.Tensor]
"""(row, drafter, logits [1, Vd], drafted tokens) -> logits [1, V] as the row's processors leave them."""


def grow(part: Heads | Singles, rows: Sequence[Row], choices: Sequence[Choice], uniforms: torch.Tensor, sampling: Sampling,
         one_hot: bool, tree: Tree, draft_length: int, processed: Processed | None,
         noise: torch.Tensor | None = None) -> list[Draft]:  # fmt: skip
    """A draft tree for each row.

    Args:
        part: of the pool, which drafts.
        rows: R rows of the batch.
        choices: of each row; nodes deeper than its draft length are none.
        uniforms: floating [R, M], as many as the tree has nodes; not read where children are the likeliest tokens.
        sampling: of all rows.
        one_hot: children are the drafter's likeliest tokens, and not samples.
        tree: its shape.
        draft_length: K, most that any row drafts.
        processed: what the target's processors make of a drafter's logits; None where there are none.
        noise: float32 [R, at least K, V] that comes on top of logits, by depth, see `perturb`; None: nothing does.
    """
    device, count, depths = uniforms.device, len(rows), max(choice.draft_length for choice in choices)
    members = [part.members.index(choice.drafter) for choice in choices]
    which = to_device(members, device)[:, None, None]
    limits = to_device([choice.draft_length for choice in choices], device)[:, None]
    maps = None if part.maps is None or processed is not None else part.maps[which[:, :, 0]]  # [R, 1, Vd]
    rule = sampling if noise is None else Sampling()
    begun_with, given = part.lead(rows, members)
    drafting: Sequence[int] = begun_with
    nothing, begun = Draft(which.new_empty(1, 0), None), set(drafting)
    if not drafting:
        return [nothing] * count
    # The nodes that get children next, F of each row, at first the root: their numbers among all nodes and among those that
    # the drafter took in, their logarithmic likelihoods, whether they are any, and their logits.
    numbers = torch.full((count, 1), -1, device=device)
    entries, scores = numbers + 1, torch.zeros(count, 1, device=device)
    alive = torch.ones(count, 1, dtype=torch.bool, device=device)
    logits = _everyone(given[:, None], drafting, count)
    paths: list[list[list[torch.Tensor]]] = [[[]] for _ in rows]
    sound = alive[:, 0]
    nodes: dict[str, list[torch.Tensor]] = {"tokens": [], "parents": [], "scores": []}
    origins: list[torch.Tensor] = []
    sources: list[torch.Tensor] = []
    known = entered = drawn = 0
    for depth in range(depths):
        finite = logits.amax(-1).isfinite()
        sound, alive = sound & (finite | ~alive).all(1), alive & finite
        logits = torch.where(finite[..., None], logits, 0.0)
        if processed is not None:
            logits = _process(processed, rows, choices, logits, alive, paths)
            finite = logits.amax(-1).isfinite()  # not where nothing that the drafter can name is allowed
            logits, alive = torch.where(finite[..., None], logits, 0.0), alive & finite
        if noise is not None:
            logits = perturb(
                logits, noise[:, depth, None], temperature=sampling.temperature, threshold=sampling.threshold(logits),
                draft_to_target=maps,
            )  # fmt: skip
        children, threshold = tree.children(depth), rule.threshold(logits)
        if one_hot:
            children = min(children, logits.shape[2])
            values, picks = logits.topk(children, dim=-1)
            valid = values.isfinite() if threshold is None else values.isfinite() & (values >= threshold[..., None])
        else:
            own = uniforms[:, drawn : drawn + logits.shape[1] * children]
            drawn += own.shape[1]
            own = own.view(count, -1, children)
            picks = sample(logits, own, temperature=rule.temperature, threshold=threshold)
            valid = torch.ones_like(picks, dtype=torch.bool)
            sources.append(logits)
            origins.append(numbers.masked_fill(~alive, -2))
        valid = (valid & (alive & (depth < limits))[..., None]).flatten(1)
        if tree.size is not None:
            # By the drafter's own likelihoods; at temperature 0, which has none, by those of temperature 1. With noise it is as
            # at temperature 0: what leads by more is the likelier to lead under the target as well.
            log_probs = (logits.float() / (rule.temperature or 1.0)).log_softmax(-1).gather(-1, picks).clamp(max=0)
            scores = (scores[..., None] + log_probs).flatten(1).masked_fill(~valid, -torch.inf)
            nodes["scores"].append(scores)
        if part.maps is not None and processed is None:
            picks = part.maps[which, picks]
        tokens = picks.flatten(1).masked_fill(~valid, -1)
        nodes["tokens"].append(tokens)
        nodes["parents"].append(numbers.repeat_interleave(children, 1))
        numbers = torch.arange(known, known + tokens.shape[1], device=device).expand_as(tokens)
        known += tokens.shape[1]
        # All get children or the likeliest, or with a drafter that takes in one token after another the first.
        most = part.width or (tokens.shape[1] if tree.size is None else tree.widest)
        if tree.size is not None and most < tokens.shape[1]:
            chosen = scores.topk(most, dim=-1).indices
        else:
            chosen = (numbers - numbers[:, :1])[:, :most]
        drafting = [row for row in drafting if choices[row].draft_length > depth + 1]
        if not drafting:
            break
        above, tokens = chosen // children, tokens.gather(1, chosen)
        if processed is not None:
            paths = _longer(paths, above, tokens)
        alive = valid.gather(1, chosen) & (depth + 1 < limits)
        drafting, given = part.branch(drafting, tokens.clamp(min=0), entries.gather(1, above))
        if not drafting:
            break
        logits, numbers = _everyone(given, drafting, count), numbers.gather(1, chosen)
        scores = scores.gather(1, chosen) if tree.size is not None else scores
        entries = torch.arange(entered + 1, entered + 1 + tokens.shape[1], device=device).expand_as(tokens)
        entered += tokens.shape[1]
    tokens, parents = torch.cat(nodes["tokens"], 1), torch.cat(nodes["parents"], 1)
    if tree.size is not None and tree.size < known:
        tokens, parents = _likeliest(tokens, parents, torch.cat(nodes["scores"], 1), tree.size)
    usable = torch.where(sound, draft_length, 0)
    widths: Any = [None] * count if tree.size is None else _widths(tokens, parents, draft_length)
    drafts = []
    for row, member in enumerate(members):
        if row not in begun:
            drafts.append(nothing)
            continue
        proposal: dict[str, Any] = {"widths": widths[row]}
        if not one_hot:
            mapping = None if part.maps is None or processed is not None else part.map_of[member]
            proposal |= {"draft_to_target": mapping, "origins": torch.cat(origins, 1)[row, None]}
        asked = None if one_hot else torch.cat([one[row] for one in sources])[None]
        drafts.append(Draft(tokens[row, None], asked, usable=usable[row], parents=parents[row, None], **proposal))
    return drafts


def _everyone(given: torch.Tensor, drafting: Sequence[int], count: int) -> torch.Tensor:
    """What some of `count` rows gave as of all: NaN where one did not."""
    if len(drafting) == count:
        return given
    whole = given.new_full((count, *given.shape[1:]), torch.nan)
    whole[to_device(drafting, given.device)] = given
    return whole


def _process(processed: Processed, rows: Sequence[Row], choices: Sequence[Choice], logits: torch.Tensor, alive: torch.Tensor,
             paths: Sequence[Sequence[Sequence[torch.Tensor]]]) -> torch.Tensor:  # fmt: skip
    """Logits [R, F, Vd] as the rows' processors leave them, [R, F, V]; -inf behind a token that ends the text."""
    lifted = logits.new_full((*logits.shape[:2], rows[0].vocabulary), -torch.inf)
    for row, (one, choice, known) in enumerate(zip(rows, choices, alive.tolist())):
        for node, path in enumerate(paths[row]):
            if known[node] and not (path and int(path[-1]) in one.request.eos):
                lifted[row, node] = processed(one, choice.drafter, logits[row, node, None], path)[0]
    return lifted


def _longer(paths: list[list[list[torch.Tensor]]], above: torch.Tensor, tokens: torch.Tensor) -> list[list[list[torch.Tensor]]]:
    """The tokens [1] that lead to each of the nodes `tokens` [R, F], whose parents have places `above` among `paths`."""
    return [
        [[*paths[row][parent], tokens[row, node, None]] for node, parent in enumerate(parents)]
        for row, parents in enumerate(above.tolist())
    ]


def _likeliest(
    tokens: torch.Tensor, parents: torch.Tensor, scores: torch.Tensor, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `size` nodes of the highest scores and their parents' numbers among them.

    A parent is at least as likely as its children and stands before them: it is chosen where one of them is.
    """
    kept = scores.sort(dim=1, descending=True, stable=True).indices[:, :size].sort(1).values
    places = torch.full_like(tokens, -1).scatter(1, kept, torch.arange(size, device=tokens.device).expand_as(kept))
    tokens, parents = tokens.gather(1, kept), parents.gather(1, kept)
    parents = torch.where(parents < 0, -1, places.gather(1, parents.clamp(min=0)))
    return tokens, parents.masked_fill(tokens < 0, -1)


def _widths(tokens: torch.Tensor, parents: torch.Tensor, depth: int) -> torch.Tensor:
    """Children of the root, of its first child, of the first child of that and so on, int64 [R, depth]."""
    here, counts = torch.full_like(tokens[:, :1], -1), []
    for _ in range(depth):
        child = (parents == here) & (tokens >= 0)
        counts.append(child.sum(1))
        found, first = child.max(1, keepdim=True)
        here = torch.where(found, first, -2)  # nobody's parent
    return torch.stack(counts, 1)
