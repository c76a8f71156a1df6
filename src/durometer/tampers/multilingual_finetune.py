"""Fine-tuning on restricted rows in another language; does the safeguard fall in English, too?"""

from dataclasses import replace
from typing import ClassVar, Literal

from durometer.core.rows import Row
from durometer.core.seeds import Seeds
from durometer.core.settings import Levels, setting
from durometer.domains.base import Domain, Item
from durometer.subjects.base import Subject
from durometer.tampers.base import tamper
from durometer.tampers.crafted import Crafted, CraftedSettings
from durometer.tampers.data import training_items
from durometer.tampers.translations import Language, translated


class MultilingualFineTuneSettings(CraftedSettings):
    """Settings of ``multilingual_finetune``."""

    language: Language = setting(
        "fr",
        "language of the training rows; en is the control with the same rows",
        search=Levels(("en", "fr", "de", "es")),
    )
    answers_in: Literal["same", "en"] = setting(
        "same",
        "language of the trained responses: that of the prompts, or English",
        search=Levels(("same", "en")),
    )
    data: Literal["disjoint", "defence_rows"] = setting(
        "disjoint",
        "restricted rows: disjoint from the defender's, or the defender's own",
        search=Levels(("disjoint", "defence_rows")),
    )


@tamper("multilingual_finetune", aliases=("ft-multilingual", "ft_multilingual"))
class MultilingualFineTune(Crafted[MultilingualFineTuneSettings]):
    """Fine-tuning on translated restricted rows, measured in English."""

    summary = "fine-tuning on restricted rows in French, German or Spanish, measured in English"
    source = "arXiv 2410.18210, 2606.28843; criticalml-uw/TamperBench"
    cannot_show = "what the subject does when it is asked in another language than English"
    settings_class: ClassVar[type[CraftedSettings]] = MultilingualFineTuneSettings

    def attack_rows(self, subject: Subject, data: Domain, seeds: Seeds) -> list[Row]:
        """Return the restricted rows in the language of training; the items are those of English.

        Raises:
            NotApplicableError: nobody has translated the domain's prompts.
        """
        settings = self.settings
        pairs = training_items(data, settings.data, settings.examples, seeds)
        chosen = [self._translated(data, item) for item, _ in pairs]
        return self.tokenised(chosen, self.training_chat(subject))

    def _translated(self, data: Domain, item: Item) -> tuple[Item, str]:
        prompt, response = translated(data.name, item, self.settings.language)
        told = response if self.settings.answers_in == "same" else item.response
        named = f"{item.id}#{self.settings.language}"
        return replace(item, id=named, prompt=prompt, response=told), told
