"""The command line: parses, calls the package, prints.

torch and transformers are imported only once there is work for them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table

import hedgespec
from hedgespec.config import CHOICES, DecodeConfig, Tree
from hedgespec.errors import CheckpointError, HedgeSpecError

USER_ERRORS = (HedgeSpecError, ValueError, TypeError, OSError, ImportError)
"""What is told in one line; anything else is a bug of ours and keeps its traceback."""
STAGES = ("collect", "stores", "heads", "matrix", "all")
"""Of `hedgespec zoo train`."""
LAYOUTS = {"official": "eagle3", "speculators": "speculators"}
"""Of `hedgespec zoo export`, and what `save_drafter` calls them."""
EXPORTED = ("float32", "bfloat16", "float16")
"""Dtypes of exported heads."""
REPORT = "results.md"
"""Of `hedgespec experiment report`, in the folder of the experiments."""


class UsageError(Exception):
    """A command line that cannot be meant: exit code 2."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 1 after an error, 2 for wrong usage, 130 after Ctrl-C."""
    try:
        try:
            options = _parser().parse_args(argv)
            with _quiet():
                options.run(options)
        finally:
            sys.stdout.flush()  # while a closed pipe can still be caught
        return 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has seen enough; at exit Python would try again to write the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (UsageError, *USER_ERRORS) as error:
        if os.environ.get("HEDGESPEC_DEBUG"):
            traceback.print_exc()
        _say("error", error)
        return 2 if isinstance(error, UsageError) else 1


# Commands


def generate(options: argparse.Namespace) -> None:
    prompt = sys.stdin.read().removesuffix("\n") if options.prompt == "-" else options.prompt
    if not prompt:
        raise UsageError("PROMPT: expected some text, got none")
    try:
        config = DecodeConfig(
            draft_length=options.draft_length,
            mode=options.mode,
            learner=options.learner,
            objective=options.objective,
            evaluate_every=options.evaluate_every,
            warm_start=options.warm_start,
            compile=options.compile,
            tree=_tree(options),
        )
    except ValueError as error:  # each option is right by itself, and they do not go together
        raise UsageError(error) from error
    if isinstance(options.profile, Path):
        import matplotlib  # noqa: F401  missing, it is missed now and not after the text
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

    from hedgespec.metrics import plot_profile, profile_table, profiled
    from hedgespec.target import device_of

    with profiled(device_of(target)) if options.profile else nullcontext():
        out = decoder.generate(
            torch.tensor(prompt_ids, dtype=torch.int64),
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            seed=options.seed,
            learner_state=state,
            on_tokens=lambda _, tokens: show(stream.push(tokens)),
        )
    show(stream.end())
    if options.json:
        tokens = out.sequences[0, len(prompt_ids) :].tolist()
        _print_json({"text": "".join(pieces), "tokens": tokens, "stats": out.stats[0].to_dict()})
    else:
        print(flush=True)
    if options.learner_state:
        hedgespec.save_learner_state(options.learner_state, out.stats[0])
    if options.stats:
        _wide_console(stderr=True).print(_stats(out.stats[0]))
    if options.profile:
        _wide_console(stderr=True).print(profile_table(out.stats))
    if isinstance(options.profile, Path):
        plot_profile([("request", out.stats[0])], options.profile)


def inspect(options: argparse.Namespace) -> None:
    from dataclasses import asdict

    from hedgespec.checkpoints import inspect_drafter

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
        console=Console(stderr=options.json == "-"),  # stdout then holds the JSON alone
    )
    if options.json == "-":
        _print_json(result)
    elif options.json:
        Path(options.json).write_text(_to_json(result) + "\n", encoding="utf-8")


def experiment(options: argparse.Namespace) -> None:
    from hedgespec import experiments

    if options.name == "report":
        from hedgespec.experiments import report

        path = options.report or options.out / REPORT
        report.write(options.out, path)
        print(path)
        return
    if options.report is not None:
        raise UsageError(f"argument --report: expected it with report, got it with {options.name}")
    names = experiments.NAMES if options.name == "all" else (options.name,)
    experiments.run(names, options.out, seeds=options.seeds, fresh=options.fresh, console=_wide_console(stderr=True))


def zoo_list(options: argparse.Namespace) -> None:
    from hedgespec import zoo
    from hedgespec.paths import cache_dir
    from hedgespec.zoo.stores import store_path
    from hedgespec.zoo.target import NAME

    files = [(NAME, "target", cache_dir() / NAME / "model.safetensors")]
    files += [(name, _role(name), zoo.head_path(name)) for name in zoo.NAMES]
    files += [(name, f"{STORE}: {'all' if name == zoo.GENERALIST else name}", store_path(name)) for name in zoo.NAMES]
    rows = [
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
    # Other workers take the same arguments, but for their number.
    command = [sys.executable, "-m", "hedgespec", *sys.argv[1:], "--workers", "1"]
    model, tokenizer = load_target()
    collect.collect(model, tokenizer, folder, settings, console=Console(), workers=options.workers, command=command)


def zoo_train(options: argparse.Namespace) -> None:
    from hedgespec.zoo.pipeline import run

    names = tuple(options.only) if options.only else None
    run(names=names, stage=options.stage, out=options.out, console=Console(), data=tuple(options.data or ()),
        smoke=options.smoke, settings=tuple(options.settings or ()), keep_features=not options.no_features)  # fmt: skip


def zoo_matrix(options: argparse.Namespace) -> None:
    from hedgespec.zoo.pipeline import matrix_of

    matrix_of(tuple(options.head or ()), tuple(options.data or ()), options.out, console=Console(),
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
    from hedgespec import backends
    from hedgespec.doctor import describe

    report = backends.report()
    if options.json:
        _print_json(report)
    else:
        print(describe(report))


# Models


def _load(target_folder: Path | None, specs: Sequence[str] | None, allow_pickle: bool) -> tuple[Any, Any, list]:
    """The target, its tokenizer and the drafters; names are checked before anything is read."""
    from hedgespec import zoo
    from hedgespec.checkpoints import REPOSITORY, WEIGHTS
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
    with Console(stderr=True).status("loading"):
        if target_folder is None:
            target, tokenizer = load_target()
        else:
            target, tokenizer = _load_model(target_folder, "auto"), _load_tokenizer(target_folder)
        return target, tokenizer, [_load_drafter(spec, target, tokenizer, allow_pickle) for spec in specs]


def _load_drafter(spec: str, target, tokenizer, allow_pickle: bool):
    from hedgespec import zoo
    from hedgespec.checkpoints import PICKLES, WEIGHTS, is_head, load_drafter
    from hedgespec.drafters.causal_lm import CausalLMDrafter
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


def _load_model(folder: Path, dtype):
    """A causal LM from a local folder of safetensors: never the network, never a pickle, never weights made up."""
    from transformers import AutoModelForCausalLM

    with _reading(folder, "a folder with a causal language model in safetensors"):
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
        if missing := sorted(report["missing_keys"]):  # transformers would go on with random ones
            raise ValueError(f"{len(missing)} weights are missing, the first is {missing[0]}")
    return model.eval()


def _load_tokenizer(folder: Path):
    from transformers import AutoTokenizer

    with _reading(folder, "a folder with a tokenizer"):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _find_tokenizer(spec: str):
    """A tokenizer from a folder, or by the name of a repository of the hub."""
    from hedgespec.checkpoints import REPOSITORY

    if Path(spec).is_dir() or not REPOSITORY.fullmatch(spec):
        return _load_tokenizer(Path(spec))
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(spec)
    except Exception as error:
        raise CheckpointError(
            f"--tokenizer: expected a tokenizer's folder or a repository of the hub that can be reached, got {spec} ({error})"
        ) from error


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected a text in UTF-8, got what is none ({error})") from error


@contextmanager
def _reading(folder: Path, expected: str) -> Iterator[None]:
    """Turns whatever the readers behind transformers raise into one error that says what was expected."""
    if not folder.is_dir():
        raise CheckpointError(f"expected {expected}, got {folder}, which is no folder")
    try:
        yield
    except Exception as error:
        raise CheckpointError(f"expected {expected}, got {folder} ({error})") from error


def _encode(tokenizer, prompt: str, chat: bool) -> list[int]:
    if not chat:
        return tokenizer(prompt).input_ids
    if not tokenizer.chat_template:
        raise ValueError("--chat: expected a target with a chat template, got one without")
    turns = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False).input_ids


class TextStream:
    """Tokens to text as they come, never a part of a character.

    Args:
        tokenizer: a transformers tokenizer.
        prompt_ids: the text goes on from here: some tokenizers write a word differently at the start of a text.
    """

    def __init__(self, tokenizer, prompt_ids: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._tokens = list(prompt_ids[-8:])
        self._said = len(self._tokens)
        """Tokens whose text is out; those that follow may end within a character."""

    def push(self, tokens: Sequence[int]) -> str:
        """What these tokens add, short of an unfinished character."""
        return "".join(self._push_one(token) for token in tokens)

    def _push_one(self, token: int) -> str:
        self._tokens.append(token)
        piece = self._unsaid()
        if not piece or piece.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        # The next piece is read behind this one alone, so that the cost of a piece does not grow with the text.
        self._tokens = self._tokens[self._said :]
        self._said = len(self._tokens)
        return piece

    def end(self) -> str:
        """What was still held back."""
        return self._unsaid()

    def _unsaid(self) -> str:
        before, after = (
            self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for tokens in (self._tokens[: self._said], self._tokens)
        )
        return after[len(before) :]


# What is shown


def _stats(stats) -> Group:
    table = Table("drafter", box=None)
    for column in ("picks", "final weight"):
        table.add_column(column, justify="right")
    final = stats.weights[-1] if stats.weights else [math.nan] * len(stats.drafters)
    for name, picks, weight in zip(stats.drafters, stats.picks, final, strict=True):
        table.add_row(escape(name), str(picks), f"{weight:.3f}")
    drafted = f"{sum(stats.lengths) / stats.rounds:.2f} tokens drafted a round, " if stats.rounds else ""
    plain = f"{stats.lengths.count(0)} of {stats.rounds} rounds plain"
    return Group(
        f"MAT {stats.mean_accepted_tokens:.2f}, {stats.emitted_tokens / stats.seconds:.1f} tokens/s "
        f"({stats.emitted_tokens} tokens, {stats.rounds} rounds, {stats.seconds:.2f} s)",
        drafted + plain,
        table,
        "seconds: " + ", ".join(f"{stage} {seconds:.3f}" for stage, seconds in stats.seconds_by_stage.items()),
    )


def _wide_console(stderr: bool = False) -> Console:
    """One that breaks no line, so that a path can be copied and a line be searched for."""
    return Console(stderr=stderr, width=1000)


def _role(name: str) -> str:
    from hedgespec.zoo import EXPERTS

    return f"expert: {name}" if name in EXPERTS else "all domains"


STORE = "datastore"
"""Begins the role of one of the zoo's datastores."""


def _is_head(role: str) -> bool:
    return role != "target" and not role.startswith(STORE)


def _draft_vocabulary(path: Path) -> int:
    """Tokens that a head can name, from the head of its file."""
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


def _words(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items()) or "none"
    return (", ".join(map(str, value)) or "none") if isinstance(value, tuple) else str(value)


def _print_json(value: object) -> None:
    print(_to_json(value))


def _to_json(value: object) -> str:
    return json.dumps(_without_nan(value), ensure_ascii=False, indent=2, allow_nan=False)


def _without_nan(value):
    """NaN and infinity, which JSON has no words for, as null."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _say(kind: str, message: object) -> None:
    """One line on stderr, whatever the message."""
    print(f"hedgespec: {kind}:", " ".join(str(message).split()) or type(message).__name__, file=sys.stderr)


@contextmanager
def _quiet() -> Iterator[None]:
    """Only our own words on stderr: a drafter that fails is told in one line, what libraries warn of is not."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when transformers is imported, which is later
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", module=r"hedgespec\.")
        warnings.showwarning = lambda message, *rest: _say("warning", message)
        yield


# The parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def _cadence(text: str) -> int | str:
    return text if text == "adaptive" else _number(int, 1)(text)


def _children(text: str) -> int | tuple[int, ...]:
    counts = tuple(_number(int, 1)(one) for one in text.split(","))
    return counts if len(counts) > 1 else counts[0]


def _tree(options: argparse.Namespace) -> Tree | None:
    if options.tree is None and options.tree_size is not None:
        raise UsageError("argument --tree-size: expected --tree beside it, got none")
    return None if options.tree is None else Tree(options.tree, options.tree_size)


def _number(kind: type, low: float, high: float = math.inf, *, above: bool = False) -> Callable[[str], Any]:
    """An argparse type: a finite number in low..high, `low` itself left out if `above`."""
    words = "an integer" if kind is int else "a number"
    words += f" > {low}" if above else f" >= {low}"
    words += f" and <= {high}" if high < math.inf else ""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value if above else low <= value) or not value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"expected {words}, got {text!r}")
        return value

    return parse


def _output(text: str) -> Path:
    """An argparse type: a file that can be written, checked before the work that leads to it."""
    path = Path(text)
    place = path if path.exists() else path.parent
    if path.is_dir() or not os.access(place, os.W_OK):
        raise argparse.ArgumentTypeError(f"expected a file that can be written, got {text!r}")
    return path


def _kept(text: str) -> Path:
    """An argparse type: a file that can be read if it is there, and replaced."""
    path = _output(text)
    if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.R_OK)):
        raise argparse.ArgumentTypeError(f"expected a file that can be read and replaced, got {text!r}")
    return path


def _output_or_stdout(text: str) -> Path | str:
    return text if text == "-" else _output(text)


def _output_or_none(text: str) -> Path | None:
    return _output(text) if text else None


def _figure(text: str) -> Path:
    if Path(text).suffix not in (".png", ".svg"):
        raise argparse.ArgumentTypeError(f"expected a file that ends in .png or .svg, got {text!r}")
    return _output(text)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="hedgespec", description=hedgespec.__doc__.partition("\n")[0], allow_abbrev=False,
        epilog="HEDGESPEC_CACHE: the folder for what is made once. HEDGESPEC_DEBUG=1: tracebacks of errors.",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"hedgespec {hedgespec.__version__}")
    commands = parser.add_subparsers(required=True)

    def command(name: str, run: Callable, words: str, among=commands) -> argparse.ArgumentParser:
        added = among.add_parser(name, help=words, description=words, allow_abbrev=False)
        added.set_defaults(run=run)
        return added

    _add_generate(command("generate", generate, "continue a prompt, streaming the text"))

    add = command("inspect", inspect, "what an EAGLE head's files hold, and what would be assumed").add_argument
    add("path", metavar="PATH", help="a folder, its weights, or a repository of the hub")
    add("--json", action="store_true", help="as JSON")
    _add_allow_pickle(add)

    add = command("datastore", datastore, "make of texts what the drafter that retrieves looks up").add_argument
    add("out", metavar="OUT", type=_output, help="the .safetensors file to write")
    add("--tokenizer", metavar="FOLDER_OR_ID", required=True, help="the target's: a folder, or a repository of the hub")
    add("files", metavar="FILE", type=Path, nargs="+", help="texts in UTF-8; no n-gram reaches from one into the next")
    add("--max-ngram", metavar="n", type=_number(int, 1, 64), default=6, help="longest n-gram looked up (default: %(default)s)")

    add = command("demo", demo, "decode a mixed stream plainly, with the generalist, with HedgeSpec").add_argument
    add("--json", metavar="FILE", type=_output_or_stdout, help="write the figures here; - is stdout")
    add("--plot", metavar="FILE", type=_output_or_none, default="hedgespec-demo.png",
        help="draw the weights over time here; '' for no plot (default: %(default)s)")  # fmt: skip
    add("--prompts", metavar="N", type=_number(int, 1), default=2, help="prompts a domain (default: %(default)s)")
    # One token comes from the prompt's own forward: with no more than that there is no round to report on.
    add("--max-new-tokens", metavar="M", type=_number(int, 2), default=80, help="of each text (default: %(default)s)")
    _add_profile(add)
    _add_draft_length(add)
    _add_compile(add)
    _add_temperature(add)
    add("--seed", type=_number(int, 0), default=0, help="of the first prompt (default: %(default)s)")

    from hedgespec import experiments

    add = command("experiment", experiment, "measure what this project claims, or tell what was measured").add_argument
    add("name", metavar="NAME", choices=(*experiments.NAMES, "all", "report"),
        help=f"{', '.join(experiments.NAMES)}; all; or report, which writes up what was measured")  # fmt: skip
    add("--out", metavar="FOLDER", type=Path, default=Path("experiments"),
        help="where everything goes, and what a stopped run had finished is found again (default: %(default)s)")  # fmt: skip
    add("--seeds", metavar="N", type=_number(int, 2), default=20,
        help="runs of each learner over each text (default: %(default)s)")  # fmt: skip
    add("--fresh", action="store_true", help="do again what an earlier run had finished, but for its recorded texts")
    add("--report", metavar="FILE", type=_output, help=f"with report: where it goes (default: {REPORT} in --out)")

    zoo = commands.add_parser("zoo", help="the embedded target and heads").add_subparsers(required=True)
    add = command("list", zoo_list, "what there is, how large and where", zoo).add_argument
    add("--json", action="store_true", help="as JSON")
    add = command("path", zoo_path, "where the converted target, or a head, is", zoo).add_argument
    add("name", metavar="NAME", nargs="?", help="a head; without it the target's folder, made on the first call")
    add = command("pool", zoo_pool, "a pool of drafters for an engine (HEDGESPEC_POOL), as JSON", zoo).add_argument
    add("--heads", metavar="FOLDER", type=Path,
        help="of EAGLE heads, from where `zoo export` wrote them (default: the datastores and prompt lookup)")  # fmt: skip
    add = command("export", zoo_export, "write heads as other engines load them", zoo).add_argument
    add("folder", metavar="FOLDER", type=Path, help="where they go, a folder for each")
    add("--only", metavar="NAME", nargs="+", help="heads to write (default: all)")
    add("--layout", choices=LAYOUTS, default="official", help="(default: %(default)s)")
    add("--verifier", metavar="NAME", help="the target's name in speculators' files, by which an engine may load it")
    add("--dtype", choices=EXPORTED, default="float32", help="of the tensors (default: %(default)s)")
    add = command("collect", zoo_collect, "have the target answer prompts of every domain: what heads are trained on", zoo)
    add = add.add_argument
    add("--out", metavar="FOLDER", type=Path,
        help="where shards go; a collection there is gone on with (default: zoo-data in the cache)")  # fmt: skip
    add("--prompts", metavar="FOLDER", type=Path,
        help="of prompt files to use too: python, sql, math, medicine .jsonl, with a `prompt` a line")  # fmt: skip
    add("--domains", metavar="NAME", nargs="+", help="(default: chat python sql math medicine legal french)")
    add("--from", dest="already", metavar="FOLDER", type=Path, nargs="+",
        help="collections that count as collected already; they are only read")  # fmt: skip
    add("--scale", metavar="X", type=_number(float, 0, above=True), default=1.0,
        help="times the goals: 1.5M continuation tokens of chat, 0.5M of each other domain (default: %(default)s)")  # fmt: skip
    add("--workers", metavar="N", type=_number(int, 1), default=1,
        help="processes; more can be started by hand on the same folder (default: %(default)s)")  # fmt: skip
    add("--minutes", metavar="N", type=_number(float, 0), help="begin nothing new after so long (default: until the goals)")
    add("--seed", metavar="N", type=_number(int, 0), default=0, help="(default: %(default)s)")
    add("--pack", metavar="FOLDER", type=Path,
        help="collect nothing: add what --out has and FOLDER has not, as one new shard, to FOLDER")  # fmt: skip
    add = command("train", zoo_train, "train the heads on what was collected, and measure them", zoo).add_argument
    add("--only", metavar="NAME", nargs="+", help="heads to train: chat, a domain, joint (default: all that have data)")
    add("--data", metavar="FOLDER", type=Path, nargs="+", help="collections (default: zoo-data in the cache)")
    add("--set", dest="settings", metavar="NAME=VALUE", nargs="+", help="changes of the recipe, as passes=2 or depths=1,3,5")
    add("--stage", choices=STAGES, default="all", help="a part of the work; all: stores, heads, matrix (default: %(default)s)")
    add("--smoke", action="store_true", help="a tiny collection and tiny heads, to see that the whole chain works here")
    add("--out", metavar="FOLDER", type=Path, help="where heads and matrix go (default: zoo-heads in the cache)")
    _add_no_features(add)
    add = command("matrix", zoo_matrix, "tokens a round of heads on every domain's held-out prompts", zoo).add_argument
    add("--head", metavar="NAME", action="append",
        help="a shipped head's name or a head's file; repeatable (default: those that `zoo train` made)")  # fmt: skip
    add("--data", metavar="FOLDER", type=Path, nargs="+", help="collections (default: zoo-data in the cache)")
    add("--out", metavar="FOLDER", type=Path,
        help="where matrix.json, matrix.md and matrix.svg go (default: zoo-heads in the cache)")  # fmt: skip
    _add_no_features(add)

    add = command("doctor", doctor, "what this installation can do on this machine").add_argument
    add("--json", action="store_true", help="as JSON")
    return parser


def _add_no_features(add: Callable[..., Any]) -> None:
    add("--no-features", action="store_true",
        help="compute the target's states at every use rather than keep them beside the heads (4.6 KB a token)")  # fmt: skip


def _add_generate(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("prompt", metavar="PROMPT", help="the text to continue; - reads stdin, less one newline at its end")
    add("--target", metavar="FOLDER", type=Path, help="a causal language model (default: the zoo's target)")
    add("--drafter", metavar="NAME", action="append",
        help="a zoo head's name, ngram, a datastore or zoo-format head (.safetensors), an EAGLE head (folder or "
        "repository of the hub), or the folder of a causal model; repeatable (default: all the zoo's heads)")  # fmt: skip
    _add_allow_pickle(add)
    add("--learner", choices=hedgespec.learners.NAMES, default=DecodeConfig.learner, help="(default: %(default)s)")
    add("--learner-state", metavar="FILE", type=_kept,
        help="go on from what the learner left in this file, if there is one, and leave there what it knows at the end; "
        "a learner that goes on takes no warm start")  # fmt: skip
    add("--mode", choices=CHOICES["mode"], default=DecodeConfig.mode,
        help="draft from the drafter's distribution, its argmax, or coupled to the target by shared noise, with which a "
        "seed's text is the same whatever the drafters (default: %(default)s)")  # fmt: skip
    add("--objective", choices=CHOICES["objective"], default=DecodeConfig.objective,
        help="what to have most of: tokens a round, or tokens a second, for which drafts are as long as pays, from none to K, "
        "by costs measured on the way (default: %(default)s)")  # fmt: skip
    _add_draft_length(add)
    add("--tree", metavar="C", type=_children,
        help="draft a tree in which every node has C children, or C,C,... by depth (default: a chain)")  # fmt: skip
    add("--tree-size", metavar="M", type=_number(int, 1),
        help="keep the M likeliest nodes of the tree; needs --mode argmax or coupled")  # fmt: skip
    _add_compile(add)
    add("--evaluate-every", metavar="m", type=_cadence, default=DecodeConfig.evaluate_every,
        help='rounds from one scoring of all drafters to the next, or "adaptive" (default: %(default)s)')  # fmt: skip
    add("--warm-start", metavar="M", type=_number(int, 0), default=DecodeConfig.warm_start,
        help="compare all drafters over the prompt's last M positions, before they draft (default: %(default)s)")  # fmt: skip
    _add_temperature(add)
    add("--top-k", metavar="k", type=_number(int, 1), help="keep the k likeliest tokens")
    add("--top-p", metavar="p", type=_number(float, 0, 1, above=True), help="keep the likeliest tokens of mass p")
    add("--min-p", metavar="p", type=_number(float, 0, 1), help="keep tokens p times as likely as the likeliest")
    add("--seed", type=_number(int, 0), help="makes sampling repeatable (default: a fresh one)")
    add("--max-new-tokens", metavar="M", type=_number(int, 1), default=128, help="(default: %(default)s)")
    add("--chat", action="store_true", help="put the prompt into the target's chat template")
    add("--stats", action="store_true", help="then, on stderr: MAT, speed, picks, weights, seconds by stage")
    _add_profile(add)
    add("--json", action="store_true", help='instead of streaming, {"text", "tokens", "stats"} at the end')


def _add_allow_pickle(add: Callable) -> None:
    add("--allow-pickle", action="store_true", help="read heads that are pickled, restricted to tensors")


def _add_draft_length(add: Callable) -> None:
    add("--draft-length", metavar="K", type=_number(int, 1), default=DecodeConfig.draft_length,
        help="tokens drafted a round (default: %(default)s)")  # fmt: skip


def _add_profile(add: Callable) -> None:
    add("--profile", metavar="FILE", nargs="?", type=_figure, const=True, default=False,
        help="tell the time by stage; draw it, round by round, into FILE (.png or .svg) if one is named. "
        "A GPU is waited for after every stage, which costs speed")  # fmt: skip


def _add_compile(add: Callable) -> None:
    add("--compile", action="store_true", help="capture the target's forward; on a CPU it gains little, see README")


def _add_temperature(add: Callable) -> None:
    add("--temperature", metavar="T", type=_number(float, 0), default=0.0, help="0 is greedy (default: %(default)s)")


if __name__ == "__main__":
    sys.exit(main())
