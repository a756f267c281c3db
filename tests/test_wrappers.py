"""Targets within `torch.compile` and PEFT: the same text as plain decoding, or a refusal by name."""

from __future__ import annotations

import pytest
import torch
import transformers
from helpers.texts import VOCABULARY, knowing_pool, plain_texts, prompts, tiny
from helpers.wrappers import WRAPPERS, build, lora, prompt_learning
from torch import nn

import hedgespec
from hedgespec import capture
from hedgespec.capture import fingerprint
from hedgespec.config import DecodeConfig
from hedgespec.decoder import Decoder
from hedgespec.drafters.ngram import NGramDrafter
from hedgespec.linear import few_row_view
from hedgespec.self_check import may_be_ragged
from hedgespec.wrappers import unwrap

COUNT = 12


def check(model, batch, texts, decoder) -> None:
    width = batch["input_ids"].shape[1]
    assert decoder.generate(**batch, max_new_tokens=COUNT).sequences[:, width:].tolist() == texts
    asked = {**batch, "max_new_tokens": COUNT, "do_sample": False}
    assert model.generate(**asked, custom_generate=decoder)[:, width:].tolist() == texts
    hedgespec.accelerate(model, [NGramDrafter(VOCABULARY)])
    try:
        assert model.generate(**asked)[:, width:].tolist() == texts
    finally:
        hedgespec.restore(model)
    assert plain_texts(model, batch, COUNT) == texts


@pytest.mark.parametrize("wrapper", WRAPPERS, ids=lambda wrapper: wrapper.name)
def test_wrapped_targets(wrapper):
    if "PEFT" in wrapper.name:
        pytest.importorskip("peft")
    model, batch = build(wrapper), prompts(9, 6)
    if wrapper.refused:
        with pytest.raises(ValueError, match="target: " + wrapper.refused):
            Decoder(model, [NGramDrafter(VOCABULARY)])
        return
    bare = plain_texts(tiny(), batch, COUNT)
    texts = bare if "compile" in wrapper.name and "PEFT" not in wrapper.name else plain_texts(model, batch, COUNT)
    assert (texts == bare) == ("PEFT" not in wrapper.name)  # or the adapter does nothing
    decoder = Decoder(model, knowing_pool(batch, texts), DecodeConfig(draft_length=3))
    assert decoder.together
    check(model, batch, texts, decoder)


@pytest.mark.parametrize("compiled", [False, True])
def test_adapters_go_on_and_off_under_one_decoder(compiled, monkeypatch):
    monkeypatch.setattr(capture, "compiled", lambda graph: graph)  # inductor's code takes seconds to make
    pytest.importorskip("peft")
    model, batch = lora(tiny()), prompts(9)
    on, off = plain_texts(model, batch, COUNT), plain_texts(tiny(), batch, COUNT)
    decoder = Decoder(model, knowing_pool(batch, on), DecodeConfig(draft_length=3, compile=compiled))

    def found() -> list[list[int]]:
        return decoder.generate(**batch, max_new_tokens=COUNT).sequences[:, 9:].tolist()

    assert found() == on
    with model.disable_adapter():
        assert found() == off
    model.merge_adapter()
    assert found() == on
    model.unmerge_adapter()
    assert found() == on


def test_an_adapter_for_every_row_is_refused_in_a_batch():
    pytest.importorskip("peft")
    model = lora(tiny())
    decoder = Decoder(model, [NGramDrafter(VOCABULARY)])
    asked = {"max_new_tokens": 4, "do_sample": False, "adapter_names": ["default"]}
    one = prompts(9)
    expected = model.generate(**one, **asked).tolist()
    assert model.generate(**one, **asked, custom_generate=decoder).tolist() == expected
    with pytest.raises(ValueError, match="adapter_names: expected a batch of 1"):
        model.generate(**prompts(9, 9), **asked | {"adapter_names": ["default", "__base__"]}, custom_generate=decoder)


def test_a_scale_that_changes_is_no_longer_the_captured_model():
    model = tiny()
    before = fingerprint(few_row_view(model))
    assert fingerprint(few_row_view(model)) == before
    model.model.layers[0].self_attn.scaling *= 2
    assert fingerprint(few_row_view(model)) != before


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_a_prompt_that_generate_adds_is_refused_there_too(kind):
    pytest.importorskip("peft")
    base = tiny()
    decoder = Decoder(base, [NGramDrafter(VOCABULARY)])  # before the base model is wrapped
    model = prompt_learning(base, kind)
    with pytest.raises(ValueError, match="target: expected a model whose prepare_inputs_for_generation"):
        model.generate(**prompts(9), max_new_tokens=3, do_sample=False, custom_generate=decoder)


def test_unwrap_finds_the_model_in_any_order():
    model = tiny()
    assert unwrap(torch.compile(nn.DataParallel(torch.compile(model)))) is model
    assert unwrap(model) is model


# --- code that is not known ----------------------------------------------------------------------------------------------


class BySlot(transformers.models.llama.modeling_llama.LlamaAttention):
    """Attends to the last four slots, counted from the end of the cache."""

    def forward(self, hidden_states, position_embeddings, attention_mask=None, **kwargs):
        seen = kwargs.get("cache", kwargs.get("past_key_values"))
        count = hidden_states.shape[1]
        end = seen.get_seq_length(self.layer_idx) + count
        queries, keys = torch.arange(end - count, end)[:, None], torch.arange(end)
        near = (keys <= queries) & (keys > queries - 4)
        mask = near[None, None] if attention_mask is None else near & attention_mask
        return super().forward(hidden_states, position_embeddings, attention_mask=mask, **kwargs)


class Averaging(transformers.models.llama.modeling_llama.LlamaMLP):
    """Looks at all tokens of a forward."""

    def forward(self, x):
        return super().forward(x + x.mean(1, keepdim=True))


class Plain(transformers.models.llama.modeling_llama.LlamaMLP):
    """The same under another name."""


def replaced(child: str, kind: type):
    model = tiny()
    for layer in model.model.layers:
        getattr(layer, child).__class__ = kind
    return model


def test_layers_that_mask_by_slot_are_found_by_trying():
    model, batch = replaced("self_attn", BySlot), prompts(9)
    texts = plain_texts(model, batch, COUNT)
    decoder = Decoder(model, knowing_pool(batch, texts), DecodeConfig(draft_length=3))
    assert not decoder.together
    check(model, batch, texts, decoder)
    with pytest.raises(ValueError, match="tree: expected a target"):
        Decoder(model, [NGramDrafter(VOCABULARY)], DecodeConfig(tree=hedgespec.Tree(2)))


def test_a_forward_over_several_tokens_that_is_no_series_of_steps_is_refused():
    with pytest.raises(ValueError, match="target: expected a model whose forward over 4 tokens gives"):
        Decoder(replaced("mlp", Averaging), [NGramDrafter(VOCABULARY)])


def test_other_code_is_tried_once_a_model(monkeypatch):
    tried = []
    import hedgespec.self_check as checks

    original = checks._try
    monkeypatch.setattr(checks, "_try", lambda model: tried.append(model) or original(model))
    model = replaced("mlp", Plain)
    assert may_be_ragged(model) and may_be_ragged(model) and may_be_ragged(tiny())
    assert tried == [model]
