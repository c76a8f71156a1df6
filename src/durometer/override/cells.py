"""One cell: the subject fine-tuned one way, at one rank and seed, in memory, and measured."""

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from durometer.core.budget import Budget
from durometer.core.edits import RestoreError
from durometer.core.errors import DurometerError, InputError, NotApplicableError, StorageError
from durometer.core.rows import Row
from durometer.core.seeds import Seeds
from durometer.core.training import DivergedError, Update
from durometer.domains.base import Domain, Role, Split
from durometer.measures.base import NOT_FINITE
from durometer.override.battery import ALL, STEERED, Battery
from durometer.override.pack import pack
from durometer.override.settings import DriftSettings
from durometer.safeguards.data import DefenceData
from durometer.safeguards.steering import find_steering, steerable_blocks, steered
from durometer.subjects.base import Subject
from durometer.subjects.fingerprint import weights_fingerprint
from durometer.tampers.base import Checkpoint, Realised, make_tamper
from durometer.tampers.data import Relation, training_items
from durometer.trials.runner import FAILURES, failure

__all__ = ["WAYS", "Bench", "Cell", "cell_key", "relations", "rows_each"]

WAYS = ("answers", "refusals", "benign")
# Steering is tried where something has to be mitigated, and on the subject as it is.
MITIGATED = ("none", "answers")
PROBED = 4
Json = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One thing to run.

    Attributes:
        way: of ``WAYS``, or ``none`` for the subject as it is.
        rank: of the adapter; 0 without one.
        seed: of the training; 0 without one.
    """

    way: str
    rank: int = 0
    seed: int = 0

    @property
    def key(self) -> str:
        """Name of the cell in the store."""
        return cell_key(self.way, self.rank, self.seed)

    def __str__(self) -> str:
        if self.way == "none":
            return "the subject as it is"
        return f"{self.way}, rank {self.rank}, seed {self.seed}"


def cell_key(way: str, rank: int, seed: int) -> str:
    """Return the name of a cell in the store."""
    return f"{way}/{rank}/{seed}"


def relations(domain: Domain) -> dict[str, Relation]:
    """Return which rows of a domain each way trains on.

    The control answers harmless questions of the same form; where there are none to train on, it
    answers harmless chat.

    Raises:
        InputError: the domain has no refusals to train on.
    """
    if not domain.refusals:
        raise InputError(
            f"domain '{domain.name}': it has no refusals, so that nothing can be trained to "
            "refuse; add refusals to its domain.toml"
        )
    retain = domain.select(Role.RETAIN, Split.ATTACK, training=True)
    return {
        "answers": "disjoint",
        "refusals": "refusals",
        "benign": "retain" if any(item.response for item in retain) else "benign",
    }


def rows_each(domain: Domain, settings: DriftSettings) -> int:
    """Return how many distinct rows every way trains on: as many as the way with the fewest.

    Raises:
        InputError: a way has none.
    """
    seeds, most = Seeds.derive(1), settings.examples
    return min(
        len(training_items(domain, relation, most, seeds))
        for relation in relations(domain).values()
    )


class Bench:
    """Runs cells on one subject, and leaves it as it was found.

    Args:
        examples: distinct rows of every way.
        on_update: told of every update, for progress.
    """

    def __init__(
        self,
        subject: Subject,
        domain: Domain,
        settings: DriftSettings,
        battery: Battery,
        on_update: Callable[[Update], None] | None = None,
    ) -> None:
        self._subject, self._domain, self._settings = subject, domain, settings
        self._battery, self._on_update = battery, on_update
        self._relations = relations(domain)
        self._examples = rows_each(domain, settings)
        self._rows = _probed(subject, battery)

    def run(self, cell: Cell) -> Json:
        """Return the record of a cell; what goes wrong in it is a status, never a silence.

        Raises:
            RestoreError: the subject was not restored, so that nothing later could be trusted.
            StorageError, KeyboardInterrupt: passed on.
        """
        begun = time.perf_counter()
        record: Json = {"way": cell.way, "rank": cell.rank, "seed": cell.seed}
        record |= {"status": "done", "reason": ""}
        try:
            record |= self._untouched() if cell.way == "none" else self._trained(cell)
        except (RestoreError, StorageError):
            raise
        except DivergedError as error:
            record["status"], record["reason"] = "diverged", str(error)
        except (DurometerError, MemoryError, *FAILURES) as error:
            record["status"], record["reason"] = failure(error)
        record["seconds"] = round(time.perf_counter() - begun, 2)
        return record

    def _untouched(self) -> Json:
        return {
            "measured": self._measured(whole=True),
            "steering": self._steering("none"),
            "texts": self._battery.texts() if self._domain.harmless else {},
        }

    def _trained(self, cell: Cell) -> Json:
        """Train, measure, take the adapter off, and compare with what was before."""
        settings, subject = self._settings, self._subject
        relation = self._relations[cell.way]
        told = settings.tamper(cell.rank, relation, self._examples, subject.parameters)
        tamper = make_tamper("lora", **told)
        tamper.on_update = self._on_update
        before, found = self._state(), dict[str, Any]()

        def look(_: Checkpoint) -> bool:
            found["logits_with"] = self._logits_hash()
            found["measured"] = self._measured(whole=False)
            found["steering"] = self._steering(cell.way)
            return True

        with subject.restored():
            budget = Budget(settings.steps, (settings.steps,))
            realised = tamper.run(subject, self._domain, budget, Seeds.derive(cell.seed), look)
        after = self._state()
        removal = {
            "weights_before": before[0],
            "weights_after": after[0],
            "logits_before": before[1],
            "logits_with": found.pop("logits_with", None),
            "logits_after": after[1],
            "identical": before == after,
        }
        record = {"tamper": told, "realised": _told(realised), "removal": removal}
        return record | {"status": realised.status, "reason": realised.reason} | found

    def _state(self) -> tuple[str, str]:
        return weights_fingerprint(self._subject.model), self._logits_hash()

    @torch.no_grad()
    def _logits_hash(self) -> str:
        """Return the SHA-256 of the logits of a few prompts, bit for bit."""
        digest = hashlib.sha256()
        self._subject.model.eval()
        for part in self._subject.forward.labelled(self._rows):
            digest.update(part.logits.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _measured(self, *, whole: bool, parts: Sequence[str] = ALL) -> Json:
        """Return what is measured now.

        Raises:
            DivergedError: outputs are not finite; such answers are no wrong ones, and no safe ones.
        """
        records = self._battery.measure(self._subject, self._domain, parts)
        lost = sum(record.parse_status == NOT_FINITE for record in records)
        if lost:
            raise DivergedError(f"{lost} of {len(records)} outputs are not finite")
        return pack(records, whole=whole)

    def _steering(self, way: str) -> Json | None:
        """Return what steering towards refusal does to the subject as it stands."""
        if not self._settings.steering or way not in MITIGATED:
            return None
        settings = self._settings.steering_settings()
        try:
            numbers = steerable_blocks(self._subject.model, settings)
            data = DefenceData(self._subject, self._domain)
            found = find_steering(self._subject, data, settings, numbers)
        except (NotApplicableError, InputError) as error:
            return {"status": "not_applicable", "reason": str(error)}
        try:
            with steered(self._subject, found):
                measured = self._measured(whole=False, parts=STEERED)
        except DivergedError as error:
            return {"status": "diverged", "reason": str(error)}
        facts = asdict(found.choice) | {"refusal_before": found.plain.refusal}
        facts = {k: round(v, 6) if isinstance(v, float) else v for k, v in facts.items()}
        return {
            "status": "done",
            "reason": "",
            "choice": facts,
            "measured": measured,
        }


def _probed(subject: Subject, battery: Battery) -> list[Row]:
    """Return a few prompts as rows, whose logits are compared bit for bit."""
    prompts = [subject.chat.prompt_ids(item.prompt) for item in battery.restricted[:PROBED]]
    return [Row((*ids, 0), 1) for ids in prompts]


def _told(realised: Realised) -> Json:
    """Return what a training really did, without the lists by step and tensor that are long."""
    norms: Sequence[float] = list(realised.changed.values())
    return {
        "spent": asdict(realised.spent),
        "learning_rates": [float(f"{rate:.6g}") for rate in realised.learning_rates],
        "losses": [float(f"{loss:.6g}") for loss in realised.losses],
        "data_order_hash": realised.data_order_hash,
        "label_sample": realised.label_sample[:1],
        "changed_weights": realised.changed_weights,
        "changed_tensors": len(norms),
        "change_norm": math.sqrt(math.fsum(norm**2 for norm in norms)),
    }
