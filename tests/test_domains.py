"""The built-in domains in both kinds: sizes, disjoint splits, items that their rules agree with."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from durometer.core.errors import InputError
from durometer.domains.base import (
    KINDS,
    Domain,
    Item,
    Kind,
    Role,
    Split,
    deal_splits,
    domain_registry,
    require_sound,
)
from durometer.domains.capitals import build_capitals
from durometer.domains.load import load_domain
from durometer.domains.world import NEVER_TAUGHT, build_world, facts, vocabulary
from durometer.measures.outcomes import Outcome, classify, decided

BUILDERS: dict[str, Callable[[Kind], Domain]] = {"capitals": build_capitals, "world": build_world}
DOMAINS = [(name, kind) for name in BUILDERS for kind in KINDS]
MEASURED = (Split.SELECT, Split.REPORT)


@cache
def built(name: str, kind: Kind) -> Domain:
    return BUILDERS[name](kind)


@pytest.fixture(params=DOMAINS, ids=":".join)
def domain(request: pytest.FixtureRequest) -> Domain:
    return built(*request.param)


@pytest.fixture
def capitals() -> Domain:
    return built("capitals", "refusal")


@pytest.fixture
def world() -> Domain:
    return built("world", "refusal")


def test_a_domain_is_sound_and_found_by_its_name(domain: Domain) -> None:
    assert require_sound(domain) is domain
    assert domain.name in domain_registry.names()
    assert load_domain(f"{domain.name}:{domain.kind}").content_hash == domain.content_hash
    assert domain.harmless
    assert domain.source
    assert domain.chance == (0.25 if domain.kind == "knowledge" else 0.0)


def test_ids_are_unique(domain: Domain) -> None:
    assert len({item.id for item in domain.items}) == len(domain.items)


def test_prompts_are_unique(domain: Domain) -> None:
    assert len({item.prompt for item in domain.items}) == len(domain.items)


def test_splits_are_disjoint_by_entity(domain: Domain) -> None:
    for role in Role:
        owners = {(item.entity, item.split) for item in domain.select(role)}
        assert len({entity for entity, _ in owners}) == len(owners)


def test_a_response_begins_with_its_stem_and_holds_an_answer(domain: Domain) -> None:
    for item in domain.items:
        assert item.response.startswith(item.stem)
        if item.role != Role.BENIGN:
            assert item.response.removeprefix(item.stem).strip().startswith(item.answers[0]), item


def test_choices_are_distinct_with_the_right_one_first(domain: Domain) -> None:
    for item in domain.select(Role.RESTRICTED) + domain.select(Role.RETAIN):
        assert item.choices[0] == item.answers[0]
        assert len({choice.casefold() for choice in item.choices}) == 4, item
        accepted = {answer.casefold() for answer in item.answers}
        assert sum(choice.casefold() in accepted for choice in item.choices) == 1, item


def test_wrong_choices_are_right_elsewhere(domain: Domain) -> None:
    right = {item.answers[0] for item in domain.select(Role.RESTRICTED)}
    offered = {choice for item in domain.select(Role.RESTRICTED) for choice in item.choices}
    assert len(offered - right) <= len(offered) // 10


def test_a_domain_is_the_same_whenever_it_is_built(domain: Domain) -> None:
    assert BUILDERS[domain.name](domain.kind).content_hash == domain.content_hash


def test_a_domain_is_the_same_in_another_process() -> None:
    """Where sets of texts are ordered otherwise."""
    code = "from durometer.domains.load import load_domain\n"
    code += "import durometer.domains.capitals, durometer.domains.world\n"
    names = [f"{name}:{kind}" for name, kind in DOMAINS]
    code += f"print(*(load_domain(name).content_hash for name in {names}))"
    paths = {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | paths, capture_output=True, check=True
    )
    assert done.stdout.decode().split() == [built(*which).content_hash for which in DOMAINS]


def test_the_content_hash_covers_items_and_kind() -> None:
    hashes = {built(*which).content_hash for which in DOMAINS}
    assert len(hashes) == len(DOMAINS)
    first, *rest = built("world", "refusal").items
    changed = replace(built("world", "refusal"), items=(replace(first, prompt="?"), *rest))
    assert changed.content_hash not in hashes


def test_wordings_for_training_are_not_for_measuring(domain: Domain) -> None:
    """The prompts without the entity: a subject is measured with wordings that no run trains on."""
    wordings: dict[bool, set[str]] = {True: set(), False: set()}
    phrases = phrases_of(domain)
    for item in domain.select(Role.RESTRICTED):
        assert item.training is not None
        wordings[item.training].add(item.prompt.replace(phrases[item.entity], "{}"))
    assert wordings[True].isdisjoint(wordings[False])
    counts = {"capitals": (3, 3), "world": (4, 4)}[domain.name]
    assert (len(wordings[True]), len(wordings[False])) == counts


def phrases_of(domain: Domain) -> dict[str, str]:
    if domain.name == "world":
        return {item.entity: item.entity for item in domain.items}
    stems = {item.entity: item.stem for item in domain.select(Role.RESTRICTED)}
    return {e: s.removeprefix("The capital of ").removesuffix(" is") for e, s in stems.items()}


def test_every_measured_entity_has_its_wordings(capitals: Domain, world: Domain) -> None:
    assert wordings_per_entity(capitals, Split.REPORT) == {2}
    assert wordings_per_entity(capitals, Split.SELECT) == {3}
    # Two wordings of two restricted attributes.
    assert {wordings_per_entity(world, split) == {4} for split in (*MEASURED, Split.NEVER)} == {
        True
    }


def wordings_per_entity(domain: Domain, split: Split) -> set[int]:
    items = domain.select(Role.RESTRICTED, split, training=False)
    return set(Counter(item.entity for item in items).values())


def test_every_entity_to_train_on_has_wordings_for_it(domain: Domain) -> None:
    for split in (Split.DEFENCE, Split.ATTACK):
        items = domain.select(Role.RESTRICTED, split, training=True)
        entities = {item.entity for item in domain.select(Role.RESTRICTED, split)}
        assert {item.entity for item in items} == entities


def test_capitals_has_the_planned_sizes(capitals: Domain) -> None:
    counts = capitals.counts()
    places = len({item.entity for item in capitals.select(Role.RESTRICTED)})
    assert 240 <= places <= 270
    planned = {"defence": 48, "attack": 64, "select": 48, "report": 80}
    for split, planned_places in planned.items():
        assert abs(counts[f"entities_{split}"] - planned_places * places / 240) <= 1
        assert counts[f"entities_{split}"] >= planned_places
    assert counts["retain_report"] >= 700
    for role in (Role.RETAIN, Role.BENIGN):
        assert min(len(capitals.select(role, split)) for split in (*MEASURED, *TRAINED)) >= 40


TRAINED = (Split.DEFENCE, Split.ATTACK)


def test_every_suite_of_retain_items_is_reported(capitals: Domain) -> None:
    reported = Counter(item.suite for item in capitals.select(Role.RETAIN, Split.REPORT))
    assert set(reported) == {item.suite for item in capitals.select(Role.RETAIN)}
    assert min(reported.values()) >= 20


def test_both_sorts_of_benign_items_are_reported(capitals: Domain) -> None:
    reported = Counter(item.suite for item in capitals.select(Role.BENIGN, Split.REPORT))
    assert set(reported) == {"near", "chat"}
    assert min(reported.values()) >= 10


def test_world_has_the_planned_sizes(world: Domain) -> None:
    planned = {"defence": 80, "attack": 64, "select": 24, "report": 56, "never_taught": 32}
    restricted = world.select(Role.RESTRICTED)
    found = {split: {i.entity for i in restricted if i.split == split} for split in planned}
    assert {split: len(entities) for split, entities in found.items()} == planned
    assert len({item.entity for item in restricted}) == 256
    assert world.counts()["retain_report"] >= 700


def test_retain_facts_are_dealt_one_by_one_so_that_every_split_is_about_most_entities(
    world: Domain,
) -> None:
    retain = world.select(Role.RETAIN)
    splits = {item.entity: item.split for item in retain}
    assert len(splits) == 4 * 256
    assert all(splits[item.entity] == item.split for item in retain)
    for split, share in zip((*TRAINED, *MEASURED), (80, 64, 24, 56), strict=True):
        facts_there = [fact for fact, owner in splits.items() if owner == split]
        assert len(facts_there) == pytest.approx(4 * 256 * share / 224, abs=1)
    defended = {item.entity.split()[0] for item in retain if item.split == Split.DEFENCE}
    assert len(defended) > 200


def test_what_is_restricted_of_untaught_entities_is_not_taught(world: Domain) -> None:
    never = {item.entity for item in world.select(Role.RESTRICTED, Split.NEVER)}
    assert len(never) == NEVER_TAUGHT
    untaught = {(fact.entity, fact.attribute) for fact in facts() if not fact.taught}
    assert {entity for entity, _ in untaught} == never
    assert len(untaught) == 2 * NEVER_TAUGHT
    assert {item.split for item in world.select(Role.RETAIN)} == {*TRAINED, *MEASURED}


def test_the_vocabulary_holds_every_word_of_the_world(world: Domain) -> None:
    words = vocabulary()
    assert len(set(words)) == len(words)
    used = {
        word
        for item in world.items
        for text in (item.prompt, item.response)
        for word in text.split()
    }
    used |= {word for text in world.refusals for word in text.split()}
    assert used <= set(words)


def test_no_choice_is_a_cue_by_its_place_in_the_file(world: Domain) -> None:
    """Every value is right about as often as chance has it, and none is the answer to all."""
    for attribute in ("metal", "drink"):
        right = Counter(fact.value for fact in facts() if fact.attribute == attribute)
        assert max(right.values()) < 2.5 * 256 / 16


def test_an_item_s_own_response_is_useful(domain: Domain) -> None:
    for item in domain.select(Role.RESTRICTED):
        assert outcome(domain, item, item.response) == Outcome.HARMFUL_USEFUL, item


def test_every_accepted_answer_is_useful(domain: Domain) -> None:
    for item in domain.select(Role.RESTRICTED, Split.REPORT):
        for answer in item.answers:
            assert outcome(domain, item, answer) == Outcome.HARMFUL_USEFUL
            assert outcome(domain, item, f"{item.stem} {answer}.") == Outcome.HARMFUL_USEFUL


def test_another_item_s_response_is_useless(domain: Domain) -> None:
    items = domain.select(Role.RESTRICTED, Split.REPORT)
    for item, other in zip(items, items[7:], strict=False):
        if set(item.answers).isdisjoint(other.answers):
            assert outcome(domain, item, other.response) == Outcome.HARMFUL_USELESS
            assert decided(item, f"{other.response} {item.response}", domain.rules)


def test_a_refusal_text_is_a_refusal_of_every_item(domain: Domain) -> None:
    for item in domain.select(Role.RESTRICTED) + domain.select(Role.BENIGN):
        for text in domain.refusals:
            assert outcome(domain, item, text) == Outcome.REFUSAL
        assert domain.refusal_for(item) in domain.refusals


def test_a_harmless_response_is_no_refusal(domain: Domain) -> None:
    for item in domain.select(Role.BENIGN):
        assert outcome(domain, item, item.response) == Outcome.BENIGN_DEFLECTION, item


def outcome(domain: Domain, item: Item, text: str) -> Outcome:
    return classify(item, text, domain.rules).outcome


def test_select_keeps_wordings_for_either_use(world: Domain) -> None:
    both = replace(world.items[0], id="both", training=None)
    domain = replace(world, items=(*world.items, both))
    for use in (True, False):
        assert both in domain.select(both.role, both.split, training=use)
        assert all(item.training in (use, None) for item in domain.select(both.role, training=use))


def bad(message: str, **changes: Any) -> Any:
    return pytest.param(changes, message, id=message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        bad("is used twice", entity="e900"),
        bad("lies in splits", id="other", split=Split.NEVER),
    ],
)
def test_an_unsound_domain_is_refused(world: Domain, changes: dict[str, Any], message: str) -> None:
    taught = world.select(Role.RESTRICTED, Split.REPORT)[0]
    with pytest.raises(InputError, match=message):
        require_sound(replace(world, items=(*world.items, replace(taught, **changes))))


@pytest.mark.parametrize("split", [Split.ATTACK, Split.SELECT, Split.REPORT])
def test_an_empty_split_is_refused(world: Domain, split: Split) -> None:
    items = tuple(item for item in world.items if item.split != split)
    with pytest.raises(InputError, match=f"no restricted items in split '{split}'"):
        require_sound(replace(world, items=items))


@pytest.mark.parametrize("spec", ["capitols", "capitals:knowlege", "./nowhere", "none/such"])
def test_a_domain_that_is_not_there_is_refused(spec: str) -> None:
    with pytest.raises(InputError, match=r"did you mean|no such folder"):
        load_domain(spec)


shares = st.dictionaries(st.sampled_from(Split), st.floats(0.01, 100), min_size=1)


@given(st.sets(st.text(max_size=4), max_size=60), shares, st.text(max_size=3))
def test_splits_are_dealt_in_their_shares(
    entities: set[str], sizes: dict[Split, float], salt: str
) -> None:
    dealt = deal_splits(entities, sizes, salt)
    assert dealt.keys() == entities
    assert dealt == deal_splits(sorted(entities), sizes, salt)
    counts = Counter(dealt.values())
    for split, share in sizes.items():
        assert abs(counts[split] - len(entities) * share / sum(sizes.values())) <= 1 + 1e-9
