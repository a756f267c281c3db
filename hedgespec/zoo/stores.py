"""Datastores of the zoo's target: what it said itself after the training prompts of each domain.

They draft from tokens alone, so engines that show nothing else have experts, too.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hedgespec import zoo
from hedgespec.drafters.datastore import Datastore
from hedgespec.errors import ZooError
from hedgespec.zoo import EXPERTS, GENERALIST, NAMES, continuations
from hedgespec.zoo.corpora import DOMAINS


def store_path(name: str, folder: Path | None = None) -> Path:
    """The file of one of the zoo's stores, named as its heads are; in another folder than its own, if one is given."""
    return (folder or zoo.FOLDER) / "stores" / f"{name}.safetensors"


def load_store(name: str) -> Datastore:
    """One of the zoo's stores. Raises: ValueError for an unknown name; CheckpointError where it is missing or corrupt."""
    if name not in NAMES:
        raise ValueError(f"name: expected one of {', '.join(NAMES)}, got {name!r}")
    return Datastore.load(store_path(name))


def build(folder: Path, names: tuple[str, ...] = NAMES, report: Callable[[str], None] = print) -> None:
    """Makes stores of the cached continuations, the generalist's of all domains'.

    Raises: ZooError where a domain has none.
    """
    for name in names:
        domains = tuple(DOMAINS) if name == GENERALIST else (name,)
        texts = []
        for domain in domains:
            shards = continuations.load(domain)
            if not shards and domain in EXPERTS:
                raise ZooError(f"domain {domain}: expected continuations in the cache, found none")
            texts += [row[:length].numpy() for one in shards for row, length in zip(one["tokens"], one["length"].tolist())]
        path = store_path(name, folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        store = Datastore.build(texts)
        store.save(path)
        report(f"{name}: {len(store)} entries from {sum(map(len, texts))} tokens of {len(texts)} texts")
