"""One request while it is decoded: its tokens, and what decides who drafts the next ones."""

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
from hedgespec.decoder.selector import Selector
from hedgespec.drafters import Drafter
from hedgespec.learners import Learner
from hedgespec.transfer import to_device


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
        self.index, self.request, self.drafters, self.config = index, request, drafters, config
        self.vocabulary, self.features, self.warned = vocabulary, features, warned
        names, own_features = zip(*((drafter.name, bool(drafter.aux_layers)) for drafter in drafters))
        self.selector = Selector(names, config, learner, request.learner_state, own_features)
        self.stats, self.alive = self.selector.stats, self.selector.alive
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
        self.held_back = False
        """Whether the last round ended within the row's draft because another row's draft had ended, see `Together`."""
        self.trees, self.widths = 0, np.zeros(config.draft_length)
        """Dynamic trees drafted, and their children of the likeliest node at each depth, summed, [K]."""
        self.unscored: list[torch.Tensor] = []
        """The target's logits, chunks [T, V], of the verified tokens on which some drafter is not scored yet."""
        self.unscored_noise: list[torch.Tensor] = []
        """In mode "coupled": their noise, likewise."""
        self.missed = np.zeros(len(drafters), dtype=np.int64)
        """Verified tokens on which each drafter is not scored yet, [N]; all chunks hold the most of them."""
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
    def emitted(self) -> int:
        """Tokens emitted so far."""
        return self.length - self.prompt_length

    @property
    def room(self) -> int:
        return len(self.tokens) - self.length

    def uniforms(self, count: int) -> np.ndarray:
        return self.request.random.random(count)

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

    def cut(self, emitted: int) -> None:
        """Ends the text after this many emitted tokens; tokens that were emitted beyond them are dropped."""
        excess = self.emitted - emitted
        assert excess >= 0, (self.emitted, emitted)
        self.length -= excess
        self.finished, self.stats.emitted_tokens = True, emitted
        counts = self.stats.emitted_by_round
        for number in reversed(range(len(counts))):
            dropped = min(excess, counts[number])
            counts[number] -= dropped
            excess -= dropped

    def to_be_scored(self, logits: torch.Tensor, noise: torch.Tensor | None = None) -> None:
        """Takes note of the target's logits [T, V] for tokens that follow."""
        if self.config.back_off is not None:  # they may be kept for long: alone, without what else was computed with them
            logits, noise = logits.clone(), None if noise is None else noise.clone()
        self.unscored.append(logits)
        if noise is not None:
            self.unscored_noise.append(noise)
        self.missed += len(logits)

    def were_scored(self, drafters: np.ndarray) -> None:
        """Forgets what is kept for drafters, bool [N], and for nobody else."""
        self.missed[drafters] = 0
        kept, most = sum(map(len, self.unscored)), int(self.missed.max())
        while self.unscored and kept - len(self.unscored[0]) >= most:
            kept -= len(self.unscored.pop(0))
        del self.unscored_noise[: max(len(self.unscored_noise) - len(self.unscored), 0)]  # a prompt's has none

    @property
    def warm_positions(self) -> int:
        """Of the warm start, those before the first emitted token and the prompt's last ones. A head says nothing of its first
        two tokens, nor of what lies behind its window."""
        fresh = self.request.learner_state is None and not self.request.is_processed
        if not fresh or not self.selector.hears_all:
            return 0
        window = self.config.drafter_window
        most = self.config.warm_start if window is None else min(self.config.warm_start, window - 1)
        return min(most, self.prompt_length - self.cached - 1)

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

    def close(self, seconds: float, drafter_cache_bytes: int) -> None:
        """Completes the statistics and lets go of what only decoding needs."""
        self.selector.close()
        self.stats.emitted_tokens = self.length - self.prompt_length
        self.stats.learner_state = self.selector.learner.state_dict()
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
        name, cause = self.drafters[drafter].name, f"{type(error).__name__}: {error}"
        if self.selector.lose(drafter, cause) and name not in self.warned:  # one row of a batch speaks for all
            self.warned.add(name)
            warnings.warn(f"drafter {name} is out of this request: {cause}", stacklevel=1)


def last(chunks: Sequence[torch.Tensor], count: int) -> torch.Tensor:
    """The last positions of chunks [T, V], of which there are as many, [count, V]."""
    first, held = len(chunks), 0
    while held < count:
        first -= 1
        held += len(chunks[first])
    return torch.cat([chunks[0][:0], *chunks[first:]])[held - count :]


def draft_width(drafter: Drafter) -> int:
    """Vd: how many logits the drafter gives."""
    return drafter.vocab_size if drafter.draft_to_target is None else len(drafter.draft_to_target)


def _lifted(logits: torch.Tensor, drafter: Drafter, vocabulary: int) -> torch.Tensor:
    """Draft logits [n, Vd] over the target's vocabulary, [n, V]: -inf for what the drafter cannot name."""
    if drafter.draft_to_target is None:
        return logits
    return logits.new_full((len(logits), vocabulary), -math.inf).index_copy_(1, drafter.draft_to_target, logits)
