"""What every page shares: its style, and templates in which all text is escaped."""

from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from durometer.report import figures

MOST_CHARACTERS = 600


def page_style() -> Markup:
    """Return the style sheet of every page, for light, dark, phone and print."""
    folder = resources.files("durometer.report").joinpath("templates")
    return Markup(folder.joinpath("report.css").read_text("utf-8"))


def page_environment() -> Environment:
    """Return the environment of the templates: everything escaped, figures as filters."""
    environment = Environment(
        loader=PackageLoader("durometer.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    for function in (
        figures.breakable,
        figures.percent,
        figures.points_text,
        figures.quantity,
        figures.flops_text,
        figures.seconds_text,
        figures.decimal,
        figures.signed,
        figures.rate_title,
        figures.rate_interval,
        figures.series_key,
        shortened,
    ):
        environment.filters[function.__name__] = function
    return environment


def _shown(value: Any) -> Any:
    """Write control and direction characters out in whatever the template prints."""
    return figures.visible(value) if type(value) is str else value


def shortened(text: str) -> str:
    """Return a response, cut where it is very long; says how much is missing."""
    if len(text) <= MOST_CHARACTERS:
        return text
    return f"{text[:MOST_CHARACTERS]} … ({len(text) - MOST_CHARACTERS:,} more characters)"
