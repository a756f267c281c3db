"""Reports a tally at intervals: a line in the log, and metrics for Prometheus."""

from __future__ import annotations

import logging
import time

from hedgespec.integrations.vllm.prometheus import Exporter
from hedgespec.integrations.vllm.request_learner import Tally

EXPORT_EVERY = 1.0
"""Seconds between two updates of the exported metrics."""


class Reporter:
    """Logs and exports a tally.

    Args:
        tally: the sums over all requests; it is read, not copied.
        log_every: seconds between two lines in the log; 0 for none.
        logger: receives the lines.
    """

    def __init__(self, tally: Tally, log_every: float, logger: logging.Logger) -> None:
        self.tally, self.log_every, self.logger = tally, log_every, logger
        self._exporter = Exporter(tally.drafters)
        self._logged = self._exported = time.monotonic()
        self._rounds = 0
        """Rounds of the tally when it was last logged."""

    def export(self) -> None:
        """Updates the metrics now."""
        self._exported = time.monotonic()
        self._exporter.update(self.tally)

    def update(self) -> None:
        """Updates the metrics and logs a line if they are due. There is no line if no round was drafted since the last one."""
        now = time.monotonic()
        if now - self._exported >= EXPORT_EVERY:
            self.export()
        if self.log_every and now - self._logged >= self.log_every and self.tally.rounds > self._rounds:
            self._logged, self._rounds = now, self.tally.rounds
            self.logger.info(self.tally.line())
