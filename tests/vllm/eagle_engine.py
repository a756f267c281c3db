"""One engine for `test_vllm_eagle.py`, in a process of its own: `python eagle_engine.py JOB.json RESULT.json`.

The job holds `target`, `heads` (folders by name), `prompts` (token ids), `max_new_tokens`, `draft_length`, `engine` (options of
vLLM's `LLM`), `who` drafts ("nobody", "vllm": the first head as vLLM itself runs it, "hedgespec"), and `parts`, names of
functions here. The result holds for each part what it returns.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # this process is the engine's own
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import torch
from vllm import LLM, SamplingParams
from vllm_sampling import mend

DRAFTING = {"disable_padded_drafter_batch": True}


def load(job: dict) -> LLM:
    options = {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 8, "enforce_eager": True} | job.get("engine", {})
    if job["who"] != "nobody":
        head = next(iter(job["heads"].values()))
        options |= {"per_request_spec_decode_metrics": "detailed", "disable_log_stats": False}
        options["speculative_config"] = {"method": "eagle3", "model": head, "num_speculative_tokens": job["draft_length"]}
    if job["who"] == "hedgespec":
        drafters = [{"type": "eagle3", "name": name, "model": folder} for name, folder in job["heads"].items()]
        os.environ["HEDGESPEC_POOL"] = json.dumps({"drafters": drafters, "seed": 1, "log_every": 0} | job.get("pool", {}))
        options["worker_cls"] = "eagle_engine.RecordingWorker"
        options["speculative_config"] |= DRAFTING
    return LLM(job["target"], **options)


def __getattr__(name: str):
    """`RecordingWorker`, which is ours taking notes of what its learners hear; only for engines that use it."""
    if name != "RecordingWorker":
        raise AttributeError(name)
    from hedgespec.integrations.vllm.eagle_proposer import Worker

    class RecordingWorker(Worker):
        def init_device(self) -> None:
            super().init_device()
            learning = self.model_runner.drafter.learning
            self.heard, hear, begin = {}, learning.learn, learning.begin

            def learn(name, prob, ratio, drafted, *rest):
                self.heard[name]["rounds"].append([learning.requests[name].place, prob.tolist(), ratio.tolist(), drafted])
                hear(name, prob, ratio, drafted, *rest)

            def note(name, prompt=None, *rest):
                self.heard[name] = {"prompt": prompt.tolist(), "rounds": []}
                begin(name, prompt, *rest)

            learning.learn, learning.begin = learn, note

    globals()[name] = RecordingWorker
    return RecordingWorker


def worker(llm: LLM):
    return llm.collective_rpc(lambda worker: worker)[0]


def generate(llm: LLM, job: dict, sampling=None, count: int | None = None) -> list[dict]:
    """Tokens of all prompts, by round what was accepted, and what the learners heard."""
    prompts = job["prompts"][:count]
    sampling = sampling or [SamplingParams(temperature=0, max_tokens=job["max_new_tokens"])] * len(prompts)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    heard = getattr(worker(llm), "heard", {}) if job["who"] == "hedgespec" else {}
    told = []
    for output in outputs:
        [text] = output.outputs
        rounds = getattr(text, "spec_decode_metrics", None)
        name = next((name for name in heard if name == output.request_id or name.startswith(f"{output.request_id}-")), None)
        told.append({
            "tokens": list(text.token_ids),
            "accepted": list(rounds.per_step_accepted) if rounds else [],
            "drafted": list(rounds.per_step_drafted) if rounds else [],
            "heard": heard.pop(name, None),
            "cached": output.num_cached_tokens,
        })  # fmt: skip
    return told


def greedy(llm: LLM, job: dict) -> dict:
    found = {"requests": generate(llm, job)}
    if job["who"] == "hedgespec":
        found |= _report(llm)
        found["preemptions"] = sum(one.value for one in llm.get_metrics() if one.name == "vllm:num_preemptions")
    return found


def again(llm: LLM, job: dict) -> dict:
    """The same prompts, which are in the cache now."""
    return {"requests": generate(llm, job, count=6)}


def _report(llm: LLM) -> dict:
    return {"report": json.loads(json.dumps(llm.collective_rpc("hedgespec_report")[0]))}  # a copy, as of now


def abort(llm: LLM, job: dict) -> dict:
    """Starts all requests, aborts half of them under way, and lets the others end."""
    engine, kept = llm.llm_engine, []
    names = [f"abort-{place}" for place in range(6)]
    for name, ids in zip(names, job["prompts"]):
        engine.add_request(name, {"prompt_token_ids": ids}, SamplingParams(temperature=0, max_tokens=24))
    texts = {}
    for step in range(10_000):
        if not engine.has_unfinished_requests():
            break
        if step == 4:
            engine.abort_request(names[::2])
        for output in engine.step():
            if output.finished:
                texts[output.request_id] = list(output.outputs[0].token_ids)
        known = set(worker(llm).model_runner.drafter.learning.requests)
        kept.append(known <= set(worker(llm).model_runner.requests))
    engine.engine_core.engine_core.step()  # as the engine's own loop does while it has ended requests to tell of
    return {"texts": texts, "kept": kept, "in_the_end": _report(llm)["report"]["kept_requests"]}


def sampled(llm: LLM, job: dict) -> dict:
    """Greedy requests and ones that sample, side by side."""
    mended = mend()
    kinds = [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 20}, {"temperature": 1.0, "top_p": 0.8}, {"temperature": 0}]
    kinds = [kinds[place % len(kinds)] for place in range(8)]
    sampling = [
        SamplingParams(max_tokens=job["max_new_tokens"], seed=place, ignore_eos=True, **kind)
        for place, kind in enumerate(kinds)
    ]
    return {"requests": generate(llm, job, sampling, len(kinds)), "kinds": kinds, "mended": mended}


def not_a_number(llm: LLM, job: dict) -> dict:
    """One head's weights are spoilt."""
    heads = worker(llm).model_runner.drafter.heads
    with torch.no_grad():
        heads[1].model.model.norm.weight.fill_(float("nan"))
    return {"requests": generate(llm, job, count=2)} | _report(llm)


def raises(llm: LLM, job: dict) -> dict:
    """One head's code fails while its request is under way."""
    drafter = worker(llm).model_runner.drafter
    forward, calls = drafter._forward, []

    def fail(head, *rest):
        if head is drafter.heads[0]:
            calls.append(0)
            if len(calls) > 5:
                raise RuntimeError("out of order")
        return forward(head, *rest)

    drafter._forward = fail
    found = {"requests": generate(llm, job, count=2)} | _report(llm)
    drafter._forward = forward
    return found | {"lost": drafter.learning.lost, "calls": len(calls)}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    sys.modules["eagle_engine"] = sys.modules["__main__"]
    llm = load(job)
    found = {}
    for part in job["parts"]:
        began = time.perf_counter()
        found[part] = globals()[part](llm, job) | {"seconds": time.perf_counter() - began}
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
