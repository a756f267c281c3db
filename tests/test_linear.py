"""The few-row product against float64, and the view of a model that uses it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from hedgespec.ops import backends
from hedgespec.ops.linear import MOST_ROWS, FewRowLinear, few_row_view, linear

needs_native = pytest.mark.skipif("cpu" not in backends.available("linear"), reason="the native module is not built")


@needs_native
@pytest.mark.parametrize("rows", [*range(10), 15, 16, 17, 40])
@pytest.mark.parametrize(("columns", "inner"), [(1, 1), (3, 7), (16, 8), (17, 9), (65, 129), (300, 64)])
def test_cpu_is_the_product(rows, columns, inner):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, inner, generator=generator) for n in (rows, columns))
    exact = x.double() @ weight.double().T
    got = linear(x, weight, backend="cpu")
    assert got.shape == (rows, columns)
    scale = x.abs().double() @ weight.abs().double().T  # each product may round once, and each sum
    assert ((got - exact).abs() <= 4e-7 * scale + 1e-30).all()
    torch.testing.assert_close(linear(x, weight, backend="reference"), got, atol=1e-4, rtol=1e-4)


@needs_native
def test_cpu_takes_any_strides_and_leading_dimensions():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(20, 12, generator=generator)
    wide = torch.randn(2, 3, 24, generator=generator)
    for x in (wide[..., :12], wide[..., ::2], wide[:, 1, :12], wide[0, 0, :12], wide.transpose(0, 1)[..., 12:]):
        torch.testing.assert_close(linear(x, weight, backend="cpu"), functional.linear(x, weight), atol=1e-5, rtol=1e-5)
    x = wide[..., :12]
    sideways = torch.randn(12, 20, generator=generator).T
    torch.testing.assert_close(linear(x, sideways, backend="cpu"), functional.linear(x, sideways), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("x", "weight", "error", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(4, 5), ValueError, r"x: expected \[..., inner\]"),
        (torch.zeros(()), torch.zeros(4, 5), ValueError, r"x: expected \[..., inner\]"),
        (torch.zeros(2, 3), torch.zeros(3), ValueError, r"x: expected \[..., inner\]"),
        (torch.zeros(2, 3).double(), torch.zeros(4, 3), TypeError, "x: expected torch.float32 as weight, got torch.float64"),
        (torch.zeros(2, 3, device="meta"), torch.zeros(4, 3), ValueError, "x: expected device cpu as weight, got meta"),
    ],
)
def test_bad_input_is_refused(x, weight, error, message):
    with pytest.raises(error, match=message):
        linear(x, weight)


@needs_native
def test_cpu_asked_for_by_name_takes_float32_only():
    with pytest.raises(TypeError, match="float32"):
        linear(torch.zeros(2, 3).double(), torch.zeros(4, 3).double(), backend="cpu")


def test_the_layer_keeps_gradients_and_long_inputs():
    layer = FewRowLinear(6, 5, bias=False)
    x = torch.randn(3, 6, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.detach().sum(0).expand(3, 6))
    torch.testing.assert_close(layer.weight.grad, x.detach().sum(0).expand(5, 6))
    with torch.no_grad():
        long = torch.randn(MOST_ROWS + 1, 6)
        assert torch.equal(layer(long), functional.linear(long, layer.weight))
        torch.testing.assert_close(layer.double()(long.double()), functional.linear(long.double(), layer.weight))


def test_dynamo_traces_the_layer():
    layer, x = FewRowLinear(6, 5, bias=False), torch.randn(3, 6)
    with torch.no_grad():
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), functional.linear(x, layer.weight), atol=1e-5, rtol=1e-5)


def test_a_view_shares_weights_and_leaves_the_model_alone():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, attention_bias=True)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    types = [type(module) for module in model.modules()]
    view = few_row_view(model)
    assert type(view.lm_head) is type(view.model.layers[1].mlp.up_proj) is FewRowLinear
    assert type(view.model.layers[0].self_attn.q_proj) is nn.Linear  # it has a bias
    assert view.lm_head.weight is model.lm_head.weight
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.inference_mode():
        expected = model(ids, output_hidden_states=True)
        got = view(ids, output_hidden_states=True)
    torch.testing.assert_close(got.logits, expected.logits, atol=1e-5, rtol=1e-5)
    assert len(got.hidden_states) == len(expected.hidden_states)

    view.lm_head.register_forward_hook(lambda *_: pytest.fail("the view's hook ran in the model"))
    with torch.inference_mode():
        model(ids)
    assert [type(module) for module in model.modules()] == types
    assert not model.lm_head._forward_hooks
