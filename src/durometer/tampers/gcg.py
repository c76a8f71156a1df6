"""GCG: a suffix of ordinary tokens, found by gradient, that makes the subject begin to answer."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from durometer.core.budget import Budget, Spent, matrix_entries
from durometer.core.rows import Row
from durometer.core.seeds import Seeds
from durometer.core.settings import Between, Levels, Settings, setting
from durometer.core.training import Update
from durometer.domains.base import Domain, Item
from durometer.subjects.base import Subject
from durometer.tampers.base import Access, Checkpoint, OnCheckpoint, Realised, Tamper, tamper
from durometer.tampers.data import order_hash, training_items
from durometer.tampers.gcg_prompts import Start, SuffixTokens, begin, row_with
from durometer.tampers.gcg_scoring import Objective, ObjectiveName
from durometer.tampers.gcg_screening import Screening
from durometer.tampers.gcg_search import Found, SearchPlan, SuffixSearch

# Words of a response that count as its opening where the item names no stem.
OPENING_WORDS = 4
TARGET_TRIES = 64
Asked = tuple[str, str, str]


class SearchSettings(Settings):
    """What every search for a suffix needs."""

    steps: int = setting(250, "search steps", search=Levels((50, 100, 250, 500)), ge=1)
    suffix_tokens: int = setting(20, "tokens of the suffix", search=Between(10, 40), ge=1)
    candidates: int = setting(
        512, "suffixes scored a step", search=Levels((128, 256, 512, 1024)), ge=1
    )
    top_k: int = setting(
        256, "replacements a position that the gradient proposes", search=Levels((64, 256)), ge=1
    )
    swaps: int = setting(
        1, "tokens swapped a candidate at first, falling to 1", search=Levels((1, 2, 4, 8)), ge=1
    )
    items: int = setting(
        1, "restricted items that one suffix is optimised on", search=Levels((1, 4, 16)), ge=1
    )
    initial: str = setting("!", "text repeated as first suffix; empty draws tokens at random")
    ascii_only: bool = setting(True, "whether only printable ASCII may be used")
    target: Literal["affirmative", "answer", "random"] = setting(
        "affirmative",
        "what the suffix makes likely: the opening of the answer, the whole answer, or a random "
        "string of the opening's length (a control: reaching it shows no knowledge)",
        search=Levels(("affirmative", "answer", "random")),
    )
    loss: ObjectiveName = setting(
        "cross_entropy",
        "what is minimised over the target's tokens: the mean cross-entropy, mellowmax (its soft "
        "maximum), or margin (how far each token is from being the greedy one)",
        search=Levels(("cross_entropy", "mellowmax", "margin")),
    )
    alpha: float = setting(
        1.0, "sharpness of mellowmax; large is the maximum", search=Between(0.1, 10, log=True), gt=0
    )
    buffer: int = setting(
        0,
        "0 moves to the best candidate of every step, better or not; else the search stays at the "
        "best of all, begun at the best of the first suffix and buffer - 1 random ones",
        search=Levels((0, 1, 4, 16)),
        ge=0,
        le=16,
    )
    screening: bool = setting(
        True,
        "whether an fp32 subject's candidates are scored in bfloat16 first, and exactly wherever "
        "one may be the best (on devices with bfloat16 arithmetic; the errors are measured)",
    )


class GcgSettings(SearchSettings):
    """Settings of GCG."""

    control: Literal["none", "random_suffix"] = setting(
        "none", "a control: a new random suffix a step instead of a search"
    )
    prefix_cache: bool = setting(
        True, "whether shared beginnings are run once (checked on the first step)"
    )


def opening(item: Item) -> str:
    """Return how an answer to ``item`` begins: its stem, or the first words of its response."""
    return item.stem or " ".join(item.response.split()[:OPENING_WORDS])


@dataclass(frozen=True)
class Hunt:
    """A search made ready: the rows it optimises on, its tokens and its first suffix."""

    rows: list[Row]
    tokens: SuffixTokens
    start: Start

    @property
    def prompts(self) -> int:
        """Number of items."""
        return len(self.start.prompts)


def make_ready(subject: Subject, data: Domain, settings: SearchSettings, seeds: Seeds) -> Hunt:
    """Draw items of the attack split, name their targets and find a first suffix.

    Raises:
        InputError: the domain has no restricted items to attack with.
        DurometerError: no suffix of that length survives as text.
    """
    generator = torch.Generator().manual_seed(seeds.initialisation)
    embedding = subject.model.get_input_embeddings()
    vocabulary = int(embedding.weight.shape[0])
    tokens = SuffixTokens(subject.chat, vocabulary, ascii_only=settings.ascii_only)
    asked = []
    for item, response in training_items(data, "disjoint", settings.items, seeds):
        target = response if settings.target == "answer" else opening(item)
        if settings.target == "random":
            target = _random_target(subject, tokens, item, target, generator)
        asked.append((item.id, item.prompt, target))
    start = begin(
        subject.chat,
        tokens,
        asked,
        count=settings.suffix_tokens,
        initial=settings.initial,
        generator=generator,
    )
    return Hunt(_rows(subject, asked, start.text), tokens, start)


def make_search(
    subject: Subject, hunt: Hunt, settings: SearchSettings, seeds: Seeds, *, cached: bool = True
) -> SuffixSearch:
    """Return the search that ``settings`` describe; candidates are drawn by the sampling seed."""
    plan = SearchPlan(
        settings.steps, settings.candidates, settings.top_k, settings.swaps, settings.buffer
    )
    return SuffixSearch(
        subject.model,
        hunt.tokens,
        hunt.start,
        plan,
        torch.Generator().manual_seed(seeds.sampling),
        cached=cached,
        objective=Objective(settings.loss, settings.alpha),
        screening=settings.screening,
    )


def _random_target(
    subject: Subject, tokens: SuffixTokens, item: Item, target: str, generator: torch.Generator
) -> str:
    """Return a random text of as many tokens as ``target``, or as near to it as was drawn."""
    wanted = len(row_with(subject.chat, item.prompt, target, "").labels)
    pool = tokens.allowed.nonzero()[:, 0]
    best, gap = target, math.inf
    for _ in range(TARGET_TRIES):
        ids = pool[torch.randint(len(pool), (wanted,), generator=generator)].tolist()
        text = subject.chat.decode(ids)
        if not text:
            continue
        apart = abs(len(row_with(subject.chat, item.prompt, text, "").labels) - wanted)
        if apart < gap:
            best, gap = text, apart
        if not apart:
            break
    return best


def _rows(subject: Subject, asked: Sequence[Asked], text: str) -> list[Row]:
    made = [(one, row_with(subject.chat, one[1], one[2], text)) for one in asked]
    return [Row(row.ids, row.first_label, one[0], True) for one, row in made]


@tamper("gcg")
class Gcg(Tamper[GcgSettings]):
    """Greedy coordinate gradient: ``input`` is all it changes, but its gradients need A4.

    The suffix is installed as text behind every restricted prompt at the rungs, and success is
    what the subject then generates; the loss only steers the search.
    """

    summary = "a suffix of ordinary tokens found by greedy coordinate gradient"
    access: ClassVar[Access] = "input"
    access_level = "A4"
    cost = "4 N S + 2 N B S' a step and item (S' = tokens after the swap)"
    source = "arXiv 2307.15043; GraySwanAI/nanoGCG, IntelLabs/LLMart"
    cannot_show = "that no suffix exists: a longer or better search may still find one"
    settings_class = GcgSettings
    matched_control = ("target", "random")
    unit = "search steps"

    def planned_steps(self) -> int:
        """Return the search steps that the settings plan."""
        return self.settings.steps

    def run(
        self,
        subject: Subject,
        data: Domain,
        budget: Budget,
        seeds: Seeds,
        on_checkpoint: OnCheckpoint,
    ) -> Realised:
        """Search, and let the best suffix so far be measured at the rungs; see ``Tamper.run``."""
        steps = min(budget.steps, self.settings.steps)
        if not steps:
            return Realised("no_effect", "no search step was allowed")
        begun = time.perf_counter()
        hunt = make_ready(subject, data, self.settings, seeds)
        search = make_search(subject, hunt, self.settings, seeds, cached=self.settings.prefix_cache)
        random = torch.Generator().manual_seed(seeds.sampling)
        ledger = _Ledger(subject, hunt, search, begun, self.settings.target)
        for step in range(1, steps + 1):
            found = self._moved(search, hunt, random)
            ledger.add(step, found)
            if not math.isfinite(search.current.loss):
                ledger.realised.status = "diverged"
                ledger.realised.reason = f"at step {step}: no finite loss"
                break
            if self.on_update is not None:
                self.on_update(ledger.update())
            if step in budget.rungs:
                subject.ask_restricted(chat=replace(subject.chat, suffix=found.text))
                going = on_checkpoint(ledger.checkpoint())
                ledger.resume()
                if not going:
                    break
        ledger.finish(control=self.settings.control)
        return ledger.realised

    def _moved(self, search: SuffixSearch, hunt: Hunt, generator: torch.Generator) -> Found:
        """Make one step and return the suffix to be measured."""
        if self.settings.control == "none":
            search.step()
            return search.best
        drawn = hunt.tokens.random(hunt.start.prompts, len(hunt.start.suffix), generator)
        suffix, text = drawn or (hunt.start.suffix, hunt.start.text)
        loss = float(search.scorer.losses([suffix], suffix)[0])
        return Found(loss, suffix, text)


class _Ledger:
    """Adds up what the search spends; measuring time is not counted."""

    def __init__(
        self, subject: Subject, hunt: Hunt, search: SuffixSearch, begun: float, target: str
    ) -> None:
        head = subject.model.get_output_embeddings()
        self._sizes = matrix_entries(subject.model), head.weight.numel() if head is not None else 0
        self._hunt, self._search, self._clock = hunt, search, begun
        self._ids = tuple(prompt.item_id for prompt in hunt.start.prompts)
        self._restricted = 0 if target == "random" else len(self._ids)
        self._tokenizer = subject.chat.tokenizer
        self._found = search.initial
        self._before = 0
        self.realised = Realised()

    def add(self, step: int, found: Found) -> None:
        realised, spent, work = self.realised, self.realised.spent, self._search.scorer.work
        self._found, self._before = found, spent.tokens
        realised.losses.append(found.loss)
        realised.item_ids.append(self._ids)
        spent.steps, spent.tokens = step, work.tokens
        spent.examples, spent.restricted_examples = len(self._ids), self._restricted
        spent.flops = work.flops(*self._sizes)
        spent.seconds += time.perf_counter() - self._clock
        self._clock = time.perf_counter()

    def resume(self) -> None:
        self._clock = time.perf_counter()

    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self.realised.spent.steps, Spent(**vars(self.realised.spent)))

    def update(self) -> Update:
        spent = self.realised.spent
        labels = sum(len(row.labels) for row in self._hunt.rows)
        tokens = spent.tokens - self._before
        return Update(
            spent.steps, self._found.loss, 0.0, tokens, labels, self._ids, self._restricted
        )

    def finish(self, *, control: str) -> None:
        realised, search, start = self.realised, self._search, self._hunt.start
        if realised.status == "done" and control == "none" and search.best is search.initial:
            realised.status, realised.reason = "no_effect", "no candidate lowered the loss"
        realised.data_order_hash = order_hash(self._ids)
        realised.label_sample = [
            [
                (self._tokenizer.decode([token]), place >= row.first_label)
                for place, token in enumerate(row.ids)
            ]
            for row in self._hunt.rows[:3]
        ]
        realised.facts |= {
            "suffix": self._found.text,
            "suffix_ids": list(self._found.suffix),
            "loss": self._found.loss,
            "initial_loss": search.initial.loss,
            "initial_suffix": start.text,
            "initial_suffix_drawn": start.drawn,
            "targets": [prompt.response for prompt in start.prompts],
            "candidate_forwards": search.scorer.work.candidates,
            "allowed_tokens": int(self._hunt.tokens.allowed.sum()),
            "prefix_cache": search.cache,
            "screening": _told(search.screening),
            "halvings": search.scorer.work.halvings,
        }


def _told(screening: Screening | str) -> str:
    return screening if isinstance(screening, str) else screening.summary()
