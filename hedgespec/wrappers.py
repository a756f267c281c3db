"""Wrappers around a model (`torch.compile`, PEFT, data parallelism) and the model inside them."""

from __future__ import annotations

import sys

from torch import nn

PARALLEL = ("DataParallel", "DistributedDataParallel")
"""Classes of torch.nn.parallel that hold the model in `module`."""
PEFT_REFUSED = {
    "ADAPTION_PROMPT": "it adds a prompt to the attention of its layers",
    "POLY": "its layers are told a task with every call",
    "XLORA": "it runs the model once more for every forward",
}
"""Kinds of PEFT adapters whose forward is more than the base model's with other layers, and why."""


def is_compiled(module) -> bool:
    """Returns whether the module is what `torch.compile(module)` returns."""
    return isinstance(module, nn.Module) and isinstance(module._modules.get("_orig_mod"), nn.Module)


def unwrap(model, name: str = "target"):
    """Returns the transformers model inside wrappers that leave its text unchanged.

    `torch.compile(model)` is taken for the model itself, which then runs as it is. A `PeftModel` is taken for its base model,
    whose layers hold the adapters: switching them on or off, or merging them, has the effect it has in PEFT.

    Args:
        model: a transformers model, or one within `torch.compile`, a `PeftModel`, `DataParallel` or
            `DistributedDataParallel`, in any order.
        name: what errors call it.

    Raises: ValueError for a PEFT adapter that changes what goes into the model (prompt tuning, prefix tuning and the like).
    """
    while isinstance(model, nn.Module):
        if is_compiled(model):
            model = model._orig_mod
        elif type(model).__name__ in PARALLEL and type(model).__module__.startswith("torch."):
            model = model.module
        elif _is_peft(model):
            _check_adapters(model, name)
            model = model.get_base_model()
        else:
            break
    return model


def check_rows(model, rows: int) -> None:
    """Refuses what PEFT's `generate` tells adapters about the rows of its batch, which leave the batch as they end.

    Raises: ValueError.
    """
    if "peft" not in sys.modules:
        return
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            told = getattr(hook, "keywords", None) or {}
            if told.get("alora_offsets") is not None:
                raise ValueError("alora_offsets: expected adapters that do not depend on where a text invokes them, got aLoRA")
            if rows > 1 and told.get("adapter_names") is not None:
                raise ValueError(f"adapter_names: expected a batch of 1, whose rows end at different times, got {rows}")


def _is_peft(model: nn.Module) -> bool:
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, (peft.PeftModel, peft.PeftMixedModel))


def _check_adapters(model, name: str) -> None:
    active = getattr(model, "active_adapters", None) or [model.active_adapter]
    active = [active] if isinstance(active, str) else active
    for adapter in active:
        config = model.peft_config[adapter]
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        reason = PEFT_REFUSED.get(kind)
        if config.is_prompt_learning:
            reason = "it puts a prompt of its own before the text"
        elif getattr(config, "alora_invocation_tokens", None):
            reason = "where it begins depends on the text (alora_invocation_tokens)"
        if reason is not None:
            raise ValueError(
                f"{name}: expected PEFT adapters that are part of the model's layers (LoRA and the like), got {kind} "
                f"({adapter!r}): {reason}"
            )
