"""Targets that prepare the inputs of their forward themselves: what is the same is taken, what is not is refused by name."""

from __future__ import annotations

import pytest
import torch
import transformers
from helpers.texts import VOCABULARY, check_same_text, plain_texts, prompts, tiny

from hedgespec.decoder import Decoder
from hedgespec.drafters.ngram import NGramDrafter
from hedgespec.plain_inputs import PlainInputs, check_inputs, prepares_by_itself

LLAMA = transformers.LlamaForCausalLM


def decoder_of(model) -> Decoder:
    return Decoder(model, [NGramDrafter(VOCABULARY)])


class Same(LLAMA):
    """As remote code often has it."""

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        return super().prepare_inputs_for_generation(input_ids, attention_mask=attention_mask, **kwargs)

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, **kwargs):
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)


class Scaled(LLAMA):
    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, attention_mask=attention_mask, **kwargs)
        inputs["inputs_embeds"] = self.get_input_embeddings()(inputs.pop("input_ids")) * 1.5
        return inputs


class Forgets(LLAMA):
    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, attention_mask=attention_mask, **kwargs)
        inputs["input_ids"] = inputs["input_ids"].clamp(max=3)
        return inputs


class Uncached(LLAMA):
    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, attention_mask=attention_mask, **kwargs)
        return {name: value for name, value in inputs.items() if name not in ("cache", "past_key_values")}


class Masks(LLAMA):
    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, **kwargs):
        kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)
        mask = kwargs["attention_mask"]
        return kwargs | {"attention_mask": torch.cat([torch.zeros_like(mask[:, :1]), mask[:, 1:]], 1)}


class Places(LLAMA):
    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        return 2 * super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)


class More(LLAMA):
    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, attention_mask=attention_mask, **kwargs)
        return inputs | {"scale": torch.ones(1)}


class Breaks(LLAMA):
    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        raise KeyError("pixel_values")


class Loops(LLAMA):
    def _sample(self, *args, **kwargs):
        return super()._sample(*args, **kwargs)


class Late(LLAMA):
    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, attention_mask=attention_mask, **kwargs)
        if input_ids.shape[1] > 13:
            inputs["position_ids"] = inputs["position_ids"] + 3
        return inputs


REFUSED = {
    Scaled: "prepare_inputs_for_generation .* got inputs_embeds from Scaled",
    Forgets: "prepare_inputs_for_generation .* got other input_ids from Forgets",
    Uncached: "prepare_inputs_for_generation .* got another cache from Uncached",
    Masks: "_update_model_kwargs_for_generation .* got another attention_mask from Masks",
    Places: "_prepare_position_ids_for_generation .* got other position_ids from Places",
    More: "prepare_inputs_for_generation .* got scale from More",
    Breaks: "prepare_inputs_for_generation to take what generate gives it",
    Loops: "expected generate's own _sample, got another in Loops",
}


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_a_target_that_prepares_other_inputs_is_refused(kind):
    with pytest.raises(ValueError, match="target: .*" + REFUSED[kind]):
        decoder_of(tiny(model_class=kind))


@pytest.mark.parametrize("lengths", [(9,), (9, 5)])
def test_a_target_that_prepares_the_same_is_taken(lengths):
    model = tiny(model_class=Same)
    assert prepares_by_itself(model)
    check_same_text(model, prompts(*lengths), 12)


class OwnPhi3(transformers.Phi3ForCausalLM):
    """Drops its cache where Phi-3 does."""

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        return super().prepare_inputs_for_generation(input_ids, attention_mask=attention_mask, **kwargs)


@pytest.mark.parametrize("length", [11, 18])
def test_a_target_that_reads_its_text_again_is_asked_too(length):
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.0], "long_factor": [4.0, 9.0]}
    model = tiny("Phi3", OwnPhi3, max_position_embeddings=64, original_max_position_embeddings=16, rope_parameters=rope)
    check_same_text(model, prompts(length), 10)


def test_what_is_different_later_is_refused_before_a_wrong_token():
    model, batch = tiny(model_class=Late), prompts(9)
    expected = plain_texts(tiny(), batch, 12)[0]
    shown: list[int] = []
    with pytest.raises(ValueError, match="got other position_ids from Late for the forward over token 14"):
        decoder_of(model).generate(**batch, max_new_tokens=12, on_tokens=lambda _, tokens: shown.extend(tokens))
    assert shown == expected[: len(shown)] and len(shown) <= 5
    with pytest.raises(ValueError, match="got other position_ids from Late"):
        model.generate(**batch, max_new_tokens=12, do_sample=False, custom_generate=decoder_of(model))


def test_a_method_of_the_instance_counts_from_the_next_call_on():
    model, batch = tiny(), prompts(9)
    decoder = decoder_of(model)
    model.prepare_inputs_for_generation = lambda *args, **kwargs: (
        LLAMA.prepare_inputs_for_generation(model, *args, **kwargs) | {"inputs_embeds": torch.zeros(1)}
    )
    with pytest.raises(ValueError, match="got inputs_embeds from LlamaForCausalLM"):
        decoder.generate(**batch, max_new_tokens=4)
    with pytest.raises(ValueError, match="got inputs_embeds from LlamaForCausalLM"):
        model.generate(**batch, max_new_tokens=4, do_sample=False, custom_generate=decoder)


def test_models_of_transformers_are_not_asked_about_every_token(monkeypatch):
    monkeypatch.setattr(PlainInputs, "check", lambda *_: pytest.fail("asked"))
    model = tiny()
    check_inputs(model)
    assert not prepares_by_itself(model)
    decoder_of(model).generate(**prompts(9), max_new_tokens=3)


def test_an_override_of_transformers_own_is_tried_once():
    asked = []
    model = tiny("Phi3", max_position_embeddings=64)
    original = type(model).prepare_inputs_for_generation

    class Noted(PlainInputs):
        def check(self, tokens):
            asked.append(tokens.shape[1])
            super().check(tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hedgespec.plain_inputs.PlainInputs", Noted)
        decoder_of(model).generate(**prompts(9), max_new_tokens=3)
    assert asked == [4, 5, 6] and original is type(model).prepare_inputs_for_generation
