"""Modules that moved are found under their old names."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from hedgespec.utils.moved import MOVED


@pytest.mark.parametrize("old", [name for name in MOVED if not name.startswith("engines.vllm")])
def test_an_old_name_is_the_new_module(old):
    sys.modules.pop(f"hedgespec.{old}", None)
    new = importlib.import_module(f"hedgespec.{MOVED[old]}")
    with pytest.warns(DeprecationWarning, match=rf"hedgespec\.{old} is now hedgespec\.{MOVED[old]}"):
        found = importlib.import_module(f"hedgespec.{old}")
    assert found is new
    assert new.__spec__.name == new.__name__


def test_an_unknown_name_is_not_found():
    with pytest.raises(ModuleNotFoundError, match=r"hedgespec\.magic"):
        importlib.import_module("hedgespec.magic")


def test_the_functions_are_no_modules():
    code = "import hedgespec; from hedgespec import evaluate, verify; assert callable(evaluate) and callable(verify)"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
