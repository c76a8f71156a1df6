"""Restoring ``smollm2`` after full fine-tuning and after LoRA: time, extra memory, exactness."""

import time
from typing import Any

from common import write

import durometer
from durometer.core.budget import Budget
from durometer.core.seeds import Seeds
from durometer.subjects.fingerprint import weights_fingerprint
from durometer.tampers.base import make_tamper


def run(name: str) -> dict[str, Any]:
    """Attack for two steps and restore; return what it cost and whether it is exact."""
    subject = durometer.load_subject("smollm2-refusal")
    domain = durometer.load_domain("capitals")
    weights = sum(p.numel() * p.element_size() for p in subject.model.parameters())
    tamper = make_tamper(name)
    with subject.restored():
        steps = tamper.steps(subject, domain, Budget(2), Seeds.derive(1))
        losses = [update.loss for update in steps]
        changed = weights_fingerprint(subject.model) != subject.fingerprint
        copies = subject.restoration.copied_bytes()
        begun = time.perf_counter()
    seconds = time.perf_counter() - begun
    begun = time.perf_counter()
    exact = weights_fingerprint(subject.model) == subject.fingerprint
    return {
        "tamper": name,
        "losses": losses,
        "changed_before_restore": changed,
        "bit_exact_after_restore": exact,
        "weights_mib": weights / 2**20,
        "copies_mib": copies / 2**20,
        "restore_and_check_seconds": seconds,
        "check_alone_seconds": time.perf_counter() - begun,
    }


def main() -> None:
    """Measure both and write ``results/restore.json``."""
    path = write("restore", {"cases": [run("finetune"), run("lora")]})
    print(path.read_text())


if __name__ == "__main__":
    main()
