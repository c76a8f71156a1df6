"""What hardening costs: a TAR step against its passes alone, and light safeguards on ``smollm2``.

An outer step of TAR is timed between two reports of the training loop. After each one the very
passes that it made, forward and backward on the same rows with the same trained weights, are made
again by themselves; so both are timed in turn, and what is left is optimisers, restores, checks and
bookkeeping. Every case runs in a process of its own, which makes its peak memory its own, too.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import peak_memory_mib, ratio, write

import durometer
from durometer.core.adapters import Adapter, linear_maps
from durometer.core.rows import Row
from durometer.core.seeds import Seeds
from durometer.core.training import Trainer
from durometer.safeguards.base import Term, TrainingSettings, make_safeguard
from durometer.safeguards.bench import Bench
from durometer.safeguards.card import measured
from durometer.safeguards.data import DefenceData
from durometer.safeguards.inner import ATTACKED
from durometer.safeguards.passes import Reference, passes
from durometer.safeguards.train import Outcome, Step, TrainingRun, edited, reduced
from durometer.subjects.base import Subject

SEEDS = Seeds.derive(7)
TARGET_RATIO, TARGET_SECONDS, MIB = 1.25, 300.0, 2**20
SMOLLM2: dict[str, Any] = {"preset": "light", "refresh": 1, "inner_weights": "all"}
# Subject, domain, number format, settings of TAR. ``smollm2`` is counted as safeguards' sources
# count it: fp32, all weights in the inner attack; its light preset puts an adapter there.
CASES: dict[str, tuple[str, str, Any, dict[str, Any]]] = {
    "micro": ("micro", "world:knowledge", "float32", {"preset": "tiny"}),
    "smollm2": ("smollm2", "capitals:knowledge", "float32", SMOLLM2),
    "smollm2-adapter": (
        "smollm2",
        "capitals:knowledge",
        "bfloat16",
        SMOLLM2 | {"inner_weights": "adapter"},
    ),
}
# Number format in which each light safeguard runs: one small edit of all weights needs fp32.
LIGHT: dict[str, Any] = {"rep_select": "float32", "cir": "auto", "rmu": "auto"}


@dataclass
class Spy:
    """What one outer step did: rows of inner updates, and places that were evaluated."""

    inner: list[list[Row]] = field(default_factory=list)
    places: list[tuple[Step, str, float]] = field(default_factory=list)

    def watch(self, run: TrainingRun) -> None:
        """Have a run tell what it does."""
        update, evaluate = Trainer.update, run._evaluate

        def updated(trainer: Trainer, rows: Any) -> Any:
            self.inner.append(list(rows))
            return update(trainer, rows)

        def evaluated(step: Step, place: str, weight: float) -> None:
            self.places.append((step, place, weight))
            evaluate(step, place, weight)

        Trainer.update = updated  # type: ignore[method-assign]
        run._evaluate = evaluated  # type: ignore[method-assign]

    def clear(self) -> None:
        """Forget the last step."""
        self.inner.clear()
        self.places.clear()


@contextmanager
def training(model: Any, trained: list[Any]) -> Iterator[None]:
    """Ask for the gradients of these weights alone, and forget them afterwards."""
    flags = {p: p.requires_grad for p in model.parameters()}
    for parameter in flags:
        parameter.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
            parameter.grad = None


class Alone:
    """Makes the passes of one step again, and nothing else."""

    def __init__(self, run: TrainingRun, subject: Subject, reference: Reference | None) -> None:
        self._run, self._subject, self._reference = run, subject, reference
        self.seconds = 0.0

    def repeat(self, spy: Spy) -> float:
        """Return the seconds of all passes: those behind an adapter with one on."""
        self.seconds = 0.0
        attacked = [entry for entry in spy.places if entry[1] == ATTACKED]
        others = [entry for entry in spy.places if entry[1] != ATTACKED]
        with self._adapter() as inner, training(self._subject.model, inner):
            for rows in spy.inner:
                self._timed(lambda rows=rows: self._inner(rows), inner)
            self._places(attacked)
        self._places(others)
        return self.seconds

    def _timed(self, work: Callable[[], None], trained: list[Any]) -> None:
        begun = time.perf_counter()
        work()
        self.seconds += time.perf_counter() - begun
        for parameter in trained:
            parameter.grad = None

    @contextmanager
    def _adapter(self) -> Iterator[list[Any]]:
        """Yield what an inner attack trains."""
        model, settings = self._subject.model, self._run.safeguard.settings
        if "adapter" not in settings.inner_weights:
            yield list(model.parameters())
            return
        maps, rank = linear_maps(model, "all"), settings.inner_rank
        adapter = Adapter(model, maps, rank=rank, alpha=2.0 * rank, seed=1)
        try:
            yield adapter.trainable()
        finally:
            adapter.remove()

    def _inner(self, rows: list[Row]) -> None:
        labels = sum(len(row.labels) for row in rows)
        for part in self._subject.forward.loss_sums(rows):
            (part / labels).backward()

    def _places(self, entries: list[tuple[Step, str, float]]) -> None:
        trained = self._run.trainer._parameters
        with training(self._subject.model, trained):
            for step, place, weight in entries:
                self._timed(lambda s=step, p=place, w=weight: self._evaluate(s, p, w), trained)

    def _evaluate(self, step: Step, place: str, weight: float) -> None:
        pools: dict[str, dict[Term, float]] = {}
        for term in self._run.terms:
            factor = weight * term.weight(step.number, step.steps)
            if term.at == place and factor:
                pools.setdefault(term.rows, {})[term] = factor
        for pool, terms in pools.items():
            rows = step.rows(pool)
            roles = tuple(dict.fromkeys(role for term in terms for role in term.reads))
            whole, unit = any(term.whole for term in terms), max(term.unit for term in terms)
            forward, frozen = self._subject.forward, self._reference
            for one in passes(forward, rows, roles, frozen, whole=whole, unit=unit):
                losses = [reduced(term, one, rows) * factor for term, factor in terms.items()]
                torch.stack(losses).sum().backward()


def resident_mib() -> float:
    """Return the present resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / MIB


def counted_mib(subject: Subject, run: TrainingRun) -> dict[str, float]:
    """Return what a step has to hold beside activations, part by part.

    Outer state, masters of weights in a narrow format, one gradient buffer, the frozen reference,
    and of the inner attack: gradient, state, masters and a copy of the weights it starts from.
    """
    model, settings = subject.model, run.safeguard.settings
    size = next(model.parameters()).element_size()
    trained = sum(p.numel() for p in run.trainer._parameters)
    adapter = "adapter" in settings.inner_weights
    maps = linear_maps(model, "all")
    inner = subject.parameters
    if adapter:
        shapes = [model.get_submodule(name).weight.shape for name in maps]
        inner = sum(settings.inner_rank * (rows + columns) for rows, columns in shapes)
    narrow = 4 if size < 4 else 0
    parts = {
        "weights": size * subject.parameters,
        "outer_optimiser": 8 * trained,
        "outer_masters": narrow * trained,
        "gradient_buffer": 4 * trained,
        "reference": size * subject.parameters if run._reference is not None else 0,
        "gradient": size * max(inner, trained),
        "inner_optimiser": 8 * inner,
        "inner_masters": narrow * inner,
        "start_copy": 0 if adapter else size * subject.parameters,
    }
    return {name: value / MIB for name, value in parts.items()} | {
        "all": sum(parts.values()) / MIB,
        "bytes_a_weight": sum(parts.values()) / subject.parameters,
    }


def tar_case(name: str, rounds: int) -> dict[str, Any]:
    """Time outer steps of TAR and their passes alone, in turn; the first round warms up."""
    spec, domain, dtype, settings = CASES[name]
    subject = durometer.load_subject(spec, dtype=dtype)
    made = make_safeguard("tar", **settings, stage1="none", loss="entropy", steps=rounds + 1)
    reference = Reference(subject.model, tree=subject.tree) if made.reference else None
    data = DefenceData(subject, durometer.load_domain(domain))
    run = TrainingRun(made, subject, data, SEEDS, reference=reference)
    spy, alone = Spy(), Alone(run, subject, reference)
    spy.watch(run)
    whole: list[float] = []
    parts: list[float] = []
    begun = time.perf_counter()

    def reported(report: Any) -> None:
        nonlocal begun
        whole.append(time.perf_counter() - begun)
        # The peak of the steps alone: making passes again holds nothing that a step does not.
        parts.append(alone.repeat(spy))
        spy.clear()
        begun = time.perf_counter()

    before = resident_mib()
    outcome = run.run(reported)
    compared = ratio(whole[1:], parts[1:])
    return {
        "case": name,
        "settings": settings,
        "dtype": subject.dtype,
        "step_seconds": compared.pop("baseline_seconds"),
        "passes_alone_seconds": compared.pop("ours_seconds"),
        **compared,
        "within_target": compared["ratio"] <= TARGET_RATIO,
        "passes": outcome.ledger.passes,
        "memory": {
            "counted_mib": counted_mib(subject, run),
            "before_training_mib": before,
            "peak_mib": peak_memory_mib(),
        },
    }


def light_case(name: str) -> dict[str, Any]:
    """Time one safeguard with its light preset, from the loaded subject to the hardened one."""
    subject = durometer.load_subject("smollm2", dtype=LIGHT[name])
    domain = durometer.load_domain("capitals:knowledge")
    made = make_safeguard(name, "light")
    before = measured(subject, domain)
    begun = time.perf_counter()
    reference = Reference(subject.model, tree=subject.tree) if made.reference else None
    data = DefenceData(subject, domain)
    outcome: Outcome
    if isinstance(made.settings, TrainingSettings):
        run = TrainingRun(made, subject, data, SEEDS, reference=reference)
        outcome = run.run()
        run.edit()
    else:
        outcome = edited(made, Bench(subject, data, SEEDS, reference))
    seconds = time.perf_counter() - begun
    return {
        "safeguard": name,
        "settings": made.settings.canonical(),
        "dtype": subject.dtype,
        "status": outcome.status,
        "seconds": seconds,
        "within_target": seconds <= TARGET_SECONDS,
        "passes": outcome.ledger.passes,
        "before": before,
        "after": measured(subject, domain),
        "peak_memory_mib": peak_memory_mib(),
    }


def in_own_process(*arguments: str) -> dict[str, Any]:
    """Run one case in a fresh process and return what it found."""
    print("--", *arguments, file=sys.stderr, flush=True)
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def parsed() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subjects", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--safeguards", nargs="*", choices=LIGHT, default=list(LIGHT))
    parser.add_argument("--rounds", type=int, default=5, help="rounds counted; one more warms up")
    parser.add_argument("--dry", action="store_true", help="print the result, write no file")
    parser.add_argument("--case", choices=(*CASES, *LIGHT), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run all cases and write ``results/hardening.json``."""
    options = parsed()
    if options.case:
        found = (
            tar_case(options.case, options.rounds)
            if options.case in CASES
            else light_case(options.case)
        )
        print(json.dumps(found))
        return
    rounds = str(options.rounds)
    result = {
        "what": "an outer TAR step against its passes alone; seconds of light safeguards",
        "target_ratio": TARGET_RATIO,
        "target_seconds": TARGET_SECONDS,
        "tar_step": [
            in_own_process("--case", name, "--rounds", rounds) for name in options.subjects
        ],
        "light": [in_own_process("--case", name) for name in options.safeguards],
    }
    if options.dry:
        print(json.dumps(result, indent=2))
    else:
        print(write("hardening", result).read_text())


if __name__ == "__main__":
    main()
