"""Reads and writes EAGLE heads in the formats of other projects.

A head is recognised by the names of its tensors. What its configuration leaves open is assumed as in vLLM, and reported.
Formats: `eagle3` (the official layout, also SpecForge's), `eagle` (EAGLE-1 and EAGLE-2), and `speculators` for both.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn

from hedgespec.drafters.checkpoint_files import find_files
from hedgespec.drafters.checkpoint_layout import HeadPlan, TargetShapes
from hedgespec.drafters.checkpoint_names import FUSED, IN_LAYER, rows_of_parts, version_of
from hedgespec.drafters.eagle import EagleConfig, EagleHead
from hedgespec.errors import CheckpointError
from hedgespec.utils.files import replacing, write_tensors
from hedgespec.utils.scalars import integers, shown, text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LAYOUTS = ("eagle3", "eagle", "speculators")


@dataclass(frozen=True)
class Inspection:
    """Contents of a checkpoint, and what a reader has to assume."""

    path: str
    format: str
    """`eagle3`, `eagle`, `speculators eagle3` or `speculators eagle`."""
    tensors: dict[str, tuple[int, ...]]
    """Shapes by name in the files."""
    dtype: str
    vocab_size: int | None
    """The target's vocabulary according to the files; None if they do not say."""
    draft_vocab_size: int | None
    """None if the output matrix is the target's."""
    aux_layers: tuple[int, ...] | None
    """Layers of the target whose inputs are read; None if they depend on the target."""
    variant: dict[str, Any]
    """Options of `EagleConfig` in which heads of one format differ."""
    assumed: tuple[str, ...]
    """What the files leave open."""
    faults: tuple[str, ...]
    """Why `load_drafter` would refuse it."""


def load_drafter(
    path: str | Path,
    target: PreTrainedModel,
    *,
    name: str | None = None,
    aux_layers: Sequence[int] | None = None,
    allow_pickle: bool = False,
    revision: str | None = None,
) -> EagleHead:
    """Reads an EAGLE head of any known format for a target, in the target's dtype and on its device.

    An embedding or output matrix that the files lack, or that equals the target's, is shared with the target. What had to be
    assumed is listed in the head's `assumed`.

    Args:
        path: a folder, a file in it, or a repository of the hub.
        target: a transformers causal language model.
        name: shown in statistics; by default that of the folder or repository.
        aux_layers: layers whose inputs an EAGLE-3 head reads; replaces those of its configuration. Heads trained for SGLang
            number the layers whose output is read: add 1 to each.
        allow_pickle: reads pickled weights where there are no safetensors, with `weights_only`.
        revision: of a repository.

    Raises:
        CheckpointError: the files cannot be read, or the head does not fit the target. The message names every key of
            config.json with a wrong type or value, and every missing, extra or mis-shaped tensor.
        TypeError, ValueError: aux_layers or name has a wrong type or value.
        ImportError: `path` is a repository of the hub and huggingface_hub is not installed.
    """
    if name is not None:
        text("name", name, otherwise=" or None")
    files = find_files(path, allow_pickle, revision)
    about = TargetShapes.of(target)
    plan = HeadPlan(files, about, _given_layers(aux_layers))
    plan.check()
    weights = {key: one.to(device=target.device, dtype=target.dtype) for key, one in plan.weights().items()}
    embedding, output = target.get_input_embeddings(), target.get_output_embeddings()
    own, vocabulary = weights.pop("embed_tokens.weight", None), plan.vocabulary
    if own is not None and _equal(own, embedding.weight):
        own = None
    if own is not None:
        embedding = nn.Embedding.from_pretrained(own, freeze=True)
    rows = None if output is None else output.weight.detach()
    if "lm_head.weight" not in weights:
        if rows is None:
            raise CheckpointError(f"{path}: expected an lm_head.weight, since the target has no output matrix, found none")
        if rows.is_meta:
            raise CheckpointError(f"{path}: expected an lm_head.weight, since the target's is not in memory, found none")
        weights["lm_head.weight"] = rows if vocabulary is None else rows[vocabulary.to(rows.device)]
    elif vocabulary is None and rows is not None and _equal(weights["lm_head.weight"], rows):
        weights["lm_head.weight"] = rows
    with torch.device("meta"):
        head = EagleHead(plan.config, embedding, name=name or files.name, owns_embedding=own is not None)
    if own is not None:
        weights["embed_tokens.weight"] = own
    head.load_state_dict(weights, assign=True)
    head.draft_to_target, head.assumed = vocabulary, tuple(plan.assumed)
    head.set_rope_frequency()
    return head.requires_grad_(False).to(device=target.device, dtype=target.dtype).eval()


def _given_layers(aux_layers: Sequence[int] | None) -> tuple[int, ...] | None:
    """Returns the argument as plain ints. Raises TypeError or ValueError."""
    return None if aux_layers is None else integers("aux_layers", aux_layers, 0, otherwise=" or None")


def _equal(own: torch.Tensor, theirs: torch.Tensor) -> bool:
    return own.shape == theirs.shape and not theirs.is_meta and torch.equal(own, theirs.to(own.device))


def inspect_drafter(
    path: str | Path,
    target: PreTrainedModel | None = None,
    *,
    aux_layers: Sequence[int] | None = None,
    allow_pickle: bool = False,
    revision: str | None = None,
) -> Inspection:
    """Describes a checkpoint without loading it: what `load_drafter` finds, assumes and refuses. Arguments as there; without a
    target, what depends on it is left open.

    Raises: CheckpointError if the files hold no EAGLE head.
    """
    files = find_files(path, allow_pickle, revision)
    plan = HeadPlan(files, None if target is None else TargetShapes.of(target), _given_layers(aux_layers))
    config, names = plan.config, ("version", "norms", "biases", "norm_before_residual", "feeds_back_norm")
    variant = {name: getattr(config, name) for name in names}
    variant |= {"head_dim": config.head_dim, "rope_theta": config.rope_theta, "rope_scaling": dict(config.rope_scaling)}
    return Inspection(
        path=str(path), format=plan.format, tensors={key: one.shape for key, one in files.tensors.items()},
        dtype=", ".join(sorted({one.dtype for one in files.tensors.values() if one.floating})),
        vocab_size=plan.vocab_size, draft_vocab_size=plan.draft_vocab_size, aux_layers=plan.aux_layers, variant=variant,
        assumed=tuple(plan.assumed), faults=tuple(plan.faults),
    )  # fmt: skip


def is_head(path: str | Path, *, allow_pickle: bool = False) -> bool:
    """Returns whether a local folder or file holds an EAGLE head, by the names of its tensors; False if it cannot be read."""
    try:
        return version_of(find_files(path, allow_pickle, None, local=True)) is not None
    except CheckpointError:
        return False


def save_drafter(
    head: EagleHead,
    folder: str | Path,
    layout: str | None = None,
    *,
    target: PreTrainedModel | None = None,
    verifier: str | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Writes `config.json` and `model.safetensors` in a layout of other projects and returns the folder. Either both files are
    written completely or neither is.

    `load_drafter` reads the result. vLLM 0.32 runs EAGLE-3 heads in both layouts; according to its source it also runs EAGLE-1
    heads in layout "eagle" if `fc` has no bias.

    Args:
        head: the head.
        folder: is created if it does not exist.
        layout: "eagle3" (official), "eagle" (EAGLE-1 and -2), or "speculators" for all; by default the official one.
        target: the head's target, for its name and its context length. An output matrix over the whole vocabulary that equals
            the target's is left out, because engines take it from the target.
        verifier: name of the target in speculators' files, by which an engine may load it; by default the one that `target` was
            loaded by, unless that is a local folder.
        dtype: of the tensors; the head's by default.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: a layout that cannot hold this head, or an EAGLE-3 head that other engines cannot run.
        OSError: the files cannot be written.
    """
    if not isinstance(head, EagleHead):
        raise TypeError(f"head: expected an EagleHead, got {shown(head)}")
    if not isinstance(folder, (str, os.PathLike)):
        raise TypeError(f"folder: expected a str or a path, got {shown(folder)}")
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: expected a torch.dtype or None, got {shown(dtype)}")
    layout, dtype = _layout_for(head.config, layout, target), head.fc.weight.dtype if dtype is None else dtype
    tensors = _tensors_of(head, layout)
    if target is not None and head.draft_to_target is None:
        output = target.get_output_embeddings().weight
        if output.shape == head.lm_head.weight.shape and torch.equal(head.lm_head.weight, output):
            del tensors["lm_head.weight"]
    tensors = {key: (one.to(dtype) if one.is_floating_point() else one).cpu().contiguous() for key, one in tensors.items()}
    tensors = {key: one.clone() for key, one in tensors.items()}  # tensors that share memory cannot go into one file
    if verifier is None:
        verifier = getattr(target, "name_or_path", None) or None
        verifier = None if verifier and Path(verifier).exists() else verifier
    settings = _config_of(head.config, layout, target, verifier, str(dtype).removeprefix("torch."))
    return _write(Path(folder), settings, tensors)


def _layout_for(config: EagleConfig, layout: str | None, target: PreTrainedModel | None) -> str:
    """Returns the layout, the official one by default. Raises ValueError if it cannot hold the head."""
    official = "eagle" if config.version == 1 else "eagle3"
    layout = official if layout is None else layout
    if layout not in (official, "speculators"):
        raise ValueError(f"layout: expected {official} or speculators for this head, got {layout!r}")
    strange = sorted({"embedding_layernorm", "input_layernorm", "norm"} & {*config.norms}) if layout == "eagle" else []
    if strange:
        raise ValueError(f"layout: expected speculators for a head with {', '.join(strange)}, which eagle has no place for")
    if target is not None and config.version == 3 and max(config.aux_layers) >= TargetShapes.of(target).layers:
        raise ValueError(f"head: expected aux layers below {max(config.aux_layers)}, whose final norm other engines leave out")
    return layout


def _write(folder: Path, settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    """Writes both files, or neither, and returns the folder."""
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(folder / "config.json") as config, replacing(folder / "model.safetensors") as weights:
            write_tensors(save_file, tensors, weights, {"format": "pt"})
            config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    except BaseException:
        if is_new:
            folder.rmdir()
        raise
    return folder


def _tensors_of(head: EagleHead, layout: str) -> dict[str, torch.Tensor]:
    config = head.config
    legacy = layout == "speculators" and config.version == 1
    prefix = "transformer." if legacy else "midlayer." if layout == "eagle3" else "layers.0."
    split = rows_of_parts(config)
    renamed = {"fc": "fusion_fc", "norm": "pre_lm_head_layernorm"} if legacy else {}
    tensors = {}
    for name, tensor in head.state_dict().items():
        stem, kind = name.rsplit(".", 1)
        if stem == "fc" or (stem not in FUSED and stem not in IN_LAYER):
            own = re.sub(r"^fc_norm_", "fc_norm.", renamed.get(stem, stem))
            tensors[f"{own}.{kind}"] = tensor
            continue
        parts = FUSED.get(stem) or (IN_LAYER[stem],)
        tensors |= {f"{prefix}{part}.{kind}": rows for part, rows in zip(parts, tensor.split(split.get(stem, len(tensor))))}
    if head.draft_to_target is not None:
        ids = head.draft_to_target.cpu()
        named = torch.zeros(config.vocab_size, dtype=torch.bool)
        named[ids] = True
        tensors |= {"d2t": ids - torch.arange(len(ids)), "t2d": named}
    return tensors


def _config_of(config: EagleConfig, layout: str, target: PreTrainedModel, verifier: str | None, dtype: str) -> dict[str, Any]:
    """Returns the contents of `config.json`, with every key that vLLM 0.32, SGLang or `load_drafter` would otherwise assume."""
    about = None if target is None else target.config.get_text_config(decoder=True)
    kind = "qwen3" if "q_norm" in config.norms else "llama"
    rope = {"rope_type": "default", **dict(config.rope_scaling), "rope_theta": config.rope_theta}
    layer = {
        "model_type": kind, "hidden_size": config.hidden_size, "num_hidden_layers": 1,
        "num_attention_heads": config.num_attention_heads, "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim, "intermediate_size": config.intermediate_size, "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps, "vocab_size": config.vocab_size,
        "max_position_embeddings": getattr(about, "max_position_embeddings", None) or 2048,
        "rope_theta": config.rope_theta, "rope_parameters": rope,
        "attention_bias": "qkv_proj" in config.biases, "mlp_bias": "down_proj" in config.biases,
        "tie_word_embeddings": False, "dtype": dtype,
    }  # fmt: skip
    if config.rope_scaling:
        layer["rope_scaling"] = dict(config.rope_scaling)
    variant: dict[str, Any] = {"draft_vocab_size": config.draft_vocab_size, "target_hidden_size": config.target_hidden_size}
    if config.version == 3:
        layer["num_aux_hidden_states"] = len(config.aux_layers)
        variant |= {
            "eagle_aux_hidden_state_layer_ids": list(config.aux_layers), "norm_before_residual": config.norm_before_residual,
            "norm_before_fc": "input_norm" in config.norms, "fc_norm": "fc_norm" in config.norms,
            "norm_output": config.feeds_back_norm,
        }  # fmt: skip
    if layout == "eagle":
        return {"architectures": ["LlamaForCausalLM"], **layer, **variant, "bias": "fc" in config.biases}
    if layout == "eagle3":
        eagle = {"eagle_aux_hidden_state_layer_ids": list(config.aux_layers), "use_aux_hidden_state": True}
        architecture = "LlamaForCausalLMEagle3" if kind == "llama" else "Eagle3Qwen3ForCausalLM"
        return {"architectures": [architecture], **layer, **variant, "eagle_config": eagle}
    algorithm = "eagle3" if config.version == 3 else "eagle"
    if config.version == 1:
        variant |= {"fusion_bias": "fc" in config.biases, "layernorms": "norm" in config.norms}
    method = {"proposal_type": "greedy", "speculative_tokens": 5}
    architectures = list(getattr(getattr(target, "config", None), "architectures", None) or [])
    return {
        "architectures": ["Eagle3DraftModel" if config.version == 3 else "EagleSpeculator"],
        "speculators_model_type": algorithm, **variant, "dtype": dtype, "transformer_layer_config": layer,
        "speculators_config": {
            "algorithm": algorithm, "default_proposal_method": "greedy", "proposal_methods": [method],
            "verifier": {"name_or_path": verifier, "architectures": architectures},
        },
    }  # fmt: skip
