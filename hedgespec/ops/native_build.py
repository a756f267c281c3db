"""What setup.py recorded about the build of the native module: whether it succeeded, and if not, why."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path

RECORD = Path(__file__).parent / "_native_build.json"
"""Written by setup.py beside the native module."""


@dataclass(frozen=True, slots=True)
class NativeBuild:
    """Outcome of the build of `hedgespec._native` at installation."""

    built: bool
    cuda: str = ""
    """Which CUDA kernels were built, or why none were; empty if the module was not built."""
    reason: str = ""
    """The step that failed; empty if the module was built."""
    output: str = ""
    """Last lines that the failed tool printed; may be empty."""


def read() -> NativeBuild | None:
    """Returns the recorded outcome, or None if there is no record or it cannot be read."""
    try:
        record = json.loads(RECORD.read_text(encoding="utf-8"))
        return NativeBuild(**record)
    except (OSError, ValueError, TypeError):
        return None


def how_to_rebuild() -> str:
    """Returns the instruction that gets the native module after a failed build."""
    return (
        "install a C++20 compiler, then install HedgeSpec again with `pip install --force-reinstall --no-deps --no-cache-dir` "
        "(pip may otherwise reuse the wheel that it kept); HEDGESPEC_REQUIRE_NATIVE=1 makes a failed build an error"
    )


def warn_if_failed() -> None:
    """Warns if the build of the native module failed at installation, with the reason and the remedy."""
    build = read()
    if build is not None and not build.built:
        warnings.warn(
            f"HedgeSpec's native module could not be built when it was installed ({build.reason}), so the cpu and cuda "
            f"backends are missing and decoding is slower; `hedgespec doctor` shows more. To get it: {how_to_rebuild()}",
            RuntimeWarning,
            stacklevel=2,
        )
