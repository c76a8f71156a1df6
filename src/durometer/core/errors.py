"""Errors that a user can act on, and the exit codes that they stand for."""

import difflib
import errno
from collections.abc import Iterable
from enum import IntEnum

# A full disk, a quota, a file-size limit, a read-only file system.
STORAGE_ERRORS = {
    number
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS")
    if (number := getattr(errno, name, None)) is not None
}


class ExitCode(IntEnum):
    """What the process tells its caller; CONDITION wins over INCOMPLETE.

    Attributes:
        COMPLETE: everything asked for was done.
        CONDITION: a condition named by ``--fail-on`` holds.
        INPUT_ERROR: the command or its input cannot be used as it is.
        INCOMPLETE: something could not be measured, examined or written.
        INTERNAL_ERROR: a fault of durometer itself.
        INTERRUPTED: Ctrl-C.
        BROKEN_PIPE: whoever read the output went away.
    """

    COMPLETE = 0
    CONDITION = 1
    INPUT_ERROR = 2
    INCOMPLETE = 3
    INTERNAL_ERROR = 4
    INTERRUPTED = 130
    BROKEN_PIPE = 141


class DurometerError(Exception):
    """Base of all errors that are shown as one line, without a traceback.

    The message names the file, field or value and says what to do.
    """

    exit_code = ExitCode.INCOMPLETE


class InputError(DurometerError):
    """The user's input cannot be used as it is."""

    exit_code = ExitCode.INPUT_ERROR


class UnsafeInputError(InputError):
    """The input asks for something that is refused: a pickle, remote code."""


class StorageError(DurometerError):
    """Results cannot be written: a full disk, a read-only folder, a foreign database."""


class NotApplicableError(DurometerError):
    """The subject lacks the structure that a method needs; the message gives the reason."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> InputError:
    """Return the error for an unknown ``name``, with the nearest known name suggested."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(names)}"
    return InputError(f"unknown {kind} '{name}'; {hint}")
