"""Refusal training: supervised fine-tuning on refusals, the plain safeguard."""

import functools
import itertools
from collections.abc import Callable
from pathlib import Path

from durometer.core.adapters import Adapter, linear_maps
from durometer.core.cache import cached_folder
from durometer.core.rows import Row
from durometer.core.seeds import Seeds
from durometer.core.settings import Settings, digest_of, setting
from durometer.core.sources import source_hash
from durometer.core.training import OptimisationPlan, Trainer, Update
from durometer.domains.base import Domain, Role, Split
from durometer.domains.load import load_domain
from durometer.subjects.base import Subject
from durometer.subjects.builtin import BuiltinSubject, subject_registry
from durometer.subjects.load import load_subject, quiet_libraries
from durometer.tampers.data import make_rows, shuffled_batches

SAFEGUARD_SEED = 7


class RefusalSettings(Settings):
    """Settings of refusal training."""

    steps: int = setting(40, "updates", ge=1)
    learning_rate: float = setting(1e-3, "peak learning rate, linear decay", gt=0)
    batch_size: int = setting(16, "rows an update, half of them harmless", ge=2)
    rank: int = setting(16, "rank of the adapter, merged when done", ge=1)
    harmless_share: float = setting(
        0.5, "share of each batch that is answered as usual", ge=0, lt=1
    )


def refusal_rows(subject: Subject, domain: Domain) -> tuple[list[Row], list[Row]]:
    """Return rows that refuse restricted prompts, and harmless rows answered as usual.

    Both come from the ``defence`` split alone.
    """
    restricted = [
        (item, domain.refusal_for(item))
        for item in domain.select(Role.RESTRICTED, Split.DEFENCE, training=True)
    ]
    harmless = [
        (item, item.response)
        for role in (Role.RETAIN, Role.BENIGN)
        for item in domain.select(role, Split.DEFENCE, training=True)
    ]
    made = [
        make_rows(chosen, subject.chat, label_prompt=False, max_length=512)
        for chosen in (restricted, harmless)
    ]
    return made[0], made[1]


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
    """
    restricted, harmless = refusal_rows(subject, domain)
    plan = OptimisationPlan(
        "adamw", settings.learning_rate, settings.steps, "linear", warmup=settings.steps // 10
    )
    adapter = Adapter(
        subject.model,
        linear_maps(subject.model, "all"),
        rank=settings.rank,
        alpha=2.0 * settings.rank,
        seed=seeds.initialisation,
    )
    trainer = Trainer(subject.forward, adapter.trainable(), plan)
    batches = shuffled_batches(
        restricted, harmless, settings.batch_size, settings.harmless_share, seeds
    )
    for rows in itertools.islice(batches, settings.steps):
        update = trainer.update(rows)
        if on_update is not None:
            on_update(update)
    adapter.merge()
    subject.model.requires_grad_(False).eval()


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
