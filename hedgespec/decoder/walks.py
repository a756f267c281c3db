"""Verification of one draft token by token, for rows whose logits the caller processes.

A logits processor may keep state, so it must be called once for every emitted token, in order, and for no other token. A walk
asks for the processed logits of one token after another, and ends where the draft is rejected or used up.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

import numpy as np
import torch

from hedgespec.config import DecodeConfig
from hedgespec.decoder.row import Row
from hedgespec.device import to_device
from hedgespec.records import Draft, Verdict

Emit = Callable[[Row, torch.Tensor, Verdict], tuple[list[int], int]]
"""(row, processed logits [1, V], verdict) -> the emitted tokens, one or none, and the number of accepted draft tokens, 0 if the
row is finished."""


class Walk:
    """One draft while it is verified token by token."""

    def __init__(self) -> None:
        self.emitted: list[int] = []
        self.verified: list[torch.Tensor] = []
        """Processed logits [1, V] of every emitted token."""
        self.path: list[int] = []
        """Their indices among the row's positions."""
        self._steps: Generator[int, torch.Tensor, None] | None = None

    def begin(self, steps: Generator[int, torch.Tensor, None]) -> int:
        """Begins the walk, and returns the index of the logits that it needs first.

        Args:
            steps: yields the index, among the row's positions, of the logits for the next token; receives them processed,
                [1, V].
        """
        self._steps = steps
        return next(steps)

    def advance(self, processed: torch.Tensor) -> int | None:
        """Verifies one token by its processed logits [1, V]. Returns the index of the logits needed next; None at the end."""
        try:
            return self._steps.send(processed)
        except StopIteration:
            return None


class Walker:
    """Makes the steps of walks.

    Args:
        config: the decoder's configuration.
        one_hot: whether proposals are the most likely tokens.
        device: of the target's logits.
        verify, verify_tree: call the operations with the batch's sampling, see `Verifier`.
        emit: emits the token of a verdict.
    """

    def __init__(self, config: DecodeConfig, one_hot: bool, device: torch.device, verify: Callable[..., Verdict],
                 verify_tree: Callable[..., Verdict], emit: Emit) -> None:  # fmt: skip
        self.config, self.one_hot, self.device = config, one_hot, device
        self._verify, self._verify_tree, self._emit = verify, verify_tree, emit

    def begin(self, walk: Walk, row: Row, draft: Draft, usable: int, uniforms: np.ndarray) -> int:
        """Begins the walk of a draft of which the first `usable` tokens may be used. Returns the index of the logits that it
        needs first."""
        steps = self._chain if draft.parents is None else self._tree
        return walk.begin(steps(walk, row, draft, usable, uniforms))

    def _chain(
        self, walk: Walk, row: Row, draft: Draft, usable: int, uniforms: np.ndarray
    ) -> Generator[int, torch.Tensor, None]:  # fmt: skip
        drafted = min(len(draft.tokens), usable)
        for position in range(drafted + 1):
            here = slice(position, min(position + 1, drafted))  # empty at the bonus position
            walk.path.append(position)
            walk.verified.append((yield position))
            # `verify` wants logits for a bonus position too; it is not used, because the walk continues there.
            target_logits = walk.verified[-1].expand(1 + here.stop - here.start, -1)[None]
            draft_logits = None if draft.logits is None or position == drafted else draft.logits[None, here]
            mapping = None if draft_logits is None else draft.draft_to_target
            tests = np.append(uniforms[here], uniforms[-1])[None]
            verdict = self._verify(target_logits, draft.tokens[None, here], draft_logits, mapping, tests)
            tokens, accepted = self._emit(row, walk.verified[-1], verdict)
            walk.emitted += tokens
            if accepted == 0:
                return

    def _tree(
        self, walk: Walk, row: Row, draft: Draft, usable: int, uniforms: np.ndarray
    ) -> Generator[int, torch.Tensor, None]:  # fmt: skip
        node, parents, tokens = -1, draft.parents.tolist(), draft.tokens.tolist()
        if draft.widths is not None:
            row.record_tree(draft.widths.tolist())
        for depth in range(self.config.draft_length + 1):
            walk.path.append(node + 1)
            walk.verified.append((yield node + 1))
            children = [place for place, parent in enumerate(parents) if parent == node and tokens[place] >= 0]
            verdict = self._verify_children(walk.verified[-1], draft, node, children, uniforms, depth)
            emitted, accepted = self._emit(row, walk.verified[-1], verdict)
            walk.emitted += emitted
            if accepted == 0:
                return
            node = children[int(verdict.path[0, 0])]

    def _verify_children(
        self, logits: torch.Tensor, draft: Draft, node: int, children: Sequence[int], uniforms: np.ndarray, depth: int
    ) -> Verdict:
        """Verifies the children of one node by the target's logits [1, V] behind it."""
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
        return self._verify_tree(
            target_logits, drafted, root, draft_logits, origins, draft.draft_to_target, tests[None], depth=1
        )
