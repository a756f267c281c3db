"""TODO."""

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
        """argparse's own, which says nothing where help or version cannot be written."""
        if message:
            (file or sys.stderr).write(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="hedgespec", description=hedgespec.__doc__.partition("\n")[0], allow_abbrev=False,
        epilog="HEDGESPEC_CACHE: the folder for what is made once. HEDGESPEC_DEBUG=1: tracebacks of errors.",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"hedgespec {hedgespec.__version__}")
    commands = parser.add_subparsers(required=True)

    def command(name: str, run: Callable, words: str, among: Any = commands) -> argparse.ArgumentParser:
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
    told = "have the target answer prompts of every domain: what heads are trained on"
    add = command("collect", zoo_collect, told, zoo).add_argument
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
    add(
        "--stage",
        choices=(*STAGES, "all"),
        default="all",
        help="a part of the work; all: stores, heads, matrix (default: %(default)s)",
    )
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
    add("--proposal", choices=CHOICES["proposal"], default=DecodeConfig.proposal,
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
