"""What a task of lm-eval becomes: a measure with items of its own, and one record a row."""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from durometer.core.errors import InputError
from durometer.core.forward import RowScore
from durometer.domains.base import KINDS, Domain, Item, Role, Split
from durometer.measures.base import (
    NOT_FINITE,
    ItemRecord,
    Measure,
    MeasureFamily,
    family_registry,
    prompt_hash,
    thin,
)
from durometer.measures.harness.spec import FAMILY, parse_harness
from durometer.measures.harness.tasks import Document, HarnessTasks, load_tasks
from durometer.subjects.base import Subject

__all__ = ["HARNESS", "measure_tasks"]

# How metrics are called that say of a row whether it is right; the first one of a task counts.
RIGHT = ("acc", "exact_match")
# Metrics whose value of a row is a sum with the number that it is to be divided by in the end.
WEIGHTED = ("word_perplexity", "byte_perplexity", "bits_per_byte")


def _names(text: str) -> tuple[str, ...]:
    return tuple(f"{FAMILY}:{spec.rest}" for spec in parse_harness(text))


@lru_cache(maxsize=16)
def _make(text: str) -> Measure:
    """Return the measure of one task, loaded; the same one every time."""
    (spec,) = parse_harness(text)
    loaded = load_tasks(spec)
    name = f"{FAMILY}:{spec.rest}"
    items = tuple(_item(document) for document in loaded.documents)

    def own_items(count: int) -> tuple[Item, ...]:
        return tuple(thin(items, count if spec.limit is None else spec.limit))

    def run(subject: Subject, domain: Domain, chosen: Sequence[Item]) -> list[ItemRecord]:
        return measure_tasks(subject, loaded, chosen, name)

    summary = f"task of lm-eval, {len(items)} rows"
    return Measure(name, summary, KINDS, Role.RETAIN, run, own_items, f"#{loaded.digest}")


HARNESS = family_registry.register(FAMILY)(
    MeasureFamily(
        "tasks of lm-eval on the subject in memory (extra 'benchmarks')",
        f"{FAMILY}:TASK[,TASK][,KEY=VALUE]",
        Role.RETAIN,
        _names,
        _make,
    )
)


def _item(document: Document) -> Item:
    """Return an item that stands for a row; its texts stay with the harness."""
    place = f"{document.task}/{document.number}"
    return Item(
        id=place,
        entity=place,
        role=Role.RETAIN,
        split=Split.REPORT,
        prompt=document.text_hash,
        response="",
        suite=document.task,
    )


def measure_tasks(
    subject: Subject, loaded: HarnessTasks, items: Sequence[Item], name: str
) -> list[ItemRecord]:
    """Ask the rows that ``items`` stand for; return one record each, in that order.

    Raises:
        InputError: see ``HarnessTasks.evaluate``; or a task none of whose metrics is a number of
            each row.
    """
    from durometer.measures.harness.adapter import SubjectLM

    chosen: dict[str, list[int]] = {}
    for item in items:
        chosen.setdefault(item.suite, []).append(int(item.id.rpartition("/")[2]))
    model = SubjectLM(subject)
    logged = loaded.evaluate(model, {task: sorted(rows) for task, rows in chosen.items()})
    records: dict[str, ItemRecord] = {}
    by_id = {item.id: item for item in items}
    for task, samples in logged.items():
        rows: dict[int, list[dict[str, Any]]] = {}
        for sample in samples:  # one a filter of the task
            rows.setdefault(sample["doc_id"], []).append(sample)
        for number, own in rows.items():
            item = by_id[f"{task}/{number}"]
            records[item.id] = _record(name, item, own, model.scores)
    return [records[item.id] for item in items]


def _record(
    name: str,
    item: Item,
    samples: Sequence[Mapping[str, Any]],
    scores: Mapping[tuple[str, str], RowScore],
) -> ItemRecord:
    details = {key: value for sample in samples for key, value in _metrics(sample)}
    if not details:
        raise InputError(
            f"{name}: none of the metrics of '{item.suite}' "
            f"({', '.join(samples[0]['metrics'])}) is a number of each row"
        )
    score, finite = _score(samples[0], scores)
    correct = next((v for k, v in details.items() if k.startswith(RIGHT) and v in (0, 1)), None)
    return ItemRecord(
        probe=name,
        split=str(item.split),
        item_id=item.id,
        entity=item.entity,
        suite=item.suite,
        prompt_hash=prompt_hash(str(samples[0]["arguments"][0][0])),
        text_hash=item.prompt,
        response=_response(samples[0]),
        correct=(correct if finite or correct is None else 0.0),
        log_probability=score.log_probability if score and finite else 0.0,
        mean_probability=score.mean_probability if score and finite else 0.0,
        tokens=score.labels if score else 0,
        parse_status="parsed" if finite else NOT_FINITE,
        details=details if finite else {},
    )


def _metrics(sample: Mapping[str, Any]) -> Iterator[tuple[str, float | None]]:
    """Yield the metrics of a row that are numbers, under the names that the harness prints."""
    tail = "" if sample["filter"] == "none" else f",{sample['filter']}"
    for metric in sample["metrics"]:
        value = sample[metric]
        if metric in WEIGHTED:
            told, weight = value
            yield f"{metric}{tail}", float(told) if math.isfinite(told) else None
            yield f"{metric}_weight{tail}", float(weight)
        elif isinstance(value, int | float) or hasattr(value, "item"):
            yield f"{metric}{tail}", float(value) if math.isfinite(float(value)) else None


def _score(
    sample: Mapping[str, Any], scores: Mapping[tuple[str, str], RowScore]
) -> tuple[RowScore | None, bool]:
    """Return how likely the right answer of a row is, and whether all its answers are finite.

    Of several answers without a number for the right one it is the first.
    """
    asked = [("", pair[0]) if len(pair) == 1 else tuple(pair) for pair in sample["arguments"]]
    found = [scores[pair] for pair in asked if all(isinstance(t, str) for t in pair)]
    if not found:
        return None, True
    finite = all(math.isfinite(score.log_probability) for score in found)
    target = sample["target"]
    place = target if isinstance(target, int) and 0 <= target < len(found) else 0
    return found[place], finite


def _response(sample: Mapping[str, Any]) -> str:
    """Return what was generated, '' where only likelihoods were asked for."""
    first = sample["resps"][0][0]
    return first if isinstance(first, str) else ""
