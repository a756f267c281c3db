"""The layout of the package: which package may import which, held by reading every import (CONTRIBUTING.md shows the table)."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hedgespec"

BASE = {"core", "utils"}
ALLOWED: dict[str, set[str]] = {
    "utils": set(),
    "core": {"utils"},
    "ops": BASE,
    "triton_kernels": BASE | {"ops"},
    "learners": BASE,
    "runtime": BASE | {"ops"},
    "drafters": BASE | {"ops", "runtime"},
    "selection": BASE | {"learners"},
    "decoder": BASE | {"ops", "learners", "runtime", "drafters", "selection"},
    "integrations": BASE | {"ops", "learners", "runtime", "drafters", "selection", "decoder"},
    "zoo": BASE | {"ops", "learners", "runtime", "drafters", "selection", "decoder", "integrations"},
    "experiments": BASE | {"ops", "learners", "runtime", "drafters", "selection", "decoder", "integrations", "zoo"},
    "cli": BASE | {"ops", "learners", "runtime", "drafters", "selection", "decoder", "integrations", "zoo", "experiments"},
}
"""For each package the packages that it may import. "core" is the modules of `hedgespec` itself."""
CORE = {"__init__", "__main__", "algorithm", "config", "records", "errors", "stats", "device"}
"""All modules of `hedgespec` itself. A new one needs a room instead."""
GENERATION = ("GenerationMixin", "GenerationConfig", "GenerateOutput", "StoppingCriteria", "TextStreamer")
MOST_LINES = 400
"""Of a file in `hedgespec`."""
MOST_FUNCTION_LINES = 60
"""Of a function in `hedgespec`, with its signature and docstring."""
LONG_FILES = {
    "hedgespec.ops.evaluate", "hedgespec.ops.self_test", "hedgespec.ops.verify", "hedgespec.runtime.target",
    "hedgespec.zoo.collect", "hedgespec.zoo.sources", "hedgespec.zoo.train",
}  # fmt: skip
"""Files that are still to be split. The list must only shrink."""
LONG_FUNCTIONS = {
    "hedgespec.algorithm.decode", "hedgespec.decoder.generate", "hedgespec.decoder.chain_drafting.draft_chains",
    "hedgespec.ops.evaluate.evaluate", "hedgespec.ops.head_layers.rotary_append", "hedgespec.ops.native.evaluate",
    "hedgespec.ops.native.evaluator", "hedgespec.ops.verify.verify", "hedgespec.ops.verify.verify_tree",
    "hedgespec.zoo.collect.collect", "hedgespec.zoo.demo.run", "hedgespec.zoo.generation.generate",
    "hedgespec.zoo.train.train_head",
}  # fmt: skip
"""Functions that are still to be split. The list must only shrink."""
ABOVE_THE_DECODER = {"integrations", "zoo", "experiments", "cli"}


def package_of(name: str) -> str:
    """`hedgespec.ops.verify` -> ops; `hedgespec.config` -> core."""
    parts = name.split(".")
    if len(parts) < 2 or parts[1] in CORE or (not (PACKAGE / parts[1]).is_dir() and parts[1] != "triton_kernels"):
        return "core"
    return parts[1]


def modules() -> dict[str, Path]:
    """Dotted name -> file, for the package and its Triton kernels, which are installed as hedgespec.triton_kernels."""
    found = {}
    for folder, prefix in ((PACKAGE, ("hedgespec",)), (ROOT / "triton_kernels", ("hedgespec", "triton_kernels"))):
        for path in sorted(folder.rglob("*.py")):
            parts = (*prefix, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(source: str, module: str, is_package: bool = False) -> set[str]:
    """Every dotted name that a module imports, `from a import b` as a.b; relative imports made absolute."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{origin}.{alias.name}" for alias in node.names}
    return names


def imports_of(module: str) -> set[str]:
    path = MODULES[module]
    return imports(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")


def module_named(name: str) -> str | None:
    """The module that an imported name is, or is in."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


def edges() -> dict[str, set[str]]:
    """Package -> packages that it imports."""
    found: dict[str, set[str]] = {name: set() for name in ALLOWED}
    for module in MODULES:
        if module in ("hedgespec", "hedgespec.__main__"):
            continue  # they import public names when these are first used
        for name in imports_of(module):
            if name.split(".")[0] == "hedgespec" and (target := module_named(name)) not in (None, "hedgespec"):
                found[package_of(module)].add(package_of(target))
    return {package: targets - {package} for package, targets in found.items()}


def test_every_import_between_packages_is_in_the_table(capsys):
    found = edges()
    with capsys.disabled():
        print(f"\n{len(found)} packages, {sum(map(len, found.values()))} imports between them")
    for package, targets in found.items():
        assert targets <= ALLOWED[package], f"{package} imports {sorted(targets - ALLOWED[package])}"
    assert len(found) <= 14


def test_the_table_itself_has_no_circle():
    assert list(TopologicalSorter(ALLOWED).static_order())
    with pytest.raises(CycleError):
        list(TopologicalSorter({"a": {"b"}, "b": {"a"}}).static_order())


def test_modules_import_each_other_without_circles():
    """Imports at the top of modules, those for type checkers included."""
    graph = {}
    for module, path in MODULES.items():
        top = ast.Module([node for node in ast.parse(path.read_text(encoding="utf-8")).body], [])
        top.body = [node for node in top.body if not isinstance(node, (ast.FunctionDef, ast.ClassDef))]
        names = imports(ast.unparse(top), module, path.name == "__init__.py")
        graph[module] = {target for name in names if (target := module_named(name)) and target != module}
        graph[module].discard("hedgespec")
    for module in MODULES:  # `from package import module` imports the module, and runs the package first
        graph[module] -= {parent for parent in graph[module] if module.startswith(f"{parent}.")}
    assert list(TopologicalSorter(graph).static_order())


def test_no_new_flat_module():
    assert {path.stem for path in PACKAGE.glob("*.py")} == CORE


def long_functions(source: str) -> set[str]:
    """Names of the functions of a module that are over the limit."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return {one.name for one in functions if (one.end_lineno or 0) - one.lineno >= MOST_FUNCTION_LINES}


def test_files_and_functions_are_short():
    sources = {module: path.read_text(encoding="utf-8") for module, path in MODULES.items() if path.is_relative_to(PACKAGE)}
    files = {module for module, source in sources.items() if len(source.splitlines()) > MOST_LINES}
    functions = {f"{module}.{name}" for module, source in sources.items() for name in long_functions(source)}
    assert files <= LONG_FILES, f"over {MOST_LINES} lines: {sorted(files - LONG_FILES)}"
    assert functions <= LONG_FUNCTIONS, f"over {MOST_FUNCTION_LINES} lines: {sorted(functions - LONG_FUNCTIONS)}"


def test_the_length_of_a_function_is_counted_with_its_signature():
    body = "    pass\n" * (MOST_FUNCTION_LINES - 1)
    assert long_functions(f"def short():\n{body}") == set()
    assert long_functions(f"class A:\n    def long(self):\n{body.replace('    ', '        ')}        pass\n") == {"long"}


def test_contributing_shows_the_table():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    lines = text.split("<!-- walls -->")[1].split("<!-- end of walls -->")[0].strip().splitlines()[2:]
    shown = {}
    for line in lines:
        package, allowed = (cell.strip().strip("`") for cell in line.strip("|").split("|"))
        shown[package] = {name.strip().strip("`") for name in allowed.split(",")} - {"", "nothing"}
    assert shown == ALLOWED


@pytest.mark.parametrize("module", MODULES)
def test_heavy_and_foreign_imports_stay_where_they_belong(module):
    package, names = package_of(module), imports_of(module)
    tops = {name.split(".")[0] for name in names}
    if package == "learners":
        assert not tops & {"torch", "transformers"}
    if package not in ABOVE_THE_DECODER:
        assert not tops & {"vllm", "argparse"}
        for name in names:
            if name.startswith("transformers.") and not name.startswith("transformers.generation.logits_process"):
                assert not name.startswith("transformers.generation")
                assert not name.rpartition(".")[2].startswith(GENERATION)


def test_the_native_sources_include_no_torch_headers():
    for source in (ROOT / "csrc").iterdir():
        text = source.read_text(encoding="utf-8")
        assert "<torch" not in text and "<ATen" not in text


def test_the_reader_sees_every_form_of_import():
    source = "import os.path\nfrom ..learners import base\nfrom . import ngram\ndef f():\n    from hedgespec import verify\n"
    assert imports(source, "hedgespec.drafters.eagle") == {
        "os.path", "hedgespec.learners.base", "hedgespec.drafters.ngram", "hedgespec.verify",
    }  # fmt: skip
    assert package_of("hedgespec.ops.verify") == "ops" and package_of("hedgespec.config") == "core"
    assert module_named("hedgespec.decoder.Decoder") == "hedgespec.decoder"
