"""GCG candidate scoring and whole steps on ``smollm2``: ours against nanoGCG's loop.

nanoGCG (github.com/GraySwanAI/nanoGCG, MIT) is re-implemented here from its published loop, since
the package is no dependency: keys and values of the ids before the suffix are kept, as it does by
default; all candidates run from the start of the suffix; logits are computed over the whole
vocabulary at every position and those of the target picked afterwards; the batch is as large as
memory allows (``THEIR_BATCH`` here, so that nothing is retried). The candidate sets are identical,
and so must be the best candidate of every step. A third column scores the same set by the shared
tree packs of ``core.forward``.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from common import alternate, ratio, write
from torch.nn import functional
from transformers import DynamicCache

import durometer
from durometer.core.forward import Forward
from durometer.core.rows import Row
from durometer.core.seeds import Seeds
from durometer.subjects.base import Subject
from durometer.tampers.gcg import GcgSettings, Hunt, make_ready, make_search
from durometer.tampers.gcg_prompts import Suffix, SuffixPrompt

THEIR_BATCH, ROUNDS, STEPS = 64, 2, 3
SETTINGS = GcgSettings(steps=STEPS, candidates=64, top_k=64, suffix_tokens=20)
SEEDS = Seeds.derive(1)


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


def tree_losses(subject: Subject, prompt: SuffixPrompt, suffixes: Sequence[Suffix]) -> Any:
    """Score the candidates by tree packs, which share every common beginning within a pack."""
    rows = [Row(prompt.ids(s), len(prompt.ids(s)) - len(prompt.target)) for s in suffixes]
    scores = Forward(subject.model, tree=True).score(rows)
    return torch.tensor([-score.log_probability / score.labels for score in scores])


def curves(subject: Subject, hunt: Hunt) -> dict[str, Any]:
    """Run both searches on the same draws; return loss against seconds, and check the choices."""
    prompt = hunt.start.prompts[0]
    theirs, search = NanoGcg(subject, prompt), make_search(subject, hunt, SETTINGS, SEEDS)
    result: dict[str, list[tuple[float, float]]] = {"nanogcg": [], "ours": []}
    seconds = {"nanogcg": 0.0, "ours": 0.0}
    for _ in range(STEPS):
        current = search.current.suffix
        state = search._generator.get_state()
        begun = time.perf_counter()
        found = search.step()
        seconds["ours"] += time.perf_counter() - begun
        # The same draw again for the baseline, from the same state of the generator.
        after = search._generator.get_state()
        search._generator.set_state(state)
        moved, search.current = search.current, search.seen[current]
        begun = time.perf_counter()
        suffixes = [suffix for suffix, _ in search.candidates(theirs.gradient(current))]
        losses = theirs.losses(suffixes)
        best = int(losses.argmin())
        seconds["nanogcg"] += time.perf_counter() - begun
        search._generator.set_state(after)
        search.current = moved
        assert suffixes[best] == found.suffix, "the two loops chose different candidates"
        result["ours"].append((seconds["ours"], found.loss))
        result["nanogcg"].append((seconds["nanogcg"], float(losses[best])))
    return {"seconds_and_loss": result, "cache": search.cache}


def main() -> None:
    """Time scoring alone and whole steps, and write ``results/gcg.json``."""
    subject = durometer.load_subject("smollm2", dtype="float32")
    domain = durometer.load_domain("capitals")
    hunt = make_ready(subject, domain, SETTINGS, SEEDS)
    search = make_search(subject, hunt, SETTINGS, SEEDS)
    prompt, current = hunt.start.prompts[0], hunt.start.suffix
    theirs = NanoGcg(subject, prompt)
    found = search.candidates(search.scorer.gradient(current))
    suffixes = [suffix for suffix, _ in found]
    ours, nano = search.scorer.losses(suffixes, current), theirs.losses(suffixes)
    begun = time.perf_counter()
    tree = tree_losses(subject, prompt, suffixes)
    tree_seconds = time.perf_counter() - begun
    assert int(ours.argmin()) == int(nano.argmin()) == int(tree.argmin())
    times = alternate(
        lambda: theirs.losses(suffixes), lambda: search.scorer.losses(suffixes, current), ROUNDS
    )
    summary = ratio(*times)
    path = write(
        "gcg",
        {
            "what": f"{len(suffixes)} candidates of 20 tokens on smollm2, capitals",
            "baseline": "nanoGCG's loop, re-implemented here",
            **summary,
            "candidates_per_second": len(suffixes) / summary["ours_seconds"],
            "baseline_candidates_per_second": len(suffixes) / summary["baseline_seconds"],
            "tree_candidates_per_second": len(suffixes) / tree_seconds,
            "largest_loss_difference": float((ours - nano).abs().max()),
            **curves(subject, hunt),
            "dtype": subject.dtype,
        },
    )
    print(path.read_text())


if __name__ == "__main__":
    main()
