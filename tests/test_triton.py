"""The Triton kernels where there is no GPU: interpreted they equal the references, compiled they neither spill nor recompile.

Interpreting and compiling exclude each other within a process: tests of values run where TRITON_INTERPRET=1 (or a GPU) is,
and compilation always happens in a process of its own, which is this file run as a script.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import fields
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from hedgespec.triton_kernels import _common, head_layers  # noqa: E402
from hedgespec.triton_kernels import evaluate as evaluation  # noqa: E402
from hedgespec.triton_kernels import verify as verification  # noqa: E402

from hedgespec.ops import backends  # noqa: E402
from hedgespec.ops.evaluate import evaluate, evaluate_reference  # noqa: E402
from hedgespec.ops.verify import verify  # noqa: E402

INF = math.inf
LAST = 1 - 2.0**-53
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICE = "cpu" if _common.INTERPRETED else "cuda"
runs = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs TRITON_INTERPRET=1 or a CUDA device"
)


# Evaluation against the reference.


def scene(dtype, drafters=2, batch=2, positions=3, vocabulary=50, draft_vocabulary=None, seed=0):
    """Random arguments of `evaluate`, and a map if there is a draft vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    arguments = [
        3 * torch.randn(batch, positions, vocabulary, generator=generator),
        3 * torch.randn(drafters, batch, positions, draft_vocabulary or vocabulary, generator=generator),
    ]
    tokens = torch.randint(vocabulary, (batch, positions), generator=generator)
    options = {}
    if draft_vocabulary is not None:
        maps = [torch.randperm(vocabulary, generator=generator)[:draft_vocabulary] for _ in range(drafters)]
        options["draft_to_target"] = torch.stack(maps)
        tokens[0, 0] = maps[0][arguments[1][0, 0, 0].argmax()]
    return [logits.to(dtype) for logits in arguments] + [tokens], options


def on_device(value):
    return value.to(DEVICE) if isinstance(value, torch.Tensor) else value


def agrees(arguments, options):
    """The kernel on these arguments equals the reference in float64, NaN included; returns what the kernel made of them."""
    result = evaluate(*map(on_device, arguments), **{name: on_device(v) for name, v in options.items()}, backend="triton")
    sharp = [logits.double() for logits in arguments[:2]]
    expected = evaluate(*sharp, arguments[2], **options, backend="reference")
    for field in fields(expected):
        ours, theirs = getattr(result, field.name), getattr(expected, field.name)
        assert (ours is None) == (theirs is None), field.name
        if ours is not None:
            torch.testing.assert_close(
                ours.cpu().double(), theirs, rtol=0, atol=2e-5 if "length" in field.name else 5e-6, equal_nan=True
            )
    return result


@runs
@pytest.mark.parametrize(("dtype", "top_k"), list(zip(DTYPES, (1, 5, 32))))
@pytest.mark.parametrize("draft_vocabulary", [None, 20])
def test_top_k(dtype, draft_vocabulary, top_k):
    arguments, options = scene(dtype, batch=1, draft_vocabulary=draft_vocabulary)
    agrees(arguments, options | {"top_k": top_k})


@runs
def test_top_k_candidates_at_ties_masks_and_temperature_zero():
    """Half types tie; thresholds and -inf leave fewer candidates than asked for, down to none."""
    arguments, options = scene(torch.float32, draft_vocabulary=20)
    arguments[1] = arguments[1].round()
    arguments[1][0, 0, 0] = torch.where(torch.arange(20) % 2 == 0, 0.0, -0.0)  # one value
    arguments[1][0, 0, 1] = -INF
    arguments[1][0, 1, :, 3:] = -INF
    options["drafter_threshold"] = torch.zeros(2, 2, 3).double()
    options["drafter_threshold"][1, 0] = 1e9
    agrees(arguments, options | {"top_k": 6, "drafter_temperature": torch.tensor([0.0, 2.0])})


@runs
@pytest.mark.parametrize(
    ("estimator", "mode", "draft_length"),
    [
        ("exact", "sampled", 2),
        ("product", "sampled", 2),
        ("exact", "argmax", 1),
        ("product", "top_k", 4),
        ("exact", "top_k", 3),
    ],
)
def test_losses(estimator, mode, draft_length, poisoned_empty):
    arguments, options = scene(torch.float32, batch=3, positions=3)
    arguments[1] = arguments[0] + 0.5 * arguments[1]  # likely enough to be accepted for long sums
    options |= dict(lengths=torch.tensor([0, 2, 3]), top_k=3, draft_length=draft_length, estimator=estimator, mode=mode)
    result = agrees(arguments, options)
    assert result.expected_accepted_length.isnan()[:, 0].all()


@runs
def test_losses_of_more_positions_than_are_computed_side_by_side():
    arguments, options = scene(torch.float32, drafters=1, batch=1, positions=66, vocabulary=2)
    agrees(arguments, options | dict(draft_length=3, lengths=torch.tensor([65])))


@runs
@pytest.mark.parametrize(("batch", "positions"), [(0, 3), (2, 0)])
def test_nothing_to_evaluate(batch, positions):
    arguments, _ = scene(torch.float32, batch=batch, positions=positions)
    arguments = [*map(on_device, arguments)]
    result = evaluate(*arguments, draft_length=2, top_k=2, backend="triton")
    assert result.acceptance_prob.shape == (2, batch, positions)
    assert result.top_k_acceptance_prob.shape == result.top_k_acceptance_ratio.shape == (2, 2, batch, positions)
    assert result.length_losses.shape == (2, batch, positions, 2)
    assert result.expected_accepted_length.shape == (2, batch)
    assert result.expected_accepted_length.isnan().all()


@pytest.fixture
def split(monkeypatch):
    """Several slices a row, and several blocks a slice, of the 64 logits that a block has at least."""
    monkeypatch.setattr(_common, "processors", lambda device: 40)
    monkeypatch.setattr(evaluation, "configuration", lambda *sizes: _common.Config(64, 4))
    monkeypatch.setattr(verification, "configuration", lambda *sizes: _common.Config(64, 4))


@runs
@pytest.mark.parametrize("processors", [1, 5, 20])
@pytest.mark.parametrize("draft_vocabulary", [None, 333])
def test_slices_and_blocks_of_a_row_agree(split, monkeypatch, processors, draft_vocabulary):
    monkeypatch.setattr(_common, "processors", lambda device: processors)
    arguments, options = scene(torch.float32, vocabulary=700, positions=2, batch=1, draft_vocabulary=draft_vocabulary)
    arguments[0][0, 1, 100] = arguments[0][0, 1, 650] = 30.0  # a tie between slices
    arguments[1][1, 0, 1, [70, 300]] = 30.0
    options |= dict(top_k=7, draft_length=2)
    agrees(arguments, options | dict(drafter_temperature=0.0))
    agrees(arguments, options | dict(target_temperature=0.0))


@runs
@pytest.mark.skipif(not _common.INTERPRETED, reason="a GPU chooses its own order")
@pytest.mark.parametrize("drafters", [2, 31])
def test_the_order_of_programs_changes_nothing(split, monkeypatch, drafters):
    """Whoever is last goes on, the target's program included; 31 drafters share two words of arrivals."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    place, size = builder.set_grid_idx, builder.set_grid_dim
    few = drafters == 2
    arguments, options = scene(torch.float32, drafters, batch=1, positions=3 if few else 1, vocabulary=200 if few else 70)
    options |= dict(lengths=torch.tensor([2 if few else 1]), top_k=2, draft_length=1)
    expected = evaluate(*arguments, **options, backend="triton")
    for seed in range(3 if few else 1):
        order = []

        def shuffled(*dims, order=order, seed=seed):
            order[:] = torch.randperm(dims[0], generator=torch.Generator().manual_seed(seed)).tolist()
            if seed == 0:
                order[:] = reversed(range(dims[0]))  # the target's programs come last
            size(*dims)

        monkeypatch.setattr(builder, "set_grid_dim", shuffled)
        monkeypatch.setattr(builder, "set_grid_idx", lambda x, y, z, order=order: place(order[x], y, z))
        result = evaluate(*arguments, **options, backend="triton")
        for field in fields(expected):
            assert torch.equal(getattr(result, field.name).nan_to_num(-1), getattr(expected, field.name).nan_to_num(-1))


@runs
def test_a_call_leaves_its_workspace_as_it_was():
    """Calls of other shapes follow each other in one workspace."""
    for seed, (batch, positions, vocabulary) in enumerate([(1, 1, 9), (3, 4, 70), (2, 1, 150), (1, 3, 9)]):
        arguments, options = scene(torch.float32, 2, batch, positions, vocabulary, draft_vocabulary=5, seed=seed)
        agrees(arguments, options | dict(top_k=seed + 1, draft_length=1))


@runs
@pytest.mark.parametrize("token", [-1, 50, 2**40])
def test_a_token_outside_the_vocabulary_is_one_that_nobody_emits(token):
    """Values are not looked at on a GPU: what the kernel does with them is seen past the checks."""
    arguments, _ = scene(torch.float32)
    expected = evaluate_reference(*arguments)
    arguments[2][0, 0] = token
    result = evaluation.evaluate_triton(*map(on_device, arguments), top_k=3, lengths=on_device(torch.tensor([7, 3])))
    assert (result.acceptance_ratio[:, 0, 0] == 0).all()
    assert (result.argmax_acceptance_ratio[:, 0, 0] == 0).all()
    assert (result.top_k_acceptance_ratio[:, :, 0, 0] == 0).all()
    torch.testing.assert_close(result.acceptance_prob.cpu(), expected.acceptance_prob, rtol=0, atol=5e-6)


@runs
def test_the_largest_and_smallest_temperatures():
    arguments, options = scene(torch.float32)
    arguments[0][:, :, ::3] = -INF
    arguments[1][:, :, :, 1::3] = -INF
    for target_temperature, drafter_temperature in ((1e-38, 1e38), (3e38, 1e-30), (1e30, 1e30)):
        agrees(arguments, options | dict(target_temperature=target_temperature, drafter_temperature=drafter_temperature))


# Verification against the reference.


def round_of(dtype, batch=4, draft_length=4, vocabulary=40, draft_vocabulary=None, seed=0, per_row=False):
    """Random arguments of `verify` for drafts that are accepted about half of the time."""
    generator = torch.Generator().manual_seed(seed)
    target = 2 * torch.randn(batch, draft_length + 1, vocabulary, generator=generator)
    if draft_vocabulary is None:
        draft, ids = target[:, :-1] + torch.randn(batch, draft_length, vocabulary, generator=generator), None
    else:  # ids repeat
        ids = torch.randint(vocabulary, (batch, draft_vocabulary), generator=generator)
        ids = ids if per_row else ids[:1].expand(batch, -1)
        draft = target[:, :-1].gather(2, ids[:, None].expand(-1, draft_length, -1))
        draft = draft + torch.randn(draft.shape, generator=generator)
    drafted = torch.distributions.Categorical(logits=draft).sample() if draft_length else torch.zeros(batch, 0).long()
    if ids is not None:
        drafted = ids.gather(1, drafted)
        ids = ids.contiguous() if per_row else ids[0].contiguous()
    uniforms = torch.rand(batch, draft_length + 1, dtype=torch.float64, generator=generator)
    arguments = dict(target_logits=target.to(dtype), draft_tokens=drafted, draft_logits=draft.to(dtype), uniforms=uniforms)
    return arguments if ids is None else arguments | dict(draft_to_target=ids)


def probabilities(logits, temperature, threshold):
    """float64 [..., V]."""
    logits = logits.double()
    if threshold is not None:
        logits = logits.masked_fill(logits < threshold.double()[..., None], -INF)
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1)
    return ((logits - logits.amax(-1, keepdim=True)) / max(temperature, 2.0**-126)).softmax(-1)


def too_close(arguments, row, verdict, margin=5e-6):
    """Whether rounding may decide the row: a comparison that it came to, or the step its token lies on, by less than this."""
    draft_length = arguments["draft_tokens"].shape[1]
    length = arguments["lengths"][row].item() if arguments.get("lengths") is not None else draft_length
    temperature = [arguments.get(f"{side}_temperature", 1.0) for side in ("target", "draft")]
    temperature = [t[row].item() if isinstance(t, torch.Tensor) else t for t in temperature]
    uniforms, stop = arguments["uniforms"][row].double(), verdict.accepted_length[row].item()
    if temperature[0] == 0:
        return False

    def row_of(side, k):
        threshold = arguments.get(f"{side}_threshold")
        threshold = None if threshold is None else threshold[row, k]
        return probabilities(arguments[f"{side}_logits"][row, k], temperature[side == "draft"], threshold)

    def proposal(k):
        token = arguments["draft_tokens"][row, k]
        if arguments.get("mode") == "argmax":
            return torch.zeros(arguments["target_logits"].shape[-1], dtype=torch.float64).scatter_(0, token, 1)
        ids = arguments.get("draft_to_target")
        ids = None if ids is None else (ids if ids.dim() == 1 else ids[row])
        probs = row_of("draft", k)
        return probs if ids is None else torch.zeros(arguments["target_logits"].shape[-1]).double().scatter_add_(0, ids, probs)

    for k in range(min(stop + 1, length)):
        token = arguments["draft_tokens"][row, k]
        p, q = row_of("target", k)[token], proposal(k)[token]
        if (uniforms[k] * q - p).abs() < margin * torch.maximum(p, q):
            return True
    weights = row_of("target", stop)
    if stop < length:
        residual = (weights - proposal(stop)).clamp(min=0)
        if 0 < residual.sum() < 1e-4:
            return True  # little is left but rounding
        weights = residual if residual.sum() > 0 else weights
    steps = weights.cumsum(0)
    return bool(((uniforms[-1] * steps[-1] - steps).abs() < margin * steps[-1]).any())


def same_verdict(arguments, *, most_close=0.5):
    """The kernel's verdict is that of the reference in float64, but for rows that rounding decides."""
    verdict = verify(**{name: on_device(value) for name, value in arguments.items()}, backend="triton")
    logits = {name: value.double() for name, value in arguments.items() if name.endswith("_logits") and value is not None}
    expected = verify(**arguments | logits, backend="reference")
    close = [too_close(arguments, row, expected) for row in range(len(expected.accepted_length))]
    assert sum(close) <= most_close * len(close)
    kept = ~torch.tensor(close)
    assert verdict.tokens.dtype is verdict.accepted_length.dtype is torch.int64
    assert verdict.accepted_length.cpu()[kept].tolist() == expected.accepted_length[kept].tolist()
    assert verdict.tokens.cpu()[kept].tolist() == expected.tokens[kept].tolist()
    return verdict


MAPS = {"no map": {}, "shared map": dict(draft_vocabulary=25), "map per row": dict(draft_vocabulary=25, per_row=True)}


@pytest.mark.slow  # test_verify.py has the like for every backend
@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["sampled", "argmax"])
@pytest.mark.parametrize("maps", MAPS.values(), ids=MAPS)
def test_verdicts(dtype, mode, maps):
    lengths = []
    for seed in range(3):
        arguments = round_of(dtype, seed=seed, **maps) | dict(mode=mode)
        if seed == 1:
            arguments |= dict(lengths=torch.tensor([0, 1, 3, 4]), uniforms=arguments["uniforms"].float())
        lengths += same_verdict(arguments).accepted_length.tolist()
    assert len(set(lengths)) > 1


@runs
@pytest.mark.parametrize("maps", MAPS.values(), ids=MAPS)
@pytest.mark.parametrize("target_temperature", [0, 0.7, 1e-30, torch.tensor([0.0, 1.0, 0.5, 1e-30])])
@pytest.mark.parametrize("draft_temperature", [0, 1.5, torch.tensor([1.0, 0.0, 1e-30, 2.0])])
def test_verdicts_at_temperatures(maps, target_temperature, draft_temperature):
    arguments = round_of(torch.float32, **maps)
    same_verdict(arguments | dict(target_temperature=target_temperature, draft_temperature=draft_temperature))


@pytest.mark.slow  # test_verify.py has the like for every backend
@runs
@pytest.mark.parametrize("maps", MAPS.values(), ids=MAPS)
def test_verdicts_with_thresholds(maps):
    for seed in range(3):
        arguments = round_of(torch.float32, seed=seed, **maps)
        for side, count in (("target", 6), ("draft", 9)):
            arguments[f"{side}_threshold"] = arguments[f"{side}_logits"].topk(count).values[..., -1]
        same_verdict(arguments)


@runs
@pytest.mark.parametrize("draft_logits", ["given", None])
def test_a_cold_target_needs_no_proposal(draft_logits):
    arguments = round_of(torch.float32)
    arguments["draft_tokens"] = arguments["target_logits"][:, :-1].argmax(-1)
    arguments["draft_tokens"][0, 2] += 1
    if draft_logits is None:
        arguments["draft_logits"] = None
    assert same_verdict(arguments | dict(target_temperature=0)).accepted_length.tolist() == [2, 4, 4, 4]


@runs
@pytest.mark.parametrize("draft_logits", ["given", None])
def test_no_draft_draws_from_the_target(draft_logits):
    arguments = round_of(torch.float32, draft_length=0)
    if draft_logits is None:
        arguments["draft_logits"] = None
    same_verdict(arguments)


@runs
@pytest.mark.parametrize("mode", ["sampled", "argmax"])
@pytest.mark.parametrize("maps", MAPS.values(), ids=MAPS)
def test_corner_uniforms_never_emit_the_impossible(mode, maps):
    for uniform in (0.0, LAST):
        arguments = round_of(torch.float32, **maps) | dict(mode=mode)
        arguments["uniforms"][:] = uniform
        arguments["target_logits"][..., ::2] = -INF
        arguments["target_logits"][..., 30:] = -INF
        tokens = verify(**{name: on_device(value) for name, value in arguments.items()}, backend="triton").tokens
        assert (tokens[tokens >= 0] % 2 == 1).all()
        assert (tokens < 30).all()


@runs
def test_a_draft_like_the_target_is_accepted_whatever_the_uniform():
    arguments = round_of(torch.float32)
    arguments["draft_logits"], arguments["uniforms"][:] = arguments["target_logits"][:, :-1].clone(), LAST
    verdict = verify(**{name: on_device(value) for name, value in arguments.items()}, backend="triton")
    assert verdict.accepted_length.tolist() == [4] * 4


@runs
def test_without_residual_the_target_takes_its_place():
    """Target and proposal agree, and the drafted token is one that neither can say."""
    arguments = round_of(torch.float32)
    arguments["target_logits"][..., 7] = -INF
    arguments["draft_logits"] = arguments["target_logits"][:, :-1].clone()
    arguments["draft_tokens"][:, 1] = 7
    arguments["uniforms"][:, :-1] = 0.5
    verdict = same_verdict(arguments)
    assert verdict.accepted_length.tolist() == [1] * 4


@runs
@pytest.mark.parametrize("token", [-1, 40, 2**40])
def test_a_drafted_token_outside_the_vocabulary_is_rejected(token):
    arguments = round_of(torch.float32)
    arguments["uniforms"][:, 0] = 0
    arguments["draft_tokens"][:, 0] = token
    del arguments["draft_logits"]
    positional = [arguments["target_logits"], arguments["draft_tokens"], None, arguments["uniforms"]]
    verdict = verification.verify_triton(*[on_device(v) for v in positional], mode="argmax")
    assert verdict.accepted_length.tolist() == [0] * 4
    assert ((verdict.tokens[:, 0] >= 0) & (verdict.tokens[:, 0] < 40)).all()


@runs
@pytest.mark.parametrize("maps", [{}, dict(draft_vocabulary=200)], ids=["no map", "map"])
@pytest.mark.parametrize("processors", [1, 15, 60])
def test_slices_and_blocks_of_a_chain_agree(split, monkeypatch, maps, processors):
    monkeypatch.setattr(_common, "processors", lambda device: processors)
    for seed in range(2):
        same_verdict(round_of(torch.float32, batch=2, draft_length=2, vocabulary=500, seed=seed, **maps))


@runs
def test_a_long_chain(split):
    """More positions leave room for fewer slices of each."""
    arguments = round_of(torch.float32, batch=1, draft_length=33, vocabulary=1100)
    arguments["uniforms"][:, :-1] *= 0.2
    assert same_verdict(arguments, most_close=0).accepted_length.item() > 3


@runs
def test_strided_logits_and_rows_that_follow_each_other():
    """Calls of other shapes share one workspace, whose counters and spread rows must come back to zero."""
    for seed, (batch, draft_length, vocabulary) in enumerate([(1, 1, 9), (3, 2, 70), (2, 3, 20), (3, 1, 70)]):
        arguments = round_of(torch.float32, batch, draft_length, vocabulary, draft_vocabulary=8, seed=seed)
        for name in ("target_logits", "draft_logits"):
            arguments[name] = arguments[name].permute(2, 1, 0).contiguous().permute(2, 1, 0)
        same_verdict(arguments, most_close=1)


def test_backends_share_one_signature():
    import inspect

    for operation, public in (("evaluate", evaluate), ("verify", verify)):
        expected = dict(inspect.signature(public).parameters)
        del expected["backend"]
        ours = backends._load(operation, "triton")
        assert dict(inspect.signature(ours).parameters) == expected


# Compilation, in processes of their own.


def in_a_process(*arguments: str) -> object:
    """What this file prints when it is run as a script."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache}
        done = subprocess.run([sys.executable, __file__, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_compiles_without_spilling(architecture):
    """Ahead of time, for the arguments that the launchers really pass; all kernels in one process: starting one is slow."""
    for operation, usage in in_a_process("compile", str(architecture)).items():
        assert len(usage) >= 2, operation
        for name, resources in usage.items():
            assert resources["STACK"] == resources["LOCAL"] == 0, (operation, name, resources)
            assert resources["REG"] <= 128, (operation, name, resources)


def test_rounds_do_not_compile_anew():
    """Positions, rows, strides and addresses change from round to round; which options are there does not."""
    kernels = ("evaluate", "verify", "stack_linear", "stack_rms_norm", "swiglu", "rotary_append")
    assert in_a_process("keys") == dict.fromkeys(kernels, 1)


class Recorder:
    """Stands in for a driver and, on the kernels, for launching: keeps what would have been compiled or run."""

    def __init__(self, architecture: int):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", architecture, 32)
        self.kernels, self.keys = [], set()

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def install(self, kernel, *, compiles: bool) -> None:
        triton.runtime.driver.set_active(self)
        run, compile_key = kernel.run, kernel._do_compile

        def record(*args, grid, warmup, **kwargs):
            self.kernels.append(run(*args, grid=grid, warmup=True, **kwargs))

        def key_only(key, *args, **kwargs):
            self.keys.add(key)
            return compile_key(key, *args, **kwargs) if compiles else None

        kernel.run, kernel._do_compile = record, key_only


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local memory of a kernel, from the cuobjdump that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        shown = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", shown)}


def run_evaluate(dtype, *, drafters=2, batch=2, positions=3, vocabulary=8192, everything=False, top_k=None, ids=False, at=0):
    """The launcher on tensors whose values do not matter; `at` moves the small tensors off their alignment."""
    draft_vocabulary = 4096 if everything or ids else vocabulary
    options = dict(top_k=top_k)
    if everything or ids:
        options |= dict(draft_to_target=torch.zeros(drafters, draft_vocabulary, dtype=torch.int32))
    if everything:
        options |= dict(
            lengths=torch.zeros(batch + at, dtype=torch.int64)[at:],
            target_temperature=torch.ones(batch + at)[at:],
            drafter_temperature=torch.ones(batch + at)[at:],
            target_threshold=torch.zeros(batch, positions),
            drafter_threshold=torch.zeros(drafters, batch, positions),
            draft_length=2,
            top_k=top_k or 4,
        )
    evaluation.evaluate_triton(
        torch.empty(batch, positions, vocabulary, dtype=dtype),
        torch.empty(drafters, batch, positions, draft_vocabulary, dtype=dtype),
        torch.zeros(batch * positions + at, dtype=torch.int64)[at:].view(batch, positions),
        **options,
    )


def run_verify(
    dtype, *, batch=2, draft_length=3, vocabulary=65536, everything=False, ids=False, mode="sampled", wide=False, at=0
):
    draft_vocabulary = 4096 if everything or ids else vocabulary
    options = dict(mode=mode)
    if everything or ids:
        options |= dict(draft_to_target=torch.zeros(draft_vocabulary, dtype=torch.int32))
    if everything:
        options |= dict(
            lengths=torch.zeros(batch + at, dtype=torch.int64)[at:],
            target_temperature=torch.ones(batch + at)[at:],
            draft_temperature=torch.ones(batch + at)[at:],
            target_threshold=torch.zeros(batch, draft_length + 1),
            draft_threshold=torch.zeros(batch, draft_length),
        )
    verification.verify_triton(
        torch.empty(batch, draft_length + 1, vocabulary, dtype=dtype),
        torch.zeros(batch * draft_length + at, dtype=torch.int64)[at:].view(batch, draft_length),
        torch.empty(batch, draft_length, draft_vocabulary, dtype=dtype),
        torch.zeros(batch, draft_length + 1, dtype=torch.float64 if wide else torch.float32),
        **options,
    )


def run_stack_linear(dtype, *, rows=2, columns=4096, inner=4096, table=False, at=0):
    weight = torch.empty(3, columns, inner, dtype=dtype)
    index = torch.zeros(3 * columns + at, dtype=torch.int64)[at:].view(3, columns) if table else None
    which = torch.zeros(rows + at, dtype=torch.int64)[at:]
    head_layers.stack_linear_triton(torch.empty(rows, inner, dtype=dtype), weight[0] if table else weight, which, index=index)


def run_stack_rms_norm(dtype, *, rows=2, width=4096, alone=False, at=0):
    x = torch.empty(*(() if alone else (3,)), rows, width, dtype=dtype)
    which = torch.zeros(rows + at, dtype=torch.int64)[at:] if alone else None
    head_layers.stack_rms_norm_triton(x, torch.empty(3, width, dtype=dtype), 1e-5, which)


def run_swiglu(dtype, *, rows=2, width=4096):
    head_layers.swiglu_triton(torch.empty(3, rows, 2 * width, dtype=dtype))


def run_rotary_append(dtype, *, rows=2, steps=3, capacity=256, head_dim=128, alone=False, at=0):
    ids = torch.zeros(rows + at, dtype=torch.int64)[at:]
    keys, values = torch.empty(2, 3, rows, 8, capacity, head_dim, dtype=dtype)
    qkv = torch.empty(*(() if alone else (3,)), rows, steps, 48 * head_dim, dtype=dtype)
    head_layers.rotary_append_triton(qkv, torch.empty(head_dim // 2), ids, ids, keys, values, ids, ids if alone else None)


FLOAT32, BFLOAT16, FLOAT16 = DTYPES
VARIANTS = {
    "evaluate": [
        (BFLOAT16, dict(everything=True)),
        (FLOAT32, dict(everything=True, top_k=32, vocabulary=8191)),
        (FLOAT32, {}),
        (FLOAT16, dict(everything=True, positions=70)),
        (BFLOAT16, dict(positions=70)),
        (FLOAT16, dict(ids=True)),
    ],
    "verify": [
        (BFLOAT16, dict(everything=True)),
        (FLOAT16, dict(everything=True, vocabulary=65537, wide=True)),
        (FLOAT32, dict(wide=True)),
        (BFLOAT16, dict(mode="argmax")),
        (FLOAT32, dict(ids=True)),
    ],
    "stack_linear": [(BFLOAT16, {}), (FLOAT32, dict(table=True)), (FLOAT16, dict(table=True, inner=570)), (FLOAT32, {})],
    "stack_rms_norm": [(BFLOAT16, {}), (FLOAT32, dict(alone=True)), (FLOAT16, dict(alone=True, width=5001))],
    "swiglu": [(BFLOAT16, {}), (FLOAT32, {}), (FLOAT16, dict(width=577))],
    "rotary_append": [(BFLOAT16, {}), (FLOAT32, dict(alone=True)), (FLOAT16, dict(head_dim=80))],
}
RUN = {
    "evaluate": run_evaluate,
    "verify": run_verify,
    "stack_linear": run_stack_linear,
    "stack_rms_norm": run_stack_rms_norm,
    "swiglu": run_swiglu,
    "rotary_append": run_rotary_append,
}
KERNEL = {
    "evaluate": evaluation.evaluate_kernel,
    "verify": verification.verify_kernel,
    "stack_linear": head_layers.stack_linear_kernel,
    "stack_rms_norm": head_layers.stack_rms_norm_kernel,
    "swiglu": head_layers.swiglu_kernel,
    "rotary_append": head_layers.rotary_append_kernel,
}


def compile_variants(operation: str, architecture: int) -> dict[str, dict[str, int]]:
    """Resources of each variant: all of them for sm_90, the largest for the others, whose code differs little."""
    recorder = Recorder(architecture)
    recorder.install(KERNEL[operation], compiles=True)
    _common.processors = lambda device: 132
    usage = {}
    for dtype, options in VARIANTS[operation][: None if architecture == 90 else 2]:
        RUN[operation](dtype, **options)
        usage[f"{dtype} {options}"] = resources(recorder.kernels[-1].asm["cubin"])
    return usage


def count_keys() -> dict[str, int]:
    """What rounds of one decoding would compile: different lengths and rows, tensors that start anywhere."""
    _common.processors = lambda device: 132
    counts = {}
    for operation, rounds in {
        "stack_linear": [dict(rows=r, at=r % 2) for r in (1, 2, 3, 16)],
        "stack_rms_norm": [dict(rows=r, alone=True, at=r % 2) for r in (1, 2, 16)],
        "swiglu": [dict(rows=r) for r in (1, 2, 16)],
        "rotary_append": [
            dict(rows=r, steps=t, capacity=c, alone=True, at=r % 2) for r, t, c in [(1, 1, 256), (2, 5, 300), (16, 16, 1000)]
        ],
        "evaluate": [
            dict(everything=True, positions=p, batch=b, at=p % 2)
            for p, b in [(1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (16, 1), (5, 2)]
        ],
        "verify": [
            dict(everything=True, draft_length=k, batch=b, at=k % 2)
            for k, b in [(1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (15, 1), (3, 2)]
        ],
    }.items():
        recorder = Recorder(90)
        recorder.install(KERNEL[operation], compiles=False)
        for options in rounds:
            RUN[operation](BFLOAT16, **options)
        counts[operation] = len(recorder.keys)
    return counts


if __name__ == "__main__":
    if sys.argv[1] == "compile":
        print(json.dumps({operation: compile_variants(operation, int(sys.argv[2])) for operation in KERNEL}))
    else:
        print(json.dumps(count_keys()))
