"""The public functions: a model that always decodes with drafters, and a decoding loop for one call."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList, StopStringCriteria
from transformers.generation.streamers import BaseStreamer

from hedgespec.config import DecodeConfig
from hedgespec.decoder import Decoder
from hedgespec.drafters import Drafter
from hedgespec.integrations.transformers.checks import SYNCED
from hedgespec.integrations.transformers.loop import decode
from hedgespec.ops.linear import is_compiled
from hedgespec.runtime.wrappers import unwrap

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model, drafters: Sequence[Drafter] | Decoder, config: DecodeConfig | None = None) -> Model:
    """Makes `model.generate` decode with drafters until `restore(model)` is called. Only this instance is changed.

    Args:
        model: the target, as `Decoder` takes it.
        drafters: a pool, or a decoder whose target is this model.
        config: the decoder's configuration; must be None if a decoder is given.

    Returns: the model.

    Raises: ValueError if the model is accelerated already or the decoder has another target; and what `Decoder` raises.
    """
    holder = _holder(model)
    if "generate" in vars(holder):
        raise ValueError(f"model: expected its own generate, got {model.generate!r}; hedgespec.restore(model) puts it back")
    if isinstance(drafters, Decoder):
        if config is not None:
            raise ValueError("config: expected None beside a decoder, which has its own")
        if drafters.target is not unwrap(model, "model"):
            raise ValueError("drafters: expected a decoder whose target is this model, got another's")
        decoder = drafters
    else:
        decoder = Decoder(model, drafters, config)
    holder.generate = _Accelerated(decoder)
    return model


def restore(model: Model) -> Model:
    """Gives the model its own `generate` back, and returns it. Raises ValueError if it is not accelerated."""
    holder = _holder(model)
    if not isinstance(vars(holder).get("generate"), _Accelerated):
        raise ValueError("model: expected one that hedgespec.accelerate was called with")
    del holder.generate
    return model


def _holder(model: Any) -> Any:
    """Returns the module that `model.generate = ...` sets the attribute on; a compiled module passes it on to the original."""
    while is_compiled(model):
        model = model._orig_mod
    return model


class _Accelerated:
    """The `generate` of an accelerated model. It also handles the arguments that `generate` does not pass to a custom loop.

    The only reference to the model is the decoder's, so that a copy of the model, pickled or deep, gets a `generate` of its
    own.
    """

    def __init__(self, decoder: Decoder):
        self.decoder = decoder

    @property
    def _plain(self) -> Callable:
        return MethodType(type(self.decoder.target).generate, self.decoder.target)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._plain)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = self.__signature__.bind(*args, **kwargs).arguments
        arguments = {name: value for name, value in bound.items() if name != "kwargs"} | bound.get("kwargs", {})
        if (loop := arguments.get("custom_generate")) is not None:
            if isinstance(loop, (Decoder, _Loop)) and arguments.get("streamer") is not None:
                arguments["custom_generate"] = custom_generate(loop, streamer=arguments.pop("streamer"))
            return self._plain(**arguments)
        if arguments.get("assistant_model") is not None:
            raise ValueError("assistant_model: expected None, the model's drafters are those it was accelerated with")
        if arguments.get("synced_gpus"):
            raise ValueError(SYNCED)
        model = view = self.decoder.target
        tokenizer, config = arguments.pop("tokenizer", None), arguments.get("generation_config")
        strings = arguments.pop("stop_strings", None) or getattr(config, "stop_strings", None)
        strings = strings or model.generation_config.stop_strings
        if strings is not None and tokenizer is not None:
            criteria = StopStringCriteria(tokenizer=tokenizer, stop_strings=strings)
            arguments["stopping_criteria"] = [*(arguments.get("stopping_criteria") or []), criteria]
            arguments["stopping_criteria"] = StoppingCriteriaList(arguments["stopping_criteria"])
            if getattr(config, "stop_strings", None) is not None:
                arguments["generation_config"] = config = copy.deepcopy(config)
                config.stop_strings = None
            if model.generation_config.stop_strings is not None:  # `generate` reads them there, even if others are passed
                view = copy.copy(model)
                view.generation_config = copy.deepcopy(model.generation_config)
                view.generation_config.stop_strings = None
        elif strings is not None:
            arguments["stop_strings"] = strings  # for transformers' own error
        loop = _Loop(self.decoder, arguments.pop("streamer", None), view)
        return MethodType(type(model).generate, view)(**arguments, custom_generate=loop)


def custom_generate(decoder: Decoder | Callable, *, streamer: BaseStreamer | None = None) -> Callable:
    """Returns a decoding loop for `model.generate(..., custom_generate=...)`: the decoder, with a streamer.

    `generate` does not pass its own argument `streamer` to a custom loop: that streamer would receive the prompt, but no tokens
    and no end, and a reader would wait forever. Pass the streamer to this function, not to `generate`.

    >>> model.generate(**inputs, custom_generate=hedgespec.custom_generate(decoder, streamer=streamer))  # doctest: +SKIP

    Args:
        decoder: a decoder whose target is the model.
        streamer: receives the prompt, every token when it is verified, and the end, as in plain `generate`. Only with a batch
            of 1. None: no streamer.

    Returns: a callable that one or several calls of `generate` may use.

    Raises:
        TypeError: `decoder` is not a `Decoder`, or `streamer` has no `put` and `end`.
        ValueError: `decoder` is the result of this function and has a streamer already.
    """
    if isinstance(decoder, _Loop):
        if decoder.streamer is not None and streamer is not None:
            raise ValueError("streamer: expected it in hedgespec.custom_generate alone, got one for generate too")
        decoder = decoder.decoder
    if not isinstance(decoder, Decoder):
        raise TypeError(f"decoder: expected a hedgespec.Decoder, got {type(decoder).__name__}")
    if streamer is not None and not all(callable(getattr(streamer, name, None)) for name in ("put", "end")):
        raise TypeError(f"streamer: expected put and end as of transformers' BaseStreamer, got {type(streamer).__name__}")
    return _Loop(decoder, streamer)


@dataclass(frozen=True)
class _Loop:
    """A decoding loop for `generate`: a decoder, and the arguments that `generate` does not pass on.

    Args:
        view: a shallow copy of the target, if `generate` is called on it instead of the target.
    """

    decoder: Decoder
    streamer: BaseStreamer | None
    view: Any = None

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        learner_state: dict | Sequence[dict] | None = None,
        **model_kwargs: Any,
    ) -> Any:
        return decode(
            self.decoder, self.decoder.target if model is self.view else model, input_ids, logits_processor, stopping_criteria,
            generation_config, streamer=self.streamer, learner_state=learner_state, **model_kwargs,
        )  # fmt: skip
