"""The learner of one request of an engine, and the sums over all requests. Numbers only, without models or engine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hedgespec.config import DecodeConfig
from hedgespec.records import NO_DRAFT, Choice
from hedgespec.selection.arms import Seconds
from hedgespec.selection.costs import Costs
from hedgespec.selection.selector import Selector, new_learner


class Tally:
    """Sums over all requests since the engine started, for N drafters.

    Args:
        drafters: N names.
    """

    def __init__(self, drafters: Sequence[str]) -> None:
        self.drafters = tuple(drafters)
        count = len(self.drafters)
        self.rounds = 0
        """Rounds with a draft that the engine verified."""
        self.picks = np.zeros(count, dtype=np.int64)
        """int64 [N]: such rounds, by drafter."""
        self.drafted = np.zeros(count, dtype=np.int64)
        """int64 [N]: drafted tokens, by drafter."""
        self.accepted = np.zeros(count, dtype=np.int64)
        """int64 [N]: accepted tokens, by drafter."""
        self.emitted = 0
        """Tokens emitted in all rounds, rounds without a draft included."""
        self.scored = np.zeros(count, dtype=np.int64)
        """int64 [N]: verified tokens on which each drafter was scored."""
        self.acceptance = np.zeros(count)
        """float64 [N]: sum of the scores: acceptance_prob, or, if only tokens are known, whether the drafter's token is the
        emitted one."""
        self.requests = 0
        """Number of ended requests."""
        self.regret = 0.0
        """Sum of the final regret of the ended requests: the learner's loss minus that of the request's best drafter."""
        self.failures: dict[str, str] = {}
        """Drafter -> first cause, of the drafters that were dropped from a request."""

    def line(self) -> str:
        """Returns a line for a log."""
        parts = [
            f"{name}: {picks} rounds, {100 * accepted / max(drafted, 1):.1f}% of {drafted} drafted tokens accepted, "
            f"acceptance {acceptance / max(scored, 1):.3f} on all text"
            for name, picks, drafted, accepted, scored, acceptance in zip(
                self.drafters, self.picks, self.drafted, self.accepted, self.scored, self.acceptance
            )
        ]
        return f"HedgeSpec: {self.requests} requests ended, regret {self.regret:.2f} in all; " + "; ".join(parts)

    def to_dict(self) -> dict:
        """Returns plain numbers, for JSON."""
        fields = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(self).items()}
        return fields | {"drafters": list(self.drafters)}


class RequestLearner:
    """Selection and learning of one request. Call `choose`, then, after the engine has verified the draft, `scored` if an
    evaluation is due, and `end_round`.

    Args:
        tally: the sums over all requests; its drafters are the pool.
        config: the pool's configuration.
        random: draws drafters; shared by all requests.
    """

    def __init__(self, tally: Tally, config: DecodeConfig, random: np.random.Generator) -> None:
        self.tally, self.random = tally, random
        self.selector = Selector(tally.drafters, config, new_learner(config, len(tally.drafters)))
        self.choice = NO_DRAFT
        """The choice of the current round."""
        self._weights = self.selector.weights()

    @property
    def alive(self) -> np.ndarray:
        """bool [N]: the drafters that were not dropped from this request."""
        return self.selector.alive

    @property
    def needs_scores(self) -> bool:
        """Whether the learner uses scores."""
        return self.selector.needs_scores

    def warm_up(self, acceptance: np.ndarray, seconds: Seconds | None = None) -> None:
        """Updates the learner with acceptance_prob at the prompt's last positions, float64 [N, T]."""
        if self.selector.full_feedback and acceptance.size:
            self.selector.warm_up(acceptance, seconds)

    def choose(self, room: int, measure: Choice | None = None) -> Choice:
        """Returns drafter and draft length of the next round.

        Args:
            room: most tokens that the round may emit.
            measure: a choice whose cost is to be measured; it replaces the learner's.
        """
        self._weights = self.selector.weights()
        self.choice = self.selector.select(self._weights, self.random.random(), room, measure)
        return self.choice

    @property
    def evaluation_is_due(self) -> bool:
        """Whether all drafters are scored after the current round. Read it before `end_round`."""
        return self.selector.evaluation_is_due(False)

    def scored(self, acceptance_prob: np.ndarray, acceptance_ratio: np.ndarray, seconds: Seconds | None = None) -> None:
        """Updates the learner with the scores, float64 [N, T], of the tokens verified since the last evaluation."""
        self.selector.observe(acceptance_prob, acceptance_ratio, seconds)
        self.tally.scored += np.where(self.alive, acceptance_prob.shape[1], 0)
        self.tally.acceptance += acceptance_prob.sum(axis=1)

    def end_round(self, emitted: int, drafted: int, accepted: int) -> None:
        """Ends a round.

        Args:
            emitted: tokens that it emitted, >= 1.
            drafted: drafted tokens that the engine verified.
            accepted: accepted tokens among these.
        """
        drafter = self.choice.drafter if drafted else None
        self.selector.end_round(drafter, self._weights, emitted, drafted, min(accepted + 1, drafted))
        self.tally.emitted += emitted
        if drafter is not None:
            self.tally.rounds += 1
            self.tally.picks[drafter] += 1
            self.tally.drafted[drafter] += drafted
            self.tally.accepted[drafter] += accepted

    def drop(self, drafter: int, cause: str) -> bool:
        """Drops a drafter from the request. Returns whether it is the first request to drop it."""
        self.selector.drop(drafter, cause)
        name = self.tally.drafters[drafter]
        first = name not in self.tally.failures
        self.tally.failures.setdefault(name, cause)
        return first

    def close(self) -> None:
        """Ends the request."""
        regret = self.selector.stats.regret
        self.tally.requests += 1
        self.tally.regret += float(regret[-1]) if len(regret) else 0.0


class EngineClock:
    """Measures the costs of rounds for objective "throughput" inside an engine.

    Drafting is timed by the proposer. The time from the end of a proposer's step to the start of the next one is the engine's
    verification.

    Args:
        costs: receives the measurements.
    """

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self._left: tuple[float, int, int] | None = None
        """End of the last step, its rows, and the length of its longest draft."""

    def enter(self, rows: int) -> None:
        """Starts a step. The time since the last step is used only if both have the same number of rows."""
        if self._left is not None and self._left[1] == rows:
            since, _, longest = self._left
            self.costs.verified(rows, longest, self.costs.clock() - since)
        self._left = None

    def leave(self, rows: int, longest: int) -> None:
        """Ends a step that drafted for all its rows; `longest` is the length of its longest draft."""
        self._left = self.costs.clock(), rows, longest
