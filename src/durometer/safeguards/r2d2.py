"""R2D2: refuse in spite of token suffixes that are searched for while training."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from durometer.core.rows import Row
from durometer.core.settings import Levels, setting
from durometer.domains.base import Item
from durometer.safeguards.base import (
    Safeguard,
    Term,
    TrainingSettings,
    Visit,
    safeguard,
    supervised,
)
from durometer.safeguards.data import DefenceData, Unit, units
from durometer.safeguards.likelihoods import improbability, light_adapter, tiny_adapter
from durometer.safeguards.passes import evaluating
from durometer.safeguards.train import Step
from durometer.subjects.base import Subject
from durometer.tampers.gcg import opening
from durometer.tampers.gcg_prompts import Start, Suffix, SuffixTokens, begin, place
from durometer.tampers.gcg_search import SearchPlan, SuffixSearch

ANSWERS, REFUSALS, SEARCH = "attacked_answers", "attacked_refusals", "search"
NOT_BEGUN = -1


class R2d2Settings(TrainingSettings):
    """Settings of ``r2d2``; defaults are those of the paper."""

    steps: int = setting(2000, "updates", ge=1)
    learning_rate: float = setting(2e-5, "peak learning rate", gt=0)
    away: float = setting(
        1.0, "coefficient of -log(1 - p) of the labels of the attack's target", ge=0
    )
    toward: float = setting(
        1.0, "coefficient of the cross-entropy of refusals of attacked prompts", ge=0
    )
    floor: float = setting(
        -5.0, "labels of a target with a log-probability below this are left alone", lt=0
    )
    pool: int = setting(180, "restricted prompts with a suffix each that are kept", ge=1)
    cases: int = setting(8, "of them, attacked further and trained on an update", ge=1)
    search_steps: int = setting(
        5, "search steps by which a suffix is improved each time", search=Levels((1, 5, 10)), ge=1
    )
    candidates: int = setting(512, "suffixes scored a search step", ge=1)
    top_k: int = setting(256, "replacements a position that the gradient proposes", ge=1)
    suffix_tokens: int = setting(20, "tokens of a suffix", ge=1)
    initial: str = setting("!", "text repeated as first suffix; empty draws tokens at random")
    reset_every: int = setting(50, "updates after which some cases begin anew; 0 never", ge=0)
    reset_share: float = setting(0.2, "share of the cases that begin anew", ge=0, le=1)


@dataclass(frozen=True)
class Case:
    """One prompt with the suffix that the search has come to."""

    item: Item
    suffix: Suffix
    text: str


@safeguard("r2d2", aliases=("robust_refusal_dynamic_defence",))
class R2d2(Safeguard[R2d2Settings]):
    """Adversarial training: the search goes on against the model as it is by now.

    A pool of prompts keeps its suffixes between updates, so that few search steps at a time make
    strong attacks in the end; the search is that of the ``gcg`` tamper.
    """

    summary = "refuse in spite of suffixes searched by gradient while training"
    cost = "3 passes, and cases x search_steps x (2 + candidates / 3) passes of one row, a step"
    source = "arXiv 2402.04249 (HarmBench); centerforaisafety/HarmBench"
    cannot_show = "resistance to fine-tuning, or to attacks on inputs unlike suffixes"
    kinds = ("refusal",)
    settings_class = R2d2Settings
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "light": light_adapter(
            pool=24, cases=2, search_steps=2, candidates=32, top_k=64, suffix_tokens=10
        ),
        "tiny": tiny_adapter(
            steps=80,
            learning_rate=2e-3,
            warmup_steps=8,
            rank=4,
            batch_size=48,
            harmless_share=0.75,
            sft=3.0,
            away=0.1,
            toward=0.1,
            pool=32,
            cases=2,
            search_steps=1,
            candidates=16,
            top_k=32,
            suffix_tokens=4,
        ),
    }

    def __init__(self, settings: R2d2Settings) -> None:
        super().__init__(settings)
        self._tokens: SuffixTokens | None = None
        self._slots = torch.empty(0, dtype=torch.long)
        self._suffixes = torch.empty(0, dtype=torch.long)

    def pools(self, data: DefenceData) -> Mapping[str, list[Unit]]:
        """Return the rows as they are without suffixes; every update puts attacked ones there."""
        return {ANSWERS: data.pool("restricted"), REFUSALS: data.pool("refusals")}

    def terms(self, subject: Subject, data: DefenceData) -> list[Term]:
        """Return the cross-entropy on supervised rows, and the losses under attack."""
        settings = self.settings
        return [
            supervised(settings),
            Term(
                "away",
                settings.away,
                ANSWERS,
                lambda p: improbability(p, settings.floor),
                may_rest=True,
            ),
            Term("toward", settings.toward, REFUSALS, lambda p: p.cross_entropy()),
        ]

    def visits(self, step: Step) -> Iterator[Visit]:
        """Attack some of the kept cases further, and train on them."""
        if self.settings.away or self.settings.toward:
            self._deal(step)
            cases = self._attacked(step)
            refusals = [(case, step.data.domain.refusal_for(case.item)) for case in cases]
            answers = [(case, opening(case.item)) for case in cases]
            step.put(REFUSALS, units(attacked_rows(step.subject, refusals, ended=True)))
            step.put(ANSWERS, units(attacked_rows(step.subject, answers, ended=False)))
        yield Visit()

    def state(self) -> Mapping[str, torch.Tensor]:
        """Return which prompts are kept, and the suffixes that the search has come to."""
        return {"slots": self._slots, "suffixes": self._suffixes}

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Go on with the kept cases."""
        self._slots, self._suffixes = tensors["slots"].clone(), tensors["suffixes"].clone()

    def _deal(self, step: Step) -> None:
        """Fill the pool with prompts, and let some of its cases begin anew now and then."""
        settings, generator = self.settings, step.random("deal")
        total = len(step.data.restricted_items())
        if not len(self._slots):
            rounds = -(-settings.pool // total)
            order = [torch.randperm(total, generator=generator) for _ in range(rounds)]
            self._slots = torch.cat(order)[: settings.pool]
            self._suffixes = torch.full((settings.pool, settings.suffix_tokens), NOT_BEGUN)
        elif settings.reset_every and step.number % settings.reset_every == 0:
            count = round(settings.reset_share * len(self._slots))
            again = torch.randperm(len(self._slots), generator=generator)[:count]
            self._slots[again] = torch.randint(total, (count,), generator=generator)
            self._suffixes[again] = NOT_BEGUN

    def _attacked(self, step: Step) -> list[Case]:
        chosen = torch.randperm(len(self._slots), generator=step.random("cases"))
        slots = chosen[: self.settings.cases].tolist()
        with evaluating(step.subject.model):
            return [self._improved(step, slot) for slot in slots]

    def _improved(self, step: Step, slot: int) -> Case:
        """Search on from where a case stands, against the model as it is now."""
        settings, subject = self.settings, step.subject
        item = step.data.restricted_items()[int(self._slots[slot])]
        generator = step.random(f"search {slot}")
        plan = SearchPlan(settings.search_steps, settings.candidates, settings.top_k)
        start, tokens = self._start(subject, item, slot, generator), self._allowed(subject)
        search = SuffixSearch(subject.model, tokens, start, plan, generator, screening=False)
        work = search.scorer.work
        for _ in range(settings.search_steps):
            before = work.forward_tokens + work.gradient_tokens
            search.step()
            spent = work.forward_tokens + work.gradient_tokens - before
            step.attacks.ledger.count(SEARCH, spent)
        found = search.current
        self._suffixes[slot] = torch.tensor(found.suffix)
        return Case(item, found.suffix, found.text)

    def _start(self, subject: Subject, item: Item, slot: int, generator: torch.Generator) -> Start:
        """Return the case as the search left it, or a first suffix."""
        settings, tokens = self.settings, self._allowed(subject)
        asked = (item.id, item.prompt, opening(item))
        suffix = tuple(self._suffixes[slot].tolist())
        if NOT_BEGUN not in suffix:
            # Where the gap is does not depend on what is in it.
            prompt, _ = place(subject.chat, *asked, " x")
            text = tokens.text(prompt, suffix)
            if text and tokens.faithful([prompt], suffix, text):
                return Start([prompt], suffix, text, drawn=False)
        return begin(
            subject.chat,
            tokens,
            [asked],
            count=settings.suffix_tokens,
            initial=settings.initial,
            generator=generator,
        )

    def _allowed(self, subject: Subject) -> SuffixTokens:
        if self._tokens is None:
            table: Any = subject.model.get_input_embeddings()
            vocabulary = int(table.weight.shape[0])
            self._tokens = SuffixTokens(subject.chat, vocabulary, ascii_only=True)
        return self._tokens


def attacked_rows(subject: Subject, asked: Sequence[tuple[Case, str]], *, ended: bool) -> list[Row]:
    """Return rows that give these responses to the cases' prompts with their suffixes."""
    return [
        replace(subject.chat, suffix=case.text).row(
            case.item.prompt,
            response,
            ended=ended,
            item_id=case.item.id,
            restricted=not ended,
        )
        for case, response in asked
    ]
