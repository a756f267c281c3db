"""The state of a batch in a stack of EAGLE heads: key-value caches, and the passes over verified and drafted tokens."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from hedgespec.device import to_device
from hedgespec.drafters.stack_attention import Rows, attend_chain, attend_tree
from hedgespec.drafters.stack_weights import StackWeights
from hedgespec.ops.head_layers import rotary_append
from hedgespec.runtime.cache import capacity_for, grown
from hedgespec.runtime.capture import CudaGraphs, NotCapturable

MOST_CAPTURED = 64
"""Most tokens of a row in a pass that is captured: the passes of rounds are, those over prompts are not."""


class StackSession:
    """The state of a batch of B rows of different lengths, in caches [N, B, kv_heads, capacity, head_dim].

    The slot of a token is its position minus `base` of its row. Drafted tokens are written behind the verified ones and
    overwritten by the next tokens, so that a rollback changes no tensor. The first token of a row is not read, because no
    hidden state of the target precedes it, but it counts as consumed.

    Args:
        stack: the weights.
        batch: B.
        window: most verified tokens of a row that the heads attend to, unless one chunk has more. When a row exceeds it, the
            older half is discarded. None keeps all.
        graphs: captures of the passes as CUDA graphs; None runs them uncaptured.
    """

    def __init__(self, stack: StackWeights, batch: int, window: int | None = None, graphs: CudaGraphs | None = None):
        self.stack, self.window, self.graphs = stack, window, graphs
        heads, config, weight = len(stack.heads), stack.config, stack.weights["fc.weight"]
        self.keys = weight.new_zeros(heads, batch, config.num_key_value_heads, 0, config.head_dim)
        self.values = self.keys.clone()
        self.scored = np.zeros(batch, dtype=np.int64)
        """int64 [B]: number of tokens of each row that all heads have consumed and been scored on."""
        self.consumed = np.zeros((heads, batch), dtype=np.int64)
        """int64 [N, B]: number of tokens of each row that each head has consumed; a head that drafts is ahead of `scored`."""
        self.base = np.zeros(batch, dtype=np.int64)
        """int64 [B]: position of the token in slot 0 of each row."""
        self.given = weight.new_zeros(heads, batch, config.draft_vocab_size)
        """[N, B, Vd]: logits for the token after the last one scored."""
        self.features = weight.new_zeros(heads, batch, config.hidden_size)
        """[N, B, H]: the heads' hidden states from which `given` was computed."""
        self._drafting: tuple[Rows, torch.Tensor] | None = None
        """The rows that draft, and the hidden states [R, H] at their last tokens."""
        self._grown: tuple[torch.Tensor, torch.Tensor, int] | None = None
        """While a tree is drafted: hidden states [R, E, H] of the root and the nodes so far, bool [R, E, E] which of them are
        ancestors of each (itself included), and the depth reached."""

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values."""
        return 2 * self.keys.numel() * self.keys.element_size()

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Continues with these rows only."""
        index = to_device(rows, self.keys.device)
        for name in ("keys", "values", "given", "features"):
            setattr(self, name, getattr(self, name).index_select(1, index))
        self.scored, self.consumed, self.base = self.scored[rows], self.consumed[:, rows], self.base[rows]

    def score(self, rows: Sequence[int], tokens: Sequence[torch.Tensor], features: Sequence[torch.Tensor],
              wanted: Sequence[int] | None = None) -> torch.Tensor:  # fmt: skip
        """All heads consume the tokens that they have not been scored on.

        Args:
            rows: R distinct rows of the batch; either all of them start here or none does.
            tokens: for each row int64 [T_r], from its token number `scored` on, T_r >= 1 (T_r >= 2 at the start).
            features: for each row [T_r, W], the target's hidden states at the position before each token.
            wanted: only read at the start: number of last tokens of each row whose logits are returned, at most T_r - 2, and
                less than the window; None: 0.
        Returns: [N, R, T, Vd], T of the longest row: the logits that each head had for each of these tokens (at the start, for
            the last `wanted` of them), given the tokens before it. Values past a row's end are arbitrary.
        """
        known, asked = self.scored[rows], None
        counts = np.array([len(one) for one in tokens])
        if known[0] == 0:
            asked = np.ones(len(rows), dtype=np.int64) if wanted is None else 1 + np.asarray(wanted)
        now = Rows.at(rows, None, known, self.keys.device)
        hidden, logits = self._consume(now, tokens, features, asked)
        at = slice(None), now.index
        had = logits[:, :, :-1] if asked is not None else torch.cat([self.given[at][:, :, None], logits[:, :, :-1]], 2)
        if logits.shape[2] > 1:
            last = to_device((counts if asked is None else asked) - 1, hidden.device)
            hidden, logits = _at(hidden, last), _at(logits, last)
        self.given[at], self.features[at] = logits[:, :, 0], hidden[:, :, 0]
        self.scored[rows] += counts
        self.consumed[:, rows] = self.scored[rows]
        return had

    def begin_draft(self, rows: Sequence[int], heads: Sequence[int], tokens: Sequence[torch.Tensor],
             features: Sequence[torch.Tensor]) -> torch.Tensor:  # fmt: skip
        """One head a row consumes the tokens that it lacks and begins to draft.

        Args:
            rows: R distinct rows of the batch.
            heads: the head of each row.
            tokens, features: as in `score`, from token number `consumed` on; empty if the head has consumed all.
        Returns: [R, Vd], logits for the first drafted token.
        """
        now = Rows.at(rows, heads, self.consumed[heads, rows], self.keys.device)
        ends = self.consumed[heads, rows] + [len(one) for one in tokens]
        lacking = np.flatnonzero([len(one) for one in tokens]).tolist()
        if len(lacking) < len(rows):
            logits, hidden = self.given[now.which, now.index], self.features[now.which, now.index]
        if lacking:
            behind = now.some(lacking)
            news = [tokens[i] for i in lacking], [features[i] for i in lacking]
            found, given = (states[:, 0] for states in self._consume(behind, *news, np.ones(len(lacking), np.int64)))
            if behind is now:
                logits, hidden = given, found
            else:
                index = to_device(lacking, hidden.device)
                logits[index], hidden[index] = given, found
            self.consumed[heads, rows] = ends
        now.positions = self.consumed[heads, rows] - 1
        self._drafting, self._grown = (now, hidden), None
        return logits

    def _drafts_in_progress(self) -> tuple[Rows, torch.Tensor]:
        assert self._drafting is not None, "begin_draft comes first"
        return self._drafting

    def draft_next(self, chosen: Sequence[int], tokens: torch.Tensor) -> torch.Tensor:
        """Consumes one drafted token, int64 [R'], in each of these rows; the others stop drafting.

        Args:
            chosen: R' indices into the rows that drafted last.
        Returns: [R', Vd], logits for the next token.
        """
        last, hidden = self._drafts_in_progress()
        now = last.some(chosen)
        hidden = hidden if now is last else hidden[to_device(chosen, hidden.device)]
        hidden, logits = (states[:, 0] for states in self._forward(now, tokens[:, None], hidden[:, None], None, fused=True))
        now.positions = now.positions + 1
        self._drafting = now, hidden
        return logits

    def draft_level(self, tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        """Consumes the tokens at the next depth of a draft tree, in all rows that drafted last.

        Args:
            tokens: int64 [R, F].
            parents: int64 [R, F], the parent of each token among those that this method consumed since `begin_draft`, counted
                from 1; 0 is the root, the row's last verified token.

        Returns: [R, F, Vd], the logits that follow each token.
        """
        (now, root), (rows, count) = self._drafts_in_progress(), tokens.shape
        assert now.which is not None
        which = now.which
        if self._grown is None:
            self._grown = root[:, None], torch.ones(rows, 1, 1, dtype=torch.bool, device=tokens.device), 0
        states, lines, depth = self._grown
        known = states.shape[1]
        features = states.gather(1, parents[..., None].expand(-1, -1, states.shape[2]))
        own = torch.eye(count, dtype=torch.bool, device=tokens.device).expand(rows, -1, -1)
        new = torch.cat([lines.gather(1, parents[..., None].expand(-1, -1, known)), own], 2)
        starts = now.positions - self.base[now.places]
        self._make_room(int(starts.max()) + known - 1 + count)
        # Each token is passed as a row of its own, so that the kernels for chains write its keys and values.
        first = to_device(starts, tokens.device)
        slots = (first[:, None] + torch.arange(known - 1, known - 1 + count, device=tokens.device)).flatten()
        positions = to_device(now.positions + depth, tokens.device)
        rows_of, positions_of, which = (one.repeat_interleave(count) for one in (now.index, positions, which))
        hidden, logits = self._layer(
            tokens.reshape(-1, 1), features.reshape(-1, 1, states.shape[2]), rows_of, positions_of, slots, which=which,
            fused=True,
            attend=lambda queries, *_: attend_tree(queries, self.keys, self.values, now, starts, first, new),
        )  # fmt: skip
        hidden = hidden.view(rows, count, -1)
        self._grown = torch.cat([states, hidden], 1), torch.cat([F.pad(lines, (0, count)), new], 1), depth + 1
        return logits.view(rows, count, -1)

    def _consume(self, now: Rows, tokens: Sequence[torch.Tensor], features: Sequence[torch.Tensor],
                 asked: np.ndarray | None = None) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Runs `_forward` over verified tokens, given by row, that follow the first `now.positions` ones. Returns the states of
        the last `asked` positions of each row, int64 [R]; None: of all."""
        skipped = (now.positions == 0).astype(np.int64)  # no feature precedes a row's first token
        if self.window is not None:
            wanted = zip(now.places.tolist(), now.positions.tolist(), map(len, tokens))
            skipped = np.maximum(skipped, [self._forget(*one, asked is not None) for one in wanted])
        now.positions = now.positions + skipped - 1
        new_tokens, new_features = ([one[skip:] for one, skip in zip(each, skipped)] for each in (tokens, features))
        some = None if asked is None else (np.array([len(one) for one in new_tokens]) - asked, int(asked.max()))
        padded = pad_sequence(new_tokens, batch_first=True), pad_sequence(new_features, batch_first=True)
        return self._forward(now, *padded, some, fused=False)

    def _forward(self, now: Rows, tokens: torch.Tensor, features: torch.Tensor, some: tuple[np.ndarray, int] | None, *,
                 fused: bool) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Runs the heads over tokens [R, T], the first of each row at `now.positions`.

        Args:
            features: [R, T, W], the target's hidden states; if `fused`, the heads' own, [R, T, H].
            some: (int64 [R] first position, S): the results of S positions of each row are returned, from this one on; values
                past a row's end are arbitrary. None: of all T.
        Returns: hidden states [(N,) R, T or S, H] and logits [(N,) R, T or S, Vd]; without N if each row has one head.
        """
        slots, count = now.positions - self.base[now.places], tokens.shape[1]
        asked = None if some is None else some[1]
        now.ends = slots + (count if some is None else np.minimum(some[0] + asked, count))
        graphs = self.graphs if count <= MOST_CAPTURED and asked in (None, 1) else None
        spare = 0 if graphs is None else (1 << (count - 1).bit_length()) - count  # fewer shapes, so fewer captures
        self._make_room(int(slots.max()) + count + spare)
        inputs = [tokens, features, now.index, *(to_device(one, tokens.device) for one in (now.positions, slots))]
        optional = {"which": now.which, "first": None if some is None else to_device(some[0], tokens.device)}
        given = {name: one for name, one in optional.items() if one is not None}

        def run(*inputs: torch.Tensor, now: Rows | None = None) -> tuple[torch.Tensor, torch.Tensor]:
            named: dict[str, Any] = dict(zip(given, inputs[5:]))
            return self._layer(*inputs[:5], **named, asked=asked, fused=fused, now=now)

        inputs += given.values()
        if graphs is not None:
            inputs[:2] = F.pad(tokens, (0, spare)), F.pad(features, (0, 0, 0, spare))
            bucket = self.keys.shape[1], self.keys.shape[3]
            self.keys, self.values = graphs.held(bucket, (self.keys, self.values))
            try:
                hidden, logits = graphs((*bucket, fused, *given, *inputs[0].shape), run, *inputs)
                # Copied, because the next run overwrites the graph's outputs.
                return hidden[..., :count, :].clone(), logits[..., :count, :].clone()
            except NotCapturable as error:
                warnings.warn(f"the heads run uncaptured: {error}", stacklevel=1)
                inputs[:2], self.graphs = (tokens, features), None
        return run(*inputs, now=now)

    def _layer(self, tokens: torch.Tensor, features: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor,
               slots: torch.Tensor, which: torch.Tensor | None = None, first: torch.Tensor | None = None, *, fused: bool,
               asked: int | None = None, now: Rows | None = None,
               attend: Callable | None = None) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """The part of `_forward` on the device. Without `now`, shapes depend on the arguments' shapes and the capacity only,
        and control flow on no value, so that it can be captured.

        A head has one layer, so for positions whose results are not returned only keys and values are computed.
        """
        stack, shape = self.stack, tokens.shape
        each = None if which is None else which.repeat_interleave(shape[1])
        embedded, feature = stack.embed(tokens).flatten(0, 1), features.flatten(0, 1)
        if which is None:
            embedded, feature = embedded[None], feature.expand(len(stack.heads), -1, -1)
        layer = stack.at(each)
        if not fused:
            feature = layer.fuse(feature)
        residual, mixed = layer.mix(embedded, feature)
        qkv = layer.qkv(mixed).unflatten(-2, shape)
        queries = rotary_append(qkv, stack.frequency, positions, slots, self.keys, self.values, rows, which)
        if stack.query_scale != 1:
            queries = queries * stack.query_scale
        if asked is not None and shape[1] > 1:
            assert first is not None
            wanted = _at(queries.transpose(-3, -2).flatten(-2), first, asked)
            queries = wanted.unflatten(-1, queries.shape[-3::2]).transpose(-3, -2)
            residual = _at(residual.unflatten(-2, shape), first, asked).flatten(-3, -2)
            each = None if which is None else which.repeat_interleave(asked)
            slots, layer, shape = slots + first, stack.at(each), torch.Size((shape[0], asked))
        attended = (attend or self._attend)(queries, rows, slots, which, now).transpose(-3, -2).flatten(-2).flatten(-3, -2)
        own, logits = layer.answer(layer.leave(residual, attended))
        return own.unflatten(-2, shape), logits.unflatten(-2, shape)

    def _attend(self, queries: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor, which: torch.Tensor | None,
                now: Rows | None) -> torch.Tensor:  # fmt: skip
        return attend_chain(queries, self.keys, self.values, rows, slots, which, now)

    def _make_room(self, end: int) -> None:
        if end > self.keys.shape[3]:
            capacity = capacity_for(end)
            if self.window is not None:  # the window, and room for drafted tokens
                capacity = min(capacity, self.window + 32)
            self.keys, self.values = (grown(one, 3, max(end, capacity)) for one in (self.keys, self.values))

    def _forget(self, row: int, position: int, count: int, last_only: bool) -> int:
        """Discards old tokens of a row so that `count` more at `position` fit into the window. Returns how many of the new ones
        are skipped."""
        assert self.window is not None
        if position - self.base[row] + count <= self.window:
            return 0
        skipped = max(0, count - self.window) if last_only else 0
        first = position + skipped - max(0, self.window // 2 - count)  # position of the first token that is kept
        if (scored := self.scored[row]) > 0:
            first = min(first, scored)  # tokens that other heads have not consumed yet must stay
        shift = first - 1 - self.base[row]
        if shift > 0:
            for buffer in (self.keys, self.values):
                buffer[:, row, :, : max(0, buffer.shape[3] - shift)] = buffer[:, row, :, shift:].clone()
            self.base[row] += shift
            self.consumed[:, row] = np.maximum(self.consumed[:, row], first)
        return skipped


def _at(states: torch.Tensor, first: torch.Tensor, count: int = 1) -> torch.Tensor:
    """Returns `count` positions of each row of states [..., R, T, X], from `first` int64 [R] on, as [..., R, count, X].
    Positions past the last one repeat it."""
    positions = first[:, None] + torch.arange(count, device=states.device)
    rows = torch.arange(len(first), device=states.device)[:, None]
    return states[..., rows, positions.clamp(max=states.shape[-2] - 1), :]
