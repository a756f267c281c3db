"""Shared by the tests that need vLLM: where it is missing, none of them is collected. `make test-vllm` runs them."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
SOURCE = "HEDGESPEC_VLLM_SOURCE"
"""Names the folder of another vLLM, whose source `test_contract.py` then reads."""

_spec = importlib.util.find_spec("vllm")
HAS_VLLM = _spec is not None and _spec.origin is not None
"""Without an origin it is this very folder, found as a package without code."""

collect_ignore = ["record_calls.py", "eagle_engine.py", "mended_worker.py"]  # programs, or only for inside vLLM
if HAS_VLLM:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
else:
    readable = {"test_contract.py"} if SOURCE in os.environ else set()
    collect_ignore += {path.name for path in FOLDER.glob("test_*.py")} - readable


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.vllm)
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def target() -> Path:
    """The folder of the zoo's target."""
    from hedgespec.zoo.target import target_path

    return target_path()


@pytest.fixture(scope="session")
def write_pool(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a pool of these drafters into a file: the zoo's datastores and prompt lookup, if none are given."""
    from hedgespec.zoo import NAMES
    from hedgespec.zoo.stores import store_path

    def write(*drafters: dict, **fields: object) -> Path:
        stores = [{"type": "datastore", "name": name, "path": str(store_path(name))} for name in NAMES]
        path = tmp_path_factory.mktemp("pool") / "pool.json"
        path.write_text(json.dumps({"drafters": drafters or [*stores, {"type": "ngram", "name": "lookup"}]} | fields))
        return path

    return write
