"""What the commands print: streamed text, tables, JSON, and errors in one line."""

from __future__ import annotations

import codecs
import errno
import io
import json
import math
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hedgespec.stats import DecodeStats

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error codes of a full disk or an exceeded quota."""


PACKAGES = {"matplotlib": "zoo", "gguf": "zoo", "accelerate": "zoo", "filelock": "zoo", "scipy": "experiments",
            "sklearn": "experiments"}  # fmt: skip
"""Optional package -> the extra that installs it."""


class TextStream:
    """Converts tokens to text as they arrive; a character is never split.

    Args:
        tokenizer: a transformers tokenizer.
        prompt_ids: ids of the prompt, because some tokenizers write a word differently at the start of a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._tokens = list(prompt_ids[-8:])
        self._said = len(self._tokens)
        """Number of tokens whose text has been returned; the others may end within a character."""

    def push(self, tokens: Sequence[int]) -> str:
        """Returns the text that these tokens add, without an unfinished character."""
        return "".join(self._push_one(token) for token in tokens)

    def _push_one(self, token: int) -> str:
        self._tokens.append(token)
        piece = self._unsaid()
        if not piece or piece.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        # Only the tokens of this piece are kept as context, so that the cost does not grow with the text.
        self._tokens = self._tokens[self._said :]
        self._said = len(self._tokens)
        return piece

    def end(self) -> str:
        """Returns the text that was held back."""
        return self._unsaid()

    def _unsaid(self) -> str:
        before, after = (
            self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for tokens in (self._tokens[: self._said], self._tokens)
        )
        return after[len(before) :]


def _stats(stats: DecodeStats) -> Group:
    table = Table("drafter", box=None)
    for column in ("picks", "final weight"):
        table.add_column(column, justify="right")
    final = stats.weights[-1] if stats.weights else [math.nan] * len(stats.drafters)
    for name, picks, weight in zip(stats.drafters, stats.picks, final, strict=True):
        table.add_row(escape(name), str(picks), f"{weight:.3f}")
    drafted = f"{sum(stats.lengths) / stats.rounds:.2f} tokens drafted a round, " if stats.rounds else ""
    plain = f"{stats.lengths.count(0)} of {stats.rounds} rounds plain"
    return Group(
        f"MAT {stats.tokens_per_round:.2f}, {stats.emitted_tokens / stats.seconds:.1f} tokens/s "
        f"({stats.emitted_tokens} tokens, {stats.rounds} rounds, {stats.seconds:.2f} s)",
        drafted + plain,
        table,
        "seconds: " + ", ".join(f"{stage} {seconds:.3f}" for stage, seconds in stats.seconds_by_stage.items()),
    )


def _wide_console(stderr: bool = False) -> Console:
    """Returns a console that does not break lines, so that paths can be copied and lines searched for."""
    return _Console(stderr=stderr, width=1000)


def _role(name: str) -> str:
    from hedgespec.zoo import EXPERTS

    return f"expert: {name}" if name in EXPERTS else "all domains"


def _words(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items()) or "none"
    return (", ".join(map(str, value)) or "none") if isinstance(value, tuple) else str(value)


def _print_json(value: object) -> None:
    """Prints JSON on stdout, in ASCII if the encoding of stdout is not UTF-8."""
    print(_to_json(value, ascii_only=not (sys.stdout.encoding or "utf-8").lower().replace("-", "").startswith("utf")))


def _to_json(value: object, *, ascii_only: bool = False) -> str:
    return json.dumps(_without_nan(value), ensure_ascii=ascii_only, indent=2, allow_nan=False)


def _without_nan(value: Any) -> Any:
    """Replaces NaN and infinity, which JSON lacks, by None."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _say(kind: str, message: object) -> None:
    """Prints a message as one line on stderr."""
    print(f"hedgespec: {kind}:", " ".join(str(message).split()) or type(message).__name__, file=sys.stderr)


def _told(error: BaseException) -> str:
    """Returns the message of an error, with a remedy for a full disk or a missing package."""
    if isinstance(error, OSError) and error.errno in FULL:
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}expected room for what is to be written, got: {error.strerror}; free some, or write to another place"
    if isinstance(error, ImportError) and (extra := PACKAGES.get((error.name or "").partition(".")[0])):
        return f"{error}: pip install 'hedgespec[{extra}]'"
    return str(error)


def _drop_stdout() -> None:
    """Discards what stdout still buffers, because Python would try to write it at exit and print an error."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _any_text() -> Iterator[None]:
    """Escapes characters that the encoding of stdout lacks, and warns once, with a remedy."""
    stdout, missed = sys.stdout, []
    if not isinstance(stdout, io.TextIOWrapper):
        yield
        return

    def escape_it(error: UnicodeError) -> tuple[str | bytes, int]:
        missed.append(error)
        return codecs.backslashreplace_errors(error)

    errors = stdout.errors
    codecs.register_error("hedgespec", escape_it)
    stdout.reconfigure(errors="hedgespec")
    try:
        yield
    finally:
        stdout.reconfigure(errors=errors)
        if missed:
            _say("warning", f"characters that {stdout.encoding} lacks were escaped: PYTHONIOENCODING=utf-8 shows them")


class _Console(Console):
    """A console that leaves the handling of a closed pipe to `main`."""

    def on_broken_pipe(self) -> None:
        raise  # the BrokenPipeError that is being handled


@contextmanager
def _quiet() -> Iterator[None]:
    """Shows warnings of this package in one line each, and no others."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when transformers is imported, which is later
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", module=r"hedgespec\.")
        warnings.showwarning = lambda message, *rest: _say("warning", message)
        yield
