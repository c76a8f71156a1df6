"""What a scoreboard is made of: finished runs, and the records of the models they attacked."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from durometer.core.errors import InputError, StorageError
from durometer.report.comparison_origin import is_plain
from durometer.report.comparison_start import outcome_rates
from durometer.report.summary import build_summary, reference_tables, start_table
from durometer.subjects.record import RECORD, belongs, facts_in, read_record
from durometer.trials.campaign import SAFEGUARDED_SHARE
from durometer.trials.store import FILE, Store

Json = Mapping[str, Any]
STRESS = "stress"
Made = TypeVar("Made")


@dataclass(frozen=True)
class Read:
    """One finished run and the record of the model that it attacked.

    Attributes:
        folder: as it was named.
        start: what the attacked model gives at step 0, None where that was not measured.
        record: ``hardening.json`` of the attacked model, {} where none is known to belong to it.
        reference_record: the same of the plain safeguard it is compared with.
        reference_tables: what was found of the reference, see ``summary.reference_tables``.
        kept: by role, what the run itself kept of the records, see ``record.facts_of``.
        origins: by role, what the run kept of its subjects, see ``origin.origin_of``.
        outcomes: by role, the share of every outcome at step 0, see ``outcome_rates``.
    """

    folder: Path
    summary: dict[str, Any]
    start: dict[str, Any] | None
    record: dict[str, Any]
    reference_record: dict[str, Any]
    reference_tables: dict[str, Any]
    kept: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, Any] = field(default_factory=dict)
    outcomes: dict[str, Any] = field(default_factory=dict)

    @property
    def attacked(self) -> bool:
        """Whether there was anything to break."""
        return bool(self.summary["tampers"])

    @property
    def open(self) -> bool:
        """Whether it is a model as it comes, that gives the restricted answers unasked."""
        if self.attacked or has_undefended_weights(self) or not _gives_answers(self):
            return False
        return not self.facts("subject") and is_plain(
            self.summary["subject"]["source"], self.origins.get("subject", {})
        )

    def facts(self, role: str) -> dict[str, Any]:
        """Return what is known of how the subject or the reference came about, see ``facts_in``.

        What the run kept was true of the weights that it attacked; a folder may have changed since.
        """
        records = {"subject": self.record, "reference": self.reference_record}
        if role not in records:
            return {}
        found: dict[str, Any] = self.kept.get(role) or facts_in(records[role])
        return found


def read_run(folder: Path) -> Read:
    """Return the finished run in ``folder`` and the records that belong to it.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    place, model = _place(folder)
    try:
        store = Store.open(place)
        try:
            if not store.begun:
                raise InputError(f"{folder}: the run in it ended before anything was measured")
            summary, start = build_summary(store), start_table(store)
            tables, kept = reference_tables(store), store.description("hardening") or {}
            origins, outcomes = store.description("origins") or {}, outcome_rates(store)
        finally:
            store.close()
    except StorageError as error:
        raise InputError(str(error)) from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise unreadable(place / FILE, error) from error
    if not summary["subject"]:
        raise _unfinished(folder)
    record = _record_of(folder, model, summary["subject"])
    plain = _reference_record(record, model, summary)
    run = Read(folder, summary, start, record, plain, tables, kept, origins, outcomes)
    described(run, lambda: _require_measured(run))
    return run


def _place(folder: Path) -> tuple[Path, Path | None]:
    """Return the run folder, and the folder of the hardened model around it."""
    if (folder / RECORD).is_file():
        if not (folder / STRESS / FILE).is_file():
            raise InputError(
                f"{folder}: a hardened model without a run in {STRESS}/; make one with: durometer "
                f"stress {folder} --out {folder / STRESS}"
            )
        return folder / STRESS, folder
    if not (folder / FILE).is_file():
        raise InputError(
            f"{folder}: no finished run here ({FILE} is missing); to attack models and compare "
            "them, add --domain and --suite"
        )
    around = folder.resolve().parent
    return folder, around if (around / RECORD).is_file() and folder.name == STRESS else None


# --- the model's record ---


def _record_of(folder: Path, model: Path | None, subject: Json) -> dict[str, Any]:
    """Return the record of the attacked model, {} where none is known to belong to it."""
    home = model or _home(subject)
    record = read_record(home) if home is not None and home.is_dir() else {}
    if belongs(record, subject["fingerprint"], subject["dtype"]):
        return record
    if model is None:
        return {}  # another model has taken its place since
    raise InputError(f"{folder}: {STRESS}/ is a run on other weights than the model's")


def _home(subject: Json) -> Path | None:
    """Return the folder that a subject was loaded from, None for one from elsewhere."""
    source = subject["source"]
    return Path(source["location"]) if source["kind"] == "folder" else None


def _reference_record(record: Json, model: Path | None, summary: Json) -> dict[str, Any]:
    """Return the record of the plain safeguard, {} where none is known to belong to it."""
    if not summary["reference"]:
        return {}
    plain = summary["reference"]["subject"]
    for home in _reference_places(record, model or _home(summary["subject"]), plain):
        found = read_record(home)
        if found and belongs(found, plain["fingerprint"], plain["dtype"]):
            return found
    return {}


def _reference_places(record: Json, home: Path | None, plain: Json) -> Iterator[Path]:
    """Yield where the record of the plain safeguard may be."""
    inside, own = record.get("reference"), _home(plain)
    if home is not None and isinstance(inside, str) and inside:
        yield home / inside
    if own is not None:
        yield own


# --- what can be compared ---


def _require_measured(run: Read) -> None:
    """Refuse a run that is not finished, or that found nothing to break in another model.

    A model that equals the undefended one is a control: that its run ends before any attack is
    what must come of it. Of a model as it comes it is the finding: it is not safeguarded.
    """
    if run.summary["complete"] and run.attacked:
        return
    if not run.attacked and (has_undefended_weights(run) or run.open):
        return
    if run.attacked or not _gives_answers(run):
        raise _unfinished(run.folder)
    if not run.facts("subject").get("unchanged"):
        raise InputError(
            f"{run.folder}: the model gives the restricted answers before any attack, so that "
            "there was nothing to break, and it is not known to equal the undefended model; "
            "leave this folder out"
        )


def _gives_answers(run: Read) -> bool:
    """Say whether there was nothing to break: ``campaign.require_safeguarded`` on what is kept."""
    undefended = (run.summary["undefended"] or {}).get("start") or {}
    own, without = (run.start or {}).get("success_report"), undefended.get("success_report")
    chance = run.summary["domain"]["chance"]
    most = (without["rate"] if without else 1.0) - chance
    return own is not None and own["rate"] - chance > SAFEGUARDED_SHARE * max(most, 0.0)


def has_undefended_weights(run: Read) -> bool:
    """Say whether the run measured its subject and an undefended one of the same weights.

    Such a run ends there, whatever the two answer: that base may refuse already.
    """
    without = (run.summary["undefended"] or {}).get("subject") or {}
    same = without.get("fingerprint") == run.summary["subject"]["fingerprint"]
    return run.start is not None and same


def _unfinished(folder: Path) -> InputError:
    return InputError(f"{folder}: the run is not finished; go on with it (stress ... --resume)")


def unreadable(path: Path, error: Exception) -> InputError:
    """Return the one-line error for a record that does not hold what it should."""
    return InputError(
        f"{path}: a record cannot be read ({type(error).__name__}: {error}); restore a copy of it, "
        "or run again"
    )


def described(run: Read, make: Callable[[], Made]) -> Made:
    """Return what ``make`` does with a run.

    Raises:
        InputError: names the record that does not hold what it should.
    """
    try:
        return make()
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise unreadable(run.folder / RECORD, error) from error


def require_one_domain(runs: Sequence[Read]) -> None:
    """Refuse runs on different domains.

    Raises:
        InputError: names the domains and the folders.
    """
    found: dict[tuple[str, ...], Path] = {}
    for run in runs:
        domain = run.summary["domain"]
        found.setdefault((domain["name"], domain["kind"], domain["hash"]), run.folder)
    if len(found) > 1:
        alike = len({key[:2] for key in found}) == 1
        told = [
            f"{name}:{kind}{f' {digest[:8]}' if alike else ''} ({folder})"
            for (name, kind, digest), folder in found.items()
        ]
        raise InputError(f"runs on different domains cannot be compared: {', '.join(told)}")
