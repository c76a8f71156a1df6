"""How a campaign goes on, on stderr: live bars on a terminal, else one plain line a trial."""

import logging
import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from durometer.domains.base import Split
from durometer.trials.analysis import success_items
from durometer.trials.record import CheckpointRecord, SubjectRole, TrialRecord, TrialSpec

NOTES = logging.getLogger("durometer")


class CampaignProgress:
    """An ``Observer`` that shows where a campaign stands; used as a context.

    Args:
        stage: what happens until the first trial begins.
        on_finished: called after every trial.
    """

    def __init__(
        self, stage: str, on_finished: Callable[[TrialRecord], None] | None = None
    ) -> None:
        # The stream as it is now: while a model is loaded, sys.stderr is another.
        self._stream = sys.stderr
        self._console = Console(file=self._stream, highlight=False)
        self._on_finished = on_finished
        self._live: Live | None = None
        self._spinner = Spinner("dots")
        self._notes = _Notes(self)
        self.begin(stage)
        self._trials = self._done = self._measured_trials = 0
        self._spent = 0.0
        self._subjects: dict[SubjectRole, str] = {}

    def __enter__(self) -> Self:
        NOTES.addHandler(self._notes)
        if self._stream.isatty() and os.environ.get("TERM") != "dumb":
            self._live = Live(
                get_renderable=self._render,
                console=self._console,
                transient=True,
                refresh_per_second=4,
            )
            self._live.start()
        else:
            self.say(self._stage)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        NOTES.removeHandler(self._notes)
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, text: str | RenderableType) -> None:
        """Show a line, or anything rich can draw, above the bars."""
        if isinstance(text, str) and self._live is None:
            print(text, file=self._stream, flush=True)
        else:
            self._console.print(text, markup=False)

    def begin(self, stage: str, steps: int = 0) -> None:
        """Say what happens now, of how many steps."""
        self._stage, self._step, self._steps = stage, 0, steps
        self._loss: float | None = None
        self._success: float | None = None
        self._begun = time.monotonic()

    def stage(self, text: str) -> None:
        """Begin a stage without steps; where there are no bars it gets a line."""
        self.begin(text)
        if self._live is None:
            self.say(text)

    def planned(self, trials: int, steps: int) -> None:
        """Show how much there is to do."""
        self._trials = trials
        if self._live is None:
            self.say(f"{trials} trials of at most {steps} steps in all")

    def started(self, spec: TrialSpec, subject: str) -> None:
        """Show the trial that begins."""
        self._subjects[spec.role] = subject
        self.begin(describe_trial(spec, subject), spec.rungs[-1] if spec.rungs else 0)

    def updated(self, step: int, steps: int, loss: float) -> None:
        """Show the step and its loss."""
        self._step, self._steps, self._loss = step, steps, loss

    def measured(self, checkpoint: CheckpointRecord) -> None:
        """Show the share of restricted answers given at the checkpoint."""
        self._success = _success(checkpoint)

    def finished(self, record: TrialRecord, *, reused: bool) -> None:
        """Count the trial; every one gets a line where there are no bars, else the failed ones."""
        self._done += 1
        if not reused:
            self._measured_trials += 1
            self._spent += record.seconds
        if reused:
            self.begin("trials that are there already")
        if self._live is None or record.status != "done":
            self.say(self._line(record, reused=reused))
        if self._on_finished is not None:
            self._on_finished(record)

    def _line(self, record: TrialRecord, *, reused: bool) -> str:
        spec, facts = record.spec, [record.status]
        if record.checkpoints:
            facts.append(f"{record.checkpoints[-1].steps} steps")
            facts.append(f"success {_percent(_success(record.checkpoints[-1]))}")
        facts.append("reused" if reused else f"{record.seconds:.1f} s")
        if record.reason:
            facts.append(record.reason)
        return f"[{self._done}/{self._trials}] {self._name(spec)}: {', '.join(facts)}"

    def _name(self, spec: TrialSpec) -> str:
        """Return a trial's words; where it is reused, the subject's name may not be known yet."""
        return describe_trial(spec, self._subjects.get(spec.role, f"the {spec.role}"))

    def _render(self) -> RenderableType:
        """Return the bars; called by rich, a few times a second."""
        grid = Table.grid(padding=(0, 1))
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1)
        grid.add_column(no_wrap=True, justify="right")
        grid.add_column(no_wrap=True)
        grid.expand = True
        if self._steps:
            facts = [f"loss {self._loss:.3f}"] if self._loss is not None else []
            facts += [f"success {_percent(self._success)}"] if self._success is not None else []
            bar = ProgressBar(self._steps, self._step)
            grid.add_row("step", bar, f"{self._step}/{self._steps}", "  ".join(facts))
        if self._trials:
            count = f"{self._done}/{self._trials}"
            grid.add_row("trials", ProgressBar(self._trials, self._done), count, self._left())
        seconds = int(time.monotonic() - self._begun)
        self._spinner.update(text=Text(f"{self._stage}  {_clock(seconds)}", overflow="ellipsis"))
        return Group(self._spinner, grid) if self._steps or self._trials else self._spinner

    def _left(self) -> str:
        if not self._measured_trials:
            return ""
        mean = self._spent / self._measured_trials
        return f"about {_clock(mean * max(self._trials - self._done, 0))} left"


class _Notes(logging.Handler):
    """Shows what the package must tell the user about a subject or a domain."""

    def __init__(self, progress: CampaignProgress) -> None:
        super().__init__()
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        self._progress.say(f"note: {record.getMessage()}")


def describe_trial(spec: TrialSpec, subject: str) -> str:
    """Return a few words that tell a trial from the others of its campaign."""
    if spec.tamper == "none":
        return f"measure {subject} before any tamper"
    again = {"fresh": "again, ", "matched": "control without its aim: "}.get(spec.purpose, "")
    return f"{again}attack {spec.tamper} seed {spec.seed} on {subject}"


def _success(checkpoint: CheckpointRecord) -> float | None:
    items = success_items(checkpoint, Split.SELECT) or success_items(checkpoint, Split.REPORT)
    return sum(item["correct"] for item in items) / len(items) if items else None


def _percent(share: float | None) -> str:
    return "not measured" if share is None else f"{100 * share:.0f} %"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
