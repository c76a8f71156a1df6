"""What a safeguard that changes weights outside the loop works with."""

from dataclasses import dataclass, field

from durometer.core.seeds import Seeds
from durometer.safeguards.attacks import AttackRunner
from durometer.safeguards.data import DefenceData
from durometer.safeguards.ledger import Ledger
from durometer.safeguards.passes import Reference
from durometer.subjects.base import Subject


@dataclass
class Bench:
    """The subject of an edit and what belongs to it.

    Attributes:
        subject: changed in place.
        data: what may be learnt from.
        reference: the frozen model, where the safeguard declares one.
        ledger: counts what it costs.
    """

    subject: Subject
    data: DefenceData
    seeds: Seeds
    reference: Reference | None = None
    ledger: Ledger = field(default_factory=Ledger)

    @property
    def attacks(self) -> AttackRunner:
        """Runs inner attacks, and puts the weights back bit for bit."""
        return AttackRunner(self.subject, self.data, self.ledger)
