"""The drop-in for transformers: a `Decoder` in place of `generate`'s own decoding loop, with everything a user passes to it.

    model.generate(**inputs, custom_generate=decoder)     # one call
    model.generate(**inputs, custom_generate=hedgespec.custom_generate(decoder, streamer=streamer))
    hedgespec.accelerate(model, drafters)                 # every call from now on, `pipeline` included
    hedgespec.restore(model)

`generate` prepares inputs, processors and criteria. They are called as in plain decoding: the processors once for every emitted
token and the criteria after it, in order, so both may keep state. In a batch they see all rows at once; there, processors that
keep state make the rows advance in step, as far as the shortest accepted draft. Processors of transformers that keep no state
are applied row by row and to the drafters' logits as well. So is any other processor with a true attribute `stateless`, which
says that it keeps nothing from call to call and treats every row by itself.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from types import MethodType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    StoppingCriteriaList,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.distributed.fsdp import is_fsdp_managed_module
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    GenerationMode,
    MaxLengthCriteria,
    PrefixConstrainedLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.streamers import BaseStreamer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from hedgespec.config import DecodeConfig
from hedgespec.decoder import Decoder, Request, Row, generator, rows_of, stack, states_of
from hedgespec.drafters import Drafter
from hedgespec.ops.linear import is_compiled
from hedgespec.ops.sampling import Sampling
from hedgespec.runtime.compat import CACHE_NAME, CACHE_NAMES, cache_in, is_callers_cache
from hedgespec.runtime.positions import length_dependent
from hedgespec.runtime.wrappers import unwrap
from hedgespec.stats import DecodeStats

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Model = TypeVar("Model", bound=nn.Module)
STATEFUL = (SynthIDTextWatermarkLogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor)
"""Processors of transformers that remember their calls."""
WARPERS = {
    TemperatureLogitsWarper: "temperature",
    TopKLogitsWarper: "top_k",
    TopPLogitsWarper: "top_p",
    MinPLogitsWarper: "min_p",
}
"""Processors that `Sampling` knows, in its order, which is `generate`'s."""
MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.ASSISTED_GENERATION)
"""What is the same text with drafters; with a custom loop, `generate` would let every other mode pass for one of these."""
BY_ROW = ("encoder_input_ids", "generated_ngrams", "prompt_ignore_length")
"""Attributes in which such processors hold something for each row of the batch."""
PREPARED = {"attention_mask", "position_ids", *CACHE_NAMES, "use_cache", "logits_to_keep", "cache_position", "synced_gpus"}
"""Arguments of the model that `generate` prepares and that say nothing new."""
MODALITIES = ("mm_token_type_ids", "token_type_ids")
"""Arguments of vision-language models, 0 for text and other numbers for pictures and films."""
RECORDED = ("output_attentions", "output_hidden_states")
"""Options of `generate` that ask for what a round does not keep."""


@dataclass
class HedgeSpecOutput(GenerateDecoderOnlyOutput):
    """What `generate` returns with `return_dict_in_generate`, and how the decoding went.

    In a batch, `scores` and `logits` are 0 for the steps after a row's end. `attentions` and `hidden_states` are None.
    """

    hedgespec: list[DecodeStats] | None = None
    """Statistics of each row, [B]."""


# Every call


def accelerate(model: Model, drafters: Sequence[Drafter] | Decoder, config: DecodeConfig | None = None) -> Model:
    """Makes `model.generate` decode with drafters, until `restore(model)`. Only this instance is changed.

    Args:
        model: as the target of a `Decoder`.
        drafters: a pool, or a decoder of this model.
        config: of the decoder, if a pool is given.

    Returns: the model.

    Raises: ValueError for a model that is accelerated already, a decoder of another one, or as `Decoder` does.
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
    """Returns the module on which `model.generate = ...` puts the attribute: what `torch.compile` returns passes it on."""
    while is_compiled(model):
        model = model._orig_mod
    return model


class _Accelerated:
    """An accelerated model's `generate`: the same arguments; those that `custom_generate` would lose are held on to.

    It knows the model by its decoder alone, so that a copy of the model, pickled or deep, has a `generate` of its own.
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
            if model.generation_config.stop_strings is not None:  # `generate` reads them there, whatever it is passed
                view = copy.copy(model)
                view.generation_config = copy.deepcopy(model.generation_config)
                view.generation_config.stop_strings = None
        elif strings is not None:
            arguments["stop_strings"] = strings  # for transformers' own error
        loop = _Loop(self.decoder, arguments.pop("streamer", None), view)
        return MethodType(type(model).generate, view)(**arguments, custom_generate=loop)


# One call


def custom_generate(decoder: Decoder | Callable, *, streamer: BaseStreamer | None = None) -> Callable:
    """Returns a decoding loop for `model.generate(..., custom_generate=...)`: the decoder, with a streamer.

    `generate` does not pass its own argument `streamer` to a custom loop. It only shows that streamer the prompt, then neither
    its tokens nor its end, so that whoever reads from it waits forever. Pass the streamer here, and not to `generate`.

    >>> model.generate(**inputs, custom_generate=hedgespec.custom_generate(decoder, streamer=streamer))  # doctest: +SKIP

    Args:
        decoder: a decoder whose target is the model.
        streamer: is shown the prompt, then every token as it is verified, then the end, as by plain `generate`. A batch of 1
            only. None: no streamer.

    Returns: a callable that one or several calls of `generate` may use.

    Raises:
        TypeError: `decoder` is no `Decoder`, or `streamer` has no `put` and `end`.
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
    """A decoder as a decoding loop, with what `generate` does not pass on.

    Args:
        view: a shallow copy of the target that `generate` may be called with in its place.
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


def decode(decoder: Decoder, model: PreTrainedModel, input_ids: torch.Tensor, logits_processor: LogitsProcessorList,
           stopping_criteria: StoppingCriteriaList, generation_config: GenerationConfig, *,
           streamer: BaseStreamer | None = None, learner_state: dict | Sequence[dict] | None = None,
           **model_kwargs: Any) -> Any:  # fmt: skip
    """The decoding loop of `generate`: arguments and results are those of `GenerationMixin._sample`.

    Args:
        decoder: its target is `model`, or wraps it.
        input_ids: as `generate` takes them, int64 or int32 [B, P].
        streamer: is shown the prompt, then every token as it is verified, then the end; a batch of 1 only.
        learner_state: as in `Decoder.generate`.

    Raises: ValueError that names the argument, before the first token, for what a decoder cannot do.
    """
    batch = input_ids.shape[0]
    _refuse(decoder, model, generation_config, streamer, batch, model_kwargs)
    if streamer is not None:
        streamer.put(input_ids.cpu())
    target, input_ids = decoder.target, input_ids.long()
    cache, past = _past(cache_in(model_kwargs), generation_config)
    _check_whole(input_ids, model_kwargs.get("attention_mask"), past, generation_config)
    prompts = rows_of(input_ids, model_kwargs.get("attention_mask"), target)
    _check_positions(model_kwargs.get("position_ids"), prompts)

    records = generation_config.return_dict_in_generate
    recorders = [_Recorder(records and generation_config.output_scores, records and generation_config.output_logits)
                 for _ in prompts]  # fmt: skip
    processors, sampling = list(logits_processor), Sampling()
    if generation_config.do_sample:
        processors, sampling = _split(processors) if not recorders[0].keeps_scores else (processors, Sampling(1.0))
    criteria = [one for one in stopping_criteria if type(one) not in (MaxLengthCriteria, EosTokenCriteria)]
    stateful = batch > 1 and [one for one in processors if not _is_separable(one, batch)]
    if stateful and not decoder.together:
        raise ValueError(
            f"logits_processor: expected a true attribute `stateless` in a batch of {batch}, because {type(target).__name__} "
            f"decodes its rows one after another, got {type(stateful[0]).__name__}"
        )
    room, eos = _limits(stopping_criteria, input_ids.shape[1])
    # Greedy decoding draws nothing from torch's generator, and neither does this: the seed then only picks drafters.
    seed = int(torch.randint(2**62, ())) if generation_config.do_sample else 0
    keep_cache = cache is not None and (records or is_callers_cache(cache))
    states = states_of(learner_state, batch)
    padding = generation_config._pad_token_tensor
    pad = 0 if padding is None else int(padding)
    steps = None
    if batch > 1 and (criteria or stateful):
        steps = _Steps(torch.stack([prompt for prompt, _ in prompts]), room, stopping_criteria, pad, recorders,
                       processors if stateful else None)  # fmt: skip
    requests = []
    for row, (prompt, padded) in enumerate(prompts):
        own = [_for_row(one, row, batch) for one in processors if batch == 1 or _is_separable(one, batch)]
        alone = (own or recorders[row].keeps) and not stateful
        requests.append(Request(
            prompt, padded, room, generator(seed, row), eos, states[row],
            process=recorders[row].process(own) if alone else None,
            process_drafts=_process_drafts(own),
            stop=_stop(criteria, recorders[row]) if criteria and batch == 1 else None,
            keep_cache=keep_cache,
            processed_together=bool(stateful),
        ))  # fmt: skip

    def show(_: int, tokens: list[int]) -> None:
        assert streamer is not None
        for token in tokens:  # one by one, as plain decoding does
            streamer.put(torch.tensor([token]))

    rows = decoder.decode(requests, sampling, past=past, on_tokens=None if streamer is None else show, together=steps)
    if streamer is not None:
        streamer.end()
    sequences = stack([row.sequence for row in rows], pad).to(input_ids.device)
    for done, recorder in zip(rows, recorders):
        recorder.cut(done.stats.emitted_tokens)
    if keep_cache:
        _store(cache, rows)
    if not records:
        return sequences
    return HedgeSpecOutput(
        sequences=sequences,
        scores=_by_step([one.scores for one in recorders]) if recorders[0].keeps_scores else None,
        logits=_by_step([one.logits for one in recorders]) if recorders[0].keeps_logits else None,
        hedgespec=[row.stats for row in rows],
        **{CACHE_NAME: cache if keep_cache else None},
    )


def _refuse(
    decoder: Decoder,
    model: PreTrainedModel,
    config: GenerationConfig,
    streamer: BaseStreamer | None,
    batch: int,
    model_kwargs: dict,
) -> None:
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
    # TextStreamer's own flag: `generate` has shown it the prompt, and a second one would be taken for new text.
    if streamer is not None and getattr(streamer, "next_tokens_are_prompt", True) is False:
        raise ValueError("streamer: expected it in hedgespec.custom_generate alone, got one that was shown a prompt already")
    if model_kwargs.get("synced_gpus") or _is_synced(model):
        raise ValueError(SYNCED)


SYNCED = "synced_gpus: expected False, because processes would not take the same number of rounds"


def _is_synced(model: PreTrainedModel) -> bool:
    """Returns whether `generate` would set `synced_gpus`, which it does not pass to a custom loop: whether several processes
    share the model's weights, by DeepSpeed ZeRO-3 or by FSDP."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return False
    return is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model)


def _says_nothing(value: Any, parameter: inspect.Parameter | None) -> bool:
    """Returns whether a value for this parameter of the model's forward means the same as its absence: None, an empty
    collection, or False unless the default is True."""
    if value is False:
        return parameter is None or parameter.default is not True
    return value is None or (isinstance(value, (dict, list, tuple)) and not value)


def _check_positions(position_ids: torch.Tensor | None, prompts: list[tuple[torch.Tensor, int]]) -> None:
    """Raises ValueError unless positions [B, T], or [n, B, T] of a model that counts in n dimensions, count a row's tokens."""
    if position_ids is None:
        return
    planes = position_ids if position_ids.ndim == 3 else position_ids[None]
    for plane in planes.expand(-1, len(prompts), -1).tolist():
        for row, (prompt, padding) in zip(plane, prompts):
            own = len(prompt) - padding
            if row[-own:] != list(range(own))[-len(row) :]:
                raise ValueError(f"position_ids: expected 0, 1, ... from a row's first token on, got {row}")


def _check_whole(
    input_ids: torch.Tensor, mask: torch.Tensor | None, past: DynamicCache | None, config: GenerationConfig
) -> None:
    """`generate` also takes the tokens behind a cache alone, told by a longer mask, which it drops if it is all ones."""
    count = input_ids.shape[1]
    whole = getattr(config, "_mask_length", count) if mask is None else mask.shape[1]
    if past is not None and max(whole, past.get_seq_length()) > count:
        raise ValueError(
            f"input_ids: expected the whole text, which drafters read, also where {CACHE_NAME} holds its beginning, got "
            f"{count} tokens behind a cache of {past.get_seq_length()}"
        )


def _past(cache: Any, config: GenerationConfig) -> tuple[DynamicCache | None, DynamicCache | None]:
    """The cache to fill in the end, and what one that came in holds already."""
    if cache is None:
        return None, None
    if type(cache) is not DynamicCache or cache.offloading:
        if config.cache_implementation is None or "static" not in config.cache_implementation:
            name = CACHE_NAME if config.cache_implementation is None else "cache_implementation"
            kind = "an offloaded one" if getattr(cache, "offloading", False) else type(cache).__name__
            raise ValueError(f"{name}: expected a DynamicCache that stays where it is, got {kind}")
        return None, None  # a static one that `generate` made: the decoder's own buffers take its place
    return cache, cache if cache.get_seq_length() else None


# Processors and criteria


def _split(processors: list) -> tuple[list, Sampling]:
    """The processors without the last few that a `Sampling` can do as well, and that `Sampling`."""
    found: dict[str, Any] = {}
    rest, known = list(processors), list(WARPERS)
    while rest and type(rest[-1]) in known and _is_plain(rest[-1]):
        warper = rest.pop()
        del known[known.index(type(warper)) :]
        name = WARPERS[type(warper)]
        found[name] = getattr(warper, name)
    return rest, Sampling(**{"temperature": 1.0} | found)


def _is_plain(warper: object) -> bool:
    return getattr(warper, "filter_value", -torch.inf) == -torch.inf and getattr(warper, "min_tokens_to_keep", 1) == 1


def _is_stateless(processor: object) -> bool:
    own = type(processor).__module__ == "transformers.generation.logits_process" and not isinstance(processor, STATEFUL)
    return own or bool(getattr(processor, "stateless", False))


def _limits(criteria: StoppingCriteriaList, prompt_length: int) -> tuple[int, frozenset[int]]:
    """Most tokens to emit, and the ids that end a text.

    The configuration does not say: a criterion of the user's stands in for `generate`'s own of the same type.
    """
    room = max(1, criteria.max_length - prompt_length)  # criteria are asked after a token, so there is always one
    eos = (one.eos_token_id.flatten().tolist() for one in criteria if type(one) is EosTokenCriteria)
    return room, frozenset(chain.from_iterable(eos))


def _by_row(processor: object) -> list[str]:
    """Returns the attributes in which a processor of transformers holds something for each row."""
    return [name for name in BY_ROW if hasattr(getattr(processor, name, None), "__len__")]


def _is_separable(processor: object, batch: int) -> bool:
    """Returns whether the rows of a batch may be processed one by one: whether nothing is kept from call to call, and what is
    kept for rows is there for each of them. With `num_return_sequences` it is there for each prompt."""
    return _is_stateless(processor) and all(len(getattr(processor, name)) == batch for name in _by_row(processor))


def _for_row(processor: LogitsProcessor, row: int, batch: int) -> LogitsProcessor:
    """Returns a separable processor for calls with one row of the batch alone."""
    if batch == 1:
        return processor
    if isinstance(processor, PrefixConstrainedLogitsProcessor):
        # Texts of one prompt may share a number: from transformers 5.24 on those of `num_return_sequences` do.
        allowed, number = processor._prefix_allowed_tokens_fn, row // processor._num_beams
        return PrefixConstrainedLogitsProcessor(lambda _, tokens: allowed(number, tokens), 1)
    if held := _by_row(processor):
        processor = copy.copy(processor)
        for name in held:
            setattr(processor, name, getattr(processor, name)[row : row + 1])
        if hasattr(processor, "batch_size"):
            processor.batch_size = 1
    return processor


def _process_drafts(processors: list) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None:
    pure = [processor for processor in processors if _is_stateless(processor)]
    return (lambda tokens, logits: _through(pure, tokens, logits.to(torch.float32, copy=True))) if pure else None


def _through(processors: Iterable[Any], tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Does what a `LogitsProcessorList` does, without looking up each processor's signature each time.

    Raises: ValueError for a processor that changes the shape of its logits.
    """
    for processor in processors:
        processed = processor(tokens, logits)
        if processed.shape != logits.shape:
            raise ValueError(
                f"logits_processor: expected scores of shape {tuple(logits.shape)} from {type(processor).__name__}, "
                f"got {tuple(processed.shape)}"
            )
        logits = processed
    return logits


def _stop(criteria: list, recorder: _Recorder) -> Callable[[torch.Tensor], bool]:
    asked = StoppingCriteriaList(criteria)
    return lambda tokens: bool(asked(tokens, tuple(recorder.scores) if recorder.keeps_scores else None)[0])


class _Steps:
    """The processors and criteria of a batch, called with all its rows as in plain decoding: a `Together` of the decoder.

    A row that has ended is padded while the others go on if anything ends at an id. Otherwise `generate` writes on in it until
    all rows have ended, and so does this.

    Args:
        prompts: int64 [B, P], padded on the left.
        room: most tokens to emit.
        criteria: `generate`'s, all of them.
        pad: id that follows the end of a row.
        recorders: of the rows, [B].
        processors: all processors, if some of them see the rows together; None if rows are processed one by one.
    """

    def __init__(self, prompts: torch.Tensor, room: int, criteria: StoppingCriteriaList, pad: int,
                 recorders: list[_Recorder], processors: list | None):  # fmt: skip
        self.processes = processors is not None
        self._processors, self._criteria, self._recorders = processors, criteria, recorders
        self._tokens = torch.cat([prompts, prompts.new_zeros(len(prompts), room)], 1)
        self._count = prompts.shape[1]
        """Columns of `_tokens` that the criteria have seen."""
        self._pads, self._pad = any(hasattr(one, "eos_token_id") for one in criteria), pad
        self._ended = torch.zeros(len(prompts), dtype=torch.bool, device=prompts.device)
        self._scores: list[torch.Tensor] = []
        """Processed logits [B, V] of the steps that the criteria have seen, if they are kept."""

    def process(self, rows: Sequence[Row], logits: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        batch = len(self._tokens)
        together = torch.zeros(batch, logits[0].shape[1], dtype=torch.float32, device=logits[0].device)
        places = torch.tensor([row.index for row in rows], device=together.device)
        together[places] = torch.cat(list(logits)).float()
        given = together.clone()
        processed = _through(self._processors or (), self._seen(), together)
        for row in rows:
            own = slice(row.index, row.index + 1)
            self._recorders[row.index].record(given[own], processed[own])
        return list(processed[places].split(1))

    def _seen(self) -> torch.Tensor:
        """The batch as it is after `_count` columns, contiguous as `generate` has it."""
        return self._tokens[:, : self._count].contiguous()

    def stop(self, rows: Sequence[Row]) -> None:
        if self._ended.all():
            return
        first, known = self._count, self._tokens.shape[1] - rows[0].request.max_new_tokens + max(row.emitted for row in rows)
        texts = torch.stack([row.padded[first:known] for row in rows])
        ended = self._ended.tolist()
        while not all(ended):
            step = self._count + 1 - (self._tokens.shape[1] - rows[0].request.max_new_tokens)
            if any(row.emitted < step and not (self._pads and done) for row, done in zip(rows, ended)):
                return
            column = texts[:, self._count - first]
            self._tokens[:, self._count] = column.masked_fill(self._ended, self._pad) if self._pads else column
            self._count += 1
            scores = None
            if self._recorders[0].keeps_scores:
                self._scores.append(_at_step([one.scores for one in self._recorders], step - 1))
                scores = tuple(self._scores)
            self._ended |= self._criteria(self._seen(), scores)
            before, ended = ended, self._ended.tolist()
            for row, was, done in zip(rows, before, ended):
                if (done and not was) if self._pads else all(ended):
                    row.cut(step)


class _Recorder:
    """Keeps what `generate` is asked to return of a row: logits as the target gave them, and as the processors left them."""

    def __init__(self, keeps_scores: bool, keeps_logits: bool):
        self.keeps_scores, self.keeps_logits = bool(keeps_scores), bool(keeps_logits)
        self.keeps = self.keeps_scores or self.keeps_logits
        self.scores: list[torch.Tensor] = []
        self.logits: list[torch.Tensor] = []

    def process(self, processors: list) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        def process(tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            given = logits.to(torch.float32, copy=True)
            processed = _through(processors, tokens, given.clone() if self.keeps_logits else given)
            self.record(given, processed)
            return processed

        return process

    def record(self, logits: torch.Tensor, scores: torch.Tensor) -> None:
        """Keeps the logits [1, V] of a step, unprocessed and processed."""
        if self.keeps_logits:
            self.logits.append(logits)
        if self.keeps_scores:
            self.scores.append(scores)

    def cut(self, count: int) -> None:
        """Forgets all but the first steps."""
        del self.logits[count:], self.scores[count:]


# Results


def _by_step(rows: list[list[torch.Tensor]]) -> tuple[torch.Tensor, ...]:
    """Rows of [1, V] a step as one [B, V] a step."""
    return tuple(_at_step(rows, step) for step in range(max(len(row) for row in rows)))


def _at_step(rows: list[list[torch.Tensor]], step: int) -> torch.Tensor:
    """One step of rows of [1, V] a step, [B, V]; 0 for a row that had ended before."""
    nothing = torch.zeros_like(rows[0][0])
    return torch.cat([row[step] if step < len(row) else nothing for row in rows])


def _store(cache: DynamicCache, rows: list[Row]) -> None:
    """Puts the rows' keys and values into a cache, as `generate` leaves them: a column for every token but the last."""
    columns = max(row.seen.shape[1] for row in rows) - 1
    while len(cache.layers) < len(rows[0].cache):
        cache.layers.append(cache.layer_class_to_replicate())
    for layer_idx, layer in enumerate(cache.layers):
        buffers = []
        for part in (0, 1):
            first = rows[0].cache[layer_idx][part]
            states = first.new_zeros(len(rows), first.shape[0], columns, first.shape[2])
            for place, row in enumerate(rows):
                own = row.cache[layer_idx][part][:, : row.length - 1]  # what was cut off the text is not part of it
                states[place, :, row.request.padding : row.request.padding + own.shape[1]] = own
            buffers.append(states)
        layer.is_initialized = False  # or else older versions of transformers keep the length and write zeros
        layer.reset()
        layer.update(*buffers)
