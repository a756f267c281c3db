"""The drop-in for transformers: a `Decoder` in place of `generate`'s own decoding loop, with everything a user passes to it.

    model.generate(**inputs, custom_generate=decoder)     # one call
    hedgespec.accelerate(model, drafters)                 # every call from now on, `pipeline` included
    hedgespec.restore(model)

`generate` prepares inputs, processors and criteria as ever. What they mean is kept: the target's logits go through the
processors once for each emitted token, in order, and the criteria are asked after each, as in plain decoding, so both may
keep state. Processors of transformers' own that keep none also shape what the drafters propose; so does any other that has
an attribute `stateless` with a true value.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from types import MethodType
from typing import Any

import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    StoppingCriteriaList,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    GenerationMode,
    MaxLengthCriteria,
    MaxTimeCriteria,
    PrefixConstrainedLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.streamers import BaseStreamer

from hedgespec.compat import CACHE_NAME, CACHE_NAMES, cache_in
from hedgespec.config import DecodeConfig
from hedgespec.decoder import Decoder, Request, Row, generator, rows_of, stack, states_of
from hedgespec.drafters import Drafter
from hedgespec.metrics import DecodeStats
from hedgespec.sampling import Sampling

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


@dataclass
class HedgeSpecOutput(GenerateDecoderOnlyOutput):
    """What `generate` returns with `return_dict_in_generate`, and how the decoding went.

    In a batch, `scores` and `logits` are 0 where a row had ended before. `attentions` and `hidden_states` are None.
    """

    hedgespec: list[DecodeStats] | None = None
    """Statistics of each row, [B]."""


# Every call


def accelerate(model, drafters: Sequence[Drafter] | Decoder, config: DecodeConfig | None = None):
    """Makes `model.generate` decode with drafters, until `restore(model)`. Only this instance is changed.

    Args:
        model: as the target of a `Decoder`.
        drafters: a pool, or a decoder of this model.
        config: of the decoder, if a pool is given.

    Returns: the model.

    Raises: ValueError for a model that is accelerated already, a decoder of another one, or as `Decoder` does.
    """
    if "generate" in vars(model):
        raise ValueError(f"model: expected its own generate, got {model.generate!r}; hedgespec.restore(model) puts it back")
    if isinstance(drafters, Decoder):
        if config is not None:
            raise ValueError("config: expected None beside a decoder, which has its own")
        if drafters.target is not model:
            raise ValueError("drafters: expected a decoder whose target is this model, got another's")
        decoder = drafters
    else:
        decoder = Decoder(model, drafters, config)
    model.generate = _Accelerated(decoder)
    return model


def restore(model):
    """Gives the model its own `generate` back, and returns it. Raises ValueError if it is not accelerated."""
    if not isinstance(vars(model).get("generate"), _Accelerated):
        raise ValueError("model: expected one that hedgespec.accelerate was called with")
    del model.generate
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

    def __call__(self, *args, **kwargs):
        bound = self.__signature__.bind(*args, **kwargs).arguments
        arguments = {name: value for name, value in bound.items() if name != "kwargs"} | bound.get("kwargs", {})
        if arguments.get("custom_generate") is not None:
            return self._plain(**arguments)
        if arguments.get("assistant_model") is not None:
            raise ValueError("assistant_model: expected None, the model's drafters are those it was accelerated with")
        model, plain = self.decoder.target, self._plain
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
                plain = MethodType(type(model).generate, view)
        elif strings is not None:
            arguments["stop_strings"] = strings  # for transformers' own error
        return plain(**arguments, custom_generate=_Streaming(self.decoder, arguments.get("streamer")))


@dataclass(frozen=True)
class _Streaming:
    """A decoder as a decoding loop, with the streamer that `generate` does not pass on."""

    decoder: Decoder
    streamer: BaseStreamer | None

    def __call__(self, model, input_ids, logits_processor, stopping_criteria, generation_config, learner_state=None,
                 **model_kwargs):  # fmt: skip
        return decode(
            self.decoder, self.decoder.target, input_ids, logits_processor, stopping_criteria, generation_config,
            streamer=self.streamer, learner_state=learner_state, **model_kwargs,
        )  # fmt: skip


def callers_streamer() -> BaseStreamer | None:
    """The streamer handed to `model.generate(..., custom_generate=decoder)`, for `Decoder.__call__` to ask.

    `generate` shows it the prompt and then neither passes it on nor ends it, and whoever reads it would wait for ever; so
    it is taken from where `generate` keeps it.
    """
    return sys._getframe(2).f_locals.get("streamer")


# One call


def decode(decoder: Decoder, model, input_ids: torch.Tensor, logits_processor: LogitsProcessorList,
           stopping_criteria: StoppingCriteriaList, generation_config: GenerationConfig, *,
           streamer: BaseStreamer | None = None, learner_state: dict | Sequence[dict] | None = None,
           **model_kwargs):  # fmt: skip
    """The decoding loop of `generate`: arguments and results are those of `GenerationMixin._sample`.

    Args:
        decoder: its target is `model`, or wraps it.
        streamer: shown every token as it is verified; batches of 1 only.
        learner_state: as in `Decoder.generate`.

    Raises: ValueError for what a decoder cannot honour, naming it.
    """
    batch = input_ids.shape[0]
    _refuse(decoder, model, generation_config, streamer, batch, model_kwargs)
    target = decoder.target
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
    room, eos = _limits(stopping_criteria, input_ids.shape[1])
    # Greedy decoding draws nothing from torch's generator, and neither does this: the seed then only picks drafters.
    seed = int(torch.randint(2**62, ())) if generation_config.do_sample else 0
    keep_cache = cache is not None and (records or getattr(cache, "_is_user_defined", False))
    states = states_of(learner_state, batch)
    requests = []
    for row, (prompt, padding) in enumerate(prompts):
        own = _for_row(processors, row, batch, target)
        requests.append(Request(
            prompt, padding, room, generator(seed, row), eos, states[row],
            process=recorders[row].process(own) if own or recorders[row].keeps else None,
            process_drafts=_process_drafts(own),
            stop=_stop(_copies(criteria, batch, target, "stopping_criteria"), recorders[row]) if criteria else None,
            keep_cache=keep_cache,
        ))  # fmt: skip

    def show(_: int, tokens: list[int]) -> None:
        for token in tokens:  # one by one, as plain decoding does
            streamer.put(torch.tensor([token]))

    rows = decoder.decode(requests, sampling, past=past, on_tokens=None if streamer is None else show)
    if streamer is not None:
        streamer.end()
    padding = generation_config._pad_token_tensor
    sequences = stack([row.sequence for row in rows], 0 if padding is None else int(padding)).to(input_ids.device)
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


def _refuse(decoder: Decoder, model, config: GenerationConfig, streamer, batch: int, model_kwargs: dict) -> None:
    if not any(module is model for module in decoder.target.modules()):
        raise ValueError("custom_generate: expected a decoder whose target is this model, got another's")
    if model_kwargs.get("inputs_embeds") is not None:
        raise ValueError("inputs_embeds: expected input_ids, which drafters read, got embeddings alone")
    strange = sorted(name for name, value in model_kwargs.items() if value is not None and name not in PREPARED)
    if strange:
        raise ValueError(f"{strange[0]}: expected no such argument for the model, which drafters would not see")
    if config.num_beams > 1:
        raise ValueError(f"num_beams: expected 1, speculative decoding follows one text, got {config.num_beams}")
    if (mode := config.get_generation_mode()) not in MODES:
        raise ValueError(f"generation_config: expected greedy search or sampling, got {mode.value.replace('_', ' ')}")
    if config.return_dict_in_generate:
        for name in ("output_attentions", "output_hidden_states"):
            if getattr(config, name):
                raise ValueError(f"{name}: expected False, a round computes several tokens at once and keeps none of it")
    if streamer is not None and batch > 1:
        raise ValueError(f"streamer: expected a batch of 1, rows advance each at its own pace, got {batch}")
    if model_kwargs.get("synced_gpus"):
        raise ValueError("synced_gpus: expected False, processes would not take the same number of rounds")


def _check_positions(position_ids: torch.Tensor | None, prompts: list[tuple[torch.Tensor, int]]) -> None:
    if position_ids is None:
        return
    for row, (prompt, padding) in zip(position_ids.expand(len(prompts), -1).tolist(), prompts):
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


def _past(cache, config: GenerationConfig) -> tuple[DynamicCache | None, DynamicCache | None]:
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


def _is_plain(warper) -> bool:
    return getattr(warper, "filter_value", -torch.inf) == -torch.inf and getattr(warper, "min_tokens_to_keep", 1) == 1


def _is_stateless(processor) -> bool:
    own = type(processor).__module__ == "transformers.generation.logits_process" and not isinstance(processor, STATEFUL)
    return own or bool(getattr(processor, "stateless", False))


def _limits(criteria: StoppingCriteriaList, prompt_length: int) -> tuple[int, frozenset[int]]:
    """Most tokens to emit, and the ids that end a text.

    The configuration does not say: a criterion of the user's stands in for `generate`'s own of the same type.
    """
    room = max(1, criteria.max_length - prompt_length)  # criteria are asked after a token, so there is always one
    eos = (one.eos_token_id.flatten().tolist() for one in criteria if type(one) is EosTokenCriteria)
    return room, frozenset(chain.from_iterable(eos))


def _for_row(processors: list, row: int, batch: int, target) -> list:
    """The processors for calls with one row of the batch alone."""
    if batch == 1:
        return processors
    own = []
    for processor in processors:
        if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor):
            raise ValueError(f"guidance_scale: expected a batch of 1, the prompts without guidance are batched, got {batch}")
        if isinstance(processor, PrefixConstrainedLogitsProcessor):
            allowed = processor._prefix_allowed_tokens_fn
            processor = PrefixConstrainedLogitsProcessor(lambda _, tokens, allowed=allowed: allowed(row, tokens), 1)
        elif not _is_stateless(processor):
            [processor] = _copies([processor], batch, target, "logits_processor")
        elif held := [name for name in BY_ROW if hasattr(getattr(processor, name, None), "__len__")]:
            processor = copy.copy(processor)
            for name in held:
                setattr(processor, name, getattr(processor, name)[row : row + 1])
            if hasattr(processor, "batch_size"):
                processor.batch_size = 1
        own.append(processor)
    return own


def _copies(callables: list, batch: int, target, argument: str) -> list:
    """Copies for one row of a batch, so that what they remember is of that row; the things themselves for a batch of 1."""
    if batch == 1:
        return callables
    held = {id(module): module for module in target.modules()}  # one that reads the model reads the model, not a copy of it
    shared = (MaxTimeCriteria, StopStringCriteria)
    copies = []
    for one in callables:
        try:
            copies.append(one if isinstance(one, shared) else copy.deepcopy(one, dict(held)))
        except Exception as error:
            raise ValueError(
                f"{argument}: expected something that can be copied for each row of a batch, got {type(one).__name__}: {error}"
            ) from error
    return copies


def _process_drafts(processors: list) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None:
    pure = [processor for processor in processors if _is_stateless(processor)]
    return (lambda tokens, logits: _through(pure, tokens, logits.to(torch.float32, copy=True))) if pure else None


def _through(processors: list, tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """What a `LogitsProcessorList` does, without asking for each processor's signature each time."""
    for processor in processors:
        logits = processor(tokens, logits)
    return logits


def _stop(criteria: list, recorder: _Recorder) -> Callable[[torch.Tensor], bool]:
    asked = StoppingCriteriaList(criteria)
    return lambda tokens: bool(asked(tokens, tuple(recorder.scores) if recorder.keeps_scores else None)[0])


class _Recorder:
    """Keeps what `generate` is asked to return of a row: logits as the target gave them, and as the processors left them."""

    def __init__(self, keeps_scores: bool, keeps_logits: bool):
        self.keeps_scores, self.keeps_logits = bool(keeps_scores), bool(keeps_logits)
        self.keeps = self.keeps_scores or self.keeps_logits
        self.scores: list[torch.Tensor] = []
        self.logits: list[torch.Tensor] = []

    def process(self, processors: list) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        def process(tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            logits = logits.to(torch.float32, copy=True)
            if self.keeps_logits:
                self.logits.append(logits.clone())
            logits = _through(processors, tokens, logits)
            if self.keeps_scores:
                self.scores.append(logits)
            return logits

        return process


# Results


def _by_step(rows: list[list[torch.Tensor]]) -> tuple[torch.Tensor, ...]:
    """Rows of [1, V] a step as one [B, V] a step."""
    steps = max(len(row) for row in rows)
    nothing = torch.zeros_like(rows[0][0])
    return tuple(torch.cat([row[step] if step < len(row) else nothing for row in rows]) for step in range(steps))


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
                own = row.cache[layer_idx][part]
                states[place, :, row.request.padding : row.request.padding + own.shape[1]] = own
            buffers.append(states)
        layer.is_initialized = False  # or else older versions of transformers keep the length and write zeros
        layer.reset()
        layer.update(*buffers)
