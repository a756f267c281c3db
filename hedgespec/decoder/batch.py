"""The rounds of a batch: rows draft each for itself, one forward of the target and one call a stage serve them all.

Between rounds the target's cache holds every token of a row but the last, whose forward is the next round's; the features,
kept at the position before their token, have a row for every token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from hedgespec.decoder.pool import UNSOUND, Heads, Pool, Singles, no_draft
from hedgespec.decoder.request import Request
from hedgespec.decoder.row import NOBODY, Row
from hedgespec.evaluate import evaluate
from hedgespec.linear import few_row_view
from hedgespec.metrics import timed
from hedgespec.records import Choice, Draft, Verdict
from hedgespec.sampling import Sampling
from hedgespec.target import TargetSession, device_of
from hedgespec.transfer import SideStream, to_device
from hedgespec.verify import verify

if TYPE_CHECKING:
    from hedgespec.decoder import Decoder


MOST_MAPS = 64
"""Stacked maps of drafters that drafted together, kept by a batch."""


@dataclass
class _Scores:
    """An evaluation under way."""

    rows: list[Row]
    counts: list[int]
    """Tokens of each row."""
    parts: list[tuple[list[int], Callable[[], np.ndarray]]]
    """Drafters, and what brings acceptance_prob, acceptance_ratio and whether the drafter's logits of the row were sound,
    float64 [3, n, R, T]."""


class Batch:
    """Rows that are decoded together until each is finished: arguments of `Decoder.decode`, which row is the first, and which
    drafters' failures the caller knows of."""

    def __init__(self, decoder: Decoder, requests: Sequence[Request], first: int, sampling: Sampling,
                 on_tokens: Callable[[int, list[int]], None] | None, warned: set[str]):  # fmt: skip
        drafters, self.config = decoder.drafters, decoder.config
        self.device, self.sampling, self.on_tokens = device_of(decoder.target), sampling, on_tokens
        self.one_hot = self.config.mode == "argmax" or sampling.temperature == 0
        # A view of the target as it is now: adapters and hooks may have come and gone since the last request.
        view = few_row_view(decoder.target)
        layers = (drafter.aux_layers for drafter in drafters)
        self.target = TargetSession(view, layers, len(requests), captures=decoder.captures)
        self.rows = [
            Row(index, request, drafters, self.config, decoder.new_learner(), decoder.vocabulary, features, warned)
            for index, (request, features) in enumerate(zip(requests, self.target.features, strict=True), start=first)
        ]
        self._place()
        self.pool = Pool(drafters, decoder.stacks(), self.rows, self.config.drafter_window, self.config.compile)
        self.overlaps = self.config.overlap if self.config.overlap is not None else self.device.type == "cuda"
        self.side = SideStream(self.device)
        self.under_way: list[_Scores] = []
        """Evaluations whose results nobody has looked at, the oldest first."""
        self.stacked_maps: dict[tuple[int, ...], tuple[torch.Tensor, list[torch.Tensor]]] = {}
        self.began = time.perf_counter()
        for row in self.rows:
            row.stats.began = self.began

    def begin(self, past: DynamicCache | None) -> None:
        """Reads the prompts and emits every row's first token, the target's own: a head needs it before it can draft."""
        with timed([row.stats for row in self.rows], "prompt"):
            if past is not None:
                self._load(past)
            logits = self._read_prompts()
            nothing = [no_draft(row) for row in self.rows]
            emitted, _ = self._verify(logits, nothing, [NOBODY] * len(self.rows), [row.uniforms(1) for row in self.rows])
            going_on = [row for row in self.rows if row.scores_all and not row.finished]
            if going_on:
                self.pool.score(going_on, [0] * len(going_on))
        self._hand_out(emitted)

    def round(self) -> None:
        """One target forward and everything around it."""
        length, rows, stats = self.config.draft_length, self.rows, [row.stats for row in self.rows]
        uniforms = np.stack([row.uniforms(2 * length + 2) for row in rows])  # one selects, K draft, K + 1 verify
        with timed(stats, "select"):
            weights = [row.weights() for row in rows]
            choices = [row.select(held, one) for row, held, one in zip(rows, weights, uniforms[:, 0].tolist())]
        with timed(stats, "draft"):
            to_draft = to_device(uniforms[:, 1 : 1 + length], self.device)
            drafts = self.pool.draft(choices, to_draft, self.sampling, self.one_hot)
        with timed(stats, "verify"):
            last = [torch.cat([row.tokens[row.length - 1 : row.length], draft.tokens[0]]) for row, draft in zip(rows, drafts)]
            tokens = stack(last, 0)
            logits = self.target.forward(tokens, tokens.shape[1])
            emitted, verified = self._verify(logits, drafts, choices, uniforms[:, length + 1 :])
            self.target.keep([len(tokens) for tokens in emitted])
        for row, chunk in zip(rows, verified):
            if row.scores_all:
                row.unscored.append(chunk)
        if due := [row for row in rows if row.evaluation_is_due()]:
            with timed(stats, "prefill"):
                scored = self.pool.score(due, [row.unscored_tokens for row in due])
            with timed(stats, "evaluate"):
                self._evaluate(due, scored)
        later = self.overlaps and bool(due) and not any(row.finished for row in rows)
        with timed(stats, "learn"):
            self._observe(later)
            for row, choice, draft, held, tokens in zip(rows, choices, drafts, weights, emitted):
                drafted = draft.tokens.shape[1] > 0
                if drafted:
                    row.reward(choice.drafter, held, len(tokens))
                row.stats.record_round(choice.drafter if drafted else None, held, len(tokens))
        self._hand_out(emitted)

    def _place(self) -> None:
        for place, row in enumerate(self.rows):
            row.place = place

    def _load(self, past: DynamicCache) -> None:
        """Takes over what a cache holds of the padded prompts; the last token of each is left to be read."""
        held = past.get_seq_length()
        for row in self.rows:
            row.cached = max(0, min(held - row.request.padding, row.length - 1))
        self.target.cache.load(
            past,
            [row.index for row in self.rows],
            [row.request.padding for row in self.rows],
            [row.cached for row in self.rows],
        )

    def _read_prompts(self) -> torch.Tensor:
        """The target's logits [B, 1, V] after each prompt."""
        new = [row.tokens[row.cached : row.length] for row in self.rows]
        counts = [len(tokens) for tokens in new]
        if min(counts) < max(counts):
            # The last tokens of all rows stand in one column only when they are read by themselves.
            self.target.forward(stack(new, 0)[:, :-1], 1)
            self.target.keep([count - 1 for count in counts])
            new, counts = [tokens[-1:] for tokens in new], [1] * len(new)
        logits = self.target.forward(torch.stack(new), 1)
        self.target.keep(counts)
        return logits

    def _verify(
        self, logits: torch.Tensor, drafts: list[Draft], choices: Sequence[Choice], uniforms: Sequence[np.ndarray]
    ) -> tuple[list[list[int]], list[torch.Tensor]]:
        """Emits what the target makes of every row's draft.

        Args:
            logits: [B, K+1, V]; of a row with a shorter draft the first positions count.
            drafts: of each row. Who drafted what is not usable is lost to the row.
            choices: who drafted, by row.
            uniforms: by row, at least one for each drafted token, and the last one draws the token that follows.
        Returns: by row, the emitted tokens and the target's processed logits [emitted, V] at their positions.
        """
        emitted: list[list[int]] = [[]] * len(self.rows)
        verified: list[torch.Tensor] = [logits[0, :0]] * len(self.rows)
        together: dict[tuple | None, list[int]] = {}
        for place, (row, draft) in enumerate(zip(self.rows, drafts)):
            if row.request.process is not None:
                usable = draft.tokens.shape[1] if draft.usable is None else int(draft.usable)
                self._lose_the_unsound(row, choices[place], draft, usable)
                emitted[place], verified[place] = self._walk(row, logits[place], draft, usable, uniforms[place])
            else:
                alike = None
                if draft.logits is not None:
                    alike = draft.logits.shape[2], draft.logits.dtype, draft.draft_to_target is not None
                together.setdefault(alike, []).append(place)
        for places in together.values():
            for place, (usable, tokens) in zip(places, self._verify_alike(places, logits, drafts, uniforms)):
                row = self.rows[place]
                self._lose_the_unsound(row, choices[place], drafts[place], usable)
                emitted[place] = row.emit(tokens)
                verified[place] = logits[place, : len(emitted[place])]
        return emitted, verified

    def _lose_the_unsound(self, row: Row, choice: Choice, draft: Draft, usable: int) -> None:
        """Takes a drafter whose logits were not sound out of the request."""
        if draft.usable is not None and usable < self.config.draft_length:
            row.lose(choice.drafter, ValueError(UNSOUND))

    def _verify_alike(self, places: list[int], logits: torch.Tensor, drafts, uniforms) -> list[tuple[int, list[int]]]:
        """Rows whose draft logits stack, verified in one call: of each how much of its draft is usable, and what it emits."""
        counts = [drafts[place].tokens.shape[1] for place in places]
        most = max(counts)
        tests = np.zeros((len(places), most + 1))
        for row, (place, count) in zip(tests, zip(places, counts)):
            row[:count], row[-1] = uniforms[place][:count], uniforms[place][-1]
        everyone = len(places) == len(self.rows)
        target_logits = (logits if everyone else logits[to_device(places, self.device)])[:, : most + 1]
        draft_logits = mapping = None
        if drafts[places[0]].logits is not None:
            draft_logits = stack([drafts[place].logits[0] for place in places], 0)
            mapping = self._maps([drafts[place].draft_to_target for place in places])
        draft_tokens = stack([drafts[place].tokens[0] for place in places], 0)
        lengths = to_device(counts, self.device)
        unknown = torch.full((), most, device=self.device)
        usable = torch.stack([unknown if drafts[place].usable is None else drafts[place].usable for place in places])
        verdict = self._call_verify(
            target_logits, draft_tokens, draft_logits, mapping, tests, torch.minimum(lengths, usable) if most else None
        )
        # What the host needs of a round, in one transfer.
        found = torch.cat([usable[:, None], verdict.tokens], 1).tolist()
        return [(known, [token for token in tokens if token >= 0]) for known, *tokens in found]

    def _walk(
        self, row: Row, logits: torch.Tensor, draft: Draft, usable: int, uniforms: np.ndarray
    ) -> tuple[list[int], torch.Tensor]:
        """Verifies one draft token by token, so that the row's processors see every emitted token once, and no other."""
        emitted: list[int] = []
        verified: list[torch.Tensor] = []
        drafted = min(draft.tokens.shape[1], usable)
        for position in range(drafted + 1):
            here = slice(position, min(position + 1, drafted))  # nothing at the bonus position
            verified.append(row.request.process(row.seen, logits[position : position + 1]))
            # A chain of one token asks for a bonus position too, which is not looked at: the walk goes on there.
            target_logits = verified[-1].expand(1 + here.stop - here.start, -1)[None]
            draft_logits = None if draft.logits is None or position == drafted else draft.logits[:, here]
            mapping = None if draft_logits is None else draft.draft_to_target
            tests = np.append(uniforms[here], uniforms[-1])[None]
            verdict = self._call_verify(target_logits, draft.tokens[:, here], draft_logits, mapping, tests)
            emitted += row.emit(verdict.tokens[0, :1].tolist())
            if row.finished or int(verdict.accepted_length[0]) == 0:
                break
        return emitted, torch.cat(verified)

    def _maps(self, maps: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
        """The maps of alike drafts, [B, Vd], or [Vd] where all have the same, or None.

        Stacked once for the same drafters in the same rows: what is checked of a map is remembered by tensor.
        """
        if all(one is maps[0] for one in maps):
            return maps[0]
        key = tuple(map(id, maps))
        if key not in self.stacked_maps:
            if len(self.stacked_maps) >= MOST_MAPS:
                self.stacked_maps.clear()
            self.stacked_maps[key] = torch.stack(list(maps)), list(maps)
        return self.stacked_maps[key][0]

    def _call_verify(self, target_logits, draft_tokens, draft_logits, mapping, uniforms, lengths=None) -> Verdict:
        return verify(
            target_logits,
            draft_tokens,
            draft_logits,
            to_device(uniforms, self.device),
            mode=self.config.mode,
            lengths=lengths,
            draft_to_target=mapping,
            target_temperature=self.sampling.temperature,
            draft_temperature=self.sampling.temperature,
            target_threshold=self.sampling.threshold(target_logits),
            draft_threshold=None if draft_logits is None else self.sampling.threshold(draft_logits),
            backend=self.config.backend,
        )

    def _evaluate(self, rows: list[Row], scored: Sequence[tuple[Heads | Singles, torch.Tensor]]) -> None:
        """Compares what all drafters had for the rows' unscored tokens, as `Pool.score` gives it, with the target; `_observe`
        sees what comes of it."""
        counts = [row.unscored_tokens for row in rows]
        target_logits = stack([torch.cat(row.unscored) for row in rows], 0)
        for row in rows:
            row.unscored.clear()
        tokens = stack([row.tokens[row.length - count : row.length] for row, count in zip(rows, counts)], 0)
        lengths = None if min(counts) == max(counts) else to_device(counts, self.device)
        lifted = rows[0].request.process_drafts is not None
        self.under_way.append(_Scores(rows, counts, []))
        with self.side.work(target_logits, tokens, lengths, *(logits for _, logits in scored)):
            target_threshold = self.sampling.threshold(target_logits)
            for part, logits in scored:
                finite = logits.amax(-1).isfinite()  # [n, R, T]
                if not logits.is_cpu or not finite.all():
                    logits = logits.masked_fill(~finite[..., None], 0)  # what comes of NaN is for kernels to choose
                if lengths is not None:
                    finite |= torch.arange(finite.shape[2], device=self.device) >= lengths[:, None]
                sound = finite.all(-1)
                if lifted:
                    logits = self._process(rows, counts, part.members, logits)
                result = evaluate(
                    target_logits,
                    logits,
                    tokens,
                    lengths=lengths,
                    draft_to_target=None if lifted else part.maps,
                    target_temperature=self.sampling.temperature,
                    drafter_temperature=self.sampling.temperature,
                    target_threshold=target_threshold,
                    drafter_threshold=self.sampling.threshold(logits),
                    backend=self.config.backend,
                )
                measured = result.scores[slice(2, 4) if self.config.mode == "argmax" else slice(2)]
                found = torch.cat([measured.double(), sound[None, :, :, None].expand_as(measured[:1])])
                self.under_way[-1].parts.append((part.members, self.side.to_host(found)))

    def _observe(self, later: bool) -> None:
        """Lets the rows learn from evaluations, from the newest at the end of the next round if `later`."""
        while len(self.under_way) > later:
            one = self.under_way.pop(0)
            scores = [np.zeros((2, len(row.drafters), count)) for row, count in zip(one.rows, one.counts)]
            for members, bring in one.parts:
                *measured, sound = bring()
                for place, (row, count) in enumerate(zip(one.rows, one.counts)):
                    for member, drafter in enumerate(members):
                        if not sound[member, place, 0]:
                            row.lose(drafter, ValueError(UNSOUND))
                        if row.alive[drafter]:  # what a lost drafter is said to have scored is 0
                            scores[place][:, drafter] = [values[member, place, :count] for values in measured]
            for row, known in zip(one.rows, scores):
                row.observe(*known)
                row.may_switch = True

    def _process(
        self, rows: Sequence[Row], counts: Sequence[int], members: Sequence[int], logits: torch.Tensor
    ) -> torch.Tensor:
        """Drafters' logits [n, R, T, Vd] for the rows' last `counts` tokens as the target's processors leave them, over V."""
        lifted = logits.new_zeros(*logits.shape[:3], rows[0].vocabulary, dtype=torch.promote_types(logits.dtype, torch.float32))
        for place, (row, count) in enumerate(zip(rows, counts)):
            first = row.seen.shape[1] - count
            for member, drafter in enumerate(members):
                for position in range(count if row.alive[drafter] else 0):
                    one = logits[member, place, position, None]
                    with row.quarantine(drafter):
                        lifted[member, place, position] = row.processed(drafter, one, row.seen[0, : first + position])[0]
        return lifted

    def _hand_out(self, emitted: list[list[int]]) -> None:
        """Shows the caller what is new, and takes leave of the rows that are finished."""
        if self.on_tokens is not None:
            for row, tokens in zip(self.rows, emitted):
                self.on_tokens(row.index, tokens)
        for place, row in enumerate(self.rows):
            if row.finished:
                row.close(time.perf_counter() - self.began, self.pool.cache_bytes)
                if row.request.keep_cache:
                    row.cache = self.target.cache.row(place)
        left = [place for place, row in enumerate(self.rows) if not row.finished]
        if len(left) < len(self.rows):
            self.rows = [self.rows[place] for place in left]
            self._place()
            if left:
                self.target.select(left)
                self.pool.select(left)


def stack(tensors: Sequence[torch.Tensor], padding: float) -> torch.Tensor:
    """Tensors [T_b, ...] as one, [B, max T_b, ...], filled up on the right."""
    if len(tensors) == 1:
        return tensors[0][None]
    return pad_sequence(list(tensors), batch_first=True, padding_value=padding)
