"""The command line `hedgespec`: `parser.py` reads it, `commands.py` runs it."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

from hedgespec.cli.arguments import UsageError
from hedgespec.cli.output import _any_text, _drop_stdout, _quiet, _say, _told
from hedgespec.cli.parser import _parser
from hedgespec.errors import HedgeSpecError

USER_ERRORS = (HedgeSpecError, ValueError, TypeError, OSError, ImportError)
"""Errors that are reported in one line. Any other is a bug and keeps its traceback."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    Returns: 0; 1 after an error; 2 for a wrong command line; 130 after Ctrl-C; 141 if the reader of stdout has closed it. For 1
        and 2 one line is written to stderr.
    """
    if sys.stdout is None:  # closed before Python started
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for as long as the process lives
    with _any_text():
        try:
            try:
                options = _parser().parse_args(argv)
                with _quiet():
                    options.run(options)
            finally:
                sys.stdout.flush()  # here, so that a closed pipe or a full disk is caught
            return 0
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:
            _drop_stdout()
            return 141
        except (UsageError, *USER_ERRORS) as error:
            if os.environ.get("HEDGESPEC_DEBUG"):
                traceback.print_exc()
            _say("error", _told(error))
            if isinstance(error, OSError):
                _drop_stdout()
            return 2 if isinstance(error, UsageError) else 1
