"""No-regret drafter selection for speculative decoding.

>>> zoo = hedgespec.load_zoo()                                            # doctest: +SKIP
>>> decoder = hedgespec.Decoder(zoo.target, zoo.drafters)                 # doctest: +SKIP
>>> out = decoder.generate(zoo.tokenizer("SELECT", return_tensors="pt").input_ids, max_new_tokens=64)  # doctest: +SKIP

Names are imported when they are first used: `import hedgespec` alone loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hedgespec.utils.moved import redirect

if TYPE_CHECKING:  # what `_HOMES` says, for type checkers and editors
    from hedgespec import algorithm, drafters, errors, learners
    from hedgespec.config import DecodeConfig, Tree
    from hedgespec.decoder import DecodeOutput, Decoder
    from hedgespec.decoder.learner_state import load_learner_state, save_learner_state
    from hedgespec.drafters.checkpoints import load_drafter, save_drafter
    from hedgespec.integrations.transformers import accelerate, custom_generate, restore
    from hedgespec.ops.evaluate import evaluate, expected_accepted_length, multi_draft_acceptance
    from hedgespec.ops.verify import verify, verify_tree
    from hedgespec.selection.delay import DelayQueue
    from hedgespec.stats import DecodeStats
    from hedgespec.zoo import load_zoo

_HOMES = {
    "Decoder": "hedgespec.decoder",
    "DecodeOutput": "hedgespec.decoder",
    "accelerate": "hedgespec.integrations.transformers",
    "custom_generate": "hedgespec.integrations.transformers",
    "restore": "hedgespec.integrations.transformers",
    "DecodeConfig": "hedgespec.config",
    "Tree": "hedgespec.config",
    "DecodeStats": "hedgespec.stats",
    "DelayQueue": "hedgespec.selection.delay",
    "evaluate": "hedgespec.ops.evaluate",
    "expected_accepted_length": "hedgespec.ops.evaluate",
    "multi_draft_acceptance": "hedgespec.ops.evaluate",
    "verify": "hedgespec.ops.verify",
    "verify_tree": "hedgespec.ops.verify",
    "load_drafter": "hedgespec.drafters.checkpoints",
    "load_learner_state": "hedgespec.decoder.learner_state",
    "load_zoo": "hedgespec.zoo",
    "save_drafter": "hedgespec.drafters.checkpoints",
    "save_learner_state": "hedgespec.decoder.learner_state",
}
_MODULES = ("algorithm", "drafters", "errors", "learners")

__version__ = "0.1.0"
__all__ = [
    "DecodeConfig",
    "DecodeOutput",
    "DecodeStats",
    "Decoder",
    "DelayQueue",
    "Tree",
    "__version__",
    "accelerate",
    "algorithm",
    "custom_generate",
    "drafters",
    "errors",
    "evaluate",
    "expected_accepted_length",
    "learners",
    "load_drafter",
    "load_learner_state",
    "load_zoo",
    "multi_draft_acceptance",
    "restore",
    "save_drafter",
    "save_learner_state",
    "verify",
    "verify_tree",
]

redirect()


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"hedgespec.{name}")
    else:
        raise AttributeError(f"module 'hedgespec' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
