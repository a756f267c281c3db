"""MkDocs hook: links from a page to a file outside docs/ become plain text on the site, which does not have that file.

Pictures outside docs/ are left out. A link to a file that does not exist is a warning, which `make docs` treats as an error.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

_log = logging.getLogger("mkdocs.hooks.repository_links")
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(((?:\.\./)+[^)\s]+)\)")


def on_page_markdown(markdown: str, *, page, config, files) -> str:
    """Returns the page's Markdown with links that leave docs/ replaced by their text."""
    docs = Path(config["docs_dir"]).resolve()
    here = Path(page.file.abs_src_path).parent

    def replace(match: re.Match) -> str:
        picture, words, link = match.groups()
        target = (here / link.partition("#")[0]).resolve()
        if target.is_relative_to(docs):
            return match[0]
        if not target.exists():
            _log.warning("%s: %s does not exist", page.file.src_path, link)
        return "" if picture else f"{words} (`{target.relative_to(docs.parent)}`)"

    return _LINK.sub(replace, markdown)
