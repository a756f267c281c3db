"""Drafting of chains: one token after another, for all rows that draft with the same group of drafters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from hedgespec.decoder.groups import DrafterGroup
from hedgespec.decoder.row import Row, no_draft
from hedgespec.device import index_of, to_device
from hedgespec.ops.gumbel import perturb
from hedgespec.ops.sampling import Sampling
from hedgespec.ops.verify import sample
from hedgespec.records import Choice, Draft

Process = Callable[[Row, int, torch.Tensor, Sequence[torch.Tensor]], torch.Tensor]
"""(row, drafter, logits [1, Vd], draft tokens so far) -> logits [1, V] after the row's logits processors."""


def processed_logits(row: Row, drafter: int, logits: torch.Tensor, drafted: Sequence[torch.Tensor]) -> torch.Tensor:
    """Applies a row's logits processors to a drafter's logits [1, Vd] behind a draft. Returns [1, V].

    A processor that raises on a draft, which may never become part of the text, ends the draft: all logits are then -inf.
    """
    try:
        return row.processed(drafter, logits, torch.cat([row.seen[0], *drafted]))
    except Exception:
        return logits.new_full((1, row.vocabulary), -math.inf)


def draft_chains(group: DrafterGroup, rows: Sequence[Row], choices: Sequence[Choice], uniforms: torch.Tensor,
                 sampling: Sampling, one_hot: bool, process: Process | None = None,
                 noise: torch.Tensor | None = None) -> list[Draft]:  # fmt: skip
    """Drafts a chain for each row.

    Args:
        group: the group that all rows draft with.
        rows: R rows of the batch.
        choices: drafter and draft length of each row.
        uniforms: floating [R, K]; uniforms[r, k] draws the k-th token of row r. Not read where proposals are one-hot.
        sampling: temperature and filters, the same for all rows.
        one_hot: proposals are the most likely tokens, not samples.
        process: applies the target's logits processors; None where there are none.
        noise: float32 [R, at least K, V], added to the logits, see `perturb`; None adds nothing.
    """
    device = uniforms.device
    members = [group.members.index(choice.drafter) for choice in choices]
    which = to_device(members, device)
    tokens: list[list[torch.Tensor]] = [[] for _ in rows]
    logits: list[list[torch.Tensor]] = [[] for _ in rows]
    finite = torch.ones(len(rows), uniforms.shape[1], dtype=torch.bool, device=device)
    drafting, given = group.begin_draft(rows, members)  # `drafting`: the rows to which the rows of `given` belong
    for position in range(max(choice.draft_length for choice in choices)):
        if not drafting:
            break
        answers = list(range(len(drafting)))  # indices among the rows that drafted last
        best, likeliest = given.max(-1)
        finite[index_of(drafting, rows, device), position] = best.isfinite()
        if process is not None:
            processed = [
                process(rows[row], choices[row].drafter, given[place, None], tokens[row]) for place, row in enumerate(drafting)
            ]
            # The draft ends where no token that the drafter can propose is allowed.
            answers = [place for place in answers if processed[place].amax().isfinite()]
            if not answers:
                break
            given = torch.cat([processed[place] for place in answers])
            drafting, likeliest = [drafting[place] for place in answers], given.argmax(-1)
        own = index_of(drafting, rows, device)
        if noise is not None:
            maps = None if group.maps is None or process is not None else group.maps[which[own]]
            given = perturb(
                given, noise[own, position], temperature=sampling.temperature, threshold=sampling.threshold(given),
                draft_to_target=maps,
            )  # fmt: skip
            likeliest = given.argmax(-1)
        if one_hot:
            drawn = likeliest
        else:
            drawn = sample(
                given, uniforms[own, position], temperature=sampling.temperature, threshold=sampling.threshold(given)
            )
        if group.maps is not None and process is None:
            drawn = group.maps[which[own], drawn]
        for place, row in enumerate(drafting):
            tokens[row].append(drawn[place : place + 1])
            logits[row].append(given[place])
        going = [
            place
            for place, row in enumerate(drafting)
            if choices[row].draft_length > position + 1
            and not (process is not None and int(drawn[place]) in rows[row].request.eos)  # nothing follows the end
        ]
        if not going:
            break
        chosen = [answers[place] for place in going]
        answered, given = group.draft_next(chosen, drawn[index_of(going, drafting, device)])
        drafting = [drafting[going[place]] for place in answered]
    usable = finite.cumprod(1).sum(1)
    keeps_logits = not one_hot
    drafts = []
    for row, member in enumerate(members):
        draft = no_draft(rows[row])
        if tokens[row]:
            mapping = group.map_of[member] if keeps_logits and process is None and group.maps is not None else None
            draft = Draft(torch.cat(tokens[row]), torch.stack(logits[row]) if keeps_logits else None, mapping)
        drafts.append(replace(draft, usable=usable[row]))
    return drafts
