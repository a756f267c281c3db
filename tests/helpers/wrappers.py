"""Models within `torch.compile` and PEFT, and how each is taken as a target: a list behind docs/compatibility.md."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from helpers.texts import tiny


@dataclass(frozen=True)
class Wrapper:
    """A way to wrap a model."""

    name: str
    wrap: Callable
    """(model) -> what is handed to `Decoder` and whose `generate` is called."""
    refused: str = ""
    """What the refusal says; empty: the text is plain `generate`'s."""


def lora(model, kind: str = "LoraConfig", **options):
    """Returns the model with random adapters."""
    import peft

    config = getattr(peft, kind)(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], **options)
    return _randomised(peft.get_peft_model(model, config))


def _randomised(adapted):
    random = torch.Generator().manual_seed(1)
    adapted = adapted.to(torch.float64).eval()
    for name, weight in adapted.named_parameters():
        if any(part in name for part in ("lora_", "ia3_", "hada_", "lokr_", "prompt", "prefix")):
            weight.data = 0.5 * torch.randn(weight.shape, generator=random, dtype=weight.dtype)
    return adapted


def prompt_learning(model, kind: str):
    import peft

    return _randomised(peft.get_peft_model(model, getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)))


def merged(model):
    adapted = lora(model)
    adapted.merge_adapter()
    return adapted


def compiled_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def compiled_layers(model):
    model.model = torch.compile(model.model, backend="eager")
    return model


PROMPTS = "expected PEFT adapters that are part of the model's layers"
WRAPPERS = (
    Wrapper("`torch.compile(model)`", lambda model: torch.compile(model, backend="eager")),
    Wrapper("`model.compile()`", compiled_in_place),
    Wrapper("`model.forward = torch.compile(model.forward)`", compiled_forward),
    Wrapper("`model.model = torch.compile(model.model)`", compiled_layers),
    Wrapper("PEFT LoRA", lora),
    Wrapper("PEFT LoRA, merged in place", merged),
    Wrapper("PEFT LoRA, merged and unloaded", lambda model: lora(model).merge_and_unload()),
    Wrapper("PEFT DoRA", lambda model: lora(model, use_dora=True)),
    Wrapper("PEFT (IA)3", lambda model: lora(model, "IA3Config", feedforward_modules=[])),
    Wrapper("PEFT LoRA within `torch.compile`", lambda model: torch.compile(lora(model), backend="eager")),
    Wrapper("PEFT prompt tuning", lambda model: prompt_learning(model, "PromptTuningConfig"), PROMPTS),
    Wrapper("PEFT prefix tuning", lambda model: prompt_learning(model, "PrefixTuningConfig"), PROMPTS),
    Wrapper("PEFT p-tuning", lambda model: prompt_learning(model, "PromptEncoderConfig"), PROMPTS),
)


def build(wrapper: Wrapper):
    """Returns a small model within the wrapper."""
    return wrapper.wrap(tiny())
