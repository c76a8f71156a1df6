"""SDD: restricted prompts get fluent answers that have nothing to do with them."""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from durometer.core.errors import InputError
from durometer.core.settings import setting
from durometer.domains.base import Item
from durometer.safeguards.base import Safeguard, Term, TrainingSettings, safeguard, supervised
from durometer.safeguards.data import DefenceData, Unit, units
from durometer.safeguards.likelihoods import harmless, light_adapter, tiny_adapter
from durometer.subjects.base import Subject

IRRELEVANT = "irrelevant"


class SddSettings(TrainingSettings):
    """Settings of ``sdd``; defaults are those of the released code as far as it names them."""

    steps: int = setting(500, "updates", ge=1)
    learning_rate: float = setting(5e-7, "peak learning rate", gt=0)
    batch_size: int = setting(24, "rows of each pool an update", ge=1)
    sft: float = setting(
        0.0, "coefficient of the cross-entropy on refusals and harmless rows", ge=0
    )
    deflection: float = setting(
        1.0, "coefficient of the cross-entropy of irrelevant answers to restricted prompts", ge=0
    )
    retain: float = setting(1.0, "coefficient of the cross-entropy on harmless rows", ge=0)
    most_similar: float = setting(
        0.25,
        "largest cosine of an answer to the prompt, over words weighted by their rarity (the "
        "published one is between sentence embeddings)",
        ge=0,
        le=1,
    )


@safeguard("sdd", aliases=("self_degraded_defence",))
class Sdd(Safeguard[SddSettings]):
    """Restricted prompts are answered well and beside the point; nothing is refused."""

    summary = "fluent but irrelevant answers to restricted prompts"
    cost = "2 passes a step"
    source = "arXiv 2507.21182; ZeroNLP/SDD (answers are those of the domain's harmless items)"
    cannot_show = "refusals: there are none, even before any tamper"
    kinds = ("refusal",)
    settings_class = SddSettings
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "light": light_adapter(),
        "tiny": tiny_adapter(),
    }

    def pools(self, data: DefenceData) -> Mapping[str, list[Unit]]:
        """Return every restricted prompt with an irrelevant answer."""
        items = data.restricted_items()
        chosen = irrelevant_answers(items, data.harmless_items(), self.settings.most_similar)
        return {IRRELEVANT: units(data.rows(list(zip(items, chosen, strict=True))))}

    def terms(self, subject: Subject, data: DefenceData) -> list[Term]:
        """Return the cross-entropies of irrelevant answers and of harmless rows."""
        settings = self.settings
        return [
            supervised(settings),
            Term("deflection", settings.deflection, IRRELEVANT, lambda p: p.cross_entropy()),
            harmless(settings.retain),
        ]


def irrelevant_answers(
    items: Sequence[Item], harmless: Sequence[Item], most_similar: float
) -> list[str]:
    """Return a harmless response for every item: unlike its prompt, and without its answers.

    Which one is drawn by hash, so that it is always the same.

    Raises:
        InputError: an item for which there is none.
    """
    responses = list(dict.fromkeys(other.response for other in harmless))
    texts = [other.prompt for other in (*items, *harmless)]
    documents = Counter(word for text in (*texts, *responses) for word in set(words(text)))
    total = len(texts) + len(responses)
    rarity = {word: math.log(total / count) for word, count in documents.items()}
    vectors = {response: weighted(response, rarity) for response in responses}

    def chosen(item: Item) -> str:
        prompt = weighted(item.prompt, rarity)
        for response in sorted(responses, key=lambda r: _draw(item.id, r)):
            named = any(answer.lower() in response.lower() for answer in item.answers)
            if not named and cosine(prompt, vectors[response]) <= most_similar:
                return response
        raise InputError(
            f"item '{item.id}': every harmless response of split 'defence' is too like its prompt; "
            "raise most_similar or add retain items"
        )

    return [chosen(item) for item in items]


def words(text: str) -> list[str]:
    """Return the words of a text in lower case."""
    return re.findall(r"\w+", text.lower())


def weighted(text: str, rarity: Mapping[str, float]) -> dict[str, float]:
    """Return how much each word of a text counts."""
    return {word: count * rarity[word] for word, count in Counter(words(text)).items()}


def cosine(first: Mapping[str, float], second: Mapping[str, float]) -> float:
    """Return the cosine of two weighted bags of words, 0 where one is empty."""
    product = sum(weight * second.get(word, 0.0) for word, weight in first.items())
    norms = math.hypot(*first.values()) * math.hypot(*second.values())
    return product / norms if norms else 0.0


def _draw(item_id: str, response: str) -> bytes:
    return hashlib.sha256(f"{item_id}:{response}".encode()).digest()
