"""The commands: each takes the parsed options, calls the package and prints.

torch and transformers are imported inside the commands, so that help and errors of the command line appear at once.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

import hedgespec
from hedgespec.cli.arguments import LAYOUTS, UsageError, _tree
from hedgespec.cli.models import (
    STORE,
    _argument,
    _check_heads,
    _draft_vocabulary,
    _encode,
    _find_tokenizer,
    _is_head,
    _load,
    _read_stdin,
    _read_text,
)
from hedgespec.cli.output import TextStream, _Console, _print_json, _role, _stats, _to_json, _wide_console, _words
from hedgespec.config import DecodeConfig
from hedgespec.errors import CheckpointError, HedgeSpecError
from hedgespec.utils.files import write_text

if TYPE_CHECKING:
    from hedgespec.stats import DecodeStats


def generate(options: argparse.Namespace) -> None:
    prompt = _read_stdin().removesuffix("\n") if options.prompt == "-" else _argument("PROMPT", options.prompt)
    if not prompt:
        raise UsageError("PROMPT: expected some text, got none")
    config = _config(options)
    if isinstance(options.profile, Path):
        import matplotlib  # noqa: F401  a missing package is reported before decoding, not after it
    target, tokenizer, drafters = _load(options.target, options.drafter, options.allow_pickle)
    decoder = hedgespec.Decoder(target, drafters, config)
    state = None
    if options.learner_state and options.learner_state.exists():
        state = hedgespec.load_learner_state(options.learner_state, decoder)
    prompt_ids = _encode(tokenizer, prompt, options.chat)
    stream = TextStream(tokenizer, prompt_ids)
    pieces: list[str] = []

    def show(piece: str) -> None:
        pieces.append(piece)
        if not options.json:
            print(piece, end="", flush=True)

    import torch

    from hedgespec.runtime.target import device_of
    from hedgespec.stats import profiled

    with profiled(device_of(target)) if options.profile else nullcontext():
        out = decoder.generate(
            torch.tensor(prompt_ids, dtype=torch.int64), max_new_tokens=options.max_new_tokens, temperature=options.temperature,
            top_k=options.top_k, top_p=options.top_p, min_p=options.min_p, seed=options.seed, learner_state=state,
            on_tokens=lambda _, tokens: show(stream.push(tokens)),
        )  # fmt: skip
    show(stream.end())
    if options.json:
        tokens = out.sequences[0, len(prompt_ids) :].tolist()
        _print_json({"text": "".join(pieces), "tokens": tokens, "stats": out.stats[0].to_dict()})
    else:
        print(flush=True)
    _finish(options, out.stats[0])


def _config(options: argparse.Namespace) -> DecodeConfig:
    """Returns the configuration of `generate`. Raises UsageError for options that cannot be combined."""
    try:
        return DecodeConfig(
            draft_length=options.draft_length,
            proposal=options.proposal,
            learner=options.learner,
            objective=options.objective,
            evaluate_every=options.evaluate_every,
            warm_start=options.warm_start,
            compile=options.compile,
            tree=_tree(options),
        )
    except ValueError as error:
        raise UsageError(error) from error


def _finish(options: argparse.Namespace, stats: DecodeStats) -> None:
    """Writes what `generate` was asked for beside the text: learner state, statistics and profile."""
    from hedgespec.stats import plot_profile, profile_table

    if options.learner_state:
        hedgespec.save_learner_state(options.learner_state, stats)
    if options.stats:
        _wide_console(stderr=True).print(_stats(stats))
    if options.profile:
        _wide_console(stderr=True).print(profile_table([stats]))
    if isinstance(options.profile, Path):
        plot_profile([("request", stats)], options.profile)


def inspect(options: argparse.Namespace) -> None:
    from dataclasses import asdict

    from hedgespec.drafters.checkpoints import inspect_drafter

    found = inspect_drafter(options.path, allow_pickle=options.allow_pickle)
    if options.json:
        _print_json(asdict(found))
        return
    table = Table("tensor", "shape", box=None)
    for name, shape in sorted(found.tensors.items()):
        table.add_row(escape(name), escape(str(list(shape))))
    whole = "the target's" if found.vocab_size is None else str(found.vocab_size)
    drafted = "all" if found.draft_vocab_size is None else str(found.draft_vocab_size)
    layers = "depend on the target" if found.aux_layers is None else ", ".join(map(str, found.aux_layers))
    lines = [f"format: {found.format}, {found.dtype}", f"draft vocabulary: {drafted} of {whole}", f"aux layers: {layers}"]
    lines += [f"{name}: {_words(value)}" for name, value in found.variant.items()]
    for title, entries in (("assumed", found.assumed), ("refused, since", found.faults)):
        lines += [f"{title}:", *(f"  {entry}" for entry in entries)] if entries else []
    _wide_console().print(Group(*map(escape, lines), table))


def datastore(options: argparse.Namespace) -> None:
    import numpy as np

    from hedgespec.drafters.datastore import Datastore

    texts = [_read_text(file) for file in options.files]
    tokenizer = _find_tokenizer(options.tokenizer)
    sequences = [np.array(tokenizer(text, add_special_tokens=False).input_ids, np.int64) for text in texts]
    built = Datastore.build(sequences, options.max_ngram)
    built.save(options.out)
    print(f"{options.out}: {len(built)} entries from {sum(map(len, sequences))} tokens")


def demo(options: argparse.Namespace) -> None:
    from hedgespec.zoo.demo import run

    result = run(
        prompts_per_domain=options.prompts,
        max_new_tokens=options.max_new_tokens,
        draft_length=options.draft_length,
        temperature=options.temperature,
        seed=options.seed,
        compile=options.compile,
        plot=options.plot,
        profile=options.profile,
        console=_Console(stderr=options.json == "-"),  # stdout then has the JSON only
    )
    if options.json == "-":
        _print_json(result)
    elif options.json:
        write_text(options.json, _to_json(result) + "\n")


def zoo_list(options: argparse.Namespace) -> None:
    from hedgespec import zoo
    from hedgespec.utils.paths import cache_dir
    from hedgespec.zoo.stores import store_path
    from hedgespec.zoo.target import NAME

    files = [(NAME, "target", cache_dir() / NAME / "model.safetensors")]
    files += [(name, _role(name), zoo.head_path(name)) for name in zoo.NAMES]
    files += [(name, f"{STORE}: {'all' if name == zoo.GENERALIST else name}", store_path(name)) for name in zoo.NAMES]
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "role": role,
            "bytes": path.stat().st_size if path.exists() else None,
            "draft_vocabulary": _draft_vocabulary(path) if path.exists() and _is_head(role) else None,
            "path": str(path),
        }
        for name, role, path in files
    ]
    if options.json:
        _print_json(rows)
        return
    table = Table("name", "domain or role", box=None)
    table.add_column("MB", justify="right")
    table.add_column("draft vocabulary", justify="right")
    table.add_column("where")
    for row in rows:
        size = "not there" if row["bytes"] is None else f"{row['bytes'] / 1e6:.1f}"
        vocabulary = "" if row["draft_vocabulary"] is None else str(row["draft_vocabulary"])
        table.add_row(row["name"], row["role"], size, vocabulary, escape(row["path"]))
    _wide_console().print(table)


def zoo_path(options: argparse.Namespace) -> None:
    from hedgespec import zoo
    from hedgespec.zoo.target import target_path

    if options.name is None:
        print(target_path())
        return
    _check_heads("NAME", [options.name])
    path = zoo.head_path(options.name)
    if not path.exists():
        raise CheckpointError(f"the head {options.name}: expected a file at {path}, found none")
    print(path)


def zoo_pool(options: argparse.Namespace) -> None:
    from hedgespec import zoo
    from hedgespec.zoo.stores import store_path

    stores = [{"type": "datastore", "name": name, "path": str(store_path(name))} for name in zoo.EXPERTS]
    drafters = [*stores, {"type": "ngram", "name": "lookup"}]
    if options.heads is not None:
        drafters = [{"type": "eagle3", "name": name, "model": str((options.heads / name).resolve())} for name in zoo.NAMES]
        if absent := [one["model"] for one in drafters if not Path(one["model"]).is_dir()]:
            raise UsageError(f"argument --heads: expected a folder written by `hedgespec zoo export`, got none at {absent[0]}")
    _print_json({"drafters": drafters})


def zoo_collect(options: argparse.Namespace) -> None:
    from hedgespec.zoo.sources import DOMAINS, GOALS, check_domains

    check_domains(tuple(options.domains or ()))
    from hedgespec.zoo import collect
    from hedgespec.zoo.pipeline import default_data
    from hedgespec.zoo.target import load_target

    folder = options.out or default_data()
    if options.pack:
        path = collect.pack(folder, options.pack)
        print(f"{path}: {path.stat().st_size} bytes" if path else f"{options.pack} already has every row of {folder}")
        return
    settings = collect.Settings(
        domains=tuple(options.domains or DOMAINS), goals={name: int(GOALS[name] * options.scale) for name in DOMAINS},
        prompts=options.prompts, already=tuple(options.already or ()), seed=options.seed, minutes=options.minutes,
    )  # fmt: skip
    # The other workers get the same arguments, except their number.
    command = [sys.executable, "-m", "hedgespec", *sys.argv[1:], "--workers", "1"]
    model, tokenizer = load_target()
    collect.collect(model, tokenizer, folder, settings, console=_Console(), workers=options.workers, command=command)


def zoo_train(options: argparse.Namespace) -> None:
    from hedgespec.zoo.pipeline import run
    from hedgespec.zoo.train import HEADS

    names = tuple(options.only) if options.only else None
    for name in names or ():
        if name not in HEADS:
            raise UsageError(f"argument --only: expected names among {', '.join(HEADS)}, got {name!r}")
    run(names=names, stage=options.stage, out=options.out, console=_Console(), data=tuple(options.data or ()),
        smoke=options.smoke, settings=tuple(options.settings or ()), keep_features=not options.no_features)  # fmt: skip


def zoo_matrix(options: argparse.Namespace) -> None:
    from hedgespec.zoo.pipeline import matrix_of

    matrix_of(tuple(options.head or ()), tuple(options.data or ()), options.out, console=_Console(),
              keep_features=not options.no_features)  # fmt: skip


def zoo_export(options: argparse.Namespace) -> None:
    _check_heads("--only", options.only or ())
    import torch

    from hedgespec import zoo

    loaded = zoo.load_zoo(options.only or zoo.NAMES)
    for head in loaded.drafters:
        folder = options.folder / head.name
        dtype = getattr(torch, options.dtype)
        layout = LAYOUTS[options.layout]
        hedgespec.save_drafter(head, folder, layout, target=loaded.target, verifier=options.verifier, dtype=dtype)
        print(folder)


def doctor(options: argparse.Namespace) -> None:
    import hedgespec.decoder  # noqa: F401  the operations register their backends when they are imported
    from hedgespec.cli.doctor import describe, failures
    from hedgespec.ops import backends

    report = backends.report(self_tests=True)
    if options.json:
        _print_json(report)
    else:
        print(describe(report))
    if failed := failures(report):
        raise HedgeSpecError(f"{len(failed)} self-test(s) of kernels failed: {failed[0]}")
