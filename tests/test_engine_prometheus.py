"""What an engine's process hands to Prometheus, and what another process reads of it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from hedgespec.integrations.vllm import prometheus
from hedgespec.integrations.vllm.request_learner import Tally

UPDATES = """
tally = Tally(["a", "b"])
exporter = Exporter(tally.drafters)
tally.picks += [1, 2]
tally.drafted += [4, 0]
tally.acceptance += [0.5, 0.25]
tally.requests, tally.emitted, tally.regret = 1, 5, 2.0
exporter.update(tally)
exporter.update(tally)  # nothing is new
tally.picks += [0, 3]
tally.emitted, tally.regret = 9, -1.0
exporter.update(tally)
"""
"""Sums that grow, of which the regret may shrink."""
EXPECTED = (
    'hedgespec_picks_total{drafter="a"} 1.0',
    'hedgespec_picks_total{drafter="b"} 5.0',
    'hedgespec_drafted_total{drafter="a"} 4.0',
    'hedgespec_drafted_total{drafter="b"} 0.0',
    'hedgespec_accepted_total{drafter="b"} 0.0',
    'hedgespec_acceptance_total{drafter="a"} 0.5',
    'hedgespec_acceptance_total{drafter="b"} 0.25',
    "hedgespec_requests_total 1.0",
    "hedgespec_emitted_total 9.0",
    "hedgespec_regret -1.0",
)


def test_a_process_registers_them():
    library = pytest.importorskip("prometheus_client")
    exec(UPDATES, {"Tally": Tally, "Exporter": prometheus.Exporter})
    told = library.generate_latest().decode().splitlines()
    assert set(EXPECTED) <= set(told)


def test_processes_are_summed_up_where_a_folder_is_named(tmp_path):
    pytest.importorskip("prometheus_client")
    program = f"""
import os

from prometheus_client import CollectorRegistry, generate_latest, multiprocess

from hedgespec.integrations.vllm.request_learner import Tally
from hedgespec.integrations.vllm.prometheus import Exporter

for _ in range(2):
    if (child := os.fork()) == 0:
        exec({UPDATES!r})
        os._exit(0)
    os.waitpid(child, 0)
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    twice = {f"{name} {2 * float(value)}" for name, value in (line.split() for line in EXPECTED)}
    assert twice <= set(done.stdout.splitlines())


def test_without_the_library_nothing_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.setattr(prometheus, "_metrics", prometheus._metrics.__wrapped__)
    assert prometheus._metrics() is None
    exec(UPDATES, {"Tally": Tally, "Exporter": prometheus.Exporter})
