"""GCG candidate scoring and whole steps on ``smollm2``: ours against nanoGCG's loop.

nanoGCG (github.com/GraySwanAI/nanoGCG, MIT) is re-implemented here from its published loop, since
the package is no dependency: keys and values of the ids before the suffix are kept, as it does by
default; all candidates run from the start of the suffix; logits are computed over the whole
vocabulary at every position and those of the target picked afterwards; the batch is as large as
memory allows (``THEIR_BATCH`` here, so that nothing is retried). The candidate sets are identical,
and so must be the best candidate of every step.

With ``--nanogcg-python PATH``, an interpreter of an environment that has the package, nanoGCG's own
program searches as well, from the same weights, prompt, target and first suffix at the same width
(``gcg_nanogcg.py``). Its draws are its own, so that its losses are another search's.
"""

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import ratio, write
from gcg_picture import picture
from torch.nn import functional
from transformers import DynamicCache

import durometer
from durometer.core.seeds import Seeds
from durometer.subjects.base import Subject
from durometer.tampers.gcg import GcgSettings, Hunt, make_ready, make_search
from durometer.tampers.gcg_prompts import Suffix, SuffixPrompt
from durometer.tampers.gcg_screening import SCREENED_FROM, Screening
from durometer.tampers.gcg_search import SuffixSearch

THEIR_BATCH = 64
SEEDS = Seeds.derive(1)
HERE = Path(__file__).resolve().parent


class NanoGcg:
    """The parts of nanoGCG's loop that cost time: the gradient, and scoring the candidates."""

    def __init__(self, subject: Subject, prompt: SuffixPrompt) -> None:
        self._model, self._prompt = subject.model, prompt
        self._embed = subject.model.get_input_embeddings()
        with torch.no_grad():
            ids = torch.tensor([prompt.before])
            self._prefix = self._model(inputs_embeds=self._embed(ids), use_cache=True)

    def _cache(self, rows: int) -> DynamicCache:
        cache = DynamicCache()
        for index, layer in enumerate(self._prefix.past_key_values.layers):
            keys, values = (part.expand(rows, -1, -1, -1) for part in (layer.keys, layer.values))
            cache.update(keys, values, index)
        return cache

    def _loss(self, embeds: torch.Tensor) -> torch.Tensor:
        target = torch.tensor(self._prompt.target)
        shift = embeds.shape[1] - len(target)
        logits = self._model(
            inputs_embeds=embeds, past_key_values=self._cache(len(embeds)), use_cache=True
        ).logits
        picked = logits[:, shift - 1 : -1].contiguous()
        labels = target.repeat(len(embeds))
        losses = functional.cross_entropy(picked.flatten(0, 1), labels, reduction="none")
        return losses.view(len(embeds), -1).mean(-1)

    def gradient(self, suffix: Suffix) -> torch.Tensor:
        weight = self._embed.weight
        one_hot = functional.one_hot(torch.tensor([suffix]), len(weight)).to(weight.dtype)
        one_hot.requires_grad_(True)
        rest = torch.tensor([(*self._prompt.after, *self._prompt.target)])
        loss = self._loss(torch.cat([one_hot @ weight, self._embed(rest)], dim=1))
        (gradient,) = torch.autograd.grad(loss.sum(), one_hot)
        return gradient[0]

    @torch.no_grad()
    def losses(self, suffixes: Sequence[Suffix]) -> torch.Tensor:
        rest = (*self._prompt.after, *self._prompt.target)
        rows = torch.tensor([(*suffix, *rest) for suffix in suffixes])
        return torch.cat([self._loss(self._embed(part)) for part in rows.split(THEIR_BATCH)])


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    begun = time.perf_counter()
    return call(), time.perf_counter() - begun


def scoring(search: SuffixSearch, theirs: NanoGcg, current: Suffix, rounds: int) -> dict[str, Any]:
    """Time all three ways of scoring the same candidates in turn, and check that they agree."""
    screening = search.screening
    suffixes = [s for s, _ in search.candidates(search.scorer.gradient(current))]
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "baseline": lambda: theirs.losses(suffixes),
        "exact": lambda: search.scorer.losses(suffixes, current),
    }
    if isinstance(screening, Screening):
        ways["screened"] = lambda: screening.losses(suffixes, current)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    processor: dict[str, list[float]] = {name: [] for name in ways}
    if isinstance(screening, Screening):  # its first use pays for the copies of the weights
        screening.losses(suffixes[:SCREENED_FROM], current)
    for _ in range(rounds):
        losses = {}
        for name, way in ways.items():
            begun = time.process_time()
            losses[name], took = timed(way)
            seconds[name].append(took)
            processor[name].append(time.process_time() - begun)
        best = {name: int(found.argmin()) for name, found in losses.items()}
        assert len(set(best.values())) == 1, f"different choices: {best}"
    ours = list(ways)[-1]
    rows = [
        {
            "way": {"baseline": "nanoGCG's loop"}.get(name, f"ours, {name}"),
            "candidates_per_second": len(suffixes) / statistics.median(took),
            "ratio": ratio(seconds["baseline"], took)["ratio"],
            "processor_time_ratio": ratio(processor["baseline"], processor[name])["ratio"],
        }
        for name, took in seconds.items()
    ]
    return {
        **ratio(seconds["baseline"], seconds[ours]),
        "largest_loss_difference": float((losses["exact"] - losses["baseline"]).abs().max()),
        "scoring": rows,
    }


def curves(
    search: SuffixSearch, theirs: NanoGcg, steps: int
) -> tuple[dict[str, list[tuple[float, float]]], float]:
    """Run both searches on the same draws and check that they choose alike.

    Returns loss against seconds of both, and the processor seconds of ours.
    """
    processor = 0.0
    result: dict[str, list[tuple[float, float]]] = {"nanogcg_loop": [], "ours": []}
    spent = {"nanogcg_loop": 0.0, "ours": 0.0}
    for _ in range(steps):
        current = search.current.suffix
        state = search._generator.get_state()
        begun = time.process_time()
        found, took = timed(search.step)
        processor += time.process_time() - begun
        spent["ours"] += took
        # The same draw again for the baseline, from the same state of the generator.
        after = search._generator.get_state()
        search._generator.set_state(state)
        moved, search.current = search.current, search.seen[current]
        begun = time.perf_counter()
        suffixes = [suffix for suffix, _ in search.candidates(theirs.gradient(current))]
        losses = theirs.losses(suffixes)
        best = int(losses.argmin())
        spent["nanogcg_loop"] += time.perf_counter() - begun
        search._generator.set_state(after)
        search.current = moved
        assert suffixes[best] == found.suffix, "the two loops chose different candidates"
        result["ours"].append((spent["ours"], found.loss))
        result["nanogcg_loop"].append((spent["nanogcg_loop"], float(losses[best])))
    return result, processor


def package(python: str, folder: str, hunt: Hunt, settings: GcgSettings) -> dict[str, Any]:
    """Let nanoGCG's own program search; return what it reports."""
    (prompt,) = hunt.start.prompts
    asked = {
        "folder": folder,
        "prompt": prompt.prompt,
        "target": prompt.response,
        "initial": hunt.start.text,
        "steps": settings.steps,
        "candidates": settings.candidates,
        "top_k": settings.top_k,
        "batch": THEIR_BATCH,
    }
    done = subprocess.run(
        [python, str(HERE / "gcg_nanogcg.py")],
        input=json.dumps(asked),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert answer["suffix_tokens"] == settings.suffix_tokens
    return answer


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nanogcg-python", help="interpreter of an environment with nanogcg")
    parser.add_argument("--candidates", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    return parser.parse_args()


def main() -> None:
    """Time scoring alone and whole steps, write ``results/gcg.json`` and draw the losses."""
    given = arguments()
    settings = GcgSettings(steps=given.steps, candidates=given.candidates, top_k=given.top_k)
    subject = durometer.load_subject("smollm2", dtype="float32")
    hunt = make_ready(subject, durometer.load_domain("capitals"), settings, SEEDS)
    theirs = NanoGcg(subject, hunt.start.prompts[0])
    fresh = make_search(subject, hunt, settings, SEEDS)
    result = scoring(fresh, theirs, hunt.start.suffix, given.rounds)
    search = make_search(subject, hunt, settings, SEEDS)
    losses, processor = curves(search, theirs, given.steps)
    if given.nanogcg_python:
        folder = subject.model.name_or_path
        own = package(given.nanogcg_python, folder, hunt, settings)
        losses["nanogcg_package"] = [tuple(pair) for pair in own.pop("seconds_and_loss")]
        seconds = losses["ours"][-1][0]
        rate = settings.steps * settings.candidates / seconds
        result |= {
            "whole_steps_candidates_per_second": rate,
            "package_candidates_per_second": own["candidates_per_second"],
            "package_ratio": rate / own["candidates_per_second"],
            "package_processor_time_ratio": settings.steps
            * settings.candidates
            / processor
            / own["candidates_per_processor_second"],
            "package_versions": ", ".join(f"{k} {v}" for k, v in own["versions"].items()),
        }
    screening = search.screening
    path = write(
        "gcg",
        {
            "what": f"{settings.candidates} candidates of 20 tokens, top-k {settings.top_k}, "
            "on smollm2, capitals",
            "baseline": "nanoGCG's loop, re-implemented here",
            **result,
            "cache": search.cache,
            "screening": screening if isinstance(screening, str) else screening.summary(),
            "dtype": subject.dtype,
            "seconds_and_loss": losses,
        },
    )
    drawn = HERE.parent / "docs" / "images" / "gcg.svg"
    drawn.write_text(picture(losses, search.initial.loss))
    print(path.read_text())


if __name__ == "__main__":
    main()
