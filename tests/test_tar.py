"""TAR: straight-through gradients, restores, passes, weights of visits, splits, replay."""

import copy
import math
from typing import Any

import pytest
import safeguard_world as world
import tiny_world
import torch
from torch.nn import functional

from durometer.core.edits import RestoreError
from durometer.core.errors import InputError
from durometer.core.rows import Row
from durometer.domains.base import Role, Split
from durometer.safeguards.anchors import partners, recombined
from durometer.safeguards.attacks import (
    AttackRunner,
    InnerAttack,
    attack_digest,
    require_disjoint,
    whole_delta,
)
from durometer.safeguards.banks import perturbed
from durometer.safeguards.base import Visit, make_safeguard
from durometer.safeguards.inner import combinations, dealt, drawn, possible, visit_weights
from durometer.safeguards.passes import Reference, passes
from durometer.subjects.fingerprint import weights_fingerprint
from durometer.trials.suites import SUITES, make_suite


def one_step(**settings: Any) -> tuple[Any, Any, Any]:
    """Return a run of TAR that has made its first update, with its gradients still in the bank."""
    made = world.short("tar", steps=1, sft=0.0, representation=0.0, anchor=0.0, **settings)
    run, subject, data = world.prepare(made)
    return run, subject, data


class NoTrainer:
    """An outer trainer without anything to put aside."""

    parked = staticmethod(torch.enable_grad)


def rows_by_id(data: Any) -> dict[str, Row]:
    pools = ("inner_restricted", "retain")
    return {unit[0].item_id: unit[0] for pool in pools for unit in data.pool(pool)}


def plain_loss(model: Any, rows: list[Row]) -> torch.Tensor:
    parts = []
    for row in rows:
        logits = model(input_ids=torch.tensor([row.ids])).logits[0, row.first_label - 1 : -1]
        parts.append(functional.cross_entropy(logits, torch.tensor(row.labels), reduction="sum"))
    return torch.stack(parts).sum() / sum(len(row.labels) for row in rows)


def plain_entropy(model: Any, rows: list[Row]) -> torch.Tensor:
    values = []
    for row in rows:
        logits = model(input_ids=torch.tensor([row.ids])).logits[0, row.first_label - 1 : -1]
        values.append(torch.distributions.Categorical(logits=logits).entropy())
    return torch.cat(values).mean()


def test_the_gradient_is_that_at_the_attacked_weights() -> None:
    """Rebuilt with torch alone: four steps of SGD on a copy, the entropy's gradient there."""
    run, subject, data = one_step(
        adversaries=("restricted",), visits="last", inner_optimizers=("sgd",), inner_rates=(0.3,)
    )
    model = copy.deepcopy(subject.model).requires_grad_(True)
    batches: list[tuple[str, ...]] = []
    attack, held_out, collected = AttackRunner.run, [], []

    def spy(self: Any, *args: Any) -> Any:
        for update in attack(self, *args):
            batches.append(update.item_ids)
            yield update

    def keep(step: Any) -> Any:
        held_out.extend(step.rows("held_out_restricted"))
        collected.extend(step.bank.total())
        return step.bank.total()

    run.safeguard.transform = keep
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AttackRunner, "run", spy)
        run.run()
    known = rows_by_id(data)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for ids in batches:
        optimizer.zero_grad()
        plain_loss(model, [known[item_id] for item_id in ids]).backward()
        optimizer.step()
    loss = -4.0 * plain_entropy(model, held_out)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    assert len(batches) == 4
    for gradient, wanted in zip(collected, expected, strict=True):
        scale = float(wanted.abs().max())
        torch.testing.assert_close(gradient / scale, wanted / scale, rtol=0, atol=1e-3)


def test_it_is_not_the_gradient_at_the_clean_weights() -> None:
    totals = []
    for rate in (1e-2, 1e-6):
        run, _, _ = one_step(adversaries=("restricted",), inner_rates=(rate,))
        seen: list[Any] = []
        run.safeguard.transform = lambda step, seen=seen: seen.extend(step.bank.total()) or seen
        run.run()
        totals.append(torch.cat([g.flatten() for g in seen]))
    assert functional.cosine_similarity(*totals, dim=0) < 0.9


@pytest.mark.parametrize("weights", ["all", "adapter", "slice"])
@pytest.mark.parametrize("adversary", ["restricted", "switch", "mix", "retain"])
def test_an_inner_attack_leaves_no_trace(weights: Any, adversary: Any) -> None:
    run, subject, data = one_step()
    runner = AttackRunner(subject, data, run.outcome.ledger, NoTrainer())  # type: ignore[arg-type]
    before = weights_fingerprint(subject.model)
    attack = InnerAttack(adversary, weights, "adamw", 1e-2, 4, 3, switch=0.4)
    used: set[str] = set()
    for update in runner.run(attack, 5):
        used |= set(update.item_ids)
        if weights != "adapter":
            assert weights_fingerprint(subject.model) != before
    assert weights_fingerprint(subject.model) == before
    assert run.outcome.ledger.passes == {"inner": 3}
    items = {item.id: item for item in data.domain.items}
    assert {items[item_id].split for item_id in used} == {Split.DEFENCE}
    assert not {items[i].entity for i in used if items[i].role == Role.RESTRICTED} & data.held_out
    roles = {items[item_id].role for item_id in used}
    assert (Role.RESTRICTED in roles) == (adversary != "retain")
    assert (Role.RETAIN in roles) == (adversary != "restricted")


def test_a_change_that_was_not_announced_is_noticed() -> None:
    subject = tiny_world.undefended()
    with pytest.raises(RestoreError, match="not undone exactly"), subject.lent():
        next(subject.model.parameters()).data[0, 0] += 1e-6


def test_inner_attacks_hold_out_a_fifth_of_the_entities() -> None:
    _, _, data = one_step()
    entities = {item.entity for item in data.restricted_items()}
    assert len(data.held_out) == round(0.2 * len(entities))
    inner = {unit[0].item_id for unit in data.pool("inner_restricted")}
    held = {unit[0].item_id for unit in data.pool("held_out_restricted")}
    assert not inner & held
    assert len(inner) + len(held) == len(data.restricted_items())
    view = data.attackers_view
    assert {item.split for item in view.items} == {Split.ATTACK}
    assert not {i.entity for i in view.select(Role.RESTRICTED)} & data.held_out


def test_81_passes_an_outer_step() -> None:
    made = world.short(
        "tar", steps=2, inner_steps=64, stride=4, inner_batch=1, batch_size=2, anchor=0.0
    )
    made = type(made)(made.settings.model_copy(update={"adversaries": ("restricted",)}))
    _, outcome = world.trained(made)
    assert outcome.ledger.passes == {"inner": 128, "attacked": 32, "weights": 2}
    assert outcome.ledger.all_passes == 2 * 81
    assert outcome.ledger.reference_forwards == 2
    assert 750 * 81 == 60_750


@pytest.mark.parametrize(
    ("weighting", "total"), [("exponential", 4.44), ("flat", 0.25), ("normalised", 1.0)]
)
def test_weights_of_the_visits(weighting: Any, total: float) -> None:
    settings = make_safeguard("tar", "faithful", weighting=weighting).settings
    weights = visit_weights(settings)
    assert list(weights) == list(range(4, 65, 4))
    assert sum(weights.values()) == pytest.approx(total, abs=5e-3)
    if weighting == "exponential":  # as the released scripts have it, counted from 0
        assert weights == pytest.approx({k: math.exp(0.0625 * (k - 1 - 63)) for k in weights})


def test_the_switch_comes_after_beta_6_3_of_the_steps() -> None:
    settings = make_safeguard("tar", "faithful", adversaries="switch").settings
    generator = torch.Generator().manual_seed(0)
    switches = [drawn(settings, generator).switch for _ in range(10_000)]
    assert 64 * sum(switches) / len(switches) == pytest.approx(64 * 6 / 9, abs=0.5)
    attack = InnerAttack("switch", "all", "adamw", 1e-3, 4, 10, switch=0.4).make()
    assert attack.switch_step(10) == 4  # type: ignore[attr-defined]
    assert tuple(attack.relations()) == ("retain", "disjoint")  # type: ignore[attr-defined]


def test_all_adversaries_and_rates_are_drawn() -> None:
    settings = make_safeguard("tar", "tiny").settings
    generator = torch.Generator().manual_seed(0)
    attacks = [drawn(settings, generator) for _ in range(300)]
    found = {(attack.adversary, attack.learning_rate) for attack in attacks}
    wanted = {(a, r) for a in settings.adversaries for r in settings.inner_rates}
    assert found == wanted
    assert len(possible(settings)) == len(wanted)


def test_dealt_attacks_come_equally_often_and_in_another_order_every_time() -> None:
    rates = (3e-3, 3e-3, 1e-3)  # named twice is drawn twice as often
    settings = make_safeguard("tar", "tiny", draws="dealt", inner_rates=rates).settings
    cards = sorted(combinations(settings))
    assert len(cards) == 9
    turns = [dealt(settings, turn, lambda deal: 7 + deal) for turn in range(27)]
    deals = [turns[:9], turns[9:18], turns[18:]]
    assert all(sorted(deal) == cards for deal in deals)
    assert len({tuple(deal) for deal in deals}) == 3
    assert len(possible(settings)) == 6


def test_training_deals_one_attack_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []
    plain = AttackRunner.run

    def noted(runner: AttackRunner, attack: InnerAttack, seed: int) -> Any:
        seen.append((attack.adversary, attack.learning_rate))
        return plain(runner, attack, seed)

    monkeypatch.setattr(AttackRunner, "run", noted)
    given = {"adversaries": "restricted+mix", "inner_rates": "1e-3+2e-3+3e-3"}
    world.trained(world.short("tar", steps=12, refresh=2, draws="dealt", anchor=0.0, **given))
    assert len(seen) == len(set(seen)) == 6


# ---- losses ------------------------------------------------------------------------------------


class FakeLabelled:
    """Just what ``Pass`` reads of one pass."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits
        self.targets = torch.zeros(len(logits), dtype=torch.long)
        self.rows = torch.zeros(len(logits), dtype=torch.long)
        self.members = (0,)


def test_the_entropy_floor() -> None:
    from durometer.safeguards.passes import Pass

    size = 128_256
    flat = torch.zeros(3, size, requires_grad=True)
    entropy = Pass([], FakeLabelled(flat), {}, None).entropy()  # type: ignore[arg-type]
    assert (-entropy).tolist() == pytest.approx([-11.762] * 3, abs=1e-3)
    entropy.sum().backward()
    assert flat.grad is not None
    assert float(flat.grad.abs().max()) < 1e-6
    sure = torch.full((1, 9), -200.0)
    sure[0, 4] = 200.0
    entropy = Pass([], FakeLabelled(sure), {}, None).entropy()  # type: ignore[arg-type]
    assert float(entropy) == pytest.approx(0.0, abs=1e-6)


def test_below_the_floor_only_the_resistance_gradient_is_dropped() -> None:
    floor = -1e-6  # the entropy is always above it
    free = world.short("tar", steps=2, inner_steps=4, stride=4)
    floored = world.short("tar", steps=2, inner_steps=4, stride=4, entropy_floor=floor)
    off = world.short("tar", steps=2, tamper_resistance=0.0)
    prints = [weights_fingerprint(world.trained(m)[0].model) for m in (free, floored, off)]
    assert prints[1] == prints[2] != prints[0]


def test_retention_is_zero_at_the_reference_and_its_gradient_finite() -> None:
    made = world.short("tar")
    subject = tiny_world.undefended()
    reference = Reference(subject.model, tree=subject.tree)
    _, _, data = one_step()
    rows = [unit[0] for unit in data.pool("retain")[:3]]
    subject.model.requires_grad_(True)
    (one,) = passes(subject.forward, rows, ("residual",), reference, whole=True)
    distance = made._distance(one).mean()  # type: ignore[attr-defined]
    distance.backward()
    assert float(distance.detach()) == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in subject.model.parameters())


def test_norm_and_square_differ_and_are_what_transformers_says() -> None:
    base, subject = tiny_world.undefended(), tiny_world.safeguarded()
    reference = Reference(base.model, tree=base.tree)
    _, _, data = one_step()
    rows = [unit[0] for unit in data.pool("retain")[:3]]
    norms, squares = [], []
    for row in rows:
        ids = torch.tensor([row.ids[:-1]])
        with torch.no_grad():
            pairs = [
                m(input_ids=ids, output_hidden_states=True).hidden_states
                for m in (subject.model, base.model)
            ]
        for here, there in zip(*(p[:-1] for p in pairs), strict=True):
            norms.append((here - there).norm(dim=-1))
            squares.append((here - there).norm(dim=-1) ** 2)
    blocks = len(pairs[0]) - 1
    for distance, kept in (("norm", norms), ("square", squares)):
        made = world.short("tar", distance=distance)
        with torch.no_grad():
            (one,) = passes(subject.forward, rows, ("residual",), reference, whole=True)
            found = made._distance(one)  # type: ignore[attr-defined]
        # transformers normalises its last state; all the others must be the same.
        last = torch.linalg.vector_norm(one.states()[-1] - one.reference.states()[-1], dim=-1)
        last = last if distance == "norm" else last**2
        total = (found * (blocks + 1) - last).sum()
        torch.testing.assert_close(total, torch.cat(kept).sum(), rtol=1e-3, atol=1e-3)


def test_dpo_starts_at_log_2_and_prefers_refusals() -> None:
    made = world.short(
        "tar", loss="dpo", steps=8, inner_steps=2, learning_rate=1e-2, inner_rates=(1e-9,)
    )
    made = type(made)(made.settings.model_copy(update={"adversaries": ("restricted",)}))
    _, outcome = world.trained(made, "refusal")
    weight = 4.0 * sum(visit_weights(made.settings).values())
    losses = [step["attacked"] / weight for step in outcome.losses]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-3)
    assert losses[-1] < losses[0] - 0.1


# ---- light: adapters, replay -------------------------------------------------------------------


def test_between_refreshes_kept_attacks_are_replayed() -> None:
    made = world.short("tar", steps=6, refresh=3, inner_weights="adapter", anchor=0.0)
    _, outcome = world.trained(made)
    assert outcome.ledger.attacks == 2
    assert outcome.ledger.passes == {"inner": 8, "attacked": 4 + 4, "weights": 6}
    assert made.can_resume(3)
    assert not made.can_resume(4)


def test_an_attack_that_diverged_at_once_is_made_anew_in_place_of_a_replay() -> None:
    made = world.short(
        "tar", steps=3, refresh=3, inner_rates=(1e30,), inner_optimizers=("sgd",), anchor=0.0
    )
    _, outcome = world.trained(made)
    assert (outcome.status, outcome.steps) == ("done", 3)
    assert outcome.ledger.attacks == outcome.ledger.diverged_attacks == 3


@pytest.mark.parametrize("name", ["tar", "mlac", "sophon"])
def test_an_adapter_on_an_adapter_is_refused(name: str) -> None:
    made = world.short(name, train="adapter", rank=2, inner_weights="all+adapter")
    with pytest.raises(InputError, match="use inner_weights=slice"):
        world.trained(made)
    world.trained(world.short(name, train="adapter", rank=2, inner_weights="slice", steps=2))


@pytest.mark.parametrize("weights", ["all", "adapter"])
def test_a_kept_attack_is_the_attack(weights: Any) -> None:
    run, subject, data = one_step()
    runner = AttackRunner(subject, data, run.outcome.ledger, NoTrainer())  # type: ignore[arg-type]
    rows = [unit[0] for unit in data.pool("held_out_restricted")[:2]]
    attack = InnerAttack("restricted", weights, "adamw", 1e-2, 4, 3)
    for update in runner.run(attack, 5):
        if update.step == 3:
            delta = runner.delta()
            with torch.no_grad():
                attacked = next(subject.forward.labelled(rows)).logits
    with torch.no_grad():
        clean = next(subject.forward.labelled(rows)).logits
        with perturbed(subject, whole_delta(delta, torch.device("cpu"))):
            again = next(subject.forward.labelled(rows)).logits
    assert not torch.allclose(clean, attacked, atol=1e-2)
    torch.testing.assert_close(again, attacked, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "first"), [("knowledge", "random_mapping"), ("refusal", "refusal")]
)
def test_the_light_preset_starts_from_a_light_first_stage(kind: Any, first: str) -> None:
    plain, made = make_safeguard("tar", "light").stages(tiny_world.tiny_domain(kind))
    assert plain.settings == make_safeguard(first, "light").settings
    assert made.settings.loss == {"knowledge": "entropy", "refusal": "dpo"}[kind]


@pytest.mark.parametrize("weights", ["adapter", "slice"])
def test_an_attack_that_freezes_weights_hides_no_gradient(weights: Any) -> None:
    """The gradient at its point is that of all weights, moved there by hand on a copy."""
    run, subject, _ = one_step(inner_weights=(weights,), inner_rates=(1e-3,), visits="last")
    model = copy.deepcopy(subject.model).requires_grad_(True)
    evaluate, kept = run._evaluate, {}

    def spy(step: Any, place: str, weight: float) -> None:
        evaluate(step, place, weight)
        if place == "attacked":
            kept["delta"] = whole_delta(step.attacks.delta(), torch.device("cpu"))
            kept["rows"] = step.rows("held_out_restricted")
            kept["gradients"] = step.by_name([g.clone() for g in step.bank.total()])

    run._evaluate = spy
    run.run()
    with torch.no_grad():
        for name, change in kept["delta"].items():
            model.get_parameter(name).add_(change)
    (-4.0 * plain_entropy(model, kept["rows"])).backward()
    assert set(kept["gradients"]) == {name for name, _ in model.named_parameters()}
    for name, gradient in kept["gradients"].items():
        wanted = model.get_parameter(name).grad
        scale = float(wanted.abs().max())
        torch.testing.assert_close(gradient / scale, wanted / scale, rtol=0, atol=1e-3)


# ---- what is refused ---------------------------------------------------------------------------


def test_an_inner_attack_without_effect_is_refused() -> None:
    with pytest.raises(InputError, match="nothing to learn from; raise inner_rates"):
        world.trained(world.short("tar", inner_rates=(1e-30,)))


def test_replay_on_coarse_weights_is_refused_at_once() -> None:
    subject = tiny_world.undefended()
    subject.model.to(torch.bfloat16)
    with pytest.raises(InputError, match="use --dtype float32, or refresh=1"):
        world.prepare(world.short("tar", refresh=2), subject=subject)


def test_a_diverging_inner_attack_ends_early_and_is_counted() -> None:
    made = world.short("tar", steps=2, inner_rates=(1e30,), inner_optimizers=("sgd",))
    _, outcome = world.trained(made)
    assert outcome.ledger.diverged_attacks == 2


@pytest.mark.parametrize("suite", SUITES)
def test_no_suite_attacks_with_a_configuration_that_is_trained_against(suite: str) -> None:
    for preset in make_safeguard("tar").presets:
        trained = make_safeguard("tar", preset).facts()["trained_against"]
        for parameters in (1_000_000, 100_000_000):
            attacks = make_suite(suite, parameters).attacks
            require_disjoint(trained, [(a.tamper, a.settings) for a in attacks])


def test_an_evaluation_that_repeats_a_training_attack_is_refused() -> None:
    attack = InnerAttack("restricted", "all", "adamw", 1e-3, 16, 32)
    name, settings = attack.tamper
    assert attack.digest == attack_digest("ft_full", settings)
    again = {"learning_rate": 1e-3, "batch_size": 16, "steps": 400, "examples": 300}
    for repeated in (settings, again, settings | {"steps": 33}):
        with pytest.raises(InputError, match="trained against exactly this"):
            require_disjoint([attack.digest], [(name, repeated)])
    for other in (
        {"learning_rate": 2e-3},
        {"batch_size": 8},
        {"optimizer": "sign_sgd"},
        {"data": "benign"},
        {"retain_share": 0.5},
        {"schedule": "linear"},
    ):
        require_disjoint([attack.digest], [(name, settings | other)])


def test_a_switch_drawn_anew_and_a_slice_are_kinds_of_their_own() -> None:
    early, late = (InnerAttack("switch", "all", "adamw", 1e-3, 16, 32, s) for s in (0.3, 0.8))
    assert early.digest == late.digest
    whole, part = (InnerAttack("restricted", w, "adamw", 1e-3, 16, 32) for w in ("all", "slice"))
    assert whole.digest != part.digest


def test_the_length_counts_where_the_rates_depend_on_it() -> None:
    linear = {"schedule": "linear", "steps": 32}
    assert attack_digest("ft_full", linear) != attack_digest("ft_full", linear | {"steps": 64})


def test_stages_follow_the_kind_of_domain() -> None:
    made = make_safeguard("tar")
    for kind, first, loss, reference in (
        ("knowledge", "random_mapping", "entropy", "original"),
        ("refusal", "refusal", "dpo", "stage_start"),
    ):
        names = [stage.name for stage in made.stages(tiny_world.tiny_domain(kind))]  # type: ignore[arg-type]
        assert names == [first, "tar"]
        second = made.stages(tiny_world.tiny_domain(kind))[1]  # type: ignore[arg-type]
        assert (second.settings.loss, second.reference) == (loss, reference)
        # Refusals are what is to be kept: the model before them is no reference for them.
        flat = make_safeguard("tar", loss="entropy").stages(tiny_world.tiny_domain(kind))[1]  # type: ignore[arg-type]
        assert flat.reference == reference
    alone = make_safeguard("tar", stage1="none", loss="entropy", retain_reference="original")
    assert alone.stages(tiny_world.tiny_domain()) == [alone]
    assert Visit().place == "weights"


# ---- where the loss is taken, and the floor ---------------------------------------------------


def test_all_tokens_of_a_restricted_row_can_be_flattened() -> None:
    made = world.short("tar", tokens="all", anchor=0.0)
    run, subject, data = world.prepare(made)
    (term,) = (t for t in run.terms if t.name == "attacked")
    rows = [unit[0] for unit in data.pool(term.rows)]
    plain = [unit[0] for unit in data.pool("held_out_restricted")]
    assert [(row.ids, row.first_label) for row in rows] == [(row.ids, 1) for row in plain]
    (one,) = passes(subject.forward, rows[:2], (), None, whole=True)
    expected = []
    for row in rows[:2]:
        logits = subject.model(input_ids=torch.tensor([row.ids])).logits[0, :-1].double()
        p = logits.softmax(-1)
        expected += (p * p.log()).sum(-1).tolist()
    assert term.loss(one).tolist() == pytest.approx(expected, abs=1e-4)
    assert make_safeguard("tar", "faithful").settings.tokens == "all"


def test_released_scripts_decay_the_weights_of_inner_attacks() -> None:
    settings = make_safeguard("tar", "faithful").settings
    assert {attack.tamper[1]["weight_decay"] for attack in possible(settings)} == {0.01}
    assert drawn(settings, torch.Generator().manual_seed(1)).weight_decay == 0.01


def test_the_floor_is_that_of_a_visit_as_a_whole() -> None:
    """With a floor between the losses of single rows all of a visit counts, or nothing of it."""
    whole = world.trained(world.short("tar", steps=2, inner_steps=2, stride=2, anchor=0.0))[1]
    weight = 4.0 * sum(visit_weights(world.short("tar", inner_steps=2, stride=2).settings).values())
    mean = whole.losses[0]["attacked"] / weight
    for floor, counted in ((mean - 0.01, True), (mean + 0.01, False)):
        made = world.short("tar", steps=1, inner_steps=2, stride=2, anchor=0.0, entropy_floor=floor)
        _, outcome = world.trained(made)
        assert ("attacked" in outcome.losses[0]) == counted
        if counted:
            assert outcome.losses[0]["attacked"] == pytest.approx(whole.losses[0]["attacked"])


# ---- anchor rows -------------------------------------------------------------------------------


def test_rows_are_recombined_place_by_place_with_rows_of_their_length() -> None:
    _, _, data = one_step()
    rows = [row for unit in data.pool("retain") for row in unit]
    units = [(row,) for row in rows] * 20
    made = recombined(units, partners(rows), 0.4, torch.Generator().manual_seed(1))
    changed, expected = 0, 0.0
    for (old,), (new,) in zip(units, made, strict=True):
        assert (new.labels, new.item_id) == (old.labels, old.item_id)
        same = [row for row in rows if row.first_label == old.first_label]
        for place, (before, after) in enumerate(zip(old.ids, new.ids, strict=True)):
            if place >= old.first_label:
                assert before == after
                continue
            column = [row.ids[place] for row in same]
            assert after in column
            changed += before != after
            expected += 0.4 * (1 - column.count(before) / len(column))
    assert expected > 100
    assert changed == pytest.approx(expected, rel=0.1)
    assert recombined(units, partners(rows), 0.4, torch.Generator().manual_seed(1)) == made
    assert recombined(units, partners(rows), 0.4, torch.Generator().manual_seed(2)) != made


def test_a_row_without_another_of_its_length_stays_as_it_is() -> None:
    _, _, data = one_step()
    (row,) = data.pool("retain")[0]
    alone = partners([row])
    assert recombined([(row,)], alone, 1.0, torch.Generator()) == [(row,)]
    assert recombined([(row,)], {}, 1.0, torch.Generator()) == [(row,)]


def test_anchors_are_another_draw_at_every_step_and_keep_near_the_reference() -> None:
    seen: list[Any] = []
    start = tiny_world.undefended()
    reference = Reference(start.model, tree=start.tree)
    _, _, data = one_step()
    rows = [unit[0] for unit in data.pool("retain")[:6]]
    drifts = []
    for anchor in (1e-9, 30.0):
        made = world.short("tar", steps=6, representation=0.0, anchor=anchor)
        visits = made.visits

        def spy(step: Any, visits: Any = visits) -> Any:
            for visit in visits(step):
                if visit.place == "anchors":
                    seen.append(tuple(row.ids for row in step.rows("anchors")))
                yield visit

        made.visits = spy  # type: ignore[method-assign]
        subject, _ = world.trained(made)
        with torch.no_grad():
            (one,) = passes(subject.forward, rows, ("residual",), reference, whole=True)
            drifts.append(float(made._distance(one).mean()))  # type: ignore[attr-defined]
    assert len(set(seen[:6])) == 6
    assert seen[:6] == seen[6:]
    assert drifts[1] < 0.7 * drifts[0]
