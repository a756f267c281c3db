"""The cache folder."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Returns the folder for downloaded and converted files: `$HEDGESPEC_CACHE`, or `hedgespec` in the user's cache folder."""
    if path := os.environ.get("HEDGESPEC_CACHE"):
        return Path(path).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "hedgespec"
