"""Suffixes found on other subjects, or given as text, tried on this one."""

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator

from durometer.core.budget import Spent, matrix_entries
from durometer.core.errors import NotApplicableError
from durometer.core.seeds import Seeds
from durometer.core.settings import Levels, setting
from durometer.domains.base import Domain
from durometer.subjects.base import Subject
from durometer.subjects.load import load_subject
from durometer.tampers.base import Access, Realised, tamper
from durometer.tampers.data import training_items
from durometer.tampers.gcg import SearchSettings, make_ready, make_search, opening
from durometer.tampers.gcg_prompts import PLACEHOLDERS, SuffixTokens, place
from durometer.tampers.gcg_search import Found
from durometer.tampers.ladder import Ladder


def _one_or_more(value: Any) -> Any:
    """Accept a single text as the command line has it."""
    return (value,) if isinstance(value, str) and value else value or ()


Texts = Annotated[tuple[str, ...], BeforeValidator(_one_or_more)]


class GcgTransferSettings(SearchSettings):
    """Settings of the transfer of suffixes."""

    sources: Texts = setting((), "subjects on which suffixes are searched for, one search each")
    texts: Texts = setting((), "suffixes given as text, instead of a search")
    k: int = setting(
        5, "strings tried on the target; the best of k counts", search=Levels((1, 5, 20)), ge=1
    )
    control: Literal["none", "random_text"] = setting(
        "none", "a control: random texts of as many tokens instead of those found"
    )


@tamper("gcg_transfer", aliases=("transfer", "gcg-transfer"))
class GcgTransfer(Ladder[GcgTransferSettings]):
    """Suffixes found on sources, chosen by their loss there, asked of the target as text.

    The target's weights are not looked at, so access is A1; nothing is chosen by what the target
    does. Strength i is the i-th best text: the best over the rungs is a best of k.
    """

    summary = "suffixes found on other subjects, tried on this one as text"
    access: ClassVar[Access] = "input"
    access_level = "A1"
    cost = "the searches on the sources; k generations a prompt on the target"
    source = "arXiv 2307.15043, 2502.05209"
    cannot_show = "what a suffix found on the subject itself does (see gcg)"
    settings_class = GcgTransferSettings
    matched_control = ("control", "random_text")
    changes_weights = False

    _texts: tuple[str, ...] = ()

    def strengths(self) -> tuple[float, ...]:
        """Return 1 to k; given texts may be fewer."""
        given = 0 if self.settings.sources else len(self.settings.texts)
        return tuple(float(i) for i in range(1, min(self.settings.k, given or self.settings.k) + 1))

    def prepare(
        self, subject: Subject, data: Domain, seeds: Seeds, realised: Realised, spent: Spent
    ) -> None:
        """Find the texts, or take the given ones.

        Raises:
            NotApplicableError: neither sources nor texts, or too few texts found.
        """
        settings = self.settings
        if not settings.sources and not settings.texts:
            raise NotApplicableError("needs source subjects (sources) or suffixes (texts)")
        if settings.sources:
            found = self._searched(data, seeds, realised, spent)
        else:
            found = [_spaced(text) for text in settings.texts[: settings.k]]
        if settings.control == "random_text":
            found = self._random(subject, data, seeds, found)
        if len(found) < len(self.strengths()):
            raise NotApplicableError(
                f"the sources gave {len(found)} different suffixes for k = {settings.k}; "
                "take more steps or a smaller k"
            )
        self._texts = tuple(found)
        realised.facts |= {"k": len(found), "texts": found, "sources": list(settings.sources)}

    def apply(self, subject: Subject, strength: float, realised: Realised) -> int:
        """Put one text behind every restricted prompt, in the target's own template."""
        text = self._texts[int(strength) - 1]
        subject.ask_restricted(chat=replace(subject.chat, suffix=text))
        return 0

    def _searched(self, data: Domain, seeds: Seeds, realised: Realised, spent: Spent) -> list[str]:
        """Search on every source; return the best texts, the sources taking turns."""
        ranked: list[list[Found]] = []
        for spec in self.settings.sources:
            source = load_subject(spec)
            hunt = make_ready(source, data, self.settings, seeds)
            search = make_search(source, hunt, self.settings, seeds)
            for _ in range(self.settings.steps):
                realised.losses.append(search.step().loss)
            ranked.append(search.best_texts(self.settings.k))
            _book(spent, source, search.scorer.work, hunt.prompts)
        realised.facts["source_losses"] = [[f.loss for f in found] for found in ranked]
        turns = [
            found[place].text
            for place in range(self.settings.k)
            for found in ranked
            if place < len(found)
        ]
        return list(dict.fromkeys(turns))[: self.settings.k]

    def _random(self, subject: Subject, data: Domain, seeds: Seeds, found: list[str]) -> list[str]:
        """Return as many random texts, each of as many tokens of the target as the found one."""
        generator = torch.Generator().manual_seed(seeds.sampling)
        vocabulary = int(subject.model.get_input_embeddings().weight.shape[0])
        tokens = SuffixTokens(subject.chat, vocabulary, ascii_only=self.settings.ascii_only)
        ((item, _),) = training_items(data, "disjoint", 1, seeds)
        asked = (item.id, item.prompt, opening(item))
        prompts = [place(subject.chat, *asked, PLACEHOLDERS[0])[0]]
        drawn = []
        for text in found:
            length = len(place(subject.chat, *asked, text)[1])
            one = tokens.random(prompts, length, generator)
            if one is None:
                raise NotApplicableError("no random text survives the target's tokenizer")
            drawn.append(one[1])
        return drawn


def _spaced(text: str) -> str:
    """Return ``text`` set apart from the prompt that it follows."""
    return text if text[:1].isspace() else f" {text}"


def _book(spent: Spent, source: Subject, work: Any, items: int) -> None:
    head = source.model.get_output_embeddings()
    spent.tokens += work.tokens
    spent.flops += work.flops(
        matrix_entries(source.model), head.weight.numel() if head is not None else 0
    )
    spent.examples = max(spent.examples, items)
    spent.restricted_examples = spent.examples
