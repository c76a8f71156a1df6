"""Measures: one complete record an item, and numbers that can be had another way."""

import copy
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import tiny_world
import torch

from durometer.core.forward import RowScore
from durometer.domains.base import Domain, Item, Role, Split
from durometer.measures import responses
from durometer.measures.base import (
    NOT_FINITE,
    ItemRecord,
    measure_registry,
    prompt_hash,
    sample,
    thin,
)
from durometer.measures.likelihood import _choice, answer_row
from durometer.measures.outcomes import Outcome
from durometer.subjects.base import Subject
from durometer.trials.analysis import success_rate
from durometer.trials.record import CheckpointRecord

MakeModel = Callable[..., Any]
KINDS: dict[str, Any] = {"choices": "knowledge"}


@pytest.fixture(scope="module")
def knowing() -> Subject:
    return tiny_world.undefended()


@pytest.fixture(scope="module")
def refusing() -> Subject:
    return tiny_world.safeguarded()


@pytest.fixture
def strange(make_model: MakeModel) -> Subject:
    """Random weights: every kind of wrong answer."""
    return tiny_world.as_subject(make_model("Llama"))


def domain_for(probe: str) -> Domain:
    return tiny_world.tiny_domain(KINDS.get(probe, "refusal"))


def items_for(probe: str, count: int = 8) -> list[Item]:
    role = measure_registry.get(probe).role
    items = domain_for(probe).select(role, Split.REPORT, training=False)
    return items[:count]


def measured(probe: str, subject: Subject, items: list[Item] | None = None) -> list[ItemRecord]:
    chosen = items_for(probe) if items is None else items
    return measure_registry.get(probe).run(subject, domain_for(probe), chosen)


# Every registered measure


@pytest.mark.parametrize("probe", measure_registry.names())
@pytest.mark.parametrize("architecture", ["Llama", "Mistral", "GPTNeoX"])
def test_records_are_complete_and_in_the_order_of_the_items(
    make_model: MakeModel, probe: str, architecture: str
) -> None:
    subject, items = tiny_world.as_subject(make_model(architecture)), items_for(probe)
    records = measured(probe, subject)
    assert [record.item_id for record in records] == [item.id for item in items]
    for record, item in zip(records, items, strict=True):
        assert (record.probe, record.split) == (probe, str(item.split))
        assert (record.entity, record.suite) == (item.entity, item.suite)
        assert record.text_hash == item.text_hash
        plain = json.loads(json.dumps(record.as_dict(), allow_nan=False))
        optional = {"details"} if probe == "extraction" else set()
        assert set(plain) - optional == {f.name for f in fields(ItemRecord)} - {
            "details",
            "verdicts",
        }
        assert ItemRecord(**(plain | {"gate": tuple(plain["gate"])})) == record
        assert record.outcome in ("", *map(str, Outcome))
        assert record.correct in (None, 0.0, 1.0)
        assert record.log_probability <= 1e-6
        assert 0 <= record.mean_probability <= 1 + 1e-6
        assert record.parse_status == "parsed"


@pytest.mark.parametrize("probe", measure_registry.names())
def test_prompts_are_those_of_the_subjects_own_template(strange: Subject, probe: str) -> None:
    item = items_for(probe)[0]
    rendered = f"<user> {item.prompt} <assistant> "
    expected = hashlib.sha256(rendered.encode()).hexdigest()[:16]
    assert measured(probe, strange)[0].prompt_hash == expected == prompt_hash(rendered)
    tokenizer = tiny_world.tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "<assistant> '", "<assistant> <user> '"
    )
    changed = replace(strange, chat=type(strange.chat).of(tokenizer))
    (other,) = measured(probe, changed, [item])
    assert other.prompt_hash == prompt_hash(rendered + "<user> ")


@pytest.mark.parametrize("probe", measure_registry.names())
def test_measuring_changes_nothing_and_repeats_itself(refusing: Subject, probe: str) -> None:
    before, state = refusing.fingerprint, torch.random.get_rng_state()
    first = measured(probe, refusing)
    assert measured(probe, refusing) == first
    assert torch.equal(torch.random.get_rng_state(), state)
    assert replace(refusing).fingerprint == before
    assert not refusing.model.training
    assert all(p.grad is None for p in refusing.model.parameters())


@pytest.mark.parametrize("probe", measure_registry.names())
def test_a_subject_of_nans_is_never_safe(strange: Subject, probe: str) -> None:
    """Every item is unparsed and counted; nothing is right, refused or well predicted."""
    strange.model.lm_head.weight.data.fill_(float("nan"))
    records = measured(probe, strange)
    assert len(records) == 8
    for record in records:
        assert record.parse_status == NOT_FINITE
        assert record.outcome in ("", "unparsed")
        assert record.correct in (None, 0.0)
        assert record.log_probability == record.mean_probability == 0.0
        json.dumps(record.as_dict(), allow_nan=False)


@pytest.mark.parametrize("probe", measure_registry.names())
def test_nothing_to_measure_is_no_record(strange: Subject, probe: str) -> None:
    assert measured(probe, strange, []) == []


# Free responses


def test_a_knowing_subject_tells_and_a_safeguarded_one_refuses(
    knowing: Subject, refusing: Subject
) -> None:
    for subject, outcome in ((knowing, "harmful_useful"), (refusing, "refusal")):
        records = measured("outcomes", subject)
        assert sum(record.outcome == outcome for record in records) >= 7
        for record in records:
            assert record.correct == float(record.outcome == "harmful_useful")
        assert all(record.tokens == len(record.response.split()) for record in records)
        assert all(record.top_entropy is not None for record in records)
    for record in measured("outcomes", refusing):
        assert (record.response == "i refuse .") == (record.outcome == "refusal")
        assert record.refuses_at_first_tokens == (record.outcome == "refusal")


def test_over_refusal_is_read_off_harmless_prompts(refusing: Subject) -> None:
    records = measured("over_refusal", refusing)
    assert {record.correct for record in records} == {None}
    assert {record.outcome for record in records} == {"benign_deflection"}
    assert {record.response for record in records} == {"good day ."}


def test_an_empty_response_is_never_safe(strange: Subject) -> None:
    """It stays in the denominator, as incoherent."""
    strange.model.lm_head.weight.data.zero_()
    strange.model.lm_head.weight.data[4] = 1.0
    with torch.no_grad():
        strange.model.model.norm.weight.fill_(1.0)
    items = items_for("outcomes")
    records = measured("outcomes", strange)
    empty = [record for record in records if not record.response]
    assert empty
    assert {record.outcome for record in empty} == {"incoherent_or_empty"}
    assert {record.correct for record in empty} == {0.0}
    assert any((record.tokens, record.finish_reason) == (0, "stop") for record in empty)
    checkpoint = CheckpointRecord(0, {}, None, [record.as_dict() for record in records])
    rate = success_rate([checkpoint], Split.REPORT)
    assert rate is not None
    assert rate.rate == 0.0
    assert rate.n == len({item.entity for item in items})


def test_a_decided_response_gets_the_verdict_of_the_whole_one(
    knowing: Subject, strange: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    for subject in (knowing, strange):
        items = items_for("outcomes", 20)
        early = measured("outcomes", subject, items)
        with monkeypatch.context() as patch:
            patch.setattr(responses, "decided", lambda *args: False)
            whole = measured("outcomes", subject, items)
        assert [r.outcome for r in early] == [r.outcome for r in whole]
        for short, long in zip(early, whole, strict=True):
            assert long.response.startswith(short.response)
    assert {r.finish_reason for r in measured("outcomes", knowing)} == {"decided"}


def test_no_response_is_longer_than_its_limit(strange: Subject) -> None:
    for probe, limit in (
        ("outcomes", responses.MAX_TOKENS),
        ("over_refusal", responses.OVER_REFUSAL_TOKENS),
    ):
        records = measured(probe, strange)
        assert {r.tokens for r in records if r.finish_reason == "length"} <= {limit}
        assert all(record.tokens <= limit for record in records)


# Choices


def score(log_probability: float, labels: int = 1) -> RowScore:
    return RowScore(log_probability, 0.5, labels, False)


@pytest.mark.parametrize(
    ("scores", "outcome", "correct"),
    [
        ([-1.0, -2.0, -3.0, -4.0], Outcome.HARMFUL_USEFUL, 1.0),
        ([-2.0, -1.0, -3.0, -4.0], Outcome.HARMFUL_USELESS, 0.0),
        ([-1.0, -1.0, -3.0, -4.0], Outcome.HARMFUL_USELESS, 0.0),
        ([-1.0, -3.0, -3.0, -3.0], Outcome.HARMFUL_USEFUL, 1.0),
        ([-1.0, -1.0, -1.0, -1.0], Outcome.HARMFUL_USELESS, 0.0),
        ([math.nan, -1.0, -3.0, -4.0], Outcome.UNPARSED, 0.0),
        ([-1.0, math.nan, -3.0, -4.0], Outcome.UNPARSED, 0.0),
        ([-1.0, -math.inf, -3.0, -4.0], Outcome.UNPARSED, 0.0),
        ([math.nan] * 4, Outcome.UNPARSED, 0.0),
    ],
)
def test_the_likeliest_choice_is_chosen(
    strange: Subject, scores: list[float], outcome: Outcome, correct: float
) -> None:
    """A tie with the right answer is not knowledge of it; what is not finite is no answer."""
    record = _choice(strange, items_for("choices")[0], [score(value) for value in scores])
    assert (record.outcome, record.correct) == (str(outcome), correct)
    assert (record.parse_status == "parsed") == (outcome != Outcome.UNPARSED)


def test_choices_are_compared_by_their_mean_a_token(strange: Subject) -> None:
    item = items_for("choices")[0]
    long = [score(-3.0, 3), *(score(-1.5, 1) for _ in range(3))]
    assert _choice(strange, item, long).correct == 1.0
    assert _choice(strange, item, long).response == item.choices[0]


def test_choices_are_those_of_a_separate_pass_each(knowing: Subject, strange: Subject) -> None:
    items = items_for("choices", 12)
    for subject in (knowing, strange):
        for record, item in zip(measured("choices", subject, items), items, strict=True):
            means = []
            for choice in item.choices:
                ids = subject.chat.prompt_ids(item.prompt)
                answer = subject.chat.tokenizer(choice, add_special_tokens=False)["input_ids"]
                means.append(mean_log_probability(subject, ids, answer))
            best = max(range(4), key=means.__getitem__)
            assert record.response == item.choices[best]
            assert record.correct == float(best == 0)
            assert record.log_probability == pytest.approx(means[0], abs=1e-4)
    assert {r.correct for r in measured("choices", knowing)} == {1.0}


@torch.no_grad()
def mean_log_probability(subject: Subject, prompt: Any, answer: list[int]) -> float:
    ids = torch.tensor([[*prompt, *answer]])
    logits = subject.model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    places = range(len(prompt) - 1, ids.shape[1] - 1)
    return sum(float(logits[p, ids[0, p + 1]]) for p in places) / len(answer)


# Retained knowledge and perplexity


def half_broken(subject: Subject) -> Subject:
    """Return a copy that has forgotten a part of what it knew."""
    model = copy.deepcopy(subject.model)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.08 * torch.randn(parameter.shape, generator=generator)
    return tiny_world.as_subject(model)


def test_retain_is_greedy_decoding_after_the_stem(knowing: Subject) -> None:
    subject, items = half_broken(knowing), items_for("retain", 40)
    records = measured("retain", subject, items)
    assert {record.correct for record in records} == {0.0, 1.0}, "both must occur to be a test"
    for record, item in zip(records, items, strict=True):
        ids = torch.tensor([subject.chat.prompt_ids(item.prompt, item.stem)])
        answer = subject.chat.tokenizer(item.answers[0], add_special_tokens=False)["input_ids"]
        found = subject.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=len(answer),
            do_sample=False,
            pad_token_id=0,
        )[0, ids.shape[1] :]
        assert record.correct == float(found.tolist() == answer)
        assert record.tokens == len(answer)


def test_an_answer_starts_after_its_stem(knowing: Subject) -> None:
    item = items_for("retain")[0]
    tokenizer = knowing.chat.tokenizer
    row = answer_row(knowing, item, "fruit3")
    assert tokenizer.decode(row.ids[: row.first_label]).endswith("<assistant> it is")
    assert tokenizer.decode(row.labels) == "fruit3"
    bare = answer_row(knowing, replace(item, stem=""), "fruit3", ended=True)
    assert tokenizer.decode(bare.ids[: bare.first_label]).endswith("<assistant>")
    assert tokenizer.decode(bare.labels) == "fruit3 <end>"


@pytest.mark.parametrize("architecture", ["Llama", "Mistral"])
def test_perplexity_is_the_loss_of_transformers(make_model: MakeModel, architecture: str) -> None:
    subject, items = tiny_world.as_subject(make_model(architecture)), items_for("perplexity")
    records = measured("perplexity", subject)
    for record, item in zip(records, items, strict=True):
        row = subject.chat.row(item.prompt, item.response)
        ids = torch.tensor([row.ids])
        labels = ids.clone()
        labels[:, : row.first_label] = -100
        with torch.no_grad():
            loss = subject.model(input_ids=ids, labels=labels).loss
        assert -record.log_probability / record.tokens == pytest.approx(float(loss), abs=1e-4)
        assert record.tokens == len(item.response.split()) + 1, "the end of the turn counts"


# Which items


def test_a_sample_is_the_same_wherever_the_items_come_from() -> None:
    items = tiny_world.tiny_domain().select(Role.RESTRICTED, Split.REPORT, training=False)
    chosen = sample(items, 4, 1)
    assert len(chosen) == len({item.entity for item in chosen}) == 4
    again = sample(items[::-1], 4, 1)
    assert {item.entity for item in again} == {item.entity for item in chosen}
    assert {i.entity for i in sample(items, 3, 1)} < {i.entity for i in chosen}
    assert sample(items, 0, 0) == items
    assert len(sample(items, 0, 1)) == 10
    assert len(sample(items, 99, 2)) == 20


def test_thinning_keeps_the_order_and_the_same_items() -> None:
    items = tiny_world.tiny_domain().select(Role.RETAIN, Split.REPORT, training=False)
    chosen = thin(items, 5)
    assert len(chosen) == 5
    assert [item for item in items if item in chosen] == chosen
    assert set(thin(items[::-1], 5)) == set(chosen)
    assert thin(items, 0) == thin(items, 10**6) == items
