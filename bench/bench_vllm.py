"""vLLM by itself and with HedgeSpec over the mixed stream: `python bench/bench_vllm.py --json FILE --table FILE`.

In an environment with vLLM (`make test-vllm` makes one). Engines: without speculation; with vLLM's own ngram method; with one
fixed drafter, the generalist's datastore or our prompt lookup; with HedgeSpec over six experts' datastores and prompt lookup,
for either objective. Each engine is loaded by itself, in a process of its own, and decodes the same prompts greedily with 1, 4
and 16 requests in flight; then all of that is done again, `--rounds` times in all, so that what the machine does meanwhile
shows. Reported are tokens a second over those of the engine without speculation in the same round, and emitted tokens a draft
(MAT). Texts must be the same as without speculation: those that differ are counted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from statistics import mean

from table import markdown

PROPOSER = "hedgespec.integrations.vllm.token_proposer.HedgeSpecProposer"
WORKER = "hedgespec.integrations.vllm.worker.Worker"


def pools() -> dict[str, dict]:
    """HedgeSpec's engines by name: what is in HEDGESPEC_POOL."""
    from hedgespec.zoo import EXPERTS, GENERALIST
    from hedgespec.zoo.stores import store_path

    def store(name: str) -> dict:
        return {"type": "datastore", "name": name, "path": str(store_path(name))}

    lookup = {"type": "ngram", "name": "lookup"}
    experts = [*map(store, EXPERTS), lookup]
    return {
        "fixed: generalist": {"drafters": [store(GENERALIST)], "learner": "fixed"},
        "fixed: lookup": {"drafters": [lookup], "learner": "fixed"},
        "hedgespec": {"drafters": experts},
        "hedgespec, throughput": {"drafters": experts, "objective": "throughput"},
    }


def serve(name: str, options: argparse.Namespace) -> dict:
    """Decodes with one engine, in this process; by requests in flight what it took."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    extra = {}
    if name in (known := pools()):
        os.environ["HEDGESPEC_POOL"] = json.dumps(known[name] | {"log_every": 0})
        speculation = {"method": "custom_class", "model": PROPOSER}
        extra["worker_cls"] = WORKER
    elif name == "ngram":
        speculation = {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 3}
    else:
        speculation = None
    if speculation is not None:
        speculation["num_speculative_tokens"] = options.draft_length
    from vllm import LLM, SamplingParams

    from hedgespec.zoo import load_prompts
    from hedgespec.zoo.target import target_path

    llm = LLM(
        str(target_path()), dtype="float32", max_model_len=512, max_num_seqs=max(options.in_flight), enforce_eager=True,
        enable_prefix_caching=False, disable_log_stats=False, speculative_config=speculation, **extra,
    )  # fmt: skip
    prompts = [prompt.text for prompt in load_prompts()[: options.prompts]]
    sampling = SamplingParams(temperature=0, max_tokens=options.max_new_tokens)
    found = {}
    for count in options.in_flight:
        run(llm, prompts[:count], sampling, count, "warm")
        before = counters(llm)
        began = time.perf_counter()
        texts = run(llm, prompts, sampling, count, str(count))
        seconds = time.perf_counter() - began
        after = counters(llm)
        drafts, accepted = (after.get(key, 0) - before.get(key, 0) for key in ("num_drafts", "num_accepted_tokens"))
        found[count] = {
            "seconds": seconds, "tokens": sum(map(len, texts)), "drafts": drafts, "accepted": accepted, "texts": texts,
        }  # fmt: skip
    if speculation is not None and "worker_cls" in extra:
        found["report"] = llm.collective_rpc("hedgespec_report")[0]
    llm.llm_engine.engine_core.shutdown()
    return found


def run(llm, prompts: list[str], sampling, count: int, tag: str) -> list[list[int]]:
    """Decodes the prompts with so many requests in flight."""
    engine, texts, waiting = llm.llm_engine, {}, list(enumerate(prompts))[::-1]
    running = 0
    while waiting or running:
        while waiting and running < count:
            index, text = waiting.pop()
            engine.add_request(f"{tag} {index}", text, sampling)
            running += 1
        for out in engine.step():
            if out.finished:
                running -= 1
                texts[int(out.request_id.split()[1])] = list(out.outputs[0].token_ids)
    return [texts[index] for index in range(len(prompts))]


def counters(llm) -> dict[str, int]:
    prefix = "vllm:spec_decode_"
    return {one.name.removeprefix(prefix): getattr(one, "value", 0) for one in llm.get_metrics() if one.name.startswith(prefix)}


def measure(name: str, options: argparse.Namespace) -> dict:
    """`serve` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "told.json"
        command = [sys.executable, __file__, "--engine", name, "--json", str(told), *options.passed_on]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"the engine {name} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        return json.loads(told.read_text())


def table(result: dict) -> str:
    """Returns a Markdown table: speed over plain by requests in flight, its least and most over several rounds, and tokens per
    round."""
    counts = [str(count) for count in result["in_flight"]]
    rows = []
    for name, rounds in result["engines"].items():
        cells = []
        for count in counts:
            ratios = [one["speed"][count] for one in rounds]
            spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ""
            cells.append(f"{mean(ratios):.2f}{spread}")
        tokens = [f"{rounds[0]['mat'][count]:.2f}" if rounds[0]["mat"][count] else "1" for count in counts]
        rows.append([name, *cells, " / ".join(tokens)])
    return markdown(["engine", *(f"speed at {count}" for count in counts), f"tokens per round at {' / '.join(counts)}"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    parser.add_argument("--table", type=Path, help="where the table goes, in Markdown")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--draft-length", type=int, default=4)
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine is not None:
        options.json.write_text(json.dumps(serve(options.engine, options)))
        return
    shape = {"prompts": options.prompts, "max-new-tokens": options.max_new_tokens, "draft-length": options.draft_length}
    options.passed_on = [part for key, value in shape.items() for part in (f"--{key}", str(value))]
    options.passed_on += ["--in-flight", *map(str, options.in_flight)]
    import torch
    import transformers
    import vllm

    result = {
        "date": date.today().isoformat(), "processor": platform.processor() or platform.machine(),
        "threads": os.environ.get("OMP_NUM_THREADS"), "in_flight": options.in_flight, **shape,
        "versions": {one.__name__: one.__version__ for one in (vllm, torch, transformers)}, "engines": {},
    }  # fmt: skip
    counts = [str(count) for count in options.in_flight]
    for _ in range(options.rounds):
        plain = None
        for name in ("plain", "ngram", *pools()):
            found = measure(name, options)
            plain = plain or found
            same = sum(found[count]["texts"] == plain[count]["texts"] for count in counts)
            told = {
                "speed": {
                    count: found[count]["tokens"] / found[count]["seconds"] * plain[count]["seconds"] / plain[count]["tokens"]
                    for count in counts
                },
                "mat": {
                    count: 1 + found[count]["accepted"] / found[count]["drafts"] if found[count]["drafts"] else None
                    for count in counts
                },
                "same_texts": same == len(counts),
                "differing": sum(
                    one != other for count in counts for one, other in zip(found[count]["texts"], plain[count]["texts"])
                ),
                "report": found.get("report"),
            }  # fmt: skip
            result["engines"].setdefault(name, []).append(told)
            print(f"{name}: {told['speed']}, MAT {told['mat']}, {told['differing']} texts differ", flush=True)
            options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.table is not None:
        options.table.write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
