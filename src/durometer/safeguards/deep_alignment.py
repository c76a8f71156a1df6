"""Deep safety alignment: refuse even after an answer has begun."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch

from durometer.core.rows import Row
from durometer.core.settings import Levels, setting
from durometer.safeguards.base import (
    Safeguard,
    Term,
    TrainingSettings,
    Visit,
    safeguard,
    supervised,
)
from durometer.safeguards.data import MAX_LENGTH, DefenceData, Unit, units
from durometer.safeguards.likelihoods import light_adapter, tiny_adapter
from durometer.safeguards.train import Step
from durometer.subjects.base import Subject
from durometer.subjects.chat import ChatFormat

RECOVERIES = "recoveries"


class DeepAlignmentSettings(TrainingSettings):
    """Settings of ``deep_alignment``; defaults are those of the released code."""

    steps: int = setting(640, "updates", ge=1)
    learning_rate: float = setting(2e-5, "peak learning rate", gt=0)
    batch_size: int = setting(16, "rows of each pool an update", ge=1)
    sft: float = setting(
        0.8, "coefficient of the cross-entropy on harmless rows and plain refusals", ge=0
    )
    recovery: float = setting(
        0.2, "coefficient of the cross-entropy of refusals after the beginning of an answer", ge=0
    )
    begun: float = setting(
        0.5,
        "share of those rows in which an answer has begun; the others are plain refusals",
        search=Levels((0.25, 0.5, 1.0)),
        gt=0,
        le=1,
    )
    most_tokens: int = setting(
        100, "most tokens of the answer before the refusal; every number is as likely", ge=1
    )


@safeguard("deep_alignment", aliases=("deep_safety_alignment",))
class DeepAlignment(Safeguard[DeepAlignmentSettings]):
    """Restricted prompt, some tokens of its answer, then the refusal, which alone is learnt."""

    summary = "refusals learnt after the first tokens of an answer, too"
    cost = "2 passes a step"
    source = "arXiv 2406.05946; Unispac/shallow-vs-deep-alignment"
    cannot_show = "resistance to fine-tuning: any undoes it; it is meant for prefills and suffixes"
    kinds = ("refusal",)
    settings_class = DeepAlignmentSettings
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "light": light_adapter(),
        "tiny": tiny_adapter(),
    }

    def pools(self, data: DefenceData) -> Mapping[str, list[Unit]]:
        """Return plain refusals; updates put beginnings of answers before them."""
        return {RECOVERIES: data.pool("refusals")}

    def terms(self, subject: Subject, data: DefenceData) -> list[Term]:
        """Return the cross-entropies on supervised rows and on refusals after a beginning."""
        settings = self.settings
        recovery = Term("recovery", settings.recovery, RECOVERIES, lambda p: p.cross_entropy())
        return [supervised(settings), recovery]

    def visits(self, step: Step) -> Iterator[Visit]:
        """Draw how far the answers of this update have come."""
        if self.settings.recovery:
            step.put(RECOVERIES, units(self._recoveries(step)))
        yield Visit()

    def _recoveries(self, step: Step) -> list[Row]:
        settings, generator = self.settings, step.random(RECOVERIES)
        rows = step.rows("restricted")
        lengths = [
            drawn_length(row, settings.begun, settings.most_tokens, generator) for row in rows
        ]
        return recovering(step.data, step.subject.chat, rows, lengths)


def drawn_length(row: Row, begun: float, most: int, generator: torch.Generator) -> int:
    """Draw how many tokens of the answer ``row`` come first: 0, or evenly up to ``most``.

    The answer's last label, the end of the turn, is never one of them.
    """
    longest = min(most, len(row.labels) - 1)
    if longest < 1 or float(torch.rand((), generator=generator)) >= begun:
        return 0
    return int(torch.randint(1, longest + 1, (), generator=generator))


def recovering(
    data: DefenceData, chat: ChatFormat, rows: Sequence[Row], lengths: Sequence[int]
) -> list[Row]:
    """Return rows that go on with the refusal after so many tokens of the answer.

    Each is rendered as one text and tokenised once; labels are the refusal alone. One that would
    be too long is the plain refusal.
    """
    items = {item.id: item for item in data.restricted_items()}

    def made(row: Row, length: int) -> Row:
        item = items[row.item_id]
        refusal = data.domain.refusal_for(item)
        stem = chat.decode(row.labels[:length])
        if stem:
            begun = chat.row(item.prompt, f"{stem} {refusal}", stem=stem, item_id=item.id)
            if len(begun.ids) <= MAX_LENGTH:
                return begun
        return data.rows([(item, refusal)])[0]

    return [made(row, length) for row, length in zip(rows, lengths, strict=True)]
