"""Datastores of the zoo's target: what it said itself after the training prompts of each domain.

They draft from tokens alone, so engines that show nothing else have experts, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from hedgespec import zoo
from hedgespec.drafters.datastore import Datastore
from hedgespec.errors import ZooError
from hedgespec.zoo import NAMES
from hedgespec.zoo.shards import Row
from hedgespec.zoo.sources import by_name


def store_path(name: str, folder: Path | None = None) -> Path:
    """The file of one of the zoo's stores, named as its heads are; in another folder than its own, if one is given."""
    return (folder or zoo.FOLDER) / "stores" / f"{name}.safetensors"


def load_store(name: str) -> Datastore:
    """One of the zoo's stores. Raises: ValueError for an unknown name; CheckpointError where it is missing or corrupt."""
    if name not in NAMES:
        raise ValueError(f"name: expected one of {', '.join(NAMES)}, got {name!r}")
    return Datastore.load(store_path(name))


def build(folder: Path, rows: Sequence[Row], report: Callable[[str], None] = print) -> None:
    """Makes a store of each domain's training rows, prompts included, and one of all of them, called `chat` as the head is.

    Args:
        folder: gets `stores/NAME.safetensors`.
        rows: collected conversations; held-out ones are left out.
        report: receives a line a store.

    Raises: ZooError if there are no training rows.
    """
    table = by_name()
    domains: dict[str, list[np.ndarray]] = {}
    for row in rows:
        if not row.held_out:
            text = np.array(row.tokens, dtype=np.int64)
            for name in dict.fromkeys((table[row.source].domain, "chat")):
                domains.setdefault(name, []).append(text)
    if not domains:
        raise ZooError("stores: expected training rows, got none; run `hedgespec zoo collect`")
    for name, texts in domains.items():
        path = store_path(name, folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        store = Datastore.build(texts)
        store.save(path)
        report(f"{name}: {len(store)} entries from {sum(map(len, texts))} tokens of {len(texts)} texts")
