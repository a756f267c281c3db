"""EAGLE heads: one decoder layer over the target's own hidden states drafts the target's next tokens.

At position t the head reads a feature of the target beside the embedding of the next token x_{t+1}, and predicts x_{t+2}.
When it drafts on, its own output takes the feature's place. What the feature is, and where the two meet, tells the
architectures apart. EAGLE-3: the hidden states of several layers (the aux layers' inputs, concatenated), projected by `fc`;
the attention reads both, side by side. EAGLE-1 and EAGLE-2: the target's last hidden state; `fc` makes one of both, and what
follows is a plain decoder layer.

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
"""Fields of `EagleConfig` that count something."""


@dataclass(frozen=True)
class EagleConfig:
    """Shapes of a head, and which of the known variants it is. Units: elements, except `rope_theta` and `rms_norm_eps`."""

    hidden_size: int
    target_hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    draft_vocab_size: int
    aux_layers: tuple[int, ...]
    """Hidden states of the target that are read, in the order of `fc`'s columns: l is the input of layer l, and the number of
    layers is the state after the final norm."""
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    version: int = 3
    """Of the architecture: 3, or 1 for EAGLE-1 and EAGLE-2."""
    norms: tuple[str, ...] = ("input_layernorm", "hidden_norm", "norm")
    """Which of the optional norms are there. `input_norm` of all the hidden states together and `fc_norm` of each, before
    `fc`; `embedding_layernorm` of the embedding before `fc` (EAGLE-1); `input_layernorm` of the embedding (EAGLE-1: of what the
    layer reads); `hidden_norm` of the feature; `q_norm` and `k_norm` of each attention head; `norm` before the output."""
    biases: tuple[str, ...] = ()
    """The matrices that have one."""
    norm_before_residual: bool = False
    """Whether the residual stream starts with the feature's norm and not with the feature (EAGLE-3)."""
    feeds_back_norm: bool = False
    """Whether the head drafts on from its output's norm and not from its output."""
    rope_scaling: tuple[tuple[str, Any], ...] = ()
    """transformers' `rope_parameters` but for `rope_theta`, where positions are scaled: items, `rope_type` among them."""

    def __post_init__(self) -> None:
        """Keeps plain ints, floats, bools and tuples, whatever numbers came. Raises: TypeError or ValueError."""
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
    """The arithmetic of all variants, of whoever has the weights: one head, or a stack of them for the rows at hand."""

    config: EagleConfig

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """x times the matrix of this name, and its bias if there is one."""
        raise NotImplementedError

    def rms(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """x under the RMS norm of this name."""
        raise NotImplementedError

    def activate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    def fuse(self, states: torch.Tensor) -> torch.Tensor:
        """The target's hidden states [..., W] as the feature, [..., H]."""
        if self.config.version == 1:
            return states
        if "input_norm" in self.config.norms:
            states = self.rms("input_norm", states)
        if "fc_norm" in self.config.norms:
            chunks = states.chunk(len(self.config.aux_layers), -1)
            states = torch.cat([self.rms(f"fc_norm_{number}", chunk) for number, chunk in enumerate(chunks)], -1)
        return self.linear("fc", states)

    def mix(self, embedded: torch.Tensor, feature: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the residual stream starts, [..., H], and what the attention reads, from a token's embedding and the feature
        before it."""
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
        """Queries, keys and values side by side, [..., (A + 2 KV) D], not yet rotated."""
        config, qkv = self.config, self.linear("qkv_proj", mixed)
        if "q_norm" not in config.norms:
            return qkv
        kv = config.num_key_value_heads
        queries, keys, values = qkv.unflatten(-1, (-1, config.head_dim)).split([config.num_attention_heads, kv, kv], -2)
        return torch.cat([self.rms("q_norm", queries), self.rms("k_norm", keys), values], -2).flatten(-2)

    def leave(self, residual: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """The rest of the layer: `attended` [..., A D] to the head's own hidden state [..., H]."""
        hidden = residual + self.linear("o_proj", attended)
        gate_up = self.linear("gate_up_proj", self.rms("post_attention_layernorm", hidden))
        return hidden + self.linear("down_proj", self.activate(gate_up))

    def answer(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the head drafts on from, [..., H], and its draft logits [..., Vd]."""
        normed = self.rms("norm", hidden) if "norm" in self.config.norms else hidden
        return normed if self.config.feeds_back_norm else hidden, self.linear("lm_head", normed)


class EagleHead(EagleLayer, nn.Module):
    """The weights of one head; a request's state lives in an `EagleSession`.

    Args:
        config: shapes.
        embed: the target's token embedding, shared, not owned.
        draft_to_target: int64 [Vd], the target's id of each draft id; None when the vocabularies are the same.
        name: shown in statistics.
        owns_embedding: whether `embed` is the head's own instead, to be moved and saved with it.
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
        """What a reader of its file had to make up."""
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
        """Copies what the head owns. An embedding that it shares with its target is shared by the copy, too, unless the target
        is copied in the same call, before the head."""
        copied = memo[id(self)] = type(self).__new__(type(self))
        vars(copied).update(copy.deepcopy({name: value for name, value in vars(self).items() if name != "_shared"}, memo))
        own = copied.embed_tokens if self.owns_embedding else memo.get(id(self.embedding), self.embedding)
        copied._shared = (own,)
        return copied

    def set_rope_frequency(self) -> None:
        """`rope_frequency` float32 [D/2], and `rope_factor`, by which cosine and sine are multiplied."""
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
        """The target's, or the head's own."""
        return self._shared[0]

    @property
    def owns_embedding(self) -> bool:
        return "embed_tokens" in self._modules

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Rows of the embedding matrix as they are. Gemma's module scales what it gives out; heads are trained without."""
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
        """Rotary embedding of `states` [B, heads, T, head_dim] at `positions` [T]."""
        angle = positions[:, None] * self.rope_frequency.to(positions.device)
        cos, sin = angle.cos(), angle.sin()
        if self.rope_factor != 1:
            cos, sin = cos * self.rope_factor, sin * self.rope_factor
        cos, sin = cos.to(states.dtype), sin.to(states.dtype)
        low, high = states.chunk(2, -1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)

    def project(self, embedded: torch.Tensor, feature: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Rotated queries and keys, and values, each [B, heads or kv_heads, T, head_dim]; and the residual [B, T, H]."""
        residual, mixed = self.mix(embedded, feature)
        qkv = self.qkv(mixed).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)
        kv = self.config.num_key_value_heads
        rotated = self.rotate(qkv[:, :-kv], positions)
        return rotated[:, :-kv], rotated[:, -kv:], qkv[:, -kv:], residual

    def finish(self, residual: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """The rest of the layer: `attended` [B, heads, T, head_dim] to the head's own hidden state [B, T, H]."""
        return self.leave(residual, attended.transpose(1, 2).flatten(2))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Draft logits [..., Vd] of hidden states [..., H]."""
        return self.answer(hidden)[1]

    def teacher_forced_logits(self, input_ids: torch.Tensor, aux_hidden_states: torch.Tensor) -> torch.Tensor:
        """The draft logits of every position of texts that are known, none of them drafted: what a head is checked by.

        Position t reads the target's hidden states `aux_hidden_states[:, t]` beside the embedding of `input_ids[:, t]`, the
        token that follows them, and attends to the positions up to its own. Its logits are those of the token after that. Of a
        text x_0..x_T and the target's states at it, that is `teacher_forced_logits(x[:, 1:], states[:, :-1])`, whose t-th
        logits are for x_{t+2}: all that a session sees, in one pass, with gradients.

        Args:
            input_ids: int64 [B, T], the target's ids.
            aux_hidden_states: [B, T, k * Ht], the aux layers' hidden states in `aux_layers`' order, of the head's dtype.
        Returns: [B, T, Vd].
        Raises: ValueError.
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
    """One request's view of a head: its KV cache and the feature it drafts on from."""

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
        assert self._own_feature is not None, "`consume` comes first"
        return self._forward(token, self._own_feature, 1)[0]

    def _forward(self, tokens: torch.Tensor, feature: torch.Tensor, logits_to_keep: int) -> torch.Tensor:
        head, start, count = self.head, self.cache.length, tokens.shape[0]
        positions = torch.arange(start, start + count, device=tokens.device)
        queries, keys, values, residual = head.project(head.embed(tokens)[None], feature, positions)
        keys, values = self.cache.append(keys, values)
        # With a single layer, positions whose logits nobody asks for are keys and values and nothing more: of a prompt, all
        # but the last.
        queries, residual = queries[:, :, -logits_to_keep:], residual[:, -logits_to_keep:]
        mask = None
        if logits_to_keep > 1:
            mask = positions[-logits_to_keep:, None] >= torch.arange(start + count, device=tokens.device)
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)
        feature, logits = head.answer(head.finish(residual, attended))
        self._own_feature = feature[:, -1:]
        return logits[0]
