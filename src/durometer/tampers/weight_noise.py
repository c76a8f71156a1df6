"""Random noise on the weights: what hides knowledge may be more brittle than the knowledge."""

from typing import ClassVar

import torch

from durometer.core.adapters import Targets
from durometer.core.budget import Spent
from durometer.core.matrices import block_matrices
from durometer.core.noise import Form, add_relative_noise
from durometer.core.seeds import Seeds
from durometer.core.settings import Levels, Settings, setting
from durometer.domains.base import Domain
from durometer.subjects.base import Subject
from durometer.tampers.base import Access, Realised, tamper
from durometer.tampers.ladder import Ladder, Strengths

# Least cosine between the change that was meant and the one that the dtype can hold.
COSINE = 0.95


class WeightNoiseSettings(Settings):
    """Settings of ``weight_noise``."""

    strengths: Strengths = setting(
        (0.003, 0.01, 0.03, 0.1), "sigma: the noise, in standard deviations of each matrix"
    )
    form: Form = setting(
        "additive",
        "W + s std(W) e, W (1 + s e), or (1 - shrink s) W + s std(W) e",
        search=Levels(("additive", "multiplicative", "shrink_and_perturb")),
    )
    shrink: float = setting(
        1.0, "how fast shrink_and_perturb shrinks, in units of sigma; not below 0", ge=0
    )
    scope: Targets = setting(
        "all", "matrices that get noise", search=Levels(("all", "mlp", "attention"))
    )


@tamper("weight_noise", aliases=("weight-noise", "noise"))
class WeightNoise(Ladder[WeightNoiseSettings]):
    """Gaussian noise on every matrix of the blocks; each trial seed is one draw."""

    summary = "Gaussian noise on the weights, relative to each matrix's spread"
    access: ClassVar[Access] = "weights"
    access_level = "A4"
    cost = "one pass over the weights a draw"
    source = "arXiv 2412.01784"
    cannot_show = "that a safeguard is shallow: noise that hurts everything also lifts refusals"
    settings_class = WeightNoiseSettings

    def strengths(self) -> tuple[float, ...]:
        """Return the sigmas."""
        return self.settings.strengths

    def prepare(
        self, subject: Subject, data: Domain, seeds: Seeds, realised: Realised, spent: Spent
    ) -> None:
        """Find the matrices."""
        self._matrices = block_matrices(subject.model, self.settings.scope)
        self._seed = seeds.initialisation
        self._cosine = 1.0
        realised.facts |= {"matrices": len(self._matrices), "cosine": {}, "rounded_away": []}

    @torch.no_grad()
    def apply(self, subject: Subject, strength: float, realised: Realised) -> int:
        """Add one draw, the same direction at every strength; return how many weights moved."""
        generator = torch.Generator().manual_seed(self._seed)
        settings = self.settings
        subject.restoration.writable(self._matrices)
        added = add_relative_noise(
            self._matrices.values(), strength, generator, settings.form, settings.shrink
        )
        self._cosine = added.cosine
        if strength:
            realised.facts["cosine"][f"{strength:g}"] = added.cosine
        return added.moved

    def _audit(self, subject: Subject, realised: Realised, strength: float) -> None:
        """Say so when rounding ate the noise: a subject that shrugs it off never met it."""
        super()._audit(subject, realised, strength)
        if realised.status == "done" and strength and self._cosine <= COSINE:
            realised.facts["rounded_away"].append(strength)
            realised.status = "no_effect"
            realised.reason = (
                f"{subject.dtype} keeps too little of the noise at strength {strength:g} "
                f"(cosine {self._cosine:.2f} with what was meant)"
            )
