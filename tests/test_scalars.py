"""Numbers of Python, NumPy and torch as plain ones, and what is none."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from hedgespec.utils.scalars import flag, integer, integers, real, text


@pytest.mark.parametrize(
    "value",
    [3, np.int8(3), np.uint64(3), np.array(3), np.array([[3]]), torch.tensor(3), torch.tensor([3], dtype=torch.uint8)],
)
def test_integers(value):
    found = integer("k", value, 3, 3)
    assert found == 3 and type(found) is int
    assert type(real("x", value)) is float and real("x", value) == 3.0
    with pytest.raises(ValueError, match=r"^k: expected at least 4 or None, got 3$"):
        integer("k", value, 4, otherwise=" or None")
    with pytest.raises(ValueError, match=r"^k: expected 0..2, got 3$"):
        integer("k", value, 0, 2)


@pytest.mark.parametrize(
    "value",
    [True, np.bool_(False), np.array(True), torch.tensor(True), 3.0, np.float32(3), torch.tensor(3.0), "3", b"3", None, 3j, [3],
     (3,), {3}, np.array([]), np.array([1, 2]), torch.tensor([1, 2]), np.array("3"), np.array([None]), object()],
)  # fmt: skip
def test_what_is_no_integer(value):
    with pytest.raises(TypeError, match=r"^k: expected an int or a thing, got "):
        integer("k", value, otherwise=" or a thing")


@pytest.mark.parametrize("value", [0.5, np.float16(0.5), np.array([0.5]), torch.tensor(0.5, dtype=torch.bfloat16)])
def test_numbers(value):
    assert real("p", value) == 0.5 and type(real("p", value)) is float


@pytest.mark.parametrize("value", [True, torch.tensor(False), "0.5", None, 1j, [0.5], torch.ones(2), 10**400])
def test_what_is_no_number(value):
    with pytest.raises(TypeError, match=r"^p: expected a number, got "):
        real("p", value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(3, (3,)), (torch.tensor(3), (3,)), (np.int64(3), (3,)), ([3, np.int64(4), torch.tensor(5)], (3, 4, 5)), ((), ()),
     (torch.tensor([3, 4]), (3, 4)), (np.array([3]), (3,)), (torch.tensor([], dtype=torch.int64), ()), (range(2), (0, 1)),
     ([torch.tensor([3])], (3,)), (frozenset([7]), (7,)), ((one for one in (1, 2)), (1, 2))],
)  # fmt: skip
def test_sequences_of_integers(value, expected):
    found = integers("ids", value, 0)
    assert found == expected and all(type(one) is int for one in found)


@pytest.mark.parametrize(
    "value", ["12", None, {1: 2}, torch.tensor([[1]]), torch.tensor([1.0]), np.array([True]), [1, None], [[1]], 2.5]
)
def test_what_is_no_sequence_of_integers(value):
    with pytest.raises(TypeError, match=r"^ids: expected an int or a sequence of ints, got "):
        integers("ids", value)


def test_messages_are_one_line_and_short():
    for value in (torch.zeros(3, 4), [0] * 1000, "x" * 1000, np.zeros((2, 2)), object(), torch.zeros(1, 1)):
        with pytest.raises(TypeError) as caught:
            integer("k", value)
        assert len(str(caught.value)) < 110 and "\n" not in str(caught.value)
    with pytest.raises(TypeError, match=r"^k: expected an int, got Tensor of torch.float32 \[3, 4\]$"):
        integer("k", torch.zeros(3, 4))
    with pytest.raises(TypeError, match=r"^n: expected a str, got 3$"):
        text("n", 3)
    for value in (1, "true", None, torch.tensor(True)):
        with pytest.raises(TypeError, match=r"^f: expected a bool, got "):
            flag("f", value)
    assert flag("f", np.bool_(True)) is True


def test_neither_torch_nor_numpy_is_needed():
    code = "import sys, hedgespec.config; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
