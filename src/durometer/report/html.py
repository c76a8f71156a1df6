"""The report page."""

from typing import Any

from durometer.trials.store import Store


def render_html(summary: dict[str, Any], store: Store, *, show_texts: bool = False) -> str:
    """Return the page."""
    return "<!doctype html>"
