"""The state of one request of a batch: its tokens, its learner, and the tokens that its drafters are not scored on yet."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from hedgespec.config import DecodeConfig
from hedgespec.decoder.request import Request
from hedgespec.device import to_device
from hedgespec.drafters import Drafter
from hedgespec.learners import Learner
from hedgespec.records import Draft
from hedgespec.runtime.cache import RowBuffer
from hedgespec.selection.selector import Selector


class ScoringBacklog:
    """The last verified tokens of a row, on which its drafters have not been scored yet.

    All drafters of a row are scored on the same tokens, so one count says how far that is.
    """

    def __init__(self) -> None:
        self.count = 0
        """Number of these tokens."""
        self._logits: list[torch.Tensor] = []
        self._noise: list[torch.Tensor] = []

    def add(self, logits: torch.Tensor, noise: torch.Tensor | None = None) -> None:
        """Appends verified tokens.

        Args:
            logits: [T, V], the target's processed logits at the positions of these tokens.
            noise: float32 [T, V], the noise of these tokens with proposal "coupled".
        """
        self._logits.append(logits)
        if noise is not None:
            self._noise.append(noise)
        self.count += len(logits)

    def take(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Empties the backlog. Returns the target's logits [count, V] and, if there is any, their noise [count, V]."""
        logits = _cat(self._logits)
        noise = _cat(self._noise) if self._noise else None
        self.count, self._logits, self._noise = 0, [], []
        return logits, noise


class Row:
    """One request of a batch.

    Args:
        index: its index among all requests of the call; `place` is its index in the batch now.
        request: the request.
        drafters: the N drafters.
        config: the decoder's configuration.
        learner: a fresh learner.
        vocabulary: V, size of the target's vocabulary.
        features: the target's hidden states at the positions before the row's tokens, by `Drafter.aux_layers`.
        warned: names of the drafters whose failure the caller was already warned of, shared by all rows.
    """

    def __init__(self, index: int, request: Request, drafters: tuple[Drafter, ...], config: DecodeConfig, learner: Learner,
                 vocabulary: int, features: dict[tuple[int, ...], RowBuffer], warned: set[str]):  # fmt: skip
        self.index, self.request, self.drafters, self.config = index, request, drafters, config
        self.vocabulary, self.features, self.warned = vocabulary, features, warned
        self.selector = Selector([drafter.name for drafter in drafters], config, learner, request.learner_state)
        self.stats, self.alive = self.selector.stats, self.selector.alive
        self.padded = torch.cat([request.prompt, request.prompt.new_zeros(request.max_new_tokens)])
        self.tokens = self.padded[request.padding :]
        """The row's own tokens; the first `length` of them are known."""
        self.length = self.prompt_length = len(self.tokens) - request.max_new_tokens
        self.place = 0
        self.cached = 0
        """Number of leading tokens that came in the caller's cache; they have no features."""
        self.cache: list[tuple[torch.Tensor, torch.Tensor]] = []
        """The target's keys and values by layer, [heads, length, head_dim], once finished and if the request asks for them."""
        self.finished = False
        self.held_back = False
        """Whether the last round ended within the row's draft because another row's draft had ended, see `Together`."""
        self.backlog = ScoringBacklog()
        self.num_trees, self.tree_widths = 0, np.zeros(config.draft_length)
        """Number of dynamic trees drafted, and the sum of their `Draft.widths`, [K]."""
        self.noise_key = 0
        """Key of the row's noise with proposal "coupled"."""
        self.noise = self.padded.new_empty(0, vocabulary, dtype=torch.float32)
        """[k, V], the noise of the next k tokens as far as it is computed."""

    @property
    def sequence(self) -> torch.Tensor:
        """Prompt with its padding, and continuation, int64 [L]."""
        return self.padded[: self.request.padding + self.length].clone()

    @property
    def seen(self) -> torch.Tensor:
        """`sequence` as a batch of one, without a copy: the input of logits processors and stopping criteria."""
        return self.padded[None, : self.request.padding + self.length]

    @property
    def emitted(self) -> int:
        """Tokens emitted so far."""
        return self.length - self.prompt_length

    @property
    def room(self) -> int:
        """Tokens that may still be emitted."""
        return len(self.tokens) - self.length

    def uniforms(self, count: int) -> np.ndarray:
        """Draws uniform random numbers, float64 [count]."""
        return self.request.random.random(count)

    def unread(self, consumed: int, layers: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the verified tokens [T] after the first `consumed`, and the target's hidden states [T, W] before each.

        For drafters with `aux_layers`, `consumed` counts from the first token that has features.
        """
        if not layers:
            return self.tokens[consumed : self.length], None
        return self.tokens[self.cached + consumed : self.length], self.features[layers][consumed : self.length - self.cached]

    def processed(self, drafter: int, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Applies the target's processors to a drafter's logits [1, Vd] for the token after `tokens` [L]. Returns [1, V]."""
        return self.request.process_drafts(tokens[None], _to_target_vocabulary(logits, self.drafters[drafter], self.vocabulary))

    def emit(self, tokens: list[int]) -> list[int]:
        """Appends verified tokens up to the first that ends the text. Returns the tokens appended."""
        self.tokens[self.length : self.length + len(tokens)] = to_device(tokens, self.tokens.device)
        for count, token in enumerate(tokens, start=1):
            self.length += 1
            self.finished = token in self.request.eos or self.room == 0
            if self.request.stop is not None:  # called after every token, as after each step of plain decoding
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

    @property
    def warm_positions(self) -> int:
        """Number of prompt positions in the warm start. The last prompt token is excluded, and so are the positions for which
        a head has no prediction: the first two tokens and what its window forgets."""
        fresh = self.request.learner_state is None and not self.request.is_processed
        if not fresh or not self.selector.full_feedback:
            return 0
        window = self.config.drafter_window
        most = self.config.warm_start if window is None else min(self.config.warm_start, window - 1)
        return min(most, self.prompt_length - self.cached - 1)

    def record_tree(self, widths: Sequence[int]) -> None:
        """Records the `Draft.widths` of a dynamic tree."""
        self.num_trees += 1
        self.tree_widths += widths

    def children(self) -> list[int]:
        """Returns the number of children at each depth with which drafters are scored, [K]. In a dynamic tree it depends on the
        other nodes, so it is the mean of this row's trees so far."""
        tree = self.config.tree
        if tree.size is not None and self.num_trees:
            return np.rint(self.tree_widths / self.num_trees).astype(int).tolist()
        return [tree.children(depth) for depth in range(self.config.draft_length)]

    def close(self, seconds: float, drafter_cache_bytes: int) -> None:
        """Completes the statistics and frees what only decoding needs."""
        self.stats.emitted_tokens = self.emitted
        self.stats.learner_state = self.selector.learner.state_dict()
        self.stats.seconds, self.stats.drafter_cache_bytes = seconds, drafter_cache_bytes
        self.features, self.backlog, self.noise = {}, ScoringBacklog(), self.noise[:0].clone()

    @contextmanager
    def isolate_failures(self, drafter: int) -> Iterator[None]:
        """Drops a drafter whose code raises within the block; the request continues, and its text does not change."""
        try:
            yield
        except Exception as error:
            self.drop(drafter, error)

    def drop(self, drafter: int, error: Exception) -> None:
        """Takes a drafter out of the request, with a warning the first time."""
        name, cause = self.drafters[drafter].name, f"{type(error).__name__}: {error}"
        if self.selector.drop(drafter, cause) and name not in self.warned:  # one warning for all rows
            self.warned.add(name)
            warnings.warn(f"drafter {name} is out of this request: {cause}", stacklevel=1)


def no_draft(row: Row) -> Draft:
    """Returns an empty draft on the row's device."""
    return Draft(row.tokens.new_empty(0), None)


def draft_width(drafter: Drafter) -> int:
    """Returns Vd, the number of logits of a drafter."""
    return drafter.vocab_size if drafter.draft_to_target is None else len(drafter.draft_to_target)


def _cat(chunks: list[torch.Tensor]) -> torch.Tensor:
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks)


def _to_target_vocabulary(logits: torch.Tensor, drafter: Drafter, vocabulary: int) -> torch.Tensor:
    """Maps draft logits [n, Vd] to the target's vocabulary, [n, V]: -inf for tokens that the drafter does not have."""
    if drafter.draft_to_target is None:
        return logits
    return logits.new_full((len(logits), vocabulary), -math.inf).index_copy_(1, drafter.draft_to_target, logits)
