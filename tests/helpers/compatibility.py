"""Options of `generate` and what becomes of them with drafters: the same text as without, or an error that names them.

`OPTIONS` is the table; `verdict_of` runs one entry and returns what happened. tests/test_compatibility.py compares every entry
with it, and docs/compatibility.md is written from it.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LogitsProcessor,
    PreTrainedTokenizerFast,
    StaticCache,
    StoppingCriteria,
)
from transformers.generation import BaseStreamer, SynthIDTextWatermarkingConfig, WatermarkingConfig

import hedgespec
from hedgespec.compat import CACHE_NAME
from hedgespec.config import DecodeConfig
from hedgespec.decoder import Decoder
from hedgespec.drafters.causal_lm import CausalLMDrafter
from hedgespec.drafters.ngram import NGramDrafter

VOCABULARY, PROMPT, NEW_TOKENS = 53, 9, 14
SAME, REFUSED, NOT_SEEN = "same text", "refused by name", "not passed on by transformers"
CUSTOM, ACCELERATE = "custom_generate=decoder", "accelerate"


@dataclass(frozen=True)
class Option:
    """One row of the table.

    `verdict` is SAME if tokens, and scores where they are asked for, are those of plain `generate`; REFUSED if a ValueError
    whose message matches `message` comes before the first token; NOT_SEEN if `generate` keeps the option from a custom loop,
    so that it has no effect.
    """

    option: str
    how: Callable[[Any], dict[str, Any]]
    """model -> keyword arguments of `generate`."""
    verdict: str = SAME
    message: str = ""
    rows: tuple[int, ...] = (1, 3)
    """Batch sizes that it is tried with; every row but the first is padded on the left."""
    doors: tuple[str, ...] = (CUSTOM, ACCELERATE)
    note: str = ""

    def __str__(self) -> str:
        return re.sub(r"\W+", "_", f"{self.option} {self.verdict} {self.note}").strip("_")[:70]


@functools.cache
def model_and_decoder() -> tuple[Any, Decoder]:
    """A random Llama in float64, and a decoder whose drafters are always right, mostly wrong, and prompt lookup."""
    models = []
    for seed in (0, 5):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.3, eos_token_id=None, bos_token_id=None, pad_token_id=None,
        )  # fmt: skip
        models.append(AutoModelForCausalLM.from_config(config).double().eval())
        models[-1].generation_config.pad_token_id = 0
    model, other = models
    pool = [CausalLMDrafter(model, model, name="right"), CausalLMDrafter(other, model, name="wrong"), NGramDrafter(VOCABULARY)]
    return model, Decoder(model, pool, DecodeConfig(draft_length=3))


def prompts(rows: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, VOCABULARY, (rows, PROMPT), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 4, 7)[:rows]):
        ids[row, :padding], mask[row, :padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@functools.cache
def tokenizer():
    """One letter is one token."""
    from tokenizers import Tokenizer, decoders, models

    letters = "~ " + "".join(map(chr, range(65, 91))) + "".join(map(chr, range(97, 97 + VOCABULARY - 28)))
    backend = Tokenizer(models.BPE({letter: token for token, letter in enumerate(letters)}, []))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="~", padding_side="left")


class PerRow(LogitsProcessor):
    """Keeps a flag for every row of the batch and has a table with an entry for every row."""

    def __init__(self, rows: int = 3):
        self.flags, self.banned = [False] * rows, [[3 * row, 40 + row] for row in range(rows)]

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        for row in range(len(scores)):
            self.flags[row] ^= int(input_ids[row, -1]) % 2 == 0
            scores[row, self.banned[row] if self.flags[row] else []] = -math.inf
        return scores


class DoneTracker(StoppingCriteria):
    """A flag for every row and one answer for the batch, as in lm-evaluation-harness."""

    def __init__(self, rows: int = 3):
        self.done = [False] * rows

    def __call__(self, input_ids, scores, **kwargs):
        for row in range(len(input_ids)):
            self.done[row] |= int(input_ids[row, -1]) % 5 == 0
        return all(self.done[: len(input_ids)])


class RowsEnd(StoppingCriteria):
    """Keeps nothing, and answers for every row."""

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] % 4 == 0


class Recorder(BaseStreamer):
    def __init__(self):
        self.got = []

    def put(self, value):
        self.got.append(value.tolist())

    def end(self):
        self.got.append("end")


CACHE = "cache, before 5.24 past_key_values"


def fixed(**options) -> Callable[[Any], dict[str, Any]]:
    return lambda model: options


def _one_allowed(row: int, tokens: torch.Tensor) -> list[int]:
    """A single token, so that even sampling has one text for each row."""
    return [(int(tokens[-1]) * 7 + row + len(tokens)) % VOCABULARY]


OPTIONS = (
    Option("do_sample=False", fixed()),
    Option("max_new_tokens", fixed(max_new_tokens=1)),
    Option("max_length", fixed(max_length=PROMPT + 7, max_new_tokens=None)),
    Option("min_new_tokens, min_length", fixed(min_new_tokens=10, min_length=PROMPT + 8, eos_token_id=[7, 11, 20, 21, 22])),
    Option("max_time", fixed(max_time=0.0), note="no time left: one token"),
    Option("eos_token_id", fixed(eos_token_id=7)),
    Option("eos_token_id", fixed(eos_token_id=[7, 11, 20, 21, 22], pad_token_id=2), note="several, with a pad_token_id"),
    Option("eos_token_id", fixed(eos_token_id=-1), note="one that no token is"),
    Option("generation_config", lambda model: dict(
        generation_config=GenerationConfig(max_new_tokens=9, repetition_penalty=1.4, do_sample=False, pad_token_id=0),
        max_new_tokens=None,
    )),
    Option("repetition_penalty", fixed(repetition_penalty=1.3)),
    Option("no_repeat_ngram_size", fixed(no_repeat_ngram_size=2)),
    Option("encoder_repetition_penalty", fixed(encoder_repetition_penalty=1.5)),
    Option("encoder_no_repeat_ngram_size", fixed(encoder_no_repeat_ngram_size=2)),
    Option("bad_words_ids", fixed(bad_words_ids=[[5], [7, 8], [9, 10, 11]])),
    Option("suppress_tokens", fixed(suppress_tokens=[3, 4, 9], begin_suppress_tokens=[12, 13, 14])),
    Option("sequence_bias", fixed(sequence_bias={(5,): 3.0, (6, 7): 4.0, (9,): -8.0})),
    Option("forced_bos_token_id", fixed(forced_bos_token_id=17)),
    Option("forced_eos_token_id", fixed(forced_eos_token_id=3)),
    Option("exponential_decay_length_penalty", fixed(exponential_decay_length_penalty=(5, 1.5), eos_token_id=7)),
    Option("prefix_allowed_tokens_fn", fixed(prefix_allowed_tokens_fn=_one_allowed)),
    Option("prefix_allowed_tokens_fn", fixed(prefix_allowed_tokens_fn=_one_allowed, do_sample=True, num_return_sequences=3),
           note="with num_return_sequences"),
    Option("no_repeat_ngram_size, repetition_penalty", fixed(
        no_repeat_ngram_size=2, repetition_penalty=1.3, do_sample=True, top_k=1, num_return_sequences=3,
    ), note="with num_return_sequences"),
    Option("encoder_no_repeat_ngram_size", fixed(
        encoder_no_repeat_ngram_size=2, do_sample=True, top_k=1, num_return_sequences=3,
    ), note="with num_return_sequences"),
    Option("encoder_repetition_penalty", fixed(
        encoder_repetition_penalty=1.5, do_sample=True, top_k=1, num_return_sequences=3,
    ), note="with num_return_sequences"),
    Option("watermarking_config", fixed(
        watermarking_config=WatermarkingConfig(bias=4.0), do_sample=True, top_k=1, num_return_sequences=3,
    ), note="with num_return_sequences"),
    Option("remove_invalid_values, renormalize_logits", fixed(remove_invalid_values=True, renormalize_logits=True)),
    Option("watermarking_config", fixed(watermarking_config=WatermarkingConfig(bias=4.0))),
    Option("watermarking_config", fixed(watermarking_config=SynthIDTextWatermarkingConfig(keys=[1, 2, 3], ngram_len=3)),
           note="SynthID"),
    Option("guidance_scale", fixed(guidance_scale=1.5)),
    Option("num_return_sequences", fixed(do_sample=True, top_k=1, num_return_sequences=3)),
    Option("logits_processor", lambda model: dict(logits_processor=[PerRow()]), note="one that keeps state for every row"),
    Option("stopping_criteria", lambda model: dict(stopping_criteria=[RowsEnd()])),
    Option("stopping_criteria", lambda model: dict(stopping_criteria=[RowsEnd()], eos_token_id=7), note="beside eos_token_id"),
    Option("stopping_criteria", lambda model: dict(stopping_criteria=[DoneTracker()]),
           note="one that keeps state for every row"),
    Option("stop_strings", lambda model: dict(stop_strings=["A", "b"], tokenizer=tokenizer()), doors=(ACCELERATE,),
           note="with accelerate"),
    Option("stop_strings", lambda model: dict(stop_strings=["A", "b"], tokenizer=tokenizer()), REFUSED, "tokenizer",
           doors=(CUSTOM,), note="with custom_generate=decoder, which transformers does not pass the tokenizer"),
    Option("streamer", lambda model: dict(streamer=Recorder()), rows=(1,), doors=(ACCELERATE,),
           note="with accelerate, or in hedgespec.custom_generate(decoder, streamer=...)"),
    Option("streamer", lambda model: dict(streamer=Recorder()), REFUSED, "streamer: expected a batch of 1", rows=(3,),
           doors=(ACCELERATE,), note="with a batch"),
    Option("streamer", lambda model: dict(streamer=Recorder()), NOT_SEEN, doors=(CUSTOM,), rows=(1,),
           note="with custom_generate=decoder; pass it to hedgespec.custom_generate"),
    Option("return_dict_in_generate, output_scores, output_logits",
           fixed(return_dict_in_generate=True, output_scores=True, output_logits=True)),
    Option("output_attentions", fixed(output_attentions=True), REFUSED, "output_attentions: expected False"),
    Option("output_attentions", fixed(output_attentions=True, return_dict_in_generate=True), REFUSED,
           "output_attentions: expected False", note="with return_dict_in_generate"),
    Option("output_hidden_states", fixed(output_hidden_states=True), REFUSED, "output_hidden_states: expected False"),
    Option("output_hidden_states", fixed(output_hidden_states=True, return_dict_in_generate=True), REFUSED,
           "output_hidden_states: expected False", note="with return_dict_in_generate"),
    Option("use_cache=False", fixed(use_cache=False)),
    Option(CACHE, lambda model: {CACHE_NAME: DynamicCache(config=model.config)}, note="a DynamicCache"),
    Option(CACHE, lambda model: {CACHE_NAME: StaticCache(config=model.config, max_cache_len=40)}, REFUSED,
           "(cache|past_key_values): expected a DynamicCache", note="a StaticCache"),
    Option(CACHE, lambda model: {CACHE_NAME: DynamicCache(config=model.config, offloading=True)}, REFUSED,
           "(cache|past_key_values): expected a DynamicCache", note="an offloaded one"),
    Option("cache_implementation", fixed(cache_implementation="static", disable_compile=True), note='"static"'),
    Option("cache_implementation", fixed(cache_implementation="offloaded"), REFUSED, "cache_implementation: expected",
           note='"offloaded"'),
    Option("logits_to_keep", fixed(logits_to_keep=1)),
    Option("prefill_chunk_size", fixed(prefill_chunk_size=4)),
    Option("num_beams", fixed(num_beams=2), REFUSED, "num_beams: expected 1"),
    Option("penalty_alpha", fixed(penalty_alpha=0.6, top_k=4), REFUSED, "generation_config: expected .*contrastive search"),
    Option("dola_layers", fixed(dola_layers="low"), REFUSED, "generation_config: expected .*dola"),
    Option("prompt_lookup_num_tokens", fixed(prompt_lookup_num_tokens=3), rows=(1,), note="the decoder's drafters are used"),
    Option("num_assistant_tokens", fixed(num_assistant_tokens=2), note="the decoder's draft_length is used"),
    Option("assistant_model", lambda model: dict(assistant_model=model), REFUSED, "assistant_model: expected None",
           doors=(ACCELERATE,), note="with accelerate"),
    Option("synced_gpus=True", fixed(synced_gpus=True), REFUSED, "synced_gpus: expected False", doors=(ACCELERATE,),
           note="with accelerate"),
    Option("synced_gpus=True", fixed(synced_gpus=True), NOT_SEEN, doors=(CUSTOM,),
           note="with custom_generate=decoder; a model that several processes share is refused"),
    Option("input_ids", lambda model: dict(input_ids=prompts(1)["input_ids"].int(), attention_mask=None), rows=(1,),
           note="int32"),
    Option("input_ids", lambda model: dict(input_ids=None, attention_mask=None, bos_token_id=5), rows=(1,), note="none at all"),
    Option("inputs_embeds", lambda model: dict(inputs_embeds=torch.zeros(1, PROMPT, 16).double(), input_ids=None,
                                               attention_mask=None), REFUSED, "inputs_embeds: expected input_ids", rows=(1,)),
    Option("attention_mask", lambda model: dict(attention_mask=torch.tensor([[1] * (PROMPT - 1) + [0]])), REFUSED,
           "attention_mask: expected zeros on the left", rows=(1,), note="padding on the right"),
    Option("position_ids", lambda model: dict(position_ids=torch.arange(PROMPT)[None]), rows=(1,), note="0, 1, ..."),
    Option("position_ids", lambda model: dict(position_ids=torch.arange(5, 5 + PROMPT)[None]), REFUSED,
           "position_ids: expected 0, 1", rows=(1,), note="others"),
    Option("an argument of the model's forward", fixed(labels=None), note="None, False or empty"),
    Option("an argument of the model's forward", fixed(cu_seq_lens_q=torch.zeros(2)), REFUSED,
           "cu_seq_lens_q: expected no such", note="anything else"),
)  # fmt: skip


def verdict_of(entry: Option, rows: int, door: str) -> str:
    """Runs plain `generate` and the same with drafters, and returns SAME, REFUSED or NOT_SEEN, or says what else happened."""
    model, decoder = model_and_decoder()
    asked = prompts(rows) | {"do_sample": False, "max_new_tokens": NEW_TOKENS} | entry.how(model)
    streamer = asked.get("streamer")
    if door == ACCELERATE:
        hedgespec.accelerate(model, decoder)
    else:
        asked["custom_generate"] = decoder
    try:
        ours = model.generate(**asked)
    except ValueError as error:
        shown = streamer is not None and streamer.got
        return REFUSED if re.search(entry.message or "$^", str(error)) and not shown else f"ValueError: {error}"
    finally:
        if door == ACCELERATE:
            hedgespec.restore(model)
    again = prompts(rows) | {"do_sample": False, "max_new_tokens": NEW_TOKENS} | entry.how(model)
    not_seen = door == CUSTOM and any(name in asked for name in ("streamer", "synced_gpus"))
    if "synced_gpus" in again:
        del again["synced_gpus"]  # in one process it means nothing, and plain decoding would ask the others
    plain = model.generate(**again)
    own, wanted = (one if isinstance(one, torch.Tensor) else one.sequences for one in (ours, plain))
    if own.tolist() != wanted.tolist() or own.dtype != wanted.dtype:
        return "another text"
    for name in ("scores", "logits"):
        if asked.get(f"output_{name}"):
            for one, other in zip(ours[name], plain[name], strict=True):
                if not torch.allclose(one, other, atol=1e-4, rtol=1e-4):
                    return f"other {name}"
    if streamer is not None and not not_seen and streamer.got != again["streamer"].got:
        return "another stream"
    if streamer is not None and not_seen and len(streamer.got) != 1:
        return "another stream"
    return NOT_SEEN if not_seen else SAME
