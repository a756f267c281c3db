"""EAGLE heads: one decoder layer that reads the target's hidden states and drafts its next tokens.

At position t the head reads a feature of the target and the embedding of the next token x_{t+1}, and predicts x_{t+2}. From the
second drafted token on, its own output replaces the feature. The architectures differ in the feature and in how it is combined
with the embedding:

- EAGLE-3: the feature is the hidden states of several layers (the inputs of the aux layers, concatenated), projected by `fc`.
  The attention reads feature and embedding, concatenated.
- EAGLE-1 and EAGLE-2: the feature is the target's last hidden state. `fc` projects feature and embedding to one vector, and a
  plain decoder layer follows.

Source: Li et al., "EAGLE", arXiv 2401.15077, "EAGLE-2", arXiv 2406.16858 and "EAGLE-3", arXiv 2503.01840.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hedgespec.ops.linear import FewRowLinear
from hedgespec.runtime.cache import KVCache
from hedgespec.utils.scalars import flag, integer, integers, real, text

SIZES = (
    "hidden_size", "target_hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
    "vocab_size", "draft_vocab_size",
)  # fmt: skip
"""Fields of `EagleConfig` that are sizes."""


@dataclass(frozen=True)
class EagleConfig:
    """Shapes and variant of a head. Sizes are numbers of elements."""

    hidden_size: int
    target_hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    draft_vocab_size: int
    aux_layers: tuple[int, ...]
    """Hidden states of the target that are read, in the order of the columns of `fc`: l is the input of layer l; the number of
    layers is the state after the final norm."""
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    version: int = 3
    """Architecture: 3, or 1 for EAGLE-1 and EAGLE-2."""
    norms: tuple[str, ...] = ("input_layernorm", "hidden_norm", "norm")
    """The optional norms that the head has: `input_norm` of the concatenated hidden states and `fc_norm` of each, before `fc`;
    `embedding_layernorm` of the embedding before `fc` (EAGLE-1); `input_layernorm` of the embedding (EAGLE-1: of the layer's
    input); `hidden_norm` of the feature; `q_norm` and `k_norm` of each attention head; `norm` before the output matrix."""
    biases: tuple[str, ...] = ()
    """The matrices that have a bias."""
    norm_before_residual: bool = False
    """Whether the residual stream starts with the normalised feature instead of the feature (EAGLE-3)."""
    feeds_back_norm: bool = False
    """Whether the next drafted token reads the normalised output instead of the output."""
    rope_scaling: tuple[tuple[str, Any], ...] = ()
    """Items of transformers' `rope_parameters` except `rope_theta`, `rope_type` included; empty if positions are not scaled."""

    def __post_init__(self) -> None:
        """Converts the fields to plain ints, floats, bools and tuples. Raises TypeError or ValueError."""
        kept: dict[str, Any] = {name: integer(name, getattr(self, name), 0) for name in SIZES}
        kept |= {name: real(name, getattr(self, name)) for name in ("rope_theta", "rms_norm_eps")}
        kept |= {name: flag(name, getattr(self, name)) for name in ("norm_before_residual", "feeds_back_norm")}
        kept |= {name: tuple(text(name, one) for one in getattr(self, name)) for name in ("norms", "biases")}
        kept["aux_layers"] = integers("aux_layers", self.aux_layers)
        kept["version"] = integer("version", self.version)
        if kept["version"] not in (1, 3):
            raise ValueError(f"version: expected 1 or 3, got {self.version}")
        kept["rope_scaling"] = tuple((text("rope_scaling", name), value) for name, value in self.rope_scaling)
        for name, value in kept.items():
            object.__setattr__(self, name, value)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the head by its name in the module."""
        hidden, heads, kv, size = self.hidden_size, self.num_attention_heads, self.num_key_value_heads, self.head_dim
        read, first = len(self.aux_layers) * self.target_hidden_size, self.version == 1
        parts = {
            "input_norm": (read,),
            **{f"fc_norm_{number}": (self.target_hidden_size,) for number in range(len(self.aux_layers))},
            "fc": (hidden, hidden + read if first else read),
            "embedding_layernorm": (hidden,),
            "input_layernorm": (hidden,),
            "hidden_norm": (hidden,),
            "qkv_proj": ((heads + 2 * kv) * size, hidden if first else 2 * hidden),
            "q_norm": (size,),
            "k_norm": (size,),
            "o_proj": (hidden, heads * size),
            "post_attention_layernorm": (hidden,),
            "gate_up_proj": (2 * self.intermediate_size, hidden),
            "down_proj": (hidden, self.intermediate_size),
            "norm": (hidden,),
            "lm_head": (self.draft_vocab_size, hidden),
        }
        shapes = {}
        for name, shape in parts.items():
            if len(shape) == 2 or name.rstrip("_0123456789") in ("post_attention_layernorm", *self.norms):
                shapes[f"{name}.weight"] = shape
            if name in self.biases:
                shapes[f"{name}.bias"] = shape[:1]
        return shapes


class EagleLayer:
    """The arithmetic of all variants. Subclasses hold the weights: those of one head, or of a stack of heads."""

    config: EagleConfig

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Returns the product of x with the matrix of this name, plus its bias if it has one."""
        raise NotImplementedError

    def rms(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Returns x normalised by the RMS norm of this name."""
        raise NotImplementedError

    def activate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    def fuse(self, states: torch.Tensor) -> torch.Tensor:
        """Returns the feature [..., H] of the target's hidden states [..., W]."""
        if self.config.version == 1:
            return states
        if "input_norm" in self.config.norms:
            states = self.rms("input_norm", states)
        if "fc_norm" in self.config.norms:
            chunks = states.chunk(len(self.config.aux_layers), -1)
            states = torch.cat([self.rms(f"fc_norm_{number}", chunk) for number, chunk in enumerate(chunks)], -1)
        return self.linear("fc", states)

    def mix(self, embedded: torch.Tensor, feature: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the start of the residual stream [..., H] and the input of the attention, for a token's embedding and the
        feature at the position before it."""
        norms = self.config.norms
        if self.config.version == 1:
            if "embedding_layernorm" in norms:
                embedded = self.rms("embedding_layernorm", embedded)
            mixed = self.linear("fc", torch.cat([embedded.expand_as(feature), feature], -1))
            return mixed, self.rms("input_layernorm", mixed) if "input_layernorm" in norms else mixed
        normed = self.rms("hidden_norm", feature)
        residual = normed if self.config.norm_before_residual else feature
        return residual, torch.cat([self.rms("input_layernorm", embedded), normed], -1)

    def qkv(self, mixed: torch.Tensor) -> torch.Tensor:
        """Returns queries, keys and values, concatenated, [..., (A + 2 KV) D], not rotated."""
        config, qkv = self.config, self.linear("qkv_proj", mixed)
        if "q_norm" not in config.norms:
            return qkv
        kv = config.num_key_value_heads
        queries, keys, values = qkv.unflatten(-1, (-1, config.head_dim)).split([config.num_attention_heads, kv, kv], -2)
        return torch.cat([self.rms("q_norm", queries), self.rms("k_norm", keys), values], -2).flatten(-2)

    def leave(self, residual: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Runs the rest of the layer: from `attended` [..., A D] to the head's hidden state [..., H]."""
        hidden = residual + self.linear("o_proj", attended)
        gate_up = self.linear("gate_up_proj", self.rms("post_attention_layernorm", hidden))
        return hidden + self.linear("down_proj", self.activate(gate_up))

    def answer(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the feature for the next drafted token [..., H], and the draft logits [..., Vd]."""
        normed = self.rms("norm", hidden) if "norm" in self.config.norms else hidden
        return normed if self.config.feeds_back_norm else hidden, self.linear("lm_head", normed)


class EagleHead(EagleLayer, nn.Module):
    """The weights of one head. `EagleSession` holds the state of a request.

    Args:
        config: shapes and variant.
        embed: the target's token embedding, which is shared.
        draft_to_target: int64 [Vd], the target's id of each draft id; None when the vocabularies are the same.
        name: shown in statistics.
        owns_embedding: `embed` is the head's own, and is moved and saved with it.
    """

    draft_to_target: torch.Tensor | None
    fc: nn.Linear
    qkv_proj: nn.Linear
    o_proj: nn.Linear
    gate_up_proj: nn.Linear
    down_proj: nn.Linear
    lm_head: nn.Linear
    hidden_norm: nn.RMSNorm
    post_attention_layernorm: nn.RMSNorm
    norm: nn.RMSNorm
    rope_frequency: torch.Tensor

    def __init__(self, config: EagleConfig, embed: nn.Module, draft_to_target: torch.Tensor | None = None,
                 name: str = "eagle", *, owns_embedding: bool = False):  # fmt: skip
        super().__init__()
        self.config, self.name = config, name
        self.assumed: tuple[str, ...] = ()
        """What `load_drafter` had to assume."""
        self.vocab_size, self.aux_layers = config.vocab_size, config.aux_layers
        self._shared = (embed,)  # in a tuple: not registered, so neither saved nor moved with the head
        for name, shape in config.shapes.items():
            stem, kind = name.rsplit(".", 1)
            if kind == "bias":
                continue
            if len(shape) == 1:
                module: nn.Module = nn.RMSNorm(shape, config.rms_norm_eps)
            elif stem in config.biases:
                module = nn.Linear(shape[1], shape[0])
            else:
                module = FewRowLinear(shape[1], shape[0], bias=False)
            setattr(self, stem, module)
        if owns_embedding:
            self.embed_tokens = embed
        self.register_buffer("draft_to_target", draft_to_target, persistent=False)
        self.set_rope_frequency()

    def __deepcopy__(self, memo: dict[int, Any]) -> EagleHead:
        """Copies what the head owns. The copy shares the target's embedding, too, unless the target was copied earlier in the
        same call."""
        copied = memo[id(self)] = type(self).__new__(type(self))
        vars(copied).update(copy.deepcopy({name: value for name, value in vars(self).items() if name != "_shared"}, memo))
        own = copied.embed_tokens if self.owns_embedding else memo.get(id(self.embedding), self.embedding)
        copied._shared = (own,)
        return copied

    def set_rope_frequency(self) -> None:
        """Sets `rope_frequency`, float32 [D/2], and `rope_factor`, the factor of cosine and sine."""
        config, half = self.config, self.config.head_dim // 2
        if not config.rope_scaling:
            self.rope_frequency = config.rope_theta ** (-torch.arange(half, dtype=torch.float32) / half)
            self.rope_factor = 1.0
            return
        from transformers import LlamaConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        scaling = dict(config.rope_scaling) | {"rope_theta": config.rope_theta}
        width = config.num_attention_heads * config.head_dim
        like = LlamaConfig(
            hidden_size=width, num_attention_heads=config.num_attention_heads, head_dim=config.head_dim,
            num_key_value_heads=config.num_key_value_heads, rope_parameters=scaling,
            max_position_embeddings=int(scaling["factor"] * scaling.get("original_max_position_embeddings", 2048)),
        )  # fmt: skip
        with torch.device("cpu"):
            frequency, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](like, torch.device("cpu"))
        self.rope_frequency, self.rope_factor = frequency.float(), float(factor)

    @property
    def embedding(self) -> nn.Module:
        """The embedding: the target's, or the head's own."""
        return self._shared[0]

    @property
    def owns_embedding(self) -> bool:
        return "embed_tokens" in self._modules

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns unscaled rows of the embedding matrix. Gemma's module scales its output; heads are trained without the
        scale."""
        embedding = self.embedding
        if not hasattr(embedding, "embed_scale"):
            return embedding(tokens)
        weight = embedding.weight
        assert isinstance(weight, torch.Tensor)
        return F.embedding(tokens, weight)

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return getattr(self, name)(x)

    def rms(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return getattr(self, name)(x)

    def rotate(self, states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Applies the rotary embedding to `states` [B, heads, T, head_dim] at `positions` [T]."""
        angle = positions[:, None] * self.rope_frequency.to(positions.device)
        cos, sin = angle.cos(), angle.sin()
        if self.rope_factor != 1:
            cos, sin = cos * self.rope_factor, sin * self.rope_factor
        cos, sin = cos.to(states.dtype), sin.to(states.dtype)
        low, high = states.chunk(2, -1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)

    def project(self, embedded: torch.Tensor, feature: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns rotated queries and keys, and values, each [B, heads or kv_heads, T, head_dim], and the residual [B, T,
        H]."""
        residual, mixed = self.mix(embedded, feature)
        qkv = self.qkv(mixed).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)
        kv = self.config.num_key_value_heads
        rotated = self.rotate(qkv[:, :-kv], positions)
        return rotated[:, :-kv], rotated[:, -kv:], qkv[:, -kv:], residual

    def finish(self, residual: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Runs the rest of the layer: from `attended` [B, heads, T, head_dim] to the head's hidden state [B, T, H]."""
        return self.leave(residual, attended.transpose(1, 2).flatten(2))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the draft logits [..., Vd] of hidden states [..., H]."""
        return self.answer(hidden)[1]

    def teacher_forced_logits(self, input_ids: torch.Tensor, aux_hidden_states: torch.Tensor) -> torch.Tensor:
        """Returns the draft logits at every position of known sequences, in one pass and with gradients.

        Position t reads the target's hidden states `aux_hidden_states[:, t]` and the embedding of `input_ids[:, t]`, which is
        the token after them, and attends to the positions up to its own. Its logits are for the token after that. For a
        sequence x_0..x_T and the target's states at it, call `teacher_forced_logits(x[:, 1:], states[:, :-1])`; entry t of the
        result is for x_{t+2}. A session returns the same logits.

        Args:
            input_ids: int64 [B, T], the target's ids.
            aux_hidden_states: [B, T, k * Ht], the hidden states of the aux layers in the order of `aux_layers`, in the head's
                dtype.
        Returns: [B, T, Vd].
        Raises: ValueError for other shapes.
        """
        width = len(self.aux_layers) * self.config.target_hidden_size
        if input_ids.ndim != 2 or aux_hidden_states.shape != (*input_ids.shape, width):
            raise ValueError(
                f"aux_hidden_states: expected [B, T, {width}] for input_ids [B, T], got {list(aux_hidden_states.shape)} for "
                f"{list(input_ids.shape)}"
            )
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        queries, keys, values, residual = self.project(self.embed(input_ids), self.fuse(aux_hidden_states), positions)
        attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
        return self.logits(self.finish(residual, attended))

    def session(self) -> EagleSession:
        return EagleSession(self)


class EagleSession:
    """The state of one request: the key-value cache and the feature of the next drafted token."""

    def __init__(self, head: EagleHead):
        self.head = head
        config = head.config
        weight = head.fc.weight
        self.cache = KVCache(config.num_key_value_heads, config.head_dim, dtype=weight.dtype, device=weight.device)
        self.verified = 0
        self._own_feature: torch.Tensor | None = None

    def consume(self, tokens: torch.Tensor, features: torch.Tensor | None, logits_to_keep: int) -> torch.Tensor:
        assert features is not None, "a head reads the target's hidden states"
        if self.verified == 0:  # no feature precedes a request's first token: the head starts at the second
            self.verified = 1
            tokens, features = tokens[1:], features[1:]
        self.cache.rollback(self.verified - 1)
        logits = self._forward(tokens, self.head.fuse(features)[None], logits_to_keep)
        self.verified += tokens.shape[0]
        return logits

    def step(self, token: torch.Tensor) -> torch.Tensor:
        assert self._own_feature is not None, "consume comes first"
        return self._forward(token, self._own_feature, 1)[0]

    def _forward(self, tokens: torch.Tensor, feature: torch.Tensor, logits_to_keep: int) -> torch.Tensor:
        head, start, count = self.head, self.cache.length, tokens.shape[0]
        positions = torch.arange(start, start + count, device=tokens.device)
        queries, keys, values, residual = head.project(head.embed(tokens)[None], feature, positions)
        keys, values = self.cache.append(keys, values)
        # The head has one layer, so for positions whose logits are not returned only keys and values are computed.
        queries, residual = queries[:, :, -logits_to_keep:], residual[:, -logits_to_keep:]
        mask = None
        if logits_to_keep > 1:
            mask = positions[-logits_to_keep:, None] >= torch.arange(start + count, device=tokens.device)
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)
        feature, logits = head.answer(head.finish(residual, attended))
        self._own_feature = feature[:, -1:]
        return logits[0]
