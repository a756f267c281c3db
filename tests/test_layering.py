"""The walls of the house, held by reading every import in it (docs: CONTRIBUTING.md)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hedgespec"

STAGES = {"evaluate", "verify", "delay", "learners", "selection", "drafters"}
FOUNDATIONS = {"records", "config", "errors", "checks", "backends", "cache", "launch", "native", "workspace", "compat"}
FOUNDATIONS |= {"linear", "prefill", "transfer", "capture", "paths", "tree", "costs", "depth", "scalars", "files"}
FOUNDATIONS |= {"positions", "wrappers"}
"""What every stage may know: data, names, and what the models of drafters and decoder are made of."""
ENTRANCES = {"hf", "engines", "zoo", "cli", "experiments"}
"""Rooms above the decoder, which use the package as its users do."""
KNOW_THE_STAGES = {"__init__", "algorithm", "decoder"} | ENTRANCES
MAKE_DRAFTERS = {"checkpoints"}
"""Rooms that read drafters from files: they know the drafters and no other stage."""
GENERATION = ("GenerationMixin", "GenerationConfig", "GenerateOutput", "StoppingCriteria", "TextStreamer")
LOGITS_PROCESSORS = "transformers.generation.logits_process"
SAMPLING_ROOMS = {"decoder", "sampling"}


def room(path: Path) -> str:
    """The module, or for a file in a folder the folder: drafters/eagle.py is in `drafters`."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Every dotted name that the file imports, `from a import b` as a.b; relative imports made absolute."""
    names = set()
    package = ["hedgespec", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{origin}.{alias.name}" for alias in node.names}
    return names


def rooms_imported(path: Path) -> set[str]:
    own = {name.split(".")[1] for name in imported(path) if name.startswith("hedgespec.")}
    return own - {room(path)}


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.fixture(params=FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def file(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_only_the_algorithm_and_the_decoder_know_the_stages(file):
    allowed = STAGES if room(file) in KNOW_THE_STAGES else {"drafters"} if room(file) in MAKE_DRAFTERS else set()
    assert rooms_imported(file) & STAGES <= allowed


def test_a_stage_knows_no_other(file):
    if room(file) in STAGES:
        allowed = FOUNDATIONS | {"_native", "triton_kernels"}  # its own kernels
        known = rooms_imported(file)
        modules = {name for name in known if (PACKAGE / name).exists() or (PACKAGE / f"{name}.py").exists()}
        assert modules <= allowed


def test_learners_know_numbers_and_drafters_know_models(file):
    names = imported(file)
    if room(file) in ("learners", "depth"):
        assert not any(name.split(".")[0] in ("torch", "transformers") for name in names)
        assert "drafters" not in rooms_imported(file)
    if room(file) == "drafters":
        assert "learners" not in rooms_imported(file)


def test_engines_stay_at_the_entrances(file):
    if room(file) in ENTRANCES:
        return
    for name in imported(file):
        top, *rest = name.split(".")
        assert top not in ("vllm", "argparse")
        if top == "transformers" and not (room(file) in SAMPLING_ROOMS and name.startswith(LOGITS_PROCESSORS)):
            assert rest[:1] != ["generation"]
            assert not rest or not rest[-1].startswith(GENERATION)


def test_the_native_sources_include_no_torch_headers():
    for source in (PACKAGE.parent / "csrc").iterdir():
        assert "<torch" not in source.read_text()
        assert "<ATen" not in source.read_text()


def test_the_reader_sees_every_form_of_import(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    file = tmp_path / "drafters" / "eagle.py"
    file.parent.mkdir()
    file.write_text(
        "import os.path\nfrom ..learners import base\nfrom . import ngram\ndef f():\n    from hedgespec import verify\n"
    )
    assert imported(file) == {
        "os.path", "hedgespec.learners.base", "hedgespec.drafters.ngram", "hedgespec.verify",
    }  # fmt: skip
    assert rooms_imported(file) == {"learners", "verify"}
