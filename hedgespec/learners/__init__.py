"""The learners, one algorithm a file, and `make`, which builds one by name."""

from __future__ import annotations

from typing import Any

from numpy.typing import ArrayLike

from hedgespec.learners.ada_normal_hedge import AdaNormalHedge
from hedgespec.learners.base import Learner
from hedgespec.learners.exp3 import EXP3Spec
from hedgespec.learners.fixed import FixedLearner, Uniform
from hedgespec.learners.hedge import Hedge
from hedgespec.learners.meta_sd import MetaSD
from hedgespec.learners.normal_hedge import NormalHedge
from hedgespec.learners.ucb import UCBSpec
from hedgespec.utils.scalars import text

_LEARNERS: dict[str, type[Learner]] = {
    learner.name: learner for learner in (NormalHedge, Hedge, AdaNormalHedge, UCBSpec, MetaSD, EXP3Spec, FixedLearner, Uniform)
}

NAMES = tuple(_LEARNERS)
"""Names that `make` takes."""

__all__ = [
    "NAMES",
    "AdaNormalHedge",
    "EXP3Spec",
    "FixedLearner",
    "Hedge",
    "Learner",
    "MetaSD",
    "NormalHedge",
    "UCBSpec",
    "Uniform",
    "make",
    "register",
]


def register(learner: type[Learner]) -> None:
    """Makes a learner known by its `name`, for `make`, `DecodeConfig.learner` and the command line.

    Args:
        learner: a subclass of `Learner`.

    Raises:
        TypeError: something else than a subclass of `Learner`.
        ValueError: a name that another learner has.
    """
    global NAMES
    if not (isinstance(learner, type) and issubclass(learner, Learner)):
        raise TypeError(f"learner: expected a subclass of Learner, got {learner!r}")
    if _LEARNERS.get(learner.name, learner) is not learner:
        raise ValueError(f"learner: expected a name that is not taken, got {learner.name!r}")
    _LEARNERS[learner.name] = learner
    NAMES = tuple(_LEARNERS)


def make(name: str, num_drafters: int, prior: ArrayLike | None = None, **options: Any) -> Learner:
    """A fresh learner.

    Args:
        name: one of `NAMES`.
        num_drafters: N >= 1.
        prior: belief before the first loss, [N], non-negative, normalised here; None is uniform.
        options: the learner's own: `eta` for hedge, `drafter` for fixed.

    Raises:
        ValueError: an unknown name, or a value outside its range.
        TypeError: an option this learner does not have, or a value of another type.

    >>> make("normal_hedge", 2, prior=[3, 1]).weights().tolist()
    [0.75, 0.25]
    """
    if text("name", name) not in _LEARNERS:
        raise ValueError(f"name: expected one of {NAMES}, got {name!r}")
    learner = _LEARNERS[name]
    if unknown := sorted(options.keys() - set(learner.OPTIONS)):
        raise TypeError(f"options: {name} takes {learner.OPTIONS or 'none'}, got {unknown}")
    return learner(num_drafters, prior, **options)
