"""The decoding loop that takes the place of `GenerationMixin._sample`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

from hedgespec.decoder import Decoder, Request, Row, generator, rows_of, stack, states_of
from hedgespec.integrations.transformers.batch_steps import BatchSteps, Recorder, stopping
from hedgespec.integrations.transformers.checks import check_positions, check_whole, refuse, split_cache
from hedgespec.integrations.transformers.processors import for_row, is_separable, limits, process_drafts, split
from hedgespec.integrations.transformers.results import HedgeSpecOutput, by_step, store
from hedgespec.ops.sampling import Sampling
from hedgespec.runtime.compat import CACHE_NAME, cache_in, is_callers_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def decode(decoder: Decoder, model: PreTrainedModel, input_ids: torch.Tensor, logits_processor: LogitsProcessorList,
           stopping_criteria: StoppingCriteriaList, generation_config: GenerationConfig, *,
           streamer: BaseStreamer | None = None, learner_state: dict | Sequence[dict] | None = None,
           **model_kwargs: Any) -> Any:  # fmt: skip
    """The decoding loop of `generate`: arguments and results are those of `GenerationMixin._sample`.

    Args:
        decoder: a decoder whose target is `model`, or wraps it.
        input_ids: int64 or int32 [B, P].
        streamer: receives the prompt, every token when it is verified, and the end; only with a batch of 1.
        learner_state: as in `Decoder.generate`.

    Raises: ValueError, before the first token, for an argument that a decoder does not support.
    """
    batch = input_ids.shape[0]
    refuse(decoder, model, generation_config, streamer, batch, model_kwargs)
    if streamer is not None:
        streamer.put(input_ids.cpu())
    target, input_ids = decoder.target, input_ids.long()
    cache, past = split_cache(cache_in(model_kwargs), generation_config)
    check_whole(input_ids, model_kwargs.get("attention_mask"), past, generation_config)
    prompts = rows_of(input_ids, model_kwargs.get("attention_mask"), target)
    check_positions(model_kwargs.get("position_ids"), prompts)

    records = generation_config.return_dict_in_generate
    recorders = [Recorder(records and generation_config.output_scores, records and generation_config.output_logits)
                 for _ in prompts]  # fmt: skip
    processors, sampling = list(logits_processor), Sampling()
    if generation_config.do_sample:
        processors, sampling = split(processors) if not recorders[0].keeps_scores else (processors, Sampling(1.0))
    stateful = batch > 1 and [one for one in processors if not is_separable(one, batch)]
    if stateful and not decoder.together:
        raise ValueError(
            f"logits_processor: expected a true attribute `stateless` in a batch of {batch}, because {type(target).__name__} "
            f"decodes its rows one after another, got {type(stateful[0]).__name__}"
        )
    keep_cache = cache is not None and (records or is_callers_cache(cache))
    pad = 0 if generation_config._pad_token_tensor is None else int(generation_config._pad_token_tensor)
    requests, steps = _requests(
        prompts, processors, stopping_criteria, recorders, stateful=bool(stateful), keep_cache=keep_cache, pad=pad,
        samples=generation_config.do_sample, states=states_of(learner_state, batch),
    )  # fmt: skip

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
        assert cache is not None
        store(cache, rows)
    return _output(sequences, rows, recorders, cache if keep_cache else None) if records else sequences


def _output(sequences: torch.Tensor, rows: list[Row], recorders: list[Recorder], cache: DynamicCache | None) -> HedgeSpecOutput:
    return HedgeSpecOutput(
        sequences=sequences,
        scores=by_step([one.scores for one in recorders]) if recorders[0].keeps_scores else None,
        logits=by_step([one.logits for one in recorders]) if recorders[0].keeps_logits else None,
        hedgespec=[row.stats for row in rows],
        **{CACHE_NAME: cache},
    )


def _requests(
    prompts: list[tuple[torch.Tensor, int]],
    processors: list,
    stopping_criteria: StoppingCriteriaList,
    recorders: list[Recorder],
    *,
    stateful: bool,
    keep_cache: bool,
    pad: int,
    samples: bool,
    states: Sequence[Mapping[str, Any] | None],
) -> tuple[list[Request], BatchSteps | None]:
    """Returns the request of every row, and the steps in which processors or criteria see all rows, if any do.

    Args:
        prompts: of each row (int64 [P], number of padding tokens).
        stateful: some processor must see the rows together.
        pad: id that follows the end of a row.
        samples: the call samples, so that its seed is drawn from torch's generator.
        states: learner state of each row.
    """
    batch = len(prompts)
    criteria = [one for one in stopping_criteria if type(one) not in (MaxLengthCriteria, EosTokenCriteria)]
    room, eos = limits(stopping_criteria, prompts[0][0].shape[0])
    # Greedy decoding draws nothing from torch's generator, and neither does this: the seed then only picks drafters.
    seed = int(torch.randint(2**62, ())) if samples else 0
    steps = None
    if batch > 1 and (criteria or stateful):
        steps = BatchSteps(torch.stack([prompt for prompt, _ in prompts]), room, stopping_criteria, pad, recorders,
                           processors if stateful else None)  # fmt: skip
    requests = []
    for row, (prompt, padded) in enumerate(prompts):
        own = [for_row(one, row, batch) for one in processors if batch == 1 or is_separable(one, batch)]
        alone = (own or recorders[row].keeps) and not stateful
        requests.append(Request(
            prompt, padded, room, generator(seed, row), eos, states[row],
            process=recorders[row].process(own) if alone else None,
            process_drafts=process_drafts(own),
            stop=stopping(criteria, recorders[row]) if criteria and batch == 1 else None,
            keep_cache=keep_cache,
            processed_together=stateful,
        ))  # fmt: skip
    return requests, steps
