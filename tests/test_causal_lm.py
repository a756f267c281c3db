"""A small language model as a drafter: whose vocabulary it takes for its own, and what its session forgets."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from hedgespec.drafters.causal_lm import CausalLMDrafter
from hedgespec.errors import VocabularyMismatchError

SHAPE = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
WORDS = ["<s>", "</s>", "the", "cat", "sat", "mat"]


def model(vocabulary: int, **options) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **SHAPE, **options)).double().eval()


def tokenizer(words: list[str], **special: str) -> PreTrainedTokenizerFast:
    ids = {word: id for id, word in enumerate(words)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(ids, unk_token="<s>")), **special)


def test_the_same_tokenizer_is_taken_whatever_the_padding_of_the_vocabularies():
    target = model(6)
    for vocabulary, usable in ((6, 6), (64, 6)):
        drafter = CausalLMDrafter(
            model(vocabulary), target, tokenizer=tokenizer(WORDS), target_tokenizer=tokenizer(WORDS)
        )  # fmt: skip
        assert (drafter.vocab_size, drafter.draft_to_target) == (usable, None)
        assert drafter.session().consume(torch.tensor([2, 3]), None, 1).shape == (1, usable)
    padded_target = CausalLMDrafter(model(60), model(64))
    assert padded_target.draft_to_target.tolist() == list(range(60))


@pytest.mark.parametrize(
    ("words", "special", "message"),
    [
        ([*WORDS[:3], "dog", *WORDS[4:]], {}, "id 3 is 'dog' to the drafter and 'cat' to the target"),
        (WORDS[:-1], {}, "id 5 is None to the drafter and 'mat' to the target"),
        ([*WORDS, "hat"], {}, "id 6 is 'hat' to the drafter and None to the target"),
        (WORDS, {"eos_token": "sat"}, "expected eos_token_id 1, the target's, got 4"),
    ],
)
def test_another_tokenizer_is_refused_by_its_first_difference(words, special, message):
    theirs = tokenizer(WORDS, eos_token="</s>")
    with pytest.raises(VocabularyMismatchError, match=f"drafter small: .*{message}"):
        CausalLMDrafter(model(7), model(7), "small", tokenizer=tokenizer(words, **special), target_tokenizer=theirs)


def test_without_tokenizers_the_configurations_are_compared():
    with pytest.raises(VocabularyMismatchError, match="expected a vocabulary of 60 tokens, got 50"):
        CausalLMDrafter(model(50), model(60))
    with pytest.raises(VocabularyMismatchError, match="expected eos_token_id 2, the target's, got 3"):
        CausalLMDrafter(model(50, eos_token_id=3), model(50, eos_token_id=2))
    CausalLMDrafter(model(50, eos_token_id=None), model(50, eos_token_id=2))
    with pytest.raises(ValueError, match="tokenizer: expected both tokenizers or neither"):
        CausalLMDrafter(model(6), model(6), tokenizer=tokenizer(WORDS))


def test_a_session_forgets_what_was_drafted_beyond_a_sliding_window_too():
    torch.manual_seed(0)
    sliding = MistralForCausalLM(MistralConfig(vocab_size=50, sliding_window=6, **SHAPE)).double().eval()
    tokens = torch.randint(50, (20,), generator=torch.Generator().manual_seed(0))
    session = CausalLMDrafter(sliding, sliding).session()
    with torch.no_grad():
        expected = sliding(tokens[None]).logits[0]
        for start, end in ((0, 9), (9, 12), (12, 13), (13, 20)):
            rows = session.consume(tokens[start:end], None, end - start)
            torch.testing.assert_close(rows, expected[start:end])
            for drafted in (7, 8, 9):
                session.step(torch.tensor([drafted]))
        assert session.verified == 20
