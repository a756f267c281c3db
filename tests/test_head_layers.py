"""The layer operations of a stack of heads: every backend against float64 written apart, and against a head's own modules."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch
from conftest import GPU_BACKENDS, HAS_GPU
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from hedgespec.drafters.eagle import EagleConfig, EagleHead
from hedgespec.ops import backends
from hedgespec.ops.head_layers import _many_rows, rotary_append, stack_linear, stack_rms_norm, swiglu
from hedgespec.ops.linear import MOST_ROWS

OPERATION = "stack_linear"  # all four have the same backends
OPERATIONS = {each.__name__: each for each in (stack_linear, stack_rms_norm, swiglu, rotary_append)}
DTYPES = {
    "reference": (torch.float64, torch.float32),
    "cpu": (torch.float32,),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
}

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def run(operation, *arguments, backend, **options):
    """The operation, on the GPU for its backends where there is one. Caches come back as they were left."""
    if not (HAS_GPU and backend in GPU_BACKENDS):
        return operation(*arguments, backend=backend, **options)
    moved = [each.cuda() if isinstance(each, torch.Tensor) else each for each in arguments]
    options = {name: each.cuda() if isinstance(each, torch.Tensor) else each for name, each in options.items()}
    result = operation(*moved, backend=backend, **options).cpu()
    if operation is rotary_append:
        for cache, left in ((arguments[4], moved[4]), (arguments[5], moved[5])):
            cache.copy_(left)
    return result


def close(got, exact, scale):
    """Within float32's rounding of sums of magnitude `scale`, and one rounding of the result. In float64 all the closer."""
    info = torch.finfo(got.dtype)
    most = (1e-14 if got.dtype is torch.float64 else 6e-7) * scale.double() + info.eps * (exact.abs() + info.tiny)
    assert got.shape == exact.shape
    assert ((got.double() - exact).abs() <= most).all(), (got.double() - exact).abs().max()


# Products.


def product_of(x, weights, which):
    """Row by row in float64, and the magnitude of what is summed."""
    if which is None:
        pairs = [(rows.double(), weight.double()) for rows, weight in zip(x, weights)]
        return torch.stack([a @ b.T for a, b in pairs]), torch.stack([a.abs() @ b.abs().T for a, b in pairs])
    pairs = [(row.double(), weights[head].double()) for row, head in zip(x, which.tolist())]
    empty = torch.zeros(0, weights.shape[1], dtype=torch.float64)
    return (
        torch.stack([b @ a for a, b in pairs]) if pairs else empty,
        torch.stack([b.abs() @ a.abs() for a, b in pairs]) if pairs else empty,
    )


@pytest.mark.parametrize("chosen", [False, True], ids=["every head", "which"])
@pytest.mark.parametrize(
    ("heads", "rows", "columns", "inner"),
    [(1, 1, 1, 1), (2, 3, 5, 7), (7, 1, 17, 24), (3, 6, 13, 9), (4, 0, 3, 4), (3, 9, 25, 65), (7, 5, 70, 129), (2, 33, 12, 8)],
)
def test_products(backend, heads, rows, columns, inner, chosen):
    for dtype in DTYPES[backend]:
        weight = torch.randn(heads, columns, inner).to(dtype)
        x = torch.randn(*(() if chosen else (heads,)), rows, inner).to(dtype)
        which = torch.randint(heads, (rows,)) if chosen else None
        close(run(stack_linear, x, weight, which, backend=backend), *product_of(x, weight, which))


@pytest.mark.parametrize("order", ["ascending", "shuffled", "one ascends", "repeated"])
@pytest.mark.parametrize("chosen", [False, True], ids=["every head", "which"])
@pytest.mark.parametrize(
    ("heads", "rows", "columns", "inner", "table_rows"),
    [(1, 1, 1, 1, 1), (3, 2, 5, 7, 9), (2, 0, 3, 5, 4), (7, 3, 20, 16, 50), (3, 7, 40, 600, 300)],
)
def test_products_with_rows_of_a_table(backend, heads, rows, columns, inner, table_rows, chosen, order):
    """The last shape makes several blocks of the table, each shared out between threads."""
    draw = torch.stack([torch.randperm(table_rows)[:columns] for _ in range(heads)])
    if order in ("ascending", "repeated"):
        draw = draw.sort(-1).values
    if order == "repeated":
        draw[:, 1:] = draw[:, :-1].clone()
    if order == "one ascends":
        draw[0] = draw[0].sort().values
    for dtype in DTYPES[backend]:
        table = torch.randn(table_rows, inner).to(dtype)
        x = torch.randn(*(() if chosen else (heads,)), rows, inner).to(dtype)
        which = torch.randint(heads, (rows,)) if chosen else None
        got = run(stack_linear, x, table, which, index=draw, backend=backend)
        close(got, *product_of(x, table[draw], which))


def test_products_take_any_strides(backend):
    weight, sideways = torch.randn(3, 10, 12), torch.randn(3, 12, 10).transpose(1, 2)
    wide, which = torch.randn(3, 4, 24), torch.tensor([2, 0, 0, 2])
    for w in (weight, sideways):
        for x in (wide[0, :, :12].expand(3, -1, -1), wide[..., 12:], wide[..., ::2], wide.transpose(0, 1)[:3, :3, :12]):
            close(run(stack_linear, x, w, backend=backend), *product_of(x, w, None))
        for x in (
            wide[0, :, :12],
            wide[1, :, ::2],
            wide[:, 1, 12:][torch.tensor([0, 1, 2, 0])],
            wide[1, :1, :12].expand(4, -1),
        ):
            close(run(stack_linear, x, w, which, backend=backend), *product_of(x, w, which))
    index = torch.randint(10, (3, 14))[:, ::2]
    close(run(stack_linear, wide[..., :12], weight[0], index=index, backend=backend),
          *product_of(wide[..., :12], weight[0][index], None))  # fmt: skip


def test_rows_of_one_head_need_not_follow_each_other(backend):
    weight, x = torch.randn(4, 9, 16), torch.randn(12, 16)
    for which in ([3] * 12, [0, 3] * 6, [2, 2, 1, 0, 0, 0, 1, 2, 3, 3, 1, 0]):
        which = torch.tensor(which)
        close(run(stack_linear, x, weight, which, backend=backend), *product_of(x, weight, which))


def test_many_rows_of_one_head_are_left_to_torch():
    x = torch.zeros(2, MOST_ROWS + 1, 4)
    assert _many_rows(x, None, None)
    assert not _many_rows(x[:, 1:], None, None)
    assert not _many_rows(x, None, torch.zeros(2, 3, dtype=torch.int64))
    which = torch.arange(MOST_ROWS + 1) % 2
    assert not _many_rows(x[0], which, None)
    assert _many_rows(x[0], which * 0, None)
    weight = torch.randn(2, 5, 4)
    assert torch.equal(stack_linear(x, weight), stack_linear(x, weight, backend="reference"))


# Norms and activations.


@pytest.mark.parametrize(("heads", "rows", "width"), [(1, 1, 1), (3, 2, 7), (7, 6, 64), (2, 0, 5), (2, 3, 4100)])
def test_norms(backend, heads, rows, width):
    for dtype in DTYPES[backend]:
        weight, eps = torch.randn(heads, width).to(dtype), 1e-3
        which = torch.randint(heads, (rows,))
        for x, chosen in (
            (torch.randn(heads, rows, width), None),
            (torch.randn(1, rows, width), None),
            (torch.randn(rows, heads, width).transpose(0, 1), None),
            (torch.randn(heads, rows, 2 * width)[..., ::2], None),
            (torch.randn(rows, width), which),
            (torch.randn(rows, 2 * width)[:, width:], which),
        ):
            x = x.to(dtype)
            got = run(stack_rms_norm, x, weight, eps, chosen, backend=backend)
            sharp = x.double()
            scale = weight.double()[which] if chosen is not None else weight.double()[:, None]
            exact = sharp / (sharp.pow(2).sum(-1, keepdim=True) / width + eps).sqrt() * scale
            assert got.dtype is dtype
            close(got, exact, exact.abs())


@pytest.mark.parametrize("shape", [(2,), (3, 14), (2, 3, 2 * 65), (0, 4), (7, 2, 2, 2 * 1030)])
def test_swiglu(backend, shape):
    for dtype in DTYPES[backend]:
        gate_up = (8 * torch.randn(shape)).to(dtype)
        gate, up = gate_up.double()[..., : shape[-1] // 2], gate_up.double()[..., shape[-1] // 2 :]
        exact = gate / (1 + torch.exp(-gate)) * up
        close(run(swiglu, gate_up, backend=backend), exact, 3 * (1 + gate.abs()) * exact.abs())


def test_swiglu_at_the_ends(backend):
    gate = torch.tensor([-1e30, -1000, -100, -88, -87, 0.0, 87, 88, 100, 1000, 1e30])
    got = run(swiglu, torch.cat([gate, torch.ones_like(gate)]), backend=backend)
    assert torch.equal(got[5:], gate[5:])
    assert (got[1:5].abs() < 1e-33).all()
    assert got.isfinite().all()
    assert run(swiglu, torch.tensor([torch.nan, 1.0]), backend=backend).isnan()


# Rotation and caches.


def scene(dtype, heads, rows, steps, attention_heads, kv_heads, head_dim, batch, capacity, chosen):
    """Arguments of `rotary_append`, caches filled with numbers of their own."""
    shape = (rows, steps, (attention_heads + 2 * kv_heads) * head_dim)
    cache = (heads, batch, kv_heads, capacity, head_dim)
    return [
        torch.randn(shape if chosen else (heads, *shape)).to(dtype),
        10000 ** (-torch.arange(head_dim // 2) * 2 / head_dim),
        torch.randint(3000, (rows,)),
        torch.randint(capacity - steps + 1, (rows,)),
        torch.randn(cache).to(dtype),
        torch.randn(cache).to(dtype),
        torch.randperm(batch)[:rows],
        torch.randint(heads, (rows,)) if chosen else None,
    ]


def appended(qkv, frequency, positions, slots, keys, values, rows, which):
    """Queries, keys and values as complex numbers turned by their angles, in float64, in loops."""
    heads, _, kv_heads, _, head_dim = keys.shape
    keys, values = keys.double().clone(), values.double().clone()
    states = qkv.double().unflatten(-1, (-1, head_dim))
    attention_heads = states.shape[-2] - 2 * kv_heads
    queries = states.new_full((*states.shape[:-3], attention_heads, states.shape[-3], head_dim), torch.nan)
    for r in range(rows.numel()):
        for n in range(heads) if which is None else [which[r]]:
            own, out = (states[n, r], queries[n, r]) if which is None else (states[r], queries[r])
            for t in range(own.shape[0]):
                angle = ((positions[r] + t).float() * frequency).double()  # the product is rounded, as a head does it
                turned = torch.complex(*own[t].chunk(2, -1)) * torch.complex(angle.cos(), angle.sin())
                turned = torch.cat([turned.real, turned.imag], -1)
                out[:, t] = turned[:attention_heads]
                keys[n, rows[r], :, slots[r] + t] = turned[attention_heads : attention_heads + kv_heads]
                values[n, rows[r], :, slots[r] + t] = own[t, attention_heads + kv_heads :]
    return queries, keys, values


@pytest.mark.parametrize("chosen", [False, True], ids=["every head", "which"])
@pytest.mark.parametrize(
    ("heads", "rows", "steps", "attention_heads", "kv_heads", "head_dim", "batch", "capacity"),
    [
        (1, 1, 1, 1, 1, 2, 1, 1),
        (3, 2, 4, 4, 2, 6, 3, 9),
        (7, 1, 1, 9, 3, 16, 1, 5),
        (2, 3, 9, 2, 2, 10, 3, 9),
        (2, 4, 3, 5, 1, 8, 5, 7),
        (2, 0, 3, 2, 1, 4, 2, 7),
        (2, 1, 0, 2, 1, 4, 2, 7),
        (7, 2, 17, 9, 3, 32, 2, 40),
    ],
)
def test_rotation_and_caches(
    backend, heads, rows, steps, attention_heads, kv_heads, head_dim, batch, capacity, chosen
):  # fmt: skip
    if backend == "triton" and steps > 9:
        pytest.skip("the interpreter is slow, and the shape is for threads")
    for dtype in DTYPES[backend]:
        arguments = scene(dtype, heads, rows, steps, attention_heads, kv_heads, head_dim, batch, capacity, chosen)
        before = [cache.clone() for cache in arguments[4:6]]
        exact = appended(*arguments)
        largest = torch.tensor(1.0 if not arguments[0].numel() else arguments[0].abs().max().item())
        # Cosines come in float32 even for float64, as a head computes them.
        got = [run(rotary_append, *arguments, backend=backend), *arguments[4:6]]
        for ours, theirs in zip(got, exact):
            narrow = ours.to(torch.float32) if ours.dtype is torch.float64 else ours
            close(narrow, theirs, largest)
        for cache, old, new in zip(arguments[4:6], before, exact[1:]):
            untouched = new == old.double()
            assert torch.equal(cache[untouched], old[untouched])
        assert torch.equal(arguments[5].double(), exact[2])  # values are copied, not computed


def test_what_is_rolled_back_is_overwritten(backend):
    arguments = scene(torch.float32, 2, 2, 5, 4, 2, 8, 2, 12, False)
    arguments[3] = torch.tensor([2, 6])
    run(rotary_append, *arguments, backend=backend)
    dropped = [cache.clone() for cache in arguments[4:6]]
    later = scene(torch.float32, 2, 2, 2, 4, 2, 8, 2, 12, False)
    later[3:7] = [torch.tensor([4, 7]), *arguments[4:6], arguments[6]]
    _, keys, values = appended(*later)
    run(rotary_append, *later, backend=backend)
    close(later[4], keys, torch.tensor(5.0))
    assert torch.equal(later[5].double(), values)
    for row, start in zip(arguments[6].tolist(), (4, 7)):  # what the second call did not reach is from the first
        for cache, old in zip(later[4:6], dropped):
            assert torch.equal(cache[:, row, :, :start], old[:, row, :, :start])
            assert torch.equal(cache[:, row, :, start + 2 :], old[:, row, :, start + 2 :])


@pytest.mark.parametrize("chosen", [False, True], ids=["every head", "which"])
def test_a_row_may_take_several_tokens_at_slots_of_their_own(backend, chosen):
    """The nodes of a draft tree: alike in position, each with a slot."""
    arguments = scene(torch.float32, 3, 5, 1, 4, 2, 8, 2, 12, chosen)
    arguments[2], arguments[6] = torch.tensor([7, 7, 7, 4, 4]), torch.tensor([1, 1, 1, 0, 0])
    arguments[3] = torch.tensor([3, 4, 8, 4, 5])
    queries, keys, values = appended(*arguments)
    close(run(rotary_append, *arguments, backend=backend), queries, torch.tensor(5.0))
    close(arguments[4], keys, torch.tensor(5.0))
    assert torch.equal(arguments[5].double(), values)
    if not HAS_GPU:
        arguments[3] = torch.tensor([3, 4, 4, 4, 5])
        if chosen:
            arguments[7] = torch.tensor([0, 2, 2, 1, 1])
        with pytest.raises(ValueError, match="rows: expected distinct rows or slots"):
            rotary_append(*arguments, backend=backend)


def test_a_row_may_belong_to_several_heads(backend):
    """Some of the heads read the same verified tokens: each has a cache of its own."""
    arguments = scene(torch.float32, 4, 4, 3, 4, 2, 8, 2, 12, True)
    arguments[2], arguments[3] = torch.tensor([7, 2, 7, 2]), torch.tensor([6, 1, 6, 1])
    arguments[6], arguments[7] = torch.tensor([1, 0, 1, 0]), torch.tensor([0, 0, 3, 3])
    queries, keys, values = appended(*arguments)
    close(run(rotary_append, *arguments, backend=backend), queries, torch.tensor(5.0))
    close(arguments[4], keys, torch.tensor(5.0))
    assert torch.equal(arguments[5].double(), values)
    if not HAS_GPU:
        arguments[7] = torch.tensor([0, 0, 0, 3])
        with pytest.raises(ValueError, match="rows: expected distinct rows"):
            rotary_append(*arguments, backend=backend)


def test_caches_may_be_views(backend):
    """Half of a batch and of the slots: strides that are not those of the shape."""
    arguments = scene(torch.float32, 3, 2, 3, 4, 2, 8, 4, 16, True)
    whole = [cache.clone() for cache in arguments[4:6]]
    arguments[3], arguments[6] = torch.tensor([1, 5]), torch.tensor([1, 0])
    inner = [cache[:, 1:3, :, 4:12] for cache in arguments[4:6]]
    if HAS_GPU and backend in GPU_BACKENDS:
        pytest.skip("copying to the device would make them contiguous")
    _, keys, values = appended(*arguments[:4], *inner, *arguments[6:])
    run(rotary_append, *arguments[:4], *inner, *arguments[6:], backend=backend)
    for cache, old, new in zip(arguments[4:6], whole, (keys, values)):
        close(cache[:, 1:3, :, 4:12], new, torch.tensor(5.0))
        old[:, 1:3, :, 4:12] = cache[:, 1:3, :, 4:12]
        assert torch.equal(cache, old)


@pytest.mark.parametrize("position", [0, 1, 8191, 131071, 1_000_003])
def test_angles_at_far_positions(backend, position):
    arguments = scene(torch.float32, 1, 1, 4, 2, 1, 64, 1, 4, False)
    arguments[2] = torch.tensor([position])
    arguments[1][0] = 1.0
    queries, keys, _ = appended(*arguments)
    close(run(rotary_append, *arguments, backend=backend), queries, torch.tensor(5.0))
    close(arguments[4], keys, torch.tensor(5.0))


# A head's own modules.


def test_stacked_heads_are_the_heads(backend):
    config = EagleConfig(hidden_size=24, target_hidden_size=20, num_attention_heads=4, num_key_value_heads=2, head_dim=6,
                         intermediate_size=40, vocab_size=90, draft_vocab_size=30, aux_layers=(0, 1))  # fmt: skip
    heads = [EagleHead(config, nn.Embedding(90, 24)) for _ in range(3)]
    for head in heads:
        for parameter in head.parameters():
            nn.init.normal_(parameter, std=0.3)
    weights = {name: torch.stack([head.state_dict()[name] for head in heads]) for name in config.shapes}
    rows, steps, start = 2, 5, 7
    features, embedded = torch.randn(rows * steps, 40), torch.randn(3, rows * steps, 24)
    ids = torch.arange(rows)
    keys, values = torch.full((2, 3, rows, 2, 16, 6), torch.nan)

    def product(x, name):
        return run(stack_linear, x, weights[name + ".weight"], backend=backend)

    def norm(x, name):
        return run(stack_rms_norm, x, weights[name + ".weight"], config.rms_norm_eps, backend=backend)

    with torch.no_grad():
        feature = product(features.expand(3, -1, -1), "fc")
        qkv = product(torch.cat([norm(embedded, "input_layernorm"), norm(feature, "hidden_norm")], -1), "qkv_proj")
        queries = run(
            rotary_append, qkv.view(3, rows, steps, -1), heads[0].rope_frequency, torch.full((rows,), start),
            torch.full((rows,), start), keys, values, ids, backend=backend,
        )  # fmt: skip
        attended = torch.randn(3, rows, 4, steps, 6)
        hidden = feature + product(attended.transpose(2, 3).reshape(3, rows * steps, 24), "o_proj")
        activated = run(swiglu, product(norm(hidden, "post_attention_layernorm"), "gate_up_proj"), backend=backend)
        hidden = hidden + product(activated, "down_proj")
        logits = product(norm(hidden, "norm"), "lm_head")

        positions = torch.arange(start, start + steps)
        for n, head in enumerate(heads):
            own = head.fc(features).view(rows, steps, -1)
            parts = head.project(embedded[n].view(rows, steps, -1), own, positions)
            for ours, theirs in zip(
                (queries[n], keys[n, :, :, start : start + steps], values[n, :, :, start : start + steps]), parts
            ):
                torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
            theirs = head.logits(head.finish(own, attended[n]))
            torch.testing.assert_close(logits[n].view_as(theirs), theirs, atol=1e-4, rtol=1e-4)
    assert keys[..., :start, :].isnan().all()
    assert values[..., start + steps :, :].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_rounds_as_torch_does(dtype):
    x, weight = torch.randn(3, 5, 32).to(dtype), torch.randn(3, 32).to(dtype)
    expected = torch.stack([functional.rms_norm(rows, (32,), own, 1e-5) for rows, own in zip(x, weight)])
    torch.testing.assert_close(stack_rms_norm(x, weight, 1e-5, backend="reference"), expected)


# What is refused.


def arguments_of_rotary(**changes):
    arguments = dict(zip(inspect.signature(rotary_append).parameters, scene(torch.float32, 2, 2, 3, 4, 2, 6, 3, 9, True)))
    arguments["slots"] = torch.tensor([0, 6])
    return arguments | changes


@pytest.mark.parametrize(
    ("operation", "arguments", "error", "message"),
    [
        (stack_linear, (torch.zeros(2, 3, 4), torch.zeros(2, 5, 4).double()), TypeError, "weight: expected torch.float32 as x"),
        (stack_linear, (torch.zeros(2, 3, 4).int(), torch.zeros(2, 5, 4).int()), TypeError, "x: expected a floating-point"),
        (stack_linear, (torch.zeros(2, 3, 4), torch.zeros(5, 4)), ValueError, r"weight: expected \[N, columns, inner\]"),
        (stack_linear, (torch.zeros(3, 3, 4), torch.zeros(2, 5, 4)), ValueError, r"x: expected \[2, R, 4\]"),
        (stack_linear, (torch.zeros(2, 3, 5), torch.zeros(2, 5, 4)), ValueError, r"x: expected \[2, R, 4\]"),
        (stack_linear, (torch.zeros(2, 3, 4), torch.zeros(2, 5, 4), torch.zeros(3)), ValueError, "x: expected .* `which`"),
        (stack_linear, (torch.zeros(3, 4), torch.zeros(2, 5, 4), torch.zeros(3)), TypeError, "which: expected torch.int64"),
        (stack_linear, (torch.zeros(3, 4), torch.zeros(2, 5, 4), torch.tensor([0, 1])), ValueError, r"which: .* shape \[3\]"),
        (stack_linear, (torch.zeros(2, 4), torch.zeros(2, 5, 4), torch.tensor([0, 2])), ValueError, r"which: .* in 0..1"),
        (stack_linear, (torch.zeros(2, 4), torch.zeros(2, 5, 4), torch.tensor([0, -1])), ValueError, r"which: .* got -1"),
        (stack_linear, (torch.zeros(2, 3, 4), torch.zeros(2, 5, 4, device="meta")), ValueError, "weight: expected device cpu"),
        (stack_rms_norm, (torch.zeros(2, 3, 4), torch.zeros(4), 1e-5), ValueError, r"weight: expected \[N, H\]"),
        (stack_rms_norm, (torch.zeros(2, 3, 4), torch.zeros(3, 4), 1e-5), ValueError, r"x: expected \[3, R, 4\]"),
        (stack_rms_norm, (torch.zeros(2, 3, 4), torch.zeros(2, 4).half(), 1e-5), TypeError, "weight: expected torch.float32"),
        (swiglu, (torch.zeros(2, 3),), ValueError, r"gate_up: expected \[..., 2 I\]"),
        (swiglu, (torch.zeros(2, 4).long(),), TypeError, "gate_up: expected a floating-point dtype"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(operation, arguments, error, message):
    with pytest.raises(error, match=message):
        operation(*arguments)


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (torch.zeros(2, 3), TypeError, "index: expected torch.int64"),
        (torch.zeros(3, dtype=torch.int64), ValueError, r"index: expected \[N, columns\]"),
        (torch.tensor([[0, 5], [1, 2]]), ValueError, r"index: expected values in 0..4, got 5"),
        (torch.tensor([[0, 4], [1, -2]]), ValueError, r"index: .* got -2"),
        (torch.zeros(3, 3, dtype=torch.int64), ValueError, r"x: expected \[3, R, 4\]"),
    ],
)
def test_bad_indices_are_refused(index, error, message):
    with pytest.raises(error, match=message):
        stack_linear(torch.zeros(2, 3, 4), torch.zeros(5, 4), index=index)


def test_an_index_that_changes_is_looked_at_again():
    index = torch.tensor([[0, 4], [1, 2]])
    x, table = torch.zeros(2, 3, 4), torch.zeros(5, 4)
    stack_linear(x, table, index=index)
    with pytest.raises(ValueError, match=r"values in 0..3"):
        stack_linear(x, table[:4], index=index)
    index[1, 1] = 5
    with pytest.raises(ValueError, match=r"values in 0..4, got 5"):
        stack_linear(x, table, index=index)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(keys=torch.zeros(2, 3, 2, 9)), ValueError, r"keys: expected \[N, B, KV, C, D\]"),
        (dict(keys=torch.zeros(2, 3, 2, 9, 6).double()), TypeError, "keys: expected torch.float32"),
        (dict(values=torch.zeros(2, 3, 2, 8, 6)), ValueError, r"values: expected shape \[2, 3, 2, 9, 6\]"),
        (dict(values=torch.zeros(2, 3, 9, 2, 6).transpose(2, 3)), ValueError, "values: expected strides"),
        (dict(keys=torch.zeros(2, 3, 2, 6, 9).transpose(3, 4)), ValueError, "keys: expected a contiguous last dimension"),
        (dict(qkv=torch.zeros(2, 3, 25)), ValueError, r"qkv: expected \[..., \(A \+ 2 KV\) D\]"),
        (dict(qkv=torch.zeros(2, 3, 24)), ValueError, r"qkv: expected \[..., \(A \+ 2 KV\) D\]"),
        (dict(qkv=torch.zeros(2, 2, 3, 48)), ValueError, "qkv: expected .* `which`"),
        (dict(frequency=torch.zeros(3).double()), TypeError, "frequency: expected torch.float32"),
        (dict(frequency=torch.zeros(6)), ValueError, r"frequency: expected shape \[3\]"),
        (dict(positions=torch.zeros(2, dtype=torch.int32)), TypeError, "positions: expected torch.int64"),
        (dict(slots=torch.tensor([0, 7])), ValueError, "slots: expected values in 0..6, got 7"),
        (dict(rows=torch.tensor([0, 3])), ValueError, "rows: expected values in 0..2, got 3"),
        (dict(rows=torch.tensor([1, 1])), ValueError, "rows: expected distinct"),
        (dict(which=torch.tensor([0, 2])), ValueError, "which: expected values in 0..1, got 2"),
    ],
)
def test_bad_arguments_of_a_rotation_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        rotary_append(**arguments_of_rotary(**changes))


def test_backends_share_one_signature():
    for name, public in OPERATIONS.items():
        expected = dict(inspect.signature(public).parameters)
        del expected["backend"]
        for backend in backends.available(name):
            assert dict(inspect.signature(backends.resolve(name, backend, "cpu")).parameters) == expected, (name, backend)


@pytest.mark.skipif("triton" not in backends.available("swiglu"), reason="Triton cannot run here")
def test_ids_nobody_looked_at_reach_no_other_memory():
    """What a GPU launch does with ids that the CPU would refuse: brought into range, or nothing written."""
    device = "cuda" if HAS_GPU else "cpu"

    def launch(operation, *arguments, **options):
        moved = [each.to(device) if isinstance(each, torch.Tensor) else each for each in arguments]
        options = {name: each.to(device) for name, each in options.items()}
        return backends.resolve(operation.__name__, "triton", device)(*moved, **options).cpu(), moved

    x, weight, wild, tame = torch.randn(3, 8), torch.randn(2, 5, 8), torch.tensor([-7, 2**40, 1]), torch.tensor([0, 1, 1])
    close(launch(stack_linear, x, weight, wild)[0], *product_of(x, weight, tame))
    index = torch.tensor([[0, -1, 3], [2, 2**40, 1]])
    close(launch(stack_linear, x, weight[0], tame, index=index)[0], *product_of(x, weight[0][index.clamp(0, 4)], tame))
    got, _ = launch(stack_rms_norm, x, weight[:, 0], 1e-5, wild)
    torch.testing.assert_close(got, stack_rms_norm(x, weight[:, 0], 1e-5, tame))
    for name, bad in (("slots", [-1, 7, 2**40]), ("rows", [-1, 4, 2**40]), ("which", [-1, 2, 2**40])):
        for each in bad:
            arguments = scene(torch.float32, 2, 1, 2, 2, 1, 4, 3, 8, True)
            before = [cache.clone() for cache in arguments[4:6]]
            good = arguments.copy()
            arguments[{"slots": 3, "rows": 6, "which": 7}[name]] = torch.tensor([each])
            queries, moved = launch(rotary_append, *arguments)
            close(queries, appended(*good)[0], torch.tensor(5.0))
            for old, cache in zip(before, moved[4:6]):
                unharmed = old == cache.cpu()
                if name == "slots":  # its other token may fit
                    unharmed = unharmed[..., 1:7, :]
                assert unharmed.all()


# Graphs: nothing off the CPU may wait for values. What has no values cannot be looked at.


def shapes_of_all(backend, make, dtype):
    """Every form of every operation on tensors of `make(*shape, dtype=)`: dtypes, devices and shapes of the results."""
    which, rows = make(4, dtype=torch.int64), make(4, dtype=torch.int64)
    weight, table, index = make(3, 10, 8), make(50, 8), make(3, 10, dtype=torch.int64)
    keys, values, frequency = make(3, 4, 2, 16, 6), make(3, 4, 2, 16, 6), make(3, dtype=torch.float32)
    results = [
        stack_linear(make(3, 4, 8), weight, backend=backend),
        stack_linear(make(4, 8), weight, which, backend=backend),
        stack_linear(make(3, 4, 8), table, index=index, backend=backend),
        stack_linear(make(4, 8), table, which, index=index, backend=backend),
        stack_rms_norm(make(1, 4, 8), make(3, 8), 1e-5, backend=backend),
        stack_rms_norm(make(4, 8), make(3, 8), 1e-5, which, backend=backend),
        swiglu(make(3, 4, 8), backend=backend),
        rotary_append(make(3, 4, 5, 48), frequency, rows, rows, keys, values, rows, backend=backend),
        rotary_append(make(4, 5, 48), frequency, rows, rows, keys, values, rows, which, backend=backend),
    ]
    assert [tuple(each.shape) for each in results] == [
        (3, 4, 10), (4, 10), (3, 4, 10), (4, 10), (3, 4, 8), (4, 8), (3, 4, 4), (3, 4, 4, 5, 6), (4, 4, 5, 6),
    ]  # fmt: skip
    assert all(each.device == keys.device and each.dtype is dtype for each in results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_looks_at_no_values_off_the_cpu(dtype):
    shapes_of_all("reference", lambda *shape, dtype=dtype: torch.zeros(shape, dtype=dtype, device="meta"), dtype)


@pytest.mark.skipif("triton" not in backends.available("swiglu"), reason="Triton cannot run here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_looks_at_no_values(dtype, monkeypatch):
    launches = []
    common = importlib.import_module("hedgespec.triton_kernels._common")
    monkeypatch.setattr(common, "launcher", lambda kernel, *_: lambda *args, **constants: launches.append(kernel))
    with FakeTensorMode():
        shapes_of_all("triton", lambda *shape, dtype=dtype: torch.zeros(shape, dtype=dtype, device="cuda"), dtype)
    assert len(launches) == 7  # all but the products of every head with its own rows, which are torch's
