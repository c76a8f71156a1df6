"""Writing a run's outputs; every one of them can be made again from the stored records."""

import json
from collections.abc import Iterator
from typing import Any

from durometer.core.files import replace_file
from durometer.report.html import render_html
from durometer.report.summary import build_summary
from durometer.trials.store import Store, storage_error

SUMMARY, TRIALS, REPORT = "summary.json", "trials.jsonl", "report.html"


def write_outputs(store: Store, *, show_texts: bool = False) -> dict[str, Any]:
    """Write ``summary.json``, ``trials.jsonl`` and ``report.html`` into the run folder.

    Args:
        show_texts: show responses of a domain that is not harmless in the report as well.

    Returns:
        The summary.

    Raises:
        StorageError: the folder cannot be written; what is stored stays.
    """
    summary = build_summary(store)
    report = render_html(summary, store, show_texts=show_texts)
    try:
        replace_file(store.folder / SUMMARY, iter([json.dumps(summary, indent=2), "\n"]))
        replace_file(store.folder / TRIALS, _item_lines(store))
        replace_file(store.folder / REPORT, iter([report]))
    except OSError as error:
        raise storage_error(store.folder, error) from error
    return summary


def _item_lines(store: Store) -> Iterator[str]:
    for trial in store.trials():
        for row in trial.item_rows():
            yield json.dumps(row, ensure_ascii=False) + "\n"
