"""The files of a checkpoint, in a folder or on the hub: a config.json, and tensors in safetensors or pickles."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hedgespec.errors import CheckpointError
from hedgespec.utils.scalars import shown

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle")


WEIGHTS = (".safetensors", *PICKLES)


REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
"""Name of a repository of the hub."""


DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16", "I64": "int64", "BOOL": "bool"}
"""Dtype in safetensors -> name in torch."""


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file, which `read` loads."""

    shape: tuple[int, ...]
    dtype: str
    floating: bool
    read: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Files:
    """A configuration and the tensors beside it, by their names in the files."""

    path: str
    name: str
    """Name of the folder or repository."""
    config: dict[str, Any]
    tensors: dict[str, Tensor]


def find_files(path: str | Path, allow_pickle: bool, revision: str | None, *, local: bool = False) -> Files:
    """Returns the configuration and the tensors at a path, see `load_drafter`.

    Args:
        path: a folder, a file in it, or, unless `local`, a repository of the hub.
        allow_pickle: also reads pickles, restricted to tensors.
        revision: of a repository.

    Raises: CheckpointError.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise CheckpointError(f"path: expected a folder, a file or a repository of the hub, got {shown(path)}")
    place = Path(path)
    name = place.resolve().name if place.is_dir() else place.resolve().parent.name if place.is_file() else str(path)
    if not place.exists():
        if local or not REPOSITORY.fullmatch(str(path)):
            raise CheckpointError(f"path: expected a folder, a file or a repository of the hub, found none at {path}")
        place, name = _download(str(path), allow_pickle, revision), str(path).rpartition("/")[2]
    folder = place if place.is_dir() else place.parent
    tensors: dict[str, Tensor] = {}
    for file in _weights_in(place, allow_pickle):
        tensors |= _tensors_in(file)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: expected a config.json beside the weights, found none") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected a config.json that can be read ({error})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected an object in config.json, got {type(config).__name__}")
    return Files(str(path), name, config, tensors)


def _download(repository: str, allow_pickle: bool, revision: str | None) -> Path:
    """Returns the local copy of a repository, which is downloaded if there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    wanted = ["config.json", "*.safetensors", "*.safetensors.index.json"]
    wanted += ["*.bin", "*.bin.index.json"] if allow_pickle else []
    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=wanted, local_files_only=True))
        if (folder / "config.json").exists() and any(folder.glob("*.safetensors")):
            _weights_in(folder, allow_pickle)  # raises if a shard is missing
            return folder
    except (LocalEntryNotFoundError, HFValidationError, CheckpointError):
        pass
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise CheckpointError(
            f"path: expected a folder, a file or a repository of the hub that can be reached, got {repository} ({error})"
        ) from error


def _weights_in(place: Path, allow_pickle: bool) -> list[Path]:
    """Returns the files with the weights of a folder, or the file itself."""
    if place.is_file():
        found = [place]
    else:
        found = _shards(place, "model.safetensors") or sorted(place.glob("*.safetensors"))
        found = found or _shards(place, "pytorch_model.bin") or sorted(one for end in PICKLES for one in place.glob(f"*{end}"))
    if not found:
        pickled = "" if allow_pickle else "; where there are pickled ones, allow_pickle reads them, restricted to tensors"
        raise CheckpointError(f"{place}: expected weights in safetensors, found none{pickled}")
    if found[0].suffix in PICKLES and not allow_pickle:
        raise CheckpointError(
            f"{place}: expected weights in safetensors, got the pickle {found[0].name}, which may run code when read: "
            "allow_pickle reads it all the same, restricted to tensors"
        )
    if found[0].suffix in PICKLES and len(found) > 1 and not _shards(place, "pytorch_model.bin"):
        raise CheckpointError(f"{place}: expected one pickle, got {', '.join(one.name for one in found)}")
    return found


def _shards(folder: Path, name: str) -> list[Path]:
    """Returns the file of this name, or the shards that its index names, or none."""
    if (folder / name).exists():
        return [folder / name]
    index = folder / f"{name}.index.json"
    if not index.exists():
        return []
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: expected an index of shards that can be read ({error})") from error
    if not all(isinstance(one, str) for one in names):
        raise CheckpointError(f"{index}: expected names of files in weight_map, got others")
    if missing := sorted(one for one in names if Path(one).name != one or not (folder / one).exists()):
        raise CheckpointError(f"{index}: expected shards beside it, found none of {', '.join(missing)}")
    return [folder / one for one in sorted(names)]


def _tensors_in(file: Path) -> dict[str, Tensor]:
    if file.suffix in PICKLES:
        try:
            found = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # an unpickler may raise anything
            raise CheckpointError(f"{file}: expected a pickle of tensors that can be read ({error})") from error
        found = found.get("state_dict", found) if isinstance(found, dict) else {}
        if not found or not all(isinstance(one, torch.Tensor) for one in found.values()):
            raise CheckpointError(f"{file}: expected a pickle of tensors by name, got something else")
        return {
            key: Tensor(tuple(one.shape), str(one.dtype).removeprefix("torch."), one.is_floating_point(), partial(_itself, one))
            for key, one in found.items()
        }
    try:
        with safe_open(file, "pt") as opened:
            if "hedgespec" in (opened.metadata() or {}).get("format", ""):
                raise CheckpointError(f"{file}: expected an EAGLE head as on the hub, got a head of HedgeSpec's zoo: "
                                      "hedgespec.zoo.storage.load_head reads it")  # fmt: skip
            slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118  not a dict
            about = {key: (tuple(one.get_shape()), one.get_dtype()) for key, one in slices.items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: expected a readable safetensors file ({error})") from error
    return {
        key: Tensor(shape, DTYPES.get(kind, kind), kind != "BOOL" and kind[0] in "FB", partial(_read, file, key))
        for key, (shape, kind) in about.items()
    }


def read_safetensors(path: str | Path, framework: str, expected: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Returns the metadata and the tensors of a file.

    Args:
        path: the file.
        framework: "pt" for torch tensors, "np" for NumPy arrays.
        expected: description of the file for errors, such as "a readable safetensors file".

    Raises: CheckpointError if there is no such file or it cannot be read.
    """
    try:
        with safe_open(path, framework) as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except FileNotFoundError as error:
        raise CheckpointError(f"path: expected {expected}, found none at {path}") from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"path: expected {expected}, got {path} ({error})") from error


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _read(file: Path, key: str) -> torch.Tensor:
    with safe_open(file, "pt") as opened:
        return opened.get_tensor(key)
