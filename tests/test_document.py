"""docs/compatibility.md is what the lists that the tests go through say."""

from __future__ import annotations

from helpers.document import PATH, text


def test_the_document_is_current():
    assert PATH.read_text() == text(), "run `python -m helpers.document` in tests/"
