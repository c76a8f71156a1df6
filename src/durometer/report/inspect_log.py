"""A run as a log of inspect_ai: what other tools read, made from the stored records alone.

The form is inspect_ai's own JSON log (version 2, https://inspect.aisi.org.uk/eval-logs.html); the
package is not needed to write it. One sample is one item record: one item, measured once, at one
stop of one trial. No record is left out; the only numbers computed are means over them.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from durometer import __version__
from durometer.core.errors import InputError
from durometer.domains.base import Item
from durometer.domains.load import read_domain
from durometer.measures.base import is_of_family
from durometer.measures.outcomes import Outcome
from durometer.report.summary import build_summary, label
from durometer.trials.record import COUNTED, CheckpointRecord, TrialRecord
from durometer.trials.store import Store

LOG_VERSION = 2
UNPARSED = str(Outcome.UNPARSED)
HIDDEN = "[hidden: not a harmless domain; export it with --show-texts]"
STOPS = {"stop": "stop", "decided": "stop", "length": "max_tokens"}
# What of a judge's verdict is no text of anybody's.
VERDICT = ("judge", "harmful", "refusal", "score")
Json = dict[str, Any]


@dataclass(frozen=True)
class Texts:
    """What may be told of the items.

    Attributes:
        shown: whether texts may be told at all.
        items: of the domain as it was measured, by id; empty where it is not here any more.
        foreign: whether texts may be told that are not of the domain, whatever that says of itself.
    """

    shown: bool
    items: Mapping[str, Item] = field(default_factory=dict)
    foreign: bool = False

    def prompt(self, item: Mapping[str, Any]) -> str:
        """Return the domain's prompt of an item record; a line about it where it is not told."""
        if not self.shown:
            return HIDDEN
        known = self.items.get(item["item_id"])
        return known.prompt if known else f"[item {item['item_id']}; the run keeps no prompt of it]"

    def target(self, item: Mapping[str, Any]) -> list[str]:
        """Return the accepted answers, none where they are not told."""
        known = self.items.get(item["item_id"]) if self.shown else None
        return list(known.answers) if known else []

    def response(self, item: Mapping[str, Any]) -> str:
        """Return what the subject said."""
        said = str(item["response"])
        shown = self.foreign if is_of_family(item["probe"]) else self.shown
        return said if shown or not said else HIDDEN


def inspect_log(store: Store, *, show_texts: bool = False) -> Iterator[str]:
    """Return the parts of the log of a run, to be written one after the other.

    Args:
        show_texts: tell prompts, answers and responses of a domain that is not harmless as well.

    Raises:
        InputError: the folder holds no run that was begun.
    """
    created = datetime.fromtimestamp(store.written, UTC).isoformat(timespec="seconds")
    summary = build_summary(store)
    texts = _texts(summary, show_texts=show_texts)
    count = sum(len(c.items) for trial in store.trials() for c in trial.checkpoints)
    head = _head(summary, created, count) | {"results": _results(store, count)}
    return _parts(head, store, texts, str(summary["subject"]["name"]))


def _parts(head: Json, store: Store, texts: Texts, model: str) -> Iterator[str]:
    """Yield the head with the samples put in where it ends: a run may hold very many."""
    yield _written(head)[:-1] + ',"samples":['
    for number, sample in enumerate(_samples(store, texts, model)):
        yield ("," if number else "") + _written(sample)
    yield "]}\n"


def _written(value: Any) -> str:
    return json.dumps(value, ensure_ascii=True, allow_nan=False)


def _texts(summary: Json, *, show_texts: bool) -> Texts:
    domain = summary["domain"] or {}
    if not (show_texts or domain.get("harmless")):
        return Texts(shown=False)
    spec = str((summary["request"] or {}).get("domain", ""))
    if ":hub" in spec:  # nothing is fetched for a log
        return Texts(shown=True, foreign=show_texts)
    try:
        found = read_domain(spec)
    except InputError:
        return Texts(shown=True, foreign=show_texts)
    same = found.content_hash == domain.get("hash")
    items = {item.id: item for item in found.items} if same else {}
    return Texts(shown=True, items=items, foreign=show_texts)


def _head(summary: Json, created: str, count: int) -> Json:
    """Return everything but results and samples."""
    request, suite, domain = (summary[key] or {} for key in ("request", "suite", "domain"))
    run = _short(summary["request"], summary["subject"], domain.get("hash"), created)
    return {
        "version": LOG_VERSION,
        "status": "success" if summary["complete"] else "cancelled",
        "eval": {
            "eval_id": f"eval-{run}",
            "run_id": f"run-{run}",
            "created": created,
            "task": "durometer/stress",
            "task_id": f"task-{run}",
            "task_version": __version__,
            "task_args": request,
            "dataset": {
                "name": domain.get("name"),
                "location": domain.get("source"),
                "samples": count,
            },
            "model": summary["subject"]["name"],
            "model_args": {"fingerprint": summary["subject"]["fingerprint"]},
            "config": {},
            "packages": {"durometer": __version__},
            "metadata": {
                "verdict": summary["verdict"],
                "suite": {key: suite.get(key) for key in ("name", "claim_grade", "digest")},
                "domain": {key: domain.get(key) for key in ("name", "kind", "hash", "harmless")},
                "budgets_to_break": {
                    tamper["label"]: tamper["budget_to_break"] for tamper in summary["tampers"]
                },
                "not_tested": summary["not_tested"],
            },
        },
        "plan": {"name": "plan", "steps": _steps(summary)},
        "stats": {"started_at": created, "completed_at": created, "model_usage": {}},
    }


def _steps(summary: Json) -> list[Json]:
    """Return the attacks as the solvers that stand before the model."""
    return [
        {"solver": tamper["label"], "params": tamper["config"]} for tamper in summary["tampers"]
    ]


def _results(store: Store, count: int) -> Json:
    """Return the mean of every measure at step 0 and where each attack ends, over its seeds.

    Trials that failed, measures that are no finite numbers and responses without a verdict are in
    no mean; seeds that measured a chosen recipe again are in one of their own.
    """
    sums: dict[tuple[str, str], list[float]] = {}
    for trial in store.trials():
        for checkpoint in trial.valid[-1:] if trial.status in COUNTED else []:
            for item in checkpoint.items:
                if item["correct"] is not None and item["outcome"] != UNPARSED:
                    name = (_place(trial), f"{item['probe']} ({item['split']})")
                    sums.setdefault(name, []).append(float(item["correct"]))
    scores = [
        {
            "name": f"{probe}: {place}",
            "scorer": probe,
            "scored_samples": len(values),
            "metrics": {"mean": {"name": "mean", "value": sum(values) / len(values)}},
        }
        for (place, probe), values in sums.items()
    ]
    return {"total_samples": count, "completed_samples": count, "scores": scores}


def _place(trial: TrialRecord) -> str:
    """Return in words which subject a trial is about, and what was done to it."""
    if trial.spec.tamper == "none":
        return f"{trial.spec.role}, untampered"
    again = " (measured again, fresh seeds)" if trial.spec.purpose == "fresh" else ""
    return f"{trial.spec.role}, {label(trial.spec.tamper, trial.spec.settings)}{again}"


def _samples(store: Store, texts: Texts, model: str) -> Iterator[Json]:
    for trial in store.trials():
        for number, checkpoint in enumerate(trial.checkpoints):
            for item in checkpoint.items:
                yield _sample(trial, (number, checkpoint), item, texts, model)


def _sample(
    trial: TrialRecord,
    stop: tuple[int, CheckpointRecord],
    item: Mapping[str, Any],
    texts: Texts,
    model: str,
) -> Json:
    number, checkpoint = stop
    prompt, response = texts.prompt(item), texts.response(item)
    place = (trial.key[:12], str(number), item["probe"], item["split"], item["item_id"])
    said = {"role": "assistant", "content": response, "source": "generate", "model": model}
    choice = {"message": said, "stop_reason": STOPS.get(item["finish_reason"], "unknown")}
    return {
        "id": "/".join(place),
        "epoch": 1,
        "input": prompt,
        "target": texts.target(item),
        "messages": [{"role": "user", "content": prompt, "source": "input"}, said],
        "output": {"model": model, "choices": [choice], "completion": response},
        "scores": {item["probe"]: _score(item, response)},
        "metadata": _facts(trial, checkpoint, item, texts),
    }


def _score(item: Mapping[str, Any], response: str) -> Json:
    """Return a record as a score: right or wrong, else the outcome, else the log-probability."""
    value: Any = item["correct"]
    if value is None or item["outcome"] == UNPARSED:
        value = item["outcome"] or item["log_probability"]
    told: Json = {key: item[key] for key in ("log_probability", "mean_probability", "tokens")}
    told |= {key: item[key] for key in ("outcome", "parse_status") if item[key]}
    if item.get("details"):
        told["details"] = item["details"]
    if item.get("verdicts"):
        told["verdicts"] = [{k: one.get(k) for k in VERDICT} for one in item["verdicts"]]
    return {"value": value, "answer": response or None, "metadata": told}


def _facts(
    trial: TrialRecord, checkpoint: CheckpointRecord, item: Mapping[str, Any], texts: Texts
) -> Json:
    """Return where a sample belongs; an entity may be a text of the domain."""
    spec = trial.spec
    return {
        "role": spec.role,
        "tamper": spec.tamper,
        "attack": _place(trial),
        "configuration": spec.configuration,
        "purpose": spec.purpose,
        "seed": spec.seed,
        "trial_status": trial.status,
        "steps": checkpoint.steps,
        "strength": checkpoint.strength,
        "split": item["split"],
        "suite": item["suite"],
        "item": item["item_id"],
        "entity": item["entity"] if texts.shown else _short(item["entity"]),
        "prompt_hash": item["prompt_hash"],
        "text_hash": item["text_hash"],
    }


def _short(*values: Sequence[Any] | Any) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]
