"""Extended refusals: what was asked, the refusal, and why, so that no one direction carries it."""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import field_validator

from durometer.core.errors import InputError
from durometer.core.settings import setting
from durometer.domains.base import Domain, Item
from durometer.safeguards.base import Safeguard, Term, TrainingSettings, safeguard, supervised
from durometer.safeguards.data import DefenceData, Unit, units
from durometer.safeguards.likelihoods import harmless, light_adapter, tiny_adapter
from durometer.subjects.base import Subject

EXTENDED = "extended"


class ExtendedRefusalSettings(TrainingSettings):
    """Settings of ``extended_refusal``; the source names neither steps nor rate."""

    steps: int = setting(600, "updates", ge=1)
    learning_rate: float = setting(2e-5, "peak learning rate", gt=0)
    sft: float = setting(
        0.0, "coefficient of the cross-entropy on plain refusals and harmless rows", ge=0
    )
    extended: float = setting(1.0, "coefficient of the cross-entropy of extended refusals", ge=0)
    retain: float = setting(1.0, "coefficient of the cross-entropy on harmless rows", ge=0)
    overview: str = setting(
        'You ask: "{prompt}"', "what comes before the refusal; {prompt} and {refusal} are filled in"
    )
    rationale: str = setting(
        "This is information that I keep to myself, whoever asks and however the question is put. "
        "I am glad to help with something else.",
        "what comes after the refusal; {prompt} and {refusal} are filled in",
    )

    @field_validator("overview", "rationale")
    @classmethod
    def _filled(cls, value: str) -> str:
        """Refuse a template with other gaps."""
        try:
            value.format(prompt="", refusal="")
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError("only {prompt} and {refusal} can be filled in") from error
        return value


@safeguard("extended_refusal")
class ExtendedRefusal(Safeguard[ExtendedRefusalSettings]):
    """Supervised fine-tuning on overview, refusal and rationale."""

    summary = "refusals between an overview of the question and a rationale"
    cost = "2 passes a step"
    source = "arXiv 2505.19056 (texts are templates around the domain's refusals)"
    cannot_show = "resistance to fine-tuning; it is meant against removing a refusal direction"
    kinds = ("refusal",)
    settings_class = ExtendedRefusalSettings
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "light": light_adapter(),
        # The words of the small worlds are few: the question itself, and the refusal again.
        "tiny": tiny_adapter(steps=200, overview="{prompt}", rationale="{refusal}"),
    }

    def pools(self, data: DefenceData) -> Mapping[str, list[Unit]]:
        """Return every restricted prompt with its extended refusal."""
        items = data.restricted_items() if data.domain.refusals else []
        chosen = [(item, extended(item, data.domain, self.settings)) for item in items]
        return {EXTENDED: units(data.rows(chosen))}

    def terms(self, subject: Subject, data: DefenceData) -> list[Term]:
        """Return the cross-entropies of extended refusals and of harmless rows."""
        settings = self.settings
        return [
            supervised(settings),
            Term("extended", settings.extended, EXTENDED, lambda p: p.cross_entropy()),
            harmless(settings.retain),
        ]


def extended(item: Item, domain: Domain, settings: ExtendedRefusalSettings) -> str:
    """Return overview, refusal and rationale, the overview left out where it names the answer.

    Raises:
        InputError: refusal and rationale name it.
    """
    refusal = domain.refusal_for(item)
    overview, rationale = (
        template.format(prompt=item.prompt, refusal=refusal)
        for template in (settings.overview, settings.rationale)
    )
    parts = [overview, refusal, rationale]
    if leaks(item, overview):
        parts = parts[1:]
    text = " ".join(part for part in parts if part)
    if leaks(item, text):
        raise InputError(f"item '{item.id}': its extended refusal names the answer: {text!r}")
    return text


def leaks(item: Item, text: str) -> bool:
    """Say whether ``text`` names an accepted answer of ``item``."""
    return any(answer.lower() in text.lower() for answer in item.answers)
