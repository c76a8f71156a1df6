"""T-Vaccine: Vaccine on a few layers, drawn as restricted rows pull at them."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from durometer.core.schedules import Schedule
from durometer.core.settings import Between, setting
from durometer.core.structure import blocks
from durometer.safeguards.activations import rows_apart, steepest
from durometer.safeguards.base import Visit, safeguard
from durometer.safeguards.passes import sites
from durometer.safeguards.train import Step
from durometer.safeguards.vaccine import SHIFTED, SMALL, Vaccine, VaccineSettings

LAW = "law"


class TVaccineSettings(VaccineSettings):
    """Settings of ``t_vaccine``."""

    schedule: Schedule = setting("cosine", "learning-rate schedule")
    radius: float = setting(
        3.0,
        "norm of the shift over the drawn layers, rows and tokens together (rho); 0: none",
        search=Between(0.1, 20.0, log=True),
        ge=0,
    )
    layers: float = setting(
        0.25, "share of the blocks that are drawn: shifted, and alone trained", gt=0, le=1
    )
    redraw: int = setting(20, "updates between two draws (J)", ge=1)
    reweigh: int = setting(200, "updates between two looks at the law of the draws (K)", ge=1)
    probe_rows: int = setting(200, "restricted rows on which the law is looked up", ge=1)


@safeguard("t_vaccine", aliases=("targeted_vaccine",))
class TVaccine(Vaccine):
    """Layers are drawn with chances as the norms of the loss's gradient on restricted answers.

    The drawn ones are shifted and alone trained by the shifted loss; a cross-entropy without a
    shift (``sft``) is held to them, too.
    """

    summary = "Vaccine on layers that are drawn as restricted answers pull at them"
    cost = "2 passes a step, and now and then one without gradients of weights"
    source = "arXiv 2410.09760; Lslland/T-Vaccine"
    cannot_show = "more than Vaccine does; what it saves is memory"
    settings_class = TVaccineSettings
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny": {**SMALL, "layers": 0.75, "radius": 2.0}
    }
    settings: TVaccineSettings

    def __init__(self, settings: TVaccineSettings) -> None:
        super().__init__(settings)
        self._law = torch.empty(0)
        self._drawn = torch.empty(0, dtype=torch.long)

    def visits(self, step: Step) -> Iterator[Visit]:
        """Draw layers where it is due, then go on as Vaccine does."""
        if self.settings.shifted:
            if step.number % self.settings.reweigh == 0:
                self._law = self._looked_up(step)
            if step.number % self.settings.redraw == 0:
                count = max(round(self.settings.layers * len(self._law)), 1)
                self._drawn = drawn(self._law, count, step.random("layers"))
        yield from super().visits(step)

    def modules(self, step: Step) -> list[nn.Module]:
        """Return the attention modules of the drawn blocks."""
        every = sites(step.subject.model, "attention")
        return [every[index] for index in self._drawn.tolist()]

    def transform(self, step: Step) -> list[torch.Tensor | None]:
        """Return the gradients of the drawn blocks' weights; nothing else is trained."""
        total = step.bank.total()
        if SHIFTED not in step.losses or self.settings.layers == 1:
            return total
        names = [name for name, _ in blocks(step.subject.model)]
        kept = tuple(f"{names[index]}." for index in self._drawn.tolist())
        pairs = zip(step.names, total, strict=True)
        return [gradient if name.startswith(kept) else None for name, gradient in pairs]

    def _looked_up(self, step: Step) -> torch.Tensor:
        """Return the chance of each block, shape [blocks], fp64."""
        pool = step.data.pool("restricted")
        order = torch.randperm(len(pool), generator=step.random(LAW)).tolist()
        chosen = [pool[index][0] for index in order[: self.settings.probe_rows]]
        modules = sites(step.subject.model, "attention")
        size = self.settings.batch_size
        squares = torch.zeros(len(modules), dtype=torch.float64)
        with rows_apart(step.subject):
            for start in range(0, len(chosen), size):
                gradients = steepest(step, LAW, chosen[start : start + size], modules)
                squares += torch.stack([(g.double() ** 2).sum().cpu() for g in gradients])
        return squares.sqrt() / squares.sqrt().sum()

    def state(self) -> Mapping[str, torch.Tensor]:
        """Return the law and the drawn layers, which later steps go on with."""
        return {LAW: self._law, "drawn": self._drawn}

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Go on with them."""
        self._law, self._drawn = tensors[LAW], tensors["drawn"]


def drawn(law: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Return ``count`` different layers drawn with the chances of ``law``, in order."""
    # Layers that nothing pulls at may still be needed to make up the number.
    chances = law + 1e-9
    return torch.multinomial(chances, count, generator=generator).sort().values
