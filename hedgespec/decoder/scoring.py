"""Scoring: compares every drafter with the target at the verified tokens of each row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from hedgespec.config import DecodeConfig
from hedgespec.decoder.groups import NON_FINITE_LOGITS, DrafterGroup
from hedgespec.decoder.noise import CoupledNoise
from hedgespec.decoder.pool import GroupLogits
from hedgespec.decoder.row import Row
from hedgespec.device import SideStream, stack, to_device
from hedgespec.ops.evaluate import evaluate, multi_draft_acceptance
from hedgespec.ops.sampling import Sampling

PROMPT_SAMPLING = Sampling(temperature=1.0)
"""Drafters are compared on a prompt at temperature 1, whatever the temperature of the request: a position then tells most."""


@dataclass(frozen=True, slots=True)
class RowScores:
    """The scores of all drafters at the tokens of one row's backlog."""

    row: Row
    of_prompt: bool
    """Whether these are prompt positions, for the warm start."""
    acceptance_prob: np.ndarray
    """float64 [N, T], 0 for drafters that were dropped; of draft trees [K, N, T], by depth."""
    acceptance_ratio: np.ndarray
    """The same; of a prompt, whose tokens were not drawn from the target, it is `acceptance_prob`."""


@dataclass
class _Verified:
    """The backlogs of some rows, padded to one length."""

    rows: list[Row]
    counts: list[int]
    logits: torch.Tensor
    """[R, T, V], the target's."""
    tokens: torch.Tensor
    """int64 [R, T]."""
    lengths: torch.Tensor | None
    """int64 [R]; None where all are T."""
    noise: torch.Tensor | None
    """[R, T, V] with proposal "coupled"."""


@dataclass
class _Evaluation:
    """An evaluation that was launched and not collected yet."""

    verified: _Verified
    of_prompt: bool
    parts: list[tuple[list[int], Callable[[], np.ndarray]]]
    """For each group its drafters, and a function that waits for float64 [C + 1, n, R, T]: the C scores, and last 1.0 where
    the drafter's logits of the row were finite."""


class Scorer:
    """Launches evaluations and hands out their results in order.

    Args:
        config: the decoder's configuration.
        sampling: how tokens are drawn from logits; greedy where the logits hold noise.
        noise: the noise with proposal "coupled", else None.
        device: of the target's logits.
    """

    def __init__(self, config: DecodeConfig, sampling: Sampling, noise: CoupledNoise | None, device: torch.device) -> None:
        self.config, self.sampling, self.noise, self.device = config, sampling, noise, device
        self.one_hot = config.proposal != "sampled" or sampling.temperature == 0
        self._side = SideStream(device)
        self._pending: list[_Evaluation] = []

    @property
    def has_pending(self) -> bool:
        """Whether an evaluation was submitted whose scores were not handed out."""
        return bool(self._pending)

    def submit(self, rows: list[Row], groups: Sequence[GroupLogits], of_prompt: bool = False) -> None:
        """Launches the evaluation of the backlogs of some rows, and empties them.

        Args:
            rows: R rows.
            groups: the teacher-forced logits of all drafters for these rows.
            of_prompt: whether the backlogs are prompt positions.
        """
        verified, found = self._take_backlogs(rows, of_prompt), []
        sampling = PROMPT_SAMPLING if of_prompt else self.sampling
        inputs = verified.logits, verified.tokens, verified.lengths, verified.noise, *(one.logits for one in groups)
        with self._side.work(*inputs):
            threshold = sampling.threshold(verified.logits)
            for one in groups:
                scores = self._evaluate(verified, one, sampling, threshold, of_prompt)
                found.append((one.group.members, self._side.to_host(scores)))
        self._pending.append(_Evaluation(verified, of_prompt, found))

    def ready(self, keep_newest: bool) -> Iterator[RowScores]:
        """Yields the scores of the evaluations that were submitted, oldest first; the newest evaluation is left for the next
        call if `keep_newest`."""
        while len(self._pending) > int(keep_newest):
            yield from self._collect(self._pending.pop(0))

    def _take_backlogs(self, rows: list[Row], of_prompt: bool) -> _Verified:
        counts = [row.backlog.count for row in rows]
        logits, noise = zip(*(row.backlog.take() for row in rows))
        tokens = [row.tokens[row.length - count : row.length] for row, count in zip(rows, counts)]
        return _Verified(
            rows, counts, stack(logits, 0), stack(tokens, 0),
            None if min(counts) == max(counts) else to_device(counts, self.device),
            stack(noise, 0) if self.noise is not None and not of_prompt else None,
        )  # fmt: skip

    def _evaluate(self, verified: _Verified, one: GroupLogits, sampling: Sampling, threshold: torch.Tensor | None,
                  of_prompt: bool) -> torch.Tensor:  # fmt: skip
        """Returns float64 [C + 1, n, R, T], see `_Evaluation.parts`."""
        logits, maps = one.logits, one.group.maps
        finite = logits.amax(-1).isfinite()  # [n, R, T]
        if not logits.is_cpu or not finite.all():
            logits = logits.masked_fill(~finite[..., None], 0)  # the kernels' results for NaN are undefined
        if verified.lengths is not None:
            finite |= torch.arange(finite.shape[2], device=self.device) >= verified.lengths[:, None]
        finite = finite.all(-1)
        if verified.rows[0].request.process_drafts is not None:
            logits, maps = self._processed(verified, one.group.members, logits), None
        if verified.noise is not None:
            logits = self.noise.perturb(logits, verified.noise, None if maps is None else maps[:, None, None])
        options: dict[str, Any] = {
            "lengths": verified.lengths,
            "draft_to_target": maps,
            "target_temperature": sampling.temperature,
            "drafter_temperature": sampling.temperature,
            "target_threshold": threshold,
            "drafter_threshold": sampling.threshold(logits),
            "backend": self.config.backend,
        }
        inputs = verified.logits, logits, verified.tokens
        if of_prompt:
            scores = evaluate(*inputs, **options).scores[:1]
        else:
            scores = self._scores(verified.rows, one.group, inputs, options)
        return torch.cat([scores.double(), finite[None, :, :, None].expand_as(scores[:1])])

    def _scores(self, rows: Sequence[Row], group: DrafterGroup, inputs: tuple, options: dict) -> torch.Tensor:
        """Returns acceptance_prob and acceptance_ratio for the proposal in force, [2, n, R, T]; of trees [2K, n, R, T], a pair
        for a node at each depth."""
        tree = self.config.tree
        if tree is None:
            scores = evaluate(*inputs, **options).scores
            return scores[slice(2) if self.config.proposal == "sampled" else slice(2, 4)]
        if self.one_hot:
            scores = evaluate(*inputs, top_k=tree.widest, **options).scores[4:]
        else:
            target_logits, logits, tokens = inputs
            scores = multi_draft_acceptance(target_logits, logits, tokens, tree.widest, **options)
        # One pair for each number of children, and in front one for no children. Where only the first child has children, the
        # path must lead to the first child.
        scores = functional.pad(scores, (0, 0) * 3 + (2, 0))
        counts = np.minimum([row.children() for row in rows], len(scores) // 2 - 1).T  # [K, R]
        followed = counts if group.branching is None else np.minimum(counts, 1)
        pairs = np.stack([2 * counts, 2 * followed + 1], 1).reshape(-1, 1, len(rows), 1)
        return scores.gather(0, to_device(pairs, scores.device).expand(-1, *scores.shape[1:]))

    def _processed(self, verified: _Verified, members: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
        """Applies the rows' processors to drafters' logits [n, R, T, Vd]. Returns [n, R, T, V]."""
        rows = verified.rows
        dtype = torch.promote_types(logits.dtype, torch.float32)
        processed = logits.new_zeros(*logits.shape[:3], rows[0].vocabulary, dtype=dtype)
        for place, (row, count) in enumerate(zip(rows, verified.counts)):
            first = row.seen.shape[1] - count
            for member, drafter in enumerate(members):
                for position in range(count if row.alive[drafter] else 0):
                    one = logits[member, place, position, None]
                    with row.isolate_failures(drafter):
                        processed[member, place, position] = row.processed(drafter, one, row.seen[0, : first + position])[0]
        return processed

    def _collect(self, evaluation: _Evaluation) -> Iterator[RowScores]:
        """Waits for an evaluation, drops drafters whose logits were not finite, and yields the scores of its rows."""
        verified = evaluation.verified
        scores: dict[int, np.ndarray] = {}
        for members, wait in evaluation.parts:
            *parts, finite = wait()
            found = np.stack(parts)  # [C, n, R, T]
            for member, drafter in enumerate(members):
                scores[drafter] = found[:, member]
                for place, row in enumerate(verified.rows):
                    if row.alive[drafter] and not finite[member, place, 0]:
                        row.drop(drafter, ValueError(NON_FINITE_LOGITS))
        by_drafter = np.stack([scores[drafter] for drafter in range(len(scores))], 1)  # [C, N, R, T]
        for place, (row, count) in enumerate(zip(verified.rows, verified.counts)):
            own = np.where(row.alive[:, None], by_drafter[:, :, place, :count], 0.0)
            if evaluation.of_prompt:
                yield RowScores(row, True, own[0], own[0])
            elif self.config.tree is None:
                yield RowScores(row, False, own[0], own[1])
            else:
                yield RowScores(row, False, own[::2], own[1::2])
