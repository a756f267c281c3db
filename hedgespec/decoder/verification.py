"""Verification of the drafts of a batch against the target's logits.

Rows without logits processors whose drafts stack are verified in one call. A row with processors is verified token by token,
because a processor may keep state and must be called once for every emitted token and for no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hedgespec.config import DecodeConfig
from hedgespec.decoder.groups import NON_FINITE_LOGITS
from hedgespec.decoder.noise import CoupledNoise
from hedgespec.decoder.row import Row
from hedgespec.records import Choice, Draft, Verdict
from hedgespec.sampling import Sampling
from hedgespec.transfer import stack, to_device
from hedgespec.verify import verify, verify_tree

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


class Verifier:
    """Verifies the drafts of a batch.

    Args:
        config: the decoder's configuration.
        sampling: how tokens are drawn from logits; greedy where the logits hold noise.
        noise: the noise with proposal "coupled", else None.
        device: of the target's logits.
    """

    def __init__(self, config: DecodeConfig, sampling: Sampling, noise: CoupledNoise | None, device: torch.device) -> None:
        self.config, self.sampling, self.noise, self.device = config, sampling, noise, device
        self.one_hot = config.proposal != "sampled" or sampling.temperature == 0
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
        """
        verdicts: list[RowVerdict | None] = [None] * len(rows)
        together: dict[tuple, list[int]] = {}
        unprocessed = logits
        if noise is not None and any(row.request.process is None for row in rows):
            logits = self.noise.perturb(logits, noise[:, : logits.shape[1]])
        for place, (row, draft) in enumerate(zip(rows, drafts)):
            if row.request.process is None:
                together.setdefault(_shape_of(draft), []).append(place)
                continue
            usable = len(draft.tokens) if draft.usable is None else int(draft.usable)
            self._drop_unusable(row, choices[place], draft, usable)
            own = None if noise is None else noise[place]
            walk = self._walk_chain if draft.parents is None else self._walk_tree
            verdicts[place] = walk(row, unprocessed[place], draft, usable, uniforms[place], own)
        for places in together.values():
            is_tree = drafts[places[0]].parents is not None
            verify_stacked = self._verify_trees if is_tree else self._verify_chains
            own = logits if len(places) == len(rows) else logits[to_device(places, self.device)]
            some = [[each[place] for place in places] for each in (rows, drafts, uniforms)]
            for place, (usable, tokens, path) in zip(places, verify_stacked(own, *some)):
                row = rows[place]
                self._drop_unusable(row, choices[place], drafts[place], usable)
                emitted = row.emit(tokens)
                path = path[: len(emitted)]
                kept = to_device(path, self.device) if is_tree else slice(len(path))
                verdicts[place] = RowVerdict(emitted, logits[place, kept], path)
        return verdicts

    def _drop_unusable(self, row: Row, choice: Choice, draft: Draft, usable: int) -> None:
        if draft.usable is not None and usable < self.config.draft_length:
            row.drop(choice.drafter, ValueError(NON_FINITE_LOGITS))

    def _verify_chains(
        self, logits: torch.Tensor, rows: Sequence[Row], drafts: Sequence[Draft], uniforms: Sequence[np.ndarray]
    ) -> list[tuple[int, list[int], list[int]]]:
        """Verifies chains in one call. Returns for each row the number of usable draft tokens, the token ids that it emits, and
        the positions of their logits."""
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
        verdict = self._call_verify(logits[:, : most + 1], draft_tokens, draft_logits, mapping, tests, lengths)
        # One transfer brings all that the host needs of a round.
        found = torch.cat([usable[:, None], verdict.tokens], 1).tolist()
        emitted = [[token for token in tokens if token >= 0] for _, *tokens in found]
        return [(known, tokens, list(range(len(tokens)))) for (known, *_), tokens in zip(found, emitted)]

    def _verify_trees(
        self, logits: torch.Tensor, rows: Sequence[Row], drafts: Sequence[Draft], uniforms: Sequence[np.ndarray]
    ) -> list[tuple[int, list[int], list[int]]]:
        """Verifies trees in one call; see `_verify_chains`."""
        tokens = stack([draft.tokens for draft in drafts], -1)
        parents = stack([draft.parents for draft in drafts], -1)
        draft_logits = origins = mapping = None
        if drafts[0].logits is not None:
            draft_logits = stack([draft.logits for draft in drafts], 0)
            origins = stack([draft.origins for draft in drafts], -2)
            mapping = self._stack_maps([draft.draft_to_target for draft in drafts])
        verdict = self._call_verify_tree(
            logits[:, : tokens.shape[1] + 1], tokens, parents, draft_logits, origins, mapping, np.stack(uniforms)
        )
        length = self.config.draft_length
        parts = [torch.stack([draft.usable for draft in drafts])[:, None], verdict.tokens, verdict.path]
        if drafts[0].widths is not None:
            parts.append(torch.stack([draft.widths for draft in drafts]))
        results = []
        for row, (usable, *rest) in zip(rows, torch.cat(parts, 1).tolist()):  # one transfer
            emitted, path, widths = rest[: length + 1], rest[length + 1 : 2 * length + 1], rest[2 * length + 1 :]
            if widths:
                row.record_tree(widths)
            path = [0, *(node + 1 for node in path if node >= 0)]
            results.append((usable, [token for token in emitted if token >= 0], path))
        return results

    def _walk_chain(
        self, row: Row, logits: torch.Tensor, draft: Draft, usable: int, uniforms: np.ndarray, noise: torch.Tensor | None
    ) -> RowVerdict:
        """Verifies a chain token by token, with the row's processors."""
        emitted: list[int] = []
        verified: list[torch.Tensor] = []
        drafted = min(len(draft.tokens), usable)
        for position in range(drafted + 1):
            here = slice(position, min(position + 1, drafted))  # empty at the bonus position
            verified.append(self._processed(row, logits, position, noise))
            # `verify` wants logits for a bonus position too; it is not used, because the walk continues there.
            target_logits = verified[-1].expand(1 + here.stop - here.start, -1)[None]
            draft_logits = None if draft.logits is None or position == drafted else draft.logits[None, here]
            mapping = None if draft_logits is None else draft.draft_to_target
            tests = np.append(uniforms[here], uniforms[-1])[None]
            verdict = self._call_verify(target_logits, draft.tokens[None, here], draft_logits, mapping, tests)
            emitted += row.emit(verdict.tokens[0, :1].tolist())
            if row.finished or int(verdict.accepted_length[0]) == 0:
                break
        return RowVerdict(emitted, torch.cat(verified), list(range(len(emitted))))

    def _walk_tree(
        self, row: Row, logits: torch.Tensor, draft: Draft, usable: int, uniforms: np.ndarray, noise: torch.Tensor | None
    ) -> RowVerdict:
        """Verifies a tree node by node, with the row's processors."""
        emitted: list[int] = []
        verified: list[torch.Tensor] = []
        node, path = -1, []
        parents, tokens = draft.parents.tolist(), draft.tokens.tolist()
        if draft.widths is not None:
            row.record_tree(draft.widths.tolist())
        for depth in range(self.config.draft_length + 1):
            path.append(node + 1)
            verified.append(self._processed(row, logits, path[-1], noise))
            children = [place for place, parent in enumerate(parents) if parent == node and tokens[place] >= 0]
            verdict = self._verify_children(verified[-1], draft, node, children, uniforms, depth)
            emitted += row.emit(verdict.tokens[0, :1].tolist())
            if row.finished or int(verdict.accepted_length[0]) == 0:
                break
            node = children[int(verdict.path[0, 0])]
        return RowVerdict(emitted, torch.cat(verified), path)

    def _verify_children(
        self, logits: torch.Tensor, draft: Draft, node: int, children: list[int], uniforms: np.ndarray, depth: int
    ) -> Verdict:
        """Verifies the children of one node, by the target's logits [1, V] behind it."""
        index = to_device(children, self.device).long()
        drafted, root = draft.tokens[None, index], torch.full_like(draft.parents[None, index], -1)
        draft_logits = origins = None
        if self.one_hot:
            tests = np.repeat(uniforms[min(depth, len(uniforms) - 1)], 2)
        else:
            siblings = (len(uniforms) - 1) // self.config.draft_length
            own = uniforms[depth * siblings : (depth + 1) * siblings] if depth < self.config.draft_length else uniforms[:0]
            tests = np.append(np.pad(own, (0, siblings - len(own))), uniforms[-1])
            source = draft.origins.tolist().index(node) if children else 0
            draft_logits, origins = draft.logits[None, source : source + 1], torch.full_like(draft.origins[None, :1], -1)
        target_logits = logits.expand(1 + len(children), -1)[None]
        return self._call_verify_tree(
            target_logits, drafted, root, draft_logits, origins, draft.draft_to_target, tests[None], depth=1
        )

    def _processed(self, row: Row, logits: torch.Tensor, place: int, noise: torch.Tensor | None) -> torch.Tensor:
        """Returns the target's logits at one position after the row's processors, with its noise, [1, V]."""
        here = slice(place, place + 1)
        logits = row.request.process(row.seen, logits[here])
        return logits if noise is None else self.noise.perturb(logits, noise[here])

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
        uniforms = to_device(uniforms, self.device)
        return verify(target_logits, draft_tokens, draft_logits, uniforms, mode=mode, lengths=lengths, **options)

    def _call_verify_tree(self, target_logits: torch.Tensor, draft_tokens: torch.Tensor, parents: torch.Tensor,
                          draft_logits: torch.Tensor | None, origins: torch.Tensor | None, mapping: torch.Tensor | None,
                          uniforms: np.ndarray, depth: int | None = None) -> Verdict:  # fmt: skip
        mode = "argmax" if draft_logits is None else "sampled"
        options = self._options(target_logits, draft_logits, mapping)
        uniforms, depth = to_device(uniforms, self.device), depth or self.config.draft_length
        return verify_tree(
            target_logits, draft_tokens, parents, draft_logits, uniforms, depth=depth, mode=mode, origins=origins, **options
        )  # fmt: skip

    def _options(
        self, target_logits: torch.Tensor, draft_logits: torch.Tensor | None, mapping: torch.Tensor | None
    ) -> dict[str, object]:
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
