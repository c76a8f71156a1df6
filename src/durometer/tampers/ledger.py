"""What an attack has spent so far, added up as it goes; measuring time is not counted."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from durometer.core.budget import Budget, Spent, matrix_entries, training_flops
from durometer.core.rows import Row
from durometer.core.training import DivergedError, Update
from durometer.subjects.base import Subject
from durometer.tampers.base import Checkpoint, OnCheckpoint, Realised


class Ledger:
    """Books passes over rows; ``spent`` may hold what was spent before.

    Args:
        spent: added to in place.
        full: whether all weights are trained (see ``training_flops``).
    """

    def __init__(self, subject: Subject, spent: Spent, *, full: bool) -> None:
        head = subject.model.get_output_embeddings()
        self._sizes = matrix_entries(subject.model), head.weight.numel() if head is not None else 0
        self._spent, self._full = spent, full
        self._restricted: set[str] = set()
        self._seen: set[str] = set()
        self._clock = time.perf_counter()

    def announce(self, rows: Iterable[Row]) -> None:
        """Learn which items' rows are restricted, before updates mix them with others."""
        self._restricted |= {row.item_id for row in rows if row.restricted}

    def saw(self, rows: Sequence[Row]) -> None:
        """Count the items of rows that are read, but whose passes are booked elsewhere."""
        self.announce(rows)
        self._count(row.item_id for row in rows)

    def book(self, rows: Sequence[Row], *, passes: float = 1.0) -> None:
        """Count forward and backward passes over ``rows``; half a pass has no backward part."""
        self.announce(rows)
        labels = sum(len(row.labels) for row in rows)
        self._add(sum(len(row.ids) for row in rows), labels, (row.item_id for row in rows), passes)

    def update(self, update: Update, realised: Realised) -> None:
        """Count an update and what it took since the clock was last read, and record it."""
        realised.learning_rates.append(update.learning_rate)
        realised.losses.append(update.loss)
        realised.item_ids.append(update.item_ids)
        self._spent.steps = update.step
        if update.restricted == len(update.item_ids):
            self._restricted.update(update.item_ids)
        self._add(update.tokens, update.labels, update.item_ids, 1.0)
        self._spent.seconds += time.perf_counter() - self._clock
        self._clock = time.perf_counter()

    def resume(self) -> None:
        """Leave out the time since the last update: the subject was being measured."""
        self._clock = time.perf_counter()

    def checkpoint(self) -> Checkpoint:
        """Return where the attack stands."""
        return Checkpoint(self._spent.steps, replace(self._spent))

    def _add(self, tokens: int, labels: int, items: Iterable[str], passes: float) -> None:
        entries, head = self._sizes
        spent = self._spent
        spent.tokens += tokens
        spent.flops += passes * training_flops(entries, tokens, head, labels, full=self._full)
        self._count(items)

    def _count(self, items: Iterable[str]) -> None:
        self._seen.update(items)
        self._spent.examples = len(self._seen)
        self._spent.restricted_examples = len(self._seen & self._restricted)


def along_rungs(
    updates: Iterable[Update],
    ledger: Ledger,
    realised: Realised,
    budget: Budget,
    on_checkpoint: OnCheckpoint,
    on_update: Callable[[Update], None] | None,
) -> None:
    """Train along the budget's rungs; an attack that diverges keeps what it reached."""
    try:
        for update in updates:
            ledger.update(update, realised)
            if on_update is not None:
                on_update(update)
            stop = update.step in budget.rungs and not on_checkpoint(ledger.checkpoint())
            ledger.resume()
            if stop:
                break
    except DivergedError as error:
        realised.status = "diverged"
        realised.reason = f"after {realised.spent.steps} steps: {error}"
