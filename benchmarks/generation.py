"""Answers on the select split of ``capitals``: ours against ``transformers.generate``.

The baseline decodes left-padded batches of 32, as users do. In fp32 the outputs must be identical:
ours may stop a response early only where its outcome is decided, so it must be an exact prefix
there and equal elsewhere, and every outcome must be the same. In bf16 rounding differs between
layouts; mismatches are counted, with the gap between the two likeliest tokens where the responses
part.
"""

from collections.abc import Sequence
from typing import Any

import torch
from common import alternate, ratio, write

import durometer
from durometer.domains.base import Domain, Item, Role, Split
from durometer.measures.outcomes import classify, decided
from durometer.measures.responses import MAX_TOKENS, respond
from durometer.subjects.base import Subject

BATCH, ROUNDS = 32, 2


@torch.no_grad()
def theirs(subject: Subject, items: Sequence[Item]) -> list[list[int]]:
    """Return greedy responses by ``transformers.generate``."""
    tokenizer = subject.chat.tokenizer
    tokenizer.padding_side = "left"
    stop = subject.chat.stop_ids(subject.model.config)
    responses: list[list[int]] = []
    for start in range(0, len(items), BATCH):
        texts = [subject.chat.prompt_text(item.prompt) for item in items[start : start + BATCH]]
        batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        batch = batch.to(subject.forward.device)
        out = subject.model.generate(
            **batch, max_new_tokens=MAX_TOKENS, do_sample=False, eos_token_id=sorted(stop)
        )
        for row in out[:, batch["input_ids"].shape[1] :].tolist():
            end = next((i for i, token in enumerate(row) if token in stop), len(row))
            responses.append(row[:end])
    return responses


def ours(subject: Subject, domain: Domain, items: Sequence[Item]) -> list[list[int]]:
    """Return our greedy responses, ended where the outcome is decided."""

    def stop(index: int, ids: Sequence[int]) -> bool:
        return decided(items[index], subject.chat.decode(ids), domain.rules)

    generated = respond(subject, items, stop)
    return [result.ids for result in generated]


def compare(
    subject: Subject, domain: Domain, items: Sequence[Item], left: Any, right: Any
) -> dict[str, Any]:
    """Count the responses that are not a prefix of the baseline's, and the outcomes that differ."""
    parted = [
        (item, a, b) for item, a, b in zip(items, left, right, strict=True) if b[: len(a)] != a
    ]
    outcomes = sum(
        classify(item, subject.chat.decode(a), domain.rules).outcome
        != classify(item, subject.chat.decode(b), domain.rules).outcome
        for item, a, b in zip(items, left, right, strict=True)
    )
    margins = [_margin(subject, item, a, b) for item, a, b in parted]
    return {"mismatches": len(parted), "different_outcomes": outcomes, "margins_nats": margins}


@torch.no_grad()
def _margin(subject: Subject, item: Item, a: list[int], b: list[int]) -> float:
    """Return the gap of the two likeliest tokens where the responses part, in nats."""
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), 0)
    ids = torch.tensor([[*subject.chat.prompt_ids(item.prompt), *a[:same]]])
    logits = subject.model(input_ids=ids.to(subject.forward.device)).logits[0, -1].float()
    top = logits.log_softmax(-1).topk(2).values
    return float(top[0] - top[1])


def run(name: str, dtype: Any) -> dict[str, Any]:
    """Compare and time both on one subject in one dtype."""
    subject = durometer.load_subject(name, dtype=dtype)
    domain = durometer.load_domain("capitals")
    items = domain.select(Role.RESTRICTED, Split.SELECT, training=False)
    a, b = ours(subject, domain, items), theirs(subject, items)
    baseline, fast = alternate(
        lambda: theirs(subject, items), lambda: ours(subject, domain, items), ROUNDS
    )
    return {
        "subject": name,
        "dtype": subject.dtype,
        "prompts": len(items),
        **ratio(baseline, fast),
        **compare(subject, domain, items, a, b),
    }


def main() -> None:
    """Measure the undefended and the safeguarded model in fp32 and in the default dtype."""
    cases = [
        run(name, dtype) for name in ("smollm2-refusal", "smollm2") for dtype in ("float32", "auto")
    ]
    path = write(
        "generation",
        {
            "what": "greedy answers to the select prompts of capitals",
            "baseline": f"transformers.generate, left-padded batches of {BATCH}",
            "cases": cases,
        },
    )
    print(path.read_text())


if __name__ == "__main__":
    main()
