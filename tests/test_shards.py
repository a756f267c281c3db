"""Files of a collection: what is written is read again, whatever happens in between."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from hedgespec.errors import ZooError
from hedgespec.zoo import shards
from hedgespec.zoo.shards import Journal, Row


def row(number: int, *, turns: int = 1, held_out: bool = False, source: str = "chat-self", temperature: float = 0.0) -> Row:
    rng = random.Random(number)
    prompt = [1, *(rng.randrange(3, 49152) for _ in range(3 + number % 5)), 2]
    tokens, last = [*prompt, 40, 41, 2], len(prompt)
    if turns == 2:
        tokens += [1, 9, 2]
        last = len(tokens)
        tokens += [50, 51, 52]
    return Row(f"{number:016x}", source, "own", held_out, temperature, len(prompt), last, tokens)


ROWS = [row(number, turns=1 + number % 2, held_out=number == 3, temperature=number % 3 * 0.47) for number in range(9)]


def test_a_shard_keeps_everything():
    found = shards.decode(shards.encode(ROWS))
    assert sorted(found, key=lambda each: each.key) == ROWS
    assert shards.decode(shards.encode([replace(ROWS[0], key="f" * 16, tokens=[0, 65535, 2, 40, 2])]))[0].tokens[1] == 65535


def test_answers():
    assert [one.answers(2) for one in (row(0), row(0, turns=2))] == [[(5, 8)], [(5, 8), (11, 14)]]
    assert row(0, turns=2).written(2) == 6


def test_bad_shards_are_named(tmp_path):
    good = shards.encode(ROWS)
    for data in (b"", b"nothing", good[: len(good) // 2]):
        (tmp_path / "ids-0000.npz.xz").write_bytes(data)
        with pytest.raises(ZooError, match=r"ids-0000.npz.xz: expected a shard of token ids in format hedgespec-ids-1"):
            shards.read_folder(tmp_path)


def test_a_journal_survives_a_kill(tmp_path):
    """A torn last line is skipped, and the next process's first line does not hang on it."""
    journal = Journal(tmp_path / "w.journal")
    for one in ROWS[:3]:
        journal.append(shards.as_entry(one))
    journal.close()
    whole = journal.path.read_bytes()
    journal.path.write_bytes(whole[:-20])
    again = Journal(journal.path)
    again.append(shards.as_entry(ROWS[5]))
    again.close()
    assert list(shards.read_folder(tmp_path).values()) == [ROWS[0], ROWS[1], ROWS[5]]


def test_a_full_disk_is_told_and_nothing_is_lost(tmp_path, monkeypatch):
    with pytest.raises(
        ZooError, match="/dev/full could not be written .No space left on device.; nothing collected before is lost"
    ):
        Journal(Path("/dev/full")).append({"row": 1})
    shards.write_shard(tmp_path, "w", ROWS[:4])
    monkeypatch.setattr(shards.os, "fsync", lambda number: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ZooError, match="w-0001.npz.xz could not be written .No space left on device."):
        shards.write_shard(tmp_path, "w", ROWS[4:])
    assert [path.name for path in tmp_path.iterdir()] == ["w-0000.npz.xz"]
    assert list(shards.read_folder(tmp_path).values()) == sorted(ROWS[:4], key=lambda each: (each.source, each.tokens))


def test_a_second_turn_replaces_the_first(tmp_path):
    first = row(4)
    longer = row(4, turns=2)
    assert list(shards.merge([longer, first, row(5)]).values()) == [longer, row(5)]


def test_packing_adds_and_never_rewrites(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    shards.write_shard(here, "worker-00", ROWS[:4])
    first = shards.pack(here, there, 2, {"seed": 0})
    before = first.read_bytes()
    assert shards.pack(here, there, 2, {"seed": 0}) is None
    shards.write_shard(here, "worker-01", ROWS[2:])
    second = shards.pack(here, there, 2, {"seed": 0})
    assert (first.name, second.name) == ("ids-0000.npz.xz", "ids-0001.npz.xz")
    assert first.read_bytes() == before
    assert sorted(shards.read_folder(there).values(), key=lambda each: each.key) == ROWS
    manifest = json.loads((there / "manifest.json").read_text())
    assert manifest["shards"] == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (first, second)}
    assert manifest["domains"]["chat"] == {
        "rows": 9, "continuation_tokens": sum(one.written(2) for one in ROWS), "tokens": sum(len(one.tokens) for one in ROWS),
        "held_out_rows": 1, "greedy_rows": 3,
    }  # fmt: skip
    assert manifest["sources"]["chat-self"]["licences"] == ["own"]
    assert manifest["seed"] == 0
