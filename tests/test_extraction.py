"""Memorisation: the closed formula against sampling, greedy decoding and slow sums."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import tiny_world
import torch
from transformers import TopKLogitsWarper

from durometer.core.generation import generate
from durometer.domains.base import Role, Split
from durometer.measures.base import Measure, measure_registry
from durometer.measures.extraction import (
    Continuation,
    ExtractionReport,
    Sampler,
    continuations,
    extractable,
    extraction,
    extraction_probability,
    recorded_extractable,
    sampled_log_probabilities,
    smallest_tries,
)
from durometer.report.further import finding, further_lines, further_tables, reading
from durometer.subjects.base import Subject
from durometer.trials.record import CheckpointRecord

MakeModel = Callable[..., Any]


@pytest.fixture(scope="module")
def knowing() -> Subject:
    return tiny_world.undefended()


@pytest.fixture
def strange(make_model: MakeModel) -> Subject:
    return tiny_world.as_subject(make_model("Llama"))


def items(split: Split, role: Role = Role.RESTRICTED) -> list[Any]:
    return tiny_world.tiny_domain().select(role, split)


# The formulas


@pytest.mark.parametrize("probability", [1e-9, 1e-4, 0.013, 0.2, 0.5, 0.93])
@pytest.mark.parametrize("odds", [0.1, 0.5, 0.9, 0.999])
def test_the_smallest_number_of_tries_is_the_smallest(probability: float, odds: float) -> None:
    told = math.log(probability)
    n = smallest_tries(told, odds)
    assert n == int(n) >= 1
    assert extractable(told, int(n), odds)
    assert n == 1 or not extractable(told, int(n) - 1, odds)
    assert n == pytest.approx(math.log(1 - odds) / math.log1p(-probability), abs=1)


def test_tries_are_found_by_counting_up() -> None:
    for probability in (0.03, 0.2, 0.5, 0.75):
        for odds in (0.25, 0.5, 0.75, 0.9375):
            counted = next(n for n in range(1, 500) if 1 - (1 - probability) ** n >= odds - 1e-15)
            assert smallest_tries(math.log(probability), odds) == counted


def test_certain_impossible_and_broken_texts() -> None:
    assert smallest_tries(0.0, 0.5) == 1
    assert smallest_tries(-math.inf, 0.5) == math.inf
    assert smallest_tries(math.nan, 0.5) == math.inf
    assert smallest_tries(-2000.0, 0.5) == math.inf
    assert smallest_tries(-60.0, 0.5) == pytest.approx(math.log(2) * math.exp(60), rel=1e-9)
    assert extraction_probability(-math.inf, 10**9) == 0
    assert extraction_probability(0.0, 1) == 1
    assert extraction_probability(math.log(0.5), 0) == 0
    # 1 - (1 - p)**n in floats would be 0 here.
    assert extraction_probability(-50.0, 1000) == pytest.approx(1000 * math.exp(-50), rel=1e-9)
    for odds in (0.0, 1.0, -1.0):
        with pytest.raises(ValueError, match="odds"):
            smallest_tries(-1.0, odds)
    for wrong in ({"temperature": 0.0}, {"top_k": -1}):
        with pytest.raises(ValueError, match="out of bounds"):
            Sampler(**wrong)


@pytest.mark.parametrize("top_k", [1, 3, 40, 500, 0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_truncation_is_that_of_transformers(top_k: int, temperature: float) -> None:
    logits = torch.randn(6, 101, generator=torch.Generator().manual_seed(1))
    expected = logits / temperature
    if top_k:
        expected = TopKLogitsWarper(top_k)(torch.zeros(6, 1, dtype=torch.long), expected)
    found = sampled_log_probabilities(logits, Sampler(temperature, top_k))
    torch.testing.assert_close(found, expected.log_softmax(-1))
    assert found.exp().sum(-1).tolist() == pytest.approx([1.0] * 6)


# On subjects


@pytest.mark.parametrize("architecture", ["Llama", "Mistral", "GPTNeoX"])
def test_one_pass_gives_what_token_by_token_passes_give(
    make_model: MakeModel, architecture: str
) -> None:
    subject, sampler = tiny_world.as_subject(make_model(architecture)), Sampler(1.3, 60)
    chosen = items(Split.REPORT, Role.RETAIN)[:5]
    found = continuations(subject, chosen, (0, 1, 3, 9), sampler)
    # 'it is fruitN .' has four tokens, so three prefixes leave something to predict.
    assert [(one.item_id, one.prefix, one.tokens) for one in found] == [
        (item.id, prefix, 4 - prefix) for item in chosen for prefix in (0, 1, 3)
    ]
    for one, item in zip(found[::3], chosen, strict=True):
        ids = list(subject.chat.prompt_ids(item.prompt))
        told, plain, greedy = 0.0, 0.0, True
        for token in subject.chat.tokenizer(item.response, add_special_tokens=False)["input_ids"]:
            with torch.no_grad():
                logits = subject.model(input_ids=torch.tensor([ids])).logits[0, -1]
            told += float(sampled_log_probabilities(logits, sampler)[token])
            plain += float(logits.log_softmax(-1)[token])
            greedy &= int(logits.argmax()) == token
            ids.append(token)
        assert one.log_probability == pytest.approx(told, abs=1e-4)
        assert one.plain_log_probability == pytest.approx(plain, abs=1e-4)
        assert one.greedy == greedy


def drawn(subject: Subject, ids: tuple[int, ...], length: int, top_k: int, draws: int) -> Any:
    """Sample ``draws`` continuations token by token, truncated by transformers' own warper."""
    generator = torch.Generator().manual_seed(5)
    tokens, warper = torch.tensor([ids]).repeat(draws, 1), TopKLogitsWarper(top_k)
    for _ in range(length):
        with torch.no_grad():
            # Equal beginnings are computed once.
            kinds, place = torch.unique(tokens, dim=0, return_inverse=True)
            logits = subject.model(input_ids=kinds).logits[:, -1].float()[place]
        chances = warper(tokens, logits).softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(chances, 1, generator=generator)], dim=1)
    return tokens[:, len(ids) :]


@pytest.mark.parametrize("top_k", [2, 5])
def test_sampling_gives_the_text_as_often_as_the_formula_says(
    make_model: MakeModel, top_k: int
) -> None:
    """Under truncation; the plain probability, a sampler forgotten, lies outside the interval."""
    subject, draws = tiny_world.as_subject(make_model("Llama")), 6000
    item = items(Split.REPORT)[0]
    prompt = subject.chat.prompt_ids(item.prompt)
    samples = drawn(subject, prompt, 2, top_k, draws)
    texts, counts = torch.unique(samples, dim=0, return_counts=True)
    # The model has ids that the tokenizer does not know; a text is one that can be told.
    counts[~((texts > 4) & (texts < len(tiny_world.VOCABULARY))).all(1)] = 0
    best = int(counts.argmax())
    answer = subject.chat.tokenizer.decode(texts[best].tolist())
    (one,) = continuations(subject, [replace(item, response=answer)], (0,), Sampler(1.0, top_k))
    assert one.tokens == 2
    chance, rate = math.exp(one.log_probability), float(counts[best]) / draws
    width = 4 * math.sqrt(chance * (1 - chance) / draws)
    assert abs(rate - chance) < width
    assert abs(rate - math.exp(one.plain_log_probability)) > width
    # And at least once in n tries: groups of n draws that hold the text.
    n = 3
    hits = (samples == texts[best]).all(1).view(-1, n).any(1).double()
    expected = extraction_probability(one.log_probability, n)
    spread = math.sqrt(expected * (1 - expected) / len(hits))
    assert abs(float(hits.mean()) - expected) < 4 * spread


def test_a_token_that_is_never_drawn_makes_a_text_impossible(strange: Subject) -> None:
    found = continuations(strange, items(Split.REPORT)[:8], (0,), Sampler(1.0, 1))
    for one in found:
        assert one.log_probability == (0.0 if one.greedy else -math.inf)
        assert math.isfinite(one.plain_log_probability)


def test_greedy_match_is_that_of_generation(knowing: Subject) -> None:
    chosen = [*items(Split.REPORT)[:6], *items(Split.NEVER)[:6]]
    found = continuations(knowing, chosen, (0,), Sampler())
    answers = generate(
        knowing.model,
        [knowing.chat.prompt_ids(item.prompt) for item in chosen],
        max_tokens=2,
        stop_ids=frozenset(),
    )
    for one, item, answer in zip(found, chosen, answers, strict=True):
        assert one.greedy == (knowing.chat.decode(answer.ids) == item.response)


def test_taught_texts_stand_out_from_held_out_ones(knowing: Subject) -> None:
    report = extraction(
        knowing, items(Split.REPORT), items(Split.NEVER), prefixes=(0, 1), sampler=Sampler(1.0, 8)
    )
    told, floor = report.rates(1, 0.5)[0]
    assert told > 0.9
    assert floor < 0.5
    told, floor = report.greedy_rates()[0]
    assert told > floor + 0.5
    # The last token, '.', follows from the style alone: the floor shows that it is no memory.
    assert report.rates(1, 0.5)[1] == (1.0, 1.0)
    curve = report.curve((1, 10, 1000), 0.5)
    for prefix in (0, 1):
        rising = [curve[n][prefix] for n in (1, 10, 1000)]
        assert rising == sorted(rising)


def test_more_tries_and_longer_prefixes_never_hurt(strange: Subject) -> None:
    found = continuations(strange, items(Split.REPORT, Role.RETAIN)[:6], (0, 1, 2, 3), Sampler())
    for item in range(6):
        own = [one.log_probability for one in found[4 * item : 4 * item + 4]]
        assert own == sorted(own)
        assert smallest_tries(own[0], 0.5) >= smallest_tries(own[-1], 0.5)


def test_a_report_without_controls_says_so() -> None:
    one = Continuation("a", 0, 3, math.log(0.5), -1.0, 0.7, True)
    report = ExtractionReport((one,), ())
    told, floor = report.rates(1, 0.5)[0]
    assert told == 1.0
    assert math.isnan(floor)
    assert report.rates(1, 0.51)[0][0] == 0.0


def test_the_registered_measure_counts_extractable_texts(knowing: Subject) -> None:
    entry, domain = measure_registry.get("extraction"), tiny_world.tiny_domain()
    assert set(entry.kinds) == {"refusal", "knowledge"}
    chosen = items(Split.REPORT)[:4]
    records = entry.run(knowing, domain, chosen)
    for record, one in zip(records, continuations(knowing, chosen, (0,), Sampler()), strict=True):
        assert record.correct == float(extractable(one.log_probability, 100, 0.5))
        assert record.log_probability == one.plain_log_probability
        assert (record.tokens, record.mean_probability) == (one.tokens, one.mean_probability)


def stored(subject: Subject, chosen: list[Any]) -> CheckpointRecord:
    """Return what a campaign keeps of the measure, read back from JSON."""
    found = measure_registry.get("extraction").run(subject, tiny_world.tiny_domain(), chosen)
    rows = json.loads(json.dumps([record.as_dict() for record in found], allow_nan=False))
    return CheckpointRecord(0, {}, None, rows)


def test_stored_records_give_the_rates_of_the_function(knowing: Subject, strange: Subject) -> None:
    texts, controls = items(Split.REPORT), items(Split.NEVER)
    for subject in (knowing, strange):
        expected = extraction(subject, texts, controls, prefixes=(0, 1))
        found = reading([stored(subject, texts + controls)], "extraction")
        assert found is not None
        assert [cell["prefix"] for cell in found["by_prefix"]] == [0, 1]
        for cell in found["by_prefix"]:
            rates = (cell["report"]["rate"], cell["control"]["rate"])
            assert rates == pytest.approx(expected.rates(100, 0.5)[cell["prefix"]])
            greedy = (cell["greedy"]["rate"], cell["greedy_control"]["rate"])
            assert greedy == pytest.approx(expected.greedy_rates()[cell["prefix"]])
            # Intervals rest on entities, of which each has several wordings.
            assert (cell["report"]["n"], cell["control"]["n"]) == (10, 6)


def test_a_rate_is_held_against_the_control(knowing: Subject) -> None:
    texts, controls = items(Split.REPORT), items(Split.NEVER)
    first, second = reading([stored(knowing, texts + controls)], "extraction")["by_prefix"]  # type: ignore[index]
    assert first["finding"] == "above_control"
    assert second["finding"] == "not_above_control"  # the last token follows from the style
    alone = reading([stored(knowing, texts)], "extraction")
    assert alone is not None
    assert [cell["finding"] for cell in alone["by_prefix"]] == ["no_control"] * 2
    assert alone["control"] is None
    assert reading([stored(knowing, controls)], "extraction") is None
    assert finding(None, None) == "not_measured"


def test_the_report_says_when_controls_are_as_high(knowing: Subject) -> None:
    read = reading([stored(knowing, items(Split.REPORT) + items(Split.NEVER))], "extraction")
    after = {**(read or {}), "steps": 8, "seeds": 2}
    told = {
        "measures": [
            {
                "name": "extraction",
                "start": {"subject": read},
                "tampers": [{"configuration": "c", "label": "lora", "readings": [after]}],
            }
        ]
    }
    tampers = [{"configuration": "c", "label": "lora"}, {"configuration": "d", "label": "other"}]
    (table,) = further_tables(told, tampers, lambda *_: {"steps": 4})
    assert [(row["label"], row["moment"]) for row in table["rows"]] == [
        ("safeguarded, untampered", "step 0"),
        ("lora", "8 steps, 2 seeds"),
    ]
    assert table["prefixes"] == [0, 1]
    (note,) = table["notes"]
    assert "no memorisation is shown" in note
    (line,) = further_lines(told)
    assert line.startswith("extraction on report items: 100 % untampered, at most 100 % after")
    assert list(further_lines({})) == []


@pytest.mark.parametrize(("role", "notes"), [(Role.RESTRICTED, 1), (Role.BENIGN, 0)])
def test_style_is_spoken_of_where_restricted_items_are_read(
    role: Role, notes: int, knowing: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = Measure("theirs", "", ("refusal",), role, lambda *_: [])
    monkeypatch.setitem(measure_registry._entries, "theirs", theirs)
    read = reading([stored(knowing, items(Split.REPORT))], "extraction")
    entry = {"configuration": "c", "label": "lora", "readings": [read]}
    told = {"measures": [{"name": "theirs", "start": {"subject": read}, "tampers": [entry]}]}
    (table,) = further_tables(told, [], lambda *_: None)
    assert len(table["notes"]) == notes
    (line,) = further_lines(told)
    assert ("never-taught" in line) == bool(notes)


def test_a_token_that_is_never_drawn_is_kept_as_null(strange: Subject) -> None:
    rows = stored(strange, items(Split.REPORT)[:8]).items
    for row, one in zip(
        rows, continuations(strange, items(Split.REPORT)[:8], (0,), Sampler()), strict=True
    ):
        told = row["details"]["log_probability_0"]
        assert told == (one.log_probability if math.isfinite(one.log_probability) else None)
        assert recorded_extractable(row, 0) == bool(row["correct"])
    assert any(row["details"]["log_probability_0"] is None for row in rows)


def test_a_broken_subject_extracts_nothing(strange: Subject) -> None:
    strange.model.lm_head.weight.data.fill_(float("nan"))
    (one,) = continuations(strange, items(Split.REPORT)[:1], (0,), Sampler())
    assert not extractable(one.log_probability, 10**6, 1e-9)
    assert not one.greedy or math.isnan(one.log_probability)
