"""Plain (eager) attention against the fused kernel (sdpa) on tree packs, as a campaign uses them.

On a CPU ``load_subject`` takes the plain products because of this result.
"""

import itertools
from typing import Any

from common import alternate, ratio, write

import durometer
from durometer.core.budget import Budget
from durometer.core.seeds import Seeds
from durometer.domains.base import Domain
from durometer.measures.base import measure_registry
from durometer.subjects.base import Subject
from durometer.tampers.base import make_tamper
from durometer.trials.runner import probes
from durometer.trials.suites import make_suite

UPDATES, ROUNDS = 6, 3


def attack(subject: Subject, domain: Domain) -> None:
    """Make a few LoRA updates and take them back."""
    tamper = make_tamper("lora", steps=UPDATES)
    with subject.restored():
        updates = tamper.steps(subject, domain, Budget(UPDATES), Seeds.derive(1))
        for _ in itertools.islice(updates, UPDATES):
            pass


def retain(subject: Subject, domain: Domain) -> None:
    """Score the retain items of a screen."""
    plan = make_suite("quick", subject.parameters).plan
    for probe in probes(domain, plan, "utility"):
        if probe.measure == "retain":
            measure_registry.get(probe.measure).run(subject, domain, probe.items)


def main() -> None:
    """Compare both on training and on scoring."""
    subject = durometer.load_subject("smollm2-refusal")
    domain = durometer.load_domain("capitals")
    cases: list[dict[str, Any]] = []
    for name, work in (("LoRA attack", attack), ("retain items", retain)):

        def run(kernel: str, work: Any = work) -> None:
            subject.model.set_attn_implementation(kernel)
            work(subject, domain)

        run("eager"), run("sdpa")
        fused, plain = alternate(lambda: run("sdpa"), lambda: run("eager"), ROUNDS)
        cases.append({"work": name, "dtype": subject.dtype, **ratio(fused, plain)})
    result = {
        "what": "plain attention (ours) on tree packs of smollm2-refusal",
        "baseline": "torch's fused scaled-dot-product attention",
        "cases": cases,
    }
    print(write("attention", result).read_text())


if __name__ == "__main__":
    main()
