"""Min posterior: the probability of restricted answers is pushed down."""

from typing import ClassVar

from durometer.core.settings import setting
from durometer.safeguards.base import Safeguard, Term, safeguard, supervised
from durometer.safeguards.data import DefenceData
from durometer.safeguards.likelihoods import improbability
from durometer.safeguards.max_entropy import MaxEntropy, MaxEntropySettings
from durometer.subjects.base import Subject


class MinPosteriorSettings(MaxEntropySettings):
    """Settings of ``min_posterior``."""

    entropy: float = setting(0.0, "coefficient of the entropy on restricted rows", ge=0)
    posterior: float = setting(1.0, "coefficient of the posterior on restricted rows", ge=0)
    floor: float = setting(-15.0, "labels with a log-probability below this are left alone", lt=0)


@safeguard("min_posterior")
class MinPosterior(Safeguard[MinPosteriorSettings]):
    """Cross-entropy on retain rows minus mean log(1 - p) of the labels of restricted ones."""

    summary = "push down the probability of restricted answers, bounded from below"
    cost = "2 passes a step"
    source = "arXiv 2408.00761 (baseline); the restricted rows really enter here"
    cannot_show = "resistance to fine-tuning"
    kinds = ("knowledge",)
    settings_class = MinPosteriorSettings
    presets: ClassVar = MaxEntropy.presets

    def terms(self, subject: Subject, data: DefenceData) -> list[Term]:
        """Return the cross-entropy on retain rows and the posterior of restricted ones."""
        settings = self.settings

        return [
            supervised(settings),
            Term(
                "posterior",
                settings.posterior,
                "restricted",
                lambda p: improbability(p, settings.floor),
            ),
            Term("entropy", settings.entropy, "restricted", lambda p: -p.entropy()),
        ]
