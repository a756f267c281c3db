"""The parser of the command line: every command and its options."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import hedgespec
from hedgespec.cli.arguments import (
    EXPORTED,
    LAYOUTS,
    UsageError,
    _cadence,
    _children,
    _figure,
    _kept,
    _number,
    _output,
    _output_or_none,
    _output_or_stdout,
)
from hedgespec.cli.commands import (
    datastore,
    demo,
    doctor,
    generate,
    inspect,
    zoo_collect,
    zoo_export,
    zoo_list,
    zoo_matrix,
    zoo_path,
    zoo_pool,
    zoo_train,
)
from hedgespec.config import CHOICES, DecodeConfig
from hedgespec.zoo import STAGES


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def _print_message(self, message: str, file: Any = None) -> None:
        """Writes like argparse, but raises if help or version cannot be written."""
        if message:
            (file or sys.stderr).write(message)


Commands = Callable[[str, Callable, str], argparse.ArgumentParser]
"""Adds a command: its name, the function that runs it, and its description."""


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="hedgespec", description=hedgespec.__doc__.partition("\n")[0], allow_abbrev=False,
        epilog="HEDGESPEC_CACHE: the folder for what is made once. HEDGESPEC_DEBUG=1: tracebacks of errors.",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"hedgespec {hedgespec.__version__}")
    commands = parser.add_subparsers(required=True)
    command = _commands_of(commands)
    _add_generate(command("generate", generate, "continue a prompt, streaming the text"))
    _add_inspect(command)
    _add_datastore(command)
    _add_demo(command)
    in_zoo = _commands_of(commands.add_parser("zoo", help="the embedded target and heads").add_subparsers(required=True))
    _add_zoo_files(in_zoo)
    _add_zoo_collect(in_zoo)
    _add_zoo_training(in_zoo)
    add = command("doctor", doctor, "show what this installation can do on this machine").add_argument
    add("--json", action="store_true", help="as JSON")
    return parser


def _commands_of(subparsers: Any) -> Commands:
    def command(name: str, run: Callable, words: str) -> argparse.ArgumentParser:
        added = subparsers.add_parser(name, help=words, description=words, allow_abbrev=False)
        added.set_defaults(run=run)
        return added

    return command


def _add_inspect(command: Commands) -> None:
    add = command("inspect", inspect, "show what an EAGLE head's files hold, and what is assumed").add_argument
    add("path", metavar="PATH", help="a folder, its weights, or a repository of the hub")
    add("--json", action="store_true", help="as JSON")
    _add_allow_pickle(add)


def _add_datastore(command: Commands) -> None:
    add = command("datastore", datastore, "build the datastore of a retrieval drafter from texts").add_argument
    add("out", metavar="OUT", type=_output, help="the .safetensors file to write")
    add("--tokenizer", metavar="FOLDER_OR_ID", required=True, help="the target's: a folder, or a repository of the hub")
    add("files", metavar="FILE", type=Path, nargs="+", help="texts in UTF-8; n-grams do not cross from one file to the next")
    add("--max-ngram", metavar="n", type=_number(int, 1, 64), default=6, help="longest n-gram looked up (default: %(default)s)")


def _add_demo(command: Commands) -> None:
    add = command("demo", demo, "decode a mixed stream plainly, with the generalist, and with HedgeSpec").add_argument
    add("--json", metavar="FILE", type=_output_or_stdout, help="write the figures here; - is stdout")
    add("--plot", metavar="FILE", type=_output_or_none, default="hedgespec-demo.png",
        help="draw the weights over time here; '' for no plot (default: %(default)s)")  # fmt: skip
    add("--prompts", metavar="N", type=_number(int, 1), default=2, help="prompts a domain (default: %(default)s)")
    # The first token comes with the prompt's forward, so that a single one would need no round.
    add("--max-new-tokens", metavar="M", type=_number(int, 2), default=80, help="of each text (default: %(default)s)")
    _add_profile(add)
    _add_draft_length(add)
    _add_compile(add)
    _add_temperature(add)
    add("--seed", type=_number(int, 0), default=0, help="of the first prompt (default: %(default)s)")


def _add_zoo_files(command: Commands) -> None:
    """The commands that show or write what the zoo holds."""
    add = command("list", zoo_list, "list the target, heads and datastores with sizes and places").add_argument
    add("--json", action="store_true", help="as JSON")
    add = command("path", zoo_path, "print the place of the converted target, or of a head").add_argument
    add("name", metavar="NAME", nargs="?", help="a head; without it the target's folder, made on the first call")
    add = command("pool", zoo_pool, "print a pool of drafters for an engine (HEDGESPEC_POOL), as JSON").add_argument
    add("--heads", metavar="FOLDER", type=Path,
        help="EAGLE heads written by `zoo export` (default: the datastores and prompt lookup)")  # fmt: skip
    add = command("export", zoo_export, "write heads in a format that other engines load").add_argument
    add("folder", metavar="FOLDER", type=Path, help="the folder to write to; each head gets a folder in it")
    add("--only", metavar="NAME", nargs="+", help="heads to write (default: all)")
    add("--layout", choices=LAYOUTS, default="official", help="(default: %(default)s)")
    add("--verifier", metavar="NAME", help="the target's name in speculators' files, by which an engine may load it")
    add("--dtype", choices=EXPORTED, default="float32", help="of the tensors (default: %(default)s)")


def _add_zoo_collect(command: Commands) -> None:
    words = "have the target answer prompts of every domain; the answers train the heads"
    add = command("collect", zoo_collect, words).add_argument
    add("--out", metavar="FOLDER", type=Path,
        help="the collection to write or continue (default: zoo-data in the cache)")  # fmt: skip
    add("--prompts", metavar="FOLDER", type=Path,
        help="further prompts: python, sql, math, medicine .jsonl, with a `prompt` a line")  # fmt: skip
    add("--domains", metavar="NAME", nargs="+", help="(default: chat python sql math medicine legal french)")
    add("--from", dest="already", metavar="FOLDER", type=Path, nargs="+",
        help="collections whose rows count as collected; they are only read")  # fmt: skip
    add("--scale", metavar="X", type=_number(float, 0, above=True), default=1.0,
        help="factor of the goals: 1.5M continuation tokens of chat, 0.5M of each other (default: %(default)s)")  # fmt: skip
    add("--workers", metavar="N", type=_number(int, 1), default=1,
        help="processes; more can be started on the same folder (default: %(default)s)")  # fmt: skip
    add("--minutes", metavar="N", type=_number(float, 0), help="start nothing new after that (default: until the goals)")
    add("--seed", metavar="N", type=_number(int, 0), default=0, help="(default: %(default)s)")
    add("--pack", metavar="FOLDER", type=Path,
        help="collect nothing: add the rows of --out that FOLDER lacks to FOLDER, as one new shard")  # fmt: skip


def _add_zoo_training(command: Commands) -> None:
    add = command("train", zoo_train, "train the heads on collected answers, and measure them").add_argument
    add("--only", metavar="NAME", nargs="+", help="heads to train: chat, a domain, joint (default: all that have data)")
    add("--data", metavar="FOLDER", type=Path, nargs="+", help="collections (default: zoo-data in the cache)")
    add("--set", dest="settings", metavar="NAME=VALUE", nargs="+", help="changes of the recipe: passes=2, depths=1,3,5")
    add(
        "--stage",
        choices=(*STAGES, "all"),
        default="all",
        help="a part of the work; all: stores, heads, matrix (default: %(default)s)",
    )
    add("--smoke", action="store_true", help="use a tiny collection and tiny heads, to test the whole chain")
    add("--out", metavar="FOLDER", type=Path, help="the folder of heads and matrix (default: zoo-heads in the cache)")
    _add_no_features(add)
    add = command("matrix", zoo_matrix, "measure tokens a round of heads on every domain's held-out prompts").add_argument
    add("--head", metavar="NAME", action="append",
        help="a shipped head's name or a head's file; repeatable (default: those that `zoo train` made)")  # fmt: skip
    add("--data", metavar="FOLDER", type=Path, nargs="+", help="collections (default: zoo-data in the cache)")
    add("--out", metavar="FOLDER", type=Path,
        help="the folder of matrix.json, matrix.md and matrix.svg (default: zoo-heads in the cache)")  # fmt: skip
    _add_no_features(add)


def _add_no_features(add: Callable[..., Any]) -> None:
    add("--no-features", action="store_true",
        help="compute the target's states at every use instead of keeping them beside the heads (4.6 KB a token)")  # fmt: skip


def _add_generate(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("prompt", metavar="PROMPT", help="the text to continue; - reads stdin, without one newline at its end")
    add("--target", metavar="FOLDER", type=Path, help="a causal language model (default: the zoo's target)")
    add("--drafter", metavar="NAME", action="append",
        help="a zoo head's name, ngram, a datastore or zoo-format head (.safetensors), an EAGLE head (folder or "
        "repository of the hub), or the folder of a causal model; repeatable (default: all the zoo's heads)")  # fmt: skip
    _add_allow_pickle(add)
    add("--learner", choices=hedgespec.learners.NAMES, default=DecodeConfig.learner, help="(default: %(default)s)")
    add("--learner-state", metavar="FILE", type=_kept,
        help="start from the learner state in this file, if it exists, and write the state to it at the end; "
        "there is no warm start then")  # fmt: skip
    add("--proposal", choices=CHOICES["proposal"], default=DecodeConfig.proposal,
        help="draft by sampling from the drafter, by its argmax, or coupled to the target by shared noise, so that the text "
        "of a seed does not depend on the drafters (default: %(default)s)")  # fmt: skip
    add("--objective", choices=CHOICES["objective"], default=DecodeConfig.objective,
        help="maximise tokens a round, or tokens a second; for the latter the draft length, 0 to K, is chosen by costs "
        "measured while decoding (default: %(default)s)")  # fmt: skip
    _add_draft_length(add)
    add("--tree", metavar="C", type=_children,
        help="draft a tree in which every node has C children, or C,C,... by depth (default: a chain)")  # fmt: skip
    add("--tree-size", metavar="M", type=_number(int, 1),
        help="keep the M likeliest nodes of the tree; needs --proposal argmax or coupled")  # fmt: skip
    _add_compile(add)
    add("--evaluate-every", metavar="m", type=_cadence, default=DecodeConfig.evaluate_every,
        help='rounds from one scoring of all drafters to the next, or "adaptive" (default: %(default)s)')  # fmt: skip
    add("--warm-start", metavar="M", type=_number(int, 0), default=DecodeConfig.warm_start,
        help="score all drafters on the prompt's last M positions before the first round (default: %(default)s)")  # fmt: skip
    _add_temperature(add)
    add("--top-k", metavar="k", type=_number(int, 1), help="keep the k likeliest tokens")
    add("--top-p", metavar="p", type=_number(float, 0, 1, above=True), help="keep the likeliest tokens of mass p")
    add("--min-p", metavar="p", type=_number(float, 0, 1), help="keep tokens p times as likely as the likeliest")
    add("--seed", type=_number(int, 0), help="makes sampling repeatable (default: a random one)")
    add("--max-new-tokens", metavar="M", type=_number(int, 1), default=128, help="(default: %(default)s)")
    add("--chat", action="store_true", help="put the prompt into the target's chat template")
    add("--stats", action="store_true", help="print tokens a round, speed, picks, weights and seconds by stage on stderr")
    _add_profile(add)
    add("--json", action="store_true", help='print {"text", "tokens", "stats"} at the end instead of streaming')


def _add_allow_pickle(add: Callable) -> None:
    add("--allow-pickle", action="store_true", help="read pickled heads, restricted to tensors")


def _add_draft_length(add: Callable) -> None:
    add("--draft-length", metavar="K", type=_number(int, 1), default=DecodeConfig.draft_length,
        help="tokens drafted a round (default: %(default)s)")  # fmt: skip


def _add_profile(add: Callable) -> None:
    add("--profile", metavar="FILE", nargs="?", type=_figure, const=True, default=False,
        help="print the time by stage, and plot it by round into FILE (.png or .svg) if one is given. "
        "On a GPU this waits after every stage and is slower")  # fmt: skip


def _add_compile(add: Callable) -> None:
    add("--compile", action="store_true", help="capture the target's forward; on a CPU it gains little, see docs/usage.md")


def _add_temperature(add: Callable) -> None:
    add("--temperature", metavar="T", type=_number(float, 0), default=0.0, help="0 is greedy (default: %(default)s)")
