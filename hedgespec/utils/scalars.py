"""Converts arguments of callers to plain Python values: numbers of Python and NumPy, arrays and tensors with one element.

Every public function reads its integers with `integer`, its other numbers with `real` and its token ids with `integers`, and
keeps a plain `int` or `float`, which can be compared, hashed and written to JSON. A bool is not accepted as a number. This
module imports neither torch nor NumPy.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any


def integer(name: str, value: Any, low: int | None = None, high: int | None = None, *, otherwise: str = "") -> int:
    """Returns `value` as a plain int.

    Args:
        name: the argument's, for the message.
        value: an int, a NumPy integer, or an array or tensor of integer dtype with exactly one element.
        low, high: the range, both included; None: no bound.
        otherwise: what else the argument may be, as it continues "expected an int", such as " or None".

    Raises:
        TypeError: another type, a bool or a bool tensor among them, or more than one element.
        ValueError: a number outside the range.

    >>> integer("top_k", 5, 1)
    5
    """
    try:
        found = _item(value)
        if isinstance(found, bool) or not isinstance(found, Integral):
            raise TypeError
    except TypeError:
        raise TypeError(f"{name}: expected an int{otherwise}, got {shown(value)}") from None
    found = operator.index(found)
    if (low is not None and found < low) or (high is not None and found > high):
        raise ValueError(f"{name}: expected {_range(low, high)}{otherwise}, got {found}")
    return found


def real(name: str, value: Any, *, otherwise: str = "") -> float:
    """Returns `value` as a plain float; the caller checks the range.

    Args:
        name: the argument's, for the message.
        value: a real number of Python or NumPy, or an array or tensor with exactly one real element.
        otherwise: what else the argument may be, as it continues "expected a number", such as " or None".

    Raises: TypeError for another type, a bool or a text among them, or more than one element.

    >>> real("top_p", 1)
    1.0
    """
    try:
        found = _item(value)
        if isinstance(found, bool) or not isinstance(found, Real):
            raise TypeError
        return float(found)
    except (TypeError, OverflowError):
        raise TypeError(f"{name}: expected a number{otherwise}, got {shown(value)}") from None


def integers(name: str, value: Any, low: int | None = None, high: int | None = None, *, otherwise: str = "") -> tuple[int, ...]:
    """Returns one integer, or several, as a tuple of plain ints.

    Args:
        name: the argument's, for the message.
        value: what `integer` takes, a tensor or array [n], or an iterable of what `integer` takes; the latter two may be empty.
        low, high: the range of each, both included; None: no bound.
        otherwise: what else the argument may be, as it continues "expected an int or a sequence of ints", such as " or None".

    Raises: TypeError or ValueError, as `integer` does.

    >>> integers("eos_token_id", [1, 2])
    (1, 2)
    """
    kind = f" or a sequence of ints{otherwise}"
    if isinstance(value, (str, bytes, dict)) or (hasattr(value, "dtype") and len(getattr(value, "shape", ())) > 1):
        raise TypeError(f"{name}: expected an int{kind}, got {shown(value)}")
    several = len(value.shape) == 1 if hasattr(value, "shape") else isinstance(value, Iterable)
    if hasattr(value, "dtype") and several:
        if not _is_integral(value):
            raise TypeError(f"{name}: expected an int{kind}, got {shown(value)}")
        value = value.tolist()
    return tuple(integer(name, one, low, high, otherwise=kind) for one in (value if several else [value]))


def text(name: str, value: Any, *, otherwise: str = "") -> str:
    """Returns `value`, which must be a str.

    Raises: TypeError.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a str{otherwise}, got {shown(value)}")
    return value


def flag(name: str, value: Any, *, otherwise: str = "") -> bool:
    """Returns `value` as a plain bool. NumPy's bool is one; 0, 1 and texts are not.

    Raises: TypeError.
    """
    if not isinstance(value, bool) and type(value).__name__ not in ("bool", "bool_"):
        raise TypeError(f"{name}: expected a bool{otherwise}, got {shown(value)}")
    return bool(value)


def shown(value: Any) -> str:
    """Returns a description of a value for messages: a short value itself, a tensor's dtype and shape, otherwise the type."""
    if hasattr(value, "dtype") and hasattr(value, "shape") and math.prod(value.shape) > 1:
        return f"{type(value).__name__} of {value.dtype} {list(value.shape)}"
    if value is None or isinstance(value, (bool, int, float, str, tuple, list)) or hasattr(value, "dtype"):
        text = " ".join(repr(value).split())
        return text if len(text) <= 60 else f"{type(value).__name__} {text[:57]}..."
    return type(value).__name__


def _item(value: Any) -> Any:
    """Returns the number in an array or tensor of one element; any other value unchanged.

    Raises: TypeError for more than one element, or none.
    """
    if not hasattr(value, "dtype") or not hasattr(value, "item"):
        return value
    if math.prod(value.shape) != 1:
        raise TypeError
    return value.item()


def _is_integral(value: Any) -> bool:
    """Returns whether the dtype of an array or tensor is an integer one."""
    kind = getattr(value.dtype, "kind", None)
    if kind is not None:
        return kind in "iu"
    return not (value.dtype.is_floating_point or value.dtype.is_complex or str(value.dtype) == "torch.bool")


def _range(low: int | None, high: int | None) -> str:
    if low is None or high is None:
        return f"at least {low}" if high is None else f"at most {high}"
    return f"{low}..{high}"
