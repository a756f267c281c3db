"""Logits of the target from which no token can be taken are an error that names the target and the position."""

from __future__ import annotations

import math

import pytest
from helpers.texts import TREE, VOCABULARY, knowing_pool, plain_texts, prompts, tiny
from transformers import LogitsProcessor, LogitsProcessorList

from hedgespec.config import DecodeConfig
from hedgespec.decoder import Decoder
from hedgespec.errors import TargetLogitsError

PROMPT, COUNT = 9, 12
BAD = {"NaN": math.nan, "inf": math.inf, "-inf throughout: no token is allowed": -math.inf}


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture
def spoiled(model):
    """Lets the model give other logits behind some tokens of a text, from `first` on."""
    handles = []

    def spoil(value: float, first: int, last: int = 10**6, token: int | None = None):
        def hook(module, arguments, kwargs, outputs):
            kept = outputs.logits.shape[1]
            places = kwargs["position_ids"][:, -kept:].expand(outputs.logits.shape[:2])
            logits, chosen = outputs.logits.clone(), (places >= first - 1) & (places < last)
            logits[(chosen, slice(None)) if token is None else (chosen, token)] = value
            outputs.logits = logits
            return outputs

        handles.append(model.register_forward_hook(hook, with_kwargs=True))

    yield spoil
    for handle in handles:
        handle.remove()


def decoder_of(model, batch, tree=None, mode="sampled") -> Decoder:
    texts = plain_texts(model, batch, COUNT)
    return Decoder(model, knowing_pool(batch, texts), DecodeConfig(draft_length=3, tree=tree, mode=mode))


@pytest.mark.parametrize("tree", [None, TREE], ids=["chain", "tree"])
@pytest.mark.parametrize("first", [PROMPT, PROMPT + 5])
@pytest.mark.parametrize("got", BAD)
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 0}], ids=["greedy", "sampled"])
def test_unsound_logits_are_the_targets_fault(model, spoiled, got, first, options, tree):
    batch = prompts(PROMPT)
    decoder = decoder_of(model, batch, tree)
    spoiled(BAD[got], first)
    shown: list[int] = []
    with pytest.raises(TargetLogitsError, match=rf"target: .* for token {first} of row 0, .*LlamaForCausalLM, got .?{got}"):
        decoder.generate(**batch, max_new_tokens=COUNT, on_tokens=lambda _, tokens: shown.extend(tokens), **options)
    assert len(shown) <= first - PROMPT


def test_one_nan_among_the_logits_is_enough_and_the_row_is_named(model, spoiled):
    batch = prompts(9, 6)
    decoder = decoder_of(model, batch)
    spoiled(math.nan, 12, token=5)
    with pytest.raises(TargetLogitsError, match="for token 12 of row 0"):  # 12 tokens of its own; row 1 is not as far
        decoder.generate(**batch, max_new_tokens=COUNT)


def test_unsound_logits_behind_the_prompts_own_tokens_do_not_matter(model, spoiled):
    batch = prompts(PROMPT)
    texts = plain_texts(model, batch, COUNT)
    decoder = Decoder(model, knowing_pool(batch, texts), DecodeConfig(draft_length=3, warm_start=6))
    spoiled(math.nan, 1, last=PROMPT - 1)
    out = decoder.generate(**batch, max_new_tokens=COUNT)
    assert out.sequences[:, PROMPT:].tolist() == texts
    assert not out.stats[0].failures


def test_unsound_logits_behind_the_end_of_a_text_do_not_matter(model, spoiled):
    batch = prompts(PROMPT)
    [text] = plain_texts(model, batch, COUNT)
    decoder = decoder_of(model, batch)
    end = next(place for place in range(3, COUNT) if text[place] not in text[:place])
    spoiled(math.nan, PROMPT + end + 1)
    found = decoder.generate(**batch, max_new_tokens=COUNT, eos_token_id=text[end]).sequences[0, PROMPT:].tolist()
    assert found == text[: end + 1]


@pytest.mark.parametrize("lengths", [(9,), (9, 9)])
@pytest.mark.parametrize("do_sample", [True, False])
def test_nothing_allowed(model, lengths, do_sample):
    batch = prompts(*lengths)
    decoder = decoder_of(model, batch)
    asked = {**batch, "max_new_tokens": 5, "do_sample": do_sample, "suppress_tokens": list(range(VOCABULARY))}
    with pytest.raises(RuntimeError, match=r"\(after the logits processors\), got -inf throughout: no token is allowed"):
        model.generate(**asked, custom_generate=decoder)
    if do_sample:
        with pytest.raises(RuntimeError, match="probability tensor"):
            model.generate(**asked)


class Forcing(LogitsProcessor):
    """Forces a token as user code does: by +inf."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        if self.calls % 3 == 0:
            scores[:, 7] = math.inf
        return scores


def test_a_token_forced_by_infinity_is_taken_in_greedy_decoding(model):
    batch = prompts(PROMPT)
    expected = model.generate(**batch, max_new_tokens=COUNT, do_sample=False, logits_processor=LogitsProcessorList([Forcing()]))
    found = model.generate(
        **batch, max_new_tokens=COUNT, do_sample=False, logits_processor=LogitsProcessorList([Forcing()]),
        custom_generate=decoder_of(model, batch),
    )  # fmt: skip
    assert found.tolist() == expected.tolist()
