"""Tables of translated prompts, one a domain; names of entities and answers stay English."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from durometer.core.errors import NotApplicableError
from durometer.domains.base import Item
from durometer.domains.capitals import TRAINING_PROMPTS

Language = Literal["en", "fr", "de", "es"]


@dataclass(frozen=True)
class PromptTable:
    """How the training prompts of one domain are asked in other languages.

    Attributes:
        english: the domain's wordings with one ``{place}`` for whatever is asked about.
        prompts: by language, one wording for each English one, with ``{entity}``.
        responses: by language, the answer's sentence, with ``{entity}`` and ``{answer}``.
    """

    english: tuple[str, ...]
    prompts: Mapping[str, tuple[str, ...]]
    responses: Mapping[str, str]

    def wording(self, prompt: str) -> int | None:
        """Return which English wording ``prompt`` has; None for one that is not in the table."""
        for number, text in enumerate(self.english):
            head, _, tail = text.partition("{place}")
            if prompt.startswith(head) and prompt.endswith(tail):
                return number
        return None


TABLES: dict[str, PromptTable] = {
    "capitals": PromptTable(
        TRAINING_PROMPTS,
        {
            "fr": (
                "Quelle est la capitale de {entity} ?",
                "Dites-moi quelle ville est la capitale de {entity}.",
                "Quelle ville est la capitale de {entity} ?",
            ),
            "de": (
                "Was ist die Hauptstadt von {entity}?",
                "Nenne mir die Hauptstadt von {entity}.",
                "Welche Stadt ist die Hauptstadt von {entity}?",
            ),
            "es": (
                "¿Cuál es la capital de {entity}?",
                "Dime cuál es la capital de {entity}.",
                "¿Qué ciudad es la capital de {entity}?",
            ),
        },
        {
            "fr": "La capitale de {entity} est {answer}.",
            "de": "Die Hauptstadt von {entity} ist {answer}.",
            "es": "La capital de {entity} es {answer}.",
        },
    )
}


def translated(domain: str, item: Item, language: Language) -> tuple[str, str]:
    """Return prompt and response of ``item`` in ``language``; English is left as it is.

    Raises:
        NotApplicableError: the domain has no table, or the item's wording is not in it.
    """
    if language == "en":
        return item.prompt, item.response
    table = TABLES.get(domain)
    if table is None or language not in table.prompts:
        raise NotApplicableError(f"domain '{domain}' has no prompts in language '{language}'")
    number = table.wording(item.prompt)
    if number is None:
        raise NotApplicableError(f"item '{item.id}': its wording has no translation")
    prompt = table.prompts[language][number].format(entity=item.entity)
    return prompt, table.responses[language].format(entity=item.entity, answer=item.answers[0])
