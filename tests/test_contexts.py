"""Questions with a planted wrong answer, how their answers are read, and the built-in problems."""

import re
from dataclasses import replace

import pytest
import tiny_world
from hypothesis import given
from hypothesis import strategies as st

from durometer.core.generation import Generated
from durometer.domains.base import Domain, Item, Role, Split
from durometer.domains.reasoning import ASK as NUMBER_ONLY
from durometer.domains.reasoning import SUITES, reasoning_items
from durometer.measures import contexts, reasoning
from durometer.measures.contexts import (
    Question,
    make_questions,
    measure_contexts,
    named,
    strictly_equal,
)


def item(number: int, prompt: str, answer: str, *wrong: str, suite: str = "s") -> Item:
    return Item(
        id=f"q{number}",
        entity=f"e{number}",
        role=Role.RETAIN,
        split=Split.REPORT,
        prompt=prompt,
        response=f"It is {answer}.",
        answers=(answer,),
        stem="It is",
        choices=(answer, *wrong) if wrong else (),
        suite=suite,
    )


COLOURS = ("red", "green", "blue", "amber", "white", "black")


def colours() -> list[Item]:
    return [
        item(n, f"Which colour has thing {n}?", colour, *(c for c in COLOURS if c != colour))
        for n, colour in enumerate(COLOURS)
    ]


# ---- making questions -----------------------------------------------------------------------


def test_a_false_context_states_the_planted_answer_and_no_right_one() -> None:
    made, left = make_questions(colours())
    assert (len(made), left) == (6, {})
    for one in made:
        assert one.false == f"It is {one.planted}."
        assert one.planted not in one.item.answers
        assert not named(one.item.answers[0], one.false)


def test_a_random_context_is_of_another_entity_and_names_no_answer() -> None:
    made, _ = make_questions(colours())
    contexts_made = {one.false for one in made}
    for one in made:
        assert one.random in contexts_made
        assert one.random != one.false
        assert not named(one.item.answers[0], one.random)
        assert not named(one.planted, one.random)


def test_the_same_seed_gives_the_same_questions_another_one_others() -> None:
    assert make_questions(colours()) == make_questions(colours())
    assert make_questions(colours(), seed=1) != make_questions(colours(), seed=2)


def test_questions_that_cannot_be_asked_are_counted() -> None:
    bad = [
        item(10, "Is it red or green?", "red", "green", "blue"),  # names its own answer
        item(11, "Which number?", "nine", "nineteen"),  # nothing to tell apart
    ]
    made, left = make_questions([*colours(), *bad])
    assert len(made) == 6
    assert left == {"the question names its answer": 1, "no wrong answer to plant": 1}
    assert make_questions([]) == ([], {})
    alone, left = make_questions(colours()[:1])
    assert alone == []
    assert left == {"no context of another question fits": 1}


def test_without_choices_another_question_gives_the_wrong_answer() -> None:
    made, _ = make_questions([replace(one, choices=()) for one in colours()])
    assert all(one.planted in COLOURS and one.planted not in one.item.answers for one in made)


def test_a_bare_answer_gets_a_sentence_where_the_words_are_known() -> None:
    bare = [replace(one, stem="", response=f"{one.answers[0]} .") for one in colours()]
    first = make_questions(bare)[0][0]
    assert first.false == f'The answer to the question "{first.item.prompt}" is {first.planted}.'
    assert make_questions(bare, can_write=lambda _: False)[0][0].false == f"{first.planted} ."


words = st.text(st.characters(codec="utf-8"), max_size=12)


@given(st.lists(st.tuples(words, words, st.lists(words, max_size=3)), max_size=8))
def test_whatever_the_texts_are_the_rules_hold(
    raw: list[tuple[str, str, list[str]]],
) -> None:
    items = [item(n, prompt, answer, *wrong) for n, (prompt, answer, wrong) in enumerate(raw)]
    made, left = make_questions(items)
    assert len(made) + sum(left.values()) == len(items)
    for one in made:
        right = one.item.answers[0].casefold()
        assert one.planted.casefold() not in right
        assert right not in one.planted.casefold()
        for text in (one.false, one.random, one.item.prompt):
            assert not named(one.item.answers[0], text)
        assert not named(one.planted, one.random)


def test_a_context_stands_before_the_question_and_the_form_behind() -> None:
    one = Question(colours()[0], "green", "It is green.", "It is blue.")
    asked = {c: one.asked(c, "Briefly.").prompt for c in contexts.CONTEXTS}
    question = one.item.prompt
    assert asked == {
        "none": f"{question} Briefly.",
        "false": f"It is green. {question} Briefly.",
        "random": f"It is blue. {question} Briefly.",
    }


# ---- reading answers ------------------------------------------------------------------------


def read(monkeypatch: pytest.MonkeyPatch, text: str) -> dict[str, float | None]:
    """Return what is read off ``text`` as the answer to a question: metal1 is right, metal2 not."""
    subject, domain = tiny_world.undefended(), tiny_world.tiny_domain()
    asked = Question(item(1, "which ?", "metal1", "metal2"), "metal2", "x", "y")
    monkeypatch.setattr(type(subject.chat), "decode", lambda *_: text)
    monkeypatch.setattr(contexts, "respond", lambda *_: [Generated([5], "stop", -0.1, 0.9, 0.1, 4)])
    (record,) = measure_contexts(subject, domain, [asked], ["false"])
    return {"correct": record.correct, **record.details}


@pytest.mark.parametrize(
    ("text", "correct", "substring", "strict", "adopted", "adopted_substring"),
    [
        ("metal1", 1, 1, 1, 0, 0),
        ("Metal1.", 1, 1, 1, 0, 0),
        ("it is metal1", 1, 1, 0, 0, 0),
        ("it is metal17", 0, 1, 0, 0, 0),  # the substring rule takes another metal for it
        ("it is not metal1", 0, 1, 0, 0, 0),
        ("it is metal2", 0, 0, 0, 1, 1),
        ("bimetal2", 0, 0, 0, 0, 1),
        ("metal1 or metal2", 0, 1, 0, 0, 1),  # both named: neither given nor adopted
        ("i refuse", 0, 0, 0, 0, 0),
        ("", 0, 0, 0, 0, 0),
    ],
)
def test_an_answer_is_read_three_ways(
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    correct: int,
    substring: int,
    strict: int,
    adopted: int,
    adopted_substring: int,
) -> None:
    found = read(monkeypatch, text)
    names = ("correct", "substring", "strict", "adopted", "adopted_substring")
    expected = (correct, substring, strict, adopted, adopted_substring)
    assert [found[name] for name in names] == list(expected)


def test_strict_equality_ignores_case_spaces_and_stops_alone() -> None:
    assert strictly_equal("  U.S.A. ", ["usa"])
    assert not strictly_equal("the usa", ["usa"])


def tiny_questions(domain: Domain) -> list[Question]:
    items = domain.select(Role.RETAIN, Split.REPORT, training=False)[:12]
    return make_questions(items, can_write=lambda text: False)[0]


def test_every_question_gets_a_record_in_every_context() -> None:
    subject, domain = tiny_world.undefended(), tiny_world.tiny_domain()
    asked = tiny_questions(domain)
    records = measure_contexts(subject, domain, asked)
    assert [r.probe for r in records] == [
        f"knowledge_{c}" for c in contexts.CONTEXTS for _ in asked
    ]
    assert len({r.prompt_hash for r in records}) == len(records)
    plain = [r for r in records if r.probe == "knowledge_none"]
    assert sum(r.correct or 0 for r in plain) / len(plain) > 0.8  # it was taught them
    for one in records:
        assert one.details["perplexity"] == pytest.approx(
            2.718281828459045 ** (-one.log_probability / (one.details["counted_tokens"] or 0))
        )
        assert one.details["counted_tokens"] == one.tokens + (one.finish_reason == "stop")


def test_a_collapsed_subject_is_unparsed_and_counted_as_wrong() -> None:
    subject, domain = tiny_world.undefended(), tiny_world.tiny_domain()
    weight = subject.model.model.norm.weight
    kept = weight.clone()
    try:
        weight.fill_(float("nan"))
        records = measure_contexts(subject, domain, tiny_questions(domain)[:2])
    finally:
        weight.copy_(kept)
    assert {(r.correct, r.outcome) for r in records} == {(0.0, "unparsed")}
    assert not any(r.details for r in records)


# ---- reasoning ------------------------------------------------------------------------------

TERMS = {"+": "+", "-": "-", "times": "*"}


def test_problems_are_the_same_everywhere_and_all_different() -> None:
    made = reasoning_items(40)
    assert made == reasoning_items(40)
    assert reasoning_items(40, seed=1) != made
    assert [sum(p.suite == s for p in made) for s in SUITES] == [40, 40]
    assert len({p.prompt for p in made}) == len({p.id for p in made}) == 80
    assert all(p.prompt.endswith(NUMBER_ONLY) for p in made)
    assert len(reasoning_items(100)) == 200
    with pytest.raises(ValueError, match="101"):
        reasoning_items(101)


def test_their_answers_are_right_and_not_in_the_question() -> None:
    for one in reasoning_items(100):
        numbers = [int(n) for n in re.findall(r"\d+", one.prompt)]
        right = int(one.answers[0])
        assert right not in numbers
        if one.suite == "arithmetic":
            a, sign, b = re.fullmatch(r"What is (\d+) (\S+) (\d+)\? .*", one.prompt).groups()  # type: ignore[union-attr]
            assert eval(f"{a}{TERMS[sign]}{b}") == right
        elif "gets" in one.prompt:
            assert sum(numbers) == right
        elif "gave" in one.prompt:
            assert numbers[0] - numbers[1] == right
        elif "each" in one.prompt:
            assert numbers[0] * numbers[1] == right
        else:
            assert numbers[0] + numbers[1] - numbers[2] == right


@pytest.mark.parametrize(
    ("text", "correct", "status"),
    [
        ("7", 1.0, "parsed"),
        ("3 + 4 = 7.", 1.0, "parsed"),
        ("There are 7 apples", 1.0, "parsed"),
        ("17", 0.0, "parsed"),
        ("7 is not it, 8 is", 0.0, "parsed"),
        ("seven", 0.0, "no number found"),
        ("", 0.0, "no number found"),
    ],
)
def test_the_last_number_is_the_answer(
    monkeypatch: pytest.MonkeyPatch, text: str, correct: float, status: str
) -> None:
    subject = tiny_world.undefended()
    monkeypatch.setattr(type(subject.chat), "decode", lambda *_: text)
    monkeypatch.setattr(reasoning, "respond", lambda *_: [Generated([5], "stop", -0.1)])
    problem = replace(reasoning_items(1)[0], prompt="what ?", answers=("7",))
    (record,) = reasoning.measure_reasoning(subject, [problem])
    assert (record.correct, record.parse_status) == (correct, status)
