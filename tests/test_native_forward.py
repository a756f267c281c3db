"""The native forward against transformers' own: logits, states and caches, masks, what is left to transformers, and texts."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from helpers.families import FAMILIES, VOCABULARY, WINDOW, own_texts, padded_prompts, pool, texts_of, tiny
from torch import nn

from hedgespec import DecodeConfig, Decoder, Tree
from hedgespec.cli import doctor
from hedgespec.ops import backends
from hedgespec.ops.linear import few_row_view
from hedgespec.ops.tree_mask import ancestry
from hedgespec.runtime import native_forward
from hedgespec.runtime.native_forward import MOST_TOKENS, NativeForward, NativeForwards, Unsupported
from hedgespec.runtime.target import TargetSession

pytestmark = pytest.mark.skipif(not native_forward.available(), reason="the native module was not built")

SERVED = ("Llama", "Qwen2", "Qwen2, sliding", "Qwen3", "Mistral", "Gemma2", "Gemma3Text")
AUX = ((0, 2), (1, 2, 3))
LENGTHS = (WINDOW + 5, 3, WINDOW)
"""Tokens of three rows: one beyond the window, one within it, and one as long as it."""


def sessions(model, rows: int, **options) -> list[TargetSession]:
    """One that leaves everything to transformers, and one with the native forward."""
    native = NativeForward(model)
    return [TargetSession(few_row_view(model), AUX, rows, native=one, **options) for one in (None, native)]


def read_prompts(session: TargetSession, texts: list[torch.Tensor]) -> None:
    padded = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.int64)
    for row, text in enumerate(texts):
        padded[row, : len(text)] = text
    counts = [len(text) for text in texts]
    native, session.native = session.native, None  # so that both begin alike
    session.forward(padded, 1, reach=counts)
    session.native = native
    session.keep(counts)


def assert_alike(one: torch.Tensor, other: torch.Tensor, share: float = 1e-3) -> None:
    assert one.dtype == other.dtype
    torch.testing.assert_close(one.float(), other.float(), rtol=0, atol=share * float(other.float().abs().max()))


@pytest.mark.parametrize("family", SERVED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@torch.no_grad()
def test_ragged_rows_get_what_transformers_computes(family, dtype):
    model = tiny(family).to(dtype)
    plain, native = sessions(model, len(LENGTHS))
    texts = texts_of(*LENGTHS)
    share = 1e-3 if dtype == torch.float32 else 0.1
    for session in (plain, native):
        read_prompts(session, texts)
    for reach, kept in (([4, 4, 4], [4, 1, 2]), ([1, 1, 1], [1, 1, 1]), ([4, 2, 3], [3, 2, 1])):
        tokens = torch.randint(VOCABULARY, (3, max(reach)), generator=torch.Generator().manual_seed(sum(kept)))
        expected, found = (session.forward(tokens, tokens.shape[1], reach=reach) for session in (plain, native))
        for row, count in enumerate(reach):
            assert_alike(found[row, :count], expected[row, :count], share)
            for group in AUX:
                assert_alike(native._chunk[group][row, :count], plain._chunk[group][row, :count], share)
        for session in (plain, native):
            session.keep(kept)
    for one, other in zip(native.cache.layers, plain.cache.layers):
        for row, length in enumerate(native.cache.lengths):
            assert_alike(one.keys[row, :, :length], other.keys[row, :, :length], share)
            assert_alike(one.values[row, :, :length], other.values[row, :, :length], share)
    assert native.cache.lengths == plain.cache.lengths


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma3Text"])
@torch.no_grad()
def test_a_tree_sees_its_own_ancestors_only(family):
    plain, native = sessions(tiny(family), 2)
    for session in (plain, native):
        read_prompts(session, texts_of(WINDOW + 3, 5))
    parents = torch.tensor([[-1, -1, 0, 1, 2], [-1, 0, 0, 1, -1]])
    shape = ancestry(parents, 3)
    tokens = torch.randint(VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(4))
    expected, found = (session.forward(tokens, 6, shape, [4, 4]) for session in (plain, native))
    assert_alike(found, expected)
    for session in (plain, native):
        session.keep([3, 2], [[0, 1, 3], [0, 5]])
    tokens = tokens[:, :2]
    expected, found = (session.forward(tokens, 1) for session in (plain, native))
    assert_alike(found, expected)


@torch.no_grad()
def test_only_the_last_logits_are_computed_and_places_without_a_token_are_zero():
    _, native = sessions(tiny("Llama"), 2)
    read_prompts(native, texts_of(6, 6))
    tokens = torch.randint(VOCABULARY, (2, 4))
    whole = native.forward(tokens, 4, reach=[4, 2])
    last = native.forward(tokens, 2, reach=[4, 2])
    assert torch.equal(last[0], whole[0, 2:])
    assert not whole[1, 2:].any()
    assert not last[1].any()


@torch.no_grad()
def test_a_row_reads_the_same_alone_and_beside_others():
    model = tiny("Qwen3")
    _, together = sessions(model, 3)
    read_prompts(together, texts_of(*LENGTHS))
    tokens = torch.randint(VOCABULARY, (3, 5), generator=torch.Generator().manual_seed(5))
    expected = together.forward(tokens, 5)
    for row, text in enumerate(texts_of(*LENGTHS)):
        _, alone = sessions(model, 1)
        read_prompts(alone, [text])
        assert_alike(alone.forward(tokens[row : row + 1], 5)[0], expected[row], 1e-4)


@torch.no_grad()
def test_the_number_of_threads_does_not_change_the_result():
    _, native = sessions(tiny("Llama"), 1)
    read_prompts(native, texts_of(20))
    tokens, threads, found = torch.randint(VOCABULARY, (1, 6)), torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(native.forward(tokens, 6))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@torch.no_grad()
def test_rotary_tables_and_caches_grow_with_the_text():
    plain, native = sessions(tiny("Llama"), 1, context=512)
    for session in (plain, native):
        read_prompts(session, texts_of(254))
    native.native._positions = 0
    for step in range(3):
        tokens = torch.randint(VOCABULARY, (1, 4), generator=torch.Generator().manual_seed(step))
        expected, found = (session.forward(tokens, 4) for session in (plain, native))
        assert_alike(found, expected)
        for session in (plain, native):
            session.keep([4])
    assert native.cache.capacity == plain.cache.capacity == 512


def with_hook(model):
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)


def with_own_forward(model):
    model.model.layers[0].self_attn.forward = model.model.layers[0].self_attn.forward


def with_own_module(model):
    class Linear(nn.Linear):
        pass

    model.model.layers[0].mlp.up_proj.__class__ = Linear


def with_bias(model):
    model.lm_head = nn.Linear(32, VOCABULARY, bias=True)


def with_strided_weight(model):
    model.lm_head.weight.data = model.lm_head.weight.data.T.contiguous().T


def with_mixed_dtypes(model):
    model.lm_head.to(torch.bfloat16)


def test_what_transformers_itself_hooks_in_does_not_matter():
    model = tiny("Llama")
    model(torch.tensor([[1, 2]]), output_hidden_states=True)
    assert any(module._forward_hooks for module in model.modules())
    assert NativeForwards(model).current() is not None


def with_smaller_vocabulary(model):
    model.lm_head.weight.data = model.lm_head.weight.data[:-1]


def with_narrower_layer(model):
    mlp = model.model.layers[1].mlp
    for linear in (mlp.gate_proj, mlp.up_proj):
        linear.weight.data = linear.weight.data[:-8].clone()
    mlp.down_proj.weight.data = mlp.down_proj.weight.data[:, :-8].clone()


class Wrapped(torch.Tensor):
    """A tensor without memory of its own, as those of quantised weights are."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(function)

    def __init__(self, inner):
        self.inner = inner


def with_quantised_weight(model):
    linear = model.model.layers[0].mlp.up_proj
    weight = Wrapped(linear.weight.data)
    del linear._parameters["weight"]
    linear.weight = weight


CHANGES = [nn.Module.train, nn.Module.double, with_hook, with_own_forward, with_own_module, with_bias, with_strided_weight,
           with_mixed_dtypes, with_smaller_vocabulary, with_narrower_layer, with_quantised_weight]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_whatever_is_not_plain_is_left_to_transformers(change):
    model = tiny("Llama")
    forwards = NativeForwards(model)
    assert forwards.current() is not None
    change(model)
    assert forwards.current() is None
    assert forwards.reason


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {*SERVED}))
def test_other_structures_are_left_to_transformers(family):
    with pytest.raises(Unsupported):
        NativeForward(tiny(family))


def test_rotary_factors_that_follow_the_length_are_left_to_transformers():
    config = tiny("Llama").config
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(Unsupported, match="rotary"):
        NativeForward(transformers.LlamaForCausalLM(config).eval())


def test_a_subclass_is_left_to_transformers():
    class LlamaForCausalLM(transformers.LlamaForCausalLM):
        pass

    model = tiny("Llama")
    model.__class__ = LlamaForCausalLM
    with pytest.raises(Unsupported):
        NativeForward(model)


def test_the_variable_switches_it_off(monkeypatch):
    forwards = NativeForwards(tiny("Llama"))
    assert "forward of a target over few tokens: available" in doctor.describe(backends.report())
    monkeypatch.setenv(native_forward.VARIABLE, "0")
    assert forwards.current() is None
    assert "over few tokens: switched off: HEDGESPEC_NATIVE_FORWARD is 0" in doctor.describe(backends.report())
    monkeypatch.delenv(native_forward.VARIABLE)
    assert forwards.current() is not None


def test_one_that_differs_from_transformers_is_not_used_and_said_once(monkeypatch):
    model = tiny("Llama")
    forwards = NativeForwards(model)
    fields = native_forward._model_fields
    monkeypatch.setattr(native_forward, "_model_fields", lambda model: {**fields(model), "epsilon": 0.5})
    with pytest.warns(UserWarning, match="left to transformers: its states differ"):
        assert forwards.current() is None
    assert "differ" in forwards.reason
    monkeypatch.undo()
    assert NativeForwards(model).current() is not None


@torch.no_grad()
def test_weights_that_change_or_move_are_seen():
    model = tiny("Llama")
    forwards = NativeForwards(model)
    first = forwards.current()
    assert forwards.current() is first
    model.model.norm.weight.mul_(2.0)  # in place: the same address
    assert forwards.current() is first
    expected, found = (session for session in sessions(model, 1))
    for session in (expected, found):
        read_prompts(session, texts_of(5))
    tokens = torch.tensor([[1, 2]])
    assert_alike(found.forward(tokens, 2), expected.forward(tokens, 2))
    model.model.norm.weight = nn.Parameter(model.model.norm.weight.clone(), requires_grad=False)
    moved = forwards.current()
    assert moved is not first
    for layer in model.model.layers:  # a constant, at the same addresses
        layer.self_attn.scaling *= 2
    assert forwards.current() not in (moved, None)


@torch.no_grad()
def test_data_replaced_in_the_middle_of_a_request_is_not_freed_under_the_forward():
    model = tiny("Llama")
    forward = NativeForward(model)
    addresses = {weight.data_ptr() for weight in forward.weights}
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.clone()
    assert weight.data_ptr() not in addresses
    assert {weight.data_ptr() for weight in forward.weights} == addresses


@torch.no_grad()
def test_autocast_is_left_to_transformers():
    _, session = sessions(tiny("Llama"), 1)
    read_prompts(session, texts_of(5))
    with torch.autocast("cpu", torch.bfloat16):
        assert not session.native.takes(session.cache, [1], False)
    assert session.native.takes(session.cache, [1], False)


@torch.no_grad()
def test_many_tokens_and_gradients_are_left_to_transformers():
    model = tiny("Llama")
    _, session = sessions(model, 1)
    read_prompts(session, texts_of(5))
    native = session.native
    assert native.takes(session.cache, [MOST_TOKENS], False)
    assert not native.takes(session.cache, [MOST_TOKENS + 1], False)
    assert not native.takes(session.cache, [1], True)
    assert not native.takes(session.cache, [0], False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["deepcopy", "pickle"])
def test_a_copy_serves_its_own_model(copied):
    forwards = NativeForwards(tiny("Llama"))
    forwards.current()
    other = copied(forwards)
    assert other._model is not forwards._model
    assert other.current().identity != forwards.current().identity


@pytest.mark.parametrize("family", SERVED)
def test_texts_are_those_of_generate(family):
    model = tiny(family)
    decoder = Decoder(model, pool(model), DecodeConfig(draft_length=3))
    assert decoder.native.current() is not None
    ids, mask = padded_prompts()
    out = decoder.generate(ids, attention_mask=mask, max_new_tokens=24, temperature=0)
    for row, text in enumerate(own_texts(model, ids, mask)):
        assert out.sequences[row, ids.shape[1] :].tolist() == text


def test_a_tree_decodes_the_same_text():
    model = tiny("Llama")
    decoder = Decoder(model, pool(model), DecodeConfig(draft_length=3, tree=Tree(2)))
    ids, mask = padded_prompts()
    out = decoder.generate(ids, attention_mask=mask, max_new_tokens=16, temperature=0)
    for row, text in enumerate(own_texts(model, ids, mask)):
        assert out.sequences[row, ids.shape[1] :].tolist() == text[:16]
