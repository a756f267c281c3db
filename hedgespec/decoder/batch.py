"""The rounds of a batch: rows draft each for itself, one forward of the target and one call a stage serve them all.

Between rounds the target's cache holds every token of a row but the last, whose forward is the next round's; the features,
kept at the position before their token, have a row for every token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from hedgespec.decoder.request import Request
from hedgespec.decoder.row import NOBODY, Row, width_of
from hedgespec.drafters import Drafter
from hedgespec.evaluate import evaluate
from hedgespec.linear import few_row_view
from hedgespec.metrics import timed
from hedgespec.records import Draft, Verdict
from hedgespec.sampling import Sampling
from hedgespec.target import TargetSession, device_of
from hedgespec.verify import verify

if TYPE_CHECKING:
    from hedgespec.decoder import Decoder


class Batch:
    """Rows that are decoded together until each is finished: arguments of `Decoder.decode`, which row is the first, and which
    drafters' failures the caller knows of."""

    def __init__(self, decoder: Decoder, requests: Sequence[Request], first: int, sampling: Sampling,
                 on_tokens: Callable[[int, list[int]], None] | None, warned: set[str]):  # fmt: skip
        self.drafters, self.groups, self.config = decoder.drafters, decoder.groups, decoder.config
        self.device, self.sampling, self.on_tokens = device_of(decoder.target), sampling, on_tokens
        # A view of the target as it is now: adapters and hooks may have come and gone since the last request.
        view = few_row_view(decoder.target)
        self.target = TargetSession(
            view, (drafter.aux_layers for drafter in self.drafters), len(requests), captures=decoder.captures
        )
        self.rows = [
            Row(index, request, self.drafters, self.config, decoder.new_learner(), decoder.vocabulary, features, warned)
            for index, (request, features) in enumerate(zip(requests, self.target.features, strict=True), start=first)
        ]
        self.began = time.perf_counter()

    def begin(self, past: DynamicCache | None) -> None:
        """Reads the prompts and emits every row's first token, the target's own: a head needs it before it can draft."""
        with timed([row.stats for row in self.rows], "prefill"):
            if past is not None:
                self._load(past)
            logits = self._read_prompts()
            nothing = [row.draft(NOBODY, np.empty(0), self.sampling) for row in self.rows]
            emitted, _ = self._verify(logits, nothing, [row.uniforms(1) for row in self.rows])
            for row in self.rows:
                if row.scores_all and not row.finished:
                    row.take_in_by_all()
        self._hand_out(emitted)

    def round(self) -> None:
        """One target forward and everything around it."""
        length, rows, stats = self.config.draft_length, self.rows, [row.stats for row in self.rows]
        uniforms = [row.uniforms(2 * length + 2) for row in rows]  # one selects, K draft, K + 1 verify
        with timed(stats, "select"):
            weights = [row.weights() for row in rows]
            choices = [row.select(held, one[0]) for row, held, one in zip(rows, weights, uniforms)]
        with timed(stats, "draft"):
            drafts = [row.draft(choice, one[1:], self.sampling) for row, choice, one in zip(rows, choices, uniforms)]
        with timed(stats, "verify"):
            last = [torch.cat([row.tokens[row.length - 1 : row.length], draft.tokens[0]]) for row, draft in zip(rows, drafts)]
            tokens = stack(last, 0)
            logits = self.target.forward(tokens, tokens.shape[1])
            tests = [np.append(one[length + 1 :][: draft.tokens.shape[1]], one[-1]) for one, draft in zip(uniforms, drafts)]
            emitted, verified = self._verify(logits, drafts, tests)
            self.target.keep([len(tokens) for tokens in emitted])
        with timed(stats, "evaluate"):
            for row, chunk in zip(rows, verified):
                if row.scores_all:
                    row.unscored.append(chunk)
            scores = self._evaluate([row for row in rows if row.evaluation_is_due()])
        with timed(stats, "learn"):
            for row, choice, draft, held, tokens in zip(rows, choices, drafts, weights, emitted):
                drafted = draft.tokens.shape[1] > 0
                row.learn(choice if drafted else None, held, len(tokens), scores.get(row.index))
                row.stats.record_round(choice.drafter if drafted else None, held, len(tokens))
        self._hand_out(emitted)

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
        self, logits: torch.Tensor, drafts: Sequence[Draft], uniforms: Sequence[np.ndarray]
    ) -> tuple[list[list[int]], list[torch.Tensor]]:
        """Emits what the target makes of every row's draft.

        Args:
            logits: [B, K+1, V]; of a row with a shorter draft the first positions count.
            uniforms: by row, [drafted + 1].
        Returns: by row, the emitted tokens and the target's processed logits [emitted, V] at their positions.
        """
        emitted: list[list[int]] = [[]] * len(self.rows)
        verified: list[torch.Tensor] = [logits[0, :0]] * len(self.rows)
        together: dict[tuple[int, bool] | None, list[int]] = {}
        for place, (row, draft) in enumerate(zip(self.rows, drafts)):
            if row.request.process is not None:
                emitted[place], verified[place] = self._walk(row, logits[place], draft, uniforms[place])
            else:
                alike = None if draft.logits is None else (draft.logits.shape[2], draft.draft_to_target is not None)
                together.setdefault(alike, []).append(place)
        for places in together.values():
            found = self._verify_alike(places, logits, drafts, uniforms)
            for place, tokens in zip(places, found):
                emitted[place] = self.rows[place].emit(tokens)
                verified[place] = logits[place, : len(emitted[place])]
        return emitted, verified

    def _verify_alike(self, places: list[int], logits: torch.Tensor, drafts, uniforms) -> list[list[int]]:
        """Rows whose draft logits stack, verified in one call."""
        counts = [drafts[place].tokens.shape[1] for place in places]
        most = max(counts)
        tests = np.zeros((len(places), most + 1))
        for row, (place, count) in zip(tests, zip(places, counts)):
            row[:count], row[-1] = uniforms[place][:-1], uniforms[place][-1]
        everyone = len(places) == len(self.rows)
        target_logits = (logits if everyone else logits[places])[:, : most + 1]
        draft_logits = mapping = None
        if drafts[places[0]].logits is not None:
            draft_logits = stack([drafts[place].logits[0] for place in places], 0)
            mapping = _maps([drafts[place].draft_to_target for place in places], self.device)
        draft_tokens = stack([drafts[place].tokens[0] for place in places], 0)
        lengths = None if min(counts) == most else torch.tensor(counts, device=self.device)
        verdict = self._call_verify(target_logits, draft_tokens, draft_logits, mapping, tests, lengths)
        return [tokens[: accepted + 1] for tokens, accepted in zip(verdict.tokens.tolist(), verdict.accepted_length.tolist())]

    def _walk(self, row: Row, logits: torch.Tensor, draft: Draft, uniforms: np.ndarray) -> tuple[list[int], torch.Tensor]:
        """Verifies one draft token by token, so that the row's processors see every emitted token once, and no other."""
        emitted: list[int] = []
        verified: list[torch.Tensor] = []
        drafted = draft.tokens.shape[1]
        for position in range(drafted + 1):
            here = slice(position, min(position + 1, drafted))  # nothing at the bonus position
            verified.append(row.request.process(row.seen, logits[position : position + 1]))
            # A chain of one token asks for a bonus position too, which is not looked at: the walk goes on there.
            target_logits = verified[-1].expand(1 + here.stop - here.start, -1)[None]
            draft_logits = None if draft.logits is None or position == drafted else draft.logits[:, here]
            mapping = None if draft_logits is None else draft.draft_to_target
            tests = np.append(uniforms[:-1][here], uniforms[-1])[None]
            verdict = self._call_verify(target_logits, draft.tokens[:, here], draft_logits, mapping, tests)
            emitted += row.emit(verdict.tokens[0, :1].tolist())
            if row.finished or int(verdict.accepted_length[0]) == 0:
                break
        return emitted, torch.cat(verified)

    def _call_verify(self, target_logits, draft_tokens, draft_logits, mapping, uniforms, lengths=None) -> Verdict:
        return verify(
            target_logits,
            draft_tokens,
            draft_logits,
            torch.as_tensor(uniforms, device=self.device),
            mode=self.config.mode,
            lengths=lengths,
            draft_to_target=mapping,
            target_temperature=self.sampling.temperature,
            draft_temperature=self.sampling.temperature,
            target_threshold=self.sampling.threshold(target_logits),
            draft_threshold=None if draft_logits is None else self.sampling.threshold(draft_logits),
            backend=self.config.backend,
        )

    def _evaluate(self, rows: list[Row]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """acceptance_prob and acceptance_ratio, float64 [N, T], of every drafter on the unscored tokens of the rows, by row."""
        if not rows:
            return {}
        scored = [row.to_score() for row in rows]
        counts = [len(target_logits) for target_logits, _ in scored]
        target_logits = stack([one for one, _ in scored], 0)
        tokens = stack([row.tokens[row.length - count : row.length] for row, count in zip(rows, counts)], 0)
        lengths = None if min(counts) == max(counts) else torch.tensor(counts, device=self.device)
        target_threshold = self.sampling.threshold(target_logits)
        scores = [np.zeros((2, len(self.drafters), count)) for count in counts]
        lifted = rows[0].request.process_drafts is not None
        for members, mapping in [(range(len(self.drafters)), None)] if lifted else self.groups:
            present = [place for place, drafter in enumerate(members) if any(drafter in logits for _, logits in scored)]
            if not present:
                continue
            alive = [members[place] for place in present]
            width = next(logits[drafter].shape[1] for drafter in alive for _, logits in scored if drafter in logits)
            drafter_logits = torch.stack([
                stack([logits.get(drafter, one.new_zeros(len(one), width)) for one, logits in scored], 0) for drafter in alive
            ])  # fmt: skip
            result = evaluate(
                target_logits,
                drafter_logits,
                tokens,
                lengths=lengths,
                draft_to_target=mapping[present] if mapping is not None and len(present) < len(members) else mapping,
                target_temperature=self.sampling.temperature,
                drafter_temperature=self.sampling.temperature,
                target_threshold=target_threshold,
                drafter_threshold=self.sampling.threshold(drafter_logits),
                backend=self.config.backend,
            )
            measured = result.scores.double().cpu().numpy()[slice(2, 4) if self.config.mode == "argmax" else slice(2)]
            for place, ((_, logits), count) in enumerate(zip(scored, counts)):
                for number, drafter in enumerate(alive):
                    if drafter in logits:
                        scores[place][:, drafter] = measured[:, number, place, :count]
        return {row.index: (prob, ratio) for row, (prob, ratio) in zip(rows, scores)}

    def _hand_out(self, emitted: list[list[int]]) -> None:
        """Shows the caller what is new, and takes leave of the rows that are finished."""
        if self.on_tokens is not None:
            for row, tokens in zip(self.rows, emitted):
                self.on_tokens(row.index, tokens)
        for place, row in enumerate(self.rows):
            if row.finished:
                row.close(time.perf_counter() - self.began)
                if row.request.keep_cache:
                    row.cache = self.target.cache.row(place)
        left = [place for place, row in enumerate(self.rows) if not row.finished]
        if len(left) < len(self.rows):
            self.rows = [self.rows[place] for place in left]
            if left:
                self.target.select(left)


def stack(tensors: Sequence[torch.Tensor], padding: float) -> torch.Tensor:
    """Tensors [T_b, ...] as one, [B, max T_b, ...], filled up on the right."""
    if len(tensors) == 1:
        return tensors[0][None]
    return pad_sequence(list(tensors), batch_first=True, padding_value=padding)


def groups_of(drafters: Sequence[Drafter], device: torch.device) -> list[tuple[list[int], torch.Tensor | None]]:
    """Drafters evaluated in one call, because their logits stack: (indices, int64 map [n, Vd] or None)."""
    members: dict[tuple[int, bool], list[int]] = {}
    for index, drafter in enumerate(drafters):
        members.setdefault((width_of(drafter), drafter.draft_to_target is not None), []).append(index)
    return [
        (indices, torch.stack([drafters[i].draft_to_target for i in indices]).to(device) if mapped else None)
        for (_, mapped), indices in members.items()
    ]


def _maps(maps: Sequence[torch.Tensor | None], device: torch.device) -> torch.Tensor | None:
    """The maps of alike drafts, [B, Vd], or [Vd] where all have the same, or None."""
    if maps[0] is None:
        return None
    shared = all(one is maps[0] for one in maps)
    return (maps[0] if shared else torch.stack(maps)).to(device)
