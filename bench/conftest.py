"""What the benchmarks share."""

from __future__ import annotations

import time

import pytest


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
