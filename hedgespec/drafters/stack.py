"""Equal-shaped EAGLE heads as one: weights stacked, caches in one buffer, every layer operation once for all of them.

An evaluation lets all N heads read the same verified tokens. Head after head that is N times the launches and, of what the
heads share (the tokens' embeddings, the target's features, the rows of the target's output matrix), N times the reading.
The head that drafts uses the same weights and the same cache, by its index.

The arithmetic is `EagleHead`'s and `EagleSession`'s, with two dimensions more: heads, and rows of a batch that advance each
at its own pace.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeGuard

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from hedgespec.device import settle, to_device
from hedgespec.drafters.eagle import EagleHead, EagleLayer
from hedgespec.ops.head_layers import rotary_append, stack_linear, stack_rms_norm, swiglu
from hedgespec.ops.linear import FewRowLinear
from hedgespec.runtime.cache import capacity_for, grown
from hedgespec.runtime.capture import CudaGraphs, NotCapturable, lend

MOST_CAPTURED = 64
"""Tokens of a row up to which a pass is captured: those of rounds, and not of prompts."""


class HeadStack:
    """The weights of N equal-shaped heads, each [N, ...].

    The heads are read and never changed. With N >= 2 the stack holds a copy of their weights, so that the heads' memory is
    needed twice for as long as both live (`nbytes` tells how much of it is the stack's own); a single head's weights are not
    copied.

    Where all output rows are rows of one matrix (a draft vocabulary's slice of the target's head), the stack has them once, as
    a table [U, H] of the U ids that any head names, and an index [N, Vd] into it.

    Args:
        heads: N >= 1 heads whose `kind_of` is the same.
    """

    def __init__(self, heads: Sequence[EagleHead]):
        self.heads, self.config, self.embed = tuple(heads), heads[0].config, heads[0].embed
        self.weights: dict[str, torch.Tensor] = {}
        for name in self.config.shapes:
            own = [head.get_parameter(name).detach() for head in heads]
            if name == "lm_head.weight":
                self.weights[name], self.index = _shared_rows(heads)
            else:
                self.weights[name] = torch.stack(own) if len(own) > 1 else own[0][None]
        self.maps, self.map_of = None, None
        if heads[0].draft_to_target is not None:
            self.maps = torch.stack([head.draft_to_target for head in heads]).to(self.weights["fc.weight"].device)
            self.map_of = list(self.maps)
        self.frequency = heads[0].rope_frequency.to(self.weights["fc.weight"].device)
        self.query_scale = heads[0].rope_factor ** 2
        """Of rotated queries: what a factor of both queries and keys does to their products."""
        settle(self.frequency.device)  # requests on any stream may use the stack
        self._origin = self._origins()
        self._idle: list[CudaGraphs] = []

    @property
    def nbytes(self) -> int:
        """Bytes of the weights that are the stack's own: 0 for a single head, or one matrix that all heads share."""
        theirs = {one.untyped_storage().data_ptr() for head in self.heads for one in head.parameters()}
        return sum(one.nbytes for one in self.weights.values() if one.untyped_storage().data_ptr() not in theirs)

    def is_current(self) -> bool:
        """Whether the heads are still what was stacked: neither moved, nor replaced, nor written to.

        torch counts what is written to a tensor, except by way of `.data` and to inference tensors: the stack does not see it.
        """
        return self._origin == self._origins()

    def _origins(self) -> list[tuple[int, int]]:
        modules = *self.heads, self.heads[0].embedding
        tensors = chain.from_iterable(chain(module.parameters(), module.buffers()) for module in modules)
        return [(one.data_ptr(), 0 if one.is_inference() else one._version) for one in tensors]

    def session(self, batch: int, window: int | None = None, *, captured: bool = False) -> StackSession:
        """A fresh batch, see `StackSession`; `captured` on a GPU, and without an effect elsewhere."""
        if not captured or self.frequency.device.type != "cuda":
            return StackSession(self, batch, window)
        session = StackSession(self, batch, window)
        session.graphs = lend(self._idle, CudaGraphs, session)
        return session

    def at(self, which: torch.Tensor | None) -> StackLayer:
        """The weights for rows that all heads work on, or of which each belongs to one head: `which` [R]."""
        return StackLayer(self, which)


class StackLayer(EagleLayer):
    """A stack's weights, for states [N, R, ...] of all heads or [R, ...] of the heads `which`."""

    def __init__(self, stack: HeadStack, which: torch.Tensor | None):
        self.stack, self.config, self.which = stack, stack.config, which

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weights, which = self.stack.weights, self.which
        index = self.stack.index if name == "lm_head" else None
        product = stack_linear(x, weights[f"{name}.weight"], which, index=index)
        if name in self.config.biases:
            bias = weights[f"{name}.bias"]
            product = product + (bias[:, None] if which is None else bias[which])
        return product

    def rms(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight, eps, which = self.stack.weights[f"{name}.weight"], self.config.rms_norm_eps, self.which
        if x.ndim == (3 if which is None else 2):
            return stack_rms_norm(x, weight, eps, which)
        parts = x.shape[-2]  # a norm of each attention head
        which = None if which is None else which.repeat_interleave(parts)
        return stack_rms_norm(x.flatten(-3, -2), weight, eps, which).unflatten(-2, (-1, parts))

    def activate(self, gate_up: torch.Tensor) -> torch.Tensor:
        return swiglu(gate_up)


def is_plain(drafter: object) -> TypeGuard[EagleHead]:
    """Whether a drafter is an EAGLE head and nothing else: no class of its own, no hooks, no layer wrapped or replaced, and
    every weight, and the draft vocabulary, of the size that its configuration names."""
    if type(drafter) is not EagleHead:
        return False
    weights, expected = dict(drafter.named_parameters()), drafter.config.shapes
    if drafter.owns_embedding:
        weights.pop("embed_tokens.weight", None)
    mapping = drafter.draft_to_target
    return (
        {name: tuple(weight.shape) for name, weight in weights.items()} == expected
        and (mapping is None or mapping.shape == (drafter.config.draft_vocab_size,))
        and all(
            type(module) in (EagleHead, FewRowLinear, nn.RMSNorm, nn.Linear, nn.Embedding)
            and not (
                module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) or "session" in vars(module)
            )
            for module in drafter.modules()
        )
    )


def kind_of(head: EagleHead) -> tuple:
    """Heads of one kind can be stacked: same shapes and variant, dtype, device and embedding."""
    weight = head.fc.weight
    return head.config, weight.dtype, weight.device, id(head.embedding), head.draft_to_target is None


def _shared_rows(heads: Sequence[EagleHead]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """All heads' output rows: (table [U, H], index [N, Vd]) where they are rows of one matrix, else ([N, Vd, H], None)."""
    rows = [head.lm_head.weight.detach() for head in heads]
    if len(heads) == 1:
        return rows[0][None], None
    names = torch.arange(len(rows[0]), device=rows[0].device)
    if heads[0].draft_to_target is None and all(one.data_ptr() == rows[0].data_ptr() for one in rows):  # the target's own
        return rows[0], names.repeat(len(rows), 1)
    ids = [names if head.draft_to_target is None else head.draft_to_target.to(names.device) for head in heads]
    union, index = torch.stack(ids).unique(return_inverse=True)
    table = rows[0].new_empty(len(union), rows[0].shape[1])
    for place, one in zip(index, rows):
        table[place] = one
    if all(torch.equal(table[place], one) for place, one in zip(index, rows)):
        return table, index
    return torch.stack(rows), None


@dataclass
class _Rows:
    """Some rows of the batch, where they are, and which head is at work on each: on the host, and where indexing needs it."""

    places: np.ndarray
    """int64 [R], rows of the batch."""
    heads: np.ndarray | None
    """int64 [R], the head of each; None where all heads are at work on all rows."""
    positions: np.ndarray
    """int64 [R], position of the next token: how many are in the cache, forgotten ones counted."""
    index: torch.Tensor
    """`places` on the device."""
    which: torch.Tensor | None
    """`heads` on the device."""
    ends: np.ndarray | None = None
    """int64 [R], slots that the last position of the chunk at hand may look at."""

    @classmethod
    def at(cls, places: ArrayLike, heads: ArrayLike, positions: np.ndarray, device: torch.device) -> _Rows:
        places, heads = np.asarray(places), None if heads is None else np.asarray(heads)
        which = None if heads is None else to_device(heads, device)
        return cls(places, heads, positions, to_device(places, device), which)

    def some(self, chosen: Sequence[int]) -> _Rows:
        if len(chosen) == len(self.places):
            return self
        return _Rows.at(self.places[chosen], self.heads[chosen], self.positions[chosen], self.index.device)


class StackSession:
    """A batch's view of a stack: B rows, of each its own number of tokens, in caches [N, B, kv_heads, capacity, head_dim].

    A token's slot is its position less the row's `base`. What is drafted lies behind what is verified and is overwritten by
    what comes next: rolling back is bookkeeping.

    Args:
        stack: the weights.
        batch: B.
        window: most verified tokens of a row that are kept for its heads to look at, unless one chunk has more; where they
            are exceeded the older half is forgotten. None keeps all.
        graphs: captures of the passes; None runs them as they are.

    A row's first token is not read, since no feature precedes it, but counts as taken in.
    """

    def __init__(self, stack: HeadStack, batch: int, window: int | None = None, graphs: CudaGraphs | None = None):
        self.stack, self.window, self.graphs = stack, window, graphs
        heads, config, weight = len(stack.heads), stack.config, stack.weights["fc.weight"]
        self.keys = weight.new_zeros(heads, batch, config.num_key_value_heads, 0, config.head_dim)
        self.values = self.keys.clone()
        self.scored = np.zeros(batch, dtype=np.int64)
        """int64 [B]: number of tokens of each row that all heads have consumed and been scored on."""
        self.consumed = np.zeros((heads, batch), dtype=np.int64)
        """int64 [N, B]: number of tokens of each row that each head has consumed; a head that drafts is ahead of `scored`."""
        self.base = np.zeros(batch, dtype=np.int64)
        """Position of each row's slot 0, [B]."""
        self.given = weight.new_zeros(heads, batch, config.draft_vocab_size)
        """Logits for the token after the last of `scored`, [N, B, Vd]."""
        self.features = weight.new_zeros(heads, batch, config.hidden_size)
        """The heads' own hidden states that gave them, [N, B, H]."""
        self._drafting: tuple[_Rows, torch.Tensor] | None = None
        """Who drafts, and the hidden states [R, H] they draft on from."""
        self._grown: tuple[torch.Tensor, torch.Tensor, int] | None = None
        """Of a draft tree: the hidden states [R, E, H] of the root and the nodes taken in, their lines of descent, bool
        [R, E, E], and the depth reached."""

    @property
    def cache_bytes(self) -> int:
        """Memory of keys and values."""
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
            rows: R distinct rows of the batch, all of them at their first tokens or none.
            tokens: of each row int64 [T_r], from its token `scored` on, T_r >= 1 (at first 2).
            features: of each row [T_r, W], the target's hidden states before each token.
            wanted: where the rows are at their first tokens: of how many of each row's last ones to return the logits, at most
                T_r - 2, and less than the window; None: of none. Ignored elsewhere.
        Returns: [N, R, T, Vd]: the logits that each head had for each of these tokens (at first the last `wanted` of them),
            given what precedes it, T of the longest; anything past a row's end.
        """
        known, asked = self.scored[rows], None
        counts = np.array([len(one) for one in tokens])
        if known[0] == 0:
            asked = np.ones(len(rows), dtype=np.int64) if wanted is None else 1 + np.asarray(wanted)
        now = _Rows.at(rows, None, known, self.keys.device)
        hidden, logits = self._take_in(now, tokens, features, asked)
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
        """One head a row takes in what it lacks and begins to draft.

        Args:
            rows: R distinct rows of the batch.
            heads: the head of each.
            tokens, features: as for `score`, from the token `consumed` on; empty where the head lacks nothing.
        Returns: [R, Vd], logits for the first drafted token.
        """
        now = _Rows.at(rows, heads, self.consumed[heads, rows], self.keys.device)
        ends = self.consumed[heads, rows] + [len(one) for one in tokens]
        lacking = np.flatnonzero([len(one) for one in tokens]).tolist()
        if len(lacking) < len(rows):
            logits, hidden = self.given[now.which, now.index], self.features[now.which, now.index]
        if lacking:
            behind = now.some(lacking)
            news = [tokens[i] for i in lacking], [features[i] for i in lacking]
            found, given = (states[:, 0] for states in self._take_in(behind, *news, np.ones(len(lacking), np.int64)))
            if behind is now:
                logits, hidden = given, found
            else:
                index = to_device(lacking, hidden.device)
                logits[index], hidden[index] = given, found
            self.consumed[heads, rows] = ends
        now.positions = self.consumed[heads, rows] - 1
        self._drafting, self._grown = (now, hidden), None
        return logits

    def draft_next(self, chosen: Sequence[int], tokens: torch.Tensor) -> torch.Tensor:
        """Takes in one drafted token, int64 [R'], of these among the rows that drafted last, and forgets the others.

        Returns: [R', Vd], logits for the next.
        """
        last, hidden = self._drafting
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
        (now, root), (rows, count) = self._drafting, tokens.shape
        if self._grown is None:
            self._grown = root[:, None], torch.ones(rows, 1, 1, dtype=torch.bool, device=tokens.device), 0
        states, lines, depth = self._grown
        known = states.shape[1]
        features = states.gather(1, parents[..., None].expand(-1, -1, states.shape[2]))
        own = torch.eye(count, dtype=torch.bool, device=tokens.device).expand(rows, -1, -1)
        new = torch.cat([lines.gather(1, parents[..., None].expand(-1, -1, known)), own], 2)
        starts = now.positions - self.base[now.places]
        self._make_room(int(starts.max()) + known - 1 + count)
        # A row of its own for each token: then the kernels that write a chain's keys and values write a tree's.
        first = to_device(starts, tokens.device)
        slots = (first[:, None] + torch.arange(known - 1, known - 1 + count, device=tokens.device)).flatten()
        positions = to_device(now.positions + depth, tokens.device)
        rows_of, positions_of, which = (one.repeat_interleave(count) for one in (now.index, positions, now.which))
        hidden, logits = self._layer(
            tokens.reshape(-1, 1), features.reshape(-1, 1, states.shape[2]), rows_of, positions_of, slots, which=which,
            fused=True,
            attend=lambda queries, *_: self._attend_tree(queries, now, starts, first, new),
        )  # fmt: skip
        hidden = hidden.view(rows, count, -1)
        self._grown = torch.cat([states, hidden], 1), torch.cat([F.pad(lines, (0, count)), new], 1), depth + 1
        return logits.view(rows, count, -1)

    def _attend_tree(self, queries: torch.Tensor, now: _Rows, starts: np.ndarray, first: torch.Tensor,
                     lines: torch.Tensor) -> torch.Tensor:  # fmt: skip
        """Attention of queries [R * F, A, 1, D] to what is verified of their rows and to their lines of descent [R, F, E + F];
        the root, which is verified, is the first of a line."""
        rows, count, known = lines.shape
        queries = queries.unflatten(0, (rows, count))[..., 0, :].transpose(1, 2)
        if queries.is_cpu or rows == 1:  # views, where a launch costs little
            apart = []
            places = now.heads.tolist(), now.places.tolist(), starts.tolist()
            for query, line, head, row, start in zip(queries, lines, *places):
                mask = F.pad(line[:, 1:], (start, 0), value=True)
                keys, values = (one[head, row, None, :, : start + known - 1] for one in (self.keys, self.values))
                apart.append(_attention(query[None], keys, values, mask))
            attended = torch.cat(apart)
        else:
            end = int(starts.max()) + known - 1
            keys, values = (one[now.which, now.index, :, :end] for one in (self.keys, self.values))
            place = torch.arange(end, device=queries.device) - first[:, None] + 1
            drafted = lines.gather(2, place.clamp(0, known - 1)[:, None].expand(-1, count, -1))
            mask = torch.where(place[:, None] < 1, True, drafted & (place < known)[:, None])
            attended = _attention(queries, keys, values, mask[:, None])
        return attended.transpose(1, 2).flatten(0, 1)[:, :, None]

    def _take_in(self, now: _Rows, tokens: Sequence[torch.Tensor], features: Sequence[torch.Tensor],
                 asked: np.ndarray | None = None) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """`_forward` over verified tokens that follow `now.positions` of them, given by row, of each of which the last `asked`
        positions, int64 [R], are wanted; None: all."""
        skipped = (now.positions == 0).astype(np.int64)  # no feature precedes a row's first token
        if self.window is not None:
            wanted = zip(now.places.tolist(), now.positions.tolist(), map(len, tokens))
            skipped = np.maximum(skipped, [self._forget(*one, asked is not None) for one in wanted])
        now.positions = now.positions + skipped - 1
        new_tokens, new_features = ([one[skip:] for one, skip in zip(each, skipped)] for each in (tokens, features))
        some = None if asked is None else (np.array([len(one) for one in new_tokens]) - asked, int(asked.max()))
        padded = pad_sequence(new_tokens, batch_first=True), pad_sequence(new_features, batch_first=True)
        return self._forward(now, *padded, some, fused=False)

    def _forward(self, now: _Rows, tokens: torch.Tensor, features: torch.Tensor, some: tuple[np.ndarray, int] | None, *,
                 fused: bool) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """The heads over tokens [R, T] that come at `now.positions`.

        Args:
            features: [R, T, W], the target's hidden states; where they are `fused` the heads' own, [R, T, H].
            some: from which position int64 [R] of each row on how many S are asked for; past a row's end comes anything. None
                asks for all T.
        Returns: hidden states [(N,) R, T or S, H] and logits [(N,) R, T or S, Vd]; no N where a row has one head.
        """
        slots, count = now.positions - self.base[now.places], tokens.shape[1]
        asked = None if some is None else some[1]
        now.ends = slots + (count if some is None else np.minimum(some[0] + asked, count))
        captured = self.graphs is not None and count <= MOST_CAPTURED and asked in (None, 1)
        spare = (1 << (count - 1).bit_length()) - count if captured else 0  # few shapes, few captures
        self._make_room(int(slots.max()) + count + spare)
        inputs = [tokens, features, now.index, *(to_device(one, tokens.device) for one in (now.positions, slots))]
        optional = {"which": now.which, "first": None if some is None else to_device(some[0], tokens.device)}
        names = [name for name, one in optional.items() if one is not None]

        def run(*inputs: torch.Tensor, now: _Rows | None = None) -> tuple[torch.Tensor, torch.Tensor]:
            given: dict[str, Any] = dict(zip(names, inputs[5:]))
            return self._layer(*inputs[:5], **given, asked=asked, fused=fused, now=now)

        inputs += [optional[name] for name in names]
        if captured:
            inputs[:2] = F.pad(tokens, (0, spare)), F.pad(features, (0, 0, 0, spare))
            bucket = self.keys.shape[1], self.keys.shape[3]
            self.keys, self.values = self.graphs.held(bucket, (self.keys, self.values))
            try:
                hidden, logits = self.graphs((*bucket, fused, *names, *inputs[0].shape), run, *inputs)
                # Copies: the next run may write where they are.
                return hidden[..., :count, :].clone(), logits[..., :count, :].clone()
            except NotCapturable as error:
                warnings.warn(f"the heads run as they are, not captured: {error}", stacklevel=1)
                inputs[:2], self.graphs = (tokens, features), None
        return run(*inputs, now=now)

    def _layer(self, tokens: torch.Tensor, features: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor,
               slots: torch.Tensor, which: torch.Tensor | None = None, first: torch.Tensor | None = None, *, fused: bool,
               asked: int | None = None, now: _Rows | None = None,
               attend: Callable | None = None) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """`_forward` on the device; without `now` its shapes are those of its arguments and the capacity, and no value decides
        what runs.

        With a single layer, positions whose hidden states nobody asks for are keys and values and nothing more.
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
            wanted = _at(queries.transpose(-3, -2).flatten(-2), first, asked)
            queries = wanted.unflatten(-1, queries.shape[-3::2]).transpose(-3, -2)
            residual = _at(residual.unflatten(-2, shape), first, asked).flatten(-3, -2)
            each = None if which is None else which.repeat_interleave(asked)
            slots, layer, shape = slots + first, stack.at(each), torch.Size((shape[0], asked))
        attended = (attend or self._attend)(queries, rows, slots, which, now).transpose(-3, -2).flatten(-2).flatten(-3, -2)
        own, logits = layer.answer(layer.leave(residual, attended))
        return own.unflatten(-2, shape), logits.unflatten(-2, shape)

    def _attend(self, queries: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor, which: torch.Tensor | None,
                now: _Rows | None) -> torch.Tensor:  # fmt: skip
        """Attention of queries [N, R, A, T, D] or [R, A, T, D], a row's first at `slots` [R], to all slots up to their own."""
        keys, values, count = self.keys, self.values, queries.shape[-2]
        own = slots[:, None] + torch.arange(count, device=slots.device)
        if now is not None:  # the host knows where the rows end
            ends = now.ends
            end = int(ends.max())
            if which is not None and (queries.is_cpu or len(ends) == 1):  # views, where a launch costs little
                each = zip(queries, now.heads.tolist(), now.places.tolist(), ends.tolist(), own[..., None])
                return torch.cat([
                    _attention(
                        query[None], keys[head, row, None, :, :last], values[head, row, None, :, :last],
                        None if count == 1 else torch.arange(last, device=slots.device) <= until,
                    )
                    for query, head, row, last, until in each
                ])  # fmt: skip
            keys, values = keys[:, :, :, :end], values[:, :, :, :end]
        if which is not None:
            keys, values = keys[which, rows], values[which, rows]
        elif len(rows) < keys.shape[1]:
            keys, values = keys[:, rows].flatten(0, 1), values[:, rows].flatten(0, 1)
        else:  # all rows, which come in order
            keys, values = keys.flatten(0, 1), values.flatten(0, 1)
        mask = torch.arange(keys.shape[2], device=slots.device) <= own[:, None, :, None]
        if which is not None:
            return _attention(queries, keys, values, mask)
        mask = mask.repeat(len(queries), 1, 1, 1) if len(rows) > 1 else mask
        return _attention(queries.flatten(0, 1), keys, values, mask).unflatten(0, queries.shape[:2])

    def _make_room(self, end: int) -> None:
        if end > self.keys.shape[3]:
            capacity = capacity_for(end)
            if self.window is not None:  # and room for what is drafted
                capacity = min(capacity, self.window + 32)
            self.keys, self.values = (grown(one, 3, max(end, capacity)) for one in (self.keys, self.values))

    def _forget(self, row: int, position: int, count: int, last_only: bool) -> int:
        """Makes a row fit the window before `count` tokens come at `position`; returns how many of them to leave out."""
        if position - self.base[row] + count <= self.window:
            return 0
        skipped = max(0, count - self.window) if last_only else 0
        first = position + skipped - max(0, self.window // 2 - count)  # of the tokens that stay
        if (scored := self.scored[row]) > 0:
            first = min(first, scored)  # a head that drafts is ahead of what others still have to consume
        shift = first - 1 - self.base[row]
        if shift > 0:
            for buffer in (self.keys, self.values):
                buffer[:, row, :, : max(0, buffer.shape[3] - shift)] = buffer[:, row, :, shift:].clone()
            self.base[row] += shift
            self.consumed[:, row] = np.maximum(self.consumed[:, row], first)
        return skipped


def _at(states: torch.Tensor, first: torch.Tensor, count: int = 1) -> torch.Tensor:
    """States [..., R, T, X] of each row from one position [R] on, [..., R, count, X]; past the last one that one again."""
    positions = first[:, None] + torch.arange(count, device=states.device)
    rows = torch.arange(len(first), device=states.device)[:, None]
    return states[..., rows, positions.clamp(max=states.shape[-2] - 1), :]


def _attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)
