"""What all requests of an engine did, as Prometheus metrics, where `prometheus_client` is installed.

An engine's web server shows what is registered in its own process, and vLLM's engine runs in another. What is counted there is
shown only where PROMETHEUS_MULTIPROC_DIR names an empty folder before vLLM starts: then all processes write into files there,
of which `/metrics` is the sum. Files stay when their processes end, so the folder must be emptied between two servers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from hedgespec.integrations.vllm.request_learner import Tally

COUNTERS = {
    "picks": "Rounds drafted, by drafter.",
    "drafted": "Tokens proposed, by drafter.",
    "accepted": "Proposed tokens that were accepted, by drafter.",
    "scored": "Verified tokens on which a drafter was scored, whoever drafted.",
    "acceptance": "Sum of acceptance probabilities over the scored tokens, whoever drafted.",
}
"""Fields of `Tally` by drafter."""


@cache
def _metrics() -> dict | None:
    """The metrics, made once a process; None without the library."""
    try:
        from prometheus_client import Counter, Gauge
    except ImportError:
        return None
    made: dict[str, Any] = {name: Counter(f"hedgespec_{name}", text, ["drafter"]) for name, text in COUNTERS.items()}
    made["requests"] = Counter("hedgespec_requests", "Requests that ended.")
    made["emitted"] = Counter("hedgespec_emitted", "Tokens emitted in all rounds.")
    text = "Sum over the requests that ended of the learner's loss less that of the request's best drafter."
    # "sum", as counters are: what a process counted that has ended stays in both.
    made["regret"] = Gauge("hedgespec_regret", text, multiprocess_mode="sum")
    return made


class Exporter:
    """Hands what is new in a tally to Prometheus.

    Args:
        drafters: their names.
    """

    def __init__(self, drafters: Sequence[str]) -> None:
        self._told = Tally(drafters)
        metrics = _metrics()
        # Made now: a series that begins with its first count has no rate until its second.
        self._series = {} if metrics is None else {name: [metrics[name].labels(one) for one in drafters] for name in COUNTERS}

    def update(self, tally: Tally) -> None:
        """Adds what happened since the last call."""
        metrics = _metrics()
        if metrics is None:
            return
        for name, series in self._series.items():
            now, told = getattr(tally, name), getattr(self._told, name)
            for one, more in zip(series, now - told):
                if more > 0:
                    one.inc(float(more))
            told[:] = now
        for name in ("requests", "emitted"):
            metrics[name].inc(getattr(tally, name) - getattr(self._told, name))
            setattr(self._told, name, getattr(tally, name))
        metrics["regret"].inc(tally.regret - self._told.regret)
        self._told.regret = tally.regret
