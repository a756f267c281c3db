"""Heads as a stack against the same heads one after another, and what a stack may not do: grow, copy, go stale."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from helpers.captured import (
    FakeCuda,
    Watched,
    as_on_a_gpu,  # noqa: F401  fixtures
)
from torch import nn

from hedgespec.drafters.eagle import EagleConfig, EagleHead
from hedgespec.drafters.stack import HeadStack
from hedgespec.drafters.stack_session import StackSession
from hedgespec.drafters.stack_weights import is_plain, kind_of
from hedgespec.ops.linear import FewRowLinear
from hedgespec.runtime.capture import CudaGraphs

VOCABULARY, HEADS, WIDTH = 40, 4, 36
SHAPES = dict(
    hidden_size=16, target_hidden_size=12, num_attention_heads=4, num_key_value_heads=2, head_dim=6, intermediate_size=20,
    vocab_size=VOCABULARY, draft_vocab_size=25, aux_layers=(1, 2, 4), rope_theta=1000.0,
)  # fmt: skip
# Largest absolute error of a logit of size up to 12, by dtype.
CLOSE = {torch.float64: 1e-12, torch.float32: 5e-5}


def pool_of(count: int, dtype: torch.dtype = torch.float64, *, shares: bool = True, mapped: bool = True) -> list[EagleHead]:
    """Heads over one embedding, their output rows slices of one matrix or each their own."""
    generator = torch.Generator().manual_seed(0)
    embedding = nn.Embedding.from_pretrained(torch.randn(VOCABULARY, 16, generator=generator)).to(dtype)
    config = EagleConfig(**SHAPES | ({} if mapped else {"draft_vocab_size": VOCABULARY}))
    output = torch.randn(VOCABULARY, 16, generator=generator).to(dtype)
    heads = []
    for number in range(count):
        ids = torch.randperm(VOCABULARY, generator=generator)[:25].sort().values
        head = EagleHead(config, embedding, ids if mapped else None, name=f"head-{number}").to(dtype)
        for weight in head.parameters():
            nn.init.normal_(weight, mean=float(weight.ndim == 1), std=0.3, generator=generator)
        if shares:
            head.lm_head.weight.data = output[ids].clone() if mapped else output.clone()
        heads.append(head.requires_grad_(False))
    return heads


def text_of(length: int, dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (length,), generator=generator)
    return tokens, torch.randn(length, WIDTH, generator=generator, dtype=torch.float64).to(dtype)


class Alone:
    """What a head says without a stack and without a past: everything read anew, every time."""

    def __init__(self, heads, texts):
        self.heads, self.texts = heads, texts

    def given(self, head: int, row: int, length: int) -> torch.Tensor:
        """Logits for each of the tokens 2..length of a row."""
        tokens, features = (one[:length] for one in self.texts[row])
        return self.heads[head].session().consume(tokens, features, length - 1)

    def drafting(self, head: int, row: int, length: int):
        tokens, features = (one[:length] for one in self.texts[row])
        session = self.heads[head].session()
        return session, session.consume(tokens, features, 1)[0]


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize(
    ("shares", "mapped", "count"), [(True, True, HEADS), (False, True, HEADS), (True, False, 2), (True, True, 1)]
)
@pytest.mark.parametrize("captured", [False, True])
def test_a_stack_is_its_heads_one_after_another(request, dtype, shares, mapped, count, captured):
    """Random rounds: rows of a batch advance each by as much as was accepted, draft each with a head of its own, some only
    after a while, and all heads catch up now and then. The same if every pass is a graph, captured once a shape."""
    if captured and dtype != torch.float64:
        pytest.skip("the fake that stands for a GPU sees torch's operations, and not the kernels for float32 on the CPU")
    if captured:
        request.getfixturevalue("as_on_a_gpu")
    heads = pool_of(count, dtype, shares=shares, mapped=mapped)
    random = np.random.default_rng(0)
    texts = [text_of(150, dtype, seed) for seed in range(3)]
    alone, close = Alone(pool_of(count, dtype, shares=shares, mapped=mapped), texts), dict(atol=CLOSE[dtype], rtol=0)
    cuda = FakeCuda()
    session = StackSession(HeadStack(heads), 3, graphs=CudaGraphs(cuda) if captured else None)
    lengths = np.array([7, 2, 12])  # prompts and first tokens

    def since(rows, taken):
        news = [[one[have : lengths[row]] for one in texts[row]] for row, have in zip(rows, taken)]
        return [tokens for tokens, _ in news], [features for _, features in news]

    assert session.score([0, 1, 2], *since([0, 1, 2], [0, 0, 0])).shape[2] == 0
    rows = [0, 1, 2]
    for round in range(25):
        drafting = sorted(random.permutation(rows)[: random.integers(1, len(rows) + 1)].tolist())
        who = random.integers(count, size=len(drafting)).tolist()
        places = [rows.index(row) for row in drafting]
        logits = session.begin_draft(places, who, *since(drafting, session.consumed[who, places]))
        single = []
        for place, (row, head) in enumerate(zip(drafting, who)):
            reference, expected = alone.drafting(head, row, lengths[row])
            torch.testing.assert_close(logits[place], expected, **close)
            single.append(reference)
        going = list(range(len(drafting)))
        for _ in range(3):
            chosen = sorted(random.permutation(len(going))[: random.integers(1, len(going) + 1)].tolist())
            going = [going[place] for place in chosen]
            tokens = torch.from_numpy(random.integers(VOCABULARY, size=len(going)))
            logits = session.draft_next(chosen, tokens)
            for place, number in enumerate(going):
                torch.testing.assert_close(logits[place], single[number].step(tokens[place : place + 1]), **close)
        lengths[rows] += random.integers(1, 6, size=len(rows))
        if round % 4 != 2:  # else heads that drafted are ahead of the others by then
            some = sorted(random.permutation(rows)[: random.integers(1, len(rows) + 1)].tolist())
            places = [rows.index(row) for row in some]
            before = session.scored[places].copy()
            had = session.score(places, *since(some, before))
            for place, (row, first) in enumerate(zip(some, before)):
                for head in range(count):
                    expected = alone.given(head, row, lengths[row])[first - 2 : -1]
                    torch.testing.assert_close(had[head, place, : len(expected)], expected, **close)
        if round == 15:  # a row has come to its end
            rows = [0, 2]
            session.keep_rows(rows)
    if captured:
        assert session.graphs is not None
        assert cuda.captured < cuda.replayed / 2


def test_a_window_bounds_the_cache_and_forgets_the_oldest():
    """Ten thousand rounds in bounded memory; what is kept is looked at, what is forgotten is not."""
    session = StackSession(HeadStack(pool_of(2)), 2, window=32)
    texts = [text_of(30_000, torch.float64, seed) for seed in range(2)]
    random, lengths = np.random.default_rng(0), np.array([50, 9])  # a prompt longer than the window, and one that fits
    session.score([0, 1], *zip(*[(tokens[:n], features[:n]) for (tokens, features), n in zip(texts, lengths)]))
    sizes = set()
    for round in range(10_000):
        first, lengths = lengths, lengths + random.integers(1, 4, size=2)
        news = [(tokens[a:b], features[a:b]) for (tokens, features), a, b in zip(texts, first, lengths)]
        session.score([0, 1], *zip(*news))
        if round % 20 == 0:
            session.begin_draft([0, 1], [round // 20 % 2, 0], [texts[0][0][:0]] * 2, [texts[0][1][:0]] * 2)
            session.draft_next([0, 1], torch.tensor([3, 4]))
        sizes.add(session.cache_bytes)
        if round % 2500 == 0:
            held = lengths - 1 - session.base
            assert (held <= 32 + 3).all()
            for row, (tokens, features) in enumerate(texts):
                # A head that began where the row's slot 0 is. Only differences of positions matter, but for rounding.
                start = session.base[row]
                fresh = session.stack.heads[1].session()
                expected = fresh.consume(tokens[start : lengths[row]], features[start : lengths[row]], 1)[0]
                torch.testing.assert_close(session.given[1, row], expected, atol=1e-3, rtol=0)
    assert max(sizes) <= 2 * 2 * 2 * 2 * 6 * 8 * (32 + 32)
    assert len(sizes) <= 3


def test_rounds_that_take_back_what_they_drafted_need_no_memory():
    session = StackSession(HeadStack(pool_of(2)), 1)
    tokens, features = text_of(40, torch.float64, 0)
    session.score([0], [tokens[:20]], [features[:20]])
    size = session.cache_bytes
    for _ in range(1000):
        session.begin_draft([0], [1], [tokens[:0]], [features[:0]])
        session.draft_next([0], tokens[:1])
    assert session.cache_bytes == size


def test_a_stack_has_weights_of_its_own_and_leaves_the_heads_alone():
    heads = pool_of(3)
    places = [weight.data_ptr() for head in heads for weight in head.parameters()]
    before = [weight.clone() for head in heads for weight in head.parameters()]
    stack, other = HeadStack(heads), HeadStack(heads[:2])
    assert places == [weight.data_ptr() for head in heads for weight in head.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, (weight for head in heads for weight in head.parameters())))
    held = {weight.untyped_storage().data_ptr() for head in heads for weight in head.parameters()}
    for one in (stack, other):
        assert one.is_current()
        assert not held & {weight.untyped_storage().data_ptr() for weight in one.weights.values()}
    assert not {weight.data_ptr() for weight in stack.weights.values()} & {
        weight.data_ptr() for weight in other.weights.values()
    }
    assert len(stack.weights["lm_head.weight"]) <= VOCABULARY  # a row for each id, not for each head's

    # What it costs: the heads' weights once more, but for output rows that several heads have.
    own = sum(weight.nbytes for head in heads for name, weight in head.named_parameters() if name != "lm_head.weight")
    assert stack.nbytes == own + stack.weights["lm_head.weight"].nbytes
    single = HeadStack(heads[:1])
    assert single.nbytes == 0 and single.weights["fc.weight"].data_ptr() == heads[0].fc.weight.data_ptr()


def test_a_copy_of_a_stacked_head_is_a_head_like_any_other(tmp_path):
    heads = pool_of(2)
    stack = HeadStack(heads)
    copied = copy.deepcopy(heads[0])
    assert copied.embedding is heads[0].embedding and kind_of(copied) == kind_of(heads[0])
    torch.save(heads[0].state_dict(), tmp_path / "head.pt")
    assert (tmp_path / "head.pt").stat().st_size < 1.5 * sum(one.nbytes for one in heads[0].parameters()) + 10_000
    with torch.no_grad():
        copied.fc.weight.zero_()
    assert stack.is_current() and heads[0].fc.weight.any()

    embedding = heads[0].embedding
    both, head = copy.deepcopy((embedding, heads[0]))  # with the target's embedding, as a decoder is copied
    assert head.embedding is both is not embedding
    owner = EagleHead(heads[0].config, nn.Embedding(VOCABULARY, 16), owns_embedding=True)
    twin = copy.deepcopy(owner)
    assert twin.embedding is twin.embed_tokens is not owner.embed_tokens


@pytest.mark.parametrize("size", [10, 25, 40])
def test_only_heads_of_the_size_that_their_configuration_names_are_stacked(size):
    """Another draft vocabulary than the configuration's, or other weights, make a head that works by itself."""
    head = pool_of(1)[0]
    assert is_plain(head)
    head.draft_to_target = torch.arange(size)
    head.lm_head = FewRowLinear(16, size, bias=False).double().requires_grad_(False)
    assert is_plain(head) == (size == 25)
    other = pool_of(1)[0]
    other.down_proj.weight = nn.Parameter(torch.zeros(16, 4).double())
    assert not is_plain(other)


@pytest.mark.parametrize("change", ["moved", "written", "replaced"])
def test_a_stack_knows_when_its_heads_have_changed(change):
    heads = pool_of(2)
    stack = HeadStack(heads)
    if change == "moved":
        heads[1].float()
    elif change == "written":
        with torch.no_grad():
            heads[1].fc.weight.mul_(2)
    else:
        heads[1].lm_head.weight = nn.Parameter(torch.zeros_like(heads[1].lm_head.weight), requires_grad=False)
    assert not stack.is_current()


def test_heads_of_one_kind_only_are_stacked():
    [head, alike], [other] = pool_of(2), pool_of(1, mapped=False)
    kinds = {kind_of(one) for one in (head, other, pool_of(1, torch.float32)[0])}
    assert len(kinds) == 3
    assert kind_of(head) == kind_of(alike)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_captures_go_from_request_to_request():
    """The caches of a capture are its own: a session is moved in, finds nothing of the last one, and captures nothing anew."""
    stack, cuda = HeadStack(pool_of(2)), FakeCuda()
    graphs, counts = CudaGraphs(cuda), []
    for seed in (0, 1, 0):
        tokens, features = text_of(40, torch.float64, seed)
        session = StackSession(stack, 1, graphs=graphs)
        session.score([0], [tokens[:20]], [features[:20]])
        session.score([0], [tokens[20:23]], [features[20:23]])
        session.begin_draft([0], [1], [tokens[:0]], [features[:0]])
        drafted = session.draft_next([0], tokens[30:31])
        reference = stack.heads[1].session()
        reference.consume(tokens[:23], features[:23], 1)
        torch.testing.assert_close(drafted[0], reference.step(tokens[30:31]), atol=1e-12, rtol=0)
        counts.append(cuda.captured)
    assert counts == [3, 3, 3]


@pytest.mark.usefixtures("as_on_a_gpu")
def test_no_value_on_the_device_decides_what_a_captured_pass_runs():
    graphs = CudaGraphs(FakeCuda())  # which raises where one did
    session = StackSession(HeadStack(pool_of(3)), 2, graphs=graphs)
    texts = [text_of(40, torch.float64, seed) for seed in range(2)]
    session.score([0, 1], *zip(*[(tokens[:9], features[:9]) for tokens, features in texts]))
    session.begin_draft([0, 1], [2, 0], *zip(*[(tokens[9:11], features[9:11]) for tokens, features in texts]))
    session.draft_next([0, 1], torch.tensor([1, 2]))
    assert session.graphs is graphs
    with pytest.raises(AssertionError), Watched():
        torch.ones(1).item()
