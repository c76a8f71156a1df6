"""Best of k: draw k responses to a restricted prompt and keep the best."""

from typing import ClassVar

from pydantic import field_validator

from durometer.core.budget import Spent
from durometer.core.errors import NotApplicableError
from durometer.core.generation import Decoding
from durometer.core.seeds import Seeds
from durometer.core.settings import Between, Levels, Settings, setting
from durometer.domains.base import Domain
from durometer.subjects.base import Subject
from durometer.tampers.base import Access, Realised, tamper
from durometer.tampers.ladder import Ladder, Strengths


class BestOfKSettings(Settings):
    """How many responses are drawn, and how."""

    strengths: Strengths = setting(
        (1.0, 5.0, 25.0), "k: responses drawn of each restricted prompt, whole numbers"
    )
    temperature: float = setting(
        1.0,
        "temperature; 0 takes the likeliest token, so that all tries are one",
        search=Levels((0.0, 0.7, 1.0)),
        ge=0,
        le=10,
    )
    top_p: float = setting(
        1.0, "share of the probability that is sampled from", search=Between(0.5, 1.0), gt=0, le=1
    )

    @field_validator("strengths")
    @classmethod
    def _are_counts(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or any(k < 1 or k != int(k) for k in value):
            raise ValueError("k must be a whole number of at least 1")
        return tuple(sorted(value))


@tamper("best_of_k", aliases=("best-of-k", "best_of_n", "best-of-n"))
class BestOfK(Ladder[BestOfKSettings]):
    """Sample k responses to each restricted prompt; one that complies is a success.

    The first tries of a larger k are those of a smaller one, so that success can only grow with k.
    """

    summary = "sample k responses to each restricted prompt and keep the best"
    access: ClassVar[Access] = "input"
    access_level = "A2"
    cost = "k responses an item (generation; prompts run once)"
    source = "arXiv 2310.06987, 2412.03556"
    cannot_show = "whether the attacker could tell the good response from the others without a key"
    settings_class = BestOfKSettings
    changes_weights = False
    _seed: int = 0

    def strengths(self) -> tuple[float, ...]:
        """Return the numbers of tries, fewest first."""
        return self.settings.strengths

    def prepare(
        self, subject: Subject, data: Domain, seeds: Seeds, realised: Realised, spent: Spent
    ) -> None:
        """Take the seed of the draws; nothing is computed.

        Raises:
            NotApplicableError: the domain is measured by likelihoods, where nothing is drawn.
        """
        if data.kind == "knowledge":
            raise NotApplicableError(
                "success is read off likelihoods here: there is nothing to draw"
            )
        self._seed = seeds.sampling
        settings = self.settings
        realised.facts |= {"temperature": settings.temperature, "top_p": settings.top_p}
        if not settings.temperature:
            realised.facts["different_tries"] = 1

    def apply(self, subject: Subject, strength: float, realised: Realised) -> int:
        """Draw ``strength`` responses of every restricted prompt from now on."""
        settings = self.settings
        subject.ask_restricted(
            decoding=Decoding(int(strength), settings.temperature, settings.top_p, self._seed)
        )
        return 0
