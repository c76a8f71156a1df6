"""Safeguards that work on activations, each against plain torch."""

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import safeguard_world as world
import tiny_world
import torch
from torch.nn import functional

from durometer.core.errors import NotApplicableError
from durometer.core.rows import Row
from durometer.core.structure import blocks
from durometer.safeguards import refat
from durometer.safeguards.activations import blank, distance, place_at, rows_apart, shifted
from durometer.safeguards.base import make_safeguard
from durometer.safeguards.circuit_breakers import ramp
from durometer.safeguards.crl import triplet
from durometer.safeguards.data import DefenceData
from durometer.safeguards.latent_adversarial import descend_tokens, spread
from durometer.safeguards.lens import logit_lens
from durometer.safeguards.likelihoods import divergence
from durometer.safeguards.passes import Pass, Reference, passes
from durometer.safeguards.refat import counted, fired, taken_out, upper
from durometer.safeguards.repnoise import (
    differing_labels,
    differing_tokens,
    mmd,
    paired,
)
from durometer.safeguards.rmu import positive_unit
from durometer.safeguards.t_vaccine import drawn
from durometer.safeguards.train import TrainingRun
from durometer.safeguards.vaccine import worst_shift
from durometer.subjects.fingerprint import weights_fingerprint


def pool(name: str, count: int, kind: Any = "refusal") -> list[Row]:
    data = DefenceData(tiny_world.undefended(), tiny_world.tiny_domain(kind))
    units = data.pool(name)
    return [row for unit in units[:: max(len(units) // count, 1)][:count] for row in unit]


def one_pass(subject: Any, rows: list[Row], reference: Any = None, *roles: Any) -> Pass:
    model = reference and Reference(reference.model, tree=reference.tree)
    (one,) = passes(subject.forward, rows, roles or ("residual",), model, whole=True)
    return one


def hidden(model: Any, row: Row) -> tuple[torch.Tensor, ...]:
    """Return the library's own hidden states of one row without its last token."""
    ids = torch.tensor([row.ids[:-1]])
    return tuple(h[0] for h in model(input_ids=ids, output_hidden_states=True).hidden_states)


def term_of(name: str, wanted: str, kind: Any, **settings: Any) -> Any:
    subject = tiny_world.undefended()
    made: Any = make_safeguard(name, **settings)
    terms = made.terms(subject, DefenceData(subject, tiny_world.tiny_domain(kind)))
    return next(term for term in terms if term.name == wanted)


def moved_weights(subject: Any) -> set[str]:
    start = tiny_world.undefended().model
    return {
        name
        for name, p in subject.model.named_parameters()
        if not torch.equal(p, start.get_parameter(name))
    }


# ---- places -------------------------------------------------------------------------------------


def test_depths_are_shares_of_any_number_of_blocks() -> None:
    model = torch.nn.Module()
    for count, places in ((32, [0, 10, 20, 32]), (30, [0, 9, 19, 30]), (4, [0, 1, 2, 4])):
        model.layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(count))
        model.config = type("Config", (), {"num_hidden_layers": count})()
        assert [place_at(model, share) for share in (0, 10 / 32, 20 / 32, 1)] == places


def test_rows_are_apart_inside_alone_and_a_shift_is_what_is_added() -> None:
    subject, rows = tiny_world.undefended(), pool("refusals", 3)
    tree, block = subject.tree, blocks(subject.model)[0][1]
    seen: list[torch.Tensor] = []
    handle = block.register_forward_hook(
        lambda m, i, o: seen.append(o[0] if isinstance(o, tuple) else o)
    )
    with rows_apart(subject):
        assert not subject.forward.tree
        shift = blank(subject, 3, max(len(row.ids) for row in rows)).detach() + 0.25
        list(subject.forward.labelled(rows, whole=True))
        with shifted([block], [shift]):
            handle.remove()
            # Behind the hook that shifts.
            handle = block.register_forward_hook(
                lambda m, i, o: seen.append(o[0] if isinstance(o, tuple) else o)
            )
            list(subject.forward.labelled(rows, whole=True))
    handle.remove()
    assert subject.tree == tree
    assert seen[0].shape == shift.shape
    torch.testing.assert_close(seen[1] - seen[0], shift)
    assert not block._forward_hooks


# ---- RMU ----------------------------------------------------------------------------------------


def test_rmu_is_two_mean_squared_distances() -> None:
    base, now = tiny_world.undefended(), tiny_world.safeguarded()
    rows = pool("restricted", 3, "knowledge")
    options: dict[str, Any] = {"depth": 0.5, "steering": 3.0}
    one = one_pass(now, rows, base)
    values = {
        name: term_of("rmu", name, "knowledge", **options).loss(one)
        for name in ("forget", "retain")
    }
    wanted = 3.0 * positive_unit(64, 42)
    states = torch.cat([hidden(now.model, row)[1] for row in rows])
    before = torch.cat([hidden(base.model, row)[1] for row in rows])
    torch.testing.assert_close(values["forget"], ((states - wanted) ** 2).mean(-1))
    torch.testing.assert_close(values["retain"], ((states - before) ** 2).mean(-1))
    labels = term_of("rmu", "forget", "knowledge", tokens="labels", **options)
    predicting = torch.cat([hidden(now.model, r)[1][r.first_label - 1 :] for r in rows])
    torch.testing.assert_close(labels.loss(one), ((predicting - wanted) ** 2).mean(-1))
    assert labels.per == "label"


def test_rmu_steers_to_a_positive_unit_vector() -> None:
    vector = positive_unit(64, 1)
    assert float(vector.norm()) == pytest.approx(1.0)
    assert float(vector.min()) >= 0
    assert not torch.equal(vector, positive_unit(64, 2))


def test_rmu_trains_what_writes_to_the_stream_just_below_its_depth() -> None:
    made: Any = make_safeguard("rmu", steps=2, learning_rate=1e-3)
    subject, _ = world.trained(made)
    assert moved_weights(subject) == {"model.layers.0.mlp.down_proj.weight"}


# ---- circuit breakers ---------------------------------------------------------------------------


def test_circuit_breakers_turn_down_one_coefficient_and_up_the_other() -> None:
    weights = [
        term_of("circuit_breakers", name, "knowledge").weight for name in ("rerouting", "retain")
    ]
    assert [w(0, 150) for w in weights] == pytest.approx([10 * (1 - 1 / 300), 10 / 300])
    assert [w(149, 150) for w in weights] == pytest.approx([5.0, 5.0])
    assert ramp(49, 100) == 0.25


def test_circuit_breakers_are_a_hinge_on_cosines_and_a_mean_of_norms() -> None:
    base, now = tiny_world.undefended(), tiny_world.safeguarded()
    rows = pool("restricted", 3)
    one = one_pass(now, rows, base)
    value = term_of("circuit_breakers", "rerouting", "refusal", depths=(0.5,)).loss(one)
    states = torch.cat([hidden(now.model, row)[1] for row in rows])
    before = torch.cat([hidden(base.model, row)[1] for row in rows])
    cosines = (states * before).sum(-1) / (states.norm(dim=-1) * before.norm(dim=-1))
    torch.testing.assert_close(value, cosines.clamp_min(0))
    pairs = zip(one.states(), one.reference.states(), strict=True)
    layers = torch.stack([(a - b).norm(dim=-1) for a, b in pairs])
    torch.testing.assert_close(distance(one), layers.mean(0))
    assert len(layers) == 3
    first = torch.cat(
        [(hidden(now.model, r)[0] - hidden(base.model, r)[0]).norm(dim=-1) for r in rows]
    )
    torch.testing.assert_close(layers[0], first)


def test_turned_the_other_way_nothing_is_rerouted_any_more() -> None:
    base, now = tiny_world.undefended(), tiny_world.undefended()
    handle = blocks(now.model)[0][1].register_forward_hook(
        lambda m, i, o: (-o[0], *o[1:]) if isinstance(o, tuple) else -o
    )
    one = one_pass(now, pool("restricted", 2), base)
    handle.remove()
    value = term_of("circuit_breakers", "rerouting", "refusal", depths=(0.5,)).loss(one)
    assert float(value.abs().max()) == 0


def test_the_distance_at_the_reference_has_a_finite_gradient() -> None:
    subject = tiny_world.undefended()
    subject.model.requires_grad_(True)
    value = distance(one_pass(subject, pool("refusals", 2), tiny_world.undefended()))
    value.sum().backward()
    gradients = [p.grad for p in subject.model.parameters() if p.grad is not None]
    assert float(value.detach().abs().max()) < 1e-4
    assert gradients
    assert all(torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("name", ["circuit_breakers", "crl"])
def test_refusals_come_first_where_a_domain_is_refused(name: str) -> None:
    refusal, knowledge = tiny_world.tiny_domain(), tiny_world.tiny_domain("knowledge")
    made: Any = make_safeguard(name)
    assert [stage.name for stage in made.stages(refusal)] == ["refusal", name]
    assert [stage.name for stage in made.stages(knowledge)] == [name]
    assert len(make_safeguard(name, stage1="none").stages(refusal)) == 1


# ---- CRL ----------------------------------------------------------------------------------------


def mixed(count: int = 3) -> list[Row]:
    pairs = zip(pool("restricted", count), pool("sft", count), strict=True)
    return [row for pair in pairs for row in pair]


def predicting(model: Any, rows: list[Row]) -> torch.Tensor:
    return torch.cat([hidden(model, row)[1][row.first_label - 1 :] for row in rows])


def test_crl_is_two_hinges_around_the_mean_of_restricted_activations() -> None:
    base, now = tiny_world.undefended(), tiny_world.safeguarded()
    rows = mixed()
    one = one_pass(now, rows, base)
    options: dict[str, Any] = {"first_depth": 0.5, "last_depth": 0.5}
    groups = {flag: [row for row in rows if row.restricted == flag] for flag in (True, False)}
    centre = predicting(now.model, groups[True]).mean(0, keepdim=True)

    def d(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return 1 - functional.cosine_similarity(a, b.expand_as(a), dim=-1)

    for name, flag, margin in (("benign", False, 0.3), ("harmful", True, 0.5)):
        value = term_of("crl", name, "refusal", **options).loss(one)
        states = predicting(now.model, groups[flag])
        old = d(states, predicting(base.model, groups[flag]))
        new = d(states, centre)
        gap = new - old if flag else old - new
        torch.testing.assert_close(value, (gap + margin).clamp_min(0).mean())
        assert float(value) > 0


def test_the_centre_moves_along() -> None:
    subject = tiny_world.safeguarded()
    subject.model.requires_grad_(True)
    one = one_pass(subject, mixed(2), tiny_world.undefended())
    states = one.states(tokens=False)[1]
    restricted = torch.tensor([row.restricted for row in one.rows for _ in row.labels])
    loss = triplet(one, range(1, 2), ~restricted, restricted, 2.0, gather=False)
    (gradient,) = torch.autograd.grad(loss, one._states["residual"][1], allow_unused=True)
    assert states.shape[0] == len(restricted)
    places = one.labelled.predictors[restricted]
    assert float(gradient.flatten(0, 1)[places].norm()) > 0


def test_the_tempered_divergence_is_the_librarys() -> None:
    one = one_pass(tiny_world.safeguarded(), pool("sft", 3), tiny_world.undefended())
    for temperature in (1.0, 2.0):
        wanted = temperature**2 * functional.kl_div(
            (one.labelled.logits / temperature).log_softmax(-1),
            (one.reference.labelled.logits / temperature).softmax(-1),
            reduction="none",
        ).sum(-1)
        torch.testing.assert_close(divergence(one, temperature), wanted)


def test_crl_sees_restricted_and_benign_rows_in_one_pass() -> None:
    seen: list[list[bool]] = []
    made: Any = world.short("crl", steps=1)
    terms = made.terms

    def spied(subject: Any, data: Any) -> Any:
        found = terms(subject, data)
        loss = found[1].loss

        def spy(one: Pass) -> Any:
            seen.append([row.restricted for row in one.rows])
            return loss(one)

        return [found[0], world.replace(found[1], loss=spy), *found[2:]]

    made.terms = spied
    world.trained(made, "refusal")
    assert seen == [[True, False] * 6]


# ---- RepNoise -----------------------------------------------------------------------------------


def test_the_discrepancy_is_the_sum_over_five_kernels() -> None:
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.randn(n, 7, generator=generator) for n in (4, 5))
    points = [*left, *right]
    distances = [[float(((a - b) ** 2).sum()) for b in points] for a in points]
    scale = sum(map(sum, distances)) / (9 * 8)

    def kernel(i: int, j: int) -> float:
        return sum(math.exp(-distances[i][j] / (scale * f)) for f in (0.25, 0.5, 1, 2, 4))

    def mean(rows: range, columns: range) -> float:
        values = [kernel(i, j) for i in rows for j in columns]
        return sum(values) / len(values)

    a, b = range(4), range(4, 9)
    wanted = mean(a, a) + mean(b, b) - 2 * mean(a, b)
    assert float(mmd(left, right)) == pytest.approx(wanted, rel=1e-4)
    assert float(mmd(left, left)) == pytest.approx(0.0, abs=1e-6)
    assert float(mmd(left, right + 5)) > float(mmd(left, right))


def test_only_tokens_that_differ_from_the_refusal_count() -> None:
    data = DefenceData(tiny_world.undefended(), tiny_world.tiny_domain())
    partners = paired(data)
    row, refusal = Row((1, 2, 3, 9, 5, 6), 3, "a", restricted=True), Row((1, 2, 3, 4, 5), 3, "a")
    other = Row((1, 2, 8), 2, "b", restricted=True)
    one: Any = type("Seen", (), {"rows": [row, other]})()
    one.labelled = type("Labelled", (), {"logits": torch.zeros(1)})()
    # Token 5 stands in both at the same place, token 6 where the refusal is over.
    assert differing_labels(one, {"a": refusal}).tolist() == [True, False, True, True]
    assert differing_tokens(one, {"a": refusal}).tolist() == [
        *(False, False, False, True, False),
        *(False, True),
    ]
    assert partners.keys() == {unit[0].item_id for unit in data.pool("restricted")}
    for unit in data.pool("restricted"):
        first = unit[0].first_label
        assert partners[unit[0].item_id].ids[:first] == unit[0].ids[:first]
    assert not paired(DefenceData(tiny_world.undefended(), tiny_world.tiny_domain("knowledge")))


def test_the_lens_at_the_last_depth_is_the_model() -> None:
    subject, rows = tiny_world.undefended(), pool("restricted", 3)
    one = one_pass(subject, rows)
    lens = logit_lens(subject, "ascent")
    torch.testing.assert_close(lens(one.states(tokens=False)[-1]), one.labelled.logits)

    def scaled(module: Any, inputs: Any, output: Any) -> Any:
        output.logits = output.logits * 2
        return output

    subject.model.register_forward_hook(scaled)
    data = DefenceData(subject, tiny_world.tiny_domain())
    for name, coefficient in (("repnoise", "ascent"), ("seam", "unlearn")):
        with pytest.raises(NotApplicableError, match=f"behind the last block; use {coefficient}=0"):
            make_safeguard(name).terms(subject, data)
        assert make_safeguard(name, **{coefficient: 0.0}).terms(subject, data)


def test_repnoise_is_minus_the_log_of_one_and_the_loss_at_all_depths() -> None:
    subject, rows = tiny_world.undefended(), pool("restricted", 3, "knowledge")
    value = term_of("repnoise", "ascent", "knowledge").loss(one_pass(subject, rows))
    model, losses = subject.model, []
    # The library's last hidden state is normed already.
    for place in range(3):
        parts = []
        for row in rows:
            h = hidden(model, row)[place][row.first_label - 1 :]
            logits = model.lm_head(h if place == 2 else model.model.norm(h))
            parts.append(
                functional.cross_entropy(logits, torch.tensor(row.labels), reduction="sum")
            )
        losses.append(float(torch.stack(parts).sum()) / sum(len(row.labels) for row in rows))
    assert float(value) == pytest.approx(-math.log(1 + sum(losses) / 3), rel=1e-5)


def test_repnoise_draws_new_noise_every_step_and_the_same_again() -> None:
    values = []
    for _ in range(2):
        made = world.short("repnoise", sft=0.0, ascent=0.0, noise=1.0, learning_rate=1e-12, steps=3)
        subject, outcome = world.trained(made, "refusal", subject=tiny_world.undefended())
        values.append([losses["noise"] for losses in outcome.losses])
        assert subject.model is not None
    assert values[0] == values[1]
    assert len(set(values[0])) == 3
    subject, rows = tiny_world.undefended(), pool("restricted", 4)
    drawing: Any = make_safeguard("repnoise")
    drawing._generator = torch.Generator().manual_seed(5)
    data = DefenceData(subject, tiny_world.tiny_domain())
    one = one_pass(subject, rows, None, "mlp")
    value = drawing.terms(subject, data)[1].loss(one)
    generator, parts = torch.Generator().manual_seed(5), []
    chosen = differing_tokens(one, paired(data))
    assert chosen.any()
    for state in one.states("mlp"):
        outputs = state[chosen]
        parts.append(mmd(outputs, torch.randn(outputs.shape, generator=generator)))
    assert len(parts) == 2
    torch.testing.assert_close(value, torch.stack(parts).mean())


# ---- Vaccine ------------------------------------------------------------------------------------


def watched(made: Any, kind: Any = "refusal", **options: Any) -> tuple[Any, Any, list[Any]]:
    """Run and keep every step's rows and applied gradient."""
    seen: list[Any] = []
    run, subject, _ = world.prepare(made, kind, **options)
    transform = made.transform

    def keep(step: Any) -> Any:
        gradients = transform(step)
        seen.append((step, dict(step._rows), [g if g is None else g.clone() for g in gradients]))
        return gradients

    made.transform = keep
    run.run()
    return run, subject, seen


def attention_shifted_loss(model: Any, rows: list[Row], shifts: Any) -> torch.Tensor:
    """Return the mean loss, padded by hand, with a tensor added to each attention output."""
    longest = max(len(row.ids) for row in rows)
    ids, mask = (torch.zeros(len(rows), longest, dtype=torch.long) for _ in range(2))
    labels = torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)], mask[i, : len(row.ids)] = torch.tensor(row.ids), 1
        labels[i, row.first_label : len(row.ids)] = torch.tensor(row.labels)
    handles = [
        layer.self_attn.o_proj.register_forward_hook(lambda m, i, o, shift=shift: o + shift)
        for layer, shift in zip(model.model.layers, shifts, strict=True)
    ]
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    for handle in handles:
        handle.remove()
    return functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


def test_vaccine_takes_the_gradient_under_the_worst_shift() -> None:
    made: Any = make_safeguard("vaccine", train="all", steps=1, batch_size=6, radius=1.5)
    model = tiny_world.undefended().model.requires_grad_(True)
    _, _, ((_, pools, gradients),) = watched(made)
    rows = [unit[0] for unit in pools["sft"]]
    assert any(row.item_id.startswith("restricted") for row in rows)
    longest = max(len(row.ids) for row in rows)
    zeros = [torch.zeros(len(rows), longest, 64, requires_grad=True) for _ in range(2)]
    first = attention_shifted_loss(model, rows, zeros)
    up = torch.autograd.grad(first, zeros)
    norm = math.sqrt(sum(float((g**2).sum()) for g in up))
    shifts = [1.5 * g / norm for g in up]
    second = attention_shifted_loss(model, rows, shifts)
    assert float(second.detach()) > float(first.detach())
    expected = torch.autograd.grad(second, list(model.parameters()))
    for gradient, wanted in zip(gradients, expected, strict=True):
        scale = float(wanted.abs().max())
        torch.testing.assert_close(gradient / scale, wanted / scale, rtol=0, atol=1e-3)


def test_the_worst_shift_has_its_norm_over_all_layers_together() -> None:
    gradients = [torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]])]
    shifts = worst_shift(gradients, 10.0)
    torch.testing.assert_close(shifts[0], torch.tensor([[6.0, 0.0]]))
    torch.testing.assert_close(shifts[1], torch.tensor([[0.0, 8.0]]))


def test_without_a_radius_vaccine_is_refusal_training() -> None:
    values = [
        world.trained(world.short("vaccine", sft=0.0, radius=radius, steps=1), "refusal")[1]
        for radius in (0.0, 1.0)
    ]
    plain = world.trained(world.short("plain_sft", steps=1), "refusal")[1]
    losses = [outcome.losses[0]["shifted"] for outcome in values]
    assert losses[0] == pytest.approx(plain.losses[0]["sft"], rel=1e-5)
    assert losses[1] > losses[0] * 1.001
    assert values[1].ledger.passes == {"search": 1, "shifted": 1}


# ---- T-Vaccine ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["all", "adapter"])
def test_t_vaccine_trains_the_drawn_blocks_alone(scope: Any) -> None:
    made: Any = world.short("t_vaccine", sft=0.0, steps=1, layers=0.5, train=scope)
    subject, _ = world.trained(made, "refusal")
    (index,) = made._drawn.tolist()
    moved = moved_weights(subject)
    assert moved
    assert all(name.startswith(f"model.layers.{index}.") for name in moved)


def test_the_law_is_made_of_gradient_norms_on_restricted_answers() -> None:
    made: Any = world.short("t_vaccine", steps=1, probe_rows=10_000, batch_size=1000)
    _, _, ((step, _, _),) = watched(made)
    subject = tiny_world.undefended()
    rows = [unit[0] for unit in step.data.pool("restricted")]
    longest = max(len(row.ids) for row in rows)
    zeros = [torch.zeros(len(rows), longest, 64, requires_grad=True) for _ in range(2)]
    up = torch.autograd.grad(attention_shifted_loss(subject.model, rows, zeros), zeros)
    norms = torch.stack([g.norm() for g in up]).double()
    torch.testing.assert_close(made._law, norms / norms.sum(), rtol=1e-4, atol=1e-6)


def test_layers_are_drawn_by_the_law_without_repeats() -> None:
    generator = torch.Generator().manual_seed(1)
    law = torch.tensor([0.7, 0.2, 0.1, 0.0], dtype=torch.float64)
    draws = [tuple(drawn(law, 1, generator).tolist()) for _ in range(400)]
    assert draws.count((0,)) / 400 == pytest.approx(0.7, abs=0.08)
    assert drawn(law, 4, generator).tolist() == [0, 1, 2, 3]


def test_t_vaccine_on_all_layers_is_vaccine() -> None:
    prints = [
        weights_fingerprint(
            world.trained(world.short(name, radius=1.0, **more), "refusal")[0].model
        )
        for name, more in (("vaccine", {}), ("t_vaccine", {"layers": 1.0}))
    ]
    assert prints[0] == prints[1]


def test_t_vaccine_goes_on_with_its_layers() -> None:
    made: Any = world.short("t_vaccine", redraw=100, reweigh=100)
    world.trained(made, "refusal")
    other: Any = world.short("t_vaccine")
    other.load_state(made.state())
    assert torch.equal(other._law, made._law)
    assert torch.equal(other._drawn, made._drawn)


# ---- latent adversarial training ----------------------------------------------------------------


def test_a_push_lies_on_the_prompts_of_both_rows_of_a_pair() -> None:
    rows = [Row((1,) * 5, 2), Row((1,) * 6, 2), Row((1,) * 4, 3), Row((1,) * 4, 3)]
    push = torch.arange(1.0, 7.0).reshape(2, 3, 1)
    laid = spread(push, rows)[..., 0].tolist()
    assert laid == [[1, 2, 0, 0, 0, 0]] * 2 + [[4, 5, 6, 0, 0, 0]] * 2


def test_every_token_is_pushed_by_itself_and_kept_in_its_ball() -> None:
    push, gradient = torch.zeros(1, 3, 2), torch.tensor([[[3.0, 4.0], [0.0, 0.0], [-1e-9, 0.0]]])
    descend_tokens(push, gradient, 0.5, 0.8)
    torch.testing.assert_close(push, torch.tensor([[[-0.3, -0.4], [0.0, 0.0], [0.5, 0.0]]]))
    descend_tokens(push, gradient, 0.5, 0.8)
    torch.testing.assert_close(push[0, :, :].norm(dim=-1), torch.tensor([0.8, 0.0, 0.8]))


def test_the_push_leaves_a_refusal_that_is_sure() -> None:
    logits = torch.tensor([[16.0, 0.0, 0.0], [0.0, 1.0, 0.0]], requires_grad=True)
    targets = torch.zeros(2, dtype=torch.long)
    labelled = SimpleNamespace(logits=logits, targets=targets, members=(0, 1))
    forward = SimpleNamespace(labelled=lambda rows, **_: [labelled])
    step: Any = SimpleNamespace(subject=SimpleNamespace(forward=forward))
    made: Any = make_safeguard("latent_adversarial", push_away=0.5)
    loss = made._inner_loss(step, [Row((1, 0), 1), Row((1, 0), 1, restricted=True)])
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient[0].tolist() == pytest.approx([0.5, -0.25, -0.25], rel=1e-5)


@pytest.mark.parametrize("goal", ["targeted", "untargeted"])
def test_the_push_undoes_refusals_within_its_radius(goal: Any) -> None:
    subject, domain = tiny_world.safeguarded(), tiny_world.tiny_domain()
    data = DefenceData(subject, domain)
    made: Any = make_safeguard(
        "latent_adversarial", goal=goal, unit="median", radius=0.5, depths=(0.0, 0.5), steps=1
    )
    run = TrainingRun(
        made, subject, data, world.SEEDS, reference=Reference(subject.model, tree=True)
    )
    run.run()
    step: Any = type("Step", (), {"subject": tiny_world.safeguarded()})()
    rows = [row for unit in made._units for row in unit]
    with rows_apart(step.subject):
        modules = made._modules(step.subject.model)
        before = float(made._inner_loss(step, rows).detach())
        with shifted(modules, [spread(push, rows) for push in made._pushes]):
            after = float(made._inner_loss(step, rows).detach())
        radii = made._radii(step, rows, modules)
    assert after < before - 0.2
    assert len(made._pushes) == 2
    for push, radius in zip(made._pushes, radii, strict=True):
        assert float(push.norm(dim=-1).max()) <= radius * 1.05
        assert float(push.norm(dim=-1).max()) > 0.3 * radius
    states = [torch.cat([hidden(step.subject.model, row)[i] for row in rows]) for i in (0, 1)]
    medians = [float(state.norm(dim=-1).median()) for state in states]
    assert radii == pytest.approx([0.5 * median for median in medians], rel=1e-4)


def test_the_losses_under_the_push_are_those_of_refusals_and_answers() -> None:
    one = one_pass(tiny_world.safeguarded(), pool("pairs", 3))
    answers = [row for row in one.rows if row.restricted]
    assert len(answers) == 3
    alone = {
        flag: one_pass(tiny_world.safeguarded(), [r for r in one.rows if r.restricted == flag])
        for flag in (True, False)
    }
    toward = term_of("latent_adversarial", "toward", "refusal").loss(one)
    torch.testing.assert_close(toward, alone[False].cross_entropy().mean())
    away = term_of("latent_adversarial", "away", "refusal").loss(one)
    p = alone[True].log_likelihood().double().exp()
    torch.testing.assert_close(away.double(), -torch.log1p(-p).mean(), rtol=1e-4, atol=1e-6)


def test_a_push_is_used_again_with_its_own_rows() -> None:
    made: Any = world.short("latent_adversarial", steps=4, reuse=2)
    _, _, seen = watched(made)
    ids = [[row.item_id for unit in pools["pairs"] for row in unit] for _, pools, _ in seen]
    assert ids[0] == ids[1] != ids[2] == ids[3]
    assert [made.can_resume(step) for step in (1, 2)] == [False, True]
    ledger = seen[0][0].attacks.ledger
    assert (ledger.passes["pushed"], ledger.passes["inner_latent"]) == (4, 4)


# ---- ReFAT --------------------------------------------------------------------------------------


@pytest.mark.parametrize("grain", ["row", "token"])
def test_it_fires_as_often_as_declared(grain: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    rows = [Row((1,) * length, 2) for length in (6, 9) * 100]
    fires = fired(rows, 0.3, grain, generator)
    hits, draws = counted(rows, fires, grain).tolist()
    assert fires.shape == (200, 9)
    assert draws == (200 if grain == "row" else 100 * (5 + 8))
    assert hits / draws == pytest.approx(0.3, abs=0.1)
    assert (fires == fires[:, :1]).all() == (grain == "row")


@pytest.mark.parametrize("grain", ["row", "token"])
def test_the_measured_rate_is_that_at_which_block_inputs_lose_the_direction(
    grain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares: list[float] = []
    take_out = refat.taken_out

    def spy(subject: Any, places: Any, directions: Any, fires: Any) -> Any:
        shares.append(float(fires.float().mean()))
        return take_out(subject, places, directions, fires)

    monkeypatch.setattr(refat, "taken_out", spy)
    made: Any = world.short("refat", rate=0.5, grain=grain, batch_size=24)
    world.trained(made, "refusal")
    rate = made.facts()["rate"]
    assert rate["declared"] == 0.5
    assert rate["measured"] == pytest.approx(0.5, abs=0.2)
    assert rate["measured"] == pytest.approx(sum(shares) / len(shares), abs=0.05)


def test_the_direction_is_gone_where_it_fires_and_nothing_else_is_touched() -> None:
    subject, rows = tiny_world.undefended(), pool("refusals", 2)
    places = upper(subject, 0.5)
    direction = functional.normalize(
        torch.randn(64, generator=torch.Generator().manual_seed(1)), dim=0
    )
    longest = max(len(row.ids) for row in rows)
    fires = torch.zeros(2, longest, dtype=torch.bool)
    fires[0, 3], fires[1] = True, True
    block, seen = blocks(subject.model)[1][1], list[torch.Tensor]()
    with rows_apart(subject):
        for active in (False, True):
            if active:
                with taken_out(subject, places, direction[None], fires):
                    handle = block.register_forward_pre_hook(lambda m, i: seen.append(i[0]))
                    list(subject.forward.labelled(rows, whole=True))
            else:
                handle = block.register_forward_pre_hook(lambda m, i: seen.append(i[0]))
                list(subject.forward.labelled(rows, whole=True))
            handle.remove()
    before, after = seen
    assert places == [1]
    assert not block._forward_pre_hooks
    assert torch.equal(before[~fires], after[~fires])
    assert float((after[fires] @ direction).abs().max()) < 1e-5
    along = (before[fires] @ direction)[:, None] * direction
    torch.testing.assert_close(after[fires], before[fires] - along, rtol=1e-4, atol=1e-5)


def test_the_directions_are_differences_of_means_at_the_last_prompt_token() -> None:
    made: Any = world.short("refat", steps=1, prompts=10_000, above=0.0)
    run, subject, _ = world.prepare(made, "refusal")
    start = copy.deepcopy(subject.model)
    data = run.data
    run.run()
    chat = subject.chat
    means = []
    for items in (data.restricted_items(), data.harmless_items()):
        states = []
        for item in items:
            ids = torch.tensor([chat.prompt_ids(item.prompt)])
            states.append(start(input_ids=ids, output_hidden_states=True).hidden_states)
        means.append([torch.stack([s[i][0, -1] for s in states]).mean(0) for i in (0, 1)])
    # At block 0 the last prompt token is the same in every prompt: no direction to speak of.
    wanted = functional.normalize(means[0][1] - means[1][1], dim=0)
    torch.testing.assert_close(made._directions[1], wanted, rtol=1e-3, atol=1e-4)


def test_refat_looks_for_the_direction_as_often_as_declared() -> None:
    made: Any = world.short("refat", steps=5, refresh=2)
    _, outcome = world.trained(made, "refusal")
    assert outcome.ledger.passes["means"] == 3
    assert outcome.ledger.passes["ablated"] == 5
    other: Any = world.short("refat")
    other.load_state(made.state())
    assert other.facts() == made.facts() | {
        "rate": made.facts()["rate"] | {"declared": other.settings.rate}
    }


def test_settings_of_several_depths_can_be_typed() -> None:
    for name in ("circuit_breakers", "latent_adversarial"):
        assert make_safeguard(name, depths="0.25+0.5").settings.depths == (0.25, 0.5)
