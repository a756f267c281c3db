"""What differs between the supported releases of transformers, 5.16 to 5.24, decided here and nowhere else.

transformers 5.24 renames the key-value cache from `past_key_values` to `cache`: in the signatures of models, in what `generate`
passes to a custom decoding loop, and in what models and `generate` return. The old name still works there, with a warning.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import transformers
from packaging.version import Version
from transformers.modeling_outputs import CausalLMOutputWithPast

CACHE_NAMES = ("cache", "past_key_values")
"""Names of the cache, the newest first."""
CACHE_NAME = next(name for name in CACHE_NAMES if name in {field.name for field in fields(CausalLMOutputWithPast)})
"""The name that the installed transformers uses in outputs and in `generate`."""

VERSION = Version(transformers.__version__)
"""Of the installed transformers."""


def cache_argument(function: Callable) -> str | None:
    """Returns the keyword argument by which a model's forward takes its key-value cache.

    Args:
        function: a model's `forward`.

    Returns: "cache" or "past_key_values". If the signature has neither but takes any keyword (`**kwargs`), the name that the
        installed transformers uses. None if the function takes no cache.
    """
    parameters = inspect.signature(function).parameters
    for name in CACHE_NAMES:
        if name in parameters:
            return name
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    return CACHE_NAME if takes_any else None


def names_cache(function: Callable) -> bool:
    """Returns whether the signature of a model's forward names a key-value cache."""
    return not set(CACHE_NAMES).isdisjoint(inspect.signature(function).parameters)


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """Returns the cache among keyword arguments, by whichever name it has there; None if there is none."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


def is_callers_cache(cache: Any) -> bool:
    """Returns whether the cache that `generate` passes to a custom loop may be one that its caller holds, so that it must be
    filled. transformers 5.16 does not say which caches are: there the answer is always True."""
    return getattr(cache, "_is_user_defined", Version("5.17") > VERSION)
