"""One request while it is decoded: its tokens, its learner, and what it decides in a round."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from hedgespec.cache import RowBuffer
from hedgespec.config import DecodeConfig
from hedgespec.decoder.request import Request
from hedgespec.delay import DelayQueue
from hedgespec.drafters import Drafter
from hedgespec.learners import Learner
from hedgespec.metrics import DecodeStats
from hedgespec.records import Choice
from hedgespec.selection import select
from hedgespec.transfer import to_device

RAREST = 8
"""Most rounds from one evaluation to the next where they adapt; a power of two, so that the rows of a batch meet."""
NOBODY = Choice(drafter=-1, draft_length=0)


class Row:
    """One request of a batch.

    Args:
        index: its place among all that came in; `place` is the one it has in the batch now.
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
        self.place = 0
        self.cached = 0
        """Tokens that came in a cache: no features are known for them."""
        self.cache: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Once it is finished and the request asks for it: the target's keys and values by layer, [heads, length, head_dim]."""
        self.finished = False
        self.scores_all = self.learner.feedback == "full" or self.config.track_regret
        self.alive = np.ones(len(drafters), dtype=bool)
        """Which drafters have not failed, [N]."""
        self.every = config.evaluate_every if config.evaluate_every != "adaptive" else 1
        """Rounds from one evaluation to the next."""
        self.chosen = -1
        """Drafter of the last round."""
        self.may_switch = True
        """Whether every drafter may be chosen, or only the same again."""
        self.trees, self.widths = 0, np.zeros(config.draft_length)
        """Dynamic trees drafted, and their children of the likeliest node at each depth, summed, [K]."""
        self.unscored: list[torch.Tensor] = []
        """The target's logits, chunks [T, V], of the verified tokens on which the drafters are not scored yet."""
        self.unscored_noise: list[torch.Tensor] = []
        """In mode "coupled": their noise, likewise."""
        self.noise_key = 0
        """In mode "coupled": what the row's noise depends on beside position and token."""
        self.noise = self.padded.new_empty(0, vocabulary, dtype=torch.float32)
        """What is known of the noise for the tokens that come next, [k, V]."""

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
        """The drafter of the next round. With a learner that hears of all drafters it changes only after an evaluation, when
        all of them are up to date; while one stays, evaluations grow rarer if the configuration lets them."""
        room = self.room - 1  # the recovered or bonus token comes on top of the draft
        if room == 0 or not weights.any():
            return NOBODY
        if self.may_switch or not self.alive[self.chosen]:
            chosen = select(weights, uniform, draft_length=self.config.draft_length, rule=self.config.selection).drafter
            if self.config.evaluate_every == "adaptive":
                self.every = min(2 * self.every, RAREST) if chosen == self.chosen else 1
            self.chosen, self.may_switch = chosen, self.learner.feedback != "full"
        return Choice(self.chosen, min(self.config.draft_length, room))

    def since(self, taken: int, layers: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Verified tokens [T] after the first `taken`, and the target's hidden states [T, W] before each at these layers.

        A head's count of tokens begins where features do.
        """
        if not layers:
            return self.tokens[taken : self.length], None
        return self.tokens[self.cached + taken : self.length], self.features[layers][taken : self.length - self.cached]

    def processed(self, drafter: int, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """A drafter's logits [1, Vd] for the token after `tokens` [L] as the target's processors leave them, [1, V]."""
        return self.request.process_drafts(tokens[None], _lifted(logits, self.drafters[drafter], self.vocabulary))

    def emit(self, tokens: list[int]) -> list[int]:
        """Appends verified tokens up to the first that ends the text."""
        self.tokens[self.length : self.length + len(tokens)] = to_device(tokens, self.tokens.device)
        for count, token in enumerate(tokens, start=1):
            self.length += 1
            self.finished = token in self.request.eos or self.room == 0
            if self.request.stop is not None:  # asked about every token, as after each step of plain decoding
                self.finished |= self.request.stop(self.seen)
            if self.finished:
                return tokens[:count]
        return tokens

    @property
    def unscored_tokens(self) -> int:
        """Verified tokens on which the drafters are not scored yet."""
        return sum(map(len, self.unscored))

    def evaluation_is_due(self) -> bool:
        """At the end, too: what is known by then is learned, for a next request to go on from."""
        return self.scores_all and (self.finished or (self.stats.rounds + 1) % self.every == 0)

    @property
    def warm_positions(self) -> int:
        """Of the warm start, those before the first emitted token and the prompt's last ones. A head says nothing of its first
        two tokens, nor of what lies behind its window."""
        fresh = self.request.learner_state is None and self.request.process is None
        if not fresh or self.learner.feedback != "full":
            return 0
        window = self.config.drafter_window
        most = self.config.warm_start if window is None else min(self.config.warm_start, window - 1)
        return min(most, self.prompt_length - self.cached - 1)

    def warm_up(self, acceptance_prob: np.ndarray) -> None:
        """Lets the learner hear how every drafter fared at the warm start's positions, float64 [N, T]."""
        for losses in 1.0 - acceptance_prob.clip(max=1.0).T:
            self.stats.prompt_losses.append(losses)
            self.learner.update(losses)

    def observe(self, acceptance_prob: np.ndarray, acceptance_ratio: np.ndarray) -> None:
        """Hands the learner every drafter's completed losses. Both: float64 [N, T] of the tokens that come next; of draft trees
        [K, N, T], by depth."""
        for feedback in self.queue.push(acceptance_prob, acceptance_ratio):
            self.stats.record_loss(feedback.losses, self.learner.weights())
            if self.learner.feedback == "full":
                self.learner.update(feedback.losses)

    def saw_tree(self, widths: Sequence[int]) -> None:
        """Takes note of a dynamic tree's `Draft.widths`."""
        self.trees += 1
        self.widths += widths

    def children(self) -> list[int]:
        """How many children a node at each depth of a draft tree is taken to have where the drafters are judged, [K]: of a
        dynamic tree, whose nodes depend on what else is in it, as many as the likeliest had in this text's trees so far."""
        tree = self.config.tree
        if tree.size is not None and self.trees:
            return np.rint(self.widths / self.trees).astype(int).tolist()
        return [tree.children(depth) for depth in range(self.config.draft_length)]

    def reward(self, drafter: int, weights: np.ndarray, emitted: int) -> None:
        """Tells a learner that asks for no more how the drafter of a round fared."""
        if self.learner.feedback == "bandit":
            losses = np.full(len(self.drafters), np.nan)
            losses[drafter] = 1 - emitted / (self.config.draft_length + 1)
            self.learner.update(losses, chosen=drafter, chosen_weight=float(weights[drafter]))

    def close(self, seconds: float, drafter_cache_bytes: int) -> None:
        """Completes the statistics and lets go of what only decoding needs."""
        self.stats.emitted_tokens = self.length - self.prompt_length
        self.stats.learner_state = self.learner.state_dict()
        self.stats.seconds, self.stats.drafter_cache_bytes = seconds, drafter_cache_bytes
        self.features, self.unscored, self.unscored_noise, self.noise = {}, [], [], self.noise[:0].clone()

    @contextmanager
    def quarantine(self, drafter: int) -> Iterator[None]:
        """Takes a drafter whose code fails out of the request: whatever it does, the request goes on, its text the same."""
        try:
            yield
        except Exception as error:
            self.lose(drafter, error)

    def lose(self, drafter: int, error: Exception) -> None:
        """Goes on without a drafter."""
        name = self.drafters[drafter].name
        if name in self.stats.failures:
            return
        cause = self.stats.failures[name] = f"{type(error).__name__}: {error}"
        self.alive[drafter] = False
        if name not in self.warned:  # one row of a batch speaks for all
            self.warned.add(name)
            warnings.warn(f"drafter {name} is out of this request: {cause}", stacklevel=1)


def draft_width(drafter: Drafter) -> int:
    """Vd: how many logits the drafter gives."""
    return drafter.vocab_size if drafter.draft_to_target is None else len(drafter.draft_to_target)


def _lifted(logits: torch.Tensor, drafter: Drafter, vocabulary: int) -> torch.Tensor:
    """Draft logits [n, Vd] over the target's vocabulary, [n, V]: -inf for what the drafter cannot name."""
    if drafter.draft_to_target is None:
        return logits
    return logits.new_full((len(logits), vocabulary), -math.inf).index_copy_(1, drafter.draft_to_target, logits)
