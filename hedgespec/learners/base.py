"""What every learner promises: weights on the simplex out, losses in [0, 1] in, a state that is plain numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from math import isfinite
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hedgespec.utils.scalars import integer, real, shown


class Learner(ABC):
    """`weights` says how to pick the next drafter, `update` learns from what a drafter, or every drafter, lost.

    A subclass is two pure formulas: `_learn` folds one loss into the state, `_weigh` reads the weights off the state.

    Args:
        num_drafters: N >= 1.
        prior: belief before the first loss, [N], non-negative, normalised here; None is uniform. Learners that
            multiply by it need every entry positive: a drafter at 0 could never win.

    Raises:
        TypeError: num_drafters or prior of another type.
        ValueError: num_drafters or prior outside its range.
    """

    name: ClassVar[str]
    """What `make` calls it."""
    feedback: ClassVar[Literal["full", "bandit", "none"]]
    """full: the loss of every drafter, as the delay queue completes it. bandit: the chosen drafter's alone, each round,
    1 - emitted / (draft_length + 1). none: nothing is learned."""
    hears_scores: ClassVar[bool] = False
    """Of a bandit whose loss is 1 - mean acceptance_prob of the chosen drafter over the tokens of the round, once scored."""
    needs_positive_prior: ClassVar[bool] = True
    OPTIONS: ClassVar[tuple[str, ...]] = ()
    """Constructor options past the prior, each an attribute; a state loads only where they are the same."""
    STATE: ClassVar[tuple[str, ...]] = ()
    """What learning changes: attributes, each float64 [N] or a count."""
    NON_NEGATIVE: ClassVar[tuple[str, ...]] = ("rounds",)
    """Those of them that are never below 0."""

    def __init__(self, num_drafters: int, prior: ArrayLike | None = None) -> None:
        num_drafters = integer("num_drafters", num_drafters, 1)
        self.num_drafters = num_drafters
        self.prior = self._read_prior(np.ones(num_drafters) if prior is None else prior)
        for field in self.STATE:
            setattr(self, field, 0 if field == "rounds" else np.zeros(num_drafters))
        self._weights = self._weigh()

    @abstractmethod
    def _weigh(self) -> NDArray[np.float64]:
        """A new array of weights, [N], from the state alone."""

    @abstractmethod
    def _learn(self, losses: NDArray[np.float64], chosen: int | None, chosen_weight: float | None) -> None:
        """Fold one validated loss into the state; `self._weights` still holds the weights before it."""

    def weights(self) -> NDArray[np.float64]:
        """Probability of each drafter for the next round, float64 [N], non-negative, sum 1. The caller's to keep."""
        return self._weights.copy()

    def update(self, losses: ArrayLike, chosen: int | None = None, chosen_weight: float | None = None) -> None:
        """Learn from one loss vector.

        Args:
            losses: [N], in [0, 1]. A bandit reads `losses[chosen]` only; the other entries may be NaN. With full feedback some
                entries, not all, may be NaN: the regret to these drafters then does not change.
            chosen: drafter that drafted, 0..N-1; bandits need it.
            chosen_weight: probability with which it was drawn when it was drawn, in (0, 1]; a bandit divides by it.
                Defaults to `weights()[chosen]`, right only where nothing was learned since the draw.

        Raises:
            ValueError: a shape or range differs from the above.
        """
        losses = np.asarray(losses, dtype=np.float64)
        if losses.shape != (self.num_drafters,):
            raise ValueError(f"losses: expected shape ({self.num_drafters},), got {losses.shape}")
        if self.feedback == "bandit":
            chosen, chosen_weight = self._read_choice(chosen, chosen_weight)
        if self.feedback != "none":
            seen = losses if chosen is None or self.feedback == "full" else losses[chosen : chosen + 1]
            # argmin stops at a NaN, which then compares false; on so few numbers it costs a fifth of min.
            if not (seen.item(seen.argmin()) >= 0 and seen.item(seen.argmax()) <= 1):
                known = seen[~np.isnan(seen)] if self.feedback == "full" else seen
                if not (len(known) and known.min() >= 0 and known.max() <= 1):
                    raise ValueError(f"losses: expected values in [0, 1], got {seen}")
                losses = np.where(np.isnan(losses), self.expected_loss(losses), losses)
        self._learn(losses, chosen, chosen_weight)
        self._weights = self._weigh()

    def expected_loss(self, losses: NDArray[np.float64]) -> float:
        """weights @ losses, [N]; where some are NaN, of the others, whose weights then count as all there is."""
        expected = float(self._weights.dot(losses))
        if expected == expected:  # no NaN among them
            return expected
        known = ~np.isnan(losses)
        weights = self._weights if self._weights[known].any() else self.prior
        # No division where the unknown weigh nothing: the sum is then what it would be if they were known, bit for bit.
        total = weights[known].sum() if weights[~known].any() else 1.0
        return float(weights.dot(np.where(known, losses, 0.0)) / total)

    def state_dict(self) -> dict[str, Any]:
        """Everything the next weights depend on, as JSON-able numbers; floats survive JSON bit for bit."""
        fields = ("name", "num_drafters", *self.OPTIONS, "prior", *self.STATE)
        values = {field: getattr(self, field) for field in fields}
        return {field: v.tolist() if isinstance(v, np.ndarray) else v for field, v in values.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken; on an error this learner is left as it was.

        Raises:
            ValueError: the state is another learner's, of another size or other options, or not finite numbers within their
                range.
        """
        identity = ("name", "num_drafters", *self.OPTIONS)
        for field in identity:
            if field in state and state[field] != (expected := getattr(self, field)):
                raise ValueError(f"state: expected {field} {expected!r}, got {state[field]!r}")
        if missing := {*identity, "prior", *self.STATE} - state.keys():
            raise ValueError(f"state: {sorted(missing)} missing, got {sorted(state)}")
        loaded: dict[str, NDArray[np.float64] | int] = {"prior": self._read_prior(_numbers(state, "prior"))}
        for field in self.STATE:
            shape, value = np.shape(getattr(self, field)), _numbers(state, field)
            if value.shape != shape or not np.isfinite(value).all():
                raise ValueError(f"state: expected {field} finite, of shape {shape}, got {state[field]!r}")
            if not shape and value % 1:
                raise ValueError(f"state: expected {field} a count, got {state[field]!r}")
            if field in self.NON_NEGATIVE and value.min() < 0:
                raise ValueError(f"state: expected {field} of at least 0, got {state[field]!r}")
            loaded[field] = value if shape else int(value)
        vars(self).update(loaded)
        self._weights = self._weigh()

    def _read_prior(self, prior: ArrayLike) -> NDArray[np.float64]:
        try:
            found = np.array(prior)
        except (TypeError, ValueError) as error:  # lists of unequal length, or what has no numbers
            raise TypeError(f"prior: expected {self.num_drafters} numbers or None, got {shown(prior)}") from error
        if found.dtype.kind not in "iuf" and found.size:
            raise TypeError(f"prior: expected {self.num_drafters} numbers or None, got {shown(prior)}")
        prior = found.astype(np.float64)
        if prior.shape != (self.num_drafters,):
            raise ValueError(f"prior: expected shape ({self.num_drafters},), got {prior.shape}")
        total = float(prior.sum())
        if not (prior.min() >= 0 and total > 0 and isfinite(total)):
            raise ValueError(f"prior: expected finite non-negative values with a positive sum, got {prior}")
        if abs(total - 1) > 1e-12:  # one that is normalised keeps its bits, so that a saved state loads unchanged
            prior /= total
        if self.needs_positive_prior and not prior.all():
            raise ValueError(f"prior: expected every entry positive for {self.name}, got {prior}")
        return prior

    def _read_choice(self, chosen: int | None, chosen_weight: float | None) -> tuple[int, float]:
        if chosen is None:
            raise ValueError(f"chosen: expected a drafter in 0..{self.num_drafters - 1} for {self.name}, got {chosen}")
        chosen = integer("chosen", chosen, 0, self.num_drafters - 1)
        if chosen_weight is None:
            chosen_weight = float(self._weights[chosen])
        chosen_weight = real("chosen_weight", chosen_weight)
        if not 0 < chosen_weight <= 1:
            raise ValueError(f"chosen_weight: expected a probability in (0, 1], got {chosen_weight}")
        return chosen, chosen_weight


def _numbers(state: Mapping[str, Any], field: str) -> NDArray[np.float64]:
    """A field as float64, where it is made of numbers and nothing else: NumPy would read some words as numbers, too."""
    try:
        values = np.array(state[field])
    except ValueError as error:  # lists of unequal length
        raise ValueError(f"state: expected {field} as numbers, got {state[field]!r}") from error
    if values.dtype.kind not in "iuf":
        raise ValueError(f"state: expected {field} as numbers, got {state[field]!r}")
    return values.astype(np.float64)


def softmax(log_weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """exp(log_weights) / sum(exp(log_weights)), [N] -> [N]; shifted by the largest, so exp cannot overflow."""
    weights = np.exp(log_weights - log_weights.max())
    return weights / weights.sum()
