"""Captured forwards: the same logits, hidden states and texts as the model as it is; when it captures, and what it refuses."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import re
import warnings

import pytest
import torch
from test_target import FAMILIES, NEW_TOKENS, ONE_BY_ONE, PROMPT, own_texts, padded_prompts, pool, texts_of, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from hedgespec import capture, target
from hedgespec.capture import CudaGraphs, NotCapturable
from hedgespec.compat import CACHE_NAME
from hedgespec.config import DecodeConfig
from hedgespec.decoder import Decoder
from hedgespec.linear import few_row_view
from hedgespec.target import Captures, TargetSession
from hedgespec.tree import ancestry

ROUND = 6
"""T: five drafts and one token more."""
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-4}


@pytest.fixture(autouse=True)
def compilations(request, monkeypatch) -> list:
    """Traced graphs, run as they are in place of inductor's code, which takes seconds to make, and counted."""
    found: list = []
    if "slow" in request.keywords:
        return found

    def count(graph):
        found.append(graph)
        return graph

    monkeypatch.setattr(capture, "compiled", count)
    return found


class Pair:
    """A session that captures beside one that does not: the same calls, and the same logits, states and keys."""

    def __init__(self, model, batch: int, captures: Captures, aux_layers: tuple[int, ...] = (0, 2)):
        self.sessions = [TargetSession(few_row_view(model), [aux_layers], batch)]
        self.sessions.append(TargetSession(few_row_view(model), [aux_layers], batch, captures=captures))
        assert self.sessions[1].captured is not None
        self.tolerance, self.random = TOLERANCE[model.dtype], torch.Generator().manual_seed(2)

    def read(self, *keep: int, count: int, parents: torch.Tensor | None = None, paths=None) -> None:
        tokens = torch.randint(1, 61, (len(keep), count), generator=self.random)
        tree = None if parents is None else ancestry(parents, count)
        plain, captured = (session.forward(tokens, count, tree) for session in self.sessions)
        torch.testing.assert_close(captured, plain, atol=self.tolerance, rtol=0)
        for session in self.sessions:
            session.keep(keep, paths)

    def select(self, *rows: int) -> None:
        for session in self.sessions:
            session.select(rows)

    def check(self) -> None:
        """What stays after the rounds, and that the session captured to the end."""
        plain, captured = self.sessions
        assert captured.captured is not None
        assert captured.cache.lengths == plain.cache.lengths
        for row, features in enumerate(plain.features):
            for layers, rows in features.items():
                torch.testing.assert_close(captured.features[row][layers][:], rows[:], atol=10 * self.tolerance, rtol=0)
            for ours, theirs in zip(captured.cache.row(row), plain.cache.row(row), strict=True):
                torch.testing.assert_close(ours, theirs, atol=10 * self.tolerance, rtol=0)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ONE_BY_ONE])
@torch.no_grad()
def test_a_captured_forward_is_the_plain_one(family):
    pair = Pair(tiny(family), 3, Captures(ROUND))
    pair.read(9, 4, 1, count=9)
    pair.read(6, 1, 0, count=6)
    pair.read(2, 2, 1, count=3)  # shorter drafts are filled up
    pair.select(2, 0)
    pair.read(1, 5, count=6)
    pair.read(1, 1, count=1)
    pair.check()


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Mistral", "Gemma3Text"])
@torch.no_grad()
def test_a_captured_forward_is_the_plain_one_in_float64(family):
    pair = Pair(tiny(family).double(), 2, Captures(ROUND))
    pair.read(8, 3, count=8)
    pair.read(6, 2, count=6)
    pair.read(1, 4, count=6)
    pair.check()


def read_trees(pair: Pair) -> None:
    """Ragged rows of two trees each, a smaller one filled up, and a chain between them."""
    pair.read(8, 3, count=8)
    pair.read(3, 2, count=6, parents=torch.tensor([[-1, -1, 0, 1, 2], [-1, 0, 0, -1, 2]]), paths=[[0, 2, 4], [0, 4]])
    pair.read(1, 4, count=5)
    pair.read(2, 3, count=4, parents=torch.tensor([[-1, -1, 1], [-1, 0, 0]]), paths=[[0, 2], [0, 1, 3]])
    pair.check()


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma3Text"])
@torch.no_grad()
def test_a_captured_tree_is_the_plain_one(family, compilations):
    read_trees(Pair(tiny(family).double(), 2, Captures(ROUND)))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Llama", "Gemma3Text"])
@torch.no_grad()
def test_inductors_code_is_the_plain_forward(family, monkeypatch, tmp_path):
    """And it is kept where the project keeps what is made once."""
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("HEDGESPEC_CACHE", str(tmp_path))
    captures = Captures(ROUND)
    pair = Pair(tiny(family), 2, captures)
    pair.read(8, 3, count=8)
    pair.read(6, 2, count=6)
    pair.read(1, 4, count=6)
    pair.check()
    assert len(captures.compilations) == 1
    assert list((tmp_path / "inductor" / "fxgraph").rglob("*"))


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Mistral", "Gemma3Text"])
def test_texts_are_the_models_own(family):
    model = tiny(family)
    ids, mask = (one[:2] for one in padded_prompts())
    decoder = Decoder(model, pool(model), DecodeConfig(draft_length=3, compile=True))
    for _ in range(2):  # the second request finds what the first one captured
        out = decoder.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, seed=0)
        assert [row[PROMPT:].tolist() for row in out.sequences] == own_texts(model, ids, mask)


# --- when it captures -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_it_compiles_once_a_shape_and_for_all_layers(compilations):
    captures, model = Captures(ROUND), tiny("Llama")
    for _ in range(3):
        pair = Pair(model, 2, captures)
        pair.read(8, 3, count=8)
        for _ in range(3):
            pair.read(6, 2, count=6)
        pair.check()
        del pair
        gc.collect()
    assert len(compilations) == 1  # three layers, three requests, nine rounds
    pair = Pair(model, 2, captures)
    pair.read(250, 100, count=250)
    pair.read(3, 3, count=6)
    pair.read(6, 6, count=6)  # needs 259 slots
    assert len(compilations) == 2
    pair.select(1)
    pair.read(2, count=6)
    assert len(compilations) == 3
    pair.check()


@torch.no_grad()
def test_sessions_side_by_side_do_not_share_a_view(compilations):
    captures, model = Captures(ROUND), tiny("Llama")
    pairs = [Pair(model, 1, captures) for _ in range(2)]
    for _ in range(2):
        for number, pair in enumerate(pairs):
            pair.read(5 - number, count=6)
    for pair in pairs:
        pair.check()
    assert pairs[0].sessions[1].model is not pairs[1].sessions[1].model
    assert len(compilations) == 1


@torch.no_grad()
def test_changed_weights_are_seen():
    captures, model = Captures(ROUND), tiny("Llama")
    for change in (
        lambda: None,
        lambda: model.model.layers[1].mlp.up_proj.weight.mul_(1.1),  # in place
        lambda: setattr(model.model.layers[0].mlp, "up_proj", copy.deepcopy(model.model.layers[2].mlp.up_proj)),
    ):
        change()
        pair = Pair(model, 1, captures)
        pair.read(7, count=7)
        pair.read(3, count=6)
        pair.check()


@torch.no_grad()
def test_a_cache_that_is_taken_over():
    model, [text] = tiny("Gemma3Text"), texts_of(20)
    past = DynamicCache(config=model.config)
    model(text[None], **{CACHE_NAME: past}, use_cache=True)
    pair = Pair(model, 1, Captures(ROUND))
    for session in pair.sessions:
        session.cache.load(past, [0], [0], [20])
    pair.read(2, count=4)
    pair.read(6, count=6)
    pair.check()


@torch.no_grad()
def test_past_the_models_positions_it_runs_as_it_is():
    """A filled-up round would ask GPT-2's table for positions that it does not have."""
    model = tiny("GPT2")
    pair = Pair(model, 1, Captures(ROUND))
    pair.read(505, count=505)
    pair.read(2, count=2)  # the last round that fits
    pair.read(2, count=2)
    assert pair.sessions[1].cache.lengths == [509]
    pair.check()


@torch.no_grad()
def test_buffers_do_not_grow_over_ten_thousand_rounds():
    captures, model = Captures(ROUND), tiny("Llama")
    session = TargetSession(few_row_view(model), [], 2, captures=captures)
    session.forward(torch.ones(2, 9, dtype=torch.int64), 1)
    session.keep([9, 4])
    tokens = torch.ones(2, ROUND, dtype=torch.int64)
    session.forward(tokens, ROUND)
    # The forward itself is replaced: what may grow is what the session and its cache keep from round to round.
    logits = torch.zeros(2, ROUND, 61)
    session._read = lambda *_: [logits]
    before = [layer.keys.data_ptr() for layer in session.cache.layers]
    for number in range(10_000):
        session.forward(tokens, ROUND)
        session.keep([number % 7, 3])
        session.cache.lengths[:] = [9 + number % 230, 4]  # rolled back
    assert session.cache.capacity == 256
    assert before == [layer.keys.data_ptr() for layer in session.cache.layers]
    assert len(captures.compilations) == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
@torch.no_grad()
def test_a_copy_begins_anew(copied):
    captures = Captures(ROUND)
    pair = Pair(tiny("Llama"), 1, captures)
    pair.read(4, count=4)
    pair.read(4, count=6)
    assert len(captures.compilations) == 1
    assert copied(captures).compilations == {} and copied(captures).count == ROUND


# --- what is refused ------------------------------------------------------------------------------------------------


def hooked(model):
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)


def wrapped(model):
    model.model.layers[1].forward = model.model.layers[1].forward


def decides_by_values(model):
    layer = model.model.layers[1].mlp
    forward = type(layer).forward

    class Deciding(type(layer)):
        def forward(self, x):
            return forward(self, x) if x.sum() > 0 else forward(self, x) + 0

    layer.__class__ = Deciding


def reads_a_stranger(model):
    layer, stranger = model.model.layers[1].mlp, torch.zeros(1, 1, 32)
    forward = type(layer).forward

    class Reading(type(layer)):
        def forward(self, x):
            return forward(self, x + stranger)

    layer.__class__ = Reading


def has_no_layers(model):
    model.config.num_hidden_layers = 2


REFUSED = {
    hooked: "has a forward hook",
    wrapped: "has its forward wrapped",
    decides_by_values: "cannot be compiled|decide by values",
    reads_a_stranger: "neither argument nor weight",
    has_no_layers: "expected a list of 2 decoder layers",
}


@pytest.mark.parametrize("spoil", REFUSED)
def test_what_cannot_be_captured_runs_as_it_is(spoil):
    model = tiny("Llama")
    ids, mask = (one[:1] for one in padded_prompts())
    drafters = pool(model)
    spoil(model)
    texts = own_texts(model, ids, mask)
    decoder = Decoder(model, drafters, DecodeConfig(draft_length=3, compile=True))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            out = decoder.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, seed=0)
            assert [row[PROMPT:].tolist() for row in out.sequences] == texts
    [message] = [str(one.message) for one in caught if "not compiled" in str(one.message)]  # said once
    assert re.search(REFUSED[spoil], message)


@pytest.mark.parametrize("family", sorted(ONE_BY_ONE))
def test_targets_without_positions_run_as_they_are(family):
    model = tiny(family)
    with pytest.warns(UserWarning, match="not compiled: it takes no positions"):
        assert TargetSession(model, [], 1, captures=Captures(ROUND)).captured is None


def test_nothing_is_captured_unless_asked_for(compilations):
    model = tiny("Llama")
    decoder = Decoder(model, pool(model))
    decoder.generate(torch.ones(1, 5, dtype=torch.int64), max_new_tokens=8)
    assert decoder.captures is None and not compilations
    decoder = Decoder(model, pool(model), DecodeConfig(compile=True))
    decoder.generate(torch.ones(1, 5, dtype=torch.int64), max_new_tokens=8)
    assert len(compilations) == len(decoder.captures.compilations) == 1


# --- CUDA graphs, without a GPU -------------------------------------------------------------------------------------


class Watched(TorchDispatchMode):
    """Raises where a captured forward would wait for the device, or take its shapes from values."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert torch.Tag.data_dependent_output not in operation.tags, operation
        assert operation not in (torch.ops.aten.nonzero.default, torch.ops.aten.masked_select.default), operation
        return operation(*args, **kwargs or {})


class FakeCuda:
    """As much of `torch.cuda` as a capture takes: a graph runs its function again, on the tensors it was captured with."""

    def __init__(self):
        self.captured, self.replayed, self.pools, self.log = 0, 0, [], []

    def Stream(self):
        return self

    def current_stream(self):
        return self

    def wait_stream(self, _):
        self.log.append("wait")

    def stream(self, _):
        self.log.append("warm up")
        return contextlib.nullcontext()

    def CUDAGraph(self):
        return _FakeGraph(self)

    def device(self, _):
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        self.pools.append(pool)
        with _Recorder(graph):
            yield
        self.captured += 1


class _FakeGraph:
    def __init__(self, cuda):
        self.cuda, self.calls = cuda, []

    def pool(self):
        return "the pool"

    def replay(self):
        self.cuda.replayed += 1
        for operation, args, kwargs, results in self.calls:
            for old, new in zip(_tensors(results), _tensors(operation(*args, **kwargs)), strict=True):
                if old is not new and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class _Recorder(Watched):
    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        results = super().__torch_dispatch__(operation, types, args, kwargs)
        self.graph.calls.append((operation, args, kwargs or {}, results))
        return results


def _tensors(results) -> list[torch.Tensor]:
    return [one for one in torch.utils._pytree.tree_leaves(results) if isinstance(one, torch.Tensor)]


class OnDevice(TorchDispatchMode):
    """Raises where a result is not on the meta device: it would have to be copied there, which a capture does not allow."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        results = operation(*args, **kwargs or {})
        assert all(one.is_meta for one in _tensors(results)), operation
        return results


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma3Text", "GPT2"])
@torch.no_grad()
def test_a_forward_of_fixed_shapes_asks_the_device_for_nothing(family):
    """Tensors on the meta device have shapes and no values: whoever reads one, or waits for one, fails."""
    model = tiny(family)
    session = TargetSession(model, [(0, 2)], 2)
    session.forward(torch.ones(2, 5, dtype=torch.int64), 1)
    session.keep([5, 3])
    session.model = copy.deepcopy(model).to("meta")
    for layer in session.cache.layers:
        layer.keys, layer.values = layer.keys.to("meta"), layer.values.to("meta")
    tokens, rows = torch.ones(2, ROUND, dtype=torch.int64, device="meta"), torch.ones(1, 2, dtype=torch.int64, device="meta")
    lines = torch.ones(2, ROUND, ROUND, dtype=torch.bool, device="meta")
    for tree in ((), (tokens, lines)):
        with OnDevice():
            logits, states = session._read(tokens, rows, *tree)
        assert logits.shape == (2, ROUND, 61) and states.shape == (2, ROUND, 64)


def test_a_graph_is_captured_once_a_key_and_replayed():
    cuda, calls = FakeCuda(), []
    graphs, offset = CudaGraphs(cuda), torch.zeros(1)

    def function(x, y):
        calls.append(x)
        return [x * 2 + y + offset]

    ones = torch.ones(3)
    [first] = graphs("three", function, ones, ones)
    assert first.tolist() == [3.0] * 3
    assert len(calls) == capture.WARM_UPS + 1 and cuda.captured == cuda.replayed == 1
    offset += 10  # what a graph reads is read where it lies, anew in every replay
    [second] = graphs("three", function, ones * 2, ones)
    assert second is first and first.tolist() == [15.0] * 3
    assert len(calls) == capture.WARM_UPS + 1 and cuda.captured == 1 and cuda.replayed == 2
    assert all(x is not ones for x in calls)  # inputs are copied into the graph's own
    [other] = graphs("four", function, torch.ones(4), torch.ones(4))
    assert other.shape == (4,) and cuda.captured == 2
    assert cuda.pools == [None, "the pool"]
    assert cuda.log == ["wait", "warm up", "wait"] * 2


def test_the_graph_that_waited_longest_makes_room(monkeypatch):
    monkeypatch.setattr(capture, "MOST_GRAPHS", 2)
    cuda = FakeCuda()
    graphs = CudaGraphs(cuda)
    for key in "abac":
        graphs(key, lambda x: [x + 1], torch.ones(2))
    assert cuda.captured == 3
    assert "a" in graphs and "c" in graphs and "b" not in graphs


def test_a_function_that_is_no_graph_is_refused():
    def function(x):
        if cuda.pools:  # when it is captured
            raise RuntimeError("operation not permitted when stream is capturing")
        return [x]

    cuda = FakeCuda()
    with pytest.raises(NotCapturable, match="no CUDA graph: operation not permitted"):
        CudaGraphs(cuda)("key", function, torch.ones(1))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Sessions capture whole forwards, in the graphs of a fake device."""
    cuda, made = FakeCuda(), capture.CudaGraphs
    monkeypatch.setattr(capture, "CudaGraphs", lambda: made(cuda))
    monkeypatch.setattr(target, "captures_graphs", lambda model: True)
    return cuda


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma3Text", "GPT2"])
@torch.no_grad()
def test_whole_forwards_in_graphs(family, as_on_a_gpu):
    captures, model = Captures(ROUND), tiny(family)
    for _ in range(2):
        pair = Pair(model, 2, captures)
        pair.read(245, 4, count=245)
        pair.read(5, 1, count=6)
        pair.read(2, 2, count=3)
        pair.read(6, 0, count=6)
        pair.read(1, 5, count=6)  # the next 256 slots
        pair.select(1)
        pair.read(3, count=6)
        pair.check()
        del pair
        gc.collect()
        assert as_on_a_gpu.captured == 3  # by rows and slots: (2, 256), (2, 512), (1, 512)
    assert as_on_a_gpu.replayed == 10


@torch.no_grad()
def test_trees_in_graphs(as_on_a_gpu):
    read_trees(Pair(tiny("Mistral"), 2, Captures(ROUND)))
    assert (as_on_a_gpu.captured, as_on_a_gpu.replayed) == (2, 3)  # of a tree and of a chain


@torch.no_grad()
def test_nothing_of_an_earlier_request_is_left(as_on_a_gpu):
    captures, model = Captures(ROUND), tiny("Llama")
    session = TargetSession(few_row_view(model), [(0, 2)], 1, captures=captures)
    for count in (60, ROUND):
        session.forward(torch.ones(1, count, dtype=torch.int64), 1)
        session.keep([count])
    for layer in session.cache.layers:
        layer.keys.fill_(float("nan"))  # a request that went wrong
    del session, layer
    gc.collect()
    pair = Pair(model, 1, captures)
    pair.read(5, count=5)
    pair.read(4, count=6)
    pair.check()
    assert as_on_a_gpu.captured == 1
