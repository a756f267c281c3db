"""The rounds of a batch: rows draft each for itself, one forward of the target and one call a stage serve them all.

Between rounds the target's cache holds every token of a row but the last, whose forward is the next round's; the features,
kept at the position before their token, have a row for every token.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from hedgespec.coupled import gumbel, key_of, perturb
from hedgespec.decoder.pool import MOST_MAPS, UNSOUND, Heads, Pool, Scored, Singles, no_draft
from hedgespec.decoder.request import Request, Together
from hedgespec.decoder.row import Row, last
from hedgespec.errors import ContextError, TargetLogitsError
from hedgespec.evaluate import evaluate, multi_draft_acceptance
from hedgespec.linear import few_row_view
from hedgespec.metrics import timed
from hedgespec.plain_inputs import PlainInputs
from hedgespec.records import NOBODY, Choice, Draft, Verdict
from hedgespec.sampling import Sampling
from hedgespec.target import TargetSession, device_of
from hedgespec.transfer import SideStream, to_device
from hedgespec.tree import ancestry
from hedgespec.verify import verify, verify_tree

if TYPE_CHECKING:
    from hedgespec.decoder import Decoder


WARM = Sampling(temperature=1.0)
"""At which drafters are compared with the target over a prompt, whatever the request's."""


@dataclass(frozen=True)
class PlainBatch:
    """What plain decoding of the same requests knows of all of them at once."""

    width: int
    """Length of the prompts, padding included."""
    padding: int
    """Padding of the longest prompt."""
    audits: bool
    """Whether the target's own code prepares the inputs of its forward and has to be asked about every token."""

    @classmethod
    def of(cls, requests: Sequence[Request], audits: bool) -> PlainBatch:
        return cls(max(len(request.prompt) for request in requests), min(request.padding for request in requests), audits)


@dataclass
class _Scores:
    """An evaluation under way."""

    rows: list[Row]
    counts: list[int]
    """Tokens of each row, on which nobody was scored before."""
    of_prompt: bool
    """Whether it is the warm start's."""
    parts: list[tuple[list[Row], list[int], list[int], Callable[[], np.ndarray]]]
    """Rows, how many tokens of each, drafters, and what brings acceptance_prob, acceptance_ratio, of trees by depth, of a
    prompt the former alone, and last whether the drafter's logits of the row were sound, float64 [3, 2K + 1 or 2, n, R, T]."""


@dataclass
class _Walk:
    """A draft that is verified token by token."""

    steps: Generator[int, torch.Tensor, None] | None = None
    """Yields the place, among the row's logits, of those for the next token; takes them processed, [1, V], and emits it."""
    emitted: list[int] = field(default_factory=list)
    verified: list[torch.Tensor] = field(default_factory=list)
    """Processed logits [1, V] of every emitted token."""
    path: list[int] = field(default_factory=list)
    """Their places among the row's logits."""


class Batch:
    """Rows that are decoded together until each is finished: arguments of `Decoder.decode`, which row is the first, and which
    drafters' failures the caller knows of."""

    def __init__(self, decoder: Decoder, requests: Sequence[Request], first: int, sampling: Sampling,
                 on_tokens: Callable[[int, list[int]], None] | None, warned: set[str], plain: PlainBatch,
                 together: Together | None = None):  # fmt: skip
        drafters, self.config = decoder.drafters, decoder.config
        self.plain, self.table = plain, decoder.table
        self.reread_at, self.rereads_all = decoder.reread_at, decoder.rereads_all
        self.target_name = type(decoder.target).__name__
        self.device, self.sampling, self.on_tokens = device_of(decoder.target), sampling, on_tokens
        self.coupled = self.config.mode == "coupled" and sampling.temperature > 0
        self.one_hot = self.config.mode != "sampled" or sampling.temperature == 0
        self.rule = Sampling() if self.coupled else sampling
        """How tokens are drawn from logits as verification and evaluation see them: coupled, they hold the noise already."""
        # A view of the target as it is now: adapters and hooks may have come and gone since the last request.
        view = few_row_view(decoder.target)
        layers = (drafter.aux_layers for drafter in drafters)
        self.target = TargetSession(
            view, layers, len(requests), captures=decoder.captures, context=decoder.context, follows=decoder.follows_length,
            offsets=[request.padding - plain.padding for request in requests], floor=plain.width - plain.padding,
        )  # fmt: skip
        self.rows = [
            Row(index, request, drafters, self.config, decoder.new_learner(), decoder.vocabulary, features, warned)
            for index, (request, features) in enumerate(zip(requests, self.target.features, strict=True), start=first)
        ]
        self.inputs: dict[int, PlainInputs] = {}
        """By row, where the target's own code prepares inputs: what it is asked."""
        if plain.audits:
            for row in self.rows:
                mask = (torch.arange(len(row.request.prompt), device=self.device) >= row.request.padding).long()[None]
                given = row.request.prompt[None]
                self.inputs[row.index] = PlainInputs(decoder.target, given, mask, reread_at=self.reread_at)
        self.all_rows, self.together = list(self.rows), together
        """Every row, those that are finished included, and who sees them at once."""
        if self.coupled:  # before the uniforms, of which there are as many as rounds
            for row in self.rows:
                row.noise_key = key_of(row.uniforms(1)[0])
        self._place()
        self.pool = Pool(drafters, decoder.stacks(), self.rows, self.config)
        self.costs = decoder.costs
        """Where rounds are measured; None: they are not."""
        tree, length = self.config.tree, self.config.draft_length
        self.draws, self.tests = length, length + 1
        """Uniforms that a round drafts with, and that it verifies with."""
        if tree is not None:
            self.draws, siblings = (0, 1) if self.one_hot else (tree.nodes(length), tree.widest)
            self.tests = length * siblings + 1
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
            if past is not None and not self._drops(past):
                self._load(past)
            logits = self._read_prompts()
            nothing = [no_draft(row) for row in self.rows]
            uniforms = [row.uniforms(1) for row in self.rows]
            emitted, _, _ = self._verify(logits, nothing, [NOBODY] * len(self.rows), uniforms, self._noise(1))
            self._check_inputs()
            self._spend_noise(emitted)
            going_on = [row for row in self.rows if row.selector.scores_all and not row.finished]
            if going_on:
                everyone = [np.ones(len(row.drafters), dtype=bool) for row in going_on]
                scored = self.pool.score(going_on, everyone)
                if any(row.missed.any() for row in going_on):
                    self._evaluate(going_on, everyone, scored, of_prompt=True)
                    self._observe(False)
        self._hand_out(emitted)

    def round(self) -> None:
        """One target forward and everything around it."""
        self._check_table()
        self._read_again()
        rows, stats = self.rows, [row.stats for row in self.rows]
        uniforms = np.stack([row.uniforms(1 + self.draws + self.tests) for row in rows])  # of a chain 1 + K + (K + 1)
        with timed(stats, "select"):
            weights = [row.selector.weights() for row in rows]
            rooms = [self._room(row) for row in rows]
            measure = self.costs and self.costs.to_measure(len(rows), max(rooms) - 1)
            first = uniforms[:, 0].tolist()
            choices = [
                row.selector.select(held, one, room, measure) for row, held, one, room in zip(rows, weights, first, rooms)
            ]
        with timed(stats, "draft"):
            to_draft = to_device(uniforms[:, 1 : 1 + self.draws], self.device)
            noise = self._noise(1 + max(choice.draft_length for choice in choices))
            drafts = self.pool.draft(choices, to_draft, self.sampling, self.one_hot, noise, self.costs and self._now)
        with timed(stats, "verify"):
            began = self.costs and self._now()
            last = [torch.cat([row.tokens[row.length - 1 : row.length], draft.tokens[0]]) for row, draft in zip(rows, drafts)]
            tokens = stack(last, 0)
            # Nodes of a tree that are none may lie deeper than the deepest of the row's own.
            reach = [1 + min(choice.draft_length, draft.tokens.shape[1]) for choice, draft in zip(choices, drafts)]
            if self.config.tree is None:
                logits = self.target.forward(tokens, tokens.shape[1], reach=reach)
            else:
                parents = stack([draft.tokens[0] if draft.parents is None else draft.parents[0] for draft in drafts], -1)
                shape = ancestry(parents, self.config.draft_length)
                logits = self.target.forward(tokens.clamp(min=0), tokens.shape[1], shape, reach)
                if noise is not None:
                    noise = noise[torch.arange(len(rows), device=self.device)[:, None], shape[0]]
            emitted, verified, paths = self._verify(logits, drafts, choices, uniforms[:, 1 + self.draws :], noise)
            self._check_inputs()
            self.target.keep([len(tokens) for tokens in emitted], paths if self.config.tree is not None else None)
            if self.costs:
                self.costs.verified(len(rows), tokens.shape[1] - 1, self._now() - began)
                for choice, draft in zip(choices, drafts):
                    if draft.tokens.shape[1]:
                        self.costs.drafted(len(rows), choice.drafter, draft.seconds_per_token)
        for row, chunk in zip(rows, verified):
            if row.selector.scores_all:
                row.to_be_scored(chunk, row.noise[: len(chunk)] if self.coupled else None)
        self._spend_noise(emitted)
        if due := [row for row in rows if row.selector.evaluation_is_due(row.finished)]:
            with timed(stats, "prefill"):
                asked = [row.selector.to_score(row.finished, row.missed) for row in due]
                scored = self.pool.score(due, asked)
            with timed(stats, "evaluate"):
                self._evaluate(due, asked, scored)
        later = self.overlaps and bool(due) and not any(row.finished for row in rows)
        with timed(stats, "learn"):
            self._observe(later)
            for row, choice, draft, held, tokens in zip(rows, choices, drafts, weights, emitted):
                drafted = draft.tokens.shape[1]
                # Whether a token that ends the text within a draft was accepted or recovered is not known here.
                tested = min(drafted, len(tokens) - row.finished)
                row.selector.end_round(
                    choice.drafter if drafted else None, held, len(tokens), drafted, tested, row.held_back and not row.finished
                )
        self._hand_out(emitted)

    def _now(self) -> float:
        """By the costs' clock, once the device has done what it was asked for; what runs beside that is not waited for."""
        if self.device.type != "cpu":
            torch.accelerator.current_stream(self.device).synchronize()
        return self.costs.clock()

    def _check_table(self) -> None:
        """Refuses to read a token past the target's table of positions, where plain decoding fails. Raises ContextError."""
        if self.table is not None and (longest := max(row.length for row in self.rows)) > self.table:
            raise ContextError(
                f"target: expected a text of at most {self.table} tokens to go on from, since {self.target_name} has as many "
                f"positions, got {longest}"
            )

    def _room(self, row: Row) -> int:
        """Returns how many tokens a round may emit for a row, the one that follows the draft included.

        No draft reaches past the positions that the target was made for, since it may hold a table of as many that is not
        known, nor past the point where it reads its text again.
        """
        room = row.room
        if self.target.context is not None and row.length <= self.target.context:
            room = min(room, self.target.context + 1 - row.length)
        if self.reread_at is not None and (left := self.reread_at - row.request.padding - row.length) > 0:
            room = min(room, left)
        return room

    def _drops(self, past: DynamicCache) -> bool:
        """Returns whether plain decoding would read the prompts again instead of taking over what a cache holds of them."""
        return self.reread_at is not None and past.get_seq_length() < self.reread_at <= self.plain.width

    def _read_again(self) -> None:
        """Computes the keys and values of rows anew where plain decoding does so, before their next token."""
        if self.reread_at is None or self.plain.width >= self.reread_at:
            return
        due = [row.request.padding + row.length == self.reread_at for row in self.rows]
        if any(due) and not self.rereads_all:
            raise ValueError(
                f"target: expected {self.target_name} to read its text again where its rotary factors change, at "
                f"{self.reread_at} tokens, but the installed transformers lets it go on from the last token alone; 5.20 and "
                "newer do not"
            )
        if any(due):
            texts = [row.tokens[: row.length - 1] if now else None for row, now in zip(self.rows, due)]
            self.target.reread(texts, self.reread_at - self.plain.padding)

    def _check_inputs(self) -> None:
        """Compares the inputs that the target's own code prepares for each emitted token with what its forward was given."""
        for row in self.rows if self.inputs else ():
            asked = self.inputs[row.index]
            for width in range(asked.width, row.seen.shape[1]):
                asked.check(row.seen[:, :width])

    def _place(self) -> None:
        for place, row in enumerate(self.rows):
            row.place = place

    def _noise(self, count: int) -> torch.Tensor | None:
        """In mode "coupled" the noise [B, count, V] for every row's next tokens; else None. It is made once a position."""
        if not self.coupled:
            return None
        lacks = [max(count - len(row.noise), 0) for row in self.rows]
        known = [row.length + len(row.noise) for row in self.rows]
        if any(lacks):
            keys = [row.noise_key for row, lack in zip(self.rows, lacks) for _ in range(lack)]
            positions = [first + number for first, lack in zip(known, lacks) for number in range(lack)]
            made = gumbel(keys, positions, self.rows[0].vocabulary, self.device).split(lacks)
            for row, new in zip(self.rows, made):
                row.noise = torch.cat([row.noise, new])
        return stack([row.noise[:count] for row in self.rows], 0)

    def _spend_noise(self, emitted: Sequence[Sequence[int]]) -> None:
        """The noise of what is emitted belongs to no token that comes."""
        for row, tokens in zip(self.rows, emitted):
            row.noise = row.noise[len(tokens) :]

    def _perturb(self, logits: torch.Tensor, noise: torch.Tensor, maps: torch.Tensor | None = None) -> torch.Tensor:
        """Logits with the noise on top, as `rule` takes them."""
        threshold = self.sampling.threshold(logits)
        return perturb(logits, noise, temperature=self.sampling.temperature, threshold=threshold, draft_to_target=maps)

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
        """The target's logits [B, 1, V] after each prompt. Those for the tokens of a row's warm start become its `unscored`."""
        new = [row.tokens[row.cached : row.length] for row in self.rows]
        counts = [len(tokens) for tokens in new]
        warm = [row.warm_positions for row in self.rows]
        most = max(1, *warm)
        ends = [min(count, most) for count in counts]  # of a row's own logits
        if min(counts) < max(counts):
            # The last tokens of all rows stand in few columns only when they are read by themselves.
            rest = [count - end for count, end in zip(counts, ends)]
            self.target.forward(stack([tokens[:count] for tokens, count in zip(new, rest)], 0), 1, reach=rest)
            self.target.keep(rest)
            new, counts = [tokens[count:] for tokens, count in zip(new, rest)], ends
        logits = self.target.forward(stack(new, 0), most, reach=counts)
        self.target.keep(counts)
        for row, one, end, count in zip(self.rows, logits, ends, warm):
            if row.selector.scores_all:
                of_prompt = one[end - count : end]  # nothing is emitted from these, and only drafters are compared with them
                row.to_be_scored(of_prompt.masked_fill(~of_prompt.amax(-1, keepdim=True).isfinite(), 0) if count else of_prompt)
        return torch.stack([one[end - 1 : end] for one, end in zip(logits, ends)])

    def _verify(
        self, logits: torch.Tensor, drafts: list[Draft], choices: Sequence[Choice], uniforms: Sequence[np.ndarray],
        noise: torch.Tensor | None = None,
    ) -> tuple[list[list[int]], list[torch.Tensor], list[list[int]]]:  # fmt: skip
        """Emits what the target makes of every row's draft.

        Args:
            logits: [B, K+1, V]; of a row with a shorter draft the first positions count.
            drafts: of each row. Who drafted what is not usable is lost to the row.
            choices: who drafted, by row.
            uniforms: by row, at least one for each drafted token, and the last one draws the token that follows; of a tree
                those of `verify_tree`.
            noise: in mode "coupled", of the token that each of `logits` scores, [B, at least K+1, V].
        Returns: by row, the emitted tokens, the target's processed logits [emitted, V] at their positions, with the noise, and
            these among those of `logits`.
        """
        emitted: list[list[int]] = [[]] * len(self.rows)
        verified: list[torch.Tensor] = [logits[0, :0]] * len(self.rows)
        paths: list[list[int]] = [[]] * len(self.rows)
        together: dict[tuple | None, list[int]] = {}
        given = logits
        if noise is not None and not all(row.request.is_processed for row in self.rows):
            logits = self._perturb(given, noise[:, : given.shape[1]])
        walks: dict[int, _Walk] = {}
        for place, (row, draft) in enumerate(zip(self.rows, drafts)):
            if row.request.is_processed:
                usable = draft.tokens.shape[1] if draft.usable is None else int(draft.usable)
                self._lose_the_unsound(row, choices[place], draft, usable)
                walks[place] = walk = _Walk()
                steps = self._walk if draft.parents is None else self._walk_tree
                walk.steps = steps(walk, row, draft, usable, uniforms[place])
                if row.request.process is not None:
                    self._walk_alone(walk, row, given[place], None if noise is None else noise[place])
            else:
                alike = (draft.parents is not None,)
                if draft.logits is not None:
                    alike = *alike, draft.logits.shape[2], draft.logits.dtype, draft.draft_to_target is not None
                together.setdefault(alike, []).append(place)
        if walks and self.together is not None and self.together.processes:
            self._walk_in_step(walks, given, noise)
        for place, walk in walks.items():
            emitted[place], verified[place], paths[place] = walk.emitted, torch.cat(walk.verified), walk.path
        for (branches, *_), places in together.items():
            if branches:
                found = self._verify_trees(places, logits, drafts, uniforms)
            else:
                found = (
                    (usable, tokens, range(len(tokens)), sound)
                    for usable, tokens, sound in self._verify_alike(places, logits, drafts, uniforms)
                )
            for place, (usable, tokens, path, sound) in zip(places, found):
                row = self.rows[place]
                self._lose_the_unsound(row, choices[place], drafts[place], usable)
                emitted[place] = row.emit(tokens[:sound])
                if not row.finished and (sound < len(tokens) or not tokens):
                    raise self._unsound(row, logits[place, [*path, 0][sound]])
                paths[place] = list(path)[: len(emitted[place])]
                kept = to_device(paths[place], self.device) if branches else slice(len(emitted[place]))
                verified[place] = logits[place, kept]
        return emitted, verified, paths

    def _unsound(self, row: Row, logits: torch.Tensor) -> TargetLogitsError:
        """Returns the error about the target's logits [V] for the next token of a row."""
        if bool(logits.isnan().any()):
            got = "NaN"
        elif bool((logits == math.inf).any()):
            got = "+inf"
        else:
            got = "-inf throughout: no token is allowed"
        processed = "" if not row.request.is_processed else " (after the logits processors)"
        return TargetLogitsError(
            f"target: expected logits with a finite maximum for token {row.seen.shape[1]} of row {row.index}, counted from 0, "
            f"from {self.target_name}{processed}, got {got}"
        )

    def _lose_the_unsound(self, row: Row, choice: Choice, draft: Draft, usable: int) -> None:
        """Takes a drafter whose logits were not sound out of the request."""
        if draft.usable is not None and usable < self.config.draft_length:
            row.lose(choice.drafter, ValueError(UNSOUND))

    def _verify_alike(self, places: list[int], logits: torch.Tensor, drafts, uniforms) -> list[tuple[int, list[int], int]]:
        """Rows whose draft logits stack, verified in one call: of each how much of its draft is usable, what it emits, and how
        many of the target's logits in a row are sound."""
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
        sound = target_logits.amax(-1).isfinite().cumprod(1).sum(1)
        # What the host needs of a round, in one transfer.
        found = torch.cat([usable[:, None], sound[:, None], verdict.tokens], 1).tolist()
        return [(known, [token for token in tokens if token >= 0], number) for known, number, *tokens in found]

    def _verify_trees(self, places: list[int], logits: torch.Tensor, drafts, uniforms) -> list[tuple]:
        """`_verify_alike` of trees: of each also, before the last, the places of what it emits among the row's logits."""
        of = [drafts[place] for place in places]
        tokens, parents = (stack(list(each), -1) for each in zip(*((one.tokens[0], one.parents[0]) for one in of)))
        target_logits = logits if len(places) == len(self.rows) else logits[to_device(places, self.device)]
        target_logits = target_logits[:, : tokens.shape[1] + 1]
        tests = np.stack([uniforms[place] for place in places])
        draft_logits = origins = mapping = None
        if of[0].logits is not None:
            draft_logits, origins = stack([one.logits[0] for one in of], 0), stack([one.origins[0] for one in of], -2)
            mapping = self._maps([one.draft_to_target for one in of])
        verdict = self._call_verify_tree(target_logits, tokens, parents, draft_logits, origins, mapping, tests)
        usable, length = torch.stack([one.usable for one in of]), self.config.draft_length
        sound = target_logits.amax(-1).isfinite().long()
        told = [usable[:, None], sound, verdict.tokens, verdict.path]
        if of[0].widths is not None:
            told.append(torch.stack([one.widths for one in of]))
        results = []
        for place, (known, *rest) in zip(places, torch.cat(told, 1).tolist()):  # in one transfer
            is_sound, rest = rest[: sound.shape[1]], rest[sound.shape[1] :]
            emitted, path, widths = rest[: length + 1], rest[length + 1 : 2 * length + 1], rest[2 * length + 1 :]
            if widths:
                self.rows[place].saw_tree(widths)
            path = [0, *(node + 1 for node in path if node >= 0)]
            number = next((number for number, node in enumerate(path) if not is_sound[node]), len(path))
            results.append((known, [one for one in emitted if one >= 0], path, number))
        return results

    def _walk_alone(self, walk: _Walk, row: Row, logits: torch.Tensor, noise: torch.Tensor | None) -> None:
        """Verifies one row's draft to its end. The row's processors see every emitted token once, and no other.

        Args:
            logits: the target's, [K+1, V].
            noise: as in `_verify`, [at least K+1, V].
        """
        place = next(walk.steps)
        while place is not None:
            here = slice(place, place + 1)
            processed = row.request.process(row.seen, logits[here])
            place = _advance(walk, self._taken(processed, None if noise is None else noise[here]))

    def _walk_in_step(self, walks: dict[int, _Walk], logits: torch.Tensor, noise: torch.Tensor | None) -> None:
        """Verifies the drafts of all rows, one token of each at a time, so that `together` sees the batch as in plain decoding.

        It ends with the first draft that does: the other rows keep what is accepted of theirs by then.
        """
        places = {place: next(walk.steps) for place, walk in walks.items()}
        while places:
            rows = [self.rows[place] for place in places]
            given = [logits[place, at : at + 1] for place, at in places.items()]
            for (place, at), row, processed in zip(list(places.items()), rows, self.together.process(rows, given)):
                own = None if noise is None else noise[place, at : at + 1]
                places[place] = _advance(walks[place], self._taken(processed, own))
                row.held_back = places[place] is not None
            self.together.stop(self.all_rows)
            places = {place: at for place, at in places.items() if not self.rows[place].finished}
            if None in places.values():
                return

    def _walk(
        self, walk: _Walk, row: Row, draft: Draft, usable: int, uniforms: np.ndarray
    ) -> Generator[int, torch.Tensor, None]:  # fmt: skip
        """Verifies one draft token by token."""
        drafted = min(draft.tokens.shape[1], usable)
        for position in range(drafted + 1):
            here = slice(position, min(position + 1, drafted))  # nothing at the bonus position
            walk.path.append(position)
            walk.verified.append((yield position))
            # A chain of one token asks for a bonus position too, which is not looked at: the walk goes on there.
            target_logits = walk.verified[-1].expand(1 + here.stop - here.start, -1)[None]
            draft_logits = None if draft.logits is None or position == drafted else draft.logits[:, here]
            mapping = None if draft_logits is None else draft.draft_to_target
            tests = np.append(uniforms[here], uniforms[-1])[None]
            verdict = self._call_verify(target_logits, draft.tokens[:, here], draft_logits, mapping, tests)
            if self._emit_one(walk, row, verdict) == 0:
                return

    def _walk_tree(
        self, walk: _Walk, row: Row, draft: Draft, usable: int, uniforms: np.ndarray
    ) -> Generator[int, torch.Tensor, None]:  # fmt: skip
        """`_walk` of a tree, of which at each node only its children are looked at."""
        node, siblings = -1, (len(uniforms) - 1) // self.config.draft_length
        parents, tokens = draft.parents[0].tolist(), draft.tokens[0].tolist()
        if draft.widths is not None:
            row.saw_tree(draft.widths.tolist())
        for depth in range(self.config.draft_length + 1):
            walk.path.append(node + 1)
            walk.verified.append((yield node + 1))
            children = [place for place, parent in enumerate(parents) if parent == node and tokens[place] >= 0]
            index = to_device(children, self.device).long()
            target_logits = walk.verified[-1].expand(1 + len(children), -1)[None]
            drafted, root = draft.tokens[:, index], torch.full_like(draft.parents[:, index], -1)
            draft_logits = origins = None
            if self.one_hot:
                tests = np.repeat(uniforms[min(depth, len(uniforms) - 1)], 2)
            else:
                own = uniforms[depth * siblings : (depth + 1) * siblings] if depth < self.config.draft_length else uniforms[:0]
                tests = np.append(np.pad(own, (0, siblings - len(own))), uniforms[-1])
                source = draft.origins[0].tolist().index(node) if children else 0
                draft_logits, origins = draft.logits[:, source : source + 1], torch.full_like(draft.origins[:, :1], -1)
            verdict = self._call_verify_tree(
                target_logits, drafted, root, draft_logits, origins, draft.draft_to_target, tests[None], depth=1
            )
            if self._emit_one(walk, row, verdict) == 0:
                return
            node = children[int(verdict.path[0, 0])]

    def _emit_one(self, walk: _Walk, row: Row, verdict: Verdict) -> int:
        """Emits the first token of a verdict that came of the last logits that a walk was given.

        Returns: how many drafted tokens were accepted; 0 also where the row is finished.

        Raises: TargetLogitsError.
        """
        sound = walk.verified[-1][0].amax(-1, keepdim=True).isfinite().long()
        told = torch.cat([verdict.tokens[0, :1], verdict.accepted_length[:1], sound])
        token, accepted, is_sound = told.tolist()
        if not is_sound:
            raise self._unsound(row, walk.verified[-1][0])
        walk.emitted += row.emit([token])
        return 0 if row.finished else accepted

    def _taken(self, processed: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        """Returns processed logits [1, V] as they are verified, with the noise [1, V] on top."""
        if self.sampling.temperature == 0:  # +inf is how some processors force a token, and the greatest all the same
            processed = processed.clamp(max=torch.finfo(processed.dtype).max)
        return processed if noise is None else self._perturb(processed, noise)

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
            mode="sampled" if self.config.mode == "sampled" else "argmax",
            lengths=lengths,
            draft_to_target=mapping,
            target_temperature=self.rule.temperature,
            draft_temperature=self.rule.temperature,
            target_threshold=self.rule.threshold(target_logits),
            draft_threshold=None if draft_logits is None else self.rule.threshold(draft_logits),
            backend=self.config.backend,
        )

    def _call_verify_tree(
        self, target_logits, draft_tokens, parents, draft_logits, origins, mapping, uniforms, depth: int | None = None
    ) -> Verdict:
        return verify_tree(
            target_logits,
            draft_tokens,
            parents,
            draft_logits,
            to_device(uniforms, self.device),
            depth=depth or self.config.draft_length,
            mode="argmax" if draft_logits is None else "sampled",
            origins=origins,
            draft_to_target=mapping,
            target_temperature=self.rule.temperature,
            draft_temperature=self.rule.temperature,
            target_threshold=self.rule.threshold(target_logits),
            draft_threshold=None if draft_logits is None else self.rule.threshold(draft_logits),
            backend=self.config.backend,
        )

    def _evaluate(self, rows: list[Row], asked: Sequence[np.ndarray], scored: Sequence[Scored],
                  of_prompt: bool = False) -> None:  # fmt: skip
        """Compares what the drafters that were asked had for the tokens they are not scored on, as `Pool.score` gives it, with
        the target; `_observe` sees what comes of it. What is `of_prompt` is compared as `DecodeConfig.warm_start` says."""
        rule = WARM if of_prompt else self.rule
        lifted = rows[0].request.process_drafts is not None
        self.under_way.append(_Scores(rows, [int(row.missed.min()) for row in rows], of_prompt, []))
        alike = [tuple((row.place, count) for row, count in zip(one.rows, one.counts)) for one in scored]
        known = {key: self._unscored(one.rows, one.counts, of_prompt) for key, one in zip(alike, scored)}
        for row, drafters in zip(rows, asked):
            row.were_scored(drafters)
        with self.side.work(*(tensor for each in known.values() for tensor in each), *(one.logits for one in scored)):
            thresholds = {key: rule.threshold(target_logits) for key, (target_logits, *_) in known.items()}
            for key, one in zip(alike, scored):
                (target_logits, tokens, lengths, noise), logits = known[key], one.logits
                finite = logits.amax(-1).isfinite()  # [n, R, T]
                if not logits.is_cpu or not finite.all():
                    logits = logits.masked_fill(~finite[..., None], 0)  # what comes of NaN is for kernels to choose
                if lengths is not None:
                    finite |= torch.arange(finite.shape[2], device=self.device) >= lengths[:, None]
                sound = finite.all(-1)
                if lifted:
                    logits = self._process(one.rows, one.counts, one.drafters, logits)
                maps = None if lifted else one.maps
                if noise is not None:
                    logits = self._perturb(logits, noise, None if maps is None else maps[:, None, None])
                arguments = {
                    "lengths": lengths,
                    "draft_to_target": maps,
                    "target_temperature": rule.temperature,
                    "drafter_temperature": rule.temperature,
                    "target_threshold": thresholds[key],
                    "drafter_threshold": rule.threshold(logits),
                }
                if of_prompt:  # the first of all scores: the overlap of distributions
                    measured = evaluate(target_logits, logits, tokens, backend=self.config.backend, **arguments).scores[:1]
                else:
                    measured = self._measure(one.part, one.rows, target_logits, logits, tokens, arguments)
                found = torch.cat([measured.double(), sound[None, :, :, None].expand_as(measured[:1])])
                self.under_way[-1].parts.append((one.rows, one.counts, one.drafters, self.side.to_host(found)))

    def _unscored(self, rows: Sequence[Row], counts: Sequence[int], of_prompt: bool) -> tuple[torch.Tensor | None, ...]:
        """Of the rows' last tokens the target's logits [R, T, V], they themselves [R, T], how many of each row [R], None where
        all are as many, and in mode "coupled" their noise [R, T, V]."""
        logits = stack([last(row.unscored, count) for row, count in zip(rows, counts)], 0)
        noise = None
        if self.coupled and not of_prompt:
            noise = stack([last(row.unscored_noise, count) for row, count in zip(rows, counts)], 0)
        tokens = stack([row.tokens[row.length - count : row.length] for row, count in zip(rows, counts)], 0)
        return logits, tokens, None if min(counts) == max(counts) else to_device(counts, self.device), noise

    def _measure(self, part: Heads | Singles, rows, target_logits, logits, tokens, arguments: dict) -> torch.Tensor:
        """acceptance_prob and acceptance_ratio of the part's drafters as they draft, [2, n, R, T]; of trees for the nodes at
        depth 0, 1, ..., [2K, n, R, T]."""
        tree, backend = self.config.tree, self.config.backend
        if tree is None:
            scores = evaluate(target_logits, logits, tokens, backend=backend, **arguments).scores
            return scores[slice(2) if self.config.mode == "sampled" else slice(2, 4)]
        if self.one_hot:
            scores = evaluate(target_logits, logits, tokens, top_k=tree.widest, backend=backend, **arguments).scores[4:]
        else:
            scores = multi_draft_acceptance(target_logits, logits, tokens, tree.widest, backend=backend, **arguments)
        # For every number of children a pair, and before them one for none. Where only the first child has children, the path
        # has to go there.
        scores = functional.pad(scores, (0, 0) * 3 + (2, 0))
        counts = np.minimum([row.children() for row in rows], len(scores) // 2 - 1).T  # [K, R]
        followed = counts if part.width is None else np.minimum(counts, 1)
        pairs = np.stack([2 * counts, 2 * followed + 1], 1).reshape(-1, 1, len(rows), 1)
        return scores.gather(0, to_device(pairs, scores.device).expand(-1, *scores.shape[1:]))

    def _observe(self, later: bool) -> None:
        """Lets the rows learn from evaluations, from the newest at the end of the next round if `later`."""
        while len(self.under_way) > later:
            seconds = self.costs and self.costs.of(len(self.rows))
            one = self.under_way.pop(0)
            depths = 1 if self.config.tree is None else self.config.draft_length
            kinds = 1 if one.of_prompt else 2 * depths
            found: dict[tuple[Row, int], np.ndarray] = {}
            for rows, counts, drafters, bring in one.parts:
                *measured, sound = bring()
                for place, (row, count) in enumerate(zip(rows, counts)):
                    for member, drafter in enumerate(drafters):
                        if not sound[member, place, 0]:
                            row.lose(drafter, ValueError(UNSOUND))
                        found[row, drafter] = np.stack([values[member, place, :count] for values in measured])
            for row, count in zip(one.rows, one.counts):
                # What a lost drafter is said to have scored is 0.
                known = np.full((kinds, len(row.drafters), count), np.nan)
                known[:, ~row.alive] = 0
                for drafter in np.flatnonzero(row.alive).tolist():
                    if (values := found.get((row, drafter))) is None:
                        continue
                    missed = values.shape[1] - count
                    known[:, drafter] = values[:, missed:]
                    if missed:
                        row.selector.catch_up(drafter, *self._by_kind(values[:, :missed]))
                if one.of_prompt:
                    row.selector.warm_up(known[0], seconds)
                else:
                    row.selector.observe(*self._by_kind(known), seconds)

    def _by_kind(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """acceptance_prob and acceptance_ratio [...] of what `_measure` gives of them, of trees [K, ...]."""
        return (scores[0], scores[1]) if self.config.tree is None else (scores[::2], scores[1::2])

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
        self.dismiss()

    def dismiss(self) -> None:
        """Takes leave of the rows that are finished."""
        if self.under_way and any(row.finished for row in self.rows):
            self._observe(False)
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


def _advance(walk: _Walk, processed: torch.Tensor) -> int | None:
    """Takes a walk one token further, and returns the place of the logits that it asks for next, or None at its end."""
    try:
        return walk.steps.send(processed)
    except StopIteration:
        return None


def stack(tensors: Sequence[torch.Tensor], padding: float) -> torch.Tensor:
    """Tensors [T_b, ...] as one, [B, max T_b, ...], filled up on the right."""
    if len(tensors) == 1:
        return tensors[0][None]
    return pad_sequence(list(tensors), batch_first=True, padding_value=padding)
