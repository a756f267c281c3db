"""Texts past the positions that a target was made for, and rotary factors that follow the text's length."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from helpers.texts import TREE, VOCABULARY, check_same_text, error_of, knowing_pool, plain_texts, prompts, tiny

from hedgespec.config import DecodeConfig
from hedgespec.decoder import Decoder
from hedgespec.drafters.causal_lm import CausalLMDrafter
from hedgespec.drafters.ngram import NGramDrafter
from hedgespec.errors import ContextError
from hedgespec.ops.linear import few_row_view
from hedgespec.runtime import capture
from hedgespec.runtime.compat import CACHE_NAME
from hedgespec.runtime.positions import follow, table_size
from hedgespec.runtime.target import TargetSession

LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.0], "long_factor": [4.0, 9.0]}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}


def phi3(**options):
    """Phi-3 as transformers builds it: it drops its cache and reads the text again where its factors change."""
    return tiny("Phi3", max_position_embeddings=64, original_max_position_embeddings=16, rope_parameters=dict(LONG), **options)


def longrope():
    """A model with the same factors that keeps what it computed with the short ones."""
    rope = LONG | {"factor": 4.0, "original_max_position_embeddings": 16}
    return tiny(max_position_embeddings=64, rope_parameters=rope)


def dynamic():
    return tiny(max_position_embeddings=16, rope_parameters=dict(DYNAMIC))


def phimoe():
    rope = LONG | {"original_max_position_embeddings": 16, "short_mscale": 1.1, "long_mscale": 1.3}
    model = tiny("Phimoe", max_position_embeddings=64, original_max_position_embeddings=16, rope_parameters=rope,
                 num_local_experts=2, num_experts_per_tok=2, experts_implementation="eager")  # fmt: skip
    return model


# --- past the context ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(9,), (9, 5)])
def test_rotary_positions_go_on_past_the_context(lengths):
    check_same_text(tiny(max_position_embeddings=20), prompts(*lengths), 30)


def test_who_asks_for_more_than_the_context_is_warned():
    model = tiny(max_position_embeddings=16)
    decoder = Decoder(model, [NGramDrafter(VOCABULARY)])
    with pytest.warns(UserWarning, match="max_new_tokens: the target was made for 16 positions, got a text of up to 19"):
        decoder.generate(**prompts(9), max_new_tokens=10)


def test_a_prompt_may_be_longer_than_the_context():
    check_same_text(tiny(max_position_embeddings=8), prompts(12, 10), 12)


@pytest.fixture
def quick_capture(monkeypatch):
    """Captured layers run as they were traced: inductor's code takes seconds to make."""
    monkeypatch.setattr(capture, "compiled", lambda graph: graph)


@pytest.mark.usefixtures("quick_capture")
def test_captured_forwards_end_with_the_context():
    model, batch = tiny(max_position_embeddings=24), prompts(9)
    check_same_text(model, batch, 24, trees=False, config=DecodeConfig(draft_length=3, compile=True))


TABLES = {
    "GPT2": {"n_positions": 24, "n_embd": 16, "n_layer": 2, "n_head": 4},
    "OPT": {"max_position_embeddings": 24, "ffn_dim": 24, "word_embed_proj_dim": 16, "init_std": 0.3},
    "GPTJ": {"n_positions": 24, "n_embd": 16, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    "BioGpt": {"max_position_embeddings": 24},
    "GPTNeo": {"max_position_embeddings": 24, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
               "window_size": 4},
    "CodeGen": {"n_positions": 24, "n_embd": 16, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
}  # fmt: skip


@pytest.mark.parametrize("family", TABLES)
def test_a_table_of_positions_ends_where_it_ends_in_plain_decoding(family):
    model, batch = tiny(family, **TABLES[family]), prompts(9)
    assert table_size(model) == 24
    most = 24 + 1 - 9  # the last token is emitted and not read
    check_same_text(model, batch, most, trees=family != "GPTNeo")
    plain = error_of(lambda: plain_texts(model, batch, most + 1))
    assert isinstance(plain, IndexError | RuntimeError)
    decoder = Decoder(model, knowing_pool(batch, plain_texts(model, batch, most)), DecodeConfig(draft_length=3))
    calls = [
        lambda: model.generate(**batch, max_new_tokens=most + 1, do_sample=False, custom_generate=decoder),
        lambda: decoder.generate(**batch, max_new_tokens=most + 1),
    ]
    for call in calls:
        with pytest.raises(ContextError, match="max_new_tokens: expected at most 16 behind a prompt of 9 tokens"):
            call()


def test_a_text_that_may_end_before_the_table_is_begun():
    model, batch = tiny("GPT2", **TABLES["GPT2"]), prompts(9)
    [text] = plain_texts(model, batch, 16)
    decoder = Decoder(model, knowing_pool(batch, [text]), DecodeConfig(draft_length=3))
    end = text[10]
    expected = text[: text.index(end) + 1]
    assert decoder.generate(**batch, max_new_tokens=40, eos_token_id=end).sequences[0, 9:].tolist() == expected
    found = model.generate(**batch, max_new_tokens=40, eos_token_id=end, do_sample=False, custom_generate=decoder)
    assert found[0, 9:].tolist() == expected
    shown: list[int] = []
    never = next(token for token in range(VOCABULARY) if token not in text)
    with pytest.raises(IndexError, match="target: expected a text of at most 24 tokens"):
        decoder.generate(**batch, max_new_tokens=40, eos_token_id=never, on_tokens=lambda _, tokens: shown.extend(tokens))
    assert shown == text  # as many as plain decoding streams before it fails


def test_a_prompt_longer_than_the_table_is_refused_at_both_doors():
    model, batch = tiny("GPT2", **TABLES["GPT2"]), prompts(25)
    decoder = Decoder(model, [NGramDrafter(VOCABULARY)])
    with pytest.raises(ContextError, match="input_ids: expected a prompt of at most 24 tokens"):
        decoder.generate(**batch, max_new_tokens=2)
    with pytest.raises(ContextError, match="input_ids: expected a prompt of at most 24 tokens"):
        model.generate(**batch, max_new_tokens=2, do_sample=False, custom_generate=decoder)


def test_padding_that_a_target_counts_as_tokens_is_refused():
    options = {"d_model": 16, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 24, "init_std": 0.3}
    model = tiny("Bart", max_position_embeddings=64, is_encoder_decoder=False, is_decoder=True, encoder_layers=1, **options)
    decoder = Decoder(model, [NGramDrafter(VOCABULARY)])
    with pytest.raises(ValueError, match="attention_mask: expected no padding for BartForCausalLM"):
        decoder.generate(**prompts(9, 5), max_new_tokens=4)


def test_a_drafter_stops_where_its_own_table_ends():
    target, batch = tiny(), prompts(9)
    drafter = CausalLMDrafter(tiny("GPT2", **TABLES["GPT2"]), target, name="short")
    texts = plain_texts(target, batch, 30)
    with pytest.warns(UserWarning, match="drafter short is out of this request: ContextError"):
        out = Decoder(target, [drafter], DecodeConfig(draft_length=3)).generate(**batch, max_new_tokens=30)
    assert out.sequences[:, 9:].tolist() == texts


# --- rotary factors that follow the length ------------------------------------------------------------------------------

FOLLOWING = {"phi3": phi3, "longrope": longrope, "dynamic": dynamic}
BATCHES = {
    "within": (11,), "at the boundary": (16,), "past it": (17,), "two": (11, 11), "ragged": (14, 7), "all padded": (11, 7),
}  # fmt: skip
QUICK = ("within", "ragged")


@pytest.mark.parametrize("shape", [pytest.param(one, marks=() if one in QUICK else pytest.mark.slow) for one in BATCHES])
@pytest.mark.parametrize("family", FOLLOWING)
def test_factors_follow_the_length_of_plain_decoding(family, shape):
    lengths = BATCHES[shape]
    batch = prompts(*lengths, width=14 if shape == "all padded" else None)
    check_same_text(FOLLOWING[family](), batch, 14)


class Forgetful(transformers.Phi3ForCausalLM):
    """Phi-3 as transformers had it before 5.20."""

    def prepare_inputs_for_generation(self, input_ids, cache=None, past_key_values=None, attention_mask=None, **kwargs):
        held = cache if cache is not None else past_key_values
        if input_ids.shape[1] >= 17 and held is not None and held.get_seq_length() <= 16:
            held = None
        kwargs |= {CACHE_NAME: held, "attention_mask": attention_mask}
        return transformers.LlamaForCausalLM.prepare_inputs_for_generation(self, input_ids, **kwargs)


def test_a_target_that_forgets_its_text_is_refused_where_it_does(monkeypatch):
    monkeypatch.setattr("hedgespec.decoder.prepares_by_itself", lambda model: False)  # as if it were transformers' own
    options = {"max_position_embeddings": 64, "original_max_position_embeddings": 16, "rope_parameters": dict(LONG)}
    model, batch, shown = tiny("Phi3", Forgetful, **options), prompts(9), []
    expected = plain_texts(phi3(), batch, 8)[0]  # up to the boundary
    with pytest.raises(ValueError, match="read its text again where its rotary factors change, at 17 tokens"):
        Decoder(model, [NGramDrafter(VOCABULARY)]).generate(
            **batch, max_new_tokens=12, on_tokens=lambda _, tokens: shown.extend(tokens)
        )
    assert shown == expected
    check_same_text(model, prompts(20), 6)  # read as a whole from the first


def test_factors_and_their_scale_follow_the_length():
    check_same_text(phimoe(), prompts(9), 20)


@pytest.mark.usefixtures("quick_capture")
@pytest.mark.parametrize("family", ["phi3", "longrope"])
def test_captured_forwards_follow_the_length(family):
    model, batch = FOLLOWING[family](), prompts(11)
    texts = plain_texts(model, batch, 14)
    for tree in (None, TREE):
        config = DecodeConfig(draft_length=3, tree=tree, compile=True)
        decoder = Decoder(model, knowing_pool(batch, texts), config)
        assert decoder.generate(**batch, max_new_tokens=14).sequences[:, 11:].tolist() == texts
        assert decoder.captures.compilations


def test_a_captured_forward_across_the_boundary_reads_no_value_of_the_device():
    """Tensors on the meta device have no values: whoever asks for one fails."""
    session = TargetSession(longrope(), [], 2, offsets=[0, 2], floor=9)
    with torch.no_grad():
        session.forward(torch.ones(2, 9, dtype=torch.int64), 1, reach=[9, 7])
        session.keep([9, 7])
        session.model.to("meta")
        session.lengths.values = None
        for layer in session.cache.layers:
            layer.keys, layer.values = layer.keys.to("meta"), layer.values.to("meta")
        tokens = torch.ones(2, 4, dtype=torch.int64, device="meta")
        [logits] = session._read(tokens, torch.ones(3, 2, dtype=torch.int64, device="meta"))
    assert logits.shape == (2, 4, VOCABULARY)


def test_factors_that_change_with_every_token_are_not_captured():
    model, batch = dynamic(), prompts(11)
    texts = plain_texts(model, batch, 14)
    decoder = Decoder(model, knowing_pool(batch, texts), DecodeConfig(draft_length=3, compile=True))
    with pytest.warns(UserWarning, match="not compiled: its rotary factors may change with every token"):
        out = decoder.generate(**batch, max_new_tokens=14)
    assert out.sequences[:, 11:].tolist() == texts


@pytest.mark.parametrize("family", FOLLOWING)
def test_a_cache_handed_over_is_taken_as_plain_decoding_takes_it(family):
    model, batch = FOLLOWING[family](), prompts(20)
    texts = []
    for decoder in (None, Decoder(model, [NGramDrafter(VOCABULARY)], DecodeConfig(draft_length=3))):
        cache = transformers.DynamicCache(config=model.config)
        with torch.no_grad():
            model(batch["input_ids"][:, :12], **{CACHE_NAME: cache}, use_cache=True)
        asked = {**batch, CACHE_NAME: cache, "max_new_tokens": 12, "do_sample": False}
        texts.append(model.generate(**asked, custom_generate=decoder).tolist())
    assert texts[0] == texts[1]


def test_the_models_own_factors_are_not_touched():
    model, batch = dynamic(), prompts(9)
    before = copy.deepcopy(model)
    Decoder(model, [NGramDrafter(VOCABULARY)]).generate(**batch, max_new_tokens=20)
    for one, other in zip(model.buffers(), before.buffers(), strict=True):
        assert torch.equal(one, other)
    assert plain_texts(model, batch, 5) == plain_texts(before, batch, 5)


def test_chunks_of_a_prompt_are_refused_where_factors_depend_on_them():
    model, batch = longrope(), prompts(9)
    with pytest.raises(ValueError, match="prefill_chunk_size: expected None"):
        model.generate(**batch, max_new_tokens=4, prefill_chunk_size=4, do_sample=False,
                       custom_generate=Decoder(model, [NGramDrafter(VOCABULARY)]))  # fmt: skip


def test_each_token_gets_the_factors_of_its_own_length():
    """One forward across the boundary against one forward on either side of it."""
    model = longrope()
    tokens = prompts(20)["input_ids"]
    with torch.no_grad():
        pieces, whole = (TargetSession(model, []) for _ in range(2))
        expected = []
        for begin, end in ((0, 14), (14, 16), (16, 20)):
            expected.append(pieces.forward(tokens[:, begin:end], end - begin))
            pieces.keep([end - begin])
        whole.forward(tokens[:, :14], 1)
        whole.keep([14])
        found = whole.forward(tokens[:, 14:], 6)
    torch.testing.assert_close(found, torch.cat(expected[1:], 1))


def test_hooks_of_accelerate_call_the_view():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model, batch = longrope(), prompts(9)
    expected = plain_texts(model, batch, 20)
    for module in (model, model.model, model.model.rotary_emb):
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    check_same_text(model, batch, 20, texts=expected)


def test_a_forward_that_would_go_past_the_view_is_refused():
    model = longrope()
    model.model.forward = model.model.forward
    with pytest.raises(ValueError, match="target: expected forwards as their classes have them"):
        follow(few_row_view(model))


def test_trees_need_no_more_positions_than_their_own_nodes(monkeypatch):
    """Nodes that are none lie deeper than the deepest of the row's own, and must not be what ends a table."""
    model, batch = tiny("GPT2", **TABLES["GPT2"]), prompts(9)
    texts = plain_texts(model, batch, 16)
    out = Decoder(model, knowing_pool(batch, texts), DecodeConfig(draft_length=3, tree=TREE)).generate(
        **batch, max_new_tokens=16
    )
    assert out.sequences[:, 9:].tolist() == texts
