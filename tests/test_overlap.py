"""Overlap between splits: repeated prompts, shared entities, passages that are no template."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from durometer.domains.base import AnswerRules, Domain, Item, Role, Split
from durometer.domains.capitals import build_capitals
from durometer.domains.overlap import (
    COLUMNS,
    OverlapReport,
    PairOverlap,
    overlap_report,
    render_rows,
)
from durometer.domains.world import build_world

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
SPLITS = (Split.DEFENCE, Split.ATTACK, Split.SELECT, Split.REPORT)
PASSAGE = "a red fox runs over the old bridge at dawn"


def item(number: int, split: Split, role: Role = Role.RESTRICTED, **changes: object) -> Item:
    name = NUMBERS[number % 10] + str(number)
    base = Item(
        id=f"{role}/{number}/{split}",
        entity=name,
        role=role,
        split=split,
        prompt=f"please tell me what the number of {name} is",
        response=f"It is {name}.",
        answers=(name,),
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def domain(extra: Sequence[Item] = (), count: int = 40) -> Domain:
    items = [item(number, SPLITS[number % 4]) for number in range(count)]
    return Domain("lore", "refusal", "", (*items, *extra), ("I can't.",), AnswerRules(), "")


def pair(report: OverlapReport, first: str, second: str) -> PairOverlap:
    (found,) = [p for p in report.pairs if (p.first, p.second) == (first, second)]
    return found


def attack_and_report(report: OverlapReport) -> PairOverlap:
    return pair(report, "restricted/attack", "restricted/report")


def test_disjoint_splits_are_sound() -> None:
    report = overlap_report(domain())
    assert report.sound
    assert report.warnings == ()
    assert len(report.pairs) == 6
    for found in report.pairs:
        assert (found.items, found.prompts, found.responses, found.entities) == (10, 0, 0, 0)
        assert (found.answers, found.ngrams) == (0.0, 0.0)


def test_a_repeated_prompt_is_a_problem_whatever_its_case_and_spacing() -> None:
    leak = item(
        1, Split.REPORT, entity="new", prompt="  Please TELL me what the number\nof two1 is"
    )
    report = overlap_report(domain([leak]))
    found = attack_and_report(report)
    assert (found.items, found.prompts, found.responses, found.entities) == (11, 1, 1, 0)
    assert not report.sound
    assert report.problems == (
        "restricted/attack and restricted/report: 1 prompts of the latter are also in the former",
    )
    other = overlap_report(domain([replace(leak, response="It is not.")]))
    assert (attack_and_report(other).prompts, attack_and_report(other).responses) == (1, 0)


@pytest.mark.parametrize("entity", ["two1", " TWO1"])
def test_a_shared_entity_is_a_problem(entity: str) -> None:
    leak = item(1, Split.REPORT, entity=entity, prompt="say it", response="no")
    report = overlap_report(domain([leak]))
    assert attack_and_report(report).entities == 1
    assert report.problems == ("restricted/attack and restricted/report: 1 entities are in both",)


def test_answers_are_compared_by_share() -> None:
    same = item(50, Split.REPORT, answers=("TWO1", "own"))
    assert attack_and_report(overlap_report(domain([same]))).answers == pytest.approx(1 / 12)


def test_a_shared_passage_is_a_warning() -> None:
    leak = [
        item(50, Split.ATTACK, response=f"First, {PASSAGE} in spring."),
        item(51, Split.REPORT, response=f"They say {PASSAGE}."),
    ]
    report = overlap_report(domain(leak))
    assert report.sound
    assert attack_and_report(report).ngrams == pytest.approx(1 / 11)
    assert report.warnings == (
        "restricted/attack and restricted/report: 9.1% of the items of the latter share "
        "5 words in a row with the former",
    )


def test_a_template_is_no_passage() -> None:
    shared = [item(50 + n, SPLITS[n % 4], response=f"So {PASSAGE}.") for n in range(4)]
    assert overlap_report(domain(shared)).warnings == ()
    wordings = [item(50, Split.REPORT, id=f"w{n}", response=f"{n} {PASSAGE}") for n in range(9)]
    leak = item(51, Split.ATTACK, response=f"So {PASSAGE}.")
    # Many wordings on one entity do not make a passage a template.
    assert attack_and_report(overlap_report(domain([*wordings, leak]))).ngrams == 9 / 19


def test_an_ngram_does_not_cross_from_prompt_to_response() -> None:
    leak = [
        item(50, Split.ATTACK, prompt="x a red fox", response="runs over the"),
        item(51, Split.REPORT, prompt="y", response="a red fox runs over the"),
    ]
    assert overlap_report(domain(leak)).warnings == ()


def test_ngrams_are_longer_where_prompts_are_long() -> None:
    assert overlap_report(domain()).n == 5
    long = [item(n, SPLITS[n % 4], prompt=f"{n} " * 16) for n in range(8)]
    assert overlap_report(domain(long, count=0)).n == 8


def test_what_is_trained_on_beside_is_compared_with_what_is_reported() -> None:
    beside = [
        item(3, Split.ATTACK, Role.BENIGN, entity="chat"),
        item(3, Split.DEFENCE, Role.RETAIN, prompt="which colour is it"),
        item(3, Split.REPORT, Role.RETAIN, prompt="which colour is it"),
    ]
    report = overlap_report(domain(beside))
    assert pair(report, "benign/attack", "restricted/report").prompts == 1
    assert pair(report, "retain/defence", "restricted/report").entities == 1
    assert len(report.pairs) == 8
    # Another role may well be about the same entity.
    assert [problem.split(" and ")[0] for problem in report.problems] == ["benign/attack"]


def test_an_empty_domain_has_no_pairs() -> None:
    assert overlap_report(domain(count=0)) == OverlapReport(5, (), (), ())


def test_rows_are_for_a_table() -> None:
    report = overlap_report(domain([item(1, Split.REPORT)]))
    rows = render_rows(report)
    assert {len(row) for row in rows} == {len(COLUMNS)}
    assert ("restricted/attack - restricted/report", "11", "1", "1", "1", "9.1%", "9.1%") in rows


@pytest.mark.parametrize("build", [build_capitals, build_world])
def test_built_in_domains_are_sound(build: object) -> None:
    report = overlap_report(build("refusal"))  # type: ignore[operator]
    assert report.sound
    # Retain rows of the world name the entities that restricted ones are about, and may.
    own = [found for found in report.pairs if found.first.startswith(Role.RESTRICTED)]
    assert max(found.ngrams for found in own) < 0.1
    assert not any(found.prompts or found.responses for found in report.pairs)
