"""What a learner knows, in a file: a tenant's, a conversation's, so that its next request goes on from there.

    stats = decoder.generate(prompt).stats[0]
    hedgespec.save_learner_state("tenant.json", stats)
    decoder.generate(prompt, learner_state=hedgespec.load_learner_state("tenant.json", decoder))

The file is JSON: {"format", "version", "drafters": their names in order, "state": `Learner.state_dict()`}. Floats survive
it bit for bit.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hedgespec.errors import LearnerStateError
from hedgespec.utils.files import write_text
from hedgespec.utils.scalars import shown

if TYPE_CHECKING:
    from hedgespec.decoder import Decoder
    from hedgespec.stats import DecodeStats

FORMAT, VERSION = "hedgespec-learner-state", 1
FIELDS = {"format": str, "version": int, "drafters": list, "state": dict}


def save_learner_state(path: str | Path, stats: DecodeStats) -> None:
    """Writes what the learner knew at a request's end. A file that was there is replaced whole, or left as it was.

    Args:
        path: the file; its folder exists.
        stats: of the request, finished.

    Raises:
        LearnerStateError: the request has no learner's state yet, or the path is a folder.
        TypeError: the path is neither a str nor a path.
        OSError: the file cannot be written.
    """
    if not getattr(stats, "learner_state", None):
        raise LearnerStateError("stats: expected those of a finished request, got none with a learner's state")
    saved = {"format": FORMAT, "version": VERSION, "drafters": list(stats.drafters), "state": stats.learner_state}
    path = _path(path)
    if path.is_dir():
        raise LearnerStateError(f"{path}: expected a file to write a learner's state to, got a folder")
    write_text(path, json.dumps(saved, indent=1, allow_nan=False) + "\n")


def load_learner_state(path: str | Path, decoder: Decoder) -> dict[str, Any]:
    """What `Decoder.generate` and `model.generate(..., custom_generate=decoder)` take as `learner_state`.

    Args:
        path: a file that `save_learner_state` wrote.
        decoder: the one that is to go on from it.

    Raises:
        LearnerStateError: no such file, a folder, a file that cannot be read, not JSON, another format, a newer version, a
            field that is missing or of another type, other drafters or another order of them, another learner or other options,
            or numbers that are no state of it.
        TypeError: the path is neither a str nor a path.
    """
    path = _path(path)
    try:
        saved = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except FileNotFoundError as error:
        raise LearnerStateError(f"{path}: expected a learner's state, found no file") from error
    except IsADirectoryError as error:
        raise LearnerStateError(f"{path}: expected a file with a learner's state, got a folder") from error
    except OSError as error:
        raise LearnerStateError(
            f"{path}: expected a file with a learner's state that can be read ({error.strerror})"
        ) from error
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors are ValueErrors
        raise LearnerStateError(f"{path}: expected a learner's state as JSON, got what is not ({error})") from error
    if not isinstance(saved, dict):
        raise LearnerStateError(f"{path}: expected a JSON object, got {_name(saved)}")
    if (found := saved.get("format")) != FORMAT:
        raise LearnerStateError(f"{path}: expected format {FORMAT!r}, got {found!r}")
    for field, kind in FIELDS.items():
        if field not in saved:
            raise LearnerStateError(f"{path}: expected the fields {', '.join(FIELDS)}, got none called {field}")
        if type(saved[field]) is not kind:
            raise LearnerStateError(f"{path}: expected {field} as {kind.__name__}, got {_name(saved[field])}")
    if saved["version"] != VERSION:
        raise LearnerStateError(
            f"{path}: expected version {VERSION}, got {saved['version']}; "
            "a newer one was written by a newer hedgespec, which reads it"
        )
    names = [drafter.name for drafter in decoder.drafters]
    if saved["drafters"] != names:
        raise LearnerStateError(f"{path}: expected the state of the drafters {names} in this order, got {saved['drafters']}")
    learner = decoder.new_learner()
    try:
        learner.load_state_dict(saved["state"])
    except ValueError as error:
        config = decoder.config
        raise LearnerStateError(
            f"{path}: {error} (for objective {config.objective!r} with draft_length {config.draft_length})"
        ) from error
    return learner.state_dict()


def _path(path: str | Path) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path: expected a str or a path, got {shown(path)}")
    return Path(path)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


def _name(value: object) -> str:
    return "null" if value is None else type(value).__name__
