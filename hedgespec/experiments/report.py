"""What was measured, told in one file."""

from __future__ import annotations

import json
import os
from pathlib import Path

from hedgespec.experiments import NAMES, load


def write(folder: Path, path: Path) -> None:
    """Writes every experiment that has a result in a folder as one file of Markdown.

    Raises: ValueError where there is none.
    """
    found = [name for name in NAMES if (folder / f"{name}.json").exists()]
    if not found:
        raise ValueError(f"folder: expected the results of an experiment, got {folder}, which has none")
    parts = ["# Results"]
    for name in found:
        experiment = load(name)
        result = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        figure = Path(os.path.relpath(folder / f"{name}.svg", path.parent)).as_posix()
        parts += [f"## {experiment.title}", experiment.question, experiment.tell(result), f"![{experiment.title}]({figure})"]
    path.write_text("\n\n".join(part.strip() for part in parts) + "\n", encoding="utf-8")
