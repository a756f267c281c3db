"""Replays selection and learning over a recorded text, without a model.

The decoder's own `Selector` decides. Where the text does not depend on which drafter drafts (temperature 0, mode "coupled") a
replay does round for round what the decoder did. For sampled proposals a trace holds probabilities, and the replay draws which
tokens are accepted: the distribution is the decoder's.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from hedgespec.config import DecodeConfig
from hedgespec.decoder.request import generator
from hedgespec.experiments.recording import Trace
from hedgespec.learners import Learner
from hedgespec.records import Choice
from hedgespec.selection.arms import Seconds
from hedgespec.selection.selector import Selector, new_learner
from hedgespec.stats import DecodeStats


class RequestSelector(Protocol):
    """Selection and learning of one request, as `replay` uses it: `hedgespec`'s own `Selector`, or one of a study's."""

    learner: Learner
    stats: DecodeStats
    full_feedback: bool
    """Whether the learner takes the losses of all drafters."""

    def warm_up(self, acceptance_prob: NDArray[np.float64], seconds: Seconds | None = None) -> None:
        """Learns from the last positions of the prompt, float64 [N, M]."""

    def weights(self) -> NDArray[np.float64]:
        """Returns the weights from which the next drafter is drawn."""

    def select(self, weights: NDArray[np.float64], uniform: float, room: int) -> Choice:
        """Returns the drafter and draft length of the next round, which may emit up to `room` tokens."""

    def evaluation_is_due(self, finished: bool) -> bool:
        """Returns whether all drafters are scored after the round in progress; `finished`: it is the last."""

    def observe(
        self, acceptance_prob: NDArray[np.float64], acceptance_ratio: NDArray[np.float64], seconds: Seconds | None = None
    ) -> None:
        """Learns from the positions verified since the last call, float64 [N, T] each."""

    def end_round(self, drafter: int | None, weights: NDArray[np.float64], emitted: int, drafted: int, tested: int) -> None:
        """Records a round: its drafter (None if no tokens were drafted), the weights at its beginning, the tokens it emitted
        and drafted, and how many of the drafted tokens are known to have been accepted or rejected."""


def replay(
    trace: Trace, config: DecodeConfig, *, seed: int | None = None, latency: int = 0, state: dict[str, Any] | None = None,
    seconds: Seconds | None = None, learner: Learner | None = None, selector: RequestSelector | None = None,
) -> DecodeStats:  # fmt: skip
    """Decodes a recorded text again with any learner, without a model.

    Args:
        trace: the text; its drafters are the pool.
        config: as for `Decoder`. `proposal` must be the trace's, `draft_length` at most its depth, `tree` None.
        seed: seed of the draws; None is the trace's.
        latency: number of rounds after which the scores of a round are learned from, >= 0. 1 is what scoring beside the next
            round gives.
        state: a `Learner.state_dict()` to continue from. The warm start is then skipped, as in the decoder.
        seconds: assumed costs, required by objective "throughput" and refused otherwise: seconds to draft a token by drafter
            [N], and seconds to verify a round by drafted length [K+1].
        learner: a new learner to use instead of the configuration's.
        selector: a new object to select and learn in place of `Selector`; `learner` and `state` are then ignored.

    Returns: the statistics that `Decoder` returns, without times.

    Raises: ValueError if the trace cannot be replayed with this configuration.
    """
    _check(trace, config, seconds)
    length, (count, positions, _) = config.draft_length, trace.drafted.shape
    if selector is None:
        selector = Selector(trace.drafters, config, learner or new_learner(config, count), state)
    random = generator(trace.seed if seed is None else seed, 0)
    random.random(2 if trace.mode == "coupled" and trace.temperature > 0 else 1)  # the noise's key, the first token
    warm = min(config.warm_start, trace.prompt_prob.shape[1])
    if warm and positions and state is None and selector.full_feedback:
        selector.warm_up(trace.prompt_prob[:, -warm:], seconds)
    pending: deque[tuple[int, slice]] = deque()
    """Evaluations that were not learned from yet: the round, and the positions scored."""
    at = scored = 0
    while at < positions:
        uniforms = random.random(2 * length + 2)
        weights = selector.weights()
        choice = selector.select(weights, uniforms.item(0), trace.max_new_tokens - 1 - at)
        accepted, longest = 0, min(choice.draft_length, positions - at)
        while accepted < longest and uniforms[1 + length + accepted] < trace.drafted[choice.drafter, at, accepted]:
            accepted += 1
        emitted = min(accepted + 1, positions - at)
        at += emitted
        finished = at == positions
        now = selector.stats.rounds
        if selector.evaluation_is_due(finished):
            pending.append((now, slice(scored, at)))
            selector.stats.evaluations += 1
            scored = at
        while pending and (finished or now - pending[0][0] >= latency):
            _, new = pending.popleft()
            selector.observe(trace.prob[:, new], trace.ratio[:, new], seconds)
        drafted = choice.draft_length
        tested = min(drafted, emitted - finished)  # the text's last token may be any drafted one, so it tests none
        selector.end_round(choice.drafter if drafted else None, weights, emitted, drafted, tested)
    selector.stats.emitted_tokens = positions + 1
    selector.stats.learner_state = selector.learner.state_dict()
    return selector.stats


def _check(trace: Trace, config: DecodeConfig, seconds: Seconds | None) -> None:
    """Raises ValueError if the trace cannot be replayed with this configuration."""
    if config.proposal != trace.mode and trace.temperature > 0:
        raise ValueError(f"proposal: expected the trace's, {trace.mode!r}, got {config.proposal!r}")
    if config.tree is not None:
        raise ValueError(f"tree: expected None, since traces are of chains, got {config.tree}")
    if config.draft_length > trace.drafted.shape[2]:
        raise ValueError(
            f"draft_length: expected at most the trace's depth {trace.drafted.shape[2]}, got {config.draft_length}"
        )
    if (config.objective == "throughput") != (seconds is not None):
        raise ValueError(f"seconds: expected them with objective 'throughput' alone, got objective {config.objective!r}")


def alone(trace: Trace, drafter: int, draft_length: int, seed: int | None = None) -> list[int]:
    """Returns the tokens emitted by each round, [R], if one drafter had drafted the whole text.

    Args:
        trace: the text.
        drafter: index of the drafter, 0..N-1.
        draft_length: K.
        seed: seed of the draws; None is the trace's. It matters for sampled proposals only.
    """
    config = DecodeConfig(draft_length=draft_length, proposal=cast(Any, trace.mode), learner="fixed", warm_start=0)
    return replay(trace.of([drafter]), config, seed=seed).emitted_by_round
