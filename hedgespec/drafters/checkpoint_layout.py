"""The description of a head's checkpoint: the configuration that its files amount to, and everything that is wrong with
them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hedgespec.drafters.checkpoint_files import Files, Tensor
from hedgespec.drafters.checkpoint_names import (
    FUSED,
    HARMLESS,
    IN_LAYER,
    KNOWN,
    NORMS,
    REQUIRED,
    layer_prefix,
    parts_of,
    plain_name,
    rows_of_parts,
    version_of,
)
from hedgespec.drafters.checkpoint_schema import read_config
from hedgespec.drafters.eagle import EagleConfig
from hedgespec.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCALINGS = ("linear", "llama3", "yarn")
"""Supported kinds of scaled positions: those that do not depend on the length of the sequence."""


@dataclass(frozen=True)
class TargetShapes:
    """The sizes of a target that a head must fit."""

    layers: int
    hidden_size: int
    vocab_size: int
    embedding: tuple[int, ...]
    output: tuple[int, ...]

    @classmethod
    def of(cls, target: PreTrainedModel) -> TargetShapes:
        config, output = target.config.get_text_config(decoder=True), target.get_output_embeddings()
        return cls(
            config.num_hidden_layers, config.hidden_size, config.vocab_size, tuple(target.get_input_embeddings().weight.shape),
            () if output is None else tuple(output.weight.shape),
        )  # fmt: skip


class HeadPlan:
    """The head that a checkpoint describes: its configuration, the source of every tensor, assumptions and faults.

    Args:
        files: the configuration and the tensors.
        target: the target's sizes, if known.
        aux_layers: replaces the aux layers of the configuration.

    Raises: CheckpointError if the files cannot be described at all.
    """

    def __init__(self, files: Files, target: TargetShapes | None, aux_layers: Sequence[int] | None):
        self.files, self.target = files, target
        self.assumed: list[str] = []
        """What the files leave open and a reader has to assume."""
        self.faults: list[str] = []
        """Why the head cannot be loaded."""
        self.version: Any = version_of(files)
        if self.version is None:
            shown = ", ".join(sorted(files.tensors)[:5]) or "none"
            raise CheckpointError(
                f"{files.path}: expected an EAGLE head (fc.weight and one decoder layer's tensors), got the tensors {shown} ..."
            )
        read = read_config(files.config)
        self.settings, self.speculators = read.values, read.is_speculators
        kind = self.settings.get("speculators_model_type")
        if kind not in (None, "eagle3", "eagle"):
            raise CheckpointError(f"{files.path}: expected an EAGLE head, got speculators' {kind}")
        self.faults += read.faults
        self.misread = bool(read.faults)
        if read.unjudged:
            self.check()
        self.assumed += [f"{key} means nothing here" for key in read.unread]
        self.format = ("speculators " if self.speculators else "") + ("eagle3" if self.version == 3 else "eagle")
        self._name_tensors()
        self._configure(aux_layers)
        self._compare()

    def check(self) -> None:
        """Raises CheckpointError if there are faults."""
        if self.faults:
            raise CheckpointError(f"{self.files.path}: " + "; ".join(self.faults))

    def weights(self) -> dict[str, torch.Tensor]:
        """Reads the head's tensors, by parameter name, and `embed_tokens.weight` if the file has one."""
        weights = {key: torch.cat([self.there[one].read() for one in parts]) for key, parts in self.sources.items()}
        if "embed_tokens.weight" in self.there:
            weights["embed_tokens.weight"] = self.there["embed_tokens.weight"].read()
        return weights

    def _shape(self, name: str) -> tuple[int, ...] | None:
        found = self.there.get(name)
        return None if found is None else found.shape

    def _name_tensors(self) -> None:
        """Sets `there`, plain name -> tensor, and `origin`, plain name -> name in the file."""
        self.there: dict[str, Tensor] = {}
        self.origin: dict[str, str] = {}
        numbers = set()
        for key, tensor in self.files.tensors.items():
            name, number = plain_name(key)
            if HARMLESS.search(name):
                continue
            numbers |= {number} - {None}
            if name in self.there:
                self.faults.append(f"{key} is there as {self.origin[name]} too")
            self.there[name], self.origin[name] = tensor, key
        if len(numbers) > 1:
            raise CheckpointError(f"{self.files.path}: expected a head of one decoder layer, got {len(numbers)}")
        flat = [self._flaw(name, tensor) for name, tensor in self.there.items()]
        if flaws := [flaw for flaw in flat if flaw]:
            self.faults += flaws
            self.check()

    def _flaw(self, name: str, tensor: Tensor) -> str | None:
        """Returns the fault of a tensor that no configuration allows, in its number of dimensions or its dtype, or None."""
        found = KNOWN.match(name)
        if found is None:
            return None
        dims = 2 if found["matrix"] else 1
        if len(tensor.shape) != dims:
            return f"{self.origin[name]} has shape {tensor.shape}, expected {dims} dimension{'s' if dims > 1 else ''}"
        if found["map"] and tensor.floating:
            return f"{self.origin[name]} is {tensor.dtype}, expected integers or bool"
        if found["map"] and not tensor.shape[0]:
            return f"{self.origin[name]} is empty"
        return None

    def _setting(self, name: str, default: Any, why: str = "") -> Any:
        """Returns the value in the configuration, or the default, which is then listed in `assumed`."""
        found = self.settings.get(name)
        if found is None:
            self.assumed.append(f"{name} {default}" + (f", {why}" if why else ""))
            return default
        return found

    def _configure(self, aux_layers: Sequence[int] | None) -> None:
        settings, version, target = self.settings, self.version, self.target
        output = self._shape("layer.self_attn.o_proj.weight") or (0, 0)
        hidden = self._integer("hidden_size", output[0], "as o_proj has")
        heads = self._integer("num_attention_heads", None)
        size = self._integer("head_dim", hidden // heads, "hidden_size / num_attention_heads")
        kv = self._integer("num_key_value_heads", heads, "as num_attention_heads")
        gate = self._shape("layer.mlp.gate_proj.weight") or (0,)
        inner = self._integer("intermediate_size", gate[0], "as gate_proj has")
        if heads % kv:
            self.faults.append(f"expected num_key_value_heads to divide {heads}, got {kv}")
        if size % 2:
            self.faults.append(f"expected an even head_dim, got {size}")
        activation = settings.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            self.faults.append(f"expected hidden_act silu, got {activation}")
        if settings.get("logit_scale", 1.0) != 1.0:
            self.faults.append(f"expected logit_scale 1, got {settings['logit_scale']}")
        read = settings.get("target_hidden_size") or (hidden if target is None else target.hidden_size)
        if target is not None and read != target.hidden_size:
            self.faults.append(f"expected a target of width {read}, got {target.hidden_size}")
        eagle = settings.get("eagle_config") or {}
        if version == 3 and eagle.get("use_aux_hidden_state") is False:
            self.faults.append("expected a head that reads several layers, got use_aux_hidden_state false")
        norms, biases = self._norms(eagle), self._biases()
        self._vocabularies(hidden)
        count = self._find_aux_layers(eagle, aux_layers, read)
        theta, scaling = self._rope()
        before = False
        if version == 3:
            before = settings.get("norm_before_residual", False)
            if self.speculators:
                before = self._setting("norm_before_residual", True, "vLLM's default for speculators")
        back = version == 3 and settings.get("norm_output", False)
        if back:
            self.assumed.append("norm_output means that the head drafts on from its output's norm, as vLLM and SGLang read it")
        if version == 1 and "norm" in norms:
            self.assumed.append("the head drafts on from its output before pre_lm_head_layernorm")
        if settings.get("sliding_window") and settings.get("use_sliding_window", True):
            self.assumed.append(f"no sliding window, though the configuration has one of {settings['sliding_window']}")
        if version == 1 and read != hidden:
            self.faults.append(f"expected a head as wide as its target for EAGLE-1, got {hidden} and {read}")
        self.config = EagleConfig(
            hidden_size=hidden, target_hidden_size=read, num_attention_heads=heads, num_key_value_heads=kv, head_dim=size,
            intermediate_size=inner, vocab_size=self.vocab_size or 0,
            draft_vocab_size=self.draft_vocab_size or self.vocab_size or 0, aux_layers=self.aux_layers or (-1,) * count,
            rope_theta=theta, rms_norm_eps=float(self._setting("rms_norm_eps", 1e-6)), version=version, norms=norms,
            biases=biases, norm_before_residual=before, feeds_back_norm=back, rope_scaling=scaling,
        )  # fmt: skip

    def _integer(self, name: str, default: int | None, why: str = "") -> Any:
        """Returns a size; raises CheckpointError if it is missing, because no shape can be checked without it."""
        found = self.settings.get(name) if default is None else self._setting(name, default, why)
        if found is None or found < 1:
            self.faults.append(f"expected {name} >= 1 in config.json, got {found}")
            self.check()
        return found

    def _norms(self, eagle: dict[str, Any]) -> tuple[str, ...]:
        """Returns the optional norms that the head has or must have."""
        flags = {"input_norm": eagle.get("norm_before_fc", self.settings.get("norm_before_fc")),
                 "fc_norm": self.settings.get("fc_norm", self.settings.get("use_aux_norm"))}  # fmt: skip
        found = []
        for norm in NORMS:
            name = f"layer.{IN_LAYER[norm]}" if norm in IN_LAYER else norm
            there = any(re.fullmatch(rf"{re.escape(name)}(\.\d+)?\.weight", key) for key in self.there)
            there |= norm in ("q_norm", "k_norm") and any(f"layer.self_attn.{one}_norm.weight" in self.there for one in "qk")
            if norm == "input_norm" and there and flags[norm] is False:  # vLLM leaves it out
                self.assumed.append("input_norm is not used, since norm_before_fc is false")
                del self.there["input_norm.weight"]
                there = False
            if norm in REQUIRED[self.version] or flags.get(norm) or (there and self._knows(norm)):
                found.append(norm)
        return tuple(found)

    def _knows(self, norm: str) -> bool:
        """Returns whether a head of this version may have the norm."""
        return norm not in (("input_norm", "fc_norm", "hidden_norm") if self.version == 1 else ("embedding_layernorm",))

    def _biases(self) -> tuple[str, ...]:
        found = []
        for name, parts in FUSED.items():
            names = [f"{part if name == 'fc' else f'layer.{part}'}.bias" for part in parts]
            if any(one in self.there for one in names):
                found.append(name)
        if self.settings.get("attention_bias") and "qkv_proj" not in found:
            self.assumed.append("no bias of the attention, though attention_bias is true")
        return tuple(found)

    def _rope(self) -> tuple[float, tuple[tuple[str, Any], ...]]:
        settings = self.settings
        given = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
        given = dict(given)
        theta = given.pop("rope_theta", settings.get("rope_theta"))
        if theta is None:
            theta = self._setting("rope_theta", 10000.0)
        kind = given.pop("rope_type", given.pop("type", "default"))
        given.pop("type", None)
        partial = given.pop("partial_rotary_factor", settings.get("partial_rotary_factor", 1.0))
        if partial != 1:
            self.faults.append(f"expected rotary positions of whole heads, got partial_rotary_factor {partial}")
        if kind == "default":
            return float(theta), ()
        if kind not in SCALINGS:
            self.faults.append(f"expected rope_type default, {', '.join(SCALINGS)} (independent of the length), got {kind}")
            return float(theta), ()
        if kind != "linear" and "original_max_position_embeddings" not in given:
            given["original_max_position_embeddings"] = self._setting("max_position_embeddings", 2048)
            self.assumed.append("original_max_position_embeddings as max_position_embeddings")
        needed = {"llama3": ("factor", "low_freq_factor", "high_freq_factor")}.get(kind, ("factor",))
        if missing := [key for key in needed if key not in given]:
            if not self.misread:  # else a fault in one of them may be the reason
                self.faults.append(f"expected {', '.join(missing)} for rope_type {kind}, found none")
            return float(theta), ()
        if kind == "llama3" and given["high_freq_factor"] <= given["low_freq_factor"]:
            self.faults.append(
                f"expected high_freq_factor above low_freq_factor {given['low_freq_factor']}, got {given['high_freq_factor']}"
            )
        if kind == "yarn" and theta <= 1:
            self.faults.append(f"expected rope_theta above 1 for rope_type yarn, got {theta}")
        return float(theta), (("rope_type", kind), *sorted((key, given[key]) for key in given))

    def _vocabularies(self, hidden: int) -> None:
        """Sets `vocab_size`, `draft_vocab_size` (None: the whole output matrix of the target) and `vocabulary`, the target's
        id of every draft id."""
        maps, target = {name: self.there.get(name) for name in ("d2t", "t2d")}, self.target
        embedded, configured = self._shape("embed_tokens.weight"), self.settings.get("vocab_size")
        sizes = [None if maps["t2d"] is None else maps["t2d"].shape[0], embedded and embedded[0], configured]
        self.vocab_size = target.vocab_size if target else next((one for one in sizes if one), None)
        total, self.vocabulary = self.vocab_size, None
        rows = self._shape("lm_head.weight")
        offsets = None if maps["d2t"] is None else maps["d2t"].read().long().flatten()
        chosen = None if maps["t2d"] is None else maps["t2d"].read().flatten().bool()
        if chosen is not None and total is not None and len(chosen) != total:
            self.faults.append(f"t2d has shape ({len(chosen)},), expected ({total},)")
            chosen = None
        if offsets is not None:
            self.vocabulary = torch.arange(len(offsets)) + offsets
        elif chosen is not None and not chosen.all():
            self.vocabulary = chosen.nonzero().flatten()
            self.assumed.append("draft ids in the order of t2d, for want of d2t")
        sizes = [rows and rows[0], None if self.vocabulary is None else len(self.vocabulary)]
        found = next((one for one in sizes if one), None)
        configured = self.settings.get("draft_vocab_size")
        if configured is None and found is not None and rows is not None and found != total:
            self.assumed.append(f"draft_vocab_size {found}, as the tensors have")
        self.draft_vocab_size = configured or found
        if rows is None:
            which = "rows" if self.vocabulary is not None else "whole"
            self.assumed.append(f"the target's output matrix, {which}, for want of lm_head")
            if self.vocabulary is None:
                self.draft_vocab_size = None
            if target is not None and (len(target.output) != 2 or target.output[1] != hidden):
                self.faults.append(f"lm_head.weight is missing and the target's is {target.output}, expected width {hidden}")
        if embedded is None:
            self.assumed.append("the target's embedding, for want of embed_tokens")
            if target is not None and target.embedding[1] != hidden:
                self.faults.append(
                    f"embed_tokens.weight is missing and the target's is {target.embedding}, expected width {hidden}"
                )
        ids = self.vocabulary
        if ids is None:
            if rows is not None and total is not None and (self.draft_vocab_size or total) != total:
                self.faults.append(f"d2t is missing for a draft vocabulary of {self.draft_vocab_size} of {total}")
            return
        if len(ids) != (self.draft_vocab_size or len(ids)):
            self.faults.append(
                f"{'d2t' if offsets is not None else 't2d'} names {len(ids)} ids, expected {self.draft_vocab_size}"
            )
        elif not len(ids):
            self.faults.append("t2d names no ids")
        elif total is not None and not 0 <= int(ids.min()) <= int(ids.max()) < total:
            self.faults.append(f"d2t leaves 0..{total - 1}: id = i + d2t[i], got {int(ids.min())} to {int(ids.max())}")
        elif ids.unique().numel() < len(ids):
            self.faults.append("d2t names ids twice: id = i + d2t[i]")
        elif chosen is not None and not torch.equal(ids.sort().values, chosen.nonzero().flatten()):
            self.faults.append("d2t and t2d name different ids")
        elif len(ids) == total and torch.equal(ids, torch.arange(total)):
            self.vocabulary = None

    def _find_aux_layers(self, eagle: dict[str, Any], given: Sequence[int] | None, read: int) -> int:
        """Sets `aux_layers`, None if they depend on an unknown target. Returns their number."""
        name, target = "eagle_aux_hidden_state_layer_ids", self.target
        layers = None if target is None else target.layers
        if self.version == 1:
            self.aux_layers = None if layers is None else (layers,)
            return 1
        width = (self._shape("fc.weight") or (0, 0))[-1]
        ids = given if given is not None else self.settings.get(name) or eagle.get(name)
        count = len(ids) if ids else max(1, width // read)
        if ids is None or len(ids) == 0:
            self.assumed.append("aux layers (2, n // 2, n - 3) of the target's n, as inputs of these layers")
            ids = None if layers is None else (2, layers // 2, layers - 3)
            if count != 3:
                self.faults.append(f"fc.weight reads {count} layers, and config.json does not say which: give aux_layers")
                ids = None
            elif ids is not None and not 0 <= ids[0] < ids[1] < ids[2]:
                self.faults.append(f"the default aux layers are {ids} for a target of {layers} layers: give aux_layers")
                ids = None
        elif given is None:
            self.assumed.append(f"aux layers {tuple(ids)} as inputs of these layers, as vLLM counts; SGLang adds 1")
            if list(ids) != sorted(ids):
                self.assumed.append("aux layers in ascending order, as engines read them")
                ids = sorted(ids)
        if ids is not None:
            ids = tuple(ids)
            if len(set(ids)) < len(ids):
                self.faults.append(f"expected distinct aux layers >= 0, got {ids}")
                ids = None
            elif layers is not None and max(ids) > layers:
                self.faults.append(f"expected a target of more than {max(ids)} layers, got {layers}")
            elif layers is not None and max(ids) == layers:
                self.faults.append(
                    f"aux layer {layers} is the last layer's output before the final norm, which transformers does not give"
                )
        self.aux_layers = ids
        return count

    def _compare(self) -> None:
        """Sets `sources`, parameter name -> plain names of its parts, and compares all shapes and dtypes."""
        config, known = self.config, {"d2t", "t2d"}
        split = rows_of_parts(config)
        self.sources: dict[str, list[str]] = {}
        expected: dict[str, tuple[int, ...]] = {}
        for name, shape in config.shapes.items():
            stem, kind = name.rsplit(".", 1)
            if stem == "lm_head" and "lm_head.weight" not in self.there:
                continue
            names = [f"{part}.{kind}" for part in parts_of(stem)]
            self.sources[name] = names
            for one, rows in zip(names, split.get(stem, shape[:1])):
                expected[one] = (rows, *shape[1:])
        if "embed_tokens.weight" in self.there:
            expected["embed_tokens.weight"] = self.vocab_size or self.there["embed_tokens.weight"].shape[0], config.hidden_size
        shown = {name: self.origin.get(name, name.replace("layer.", layer_prefix(self.origin))) for name in expected}
        for name, shape in expected.items():
            found = self.there.get(name)
            if found is None:
                self.faults.append(f"{shown[name]} is missing")
            elif found.shape != shape:
                self.faults.append(f"{shown[name]} has shape {found.shape}, expected {shape}")
            elif not found.floating:
                self.faults.append(f"{shown[name]} is {found.dtype}, expected floating point")
        extra = sorted(self.origin[name] for name in self.there.keys() - expected.keys() - known)
        self.faults += [f"{name} is not known" for name in extra]
