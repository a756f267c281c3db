"""A file is replaced whole or stays as it was."""

from __future__ import annotations

import os
import stat
from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_file, save_file

from hedgespec.utils.files import replacing, write_tensors, write_text


def test_a_file_is_there_when_it_is_whole(tmp_path):
    path = tmp_path / "x.txt"
    with replacing(path) as fresh:
        fresh.write_text("half")
        assert not path.exists() and fresh.name == path.name
        fresh.write_text("whole")
    assert path.read_text() == "whole" and list(tmp_path.iterdir()) == [path]
    with suppress(KeyError), replacing(path) as fresh:
        fresh.write_text("other")
        raise KeyError
    assert path.read_text() == "whole" and list(tmp_path.iterdir()) == [path]


def test_folders_links_and_devices(tmp_path):
    with pytest.raises(IsADirectoryError), replacing(tmp_path):
        pass
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "named")
    write_text(link, "text")
    assert link.is_symlink() and (tmp_path / "named").read_text() == "text"
    write_text(os.devnull, "text")
    assert not stat.S_ISREG(os.stat(os.devnull).st_mode)
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "no" / "such", "text")


def test_names_of_files_that_are_no_utf_8_can_be_written(tmp_path):
    write_text(tmp_path / "x", "caf\udce9 é")
    assert (tmp_path / "x").read_bytes() == "caf\\udce9 é".encode()


def test_tensors_that_cannot_be_written_are_an_oserror(tmp_path):
    write_tensors(save_file, {"a": torch.ones(3)}, tmp_path / "x", {})
    assert torch.equal(load_file(tmp_path / "x")["a"], torch.ones(3))
    with pytest.raises(OSError, match="No such file") as caught:
        write_tensors(save_file, {"a": torch.ones(3)}, tmp_path / "no" / "x", {})
    assert caught.value.filename == str(tmp_path / "no" / "x")
