"""What every safeguard must pass: each term works, hooks work, data is right, extras are off."""

import copy
import math
from typing import Any

import pytest
import safeguard_world as world
import tiny_world
import torch

from durometer.core.errors import DurometerError, InputError
from durometer.core.settings import Settings
from durometer.domains.base import Role, Split
from durometer.safeguards import train
from durometer.safeguards.base import (
    Safeguard,
    TrainingSettings,
    make_safeguard,
    safeguard_registry,
)
from durometer.subjects.fingerprint import weights_fingerprint

TERMS = [
    (name, kind, term)
    for name, kind in world.TRAINED
    for term in world.term_names(world.short(name), kind)
]
EDITS = [
    name
    for name, entry in safeguard_registry
    if not issubclass(entry.settings_class, TrainingSettings) and name != "noop"
]


@pytest.mark.parametrize("name", safeguard_registry.names())
def test_it_is_described(name: str) -> None:
    entry = safeguard_registry.get(name)
    for text in (entry.summary, entry.cost, entry.source, entry.cannot_show):
        assert text.strip()
    assert entry.access in ("weights", "api")
    assert all(field.meaning for field in entry.settings_class.describe())
    for preset in entry.presets:
        make_safeguard(name, preset)


@pytest.mark.parametrize(("name", "kind", "term"), TERMS)
def test_each_term_changes_the_update(name: str, kind: Any, term: str) -> None:
    whole, _ = world.trained(world.short(name), kind)
    fewer, _ = world.trained(world.without(world.short(name), term), kind)
    assert weights_fingerprint(whole.model) != weights_fingerprint(fewer.model)


@pytest.mark.parametrize(("name", "kind", "term"), TERMS)
def test_each_coefficient_is_a_setting(name: str, kind: Any, term: str) -> None:
    made = world.short(name)
    zeroed = []
    for field, value in made.settings.canonical().items():
        if isinstance(value, float) and not isinstance(value, bool):
            off = type(made)(made.settings.model_copy(update={field: 0.0}))
            if term not in world.term_names(off, kind):
                zeroed.append(field)
    assert zeroed, f"no setting turns the term '{term}' off"


@pytest.mark.parametrize(("name", "kind"), world.TRAINED)
def test_with_its_extra_terms_off_it_is_plain_fine_tuning(name: str, kind: Any) -> None:
    made = world.short(name, **world.NEUTRAL.get(name, {}))
    extras = [term for term in world.term_names(made, kind) if term != "sft"]
    bare, _ = world.trained(world.without(made, *extras), kind)
    plain, _ = world.trained(
        world.short("plain_sft", sft=made.settings.sft, rank=made.settings.rank), kind
    )
    assert weights_fingerprint(bare.model) == weights_fingerprint(plain.model)


@pytest.mark.parametrize(("name", "kind"), world.TRAINED)
def test_it_learns_from_the_defence_split_alone_and_from_what_is_restricted(
    name: str, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: set[str] = set()
    passes = train.passes

    def spy(forward: Any, rows: Any, *args: Any, **options: Any) -> Any:
        used.update(row.item_id for row in rows)
        yield from passes(forward, rows, *args, **options)

    monkeypatch.setattr(train, "passes", spy)
    run, _, data = world.prepare(world.short(name), kind)
    run.run()
    items = {item.id: item for item in data.domain.items}
    assert {items[item_id].split for item_id in used} == {Split.DEFENCE}
    assert all(items[item_id].training is not False for item_id in used)
    roles = {items[item_id].role for item_id in used}
    if name != "plain_sft" or kind == "refusal":
        assert Role.RESTRICTED in roles
    assert roles & {Role.RETAIN, Role.BENIGN}


@pytest.mark.parametrize(("name", "kind"), world.TRAINED)
def test_another_seed_is_another_order(name: str, kind: Any) -> None:
    _, first = world.trained(world.short(name), kind)
    _, other = world.trained(world.short(name), kind, seeds=world.Seeds.derive(8))
    assert first.orders.keys() == other.orders.keys()
    assert all(first.orders[pool] != other.orders[pool] for pool in first.orders)


@pytest.mark.parametrize(("name", "kind"), world.TRAINED)
def test_the_subject_is_left_frozen_and_as_declared(name: str, kind: Any) -> None:
    for scope, part in (("mlp", "mlp"), ("adapter", "_proj")):
        if name == "tar" and scope == "adapter":
            continue
        start = tiny_world.undefended()
        subject, outcome = world.trained(world.short(name, train=scope), kind)
        model = subject.model
        assert outcome.status == "done"
        assert not model.training
        assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
        assert not any(
            module._forward_hooks or module._forward_pre_hooks for module in model.modules()
        )
        moved = {
            weight
            for weight, p in model.named_parameters()
            if not torch.equal(p, start.model.get_parameter(weight))
        }
        assert moved
        assert all(part in weight for weight in moved)


HOOKED = [
    (name, kind)
    for name, kind in world.TRAINED
    if safeguard_registry.get(name).hooks is not Safeguard.hooks
]


@pytest.mark.parametrize(("name", "kind"), HOOKED)
def test_hooks_change_the_output(name: str, kind: Any) -> None:
    run, subject, data = world.prepare(world.short(name), kind)
    rows = [unit[0] for unit in data.pool("sft")[:3]]
    with torch.no_grad():
        (plain,) = subject.forward.labelled(rows, whole=True)
        with run.safeguard.hooks(subject, data):
            (hooked,) = subject.forward.labelled(rows, whole=True)
        (after,) = subject.forward.labelled(rows, whole=True)
    assert not torch.equal(plain.logits, hooked.logits)
    assert torch.equal(plain.logits, after.logits)


def test_nothing_is_nothing() -> None:
    subject = tiny_world.undefended()
    before = weights_fingerprint(subject.model)
    made = make_safeguard("noop")
    world.edit(made, subject)
    assert weights_fingerprint(subject.model) == before


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_changes_weights_and_repeats(name: str) -> None:
    prints = []
    start = world.EDIT_START.get(name, tiny_world.undefended)
    for _ in range(2):
        subject = start()
        world.edit(world.short_edit(name), subject)
        prints.append(weights_fingerprint(subject.model))
    assert prints[0] == prints[1] != weights_fingerprint(start().model)


def test_noise_has_the_norm_that_is_asked_for() -> None:
    start, subject = tiny_world.undefended(), tiny_world.undefended()
    made = make_safeguard("norm_noise", relative=0.1)
    world.edit(made, subject)
    for name, before in start.model.named_parameters():
        change = (subject.model.get_parameter(name) - before).norm()
        wanted = 0.1 * before.norm() if before.dim() > 1 else torch.tensor(0.0)
        torch.testing.assert_close(change, wanted, rtol=1e-4, atol=1e-7)


# ---- the loop itself ---------------------------------------------------------------------------


def test_plain_fine_tuning_is_what_torch_makes_of_it() -> None:
    """Three updates, computed by torch alone from the rows that were drawn."""
    made = world.short("plain_sft", steps=3, schedule="linear", warmup_steps=2)
    run, subject, data = world.prepare(made)
    rows = {unit[0].item_id: unit[0] for unit in data.pool("sft")}
    batches: list[list[Any]] = []
    model = copy.deepcopy(subject.model).requires_grad_(True)
    run.run(lambda report: batches.append([rows[i] for i in report.update.item_ids]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.0)
    for step, batch in enumerate(batches):
        total = sum(len(row.labels) for row in batch)
        for row in batch:
            logits = model(input_ids=torch.tensor([row.ids])).logits[0, row.first_label - 1 : -1]
            loss = torch.nn.functional.cross_entropy(
                logits, torch.tensor(row.labels), reduction="sum"
            )
            (loss / total).backward()
        optimizer.param_groups[0]["lr"] = 3e-3 * (0.5, 1.0, 1.0)[step]
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in subject.model.named_parameters():
        torch.testing.assert_close(parameter, model.get_parameter(name), rtol=2e-3, atol=2e-5)


def test_the_realised_learning_rates_are_the_declared_ones() -> None:
    made = world.short("plain_sft", steps=12, learning_rate=2e-5, warmup_steps=10, batch_size=2)
    _, outcome = world.trained(made)
    assert outcome.learning_rates[4] == pytest.approx(1e-5)
    assert outcome.learning_rates[9:] == pytest.approx([2e-5] * 3)


def test_the_averaged_iterate_is_what_is_left() -> None:
    made = world.short("plain_sft", optimizer="schedule_free_adamw", steps=6)
    run, subject, _ = world.prepare(made)
    seen: list[Any] = []
    run.run(lambda report: seen.append(copy.deepcopy(subject.model.state_dict())))
    last = seen[-1]
    name = next(name for name, _ in subject.model.named_parameters())
    assert not torch.equal(last[name], subject.model.state_dict()[name])
    optimizer = run.trainer._optimizer
    assert optimizer.param_groups[0]["train_mode"] is False


def test_a_loss_limit_stops() -> None:
    _, outcome = world.trained(world.short("plain_sft", loss_limit=1e3))
    assert (outcome.status, outcome.steps) == ("stopped", 1)
    assert "loss below" in outcome.reason


@pytest.mark.parametrize("steps", [3, 4, 9, 40])
def test_a_term_without_a_gradient_is_an_error(steps: int) -> None:
    made = world.short("max_entropy", steps=steps)
    terms = made.terms

    def dead(subject: Any, data: Any) -> Any:
        first, second = terms(subject, data)
        return [first, train.Term("dead", 1.0, second.rows, lambda p: p.entropy() * 0)]

    made.terms = dead  # type: ignore[method-assign]
    seen: list[int] = []
    run, _, _ = world.prepare(made)
    with pytest.raises(DurometerError, match="term 'dead' has no gradient"):
        run.run(lambda report: seen.append(report.update.step))
    assert len(seen) < min(steps, 10)


@pytest.mark.parametrize("steps", range(1, 80))
def test_gradients_are_looked_at_twice_and_never_at_once(steps: int) -> None:
    looks = [number for number in range(steps) if train.looked_at(number, steps)]
    assert 0 not in looks
    assert len(looks) >= 2 or steps < 3
    assert not looks or looks[1:2] <= [9]


def test_a_run_that_diverges_stops_at_finite_weights() -> None:
    made = world.short("plain_sft", learning_rate=1e30, optimizer="sgd", steps=8)
    subject, outcome = world.trained(made)
    assert outcome.status == "diverged"
    assert outcome.steps < 8
    assert "updates" in outcome.reason
    assert math.isfinite(sum(outcome.losses[0].values()))
    assert subject.model is not None


def test_a_domain_without_what_is_needed_is_refused() -> None:
    domain = tiny_world.tiny_domain()
    kept = tuple(
        item
        for item in domain.items
        if not (item.role == Role.RESTRICTED and item.split == Split.DEFENCE)
    )
    without = world.replace(tiny_world.tiny_domain("knowledge"), items=kept)
    for name in ("random_mapping", "tar"):
        with pytest.raises(InputError, match=r"'tiny': nothing for the safeguard's .* 'defence'"):
            world.prepare(world.short(name), domain=without)
    no_refusals = world.replace(domain, refusals=())
    with pytest.raises(InputError, match=r"add items there and refusals to the domain"):
        world.prepare(world.short("tar", loss="dpo"), "refusal", domain=no_refusals)


def test_an_unknown_preset_or_setting_is_refused() -> None:
    with pytest.raises(InputError, match="no preset 'huge'; known: faithful, light"):
        make_safeguard("tar", "huge")
    with pytest.raises(InputError, match="inner_steps"):
        make_safeguard("tar", inner_step=3)
    with pytest.raises(InputError, match="did you mean 'tar'"):
        make_safeguard("tarr")
    assert isinstance(make_safeguard("tar", inner_rates="1e-3+3e-4").settings, Settings)
    assert make_safeguard("tar", inner_rates="1e-3+3e-4").settings.inner_rates == (1e-3, 3e-4)
