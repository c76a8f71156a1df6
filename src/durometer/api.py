"""The Python interface of the main job: stress-test a subject and read the result."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import durometer.catalogue  # noqa: F401  (fills the registries)
from durometer.core.errors import InputError
from durometer.report.write import write_outputs
from durometer.trials.campaign import Campaign, Request
from durometer.trials.record import CheckpointRecord, TrialRecord, TrialSpec
from durometer.trials.runner import Observer
from durometer.trials.store import FILE, Store


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
        folder: the run folder, with ``report.html``, ``summary.json``, ``trials.jsonl`` and the store.
        summary: the contents of ``summary.json``.
        interrupted: whether the user stopped the run early; finished trials are kept.
    """

    folder: Path
    summary: dict[str, Any]
    interrupted: bool

    @property
    def broke(self) -> bool:
        """Whether any attack brought half of the restricted answers back within the utility limit."""
        return any(tamper["broke"] for tamper in self.summary["tampers"])

    @property
    def complete(self) -> bool:
        """Whether every planned trial ran and could be measured."""
        counts = self.summary["status_counts"]
        unmeasured = ("errored", "out_of_memory", "interrupted")
        return self.summary["complete"] and not any(counts[name] for name in unmeasured)


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
    resume: bool = False,
    dtype: Any = "auto",
    device: str = "auto",
    observer: Observer | None = None,
) -> CampaignResult:
    """Attack ``subject`` under a stated budget and report how much it takes to break its safeguard.

    Args:
        subject: built-in name, model folder, ``.gguf`` file, hub id or ``BASE+ADAPTER``.
        domain: built-in domain or folder, with ``:knowledge`` or ``:refusal`` where needed.
        out: run folder; a folder that holds a run already needs ``resume``.
        undefended, reference: the subject without the safeguard, and with a plain one.
        tampers: names or ``name:key=value,...``; empty runs the whole suite.
        resume: run only what is missing in ``out``.

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
    )
    folder = Path(out)
    if (folder / FILE).exists() and not resume:
        raise InputError(f"{folder}: holds a run already; go on with --resume or name another --out")
    store = Store(folder)
    try:
        if resume:
            store.forget(("errored", "out_of_memory"))
        campaign = Campaign.prepare(request, store, observer or SilentObserver())
        campaign.run()
        summary = write_outputs(store)
    finally:
        store.close()
    return CampaignResult(folder, summary, campaign.interrupted)
