"""Find suffixes on safeguarded models, try them on others of the same lineage, and tabulate.

Usage: python studies/transfer/run.py [--quick] [--work FOLDER]

Every string that was found and every answer to it is kept in the work folder at once, so that the
same command goes on where it was stopped. ``--quick`` is a try on ``micro``, without results.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import transfer_pages
from transfer_matrix import LETTERS, NONE, RANDOM, SUCCESS, UNDEFENDED, Outcomes, failures, matrix
from transfer_variants import Variant, variant_folder, variants

import durometer.catalogue  # noqa: F401  (fills the registries)
from durometer.core.errors import DurometerError
from durometer.core.seeds import Seeds
from durometer.core.settings import Settings, digest_of, setting
from durometer.core.sources import source_hash
from durometer.domains.base import Domain, Item, Role, Split
from durometer.domains.load import load_domain
from durometer.measures.base import sample
from durometer.measures.outcomes import Outcome
from durometer.measures.responses import measure_outcomes
from durometer.subjects.base import Subject
from durometer.subjects.load import load_subject
from durometer.tampers.gcg import GcgSettings, make_ready, make_search
from durometer.trials.runner import environment

HERE = Path(__file__).resolve().parent
SPLITS = (Split.SELECT, Split.REPORT)
ROOMS = ("core", "domains", "measures", "safeguards", "subjects", "tampers")
RANDOM_SEED = 1000  # apart from the seeds of the searches
Load = Callable[[str], Subject]


class Plan(Settings):
    """What the study does; another plan has a work folder of its own."""

    base: str = setting("smollm2", "the undefended model")
    domain: str = setting("capitals", "what is safeguarded")
    k: int = setting(4, "strings a source, found with seeds 1 to k, and random strings", ge=1)
    search: GcgSettings = setting(
        GcgSettings(steps=12, candidates=64, top_k=64), "settings of every search"
    )
    select_entities: int = setting(24, "entities that strings are chosen on, one item each", ge=2)
    report_entities: int = setting(40, "entities that rates are shown on, one item each", ge=2)


QUICK = Plan(
    base="micro",
    domain="world",
    k=2,
    search=GcgSettings(steps=3, candidates=16, top_k=8, suffix_tokens=4),
    select_entities=8,
    report_entities=12,
)


class Shelf:
    """JSON values in a folder, one file a name, each written whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """Return the value of ``name``, made now if it is not there."""
        path = self.folder / f"{name}.json"
        with suppress(FileNotFoundError):
            return json.loads(path.read_text("utf-8"))
        value = make()
        write_whole(path, json.dumps(value))
        return value


def write_whole(path: Path, text: str) -> None:
    """Write ``text`` so that a kill at any moment leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text, "utf-8")
    beside.replace(path)


@dataclass(frozen=True)
class Study:
    """The parts of one run.

    Attributes:
        load: returns a variant, or ``undefended``, by name.
        names: the safeguarded variants.
        tell: shows one line of progress.
    """

    plan: Plan
    domain: Domain
    names: Sequence[str]
    load: Load
    shelf: Shelf
    tell: Callable[[str], None] = print

    def items(self, split: Split) -> list[Item]:
        """Return the items of a split that all strings are tried on, none of them trained on."""
        plan = self.plan
        entities = plan.select_entities if split == Split.SELECT else plan.report_entities
        return sample(self.domain.select(Role.RESTRICTED, split, training=False), entities, 1)


def search(study: Study, source: str, number: int) -> dict[str, Any]:
    """Return the best suffix of one search on ``source``, with its losses."""
    subject = study.load(source)
    settings, seeds, begun = study.plan.search, Seeds.derive(number), time.perf_counter()
    hunt = make_ready(subject, study.domain, settings, seeds)
    hunter = make_search(subject, hunt, settings, seeds)
    losses = [hunter.step().loss for _ in range(settings.steps)]
    return {
        "text": hunter.best.text,
        "loss": hunter.best.loss,
        "initial_loss": hunter.initial.loss,
        "losses": losses,
        "items": [prompt.item_id for prompt in hunt.start.prompts],
        "subject": subject.fingerprint,
        "seconds": time.perf_counter() - begun,
    }


def draw(study: Study, source: str, number: int) -> dict[str, Any]:
    """Return a random suffix of as many tokens as those that are searched for."""
    subject = study.load(source)
    settings, seeds = study.plan.search, Seeds.derive(RANDOM_SEED + number)
    hunt = make_ready(subject, study.domain, settings, seeds)
    generator = torch.Generator().manual_seed(seeds.sampling)
    drawn = hunt.tokens.random(hunt.start.prompts, settings.suffix_tokens, generator)
    if drawn is None:
        raise DurometerError("no random suffix survives the tokenizer; take fewer suffix_tokens")
    return {"text": drawn[1]}


def find_strings(study: Study) -> dict[str, dict[str, dict[str, Any]]]:
    """Return all strings by where they come from, found or drawn now where they are missing."""
    numbers = range(1, study.plan.k + 1)
    first = study.names[0]
    strings: dict[str, dict[str, dict[str, Any]]] = {NONE: {NONE: {"text": ""}}}
    strings[RANDOM] = {
        f"{RANDOM}-{n}": study.shelf.kept(f"string-{RANDOM}-{n}", partial(draw, study, first, n))
        for n in numbers
    }
    for source in study.names:
        strings[source] = {}
        for n in numbers:
            found = study.shelf.kept(f"string-{source}-{n}", partial(search, study, source, n))
            strings[source][f"{source}-{n}"] = found
            study.tell(f"{source}-{n}: loss {found['initial_loss']:.2f} to {found['loss']:.2f}")
    return strings


def ask(study: Study, target: str, text: str) -> dict[str, Any]:
    """Return outcomes and responses of all items with ``text`` behind every prompt.

    The text is rendered in the target's own template and tokenised there.
    """
    subject = study.load(target)
    items = [item for split in SPLITS for item in study.items(split)]
    with subject.restored():
        subject.ask_restricted(chat=replace(subject.chat, suffix=text))
        records = measure_outcomes(subject, study.domain, items)
    return {
        "outcomes": {
            str(split): "".join(LETTERS[Outcome(r.outcome)] for r in records if r.split == split)
            for split in SPLITS
        },
        "responses": [record.response for record in records],
        "subject": subject.fingerprint,
    }


def try_strings(
    study: Study, strings: dict[str, dict[str, dict[str, Any]]]
) -> dict[str, dict[str, Any]]:
    """Return by target and string what was answered; asked now where it is missing."""
    answers: dict[str, dict[str, Any]] = {}
    for target in (*study.names, UNDEFENDED):
        answers[target] = {}
        for name, string in ((n, s) for group in strings.values() for n, s in group.items()):
            answers[target][name] = study.shelf.kept(
                f"answers-{target}-to-{name}", partial(ask, study, target, string["text"])
            )
            report = answers[target][name]["outcomes"][Split.REPORT]
            study.tell(f"{name} on {target}: {report.count(SUCCESS)} of {len(report)}")
    return answers


def require_one_model(
    strings: dict[str, dict[str, dict[str, Any]]], answers: dict[str, dict[str, Any]]
) -> dict[str, str]:
    """Return the weights' fingerprint of every target.

    Raises:
        DurometerError: a name stands for different weights in what is kept, say because a variant
            was trained anew on another machine.
    """
    kept = {target: {a["subject"] for a in group.values()} for target, group in answers.items()}
    for source, group in strings.items():
        if source in kept:
            kept[source] |= {string["subject"] for string in group.values()}
    mixed = [name for name, fingerprints in kept.items() if len(fingerprints) > 1]
    if mixed:
        raise DurometerError(f"'{mixed[0]}' has changed since the study began; use another --work")
    return {name: fingerprint for name, (fingerprint,) in kept.items()}


def outcomes_of(
    study: Study, strings: dict[str, dict[str, Any]], answers: dict[str, dict[str, Any]]
) -> Outcomes:
    """Return the table that matrix and failures are computed from."""
    return Outcomes(
        {origin: list(group) for origin, group in strings.items()},
        list(answers),
        {
            target: {name: answer["outcomes"] for name, answer in group.items()}
            for target, group in answers.items()
        },
        {str(split): [item.entity for item in study.items(split)] for split in SPLITS},
    )


def run(study: Study) -> dict[str, Any]:
    """Do all that is missing and return the result."""
    strings = find_strings(study)
    answers = try_strings(study, strings)
    outcomes = outcomes_of(study, strings, answers)
    return {
        "what": f"suffixes found on safeguarded variants of {study.plan.base}, tried on the others",
        "lineage": f"all targets are {study.plan.base} with one safeguard; one tokenizer, one "
        "chat template: this says nothing of transfer between families",
        "plan": study.plan.canonical(),
        "environment": environment(study.load(UNDEFENDED)),
        "letters": {letter: str(outcome) for outcome, letter in LETTERS.items()},
        "items": {str(split): [item.id for item in study.items(split)] for split in SPLITS},
        "strings": strings,
        "subjects": require_one_model(strings, answers),
        "outcomes": outcomes.letters,
        "thresholds": {
            t: {str(split): outcomes.threshold(t, split) for split in SPLITS} for t in study.names
        },
        "matrix": matrix(outcomes),
        "failures": failures(outcomes),
    }


def make_study(plan: Plan, work: Path) -> Study:
    """Return the study of ``plan`` on its real models, with a folder of its own in ``work``."""
    domain, chosen = load_domain(plan.domain), {v.name: v for v in variants(plan.base)}

    @cache
    def load(name: str) -> Subject:
        if name == UNDEFENDED:
            return load_subject(plan.base)
        return load_subject(str(variant_folder(plan.base, plan.domain, chosen[name])))

    recipe = [plan.canonical(), domain.content_hash, source_hash(*ROOMS)]
    recipe += [repr(variant) for variant in chosen.values()]
    folder = work / digest_of(recipe)[:12]
    return Study(
        plan, domain, list(chosen), load, Shelf(folder), lambda text: print(text, flush=True)
    )


def described(plan: Plan) -> dict[str, dict[str, Any]]:
    """Return the variants as the result file has them."""

    def one(variant: Variant) -> dict[str, Any]:
        settings = variant.settings.canonical()
        return {
            "difference": variant.difference,
            "settings": settings,
            "seed": variant.seed,
            "full": variant.full,
        }

    return {variant.name: one(variant) for variant in variants(plan.base)}


def main() -> None:
    """Run the study; write result, figure and README unless it is a quick try."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="a try on micro; writes no results")
    parser.add_argument("--work", type=Path, default=Path("runs/transfer"), help="work folder")
    options = parser.parse_args()
    study = make_study(QUICK if options.quick else Plan(), options.work)
    print(f"kept in {study.shelf.folder}", flush=True)
    result = {**run(study), "variants": described(study.plan)}
    folder = study.shelf.folder / "results" if options.quick else HERE / "results"
    write_whole(folder / "transfer.json", json.dumps(result, indent=1) + "\n")
    pictures = folder if options.quick else HERE.parents[1] / "docs" / "images"
    write_whole(pictures / "transfer.svg", transfer_pages.figure(result))
    if not options.quick:
        readme = HERE / "README.md"
        page = transfer_pages.with_results(readme.read_text("utf-8"), result)
        write_whole(readme, page)
    print(transfer_pages.tables(result))


if __name__ == "__main__":
    main()
