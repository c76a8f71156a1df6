"""What ``export`` does: a run in the form of another tool, from its stored records alone."""

from pathlib import Path

from durometer.core.errors import ExitCode, InputError, StorageError
from durometer.core.files import replace_file
from durometer.report.inspect_log import inspect_log
from durometer.trials.store import Store

SUFFIX = ".json"


def export_inspect(
    folder: str | Path, out: str | Path | None = None, *, show_texts: bool = False
) -> Path:
    """Write a run as a log of inspect_ai, and return the file.

    Args:
        folder: the run folder; it is left as it is.
        out: a file that ends in ``.json``, by which inspect_ai knows the form; None:
            ``inspect.json`` in the run folder.
        show_texts: tell prompts, answers and responses of a domain that is not harmless as well.

    Raises:
        InputError: no run in the folder, or a file name that inspect_ai would not read.
        StorageError: the file cannot be written.
    """
    folder = Path(folder).expanduser()
    file = Path(out).expanduser() if out is not None else folder / f"inspect{SUFFIX}"
    if file.suffix != SUFFIX:
        raise InputError(f"--out {file}: inspect_ai reads logs by their ending; end it in {SUFFIX}")
    if file.is_dir():
        raise InputError(f"--out {file}: a folder; name a file")
    store = Store.open(folder)
    try:
        if not store.begun:
            raise InputError(f"{folder}: the run in it ended before anything was measured")
        parts = inspect_log(store, show_texts=show_texts)
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, parts)
    except OSError as error:
        raise StorageError(
            f"{file}: {error.strerror or error}; free some space or name a writable --out"
        ) from error
    finally:
        store.close()
    return file


def run(folder: Path, out: Path | None, *, show_texts: bool) -> int:
    """Write the log and print where it is."""
    file = export_inspect(folder, out, show_texts=show_texts)
    print(f"log: {file} (inspect view start --log-dir {file.parent})")
    return ExitCode.COMPLETE
