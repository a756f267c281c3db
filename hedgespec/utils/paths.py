"""Where things are kept from one run to the next."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """The folder that holds what is made once: `$HEDGESPEC_CACHE`, else the user's cache folder."""
    if path := os.environ.get("HEDGESPEC_CACHE"):
        return Path(path).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "hedgespec"
