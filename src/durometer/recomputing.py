"""What ``recompute`` does: whether printed figures follow from the outcomes they rest on."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from durometer.console import show
from durometer.core.errors import ExitCode, InputError
from durometer.headlines.options import typed_columns, typed_headlines
from durometer.headlines.read import read_table
from durometer.headlines.result import check_headlines
from durometer.headlines.settings import Kind, Settings, read_settings, with_scorers
from durometer.headlines.shipped import shipped_or_named
from durometer.report.output import output_folder, write_output

NAME = "recompute"


@dataclass(frozen=True)
class Recomputation:
    """Headlines checked against a table.

    Attributes:
        data: the contents of ``recompute.json``.
        folder: where it was written, None where it was not.
    """

    data: dict[str, Any]
    folder: Path | None = None

    @property
    def all_follow(self) -> bool:
        """Whether every headline follows from the rows."""
        return bool(self.data["all_follow"])

    def exit_code(self) -> int:
        """Return 0 where every headline follows, 1 where one does not."""
        return ExitCode.COMPLETE if self.all_follow else ExitCode.CONDITION


def recompute(
    file: str | Path,
    headlines: str | Path | Sequence[Mapping[str, Any]] = (),
    *,
    rate: Sequence[str] = (),
    difference: Sequence[str] = (),
    change: Sequence[str] = (),
    deviation: Sequence[str] = (),
    success: Sequence[str] = (),
    unparsed: Sequence[str] = (),
    scorer: Sequence[str] = (),
    column: Sequence[str] = (),
    out: str | Path | None = None,
) -> Recomputation:
    """Check whether printed figures follow from a table of outcomes.

    Args:
        file: a ``.csv``, ``.tsv`` or ``.jsonl`` file, or the name of a shipped table.
        headlines: a TOML file, or headlines as mappings with its keys (``printed``, ``kind``,
            ``arm`` ...). Without a file, ``FILE.toml`` beside the table is read where there is one.
        rate: further headlines as ``ARM[:CATEGORY]=FIGURE``.
        difference: as ``BEFORE,AFTER[:CATEGORY]=FIGURE``, after minus before.
        change: the same, relative to the rate before.
        deviation: standard deviations as ``ARM[:CATEGORY]=FIGURE``.
        success: outcomes that are a success; every other one is none.
        unparsed: outcomes that could not be read, besides empty and ``unparsed`` ones.
        scorer: ``CATEGORY=NAME`` where a category needs a scorer of its own.
        column: ``ROLE=NAME`` where a column has another name than its role.
        out: folder for ``recompute.json`` and ``recompute.html``; nothing is written without.

    Raises:
        InputError: the table or a headline cannot be read, or there is no headline.
        StorageError: ``out`` cannot be written.
    """
    path = shipped_or_named(str(file))
    settings = _settings(path, headlines).changed(
        **{name: list(given) for name, given in (("success", success),) if given}
    )
    settings = settings.changed(
        unparsed=[*settings.unparsed, *unparsed],
        scorers=with_scorers(settings, scorer),
        columns=typed_columns(settings.columns, column),
    )
    table = read_table(path, settings)
    typed: dict[Kind, Sequence[str]] = {
        "rate": rate,
        "difference": difference,
        "change": change,
        "deviation": deviation,
    }
    more = [one for kind, texts in typed.items() for one in typed_headlines(kind, texts, table)]
    settings = settings.model_copy(update={"headline": [*settings.headline, *more]})
    if not settings.headline:
        arms = ", ".join(table.arms[:20])
        raise InputError(
            f"{path.name}: no headline to check; give --rate ARM=FIGURE, --difference "
            f"BEFORE,AFTER=FIGURE or a file with --headlines (arms: {arms})"
        )
    folder = output_folder(out)
    made = Recomputation(check_headlines(table, settings, path.name), folder)
    if folder is not None:
        from durometer.report.recompute_html import render_recomputation

        write_output(folder, NAME, made.data, render_recomputation(made.data))
    return made


def _settings(path: Path, headlines: str | Path | Sequence[Mapping[str, Any]]) -> Settings:
    """Return what is told beside a table: in a named file, in the one beside it, or in Python."""
    if isinstance(headlines, str | Path):
        return read_settings(Path(headlines).expanduser())
    beside = path.with_suffix(".toml")
    if headlines:
        return Settings().changed(headline=[dict(one) for one in headlines])
    return read_settings(beside) if beside.is_file() else Settings()


def run(
    file: str, headlines: Path | None, out: Path | None, *, as_json: bool, **given: Sequence[str]
) -> int:
    """Print whether the headlines follow, and where the page is; return the exit code."""
    from durometer.report.recompute_terminal import recomputation_table

    made = recompute(file, headlines or (), out=out, **given)
    if as_json:
        print(json.dumps(made.data, indent=2))
        return made.exit_code()
    show(recomputation_table(made.data))
    if made.folder is not None:
        print(f"page: {made.folder / NAME}.html")
    return made.exit_code()
