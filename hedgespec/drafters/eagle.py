"""EAGLE-3 heads: one decoder layer over the target's own hidden states drafts the target's next tokens.

At position t the head projects the target's hidden states (the aux layers' inputs, concatenated) to one feature, reads it
beside the embedding of the next token x_{t+1}, and predicts x_{t+2}. When it drafts on, its own output takes the
feature's place.

Source: Li et al., "EAGLE-3", arXiv 2503.01840.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from hedgespec.cache import KVCache
from hedgespec.linear import FewRowLinear


@dataclass(frozen=True)
class EagleConfig:
    """Shapes of a head. Units: elements, except `rope_theta` and `rms_norm_eps`."""

    hidden_size: int
    target_hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    draft_vocab_size: int
    aux_layers: tuple[int, ...]
    """Layers of the target whose input is read, in the order of `fc`'s columns."""
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the head by its name in the module."""
        hidden, heads, kv = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        return {
            "fc.weight": (hidden, len(self.aux_layers) * self.target_hidden_size),
            "input_layernorm.weight": (hidden,),
            "hidden_norm.weight": (hidden,),
            "qkv_proj.weight": ((heads + 2 * kv) * self.head_dim, 2 * hidden),
            "o_proj.weight": (hidden, heads * self.head_dim),
            "post_attention_layernorm.weight": (hidden,),
            "gate_up_proj.weight": (2 * self.intermediate_size, hidden),
            "down_proj.weight": (hidden, self.intermediate_size),
            "norm.weight": (hidden,),
            "lm_head.weight": (self.draft_vocab_size, hidden),
        }


class EagleHead(nn.Module):
    """The weights of one head and its arithmetic; a request's state lives in an `EagleSession`.

    Args:
        config: shapes.
        embed: the target's token embedding, shared, not owned.
        draft_to_target: int64 [Vd], the target's id of each draft id; None when the vocabularies are the same.
        name: shown in statistics.
    """

    def __init__(self, config: EagleConfig, embed: nn.Module, draft_to_target: torch.Tensor | None = None, name: str = "eagle"):
        super().__init__()
        self.config, self.name = config, name
        self.vocab_size, self.aux_layers = config.vocab_size, config.aux_layers
        self._shared = (embed,)  # in a tuple: not registered, so neither saved nor moved with the head
        for name, shape in config.shapes.items():
            stem = name.removesuffix(".weight")
            module = FewRowLinear(shape[1], shape[0], bias=False) if len(shape) == 2 else nn.RMSNorm(shape, config.rms_norm_eps)
            setattr(self, stem, module)
        self.register_buffer("draft_to_target", draft_to_target, persistent=False)
        self.set_rope_frequency()

    def set_rope_frequency(self) -> None:
        half = self.config.head_dim // 2
        self.rope_frequency = self.config.rope_theta ** (-torch.arange(half, dtype=torch.float32) / half)

    @property
    def embedding(self) -> nn.Module:
        """The target's."""
        return self._shared[0]

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.embedding(tokens)

    def rotate(self, states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotary embedding of `states` [B, heads, T, head_dim] at `positions` [T]."""
        angle = positions[:, None] * self.rope_frequency.to(positions.device)
        cos, sin = angle.cos().to(states.dtype), angle.sin().to(states.dtype)
        low, high = states.chunk(2, -1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)

    def project(self, embedded: torch.Tensor, feature: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Rotated queries and keys, and values, each [B, heads or kv_heads, T, head_dim]."""
        shape, config = embedded.shape[:-1], self.config
        qkv = self.qkv_proj(torch.cat([self.input_layernorm(embedded), self.hidden_norm(feature)], -1))
        qkv = qkv.view(*shape, -1, config.head_dim).transpose(1, 2)
        kv = config.num_key_value_heads
        rotated = self.rotate(qkv[:, :-kv], positions)
        return rotated[:, :-kv], rotated[:, -kv:], qkv[:, -kv:]

    def finish(self, feature: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """The rest of the layer: `attended` [B, heads, T, head_dim] to the head's own hidden state [B, T, H]."""
        hidden = feature + self.o_proj(attended.transpose(1, 2).flatten(2))
        gate, up = self.gate_up_proj(self.post_attention_layernorm(hidden)).chunk(2, -1)
        return hidden + self.down_proj(F.silu(gate) * up)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Draft logits [..., Vd] of hidden states [..., H]."""
        return self.lm_head(self.norm(hidden))

    def session(self) -> EagleSession:
        return EagleSession(self)


class EagleSession:
    """One request's view of a head: its KV cache and the feature it drafts on from."""

    def __init__(self, head: EagleHead):
        self.head = head
        config = head.config
        weight = head.fc.weight
        self.cache = KVCache(config.num_key_value_heads, config.head_dim, dtype=weight.dtype, device=weight.device)
        self.verified = 0
        self._own_feature: torch.Tensor | None = None

    def prefill(self, tokens: torch.Tensor, features: torch.Tensor, logits_to_keep: int) -> torch.Tensor:
        if self.verified == 0:  # no feature precedes a request's first token: the head starts at the second
            self.verified = 1
            tokens, features = tokens[1:], features[1:]
        self.cache.rollback(self.verified - 1)
        logits = self._forward(tokens, self.head.fc(features)[None], logits_to_keep)
        self.verified += tokens.shape[0]
        return logits

    def step(self, token: torch.Tensor) -> torch.Tensor:
        return self._forward(token, self._own_feature, 1)[0]

    def _forward(self, tokens: torch.Tensor, feature: torch.Tensor, logits_to_keep: int) -> torch.Tensor:
        head, start, count = self.head, self.cache.length, tokens.shape[0]
        positions = torch.arange(start, start + count, device=tokens.device)
        queries, keys, values = head.project(head.embed(tokens)[None], feature, positions)
        keys, values = self.cache.append(keys, values)
        # With a single layer, positions whose logits nobody asks for are keys and values and nothing more: of a prompt, all
        # but the last.
        queries, feature = queries[:, :, -logits_to_keep:], feature[:, -logits_to_keep:]
        mask = None
        if logits_to_keep > 1:
            mask = positions[-logits_to_keep:, None] >= torch.arange(start + count, device=tokens.device)
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)
        hidden = head.finish(feature, attended)
        self._own_feature = hidden[:, -1:]
        return head.logits(hidden[0])
