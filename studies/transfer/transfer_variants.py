"""The safeguarded variants of one base model, trained on first use and kept in the cache."""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from durometer.core.cache import cached_folder
from durometer.core.seeds import Seeds
from durometer.core.settings import digest_of
from durometer.core.sources import source_hash
from durometer.core.training import OptimisationPlan, Trainer
from durometer.domains.base import Domain
from durometer.domains.load import load_domain
from durometer.safeguards.refusal import (
    BUILT_IN,
    SAFEGUARD_SEED,
    RefusalSettings,
    refusal_rows,
    safeguarded_folder,
    train_refusal,
)
from durometer.subjects.base import Subject
from durometer.subjects.load import load_subject, quiet_libraries
from durometer.tampers.data import shuffled_batches


@dataclass(frozen=True)
class Variant:
    """One safeguarded model of the lineage.

    Attributes:
        name: as in tables and file names.
        difference: what sets it apart from the built-in recipe.
        full: all weights are trained instead of an adapter; the rank is then not used.
    """

    name: str
    difference: str
    settings: RefusalSettings
    seed: int = SAFEGUARD_SEED
    full: bool = False


def train_full(subject: Subject, domain: Domain, settings: RefusalSettings, seeds: Seeds) -> None:
    """Train all weights of ``subject`` in place on the rows and batches of refusal training."""
    restricted, harmless = refusal_rows(subject, domain)
    plan = OptimisationPlan(
        "adamw", settings.learning_rate, settings.steps, "linear", warmup=settings.steps // 10
    )
    parameters = list(subject.model.requires_grad_(True).parameters())
    trainer = Trainer(subject.forward, parameters, plan)
    batches = shuffled_batches(
        restricted, harmless, settings.batch_size, settings.harmless_share, seeds
    )
    for rows in itertools.islice(batches, settings.steps):
        trainer.update(rows)
    subject.model.requires_grad_(False).eval()


def variant_folder(base: str, domain_name: str, variant: Variant) -> Path:
    """Return the folder of ``base`` with the safeguard of ``variant``, trained on first use."""
    if variant.seed == SAFEGUARD_SEED and not variant.full:
        return safeguarded_folder(base, domain_name, variant.settings)
    domain, subject = load_domain(domain_name), load_subject(base)
    seeds = Seeds.derive(variant.seed)
    train = train_full if variant.full else train_refusal

    def build(folder: Path) -> None:
        train(subject, domain, variant.settings, seeds)
        with quiet_libraries():
            subject.model.save_pretrained(folder)
            subject.chat.tokenizer.save_pretrained(folder)

    recipe = [
        subject.subject_fingerprint,
        domain.content_hash,
        variant.settings.canonical(),
        seeds.as_dict(),
        variant.full,
        subject.dtype,
        source_hash("core", "tampers", "safeguards"),
    ]
    return cached_folder(f"{base}-transfer-{variant.name}", digest_of(recipe), build)


def variants(base: str) -> tuple[Variant, ...]:
    """Return the variants of ``base``; the first is its built-in safeguard."""
    recipe = next(settings for name, _, settings in BUILT_IN if name == base)
    rate, steps = recipe.learning_rate, recipe.steps

    def changed(**changes: Any) -> RefusalSettings:
        return recipe.model_copy(update=changes)

    return (
        Variant("recipe", "the built-in recipe", recipe),
        Variant("seed", "another seed", recipe, seed=SAFEGUARD_SEED + 1),
        Variant(
            "settings",
            "rank 4 instead of 16, half the learning rate, half as many updates again, three "
            "quarters harmless rows instead of half",
            changed(rank=4, learning_rate=rate / 2, steps=steps * 3 // 2, harmless_share=0.75),
        ),
        Variant(
            "full",
            "all weights trained instead of an adapter, a twentieth of the learning rate",
            changed(learning_rate=rate / 20),
            full=True,
        ),
    )
