"""Booster, CTRAP, SAM-unlearning, SEAM, MLAC, SOPHON: gradients rebuilt with torch alone."""

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import safeguard_world as world
import tiny_world
import torch
from torch.nn import functional

from durometer.core.errors import DurometerError, InputError, NotApplicableError
from durometer.core.rows import Row
from durometer.safeguards import banks
from durometer.safeguards.attacks import AttackRunner
from durometer.safeguards.base import make_safeguard
from durometer.safeguards.ctrap import first_token
from durometer.safeguards.lens import last_norm
from durometer.safeguards.mlac import bounded_cross_entropy
from durometer.safeguards.npo import rejection
from durometer.safeguards.passes import Pass
from durometer.safeguards.sophon import from_uniform, inverse_cross_entropy
from durometer.subjects.fingerprint import weights_fingerprint
from durometer.trials.suites import SUITES, make_suite

OURS = ("booster", "ctrap", "sam_unlearning", "seam", "mlac", "sophon")
Gradient = list[torch.Tensor]


class Seen:
    """One update of a safeguard: what it started from, read, and would have applied."""

    def __init__(self, name: str, *, step: int = 0, **settings: Any) -> None:
        made: Any = world.short(name, **{"steps": step + 1, "learning_rate": 1e-2, **settings})
        self.run, self.subject, self.data = world.prepare(made, made.kinds[0])
        self.rows: dict[str, list[Row]] = {}
        self.attacks: list[list[Row]] = []
        visits, transform = made.visits, made.transform

        def start(now: Any) -> Any:
            self.attacks.clear()
            self.model = copy.deepcopy(self.subject.model).requires_grad_(True)
            yield from visits(now)

        def keep(now: Any) -> Any:
            self.losses = now.losses
            self.rows = {pool: now.rows(pool) for pool in now._rows}
            self.gradient = [torch.zeros(1) if g is None else g.clone() for g in transform(now)]
            self.restored = weights_fingerprint(self.subject.model) == weights_fingerprint(
                self.model
            )
            return list(self.gradient)

        made.visits, made.transform = start, keep
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(AttackRunner, "run", self._watching(AttackRunner.run))
            self.outcome = self.run.run()

    def _watching(self, attack: Any) -> Any:
        def watched(runner: Any, *args: Any) -> Any:
            known = {
                unit[0].item_id: unit[0]
                for pool in ("inner_restricted", "retain")
                for unit in self.data.pool(pool)
            }
            for update in attack(runner, *args):
                self.attacks.append([known[item_id] for item_id in update.item_ids])
                yield update

        return watched


def labelled(model: Any, row: Row) -> tuple[torch.Tensor, torch.Tensor]:
    logits = model(input_ids=torch.tensor([row.ids])).logits[0, row.first_label - 1 : -1]
    return logits, torch.tensor(row.labels)


def mean_loss(model: Any, rows: list[Row]) -> torch.Tensor:
    parts = [functional.cross_entropy(*labelled(model, row), reduction="none") for row in rows]
    return torch.cat(parts).mean()


def gradient(loss: torch.Tensor, model: Any) -> Gradient:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def flat(gradients: Gradient) -> torch.Tensor:
    return torch.cat([g.flatten() for g in gradients])


def moved(model: Any, way: Gradient, factor: float) -> Any:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, delta in zip(other.parameters(), way, strict=True):
            parameter.add_(delta, alpha=factor)
    return other


def weighed(*parts: tuple[float, Gradient]) -> Gradient:
    return [
        sum(w * g for (w, _), g in zip(parts, column, strict=True))
        for column in zip(*(p for _, p in parts), strict=True)
    ]


def assert_same(found: Gradient, wanted: Gradient, tolerance: float = 1e-3) -> None:
    assert float(flat(wanted).norm()) > 1e-3
    difference = float((flat(found) - flat(wanted)).norm() / flat(wanted).norm())
    assert difference < tolerance


def fake(logits: torch.Tensor, targets: list[int]) -> Pass:
    found: Any = SimpleNamespace(
        logits=logits,
        targets=torch.tensor(targets),
        rows=torch.arange(len(targets)),
        members=tuple(range(len(targets))),
    )
    rows: Any = [None] * len(targets)
    return Pass(rows, found, {}, None)


# ---- probes along a gradient -------------------------------------------------------------------


def test_booster_takes_the_gradient_here_minus_that_after_a_normalised_step() -> None:
    seen = Seen("booster", step=2)
    model, harmful = seen.model, seen.rows["restricted"]
    here = gradient(mean_loss(model, harmful), model)
    after = moved(model, here, -0.1 / float(flat(here).norm()))
    there = gradient(mean_loss(after, harmful), after)
    plain = gradient(mean_loss(model, seen.rows["sft"]), model)
    assert_same(seen.gradient, weighed((1.0, plain), (5.0, here), (-5.0, there)))
    gain = float((mean_loss(model, harmful) - mean_loss(after, harmful)).detach())
    assert gain > 0
    assert seen.losses["harmful"] + seen.losses["after_step"] == pytest.approx(5 * gain, rel=1e-2)
    assert seen.restored


def test_boosters_step_does_not_depend_on_its_coefficient() -> None:
    lengths = []
    for attenuation in (0.5, 5.0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(banks, "_move", lambda s, d, c: lengths.append(flat(list(d.values()))))
            Seen("booster", attenuation=attenuation, step_size=0.3)
    assert float(lengths[0].norm()) == pytest.approx(0.3, rel=1e-4)
    torch.testing.assert_close(lengths[0], lengths[1], rtol=1e-3, atol=1e-6)


def test_ctrap_collapses_after_a_step_that_is_not_normalised() -> None:
    seen = Seen("ctrap", step=2, collapse=0.7, step_size=0.3, token="hello")
    model = seen.model
    harm = gradient(mean_loss(model, seen.rows["restricted"]), model)
    after = moved(model, harm, -0.3)
    word = tiny_world.VOCABULARY.index("hello")
    parts = []
    for row in seen.rows["retain"]:
        logits, labels = labelled(after, row)
        parts.append(
            functional.cross_entropy(logits, torch.full_like(labels, word), reduction="none")
        )
    loss = torch.cat(parts).mean()
    plain = gradient(mean_loss(model, seen.rows["sft"]), model)
    assert_same(seen.gradient, weighed((1.0, plain), (0.7, gradient(loss, after))))
    assert seen.losses["collapse"] == pytest.approx(0.7 * float(loss.detach()), rel=1e-3)
    assert set(seen.losses) == {"sft", "collapse"}


def test_ctraps_token_is_the_first_of_its_text() -> None:
    subject = tiny_world.undefended()
    assert first_token(subject, "good day") == tiny_world.VOCABULARY.index("good")
    with pytest.raises(InputError, match="makes no token of ' '"):
        first_token(subject, " ")


def npo(model: Any, frozen: Any, rows: list[Row], beta: float) -> torch.Tensor:
    """NPO as its paper writes it, with the ratio of probabilities."""
    values = []
    for row in rows:
        logs = [
            m.gather(1, labels[:, None]).sum()
            for m, labels in (
                (logits.log_softmax(-1), labels)
                for logits, labels in (labelled(model, row), labelled(frozen, row))
            )
        ]
        ratio = (logs[0] - logs[1].detach()).exp()
        values.append(2 / beta * torch.log1p(ratio**beta))
    return torch.stack(values).mean()


def test_sam_forgets_one_step_up_the_loss_of_forgetting() -> None:
    seen = Seen("sam_unlearning", step=2, rho=0.05, beta=0.1, forget=0.5)
    model, frozen = seen.model, tiny_world.undefended().model
    rows = seen.rows["restricted"]
    up = gradient(npo(model, frozen, rows, 0.1), model)
    worse = moved(model, up, 0.05 / float(flat(up).norm()))
    loss = npo(worse, frozen, rows, 0.1)
    assert float(loss.detach()) > float(npo(model, frozen, rows, 0.1).detach())
    plain = gradient(mean_loss(model, seen.rows["sft"]), model)
    wanted = weighed((2.25, plain), (0.5, gradient(loss, worse)))
    assert_same(seen.gradient, wanted)
    assert seen.losses["forget"] == pytest.approx(0.5 * float(loss.detach()), rel=1e-3)
    assert set(seen.losses) == {"sft", "forget"}
    assert seen.restored


def test_without_a_step_sam_is_npo_and_costs_no_third_pass() -> None:
    seen = Seen("sam_unlearning", step=1, rho=0.0, beta=0.1)
    model = seen.model
    loss = npo(model, tiny_world.undefended().model, seen.rows["restricted"], 0.1)
    plain = gradient(mean_loss(model, seen.rows["sft"]), model)
    assert_same(seen.gradient, weighed((2.25, plain), (1.0, gradient(loss, model))))
    assert seen.outcome.ledger.passes == {"weights": 2, "probe": 2}


def test_smoothing_averages_gradients_at_noisy_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    deltas: list[Any] = []
    move = banks._move

    def spy(subject: Any, delta: Any, cosine: float) -> None:
        deltas.append(list(delta.values()))
        move(subject, delta, cosine)

    monkeypatch.setattr(banks, "_move", spy)
    seen = Seen("sam_unlearning", smoothing="noise", draws=2, sigma=0.02, beta=0.1, sft=0.0)
    model, frozen = seen.model, tiny_world.undefended().model
    assert len(deltas) == 2
    assert not torch.equal(deltas[0][0], deltas[1][0])
    for delta in deltas:
        assert float(flat(delta).std()) == pytest.approx(0.02, rel=0.02)
    parts = []
    for delta in deltas:
        other = moved(model, delta, 1.0)
        loss = npo(other, frozen, seen.rows["restricted"], 0.1)
        parts.append((0.5, gradient(loss, other)))
    assert_same(seen.gradient, weighed(*parts))


def test_npo_leaves_what_is_forgotten_alone() -> None:
    one = fake(torch.tensor([[0.0, 0.0], [-50.0, 0.0]], requires_grad=True), [0, 0])
    one.__dict__["reference"] = fake(torch.tensor([[0.0, 0.0], [0.0, 0.0]]), [0, 0])
    values = rejection(one, 0.5)
    assert values.tolist() == pytest.approx([4 * math.log(2), 0.0], abs=1e-6)
    values.sum().backward()
    slopes = one.labelled.logits.grad
    assert slopes is not None
    assert slopes[0].tolist() == pytest.approx([0.5, -0.5])
    assert float(slopes[1].abs().max()) < 1e-9


def test_a_probe_below_the_resolution_of_the_weights_is_refused() -> None:
    for name, settings in (("sam_unlearning", {"rho": 1e-4}), ("seam", {})):
        subject = tiny_world.undefended()
        subject.model.to(torch.bfloat16)
        made = world.short(name, **settings)
        run, _, _ = world.prepare(made, made.kinds[0], subject=subject)
        with pytest.raises(DurometerError, match="bfloat16 is too coarse for it"):
            run.run()


@pytest.mark.parametrize("name", ["booster", "ctrap", "seam"])
def test_with_an_adapter_the_adapter_is_probed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    probed: set[str] = set()
    move = banks._move

    def spy(subject: Any, delta: Any, cosine: float) -> None:
        probed.update(delta)
        move(subject, delta, cosine)

    monkeypatch.setattr(banks, "_move", spy)
    world.trained(world.short(name, train="adapter", rank=2), "refusal")
    assert probed
    assert all("lora_" in weight for weight in probed)


# ---- SEAM --------------------------------------------------------------------------------------


def test_the_cosines_gradient_is_that_of_double_backpropagation() -> None:
    seen = Seen("seam", step=2, sft=0.0, unlearn=0.0, self_destruct=0.5)
    model = seen.model
    weights = list(model.parameters())
    flats = []
    for pool in ("restricted", "retain"):
        loss = mean_loss(model, seen.rows[pool])
        found = torch.autograd.grad(loss, weights, create_graph=True)
        flats.append(torch.cat([g.flatten() for g in found]))
    cosine = functional.cosine_similarity(flats[0], flats[1], dim=0)
    wanted = list(torch.autograd.grad(0.5 * cosine, weights))
    assert_same(seen.gradient, wanted, 0.02)
    assert seen.losses == pytest.approx({"self_destruct": 0.5 * float(cosine.detach())}, rel=1e-3)
    assert seen.restored


def test_unlearning_reads_every_depth_as_transformers_does() -> None:
    seen = Seen("seam", step=1, sft=0.0, self_destruct=0.0)
    model = seen.model
    depths: list[list[torch.Tensor]] = []
    targets = []
    for row in seen.rows["restricted"]:
        states = model(input_ids=torch.tensor([row.ids]), output_hidden_states=True).hidden_states
        # The library has normalised its last state already.
        read = [model.lm_head(model.model.norm(s)) for s in states[:-1]]
        read.append(model.lm_head(states[-1]))
        depths.append([logits[0, row.first_label - 1 : -1] for logits in read])
        targets.append(torch.tensor(row.labels))
    losses = [
        functional.cross_entropy(torch.cat(list(depth)), torch.cat(targets))
        for depth in zip(*depths, strict=True)
    ]
    assert len(losses) == 3
    loss = -torch.log(1 + torch.stack(losses).mean())
    assert_same(seen.gradient, gradient(loss, model))
    assert seen.losses == pytest.approx({"unlearn": float(loss.detach())}, rel=1e-4)


def test_all_of_seam_is_the_sum_of_its_parts() -> None:
    whole = Seen("seam", self_destruct=0.3)
    parts = [
        Seen("seam", sft=0.0, unlearn=0.0, self_destruct=0.3).gradient,
        Seen("seam", sft=0.0, self_destruct=0.0).gradient,
        Seen("seam", unlearn=0.0, self_destruct=0.0).gradient,
    ]
    assert_same(whole.gradient, weighed(*((1.0, part) for part in parts)))
    assert set(whole.losses) == {"sft", "unlearn", "self_destruct"}
    assert whole.outcome.ledger.all_passes == 5


def test_the_last_norm_is_found_by_its_shape() -> None:
    model = tiny_world.undefended().model
    assert last_norm(model) is model.model.norm
    model.model.norm = torch.nn.Identity()
    with pytest.raises(NotApplicableError, match="no norm found"):
        last_norm(model)


# ---- inner attacks -----------------------------------------------------------------------------


def after_attack(seen: Seen, rate: float) -> Any:
    """SGD by torch alone on the batches that the attack was seen to train on."""
    model = copy.deepcopy(seen.model)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for rows in seen.attacks:
        optimizer.zero_grad()
        mean_loss(model, rows).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model


ATTACK: dict[str, Any] = {
    "inner_optimizers": ("sgd",),
    "inner_rates": (0.3,),
    "inner_steps": 3,
    "visits": "last",
}


def test_mlac_pushes_the_attacked_loss_up_to_chance() -> None:
    seen = Seen("mlac", censoring=2.0, **ATTACK)
    attacked = after_attack(seen, 0.3)
    ceiling = math.log(len(tiny_world.VOCABULARY))
    parts = [
        functional.cross_entropy(*labelled(attacked, row), reduction="none")
        for row in seen.rows["restricted"]
    ]
    loss = torch.minimum(torch.cat(parts), torch.tensor(ceiling)).mean()
    plain = gradient(mean_loss(seen.model, seen.rows["sft"]), seen.model)
    wanted = weighed((1.0, plain), (-2.0, gradient(loss, attacked)))
    assert len(seen.attacks) == 3
    assert_same(seen.gradient, wanted)
    assert seen.losses["attacked"] == pytest.approx(-2 * float(loss.detach()), rel=1e-2)
    assert seen.restored


def test_mlacs_loss_stops_at_chance() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [-9.0, 1.0, 0.0, 2.0], [3.0, 0.0, 0.0, 0.0]])
    logits.requires_grad_(True)
    values = bounded_cross_entropy(fake(logits, [0, 0, 0]))
    known = functional.cross_entropy(logits[2:], torch.tensor([0]))
    assert values.tolist() == pytest.approx([math.log(4), math.log(4), float(known.detach())])
    values.sum().backward()
    assert logits.grad is not None
    assert float(logits.grad[1].abs().max()) == 0
    assert float(logits.grad[2].abs().max()) > 0


@pytest.mark.parametrize("bound", ["inverse", "uniform"])
def test_sophon_suppresses_alone_then_trains_alone(bound: Any) -> None:
    seen = Seen("sophon", bound=bound, **ATTACK)
    attacked = after_attack(seen, 0.3)
    values = []
    for row in seen.rows["restricted"]:
        logits, labels = labelled(attacked, row)
        probabilities = logits.softmax(-1).double()
        if bound == "inverse":
            values.append(-torch.log(1 - probabilities.gather(1, labels[:, None])[:, 0]))
        else:
            uniform = torch.full_like(probabilities, 1 / probabilities.shape[-1])
            divergence = functional.kl_div(probabilities.log(), uniform, reduction="none")
            values.append(divergence.sum(-1))
    loss = 3.0 * torch.cat(values).mean()
    assert_same(seen.gradient, gradient(loss.float(), attacked), 1e-2)
    assert list(seen.losses) == ["attacked"]
    assert "sft" not in seen.rows
    ordinary = Seen("sophon", step=1, bound=bound, **ATTACK)
    plain = gradient(mean_loss(ordinary.model, ordinary.rows["sft"]), ordinary.model)
    assert_same(ordinary.gradient, weighed((5.0, plain)))
    assert not ordinary.attacks


def test_sophons_turns() -> None:
    _, outcome = world.trained(world.short("sophon", steps=7, normal_steps=2))
    kinds = [next(iter(losses)) for losses in outcome.losses]
    assert kinds == ["attacked", "sft", "sft", "attacked", "sft", "sft", "attacked"]
    assert outcome.ledger.attacks == 3
    assert outcome.ledger.passes == {"inner": 9, "attacked": 3, "weights": 4}


def test_sophons_losses_are_bounded() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [-200.0, 0.0, 0.0, 0.0], [200.0, 0.0, 0.0, 0.0]])
    logits.requires_grad_(True)
    values = inverse_cross_entropy(fake(logits, [0, 0, 0]))
    assert values[:2].tolist() == pytest.approx([-math.log(0.75), 0.0], abs=1e-6)
    assert values.tolist()[2] == pytest.approx(200 - math.log(3), rel=1e-6)
    divergences = from_uniform(fake(logits, [0, 0, 0]))
    assert divergences.tolist()[0] == pytest.approx(0.0, abs=1e-6)
    assert bool((divergences[1:] > 1).all())
    (values.sum() + divergences.sum()).backward()
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())


@pytest.mark.parametrize("name", ["mlac", "sophon"])
def test_the_outer_loss_can_keep_to_entities_that_no_attack_trains_on(name: str) -> None:
    seen = Seen(name, rows="held_out_restricted")
    attacked = {row.item_id for rows in seen.attacks for row in rows}
    assert not attacked & {row.item_id for row in seen.rows["held_out_restricted"]}
    assert "restricted" not in seen.rows


@pytest.mark.parametrize("name", ["mlac", "sophon"])
def test_no_suite_attacks_with_what_it_is_trained_against(name: str) -> None:
    from durometer.safeguards.attacks import require_disjoint

    for preset in ("", *make_safeguard(name).presets):
        trained = make_safeguard(name, preset).facts()["trained_against"]
        assert trained
        for suite in SUITES:
            for parameters in (1_000_000, 100_000_000):
                attacks = make_suite(suite, parameters).attacks
                require_disjoint(trained, [(a.tamper, a.settings) for a in attacks])


@pytest.mark.parametrize("name", OURS)
def test_every_kind_of_subject_has_its_settings(name: str) -> None:
    assert "tiny" in make_safeguard(name).presets
