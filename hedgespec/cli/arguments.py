"""Types of arguments for argparse, and the error of a wrong command line."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hedgespec.config import Tree

LAYOUTS = {"official": "eagle3", "speculators": "speculators"}
"""Layouts of `hedgespec zoo export`, and their names in `save_drafter`."""


EXPORTED = ("float32", "bfloat16", "float16")
"""Dtypes of exported heads."""


class UsageError(Exception):
    """A wrong command line: exit code 2."""


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
    """Returns an argparse type: a finite number in low..high, without `low` itself if `above`."""
    words = "an integer" if kind is int else "a number"
    words += f" > {low}" if above else f" >= {low}"
    words += f" and <= {high}" if high < math.inf else ""

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value if above else low <= value) or not value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"expected {words}, got {text!r}")
        return value

    return parse


def _output(text: str) -> Path:
    """An argparse type: a file that can be written, which is checked before any work is done."""
    path = Path(text)
    place = path if path.exists() else path.parent
    if path.is_dir() or not os.access(place, os.W_OK):
        raise argparse.ArgumentTypeError(f"expected a file that can be written, got {text!r}")
    return path


def _kept(text: str) -> Path:
    """An argparse type: a file that can be read, if it exists, and replaced."""
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
