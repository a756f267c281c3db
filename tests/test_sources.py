"""What is written alike all over the sources: the form of error messages, and citations of files that are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = [ROOT / "hedgespec", ROOT / "triton_kernels"]

# Error messages: "argument: expected X, got Y".


def text_of(node: ast.expr) -> str:
    """A string literal with {} for what is filled in; "" for anything else."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return text_of(node.left) + text_of(node.right) if isinstance(node, ast.BinOp) else ""


def messages(source: str) -> list[str]:
    """The messages of exceptions that the source makes: literal arguments of calls of anything called ...Error or ...error."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name.lower().endswith("error"):
                found += [text for text in map(text_of, node.args) if text]
    return found


def fault(message: str) -> str | None:
    """What is wrong with the form of a message."""
    if re.search(r"(?<!,) got\b", message):
        return "', got' comes after a comma"
    if re.search(r"\bexpects\b|, expected\b", message):
        return "'expected' comes first, after the argument's name and a colon, and then ', got'"
    return None


def test_error_messages_have_one_form():
    sources = [path for package in PACKAGES for path in package.rglob("*.py")]
    known = {path.relative_to(ROOT): messages(path.read_text()) for path in sources}
    assert sum(map(len, known.values())) > 150  # the reader finds them
    assert [(str(path), text, fault(text)) for path, texts in known.items() for text in texts if fault(text)] == []


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ('raise ValueError(f"x: expected 1; got {x}")', True),
        ('raise errors.PoolError("x: expected " + "1 got 2")', True),
        ('error(f"{name}: expected {expected}; got {got}")', True),
        ('raise TypeError(f"x is {x}, expected 1")', True),
        ('raise ValueError(f"prior: {name} expects 1, got {x}")', True),
        ('raise ValueError(f"x: expected 1, got {x}")', False),
        ('raise ValueError("x: expected a file, found none")', False),
        ('print("a; got")', False),
    ],
)
def test_the_reader_of_messages_sees_faults(source, wrong):
    assert any(map(fault, messages(source))) is wrong


# Citations of files.

CITED = re.compile(r"(?<![\w/.{}*<-])(?:[\w-]+/)*[\w-]+\.(?:md|cu|cuh|h|cpp|sh|py)\b(?![\w.(])")
ELSEWHERE = ("vllm/", "v1/", "worker/", "config/")
"""Folders of vLLM's sources, which docs/engines.md and the tests of vLLM cite."""
WRITTEN = {"matrix.md"}
"""Files that commands write."""


def citations(text: str) -> set[str]:
    """Names of files in the text, but for placeholders in capitals such as NAME.py, and for vLLM's."""
    found = set(CITED.findall(text))
    return {name for name in found if not re.search(r"[A-Z]{4}", Path(name).stem) and not name.startswith(ELSEWHERE)}


def test_files_that_are_cited_are_there():
    skipped = {".git", ".venv", "build", "__pycache__"}
    there = [path for path in ROOT.rglob("*.*") if not skipped & set(path.relative_to(ROOT).parts) and path.is_file()]
    names = {f"/{path.relative_to(ROOT)}" for path in there}
    names |= {f"/hedgespec{name}" for name in names if name.startswith("/triton_kernels")}  # where it is installed
    readers = [path for path in there if path.suffix in (".py", ".cu", ".cuh", ".h", ".cpp") and "tests" not in path.parts]
    readers += [*ROOT.glob("docs/*.md"), ROOT / "README.md"]
    lost = {
        (str(path.relative_to(ROOT)), name)
        for path in readers
        for name in citations(path.read_text(encoding="utf-8"))
        if not any(other.endswith(f"/{name}") for other in names)
    }
    assert {(path, name) for path, name in lost if name not in WRITTEN} == set()


def test_the_reader_of_citations_sees_them():
    text = "see `algorithm.md`, section 3; docs/notation.md, csrc/OPERATION.cu and vllm/config/vllm.py, model.py(x), a.python"
    assert citations(text) == {"algorithm.md", "docs/notation.md"}


# Imports of tests.


def test_no_test_imports_another():
    """What tests share lies in tests/helpers."""
    paths = [*(ROOT / "tests").rglob("test_*.py")]
    assert len(paths) > 50
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.startswith("test_") for name in names), path.name
