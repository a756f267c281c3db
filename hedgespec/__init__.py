"""No-regret drafter selection for speculative decoding.

>>> zoo = hedgespec.load_zoo()                                            # doctest: +SKIP
>>> decoder = hedgespec.Decoder(zoo.target, zoo.drafters)                 # doctest: +SKIP
>>> out = decoder.generate(zoo.tokenizer("SELECT", return_tensors="pt").input_ids, max_new_tokens=64)  # doctest: +SKIP

Names are imported when they are first used: `import hedgespec` alone loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

_HOMES = {
    "Decoder": "hedgespec.decoder",
    "DecodeOutput": "hedgespec.decoder",
    "accelerate": "hedgespec.hf",
    "custom_generate": "hedgespec.hf",
    "restore": "hedgespec.hf",
    "DecodeConfig": "hedgespec.config",
    "Tree": "hedgespec.config",
    "DecodeStats": "hedgespec.metrics",
    "DelayQueue": "hedgespec.delay",
    "evaluate": "hedgespec.evaluate",
    "expected_accepted_length": "hedgespec.evaluate",
    "multi_draft_acceptance": "hedgespec.evaluate",
    "verify": "hedgespec.verify",
    "verify_tree": "hedgespec.verify",
    "load_drafter": "hedgespec.checkpoints",
    "load_learner_state": "hedgespec.learner_state",
    "load_zoo": "hedgespec.zoo",
    "save_drafter": "hedgespec.checkpoints",
    "save_learner_state": "hedgespec.learner_state",
}
_MODULES = ("algorithm", "drafters", "errors", "learners")

__version__ = "0.1.0"
__all__ = [*_HOMES, *_MODULES, "__version__"]


def __getattr__(name: str):
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"hedgespec.{name}")
    else:
        raise AttributeError(f"module 'hedgespec' has no attribute {name!r}")
    globals()[name] = value
    return value


class _Package(ModuleType):
    """The package, whose `evaluate` and `verify` are the functions and not the modules that they live in."""

    def __setattr__(self, name: str, value: object) -> None:
        # Python binds a submodule to its package once it is loaded, whoever loads it.
        if isinstance(value, ModuleType) and _HOMES.get(name) == value.__name__:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
