"""Drafters for an engine that runs requests in batches of its own and shows nothing of its target but token ids.

Requests come and go at every step. After a step the engine has new verified tokens of some requests: `extend` takes them in and
says at each position what the drafter would have drafted there, which is all that a learner needs of a drafter that it did not
choose; `draft` is for those that it chose.
"""

from __future__ import annotations

import copy
import inspect
import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, cast

import numpy as np
import torch

from hedgespec.device import to_device
from hedgespec.drafters import Drafter, DrafterSession, open_session
from hedgespec.drafters.causal_lm import usable_vocabulary
from hedgespec.drafters.datastore import Datastore, check_vocabulary
from hedgespec.drafters.ngram import NGramDrafter, NGramIndex
from hedgespec.ops.linear import few_row_view
from hedgespec.runtime.cache import RowCache
from hedgespec.runtime.compat import cache_argument
from hedgespec.runtime.target import check_target, context_of, device_of, row_masks, rows_may_differ

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NOTHING = -1
"""Stands where a drafter has no token to say."""
CHUNK = 512
"""Tokens of one request that a forward reads at most."""
MOST = 2048
"""Tokens of all its requests that a forward reads at most, once there are several."""
FEW = 16
"""New tokens up to which requests share a forward, however many the others have."""
STEP = 256
"""Slots by which the rows of a cache grow."""


class TokenDrafter(Protocol):
    """A drafter that runs from tokens alone, with its state of every request of an engine; requests are named by integer keys.

    In all methods: ValueError for arguments of different lengths, a key twice, no tokens, a negative number, or a draft of a
    request that is not known. Nothing has changed then.
    """

    name: str
    """Shown in statistics; distinct within a pool."""

    def extend(self, keys: Sequence[int], tokens: Sequence[np.ndarray], keep: Sequence[int]) -> list[np.ndarray]:
        """Takes in verified tokens that follow what each request has; a key not known yet begins a request. Forgets what was
        drafted.

        Args:
            keys: B of them, distinct.
            tokens: of each request, int32 or int64 [T_b], T_b >= 1.
            keep: of each request, after how many of these tokens, the last ones, to say the next.

        Returns: of each request the drafter's (argmax) token after each of its last min(keep_b, T_b) tokens, int64
            [min(keep_b, T_b)]; -1 where it has nothing to say.
        """

    def draft(self, keys: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
        """Up to so many tokens each behind the request's verified ones, greedily, fewer where it has nothing to say. Nothing
        drafted is kept: a later `extend` or `draft` begins from the verified tokens again."""

    def drop(self, keys: Iterable[int]) -> None:
        """Forgets these requests; unknown keys are fine."""

    @property
    def requests(self) -> int:
        """How many requests it holds state of."""


_Request = TypeVar("_Request")


class _ByKey(Generic[_Request]):
    """What the drafters share: requests by their keys, and arguments that have been checked."""

    def __init__(self, name: str):
        self.name = name
        self._requests: dict[int, _Request] = {}

    def extend(self, keys: Sequence[int], tokens: Sequence[np.ndarray], keep: Sequence[int]) -> list[np.ndarray]:
        _check(keys, "tokens", tokens)
        _check(keys, "keep", keep)
        tokens = [np.asarray(one) for one in tokens]
        for one in tokens:
            if one.ndim != 1 or one.size == 0 or one.dtype.kind not in "iu":
                raise ValueError(f"tokens: expected at least one integer id of each request, [T], got {one.dtype} {one.shape}")
        _check_counts("keep", keep)
        for key in keys:
            if key not in self._requests:
                self._requests[key] = self._begin()
        found = [self._requests[key] for key in keys]
        return self._extend(found, tokens, [min(count, len(one)) for count, one in zip(keep, tokens)])

    def draft(self, keys: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
        _check(keys, "lengths", lengths)
        _check_counts("lengths", lengths)
        if unknown := [key for key in keys if key not in self._requests]:
            raise ValueError(f"keys: expected requests that were extended, got {unknown[0]}")
        return self._draft([self._requests[key] for key in keys], lengths)

    def drop(self, keys: Iterable[int]) -> None:
        for key in keys:
            self._requests.pop(key, None)

    @property
    def requests(self) -> int:
        return len(self._requests)

    def _begin(self) -> _Request:
        """A fresh request."""
        raise NotImplementedError

    def _extend(self, requests: list[_Request], tokens: list[np.ndarray], keep: list[int]) -> list[np.ndarray]:
        """`extend`, with keep_b <= T_b."""
        raise NotImplementedError

    def _draft(self, requests: list[_Request], lengths: Sequence[int]) -> list[list[int]]:
        raise NotImplementedError


class NGrams(_ByKey[NGramIndex]):
    """Prompt lookup: what followed the latest occurrence of the longest matching n-gram of the request's own text.

    Args:
        max_ngram: longest match tried, >= 1.
        name: shown in statistics.

    Raises: ValueError for max_ngram < 1.

    Source: Saxena, "Prompt Lookup Decoding", 2023.
    """

    def __init__(self, max_ngram: int = 3, name: str = "ngram"):
        super().__init__(name)
        self.max_ngram = NGramDrafter(1, max_ngram).max_ngram

    def _begin(self) -> NGramIndex:
        return NGramIndex(self.max_ngram)

    def _extend(self, requests: list[NGramIndex], tokens: list[np.ndarray], keep: list[int]) -> list[np.ndarray]:
        said = []
        for index, new, count in zip(requests, tokens, keep):
            first = len(new) - count
            proposals = []
            for place, token in enumerate(new.tolist()):
                index.append(token)
                if place >= first:
                    proposals.append(_or_nothing(index.propose()))
            said.append(np.array(proposals, np.int64))
        return said

    def _draft(self, requests: list[NGramIndex], lengths: Sequence[int]) -> list[list[int]]:
        drafts = []
        for index, length in zip(requests, lengths):
            drafted: list[int] = []
            while len(drafted) < length and (token := index.propose(drafted)) is not None:
                drafted.append(token)
            drafts.append(drafted)
        return drafts


@dataclass(eq=False)
class _Text:
    """A request of `CausalLMs`: its tokens, and where their keys and values are."""

    tokens: array = field(default_factory=lambda: array("i"))
    row: Any = None
    """Of the cache; None while it has none."""
    length: int = 0
    """Tokens whose keys and values lie in the row."""
    said: int = NOTHING
    """The token after the last, once all are read."""
    extended: int = 0
    """When it was last, by the drafter's count of calls."""
    over: bool = False
    """It has left the model's context or vocabulary: nothing of it is held any more."""

    @property
    def unread(self) -> int:
        return len(self.tokens) - self.length


class CausalLMs(_ByKey[_Text]):
    """A transformers causal language model that shares the target's tokenizer, one forward for all the requests at hand.

    Of a request that grows beyond the model's context, or has a token that the model has no embedding of, nothing is said any
    more and nothing held but its key, until it is dropped.

    Args:
        model: in eval mode. Half precision is computed in float32 on a CPU, from a copy.
        vocab_size: the target's.
        name: shown in statistics.
        tokenizer, target_tokenizer: transformers tokenizers of both. With both every id is compared, without them only the
            sizes of the vocabularies, which may differ by padding (a tenth).
        max_cache_tokens: slots of the cache at most, over all of its rows, each as long as the longest request needs.
            Requests that were extended least recently lose their rows beyond that, and are read again when their turn comes;
            one that does not fit alone is as one beyond the context. None: no bound.

    Raises:
        ValueError: an encoder-decoder, a recurrent state, one tokenizer without the other, or max_cache_tokens < 2.
        VocabularyMismatchError: ids that do not mean the same; the first difference is named.
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
        """Tokens of a request at most; a slot behind them is for what fills up shorter rows."""
        self._known = model.config.get_text_config(decoder=True).vocab_size
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self._rows: dict[int, _Text] = {}
        self._calls = 0
        self._picked: tuple[torch.Tensor, torch.Tensor] | None = None
        # The output matrix is the largest: it is read for the positions asked for, and no logits of a whole prompt are made.
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
        said = [np.full(count, NOTHING, np.int64) for count in keep]
        going = {}
        for request, new, count, answer in zip(requests, tokens, keep, said):
            request.extended, request.said = self._calls, NOTHING
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
        return said

    @torch.no_grad()
    def _draft(self, requests: list[_Text], lengths: Sequence[int]) -> list[list[int]]:
        drafts = [[request.said][:length] if request.said != NOTHING else [] for request, length in zip(requests, lengths)]
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
        """The requests in groups that find room in the cache at once, by the slots that each needs."""
        groups: list[list[_Text]] = []
        for request in sorted(ends, key=lambda request: ends[request]):
            room = self.together and groups and (len(groups[-1]) + 1) * self._capacity(ends[request]) <= self.max_cache_tokens
            if room:
                groups[-1].append(request)
            else:
                groups.append([request])
        return groups

    def _read(self, requests: list[_Text], wanted: dict[_Text, tuple[int, np.ndarray]]) -> None:
        """Takes what is not read of requests that have rows, and fills the arrays of `wanted` with what is said from so many
        tokens on. Prompts are read in chunks; requests with about as many tokens share a forward."""
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
        """Reads up to a chunk of each in one forward."""
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
            if not batch[place].unread:  # of those picked of a request the last one stays
                batch[place].said = token
            if answer is not None:
                answer[index] = token

    def _forward(
        self, rows: list[int], lengths: list[int], tokens: Sequence[Sequence[int]], picked: list[tuple[int, int]]
    ) -> list[int]:
        """Reads tokens behind what each row holds, the rows ascending, and says the next after those picked: (which row, which
        of its tokens)."""
        counts = [len(one) for one in tokens]
        starts = np.array(lengths)[:, None]
        end = max(length + count for length, count in zip(lengths, counts))
        places = starts + np.arange(max(counts))
        given = np.zeros((3, *places.shape), np.int64)
        for row, one in enumerate(tokens):
            given[0, row, : len(one)] = one
        given[1] = np.minimum(places, end)  # what fills up a row goes behind all that is read
        given[2] = np.minimum(places, end - 1)  # and has a position that the model knows
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
        """Of hidden states [B, T, H] those asked for, [n, 1, H]."""
        assert self._picked is not None  # `_forward` sets it
        rows, places = (one.to(arguments[0].device) for one in self._picked)
        return (arguments[0][rows, places][:, None],)

    def _capacity(self, end: int) -> int:
        """Slots of rows that hold `end` tokens and a slot behind them."""
        return min(-(-(end + 1) // STEP) * STEP, self.context + 1)

    def _rounded_rows(self, rows: int, capacity: int) -> int:
        """Rows to make where so many are needed: a power of two, if there is room."""
        return min(1 << (rows - 1).bit_length(), max(rows, self.max_cache_tokens // capacity)) if rows else 0

    def _reserve(self, group: list[_Text], end: int) -> None:
        """Sees to a row that holds `end` tokens for each of the group, at the cost of those extended least recently."""
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
        """Takes its row away; it keeps its tokens."""
        if request.row is not None:
            del self._rows[request.row]
        request.row, request.length = None, 0


@dataclass(eq=False)
class _Tail:
    """The last verified tokens of a request, as many as the longest n-gram has."""

    tokens: list[int] = field(default_factory=list)


class Datastores(_ByKey[_Tail]):
    """Retrieval from a corpus, one look-up for all the requests at hand.

    Args:
        datastore: of texts in the target's tokens.
        vocab_size: the target's.
        name: shown in statistics.

    Raises: VocabularyMismatchError for a datastore that says ids beyond the vocabulary.
    """

    def __init__(self, datastore: Datastore, vocab_size: int, name: str = "datastore"):
        super().__init__(name)
        check_vocabulary(datastore, vocab_size, name)
        self.datastore = datastore

    def _begin(self) -> _Tail:
        return _Tail()

    def _extend(self, requests: list[_Tail], tokens: list[np.ndarray], keep: list[int]) -> list[np.ndarray]:
        contexts, longest = [], self.datastore.max_ngram
        for request, new, count in zip(requests, tokens, keep):
            text = [*request.tokens, *new[-(longest + count) :].tolist()]
            contexts += [text[max(0, end - longest) : end] for end in range(len(text) - count + 1, len(text) + 1)]
            request.tokens = text[-longest:]
        return np.split(self.datastore.next_tokens(contexts), np.cumsum(keep)[:-1]) if requests else []

    def _draft(self, requests: list[_Tail], lengths: Sequence[int]) -> list[list[int]]:
        drafts: list[list[int]] = [[] for _ in requests]
        going = [place for place, length in enumerate(lengths) if length]
        while going:
            found = self.datastore.next_tokens([[*requests[place].tokens, *drafts[place]] for place in going])
            for place, token in zip(going, found.tolist()):
                if token != NOTHING:
                    drafts[place].append(token)
            going = [place for place, token in zip(going, found) if token != NOTHING and len(drafts[place]) < lengths[place]]
        return drafts


class _Session:
    """A request's session, what it said last, and what was drafted since: a session takes back drafts only when it reads on."""

    def __init__(self, session: DrafterSession):
        self.session = session
        self.drafted: list[int] = []
        """Its first token follows from the verified ones; the session has taken in all but the last."""


class Sessions(_ByKey[_Session]):
    """Any drafter of the decoder that needs tokens only, one request after the other.

    Args:
        drafter: whose `aux_layers` are empty.
        device: where it reads its tokens.

    Raises: ValueError for a drafter that reads the target's hidden states.
    """

    def __init__(self, drafter: Drafter, device: torch.device | str = "cpu"):
        if drafter.aux_layers:
            raise ValueError(
                f"drafter: expected one that runs from tokens alone, got {drafter.name}, which reads the target's hidden "
                f"states of the layers {', '.join(map(str, drafter.aux_layers))}"
            )
        super().__init__(drafter.name)
        self.drafter, self.device = drafter, torch.device(device)

    def _begin(self) -> _Session:
        return _Session(open_session(self.drafter))

    @torch.no_grad()
    def _extend(self, requests: list[_Session], tokens: list[np.ndarray], keep: list[int]) -> list[np.ndarray]:
        said = []
        for request, new, count in zip(requests, tokens, keep):
            given = torch.as_tensor(new, dtype=torch.int64, device=self.device)
            proposals = self._targets(request.session.consume(given, None, max(1, count)))
            request.drafted = proposals[-1:]
            said.append(np.array(proposals[len(proposals) - count :], np.int64))
        return said

    @torch.no_grad()
    def _draft(self, requests: list[_Session], lengths: Sequence[int]) -> list[list[int]]:
        for request, length in zip(requests, lengths):
            while len(request.drafted) < length:
                last = torch.tensor(request.drafted[-1:], device=self.device)
                request.drafted += self._targets(request.session.step(last)[None])
        return [request.drafted[:length] for request, length in zip(requests, lengths)]

    def _targets(self, logits: torch.Tensor) -> list[int]:
        """The target's ids of the likeliest tokens, of logits [T, Vd]."""
        best = logits.argmax(-1)
        return (best if self.drafter.draft_to_target is None else self.drafter.draft_to_target.to(best.device)[best]).tolist()


def _check(keys: Sequence[int], name: str, values: Sequence) -> None:
    if len(values) != len(keys):
        raise ValueError(f"{name}: expected one for each of the {len(keys)} keys, got {len(values)}")
    if len(set(keys)) < len(keys):
        raise ValueError(f"keys: expected distinct ones, got {list(keys)}")


def _check_counts(name: str, counts: Sequence[int]) -> None:
    if counts and min(counts) < 0:
        raise ValueError(f"{name}: expected numbers >= 0, got {min(counts)}")


def _or_nothing(token: int | None) -> int:
    return NOTHING if token is None else token
