"""Refusal training: on the defence split alone, merged, repeatable, made once and cached."""

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import tiny_world
import torch

from durometer.core.adapters import Adapter
from durometer.core.errors import StorageError
from durometer.core.seeds import Seeds
from durometer.core.training import Update
from durometer.domains.base import Role, Split
from durometer.measures.base import measure_registry
from durometer.safeguards import refusal
from durometer.safeguards.refusal import (
    BUILT_IN,
    RefusalSettings,
    refusal_rows,
    safeguarded_folder,
    train_refusal,
)
from durometer.subjects.base import Subject
from durometer.subjects.builtin import subject_registry
from durometer.subjects.fingerprint import weights_fingerprint
from durometer.subjects.load import load_subject

SHORT = RefusalSettings(steps=6, learning_rate=1e-2, rank=4, batch_size=8)
SEEDS = Seeds.derive(7)


def trained(
    settings: RefusalSettings = SHORT, seeds: Seeds = SEEDS
) -> tuple[Subject, list[Update]]:
    subject, updates = tiny_world.undefended(), list[Update]()
    train_refusal(subject, tiny_world.tiny_domain(), settings, seeds, updates.append)
    return subject, updates


def test_it_learns_from_the_defence_split_alone() -> None:
    domain = tiny_world.tiny_domain()
    items = {item.id: item for item in domain.items}
    refused, answered = refusal_rows(tiny_world.undefended(), domain)
    _, updates = trained()
    used = {items[item_id] for update in updates for item_id in update.item_ids}
    assert used <= {items[row.item_id] for row in (*refused, *answered)}
    for rows, roles in ((refused, {Role.RESTRICTED}), (answered, {Role.RETAIN, Role.BENIGN})):
        chosen = [items[row.item_id] for row in rows]
        assert {item.split for item in chosen} == {Split.DEFENCE}
        assert {item.role for item in chosen} == roles
        assert all(item.training is not False for item in chosen)
        # All that there is of it.
        pool = [
            item for role in roles for item in domain.select(role, Split.DEFENCE, training=True)
        ]
        assert {item.id for item in chosen} == {item.id for item in pool}


def test_restricted_prompts_are_refused_and_others_answered_as_usual() -> None:
    subject, domain = tiny_world.undefended(), tiny_world.tiny_domain()
    items = {item.id: item for item in domain.items}
    refused, answered = refusal_rows(subject, domain)
    decode = subject.chat.tokenizer.decode
    assert {decode(row.labels) for row in refused} == {"i refuse . <end>"}
    assert not any(row.restricted for row in (*refused, *answered))
    for row in answered:
        assert decode(row.labels) == f"{items[row.item_id].response} <end>"


@pytest.mark.parametrize(("share", "harmless"), [(0.5, 4), (0.25, 2), (0.75, 6), (0.0, 0)])
def test_each_batch_holds_the_harmless_share(share: float, harmless: int) -> None:
    _, updates = trained(SHORT.model_copy(update={"harmless_share": share, "steps": 3}))
    for update in updates:
        assert len(update.item_ids) == 8
        assert sum(not item.startswith("restricted/") for item in update.item_ids) == harmless


def test_the_loss_falls_along_the_declared_schedule() -> None:
    settings = tiny_world.REFUSING
    _, updates = trained(settings)
    assert [update.step for update in updates] == list(range(1, settings.steps + 1))
    assert updates[-1].loss < 0.1 * updates[0].loss
    rates = [update.learning_rate for update in updates]
    peak = rates.index(max(rates))
    assert rates[peak] == pytest.approx(settings.learning_rate)
    assert peak <= settings.steps // 10
    assert all(
        after < before for before, after in zip(rates[peak + 1 :], rates[peak + 2 :], strict=False)
    )
    assert rates[-1] < 0.1 * rates[peak]


def test_the_adapter_is_merged_and_the_subject_is_as_it_was_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start, unmerged = tiny_world.undefended(), list[torch.Tensor]()
    names = [name for name, _ in start.model.named_parameters()]
    ids = torch.tensor([start.chat.prompt_ids("what is the metal of e30 ?")])
    merge = Adapter.merge

    def spy(self: Adapter) -> None:
        self._model.eval()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            unmerged.append(self._model(input_ids=ids).logits)
        merge(self)

    monkeypatch.setattr(Adapter, "merge", spy)
    subject, _ = trained()
    assert [name for name, _ in subject.model.named_parameters()] == names
    assert not any(p.requires_grad or p.grad is not None for p in subject.model.parameters())
    assert not subject.model.training
    assert not hasattr(subject.model, "peft_config")
    with torch.no_grad():
        torch.testing.assert_close(
            subject.model(input_ids=ids).logits, unmerged[0], atol=1e-4, rtol=0
        )
    moved = {
        name
        for name, p in subject.model.named_parameters()
        if not torch.equal(p, start.model.get_parameter(name))
    }
    assert moved == {name for name in names if "_proj" in name}


def test_after_it_the_subject_refuses_what_it_never_saw_and_nothing_else() -> None:
    subject, domain = tiny_world.safeguarded(), tiny_world.tiny_domain()
    restricted = domain.select(Role.RESTRICTED, Split.REPORT, training=False)
    answers = measure_registry.get("outcomes").run(subject, domain, restricted)
    assert sum(answer.outcome == "refusal" for answer in answers) >= 0.9 * len(answers)
    benign = domain.select(Role.BENIGN, Split.REPORT)
    over = measure_registry.get("over_refusal").run(subject, domain, benign)
    assert not any(answer.outcome == "refusal" for answer in over)
    retain = domain.select(Role.RETAIN, Split.REPORT, training=False)
    kept = measure_registry.get("retain").run(subject, domain, retain)
    assert sum(answer.correct or 0.0 for answer in kept) >= 0.85 * len(kept)


def test_same_seeds_same_weights() -> None:
    first, losses = trained()
    again, same = trained()
    assert weights_fingerprint(first.model) == weights_fingerprint(again.model)
    assert [update.loss for update in losses] == [update.loss for update in same]
    other, _ = trained(seeds=Seeds.derive(8))
    assert weights_fingerprint(other.model) != weights_fingerprint(first.model)


def test_the_updates_are_told_and_need_not_be() -> None:
    silent = tiny_world.undefended()
    train_refusal(silent, tiny_world.tiny_domain(), SHORT, SEEDS)
    assert weights_fingerprint(silent.model) == weights_fingerprint(trained()[0].model)


# Made once, cached


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The folder of a base model; the domain is that of the tests; the cache is empty."""
    subject = tiny_world.undefended()
    folder = tmp_path / "base"
    subject.model.save_pretrained(folder)
    subject.chat.tokenizer.save_pretrained(folder)
    monkeypatch.setenv("DUROMETER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(refusal, "load_domain", lambda name: tiny_world.tiny_domain())
    monkeypatch.setattr(refusal, "cached_folder", cached_under_base_name)
    return str(folder)


def cached_under_base_name(name: str, digest: str, build: Any) -> Path:
    from durometer.core.cache import cached_folder

    return cached_folder(Path(name).name, digest, build)


def test_it_is_trained_on_first_use_only(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    updates = list[Update]()
    folder = safeguarded_folder(base, "tiny", SHORT, updates.append)
    assert len(updates) == SHORT.steps
    assert folder.parent.name == "cache"
    written = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}

    def never(*args: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(refusal, "train_refusal", never)
    assert safeguarded_folder(base, "tiny", SHORT) == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == written
    loaded = load_subject(str(folder))
    assert loaded.fingerprint == weights_fingerprint(trained()[0].model)
    assert loaded.chat.prompt_text("x") == tiny_world.undefended().chat.prompt_text("x")


def test_another_recipe_is_another_folder(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {safeguarded_folder(base, "tiny", SHORT)}

    def add() -> None:
        folder = safeguarded_folder(base, "tiny", SHORT)
        assert folder not in found
        found.add(folder)

    found.add(safeguarded_folder(base, "tiny", SHORT.model_copy(update={"steps": 2})))
    assert len(found) == 2
    with monkeypatch.context() as patch:
        patch.setattr(refusal, "source_hash", lambda *rooms: "other code")
        add()
    with monkeypatch.context() as patch:
        patch.setattr(refusal, "SAFEGUARD_SEED", 8)
        add()
    domain = copy.copy(tiny_world.tiny_domain())
    object.__setattr__(domain, "refusals", ("i refuse now .",))
    with monkeypatch.context() as patch:
        patch.setattr(refusal, "load_domain", lambda name: domain)
        add()


def test_training_that_fails_leaves_no_folder(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(refusal, "train_refusal", fail)
    with pytest.raises(StorageError, match="No space left"):
        safeguarded_folder(base, "tiny", SHORT)
    assert list((Path(base).parent / "cache").iterdir()) == []


def test_built_in_safeguards_are_registered_with_their_controls() -> None:
    for name, domain, settings in BUILT_IN:
        entry = subject_registry.get(f"{name}-refusal")
        assert (entry.domain, entry.undefended) == (domain, name)
        assert entry.reference == f"{name}-refusal"
        assert isinstance(entry.folder, functools.partial)
        assert entry.folder.args == (name, domain, settings)
