"""Scoring by likelihood: ours against lm-eval's own backend for transformers (``HFLM``).

Both answer the same requests of the harness on the same weights, texts to ids included, and must
give the same answers: the choice of every question, and whether greedy decoding gives a text. The
backend runs with batches of 1, 8 and 32 and with its automatic size, in turn with ours, and the
best of them is the baseline. It keeps what it loads itself: torch's fused attention.

Needs lm-eval: ``pip install 'durometer[benchmarks]'``.
"""

import copy
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from statistics import median
from typing import Any

from common import ratio, write
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import durometer
from durometer.domains.base import Item, Role
from durometer.measures.harness.adapter import SubjectLM
from durometer.subjects.base import Subject

# Its automatic size is the largest that fits, 64 here; finding it out is timed once, apart.
SIZES = (1, 8, 32, 64)
ROUNDS, SHOTS = 2, 5
# Questions of each kind of work; few, since a batch of 1 takes a second a question.
QUESTIONS = {"choices": 24, "few_shot": 4, "answers": 32, "apart": 32}
Pairs = list[tuple[str, str]]


def asked(item: Item) -> str:
    """Return a question in the plain form in which the harness puts most of them."""
    return f"Question: {item.prompt}\nAnswer:"


def works(subject: Subject) -> dict[str, tuple[str, Pairs]]:
    """Return kinds of work: what each is, and its pairs of context and continuation."""
    domain = durometer.load_domain("capitals:knowledge")
    known = [item for item in domain.select(Role.RESTRICTED, training=False) if item.choices]
    retain = domain.select(Role.RETAIN, training=False)
    shots = "".join(f"{asked(item)} {item.choices[0]}\n\n" for item in known[-SHOTS:])
    count = QUESTIONS
    return {
        "multiple choice": (
            "four choices a question, without examples",
            [(asked(i), f" {c}") for i in known[: count["choices"]] for c in i.choices],
        ),
        "multiple choice, few-shot": (
            f"four choices a question, behind {SHOTS} examples",
            [(shots + asked(i), f" {c}") for i in known[: count["few_shot"]] for c in i.choices],
        ),
        "teacher-forced": (
            "one answer a question, in the chat template, as retain items are scored",
            [
                (subject.chat.prompt_text(i.prompt) + i.stem, f" {i.answers[0]}")
                for i in retain[: count["answers"]]
            ],
        ),
        "teacher-forced, nothing shared": (
            "one answer a question, without a template: no two rows begin alike for long",
            [(f"{i.prompt} {i.stem}", f" {i.answers[0]}") for i in retain[-count["apart"] :]],
        ),
    }


def requests(pairs: Pairs) -> list[Instance]:
    """Return the harness's requests."""
    return [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]


def theirs(subject: Subject, sizes: Sequence[int | str]) -> dict[str, HFLM]:
    """Return the harness's backend, one a batch size, around one copy of the weights."""
    model = copy.deepcopy(subject.model)
    model.set_attn_implementation("sdpa")
    return {
        str(size): HFLM(pretrained=model, tokenizer=subject.chat.tokenizer, batch_size=size)
        for size in sizes
    }


def choices(found: Sequence[tuple[float, bool]], count: int) -> list[int]:
    """Return the likeliest of every ``count`` continuations."""
    groups = [found[start : start + count] for start in range(0, len(found), count)]
    return [max(range(count), key=lambda at: group[at][0]) for group in groups]


def differences(
    ours: Sequence[tuple[float, bool]], other: Sequence[tuple[float, bool]], count: int
) -> dict[str, Any]:
    """Say how far two sets of answers are apart."""
    picked = zip(choices(ours, count), choices(other, count), strict=True)
    return {
        "different_choices": sum(a != b for a, b in picked) if count > 1 else None,
        "different_greedy": sum(a[1] != b[1] for a, b in zip(ours, other, strict=True)),
        "largest_difference_nats": max(abs(a[0] - b[0]) for a, b in zip(ours, other, strict=True)),
    }


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Return processor seconds of this process, and what ``run`` gives."""
    begun = time.process_time()
    found = run()
    return time.process_time() - begun, found


def compare(name: str, subject: Subject, backends: dict[str, HFLM], rounds: int) -> dict[str, Any]:
    """Time one kind of work on both, in turn; a batch of 1 once, since it is never the best."""
    what, pairs = works(subject)[name]
    fast = SubjectLM(subject)
    times: dict[str, list[float]] = {size: [] for size in backends}
    own: list[float] = []
    fast.loglikelihood(requests(pairs[:8]))  # kernels are made on first use, here and there
    for number in range(rounds):
        for size, backend in backends.items():
            if number and size == "1":
                continue
            seconds, other = timed(partial(backend.loglikelihood, requests(pairs), True))
            times[size].append(seconds)
        seconds, found = timed(partial(fast.loglikelihood, requests(pairs)))
        own.append(seconds)
    full = {size: seconds for size, seconds in times.items() if len(seconds) == rounds}
    best = min(full, key=lambda size: sum(full[size]))
    return {
        "work": name,
        "what": what,
        "dtype": subject.dtype,
        "requests": len(pairs),
        "baseline_batch": best,
        **ratio(full[best], own),
        "seconds_by_batch": {size: median(seconds) for size, seconds in times.items()},
        **differences(found, other, 4 if "choice" in name else 1),
    }


def automatic(subject: Subject) -> dict[str, Any]:
    """Time the backend's automatic batch size once, on the first kind of work."""
    (backend,) = theirs(subject, ("auto",)).values()
    _, pairs = works(subject)["multiple choice"]
    seconds, _ = timed(partial(backend.loglikelihood, requests(pairs), True))
    return {"work": "multiple choice", "seconds": seconds, "batches": backend.batch_sizes}


def main() -> None:
    """Time both in the default dtype, and compare the answers in fp32, where rounding is small."""
    subject = durometer.load_subject("smollm2")
    backends = theirs(subject, SIZES)
    cases = [compare(name, subject, backends, ROUNDS) for name in works(subject)]
    found = automatic(subject)
    exact = durometer.load_subject("smollm2", dtype="float32")
    cases += [compare(name, exact, theirs(exact, (8,)), 1) for name in works(exact)]
    path = write(
        "likelihood",
        {
            "what": "likelihoods of the same requests on smollm2, processor seconds",
            "baseline": "lm-eval's HFLM at its best batch size",
            "lm_eval": version("lm_eval"),
            "load": os.getloadavg()[0],
            "note": "Other work ran on the machine; both were timed in turn in one process. The "
            "cases in float32 compare answers, with one round of batches of 8.",
            "automatic_batch": found,
            "cases": cases,
        },
    )
    print(path.read_text())


if __name__ == "__main__":
    main()
