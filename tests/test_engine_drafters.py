"""Drafters of an engine: whatever comes and goes beside a request, it is told what it would be told alone."""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)  # fmt: skip

from hedgespec.drafters.causal_lm import CausalLMDrafter
from hedgespec.drafters.datastore import Datastore
from hedgespec.errors import VocabularyMismatchError
from hedgespec.integrations.vllm import causal_lms
from hedgespec.integrations.vllm.drafters import NOTHING, CausalLMs, Datastores, NGrams, Sessions, TokenDrafter
from hedgespec.runtime.cache import RowCache

V, CONTEXT = 31, 40
SHAPE = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             initializer_range=0.5)  # fmt: skip


def llama(vocabulary: int = V, context: int = CONTEXT, **options) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocabulary, max_position_embeddings=context, **SHAPE, **options)
    return LlamaForCausalLM(config).double().eval()


def bloom() -> BloomForCausalLM:
    """Its biases come from the slots' own numbers: rows of different lengths cannot share a forward."""
    torch.manual_seed(0)
    return BloomForCausalLM(
        BloomConfig(vocab_size=V, hidden_size=16, n_layer=1, n_head=2, initializer_range=0.5)
    ).double().eval()  # fmt: skip


class ByModel:
    """A model's argmax after a text, read at once and alone; -1 beyond `context`."""

    def __init__(self, model, context: int):
        self.model, self.context, self.seen = model, context, {}

    def __call__(self, text: list[int], drafted: list[int]) -> int:
        key = tuple(text + drafted)
        if len(key) > self.context:
            return NOTHING
        if key not in self.seen:
            with torch.no_grad():
                best = self.model(torch.tensor([key])).logits[0].argmax(-1).tolist()
            self.seen |= {key[: end + 1]: token for end, token in enumerate(best)}
        return self.seen[key]


def by_ngram(text: list[int], drafted: list[int]) -> int:
    whole = text + drafted
    for length in range(min(3, len(whole)), 0, -1):
        for start in range(len(text) - length - 1, -1, -1):
            if text[start : start + length] == whole[len(whole) - length :]:
                return text[start + length]
    return NOTHING


CORPUS = Datastore.build([np.random.default_rng(0).integers(0, V, 400)], 3)
LLAMA, BLOOM = llama(), bloom()
KINDS = {
    "LM": (lambda: CausalLMs(LLAMA, V), ByModel(LLAMA, CONTEXT), {}),
    "LM in little room": (lambda: CausalLMs(LLAMA, V, max_cache_tokens=3 * CONTEXT), ByModel(LLAMA, CONTEXT), {}),
    "LM in room for one": (lambda: CausalLMs(LLAMA, V, max_cache_tokens=CONTEXT - 9), ByModel(LLAMA, CONTEXT - 10), {}),
    "LM in chunks": (
        lambda: CausalLMs(LLAMA, V, max_cache_tokens=4 * CONTEXT), ByModel(LLAMA, CONTEXT),
        {"CHUNK": 4, "MOST": 8, "FEW": 2, "STEP": 5},
    ),
    "LM one by one": (lambda: CausalLMs(BLOOM, V, max_cache_tokens=600), ByModel(BLOOM, 599), {}),
    "n-grams": (NGrams, by_ngram, {}),
    "datastore": (lambda: Datastores(CORPUS, V), lambda text, drafted: int(CORPUS.next_tokens([text + drafted])[0]), {}),
    "sessions": (lambda: Sessions(CausalLMDrafter(LLAMA, LLAMA)), ByModel(LLAMA, 10**6), {}),
}  # fmt: skip
"""By kind: how to make one, what it has to say after a text and some drafted tokens, and sizes of forwards."""
WORK = st.dictionaries(
    st.integers(0, 4), st.tuples(st.lists(st.integers(0, V - 1), min_size=1, max_size=11), st.integers(0, 5)), min_size=1
)
STEPS = st.lists(st.tuples(st.sampled_from(["extend", "extend", "draft", "drop"]), WORK), max_size=14)


def drafted_alone(says, text: list[int], length: int) -> list[int]:
    drafted: list[int] = []
    while len(drafted) < length and (token := says(text, drafted)) != NOTHING:
        drafted.append(token)
    return drafted


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None)
@given(steps=STEPS)
def test_every_request_is_told_what_it_would_be_told_alone(kind, steps):
    make, says, sizes = KINDS[kind]
    texts: dict[int, list[int]] = {}
    over: set[int] = set()
    with ExitStack() as changes:
        for name, value in sizes.items():
            changes.enter_context(mock.patch.object(causal_lms, name, value))
        drafter = make()
        for what, work in steps:
            if what == "extend":
                tokens = [np.array(new, np.int32) for new, _ in work.values()]
                said = drafter.extend(list(work), tokens, [keep for _, keep in work.values()])
                for (key, (new, keep)), told in zip(work.items(), said, strict=True):
                    text = texts[key] = [*texts.get(key, []), *new]
                    ends = range(len(text) - min(keep, len(new)) + 1, len(text) + 1)
                    gone = says(text, []) == NOTHING and isinstance(says, ByModel)
                    assert told.tolist() == [NOTHING if gone else says(text[:end], []) for end in ends]
                    assert told.dtype == np.int64
                    over |= {key} if gone else set()
            elif what == "draft":
                lengths = {key: length for key, (_, length) in work.items() if key in texts}
                for (key, length), draft in zip(lengths.items(), drafter.draft(list(lengths), list(lengths.values()))):
                    assert draft == ([] if key in over else drafted_alone(says, texts[key], length))
            else:
                drafter.drop(work)
                for key in work:
                    texts.pop(key, None)
                    over.discard(key)
            assert drafter.requests == len(texts)
            if isinstance(drafter, CausalLMs):
                assert drafter.cache.rows * drafter.cache.capacity <= drafter.max_cache_tokens
        drafter.drop(range(5))
        assert drafter.requests == 0
        if isinstance(drafter, CausalLMs):
            assert drafter.cache.rows == 0 and not drafter.cache.layers


@pytest.mark.parametrize("kind", KINDS)
def test_drafting_leaves_no_trace(kind):
    make, says, _ = KINDS[kind]
    drafter, text = make(), [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    drafter.extend([7, 8], [np.array(text), np.array(text[:4])], [1, 1])
    longest = drafter.draft([7], [5])
    for length in (2, 5, 3):
        assert drafter.draft([8, 7], [1, length])[1] == longest[0][:length] == drafted_alone(says, text, length)
    assert drafter.extend([7], [np.array([5, 8])], [2])[0].tolist() == [says([*text, 5], []), says([*text, 5, 8], [])]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (("extend", [1, 2], [np.array([1])], [1, 1]), "tokens: expected one for each of the 2 keys, got 1"),
        (("extend", [1], [np.array([1])], [1, 1]), "keep: expected one for each of the 1 keys, got 2"),
        (("extend", [2, 2], [np.array([1])] * 2, [1, 1]), r"keys: expected distinct ones, got \[2, 2\]"),
        (("extend", [2], [np.array([], np.int64)], [1]), r"tokens: expected at least one integer id.*got int64 \(0,\)"),
        (("extend", [2], [np.array([1.0])], [1]), "tokens: expected at least one integer id.*got float64"),
        (("extend", [2], [np.array([1])], [-1]), "keep: expected numbers >= 0, got -1"),
        (("draft", [1], [-2]), "lengths: expected numbers >= 0, got -2"),
        (("draft", [1], []), "lengths: expected one for each of the 1 keys, got 0"),
        (("draft", [1, 2], [1, 1]), "keys: expected requests that were extended, got 2"),
    ],
)
def test_arguments_that_do_not_fit_change_nothing(kind, call, message):
    drafter = KINDS[kind][0]()
    drafter.extend([1], [np.array([4, 5])], [0])
    name, *arguments = call
    with pytest.raises(ValueError, match=message):
        getattr(drafter, name)(*arguments)
    assert drafter.requests == 1


@pytest.mark.parametrize("kind", KINDS)
def test_no_requests_are_no_work(kind):
    drafter = KINDS[kind][0]()
    assert drafter.extend([], [], []) == [] and drafter.draft([], []) == []
    drafter.drop([3])


def test_all_kinds_have_the_protocols_methods():
    for kind in (CausalLMs, NGrams, Datastores, Sessions):
        for name in ("extend", "draft", "drop"):
            assert inspect.signature(getattr(kind, name)) == inspect.signature(getattr(TokenDrafter, name))
    assert [KINDS[kind][0]().name for kind in ("LM", "n-grams", "datastore", "sessions")] == [
        "causal_lm", "ngram", "datastore", "causal_lm",
    ]  # fmt: skip


# Language models


def counted(drafter: CausalLMs) -> list[tuple[int, ...]]:
    """Shapes of the tokens of every forward to come, and of what the output matrix is multiplied with."""
    shapes: list[tuple[int, ...]] = []
    drafter.model.register_forward_pre_hook(lambda module, arguments: shapes.append(tuple(arguments[0].shape)))
    drafter.model.lm_head.register_forward_hook(lambda module, arguments, _: shapes.append(tuple(arguments[0].shape)))
    return shapes


def test_a_forward_serves_all_and_the_output_matrix_the_positions_asked_for():
    drafter = CausalLMs(llama(context=2000), V)
    shapes, keys = counted(drafter), range(16)
    drafter.extend(keys, [np.arange(20 + key) % V for key in keys], [1] * 16)
    assert shapes == [(16, 35), (16, 1, 16)]
    shapes.clear()
    drafter.extend(keys, [np.arange(1 + key % 3) for key in keys], [2] * 16)
    assert shapes == [(16, 3), (6 + 2 * 10, 1, 16)]
    shapes.clear()
    drafter.draft(keys, [4, 2, 1, 0] * 4)
    assert shapes == [(8, 1), (8, 1, 16), (4, 1), (4, 1, 16), (4, 1), (4, 1, 16)]
    shapes.clear()
    drafter.extend([1, 20, 21, 22], [np.arange(2), np.arange(1100) % V, np.arange(70) % V, np.arange(90) % V], [2, 3, 0, 1])
    assert [shape for shape in shapes if len(shape) == 2] == [(1, 512), (1, 512), (3, 90), (1, 2)]
    assert sum(shape[0] for shape in shapes if len(shape) == 3) == 2 * 1 + (3 + 1 + 1) + 2


def test_who_was_extended_least_recently_loses_its_row_and_is_read_again():
    drafter = CausalLMs(LLAMA, V, max_cache_tokens=3 * (CONTEXT + 1))
    for key in range(3):
        drafter.extend([key], [np.array([key, 5, 6])], [1])
    drafter.extend([0], [np.array([7])], [1])
    drafter.extend([3], [np.array([1, 2])], [1])
    assert [drafter._requests[key].row is None for key in range(4)] == [False, True, False, False]
    shapes = counted(drafter)
    says = ByModel(LLAMA, CONTEXT)
    assert drafter.draft([1], [1]) == [[says([1, 5, 6], [])]] and not shapes  # known since it was extended
    assert drafter.draft([1], [2]) == [drafted_alone(says, [1, 5, 6], 2)]
    assert [shape for shape in shapes if len(shape) == 2] == [(1, 3), (1, 1)]


def test_rows_are_used_again_and_given_back():
    drafter, new = CausalLMs(llama(context=4096), V), np.array([1, 2, 3])
    drafter.extend(range(8), [new] * 8, [1] * 8)
    assert (drafter.cache.rows, drafter.cache.capacity) == (8, 256)
    buffer = drafter.cache.layers[0].keys
    for key in range(8, 40):
        drafter.drop([key - 8])
        drafter.extend([key], [new], [1])
    assert drafter.cache.layers[0].keys is buffer and drafter.requests == 8
    drafter.extend([39], [np.ones(600, np.int64)], [1])
    assert (drafter.cache.rows, drafter.cache.capacity) == (8, 768)
    drafter.drop([39])
    assert (drafter.cache.rows, drafter.cache.capacity) == (8, 768)  # not for every request that goes
    drafter.drop(range(33, 39))
    assert (drafter.cache.rows, drafter.cache.capacity) == (1, 256)


def test_neighbours_in_order_are_read_without_a_copy():
    cache = RowCache()
    cache.rebuild([], 4, 8)
    states = torch.ones(4, 1, 2, 3)
    for rows, lengths in (([0, 1, 2, 3], [5, 5, 5, 5]), ([0, 1, 2, 3], [1, 2, 3, 4]), ([1, 2], [0, 4]), ([0, 3], [2, 2])):
        slots = torch.tensor(lengths)[:, None] + torch.arange(2)
        cache.take(rows, lengths, slots, max(lengths) + 2)
        keys, _ = cache.update(states[: len(rows)], states[: len(rows)], 0)
        held = cache.layers[0].keys
        assert keys.shape == (len(rows), 1, max(lengths) + 2, 3) and torch.equal(keys, held[rows, :, : max(lengths) + 2])
        shared = keys.untyped_storage().data_ptr() == held.untyped_storage().data_ptr()
        assert shared == (rows != [0, 3])


def test_a_request_is_drafted_for_up_to_the_models_context():
    drafter, says = CausalLMs(LLAMA, V), ByModel(LLAMA, CONTEXT)
    text = [token % V for token in range(CONTEXT - 2)]
    drafter.extend([1, 2], [np.array(text), np.array(text[:3])], [1, 1])
    assert drafter.draft([1, 2], [9, 2]) == [drafted_alone(says, text, 3), drafted_alone(says, text[:3], 2)]
    assert len(drafter.draft([1], [9])[0]) == 3
    said = drafter.extend([1, 2], [np.array([5, 6, 7]), np.array([5])], [2, 1])
    assert [one.tolist() for one in said] == [[NOTHING] * 2, [says([*text[:3], 5], [])]]
    assert drafter.draft([1, 2], [4, 0]) == [[], []] and drafter.requests == 2
    assert drafter.extend([1], [np.array([5])], [1])[0].tolist() == [NOTHING]
    assert not drafter._requests[1].tokens and drafter._requests[1].row is None
    drafter.drop([1])
    assert drafter.extend([1], [np.array(text[:3])], [1])[0].tolist() == [says(text[:3], [])]


def test_what_fills_up_a_row_stays_within_a_table_of_positions():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=V, n_embd=16, n_layer=2, n_head=2, n_positions=CONTEXT, initializer_range=0.5)
    ).double().eval()  # fmt: skip
    drafter, says = CausalLMs(model, V), ByModel(model, CONTEXT)
    texts = [[token % V for token in range(CONTEXT - 1)], [5, 6, 7], [8] * (CONTEXT - 3)]
    drafter.extend([0, 1, 2], [np.array(text) for text in texts], [1, 1, 1])
    parts = [[4], [1, 2, 3, 4, 5], [3, 2]]
    said = drafter.extend([0, 1, 2], [np.array(part) for part in parts], [1, 1, 1])
    assert [one.tolist() for one in said] == [[says(text + part, [])] for text, part in zip(texts, parts)]
    wanted = [drafted_alone(says, text + part, 4) for text, part in zip(texts, parts)]
    assert drafter.draft([0, 1, 2], [4, 4, 4]) == wanted and list(map(len, wanted)) == [1, 4, 2]


def test_only_ids_that_both_know_are_said_and_read():
    wide, narrow = CausalLMs(llama(V), V - 2), CausalLMs(llama(V), V + 2)
    assert (wide.vocab_size, narrow.vocab_size) == (V - 2, V)
    text = np.arange(29)
    with torch.no_grad():
        logits = LLAMA(torch.from_numpy(text)[None]).logits[0]
    assert (logits.argmax(-1) >= V - 2).any()
    assert wide.extend([0], [text], [29])[0].tolist() == logits[:, : V - 2].argmax(-1).tolist()
    for stranger in (V, V + 1, -1, 2**40):
        assert narrow.extend([0, 1], [np.array([1, stranger]), np.array([1])], [1, 1])[0].tolist() == [NOTHING]
        assert narrow.draft([0], [3]) == [[]]
        narrow.drop([0, 1])


def test_what_cannot_draft_is_refused():
    words, others = ({word: id for id, word in enumerate(text.split())} for text in ("a b c", "a c b"))
    tokenizers = [PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(ids, unk_token="a"))) for ids in (words, others)]
    CausalLMs(LLAMA, V, tokenizer=tokenizers[0], target_tokenizer=tokenizers[0])
    with pytest.raises(VocabularyMismatchError, match="drafter small: .* id 1 is 'b' to the drafter and 'c' to the target"):
        CausalLMs(LLAMA, V, "small", tokenizer=tokenizers[0], target_tokenizer=tokenizers[1])
    with pytest.raises(ValueError, match="tokenizer: expected both tokenizers or neither"):
        CausalLMs(LLAMA, V, tokenizer=tokenizers[0])
    with pytest.raises(VocabularyMismatchError, match=f"drafter small: expected a vocabulary of 100 tokens, got {V}"):
        CausalLMs(LLAMA, 100, "small")
    with pytest.raises(ValueError, match="max_cache_tokens: expected at least 2, got 1"):
        CausalLMs(LLAMA, V, max_cache_tokens=1)
    stateful = SimpleNamespace(config=LLAMA.config, _is_stateful=True)
    with pytest.raises(ValueError, match="drafter small: expected attention layers .* a recurrent state"):
        CausalLMs(stateful, V, "small")
    with pytest.raises(VocabularyMismatchError, match="drafter code: expected ids below the target's 7"):
        Datastores(CORPUS, 7, "code")
    with pytest.raises(ValueError, match="max_ngram: expected at least 1, got 0"):
        NGrams(0)
    head = SimpleNamespace(name="head", aux_layers=(2, 5))
    with pytest.raises(ValueError, match="drafter: expected one that runs from tokens alone, got head.*of the layers 2, 5"):
        Sessions(head)


def test_the_model_stays_the_callers():
    model = llama().to(torch.bfloat16)
    drafter = CausalLMs(model, V)
    assert drafter.extend([0], [np.arange(9)], [2])[0].shape == (2,)
    assert drafter.cache.layers[0].keys.dtype == torch.float32 and model.dtype == torch.bfloat16
    CausalLMs(LLAMA, V).extend([0], [np.arange(9)], [2])
    with torch.no_grad():
        assert LLAMA(torch.arange(9)[None]).logits.shape == (1, 9, V)


def test_a_forward_that_fails_loses_no_request():
    drafter, says = CausalLMs(LLAMA, V), ByModel(LLAMA, CONTEXT)
    drafter.extend([0, 1], [np.array([1, 2]), np.array([3])], [1, 1])
    with mock.patch.object(drafter.model, "forward", side_effect=RuntimeError("out of memory")), pytest.raises(RuntimeError):
        drafter.extend([0, 2], [np.array([4]), np.array([5])], [1, 1])
    assert drafter.draft([0, 1, 2], [2, 2, 2]) == [[], drafted_alone(says, [3], 2), []]  # it was not told yet
    said = drafter.extend([0, 2], [np.array([6]), np.array([7, 8])], [1, 2])
    assert [one.tolist() for one in said] == [[says([1, 2, 4, 6], [])], [says([5, 7], []), says([5, 7, 8], [])]]


def test_a_sessions_ids_are_the_targets():
    drafter = SimpleNamespace(name="own", aux_layers=(), vocab_size=9, draft_to_target=torch.tensor([8, 3, 5]))
    rows = torch.eye(3)
    drafter.session = lambda: SimpleNamespace(
        consume=lambda tokens, features, keep: rows[tokens % 3][len(tokens) - keep :], step=lambda token: rows[token[0] % 3]
    )
    own = Sessions(drafter)
    assert own.name == "own" and own.extend([0], [np.array([2, 1, 0])], [2])[0].tolist() == [3, 8]
    assert own.draft([0], [3]) == [[8, 5, 5]]
