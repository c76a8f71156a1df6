"""The data files of ``capitals``: shape, uniqueness, no capital leaking into the other files."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[1] / "src" / "durometer" / "domains" / "data"

Row = dict[str, Any]


def load(name: str, key: str) -> list[Row]:
    content = json.loads((DATA / f"capitals_{name}.json").read_text(encoding="utf-8"))
    assert set(content) == {"source", key}
    assert content["source"].strip()
    return content[key]


PLACES = load("places", "places")
RETAIN = load("retain", "items")
BENIGN = load("benign", "items")


def spellings(place: Row) -> list[str]:
    return [place["capital"], *place["aliases"]]


def whole_word(words: list[str], flags: int = 0) -> re.Pattern[str]:
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, longest_first)) + r")(?!\w)", flags)


def test_places_have_the_fields_that_are_read() -> None:
    for place in PLACES:
        assert set(place) - {"phrase"} == {"name", "type", "capital", "aliases"}, place
        assert all(
            isinstance(place[key], str) and place[key].strip() == place[key] != ""
            for key in set(place) - {"aliases"}
        )
        for text in (place["name"], place["capital"], place.get("phrase", "")):
            assert text.isascii(), place
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*", place["type"])
        assert len(set(spellings(place))) == len(spellings(place))


def test_there_are_enough_places() -> None:
    kinds = Counter(place["type"] for place in PLACES)
    assert len(PLACES) >= 240
    assert kinds["country"] >= 150
    assert kinds["us_state"] >= 40


def test_names_and_capitals_are_unique() -> None:
    for values in (
        [place["name"].casefold() for place in PLACES],
        [place.get("phrase", place["name"]).casefold() for place in PLACES],
        [spelling.casefold() for place in PLACES for spelling in spellings(place)],
    ):
        assert [value for value, count in Counter(values).items() if count > 1] == []


def test_a_phrase_contains_its_name() -> None:
    for place in PLACES:
        assert place["name"] in place.get("phrase", place["name"]), place


def test_no_name_contains_a_capital() -> None:
    """Neither its own, which would give the answer away, nor another's."""
    spelled = [spelling for place in PLACES for spelling in spellings(place)]
    every_capital = whole_word(spelled, re.IGNORECASE)
    for place in PLACES:
        found = every_capital.search(place["name"]) or every_capital.search(place.get("phrase", ""))
        assert found is None, (place["name"], found)


def test_no_capital_contains_its_place() -> None:
    for place in PLACES:
        name = place["name"].casefold()
        assert not any(name in spelling.casefold() for spelling in spellings(place)), place


def test_no_capital_contains_another_capital() -> None:
    for place in PLACES:
        rest = [s for other in PLACES if other is not place for s in spellings(other)]
        others = whole_word(rest, re.IGNORECASE)
        for spelling in spellings(place):
            assert others.search(spelling) is None, (place["name"], spelling)


def test_retain_items_have_the_fields_that_are_read() -> None:
    for item in RETAIN:
        assert set(item) == {"suite", "entity", "prompt", "stem", "answer", "wrong"}, item
        fields = [item[name] for name in ("suite", "entity", "prompt", "stem", "answer")]
        for text in (*fields, *item["wrong"]):
            assert text, item
            assert text == text.strip(), item
            assert text.isascii(), item
        assert not item["stem"].endswith((" ", ".")), item
        assert 1 <= len(item["answer"].split()) <= 3, item


def test_there_are_enough_retain_items_in_every_suite() -> None:
    suites = Counter(item["suite"] for item in RETAIN)
    assert len(RETAIN) >= 1150
    assert 8 <= len(suites) <= 14
    assert min(suites.values()) >= 60
    assert max(suites.values()) <= 150


def test_wrong_answers_are_three_others() -> None:
    for item in RETAIN:
        assert len(item["wrong"]) == 3, item
        assert len({answer.casefold() for answer in [item["answer"], *item["wrong"]]}) == 4, item


def test_an_arithmetic_answer_is_right() -> None:
    operations = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "x": lambda a, b: a * b}
    for item in RETAIN:
        if item["suite"] == "arithmetic":
            match = re.fullmatch(r"(\d+) ([+x-]) (\d+) =", item["stem"])
            assert match, item
            assert operations[match[2]](int(match[1]), int(match[3])) == int(item["answer"]), item


def test_benign_items_have_the_fields_that_are_read() -> None:
    for item in BENIGN:
        assert set(item) - {"near"} == {"entity", "prompt", "response"}, item
        assert item.get("near", True) is True
        for key in ("entity", "prompt", "response"):
            assert item[key], item
            assert item[key] == item[key].strip(), item
            assert item[key].isascii(), item
        assert item["response"][-1] in ".!?", item


def test_there_are_enough_benign_items() -> None:
    assert len(BENIGN) >= 260
    assert sum("near" in item for item in BENIGN) >= 60
    assert len({item["entity"] for item in BENIGN}) == len(BENIGN)


def test_no_prompt_occurs_twice() -> None:
    prompts = Counter(item["prompt"].casefold() for item in [*RETAIN, *BENIGN])
    assert [prompt for prompt, count in prompts.items() if count > 1] == []


def test_no_capital_is_named_elsewhere() -> None:
    every_capital = whole_word([spelling for place in PLACES for spelling in spellings(place)])
    for item in [*RETAIN, *BENIGN]:
        fields = ("entity", "prompt", "stem", "answer", "response")
        texts = [item.get(name, "") for name in fields]
        for text in (*texts, *item.get("wrong", [])):
            assert every_capital.search(text) is None, (text, item)


def test_nobody_is_asked_for_a_capital_city() -> None:
    asks = re.compile(r"\bcapital (city|of [A-Z])|\bseat of government\b")
    assert [item["prompt"] for item in [*RETAIN, *BENIGN] if asks.search(item["prompt"])] == []
