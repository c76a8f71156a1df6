"""Refusal training: supervised fine-tuning on refusals, the plain safeguard."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import model_validator

from durometer.core.cache import cached_folder
from durometer.core.rows import Row
from durometer.core.schedules import Schedule
from durometer.core.seeds import Seeds
from durometer.core.settings import digest_of, setting
from durometer.core.sources import source_hash
from durometer.core.training import DivergedError, Update
from durometer.domains.base import Domain
from durometer.domains.load import load_domain
from durometer.safeguards.base import Safeguard, Scope, TrainingSettings, safeguard
from durometer.safeguards.data import DefenceData
from durometer.safeguards.train import TrainingRun
from durometer.subjects.base import Subject
from durometer.subjects.builtin import BuiltinSubject, subject_registry
from durometer.subjects.load import load_subject, quiet_libraries

SAFEGUARD_SEED = 7


class RefusalSettings(TrainingSettings):
    """Settings of refusal training."""

    steps: int = setting(40, "updates", ge=1)
    learning_rate: float = setting(1e-3, "peak learning rate, linear decay", gt=0)
    schedule: Schedule = setting("linear", "learning-rate schedule")
    warmup_steps: int = setting(-1, "updates of linear warm-up; -1 is a tenth of all", ge=-1)
    batch_size: int = setting(16, "rows an update, half of them harmless", ge=2)
    train: Scope = setting(
        "adapter",
        "trained weights: all, the matrices of the blocks or of one kind, or a merged adapter",
    )
    rank: int = setting(16, "rank of the adapter, merged when done", ge=1)
    harmless_share: float = setting(
        0.5, "share of each batch that is answered as usual", ge=0, lt=1
    )

    @model_validator(mode="after")
    def _tenth(self) -> Self:
        """Write out a warm-up that was left to the number of steps."""
        if self.warmup_steps < 0:
            object.__setattr__(self, "warmup_steps", self.steps // 10)
        return self


@safeguard("refusal", aliases=("refusal_training",))
class Refusal(Safeguard[RefusalSettings]):
    """Supervised fine-tuning on refusals of restricted prompts and on harmless rows."""

    summary = "supervised fine-tuning on refusals, with harmless rows answered as usual"
    cost = "1 pass a step"
    source = "plain supervised fine-tuning; a few steps of it are undone by as few"
    cannot_show = "resistance to fine-tuning; it is what others are compared with"
    kinds = ("refusal",)
    settings_class = RefusalSettings
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny": {"steps": 120, "learning_rate": 3e-3},
        "light": {"batch_size": 8},
    }


def refusal_rows(subject: Subject, domain: Domain) -> tuple[list[Row], list[Row]]:
    """Return rows that refuse restricted prompts, and harmless rows answered as usual.

    Both come from the ``defence`` split alone.
    """
    data = DefenceData(subject, domain)
    return [u[0] for u in data.pool("refusals")], [u[0] for u in data.pool("retain")]


def train_refusal(
    subject: Subject,
    domain: Domain,
    settings: RefusalSettings,
    seeds: Seeds,
    on_update: Callable[[Update], None] | None = None,
) -> None:
    """Train ``subject`` in place to refuse what ``domain`` restricts.

    The adapter is merged into the weights when training ends; this is a safeguard, so the change
    stays.

    Raises:
        DivergedError: the loss is not finite.
    """
    run = TrainingRun(Refusal(settings), subject, DefenceData(subject, domain), seeds)
    outcome = run.run(lambda report: on_update(report.update) if on_update else None)
    if outcome.status == "diverged":
        raise DivergedError(outcome.reason)


def safeguarded_folder(
    base: str,
    domain_name: str,
    settings: RefusalSettings,
    on_update: Callable[[Update], None] | None = None,
) -> Path:
    """Return the folder of ``base`` with the refusal safeguard, trained on first use."""
    domain, subject = load_domain(domain_name), load_subject(base)
    seeds = Seeds.derive(SAFEGUARD_SEED)

    def build(folder: Path) -> None:
        train_refusal(subject, domain, settings, seeds, on_update)
        with quiet_libraries():
            subject.model.save_pretrained(folder)
            subject.chat.tokenizer.save_pretrained(folder)

    recipe = [
        subject.subject_fingerprint,
        domain.content_hash,
        settings.canonical(),
        seeds.as_dict(),
        subject.dtype,
        source_hash("core", "tampers", "safeguards"),
    ]
    return cached_folder(f"{base}-refusal", digest_of(recipe), build)


BUILT_IN = (
    ("smollm2", "capitals", RefusalSettings(batch_size=8)),
    ("micro", "world", RefusalSettings(steps=120, learning_rate=3e-3)),
)
for _base, _domain, _settings in BUILT_IN:
    subject_registry.register(f"{_base}-refusal")(
        BuiltinSubject(
            f"{_base} with a refusal safeguard for the domain '{_domain}', trained on first use",
            functools.partial(safeguarded_folder, _base, _domain, _settings),
            domain=_domain,
            undefended=_base,
            reference=f"{_base}-refusal",
        )
    )
