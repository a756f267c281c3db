"""Transfers and side streams: on the CPU nothing waits, and on a GPU, of which a fake is used here, the order is right."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch

from hedgespec.transfer import SideStream, to_device

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
