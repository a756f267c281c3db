"""One request while it is decoded: its tokens, its learner, every drafter's session, and what it does in a round."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from hedgespec.cache import RowBuffer
from hedgespec.config import DecodeConfig
from hedgespec.decoder.request import Request
from hedgespec.delay import DelayQueue
from hedgespec.drafters import Drafter, DrafterSession
from hedgespec.learners import Learner
from hedgespec.metrics import DecodeStats
from hedgespec.records import Choice, Draft
from hedgespec.sampling import Sampling
from hedgespec.selection import select
from hedgespec.verify import sample

EAGER_ROUNDS = 8
"""Rounds at the start of a request after each of which the drafters are scored, whatever the cadence."""
NOBODY = Choice(drafter=-1, draft_length=0)


class Row:
    """One request of a batch.

    Args:
        index: its place in the batch as it came in.
        request: what is asked.
        drafters, config, learner: the decoder's, a fresh learner.
        vocabulary: V, the target's.
        features: the target's hidden states at the positions before the row's tokens, by `Drafter.aux_layers`.
        warned: names of drafters of whose failure the caller knows; of all rows together.
    """

    def __init__(self, index: int, request: Request, drafters: tuple[Drafter, ...], config: DecodeConfig, learner: Learner,
                 vocabulary: int, features: dict[tuple[int, ...], RowBuffer], warned: set[str]):  # fmt: skip
        self.index, self.request, self.drafters, self.config, self.learner = index, request, drafters, config, learner
        self.vocabulary, self.features, self.warned = vocabulary, features, warned
        if request.learner_state is not None:
            self.learner.load_state_dict(request.learner_state)
        self.queue = DelayQueue(
            len(self.drafters), self.config.draft_length, estimator=self.config.estimator, loss=self.config.loss
        )
        self.stats = DecodeStats(tuple(drafter.name for drafter in drafters), config.draft_length)
        self.padded = torch.cat([request.prompt, request.prompt.new_zeros(request.max_new_tokens)])
        self.tokens = self.padded[request.padding :]
        """The row's own tokens, the first `length` of them known."""
        self.length = self.prompt_length = len(self.tokens) - request.max_new_tokens
        self.cached = 0
        """Tokens that came in a cache: no features are known for them."""
        self.cache: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Once it is finished and the request asks for it: the target's keys and values by layer, [heads, length, head_dim]."""
        self.finished = False
        self.scores_all = self.learner.feedback == "full" or self.config.track_regret
        self.sessions: dict[int, DrafterSession] = {}
        """By drafter."""
        for drafter in range(len(drafters)):
            with self._quarantine(drafter):
                self.sessions[drafter] = drafters[drafter].session()
        self.given: list[list[torch.Tensor]] = [[] for _ in self.drafters]
        """Each drafter's logits, chunks [T, Vd], from the first unscored token to the one after the last it has taken in."""
        self.unscored: list[torch.Tensor] = []
        """The target's logits, chunks [T, V], of the verified tokens on which the drafters are not scored yet."""

    @property
    def sequence(self) -> torch.Tensor:
        """Prompt as it was given, padding included, and continuation, int64 [L]."""
        return self.padded[: self.request.padding + self.length].clone()

    @property
    def seen(self) -> torch.Tensor:
        """`sequence` as a batch of 1 and without a copy, which is how processors and criteria see it."""
        return self.padded[None, : self.request.padding + self.length]

    @property
    def room(self) -> int:
        return len(self.tokens) - self.length

    @property
    def alive(self) -> np.ndarray:
        """Which drafters have not failed, bool [N]."""
        return np.array([drafter.name not in self.stats.failures for drafter in self.drafters])

    def uniforms(self, count: int) -> np.ndarray:
        return self.request.random.random(count)

    def weights(self) -> np.ndarray:
        """The learner's weights [N], what failed drafters hold shared out among the others; all 0 if all failed."""
        weights = self.learner.weights()
        if self.stats.failures:
            weights = np.where(self.alive, weights, 0.0)
            weights = weights / weights.sum() if weights.any() else self.alive / max(self.alive.sum(), 1)
        return weights

    def select(self, weights: np.ndarray, uniform: float) -> Choice:
        room = self.room - 1  # the recovered or bonus token comes on top of the draft
        if room == 0 or not weights.any():
            return NOBODY
        choice = select(weights, uniform, draft_length=self.config.draft_length, rule=self.config.selection)
        return replace(choice, draft_length=min(choice.draft_length, room))

    def draft(self, choice: Choice, uniforms: np.ndarray, sampling: Sampling) -> Draft:
        """What the chosen drafter proposes; nothing if it fails."""
        one_hot = self.config.mode == "argmax" or sampling.temperature == 0
        draft = Draft(self.tokens.new_empty(1, 0), None)
        if choice == NOBODY:
            return draft
        with self._quarantine(choice.drafter):
            tokens, logits = [], []
            mapping = self.drafters[choice.drafter].draft_to_target if self.request.process_drafts is None else None
            for position in range(choice.draft_length):
                if position == 0:
                    self.take_in(choice.drafter)
                    row = self.given[choice.drafter][-1][-1]
                else:
                    row = self._checked(choice.drafter, self.sessions[choice.drafter].step(tokens[-1])[None], 1)[0]
                if self.request.process_drafts is not None:
                    row = self._processed(choice.drafter, row[None], torch.cat([self.seen[0], *tokens]))[0]
                    if not row.amax().isfinite():
                        break  # nothing that the drafter can name is allowed here
                if one_hot:
                    token = row.argmax()
                else:
                    uniform, threshold = torch.as_tensor(uniforms[position], device=row.device), sampling.threshold(row)
                    token = sample(row, uniform, temperature=sampling.temperature, threshold=threshold)
                tokens.append((token if mapping is None else mapping[token]).view(1))
                logits.append(row)
            if tokens:
                proposal = (None, None) if one_hot else (torch.stack(logits)[None], mapping)
                draft = Draft(torch.cat(tokens)[None], *proposal)
        return draft

    def _processed(self, drafter: int, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """A drafter's logits [n, Vd] for the token after `tokens` [L] as the target's processors leave them, [n, V]."""
        return self.request.process_drafts(tokens[None], _lifted(logits, self.drafters[drafter], self.vocabulary))

    def emit(self, tokens: list[int]) -> list[int]:
        """Appends verified tokens up to the first that ends the text."""
        self.tokens[self.length : self.length + len(tokens)] = torch.tensor(tokens)
        for count, token in enumerate(tokens, start=1):
            self.length += 1
            self.finished = token in self.request.eos or self.room == 0
            if self.request.stop is not None:  # asked about every token, as after each step of plain decoding
                self.finished |= self.request.stop(self.seen)
            if self.finished:
                return tokens[:count]
        return tokens

    def take_in(self, drafter: int) -> None:
        """Feeds a drafter the verified tokens it lacks, all in one chunk; of a fresh session only the last row is kept."""
        session, layers = self.sessions[drafter], self.drafters[drafter].aux_layers
        first = self.cached if layers else 0  # a head's request begins where features do
        lacking = slice(first + session.verified, self.length)
        if lacking.start == lacking.stop:
            return
        keep = 1 if session.verified == 0 else lacking.stop - lacking.start
        features = self.features[layers][lacking.start - first : lacking.stop - first] if layers else None
        logits = self._checked(drafter, session.prefill(self.tokens[lacking], features, keep), keep)
        if not self.scores_all:
            self.given[drafter].clear()  # nobody will ask for what lies behind
        self.given[drafter].append(logits)

    def take_in_by_all(self) -> None:
        """`take_in` by every drafter that has not failed."""
        for drafter in np.flatnonzero(self.alive):
            with self._quarantine(drafter):
                self.take_in(drafter)

    def _checked(self, drafter: int, logits: torch.Tensor, rows: int) -> torch.Tensor:
        """The logits [rows, Vd] themselves, if they are what a drafter owes. A row's maximum tells NaN, +inf and no mass."""
        width = width_of(self.drafters[drafter])
        if logits.shape != (rows, width):
            raise ValueError(f"expected logits of shape {(rows, width)}, got {tuple(logits.shape)}")
        if not logits.is_floating_point():
            raise TypeError(f"expected floating-point logits, got {logits.dtype}")
        if not all(map(math.isfinite, logits.amax(-1).tolist())):
            raise ValueError("expected logits with a finite maximum, got NaN, +inf or -inf throughout")
        return logits

    def evaluation_is_due(self) -> bool:
        """Every round while there is much to learn, later as the configuration says, and at the end."""
        rounds = self.stats.rounds + 1
        return self.scores_all and (rounds <= EAGER_ROUNDS or rounds % self.config.evaluate_every == 0 or self.finished)

    def to_score(self) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Lets every drafter take in what it lacks; the target's logits [T, V] of the unscored tokens, and by drafter its own.

        A drafter's logits for the first of them are those it ended the last evaluation with.
        """
        target_logits = torch.cat(self.unscored)
        self.unscored.clear()
        self.take_in_by_all()
        rows: dict[int, torch.Tensor] = {}
        for drafter in np.flatnonzero(self.alive):
            with self._quarantine(drafter):
                logits = torch.cat(self.given[drafter])
                rows[drafter], self.given[drafter] = logits[:-1], [logits[-1:]]
                if self.request.process_drafts is not None:
                    first = self.seen.shape[1] - len(rows[drafter])
                    rows[drafter] = torch.cat([
                        self._processed(drafter, row[None], self.seen[0, : first + position])
                        for position, row in enumerate(rows[drafter])
                    ])  # fmt: skip
        return target_logits, rows

    def learn(self, choice: Choice | None, weights: np.ndarray, emitted: int, scores) -> None:
        """Hands the learner what it asks for: every drafter's completed losses, or the chosen one's own round."""
        full = self.learner.feedback == "full"
        for feedback in self.queue.push(*scores) if scores is not None else ():
            self.stats.record_loss(feedback.losses, self.learner.weights())
            if full:
                self.learner.update(feedback.losses)
        if self.learner.feedback == "bandit" and choice is not None:
            losses = np.full(len(self.drafters), np.nan)
            losses[choice.drafter] = 1 - emitted / (self.config.draft_length + 1)
            self.learner.update(losses, chosen=choice.drafter, chosen_weight=float(weights[choice.drafter]))

    def close(self, seconds: float) -> None:
        """Completes the statistics and lets go of what only decoding needs."""
        self.stats.emitted_tokens = self.length - self.prompt_length
        self.stats.learner_state = self.learner.state_dict()
        self.stats.seconds = seconds
        self.sessions, self.given, self.features = {}, [], {}

    @contextmanager
    def _quarantine(self, drafter: int) -> Iterator[None]:
        """Takes a drafter whose code fails out of the request: whatever it does, the request goes on, its text the same."""
        try:
            yield
        except Exception as error:
            name = self.drafters[drafter].name
            cause = self.stats.failures[name] = f"{type(error).__name__}: {error}"
            if name not in self.warned:  # one row of a batch speaks for all
                self.warned.add(name)
                warnings.warn(f"drafter {name} is out of this request: {cause}", stacklevel=3)  # where it was asked


def width_of(drafter: Drafter) -> int:
    """Vd: how many logits the drafter gives."""
    return drafter.vocab_size if drafter.draft_to_target is None else len(drafter.draft_to_target)


def _lifted(logits: torch.Tensor, drafter: Drafter, vocabulary: int) -> torch.Tensor:
    """Draft logits [n, Vd] over the target's vocabulary, [n, V]: -inf for what the drafter cannot name."""
    if drafter.draft_to_target is None:
        return logits
    return logits.new_full((len(logits), vocabulary), -math.inf).index_copy_(1, drafter.draft_to_target, logits)
