"""EAGLE heads as other projects store them: read as they lie on the hub, and written so that other engines run them.

A head is known by the names of its tensors; what its configuration leaves open is taken as vLLM takes it, and told. Formats:
`eagle3` (the official layout, which SpecForge shares), `eagle` (EAGLE-1 and EAGLE-2), and `speculators` of either kind.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from hedgespec.checkpoint_schema import read_config
from hedgespec.drafters.eagle import EagleConfig, EagleHead
from hedgespec.errors import CheckpointError
from hedgespec.files import replacing, write_tensors
from hedgespec.scalars import integers, shown, text

LAYOUTS = ("eagle3", "eagle", "speculators")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle")
WEIGHTS = (".safetensors", *PICKLES)
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
"""Of the hub."""
DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16", "I64": "int64", "BOOL": "bool"}
"""Of safetensors, as torch calls them."""
SCALINGS = ("linear", "llama3", "yarn")
"""Of positions, those that do not depend on the length."""
NORMS = (
    "input_norm", "fc_norm", "embedding_layernorm", "input_layernorm", "hidden_norm", "q_norm", "k_norm", "norm",
)  # fmt: skip
"""Optional ones, in the order in which a configuration names them."""
REQUIRED = {1: (), 3: ("input_layernorm", "hidden_norm", "norm")}
"""Norms that a head of this version always has."""
FUSED = {"qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "o_proj": ("self_attn.o_proj",),
         "gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"), "down_proj": ("mlp.down_proj",), "fc": ("fc",)}  # fmt: skip
"""The head's matrices and what they are made of in a file."""
IN_LAYER = {"input_layernorm": "input_layernorm", "hidden_norm": "hidden_norm", "q_norm": "self_attn.q_norm",
            "k_norm": "self_attn.k_norm", "post_attention_layernorm": "post_attention_layernorm"}  # fmt: skip
"""The layer's norms, likewise."""
HARMLESS = re.compile(r"(^|\.)(inv_freq|cos_cached|sin_cached)$")
"""Buffers that are worked out anew."""
WRAPPERS = re.compile(r"^((model|module|_orig_mod|drafter|draft_model|ea_layer|eagle_module)\.)+")
LAYER = re.compile(r"^(midlayer|transformer|layers\.(?P<number>\d+))\.")
KNOWN = re.compile(
    r"((?P<matrix>(fc|embed_tokens|lm_head|layer\.(self_attn|mlp)\.\w+_proj)\.weight)|(?P<map>d2t|t2d)|.*norm(\.\d)?\.weight|.*\.bias)$"
)
"""Plain names of tensors whose number of dimensions is known: matrices have two, maps, norms and biases one."""
SYNONYMS = {
    "fusion_fc.weight": "fc.weight", "fusion_fc.bias": "fc.bias", "pre_lm_head_layernorm.weight": "norm.weight",
    "aux_norm_low.weight": "fc_norm.0.weight", "aux_norm_mid.weight": "fc_norm.1.weight",
    "aux_norm_high.weight": "fc_norm.2.weight",
}  # fmt: skip


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint holds and what a reader has to make up."""

    path: str
    format: str
    """`eagle3`, `eagle`, `speculators eagle3` or `speculators eagle`."""
    tensors: dict[str, tuple[int, ...]]
    """Shapes by name, as they lie."""
    dtype: str
    vocab_size: int | None
    """The target's as the file has it; None if it does not say."""
    draft_vocab_size: int | None
    """None where the output matrix is the target's."""
    aux_layers: tuple[int, ...] | None
    """Layers of the target whose inputs are read; None where that depends on the target."""
    variant: dict[str, Any]
    """What tells this head's arithmetic from others of its format."""
    assumed: tuple[str, ...]
    faults: tuple[str, ...]
    """Why `load_drafter` would refuse it."""


def load_drafter(
    path: str | Path,
    target,
    *,
    name: str | None = None,
    aux_layers: Sequence[int] | None = None,
    allow_pickle: bool = False,
    revision: str | None = None,
) -> EagleHead:
    """Reads an EAGLE head of any known format for a target, in the target's dtype and on its device.

    An embedding or output matrix that the file lacks, or that equals the target's, is the target's own, shared. What had to be
    assumed stands in the head's `assumed`.

    Args:
        path: a folder, a file in it, or a repository of the hub.
        target: a transformers causal language model.
        name: shown in statistics; by default that of the folder or repository.
        aux_layers: layers whose inputs an EAGLE-3 head reads, instead of those that its configuration names. Heads trained for
            SGLang count the layers whose output is read: add 1 to each.
        allow_pickle: reads pickled weights where there are no safetensors, with `weights_only`.
        revision: of a repository.

    Raises:
        CheckpointError: nothing that can be read there, or a head that does not fit; it names every key of config.json with a
            wrong type or value, and every missing, extra or mis-shaped tensor.
        TypeError, ValueError: aux_layers or name is of another type, or outside its range.
        ImportError: a repository of the hub is asked for and huggingface_hub is not installed.
    """
    if name is not None:
        text("name", name, otherwise=" or None")
    files = _find(path, allow_pickle, revision)
    about = _Target.of(target)
    plan = _Plan(files, about, _given_layers(aux_layers))
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
    """The argument as plain ints. Raises: TypeError or ValueError."""
    return None if aux_layers is None else integers("aux_layers", aux_layers, 0, otherwise=" or None")


def _equal(own: torch.Tensor, theirs: torch.Tensor) -> bool:
    return own.shape == theirs.shape and not theirs.is_meta and torch.equal(own, theirs.to(own.device))


def inspect_drafter(
    path: str | Path, target=None, *, aux_layers: Sequence[int] | None = None, allow_pickle: bool = False,
    revision: str | None = None,
) -> Inspection:  # fmt: skip
    """What `load_drafter` finds and assumes, without a target as far as that goes. Arguments as there.

    Raises: CheckpointError where there is no EAGLE head that could be described.
    """
    files = _find(path, allow_pickle, revision)
    plan = _Plan(files, None if target is None else _Target.of(target), _given_layers(aux_layers))
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
    """Whether a local folder or file holds an EAGLE head, by the names of its tensors; False where nothing can be read."""
    try:
        return _version_of(_find(path, allow_pickle, None, local=True)) is not None
    except CheckpointError:
        return False


def save_drafter(
    head: EagleHead, folder: str | Path, layout: str | None = None, *, target=None, verifier: str | None = None,
    dtype: torch.dtype | None = None,
) -> Path:  # fmt: skip
    """Writes `config.json` and `model.safetensors` in a layout of other projects and returns the folder. Both files are
    written whole or not at all.

    `load_drafter` reads it. vLLM 0.32 runs EAGLE-3 heads in both layouts. Of EAGLE-1 heads it takes, by its source, those of
    layout "eagle" whose `fc` has no bias.

    Args:
        head: what to write.
        folder: made if it is not there.
        layout: "eagle3" (official), "eagle" (EAGLE-1 and -2), or "speculators" for either; by default the official one.
        target: the head's target, for what a head does not know: its name and its context. What equals the target's is left out
            where engines take it from there: an output matrix over the whole vocabulary.
        verifier: the target's name in speculators' files, which an engine may load it by; by default the one that `target` was
            loaded by, unless that is a folder of this machine.
        dtype: of the tensors; the head's by default.

    Raises:
        TypeError: an argument of another type.
        ValueError: a layout that cannot hold this head, or an EAGLE-3 head that other engines cannot run.
        OSError: the files cannot be written.
    """
    if not isinstance(head, EagleHead):
        raise TypeError(f"head: expected an EagleHead, got {shown(head)}")
    if not isinstance(folder, (str, os.PathLike)):
        raise TypeError(f"folder: expected a str or a path, got {shown(folder)}")
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: expected a torch.dtype or None, got {shown(dtype)}")
    config, folder = head.config, Path(folder)
    official = "eagle" if config.version == 1 else "eagle3"
    layout = official if layout is None else layout
    if layout not in (official, "speculators"):
        raise ValueError(f"layout: expected {official} or speculators for this head, got {layout!r}")
    strange = sorted({"embedding_layernorm", "input_layernorm", "norm"} & {*config.norms}) if layout == "eagle" else []
    if strange:
        raise ValueError(f"layout: expected speculators for a head with {', '.join(strange)}, which eagle has no place for")
    if target is not None and config.version == 3 and max(config.aux_layers) >= _Target.of(target).layers:
        raise ValueError(f"head: expected aux layers below {max(config.aux_layers)}, whose final norm other engines leave out")
    tensors = _tensors_of(head, layout)
    if target is not None and head.draft_to_target is None:
        output = target.get_output_embeddings().weight
        if output.shape == head.lm_head.weight.shape and torch.equal(head.lm_head.weight, output):
            del tensors["lm_head.weight"]
    dtype = head.fc.weight.dtype if dtype is None else dtype
    tensors = {key: (one.to(dtype) if one.is_floating_point() else one).cpu().contiguous() for key, one in tensors.items()}
    tensors = {key: one.clone() for key, one in tensors.items()}  # tensors that share memory cannot go into one file
    if verifier is None:
        verifier = getattr(target, "name_or_path", None) or None
        verifier = None if verifier and Path(verifier).exists() else verifier
    written = _config_of(config, layout, target, verifier, str(dtype).removeprefix("torch."))
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(folder / "config.json") as about, replacing(folder / "model.safetensors") as weights:
            write_tensors(save_file, tensors, weights, {"format": "pt"})
            about.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    except BaseException:
        if is_new:
            folder.rmdir()
        raise
    return folder


# Files


@dataclass(frozen=True)
class _Tensor:
    """A tensor of a file, read when it is asked for."""

    shape: tuple[int, ...]
    dtype: str
    floating: bool
    read: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class _Files:
    """A configuration and tensors by the names they have there."""

    path: str
    name: str
    config: dict[str, Any]
    tensors: dict[str, _Tensor]


def _find(path: str | Path, allow_pickle: bool, revision: str | None, *, local: bool = False) -> _Files:
    if not isinstance(path, (str, os.PathLike)):
        raise CheckpointError(f"path: expected a folder, a file or a repository of the hub, got {shown(path)}")
    place = Path(path)
    name = place.resolve().name if place.is_dir() else place.resolve().parent.name if place.is_file() else str(path)
    if not place.exists():
        if local or not REPOSITORY.fullmatch(str(path)):
            raise CheckpointError(f"path: expected a folder, a file or a repository of the hub, found none at {path}")
        place, name = _download(str(path), allow_pickle, revision), str(path).rpartition("/")[2]
    folder = place if place.is_dir() else place.parent
    tensors: dict[str, _Tensor] = {}
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
    return _Files(str(path), name, config, tensors)


def _download(repository: str, allow_pickle: bool, revision: str | None) -> Path:
    """The local copy of a repository, fetched where there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    wanted = ["config.json", "*.safetensors", "*.safetensors.index.json"]
    wanted += ["*.bin", "*.bin.index.json"] if allow_pickle else []
    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=wanted, local_files_only=True))
        if (folder / "config.json").exists() and any(folder.glob("*.safetensors")):
            _weights_in(folder, allow_pickle)  # all of them
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
    """The files that hold the weights of a folder, or the file itself."""
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
    """The file of this name, or those that its index names."""
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


def _tensors_in(file: Path) -> dict[str, _Tensor]:
    if file.suffix in PICKLES:
        try:
            found = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever the bytes make of the reader
            raise CheckpointError(f"{file}: expected a pickle of tensors that can be read ({error})") from error
        found = found.get("state_dict", found) if isinstance(found, dict) else {}
        if not found or not all(isinstance(one, torch.Tensor) for one in found.values()):
            raise CheckpointError(f"{file}: expected a pickle of tensors by name, got something else")
        return {
            key: _Tensor(tuple(one.shape), str(one.dtype).removeprefix("torch."), one.is_floating_point(), lambda one=one: one)
            for key, one in found.items()
        }
    try:
        with safe_open(file, "pt") as opened:
            if "hedgespec" in (opened.metadata() or {}).get("format", ""):
                raise CheckpointError(f"{file}: expected an EAGLE head as on the hub, got a head of HedgeSpec's zoo: "
                                      "hedgespec.zoo.storage.load_head reads it")  # fmt: skip
            slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118  it is no dict
            about = {key: (tuple(one.get_shape()), one.get_dtype()) for key, one in slices.items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: expected a readable safetensors file ({error})") from error
    return {
        key: _Tensor(shape, DTYPES.get(kind, kind), kind != "BOOL" and kind[0] in "FB", lambda key=key: _read(file, key))
        for key, (shape, kind) in about.items()
    }


def _read(file: Path, key: str) -> torch.Tensor:
    with safe_open(file, "pt") as opened:
        return opened.get_tensor(key)


# What they mean


@dataclass(frozen=True)
class _Target:
    """What a head has to fit."""

    layers: int
    hidden_size: int
    vocab_size: int
    embedding: tuple[int, ...]
    output: tuple[int, ...]

    @classmethod
    def of(cls, target) -> _Target:
        config, output = target.config.get_text_config(decoder=True), target.get_output_embeddings()
        return cls(
            config.num_hidden_layers, config.hidden_size, config.vocab_size, tuple(target.get_input_embeddings().weight.shape),
            () if output is None else tuple(output.weight.shape),
        )  # fmt: skip


def _plain(name: str) -> tuple[str, int | None]:
    """A tensor's name without what wraps it, and the number of the layer that it is in: `layer.` in front says so."""
    name = WRAPPERS.sub("", name)
    found = LAYER.match(name)
    if found:
        return f"layer.{name[found.end() :]}", int(found["number"] or 0)
    return SYNONYMS.get(name, name), None


def _version_of(files: _Files) -> int | None:
    """3 for EAGLE-3, 1 for EAGLE-1 and -2, None for what is no EAGLE head."""
    shapes = {_plain(key)[0]: one.shape for key, one in files.tensors.items()}
    if not {"fc.weight", "layer.self_attn.q_proj.weight"} & shapes.keys() or "layer.self_attn.o_proj.weight" not in shapes:
        return None
    queries, output = (shapes.get(f"layer.self_attn.{one}_proj.weight", (0, 0)) for one in "qo")
    if "layer.hidden_norm.weight" in shapes or any("midlayer." in key for key in files.tensors):
        return 3
    if len(queries) == len(output) == 2 and queries[1] == 2 * output[0]:
        return 3
    return 1 if "fc.weight" in shapes else None


class _Plan:
    """A checkpoint understood: the head's configuration, what of the file goes where, what is assumed and what is wrong.

    Args:
        files: what lies there.
        target: what it has to fit, if known.
        aux_layers: instead of the configuration's.

    Raises: CheckpointError for what cannot be described at all.
    """

    def __init__(self, files: _Files, target: _Target | None, aux_layers: Sequence[int] | None):
        self.files, self.target = files, target
        self.assumed: list[str] = []
        self.faults: list[str] = []
        self.version = _version_of(files)
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
        if self.faults:
            raise CheckpointError(f"{self.files.path}: " + "; ".join(self.faults))

    def weights(self) -> dict[str, torch.Tensor]:
        """The head's tensors by their names in the module, and `embed_tokens.weight` where the file has one."""
        weights = {key: torch.cat([self.there[one].read() for one in parts]) for key, parts in self.sources.items()}
        if "embed_tokens.weight" in self.there:
            weights["embed_tokens.weight"] = self.there["embed_tokens.weight"].read()
        return weights

    def _shape(self, name: str) -> tuple[int, ...] | None:
        found = self.there.get(name)
        return None if found is None else found.shape

    def _name_tensors(self) -> None:
        """`there`: the tensors by plain names."""
        self.there: dict[str, _Tensor] = {}
        self.origin: dict[str, str] = {}
        numbers = set()
        for key, tensor in self.files.tensors.items():
            name, number = _plain(key)
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

    def _flaw(self, name: str, tensor: _Tensor) -> str | None:
        """What is wrong with a tensor whatever the configuration says: its number of dimensions, and the dtype of a map."""
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
        """What the configuration says, or the default, which is then assumed."""
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

    def _integer(self, name: str, default: int | None, why: str = "") -> int:
        """A size; without one nothing else can be said."""
        found = self.settings.get(name) if default is None else self._setting(name, default, why)
        if found is None or found < 1:
            self.faults.append(f"expected {name} >= 1 in config.json, got {found}")
            self.check()
        return found

    def _norms(self, eagle: dict[str, Any]) -> tuple[str, ...]:
        """Those that are there, or have to be."""
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
        """Whether a head of this version can have the norm; else its tensors are extra."""
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
            if not self.misread:  # else one of them may be there and be at fault
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
        """`vocab_size`, `draft_vocab_size` (None: the whole output matrix of the target) and `vocabulary`, draft ids to ids."""
        maps, target = {name: self.there.get(name) for name in ("d2t", "t2d")}, self.target
        embedded, said = self._shape("embed_tokens.weight"), self.settings.get("vocab_size")
        sizes = [None if maps["t2d"] is None else maps["t2d"].shape[0], embedded and embedded[0], said]
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
        said = self.settings.get("draft_vocab_size")
        if said is None and found is not None and rows is not None and found != total:
            self.assumed.append(f"draft_vocab_size {found}, as the tensors have")
        self.draft_vocab_size = said or found
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
        """`aux_layers`, or None where they depend on the target; returns how many they are."""
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
        """`sources`: of each of the head's tensors the file's, all of which have their shapes."""
        config, known = self.config, {"d2t", "t2d"}
        kv, heads = config.num_key_value_heads * config.head_dim, config.num_attention_heads * config.head_dim
        split = {"qkv_proj": (heads, kv, kv), "gate_up_proj": (config.intermediate_size,) * 2}
        self.sources: dict[str, list[str]] = {}
        expected: dict[str, tuple[int, ...]] = {}
        for name, shape in config.shapes.items():
            stem, kind = name.rsplit(".", 1)
            if stem in FUSED:
                parts = [one if stem == "fc" else f"layer.{one}" for one in FUSED[stem]]
            elif stem in IN_LAYER:
                parts = [f"layer.{IN_LAYER[stem]}"]
            else:
                parts = [re.sub(r"^fc_norm_", "fc_norm.", stem)]
            if stem == "lm_head" and "lm_head.weight" not in self.there:
                continue
            names = [f"{part}.{kind}" for part in parts]
            self.sources[name] = names
            for one, rows in zip(names, split.get(stem, shape[:1])):
                expected[one] = (rows, *shape[1:])
        if "embed_tokens.weight" in self.there:
            expected["embed_tokens.weight"] = (self.vocab_size or self._shape("embed_tokens.weight")[0], config.hidden_size)
        said = {name: self.origin.get(name, name.replace("layer.", self._layer_prefix())) for name in expected}
        for name, shape in expected.items():
            found = self.there.get(name)
            if found is None:
                self.faults.append(f"{said[name]} is missing")
            elif found.shape != shape:
                self.faults.append(f"{said[name]} has shape {found.shape}, expected {shape}")
            elif not found.floating:
                self.faults.append(f"{said[name]} is {found.dtype}, expected floating point")
        extra = sorted(self.origin[name] for name in self.there.keys() - expected.keys() - known)
        self.faults += [f"{name} is not known" for name in extra]

    def _layer_prefix(self) -> str:
        """What stands in front of the layer's tensors in this file."""
        name, origin = next((name, origin) for name, origin in self.origin.items() if name.startswith("layer."))
        return origin.removesuffix(name.removeprefix("layer."))


# Writing


def _tensors_of(head: EagleHead, layout: str) -> dict[str, torch.Tensor]:
    config = head.config
    legacy = layout == "speculators" and config.version == 1
    prefix = "transformer." if legacy else "midlayer." if layout == "eagle3" else "layers.0."
    kv, heads = config.num_key_value_heads * config.head_dim, config.num_attention_heads * config.head_dim
    split = {"qkv_proj": (heads, kv, kv), "gate_up_proj": (config.intermediate_size,) * 2}
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


def _config_of(config: EagleConfig, layout: str, target, verifier: str | None, dtype: str) -> dict[str, Any]:
    """`config.json`, with all that vLLM 0.32, SGLang and we ourselves would otherwise have to assume."""
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
