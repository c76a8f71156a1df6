"""Tampers without optimiser steps: one edit, tried at ascending strengths."""

import math
import time
from dataclasses import replace
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BeforeValidator

from durometer.core.budget import Budget, Spent
from durometer.core.seeds import Seeds
from durometer.core.settings import Settings
from durometer.domains.base import Domain
from durometer.subjects.base import Subject
from durometer.tampers.base import Checkpoint, OnCheckpoint, Realised, Tamper


def _numbers(value: Any) -> Any:
    """Accept '0.1 0.2' and '0.1/0.2' as the command line has them."""
    return tuple(value.replace("/", " ").split()) if isinstance(value, str) else value


Strengths = Annotated[tuple[float, ...], BeforeValidator(_numbers)]
S = TypeVar("S", bound=Settings)


class Ladder(Tamper[S]):
    """Base of edits: ``prepare`` looks at the subject once, ``apply`` edits it at one strength.

    Before each strength the subject is as it was found; every change is announced to
    ``subject.restoration`` (weights by ``writable``, hooks and adapters by ``on_exit``).
    """

    unit = "strengths"
    ladder = True
    # Weights of tampers that only hook or reword stay as they are.
    changes_weights: ClassVar[bool] = True

    def strengths(self) -> tuple[float, ...]:
        """Return the strengths in the order in which they are tried, weakest first."""
        raise TypeError(f"{type(self).__name__} defines no strengths()")  # pragma: no cover

    def prepare(
        self, subject: Subject, data: Domain, seeds: Seeds, realised: Realised, spent: Spent
    ) -> None:
        """Compute what every strength needs; book passes in ``spent``, facts in ``realised``.

        Raises:
            NotApplicableError: the subject lacks the structure that the tamper needs.
        """

    def apply(self, subject: Subject, strength: float, realised: Realised) -> int:
        """Edit the untouched ``subject``; return how many weights were edited (hooks: 0)."""
        raise TypeError(f"{type(self).__name__} defines no apply()")  # pragma: no cover

    def planned_steps(self) -> int:
        """Return the number of strengths."""
        return len(self.strengths())

    def run(
        self,
        subject: Subject,
        data: Domain,
        budget: Budget,
        seeds: Seeds,
        on_checkpoint: OnCheckpoint,
    ) -> Realised:
        """Try the strengths within ``budget``, weakest first; see ``Tamper.run``."""
        realised, spent = Realised(), Spent()
        begun, effective = time.perf_counter(), False
        if budget.steps:
            self.prepare(subject, data, seeds, realised, spent)
        strengths = self.strengths()[: budget.steps]
        for step, strength in enumerate(strengths, start=1):
            subject.restoration.undo()
            realised.changed_weights = self.apply(subject, strength, realised)
            self._audit(subject, realised, strength)
            effective |= realised.status == "done" and strength != 0
            spent.steps = step
            spent.seconds += time.perf_counter() - begun
            stop = step in budget.rungs and not on_checkpoint(
                Checkpoint(step, replace(spent), strength, last=step == len(strengths))
            )
            begun = time.perf_counter()
            if stop or realised.status == "diverged":
                break
        if realised.status == "no_effect" and effective:
            # One strength without effect must not hide what the others did.
            realised.facts["without_effect"] = realised.reason
            realised.status, realised.reason = "done", ""
        realised.spent = spent
        return realised

    def _audit(self, subject: Subject, realised: Realised, strength: float) -> None:
        """Record what changed; strength 0 may change nothing, any other must."""
        norms = subject.restoration.changes()
        realised.changed = {name: norm for name, norm in norms.items() if math.isfinite(norm)}
        if len(realised.changed) < len(norms):
            realised.status = "diverged"
            realised.reason = f"weights not finite at strength {strength:g}"
        elif not self.changes_weights or not strength or any(realised.changed.values()):
            realised.status, realised.reason = "done", ""
        else:
            realised.status = "no_effect"
            realised.reason = f"no weight changed at strength {strength:g}"
