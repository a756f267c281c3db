"""Files that are either written completely or not changed."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a path to write to, which becomes `path` in one step when the block ends without an error.

    Until then, and after an error, `path` is unchanged, and no other file remains. If `path` is a link, the file that it names
    is replaced. A device, a pipe, or a file in a folder without write permission is written in place.

    Raises: OSError if the file cannot be written; IsADirectoryError if there is a folder.
    """
    path = Path(path).resolve()
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "expected a file, got a folder", str(path))
    if path.exists() and not (path.is_file() and os.access(path.parent, os.W_OK)):
        yield path
        return
    # In the same folder, because a rename is atomic only within a file system.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".hedgespec-") as folder:
        fresh = Path(folder, path.name)
        yield fresh
        os.replace(fresh, path)


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file in UTF-8 through `replacing`. Characters that UTF-8 cannot encode, as in file names, are escaped.

    Raises: OSError.
    """
    with replacing(path) as fresh:
        fresh.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_tensors(save_file: Callable[..., None], tensors: Mapping[str, Any], path: Path, metadata: dict[str, str]) -> None:
    """Calls safetensors' `save_file`, of torch or NumPy. Errors of the operating system are raised as OSError."""
    from safetensors import SafetensorError

    try:
        save_file(dict(tensors), path, metadata=metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
