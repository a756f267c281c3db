"""Exports the sums over all requests of an engine as Prometheus metrics, if `prometheus_client` is installed.

The web server of an engine shows the metrics of its own process, but vLLM's engine runs in another one. Its metrics are shown
only
if PROMETHEUS_MULTIPROC_DIR names an empty folder before vLLM starts: all processes then write to files in it, and `/metrics`
shows their sum. The files remain when the processes end, so the folder must be emptied before the next server starts.
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
    "scored": "Verified tokens on which a drafter was scored, whether or not it drafted.",
    "acceptance": "Sum of acceptance probabilities over the scored tokens, whether or not it drafted.",
}
"""Fields of `Tally` by drafter."""


@cache
def _metrics() -> dict | None:
    """Returns the metrics, which are created once a process; None without the library."""
    try:
        from prometheus_client import Counter, Gauge
    except ImportError:
        return None
    made: dict[str, Any] = {name: Counter(f"hedgespec_{name}", text, ["drafter"]) for name, text in COUNTERS.items()}
    made["requests"] = Counter("hedgespec_requests", "Requests that ended.")
    made["emitted"] = Counter("hedgespec_emitted", "Tokens emitted in all rounds.")
    text = "Sum over the requests that ended of the learner's loss less that of the request's best drafter."
    # "sum", as for counters: the values of processes that have ended are kept.
    made["regret"] = Gauge("hedgespec_regret", text, multiprocess_mode="sum")
    return made


class Exporter:
    """Passes the changes of a tally to Prometheus.

    Args:
        drafters: names.
    """

    def __init__(self, drafters: Sequence[str]) -> None:
        self._exported = Tally(drafters)
        metrics = _metrics()
        # Created with a count of 0: a series that starts with its first count has no rate until the second.
        self._series = {} if metrics is None else {name: [metrics[name].labels(one) for one in drafters] for name in COUNTERS}

    def update(self, tally: Tally) -> None:
        """Adds the changes since the last call."""
        metrics = _metrics()
        if metrics is None:
            return
        for name, series in self._series.items():
            now, before = getattr(tally, name), getattr(self._exported, name)
            for one, more in zip(series, now - before):
                if more > 0:
                    one.inc(float(more))
            before[:] = now
        for name in ("requests", "emitted"):
            metrics[name].inc(getattr(tally, name) - getattr(self._exported, name))
            setattr(self._exported, name, getattr(tally, name))
        metrics["regret"].inc(tally.regret - self._exported.regret)
        self._exported.regret = tally.regret
