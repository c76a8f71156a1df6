"""Services of safeguards: gradients, perturbations, passes, checkpoints, going on after a kill."""

import errno
import math
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import safeguard_world as world
import tiny_world
import torch

from durometer.core.edits import Restoration
from durometer.core.errors import DurometerError, InputError, StorageError
from durometer.core.forward import Forward
from durometer.core.rows import Row
from durometer.core.structure import blocks
from durometer.core.training import DivergedError
from durometer.safeguards import checkpoint
from durometer.safeguards.banks import GradientBank, perturbed
from durometer.safeguards.base import Term
from durometer.safeguards.checkpoint import CheckpointFile
from durometer.safeguards.data import DefenceData, Streams
from durometer.safeguards.passes import Pass, passes, sites
from durometer.safeguards.train import Report, TrainingRun, reduced
from durometer.subjects.base import Subject
from durometer.subjects.fingerprint import weights_checksum, weights_fingerprint

lent = Subject.lent

# ---- gradients and perturbations ---------------------------------------------------------------


def test_the_bank_sums_and_compares_like_torch() -> None:
    first, second = torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(4))
    bank = GradientBank([first, second])

    def a() -> torch.Tensor:
        return (first**2).sum() + second.sum()

    def b() -> torch.Tensor:
        return (first**3).sum()

    for name, loss in (("a", a), ("b", b), ("a", a)):
        with bank.collecting(name):
            loss().backward()
        assert first.grad is None
        assert second.grad is None
    ga = [2 * g for g in torch.autograd.grad(a(), [first, second])]
    (gb,) = torch.autograd.grad(b(), [first])
    torch.testing.assert_close(bank.gradients("a")[0], ga[0])
    assert bank.gradients("b")[1] is None
    torch.testing.assert_close(bank.total()[0], ga[0] + gb)
    torch.testing.assert_close(bank.combined({"a": 1.0, "b": -3.0})[0], ga[0] - 3 * gb)
    flat = torch.cat([g.flatten() for g in ga]), torch.cat([gb.flatten(), torch.zeros(4)])
    assert bank.norm("a") == pytest.approx(float(flat[0].norm()))
    assert bank.cosine("a", "b") == pytest.approx(
        float(torch.nn.functional.cosine_similarity(*flat, dim=0)), abs=1e-6
    )


def test_the_bank_is_fp32_and_leaves_flags_alone() -> None:
    parameter = torch.nn.Parameter(torch.randn(5, dtype=torch.bfloat16), requires_grad=False)
    bank = GradientBank([parameter])
    with bank.collecting("x"):
        (parameter.float() ** 2).sum().backward()
    assert not parameter.requires_grad
    (gradient,) = bank.gradients("x")
    assert gradient is not None
    assert gradient.dtype == torch.float32


def test_a_perturbation_comes_and_goes_bit_for_bit() -> None:
    subject = tiny_world.undefended()
    name, weight = next(iter(subject.model.named_parameters()))
    before, kept = weights_fingerprint(subject.model), weight.detach().clone()
    delta = 0.1 * torch.randn_like(weight)
    with perturbed(subject, {name: delta}):
        torch.testing.assert_close(weight.detach(), kept + delta)
    assert weights_fingerprint(subject.model) == before
    with pytest.raises(ZeroDivisionError), perturbed(subject, {name: delta}):
        raise ZeroDivisionError
    assert weights_fingerprint(subject.model) == before


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_on_an_accelerator_copies_of_weights_wait_on_the_host(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = tiny_world.undefended()
    name, weight = next(iter(subject.model.named_parameters()))
    assert subject.tree
    asked: list[bool] = []

    def keep(model: Any, *, host: bool) -> Restoration:
        asked.append(host)
        return Restoration(model, host=host)

    monkeypatch.setattr("durometer.subjects.base.Restoration", keep)
    monkeypatch.setattr(Forward, "device", property(lambda self: torch.device(device)))
    with perturbed(subject, {name: torch.ones_like(weight)}):
        pass
    with subject.lent(host=True), subject.lent():
        pass
    assert asked == [device != "cpu", True, device != "cpu"]


@pytest.mark.parametrize(
    "name", ["booster", "ctrap", "sam_unlearning", "seam", "mudman", "tar", "rep_select"]
)
def test_where_copies_wait_changes_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prints = []
    for host in (False, True):
        monkeypatch.setattr(Subject, "lent", partialmethod(lent, host=host))
        if name == "rep_select":
            subject = tiny_world.undefended()
            world.edit(world.short_edit(name), subject)
        else:
            made = world.short(name)
            subject, _ = world.trained(made, made.kinds[0])
        prints.append(weights_fingerprint(subject.model))
    assert prints[0] == prints[1]


def test_a_perturbation_that_the_number_format_swallows_is_refused() -> None:
    subject = tiny_world.undefended()
    subject.model.to(torch.bfloat16)
    name, weight = next(iter(subject.model.named_parameters()))
    before = weights_checksum(subject.model)
    tiny = 1e-5 * torch.randn(weight.shape)
    with (
        pytest.raises(DurometerError, match="too coarse for it; use --dtype float32"),
        perturbed(subject, {name: tiny}),
    ):
        pass
    assert weights_checksum(subject.model) == before


def test_the_checksum_sees_one_changed_and_two_exchanged_elements(tiny_llama: Any) -> None:
    before = weights_checksum(tiny_llama)
    weight = next(tiny_llama.parameters()).data
    weight[1, 0], weight[1, 1] = weight[1, 1].clone(), weight[1, 0].clone()
    assert weights_checksum(tiny_llama) != before
    weight[1, 0], weight[1, 1] = weight[1, 1].clone(), weight[1, 0].clone()
    assert weights_checksum(tiny_llama) == before
    weight[3, 3] += 1e-6
    assert weights_checksum(tiny_llama) != before


# ---- passes ------------------------------------------------------------------------------------

ROWS = [
    Row((5, 9, 7, 11, 13, 20), 3),
    Row((5, 9, 7, 12, 13), 4),
    Row((5, 9, 8, 12, 14, 21, 22, 23), 5),
]


@pytest.mark.parametrize("tree", [True, False])
@pytest.mark.parametrize("architecture", ["Llama", "Qwen2"])
def test_a_pass_sees_what_separate_rows_give(
    make_model: Any, architecture: str, tree: bool
) -> None:
    model = make_model(architecture)
    with torch.no_grad():
        (one,) = passes(Forward(model, tree=tree), ROWS, ("residual", "mlp"), None, whole=True)
        assert not any(module._forward_hooks for module in sites(model, "residual"))
        states, labels = one.states(), one.states(tokens=False)
        hidden, entropies, likelihoods = [], [], []
        for row in ROWS:
            out = model(input_ids=torch.tensor([row.ids]), output_hidden_states=True)
            hidden.append([state[0, :-1] for state in out.hidden_states[:-1]])
            logits = out.logits[0, row.first_label - 1 : -1]
            spread = torch.distributions.Categorical(logits=logits)
            entropies.append(spread.entropy())
            likelihoods.append(spread.log_prob(torch.tensor(row.labels)))
        close = {"rtol": 1e-4, "atol": 1e-5}
        for layer in range(2):
            wanted = torch.cat([states[layer] for states in hidden])
            torch.testing.assert_close(states[layer], wanted, **close)
            wanted = torch.cat(
                [s[layer][row.first_label - 1 :] for s, row in zip(hidden, ROWS, strict=True)]
            )
            torch.testing.assert_close(labels[layer], wanted, **close)
        torch.testing.assert_close(one.entropy(), torch.cat(entropies), **close)
        torch.testing.assert_close(one.log_likelihood(), torch.cat(likelihoods), **close)
        torch.testing.assert_close(-one.cross_entropy(), torch.cat(likelihoods), **close)
        sums = torch.stack([values.sum() for values in likelihoods])
        torch.testing.assert_close(one.row_log_likelihood(), sums, **close)
    assert one.token_ids.tolist() == [token for row in ROWS for token in row.ids[:-1]]
    assert len(states) == 3


@pytest.mark.parametrize("per", ["label", "token", "row", "pair"])
def test_batches_in_parts_give_the_gradient_of_the_whole(tiny_llama: Any, per: Any) -> None:
    values = {
        "label": Pass.entropy,
        "token": lambda one: one.states()[-1].norm(dim=-1),
        "row": Pass.row_log_likelihood,
        "pair": lambda one: one.row_log_likelihood()[0::2] ** 2 - one.row_log_likelihood()[1::2],
    }
    term = Term("x", 1.0, "pool", values[per], per=per)
    gradients = []
    for whole, nodes in ((True, 1000), (False, 8)):
        tiny_llama.zero_grad()
        forward = Forward(tiny_llama, tree=True)
        labelled = forward.labelled
        forward.labelled = lambda rows, whole, unit, nodes=nodes, f=labelled: f(  # type: ignore[method-assign, misc]
            rows, nodes, unit=unit
        )
        parts = list(passes_of(forward, term))
        assert (len(parts) == 1) == whole
        gradients.append([p.grad.clone() for p in tiny_llama.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def passes_of(forward: Forward, term: Term) -> Any:
    rows = [*ROWS, Row((5, 9, 8, 30, 31, 32), 3)]
    for one in passes(forward, rows, ("residual",), None, whole=False, unit=term.unit):
        reduced(term, one, rows).backward()
        yield one


def test_a_term_with_the_wrong_number_of_values_is_an_error(tiny_llama: Any) -> None:
    term = Term("x", 1.0, "pool", Pass.entropy, per="row")
    (one,) = passes(Forward(tiny_llama, tree=True), ROWS, (), None, whole=True)
    with pytest.raises(TypeError, match="term 'x'"):
        reduced(term, one, ROWS)


@pytest.mark.parametrize("architecture", ["Llama", "GPTNeoX", "Gemma3", "Qwen3"])
def test_sites_are_found_by_role(make_model: Any, architecture: str) -> None:
    model = make_model(architecture)
    count = len(blocks(model))
    assert len(sites(model, "residual")) == count + 1
    assert all("mlp" in type(module).__name__.lower() for module in sites(model, "mlp"))
    assert all("attention" in type(m).__name__.lower() for m in sites(model, "attention"))


# ---- checkpoints -------------------------------------------------------------------------------


class KilledError(Exception):
    """Stands for a kill between two updates."""


def interrupted_and_resumed(name: str, path: Path, kill: int, **settings: Any) -> tuple[str, Any]:
    """Train, die after update ``kill``, go on in a new process's place; return the weights."""
    file = CheckpointFile(path, {"name": name}, every=2)
    run, _, _ = world.prepare(world.short(name, **settings), checkpoint=file)

    def die(report: Report) -> None:
        if report.update.step == kill:
            raise KilledError

    with pytest.raises(KilledError):
        run.run(die)
    file = CheckpointFile(path, {"name": name}, every=2, resume=True)
    subject, outcome = world.trained(world.short(name, **settings), checkpoint=file)
    return weights_fingerprint(subject.model), outcome


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("random_mapping", {"steps": 7}),
        ("random_mapping", {"steps": 7, "optimizer": "schedule_free_adamw", "warmup_steps": 3}),
        ("max_entropy", {"steps": 7, "train": "adapter", "rank": 2}),
        ("tar", {"steps": 5}),
        ("tar", {"steps": 7, "refresh": 3, "inner_weights": "adapter"}),
        ("undo", {"steps": 7, "teacher": "none", "train": "adapter", "rank": 2}),
        ("cir", {"steps": 7, "refit": 3}),
        ("sophon", {"steps": 9, "refresh": 2, "normal_steps": 1}),
    ],
)
def test_a_run_that_was_killed_goes_on_bit_for_bit(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    subject, whole = world.trained(world.short(name, **settings))
    path = tmp_path / "training.safetensors"
    print_, outcome = interrupted_and_resumed(name, path, 5, **settings)
    assert print_ == weights_fingerprint(subject.model)
    assert outcome.losses == whole.losses
    assert outcome.learning_rates == whole.learning_rates
    assert outcome.orders == whole.orders
    assert outcome.ledger.passes == whole.ledger.passes
    assert outcome.ledger.reference_forwards == whole.ledger.reference_forwards
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_another_configuration_is_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    was = {"safeguards": {"0": {"settings": {"steps": 3, "rate": 1e-3}}}, "seed": 1}
    CheckpointFile(path, was, every=1).save({"x": torch.ones(1)}, {})
    now = {"safeguards": {"0": {"settings": {"steps": 3, "rate": 2e-3}}}, "seed": 1}
    with pytest.raises(InputError, match=r"another safeguards\.0\.settings\.rate \(0\.001, now"):
        CheckpointFile(path, now, every=1, resume=True).load()
    assert CheckpointFile(path, now, every=1).load() is None
    found = CheckpointFile(path, was, every=1, resume=True).load()
    assert found is not None


@pytest.mark.parametrize("content", [b"", b"garbage" * 50])
def test_a_damaged_checkpoint_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "c.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match="no usable checkpoint"):
        CheckpointFile(path, {}, every=1, resume=True).load()


def test_a_full_disk_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.safetensors"
    file = CheckpointFile(path, {}, every=1, resume=True)
    file.save({"x": torch.ones(2)}, {"step": 1})

    def full(tensors: Any, name: Path, **_: Any) -> None:
        Path(name).write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(StorageError, match=r"No space left on device; free some space") as caught:
        file.save({"x": torch.zeros(2)}, {"step": 2})
    assert "\n" not in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    found = file.load()
    assert found is not None
    assert found[1] == {"step": 1}


def test_a_diverging_run_keeps_its_last_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    made = world.short("plain_sft", steps=8)
    run, _, _ = world.prepare(made, checkpoint=CheckpointFile(path, {}, every=2))
    finish = None

    def break_down(report: Report) -> None:
        nonlocal finish
        if report.update.step == 5:
            finish = run.trainer.finish

            def fail(*_: Any) -> Any:
                raise DivergedError("loss nan, gradient norm nan")

            run.trainer.finish = fail  # type: ignore[method-assign]

    outcome = run.run(break_down)
    assert (outcome.status, outcome.steps) == ("diverged", 5)
    assert outcome.reason == "after 5 updates: loss nan, gradient norm nan"
    found = CheckpointFile(path, {}, every=2, resume=True).load()
    assert found is not None
    assert found[1]["trainer"]["step"] == 4


def test_the_state_is_kept_at_the_first_step_that_can_be_gone_on_from(tmp_path: Path) -> None:
    """Kept points of attacks are lost between refreshes: here no multiple of 4 will do."""
    made = world.short("tar", steps=7, refresh=3, inner_weights="adapter")
    file = CheckpointFile(tmp_path / "c.safetensors", {}, every=4, resume=True)
    run, _, _ = world.prepare(made, checkpoint=file)
    run.run()
    found = file.load()
    assert found is not None
    assert found[1]["trainer"]["step"] == 6


def test_stages_with_one_reference_count_its_forwards_apart() -> None:
    first, second = (world.short("tar", steps=2) for _ in range(2))
    run, subject, data = world.prepare(first)
    run.run()
    again = TrainingRun(second, subject, data, run.seeds, reference=run._reference)
    counted = run.outcome.ledger.reference_forwards
    assert counted > 0
    assert again.run().ledger.reference_forwards == counted


@pytest.mark.parametrize("pool", ["pairs", "restricted"])
def test_the_order_of_a_whole_epoch_is_told(pool: str) -> None:
    subject = tiny_world.undefended()
    data = DefenceData(subject, tiny_world.tiny_domain("refusal"))
    streams = Streams(data, world.SEEDS, 3, 0.5)
    for _ in range(2 * len(data.pool(pool))):
        streams.next(pool)
    ids = streams.first_epoch[pool]
    assert set(ids) == {row.item_id for unit in data.pool(pool) for row in unit}
    size = len(data.pool(pool)[0])
    assert len(ids) == 3 * size * math.ceil(len(data.pool(pool)) / 3)


def test_pools_that_are_not_there_are_told() -> None:
    subject = tiny_world.undefended()
    data = DefenceData(subject, tiny_world.tiny_domain())
    with pytest.raises(KeyError, match="no pool 'nonsense'"):
        data.pool("nonsense")
    assert {len(unit) for unit in data.pool("pairs")} == {2}
    for refusal, answer in data.pool("held_out_pairs"):
        assert refusal.item_id == answer.item_id
        assert answer.restricted
        assert not refusal.restricted
