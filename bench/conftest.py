"""What the benchmarks share: fair timing, and what a machine reads at most."""

from __future__ import annotations

import itertools
import time

import pytest
import torch

BEYOND_CACHE = 256 * 2**20
"""Bytes that no cache holds: a GPU's inputs cycle through as many."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the tensors of the kernel benchmarks lie: cpu or cuda")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture
def fastest():
    """Each call's fastest time in seconds, the calls taking turns so that what disturbs one disturbs all."""

    def measure(*calls, seconds: float = 1.0) -> list[float]:
        best = [float("inf")] * len(calls)
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            for i, call in enumerate(calls):
                start = time.perf_counter()
                call()
                best[i] = min(best[i], time.perf_counter() - start)
        return best

    return measure


@pytest.fixture
def fastest_on(device, fastest):
    """Like `fastest` for calls that take one of several equal sets of inputs: on a GPU the time of its work alone.

    On a GPU the calls of a turn are queued behind each other over enough sets to leave no cache warm, so that neither the
    host nor the caches have a part in the time.
    """

    def measure(inputs: list, *calls, seconds: float = 1.0) -> list[float]:
        if device.type == "cpu":
            return fastest(*(lambda call=call: call(inputs[0]) for call in calls), seconds=seconds)
        best = [float("inf")] * len(calls)
        until = time.perf_counter() + seconds
        for turn in itertools.count():
            if turn > 3 and time.perf_counter() > until:
                return best
            for i, call in enumerate(calls):
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                torch.cuda._sleep(20_000_000)  # the device waits until the host has queued everything
                start.record()
                for each in inputs:
                    call(each)
                end.record()
                end.synchronize()
                best[i] = min(best[i], start.elapsed_time(end) * 1e-3 / len(inputs))

    return measure


@pytest.fixture(scope="session")
def read_bandwidth(device) -> float:
    """Bytes a second that a GPU reads from its memory at best, by reductions of a large tensor."""
    large = torch.ones(2**30 // 4, device=device)
    best = float("inf")
    for reduce in (torch.sum, torch.amax):
        for _ in range(20):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            reduce(large)
            end.record()
            end.synchronize()
            best = min(best, start.elapsed_time(end) * 1e-3)
    return large.nbytes / best
