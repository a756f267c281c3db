"""A causal language model that drafts for all requests of an engine, with one key-value cache for all of them."""

from __future__ import annotations

import copy
import inspect
import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from hedgespec.device import to_device
from hedgespec.drafters.causal_lm import usable_vocabulary
from hedgespec.integrations.vllm.token_drafter import NOTHING, KeyedDrafter
from hedgespec.ops.linear import few_row_view
from hedgespec.runtime.cache import RowCache
from hedgespec.runtime.compat import cache_argument
from hedgespec.runtime.target import check_target, context_of, device_of, row_masks, rows_may_differ

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHUNK = 512
"""Most tokens of one request in a forward."""
MOST = 2048
"""Most tokens in a forward over several requests."""
FEW = 16
"""Requests with at most this many new tokens share a forward even if the others have far fewer."""
STEP = 256
"""The rows of the cache grow by multiples of this number of slots."""


@dataclass(eq=False)
class _Text:
    """A request of `CausalLMs`: its tokens, and the place of their keys and values."""

    tokens: array = field(default_factory=lambda: array("i"))
    row: Any = None
    """Row of the cache; None while it has none."""
    length: int = 0
    """Number of tokens whose keys and values are in the row."""
    next_token: int = NOTHING
    """The model's token after the last one, once all are read."""
    extended: int = 0
    """Number of the `extend` call that last extended it."""
    over: bool = False
    """Whether it has exceeded the model's context or vocabulary; its tokens are then discarded."""

    @property
    def unread(self) -> int:
        return len(self.tokens) - self.length


class CausalLMs(KeyedDrafter[_Text]):
    """A causal language model of transformers with the target's tokenizer; one forward serves all requests of a step.

    The model abstains in a request that exceeds its context, or has a token without an embedding, until the request is dropped.

    Args:
        model: the model, in eval mode. On a CPU a float32 copy of a half-precision model is used.
        vocab_size: the target's.
        name: shown in statistics.
        tokenizer, target_tokenizer: the tokenizers of model and target. If given, every id is compared; otherwise only the
            sizes of the vocabularies, which may differ by padding (a tenth).
        max_cache_tokens: most slots of the cache, over all of its rows, each as long as the longest request needs. Beyond it,
            the requests that were extended least recently lose their rows and are read again when needed. A request that does
            not fit alone is treated as one beyond the context. None: no bound.

    Raises:
        ValueError: an encoder-decoder, a recurrent state, one tokenizer without the other, or max_cache_tokens < 2.
        VocabularyMismatchError: an id means different tokens; the message names the first one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        vocab_size: int,
        name: str = "causal_lm",
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        target_tokenizer: PreTrainedTokenizerBase | None = None,
        max_cache_tokens: int | None = None,
    ) -> None:
        super().__init__(name)
        check_target(model, f"drafter {name}")
        if max_cache_tokens is not None and max_cache_tokens < 2:
            raise ValueError(f"max_cache_tokens: expected at least 2, got {max_cache_tokens}")
        self.vocab_size = usable_vocabulary(
            model, vocab_size, name, tokenizer=tokenizer, target_tokenizer=target_tokenizer
        )  # fmt: skip
        self.device = device_of(model)
        if self.device.type == "cpu" and model.dtype in (torch.bfloat16, torch.float16):
            model = copy.deepcopy(model).float()
        self.model = cast(Any, few_row_view(model))
        self.together = rows_may_differ(model)
        self.cache = RowCache()
        self._with_cache: dict[Any, Any] = {cache_argument(self.model.forward): self.cache, "use_cache": True}
        self.max_cache_tokens = sys.maxsize if max_cache_tokens is None else max_cache_tokens
        context = context_of(model)
        self.context = min(self.max_cache_tokens - 1, sys.maxsize - 1 if context is None else context)
        """Most tokens of a request. One more slot takes the padding of shorter rows."""
        self._known = model.config.get_text_config(decoder=True).vocab_size
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self._rows: dict[int, _Text] = {}
        self._calls = 0
        self._picked: tuple[torch.Tensor, torch.Tensor] | None = None
        # The output matrix is the largest one: it is applied to the requested positions only.
        head: Any = self.model.get_output_embeddings()
        if head is None:
            raise ValueError(f"drafter {name}: expected a model with an output matrix, got {type(model).__name__} without one")
        head.register_forward_pre_hook(self._pick)

    def drop(self, keys: Iterable[int]) -> None:
        for key in keys:
            if (request := self._requests.pop(key, None)) is not None:
                self._evict(request)
        longest = max((request.length for request in self._rows.values()), default=0)
        capacity = self._capacity(longest) if self._rows else 0
        rows = self._rounded_rows(len(self._rows), capacity)
        if 4 * rows * capacity <= self.cache.rows * self.cache.capacity:
            self._rebuild(rows, capacity)

    def _begin(self) -> _Text:
        return _Text()

    @torch.no_grad()
    def _extend(self, requests: list[_Text], tokens: list[np.ndarray], keep: list[int]) -> list[np.ndarray]:
        self._calls += 1
        answers = [np.full(count, NOTHING, np.int64) for count in keep]
        going = {}
        for request, new, count, answer in zip(requests, tokens, keep, answers):
            request.extended, request.next_token = self._calls, NOTHING
            known = new.min() >= 0 and new.max() < self._known
            if request.over or not known or len(request.tokens) + len(new) > self.context:
                self._evict(request)
                request.tokens, request.over = array("i"), True
                continue
            request.tokens.frombytes(new.astype(np.int32).tobytes())
            going[request] = (len(request.tokens) - count, answer)
        for group in self._groups({request: len(request.tokens) for request in going}):
            self._reserve(group, max(len(request.tokens) for request in group))
            self._read(group, going)
        return answers

    @torch.no_grad()
    def _draft(self, requests: list[_Text], lengths: Sequence[int]) -> list[list[int]]:
        drafts = [
            [request.next_token][:length] if request.next_token != NOTHING else [] for request, length in zip(requests, lengths)
        ]
        going = {}
        for request, draft, length in zip(requests, drafts, lengths):
            length = min(length, self.context - len(request.tokens) + 1)
            if draft and length > 1:
                going[request] = (draft, length)
        for group in self._groups({request: len(request.tokens) + length - 1 for request, (_, length) in going.items()}):
            self._reserve(group, max(len(request.tokens) + going[request][1] - 1 for request in group))
            self._read([request for request in group if request.unread], {})
            for step in range(max(going[request][1] for request in group) - 1):
                some = sorted((request for request in group if going[request][1] > step + 1), key=lambda request: request.row)
                best = self._forward(
                    [request.row for request in some], [request.length + step for request in some],
                    [going[request][0][-1:] for request in some], [(place, 0) for place in range(len(some))],
                )  # fmt: skip
                for request, token in zip(some, best):
                    going[request][0].append(token)
        return drafts

    def _groups(self, ends: dict[_Text, int]) -> list[list[_Text]]:
        """Groups the requests such that each group fits into the cache; `ends` is the number of slots that each needs."""
        groups: list[list[_Text]] = []
        for request in sorted(ends, key=lambda request: ends[request]):
            room = self.together and groups and (len(groups[-1]) + 1) * self._capacity(ends[request]) <= self.max_cache_tokens
            if room:
                groups[-1].append(request)
            else:
                groups.append([request])
        return groups

    def _read(self, requests: list[_Text], wanted: dict[_Text, tuple[int, np.ndarray]]) -> None:
        """Reads the unread tokens of requests that have rows.

        Prompts are read in chunks. Requests with similar numbers of tokens share a forward.

        Args:
            requests: the requests.
            wanted: request -> (t, array): the array is filled with the model's tokens after the first t tokens, t + 1, ...
        """
        for request in requests:
            while request.unread > CHUNK:
                self._advance([request], wanted)
        batch: list[_Text] = []
        for request in sorted(requests, key=lambda request: -request.unread):
            most = batch[0].unread if batch else 0
            alike = self.together and (most <= FEW or request.unread >= most / 2)
            if batch and not (alike and (len(batch) + 1) * most <= MOST):
                self._advance(batch, wanted)
                batch = []
            batch.append(request)
        if batch:
            self._advance(batch, wanted)

    def _advance(self, batch: list[_Text], wanted: dict[_Text, tuple[int, np.ndarray]]) -> None:
        """Reads up to a chunk of each request in one forward."""
        batch = sorted(batch, key=lambda request: request.row)
        chunks = [request.tokens[request.length : request.length + CHUNK] for request in batch]
        picked, answers = [], []
        for place, (request, chunk) in enumerate(zip(batch, chunks)):
            last = request.length + len(chunk) - 1
            first, answer = wanted.get(request, (len(request.tokens), None))
            for position in range(max(first, request.length), last + 1):
                picked.append((place, position - request.length))
                answers.append((answer, position - first))
            if first == len(request.tokens) == last + 1:
                picked.append((place, len(chunk) - 1))
                answers.append((None, 0))
        best = self._forward([request.row for request in batch], [request.length for request in batch], chunks, picked)
        for request, chunk in zip(batch, chunks):
            request.length += len(chunk)
        for (place, _), (answer, index), token in zip(picked, answers, best):
            if not batch[place].unread:  # the last picked one of a request remains
                batch[place].next_token = token
            if answer is not None:
                answer[index] = token

    def _forward(
        self, rows: list[int], lengths: list[int], tokens: Sequence[Sequence[int]], picked: list[tuple[int, int]]
    ) -> list[int]:
        """Runs the model over tokens that follow those in each row.

        Args:
            rows: rows of the cache, ascending.
            lengths: number of tokens in each row.
            tokens: the new tokens of each row.
            picked: (index into `rows`, index into its tokens) of the positions whose next token is returned.
        Returns: the argmax token after each picked one.
        """
        counts = [len(one) for one in tokens]
        starts = np.array(lengths)[:, None]
        end = max(length + count for length, count in zip(lengths, counts))
        places = starts + np.arange(max(counts))
        given = np.zeros((3, *places.shape), np.int64)
        for row, one in enumerate(tokens):
            given[0, row, : len(one)] = one
        given[1] = np.minimum(places, end)  # padding goes behind all tokens
        given[2] = np.minimum(places, end - 1)  # and has a position within the model's table
        ids, slots, positions = to_device(given, self.device)
        places_picked, tokens_picked = to_device(np.array(picked or [(0, 0)]).T, self.device).unbind()
        self._picked = places_picked, tokens_picked
        arguments = {}
        if self._takes_positions:
            arguments["position_ids"] = positions
        if min(lengths) != max(lengths):
            arguments["attention_mask"] = row_masks(self.model, positions, end)
        self.cache.take(rows, lengths, slots, end)
        logits = self.model(ids, **self._with_cache, **arguments).logits
        return logits[: len(picked), 0, : self.vocab_size].argmax(-1).tolist()

    def _pick(self, module: torch.nn.Module, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        """Selects the picked positions [n, 1, H] of the hidden states [B, T, H] before the output matrix."""
        assert self._picked is not None  # `_forward` sets it
        rows, places = (one.to(arguments[0].device) for one in self._picked)
        return (arguments[0][rows, places][:, None],)

    def _capacity(self, end: int) -> int:
        """Returns the number of slots of rows for `end` tokens and one slot of padding."""
        return min(-(-(end + 1) // STEP) * STEP, self.context + 1)

    def _rounded_rows(self, rows: int, capacity: int) -> int:
        """Returns the number of rows to allocate if `rows` are needed: the next power of two, if there is room."""
        return min(1 << (rows - 1).bit_length(), max(rows, self.max_cache_tokens // capacity)) if rows else 0

    def _reserve(self, group: list[_Text], end: int) -> None:
        """Gives every request of the group a row of at least `end` tokens; evicts the requests extended least recently."""
        homeless = [request for request in group if request.row is None]
        if not homeless and end < self.cache.capacity:
            return
        others = sorted(set(self._rows.values()) - set(group), key=lambda request: (-request.extended, request.row))
        while True:
            rows = len(group) + len(others)
            capacity = self._capacity(max([end, *(request.length for request in others)]))
            if not others or rows * capacity <= self.max_cache_tokens:
                break
            self._evict(others.pop())
        if rows > self.cache.rows or capacity > self.cache.capacity:
            self._rebuild(self._rounded_rows(rows, capacity), capacity)
        free = (row for row in range(self.cache.rows) if row not in self._rows)
        for request, row in zip(homeless, list(free)):
            request.row, self._rows[row] = row, request

    def _rebuild(self, rows: int, capacity: int) -> None:
        kept = sorted(self._rows)
        self.cache.rebuild(kept, rows, capacity)
        self._rows = {place: self._rows[row] for place, row in enumerate(kept)}
        for row, request in self._rows.items():
            request.row = row

    def _evict(self, request: _Text) -> None:
        """Frees the row of a request, which keeps its tokens."""
        if request.row is not None:
            del self._rows[request.row]
        request.row, request.length = None, 0
