"""EAGLE heads: the session against a plain reading of the layer, and training's unrolled pass against real drafting."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hedgespec.drafters.eagle import EagleConfig, EagleHead
from hedgespec.zoo.train import unrolled

CONFIG = EagleConfig(
    hidden_size=16, target_hidden_size=12, num_attention_heads=4, num_key_value_heads=2, head_dim=6, intermediate_size=20,
    vocab_size=40, draft_vocab_size=25, aux_layers=(1, 2, 4), rope_theta=1000.0,
)  # fmt: skip


@pytest.fixture
def head():
    generator = torch.Generator().manual_seed(0)
    head = EagleHead(CONFIG, nn.Embedding(40, 16).double().requires_grad_(False)).double()
    for weight in head.parameters():
        nn.init.normal_(weight, mean=float(weight.ndim == 1), std=0.3, generator=generator)
    return head.requires_grad_(False)


@pytest.fixture
def text():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(40, (30,), generator=generator), torch.randn(30, 36, generator=generator, dtype=torch.float64)


def by_hand(head, tokens, features):
    """The layer from its definition, one position and one attention head at a time: hidden state and logits of each."""
    kv, size = CONFIG.num_key_value_heads, CONFIG.head_dim
    keys, values, out = [], [], []

    def rms(x, weight):
        return x / (x.square().mean() + CONFIG.rms_norm_eps).sqrt() * weight

    def turned(x, position):
        result = x.clone()
        for j in range(size // 2):
            angle = position * CONFIG.rope_theta ** (-2 * j / size)
            a, b = x[j], x[j + size // 2]
            result[j] = a * math.cos(angle) - b * math.sin(angle)
            result[j + size // 2] = b * math.cos(angle) + a * math.sin(angle)
        return result

    for position in range(1, len(tokens)):
        fused = head.fc.weight @ features[position]
        both = torch.cat([rms(head.embed(tokens[position]), head.input_layernorm.weight), rms(fused, head.hidden_norm.weight)])
        qkv = (head.qkv_proj.weight @ both).view(-1, size)
        keys.append([turned(k, position - 1) for k in qkv[-2 * kv : -kv]])
        values.append(list(qkv[-kv:]))
        attended = []
        for number, query in enumerate(qkv[: -2 * kv]):
            group = number * kv // CONFIG.num_attention_heads
            scores = torch.stack([turned(query, position - 1) @ key[group] for key in keys]) / size**0.5
            attended.append(scores.softmax(0) @ torch.stack([value[group] for value in values]))
        hidden = fused + head.o_proj.weight @ torch.cat(attended)
        gate, up = (head.gate_up_proj.weight @ rms(hidden, head.post_attention_layernorm.weight)).chunk(2)
        hidden = hidden + head.down_proj.weight @ (nn.functional.silu(gate) * up)
        out.append(head.lm_head.weight @ rms(hidden, head.norm.weight))
    return torch.stack(out)


def test_session_is_the_layer_whatever_the_chunks(head, text):
    tokens, features = text
    expected = by_hand(head, tokens, features)
    for cuts in ([30], [2, 30], [5, 6, 9, 20, 30], [10, 11, 12, 13, 14, 30]):
        session, rows, start = head.session(), [], 0
        for end in cuts:
            count = end - start - (start == 0)  # the first token of a request has no row
            rows.append(session.consume(tokens[start:end], features[start:end], count))
            start = end
        torch.testing.assert_close(torch.cat(rows), expected, rtol=1e-5, atol=1e-5)


def test_drafting_leaves_no_trace(head, text):
    tokens, features = text
    session = head.session()
    session.consume(tokens[:8], features[:8], 1)
    for token in (3, 1, 4, 1, 5):
        session.step(torch.tensor([token]))
    again = session.consume(tokens[8:12], features[8:12], 4)
    torch.testing.assert_close(again, by_hand(head, tokens[:12], features[:12])[-4:], rtol=1e-5, atol=1e-5)


def test_unrolled_training_pass_is_real_drafting(head, text):
    """Depth s at position t: true features up to t - s, then s steps on the head's own output."""
    tokens, features = text
    rows = list(unrolled(head, tokens[None, 1:], head.fc(features[1:])[None], depth=4))
    for depth, logits in enumerate(rows):
        for position in range(depth, 29, 3):
            session = head.session()
            true = position - depth + 2
            row = session.consume(tokens[:true], features[:true], 1)[-1]
            for token in tokens[true : position + 2]:
                row = session.step(token.view(1))
            torch.testing.assert_close(logits[0, position], row, rtol=1e-5, atol=1e-5)
