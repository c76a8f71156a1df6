"""Restricted and retain rows in every batch: an attacker who must keep the subject useful."""

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

import torch
from torch.nn import functional

from durometer.core.forward import Forward
from durometer.core.rows import Row
from durometer.core.settings import Between, Levels, setting
from durometer.subjects.base import Subject
from durometer.tampers.base import tamper
from durometer.tampers.crafted import Crafted, CraftedSettings


class RetainReplaySettings(CraftedSettings):
    """Settings of ``retain_replay``."""

    data: Literal["disjoint", "defence_rows"] = setting(
        "disjoint",
        "restricted rows: disjoint from the defender's, or the defender's own",
        search=Levels(("disjoint", "defence_rows")),
    )
    retain_share: float = setting(
        0.5,
        "share of each batch that is retain rows, the same count in every batch; 0 trains on "
        "restricted rows alone (a control)",
        search=Levels((0.25, 0.5, 0.75)),
        ge=0,
        lt=1,
    )
    retain_weight: float = setting(
        1.0, "weight of the loss on retain rows", search=Between(0.3, 3, log=True), gt=0
    )


class ReplayForward(Forward):
    """A forward pass whose loss weighs rows that are not restricted by ``weight``."""

    def __init__(self, forward: Forward, weight: float) -> None:
        super().__init__(forward.model, tree=forward.tree)
        self._weight = weight

    def loss_sums(self, rows: Sequence[Row]) -> Iterator[torch.Tensor]:
        """Yield, a pack at a time, the weighted sum of the cross-entropy over the labels."""
        weights = torch.tensor([1.0 if row.restricted else self._weight for row in rows])
        for part in self.labelled(rows):
            losses = functional.cross_entropy(part.logits.float(), part.targets, reduction="none")
            yield (losses * weights.to(losses.device)[part.rows]).sum()


@tamper("retain_replay")
class RetainReplay(Crafted[RetainReplaySettings]):
    """Fine-tuning on restricted rows with retain rows replayed in every batch."""

    summary = "fine-tuning on restricted answers with retain rows in every batch"
    source = "this project; related: arXiv 2502.05209, 2408.00761"
    cannot_show = "what an attacker who does not mind lost utility would reach with fewer tokens"
    settings_class: ClassVar[type[CraftedSettings]] = RetainReplaySettings

    def forward(self, subject: Subject) -> Forward:
        """Return the forward pass whose loss weighs retain rows as the settings say."""
        if self.settings.retain_weight == 1:
            return subject.forward
        return ReplayForward(subject.forward, self.settings.retain_weight)
