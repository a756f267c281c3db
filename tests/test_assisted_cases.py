"""Cases that transformers' own tests of assisted generation, prompt lookup and candidate generators go through, on the drop-in.

The tests there were read for their cases only, in these files:

- tests/generation/test_utils.py: test_assisted_decoding_matches_greedy_search, test_assisted_decoding_sample,
  test_prompt_lookup_decoding_matches_greedy_search, test_prompt_lookup_decoding_stops_at_eos,
  test_assisted_decoding_num_assistant_tokens_heuristic_schedule and ..._transient_schedule,
  test_assisted_decoding_encoder_decoder_shared_encoder, test_validate_assistant, test_compare_unprocessed_logit_scores,
  test_special_tokens_fall_back_to_model_default, test_speculative_decoding_equals_regular_decoding;
- tests/generation/test_candidate_generator.py: those of AssistantToTargetTranslator and of
  UniversalSpeculativeDecodingGenerator.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from helpers.compatibility import PROMPT, VOCABULARY, model_and_decoder, prompts
from transformers import LlamaForCausalLM

from hedgespec.compat import CACHE_NAME
from hedgespec.config import DecodeConfig
from hedgespec.decoder import Decoder
from hedgespec.drafters.causal_lm import CausalLMDrafter
from hedgespec.drafters.ngram import NGramDrafter
from hedgespec.errors import VocabularyMismatchError


def other_model(seed: int = 5):
    model, _ = model_and_decoder()
    torch.manual_seed(seed)
    return LlamaForCausalLM(model.config).double().eval()


@pytest.mark.parametrize("assistant", ["random", "same", "prompt lookup"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("processors", [{}, dict(bad_words_ids=[[1, 0]], repetition_penalty=1.2, remove_invalid_values=True)])
def test_tokens_scores_and_logits_are_those_of_greedy_search(assistant, rows, processors):
    """No token ends the text, the assistant drafts two, the target runs at least twice. There a batch of one only."""
    model, _ = model_and_decoder()
    drafter = {
        "random": lambda: CausalLMDrafter(other_model(), model), "same": lambda: CausalLMDrafter(model, model),
        "prompt lookup": lambda: NGramDrafter(VOCABULARY),
    }[assistant]()  # fmt: skip
    asked = prompts(rows) | dict(
        eos_token_id=-1, max_new_tokens=4, num_beams=1, do_sample=False, output_scores=True, output_logits=True,
        return_dict_in_generate=True, use_cache=True, **processors,
    )  # fmt: skip
    expected = model.generate(**asked)
    out = model.generate(**asked, custom_generate=Decoder(model, [drafter], DecodeConfig(draft_length=2)))
    assert out.sequences.tolist() == expected.sequences.tolist()
    for name in ("scores", "logits"):
        assert len(out[name]) == 4
        for own, wanted in zip(out[name], expected[name], strict=True):
            torch.testing.assert_close(own, wanted, atol=1e-4, rtol=1e-4)


def test_sampling_keeps_shapes():
    model, _ = model_and_decoder()
    asked = prompts(1) | dict(
        eos_token_id=-1, max_new_tokens=4, do_sample=True, output_scores=True, return_dict_in_generate=True
    )
    out = model.generate(**asked, custom_generate=Decoder(model, [CausalLMDrafter(model, model)], DecodeConfig(draft_length=2)))
    assert out.sequences.shape == (1, PROMPT + 4) and [tuple(one.shape) for one in out.scores] == [(1, VOCABULARY)] * 4


@pytest.mark.parametrize("place", range(3, PROMPT))
def test_a_draft_copied_from_the_prompt_ends_with_its_end_id(place):
    """The prompt repeats a token that an end id followed: whatever of that is accepted, nothing comes after the end."""
    model, _ = model_and_decoder()
    ids = prompts(1)["input_ids"]
    ids[0, place - 1] = ids[0, -1]
    ids[0, place] = end = 23
    forced = dict(prefix_allowed_tokens_fn=lambda row, tokens: [end] if len(tokens) < PROMPT + 3 else list(range(VOCABULARY)))
    for asked in ({}, forced):
        asked = dict(max_new_tokens=12, do_sample=False, eos_token_id=torch.tensor([end]), pad_token_id=0, **asked)
        expected = model.generate(ids, **asked)
        out = model.generate(ids, **asked, custom_generate=Decoder(model, [NGramDrafter(VOCABULARY)]))
        assert out.tolist() == expected.tolist()
    assert out.shape[1] == PROMPT + 1


@pytest.mark.parametrize("new_tokens", [1, 2, 3])
def test_a_draft_longer_than_the_room(new_tokens):
    model, _ = model_and_decoder()
    decoder = Decoder(model, [CausalLMDrafter(model, model)], DecodeConfig(draft_length=8))
    for asked in (dict(max_new_tokens=new_tokens), dict(max_length=PROMPT + new_tokens)):
        out = model.generate(**prompts(3), do_sample=False, custom_generate=decoder, **asked)
        assert out.tolist() == model.generate(**prompts(3), do_sample=False, **asked).tolist()


@pytest.mark.parametrize("schedule", ["heuristic", "heuristic_transient", "constant"])
def test_generation_configs_stay_as_they_were(schedule):
    """A schedule of transformers' assistants changes nothing here, and nothing is written into it."""
    model, _ = model_and_decoder()
    assistant = other_model()
    assistant.generation_config.num_assistant_tokens = 5
    assistant.generation_config.num_assistant_tokens_schedule = schedule
    before = assistant.generation_config.to_dict(), model.generation_config.to_dict()
    decoder = Decoder(model, [CausalLMDrafter(assistant, model)])
    asked = prompts(1) | dict(eos_token_id=-1, max_new_tokens=5, do_sample=False)
    assert model.generate(**asked, custom_generate=decoder).tolist() == model.generate(**asked).tolist()
    assert (assistant.generation_config.to_dict(), model.generation_config.to_dict()) == before


class Fake(LlamaForCausalLM):
    """Takes an argument of its own that changes what it says."""

    def forward(self, input_ids=None, past_key_values=None, foo=False, **kwargs):
        if past_key_values is not None:
            kwargs[CACHE_NAME] = past_key_values
        out = super().forward(input_ids, **kwargs)
        if foo:
            out["logits"] = out["logits"].roll(1, -1)
        return out


def test_an_argument_of_the_models_own_is_refused_unless_it_says_nothing():
    """There it reaches the assistant too; here drafters would not see it."""
    model, _ = model_and_decoder()
    fake = Fake(model.config).double().eval()
    fake.generation_config.pad_token_id = 0
    decoder = Decoder(fake, [NGramDrafter(VOCABULARY)])
    asked = prompts(1) | dict(max_new_tokens=6, do_sample=False)
    plain = fake.generate(**asked)
    assert fake.generate(**asked, foo=True).tolist() != plain.tolist()
    with pytest.raises(ValueError, match="foo: expected no such argument for the model"):
        fake.generate(**asked, foo=True, custom_generate=decoder)
    assert fake.generate(**asked, foo=False, custom_generate=decoder).tolist() == plain.tolist()


def test_an_assistant_with_another_vocabulary_is_refused():
    """There are translators between tokenizers; here ids have to mean the same."""
    model, _ = model_and_decoder()
    config = transformers.LlamaConfig.from_dict(model.config.to_dict() | {"vocab_size": 2 * VOCABULARY})
    with pytest.raises(VocabularyMismatchError, match="expected a vocabulary of 53 tokens, got 106"):
        CausalLMDrafter(LlamaForCausalLM(config), model)


def test_encoder_decoders_are_refused():
    config = transformers.BartConfig(vocab_size=VOCABULARY, d_model=16, encoder_layers=1, decoder_layers=1,
                                     encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
                                     decoder_ffn_dim=16)  # fmt: skip
    with pytest.raises(ValueError, match="target: expected a decoder-only model, got the encoder-decoder"):
        Decoder(transformers.BartForConditionalGeneration(config), [NGramDrafter(VOCABULARY)])


def test_unprocessed_logits_are_those_of_a_forward():
    model, decoder = model_and_decoder()
    with torch.no_grad():
        forward = model(prompts(1)["input_ids"]).logits[:, -1].float()
    out = model.generate(
        **prompts(1),
        max_new_tokens=1,
        do_sample=True,
        output_logits=True,
        return_dict_in_generate=True,
        custom_generate=decoder,
    )
    torch.testing.assert_close(out.logits[0], forward, atol=1e-5, rtol=1e-5)


def test_a_first_token_of_its_own_comes_from_the_config():
    model, decoder = model_and_decoder()
    config = transformers.GenerationConfig(bos_token_id=40, pad_token_id=0, max_new_tokens=3, do_sample=False)
    out = model.generate(generation_config=config, custom_generate=decoder)
    assert out[0, 0] == 40 and out.tolist() == model.generate(generation_config=config).tolist()


@pytest.mark.parametrize("seed", range(4))
def test_random_prompts_and_lengths(seed):
    model, decoder = model_and_decoder()
    generator = torch.Generator().manual_seed(seed)
    length, new_tokens = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((2, 60), (10, 50)))
    ids = torch.randint(1, VOCABULARY, (1, length), generator=generator)
    asked = dict(do_sample=False, max_new_tokens=new_tokens)
    assert model.generate(ids, **asked, custom_generate=decoder).tolist() == model.generate(ids, **asked).tolist()
