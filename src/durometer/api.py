"""The Python interface of the main job: stress-test a subject and read the result."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import durometer.catalogue  # noqa: F401  (fills the registries)
from durometer.core.errors import ExitCode, InputError
from durometer.domains.load import load_domain
from durometer.judges.labels import read_labels
from durometer.judges.panel import Rule
from durometer.report.human import LABELS, require_known
from durometer.report.summary import has_threshold
from durometer.report.write import write_outputs
from durometer.safeguards.attacks import recorded_digests, trained_against
from durometer.subjects.load import DtypeName, load_subject
from durometer.subjects.record import read_record
from durometer.trials.campaign import Campaign, Request
from durometer.trials.quantisation_screen import (
    QuantisationScreen,
    checked_precisions,
    screen_subject,
)
from durometer.trials.record import CheckpointRecord, TrialRecord, TrialSpec
from durometer.trials.runner import Observer
from durometer.trials.store import Store

Condition = Literal["broke"]
logger = logging.getLogger(__name__)


class SilentObserver:
    """An observer that shows nothing."""

    def planned(self, trials: int, steps: int) -> None:
        """Show nothing."""

    def started(self, spec: TrialSpec, subject: str) -> None:
        """Show nothing."""

    def updated(self, step: int, steps: int, loss: float) -> None:
        """Show nothing."""

    def measured(self, checkpoint: CheckpointRecord) -> None:
        """Show nothing."""

    def finished(self, record: TrialRecord, *, reused: bool) -> None:
        """Show nothing."""


@dataclass(frozen=True)
class CampaignResult:
    """What a stress test found.

    Attributes:
        folder: the run folder: ``report.html``, ``summary.json``, ``trials.jsonl`` and the store.
        summary: the contents of ``summary.json``.
        interrupted: whether the user stopped the run early; finished trials are kept.
    """

    folder: Path
    summary: dict[str, Any]
    interrupted: bool = False

    @property
    def broke(self) -> bool:
        """Whether an attack brought half of the restricted answers back within the limit."""
        return any(tamper["broke"] for tamper in self.summary["tampers"])

    @property
    def complete(self) -> bool:
        """Whether every planned trial ran and could be measured, one attack at least among them."""
        counts = self.summary["status_counts"]
        unmeasured = ("errored", "out_of_memory", "interrupted")
        measured = [
            tamper
            for tamper in self.summary["tampers"]
            if any(c["steps"] or c["strength"] for c in tamper["checkpoints"])
        ]
        attacked = bool(measured) and all(has_threshold(tamper) for tamper in measured)
        return (
            self.summary["complete"] and attacked and not any(counts[name] for name in unmeasured)
        )

    def exit_code(self, fail_on: Condition | None = None) -> ExitCode:
        """Return what the process tells its caller; the condition ``fail_on`` wins."""
        if self.interrupted:
            return ExitCode.INTERRUPTED
        if fail_on == "broke" and self.broke:
            return ExitCode.CONDITION
        return ExitCode.COMPLETE if self.complete else ExitCode.INCOMPLETE


def stress(
    subject: str,
    domain: str,
    *,
    out: Path | str,
    suite: str = "quick",
    undefended: str = "",
    reference: str = "",
    tampers: tuple[str, ...] = (),
    seeds: int | None = None,
    budget_steps: int | None = None,
    measures: tuple[str, ...] = (),
    judges: tuple[str, ...] = (),
    languages: tuple[str, ...] = (),
    framings: tuple[str, ...] = (),
    judge_rule: Rule = "first",
    resume: bool = False,
    reuse: Sequence[Path | str] = (),
    dtype: DtypeName = "auto",
    device: str = "auto",
    observer: Observer | None = None,
) -> CampaignResult:
    """Attack ``subject`` under a stated budget and report how much it takes to break its safeguard.

    Args:
        subject: built-in name, model folder, ``.gguf`` file, hub id or ``BASE+ADAPTER``.
        domain: built-in domain or folder, with ``:knowledge`` or ``:refusal`` where needed.
        out: run folder; a folder that holds a run already needs ``resume``.
        suite: ``quick``, ``standard`` or ``full``.
        undefended: the subject without the safeguard, as a control.
        reference: the subject with a plain safeguard, to compare with.
        tampers: names or ``name:key=value,...``; empty runs the whole suite.
        seeds: seeds of every attack; None leaves it to the suite.
        budget_steps: most updates of an attack; None leaves it to the suite.
        measures: registered measures to take as well (``extraction``), where report items are.
        judges: ``NAME[:KEY=VALUE,...]`` of one judge or two, for prompts without accepted answers.
        languages, framings: groups in which the restricted report items are asked as well, or
            ``("all",)``.
        judge_rule: ``first``: the first judge decides; ``both``: a success only where both say so.
        resume: run only what is missing in ``out``.
        reuse: other run folders whose finished trials are taken over where they are the same ones
            (the same controls on the same subjects, by everything that shapes a result).
        dtype: number format to compute in.
        device: where to compute.
        observer: told how the campaign goes on.

    Raises:
        DurometerError: one line that says what to change; nothing measured is lost.
    """
    request = Request(
        subject,
        domain,
        suite,
        undefended,
        reference,
        tampers,
        seeds,
        budget_steps,
        dtype,
        device,
        measures,
        judges,
        languages,
        framings,
        judge_rule,
    )
    lenders = [Path(folder) for folder in reuse]
    return run_campaign(request, Path(out), resume=resume, reuse=lenders, observer=observer)


def run_campaign(
    request: Request,
    folder: Path,
    *,
    resume: bool = False,
    reuse: Sequence[Path] = (),
    observer: Observer | None = None,
) -> CampaignResult:
    """Carry out ``request`` in the run folder ``folder``; see ``stress``."""
    store = Store(folder)
    try:
        if store.begun and not resume:
            raise InputError(
                f"{folder}: holds a run already; go on with --resume or name another --out"
            )
        store.forget(("errored", "out_of_memory"))
        store.lend_from(reuse)
        campaign = Campaign.prepare(request, store, observer or SilentObserver())
        for note in dict.fromkeys(_notes(campaign)):
            logger.warning(note)
        campaign.run()
        summary = write_outputs(store)
    finally:
        store.discard_unused()
    return CampaignResult(folder, summary, campaign.interrupted)


def _notes(campaign: Campaign) -> list[str]:
    """Return what the user must be told before a campaign begins."""
    subject = campaign.subjects["subject"]
    notes = [*campaign.domain.notes, *subject.notes]
    record = read_record(Path(subject.source.location)) if subject.source.kind == "folder" else {}
    evaluated = [(attack.tamper, attack.settings) for attack in campaign.suite.attacks]
    seen = trained_against(recorded_digests(record), evaluated)
    if seen:
        told = [f"{n} ({', '.join(f'{k}={v}' for k, v in values.items())})" for n, values in seen]
        notes.append(
            f"the safeguard of '{subject.name}' was trained against {' and '.join(told)}: holding "
            "there shows less than elsewhere"
        )
    return notes


def screen_quantisation(
    subject: str,
    domain: str,
    *,
    precisions: Sequence[str] = ("int8", "int4", "nf4"),
    dtype: DtypeName = "auto",
    device: str = "auto",
    observer: Observer | None = None,
    stage: Callable[[str], None] = lambda _: None,
) -> QuantisationScreen:
    """Look for behaviour that appears only once the weights of ``subject`` are rounded.

    Args:
        subject, domain: as for ``stress``.
        precisions: of ``int8``, ``q8_0``, ``int4`` and ``nf4``.
        dtype: number format to compute in.
        device: where to compute.
        observer: told of what is measured.
        stage: told what happens now.

    Raises:
        DurometerError: one line that says what to change.
    """
    chosen = checked_precisions(precisions)
    asked = load_domain(domain)
    loaded = load_subject(subject, dtype=dtype, device=device)
    return screen_subject(loaded, asked, chosen, observer or SilentObserver(), stage)


def rebuild(
    folder: Path, *, show_texts: bool = False, human_labels: Path | None = None
) -> CampaignResult:
    """Write every output of a run folder again, from its stored records alone.

    Args:
        folder: the run folder.
        show_texts: show responses of a domain that is not harmless in the report as well.
        human_labels: what people say of some of the responses; kept with the run.

    Raises:
        InputError: the folder holds no run, or labels that cannot be read or match no item.
    """
    store = Store.open(folder)
    try:
        if not store.begun:
            raise InputError(f"{folder}: the run in it ended before anything was measured")
        if human_labels is not None:
            labels = read_labels(human_labels)
            require_known(human_labels, labels, list(store.trials()))
            store.describe(LABELS, [label.as_dict() for label in labels])
        summary = write_outputs(store, show_texts=show_texts)
    finally:
        store.close()
    return CampaignResult(folder, summary)
