"""Transfers and side streams: on the CPU nothing waits, and on a GPU, of which a fake is used here, the order is right."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hedgespec import device as transfer
from hedgespec.device import Kept, SideStream, to_device
from hedgespec.ops.checks import check_map

CPU = torch.device("cpu")


@pytest.mark.parametrize("values", [[1, 2], np.array([0.5, 0.25]), torch.tensor([3])])
def test_numbers_stay_where_they_are_on_a_cpu(values):
    moved = to_device(values, CPU)
    assert moved.tolist() == list(values)
    if isinstance(values, torch.Tensor):
        assert moved is values


def test_work_on_a_cpu_is_done_at_once():
    side = SideStream(CPU)
    with side.work(torch.ones(2), None):
        made = torch.ones(2) * 3
    assert side.to_host(made)().tolist() == [3.0, 3.0]


def test_a_gpus_side_stream_comes_after_its_inputs_and_is_waited_for_by_who_asks(monkeypatch):
    log = []

    class Stream:
        device = "device"

        def __init__(self, device):
            log.append(("made for", str(device)))

        def wait_stream(self, other):
            log.append(("waits for", other))

    class Event:
        def record(self):
            log.append("recorded")

        def synchronize(self):
            log.append("waited")

    @contextmanager
    def stream(one):
        log.append("in")
        yield
        log.append("out")

    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "current")
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory, **options: empty(*shape, **options))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, one: log.append("kept"))

    side = SideStream(torch.device("cuda"))
    with side.work(torch.ones(1), None):
        log.append("launched")
    bring = side.to_host(torch.tensor([7.0]))
    assert log == [("made for", "cuda"), ("waits for", "current"), "kept", "in", "launched", "out", "in", "recorded", "out"]
    assert bring().tolist() == [7.0]
    assert log[-1] == "waited"


class FakeStream:
    """A queue of work, which is done when somebody waits for it."""

    def __init__(self):
        self.queue = []

    def synchronize(self):
        while self.queue:
            self.queue.pop(0)()


class Queued(TorchDispatchMode):
    """Copies go to the current stream's queue, as on a GPU, and leave -1 until then; reading a number waits for that stream."""

    def __init__(self, streams):
        super().__init__()
        self.streams = streams

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        current = self.streams["current"]
        if function is torch.ops.aten._local_scalar_dense.default:
            current.synchronize()
        result = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten._to_copy.default, torch.ops.aten.clone.default):
            right = result.clone()
            result.fill_(-1)
            current.queue.append(lambda: result.copy_(right))
        return result


@pytest.fixture
def streams(monkeypatch):
    """A device with streams, which the CPU is made into; "current" may be changed. "lent" lists what record_stream got."""
    state = {"current": FakeStream(), "lent": []}
    monkeypatch.setattr(transfer, "current_stream", lambda device: state["current"])
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: state["lent"].append((self.data_ptr(), stream)))
    return state


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_a_map_that_one_stream_made_narrow_may_be_read_by_another(streams, dtype):
    """The scoring's stream makes the copy, and verification on the main one reads it, which never waits for the former."""
    ids, side, main = torch.tensor([4, 1, 3], dtype=dtype), streams["current"], FakeStream()
    with Queued(streams):
        check_map("ids", ids, (3,), CPU, 5, distinct=True)
        streams["current"] = main
        narrow = check_map("ids", ids, (3,), CPU, 5, distinct=True)
    assert narrow.tolist() == [4, 1, 3]
    assert narrow.dtype is torch.int32
    assert streams["lent"] == [(narrow.data_ptr(), main)]
    streams["current"] = side
    assert check_map("ids", ids, (3,), CPU, 5, distinct=True) is narrow
    assert len(streams["lent"]) == 1  # whoever made it needs no note


def test_the_fake_device_shows_a_copy_that_nobody_waited_for(streams):
    with Queued(streams):
        narrow = torch.tensor([4, 1, 3]).to(torch.int32)
    assert narrow.tolist() == [-1, -1, -1]


def test_a_kept_tensor_on_a_cpu_is_the_tensor(monkeypatch):
    tensor = torch.ones(2)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: pytest.fail("a CPU has no streams"))
    assert Kept(tensor).get() is tensor


@pytest.mark.gpu
def test_a_map_is_right_on_every_stream_of_a_gpu():
    for _ in range(20):
        ids, side = torch.randperm(200_000, device="cuda"), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(10_000_000)
            check_map("ids", ids, ids.shape, ids.device, 200_000, distinct=False)
        assert torch.equal(check_map("ids", ids, ids.shape, ids.device, 200_000, distinct=False).long(), ids)
