"""ReFAT: refusals learnt while the refusal direction is taken out of the residual stream."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, Literal

import torch

from durometer.core.budget import Spent
from durometer.core.rows import Row
from durometer.core.settings import Levels, setting
from durometer.core.structure import blocks
from durometer.core.writers import Edit, hook_block_input, orthonormal, take_out
from durometer.domains.base import Item
from durometer.safeguards.activations import rows_apart
from durometer.safeguards.base import (
    Safeguard,
    Scope,
    Term,
    TrainingSettings,
    Visit,
    safeguard,
    supervised,
)
from durometer.safeguards.data import DefenceData
from durometer.safeguards.train import Step
from durometer.subjects.base import Subject
from durometer.tampers.directions import PromptReader

ABLATED, MEANS = "ablated", "means"


class RefatSettings(TrainingSettings):
    """Settings of ``refat``."""

    steps: int = setting(1000, "updates", ge=1)
    learning_rate: float = setting(2e-5, "peak learning rate", gt=0)
    batch_size: int = setting(32, "rows of each pool an update", ge=1)
    train: Scope = setting("adapter", "trained weights, see plain_sft")
    rank: int = setting(128, "rank of the adapter", ge=1)
    ablated: float = setting(
        1.0, "coefficient of the cross-entropy of refusals, some without the direction", ge=0
    )
    rate: float = setting(
        0.5,
        "share of what ``grain`` names from which the direction is taken out",
        search=Levels((0.05, 0.25, 0.5, 1.0)),
        gt=0,
        le=1,
    )
    grain: Literal["row", "token"] = setting(
        "row", "drawn once for a row (ReFAT), or once for a token (as DeepRefusal), for all blocks"
    )
    above: float = setting(
        0.25, "share of the blocks, from below, that keep the direction", ge=0, lt=1
    )
    refresh: int = setting(4, "updates between two looks for the direction", ge=1)
    prompts: int = setting(32, "prompts of each kind for one look", ge=2)


@safeguard("refat", aliases=("refusal_feature_adversarial_training",))
class Refat(Safeguard[RefatSettings]):
    """Refusal training in which part of the refused rows must do without the refusal direction.

    At the input of every block of the upper part the direction of that place, the mean over
    restricted prompts minus that over harmless ones at the last prompt token, is projected out at
    all tokens that were drawn. One draw holds for all blocks: drawing anew for each, as released
    code for tokens does, multiplies the rates.
    """

    summary = "learn refusals while the refusal direction is taken out of some rows"
    cost = "2 passes a step and some forwards of prompts"
    source = "arXiv 2409.20089; tokens as in arXiv 2509.15202 (YuanBoXie/DeepRefusal)"
    cannot_show = "resistance to fine-tuning, or to several directions at once (2511.08379)"
    kinds = ("refusal",)
    settings_class = RefatSettings
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny": {
            "steps": 120,
            "learning_rate": 2e-3,
            "schedule": "linear",
            "warmup_steps": 12,
            "batch_size": 16,
            "rank": 16,
            "harmless_share": 0.7,
        }
    }

    def __init__(self, settings: RefatSettings) -> None:
        super().__init__(settings)
        # One unit direction a place, shape [places, width].
        self._directions = torch.empty(0)
        # Draws that fired, and draws.
        self._fired = torch.zeros(2, dtype=torch.long)

    def terms(self, subject: Subject, data: DefenceData) -> list[Term]:
        """Return the supervised loss, and that of refusals with the direction taken out."""
        ablated = self.settings.ablated
        return [
            supervised(self.settings),
            Term(ABLATED, ablated, "refusals", lambda p: p.cross_entropy(), at=ABLATED, whole=True),
        ]

    def visits(self, step: Step) -> Iterator[Visit]:
        """Yield the weights, then the same with the direction taken out of some rows."""
        yield Visit()
        if not self.settings.ablated:
            return
        if step.number % self.settings.refresh == 0:
            self._directions = self._found(step)
        rows = step.rows("refusals")
        fires = fired(rows, self.settings.rate, self.settings.grain, step.random(ABLATED))
        self._fired += counted(rows, fires, self.settings.grain)
        places = upper(step.subject, self.settings.above)
        with rows_apart(step.subject), taken_out(step.subject, places, self._directions, fires):
            yield Visit(ABLATED)

    def _found(self, step: Step) -> torch.Tensor:
        """Return the direction at each place from prompts of this step's own draw."""
        restricted, harmless = (
            self._prompts(items, step, name)
            for name, items in (
                ("restricted", step.data.restricted_items()),
                ("harmless", step.data.harmless_items()),
            )
        )
        spent = Spent()
        reader = PromptReader(step.subject, spent, 1)
        places = upper(step.subject, self.settings.above)
        means = [reader.read(reader.rows(items), places).hidden for items in (restricted, harmless)]
        step.attacks.ledger.count(MEANS, spent.tokens)
        differences = [means[0][p].mean((0, 1)) - means[1][p].mean((0, 1)) for p in places]
        return torch.stack([orthonormal(d)[:, 0] for d in differences])

    def _prompts(self, items: Sequence[Item], step: Step, name: str) -> list[Item]:
        order = torch.randperm(len(items), generator=step.random(name)).tolist()
        return [items[index] for index in order[: self.settings.prompts]]

    def state(self) -> Mapping[str, torch.Tensor]:
        """Return the directions and the counts, which later steps go on with."""
        return {"directions": self._directions, "fired": self._fired}

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Go on with them."""
        self._directions, self._fired = tensors["directions"], tensors["fired"]

    def facts(self) -> dict[str, Any]:
        """Return the declared rate and the measured one."""
        hits, draws = self._fired.tolist()
        return {"rate": {"declared": self.settings.rate, "measured": hits / draws if draws else 0}}


def upper(subject: Subject, above: float) -> list[int]:
    """Return the blocks at whose input the direction is taken out."""
    count = len(blocks(subject.model))
    return list(range(min(int(above * count), count - 1), count))


def fired(rows: Sequence[Row], rate: float, grain: str, generator: torch.Generator) -> torch.Tensor:
    """Return where the direction is taken out, shape [rows, longest row], bool."""
    longest = max(len(row.ids) for row in rows)
    shape = (len(rows), longest if grain == "token" else 1)
    drawn = torch.rand(shape, generator=generator) < rate
    return drawn.expand(len(rows), longest)


def counted(rows: Sequence[Row], fires: torch.Tensor, grain: str) -> torch.Tensor:
    """Return how often it fires and how many draws there are, shape [2].

    Padding, which nothing reads, counts as no draw.
    """
    lengths = [len(row.ids) - 1 if grain == "token" else 1 for row in rows]
    drawn = [fires[index, :length] for index, length in enumerate(lengths)]
    return torch.tensor([sum(int(d.sum()) for d in drawn), sum(lengths)])


@contextmanager
def taken_out(
    subject: Subject, places: Sequence[int], directions: torch.Tensor, fires: torch.Tensor
) -> Iterator[None]:
    """Project a direction out of the input of each place where ``fires``, inside.

    Args:
        places: which blocks.
        directions: a unit vector a place, shape [places, width].
        fires: shape [rows, length], bool; inside ``rows_apart``, all rows in one pass.
    """
    chain = [block for _, block in blocks(subject.model)]
    where = fires.to(subject.forward.device)[..., None]

    def edit(direction: torch.Tensor) -> Edit:
        basis = direction[:, None]
        return lambda states: torch.where(where, take_out(states, basis, 1.0), states)

    with ExitStack() as stack:
        for place, direction in zip(places, directions, strict=True):
            stack.callback(hook_block_input(chain[place], edit(direction)).remove)
        yield
