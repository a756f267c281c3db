"""What engines' learners make of recorded texts: `python bench/bench_engine_replay.py --json FILE`.

An engine that shows tokens only has `TokenProposer` decide who drafts. Here it drafts for the greedy texts that the experiments
recorded (bench/results/experiments/traces/greedy), one after another, with the zoo's datastores and prompt lookup; a drafted
token is accepted where it is the text's. No model runs, and nothing is timed. Reported is the MAT of each drafter alone, and of
HedgeSpec by positions of the warm start, with the six experts' stores and lookup, and with the stores alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from hedgespec.config import DecodeConfig
from hedgespec.experiments.recording import Trace
from hedgespec.integrations.vllm.drafters import Datastores, NGrams, TokenDrafter
from hedgespec.integrations.vllm.pool_config import TOKENS_ONLY
from hedgespec.integrations.vllm.token_pool import TokenProposer
from hedgespec.zoo import EXPERTS, NAMES
from hedgespec.zoo.stores import load_store

TRACES = Path(__file__).parent / "results" / "experiments" / "traces" / "greedy"
VOCABULARY = 49152


def decode(traces: Sequence[Trace], drafters: Sequence[TokenDrafter], draft_length: int, **options) -> float:
    """MAT over all texts, tokens by rounds."""
    config = DecodeConfig(draft_length=draft_length, proposal="argmax", **{**TOKENS_ONLY, **options})
    proposer, rounds, tokens = TokenProposer(drafters, config, max_length=1 << 20), 0, 0
    for trace in traces:
        text, length, emitted = trace.tokens, trace.prompt_length + 1, 1
        while length < len(text):
            [draft] = proposer.propose([text[:length]], [emitted])
            left = text[length:]
            right = next(
                (place for place, (ours, its) in enumerate(zip(draft, left)) if ours != its), min(len(draft), len(left))
            )
            emitted = min(right + 1, len(left))
            length, rounds, tokens = length + emitted, rounds + 1, tokens + emitted
        proposer.close()
    return tokens / rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    parser.add_argument("--draft-length", type=int, default=4)
    parser.add_argument("--warm-start", type=int, nargs="+", default=[0, 4, 8, 16, 32])
    options = parser.parse_args()
    traces = [Trace.load(path) for path in sorted(TRACES.glob("*.npz"))]
    stores = {name: Datastores(load_store(name), VOCABULARY, name) for name in NAMES}
    lookup = NGrams(name="lookup")
    experts = [stores[name] for name in EXPERTS]
    result = {"texts": len(traces), "draft_length": options.draft_length, "alone": {}, "hedgespec": {}}
    for drafter in (*stores.values(), lookup):
        result["alone"][drafter.name] = decode(traces, [drafter], options.draft_length, learner="fixed")
    for name, pool in (("stores and lookup", [*experts, lookup]), ("stores", experts)):
        result["hedgespec"][name] = {
            str(warm): decode(traces, pool, options.draft_length, warm_start=warm) for warm in options.warm_start
        }
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
