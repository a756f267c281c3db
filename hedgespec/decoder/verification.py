"""Verification of the drafts of a batch against the target's logits.

Rows without logits processors whose drafts stack are verified in one call. A row with processors is verified token by token,
because a processor may keep state and must be called once for every emitted token and for no other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hedgespec.config import DecodeConfig
from hedgespec.decoder.groups import NON_FINITE_LOGITS
from hedgespec.decoder.noise import CoupledNoise
from hedgespec.decoder.row import Row
from hedgespec.decoder.together import Together
from hedgespec.decoder.walks import Walk, Walker
from hedgespec.device import stack, to_device
from hedgespec.errors import TargetLogitsError
from hedgespec.ops.sampling import Sampling
from hedgespec.ops.verify import verify, verify_tree
from hedgespec.records import Choice, Draft, Verdict

MAX_STACKED_MAPS = 64
"""Stacked vocabulary maps that are kept, one for each combination of drafters that drafted together."""


@dataclass(frozen=True, slots=True)
class RowVerdict:
    """What a round emits in one row."""

    emitted: list[int]
    """The emitted token ids: the accepted tokens, then the recovered or bonus token."""
    logits: torch.Tensor
    """[len(emitted), V], the target's processed logits from which they were drawn, noise included."""
    path: list[int]
    """Index of each of these among the positions of the target's forward: 0, 1, ... for a chain."""


@dataclass(frozen=True, slots=True)
class _Found:
    """One row of a call that verified several."""

    usable: int
    """Number of usable draft tokens."""
    tokens: list[int]
    """Token ids to emit."""
    path: list[int]
    """Indices of their logits."""
    sound: int
    """How many of these logits, from the first, have a finite maximum."""


class Verifier:
    """Verifies the drafts of a batch.

    Args:
        config: the decoder's configuration.
        sampling: how tokens are drawn from logits; greedy where the logits hold noise.
        noise: the noise with proposal "coupled", else None.
        device: of the target's logits.
        target_name: what errors call the target.
        all_rows: every row of the batch, finished ones included.
        together: callbacks that see all rows at once, or None.
    """

    def __init__(self, config: DecodeConfig, sampling: Sampling, noise: CoupledNoise | None, device: torch.device,
                 target_name: str, all_rows: Sequence[Row], together: Together | None) -> None:  # fmt: skip
        self.config, self.sampling, self.noise, self.device = config, sampling, noise, device
        self.target_name, self.all_rows, self.together = target_name, all_rows, together
        self.greedy = (sampling if noise is None else noise.sampling).temperature == 0
        self.one_hot = config.proposal != "sampled" or sampling.temperature == 0
        self._walker = Walker(config, self.one_hot, device, self._call_verify, self._call_verify_tree, self._emit_one)
        self._stacked_maps: dict[tuple[int, ...], tuple[torch.Tensor, list[torch.Tensor]]] = {}

    def verify(
        self, rows: Sequence[Row], logits: torch.Tensor, drafts: Sequence[Draft], choices: Sequence[Choice],
        uniforms: Sequence[np.ndarray], noise: torch.Tensor | None = None,
    ) -> list[RowVerdict]:  # fmt: skip
        """Emits tokens in every row. Drops the drafter of a draft with unusable tokens from its row.

        Args:
            rows: the B rows.
            logits: [B, T, V], the target's logits; a row with a shorter draft uses the first positions.
            drafts: the draft of each row.
            choices: the drafter of each row.
            uniforms: for each row one uniform for each draft token, and a last one that draws the recovered or bonus token; in
                a tree those of `verify_tree`.
            noise: [B, at least T, V], the noise of the token that each position scores, with proposal "coupled".

        Raises:
            TargetLogitsError: the logits of an emitted token have no finite maximum.
        """
        verdicts: dict[int, RowVerdict] = {}
        together: dict[tuple, list[int]] = {}
        walks: dict[int, tuple[Walk, int]] = {}
        for place, (row, draft) in enumerate(zip(rows, drafts)):
            if not row.request.is_processed:
                together.setdefault(_shape_of(draft), []).append(place)
                continue
            usable = len(draft.tokens) if draft.usable is None else int(draft.usable)
            self._drop_unusable(row, choices[place], draft, usable)
            walk = Walk()
            walks[place] = walk, self._walker.begin(walk, row, draft, usable, uniforms[place])
        self._walk(rows, walks, logits, noise)
        for place, (walk, _) in walks.items():
            verdicts[place] = RowVerdict(walk.emitted, torch.cat(walk.verified), walk.path)
        if noise is not None and together:
            logits = self.noise.perturb(logits, noise[:, : logits.shape[1]])
        for places in together.values():
            is_tree = drafts[places[0]].parents is not None
            verify_stacked = self._verify_trees if is_tree else self._verify_chains
            own = logits if len(places) == len(rows) else logits[to_device(places, self.device)]
            own_rows, own_drafts = [rows[place] for place in places], [drafts[place] for place in places]
            own_uniforms = [uniforms[place] for place in places]
            for place, found in zip(places, verify_stacked(own, own_rows, own_drafts, own_uniforms)):
                row = rows[place]
                self._drop_unusable(row, choices[place], drafts[place], found.usable)
                emitted = row.emit(found.tokens[: found.sound])
                if not row.finished and (found.sound < len(found.tokens) or not found.tokens):
                    raise self._unsound_logits(row, logits[place, [*found.path, 0][found.sound]])
                path = found.path[: len(emitted)]
                kept = to_device(path, self.device) if is_tree else slice(len(path))
                verdicts[place] = RowVerdict(emitted, logits[place, kept], path)
        return [verdicts[place] for place in range(len(rows))]

    def _drop_unusable(self, row: Row, choice: Choice, draft: Draft, usable: int) -> None:
        if draft.usable is not None and usable < self.config.draft_length:
            row.drop(choice.drafter, ValueError(NON_FINITE_LOGITS))

    def _unsound_logits(self, row: Row, logits: torch.Tensor) -> TargetLogitsError:
        """Returns the error about the target's logits [V] for the next token of a row."""
        if bool(logits.isnan().any()):
            got = "NaN"
        elif bool((logits == math.inf).any()):
            got = "+inf"
        else:
            got = "-inf throughout: no token is allowed"
        processed = " (after the logits processors)" if row.request.is_processed else ""
        return TargetLogitsError(
            f"target: expected logits with a finite maximum for token {row.seen.shape[1]} of row {row.index}, counted from 0, "
            f"from {self.target_name}{processed}, got {got}"
        )

    # Rows without processors

    def _verify_chains(
        self, logits: torch.Tensor, rows: Sequence[Row], drafts: Sequence[Draft], uniforms: Sequence[np.ndarray]
    ) -> list[_Found]:
        """Verifies chains in one call."""
        counts = [len(draft.tokens) for draft in drafts]
        most = max(counts)
        tests = np.zeros((len(drafts), most + 1))
        for row, own, count in zip(tests, uniforms, counts):
            row[:count], row[-1] = own[:count], own[-1]
        draft_logits = mapping = None
        if drafts[0].logits is not None:
            draft_logits = stack([draft.logits for draft in drafts], 0)
            mapping = self._stack_maps([draft.draft_to_target for draft in drafts])
        draft_tokens = stack([draft.tokens for draft in drafts], 0)
        unknown = torch.full((), most, device=self.device)
        usable = torch.stack([unknown if draft.usable is None else draft.usable for draft in drafts])
        lengths = torch.minimum(to_device(counts, self.device), usable) if most else None
        target_logits = logits[:, : most + 1]
        verdict = self._call_verify(target_logits, draft_tokens, draft_logits, mapping, tests, lengths)
        sound = target_logits.amax(-1).isfinite().cumprod(1).sum(1)
        # One transfer brings all that the host needs of a round.
        found = torch.cat([usable[:, None], sound[:, None], verdict.tokens], 1).tolist()
        emitted = [[token for token in tokens if token >= 0] for _, _, *tokens in found]
        return [_Found(one[0], tokens, list(range(len(tokens))), one[1]) for one, tokens in zip(found, emitted)]

    def _verify_trees(
        self, logits: torch.Tensor, rows: Sequence[Row], drafts: Sequence[Draft], uniforms: Sequence[np.ndarray]
    ) -> list[_Found]:
        """Verifies trees in one call."""
        tokens = stack([draft.tokens for draft in drafts], -1)
        parents = stack([draft.parents for draft in drafts], -1)
        draft_logits = origins = mapping = None
        if drafts[0].logits is not None:
            draft_logits = stack([draft.logits for draft in drafts], 0)
            origins = stack([draft.origins for draft in drafts], -2)
            mapping = self._stack_maps([draft.draft_to_target for draft in drafts])
        target_logits = logits[:, : tokens.shape[1] + 1]
        verdict = self._call_verify_tree(target_logits, tokens, parents, draft_logits, origins, mapping, np.stack(uniforms))
        sound, length = target_logits.amax(-1).isfinite().long(), self.config.draft_length
        parts = [torch.stack([draft.usable for draft in drafts])[:, None], sound, verdict.tokens, verdict.path]
        if drafts[0].widths is not None:
            parts.append(torch.stack([draft.widths for draft in drafts]))
        results = []
        for row, (usable, *rest) in zip(rows, torch.cat(parts, 1).tolist()):  # one transfer
            is_sound, rest = rest[: sound.shape[1]], rest[sound.shape[1] :]
            emitted, path, widths = rest[: length + 1], rest[length + 1 : 2 * length + 1], rest[2 * length + 1 :]
            if widths:
                row.record_tree(widths)
            path = [0, *(node + 1 for node in path if node >= 0)]
            number = next((number for number, node in enumerate(path) if not is_sound[node]), len(path))
            results.append(_Found(usable, [token for token in emitted if token >= 0], path, number))
        return results

    # Rows with processors

    def _walk(self, rows: Sequence[Row], walks: dict[int, tuple[Walk, int]], logits: torch.Tensor,
              noise: torch.Tensor | None) -> None:  # fmt: skip
        """Verifies drafts token by token, each by itself or all in step."""
        if walks and self.together is not None and self.together.processes:
            self._walk_in_step(rows, walks, logits, noise)
            return
        for place, (walk, index) in walks.items():
            row, at = rows[place], index
            while at is not None:
                processed = row.request.process(row.seen, logits[place, at : at + 1])
                at = walk.advance(self._prepare(processed, None if noise is None else noise[place, at : at + 1]))

    def _walk_in_step(self, rows: Sequence[Row], walks: dict[int, tuple[Walk, int]], logits: torch.Tensor,
                      noise: torch.Tensor | None) -> None:  # fmt: skip
        """Verifies the drafts of all rows, one token of each at a time, so that `together` sees the batch as in plain decoding.

        It ends with the first draft that ends; the other rows keep what is accepted of their drafts by then.
        """
        places = {place: index for place, (_, index) in walks.items()}
        while places:
            some = [rows[place] for place in places]
            given = [logits[place, at : at + 1] for place, at in places.items()]
            for (place, at), row, processed in zip(list(places.items()), some, self.together.process(some, given)):
                own = None if noise is None else noise[place, at : at + 1]
                places[place] = walks[place][0].advance(self._prepare(processed, own))
                row.held_back = places[place] is not None
            self.together.stop(self.all_rows)
            places = {place: at for place, at in places.items() if not rows[place].finished}
            if None in places.values():
                return

    def _prepare(self, processed: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        """Returns processed logits [1, V] as they are verified, with the noise [1, V] added."""
        if self.greedy:  # some processors force a token with +inf, which is the largest logit all the same
            processed = processed.clamp(max=torch.finfo(processed.dtype).max)
        return processed if noise is None else self.noise.perturb(processed, noise)

    def _emit_one(self, row: Row, logits: torch.Tensor, verdict: Verdict) -> tuple[list[int], int]:
        """Emits the first token of a verdict that was drawn from processed logits [1, V]; see `hedgespec.decoder.walks.Emit`.

        Raises:
            TargetLogitsError: the logits have no finite maximum.
        """
        sound = logits[0].amax(-1, keepdim=True).isfinite().long()
        token, accepted, is_sound = torch.cat([verdict.tokens[0, :1], verdict.accepted_length[:1], sound]).tolist()
        if not is_sound:
            raise self._unsound_logits(row, logits[0])
        emitted = row.emit([token])
        return emitted, 0 if row.finished else accepted

    def _stack_maps(self, maps: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
        """Stacks vocabulary maps: [B, Vd], or [Vd] where all rows have the same map, or None.

        The same drafters in the same rows get the same tensor, because the checks of a map are cached by tensor.
        """
        if all(one is maps[0] for one in maps):
            return maps[0]
        key = tuple(map(id, maps))
        if key not in self._stacked_maps:
            if len(self._stacked_maps) >= MAX_STACKED_MAPS:
                self._stacked_maps.clear()
            self._stacked_maps[key] = torch.stack(list(maps)), list(maps)
        return self._stacked_maps[key][0]

    def _call_verify(self, target_logits: torch.Tensor, draft_tokens: torch.Tensor, draft_logits: torch.Tensor | None,
                     mapping: torch.Tensor | None, uniforms: np.ndarray,
                     lengths: torch.Tensor | None = None) -> Verdict:  # fmt: skip
        mode = "sampled" if self.config.proposal == "sampled" else "argmax"
        options = self._options(target_logits, draft_logits, mapping)
        draws = to_device(uniforms, self.device)
        return verify(target_logits, draft_tokens, draft_logits, draws, mode=mode, lengths=lengths, **options)

    def _call_verify_tree(self, target_logits: torch.Tensor, draft_tokens: torch.Tensor, parents: torch.Tensor,
                          draft_logits: torch.Tensor | None, origins: torch.Tensor | None, mapping: torch.Tensor | None,
                          uniforms: np.ndarray, depth: int | None = None) -> Verdict:  # fmt: skip
        mode = "argmax" if draft_logits is None else "sampled"
        options = self._options(target_logits, draft_logits, mapping)
        draws, depth = to_device(uniforms, self.device), depth or self.config.draft_length
        return verify_tree(
            target_logits, draft_tokens, parents, draft_logits, draws, depth=depth, mode=mode, origins=origins, **options
        )  # fmt: skip

    def _options(
        self, target_logits: torch.Tensor, draft_logits: torch.Tensor | None, mapping: torch.Tensor | None
    ) -> dict[str, Any]:
        """Returns the arguments that `verify` and `verify_tree` share."""
        return {
            "draft_to_target": mapping,
            "target_temperature": self.sampling.temperature,
            "draft_temperature": self.sampling.temperature,
            "target_threshold": self.sampling.threshold(target_logits),
            "draft_threshold": None if draft_logits is None else self.sampling.threshold(draft_logits),
            "backend": self.config.backend,
        }


def _shape_of(draft: Draft) -> tuple:
    """Returns a key; drafts with the same key can be verified in one call."""
    if draft.logits is None:
        return (draft.parents is not None,)
    return draft.parents is not None, draft.logits.shape[1], draft.logits.dtype, draft.draft_to_target is not None
