"""The drafters of a batch: every row drafts with its own, all are scored in one pass, and one that fails leaves its row.

Equal-shaped EAGLE heads work as one (`Heads`), any other drafter by itself with a session for each row (`Singles`). Both
answer the same calls: `score` lets all its drafters take in what is verified, `lead` brings each row's own up to date and
begins a draft, `step` goes on with it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, TypeVar

import numpy as np
import torch

from hedgespec.config import DecodeConfig
from hedgespec.coupled import perturb
from hedgespec.decoder.grow import grow
from hedgespec.decoder.row import Row, draft_width
from hedgespec.drafters import Drafter, DrafterSession
from hedgespec.drafters.stack import HeadStack, is_plain, kind_of
from hedgespec.records import Choice, Draft
from hedgespec.sampling import Sampling
from hedgespec.transfer import to_device
from hedgespec.verify import sample

UNSOUND = "expected logits with a finite maximum, got NaN, +inf or -inf throughout"
"""Of logits. A row's maximum tells all three."""
MOST_MAPS = 64
"""Stacked maps of drafters that drafted, or were scored, together: as many are kept."""
T = TypeVar("T")


@dataclass
class Scored:
    """What some drafters of a part had for the last tokens of some rows."""

    part: Heads | Singles
    members: tuple[int, ...]
    """n of the part's."""
    rows: list[Row]
    """R rows."""
    counts: list[int]
    """Of each row how many tokens."""
    logits: torch.Tensor
    """[n, R, T, Vd], T of the longest, anything past a row's own."""

    @property
    def drafters(self) -> list[int]:
        """Their indices in the pool."""
        return [self.part.members[member] for member in self.members]

    @property
    def maps(self) -> torch.Tensor | None:
        """int64 [n, Vd], their maps into the target's vocabulary, if they have some."""
        return self.part.maps_of(self.members)


class Part:
    """What both kinds of parts are to an evaluation.

    Args:
        members: their indices in the pool.
        maps: int64 [n, Vd], the target's id of each draft id; None where the vocabularies are the same.
    """

    map_of: Any
    """Of each member its map; only where there are any."""

    def __init__(self, members: Sequence[int], maps: torch.Tensor | None):
        self.members, self.maps = list(members), maps
        self._maps_of: dict[tuple[int, ...], torch.Tensor] = {}

    def maps_of(self, members: tuple[int, ...]) -> torch.Tensor | None:
        """Those of some members; the same tensor for the same ones, since what is checked of a map is remembered by tensor."""
        if self.maps is None or len(members) == len(self.members):
            return self.maps
        if members not in self._maps_of:
            if len(self._maps_of) >= MOST_MAPS:
                self._maps_of.clear()
            self._maps_of[members] = self.maps[list(members)]
        return self._maps_of[members]


class Heads(Part):
    """Some of the pool's drafters as one stack, at work on a batch.

    Args:
        members: their indices in the pool.
        stack: their weights.
        batch: B, rows.
        window, captured: see `HeadStack.session`.
    """

    width: int | None = None
    """Tokens that a drafter takes in at one depth of a tree; None: any number."""

    def __init__(self, members: Sequence[int], stack: HeadStack, batch: int, window: int | None, captured: bool):
        super().__init__(members, stack.maps)
        self.map_of, self.layers = stack.map_of, stack.config.aux_layers
        self.session = stack.session(batch, window, captured=captured)

    @property
    def cache_bytes(self) -> int:
        return self.session.cache_bytes

    def select(self, places: Sequence[int]) -> None:
        """Goes on with the rows at these places only."""
        self.session.select(places)

    def score(self, rows: Sequence[Row], counts: Sequence[int], members: Sequence[int]) -> torch.Tensor:
        """Logits [n, R, T, Vd] that these members had for each row's last `counts` tokens, T of the longest; they take in all
        that is verified. Of what was verified before, the counts have to be those of the tokens they are not yet scored on."""
        places = [row.place for row in rows]
        news = self._since(rows, self.session.scored[members[0], places])
        return self.session.score(places, *news, counts, None if len(members) == len(self.members) else members)

    def lead(self, rows: Sequence[Row], members: Sequence[int]) -> tuple[list[int], torch.Tensor]:
        """Which of the rows draft, as places among them, and the logits [R', Vd] for their first tokens."""
        places = [row.place for row in rows]
        taken = self.session.taken[members, places]
        return list(range(len(rows))), self.session.lead(places, members, *self._since(rows, taken))

    def step(self, chosen: Sequence[int], tokens: torch.Tensor) -> tuple[list[int], torch.Tensor]:
        """Takes in one drafted token of each row that goes on, `chosen` among those that drafted last; returns as `lead`."""
        return list(range(len(chosen))), self.session.step(chosen, tokens)

    def branch(
        self, drafting: Sequence[int], tokens: torch.Tensor, parents: torch.Tensor
    ) -> tuple[Sequence[int], torch.Tensor]:
        """Takes in the next depth of the trees of all rows that drafted last, int64 [R, F], each token's parent among those
        that it took in, see `StackSession.branch`; returns which rows go on and the logits [R', F, Vd] that follow."""
        return range(len(tokens)), self.session.branch(tokens, parents)

    def _since(self, rows: Sequence[Row], taken: np.ndarray) -> tuple[list[torch.Tensor], list[Any]]:
        news = [row.since(count, self.layers) for row, count in zip(rows, taken.tolist())]
        return [tokens for tokens, _ in news], [features for _, features in news]


class Singles(Part):
    """Some of the pool's drafters, whose logits are alike in shape, each at work on each row by itself.

    Whatever one of them does, its row goes on without it.

    Args:
        members: their indices in the pool.
        drafters: they themselves.
        rows: of the batch.
    """

    def __init__(self, members: Sequence[int], drafters: Sequence[Drafter], rows: Sequence[Row]):
        maps = None
        if drafters[0].draft_to_target is not None:
            own = [drafter.draft_to_target for drafter in drafters]
            maps = torch.stack([one.to(rows[0].tokens.device) for one in own if one is not None])
            self.map_of = list(maps)
        super().__init__(members, maps)
        self.drafters, self.rows = list(drafters), list(rows)
        self.sessions: dict[tuple[int, int], DrafterSession] = {}
        """By row and member."""
        self.given: dict[tuple[int, int], list[torch.Tensor]] = {}
        """Logits, chunks [T, Vd], from the first token the member is not scored on to the one after the last it has taken in;
        likewise."""
        for row in rows:
            for member, drafter in enumerate(self.drafters):
                with row.quarantine(self.members[member]):
                    self.sessions[row.index, member] = drafter.session()
        self._drafting: list[tuple[Row, int]] = []
        self._places: dict[int, int] = {}
        """Of the rows of a tree: where each stands in `_drafting`."""

    cache_bytes = 0
    """Not known."""
    width = 1
    """As of `Heads`: sessions take in one token after another."""

    def select(self, places: Sequence[int]) -> None:
        self.rows = [self.rows[place] for place in places]
        left = {row.index for row in self.rows}
        for held in (self.sessions, self.given):
            for key in [key for key in held if key[0] not in left]:
                del held[key]

    def score(self, rows: Sequence[Row], counts: Sequence[int], members: Sequence[int]) -> torch.Tensor:
        known: dict[tuple[int, int], torch.Tensor] = {}
        for row_place, (row, count) in enumerate(zip(rows, counts)):
            for place, member in enumerate(members):
                if not row.alive[self.members[member]]:
                    continue
                with row.quarantine(self.members[member]):
                    self._take_in(row, member, count)
                    logits = torch.cat(self.given[row.index, member])
                    known[place, row_place], self.given[row.index, member] = logits[:-1], [logits[-1:]]
        width = draft_width(self.drafters[0])
        dtype = reduce(torch.promote_types, (logits.dtype for logits in known.values()), torch.float32)
        out = rows[0].tokens.new_zeros(len(members), len(rows), max(counts), width, dtype=dtype)
        for (place, row_place), logits in known.items():
            out[place, row_place, : len(logits)] = logits
        return out

    def lead(self, rows: Sequence[Row], members: Sequence[int]) -> tuple[list[int], torch.Tensor]:
        self._drafting = list(zip(rows, members))
        going, logits = self._each(lambda row, member, place: self._take_in(row, member, int(row.missed[self.members[member]])))
        self._places = {row: place for place, row in enumerate(going)}
        return going, logits

    def step(self, chosen: Sequence[int], tokens: torch.Tensor) -> tuple[list[int], torch.Tensor]:
        self._drafting = [self._drafting[place] for place in chosen]

        def one(row: Row, member: int, place: int) -> torch.Tensor:
            logits = self.sessions[row.index, member].step(tokens[place : place + 1])
            return self._checked(member, logits[None], 1)

        return self._each(one)

    def branch(self, drafting: Sequence[int], tokens: torch.Tensor, parents: torch.Tensor) -> tuple[list[int], torch.Tensor]:
        """As of `Heads`, with F = 1 and every parent the last token; only the rows `drafting` go on."""
        standing = [self._places[row] for row in drafting]
        answered, logits = self.step(standing, tokens[to_device(drafting, tokens.device), 0])
        going = [drafting[place] for place in answered]
        self._places = {row: place for place, row in enumerate(going)}
        return going, logits[:, None]

    def _each(self, ask: Callable[[Row, int, int], torch.Tensor]) -> tuple[list[int], torch.Tensor]:
        """The rows that get an answer, which alone draft on, and the last row of each answer, stacked."""
        going, answers = [], []
        for place, (row, member) in enumerate(self._drafting):
            with row.quarantine(self.members[member]):
                answers.append(ask(row, member, place)[-1])
                going.append(place)
        self._drafting = [self._drafting[place] for place in going]
        return going, torch.stack(answers) if answers else torch.empty(0)

    def _take_in(self, row: Row, member: int, unscored: int) -> torch.Tensor:
        """Feeds a drafter the verified tokens it lacks, all in one chunk; the logits it gives last, [.., Vd].

        Of a fresh session only those that are to be scored are kept, and the last.
        """
        session, chunks = self.sessions[row.index, member], self.given.setdefault((row.index, member), [])
        tokens, features = row.since(session.verified, self.drafters[member].aux_layers)
        if len(tokens):
            before = session.verified
            keep = len(tokens) if before else unscored + 1
            logits = self._checked(member, session.prefill(tokens, features, keep), keep)
            if session.verified != before + len(tokens):
                raise ValueError(
                    f"expected prefill to add its {len(tokens)} tokens to `verified`, {before} before, got {session.verified}"
                )
            if not row.selector.scores_all:
                chunks.clear()  # nobody will ask for what lies behind
            chunks.append(logits)
        return chunks[-1]

    def _checked(self, member: int, logits: torch.Tensor, rows: int) -> torch.Tensor:
        """The logits [rows, Vd] themselves, if they are what a drafter owes."""
        width = draft_width(self.drafters[member])
        if logits.shape != (rows, width):
            raise ValueError(f"expected logits of shape {(rows, width)}, got {tuple(logits.shape)}")
        if not logits.is_floating_point():
            raise TypeError(f"expected floating-point logits, got {logits.dtype}")
        if logits.device != self.rows[0].tokens.device:
            raise ValueError(f"expected logits on {self.rows[0].tokens.device}, got them on {logits.device}")
        if not all(map(math.isfinite, logits.amax(-1).tolist())):
            raise ValueError(UNSOUND)
        return logits


class Pool:
    """All drafters of a batch.

    Args:
        drafters: N.
        stacks: which of them work as one, as (indices, weights).
        rows: B rows, not begun.
        config: the decoder's.
    """

    def __init__(self, drafters: Sequence[Drafter], stacks: Sequence[tuple[list[int], HeadStack]], rows: Sequence[Row],
                 config: DecodeConfig):  # fmt: skip
        self.drafters, self.rows, self.config = drafters, list(rows), config
        self.parts: list[Heads | Singles] = [
            Heads(members, stack, len(rows), config.drafter_window, config.compile) for members, stack in stacks
        ]
        stacked = {index for members, _ in stacks for index in members}
        alike: dict[tuple[int, bool], list[int]] = {}
        for index, drafter in enumerate(drafters):
            if index not in stacked:
                alike.setdefault((draft_width(drafter), drafter.draft_to_target is not None), []).append(index)
        self.parts += [Singles(members, [drafters[index] for index in members], rows) for members in alike.values()]

    @property
    def cache_bytes(self) -> int:
        """Memory of the stacked heads' keys and values."""
        return sum(part.cache_bytes for part in self.parts)

    def select(self, places: Sequence[int]) -> None:
        """Goes on with the rows at these places only."""
        self.rows = [self.rows[place] for place in places]
        for part in self.parts:
            part.select(places)

    def score(self, rows: Sequence[Row], asked: Sequence[np.ndarray]) -> list[Scored]:
        """Drafters take in what is verified of some rows, of each those that are asked, bool [N]: what they had for the tokens
        that they are not scored on yet. Drafters that missed as much as each other work together, and so do their rows."""
        scored = []
        for number in range(len(self.parts)):
            together: dict[tuple[int, ...], list[tuple[Row, int]]] = {}
            for row, some in zip(rows, asked):
                alike: dict[int, list[int]] = {}
                for member, drafter in enumerate(self.parts[number].members):
                    if some[drafter]:
                        alike.setdefault(int(row.missed[drafter]), []).append(member)
                for count, members in alike.items():
                    together.setdefault(tuple(members), []).append((row, count))
            for members, of in together.items():
                own, counts = [row for row, _ in of], [count for _, count in of]
                logits = self._or_apart(number, _score, own, counts, members)
                scored.append(Scored(self.parts[number], members, own, counts, logits))
        return scored

    def draft(self, choices: Sequence[Choice], uniforms: torch.Tensor, sampling: Sampling, one_hot: bool,
              noise: torch.Tensor | None = None, now: Callable[[], float] | None = None) -> list[Draft]:  # fmt: skip
        """What each row's chosen drafter proposes; nothing where none is chosen or it fails.

        Args:
            choices: of each row, [B].
            uniforms: floating [B, K]: row b's k-th draws its k-th token; of a tree see `grow`.
            sampling: of all rows.
            one_hot: proposals are the drafters' likeliest tokens.
            noise: float32 [B, at least K, V] that comes on top of their logits first, see `perturb`; None: nothing does.
            now: a clock in seconds, read around what each part drafts; None measures nothing.
        """
        draft_with = self._draft_with if self.config.tree is None else self._grow_with
        drafts = [no_draft(row) for row in self.rows]
        for number, part in enumerate(self.parts):
            places = [place for place, choice in enumerate(choices) if choice.drafter in part.members]
            if places:
                at = _places(places, self.rows, uniforms.device)
                own, own_noise = uniforms[at], None if noise is None else noise[at]
                chosen = [choices[place] for place in places]
                rows = [self.rows[place] for place in places]
                began = now() if now else 0.0
                found = self._or_apart(number, draft_with, rows, chosen, own, sampling, one_hot, own_noise)
                if now:
                    each = (now() - began) / max(1, *(draft.tokens.shape[1] for draft in found))
                    found = [replace(draft, seconds_per_token=each) for draft in found]
                for place, draft in zip(places, found):
                    drafts[place] = draft
        return drafts

    def _or_apart(self, number: int, call: Callable[..., T], *arguments: Any) -> T:
        """`call` with a part and the arguments. Heads that fail together go on one by one, and those at fault leave."""
        try:
            return call(self.parts[number], *arguments)
        except Exception as error:
            members, single = self.parts[number].members, isinstance(self.parts[number], Singles)
            if single:
                raise
            warnings.warn(f"stacked heads work apart from now on: {type(error).__name__}: {error}", stacklevel=1)
        self.parts[number] = None  # their memory may be what is wanted
        self.parts[number] = Singles(members, [self.drafters[index] for index in members], self.rows)
        return call(self.parts[number], *arguments)

    def _grow_with(self, part: Heads | Singles, rows: Sequence[Row], choices: Sequence[Choice], uniforms: torch.Tensor,
                   sampling: Sampling, one_hot: bool, noise: torch.Tensor | None) -> list[Draft]:  # fmt: skip
        """Trees for rows that all draft with the same part."""
        processed = None if rows[0].request.process_drafts is None else _processed
        return grow(
            part, rows, choices, uniforms, sampling, one_hot, self.config.tree, self.config.draft_length, processed, noise
        )  # fmt: skip

    def _draft_with(self, part: Heads | Singles, rows: Sequence[Row], choices: Sequence[Choice], uniforms: torch.Tensor,
                    sampling: Sampling, one_hot: bool, noise: torch.Tensor | None) -> list[Draft]:  # fmt: skip
        """`draft` for rows that all draft with the same part."""
        processed, device = rows[0].request.process_drafts is not None, uniforms.device
        members = [part.members.index(choice.drafter) for choice in choices]
        which = to_device(members, device)
        tokens: list[list[torch.Tensor]] = [[] for _ in rows]
        logits: list[list[torch.Tensor]] = [[] for _ in rows]
        sound = torch.ones(len(rows), uniforms.shape[1], dtype=torch.bool, device=device)
        drafting, given = part.lead(rows, members)  # `drafting`: the rows to which the rows of `given` belong
        for position in range(max(choice.draft_length for choice in choices)):
            if not drafting:
                break
            there = list(range(len(drafting)))  # their places among those that drafted last
            best, likeliest = given.max(-1)
            sound[_places(drafting, rows, device), position] = best.isfinite()
            if processed:
                given = [
                    _processed(rows[row], choices[row].drafter, given[place, None], tokens[row])
                    for place, row in enumerate(drafting)
                ]
                # Where nothing that the drafter can name is allowed, its draft ends.
                there = [place for place in there if given[place].amax().isfinite()]
                if not there:
                    break
                given = torch.cat([given[place] for place in there])
                drafting, likeliest = [drafting[place] for place in there], given.argmax(-1)
            own = _places(drafting, rows, device)
            if noise is not None:
                maps = None if part.maps is None or processed else part.maps[which[own]]
                given = perturb(
                    given, noise[own, position], temperature=sampling.temperature, threshold=sampling.threshold(given),
                    draft_to_target=maps,
                )  # fmt: skip
                likeliest = given.argmax(-1)
            if one_hot:
                drawn = likeliest
            else:
                drawn = sample(
                    given, uniforms[own, position], temperature=sampling.temperature, threshold=sampling.threshold(given)
                )
            if part.maps is not None and not processed:
                drawn = part.maps[which[own], drawn]
            for place, row in enumerate(drafting):
                tokens[row].append(drawn[place : place + 1])
                logits[row].append(given[place])
            going = [
                place
                for place, row in enumerate(drafting)
                if choices[row].draft_length > position + 1
                and not (processed and int(drawn[place]) in rows[row].request.eos)  # behind it no text is to be
            ]
            if not going:
                break
            answered, given = part.step([there[place] for place in going], drawn[_places(going, drafting, device)])
            drafting = [drafting[going[place]] for place in answered]
        usable = sound.cumprod(1).sum(1)
        drafts = []
        for row, member in enumerate(members):
            draft = no_draft(rows[row])
            if tokens[row]:
                proposal = (None, None)
                if not one_hot:
                    mapping = None if processed or part.maps is None else part.map_of[member]
                    proposal = torch.stack(logits[row])[None], mapping
                draft = Draft(torch.cat(tokens[row])[None], *proposal)
            drafts.append(replace(draft, usable=usable[row]))
        return drafts


def _places(some: Sequence[int], everyone: Sequence, device: torch.device) -> slice | torch.Tensor:
    """What indexes some of a sequence's places, which ascend, on the device."""
    return slice(None) if len(some) == len(everyone) else to_device(some, device)


def _processed(row: Row, drafter: int, logits: torch.Tensor, drafted: Sequence[torch.Tensor]) -> torch.Tensor:
    """A drafter's logits [1, Vd] after what it has drafted as the row's processors leave them; -inf where they fail.

    What they make of a text that may never be is nobody's fault: the draft ends there.
    """
    try:
        return row.processed(drafter, logits, torch.cat([row.seen[0], *drafted]))
    except Exception:
        return logits.new_full((1, row.vocabulary), -math.inf)


def _score(part: Heads | Singles, rows: Sequence[Row], counts: Sequence[int], members: Sequence[int]) -> torch.Tensor:
    return part.score(rows, counts, members)


def no_draft(row: Row) -> Draft:
    """No tokens, where the row's are."""
    return Draft(row.tokens.new_empty(1, 0), None)


def stacks_of(drafters: Sequence[Drafter]) -> list[tuple[list[int], HeadStack]]:
    """The heads among the drafters, by kind: their indices and their weights."""
    kinds: dict[tuple, list[int]] = {}
    for index, drafter in enumerate(drafters):
        if is_plain(drafter):
            kinds.setdefault(kind_of(drafter), []).append(index)
    return [(members, HeadStack([drafters[index] for index in members])) for members in kinds.values()]
