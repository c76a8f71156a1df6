"""Invariants of every registered tamper, on tiny models of all architectures that they meet."""

import copy
import itertools
import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import tiny_world
import torch
from torch import nn

from durometer.core.adapters import Adapter, linear_maps
from durometer.core.budget import Budget, Spent
from durometer.core.edits import RestoreError
from durometer.core.errors import InputError, NotApplicableError
from durometer.core.rows import Row
from durometer.core.schedules import learning_rate
from durometer.core.seeds import Seeds
from durometer.core.settings import Settings
from durometer.core.training import Update
from durometer.domains.base import Role, Split
from durometer.safeguards.refusal import RefusalSettings
from durometer.subjects.base import Subject
from durometer.subjects.fingerprint import weights_fingerprint
from durometer.tampers import data as tamper_data
from durometer.tampers.base import Checkpoint, Realised, Tamper, make_tamper, tamper_registry
from durometer.tampers.data import Relation, shuffled_batches, training_items
from durometer.tampers.finetune import FineTuning
from durometer.trials.record import TrialRecord, TrialSpec
from durometer.trials.runner import TrialRunner
from durometer.trials.suites import MeasuringPlan

MakeModel = Callable[..., Any]
SEEDS = Seeds(11, 12, 13, 14)
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 8},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8},
    "Olmo2": {},
    "Phi3": {},
    "GPTNeoX": {},
}
# The rest of the attack surface has its own table, tests/test_attack_surface.py.
NAMES = ["none"] + [name for name, cls in tamper_registry if issubclass(cls, FineTuning)]
# Settings that make a tamper short; one that has no such field keeps its own.
SHORT = {"steps": 3, "batch_size": 4, "examples": 8, "learning_rate": 1e-2}


def short(name: str, **changes: Any) -> Tamper[Any]:
    """Return the tamper with the settings of ``SHORT`` and ``changes`` that it has."""
    known = tamper_registry.get(name).settings_class.model_fields
    return make_tamper(name, **{k: v for k, v in (SHORT | changes).items() if k in known})


TRAINING = [name for name in NAMES if isinstance(short(name), FineTuning)]
# Those that train on the domain's own texts in one stage; what the others make of them is tested in
# test_finetune_family.py.
PLAIN = [
    name
    for name in TRAINING
    if (cls := tamper_registry.get(name)).attack_rows is FineTuning.attack_rows  # type: ignore[attr-defined]
]
# Each tamper once with the defaults, and once with everything that could disturb an invariant.
VARIANTS: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in NAMES] + [
    (name, {"retain_share": 0.5, "dropout": 0.1, "optimizer": "schedule_free_adamw"})
    for name in TRAINING
]


@dataclass
class Attack:
    """What one attack did, as seen from outside."""

    realised: Realised
    checkpoints: list[Checkpoint]
    logits: list[torch.Tensor]
    effective: dict[str, torch.Tensor]
    before: dict[str, torch.Tensor]
    updates: list[Update]


def look(subject: Subject) -> torch.Tensor:
    """Return logits of a fixed prompt."""
    ids = torch.tensor([subject.chat.prompt_ids("what is the metal of e30 ?")])
    with torch.no_grad():
        return subject.model(input_ids=ids, use_cache=False).logits[0].clone()


def effective_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights as they act now, adapters added in, by name without one."""
    weights = {
        name.replace(".base_layer", ""): p.detach().clone()
        for name, p in model.named_parameters()
        if "lora_" not in name
    }
    for name, module in model.named_modules():
        for adapter in getattr(module, "lora_A", {}):
            delta = module.get_delta_weight(adapter).detach()
            weights[f"{name}.weight"] = weights[f"{name}.weight"].float() + delta
    return weights


def attack(
    subject: Subject,
    tamper: Tamper[Any],
    *,
    seeds: Seeds = SEEDS,
    budget: Budget | None = None,
    stop_at: int | None = None,
) -> Attack:
    checkpoints, logits, updates = list[Checkpoint](), list[torch.Tensor](), list[Update]()
    before = effective_weights(subject.model)

    def on_checkpoint(checkpoint: Checkpoint) -> bool:
        checkpoints.append(checkpoint)
        logits.append(look(subject))
        assert not subject.model.training
        return checkpoint.steps != stop_at

    tamper.on_update = updates.append
    steps = tamper.planned_steps()
    budget = budget or Budget(steps, tuple(range(1, steps + 1)))
    with subject.restored():
        realised = tamper.run(subject, tiny_world.tiny_domain(), budget, seeds, on_checkpoint)
        effective = effective_weights(subject.model)
    return Attack(realised, checkpoints, logits, effective, before, updates)


def attack_or_refusal(subject: Subject, tamper: Tamper[Any]) -> tuple[Attack | None, str]:
    try:
        return attack(subject, tamper), ""
    except NotApplicableError as error:
        return None, str(error)


@pytest.fixture
def subject(make_model: MakeModel) -> Subject:
    return tiny_world.as_subject(make_model("Llama"))


@pytest.fixture
def domain() -> Any:
    return tiny_world.tiny_domain()


# Every registered tamper


def test_the_registry_holds_what_these_tests_cover() -> None:
    assert set(NAMES) <= set(tamper_registry.names())
    assert TRAINING
    for name in NAMES:
        for alias in (name.replace("_", "-"),):
            if alias in tamper_registry._aliases:
                assert tamper_registry.get(alias) is tamper_registry.get(name)


@pytest.mark.parametrize("name", NAMES)
def test_every_tamper_says_what_it_is(name: str) -> None:
    cls = tamper_registry.get(name)
    assert cls.name == name == name.lower()
    for text in (cls.summary, cls.access_level, cls.cost, cls.source, cls.cannot_show):
        assert text.strip()
    assert cls.access in ("input", "activations", "routing", "weights")
    assert cls.access_level in {f"A{level}" for level in range(6)}
    assert cls.__doc__
    assert cls.settings_class.parse("test", {}) == make_tamper(name).settings


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_or_refuses_with_a_reason_and_restores(
    make_model: MakeModel, name: str, architecture: str
) -> None:
    model = make_model(architecture, **ARCHITECTURES[architecture])
    subject = tiny_world.as_subject(model)
    before, seen = weights_fingerprint(model), look(subject)
    modules = [(n, type(m)) for n, m in model.named_modules()]
    tamper = short(name)
    result, refusal = attack_or_refusal(subject, tamper)
    if result is None:
        assert len(refusal) > 10
    else:
        assert result.realised.status == "done", result.realised.reason
        assert result.realised.reason == ""
        if tamper.planned_steps():
            assert not torch.equal(result.logits[-1], seen)
            assert len(result.realised.losses) == result.realised.spent.steps == SHORT["steps"]
    assert weights_fingerprint(model) == before
    assert torch.equal(look(subject), seen)
    assert [(n, type(m)) for n, m in model.named_modules()] == modules
    assert not model.training
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize("name", NAMES)
def test_a_rehearsal_on_fused_experts_runs_or_refuses(make_model: MakeModel, name: str) -> None:
    """Experts in one tensor of three dimensions would be skipped in silence by a matrix adapter."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    subject = tiny_world.as_subject(make_model("Qwen3Moe", head_dim=8, **experts))
    before = weights_fingerprint(subject.model)
    result, refusal = attack_or_refusal(subject, short(name))
    assert "expert" in refusal if result is None else result.realised.status == "done"
    assert weights_fingerprint(subject.model) == before


@pytest.mark.parametrize("name", NAMES)
def test_zero_steps_change_nothing(subject: Subject, name: str) -> None:
    untouched = look(subject)
    tamper = short(name)
    seen = []
    with subject.restored():
        realised = tamper.run(
            subject, tiny_world.tiny_domain(), Budget(0), SEEDS, lambda c: seen.append(c) is None
        )
        assert torch.equal(look(subject), untouched)
        after = effective_weights(subject.model)
    before = effective_weights(subject.model)
    assert all(torch.equal(after[weight], before[weight]) for weight in before)
    assert all(checkpoint.steps == 0 for checkpoint in seen)
    assert realised.status == ("no_effect" if tamper.planned_steps() else "done")
    spent = realised.spent.as_dict()
    del spent["seconds"]
    assert not any(spent.values())
    assert not any(realised.changed.values())


@pytest.mark.parametrize("error", [RuntimeError("broken off"), KeyboardInterrupt()])
@pytest.mark.parametrize(("name", "changes"), VARIANTS)
def test_it_restores_when_it_is_broken_off(
    subject: Subject, name: str, changes: dict[str, Any], error: BaseException
) -> None:
    before = weights_fingerprint(subject.model)

    def on_checkpoint(checkpoint: Checkpoint) -> bool:
        raise error

    tamper, budget = short(name, **changes), Budget(3, (2,))
    with pytest.raises(type(error)), subject.restored():
        tamper.run(subject, tiny_world.tiny_domain(), budget, SEEDS, on_checkpoint)
    assert weights_fingerprint(subject.model) == before
    assert not any(p.requires_grad for p in subject.model.parameters())
    # And it is fit for the next attack.
    assert attack(subject, short(name)).realised.status == "done"


@pytest.mark.parametrize("name", NAMES)
def test_it_restores_bf16_and_moves_it(make_model: MakeModel, name: str) -> None:
    subject = tiny_world.as_subject(make_model("Llama").to(torch.bfloat16))
    before = weights_fingerprint(subject.model)
    # Each update is smaller than half the gap between neighbours in bf16; the batch is the same.
    result = attack(subject, short(name, learning_rate=1e-4, steps=6, examples=4))
    assert weights_fingerprint(subject.model) == before
    assert {p.dtype for p in subject.model.parameters()} == {torch.bfloat16}
    if short(name).planned_steps():
        assert result.realised.losses[-1] < result.realised.losses[0]

    def broken_off(checkpoint: Checkpoint) -> bool:
        raise RuntimeError("broken off")

    tamper, domain = short(name), tiny_world.tiny_domain()
    with pytest.raises(RuntimeError, match="broken off"), subject.restored():
        tamper.run(subject, domain, Budget(3, (2,)), SEEDS, broken_off)
    assert weights_fingerprint(subject.model) == before


class Sneaky(Tamper[Settings]):
    """Announces one weight and changes another."""

    name = "sneaky"

    def run(self, subject: Subject, *rest: Any) -> Realised:
        (announced,) = subject.restoration.writable(["model.norm.weight"])
        announced.data.add_(1.0)
        subject.model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1e-3
        if self.settings is None:
            raise ValueError("and fails afterwards")
        return Realised()


@pytest.mark.parametrize("fails", [False, True])
def test_a_change_that_was_not_announced_is_caught(subject: Subject, fails: bool) -> None:
    tamper = Sneaky(None if fails else Settings())  # type: ignore[arg-type]
    with pytest.raises(RestoreError, match="did not announce"):
        attack(subject, tamper)


def test_a_change_that_was_not_announced_ends_the_campaign(
    subject: Subject, domain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from durometer.trials import runner

    monkeypatch.setattr(runner, "make_tamper", lambda name, **settings: Sneaky(Settings()))
    with pytest.raises(RestoreError):
        run_trial(subject, domain, "finetune", {}, ())


def test_nothing_may_be_changed_outside_restored(subject: Subject) -> None:
    with pytest.raises(Exception, match="only inside restored"):
        short("finetune").run(
            subject, tiny_world.tiny_domain(), Budget(1, (1,)), SEEDS, lambda c: True
        )


@pytest.mark.parametrize(("name", "changes"), VARIANTS)
def test_same_seeds_same_run(
    subject: Subject, make_model: MakeModel, name: str, changes: dict[str, Any]
) -> None:
    """On the same subject again, on a fresh one, and however often it is measured."""
    first = attack(subject, short(name, **changes))
    again = attack(subject, short(name, **changes))
    fresh = attack(tiny_world.as_subject(make_model("Llama")), short(name, **changes))
    steps = short(name).planned_steps()
    once = attack(subject, short(name, **changes), budget=Budget(steps, (steps,)))
    for other in (again, fresh, once):
        assert other.realised.losses == first.realised.losses
        assert other.realised.item_ids == first.realised.item_ids
        assert other.realised.data_order_hash == first.realised.data_order_hash
        assert torch.equal(other.logits[-1], first.logits[-1])
    for left, right in zip(first.logits, fresh.logits, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("name", TRAINING)
def test_each_seed_has_its_own_effect(subject: Subject, name: str) -> None:
    plan = {"steps": 4}
    first = attack(subject, short(name, **plan)).realised
    order = attack(subject, short(name, **plan), seeds=replace(SEEDS, data_order=1)).realised
    assert order.data_order_hash != first.data_order_hash
    assert Counter(itertools.chain(*order.item_ids)) == Counter(itertools.chain(*first.item_ids))
    assert order.losses != first.losses
    start = attack(subject, short(name, **plan), seeds=replace(SEEDS, initialisation=1)).realised
    assert start.data_order_hash == first.data_order_hash
    assert start.item_ids == first.item_ids
    drawn = attack(subject, short(name, **plan), seeds=replace(SEEDS, sampling=1)).realised
    assert set(itertools.chain(*drawn.item_ids)) != set(itertools.chain(*first.item_ids))
    evaluated = attack(subject, short(name, **plan), seeds=replace(SEEDS, evaluation=1)).realised
    assert evaluated.losses == first.losses


def closed_formula(subject: Subject, rows: list[Row], *, full: bool) -> tuple[int, float]:
    """Return tokens and FLOPs of one pass over ``rows``, from the sizes of a Llama's matrices."""
    config = subject.model.config
    width, inner = config.hidden_size, config.intermediate_size
    keys = width * config.num_key_value_heads // config.num_attention_heads
    matrices = config.num_hidden_layers * (2 * width * (width + keys) + 3 * width * inner)
    tokens = sum(len(row.ids) for row in rows)
    labels = sum(len(row.ids) - row.first_label for row in rows)
    head = width * config.vocab_size
    return tokens, (6 if full else 4) * (matrices * tokens + head * labels)


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("name", PLAIN)
def test_the_budget_is_kept_and_counted(subject: Subject, name: str, share: float) -> None:
    tamper = short(name, steps=9, retain_share=share)
    assert isinstance(tamper, FineTuning)
    result = attack(subject, tamper, budget=Budget(5, (2, 5)))
    realised, spent = result.realised, result.realised.spent
    rows, replay = tamper.rows(subject, tiny_world.tiny_domain(), SEEDS)
    by_id = {row.item_id: row for row in (*rows, *replay)}
    used = [by_id[item] for batch in realised.item_ids for item in batch]
    assert len(used) == 5 * SHORT["batch_size"]
    assert spent.steps == len(realised.losses) == len(realised.learning_rates) == 5
    assert spent.examples == len({row.item_id for row in used})
    assert len(rows) <= SHORT["examples"]
    assert len(replay) <= SHORT["examples"]
    restricted = {row.item_id for row in used if row.restricted}
    assert spent.restricted_examples == len(restricted)
    assert bool(restricted) == (name != "benign_finetune")
    full = not hasattr(tamper.settings, "rank")
    assert (spent.tokens, spent.flops) == closed_formula(subject, used, full=full)
    assert spent.seconds > 0
    first, last = result.checkpoints
    assert (first.steps, last.steps) == (2, 5)
    early = [by_id[item] for batch in realised.item_ids[:2] for item in batch]
    assert (first.spent.tokens, first.spent.flops) == closed_formula(subject, early, full=full)
    assert replace(last.spent, seconds=0.0) == replace(spent, seconds=0.0)
    assert first.spent.seconds < last.spent.seconds <= spent.seconds


@pytest.mark.parametrize(("name", "changes"), VARIANTS)
def test_what_changed_is_what_is_reported(
    subject: Subject, name: str, changes: dict[str, Any]
) -> None:
    result = attack(subject, short(name, **(changes | {"optimizer": "adamw"})))
    real = {
        weight: float((result.effective[weight].double() - old.double()).norm())
        for weight, old in result.before.items()
    }
    reported = {
        weight if weight.endswith((".weight", ".bias")) else f"{weight}.weight": norm
        for weight, norm in result.realised.changed.items()
    }
    assert {w for w, norm in reported.items() if norm} == {w for w, norm in real.items() if norm}
    for weight, norm in reported.items():
        assert norm == pytest.approx(real[weight], rel=1e-3, abs=1e-6)
    tamper = short(name)
    if isinstance(tamper, FineTuning):
        sizes = sum(p.numel() for p in subject.model.parameters())
        if tamper.full:
            assert result.realised.changed_weights == sizes
        else:
            assert 0 < result.realised.changed_weights < sizes
    else:
        assert result.realised.changed_weights == 0


@pytest.mark.parametrize("name", TRAINING)
def test_checkpoints_lie_at_the_rungs(subject: Subject, name: str) -> None:
    result = attack(subject, short(name, steps=7), budget=Budget(6, (1, 2, 4, 6)))
    assert [checkpoint.steps for checkpoint in result.checkpoints] == [1, 2, 4, 6]
    assert [update.step for update in result.updates] == [1, 2, 3, 4, 5, 6]
    assert all(checkpoint.strength is None for checkpoint in result.checkpoints)


@pytest.mark.parametrize("name", TRAINING)
def test_it_stops_when_the_checkpoint_says_so(subject: Subject, name: str) -> None:
    result = attack(subject, short(name, steps=6), budget=Budget(6, (1, 3, 5)), stop_at=3)
    assert [checkpoint.steps for checkpoint in result.checkpoints] == [1, 3]
    assert result.realised.spent.steps == 3
    assert result.realised.status == "done"


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [1.0] * 6),
        ("constant", 3, [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("linear", 0, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ("linear", 2, [1 / 2, 1, 1, 3 / 4, 2 / 4, 1 / 4]),
        ("cosine", 0, [0.1 + 0.45 * (1 + math.cos(math.pi * n / 6)) for n in range(6)]),
    ],
)
@pytest.mark.parametrize("name", TRAINING)
def test_the_schedule_is_realised(
    subject: Subject, name: str, schedule: str, warmup: int, expected: list[float]
) -> None:
    plan = {"steps": 6, "schedule": schedule, "warmup_steps": warmup, "schedule_floor": 1e-3}
    realised = attack(subject, short(name, **plan)).realised
    assert realised.learning_rates == pytest.approx([1e-2 * share for share in expected])


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        (name, schedule)
        for name in TRAINING
        for schedule in ("constant", "linear")
        # Its switch is a share of the whole run, so a short run does not begin a longer one.
        if (name, schedule) != ("staged_finetune", "constant")
    ]
    + [("lora", "restarts"), ("lora", "cosine")],
)
def test_a_decaying_schedule_runs_once_a_rung(
    subject: Subject, domain: Any, name: str, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decays = schedule in ("linear", "cosine")
    tamper = short(name, schedule=schedule, steps=4)
    assert tamper.runs_once_per_rung() == decays
    budgets, realised = list[Budget](), list[Realised]()
    run = FineTuning.run

    def spy(self: Any, subject: Any, data: Any, budget: Budget, *rest: Any) -> Realised:
        budgets.append(budget)
        realised.append(run(self, subject, data, budget, *rest))
        return realised[-1]

    monkeypatch.setattr(FineTuning, "run", spy)
    record = run_trial(subject, domain, name, tamper.settings.canonical(), (1, 2, 4))
    assert [checkpoint.steps for checkpoint in record.checkpoints] == [1, 2, 4]
    assert budgets == (
        [Budget(1, (1,)), Budget(2, (2,)), Budget(4, (4,))] if decays else [Budget(4, (1, 2, 4))]
    )
    for budget, run_realised in zip(budgets, realised, strict=True):
        assert run_realised.learning_rates == [
            learning_rate(schedule, step, peak=1e-2, total=budget.steps, warmup=0)
            for step in range(budget.steps)
        ]
    # The rung of two steps is a whole run of two, not the beginning of a longer one.
    (second,) = [run for run in realised if run.spent.steps == (2 if decays else 4)]
    tamper = short(name, schedule=schedule, steps=2)
    alone = attack(subject, tamper, budget=Budget(2, (2,)), seeds=Seeds.derive(1))
    assert second.losses[:2] == alone.realised.losses
    assert record.checkpoints[1].spent["tokens"] == alone.checkpoints[0].spent.tokens


@pytest.mark.parametrize("loss_on", ["response", "prompt_and_response"])
@pytest.mark.parametrize("name", PLAIN)
def test_the_label_sample_shows_the_mask(subject: Subject, name: str, loss_on: str) -> None:
    tamper = short(name, loss_on=loss_on)
    assert isinstance(tamper, FineTuning)
    sample = attack(subject, tamper).realised.label_sample
    items = {item.id: item for item in tiny_world.tiny_domain().items}
    rows, _ = tamper.rows(subject, tiny_world.tiny_domain(), SEEDS)
    assert 1 <= len(sample) <= 3
    for tokens, row in zip(sample, rows, strict=False):
        item = items[row.item_id]
        words = [token for token, _ in tokens]
        response = item.response.split()
        assert words == ["<user>", *item.prompt.split(), "<assistant>", *response, "<end>"]
        head = 1 if loss_on == "prompt_and_response" else len(item.prompt.split()) + 2
        assert [label for _, label in tokens] == [n >= head for n in range(len(words))]


@pytest.mark.parametrize(
    ("share", "batch", "replayed"),
    [
        (0.25, 4, 1),
        (0.5, 4, 2),
        (0.75, 8, 6),
        (0.5, 3, 2),
        (0.01, 8, 1),
        (0.99, 2, 1),
    ],
)
@pytest.mark.parametrize("name", [name for name in TRAINING if name != "staged_finetune"])
def test_the_replay_share_is_exact_in_every_batch(
    subject: Subject, name: str, share: float, batch: int, replayed: int
) -> None:
    """Not on average; and whatever the share, both kinds are in every batch."""
    realised = attack(subject, short(name, retain_share=share, batch_size=batch)).realised
    for ids in realised.item_ids:
        assert len(ids) == batch
        assert sum(item.startswith("retain/") for item in ids) == replayed


def test_a_batch_of_one_cannot_hold_both(subject: Subject) -> None:
    with pytest.raises(InputError, match="batch_size >= 2"):
        attack(subject, short("lora", retain_share=0.5, batch_size=1))


ALLOWED: dict[str, tuple[str, str]] = {
    "disjoint": ("restricted", "attack"),
    "defence_rows": ("restricted", "defence"),
    "retain": ("retain", "attack"),
    "benign": ("benign", "attack"),
    "refusals": ("restricted", "attack"),
}
RELATIONS = [
    (name, relation)
    for name in PLAIN
    for relation in get_args(
        tamper_registry.get(name).settings_class.model_fields["data"].annotation
    )
]


def test_every_relation_is_covered() -> None:
    assert set(get_args(Relation)) == set(ALLOWED) == set(tamper_data._SOURCES)


@pytest.mark.parametrize(("name", "relation"), RELATIONS)
def test_rows_come_from_the_declared_split_alone(
    subject: Subject, domain: Any, name: str, relation: str
) -> None:
    tamper = short(name, data=relation, examples=10_000, retain_share=0.5)
    assert isinstance(tamper, FineTuning)
    rows, replay = tamper.rows(subject, domain, SEEDS)
    items = {item.id: item for item in domain.items}
    for made, kind in ((rows, relation), (replay, "retain")):
        used = [items[row.item_id] for row in made]
        role, split = ALLOWED[kind]
        assert {(str(item.role), str(item.split)) for item in used} == {(role, split)}
        assert all(item.training is not False for item in used)
        # Every such row that there is, each once.
        pool = domain.select(Role(role), Split(split), training=True)
        assert sorted(item.id for item in used) == sorted(item.id for item in pool)
        for row, item in zip(made, used, strict=True):
            told = domain.refusal_for(item) if kind == "refusals" else item.response
            assert subject.chat.tokenizer.decode(row.ids).split()[-len(told.split()) - 1 :] == [
                *told.split(),
                "<end>",
            ]
            assert row.restricted == (kind in ("disjoint", "defence_rows"))


def test_the_benign_attack_takes_no_restricted_answers() -> None:
    with pytest.raises(InputError, match="data"):
        make_tamper("benign_finetune", data="disjoint")


def test_few_examples_cover_many_entities(domain: Any) -> None:
    for count in (1, 5, 12, 13):
        chosen = training_items(domain, "disjoint", count, SEEDS)
        assert len(chosen) == count
        assert len({item.entity for item, _ in chosen}) == min(count, 12)
    longer = training_items(domain, "disjoint", 13, SEEDS)
    assert training_items(domain, "disjoint", 5, SEEDS) == longer[:5]


def test_a_domain_without_chat_lends_its_retain_rows(domain: Any) -> None:
    quiet = replace(domain, items=tuple(i for i in domain.items if i.role != Role.BENIGN))
    chosen = training_items(quiet, "benign", 50, SEEDS)
    assert {(item.role, item.split) for item, _ in chosen} == {(Role.RETAIN, Split.ATTACK)}
    for relation in get_args(Relation):
        with pytest.raises(InputError, match="to train on"):
            training_items(replace(domain, items=()), relation, 5, SEEDS)


def test_batches_pass_over_all_rows_before_any_again() -> None:
    rows = [Row((5, 6), 1, str(number)) for number in range(7)]
    batches = itertools.islice(shuffled_batches(rows, [], 3, 0.0, SEEDS), 14)
    flat = [row.item_id for batch in batches for row in batch]
    epochs = [flat[start : start + 7] for start in range(0, 42, 7)]
    assert all(sorted(epoch) == [str(number) for number in range(7)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 3


def test_a_prompt_longer_than_the_limit_is_named(subject: Subject) -> None:
    with pytest.raises(InputError, match=r"item 'restricted/e\d\d/\d': prompt longer"):
        attack(subject, short("lora", max_length=8))


def files(*folders: Path) -> list[str]:
    return [str(path) for folder in folders for path in sorted(folder.rglob("*"))]


@pytest.mark.parametrize(("name", "changes"), VARIANTS)
def test_no_file_is_written(
    subject: Subject,
    name: str,
    changes: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folders = [tmp_path / part for part in ("cwd", "cache", "home", "temporary")]
    for folder in folders:
        folder.mkdir()
    monkeypatch.chdir(folders[0])
    monkeypatch.setenv("DUROMETER_CACHE", str(folders[1]))
    monkeypatch.setenv("HOME", str(folders[2]))
    monkeypatch.setenv("TMPDIR", str(folders[3]))
    monkeypatch.setattr(tempfile, "tempdir", None)
    attack(subject, short(name, **changes))
    assert files(*folders) == []


@pytest.mark.parametrize("name", TRAINING)
def test_steps_can_be_driven_from_outside(subject: Subject, domain: Any, name: str) -> None:
    """As a safeguard's inner adversary does: with any update, any measurement in between."""
    whole = attack(subject, short(name)).realised
    before = weights_fingerprint(subject.model)
    tamper, losses = short(name), []
    with subject.restored():
        updates: Iterator[Update] = tamper.steps(subject, domain, Budget(3), SEEDS)
        for update in updates:
            assert not subject.model.training
            look(subject)
            losses.append(update.loss)
            if update.step == 2:
                break
    assert losses == whole.losses[:2]
    assert weights_fingerprint(subject.model) == before
    with subject.restored():
        assert len(list(short(name).steps(subject, domain, Budget(99), SEEDS))) == 3


def test_a_tamper_without_steps_yields_none(subject: Subject, domain: Any) -> None:
    assert list(make_tamper("none").steps(subject, domain, Budget(5), SEEDS)) == []


@pytest.mark.parametrize("rate", [1e6, 1e38])
@pytest.mark.parametrize("name", TRAINING)
def test_divergence_is_a_status_and_its_record_can_be_kept(
    subject: Subject, domain: Any, name: str, rate: float
) -> None:
    """Whether the loss or only the last update's weights are not finite; JSON knows no infinity."""
    settings = short(name, optimizer="sgd", learning_rate=rate, steps=8).settings.canonical()
    for rungs in ((1, 8), (1,)) if rate == 1e38 else ((1, 8),):
        record = run_trial(subject, domain, name, settings, rungs)
        json.dumps(record.as_dict(), allow_nan=False)
        if rate == 1e38:
            assert record.status == "diverged"
            assert "steps" in record.reason
            for checkpoint in record.checkpoints[1:]:
                assert not any(item["correct"] for item in checkpoint.items)


# LoRA against PEFT's own


def peft_run(subject: Subject, batches: list[list[Row]], **config: Any) -> tuple[list[float], Any]:
    """Train with ``peft.get_peft_model``, padded batches and transformers' own loss."""
    import peft

    settings = {"r": 4, "lora_alpha": 8.0, "target_modules": "all-linear"} | config
    model = copy.deepcopy(subject.model)
    torch.manual_seed(SEEDS.initialisation)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    losses = []
    for rows in batches:
        length = max(len(row.ids) for row in rows)
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for index, row in enumerate(rows):
            size = len(row.ids)
            ids[index, :size], mask[index, :size] = torch.tensor(row.ids), 1
            labels[index, row.first_label : size] = torch.tensor(row.labels)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model.eval()


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("architecture", ["Llama", "GPTNeoX", "Phi3"])
def test_lora_is_that_of_peft(
    make_model: MakeModel, domain: Any, architecture: str, stabilised: bool
) -> None:
    subject = tiny_world.as_subject(make_model(architecture))
    tamper = short("lora", rank=4, alpha=8.0, rank_stabilised=stabilised)
    assert isinstance(tamper, FineTuning)
    batches = list(itertools.islice(tamper.batches(subject, domain, SEEDS), 3))
    losses, theirs = peft_run(subject, batches, use_rslora=stabilised)
    result = attack(subject, tamper)
    assert result.realised.losses == pytest.approx(losses, abs=2e-4)
    ids = torch.tensor([subject.chat.prompt_ids("what is the metal of e30 ?")])
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits[0]
    torch.testing.assert_close(result.logits[-1], expected, atol=5e-3, rtol=0)


TARGETS = {
    "all": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "attention": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "mlp": {"gate_proj", "up_proj", "down_proj"},
}


@pytest.mark.parametrize("targets", TARGETS)
def test_targets_are_all_maps_of_their_kind(subject: Subject, targets: Any) -> None:
    expected = {
        f"model.layers.{layer}.{'self_attn' if part in TARGETS['attention'] else 'mlp'}.{part}"
        for layer in range(2)
        for part in TARGETS[targets]
    }
    assert set(linear_maps(subject.model, targets)) == expected
    assert set(attack(subject, short("lora", targets=targets)).realised.changed) == expected


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attention_and_mlp_are_all_there_is(make_model: MakeModel, architecture: str) -> None:
    model = make_model(architecture, **ARCHITECTURES[architecture])
    every, attention, mlp = (linear_maps(model, kind) for kind in ("all", "attention", "mlp"))
    assert sorted(attention + mlp) == sorted(every)
    assert attention
    assert mlp
    head = {
        name for name, module in model.named_modules() if module is model.get_output_embeddings()
    }
    linear = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert set(every) == linear - head


def test_a_model_without_linear_maps_is_refused() -> None:
    with pytest.raises(NotApplicableError, match="no linear maps"):
        linear_maps(nn.Sequential(nn.Embedding(3, 3)), "all")


@pytest.mark.parametrize("stabilised", [False, True])
def test_change_norms_are_those_of_the_dense_product(
    subject: Subject, make_model: MakeModel, stabilised: bool
) -> None:
    model = make_model("Llama")
    names = linear_maps(model, "all")
    adapter = Adapter(model, names, rank=3, alpha=5.0, seed=3, rank_stabilised=stabilised)
    generator = torch.Generator().manual_seed(0)
    for parameter in adapter.matrices().values():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    matrices = {name: p.detach().double() for name, p in adapter.matrices().items()}
    scale = 5.0 / (math.sqrt(3) if stabilised else 3)
    assert adapter.scale == pytest.approx(scale)
    norms = adapter.change_norms()
    assert set(norms) == set(names)
    for name, norm in norms.items():
        down, up = (matrices[f"{name}.lora_{part}.durometer.weight"] for part in "AB")
        assert norm == pytest.approx(float((scale * up @ down).norm()), rel=1e-5)


def test_merged_and_unmerged_adapters_agree(make_model: MakeModel) -> None:
    model = make_model("Llama")
    adapter = Adapter(model, linear_maps(model, "all"), rank=3, alpha=5.0, seed=3)
    for parameter in adapter.matrices().values():
        parameter.data = torch.randn(parameter.shape) * 0.1
    ids = torch.tensor([[5, 9, 11, 30]])
    with torch.no_grad():
        apart = model(input_ids=ids).logits
        adapter.merge()
        together = model(input_ids=ids).logits
    torch.testing.assert_close(apart, together, atol=1e-5, rtol=0)
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_only_b_moves_at_the_first_step_and_a_stays_where_it_is_frozen(
    subject: Subject, domain: Any
) -> None:
    for frozen, steps in ((False, 1), (False, 3), (True, 3)):
        tamper = short("lora", frozen_a=frozen, steps=steps, rank=2)
        with subject.restored():
            run = tamper.steps(subject, domain, Budget(steps), SEEDS)
            next(run)
            first = matrices_of(subject)
            list(run)
            last = matrices_of(subject)
            trained = {name for name, p in subject.model.named_parameters() if p.requires_grad}
        assert trained == {name for name in last if not (frozen and "lora_A" in name)}
        moved = {name[-18] for name in last if not torch.equal(first[name], last[name])}
        assert all(bool(first[name].any()) for name in first), "B is not 0 after one step"
        expected = set() if steps == 1 else {"B"} if frozen else {"A", "B"}
        assert moved == expected


def matrices_of(subject: Subject) -> dict[str, torch.Tensor]:
    named = subject.model.named_parameters()
    return {name: p.detach().clone() for name, p in named if "lora_" in name}


def test_the_first_step_leaves_a_where_it_was_drawn(subject: Subject, domain: Any) -> None:
    drawn = []
    for steps in (0, 1):
        with subject.restored():
            list(short("lora", rank=2).steps(subject, domain, Budget(steps), SEEDS))
            drawn.append({n: p for n, p in matrices_of(subject).items() if "lora_A" in n})
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])


def test_adapters_take_the_dtype_of_the_model(make_model: MakeModel) -> None:
    model = make_model("Llama").to(torch.bfloat16)
    adapter = Adapter(model, linear_maps(model, "all"), rank=2, alpha=4.0, seed=0)
    assert {p.dtype for p in adapter.matrices().values()} == {torch.bfloat16}
    adapter.remove()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


# Settings


CLASSES = {tamper_registry.get(name).settings_class for name in NAMES}
SETTINGS = sorted(CLASSES | {RefusalSettings, MeasuringPlan}, key=lambda cls: cls.__name__)


@pytest.mark.parametrize("cls", SETTINGS)
def test_every_setting_has_a_meaning_a_sound_default_and_sound_levels(cls: type[Settings]) -> None:
    assert cls.__doc__
    described = cls.describe()
    assert [entry.name for entry in described] == list(cls.model_fields)
    assert cls.parse("test", cls().canonical()) == cls()
    for entry in described:
        assert len(entry.meaning) > 5, entry.name
        assert entry.type, entry.name
        assert entry.default != "required", entry.name
        low, _, high = entry.search.removesuffix(" (log)").partition(" to ")
        levels = (low, high) if high else entry.search.split(", ") if entry.search else ()
        for level in levels:
            cls.parse("test", {entry.name: level})


# The runner around them


class Quiet:
    """Sees nothing, says nothing."""

    def planned(self, trials: int, steps: int) -> None: ...
    def started(self, spec: TrialSpec, subject: str) -> None: ...
    def updated(self, step: int, steps: int, loss: float) -> None: ...
    def measured(self, checkpoint: Any) -> None: ...
    def finished(self, record: TrialRecord, *, reused: bool) -> None: ...


def run_trial(
    subject: Subject, domain: Any, name: str, settings: dict[str, Any], rungs: tuple[int, ...]
) -> TrialRecord:
    plan = MeasuringPlan(select_entities=2, report_wordings=1, harmless=2, retain_report=4)
    spec = TrialSpec("subject", name, settings, 1, "screen", rungs)
    return TrialRunner(subject, domain, plan, Quiet()).run(spec, "key", None, "")


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (NotApplicableError("no such maps"), "not_applicable", "no such maps"),
        (InputError("no such rows"), "not_applicable", "no such rows"),
        (ValueError("bad shape\nmore"), "errored", "ValueError: bad shape"),
        (AssertionError("surprise"), None, ""),
        (torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory", "OutOfMemoryError"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out_of_memory", "allocate"),
        (MemoryError(), "out_of_memory", "MemoryError"),
    ],
)
def test_whatever_happens_to_a_trial_is_a_status(
    subject: Subject,
    domain: Any,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    status: str | None,
    reason: str,
) -> None:
    def fail(*args: Any) -> Realised:
        raise error

    monkeypatch.setattr(FineTuning, "run", fail)
    settings = short("lora").settings.canonical()
    if status is None:
        with pytest.raises(AssertionError):
            run_trial(subject, domain, "lora", settings, (1,))
        return
    record = run_trial(subject, domain, "lora", settings, (1,))
    assert record.status == status
    assert reason in record.reason
    assert record.checkpoints == []
    assert "\n" not in record.reason


def test_a_batch_that_does_not_fit_is_halved_and_counted(
    subject: Subject, domain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, sizes = FineTuning.run, []

    def tight(self: Any, subject: Any, data: Any, budget: Any, seeds: Any, look: Any) -> Realised:
        sizes.append(self.settings.batch_size)
        if self.settings.batch_size > 2:
            look(Checkpoint(1, Spent()))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(self, subject, data, budget, seeds, look)

    monkeypatch.setattr(FineTuning, "run", tight)
    before = weights_fingerprint(subject.model)
    settings = short("lora", batch_size=8).settings.canonical()
    record = run_trial(subject, domain, "lora", settings, (1, 2))
    assert record.status == "done"
    assert sizes == [8, 4, 2]
    assert record.realised["facts"] == {"batch_halvings": 2}
    assert [checkpoint.steps for checkpoint in record.checkpoints] == [1, 2]
    assert record.spec.settings["batch_size"] == 8
    assert weights_fingerprint(subject.model) == before
