"""The files of a collection: journals that lose nothing, shards of token ids that are small, and their manifest.

A folder holds, for each worker, `NAME.journal` (JSON lines, appended row by row) and shards `NAME-0000.npz.xz`. A shard is an
uncompressed numpy archive inside xz, without pickles:

- `vocabulary` uint16: the ids that occur, the most frequent first; `tokens` uint16: the rows' ids, one after another, as
  indices into it. (0.8 bytes a token; ids as they are take 0.9, low and high bytes apart 1.07, bz2 0.9.)
- `length`, `prompt_length`, `last_start` int32 [R]: a row's tokens; where its first answer starts; where its last answer does.
- `temperature` uint8 [R], in hundredths, 0 for greedy; `source`, `licence` int16 [R], indices into `names`; `held_out` bool
  [R]; `key` uint64 [R], the first 16 hex digits of the SHA-256 of the normalised prompt; `names`, a JSON list as uint8.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hedgespec.errors import ZooError

FORMAT = "hedgespec-ids-1"
SUFFIX = ".npz.xz"
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 2, "lp": 1, "pb": 1}]


@dataclass(frozen=True)
class Row:
    """One conversation with the target's answers.

    Attributes:
        key: of its first prompt, see `Prompt.key`.
        source: a name in the table of sources.
        licence: of the prompt.
        held_out: its side.
        temperature: of the sampling, 0 for greedy.
        prompt_length: tokens before the first answer.
        last_start: tokens before the last answer; equal to `prompt_length` in a conversation of one turn.
        tokens: the whole conversation.
    """

    key: str
    source: str
    licence: str
    held_out: bool
    temperature: float
    prompt_length: int
    last_start: int
    tokens: list[int]

    @property
    def id(self) -> tuple[str, bool]:
        """Rows with equal ids are the same conversation, one perhaps a turn longer."""
        return self.key, self.temperature > 0

    def answers(self, end: int) -> list[tuple[int, int]]:
        """(start, stop) of the answers, each with its end token; `end` is the id of <|im_end|>."""
        if self.last_start == self.prompt_length:
            return [(self.prompt_length, len(self.tokens))]
        stop = self.tokens.index(end, self.prompt_length) + 1
        return [(self.prompt_length, stop), (self.last_start, len(self.tokens))]

    def written(self, end: int) -> int:
        """Tokens the target wrote as answers."""
        return sum(stop - start for start, stop in self.answers(end))


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces a file as a whole. Raises: ZooError if that fails; the old file is left."""
    scratch = path.with_name(path.name + ".part")
    try:
        with scratch.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        scratch.rename(path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise ZooError(f"{path} could not be written ({error.strerror}); nothing collected before is lost") from error


def encode(rows: Iterable[Row]) -> bytes:
    """The bytes of a shard."""
    rows = sorted(rows, key=lambda row: (row.source, row.tokens))
    names = sorted({name for row in rows for name in (row.source, row.licence)})
    at = {name: index for index, name in enumerate(names)}
    tokens = np.array([token for row in rows for token in row.tokens], dtype=np.uint16)
    found, counts = np.unique(tokens, return_counts=True)
    vocabulary = found[np.argsort(-counts, kind="stable")]
    ranks = np.zeros(65536, dtype=np.uint16)
    ranks[vocabulary] = np.arange(len(vocabulary))
    arrays: dict[str, Any] = {
        "vocabulary": vocabulary,
        "tokens": ranks[tokens],
        "length": np.array([len(row.tokens) for row in rows], dtype=np.int32),
        "prompt_length": np.array([row.prompt_length for row in rows], dtype=np.int32),
        "last_start": np.array([row.last_start for row in rows], dtype=np.int32),
        "temperature": np.array([round(100 * row.temperature) for row in rows], dtype=np.uint8),
        "source": np.array([at[row.source] for row in rows], dtype=np.int16),
        "licence": np.array([at[row.licence] for row in rows], dtype=np.int16),
        "held_out": np.array([row.held_out for row in rows], dtype=bool),
        "key": np.array([int(row.key, 16) for row in rows], dtype=np.uint64),
        "names": np.frombuffer(json.dumps([FORMAT, *names]).encode(), dtype=np.uint8),
    }
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return lzma.compress(buffer.getvalue(), lzma.FORMAT_XZ, filters=FILTERS)


def decode(data: bytes, name: str = "shard") -> list[Row]:
    """The rows of a shard. Raises: ZooError if it is corrupt or of another format."""
    try:
        with np.load(io.BytesIO(lzma.decompress(data)), allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        kind, *names = json.loads(arrays["names"].tobytes())
        if kind != FORMAT:
            raise ValueError(f"format {kind}")
        tokens = arrays["vocabulary"][arrays["tokens"]].tolist()
        ends = np.cumsum(arrays["length"]).tolist()
        fields = zip(
            [0, *ends[:-1]], ends, arrays["key"].tolist(), arrays["source"].tolist(), arrays["licence"].tolist(),
            arrays["held_out"].tolist(), arrays["temperature"].tolist(), arrays["prompt_length"].tolist(),
            arrays["last_start"].tolist(), strict=True,
        )  # fmt: skip
        return [
            Row(f"{key:016x}", names[source], names[licence], held_out, temperature / 100, prompt, last, tokens[start:stop])
            for start, stop, key, source, licence, held_out, temperature, prompt, last in fields
        ]
    except (lzma.LZMAError, ValueError, KeyError, EOFError, IndexError) as error:
        raise ZooError(f"{name}: expected a shard of token ids in format {FORMAT} ({error})") from error


class Journal:
    """Lines that are on disk as soon as `append` returns."""

    def __init__(self, path: Path):
        self.path = path
        self.file: BinaryIO | None = None

    def append(self, entry: dict) -> None:
        """Raises: ZooError if the line cannot be written; what was written before is left whole."""
        try:
            if self.file is None:
                self.file = self.path.open("ab")
                if self.file.tell():  # a torn last line, of a process that was killed, must not swallow the next
                    with self.path.open("rb") as old:
                        old.seek(-1, os.SEEK_END)
                        if old.read(1) != b"\n":
                            self.file.write(b"\n")
            self.file.write(json.dumps(entry).encode() + b"\n")
            self.file.flush()
        except OSError as error:
            raise ZooError(f"{self.path} could not be written ({error.strerror}); nothing collected before is lost") from error

    def rewrite(self, entries: Iterable[dict]) -> None:
        """Replaces all lines, atomically."""
        self.close()
        write_atomically(self.path, b"".join(json.dumps(entry).encode() + b"\n" for entry in entries))

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None

    @staticmethod
    def read(path: Path) -> Iterator[dict]:
        """The lines of a journal; one that a killed process left unfinished is skipped."""
        if not path.exists():
            return
        for line in path.read_bytes().split(b"\n"):
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict):
                yield entry


def merge(rows: Iterable[Row]) -> dict[tuple[str, bool], Row]:
    """Rows by id, the longest of each: a row with a second turn replaces its first version."""
    kept: dict[tuple[str, bool], Row] = {}
    for row in rows:
        if row.id not in kept or len(kept[row.id].tokens) < len(row.tokens):
            kept[row.id] = row
    return kept


def read_folder(*folders: Path, journals: bool = True) -> dict[tuple[str, bool], Row]:
    """All rows of the folders' shards and, unless told otherwise, journals."""

    def every() -> Iterator[Row]:
        for folder in folders:
            for path in sorted(folder.glob(f"*{SUFFIX}")):
                yield from decode(path.read_bytes(), str(path))
            for path in sorted(folder.glob("*.journal")) if journals else ():
                yield from (Row(**entry["row"]) for entry in Journal.read(path) if "row" in entry)

    return merge(every())


def write_shard(folder: Path, name: str, rows: Iterable[Row]) -> Path:
    """Writes `NAME-NUMBER.npz.xz` with the next free number and returns its path."""
    number = 1 + max((int(path.name[len(name) + 1 :].split(".")[0]) for path in folder.glob(f"{name}-*{SUFFIX}")), default=-1)
    path = folder / f"{name}-{number:04d}{SUFFIX}"
    write_atomically(path, encode(rows))
    return path


def write_manifest(folder: Path, rows: Iterable[Row], end: int, description: dict) -> dict:
    """Writes manifest.json: counts by domain, source and side, licences, hashes of the shards, and `description`."""
    from hedgespec.zoo.sources import by_name

    table = by_name()
    counts: dict[str, dict] = {}
    sources: dict[str, dict] = {}
    for row in rows:
        source = table[row.source]
        for group, name in ((counts, source.domain), (sources, source.name)):
            entry = group.setdefault(
                name, {"rows": 0, "continuation_tokens": 0, "tokens": 0, "held_out_rows": 0, "greedy_rows": 0}
            )
            entry["rows"] += 1
            entry["tokens"] += len(row.tokens)
            entry["continuation_tokens"] += row.written(end)
            entry["held_out_rows"] += row.held_out
            entry["greedy_rows"] += row.temperature == 0
        sources[source.name].setdefault("licences", [])
        if row.licence not in sources[source.name]["licences"]:
            sources[source.name]["licences"].append(row.licence)
    for name, entry in sources.items():
        entry["origin"], entry["kind"] = table[name].origin, table[name].kind
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob(f"*{SUFFIX}"))}
    manifest = {"format": FORMAT, **description, "domains": counts, "sources": sources, "shards": files}
    write_atomically(folder / "manifest.json", (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode())
    return manifest


def pack(folder: Path, destination: Path, end: int, description: dict) -> Path | None:
    """Writes the rows of `folder` that `destination` does not hold into one new shard there; None if there are none.

    Existing files of `destination` are not rewritten, so that a repository that tracks them grows by what is new.
    """
    destination.mkdir(parents=True, exist_ok=True)
    there = read_folder(destination)
    rows = [row for row in read_folder(folder).values() if row.id not in there or len(there[row.id].tokens) < len(row.tokens)]
    if not rows:
        return None
    path = write_shard(destination, "ids", rows)
    write_manifest(destination, merge([*there.values(), *rows]).values(), end, description)
    return path


def as_entry(row: Row) -> dict:
    """A journal's line for a row."""
    return {"row": asdict(row)}
