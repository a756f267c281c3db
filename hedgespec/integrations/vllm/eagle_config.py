"""Checks of vLLM's configuration, and the configuration of every head of a pool."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm.compilation.breakable_cudagraph import is_breakable_cudagraph_enabled
from vllm.config import VllmConfig, replace

from hedgespec.errors import EngineError, PoolError


def check_config(config: VllmConfig) -> None:
    """Raises EngineError for a configuration of vLLM that is not supported or was not tested."""
    spec, parallel = config.speculative_config, config.parallel_config
    if spec is None or spec.method != "eagle3":
        raise EngineError(f'speculative_config: expected method "eagle3", got {spec and spec.method!r}')
    if not spec.disable_padded_drafter_batch:
        raise EngineError('speculative_config: expected "disable_padded_drafter_batch": true, got false')
    if config.scheduler_config.async_scheduling:
        raise EngineError("async_scheduling: expected --no-async-scheduling, got async scheduling")
    if config.use_v2_model_runner:
        raise EngineError("VLLM_USE_V2_MODEL_RUNNER: expected 0 in the environment, got vLLM's second model runner")
    for name, expected, got in (
        ("speculative_config: draft_sample_method", "greedy", spec.draft_sample_method),
        ("speculative_config: rejection_sample_method", "standard", spec.rejection_sample_method),
        ("speculative_config: parallel_drafting", False, spec.parallel_drafting),
        ("pipeline_parallel_size", 1, parallel.pipeline_parallel_size),
        ("data_parallel_size", 1, parallel.data_parallel_size),
        ("enable_eplb", False, parallel.enable_eplb),
        ("VLLM_USE_BREAKABLE_CUDAGRAPH", False, is_breakable_cudagraph_enabled()),
        ("model: one with inputs other than text", False, config.model_config.supports_multimodal_inputs),
        ("model: one with M-RoPE", False, config.model_config.uses_mrope),
    ):
        if got != expected:
            raise EngineError(f"{name}: expected {expected}, got {got}")


@dataclass(eq=False)
class Head:
    """One head of the pool."""

    name: str
    speculative: Any
    """vLLM's SpeculativeConfig, with this head as the drafter."""
    model: Any = None


def speculative_with(spec: Any, folder: str) -> Any:
    """Returns vLLM's speculative configuration for another head, which vLLM reads itself."""
    try:
        # Values that vLLM derived from the first head are reset, and so are its defaults of 0, which it does not accept.
        return replace(
            spec,
            model=folder,
            draft_model_config=None,
            draft_parallel_config=None,
            prompt_lookup_max=None,
            prompt_lookup_min=None,
        )
    except Exception as error:
        raise PoolError(f"drafters: expected a folder with an EAGLE-3 head that vLLM reads, got {folder} ({error})") from error


def width_of(config: Any) -> int:
    return config.get_hidden_size()


def layers_of(config: Any) -> tuple[int, ...] | str:
    """Returns the target's layers that a head reads. They must be the same for all heads, because vLLM passes one set."""
    own = config.hf_config
    nested = getattr(own, "eagle_config", None) or {}
    if not nested.get("use_aux_hidden_state", True):
        return "last"
    found = getattr(own, "eagle_aux_hidden_state_layer_ids", None) or nested.get("eagle_aux_hidden_state_layer_ids")
    return tuple(found) if found else "default"


def same_folder(one: str, other: str) -> bool:
    return one == other or Path(one).expanduser().resolve() == Path(other).expanduser().resolve()
