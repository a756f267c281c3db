"""One request's learner inside an engine, and what all of them did: numbers only, no models and no engine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hedgespec.config import DecodeConfig
from hedgespec.records import NO_DRAFT, Choice
from hedgespec.selection.arms import Seconds
from hedgespec.selection.costs import Costs
from hedgespec.selection.selector import Selector, new_learner


class Tally:
    """Sums over all requests since the engine began. Sizes: N drafters.

    Args:
        drafters: their names.
    """

    def __init__(self, drafters: Sequence[str]) -> None:
        self.drafters = tuple(drafters)
        count = len(self.drafters)
        self.rounds = 0
        """Rounds in which a drafter drafted, as far as the engine verified them."""
        self.picks = np.zeros(count, dtype=np.int64)
        """Such rounds by drafter, [N]."""
        self.drafted = np.zeros(count, dtype=np.int64)
        """Tokens proposed, by drafter, [N]."""
        self.accepted = np.zeros(count, dtype=np.int64)
        """Of these, accepted ones, [N]."""
        self.emitted = 0
        """Tokens emitted in all rounds, those without a draft included."""
        self.scored = np.zeros(count, dtype=np.int64)
        """Verified tokens on which each drafter was scored, [N]."""
        self.acceptance = np.zeros(count)
        """Sum over these of what was scored: the probability that the drafter's token is accepted, or, where only tokens are
        seen, whether it is the emitted one; float64 [N]."""
        self.requests = 0
        """Requests that ended."""
        self.regret = 0.0
        """Of these, each request's last regret, summed: the learner's loss less that of the request's best drafter."""
        self.failures: dict[str, str] = {}
        """Drafters that were taken out of a request, with the first cause."""

    def line(self) -> str:
        """For a log."""
        parts = [
            f"{name}: {picks} rounds, {100 * accepted / max(drafted, 1):.1f}% of {drafted} drafted tokens accepted, "
            f"acceptance {acceptance / max(scored, 1):.3f} on all text"
            for name, picks, drafted, accepted, scored, acceptance in zip(
                self.drafters, self.picks, self.drafted, self.accepted, self.scored, self.acceptance
            )
        ]
        return f"HedgeSpec: {self.requests} requests ended, regret {self.regret:.2f} in all; " + "; ".join(parts)

    def to_dict(self) -> dict:
        """Plain numbers, for JSON."""
        told = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(self).items()}
        return told | {"drafters": list(self.drafters)}


class RequestLearner:
    """Who drafts in one request, and what is learned from it. Each round is `choose`, then, once the engine has verified the
    draft, `scored` where an evaluation is due and `end_round`.

    Args:
        tally: of all requests; its drafters are the pool.
        config: as the pool has it.
        random: draws drafters; of all requests.
    """

    def __init__(self, tally: Tally, config: DecodeConfig, random: np.random.Generator) -> None:
        self.tally, self.random = tally, random
        self.selector = Selector(tally.drafters, config, new_learner(config, len(tally.drafters)))
        self.choice = NO_DRAFT
        """Of the round under way."""
        self._weights = self.selector.weights()

    @property
    def alive(self) -> np.ndarray:
        """Which drafters have not failed in this request, bool [N]."""
        return self.selector.alive

    @property
    def needs_scores(self) -> bool:
        """Whether the drafters are scored at all."""
        return self.selector.needs_scores

    def warm_up(self, acceptance: np.ndarray, seconds: Seconds | None = None) -> None:
        """Lets the learner hear how the drafters fare at the prompt's last positions, float64 [N, T]."""
        if self.selector.full_feedback and acceptance.size:
            self.selector.warm_up(acceptance, seconds)

    def choose(self, room: int, measure: Choice | None = None) -> Choice:
        """Who drafts how many tokens in the next round, which may emit `room`; `measure` is what is drafted instead where its
        cost is wanted."""
        self._weights = self.selector.weights()
        self.choice = self.selector.select(self._weights, self.random.random(), room, measure)
        return self.choice

    @property
    def evaluation_is_due(self) -> bool:
        """Whether all drafters are to be scored after the round that is under way. To be asked before `end_round`."""
        return self.selector.evaluation_is_due(False)

    def scored(self, acceptance_prob: np.ndarray, acceptance_ratio: np.ndarray, seconds: Seconds | None = None) -> None:
        """Takes the scores, float64 [N, T], of the verified tokens since the last evaluation."""
        self.selector.observe(acceptance_prob, acceptance_ratio, seconds)
        self.tally.scored += np.where(self.alive, acceptance_prob.shape[1], 0)
        self.tally.acceptance += acceptance_prob.sum(axis=1)

    def end_round(self, emitted: int, drafted: int, accepted: int) -> None:
        """Ends the round in which `drafted` of the chosen drafter's tokens came before the engine, `accepted` of which it
        accepted, and which emitted so many tokens, 1 or more."""
        drafter = self.choice.drafter if drafted else None
        self.selector.end_round(drafter, self._weights, emitted, drafted, min(accepted + 1, drafted))
        self.tally.emitted += emitted
        if drafter is not None:
            self.tally.rounds += 1
            self.tally.picks[drafter] += 1
            self.tally.drafted[drafter] += drafted
            self.tally.accepted[drafter] += accepted

    def lose(self, drafter: int, cause: str) -> bool:
        """Goes on without a drafter; whether it is the first time that any request does."""
        self.selector.drop(drafter, cause)
        name = self.tally.drafters[drafter]
        first = name not in self.tally.failures
        self.tally.failures.setdefault(name, cause)
        return first

    def close(self) -> None:
        """The request has ended."""
        regret = self.selector.stats.regret
        self.tally.requests += 1
        self.tally.regret += float(regret[-1]) if len(regret) else 0.0


class EngineClock:
    """Measures what rounds cost for `DecodeConfig.objective` "throughput", where the engine owns the loop: drafting happens
    inside a step of ours, everything from its end to the beginning of the next one is the engine's verification.

    Args:
        costs: where it is noted.
    """

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self._left: tuple[float, int, int] | None = None
        """When the last step ended, its rows, and the longest of their drafts."""

    def enter(self, rows: int) -> None:
        """A step of so many rows begins. Where the rows are not those of the last step the time between tells nothing."""
        if self._left is not None and self._left[1] == rows:
            since, _, longest = self._left
            self.costs.verified(rows, longest, self.costs.clock() - since)
        self._left = None

    def leave(self, rows: int, longest: int) -> None:
        """It ends, having drafted for all its rows, the longest draft of so many tokens."""
        self._left = self.costs.clock(), rows, longest
