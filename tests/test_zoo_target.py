"""The zoo's target from the cache: dtypes, damage, packages and room that are missing. A tiny model stands in for it."""

from __future__ import annotations

import errno
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.command_line import byte_tokenizer, fails, speaker
from safetensors.torch import load_file, save_file

from hedgespec import cli, zoo
from hedgespec.cli import parser
from hedgespec.drafters.eagle import EagleConfig, EagleHead
from hedgespec.errors import CheckpointError, ZooError
from hedgespec.zoo import pipeline
from hedgespec.zoo.storage import load_head, save_head
from hedgespec.zoo.target import NAME, NEEDED, load_target, target_path


@pytest.fixture
def cached(tmp_path, monkeypatch) -> Path:
    """The folder of a cached target."""
    folder = tmp_path / NAME
    tokenizer = byte_tokenizer()
    speaker(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "COMPLETE").write_text("")
    monkeypatch.setenv("HEDGESPEC_CACHE", str(tmp_path))
    return folder


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float64, torch.float64),
        (torch.float16, torch.float16), ("bfloat16", torch.bfloat16), ("torch.float64", torch.float64), ("auto", torch.float32),
    ],
)  # fmt: skip
def test_a_dtype_comes_as_it_is_by_its_name_or_by_the_file(cached, dtype, expected):
    loaded = zoo.load_zoo((), dtype=dtype)
    assert {one.dtype for one in loaded.target.parameters()} == {expected}
    assert not loaded.target.training and loaded.drafters == []
    assert zoo.load_zoo((), device=torch.device("cpu")).target.dtype is torch.float32


def test_wrong_arguments_are_refused_before_anything_is_read(monkeypatch, tmp_path):
    monkeypatch.setenv("HEDGESPEC_CACHE", str(tmp_path / "none"))
    for wrong in ("int8", "float", "complex64", torch.int8, torch.complex64):
        with pytest.raises(ValueError, match=r"dtype: expected auto, a torch.dtype, or one of float64, float32"):
            zoo.load_zoo(dtype=wrong)
    for wrong in (None, 32, float):
        with pytest.raises(TypeError, match=r"dtype: expected auto, a torch.dtype, or one of float64, float32.*, got"):
            zoo.load_zoo(dtype=wrong)
    for wrong in ("python", 3, None):
        with pytest.raises(TypeError, match="drafters: expected a sequence of names, got"):
            zoo.load_zoo(wrong)
    with pytest.raises(TypeError, match="domain: expected a str or None, got 3"):
        zoo.load_prompts(3)
    assert not (tmp_path / "none").exists()


def spoil(folder: Path, how: str) -> None:
    weights = folder / "model.safetensors"
    if how == "cut short":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif how == "cut in its header":
        weights.write_bytes(weights.read_bytes()[:100])
    elif how == "empty":
        weights.write_bytes(b"")
    elif how == "a weight is missing":
        tensors = load_file(weights)
        del tensors["model.norm.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
    elif how == "no tokenizer":
        (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text()[:100])
    elif how == "config cut short":
        (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    "how", ["cut short", "cut in its header", "empty", "a weight is missing", "no tokenizer", "config cut short"]
)
def test_a_damaged_target_is_told_with_the_remedy(cached, how, capsys):
    spoil(cached, how)
    with pytest.raises(CheckpointError, match="expected the zoo's target, got files that cannot be read .*remove the folder"):
        load_target()
    with pytest.raises(CheckpointError, match="remove the folder"):
        zoo.load_zoo(())
    capsys.readouterr()
    fails(capsys, 1, str(cached), "remove the folder", argv=["generate", "c", "--drafter", "ngram"])


@pytest.mark.parametrize("package", NEEDED)
def test_a_missing_package_is_named_with_its_extra(package, monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    monkeypatch.setenv("HEDGESPEC_CACHE", str(tmp_path))
    for call in (zoo.load_zoo, target_path, load_target):
        with pytest.raises(ZooError, match=rf"needs the packages {package}: pip install 'hedgespec\[zoo\]'"):
            call()


def test_the_zoo_can_be_imported_and_read_without_its_extra(cached):
    """Nothing is imported before it is needed: neither the extra's packages, nor torch for the names alone."""
    code = (
        "import sys\nfor name in ('gguf', 'accelerate', 'matplotlib'): sys.modules[name] = None\n"
        "from hedgespec import zoo\nassert not {'torch', 'filelock'} & set(sys.modules) and zoo.STAGES and zoo.load_prompts()\n"
        "assert zoo.load_zoo(()).target is not None\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_room_for_the_target_is_told_with_the_remedy(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HEDGESPEC_CACHE", str(tmp_path))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "somewhere")

    monkeypatch.setattr("hedgespec.zoo.target._fetch", lambda scratch: scratch)
    monkeypatch.setattr("hedgespec.zoo.target._convert", full)
    with pytest.raises(ZooError, match=r"could not be prepared in .*No space left.*HEDGESPEC_CACHE names another folder"):
        target_path(quiet=True)
    capsys.readouterr()
    assert cli.main(["zoo", "path"]) == 1
    assert "HEDGESPEC_CACHE names another folder" in capsys.readouterr().err
    assert [one.suffix for one in tmp_path.iterdir()] in ([], [".lock"])


def test_stages_are_in_one_place():
    assert pipeline.STAGES is zoo.STAGES is parser.STAGES and "stores" in zoo.STAGES
    with pytest.raises(ValueError, match="stage: expected all or one of collect, stores, heads, matrix, got 'eat'"):
        pipeline.run(stage="eat", console=None)


@pytest.mark.parametrize("config", ["[]", "3", "null", "{}", '{"hidden_size": "8"}', "{", '{"aux_layers": [1, null]}'])
def test_a_head_of_the_zoo_with_other_metadata_is_refused(config, tmp_path):
    target = speaker(byte_tokenizer())
    shapes = EagleConfig(64, 64, 4, 2, 16, 8, 257, 40, (0, 1, 2))
    save_head(EagleHead(shapes, target.get_input_embeddings(), torch.arange(40)), tmp_path / "head.safetensors")
    if config.startswith('{"'):
        whole = json.loads(json.dumps(vars(shapes)))
        config = json.dumps(whole | json.loads(config))
    metadata = {"format": "hedgespec-zoo-1", "config": config}
    save_file(load_file(tmp_path / "head.safetensors"), tmp_path / "head.safetensors", metadata=metadata)
    with pytest.raises(CheckpointError, match="expected the head's shapes in its metadata, got none that can be read"):
        load_head(tmp_path / "head.safetensors", target)
    for path in (None, 3, tmp_path):
        with pytest.raises(CheckpointError, match="path: expected a"):
            load_head(path, target)
