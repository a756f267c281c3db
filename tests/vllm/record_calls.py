"""Records how vLLM calls a custom proposer, for `tests/test_engine_proposer.py`, which needs no vLLM.

    HEDGESPEC_CALLS=tests/data/vllm_calls.json python tests/vllm/record_calls.py

Eight rows, prompts read in chunks, and too little memory for all of them, so that requests are preempted; half as many rows as
requests, so that rows are used again; some requests stop early, and some are aborted. What is written, of each call: the names
of the rows' requests, how many tokens each has, what each emitted, and the names of all requests that are alive; and each
request's prompt.
"""

from __future__ import annotations

import atexit
import json
import os
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("HEDGESPEC_POOL", json.dumps({"drafters": [{"type": "ngram"}], "log_every": 0}))

from hedgespec.integrations.vllm.token_proposer import HedgeSpecProposer


class Recorder(HedgeSpecProposer):
    """The proposer, taking notes."""

    def __init__(self, vllm_config) -> None:
        super().__init__(vllm_config)
        self.calls: list[dict] = []
        self.prompts: dict[str, list[int]] = {}
        atexit.register(self.write)

    def propose(self, sampled_token_ids, num_tokens_no_spec, token_ids_cpu, slot_mappings=None):
        drafts = super().propose(sampled_token_ids, num_tokens_no_spec, token_ids_cpu, slot_mappings)
        names = list(self.runner.input_batch.req_ids[: len(sampled_token_ids)])
        for name in names:
            prompt = self.runner.requests[name].prompt_token_ids
            self.prompts.setdefault(name, [int(token) for token in prompt])
        self.calls.append({
            "names": names,
            "lengths": [int(count) for count in num_tokens_no_spec[: len(names)]],
            "emitted": [[int(token) for token in new] for new in sampled_token_ids],
            "alive": sorted(self.runner.requests),
        })  # fmt: skip
        return drafts

    def write(self) -> None:
        short = {name: str(index) for index, name in enumerate(self.prompts)}
        for call in self.calls:
            call["names"] = [short[name] for name in call["names"]]
            call["alive"] = [short[name] for name in call["alive"] if name in short]
        told = {"prompts": {short[name]: tokens for name, tokens in self.prompts.items()}, "calls": self.calls}
        Path(os.environ["HEDGESPEC_CALLS"]).write_text(json.dumps(told, separators=(",", ":")) + "\n")


def main() -> None:
    from vllm import LLM, SamplingParams

    from hedgespec.zoo import load_prompts
    from hedgespec.zoo.target import target_path

    llm = LLM(
        str(target_path()), dtype="float32", max_model_len=256, max_num_seqs=8, max_num_batched_tokens=64, block_size=32,
        num_gpu_blocks_override=26, enforce_eager=True, enable_prefix_caching=False,
        worker_cls="hedgespec.integrations.vllm.worker.Worker",
        speculative_config={
            "method": "custom_class", "model": f"{Path(__file__).stem}.Recorder", "num_speculative_tokens": 3,
        },
    )  # fmt: skip
    engine = llm.llm_engine
    prompts = [prompt.text for prompt in load_prompts()[:16]]
    prompts[9] = prompts[2]  # the same text twice
    for index, text in enumerate(prompts):
        engine.add_request(
            str(index), text, SamplingParams(temperature=0, max_tokens=20 + 7 * (index % 5), min_tokens=index % 3)
        )
    steps = 0
    while engine.has_unfinished_requests():
        engine.step()
        steps += 1
        if steps == 20:
            engine.abort_request(["3", "5"])


if __name__ == "__main__":
    main()
