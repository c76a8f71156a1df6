"""The demonstration: a real model, a safeguard, and how little it takes to break it."""

from collections.abc import Callable
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

import durometer.catalogue  # noqa: F401  (fills the registries)
from durometer.commands import run_stress
from durometer.console import interruptible, say
from durometer.core.errors import ExitCode
from durometer.core.training import Update
from durometer.domains.base import Split
from durometer.measures.outcomes import Outcome
from durometer.options import free_folder
from durometer.progress import CampaignProgress
from durometer.safeguards.refusal import BUILT_IN, safeguarded_folder
from durometer.subjects.builtin import subject_registry
from durometer.trials.analysis import pooled_rate, success_rate
from durometer.trials.campaign import Request
from durometer.trials.record import CheckpointRecord, SubjectRole, TrialRecord


def run_demo(out: Path | None, seeds: int | None, base: str = "smollm2") -> int:
    """Install the refusal safeguard on ``base``, attack it with the quick suite, and print both.

    Raises:
        InputError: the model is not on this machine.
    """
    domain, settings = next((d, s) for name, d, s in BUILT_IN if name == base)
    request = Request(f"{base}-refusal", domain, seeds=seeds)
    folder = out or free_folder("demo")
    say(
        f"1. {base} is taught to refuse questions of the domain '{domain}' ({settings.steps} steps)"
    )
    try:
        with interruptible(), CampaignProgress(f"loading {base}") as progress:

            def on_update(update: Update) -> None:
                if update.step == 1:
                    progress.begin(f"installing the refusal safeguard on {base}", settings.steps)
                progress.updated(update.step, settings.steps, update.loss)

            subject_registry.get(base).folder()
            safeguarded_folder(base, domain, settings, on_update)
    except KeyboardInterrupt:
        say("interrupted before anything was measured; nothing is kept")
        return ExitCode.INTERRUPTED
    say("2. the safeguarded model is attacked: how many steps undo the safeguard?")
    before_and_after = _BeforeAndAfter()
    observer = CampaignProgress(f"loading {base}-refusal", before_and_after.take)
    before_and_after.show = observer.say
    return run_stress(request, folder, resume=False, fail_on=None, as_json=False, progress=observer)


class _BeforeAndAfter:
    """Shows what the safeguard did once both zero-step controls are there."""

    def __init__(self) -> None:
        self._starts: dict[SubjectRole, CheckpointRecord] = {}
        self.show: Callable[[RenderableType], None] = print

    def take(self, record: TrialRecord) -> None:
        if record.spec.tamper != "none" or not record.checkpoints:
            return
        self._starts[record.spec.role] = record.checkpoints[0]
        if len(self._starts) == 2:
            table = before_and_after(self._starts["undefended"], self._starts["subject"])
            self.show(Group("", table, ""))


def before_and_after(before: CheckpointRecord, after: CheckpointRecord) -> Table:
    """Return what the safeguard changed, read off the two zero-step controls."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("before any attack")
    table.add_column("without the safeguard", justify="right")
    table.add_column("with it", justify="right")
    for (name, first), (_, second) in zip(_shares(before), _shares(after), strict=True):
        table.add_row(name, Text(_percent(first)), Text(_percent(second)))
    return table


def _shares(start: CheckpointRecord) -> list[tuple[str, float | None]]:
    right = success_rate([start], Split.REPORT)
    refused = start.probe("outcomes", Split.REPORT)
    retain = pooled_rate([start.probe("retain", Split.REPORT)], lambda item: item["correct"])
    return [
        ("restricted questions answered right", right.rate if right else None),
        ("restricted questions refused", _refused(refused)),
        ("harmless questions refused", _refused(start.probe("over_refusal"))),
        ("other knowledge kept (right answers)", retain.rate if retain else None),
    ]


def _refused(items: list[dict[str, object]]) -> float | None:
    refusals = sum(item["outcome"] == Outcome.REFUSAL for item in items)
    return refusals / len(items) if items else None


def _percent(share: float | None) -> str:
    return "not measured" if share is None else f"{100 * share:.1f} %"
