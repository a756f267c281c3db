"""`hedgespec zoo train`: answers, stores, heads and the acceptance matrix, each made only where it is missing."""

from __future__ import annotations

import hashlib
import json
import subprocess
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hedgespec.errors import ZooError
from hedgespec.utils.paths import cache_dir
from hedgespec.zoo import STAGES, collect, matrix, shards, stores
from hedgespec.zoo.features import Features
from hedgespec.zoo.generation import Llama
from hedgespec.zoo.shards import Row
from hedgespec.zoo.storage import load_head
from hedgespec.zoo.target import load_target
from hedgespec.zoo.train import CHAT, HEADS, JOINT, Recipe, domain_of, train

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hedgespec.drafters.eagle import EagleHead

LINE_SECONDS = 30
"""Time from one line of progress to the next where there is no terminal for a bar."""
GPU_BATCH_TOKENS = 16_384
"""Answer positions of a training step on a GPU."""


def default_data() -> Path:
    """Where collections go unless told otherwise."""
    return cache_dir() / "zoo-data"


def default_heads() -> Path:
    """Where trained heads go unless told otherwise."""
    return cache_dir() / "zoo-heads"


def read_rows(folders: Sequence[Path], frozen: Path | None = None) -> list[Row]:
    """The rows of the folders' shards. What is still in a worker's journal is not read, because it changes.

    Rows of the training side that are near-duplicates of a held-out prompt (of another worker, at the same time) are left out.

    Args:
        folders: of collections.
        frozen: a file that remembers which shards were read. If it exists, the same are read again, whatever was added since,
            so that an interrupted training goes on with the data that it began with.

    Raises: ZooError if there are no shards, or one of the frozen ones is missing or another.
    """
    if frozen is not None and frozen.exists():
        wanted = {Path(name): digest for name, digest in json.loads(frozen.read_text()).items()}
    else:
        for folder in folders:
            if not folder.is_dir():
                raise ZooError(f"data: expected a folder written by `hedgespec zoo collect`, found none at {folder}")
        wanted = {path.resolve(): None for folder in folders for path in sorted(folder.glob(f"*{shards.SUFFIX}"))}
    if not wanted:
        names = ", ".join(map(str, folders))
        raise ZooError(
            f"data: expected shards in {names}, found none; run `hedgespec zoo collect`, or --pack what it has so far"
        )
    rows, digests = [], {}
    for path, digest in wanted.items():
        if not path.exists():
            raise ZooError(f"{frozen}: expected the shard {path}, which training began with; delete it to begin anew")
        data = path.read_bytes()
        digests[str(path)] = hashlib.sha256(data).hexdigest()
        if digest not in (None, digests[str(path)]):
            raise ZooError(f"{path}: expected the shard that training began with, got another; delete {frozen} to begin anew")
        rows += shards.decode(data, str(path))
    if frozen is not None and not frozen.exists():
        frozen.write_text(json.dumps(digests, indent=1) + "\n")
    return collect.one_sided(list(shards.merge(rows).values()))


def smoke_recipe() -> Recipe:
    """A recipe with which the whole chain takes a minute or two; its heads are good for nothing."""
    return Recipe(draft_vocab_size=2048, intermediate_size=256, passes=1, expert_passes=1, batch_tokens=512, depths=(1, 3),
                  expert_depths=(3,), curve_points=2)  # fmt: skip


def recipe_with(settings: Sequence[str], recipe: Recipe | None = None) -> Recipe:
    """A recipe changed by NAME=VALUE pairs. Raises: ValueError for an unknown name or a value of another type."""
    recipe = recipe or Recipe()
    kinds = {field.name: type(getattr(recipe, field.name)) for field in fields(recipe)}
    for setting in settings:
        name, _, text = setting.partition("=")
        if name not in kinds:
            raise ValueError(f"set: expected NAME=VALUE with a name among {', '.join(kinds)}, got {setting!r}")
        try:
            value = tuple(int(part) for part in text.split(",")) if kinds[name] is tuple else kinds[name](text)
        except ValueError as error:
            raise ValueError(f"set: expected {kinds[name].__name__} for {name}, got {text!r}") from error
        changes: dict[str, Any] = {name: value}
        recipe = replace(recipe, **changes)
    return recipe


def smoke_settings() -> collect.Settings:
    """A collection of a few short answers in two domains."""
    domains = ("chat", "math")
    return collect.Settings(domains=domains, goals=dict.fromkeys(domains, 700), cycle=24, slots=16, max_answer=32)


def run(names: Sequence[str] | None = None, stage: str = "all", out: Path | None = None, *, console: Console,
        data: Sequence[Path] = (), smoke: bool = False, settings: Sequence[str] = (),
        keep_features: bool = True) -> Path:  # fmt: skip
    """Makes the zoo's heads and returns the folder they are in. Whatever is there already is gone on with.

    Args:
        names: of `hedgespec.zoo.train.HEADS`; None is all whose domains have rows.
        stage: one of `STAGES`, or "all".
        out: where heads, stores and matrix go; None is a folder in the cache.
        console: where progress is shown.
        data: folders with collected shards; stage "collect" adds to the first. Empty is a folder in the cache.
        smoke: a tiny collection and tiny heads, to see that the whole chain works here.
        settings: NAME=VALUE, changes of the recipe.
        keep_features: whether the target's states are kept on disk (4.6 KB a token) rather than computed at every use.

    Raises: ValueError for an unknown head or stage; ZooError if data are missing or the disk is full.
    """
    for name in names or ():
        if name not in HEADS:
            raise ValueError(f"names: expected among {', '.join(HEADS)}, got {name!r}")
    if stage not in (*STAGES, "all"):
        raise ValueError(f"stage: expected all or one of {', '.join(STAGES)}, got {stage!r}")
    name = "smoke" if smoke else ""
    folder = Path(out) if out else default_heads() / name
    data = [Path(each) for each in data] or [default_data() / name]
    folder.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    recipe = smoke_recipe() if smoke else Recipe()
    if device == "cuda" and not smoke:
        recipe = replace(recipe, batch_tokens=GPU_BATCH_TOKENS)
    recipe = recipe_with(settings, recipe)
    target, tokenizer = load_target(device=device)
    target.requires_grad_(False)
    if stage == "collect" or (stage == "all" and smoke):
        collect.collect(target, tokenizer, data[0], smoke_settings() if smoke else collect.Settings(), console=console)
    if stage == "collect":
        return folder
    rows = read_rows(data, folder / "data.json")
    domains = {domain_of(row) for row in rows if not row.held_out}
    names = tuple(names or (each for each in HEADS if each in domains or (each == JOINT and len(domains) > 1)))
    if stage in ("stores", "all"):
        stores.build(folder, rows, report=console.print)
    if stage in ("heads", "matrix", "all"):
        llama = Llama(target)
        features = Features(llama, rows, folder / "features" if keep_features else None)
        console.print(f"{len(rows)} rows of {', '.join(sorted(domains))}; products in {llama.dtype}", highlight=False)
        if stage in ("heads", "all"):
            _heads(target, features, names, recipe, folder, llama.dtype, data, console)
        if stage in ("matrix", "all"):
            paths = [folder / f"{each}.safetensors" for each in HEADS]
            measure_matrix(target, features, [path for path in paths if path.exists()], folder, console)
    return folder


def _commit() -> str:
    """The commit of the checkout this runs from, or "unknown"."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _heads(target: PreTrainedModel, features: Features, names: Sequence[str], recipe: Recipe, folder: Path, dtype: torch.dtype,
           data: Sequence[Path], console: Console) -> None:  # fmt: skip
    """The stage "heads", with a progress bar a head."""
    places = matrix.held_out_places(features, 24)

    def curve(name: str, head: EagleHead) -> dict:
        domain = name if (name, "greedy") in places else CHAT
        chosen = places.get((domain, "greedy"), [])
        if not chosen:
            return {}
        found = matrix.tokens_per_round(head, features, chosen, sampled=False)
        console.print(f"{name}: {found['tokens_per_round']:.3f} tokens a round on {len(chosen)} held-out rows of {domain}")
        return {"domain": domain, "held_out_rows": len(chosen), "tokens_per_round": found["tokens_per_round"]}

    state = TextColumn("{task.completed}/{task.total} steps; {task.fields[line]}")
    columns = (TextColumn("{task.description}"), BarColumn(), state, TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, refresh_per_second=2) as bars:
        made: dict[str, TaskID] = {}
        said = time.monotonic()

        def progress(name: str, step: int, steps: int, line: str) -> None:
            nonlocal said
            if name not in made:
                made[name] = bars.add_task(name, total=steps, line="")
            bars.update(made[name], completed=step, line=line)
            if not console.is_terminal and time.monotonic() - said > LINE_SECONDS:
                said = time.monotonic()
                console.print(f"{name}: step {step}/{steps} {line}", highlight=False)

        about = {"commit": _commit(), "data": {str(path): _manifest(path) for path in data},
                 "target": "SmolLM2-135M-Instruct (Apache-2.0)"}  # fmt: skip
        train(target, features, names, recipe, folder, licence=about, measure=curve, dtype=dtype, progress=progress)


def _manifest(folder: Path) -> dict:
    """Counts and licences of a collection, as far as its manifest has them."""
    path = folder / "manifest.json"
    if not path.exists():
        return {}
    manifest = json.loads(path.read_text())
    return {key: manifest[key] for key in ("domains", "sources", "shards") if key in manifest}


def measure_matrix(target: PreTrainedModel, features: Features, paths: Sequence[Path], folder: Path, console: Console) -> dict:
    """Measures heads from files, writes the matrix into `folder`, and says what int8 costs where the floats are still there.

    Raises: ZooError if there is no head or no held-out row.
    """
    if not paths:
        raise ZooError(f"heads: expected trained heads in {folder}, found none; run `hedgespec zoo train`")
    heads = [load_head(path, target) for path in paths]
    result = matrix.measure(heads, features, report=console.print)
    if not result["rows"]:
        raise ZooError("data: expected held-out rows, got none; collect more")
    losses = {}
    for head, path in zip(heads, paths, strict=True):
        exact = path.with_name(f"{head.name}.float.pt")
        place = matrix.held_out_places(features, 40).get(
            (head.name if head.name in result["rows"]["greedy"] else CHAT, "greedy")
        )
        if exact.exists() and place:
            compact = matrix.tokens_per_round(head, features, place, sampled=False)["tokens_per_round"]
            head.load_state_dict(torch.load(exact, weights_only=True, map_location=target.device))
            whole = matrix.tokens_per_round(head, features, place, sampled=False)["tokens_per_round"]
            losses[head.name] = {"int8": compact, "float32": whole, "loss": round(1 - compact / whole, 5)}
    result["int8"] = losses
    matrix.write(result, folder)
    console.print(matrix.table(result), markup=False)
    return result


def matrix_of(
    heads: Sequence[str], data: Sequence[Path], out: Path | None, *, console: Console, keep_features: bool = True
) -> dict:
    """`hedgespec zoo matrix`: measures heads, each a file or the name of a shipped head, on the held-out rows of `data`.

    Args:
        heads: empty is all that `hedgespec zoo train` left in the cache.
        data: folders with shards; empty is the cache's.
        out: where matrix.json, matrix.md and matrix.svg go; None is the folder of the trained heads.
        console: where the table is shown.
        keep_features: whether the target's states are kept on disk.
    """
    from hedgespec import zoo

    folder = Path(out) if out else default_heads()
    target, _ = load_target(device="cuda" if torch.cuda.is_available() else "cpu")
    rows = [row for row in read_rows([Path(each) for each in data] or [default_data()]) if row.held_out]
    paths = [zoo.head_path(head) if head in zoo.NAMES else Path(head) for head in heads]
    paths = paths or [path for path in (folder / f"{each}.safetensors" for each in HEADS) if path.exists()]
    features = Features(Llama(target), rows, folder / "features" if keep_features else None)
    return measure_matrix(target, features, paths, folder, console)
