"""A device that records and repeats what is captured, on the CPU."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hedgespec.ops.head_layers import stack_linear


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


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Products of rows that choose their head as the reference has them off the CPU, where nobody may look at the choice."""

    def product(x, weight, which=None, *, index=None):
        if which is None or index is not None:
            return stack_linear(x, weight, which, index=index, backend="reference")
        return torch.bmm(weight[which], x[:, :, None])[:, :, 0]

    monkeypatch.setattr("hedgespec.drafters.stack_weights.stack_linear", product)
    monkeypatch.setattr("hedgespec.ops.head_layers.check_ids", lambda *_: None)
