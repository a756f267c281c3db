"""The target's session over ragged batches, and many families of targets under the decoder."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import transformers
from helpers.families import (
    FAMILIES,
    NEW_TOKENS,
    ONE_BY_ONE,
    PADDING,
    PROMPT,
    VOCABULARY,
    WIDTH,
    own_texts,
    padded_prompts,
    pool,
    texts_of,
    tiny,
)
from transformers import DynamicCache

from hedgespec.config import DecodeConfig
from hedgespec.decoder import Decoder, Request, generator
from hedgespec.drafters.ngram import NGramDrafter
from hedgespec.ops.sampling import Sampling
from hedgespec.runtime.compat import CACHE_NAME
from hedgespec.runtime.target import TargetSession, rows_may_differ


def attentions(family: str) -> list[str]:
    model_class = type(tiny(family))
    return ["eager"] + ["sdpa"] * model_class._supports_sdpa


@pytest.mark.parametrize(("family", "attention"), [(family, kind) for family in FAMILIES for kind in ("sdpa", "eager")])
def test_every_row_is_the_models_own_text(family, attention):
    if attention not in attentions(family):
        pytest.skip(f"{family} has no {attention} attention")
    model = tiny(family, attention)
    ids, mask = padded_prompts()
    texts = own_texts(model, ids, mask)
    # Loops would be too easy to follow.
    assert sum(len(set(itertools.pairwise(text))) for text in texts) > len(texts) * NEW_TOKENS * 0.35
    # The rows end at different times, on the token that spreads their ends the most.
    eos = max(range(1, VOCABULARY), key=lambda token: len({(*text, token).index(token) for text in texts}))
    ended = [text[: (*text, eos).index(eos) + 1] for text in texts]
    assert len({len(text) for text in ended}) >= 3

    assert rows_may_differ(model) == (family not in ONE_BY_ONE)
    decoder = Decoder(model, pool(model), DecodeConfig(draft_length=3))
    out = decoder.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, eos_token_id=eos, seed=0)
    assert [row[PROMPT:].tolist() for row in out.sequences] == [
        text + [0] * (max(map(len, ended)) - len(text)) for text in ended
    ]
    assert not any(stats.failures for stats in out.stats)
    emitted = [count for stats in out.stats for count in stats.emitted_by_round]
    assert min(emitted) == 1 and max(emitted) > 2 and np.mean(emitted) > 1.1  # drafts were rejected and accepted


@pytest.fixture(scope="module")
def sliding():
    """A target with windowed layers and full ones."""
    return tiny("Gemma3Text")


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("learner", ["normal_hedge", "exp3"])
def test_a_row_is_decoded_as_it_would_be_alone(sliding, temperature, learner):
    """Text, choices, weights and what was learned, from the same uniforms, whoever else is in the batch."""
    ids, mask = padded_prompts()
    decoder = Decoder(sliding, pool(sliding), DecodeConfig(draft_length=3, learner=learner))
    sampling = Sampling(temperature)
    together = decoder.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, temperature=temperature, seed=5)
    for number, (row, padding, beside) in enumerate(zip(ids, PADDING, together.stats)):
        with torch.no_grad():
            [alone] = decoder.decode([Request(row[padding:], 0, NEW_TOKENS, generator(5, number))], sampling)
        assert alone.sequence[PROMPT - padding :].tolist() == together.sequences[number, PROMPT:].tolist()
        assert alone.stats.choices == beside.choices
        assert alone.stats.emitted_by_round == beside.emitted_by_round
        np.testing.assert_allclose(alone.stats.weights, beside.weights, atol=1e-4)
        np.testing.assert_allclose(alone.stats.losses, beside.losses, atol=1e-4)


# --- the session ----------------------------------------------------------------------------------------------------


class Reader:
    """Feeds a session texts in chunks, each row at its own pace, and compares what comes back with one plain forward."""

    def __init__(self, model, texts: list[torch.Tensor], aux_layers: tuple[int, ...] = ()):
        self.session = TargetSession(model, [aux_layers], len(texts))
        self.texts, self.at, self.aux_layers = texts, [0] * len(texts), aux_layers
        self.expected = [model(text[None], output_hidden_states=True) for text in texts]

    def read(self, *keep: int, chunk: int) -> None:
        """Reads a chunk of every row of which `keep` tokens are the text's and the others are not."""
        tokens = torch.zeros(len(keep), chunk, dtype=torch.int64)
        for row, count in enumerate(keep):
            tokens[row, :count] = self.texts[row][self.at[row] :][:count]
        logits = self.session.forward(tokens, chunk)
        for row, (begin, count) in enumerate(zip(self.at, keep)):
            expected = self.expected[row].logits[0, begin : begin + count]
            torch.testing.assert_close(logits[row, :count], expected, atol=2e-4, rtol=1e-4)
        self.session.keep(keep)
        self.at = [begin + count for begin, count in zip(self.at, keep)]
        assert self.session.cache.lengths == self.at

    def select(self, *rows: int) -> None:
        self.session.select(rows)
        self.texts, self.at, self.expected = ([held[row] for row in rows] for held in (self.texts, self.at, self.expected))

    def check_features(self) -> None:
        """A row for every token: the states at the position before it, zeros before the first."""
        for features, end, expected in zip(self.session.features, self.at, self.expected):
            states = torch.cat([expected.hidden_states[layer][0, :end] for layer in self.aux_layers], -1)
            rows = torch.cat([torch.zeros_like(states[:1]), states])
            torch.testing.assert_close(features[self.aux_layers][:], rows, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["Llama", "Gemma3Text", "GptOss", "GPT2"])
@torch.no_grad()
def test_rows_advance_and_roll_back_each_at_its_own_pace(family):
    reader = Reader(tiny(family), texts_of(40, 40, 40), aux_layers=(0, 2))
    reader.read(9, 2, 5, chunk=9)
    reader.read(1, 4, 0, chunk=4)  # a row may keep nothing at all
    reader.read(3, 3, 3, chunk=3)
    reader.check_features()
    reader.select(2, 0)  # the order is the caller's
    reader.read(1, 6, chunk=6)
    reader.read(11, 1, chunk=12)
    reader.check_features()
    reader.select(1)
    reader.read(12, chunk=12)
    reader.check_features()


@torch.no_grad()
def test_only_the_logits_asked_for_come_back(sliding):
    session = TargetSession(sliding, [()], 2)
    assert session.forward(torch.ones(2, 5, dtype=torch.int64), 2).shape == (2, 2, VOCABULARY)
    session.keep([3, 5])
    assert session.forward(torch.ones(2, 4, dtype=torch.int64), 1).shape == (2, 1, VOCABULARY)


@pytest.mark.parametrize("first", [(250, 250), (250, 180)])
@torch.no_grad()
def test_the_cache_grows_under_ragged_rows(sliding, first):
    """256 slots come with the first tokens; then they are outgrown twice, by one row before the other."""
    reader = Reader(sliding, texts_of(470, 470), aux_layers=(1,))
    reader.read(*first, chunk=max(first))
    for _ in range(10):
        reader.read(9, 7, chunk=20)
    reader.read(120, 100, chunk=120)
    assert max(reader.at) > 256 + 128
    reader.check_features()


@pytest.mark.parametrize("family", ["Llama", "Gemma3Text"])
@torch.no_grad()
def test_a_cache_is_taken_over(family):
    """From padded prompts, of which the window may have forgotten the first tokens; some rows go on from fewer tokens."""
    model = tiny(family)
    ids, mask = padded_prompts()
    past = DynamicCache(config=model.config)
    model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), **{CACHE_NAME: past}, use_cache=True)
    rows, more = [0, 2, 3], texts_of(6, 6, 6)
    texts = [torch.cat([ids[row, PADDING[row] :], tokens]) for row, tokens in zip(rows, more)]
    reader = Reader(model, texts)
    reader.at = [PROMPT - PADDING[row] - back for row, back in zip(rows, (0, 1, 0))]
    reader.session.cache.load(past, rows, [PADDING[row] for row in rows], reader.at)
    reader.read(4, 2, 1, chunk=4)
    reader.read(1, 3, 3, chunk=3)


def test_a_rows_keys_are_those_of_the_row_alone(sliding):
    [text] = texts_of(20)
    with torch.no_grad():
        alone, beside = TargetSession(sliding, [()], 1), TargetSession(sliding, [()], 2)
        alone.forward(text[None], 1)
        alone.keep([20])
        beside.forward(torch.stack([text, text.flip(0)]), 1)
        beside.keep([20, 5])
    for (keys, values), (own_keys, own_values) in zip(beside.cache.row(0), alone.cache.row(0), strict=True):
        assert keys.shape[1] == 20
        torch.testing.assert_close(keys, own_keys)
        torch.testing.assert_close(values, own_values)
    assert [keys.shape[1] for keys, _ in beside.cache.row(1)] == [5, 5, 5]


# --- what is refused ------------------------------------------------------------------------------------------------

REFUSED = {
    "T5": ({"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}, "the encoder-decoder T5"),
    "Mamba": ({"hidden_size": 32, "num_hidden_layers": 2}, "cannot take back a rejected token"),
    "Jamba": ({"num_hidden_layers": 8, "intermediate_size": 48}, "cannot take back a rejected token"),
    "RecurrentGemma": ({"num_hidden_layers": 3, "intermediate_size": 48}, "cannot take back a rejected token"),
    "Qwen3Next": ({"num_hidden_layers": 4, "intermediate_size": 48}, "cannot take back a rejected token"),
    "Rwkv": ({"hidden_size": 32, "num_hidden_layers": 2}, "a recurrent state"),
    "XLNet": ({"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 32}, "a model that takes cache or past_key_values"),
}


@pytest.mark.parametrize("family", REFUSED)
def test_targets_that_cannot_roll_back_are_refused(family):
    options, message = REFUSED[family]
    config = getattr(transformers, family + "Config")(vocab_size=VOCABULARY, **options)
    with torch.device("meta"):
        auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
        model = auto.from_config(config)
    with pytest.raises(ValueError, match=f"target: expected .*{message}"):
        Decoder(model, [NGramDrafter(VOCABULARY)])


def test_a_target_that_reads_more_than_its_tokens_is_refused():
    """It puts prompts of its own before them, and so their keys into the cache."""
    config = transformers.CpmAntConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, num_attention_heads=4, dim_head=8, dim_ff=48,
                                       num_hidden_layers=2, prompt_length=3)  # fmt: skip
    model = transformers.CpmAntForCausalLM(config).eval()
    with pytest.raises(ValueError, match="target: expected .*got other input_ids from CpmAntForCausalLM"):
        Decoder(model, [NGramDrafter(VOCABULARY)]).generate(torch.ones(1, 5, dtype=torch.int64), max_new_tokens=4)
