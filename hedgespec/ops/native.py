"""Launchers of the compiled kernels: checked tensors become the raw pointers and strides of csrc/hedgespec.h."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch

from hedgespec import _native
from hedgespec.ops.launch import as_float32, dense_vocabulary, empty_evaluation, not_quite_zero, split_temperature
from hedgespec.ops.workspace import workspace
from hedgespec.records import Evaluation, Verdict, score_row

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

Launch = Callable[[object, torch.device], None]
"""Runs or enqueues a kernel: parameters of the module's own class, and the device of the tensors."""


def evaluator(module: ModuleType, launch: Launch) -> Callable[..., Evaluation]:
    """`evaluate` by a kernel of `module`. The function that is returned takes its arguments as checked.

    Args:
        module: the compiled module: hedgespec._native, or another build of it.
        launch: what runs its kernel.
    """

    def evaluate(
        target_logits: torch.Tensor,
        drafter_logits: torch.Tensor,
        tokens: torch.Tensor,
        *,
        lengths: torch.Tensor | None = None,
        draft_to_target: torch.Tensor | None = None,
        target_temperature: float | torch.Tensor = 1.0,
        drafter_temperature: float | torch.Tensor = 1.0,
        target_threshold: torch.Tensor | None = None,
        drafter_threshold: torch.Tensor | None = None,
        top_k: int | None = None,
        draft_length: int | None = None,
        estimator: str = "exact",
        mode: str = "sampled",
    ) -> Evaluation:
        # A call takes a few microseconds, so nothing here is done twice, or for arguments that were not given. Every tensor
        # whose address is handed over must keep a name until the launch returns.
        target_strides, drafter_strides = target_logits.stride(), drafter_logits.stride()
        if target_strides[2] != 1:
            target_logits = target_logits.contiguous()
            target_strides = target_logits.stride()
        if drafter_strides[3] != 1:
            drafter_logits = drafter_logits.contiguous()
            drafter_strides = drafter_logits.stride()
        tokens = tokens.contiguous()
        if lengths is not None:
            lengths = lengths.contiguous()
        target_threshold, drafter_threshold = as_float32(target_threshold), as_float32(drafter_threshold)
        target_temperature, target_temperatures = split_temperature(target_temperature)
        drafter_temperature, drafter_temperatures = split_temperature(drafter_temperature)

        shape, device = drafter_logits.shape, target_logits.device
        drafters, batch, positions, _ = shape
        result = empty_evaluation(drafters, batch, positions, top_k, draft_length, device)
        if batch and positions:
            parameters = module.EvaluateParams(
                shape,
                target_logits.shape[2],
                target_logits.data_ptr(),
                _DTYPES[target_logits.dtype],
                target_strides,
                drafter_logits.data_ptr(),
                _DTYPES[drafter_logits.dtype],
                drafter_strides,
                tokens.data_ptr(),
                _address(lengths),
                _address(draft_to_target),
                _address(target_threshold),
                _address(drafter_threshold),
                target_temperature,
                _address(target_temperatures),
                drafter_temperature,
                _address(drafter_temperatures),
                top_k or 0,
                draft_length or 0,
                estimator == "product",
                score_row(mode, top_k),
                result.scores.data_ptr(),
                _address(result.expected_accepted_length),
                _address(result.length_losses),
            )
            launch(parameters, device)
        return result

    return evaluate


def verifier(module: ModuleType, launch: Launch) -> Callable[..., Verdict]:
    """`verify` by a kernel of `module`, likewise."""

    def verify(
        target_logits: torch.Tensor,
        draft_tokens: torch.Tensor,
        draft_logits: torch.Tensor | None,
        uniforms: torch.Tensor,
        *,
        mode: str = "sampled",
        lengths: torch.Tensor | None = None,
        draft_to_target: torch.Tensor | None = None,
        target_temperature: float | torch.Tensor = 1.0,
        draft_temperature: float | torch.Tensor = 1.0,
        target_threshold: torch.Tensor | None = None,
        draft_threshold: torch.Tensor | None = None,
    ) -> Verdict:
        target_logits = dense_vocabulary(target_logits)
        draft_logits = None if mode == "argmax" or draft_logits is None else dense_vocabulary(draft_logits)
        draft_tokens, uniforms = draft_tokens.contiguous(), uniforms.contiguous()
        lengths = None if lengths is None else lengths.contiguous()
        target_threshold, draft_threshold = as_float32(target_threshold), as_float32(draft_threshold)
        target_shared, target_temperatures = split_temperature(not_quite_zero(target_temperature))
        draft_shared, draft_temperatures = split_temperature(not_quite_zero(draft_temperature))

        device = target_logits.device
        batch, positions, vocabulary = target_logits.shape
        accepted_length = torch.empty(batch, dtype=torch.int64, device=device)
        tokens = torch.empty((batch, positions), dtype=torch.int64, device=device)
        if batch:
            map_stride = 0 if draft_to_target is None or draft_to_target.dim() == 1 else draft_to_target.shape[1]
            parameters = module.VerifyParams(
                (batch, positions - 1, vocabulary, vocabulary if draft_logits is None else draft_logits.shape[2]),
                target_logits.data_ptr(),
                _DTYPES[target_logits.dtype],
                target_logits.stride(),
                _address(draft_logits),
                0 if draft_logits is None else _DTYPES[draft_logits.dtype],
                (0, 0, 0) if draft_logits is None else draft_logits.stride(),
                draft_tokens.data_ptr(),
                uniforms.data_ptr(),
                uniforms.dtype is torch.float64,
                _address(lengths),
                0 if draft_logits is None else _address(draft_to_target),
                map_stride,
                _address(target_threshold),
                _address(draft_threshold),
                target_shared,
                _address(target_temperatures),
                draft_shared,
                _address(draft_temperatures),
                accepted_length.data_ptr(),
                tokens.data_ptr(),
            )
            launch(parameters, device)
        return Verdict(accepted_length, tokens)

    return verify


# The layer operations of a stack of heads. Per-row arguments are contiguous or made so; a tensor whose address is handed over
# must keep a name until the call returns.


def stack_linear_cpu(
    x: torch.Tensor, weight: torch.Tensor, which: torch.Tensor | None = None, *, index: torch.Tensor | None = None
) -> torch.Tensor:
    weight = weight.contiguous()
    if x.stride(-1) != 1:
        x = x.contiguous()
    if index is None:
        (heads, columns, inner), table_rows = weight.shape, 0
    else:
        index = index.contiguous()
        (heads, columns), (table_rows, inner) = index.shape, weight.shape
    which, strides = _rows_of(x, which)
    rows = x.shape[-2]
    out = torch.empty((rows, columns) if which is not None else (heads, rows, columns), dtype=torch.float32, device="cpu")
    _native.linear(
        (heads, rows, columns, inner), x.data_ptr(), strides, _address(which), weight.data_ptr(), _address(index), table_rows,
        out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def stack_rms_norm_cpu(x: torch.Tensor, weight: torch.Tensor, eps: float, which: torch.Tensor | None = None) -> torch.Tensor:
    weight = weight.contiguous()
    if x.stride(-1) != 1:
        x = x.contiguous()
    heads, width = weight.shape
    which, strides = _rows_of(x, which)
    if which is None and x.shape[0] == 1:
        strides = 0, strides[1]
    rows = x.shape[-2]
    out = torch.empty((rows, width) if which is not None else (heads, rows, width), dtype=torch.float32, device="cpu")
    _native.stack_rms_norm(
        (heads, rows, width), x.data_ptr(), strides, _address(which), weight.data_ptr(), eps, out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def swiglu_cpu(gate_up: torch.Tensor) -> torch.Tensor:
    gate_up = gate_up.contiguous()
    *leading, both = gate_up.shape
    out = torch.empty((*leading, both // 2), dtype=torch.float32, device="cpu")
    if out.numel():
        _native.swiglu(gate_up.data_ptr(), out.data_ptr(), out.numel() // (both // 2), both // 2, torch.get_num_threads())
    return out


def rotary_append_cpu(
    qkv: torch.Tensor,
    frequency: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: torch.Tensor,
    which: torch.Tensor | None = None,
) -> torch.Tensor:
    qkv, frequency, which = qkv.contiguous(), frequency.contiguous(), None if which is None else which.contiguous()
    positions, slots, rows = positions.contiguous(), slots.contiguous(), rows.contiguous()
    heads, _, kv_heads, _, head_dim = keys.shape
    *leading, steps, width = qkv.shape
    attention_heads = width // head_dim - 2 * kv_heads
    queries = torch.empty((*leading, attention_heads, steps, head_dim), dtype=torch.float32, device="cpu")
    _native.rotary_append(
        (heads, leading[-1], steps, attention_heads, kv_heads, head_dim), qkv.data_ptr(), frequency.data_ptr(),
        positions.data_ptr(), slots.data_ptr(), rows.data_ptr(), _address(which), keys.data_ptr(), values.data_ptr(),
        keys.stride(), queries.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return queries


def _rows_of(x: torch.Tensor, which: torch.Tensor | None) -> tuple[torch.Tensor | None, tuple[int, int]]:
    """`which`, contiguous, and the strides of x by head and by row."""
    return (None, (x.stride(0), x.stride(1))) if which is None else (which.contiguous(), (0, x.stride(0)))


def require_cuda() -> None:
    """Raises ImportError, with the reason, where the CUDA kernels cannot run."""
    if not _native.cuda:
        raise ImportError("the native module was built without CUDA")
    if not torch.cuda.is_available():
        raise ImportError("torch sees no GPU")


def _on_cpu(run: Callable[[object, int], None]) -> Launch:
    threads = torch.get_num_threads
    return lambda parameters, device: run(parameters, threads())


def _on_cuda(run: Callable[[object, int, int], None], workspace_bytes: Callable[[object], int], purpose: str) -> Launch:
    def launch(parameters: object, device: torch.device) -> None:
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream().cuda_stream
            scratch = workspace(device, stream, workspace_bytes(parameters), purpose)
            run(parameters, scratch.data_ptr(), stream)

    return launch


evaluate_cpu = evaluator(_native, _on_cpu(_native.evaluate_cpu))
verify_cpu = verifier(_native, _on_cpu(_native.verify_cpu))
if _native.cuda:
    evaluate_cuda = evaluator(_native, _on_cuda(_native.evaluate_cuda, _native.evaluate_cuda_workspace_bytes, "evaluate"))
    verify_cuda = verifier(_native, _on_cuda(_native.verify_cuda, _native.verify_cuda_workspace_bytes, "verify"))


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
