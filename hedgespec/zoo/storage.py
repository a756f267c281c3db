"""The zoo's file format: a head in one safetensors file, matrices as int8 with a scale per row and per column.

What the target already has (embedding, output rows of the draft vocabulary) is not stored. `w[i, j]` is
`row[i] * int8[i, j] * column[j]`; the column scales absorb the unequal sizes of the fused hidden states.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from hedgespec.drafters.checkpoint_files import PICKLES, read_safetensors
from hedgespec.drafters.eagle import EagleConfig, EagleHead
from hedgespec.errors import CheckpointError
from hedgespec.utils.files import replacing, write_tensors
from hedgespec.utils.scalars import shown

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = "hedgespec-zoo-1"
SHARED = ("lm_head.weight",)
"""Tensors that are the target's own and not stored."""


def quantize(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """`weight` [out, in] as {int8 [out, in], row float32 [out], column float32 [in]}."""
    weight = weight.detach().float()
    column = weight.abs().amax(0).clamp_min(1e-12)
    row = (weight / column).abs().amax(1).clamp_min(1e-12) / 127
    return {"int8": (weight / column / row[:, None]).round().to(torch.int8), "row": row, "column": column}


def dequantize(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """The float32 matrix of what `quantize` made."""
    return parts["int8"].float() * parts["row"][:, None] * parts["column"]


def save_head(head: EagleHead, path: Path, **description: str) -> None:
    """Writes a head that shares its embedding and output rows with the target; `description` goes into the metadata."""
    assert head.draft_to_target is not None  # a zoo head has a draft vocabulary
    tensors = {"draft_to_target": head.draft_to_target.int()}
    for name, weight in head.state_dict().items():
        if name in SHARED:
            continue
        if weight.ndim == 1:
            tensors[name] = weight.detach().float()
        else:
            tensors |= {f"{name}.{part}": value.contiguous() for part, value in quantize(weight).items()}
    metadata = {"format": FORMAT, "config": json.dumps(asdict(head.config)), **description}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as fresh:
        write_tensors(save_file, tensors, fresh, metadata)


def load_head(path: str | Path, target: PreTrainedModel) -> EagleHead:
    """Reads a head for `target` (a transformers causal LM), in the target's dtype and on its device.

    Raises: CheckpointError if the file is missing, corrupt, a pickle, of another format, or made for another target.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise CheckpointError(f"path: expected a safetensors file, got {shown(path)}")
    path = Path(path)
    if path.suffix in PICKLES:
        raise CheckpointError(f"path: expected a safetensors file, got the pickle {path.name}, which may run code when read")
    metadata, tensors = read_safetensors(path, "pt", "a readable safetensors file")
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path}: expected format {FORMAT}, got {metadata.get('format')}")
    try:
        saved = json.loads(metadata["config"])
        fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
        config = EagleConfig(**fields)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: expected the head's shapes in its metadata, got none that can be read ({error})"
        ) from error
    if not config.aux_layers or min(config.aux_layers) < 0:
        raise CheckpointError(f"{path}: expected aux layers >= 0 in its metadata, got {config.aux_layers}")
    if (config.vocab_size, config.target_hidden_size) != (target.config.vocab_size, target.config.hidden_size):
        raise CheckpointError(
            f"{path}: expected a target of vocabulary {config.vocab_size} and width {config.target_hidden_size}, "
            f"got {target.config.vocab_size} and {target.config.hidden_size}; heads are loaded before resize_token_embeddings"
        )
    if max(config.aux_layers) > target.config.num_hidden_layers:
        raise CheckpointError(
            f"{path}: expected a target of more than {max(config.aux_layers)} layers, got {target.config.num_hidden_layers}"
        )
    weights = _weights(path, config, tensors)
    vocabulary = tensors["draft_to_target"].long()
    weights["lm_head.weight"] = target.get_output_embeddings().weight[vocabulary.to(target.device)].detach().cpu().float()
    with torch.device("meta"):
        head = EagleHead(config, target.get_input_embeddings(), name=metadata.get("name", path.stem))
    head.load_state_dict(weights, assign=True)
    head.draft_to_target = vocabulary
    head.set_rope_frequency()
    return head.requires_grad_(False).to(device=target.device, dtype=target.dtype).eval()


def _weights(path: Path, config: EagleConfig, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Dequantised weights, every missing, extra or mis-shaped tensor named in one error."""
    weights, faults, left = {}, [], set(tensors) - {"draft_to_target"}
    for name, shape in config.shapes.items():
        if name in SHARED:
            continue
        names = [name] if len(shape) == 1 else [f"{name}.{part}" for part in ("int8", "row", "column")]
        sizes = [shape] if len(shape) == 1 else [shape, shape[:1], shape[1:]]
        for part, size in zip(names, sizes):
            if part not in tensors:
                faults.append(f"{part} is missing")
            elif tuple(tensors[part].shape) != tuple(size):
                faults.append(f"{part} has shape {tuple(tensors[part].shape)}, expected {tuple(size)}")
        left -= set(names)
        if not faults:
            parts = [tensors[part] for part in names]
            weights[name] = parts[0] if len(parts) == 1 else dequantize(dict(zip(("int8", "row", "column"), parts)))
    faults += [f"{name} is not known" for name in sorted(left)]
    if tensors.get("draft_to_target", torch.empty(0)).shape != (config.draft_vocab_size,):
        faults.append(f"draft_to_target is not of shape ({config.draft_vocab_size},)")
    elif not 0 <= int(tensors["draft_to_target"].min()) <= int(tensors["draft_to_target"].max()) < config.vocab_size:
        faults.append(f"draft_to_target leaves 0..{config.vocab_size - 1}")
    elif tensors["draft_to_target"].unique().numel() < config.draft_vocab_size:
        faults.append("draft_to_target repeats ids")
    if faults:
        raise CheckpointError(f"{path}: " + "; ".join(faults))
    return weights
