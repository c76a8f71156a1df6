"""MUDMAN, CIR and RepSelect against computations of their own: masks, projections, one edit."""

import copy
from pathlib import Path
from typing import Any

import pytest
import safeguard_world as world
import tiny_world
import torch
from torch.nn import functional

from durometer.core.errors import InputError
from durometer.safeguards.banks import GradientBank
from durometer.safeguards.bench import Bench
from durometer.safeguards.checkpoint import CheckpointFile
from durometer.safeguards.cir import common_directions, distance, overlap
from durometer.safeguards.data import DefenceData
from durometer.safeguards.passes import Reference, passes
from durometer.safeguards.rep_select import edited_weights, filtered, top_directions
from durometer.safeguards.train import Report
from durometer.subjects.fingerprint import weights_fingerprint

SGD: dict[str, Any] = {"optimizer": "sgd", "learning_rate": 1.0, "train": "mlp"}


def spied(made: Any, pools: tuple[str, ...]) -> list[dict[str, Any]]:
    """Have a safeguard tell the rows of every step, by pool."""
    seen: list[dict[str, Any]] = []
    visits = made.visits

    def spy(step: Any) -> Any:
        seen.append({pool: step.rows(pool) for pool in pools})
        yield from visits(step)

    made.visits = spy
    return seen


def logits_of(model: Any, row: Any) -> torch.Tensor:
    """Return the logits that predict a row's labels, by transformers alone, unpacked."""
    found: torch.Tensor = model(input_ids=torch.tensor([row.ids])).logits[0]
    return found[row.first_label - 1 : -1]


def mean_loss(model: Any, rows: Any, *, entropy: bool = False) -> torch.Tensor:
    logits = torch.cat([logits_of(model, row) for row in rows])
    if entropy:
        logs = logits.log_softmax(-1)
        return (logs.exp() * logs).sum(-1).mean()
    return functional.cross_entropy(logits, torch.tensor([t for row in rows for t in row.labels]))


def mlp_names(model: Any) -> list[str]:
    return [name for name, _ in model.named_parameters() if ".mlp." in name]


def gradients(loss: torch.Tensor, model: Any, names: list[str]) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, [model.get_parameter(name) for name in names]))


def moved(subject: Any, start: Any) -> dict[str, torch.Tensor]:
    return {
        name: (p - start.get_parameter(name)).detach()
        for name, p in subject.model.named_parameters()
        if not torch.equal(p, start.get_parameter(name))
    }


# ---- MUDMAN ------------------------------------------------------------------------------------

MUDMAN: dict[str, Any] = SGD | {
    "sft": 0.5,
    "relearning": 0.3,
    "unlearning": 0.4,
    "retain_momentum": 0.7,
    "fork_every": 2,
    "steps": 3,
}


def test_mudman_is_what_torch_makes_of_it() -> None:
    """Three updates by hand: the fork is kept for two, and every loss has a pass of its own."""
    made = world.short("mudman", **MUDMAN)
    seen = spied(made, ("sft", "restricted"))
    start = copy.deepcopy(tiny_world.undefended().model)
    main = copy.deepcopy(start).requires_grad_(True)
    names = mlp_names(main)
    subject, _ = world.trained(made)
    accumulated = [torch.zeros_like(main.get_parameter(name)) for name in names]
    for number, rows in enumerate(seen):
        if number % 2 == 0:
            fork = copy.deepcopy(main)
        fresh = gradients(0.5 * mean_loss(main, rows["sft"]), main, names)
        accumulated = [0.7 * a + 0.3 * g for a, g in zip(accumulated, fresh, strict=True)]
        learnt = gradients(mean_loss(fork, rows["restricted"]), fork, names)
        with torch.no_grad():
            for name, g in zip(names, learnt, strict=True):
                fork.get_parameter(name).sub_(0.3 * g)
        away = gradients(mean_loss(fork, rows["restricted"], entropy=True), fork, names)
        norm = torch.cat([u.flatten() for u in away]).norm()
        with torch.no_grad():
            for name, a, u in zip(names, accumulated, away, strict=True):
                masked = torch.where(a.sign() == u.sign(), u, torch.zeros_like(u))
                main.get_parameter(name).sub_(a + 0.4 / norm * masked)
    for name, change in moved(subject, start).items():
        wanted = main.get_parameter(name) - start.get_parameter(name)
        assert (change - wanted).norm() < 0.01 * wanted.norm(), name
    assert moved(subject, start).keys() == set(names)


def test_mudman_takes_the_norm_before_it_masks() -> None:
    norms = []
    for mask in (False, True):
        made = world.short("mudman", **(MUDMAN | {"steps": 1, "sft": 1e-9, "mask": mask}))
        start = tiny_world.undefended().model
        subject, _ = world.trained(made)
        norms.append(sum(float((d**2).sum()) for d in moved(subject, start).values()) ** 0.5)
    assert norms[0] == pytest.approx(0.4, rel=1e-3)
    assert 0.1 < norms[1] < 0.39


def test_mudman_unlearns_at_the_attackers_weights_as_they_are_after_its_update() -> None:
    """The released code goes back through the pass before it; then the rate made no difference."""
    prints = set()
    for rate in (0.0, 1e-3, 0.3):
        made = world.short("mudman", **(MUDMAN | {"steps": 1, "relearning": rate}))
        prints.add(weights_fingerprint(world.trained(made)[0].model))
    assert len(prints) == 3


def test_mudman_counts_three_passes_a_step() -> None:
    _, outcome = world.trained(world.short("mudman"))
    assert outcome.ledger.passes == {"weights": 4, "fork": 4, "relearnt": 4}


# ---- CIR ---------------------------------------------------------------------------------------

CIR: dict[str, Any] = SGD | {
    "sft": 0.0,
    "retention": 0.0,
    "overlap": 0.3,
    "first_read": 0.0,
    "last_read": 1.0,
    "steps": 2,
    "refit": 1,
    "last_block": 1.0,
}


def recorded(model: Any, ids: list[int]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return outputs of the MLPs and the residual stream of one unpacked row, but its last."""
    outputs: list[torch.Tensor] = []
    handles = [
        layer.mlp.register_forward_hook(lambda m, i, o: outputs.append(o[0]))
        for layer in model.model.layers
    ]
    states: list[torch.Tensor] = []
    handles += [
        layer.register_forward_hook(
            lambda m, i, o: states.append((o[0] if isinstance(o, tuple) else o)[0])
        )
        for layer in model.model.layers
    ]
    model(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return [o[:-1] for o in outputs], [s[:-1] for s in states]


def test_overlap_and_distance_by_hand() -> None:
    now, base = tiny_world.safeguarded(), tiny_world.undefended()
    data = DefenceData(now, tiny_world.tiny_domain("knowledge"))
    rows = [unit[0] for unit in data.pool("restricted")[:5]]
    reference = Reference(base.model, tree=base.tree)
    with torch.no_grad():
        roles = ("mlp", "residual")
        (one,) = passes(now.forward, rows, roles, reference, whole=True)  # type: ignore[arg-type]
        counted = torch.cat([torch.arange(len(row.ids) - 1) > 0 for row in rows])
        found = overlap(one, slice(1, 2), counted)
        far = distance(one, 2)
        pairs = [(recorded(now.model, row.ids), recorded(base.model, row.ids)) for row in rows]  # type: ignore[arg-type]
    mine = torch.cat([m[0][1][1:] for m, _ in pairs])
    before = torch.cat([b[0][1][1:] for _, b in pairs])
    wanted = (mine * before).sum(-1).clamp(min=0) / before.norm(dim=-1).mean() ** 2
    torch.testing.assert_close(found[counted].mean() * counted.float().mean(), wanted.mean())
    torch.testing.assert_close(found.mean(), wanted.mean(), rtol=1e-4, atol=1e-5)
    assert (found[~counted] == 0).all()
    here = torch.cat([m[1][1] for m, _ in pairs])
    there = torch.cat([b[1][1] for _, b in pairs])
    wanted = (here - there).norm(dim=-1) / there.norm(dim=-1).mean()
    torch.testing.assert_close(far, wanted, rtol=1e-3, atol=1e-4)


def test_opposed_outputs_do_not_overlap() -> None:
    class Pair:
        def __init__(self, sign: float, reference: Any = None) -> None:
            self.sign, self.reference = sign, reference

        def states(self, role: str) -> list[torch.Tensor]:
            return [self.sign * torch.eye(3) * 2]

    counted = torch.tensor([True, True, True])
    same = overlap(Pair(1, Pair(1)), slice(0, 1), counted)  # type: ignore[arg-type]
    opposed = overlap(Pair(-1, Pair(1)), slice(0, 1), counted)  # type: ignore[arg-type]
    assert same.tolist() == [1, 1, 1]
    assert opposed.tolist() == [0, 0, 0]


def test_common_directions_are_the_mean_and_the_top_components() -> None:
    generator = torch.Generator().manual_seed(3)
    scales = torch.tensor([9.0, 6.0, 4.0, *[0.1] * 9])
    tokens = torch.randn(50, 12, generator=generator) * scales + 2.0
    basis = common_directions(tokens, 4)
    mean = tokens.mean(0)
    top = torch.linalg.svd(tokens - mean, full_matrices=False).Vh[:3].T
    wanted = torch.linalg.qr(torch.cat([mean[:, None], top], 1)).Q
    projector = basis @ basis.T
    torch.testing.assert_close(projector, wanted @ wanted.T, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(projector @ projector, projector, rtol=1e-4, atol=1e-5)
    assert common_directions(tokens, 0).shape == (12, 0)
    assert common_directions(tokens, 99).shape == (12, 11)


def test_the_first_epoch_of_cir_only_collects() -> None:
    start = tiny_world.undefended().model
    still, _ = world.trained(world.short("cir", **(CIR | {"steps": 2, "refit": 2})))
    assert not moved(still, start)
    begun, _ = world.trained(world.short("cir", **(CIR | {"steps": 3, "refit": 2})))
    assert moved(begun, start).keys() == set(mlp_names(start))


def tokens_of(model: Any, base: Any, rows: Any) -> dict[str, list[tuple[Any, Any]]]:
    """Return input and output gradient of every MLP map, unpacked row by unpacked row."""
    maps = {n.removesuffix(".weight"): model.get_submodule(n[:-7]) for n in mlp_names(model)}
    total = sum(len(row.ids) - 2 for row in rows)
    norms = [
        torch.cat([recorded(base, list(row.ids))[0][i][1:] for row in rows]).norm(dim=-1).mean()
        for i in range(len(model.model.layers))
    ]
    found: dict[str, list[tuple[Any, Any]]] = {name: [] for name in maps}
    for row in rows:
        inputs: dict[str, torch.Tensor] = {}
        outputs: dict[str, torch.Tensor] = {}

        def keep(name: str, inputs: Any = inputs, outputs: Any = outputs) -> Any:
            def hook(module: Any, i: Any, o: Any) -> None:
                inputs[name], outputs[name] = i[0].detach()[0], o
                o.retain_grad()

            return hook

        handles = [m.register_forward_hook(keep(name)) for name, m in maps.items()]
        mine, _ = recorded(model, list(row.ids))
        with torch.no_grad():
            before, _ = recorded(base, list(row.ids))
        pairs = zip(mine, before, norms, strict=True)
        loss = sum((m[1:] * b[1:]).sum(-1).clamp(min=0).sum() / n**2 for m, b, n in pairs)
        (loss / total / len(norms)).backward()
        for handle in handles:
            handle.remove()
        for name in maps:
            # Neither the first token nor the last.
            found[name].append((inputs[name][1:-1], outputs[name].grad[0, 1:-1]))  # type: ignore[index]
    return found


def test_the_gradient_of_cir_is_the_sum_over_projected_tokens() -> None:
    """Token by token with hooks of our own, unpacked; the directions are those fitted before."""
    made: Any = world.short("cir", **(CIR | {"input_directions": 3, "gradient_directions": 5}))
    seen = spied(made, ("restricted",))
    kept: list[Any] = []
    filtered_ = made._filtered

    def spy() -> Any:
        kept.append((dict(made._bases), filtered_()))
        return kept[-1][1]

    made._filtered = spy
    subject, _ = world.trained(made)
    ((bases, found),) = kept
    start = tiny_world.undefended().model
    model = copy.deepcopy(start).requires_grad_(True)
    for name, tokens in tokens_of(model, start, seen[1]["restricted"]).items():
        came, out = bases[name]
        assert (came.shape[1], out.shape[1]) == (3, 5)
        wanted = torch.zeros_like(found[name])
        for inputs, gradient in tokens:
            for a, g in zip(inputs, gradient, strict=True):
                wanted += torch.outer(g - out @ (out.T @ g), a - came @ (came.T @ a))
        # What is found is the gradient of the coefficient times the loss.
        assert (found[name] / 0.3 - wanted).norm() < 1e-3 * wanted.norm(), name
    norm = sum(float((d**2).sum()) for d in moved(subject, start).values()) ** 0.5
    assert norm == pytest.approx(0.3, rel=1e-3)


def test_cir_stops_where_retain_rows_suffer() -> None:
    free = world.short("cir", **(CIR | {"steps": 6, "overlap": 3.0}))
    assert world.trained(free)[1].status == "done"
    made = world.short("cir", **(CIR | {"steps": 6, "overlap": 3.0, "retain_limit": 1.001}))
    _, outcome = world.trained(made)
    assert outcome.status == "stopped"
    assert 1 < outcome.steps < 6
    assert "cross-entropy on retain rows" in outcome.reason


# ---- going on after a kill ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mudman", {"steps": 7, "fork_every": 3}),
        ("mudman", {"steps": 7, "fork_every": 3, "train": "adapter", "rank": 2}),
        ("cir", {"steps": 7, "refit": 2, "retain_limit": 50.0}),
    ],
)
def test_what_a_safeguard_keeps_goes_on_bit_for_bit(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    subject, whole = world.trained(world.short(name, **settings))
    path = tmp_path / "training.safetensors"
    file = CheckpointFile(path, {"name": name}, every=2)
    run, _, _ = world.prepare(world.short(name, **settings), checkpoint=file)

    def die(report: Report) -> None:
        if report.update.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.run(die)
    # The frozen reference is the start's, as ``harden`` has it.
    file = CheckpointFile(path, {"name": name}, every=2, resume=True)
    again, outcome = world.trained(world.short(name, **settings), checkpoint=file)
    assert weights_fingerprint(again.model) == weights_fingerprint(subject.model)
    assert outcome.losses == whole.losses


# ---- RepSelect ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
@pytest.mark.parametrize(("collapse", "power"), [("soft", 1), ("quadratic", 2), ("hard", None)])
def test_the_filter_turns_the_spectrum_over(shape: Any, collapse: Any, power: int | None) -> None:
    """Of its own directions a gradient keeps ``s_k^2 / s_i`` where it had ``s_i`` (soft)."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    wanted = values.clone()
    # A direction is divided once on the side of the inputs and once on that of the outputs.
    wanted[:3] = 0 if power is None else values[:3] / (values[:3] / values[2]) ** (2 * power)
    found = filtered(matrix, matrix, 0.5, collapse)
    torch.testing.assert_close(found, (left * wanted @ right).float(), rtol=1e-4, atol=1e-5)
    assert torch.equal(filtered(matrix, matrix, 0.0, collapse), matrix)


def test_the_filter_with_directions_of_another_gradient() -> None:
    generator = torch.Generator().manual_seed(2)
    matrix, source = torch.randn(2, 8, 5, generator=generator)
    left, values, right = torch.linalg.svd(source, full_matrices=False)
    u, s, v = left[:, :2], values[:2], right[:2].T
    inputs = torch.eye(5) - v @ torch.diag(1 - s[1] / s) @ v.T
    outputs = torch.eye(8) - u @ torch.diag(1 - s[1] / s) @ u.T
    found = filtered(matrix, source, 0.4, "soft")
    torch.testing.assert_close(found, outputs @ matrix @ inputs, rtol=1e-4, atol=1e-5)
    hard = filtered(matrix, source, 0.4, "hard")
    assert float((hard @ v).norm()) < 1e-5
    assert float((u.T @ hard).norm()) < 1e-5


def test_a_gradient_of_low_rank_has_no_further_directions() -> None:
    generator = torch.Generator().manual_seed(4)
    matrix = torch.randn(7, 2, generator=generator) @ torch.randn(2, 9, generator=generator)
    left, values, right = top_directions(matrix, 5)
    assert len(values) == 2
    torch.testing.assert_close((left * values @ right.T).float(), matrix, rtol=1e-4, atol=1e-5)
    assert filtered(matrix, matrix, 1.0, "soft").isfinite().all()


def bench_of(subject: Any) -> Bench:
    data = DefenceData(subject, tiny_world.tiny_domain("knowledge"))
    reference = Reference(subject.model, tree=subject.tree)
    return Bench(subject, data, world.SEEDS, reference)


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_the_gradient_is_taken_behind_the_eliciting_attack(
    rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: Any = world.short_edit("rep_select", elicit_rate=rate, batch_size=10)
    subject = tiny_world.undefended()
    bench = bench_of(subject)
    elicited = copy.deepcopy(subject.model)
    collect = type(made)._collect

    def merged(self: Any, bench: Bench, bank: GradientBank, pool: str) -> None:
        for name, module in subject.model.named_modules():
            if hasattr(module, "get_delta_weight"):
                with torch.no_grad():
                    delta = module.get_delta_weight("durometer")
                    elicited.get_submodule(name).weight.add_(delta)
        collect(self, bench, bank, pool)

    monkeypatch.setattr(type(made), "_collect", merged)
    before = weights_fingerprint(subject.model)
    found = made._gradients(bench)["restricted"]
    assert weights_fingerprint(subject.model) == before
    assert bool(rate) == (weights_fingerprint(elicited) != before)
    names = mlp_names(elicited)
    rows = [unit[0] for unit in bench.data.pool("restricted")]
    elicited.requires_grad_(True)
    loss = sum(mean_loss(elicited, rows[i : i + 10]) for i in range(0, len(rows), 10))
    for name, wanted in zip(names, gradients(loss, elicited, names), strict=True):  # type: ignore[arg-type]
        assert (found[name] - wanted).norm() < 1e-3 * wanted.norm(), name
    assert found.keys() == set(names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_edit_is_one_step_from_the_stored_weights(dtype: Any) -> None:
    """Rounded once, within the limit, up the restricted loss, and no other weight is touched."""
    subject = tiny_world.undefended()
    subject.model.to(dtype)
    start = copy.deepcopy(subject.model)
    made: Any = world.short_edit("rep_select", retain_kl=0.2, bisections=6)
    bench = bench_of(subject)
    edit = made._filtered(made._gradients(bench))
    made.edit(bench)
    facts = made.facts()
    changed = {
        name
        for name, p in subject.model.named_parameters()
        if not torch.equal(p, start.get_parameter(name))
    }
    assert changed == set(mlp_names(start))
    for name, direction in edit.items():
        before = start.get_parameter(name).float()
        wanted = (before + facts["applied_rate"] * direction).to(dtype)
        assert torch.equal(subject.model.get_parameter(name), wanted)
    assert 0.02 < facts["retain_kl"] <= 0.2
    with torch.no_grad():
        own = [unit[0] for unit in bench.data.pool("restricted")]
        assert mean_loss(subject.model, own) > mean_loss(start, own) + 0.1


def test_the_limit_is_a_divergence_on_retain_rows() -> None:
    subject = tiny_world.undefended()
    start = copy.deepcopy(subject.model)
    made: Any = world.short_edit("rep_select", retain_kl=0.05, bisections=5)
    bench = bench_of(subject)
    made.edit(bench)
    rows = [unit[0] for unit in bench.data.pool("retain")]

    def divergence(model: Any) -> float:
        with torch.no_grad():
            now, then = (
                torch.cat([logits_of(m, row) for row in rows]).log_softmax(-1)
                for m in (model, start)
            )
        return float(functional.kl_div(now, then, reduction="batchmean", log_target=True))

    assert made.facts()["retain_kl"] == pytest.approx(divergence(subject.model), rel=1e-3)
    with torch.no_grad():
        for name in mlp_names(start):
            weight, before = subject.model.get_parameter(name), start.get_parameter(name)
            weight.copy_(before + 1.1 * (weight - before))
    assert divergence(subject.model) > 0.05  # the next rate would have been too much


def test_an_edit_without_room_is_refused_and_changes_nothing() -> None:
    subject = tiny_world.undefended()
    before = weights_fingerprint(subject.model)
    with pytest.raises(InputError, match="raise it, or lower rate"):
        world.edit(world.short_edit("rep_select", rate=1e9, retain_kl=1e-4), subject)
    assert weights_fingerprint(subject.model) == before


def test_only_the_chosen_blocks_are_edited() -> None:
    model = tiny_world.undefended().model
    made: Any = world.short_edit("rep_select", first_block=0.5)
    names = edited_weights(model, made.settings)
    assert names == [name for name in mlp_names(model) if ".layers.1." in name]
