"""The decoding loop of a batch. `Batch.round` is one round: select, draft, verify, evaluate, learn.

Between rounds the target's cache holds every token of a row but the last, which the next round's forward reads. The features,
kept at the position before their token, have an entry for every token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import DynamicCache

from hedgespec.decoder.noise import CoupledNoise
from hedgespec.decoder.plain import PlainBatch, PlainDecoding
from hedgespec.decoder.pool import Pool
from hedgespec.decoder.request import Request
from hedgespec.decoder.row import Row, no_draft
from hedgespec.decoder.scoring import Scorer
from hedgespec.decoder.together import Together
from hedgespec.decoder.verification import RowVerdict, Verifier
from hedgespec.device import stack, to_device
from hedgespec.ops.linear import few_row_view
from hedgespec.ops.sampling import Sampling
from hedgespec.ops.tree_mask import ancestry
from hedgespec.records import NO_DRAFT, Choice, Draft
from hedgespec.runtime.target import TargetSession, device_of
from hedgespec.stats import timed

if TYPE_CHECKING:
    from hedgespec.decoder import Decoder


@dataclass(frozen=True, slots=True)
class _Uniforms:
    """The uniforms of one round, by the stage that uses them."""

    select: np.ndarray
    """float64 [B]."""
    draft: np.ndarray
    """float64 [B, D]: one for each draft token that is sampled."""
    verify: np.ndarray
    """float64 [B, D']: see `Verifier.verify`."""


class Batch:
    """Rows that are decoded together until each is finished.

    Args:
        decoder: the decoder.
        requests: one for each row.
        first: index of the first row among all requests of the call.
        sampling: temperature and filters of all rows.
        on_tokens: called with the index of a row and its new tokens; None calls nothing.
        warned: names of the drafters whose failure the caller was already warned of.
        plain: properties of all requests of the call.
        together: callbacks that see all rows at once, or None.
    """

    def __init__(self, decoder: Decoder, requests: Sequence[Request], first: int, sampling: Sampling,
                 on_tokens: Callable[[int, list[int]], None] | None, warned: set[str], plain: PlainBatch,
                 together: Together | None = None):  # fmt: skip
        self.config, self.device, self.on_tokens = decoder.config, device_of(decoder.target), on_tokens
        # A view of the target as it is now: adapters and hooks may have changed since the last request.
        view = few_row_view(decoder.target)
        layers = (drafter.aux_layers for drafter in decoder.drafters)
        self.target = TargetSession(
            view, layers, len(requests), captures=decoder.captures, context=decoder.context, follows=decoder.follows_length,
            offsets=[request.padding - plain.padding for request in requests], floor=plain.width - plain.padding,
            native=decoder.native.current(),
        )  # fmt: skip
        self.rows = [
            Row(index, request, decoder.drafters, self.config, decoder.new_learner(), decoder.vocabulary, features, warned)
            for index, (request, features) in enumerate(zip(requests, self.target.features, strict=True), start=first)
        ]
        self.all_rows = list(self.rows)
        """Every row, finished ones included."""
        self.plain = PlainDecoding(decoder, self.target, self.rows, plain)
        self.noise = CoupledNoise(sampling) if self.config.proposal == "coupled" and sampling.temperature > 0 else None
        if self.noise is not None:
            self.noise.begin(self.rows)
        self._number_rows()
        rule = sampling if self.noise is None else Sampling()  # logits with noise are decoded greedily
        target_name = type(decoder.target).__name__
        self.verifier = Verifier(self.config, rule, self.noise, self.device, target_name, self.all_rows, together)
        self.scorer = Scorer(self.config, rule, self.noise, self.device)
        self.pool = Pool(decoder.drafters, decoder.stacks(), self.rows, self.config, sampling, self.verifier.one_hot)
        self.costs = decoder.costs
        """Measured costs of rounds; None unless the objective is "throughput"."""
        self.overlaps = decoder.overlaps
        """Whether drafters are scored beside the next round."""
        self.num_draft_uniforms, self.num_verify_uniforms = self._count_uniforms()
        self.began = time.perf_counter()
        for row in self.rows:
            row.stats.began = self.began

    def begin(self, past: DynamicCache | None) -> None:
        """Reads the prompts and emits the first token of every row, drawn from the target: a head needs it to draft.

        Args:
            past: keys and values of the prompts or of their beginnings; None if nothing is cached.
        """
        with self._timed("prompt"):
            if past is not None and not self.plain.drops(past):
                self._load(past)
            logits = self._read_prompts()
            drafts = [no_draft(row) for row in self.rows]
            uniforms = [row.uniforms(1) for row in self.rows]
            noise = None if self.noise is None else self.noise.next(self.rows, 1)
            verdicts = self.verifier.verify(self.rows, logits, drafts, [NO_DRAFT] * len(self.rows), uniforms, noise)
            self.plain.check_inputs(self.rows)
            if self.noise is not None:
                for row in self.rows:
                    self.noise.spend(row, 1)
            self._warm_start([row for row in self.rows if row.selector.needs_scores and not row.finished])
        self._hand_out(verdicts)

    def round(self) -> None:
        """Runs one round: one forward of the target, and everything around it."""
        self.plain.check_table(self.rows)
        self.plain.read_again(self.rows)
        uniforms = self._uniforms()
        with self._timed("select"):
            weights = [row.selector.weights() for row in self.rows]
            choices = self._select(weights, uniforms.select)
        with self._timed("draft"):
            noise = None if self.noise is None else self.noise.next(self.rows, 1 + max(one.draft_length for one in choices))
            drafts = self.pool.draft(choices, to_device(uniforms.draft, self.device), noise, self._clock)
        with self._timed("verify"):
            verdicts = self._verify(choices, drafts, uniforms.verify, noise)
        due = [row for row in self.rows if row.selector.evaluation_is_due(row.finished)]
        if due:
            with self._timed("drafter_forward"):
                groups = self.pool.teacher_forced_logits(due)
            with self._timed("evaluate"):
                self.scorer.submit(due, groups)
            for row in due:
                row.stats.evaluations += 1
        with self._timed("learn"):
            overlaps = self.overlaps and bool(due) and not any(row.finished for row in self.rows)
            self._learn(overlaps, choices, drafts, weights, verdicts)
        self._hand_out(verdicts)

    # Stages

    def _select(self, weights: Sequence[np.ndarray], uniforms: np.ndarray) -> list[Choice]:
        """Chooses the drafter and the draft length of every row, or what is to be measured."""
        rooms, measure = [self.plain.room(row) for row in self.rows], None
        if self.costs is not None:
            measure = self.costs.to_measure(len(self.rows), max(rooms) - 1)
        return [
            row.selector.select(own, uniform, room, measure)
            for row, own, uniform, room in zip(self.rows, weights, uniforms.tolist(), rooms)
        ]

    def _verify(self, choices: Sequence[Choice], drafts: Sequence[Draft], uniforms: np.ndarray,
                noise: torch.Tensor | None) -> list[RowVerdict]:  # fmt: skip
        """Runs the target over the drafts, emits tokens, and adds them to the rows' backlogs."""
        began = self._now() if self.costs is not None else 0.0
        logits, noise = self._forward(choices, drafts, noise)
        verdicts = self.verifier.verify(self.rows, logits, drafts, choices, list(uniforms), noise)
        self.plain.check_inputs(self.rows)
        paths = None if self.config.tree is None else [verdict.path for verdict in verdicts]
        self.target.keep([len(verdict.emitted) for verdict in verdicts], paths)
        if self.costs is not None:
            self._record_costs(choices, drafts, logits.shape[1] - 1, self._now() - began)
        for row, verdict in zip(self.rows, verdicts):
            spent = None if self.noise is None else self.noise.spend(row, len(verdict.emitted))
            if row.selector.needs_scores:
                row.backlog.add(verdict.logits, spent)
        return verdicts

    def _forward(
        self, choices: Sequence[Choice], drafts: Sequence[Draft], noise: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the target's logits [B, T, V] at each row's last verified token and at its draft, and the noise of the token
        that each position scores."""
        read = [torch.cat([row.tokens[row.length - 1 : row.length], draft.tokens]) for row, draft in zip(self.rows, drafts)]
        tokens = stack(read, 0)
        # Nodes that do not exist may lie deeper than the deepest node of the row's own tree.
        reach = [1 + min(choice.draft_length, len(draft.tokens)) for choice, draft in zip(choices, drafts)]
        if self.config.tree is None:
            return self.target.forward(tokens, tokens.shape[1], reach=reach), noise
        parents = stack([draft.tokens if draft.parents is None else draft.parents for draft in drafts], -1)
        shape = ancestry(parents, self.config.draft_length)
        logits = self.target.forward(tokens.clamp(min=0), tokens.shape[1], shape, reach)
        if noise is not None:
            noise = noise[torch.arange(len(self.rows), device=self.device)[:, None], shape[0]]
        return logits, noise

    def _learn(self, overlaps: bool, choices: Sequence[Choice], drafts: Sequence[Draft], weights: Sequence[np.ndarray],
               verdicts: Sequence[RowVerdict]) -> None:  # fmt: skip
        """Updates the learners with the scores that have arrived, and ends the round in every row."""
        self._observe(overlaps)
        for row, choice, draft, own, verdict in zip(self.rows, choices, drafts, weights, verdicts):
            drafted, emitted = len(draft.tokens), len(verdict.emitted)
            # If the text ended within the draft, its last token may have been accepted or recovered.
            tested = min(drafted, emitted - row.finished)
            held_back = row.held_back and not row.finished
            row.selector.end_round(choice.drafter if drafted else None, own, emitted, drafted, tested, held_back)

    def _observe(self, keep_newest: bool) -> None:
        seconds = None if self.costs is None else self.costs.of(len(self.rows))
        for scores in self.scorer.ready(keep_newest):
            if scores.of_prompt:
                scores.row.selector.warm_up(scores.acceptance_prob, seconds)
            else:
                scores.row.selector.observe(scores.acceptance_prob, scores.acceptance_ratio, seconds)

    def _warm_start(self, rows: list[Row]) -> None:
        """Lets the drafters consume the prompts, and updates the learners with their scores on the last positions."""
        if not rows:
            return
        groups = self.pool.teacher_forced_logits(rows)
        if any(row.backlog.count for row in rows):
            self.scorer.submit(rows, groups, of_prompt=True)
            self._observe(False)

    # Prompts

    def _load(self, past: DynamicCache) -> None:
        """Copies the keys and values of the padded prompts; the last token of each row is left to be read."""
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
        """Returns the target's logits [B, 1, V] after each prompt, and adds those of the warm start to the backlogs."""
        new = [row.tokens[row.cached : row.length] for row in self.rows]
        counts = [len(tokens) for tokens in new]
        warm = [row.warm_positions for row in self.rows]
        most = max(1, *warm)
        ends = [min(count, most) for count in counts]  # how many of a row's own logits are read
        if min(counts) < max(counts):
            # The last tokens of all rows are in few columns only if they are read by themselves.
            rest = [count - end for count, end in zip(counts, ends)]
            self.target.forward(stack([tokens[:count] for tokens, count in zip(new, rest)], 0), 1, reach=rest)
            self.target.keep(rest)
            new, counts = [tokens[count:] for tokens, count in zip(new, rest)], ends
        logits = self.target.forward(stack(new, 0), most, reach=counts)
        self.target.keep(counts)
        for row, own, end, count in zip(self.rows, logits, ends, warm):
            if row.selector.needs_scores:
                prompt = own[end - count : end]  # no token is drawn from these logits; drafters are compared with them
                if count:
                    prompt = prompt.masked_fill(~prompt.amax(-1, keepdim=True).isfinite(), 0)
                row.backlog.add(prompt)
        return torch.stack([own[end - 1 : end] for own, end in zip(logits, ends)])

    # Helpers

    def _count_uniforms(self) -> tuple[int, int]:
        """Returns how many uniforms a round drafts with, and how many it verifies with."""
        tree, length = self.config.tree, self.config.draft_length
        if tree is None:
            return length, length + 1
        if self.verifier.one_hot:
            return 0, length + 1
        return tree.nodes(length), length * tree.widest + 1

    def _uniforms(self) -> _Uniforms:
        count = 1 + self.num_draft_uniforms + self.num_verify_uniforms  # for a chain 1 + K + (K + 1)
        drawn = np.stack([row.uniforms(count) for row in self.rows])
        return _Uniforms(drawn[:, 0], drawn[:, 1 : 1 + self.num_draft_uniforms], drawn[:, 1 + self.num_draft_uniforms :])

    def _timed(self, stage: str) -> AbstractContextManager[None]:
        return timed([row.stats for row in self.rows], stage)

    @property
    def _clock(self) -> Callable[[], float] | None:
        return None if self.costs is None else self._now

    def _now(self) -> float:
        """Returns the time of the costs' clock, after waiting for the current stream of the device."""
        if self.device.type != "cpu":
            torch.accelerator.current_stream(self.device).synchronize()
        return self.costs.clock()

    def _record_costs(self, choices: Sequence[Choice], drafts: Sequence[Draft], length: int, seconds: float) -> None:
        self.costs.verified(len(self.rows), length, seconds)
        for choice, draft in zip(choices, drafts):
            if len(draft.tokens):
                self.costs.drafted(len(self.rows), choice.drafter, draft.seconds_per_token)

    def _number_rows(self) -> None:
        for place, row in enumerate(self.rows):
            row.place = place

    def _hand_out(self, verdicts: Sequence[RowVerdict]) -> None:
        """Passes new tokens to the caller, and removes finished rows from the batch."""
        if self.on_tokens is not None:
            for row, verdict in zip(self.rows, verdicts):
                self.on_tokens(row.index, verdict.emitted)
        self.dismiss()

    def dismiss(self) -> None:
        """Removes finished rows from the batch."""
        if self.scorer.has_pending and any(row.finished for row in self.rows):
            self._observe(False)
        for place, row in enumerate(self.rows):
            if row.finished:
                row.close(time.perf_counter() - self.began, self.pool.cache_bytes)
                if row.request.keep_cache:
                    row.cache = self.target.cache.row(place)
        left = [place for place, row in enumerate(self.rows) if not row.finished]
        if len(left) < len(self.rows):
            self.rows = [self.rows[place] for place in left]
            self._number_rows()
            if left:
                self.target.select(left)
                self.pool.keep_rows(left)
