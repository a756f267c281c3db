"""Checks of the arguments of `generate`: those that a decoder does not support are refused before the first token."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache, GenerationConfig
from transformers.distributed.fsdp import is_fsdp_managed_module
from transformers.generation import GenerationMode
from transformers.generation.streamers import BaseStreamer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from hedgespec.decoder import Decoder
from hedgespec.runtime.compat import CACHE_NAME, CACHE_NAMES
from hedgespec.runtime.positions import length_dependent

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.ASSISTED_GENERATION)
"""Supported modes. With a custom loop `generate` itself does not refuse the others."""
PREPARED = {"attention_mask", "position_ids", *CACHE_NAMES, "use_cache", "logits_to_keep", "cache_position", "synced_gpus"}
"""Arguments of the model that `generate` prepares and that are derived from others."""
MODALITIES = ("mm_token_type_ids", "token_type_ids")
"""Arguments of vision-language models: 0 for text, other numbers for images and videos."""
RECORDED = ("output_attentions", "output_hidden_states")
"""Options of `generate` for results that a round does not keep."""
SYNCED = "synced_gpus: expected False, because processes would not take the same number of rounds"


def refuse(
    decoder: Decoder,
    model: PreTrainedModel,
    config: GenerationConfig,
    streamer: BaseStreamer | None,
    batch: int,
    model_kwargs: dict,
) -> None:
    """Raises ValueError for a model, an option or an argument of the model that the decoder does not support.

    Args:
        config: the options of the call.
        batch: number of rows.
        model_kwargs: the arguments of the model, as `generate` passes them to a custom loop.
    """
    if not any(module is model for module in decoder.target.modules()):
        raise ValueError("custom_generate: expected a decoder whose target is this model, got another's")
    if model_kwargs.get("inputs_embeds") is not None:
        raise ValueError("inputs_embeds: expected input_ids, which drafters read, got embeddings alone")
    for name in RECORDED:
        if getattr(config, name) or model_kwargs.get(name):
            raise ValueError(f"{name}: expected False, a round computes several tokens at once and keeps none of it")
    parameters = inspect.signature(model.forward).parameters
    sees = getattr(model.config, "vision_config", None) is not None
    strange = sorted(
        name for name, value in model_kwargs.items()
        if name not in PREPARED and not _says_nothing(value, parameters.get(name))
        and not (sees and name in MODALITIES and isinstance(value, torch.Tensor) and not value.any())
    )  # fmt: skip
    if strange:
        raise ValueError(f"{strange[0]}: expected no such argument for the model, which drafters would not see")
    if config.num_beams > 1:
        raise ValueError(f"num_beams: expected 1, speculative decoding follows one text, got {config.num_beams}")
    if config.prefill_chunk_size is not None and length_dependent(decoder.target):
        raise ValueError(
            "prefill_chunk_size: expected None for a target whose rotary factors follow the length of what it reads, got "
            f"{config.prefill_chunk_size}"
        )
    if (mode := config.get_generation_mode()) not in MODES:
        raise ValueError(f"generation_config: expected greedy search or sampling, got {mode.value.replace('_', ' ')}")
    if streamer is not None and batch > 1:
        raise ValueError(f"streamer: expected a batch of 1, rows advance each at its own pace, got {batch}")
    # The flag is TextStreamer's: `generate` has passed it the prompt, and it would print a second one as new text.
    if streamer is not None and getattr(streamer, "next_tokens_are_prompt", True) is False:
        raise ValueError("streamer: expected it in hedgespec.custom_generate alone, got one that was shown a prompt already")
    if model_kwargs.get("synced_gpus") or _is_synced(model):
        raise ValueError(SYNCED)


def _is_synced(model: PreTrainedModel) -> bool:
    """Returns whether several processes share the model's weights, by DeepSpeed ZeRO-3 or FSDP. `generate` then sets
    `synced_gpus`, which it does not pass to a custom loop."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return False
    return is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model)


def _says_nothing(value: Any, parameter: inspect.Parameter | None) -> bool:
    """Returns whether a value for this parameter of the model's forward is equivalent to leaving it out: None, an empty
    collection, or False unless the default is True."""
    if value is False:
        return parameter is None or parameter.default is not True
    return value is None or (isinstance(value, (dict, list, tuple)) and not value)


def check_positions(position_ids: torch.Tensor | None, prompts: list[tuple[torch.Tensor, int]]) -> None:
    """Raises ValueError unless positions [B, T], or [n, B, T] of a model that counts in n dimensions, count a row's tokens."""
    if position_ids is None:
        return
    planes = position_ids if position_ids.ndim == 3 else position_ids[None]
    for plane in planes.expand(-1, len(prompts), -1).tolist():
        for row, (prompt, padding) in zip(plane, prompts):
            own = len(prompt) - padding
            if row[-own:] != list(range(own))[-len(row) :]:
                raise ValueError(f"position_ids: expected 0, 1, ... from a row's first token on, got {row}")


def check_whole(
    input_ids: torch.Tensor, mask: torch.Tensor | None, past: DynamicCache | None, config: GenerationConfig
) -> None:
    """Raises ValueError if `input_ids` are only the tokens that follow a cache, which `generate` itself accepts.

    A mask, or the length that `generate` notes before it drops a mask of ones, is then longer than `input_ids`.
    """
    count = input_ids.shape[1]
    whole = getattr(config, "_mask_length", count) if mask is None else mask.shape[1]
    if past is not None and max(whole, past.get_seq_length()) > count:
        raise ValueError(
            f"input_ids: expected the whole text, which drafters read, also where {CACHE_NAME} holds its beginning, got "
            f"{count} tokens behind a cache of {past.get_seq_length()}"
        )


def split_cache(cache: Any, config: GenerationConfig) -> tuple[DynamicCache | None, DynamicCache | None]:
    """Returns the caller's cache, which is filled at the end, and the same cache if it already holds tokens; None for each that
    does not apply. Raises ValueError for a cache of another kind."""
    if cache is None:
        return None, None
    if type(cache) is not DynamicCache or cache.offloading:
        if config.cache_implementation is None or "static" not in config.cache_implementation:
            name = CACHE_NAME if config.cache_implementation is None else "cache_implementation"
            kind = "an offloaded one" if getattr(cache, "offloading", False) else type(cache).__name__
            raise ValueError(f"{name}: expected a DynamicCache that stays where it is, got {kind}")
        return None, None  # a static cache that `generate` made: the decoder uses its own buffers
    return cache, cache if cache.get_seq_length() else None
