"""Every entry of the table of `generate`'s options, by both doors; the cache's two names; nothing of ours is deprecated."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
import transformers
from helpers.compatibility import OPTIONS as ENTRIES
from helpers.compatibility import DoneTracker, PerRow, model_and_decoder, prompts, verdict_of
from transformers import DynamicCache

import hedgespec
from hedgespec.decoder import Decoder
from hedgespec.drafters.ngram import NGramDrafter
from hedgespec.runtime import compat
from hedgespec.runtime.compat import CACHE_NAME
from hedgespec.runtime.target import check_target

RUNS = [(entry, rows, door) for entry in ENTRIES for rows in entry.rows for door in entry.doors]


@pytest.mark.parametrize(("entry", "rows", "door"), RUNS, ids=[f"{entry}-{rows}-{door}" for entry, rows, door in RUNS])
def test_the_table_says_what_happens(entry, rows, door):
    assert verdict_of(entry, rows, door) == entry.verdict


def test_a_wrong_entry_would_be_seen(monkeypatch):
    """The other text of a decoder that drops the processors is not called the same."""
    entry = next(one for one in ENTRIES if one.option == "repetition_penalty")
    monkeypatch.setattr("hedgespec.integrations.transformers.batch_steps.through", lambda processors, tokens, logits: logits)
    assert verdict_of(entry, 1, entry.doors[0]) == "another text"
    refused = next(one for one in ENTRIES if one.option == "num_beams")
    monkeypatch.setattr("hedgespec.integrations.transformers.loop.refuse", lambda *arguments: None)
    assert verdict_of(refused, 1, refused.doors[0]) != refused.verdict


# The names of the cache


class OldName(transformers.LlamaForCausalLM):
    """As models outside transformers are written until they follow the new name."""

    def forward(self, input_ids=None, past_key_values=None, **kwargs):
        if past_key_values is not None:
            kwargs[CACHE_NAME] = past_key_values
        return super().forward(input_ids, **kwargs)


class NewName(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, cache=None, **kwargs):
        if cache is not None:
            kwargs[CACHE_NAME] = cache
        return super().forward(input_ids, **kwargs)


def old(input_ids, past_key_values=None, use_cache=None): ...


def new(input_ids, cache=None, use_cache=None): ...


def anything(*args, **kwargs): ...


def nothing(input_ids): ...


@pytest.mark.parametrize(
    ("function", "argument", "names"),
    [(old, "past_key_values", True), (new, "cache", True), (anything, CACHE_NAME, False), (nothing, None, False)],
)
def test_the_caches_argument(function, argument, names):
    assert compat.cache_argument(function) == argument and compat.names_cache(function) is names


def test_the_cache_among_arguments():
    cache = DynamicCache()
    for arguments, expected in (
        ({"cache": cache}, cache), ({"past_key_values": cache}, cache), ({"cache": None, "past_key_values": cache}, cache),
        ({"cache": None}, None), ({}, None),
    ):  # fmt: skip
        assert compat.cache_in(arguments) is expected


@pytest.mark.parametrize("kind", [OldName, NewName])
def test_targets_by_either_name(kind):
    model, _ = model_and_decoder()
    target = kind(model.config).double().eval()
    target.load_state_dict(model.state_dict())
    check_target(target)
    decoder = Decoder(target, [NGramDrafter(target.config.vocab_size)])
    for rows in (1, 3):
        out = decoder.generate(**prompts(rows), max_new_tokens=10)
        expected = model.generate(**prompts(rows), max_new_tokens=10, do_sample=False)
        assert out.sequences.tolist() == expected.tolist()


def test_a_cache_passed_by_the_old_name_still_works():
    """transformers itself warns of it from 5.24 on."""
    model, decoder = model_and_decoder()
    cache = DynamicCache(config=model.config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        out = model.generate(
            **prompts(1), past_key_values=cache, max_new_tokens=5, do_sample=False, custom_generate=decoder,
            return_dict_in_generate=True,
        )  # fmt: skip
    assert out[CACHE_NAME] is cache and cache.get_seq_length() == prompts(1)["input_ids"].shape[1] + 4


def test_nothing_of_ours_is_deprecated(caplog):
    """Neither Python's warnings nor transformers' log speak of a call of ours."""
    model, decoder = model_and_decoder()
    asked = dict(max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_warning()
    transformers.utils.logging.warning_once.cache_clear()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for rows in (1, 3):
                cache = DynamicCache(config=model.config)
                out = model.generate(**prompts(rows), **asked, **{CACHE_NAME: cache}, custom_generate=decoder)
                assert out[CACHE_NAME] is cache
                decoder.generate(**prompts(rows), max_new_tokens=8)
            model.generate(**prompts(3), **asked, logits_processor=[PerRow()], stopping_criteria=[DoneTracker()],
                           custom_generate=decoder)  # fmt: skip
            hedgespec.accelerate(model, decoder)
            try:
                model.generate(**prompts(1), **asked)
            finally:
                hedgespec.restore(model)
    finally:
        logger.removeHandler(caplog.handler)
        transformers.logging.set_verbosity(verbosity)
    assert not [record for record in caplog.records if "deprecated" in record.getMessage()]


# Weights that several processes share


def test_a_model_that_processes_share_is_refused(monkeypatch):
    """`generate` sets `synced_gpus` for it and does not pass that on."""
    model, decoder = model_and_decoder()
    for name, value in (("is_available", True), ("is_initialized", True), ("get_world_size", 2)):
        monkeypatch.setattr(torch.distributed, name, lambda *_, value=value: value)
    monkeypatch.setattr("hedgespec.integrations.transformers.checks.is_fsdp_managed_module", lambda module: module is model)
    with pytest.raises(ValueError, match="synced_gpus: expected False, because processes"):
        model.generate(**prompts(1), max_new_tokens=3, custom_generate=decoder)
    monkeypatch.setattr("hedgespec.integrations.transformers.checks.is_fsdp_managed_module", lambda module: False)
    model.generate(**prompts(1), max_new_tokens=3, custom_generate=decoder)
