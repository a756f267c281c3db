"""Griffe extension: brackets in docstrings are shapes such as [N, B], never Markdown links, so they are escaped."""

from __future__ import annotations

import re

import griffe

_CODE = re.compile(r"(``.*?``|`.*?`)")
_SECTION = re.compile(r"(Args|Returns|Raises|Yields|Attributes):")


class Shapes(griffe.Extension):
    """Escapes every "[" outside inline code, code blocks and doctests."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring is not None:
            obj.docstring.value = escape(obj.docstring.value)


def escape(docstring: str) -> str:
    """Returns the docstring, whose indentation is that of its text, with brackets escaped."""
    lines, section = [], False
    for line in docstring.split("\n"):
        if line[:1].strip():  # not indented: text, or the heading of a section
            section = _SECTION.match(line) is not None
        code = (line.startswith("    ") and not section) or line.lstrip().startswith((">>>", "..."))
        lines.append(line if code else _escape(line))
    return "\n".join(lines)


def _escape(line: str) -> str:
    parts = _CODE.split(line)
    return "".join(part if part.startswith("`") else part.replace("[", r"\[") for part in parts)
