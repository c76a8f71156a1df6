"""The training loop against independent loops: plain torch, transformers.Trainer, schedulefree."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn

from durometer.core.forward import Forward
from durometer.core.optimizers import OptimizerName
from durometer.core.rows import Row, tree_packs
from durometer.core.schedules import RESTART_PERIOD, Schedule, depends_on_total, learning_rate
from durometer.core.training import DivergedError, OptimisationPlan, Trainer

Model = Any
Padded = Callable[[Sequence[Row]], dict[str, torch.Tensor]]
RATE = 1e-3
NARROW = 5e-4  # less than half the gap between 1 and its neighbours in bf16


def random_rows(seed: int, count: int, length: int = 12, shared: int = 4) -> list[Row]:
    """Rows with a shared head, of unequal length, with labels from somewhere in the middle on."""
    generator = torch.Generator().manual_seed(seed)

    def draw(size: int) -> tuple[int, ...]:
        return tuple(torch.randint(5, 101, (size,), generator=generator).tolist())

    head = draw(shared)
    return [
        Row((*head, *draw(length - shared - i % 3)), length // 2 - i % 2, f"{seed}-{i}", i % 2 == 0)
        for i in range(count)
    ]


def make_trainer(model: Model, *, tree: bool = True, **plan: Any) -> Trainer:
    values: dict[str, Any] = {"optimizer": "adamw", "learning_rate": RATE, "steps": 10} | plan
    trained = [p for p in model.parameters() if p.requires_grad]
    return Trainer(Forward(model, tree=tree), trained, OptimisationPlan(**values))


def weights(model: Model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        other = theirs[name]
        assert tensor.dtype == other.dtype, name
        assert torch.equal(tensor.view(torch.uint8), other.view(torch.uint8)), name


def assert_near(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], by: float) -> None:
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=by, rtol=0, msg=name)


# One update, against torch's own optimisers and the loss that transformers computes.


class Signs(torch.optim.Optimizer):
    """Sign descent as its paper writes it, with decoupled weight decay."""

    def __init__(self, params: Any, lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                decayed = p.data * (1 - group["lr"] * group["weight_decay"])
                p.data = decayed - group["lr"] * torch.sign(p.grad)


INDEPENDENT: dict[str, Callable[[Any, float, float], torch.optim.Optimizer]] = {
    "adamw": lambda p, lr, wd: torch.optim.AdamW(p, lr, weight_decay=wd, foreach=False),
    "adam": lambda p, lr, wd: torch.optim.Adam(p, lr, weight_decay=wd, foreach=False),
    "sgd": lambda p, lr, wd: torch.optim.SGD(p, lr, weight_decay=wd),
    "sgd_momentum": lambda p, lr, wd: torch.optim.SGD(p, lr, momentum=0.9, weight_decay=wd),
    "sgd_nesterov": lambda p, lr, wd: torch.optim.SGD(
        p, lr, momentum=0.9, nesterov=True, weight_decay=wd
    ),
    "rmsprop": lambda p, lr, wd: torch.optim.RMSprop(p, lr, weight_decay=wd, foreach=False),
    "sign_sgd": Signs,
}


@pytest.mark.parametrize("tree", [True, False])
@pytest.mark.parametrize("name", INDEPENDENT)
def test_updates_equal_a_plain_loop(
    tiny_llama: Model, padded: Padded, name: OptimizerName, tree: bool
) -> None:
    """Two updates, so that momentum counts; weight decay and clipping are on."""
    rate, decay, clip = (0.1 if name.startswith("sgd") else RATE), 0.1, 0.5
    twin = copy.deepcopy(tiny_llama)
    trainer = make_trainer(
        tiny_llama,
        tree=tree,
        optimizer=name,
        learning_rate=rate,
        weight_decay=decay,
        gradient_clip=clip,
    )
    optimizer = INDEPENDENT[name](list(twin.parameters()), rate, decay)
    for step in range(2):
        rows = random_rows(step, 6)
        loss = twin(**padded(rows)).loss
        optimizer.zero_grad()
        loss.backward()
        assert float(nn.utils.clip_grad_norm_(twin.parameters(), clip)) > clip
        optimizer.step()
        update = trainer.update(rows)
        assert update.loss == pytest.approx(loss.item(), abs=2e-5)
        assert update.step == step + 1
        assert update.tokens == sum(len(row.ids) for row in rows)
        assert update.labels == sum(len(row.ids) - row.first_label for row in rows)
        assert update.item_ids == tuple(row.item_id for row in rows)
        assert (update.restricted, update.learning_rate) == (3, rate)
    # The sign of a gradient near zero may differ by rounding, and adaptive rates blow it up.
    apart = [
        ((p - q).abs() > 2e-5).float().mean()
        for p, q in zip(tiny_llama.parameters(), twin.parameters(), strict=True)
    ]
    assert max(apart) <= (2e-3 if name in ("sign_sgd", "rmsprop", "adam", "adamw") else 0)
    assert all(p.grad is None for p in tiny_llama.parameters())


@pytest.mark.parametrize("tree", [True, False])
def test_packs_add_up_to_the_gradient_of_the_joined_batch(
    tiny_llama: Model, padded: Padded, tree: bool
) -> None:
    rows = random_rows(5, 20, length=60)
    assert len(list(tree_packs(rows))) >= 2
    twin = copy.deepcopy(tiny_llama)
    loss = twin(**padded(rows)).loss
    loss.backward()
    before = weights(tiny_llama)
    update = make_trainer(tiny_llama, tree=tree, optimizer="sgd", learning_rate=1.0).update(rows)
    assert update.loss == pytest.approx(loss.item(), abs=1e-5)
    for name, parameter in twin.named_parameters():
        moved = before[name] - tiny_llama.get_parameter(name).detach()
        torch.testing.assert_close(moved, parameter.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_only_the_given_weights_move(tiny_llama: Model) -> None:
    before = weights(tiny_llama)
    chosen = tiny_llama.model.layers[1].mlp.up_proj.weight
    plan = OptimisationPlan("adamw", RATE, 1, weight_decay=0.1)
    Trainer(Forward(tiny_llama, tree=True), [chosen], plan).update(random_rows(0, 4))
    moved = [n for n, p in tiny_llama.named_parameters() if not torch.equal(p, before[n])]
    assert moved == ["model.layers.1.mlp.up_proj.weight"]


def test_dropout_is_on_while_training_and_off_while_measuring(make_model: Any) -> None:
    model = make_model("Llama", attention_dropout=0.5)
    trainer, modes = make_trainer(model), []
    model.model.layers[0].self_attn.register_forward_pre_hook(lambda m, _: modes.append(m.training))
    trainer.update(random_rows(0, 4))
    with trainer.measuring():
        Forward(model, tree=True).score(random_rows(1, 2))
    trainer.update(random_rows(0, 4))
    assert modes == [True, False, True]


# A LoRA run, against PEFT's and transformers' own trainer.


def test_a_lora_run_equals_the_standard_trainer(
    tiny_llama: Model, padded: Padded, tmp_path: Path
) -> None:
    import peft
    import transformers

    def adapted() -> Model:
        torch.manual_seed(4)
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.0)
        return peft.get_peft_model(copy.deepcopy(tiny_llama), config)

    class Recording(transformers.Trainer):  # type: ignore[misc, unused-ignore]
        def compute_loss(self, *args: Any, **options: Any) -> Any:
            loss = super().compute_loss(*args, **options)
            theirs.append(loss.item())
            return loss

    rows, size, theirs = random_rows(7, 20), 4, list[float]()
    standard = adapted()
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=size,
        max_steps=5,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=0.0,
        optim="adamw_torch",
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    dataset: Any = rows
    Recording(standard, arguments, train_dataset=dataset, data_collator=padded).train()

    ours = adapted()
    assert_bits(
        weights(ours.base_model.model.model.embed_tokens), weights(tiny_llama.model.embed_tokens)
    )
    trainer = make_trainer(ours, learning_rate=1e-2, steps=5)
    losses = [trainer.update(rows[i : i + size]).loss for i in range(0, len(rows), size)]
    assert losses == pytest.approx(theirs, abs=1e-4)
    assert_near(weights(ours), weights(standard), 1e-4)
    moved = [n for n, p in ours.named_parameters() if "lora_B" in n and p.abs().max() > 1e-3]
    assert len(moved) == 14


# Narrow weights.


def test_narrow_weights_have_masters(make_model: Any, padded: Padded) -> None:
    """Steps too small for bf16 are lost in a plain loop, and add up in ours."""
    rows = random_rows(2, 6)
    model, plain = (make_model("Llama").to(torch.bfloat16) for _ in range(2))
    optimizer = torch.optim.AdamW(plain.parameters(), NARROW, weight_decay=0.0)
    trainer = make_trainer(model, learning_rate=NARROW)
    start = weights(model)
    norms = [name for name in start if "norm" in name]
    for step in range(12):
        plain(**padded(rows)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        trainer.update(rows)
        if step == 0:
            assert_bits({n: weights(model)[n] for n in norms}, {n: start[n] for n in norms})
    ours, theirs = weights(model), weights(plain)
    assert len(norms) == 5
    for name in norms:
        assert torch.equal(theirs[name], start[name])
        assert (ours[name] != start[name]).float().mean() > 0.5
        assert ours[name].dtype == torch.bfloat16
    assert all(p.grad is None for p in model.parameters())


class Away:
    """Stands for a tensor on an accelerator."""

    def __init__(self) -> None:
        self.data: Any = Moved("cuda")

    @property
    def device(self) -> torch.device:
        return torch.device(self.data.kind)


class Moved:
    """What such a tensor holds, by where it is."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def cpu(self) -> "Moved":
        return Moved("cpu")

    def to(self, device: torch.device) -> "Moved":
        return Moved(device.type)


def test_masters_of_narrow_weights_are_parked_and_wide_weights_stay(make_model: Any) -> None:
    trainer = make_trainer(make_model("Llama"))
    wide, master = Away(), Away()
    parts: Any = trainer
    parts._parameters, parts._masters = [wide, Away()], [wide, master]
    with trainer.parked():
        assert (wide.device.type, master.device.type) == ("cuda", "cpu")
    assert (wide.device.type, master.device.type) == ("cuda", "cuda")
    with pytest.raises(ZeroDivisionError), trainer.parked():
        raise ZeroDivisionError
    assert master.device.type == "cuda"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parking_on_an_accelerator_changes_no_run(make_model: Any, dtype: torch.dtype) -> None:
    ends = []
    for parked in (False, True):
        model = make_model("Llama").to("cuda", dtype)
        trainer = make_trainer(model, optimizer="schedule_free_adamw")
        for seed in range(3):
            trainer.update(random_rows(seed, 4))
            if not parked:
                continue
            with trainer.parked():
                masters = {master.device.type for master in trainer._masters}
                assert masters == {"cuda" if dtype == torch.float32 else "cpu"}
        ends.append(weights(model))
    assert_bits(*ends)


# Divergence and broken-off updates.


def spoil(model: Model, what: str) -> Any:
    """Make the next pass give a loss or a gradient that is not finite; returns the hook."""
    if what == "gradient":
        weight = model.model.layers[0].mlp.up_proj.weight
        return weight.register_hook(lambda gradient: gradient * math.nan)
    factor = math.nan if what == "nan" else math.inf
    return model.lm_head.register_forward_hook(lambda module, args, logits: logits * factor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", ["nan", "inf", "gradient"])
def test_divergence_leaves_everything_as_it_was(
    tiny_llama: Model, what: str, dtype: torch.dtype
) -> None:
    model, twin = tiny_llama.to(dtype), copy.deepcopy(tiny_llama).to(dtype)
    options: dict[str, Any] = {"warmup": 4, "gradient_clip": 1.0}
    trainer, calm = make_trainer(model, **options), make_trainer(twin, **options)
    trainer.update(random_rows(0, 4))
    before = weights(model)
    hook = spoil(model, what)
    with pytest.raises(DivergedError, match="loss"):
        trainer.update(random_rows(1, 4))
    hook.remove()
    assert_bits(weights(model), before)
    assert all(p.grad is None for p in model.parameters())
    after = trainer.update(random_rows(2, 4))
    calm.update(random_rows(0, 4))
    assert after == calm.update(random_rows(2, 4))  # the same step, rate and loss
    assert_bits(weights(model), weights(twin))


def test_a_broken_off_update_leaves_no_gradient_behind(tiny_llama: Model) -> None:
    """Out of memory in the second pack: the caller tries again with a smaller batch."""
    rows = random_rows(5, 20, length=60)
    twin = copy.deepcopy(tiny_llama)
    trainer, calls = make_trainer(tiny_llama, optimizer="sgd"), []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError

    hook = tiny_llama.register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.update(rows)
    hook.remove()
    assert trainer.update(rows[:10]) == make_trainer(twin, optimizer="sgd").update(rows[:10])
    assert_bits(weights(tiny_llama), weights(twin))


# Schedule-free: what is measured is the average.


def test_measuring_shows_the_averaged_iterate(tiny_llama: Model, padded: Padded) -> None:
    from schedulefree import AdamWScheduleFree

    twin = copy.deepcopy(tiny_llama)
    optimizer: Any = AdamWScheduleFree(twin.parameters(), lr=1e-2, foreach=False)
    optimizer.train()
    trainer = make_trainer(tiny_llama, optimizer="schedule_free_adamw", learning_rate=1e-2)
    for step in range(4):
        rows = random_rows(step, 4)
        twin(**padded(rows)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        trainer.update(rows)
    training = weights(tiny_llama)
    assert_near(training, weights(twin), 2e-4)
    optimizer.eval()
    with trainer.measuring():
        shown = weights(tiny_llama)
        assert not tiny_llama.training
    assert_near(shown, weights(twin), 2e-4)
    assert max((shown[name] - training[name]).abs().max() for name in shown) > 2e-3
    assert_bits(weights(tiny_llama), training)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["schedule_free_adamw", "adamw"])
def test_measuring_changes_no_run(
    tiny_llama: Model, name: OptimizerName, dtype: torch.dtype
) -> None:
    model, twin = tiny_llama.to(dtype), copy.deepcopy(tiny_llama).to(dtype)
    often, never = make_trainer(model, optimizer=name), make_trainer(twin, optimizer=name)
    for step in range(4):
        with often.measuring():
            Forward(model, tree=True).score(random_rows(9, 2))
        assert often.update(random_rows(step, 4)) == never.update(random_rows(step, 4))
    assert_bits(weights(model), weights(twin))


def test_an_error_while_measuring_switches_back(tiny_llama: Model) -> None:
    trainer = make_trainer(tiny_llama, optimizer="schedule_free_adamw", learning_rate=1e-2)
    trainer.update(random_rows(0, 4))
    trainer.update(random_rows(1, 4))
    before = weights(tiny_llama)
    with pytest.raises(KeyError), trainer.measuring():
        raise KeyError
    assert_bits(weights(tiny_llama), before)
    trainer.update(random_rows(2, 4))


# Learning rates, as the weights feel them.


class OneWeight(nn.Module):
    """A stand-in for model and forward pass: one weight, whose gradient is always 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.offset = 0.0

    @property
    def model(self) -> nn.Module:
        return self

    def loss_sums(self, rows: Sequence[Row]) -> Iterator[torch.Tensor]:
        yield self.weight.sum() * sum(len(row.labels) for row in rows) + self.offset


def realised(schedule: Schedule, total: int, warmup: int, floor: float) -> list[float]:
    """Return the size of every step of sign descent: the rate, as the weight felt it."""
    model: Any = OneWeight()
    plan = OptimisationPlan("sign_sgd", RATE, total, schedule, warmup, floor)
    trainer, rates = Trainer(model, [model.weight], plan), []
    for _ in range(total):
        model.weight.data.zero_()
        update = trainer.update([Row((5, 6), 1)])
        rates.append(-model.weight.item())
        assert rates[-1] == pytest.approx(update.learning_rate, rel=1e-6)
    return rates


def torch_schedule(schedule: Schedule, total: int, floor: float) -> list[float]:
    """The same schedule by torch's own scheduler."""
    from torch.optim import lr_scheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], RATE)
    schedulers: dict[str, Callable[[], Any]] = {
        "constant": lambda: lr_scheduler.ConstantLR(optimizer, 1.0),
        "linear": lambda: lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total),
        "cosine": lambda: lr_scheduler.CosineAnnealingLR(optimizer, total, floor),
        "restarts": lambda: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 100, 1, floor),
    }
    scheduler = schedulers[schedule]()
    rates = []
    for _ in range(total):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("warmup", [0, 1, 5, 30])
@pytest.mark.parametrize("floor", [0.0, 5e-6])
@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_realised_rates_equal_the_declared_schedule(
    schedule: Schedule, floor: float, warmup: int
) -> None:
    total = 260 if schedule == "restarts" else 64
    rates = realised(schedule, total, warmup, floor)
    rising = [RATE * (step + 1) / warmup for step in range(warmup)]
    expected = [*rising, *torch_schedule(schedule, total - warmup, floor)]
    assert rates == pytest.approx(expected, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("schedule", get_args(Schedule))
@pytest.mark.parametrize("warmup", [0, 5, 30, 100])
def test_no_rate_is_negligible_unless_declared(schedule: Schedule, warmup: int) -> None:
    """A warm-up that trained at a billionth of the rate went unnoticed in published work."""
    total = warmup + RESTART_PERIOD
    rates = realised(schedule, total, warmup, RATE / 100)
    assert min(rates) >= RATE / 100 * (1 - 1e-5)
    assert max(rates) == pytest.approx(RATE, rel=1e-5)


def test_a_plan_shorter_than_its_warm_up_still_trains() -> None:
    for schedule in get_args(Schedule):
        rates = [learning_rate(schedule, s, peak=1.0, total=3, warmup=5) for s in range(3)]
        assert rates == pytest.approx([0.2, 0.4, 0.6])


@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_dependence_on_the_plan_is_declared(schedule: Schedule) -> None:
    rates = [
        [learning_rate(schedule, step, peak=1.0, total=total, warmup=2) for step in range(20)]
        for total in (20, 40)
    ]
    assert (rates[0] != rates[1]) is depends_on_total(schedule)


@pytest.mark.parametrize("offset", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_counts_even_with_a_finite_gradient(offset: float) -> None:
    model: Any = OneWeight()
    trainer = Trainer(model, [model.weight], OptimisationPlan("sgd", RATE, 1))
    model.offset = offset
    with pytest.raises(DivergedError):
        trainer.update([Row((5, 6), 1)])
    assert model.weight.item() == 0.0


# Every optimiser of the table.

RATES = {"sgd": 0.3, "sgd_momentum": 0.1, "sgd_nesterov": 0.1, "adadelta": 3.0, "adafactor": 0.01}
RATES |= {"adagrad": 0.02, "sign_sgd": 1e-3, "rmsprop": 1e-3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", get_args(OptimizerName))
def test_every_optimiser_lowers_the_loss(
    tiny_llama: Model, name: OptimizerName, dtype: torch.dtype
) -> None:
    rows = random_rows(11, 4)
    model = tiny_llama.to(dtype)
    trainer = make_trainer(model, optimizer=name, learning_rate=RATES.get(name, 5e-3), steps=12)
    first = trainer.update(rows).loss
    for _ in range(11):
        trainer.update(rows)
    with trainer.measuring():
        labels = sum(len(row.labels) for row in rows)
        last = -sum(s.log_probability for s in Forward(model, tree=True).score(rows)) / labels
    assert last < 0.9 * first
