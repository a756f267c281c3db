"""Old names of modules. They work for one release, with a DeprecationWarning."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "backends": "ops.backends",
    "checkpoints": "drafters.checkpoints",
    "costs": "selection.costs",
    "delay": "selection.delay",
    "engines": "integrations.vllm",
    "engines.vllm": "integrations.vllm.token_proposer",
    "engines.vllm_eagle": "integrations.vllm.eagle_proposer",
    "engines.vllm_worker": "integrations.vllm.worker",
    "hf": "integrations.transformers",
    "learner_state": "decoder.learner_state",
    "metrics": "stats",
    "prefill": "ops.head_layers",
    "sampling": "ops.sampling",
    "target": "runtime.target",
}
"""Old name -> new name, both below `hedgespec`: the modules that the documentation of 0.1 named. `hedgespec.evaluate` and
`hedgespec.verify`, once modules too, are the functions only."""


class _Redirect(MetaPathFinder, Loader):
    """Imports the new module under its old name."""

    def __init__(self) -> None:
        self._specs: dict[str, ModuleSpec | None] = {}

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        old = name.removeprefix("hedgespec.")
        return ModuleSpec(name, self, is_package=old == "engines") if name != old and old in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = f"hedgespec.{MOVED[spec.name.removeprefix('hedgespec.')]}"
        warnings.warn(f"{spec.name} is now {new}; the old name goes with the next release", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(new)
        self._specs[spec.name] = module.__spec__  # importlib overwrites it after this
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Restores the specification of the module, which was executed under its new name."""
        assert module.__spec__ is not None
        module.__spec__ = self._specs.pop(module.__spec__.name)


def redirect() -> None:
    """Makes the old names importable."""
    if not any(isinstance(finder, _Redirect) for finder in sys.meta_path):
        sys.meta_path.append(_Redirect())
