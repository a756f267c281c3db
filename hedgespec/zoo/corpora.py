"""The zoo's domains: where each one's text comes from, how it is split, and the prompts cut from it.

Every domain is a list of documents `(identifier, text)`. A document is held out when the hash of its identifier says so,
so the split is by document and does not depend on the order of files. Packages are fetched by name;
nothing of them is run but bible-kjv's own printing program.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hedgespec.errors import ZooError
from hedgespec.utils.paths import cache_dir
from hedgespec.zoo import templates

Document = tuple[str, str]


@dataclass(frozen=True)
class Domain:
    """One domain of the mixed stream."""

    name: str
    source: str
    licence: str
    documents: Callable[[], Iterator[Document]]
    prompt_tokens: int
    """Length of a training prompt; a held-out prompt is cut to about as much text."""
    chat: bool = False
    """Whether a document is a user's message, to be wrapped in the target's chat template, rather than text to go on."""


def held_out(identifier: str) -> bool:
    """About one document in five belongs to the held-out side."""
    return hashlib.sha256(identifier.encode()).digest()[0] < 51


def _run(command: list[str], folder: Path) -> str:
    try:
        return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, errors="replace").stdout
    except FileNotFoundError as error:
        raise ZooError(f"fetching the corpora needs {command[0]} on the path") from error
    except subprocess.CalledProcessError as error:
        raise ZooError(f"{' '.join(command)} failed: {error.stderr.strip()[-300:]}") from error


def _fetched(name: str, fetch: Callable[[Path], None]) -> Path:
    folder = cache_dir() / "corpora" / name
    if not (folder / "COMPLETE").exists():
        folder.mkdir(parents=True, exist_ok=True)
        fetch(folder)
        (folder / "COMPLETE").touch()
    return folder


def _debian(package: str) -> Path:
    def fetch(folder: Path) -> None:
        _run(["apt-get", "download", package], folder)
        _run(["dpkg", "-x", str(next(folder.glob("*.deb"))), "."], folder)

    return _fetched(package, fetch)


def _npm(package: str) -> Path:
    def fetch(folder: Path) -> None:
        _run(["npm", "pack", "--silent", package], folder)
        _run(["tar", "xzf", str(next(folder.glob("*.tgz")))], folder)

    return _fetched(package, fetch)


def python() -> Iterator[Document]:
    """The standard library of the interpreter that runs this, without its tests, a few of its packages, and tiny files."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "turtledemo", "ensurepip", "encodings"}
    for path in sorted(root.rglob("*.py")):
        where = path.relative_to(root)
        if skip.isdisjoint(where.parts) and path.stat().st_size > 2000:
            yield str(where), path.read_text(errors="replace")


def scripture() -> Iterator[Document]:
    """The King James Version, a document a chapter."""
    program = _debian("bible-kjv") / "usr/bin/bible"
    text = _run([str(program), "-f", "-p", str(_debian("bible-kjv-text") / "usr/lib"), "gen1:1-rev22:21"], Path.cwd())
    chapters: dict[str, list[str]] = {}
    for line in text.splitlines():
        if match := re.match(r"(\w+):(\d+):\d+ (.*)|(\w+?)(\d+):\d+ (.*)", line):
            book, chapter, verse = [part for part in match.groups() if part is not None]
            chapters.setdefault(f"{book} {chapter}", []).append(verse.strip())
    if len(chapters) < 1000:
        raise ZooError(f"bible-kjv: expected 1189 chapters, got {len(chapters)}")
    for name, verses in chapters.items():
        yield name, "\n".join(verses)


def legal() -> Iterator[Document]:
    """The licence texts of the SPDX list, a document a licence: ASCII paragraphs that are new, if 1000 characters long."""
    seen: set[str] = set()
    for name, entry in sorted(json.loads((_npm("spdx-license-list") / "package/spdx-full.json").read_text()).items()):
        fresh = []
        for paragraph in re.split(r"\n\s*\n", entry["licenseText"]):
            key = re.sub(r"\W+", " ", paragraph.lower())
            if key not in seen and paragraph.isascii():
                seen.add(key)
                fresh.append(re.sub(r"\s+", " ", paragraph).strip())
        if len(text := "\n\n".join(fresh)) > 1000:
            yield name, text


OWN = "written for this project", "Apache-2.0"
DOMAINS: dict[str, Domain] = {
    domain.name: domain
    for domain in (
        Domain("python", "CPython's standard library", "PSF-2.0", python, 64),
        Domain("sql", f"SQL scripts from templates {OWN[0]}", OWN[1], templates.sql, 64),
        Domain("math", f"arithmetic word problems from templates {OWN[0]}", OWN[1], templates.math, 96),
        Domain("scripture", "King James Version, Debian package bible-kjv-text", "public domain", scripture, 48),
        Domain("legal", "SPDX licence texts, npm package spdx-license-list", "CC0-1.0", legal, 48),
        Domain("french", f"French prose from templates {OWN[0]}", OWN[1], templates.french, 64),
        Domain("chat", f"questions and requests from templates {OWN[0]}", OWN[1], templates.chat, 40, chat=True),
    )
}


def prompts(domain: Domain, count: int, *, side: str, seed: int = 0, characters: int | None = None) -> list[tuple[str, str]]:
    """`count` distinct prompts as `(document identifier, text)` from one side ("train" or "held_out") of a domain.

    A prompt starts at a line or paragraph of a document and is cut after `characters`; a chat document is one prompt.
    Raises: ZooError when the domain has too little text.
    """
    rng = random.Random(f"{domain.name} {side} {seed}")
    documents = [entry for entry in domain.documents() if held_out(entry[0]) == (side == "held_out")]
    rng.shuffle(documents)
    found: dict[str, str] = {}
    for _ in range(40):
        for identifier, text in documents:
            if len(found) == count:
                return [(name, cut) for cut, name in found.items()]
            if domain.chat:
                found.setdefault(text, identifier)
                continue
            starts = [match.end() for match in re.finditer(r"\n+(?=\S)", text)] or [0]
            starts = [start for start in starts if start + (characters or 1) <= len(text)]
            if starts:
                start = rng.choice(starts)
                found.setdefault(text[start : start + characters] if characters else text[start:], identifier)
    raise ZooError(f"domain {domain.name}: expected {count} {side} prompts in its text, got {len(found)}")
