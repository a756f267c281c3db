"""Shared by the tests: seeds, the backends an operation has here, tolerances, outputs that show what nobody wrote."""

from __future__ import annotations

import importlib
import os

import numpy as np
import pytest
import torch

from hedgespec import backends

# Largest absolute error of a probability, against float64 on the same (already rounded) logits. Half types are computed
# in float32, hence share its tolerance.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 5e-6, torch.float16: 5e-6}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`backend` in a test of tests/test_OPERATION.py runs it on every backend registered for OPERATION."""
    if "backend" not in metafunc.fixturenames:
        return
    operation = metafunc.module.__name__.rpartition(".")[2].removeprefix("test_")
    importlib.import_module(f"hedgespec.{operation}")
    registered = backends.report()["operations"][operation]
    metafunc.parametrize(
        "backend",
        [
            pytest.param(name, marks=() if state == "available" else pytest.mark.skip(reason=f"{name} is {state}"))
            for name, state in registered.items()
        ],
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def seeds() -> None:
    """The same random numbers for every test, whatever ran before it."""
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(scope="session", autouse=True)
def threads() -> None:
    """Small tensors: more threads than cores would only wait for each other."""
    torch.set_num_threads(min(torch.get_num_threads(), os.cpu_count() or 1))


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty hands out NaN, so that an output element nobody writes is seen."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
