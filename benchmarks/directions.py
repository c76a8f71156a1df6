"""A small grid of layers and strengths on ``smollm2``: what one trial of a search costs.

Each trial edits every writer into the residual stream, looks at logits and goes back. Three ways:
loading the weights anew and writing the edit into them, writing it and restoring, and two rank-1
products hung on the writers. All must give the same logits. Directions are random, one a layer: an
edit costs the same whatever its direction.
"""

import functools
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from common import write

import durometer
from durometer.core.writers import edit_weights, edited_names, low_rank_edit, orthonormal, writers
from durometer.subjects.base import Subject
from durometer.subjects.load import DtypeName

SUBJECT = "smollm2"
GRID = ((8, 0.5), (16, 1.0), (22, 1.5))
PROMPT = "Which river flows through the city of Cologne?"
# Largest difference of one logit allowed, in standard deviations of the logits. In bf16 a written
# edit rounds every weight once more, which the hooks do not.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.3}


def look(subject: Subject) -> torch.Tensor:
    ids = torch.tensor([subject.chat.prompt_ids(PROMPT)])
    with torch.no_grad():
        return subject.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1].clone()


def direction(subject: Subject, layer: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(layer)
    return orthonormal(torch.randn(subject.model.config.hidden_size, generator=generator))


def reloaded(dtype: DtypeName, layer: int, strength: float) -> torch.Tensor:
    """Load from disk and write the edit."""
    subject = durometer.load_subject(SUBJECT, dtype=dtype)
    found = writers(subject.model)
    parameters = dict(subject.model.named_parameters())
    edit_weights(found, parameters, direction(subject, layer), strength)
    return look(subject)


def timed(run: Callable[[int, float], torch.Tensor]) -> tuple[list[float], list[torch.Tensor]]:
    seconds, logits = [], []
    for layer, strength in GRID:
        begun = time.perf_counter()
        logits.append(run(layer, strength))
        seconds.append(time.perf_counter() - begun)
    return seconds, logits


def measure(dtype: DtypeName) -> dict[str, Any]:
    subject = durometer.load_subject(SUBJECT, dtype=dtype)
    found = writers(subject.model)
    names = edited_names(found)
    untouched = look(subject)

    def hooked(layer: int, strength: float) -> torch.Tensor:
        with low_rank_edit(subject.model, direction(subject, layer), strength, found):
            return look(subject)

    def written(layer: int, strength: float) -> torch.Tensor:
        parameters = dict(zip(names, subject.restoration.writable(names), strict=True))
        edit_weights(found, parameters, direction(subject, layer), strength)
        logits = look(subject)
        subject.restoration.undo()
        return logits

    ours, low_rank = timed(hooked)
    exact = torch.equal(look(subject), untouched)
    with subject.restored():
        restoring, dense = timed(written)
    baseline, expected = timed(functools.partial(reloaded, dtype))
    differences = [
        float((logits - right).abs().max() / right.std())
        for way in (low_rank, dense)
        for logits, right in zip(way, expected, strict=True)
    ]
    if not exact or max(differences) > TOLERANCE[dtype]:
        raise SystemExit(f"logits differ: {differences}, untouched again: {exact}")
    return {
        "subject": SUBJECT,
        "dtype": dtype,
        "grid": [{"layer": layer, "strength": strength} for layer, strength in GRID],
        "writers": len(found),
        "reload_and_edit_seconds": baseline,
        "write_and_undo_seconds": restoring,
        "low_rank_seconds": ours,
        "ratio_to_reload": median(b / o for b, o in zip(baseline, ours, strict=True)),
        "ratio_to_write": median(b / o for b, o in zip(restoring, ours, strict=True)),
        "largest_difference_of_logits": max(differences),
        "untouched_again_bit_for_bit": exact,
    }


def main() -> None:
    """Measure once and write ``results/directions.json``."""
    print(write("directions", {"cases": [measure("float32"), measure("bfloat16")]}).read_text())


if __name__ == "__main__":
    main()
