"""Loads what the commands name: targets, tokenizers, drafters, texts."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hedgespec.cli.arguments import UsageError
from hedgespec.cli.output import _Console
from hedgespec.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hedgespec.drafters import Drafter


def _load(target_folder: Path | None, specs: Sequence[str] | None, allow_pickle: bool) -> tuple[Any, Any, list]:
    """Returns the target, its tokenizer and the drafters. Names are checked before anything is read."""
    from hedgespec import zoo
    from hedgespec.drafters.checkpoint_files import REPOSITORY, WEIGHTS
    from hedgespec.zoo.target import load_target

    specs = specs or zoo.NAMES
    for spec in specs:
        known = spec in (*zoo.NAMES, "ngram") or Path(spec).exists() or Path(spec).suffix in WEIGHTS
        if not known and not REPOSITORY.fullmatch(spec):
            raise UsageError(
                f"argument --drafter: expected one of {', '.join(zoo.NAMES)}, ngram, a .safetensors file, "
                f"the folder of a head or a model, or a repository of the hub, got {spec!r}"
            )
    if repeated := {spec for spec in specs if specs.count(spec) > 1}:
        raise UsageError(f"argument --drafter: expected each once, got {', '.join(sorted(repeated))} again")
    with _Console(stderr=True).status("loading", spinner="line"):  # this spinner works in ASCII terminals
        if target_folder is None:
            target, tokenizer = load_target()
        else:
            target, tokenizer = _load_model(target_folder, "auto"), _load_tokenizer(target_folder)
        return target, tokenizer, [_load_drafter(spec, target, tokenizer, allow_pickle) for spec in specs]


def _load_drafter(spec: str, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, allow_pickle: bool) -> Drafter:
    from hedgespec import zoo
    from hedgespec.drafters.causal_lm import CausalLMDrafter
    from hedgespec.drafters.checkpoint_files import PICKLES, WEIGHTS
    from hedgespec.drafters.checkpoints import is_head, load_drafter
    from hedgespec.drafters.datastore import Datastore, DatastoreDrafter, is_datastore
    from hedgespec.drafters.ngram import NGramDrafter
    from hedgespec.zoo.storage import load_head

    if spec == "ngram":
        return NGramDrafter(target.config.vocab_size)
    if spec not in zoo.NAMES and is_datastore(spec):
        return DatastoreDrafter(Datastore.load(spec), target.config.vocab_size, Path(spec).stem)
    absent = not Path(spec).exists() and Path(spec).suffix not in WEIGHTS
    if spec not in zoo.NAMES and (absent or is_head(spec, allow_pickle=allow_pickle)):
        return load_drafter(spec, target, allow_pickle=allow_pickle)
    if spec not in zoo.NAMES and Path(spec).is_dir():
        endings = {file.suffix for file in Path(spec).iterdir()}
        if not allow_pickle and ".safetensors" not in endings and not endings.isdisjoint(PICKLES):
            raise CheckpointError(
                f"--drafter: expected a folder with a causal language model in safetensors, or an EAGLE head, got {spec} with "
                "pickled weights, which may run code when read: those of a head --allow-pickle reads, restricted to tensors"
            )
        model = _load_model(Path(spec), target.dtype).to(target.device)
        tokenizers = {}
        if (Path(spec) / "tokenizer_config.json").exists():
            tokenizers = {"tokenizer": _load_tokenizer(Path(spec)), "target_tokenizer": tokenizer}
        return CausalLMDrafter(model, target, name=Path(spec).resolve().name, **tokenizers)
    return load_head(zoo.head_path(spec) if spec in zoo.NAMES else spec, target)


def _load_model(folder: Path, dtype: torch.dtype | str) -> PreTrainedModel:
    """Loads a causal language model from a local folder of safetensors. No network, no pickles, no missing weights."""
    from transformers import AutoModelForCausalLM

    with _reading(folder, "a folder with a causal language model in safetensors"):
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
        if missing := sorted(report["missing_keys"]):  # transformers would use random ones
            raise ValueError(f"{len(missing)} weights are missing, the first is {missing[0]}")
    return model.eval()


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    with _reading(folder, "a folder with a tokenizer"):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _find_tokenizer(spec: str) -> PreTrainedTokenizerBase:
    """Loads a tokenizer from a folder or a repository of the hub."""
    from hedgespec.drafters.checkpoint_files import REPOSITORY

    if Path(spec).is_dir() or not REPOSITORY.fullmatch(spec):
        return _load_tokenizer(Path(spec))
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(spec)
    except Exception as error:
        raise CheckpointError(
            f"--tokenizer: expected a tokenizer's folder or a repository of the hub that can be reached, got {spec} ({error})"
        ) from error


TO_UTF_8 = "iconv -t utf-8 converts it"


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected a text in UTF-8, got what is none ({error}); {TO_UTF_8}") from error


def _read_stdin() -> str:
    """Returns the text on stdin, read as UTF-8 in any terminal, with any line ends."""
    if not hasattr(sys.stdin, "buffer"):
        return sys.stdin.read()
    try:
        return io.TextIOWrapper(io.BytesIO(sys.stdin.buffer.read()), encoding="utf-8").read()
    except UnicodeDecodeError as error:
        raise ValueError(f"PROMPT: expected a text in UTF-8 on stdin, got what is none ({error}); {TO_UTF_8}") from error


def _argument(name: str, value: str) -> str:
    """Returns an argument as text, also if Python decoded the command line in another encoding than UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError:
        try:
            return os.fsencode(value).decode()
        except UnicodeError as error:
            raise UsageError(f"{name}: expected a text in UTF-8, got what is none ({error}); {TO_UTF_8}") from error
    return value


@contextmanager
def _reading(folder: Path, expected: str) -> Iterator[None]:
    """Turns any error of transformers' readers into a CheckpointError that names what was expected."""
    if not folder.is_dir():
        raise CheckpointError(f"expected {expected}, got {folder}, which is no folder")
    try:
        yield
    except Exception as error:
        raise CheckpointError(f"expected {expected}, got {folder} ({error})") from error


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool) -> list[int]:
    if not chat:
        return tokenizer(prompt).input_ids
    if not tokenizer.chat_template:
        raise ValueError("--chat: expected a target with a chat template, got one without")
    turns = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False).input_ids


STORE = "datastore"
"""Prefix of the role of the zoo's datastores."""


def _is_head(role: str) -> bool:
    return role != "target" and not role.startswith(STORE)


def _draft_vocabulary(path: Path) -> int:
    """Returns the size of a head's draft vocabulary, from the header of its file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            return file.get_slice("draft_to_target").get_shape()[0]
    except SafetensorError as error:
        raise CheckpointError(f"expected a head in the zoo's format, got {path} ({error})") from error


def _check_heads(argument: str, names: Sequence[str]) -> None:
    from hedgespec.zoo import NAMES

    for name in names:
        if name not in NAMES:
            raise UsageError(f"argument {argument}: expected one of {', '.join(NAMES)}, got {name!r}")
