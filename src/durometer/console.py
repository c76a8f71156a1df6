"""Where commands print, and the one place where exceptions become a line and an exit code.

Results go to stdout, everything else to stderr.
"""

import io
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType

import typer
from rich.console import Console, RenderableType

from durometer.core.errors import STORAGE_ERRORS, DurometerError, ExitCode

DEBUG = "DUROMETER_DEBUG"
# What is not a terminal may be a file or a pipe: rows are not broken there.
PIPE_WIDTH = 1000
SHOW_CURSOR = "\x1b[?25h"


def show(renderable: RenderableType) -> None:
    """Print a table on stdout: as wide as the terminal, elsewhere in plain unbroken rows."""
    if sys.stdout.isatty():
        Console(highlight=False).print(renderable)
        return
    console = Console(width=PIPE_WIDTH, highlight=False, color_system=None, file=io.StringIO())
    with console.capture() as text:
        console.print(renderable)
    for line in text.get().splitlines():
        print(line.rstrip())


def say(text: str) -> None:
    """Print one line on stderr."""
    print(text, file=sys.stderr, flush=True)


class ErrorLine:
    """A context that shows whatever goes wrong inside as one line on stderr.

    Attributes:
        code: exit code of what was raised; None when nothing was.
    """

    def __init__(self) -> None:
        self.code: int | None = None

    def __enter__(self) -> "ErrorLine":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError):
            error = error.__context__  # rich ends the process when nobody reads any more
        if error is None or isinstance(error, SystemExit):
            return False
        self.code = _shown(error)
        return True


def _shown(error: BaseException) -> int:
    """Show ``error`` in one line and return its exit code."""
    match error:
        case typer.Exit():
            return error.exit_code
        case KeyboardInterrupt():
            say("interrupted")
            return ExitCode.INTERRUPTED
        case DurometerError():
            say(f"error: {_one_line(str(error))}")
            return error.exit_code
        case typer.TyperException():
            say(f"error: {_one_line(error.format_message())}{_where_to_look(error)}")
            return ExitCode.INPUT_ERROR
        case BrokenPipeError():
            # Nobody reads any more; the interpreter must not complain at exit that it cannot flush.
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return ExitCode.BROKEN_PIPE
        case OSError() if error.errno in STORAGE_ERRORS:
            place = f"{error.filename}: " if error.filename else ""
            say(f"error: {place}{error.strerror}; free some space, or write to another place")
            return ExitCode.INCOMPLETE
    return _internal(error)


def _internal(error: BaseException) -> int:
    if os.environ.get(DEBUG):
        traceback.print_exception(error)
        return ExitCode.INTERNAL_ERROR
    text = _one_line(f"{type(error).__name__}: {error}")
    say(f"internal error: {text} (set {DEBUG}=1 for the traceback)")
    return ExitCode.INTERNAL_ERROR


def _one_line(text: str) -> str:
    """Return ``text`` in one line, without characters that a terminal would act on."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


def _where_to_look(error: typer.TyperException) -> str:
    context = getattr(error, "ctx", None)
    return f" (see '{context.command_path} --help')" if context is not None else ""


@contextmanager
def interruptible() -> Iterator[None]:
    """Let a first Ctrl-C raise KeyboardInterrupt inside, and a second end the process at once.

    The second is for a user who does not want to wait for what was measured to be written.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # ignored (nohup), or somebody else's
        return
    presses = 0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal presses
        presses += 1
        if presses > 1:
            if sys.stderr.isatty():
                os.write(sys.stderr.fileno(), f"{SHOW_CURSOR}\n".encode())
            os._exit(ExitCode.INTERRUPTED)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
