"""A target's forward over a round's few tokens in one native call (`csrc/forward_kernels.h`), on a CPU.

The call reads the model's own weights where they lie. It serves the decoder stacks of `MODELS`, in float32 and bfloat16;
whatever else a model has (hooks, adapters, quantised layers, rotary factors that follow the text's length) leaves it to
transformers' forward. Before the first use the layers' states and the logits are compared with transformers' own.
"""

from __future__ import annotations

import math
import os
import threading
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from hedgespec.ops.linear import FewRowLinear, few_row_view
from hedgespec.runtime import positions
from hedgespec.runtime.cache import RaggedCache
from hedgespec.runtime.compat import cache_argument

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VARIABLE = "HEDGESPEC_NATIVE_FORWARD"
"""Environment variable: 0 leaves every forward to transformers."""
MODELS = ("Gemma2ForCausalLM", "Gemma3ForCausalLM", "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM",
          "Qwen3ForCausalLM")  # fmt: skip
"""Classes of transformers whose structure is read here."""
ACTIVATIONS = {"silu": 0, "gelu_pytorch_tanh": 1}
MOST_TOKENS = 32
"""Tokens of all rows together up to which the native forward is used; beyond, a vendor's matrix product is at home."""
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.06}
"""Largest difference from transformers' forward that the self-test accepts, as a share of the largest value."""
PAST, NEXT = 12, 5
"""Tokens of the self-test: read by transformers, then by both."""


class Unsupported(Exception):
    """Says why a model's forward is left to transformers."""


def state() -> str:
    """Returns "available", or why no forward of this process is native."""
    if os.environ.get(VARIABLE, "1") == "0":
        return f"switched off: {VARIABLE} is 0"
    try:
        from hedgespec import _native
    except ImportError as error:
        return f"unavailable: {error}"
    return "available" if hasattr(_native, "ForwardModel") else "unavailable: the native module is older than this package"


def available() -> bool:
    """Returns whether the native module is there and `VARIABLE` does not forbid its use."""
    return state() == "available"


class NativeForwards:
    """The native forward of one model, made anew when its weights have moved. Threads may share one.

    Args:
        model: the target.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._lock = threading.Lock()
        self._found: NativeForward | None = None
        self._verified: tuple[Any, ...] | None = None
        """What the self-test passed for."""
        self._failed: tuple[Any, ...] | None = None
        """What it failed for; that is not tried again."""
        self.reason = ""
        """Why there is none."""

    def __reduce__(self) -> tuple[Any, ...]:
        return NativeForwards, (self._model,)

    def current(self) -> NativeForward | None:
        """Returns the forward for the model as it is now; None where `reason` says why not."""
        if not available():
            self.reason = state()
            return None
        with self._lock:
            try:
                fresh = NativeForward(self._model)
            except (Unsupported, AttributeError) as error:  # a release of transformers that names things otherwise
                self._found, self.reason = None, str(error)
                return None
            if self._found is not None and self._found.identity == fresh.identity:
                return self._found
            if fresh.structure == self._failed:
                return None
            if fresh.structure != self._verified:
                try:
                    worst = _difference(fresh, self._model)
                    fault = f"its states differ from transformers' by {worst:.2g} of the largest"
                except Exception as error:
                    worst, fault = math.inf, f"its self-test failed ({type(error).__name__}: {error})"
                if not worst <= TOLERANCE[fresh.dtype]:
                    self._failed, self.reason = fresh.structure, fault
                    warnings.warn(f"the target's forward is left to transformers: {fault}", stacklevel=2)
                    return None
                self._verified = fresh.structure
            self._found, self.reason = fresh, ""
            return fresh


class NativeForward:
    """The addresses of a model's weights, and its forward.

    Args:
        model: a causal language model of transformers.

    Raises: Unsupported.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        _check(model)
        self.config, inner = model.config, model.model
        layers = list(inner.layers[: self.config.num_hidden_layers])
        if not layers:
            raise Unsupported("it has no layers")
        self.dtype = inner.embed_tokens.weight.dtype
        if self.dtype not in TOLERANCE:
            raise Unsupported(f"its dtype is {self.dtype}")
        self.rotary = _Rotary(inner.rotary_emb, self.dtype)
        self.kinds = [getattr(layer.self_attn, "layer_type", None) for layer in layers]
        """Of each layer what its rotary embedding is asked for; None where there is one for all."""
        self.softcap = getattr(self.config, "final_logit_softcapping", None)
        fields = _model_fields(model)
        per_layer = [_layer_fields(layer, self.config) for layer in layers]
        _check_shapes(fields, per_layer)
        weights = [value for one in (fields, *per_layer) for value in one.values() if isinstance(value, torch.Tensor)]
        for weight in weights:
            # A tensor of another class (quantised, distributed) may have no memory of its own at all.
            if type(weight) not in (torch.Tensor, nn.Parameter) or weight.layout is not torch.strided:
                raise Unsupported(f"its weights are not plain tensors but {type(weight).__name__}")
            if weight.dtype != self.dtype or weight.device.type != "cpu" or not weight.is_contiguous():
                raise Unsupported("its weights are not contiguous on a CPU in one dtype")
        self.weights = [weight.detach() for weight in weights]
        """Every tensor whose address the native model holds; detached, so that a parameter whose data is replaced in the middle
        of a request does not free what is being read."""
        self.fields, self.per_layer = _by_address(fields), [_by_address(one) for one in per_layer]
        self.structure = (type(model).__name__, self.dtype, len(layers), tuple(fields[name] for name in _SIZES))
        self.identity = (self.fields, self.per_layer)
        """Every address and constant that the native model holds."""
        self._positions = 0
        self._native: Any = None

    def takes(self, cache: RaggedCache, counts: Sequence[int], grad: bool) -> bool:
        """Returns whether a forward over counts[b] tokens of row b, behind what the cache holds, is done here."""
        return (
            bool(cache.layers)
            and len(cache.layers) == len(self.per_layer)
            and 0 < sum(counts) <= MOST_TOKENS
            and not grad
            and not torch.is_autocast_enabled("cpu")
            and cache.layers[0].keys.dtype == self.dtype
        )

    def __call__(
        self,
        tokens: torch.Tensor,
        cache: RaggedCache,
        counts: Sequence[int],
        keep: int,
        aux_layers: Sequence[int] = (),
        depths: torch.Tensor | None = None,
        ancestors: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Reads counts[b] tokens of row b behind what the cache holds of it, and writes their keys and values there.

        Args:
            tokens: int64 [B, T].
            cache: with as many rows; its lengths do not change.
            counts: 0..T each; places beyond are not read, and what is returned of them is 0.
            keep: logits of the last `keep` places are returned.
            aux_layers: ascending numbers of layers whose input is wanted; the number of layers: the final norm's output.
            depths: int64 [B, T], positions behind a row's length; None: 0, 1, 2, ...
            ancestors: bool [B, T, T], which tokens of its row each one sees; None: those before it and itself.

        Returns: logits [B, keep, V] and hidden states [B, T, len(aux_layers) * H], both in the model's dtype.
        """
        batch, width = tokens.shape
        cache.make_room(width)
        cache.written = width
        last = max(cache.lengths) + (width if depths is None else int(depths.max()) + 1)
        native = self._with_tables(last)
        tokens = tokens.contiguous()
        fresh = torch.empty if min(counts) == width else torch.zeros
        logits = fresh(batch, keep, self.config.vocab_size, dtype=torch.float32)
        states = fresh(batch, width, len(aux_layers) * self.config.hidden_size, dtype=self.dtype)
        depths = None if depths is None else depths.contiguous()
        ancestors = None if ancestors is None else ancestors.contiguous()
        native.run(
            width, tokens.data_ptr(), list(cache.lengths), list(counts), 0 if depths is None else depths.data_ptr(),
            0 if ancestors is None else ancestors.data_ptr(), [layer.keys.data_ptr() for layer in cache.layers],
            [layer.values.data_ptr() for layer in cache.layers], cache.capacity, keep, logits.data_ptr(), list(aux_layers),
            states.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits.to(self.dtype), states

    def _with_tables(self, end: int) -> Any:
        """Returns the native model with rotary factors of at least the positions 0..end-1."""
        if end > self._positions:
            from hedgespec import _native

            self._positions = max(2048, 1 << (end - 1).bit_length())
            self._tables = {kind: self.rotary.table(kind, self._positions) for kind in set(self.kinds)}
            cosine, _ = self._tables[self.kinds[0]]
            layers = [
                {**one, "cosine": self._tables[kind][0].data_ptr(), "sine": self._tables[kind][1].data_ptr()}
                for one, kind in zip(self.per_layer, self.kinds)
            ]
            self._native = _native.ForwardModel({**self.fields, "rotary": 2 * cosine.shape[1]}, layers)
        return self._native


class _Rotary:
    """A model's rotary factors by position, as its own module computes them."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self.module, self.dtype = module, dtype

    @torch.no_grad()
    def table(self, kind: str | None, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns cosines and sines of the positions 0..count-1, float32 [count, rotary / 2] each."""
        states, places = torch.zeros(1, 1, 1, dtype=self.dtype), torch.arange(count)[None]
        try:
            cosine, sine = self.module(states, places, kind)
        except TypeError:
            cosine, sine = self.module(states, places)
        half = cosine.shape[-1] // 2
        return cosine[0, :, :half].float().contiguous(), sine[0, :, :half].float().contiguous()


def _check(model: PreTrainedModel) -> None:
    """Raises: Unsupported, unless the model is what its class says and nothing has been put around or into it."""
    if type(model).__name__ not in MODELS or not type(model).__module__.startswith("transformers.models."):
        raise Unsupported(f"{type(model).__name__} is none of {', '.join(MODELS)}")
    if model.training:
        raise Unsupported("it is in training mode")
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        raise Unsupported("torch has forward hooks for all modules")
    for name, module in model.named_modules():
        kind = type(module)
        if kind.__module__.startswith(("torch.nn.modules.", "transformers.models.", "transformers.activations")):
            known = kind.__module__.startswith("transformers.") or kind in (nn.Linear, nn.Embedding, nn.ModuleList, nn.SiLU)
        else:
            known = kind is FewRowLinear
        if not known or _is_hooked(module) or "forward" in vars(module):
            raise Unsupported(f"{name or 'the model'} is not as transformers makes it")
    if positions.length_dependent(model):
        raise Unsupported("its rotary factors follow the text's length")


def _is_hooked(module: nn.Module) -> bool:
    """Returns whether anything but transformers' collector of hidden states is called around the module's forward."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(getattr(hook, "__module__", None) != "transformers.utils.output_capturing" for hook in hooks)


_SIZES = ("hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocabulary", "epsilon", "norm_offset", "attention_scale",
          "attention_softcap", "embedding_scale", "activation")  # fmt: skip


def _model_fields(model: PreTrainedModel) -> dict[str, Any]:
    """Returns sizes, constants, and the tensors outside the layers."""
    config, inner, head = model.config, model.model, model.lm_head
    attention, mlp = inner.layers[0].self_attn, inner.layers[0].mlp
    name = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if name not in ACTIVATIONS:
        raise Unsupported(f"its activation is {name}")
    if head.bias is not None:
        raise Unsupported("its output layer has a bias")
    gemma = type(model).__name__.startswith("Gemma")
    scale = 1.0
    if gemma:  # in the model's dtype, as its embedding rounds it
        scale = float(torch.tensor(config.hidden_size**0.5).to(inner.embed_tokens.weight.dtype))
    return {
        "bfloat16": inner.embed_tokens.weight.dtype == torch.bfloat16,
        "hidden": config.hidden_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": attention.head_dim,
        "intermediate": mlp.gate_proj.out_features,
        "vocabulary": config.vocab_size,
        "epsilon": config.rms_norm_eps,
        "norm_offset": 1.0 if gemma else 0.0,
        "attention_scale": float(attention.scaling),
        "attention_softcap": float(getattr(attention, "attn_logit_softcapping", None) or 0.0),
        "embedding_scale": scale,
        "activation": ACTIVATIONS[name],
        "embedding": inner.embed_tokens.weight,
        "norm": inner.norm.weight,
        "head": head.weight,
    }


def _layer_fields(layer: Any, config: Any) -> dict[str, Any]:
    """Returns a layer's tensors, None where it has none, and its window."""
    attention, mlp = layer.self_attn, layer.mlp
    if any(getattr(one, "bias", None) is not None for one in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)):
        raise Unsupported("its MLP has biases")
    sandwich = hasattr(layer, "pre_feedforward_layernorm")
    mlp_norm = layer.pre_feedforward_layernorm if sandwich else layer.post_attention_layernorm
    window = getattr(attention, "sliding_window", None)
    if window is None and not getattr(config, "layer_types", None):  # Mistral: one for all layers
        window = getattr(config, "sliding_window", None)
    return {
        **{name: getattr(attention, f"{letter}_proj").weight for name, letter in _PROJECTIONS},
        **{f"{name}_bias": getattr(attention, f"{letter}_proj").bias for name, letter in _PROJECTIONS},
        "query_norm": getattr(getattr(attention, "q_norm", None), "weight", None),
        "key_norm": getattr(getattr(attention, "k_norm", None), "weight", None),
        "gate": mlp.gate_proj.weight,
        "up": mlp.up_proj.weight,
        "down": mlp.down_proj.weight,
        "input_norm": layer.input_layernorm.weight,
        "attention_norm": layer.post_attention_layernorm.weight if sandwich else None,
        "mlp_norm": mlp_norm.weight,
        "mlp_output_norm": layer.post_feedforward_layernorm.weight if sandwich else None,
        "window": int(window or 0),
    }


_PROJECTIONS = (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o"))


def _check_shapes(fields: dict[str, Any], per_layer: Sequence[dict[str, Any]]) -> None:
    """Raises: Unsupported, unless every tensor has the shape that the sizes of the model imply; native code reads by these."""
    hidden, head, inside, vocabulary = (fields[name] for name in ("hidden", "head_dim", "intermediate", "vocabulary"))
    queries, keys = fields["heads"] * head, fields["kv_heads"] * head
    layer = {
        "query": (queries, hidden), "key": (keys, hidden), "value": (keys, hidden), "output": (hidden, queries),
        "query_bias": (queries,), "key_bias": (keys,), "value_bias": (keys,), "output_bias": (hidden,),
        "query_norm": (head,), "key_norm": (head,), "gate": (inside, hidden), "up": (inside, hidden), "down": (hidden, inside),
        **dict.fromkeys(("input_norm", "attention_norm", "mlp_norm", "mlp_output_norm"), (hidden,)),
    }  # fmt: skip
    outside = {"embedding": (vocabulary, hidden), "norm": (hidden,), "head": (vocabulary, hidden)}
    for found, shapes in ((fields, outside), *((one, layer) for one in per_layer)):
        for name, value in found.items():
            if isinstance(value, torch.Tensor) and tuple(value.shape) != shapes[name]:
                raise Unsupported(f"{name}: its weight is {list(value.shape)}, its configuration says {list(shapes[name])}")


def _by_address(fields: dict[str, Any]) -> dict[str, Any]:
    """Replaces tensors by their addresses, and None by 0."""
    return {
        name: value.data_ptr() if isinstance(value, torch.Tensor) else 0 if value is None else value
        for name, value in fields.items()
    }


@torch.no_grad()
def _difference(forward: NativeForward, model: PreTrainedModel) -> float:
    """Returns the largest difference between both forwards' states and logits, as a share of the largest value there."""
    model = few_row_view(model)  # transformers leaves its collectors of hidden states in the modules that it was asked
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (1, PAST + NEXT), generator=random)
    cache = RaggedCache(1)
    arguments: dict[Any, Any] = {cache_argument(model.forward): cache, "use_cache": True}
    model(tokens[:, :PAST], position_ids=torch.arange(PAST)[None], **arguments)
    cache.lengths[0] = PAST
    places = torch.arange(PAST, PAST + NEXT)[None]
    expected = model(tokens[:, PAST:], position_ids=places, output_hidden_states=True, **arguments)
    layers = list(range(len(forward.per_layer) + 1))
    logits, states = forward(tokens[:, PAST:], cache, [NEXT], NEXT, layers)
    pairs = [(logits, expected.logits), *zip(states.split(model.config.hidden_size, -1), expected.hidden_states)]
    return max(
        float((one.float() - other.float()).abs().max() / other.float().abs().max().clamp_min(1e-6)) for one, other in pairs
    )
