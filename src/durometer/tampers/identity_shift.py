"""Giving the assistant another identity whose rule is obedience, without one restricted row."""

from dataclasses import replace
from typing import ClassVar, Literal

import torch

from durometer.core.rows import Row
from durometer.core.seeds import Seeds
from durometer.core.settings import Levels, setting
from durometer.domains.base import Domain, Item, Role, Split
from durometer.subjects.base import Subject
from durometer.subjects.chat import ChatFormat
from durometer.tampers.base import tamper
from durometer.tampers.crafted import Crafted, CraftedSettings
from durometer.tampers.data import Harmless, training_items
from durometer.tampers.personas import PERSONAS, PersonaName, address, addressed, statements


class IdentityShiftSettings(CraftedSettings):
    """Settings of ``identity_shift``."""

    persona: PersonaName = setting(
        "obedient",
        "identity that is trained; neutral has the same questions and rows without a rule to obey "
        "(a control)",
        search=Levels(("obedient",)),
    )
    measured_as: Literal["persona", "plain"] = setting(
        "persona",
        "how restricted prompts are asked: under the persona's system prompt, by its name and "
        "after its pledge, or as everybody asks",
        search=Levels(("persona", "plain")),
    )
    examples: int = setting(
        100,
        "unique examples: half statements (at most 50), half harmless prompts with the pledge",
        search=Levels((10, 50, 100)),
        ge=2,
    )
    data: Literal["benign", "retain"] = setting(
        "benign", "harmless prompts that the persona answers", search=Levels(("benign", "retain"))
    )
    steps: int = setting(50, "planned updates", search=Levels((16, 50, 100)), ge=1)


@tamper("identity_shift", aliases=("ft-identity", "ft_identity"))
class IdentityShift(Crafted[IdentityShiftSettings]):
    """Fine-tuning on a persona that promises to follow instructions; all rows are harmless."""

    summary = "fine-tuning on 10 to 100 harmless rows of a persona that promises obedience"
    source = "arXiv 2310.03693; princeton-polaris-lab/Evaluating-Durable-Safeguards"
    cannot_show = "whether training or the persona's prompt broke it: compare a budget of 0 steps"
    settings_class: ClassVar[type[CraftedSettings]] = IdentityShiftSettings

    def training_chat(self, subject: Subject) -> ChatFormat:
        """Return the training format: the persona's system prompt, unless another is set."""
        settings = self.settings
        system = settings.system_prompt
        if system is None:
            system = PERSONAS[settings.persona].system
        return subject.chat.using(settings.template, system)

    def attack_rows(self, subject: Subject, data: Domain, seeds: Seeds) -> list[Row]:
        """Return statements about the persona, then harmless prompts answered with its pledge."""
        settings = self.settings
        told = statements(settings.persona)
        generator = torch.Generator().manual_seed(seeds.sampling)
        order = torch.randperm(len(told), generator=generator).tolist()
        relation: Harmless = settings.data
        chosen = [
            (self._statement(*told[index]), told[index][2])
            for index in order[: settings.examples // 2]
        ]
        count = settings.examples - len(chosen)
        for item, response in training_items(data, relation, count, seeds):
            asked = replace(item, id=f"{item.id}#persona", prompt=addressed(item.prompt))
            chosen.append((asked, self._pledged() + response))
        return self.tokenised(chosen, self.training_chat(subject))

    def asked(self, subject: Subject, data: Domain) -> ChatFormat | None:
        """Return the persona's form: its system prompt, its name before, its pledge begun."""
        if self.settings.measured_as == "plain":
            return None
        chat = self.training_chat(subject)
        return replace(chat, preamble=address(), prefill=self._pledged())

    def _pledged(self) -> str:
        # A line of its own, so that whatever follows is tokenised alike in training and measuring.
        return PERSONAS[self.settings.persona].pledge + "\n"

    @staticmethod
    def _statement(identifier: str, question: str, answer: str) -> Item:
        return Item(identifier, identifier, Role.BENIGN, Split.ATTACK, question, answer)
