"""The documentation is true: its code runs; commands, options, names, paths and links exist; figures are the kept ones."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import importlib.util
import io
import re
import sys
import traceback
from pathlib import Path

import pytest
import yaml
from helpers import docs, docs_figures

import hedgespec
from hedgespec.cli import main

ROOT, PAGES = docs.ROOT, docs.PAGES
WITH_CODE = [page for page in PAGES if docs.blocks(page, "python")]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(params=PAGES, ids=name_of)
def page(request) -> Path:
    return request.param


# Python code


@pytest.fixture(scope="module")
def read_zoo_once():
    """Returns `load_zoo`, which reads the zoo from disk when it is first called."""
    return functools.cache(hedgespec.load_zoo)


@pytest.fixture
def namespace(tmp_path, monkeypatch, read_zoo_once):
    """Returns what every page starts with. The working folder holds the files that pages name, and no others."""
    monkeypatch.setattr(hedgespec, "load_zoo", read_zoo_once)
    monkeypatch.chdir(tmp_path)
    return docs.prepare(tmp_path)


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_the_code_of_a_page_runs_from_top_to_bottom(page, namespace, capsys):
    for block in docs.blocks(page, "python"):
        docs.run(block, namespace)


def test_pages_that_should_have_code_have_it():
    assert {name_of(page) for page in WITH_CODE} >= {
        "README.md", "docs/usage.md", "docs/transformers.md", "docs/drafters.md", "docs/trees.md", "docs/kernels.md",
    }  # fmt: skip


def test_a_broken_example_fails_at_its_line(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n```python\nfirst = 1\n```\n\n```python\nsecond = first + 1\nraise KeyError(second)\n```\n")
    first, second = docs.blocks(page, "python")
    namespace = {}
    docs.run(first, namespace)
    with pytest.raises(KeyError) as caught:
        docs.run(second, namespace)
    last = traceback.extract_tb(caught.value.__traceback__)[-1]
    assert (last.filename, last.lineno) == (str(page), 9)


def test_examples_generate_few_tokens():
    namespace = {}
    docs.run(docs.Block(Path("page.md"), "python", "asked = dict(max_new_tokens=4000)", 0), namespace)
    assert namespace["asked"] == {"max_new_tokens": docs.MOST_NEW_TOKENS}


# Commands and options


@functools.cache
def help_of(*words: str) -> str:
    """Returns what `hedgespec WORDS --help` prints; empty if there is no such command."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
        main([*words, "--help"])
    return out.getvalue()


def subcommands(*words: str) -> list[str]:
    found = re.search(r"\{([\w,-]+)\}", help_of(*words).partition("\n\n")[0])
    return found[1].split(",") if found else []


COMMANDS = {(name,) for name in subcommands()} - {("zoo",)} | {("zoo", name) for name in subcommands("zoo")}


def command_of(words: list[str]) -> tuple[str, ...]:
    """Returns the command that a line of words after `hedgespec` calls; raises ValueError if there is none."""
    for count in (2, 1):
        if tuple(words[:count]) in COMMANDS:
            return tuple(words[:count])
    raise ValueError(f"no such command: hedgespec {' '.join(words)}")


def test_commands_and_their_options_exist(page):
    """Of console blocks, of indented lines, and of inline code that starts with `hedgespec`."""
    lines = [line for line in docs.commands(page) if re.match(r"hedgespec \w", line)]
    lines += re.findall(r"`(hedgespec \w[^`]*)`", docs.prose(page))
    for line in lines:
        words = re.split(r"[|>]", line)[0].split()[1:]
        if words[0].isupper() or words[0] == "vllm":
            continue  # a placeholder
        shown = help_of(*command_of(words))
        for option in re.findall(r"(?<!\S)--[\w-]+", " ".join(words)):
            assert f"{option} " in shown or f"{option}\n" in shown or f"{option}]" in shown, f"{line}: no {option}"


def test_every_command_is_described():
    table = (ROOT / "docs" / "cli.md").read_text()
    assert len(COMMANDS) > 8
    assert [command for command in sorted(COMMANDS) if f"`hedgespec {' '.join(command)}" not in table] == []


def test_options_of_generate_in_prose_exist():
    section = (ROOT / "docs" / "cli.md").read_text().split("## Generate")[1].split("\n## ")[0]
    options = set(re.findall(r"`(--[\w-]+)", section))
    assert len(options) > 10
    assert [option for option in sorted(options) if option not in help_of("generate")] == []


def test_make_targets_exist(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`make ([\w-]+)", docs.prose(page)))
    named |= {line.split()[1] for line in docs.commands(page) if line.startswith("make ")}
    assert named <= targets


def test_the_table_of_options_is_that_of_decode_config():
    text = (ROOT / "docs" / "usage.md").read_text().split("## Options")[1].split("\n### ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| `?([^|`]+?)`? \|", text, re.MULTILINE))
    fields = {field.name: field.default for field in dataclasses.fields(hedgespec.DecodeConfig)}
    assert {name: ast.literal_eval(default) for name, default in rows.items()} == fields


# Names, paths, links


def module_file(name: str) -> Path | None:
    path = ROOT.joinpath(*name.split("."))
    if name.startswith("hedgespec.triton_kernels"):
        path = ROOT.joinpath(*name.split(".")[1:])
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.exists()), None)


def defined_in(file: Path) -> set[str]:
    """Returns the names that a module binds at its top level, without importing it: some need vLLM."""
    names = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def exists(name: str) -> bool:
    """Whether a dotted name below hedgespec is a module or an attribute of one."""
    if module_file(name):
        return True
    home, _, attribute = name.rpartition(".")
    if home == "hedgespec":
        return attribute in hedgespec.__all__
    file = module_file(home)
    return file is not None and attribute in defined_in(file)


def test_names_of_the_package_exist(page):
    names = set(re.findall(r"\bhedgespec(?:\.[A-Za-z_]\w*)+", page.read_text()))
    files = re.compile(r"\.(py|md|png|json|h)$")
    assert [name for name in sorted(names) if not files.search(name) and not exists(name)] == []


FOLDERS = "hedgespec|csrc|triton_kernels|tests|bench|docs"


def test_paths_exist(page):
    named = set(re.findall(rf"`((?:{FOLDERS})/[\w./-]*)`", docs.prose(page)))
    named = {name for name in named if not re.search(r"NAME|OPERATION", name)}
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_relative_links_lead_somewhere(page):
    for path, anchor in docs.links(page):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{path} does not exist"
        if anchor:
            assert anchor in docs.anchors(target), f"{path}#{anchor}: no such heading"


# Figures


def test_figures_are_those_of_the_kept_results():
    texts = {name: (ROOT / name).read_text() for name in (docs_figures.README, docs_figures.BENCHMARKS, docs_figures.ENGINES,
                                                          docs_figures.GUARANTEES)}  # fmt: skip
    expected = list(docs_figures.expected())
    assert len(expected) > 50
    assert [(name, text) for name, text in expected if text not in texts[name]] == []


def test_every_row_of_numbers_in_benchmarks_is_checked():
    checked = {text for name, text in docs_figures.expected() if name == docs_figures.BENCHMARKS}
    rows = [
        line for line in (ROOT / docs_figures.BENCHMARKS).read_text().splitlines() if re.match(r"\| .*\d\.\d|\| .*\d%", line)
    ]
    assert [line for line in rows if line not in checked] == []


def test_the_picture_is_drawn_from_the_kept_data():
    source = ROOT / "docs" / "figures" / "overview.py"
    spec = importlib.util.spec_from_file_location("overview", source)
    overview = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(overview)
    drawn = overview.svg()
    assert overview.SVG.read_text() == drawn
    assert not re.search(r"20\d\d-\d\d", drawn)


# The pages as a whole


def test_the_readme_is_short_and_shows_what_matters_first():
    text = (ROOT / "README.md").read_text()
    assert len(text.encode()) <= 8000
    first_screen = "\n".join(text.splitlines()[:24])
    assert "overview.svg" in first_screen
    assert "CPU" in first_screen
    commands = re.findall(r"^    (\S.*)$", text, re.MULTILINE)
    assert commands[:2] == ["make demo", "make test"]


def test_the_glossary_is_sorted_and_refers_to_itself():
    text = (ROOT / "docs" / "notation.md").read_text().split("## Glossary")[1].split("\n## ")[0]
    entries = re.findall(r"^\| (\S[^|]*?) \| (.*) \|$", text, re.MULTILINE)[1:]
    terms = [term for term, _ in entries]
    assert terms == sorted(terms, key=str.lower)
    assert len(set(terms)) == len(terms) > 30
    named = {word for _, meaning in entries for word in re.findall(r"\*([^*]+)\*", meaning)}
    forms = {form for term in terms for form in (term, f"{term}s", f"{term}es", term.removesuffix(" token"))}
    assert sorted(named - forms) == []


def test_every_page_is_in_the_site():
    config = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader=_Loader)
    pages = set()

    def collect(entry: object) -> None:
        if isinstance(entry, str):
            pages.add(entry)
        else:
            for value in entry.values() if isinstance(entry, dict) else entry:
                collect(value)

    collect(config["nav"])
    files = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert pages == files


class _Loader(yaml.SafeLoader):
    """YAML with the tags that MkDocs adds, which are read as None."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs the extra docs")
def test_the_site_builds_without_a_warning(tmp_path):
    import subprocess

    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "tokens_per_round" in (tmp_path / "site" / "reference" / "decoding" / "index.html").read_text()


def test_brackets_of_docstrings_are_no_links():
    pytest.importorskip("griffe")
    spec = importlib.util.spec_from_file_location("griffe_shapes", ROOT / "docs" / "griffe_shapes.py")
    shapes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shapes)
    docstring = "[B, T] and `x[0]`.\n\n    p[x] = 1\n\nArgs:\n    a: [N] [A].\n\n>>> a[0]\n"
    assert shapes.escape(docstring) == docstring.replace("[B", r"\[B").replace("[N] [A]", r"\[N] \[A]")
