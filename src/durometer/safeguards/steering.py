"""Activation steering towards refusal, kept in a bias: a mitigation that acts while answering."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from durometer.core.biases import give_biases
from durometer.core.budget import Spent
from durometer.core.errors import NotApplicableError
from durometer.core.rows import Row
from durometer.core.settings import Settings, setting
from durometer.core.structure import blocks
from durometer.core.writers import Writer, hook_block_input, writers
from durometer.domains.base import Domain, Item, Role, Split, deal_splits
from durometer.measures.base import measure_registry
from durometer.safeguards.base import Safeguard, make_safeguard, safeguard
from durometer.safeguards.bench import Bench
from durometer.safeguards.data import DefenceData
from durometer.subjects.base import Subject
from durometer.tampers.directions import PromptReader, added, refusal_ids, refusal_scores
from durometer.tampers.ladder import Strengths

ATTENTION = ("attn", "attention")
CHOOSING_SHARE = 0.5
# Largest relative difference of logits between the bias and a hook that adds the same vector.
FIDELITY = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.03}


class SteeringSettings(Settings):
    """Settings of ``steering``."""

    stage1: Literal["refusal", "none"] = setting(
        "refusal", "plain safeguard that is steered; none: the model refuses already"
    )
    stage1_preset: str = setting("", "preset of the first stage")
    contrast: Literal["prompts", "responses"] = setting(
        "prompts",
        "the vector is a difference of means: restricted minus harmless prompts at the last "
        "token, or refusals minus answers after the first token of the response",
    )
    coefficients: Strengths = setting(
        (0.05, 0.1, 0.2, 0.4, 0.8, 1.2, 1.6, 2.4), "multiples of the mean difference that are tried"
    )
    prompts: int = setting(160, "prompts of each kind, half of them for choosing", ge=8)
    first_block: float = setting(
        0.2, "share of the blocks, from below, before the first whose input is tried", ge=0, lt=1
    )
    last_block: float = setting(
        0.8, "share of the blocks, from below, up to the last whose input is tried", gt=0, le=1
    )
    layer_stride: int = setting(3, "every how many blocks a vector is tried", ge=1)
    keep: float = setting(
        0.99,
        "least share of harmless prompts that must be answered as before, and not refused",
        gt=0,
        le=1,
    )
    margin: float = setting(
        2.0, "how many times the coefficient the harmless answers must withstand", ge=1
    )


@dataclass(frozen=True)
class Choice:
    """Where and how strongly to steer, and what that does on the prompts for choosing.

    Attributes:
        block: the vector is added to what this block writes.
        refusal: mean log-odds of beginning a refusal of a restricted prompt.
        kept: the smaller of two shares of harmless prompts, at ``margin`` times the coefficient:
            right answers that stay right, and answers that still do not begin with a refusal.
    """

    block: int
    coefficient: float
    refusal: float
    kept: float


@dataclass(frozen=True)
class Found:
    """A way to steer, and what the subject does without it.

    Attributes:
        shift: what is added to the residual stream behind ``choice.block``, shape [width], fp32.
        plain: the subject without it, on the prompts for choosing.
        spent: what the search took.
    """

    choice: Choice
    shift: torch.Tensor
    plain: Choice
    spent: Spent


@torch.no_grad()
def find_steering(
    subject: Subject, data: DefenceData, settings: SteeringSettings, numbers: Sequence[int]
) -> Found:
    """Look for the vector towards refusal, its block and coefficient, with hooks alone.

    Args:
        subject: as it is, adapters on it included.
        data: prompts of the defence split make the vectors and choose among them.
        numbers: blocks behind which it is tried; none may be the last.

    Raises:
        InputError: the domain has no refusals, or nothing harmless, in its defence split.
        NotApplicableError: no coefficient above 0 both makes refusals likelier and keeps the
            harmless answers.
    """
    search = _Search(subject, data, settings)
    plain = search.tried(None, 0.0, -1)
    vectors = search.vectors(numbers)
    choice = search.best(vectors, plain)
    return Found(choice, choice.coefficient * vectors[choice.block], plain, search.spent)


def steerable_blocks(model: nn.Module, settings: SteeringSettings) -> list[int]:
    """Return the blocks that the settings name and that another follows, for hooks."""
    chain = len(blocks(model))
    first = max(math.floor(settings.first_block * chain), 1)
    last = max(math.ceil(settings.last_block * chain), first + 1)
    return list(range(first - 1, min(last, chain) - 1, settings.layer_stride))


@contextmanager
def steered(subject: Subject, found: Found) -> Iterator[None]:
    """Add the vector inside the context; no weight is touched."""
    chain = [block for _, block in blocks(subject.model)]
    handle = hook_block_input(chain[found.choice.block + 1], added(found.shift))
    try:
        yield
    finally:
        handle.remove()


@safeguard("steering", aliases=("activation_steering",))
class Steering(Safeguard[SteeringSettings]):
    """Add a vector towards refusal to what one block writes, as a bias of its last map.

    The same for every token and prompt, so nothing but the choice of coefficient protects harmless
    prompts. The bias makes an ordinary model folder of it, which every tamper measures.
    """

    summary = "add a vector towards refusal to the residual stream of a block, as a bias"
    cost = "2 N T of a few hundred prompts for each block and coefficient"
    source = "arXiv 2406.11717 (addition of the refusal direction; 2312.06681 steers likewise)"
    cannot_show = (
        "protection once weights are public: whoever holds them sets the bias to zero, or takes "
        "the direction out"
    )
    kinds = ("refusal",)
    settings_class = SteeringSettings
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"tiny": {"layer_stride": 1}}

    def __init__(self, settings: SteeringSettings) -> None:
        super().__init__(settings)
        self._facts: dict[str, Any] = {}

    def stages(self, domain: Domain) -> list[Safeguard[Any]]:
        """Return the plain safeguard, and the steering of it."""
        if self.settings.stage1 == "none":
            return [self]
        return [make_safeguard(self.settings.stage1, self.settings.stage1_preset), self]

    def require(self, subject: Subject, data: DefenceData) -> None:
        """Look for a place for the vector, and for prompts to make it of.

        Raises:
            InputError: the domain has no refusals, or nothing harmless.
            NotApplicableError: no block has such a place.
        """
        _places(subject.model, self.settings)
        _require_prompts(data)

    @torch.no_grad()
    def edit(self, bench: Bench) -> None:
        """Find the vector, choose its block and coefficient, and write it into a bias.

        Raises:
            NotApplicableError: the family has no such bias, or no coefficient above 0 both makes
                refusals likelier and keeps the harmless answers.
        """
        subject = bench.subject
        places = _places(subject.model, self.settings)
        found = find_steering(subject, bench.data, self.settings, sorted(places))
        flag = _write(subject, found.choice.block, places[found.choice.block], found.shift)
        bench.ledger.tokens += found.spent.tokens
        self._facts = {
            "steering": asdict(found.choice)
            | {
                "norm": float(found.shift.norm()),
                "refusal_before": found.plain.refusal,
                "bias_setting": flag,
            }
        }

    def facts(self) -> dict[str, Any]:
        """Return what was chosen, and what it did on the prompts for choosing."""
        return self._facts


def _places(model: nn.Module, settings: SteeringSettings) -> dict[int, Writer]:
    """Return the blocks whose last feed-forward map may carry the vector, with that map.

    Raises:
        NotApplicableError: none has one map at which a bias reaches the residual stream as it is.
    """
    chain = blocks(model)
    inside = {
        number: [w for w in writers(model) if w.module.startswith(f"{name}.")]
        for number, (name, _) in enumerate(chain)
    }
    found = {}
    for number in steerable_blocks(model, settings):
        ends = [w for w in inside[number] if not any(word in w.module for word in ATTENTION)]
        if len(ends) == 1 and ends[0].gain is None and "expert" not in ends[0].module:
            found[number] = ends[0]
    if not found:
        raise NotApplicableError(
            "steering needs one map at the end of a block's MLP whose output is added to the "
            "residual stream as it is (no experts, no norm behind it)"
        )
    return found


def _require_prompts(data: DefenceData) -> None:
    for pool in ("refusals", "retain"):  # what is missing is told
        data.pool(pool)


class _Search:
    """Looks for the vectors, and tries them with hooks on prompts that made none of them."""

    def __init__(self, subject: Subject, data: DefenceData, settings: SteeringSettings) -> None:
        self.spent = Spent()
        self._subject, self._settings, self._domain = subject, settings, data.domain
        self._reader = PromptReader(subject, self.spent, 1)
        self._chain = [block for _, block in blocks(subject.model)]
        _require_prompts(data)
        restricted, harmless = data.restricted_items(), data.harmless_items()
        self._restricted = _dealt(restricted, settings.prompts)
        self._harmless = _dealt(harmless, settings.prompts)
        self._ids = refusal_ids(subject, data.domain, restricted[0])
        self._good: tuple[set[str], set[str]] = (set(), set())

    def vectors(self, numbers: Sequence[int]) -> dict[int, torch.Tensor]:
        """Return the mean difference at the output of each block, shape [width], fp32."""
        layers = [number + 1 for number in numbers]
        items, harmless = self._restricted[0], self._harmless[0]
        if self._settings.contrast == "prompts":
            pairs = (self._reader.rows(items), self._reader.rows(harmless))
        else:
            refusals = [(item, self._domain.refusal_for(item)) for item in items]
            pairs = (self._begun(refusals), self._begun([(item, item.response) for item in items]))
        ahead, behind = (self._reader.read(rows, layers).hidden for rows in pairs)
        return {
            layer - 1: (ahead[layer].double().mean((0, 1)) - behind[layer].double().mean((0, 1)))
            .float()
            .to(self._subject.forward.device)
            for layer in layers
        }

    def _begun(self, chosen: Sequence[tuple[Item, str]]) -> list[Row]:
        """Return rows that end behind the first token of the response."""
        rows = [self._subject.chat.row(item.prompt, response) for item, response in chosen]
        return [Row((*r.ids[: r.first_label + 1], 0), r.first_label + 1) for r in rows]

    def tried(self, vector: torch.Tensor | None, coefficient: float, number: int) -> Choice:
        """Return what steering does on the prompts for choosing."""
        items, harmless = self._restricted[1], self._harmless[1]
        with self._steered(vector, coefficient, number):
            scores = self._scores(items)
        # The wordings for measuring are new: what is kept at the very edge here is lost there.
        with self._steered(vector, self._settings.margin * coefficient, number):
            good = (self._right(harmless), self._open(harmless))
        if vector is None:
            self._good = good
        kept = [
            len(now & then) / len(then) if then else 1.0
            for now, then in zip(good, self._good, strict=True)
        ]
        return Choice(number, coefficient, float(scores.mean()), min(kept))

    def _scores(self, items: Sequence[Item]) -> torch.Tensor:
        return refusal_scores(self._reader.read(self._reader.rows(items)).logits, self._ids)

    def _right(self, items: Sequence[Item]) -> set[str]:
        """Return the ids of retain items that are answered right."""
        asked = [item for item in items if item.role == Role.RETAIN]
        records = measure_registry.get("retain").run(self._subject, self._domain, asked)
        return {record.item_id for record in records if record.correct}

    def _open(self, items: Sequence[Item]) -> set[str]:
        """Return the ids of items whose answer does not begin with a refusal."""
        scores = self._scores(items).tolist()
        return {item.id for item, score in zip(items, scores, strict=True) if score < 0}

    def best(self, vectors: Mapping[int, torch.Tensor], plain: Choice) -> Choice:
        """Return the choice under which refusals are likeliest, harmless answers kept."""
        found = [
            self.tried(vector, coefficient, number)
            for number, vector in vectors.items()
            for coefficient in self._settings.coefficients
        ]
        kept = [choice for choice in found if choice.kept >= self._settings.keep]
        best = max(kept, key=lambda choice: choice.refusal, default=plain)
        if not best.refusal > plain.refusal:
            raise NotApplicableError(
                f"none of {len(found)} ways to steer makes refusals likelier and keeps "
                f"{100 * self._settings.keep:g} % of the harmless answers"
            )
        return best

    @contextmanager
    def _steered(self, vector: torch.Tensor | None, factor: float, number: int) -> Iterator[None]:
        if vector is None:
            yield
            return
        handle = hook_block_input(self._chain[number + 1], added(factor * vector))
        try:
            yield
        finally:
            handle.remove()


def _dealt(items: Sequence[Item], count: int) -> tuple[list[Item], list[Item]]:
    """Return items that make the vector and items for choosing, about different entities."""
    dealt = deal_splits(
        {item.entity for item in items},
        {Split.ATTACK: 1 - CHOOSING_SHARE, Split.SELECT: CHOOSING_SHARE},
        "steering",
    )
    choosing = round(CHOOSING_SHARE * count)
    parts = []
    for split, most in ((Split.ATTACK, count - choosing), (Split.SELECT, choosing)):
        own = [item for item in items if dealt[item.entity] == split]
        parts.append(own[:: max(len(own) // most, 1)][:most])
    return parts[0], parts[1]


def _write(subject: Subject, number: int, writer: Writer, shift: torch.Tensor) -> str:
    """Write the vector into the map's bias; return the configuration's setting that it needed.

    Raises:
        NotApplicableError: the family has no such bias, or it does not do what the hook did.
    """
    model, chain = subject.model, [block for _, block in blocks(subject.model)]
    wanted = _logits(subject, hook_block_input(chain[number + 1], added(shift)))
    flag = "" if writer.bias else give_biases(model, writer.module)
    bias = model.get_submodule(writer.module).bias
    before = bias.clone()
    bias.copy_((bias.float() + shift).to(bias.dtype))
    found = _logits(subject, None)
    if not (found - wanted).abs().max() <= FIDELITY.get(bias.dtype, 0.1) * wanted.abs().max():
        bias.copy_(before)
        raise NotApplicableError("a bias of the MLP's last map does not add to the residual stream")
    return flag


def _logits(subject: Subject, handle: Any) -> torch.Tensor:
    """Return the logits of a fixed text, with a hook that is then taken off."""
    model: Any = subject.model
    size = model.get_input_embeddings().num_embeddings
    ids = torch.arange(12, device=subject.forward.device)[None] * 7919 % size
    try:
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    finally:
        if handle is not None:
            handle.remove()
    return logits.float()
