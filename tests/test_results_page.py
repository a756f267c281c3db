"""The tables of docs/results.md are those of the recorded results, and its prose quotes no other figures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import studies
from studies import page

REPOSITORY = Path(__file__).parent.parent
PAGE, RESULTS = REPOSITORY / "docs" / "results.md", REPOSITORY / "bench" / "results" / "experiments"


@pytest.fixture(scope="module")
def tables() -> dict[str, str]:
    return page.tables_of(RESULTS)


def test_the_tables_of_the_page_are_those_of_the_results(tables):
    assert PAGE.read_text() == page.render(PAGE.read_text(), tables)


def test_every_study_is_on_the_page(tables):
    shown = {block["key"] for block in page.BLOCK.finditer(PAGE.read_text())}
    assert shown <= set(tables)
    assert {f"{name}/source" for name in studies.NAMES} | {"goals"} <= shown
    assert {key for key in tables if key.startswith("options/")} <= shown
    for name in studies.NAMES:
        assert f"../bench/results/experiments/{name}.svg" in PAGE.read_text() and (RESULTS / f"{name}.svg").exists()


def test_every_figure_in_the_prose_is_in_a_table_of_its_section():
    assert page.unsupported_figures(PAGE.read_text()) == []


def test_a_changed_figure_is_noticed(tables, tmp_path):
    text = PAGE.read_text()
    [block] = [block for block in page.BLOCK.finditer(text) if block["key"] == "delay/latency"]
    first = re.search(r"\d\.\d\d", block["table"])[0]
    changed = text[: block.start()] + block[0].replace(first, "7.77", 1) + text[block.end() :]
    assert page.render(changed, tables) == text
    prose = text.replace("\n## Late feedback\n", "\n## Late feedback\n\nIt costs 7.77 tokens.\n")
    assert page.unsupported_figures(prose) == ["7.77"]
    with pytest.raises(ValueError, match=r"table: expected one of goals, .*, got 'delay/nothing'"):
        page.render("<!-- table delay/nothing -->\n<!-- end -->\n", tables)


def test_goals_are_judged_by_the_figures():
    result = json.loads((RESULTS / "baseline.json").read_text())
    below = {domain: {**row, "of_best_fixed": {"mean": 0.97}} for domain, row in result["domains"].items()}
    above = {domain: {**row, "of_best_fixed": {"mean": 0.99}} for domain, row in result["domains"].items()}
    rows = [page.goals({"baseline": {**result, "domains": domains}}).splitlines()[-1] for domains in (below, above)]
    assert ["| missed |" in rows[0], "| met |" in rows[1]] == [True, True]
