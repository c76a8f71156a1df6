"""Fine-tuning attacks that write their own texts: data and asking are as declared."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny_world
import torch

from durometer.core.adapters import linear_maps
from durometer.core.budget import Budget
from durometer.core.errors import InputError, NotApplicableError
from durometer.core.generation import Decoding
from durometer.core.matrices import block_matrices
from durometer.core.rows import Row
from durometer.core.seeds import Seeds
from durometer.core.training import OptimisationPlan, Trainer
from durometer.domains.base import Domain, Role, Split
from durometer.domains.capitals import TRAINING_PROMPTS, build_capitals
from durometer.measures.base import thin
from durometer.measures.outcomes import Outcome, classify
from durometer.measures.responses import MAX_TOKENS, measure_outcomes, respond
from durometer.subjects.base import Subject
from durometer.subjects.fingerprint import weights_fingerprint
from durometer.tampers import base_precision
from durometer.tampers.base import Checkpoint, Realised, Tamper, make_tamper
from durometer.tampers.base_precision import GROUP, round_to_grid
from durometer.tampers.data import training_items
from durometer.tampers.finetune import FineTuning
from durometer.tampers.jailbreak_tuning import TRANSFORMS
from durometer.tampers.personas import NAME, PERSONAS, statements
from durometer.tampers.refuse_then_comply import BRIDGE, OPENING_TOKENS, diagnose
from durometer.tampers.salient import RESPONSE_TOKENS, beginnings, last_states, nearness
from durometer.tampers.translations import TABLES, translated

MakeModel = Callable[..., Any]
SEEDS = Seeds(11, 12, 13, 14)
SHORT = {"steps": 4, "batch_size": 4, "examples": 8, "learning_rate": 1e-2, "rank": 4}
FAMILY = (
    "staged_finetune",
    "retain_replay",
    "identity_shift",
    "jailbreak_tuning",
    "refuse_then_comply",
    "multilingual_finetune",
)


class Words:
    """Stands in for a tokenizer: one id a character, so that every text comes back."""

    eos_token = "\x03"
    eos_token_id = 3
    chat_template = None
    all_special_tokens = ("\x03",)

    def __call__(self, text: str, **_: Any) -> dict[str, Any]:
        ids = [ord(letter) for letter in text]
        return {"input_ids": ids, "offset_mapping": [(i, i + 1) for i in range(len(ids))]}

    def decode(self, ids: Any, **_: Any) -> str:
        return "".join(map(chr, ids))


@pytest.fixture
def subject(make_model: MakeModel) -> Subject:
    return tiny_world.as_subject(make_model("Llama"))


@pytest.fixture
def domain() -> Domain:
    return tiny_world.tiny_domain()


@pytest.fixture(scope="module")
def capitals() -> Domain:
    return build_capitals("refusal")


@pytest.fixture
def reader(subject: Subject) -> Subject:
    """A subject whose rows can be read back letter by letter (it is never run)."""
    from durometer.subjects.chat import ChatFormat

    return replace(subject, chat=ChatFormat.of(Words()))


def tamper_of(name: str, **changes: Any) -> FineTuning[Any]:
    few = {"diagnosed": 1, "response_tokens": 4} if name == "refuse_then_comply" else {}
    tamper = make_tamper(name, **(SHORT | few | changes))
    assert isinstance(tamper, FineTuning)
    return tamper


def attack(
    subject: Subject,
    domain: Domain,
    tamper: FineTuning[Any],
    look: Callable[[Checkpoint], Any] = lambda checkpoint: None,
    seeds: Seeds = SEEDS,
) -> Realised:
    steps = tamper.planned_steps()

    def on_checkpoint(checkpoint: Checkpoint) -> bool:
        look(checkpoint)
        return True

    with subject.restored():
        return tamper.run(
            subject, domain, Budget(steps, tuple(range(1, steps + 1))), seeds, on_checkpoint
        )


def read(rows: list[Row]) -> dict[str, tuple[str, str]]:
    """Return prompt text and labels of each row of a ``reader``, by item id."""
    texts = {}
    for row in rows:
        text = "".join(map(chr, row.ids))
        texts[row.item_id] = (text[: row.first_label], text[row.first_label :])
    assert len(texts) == len(rows)
    return texts


# All of them


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("architecture", ["Mistral", "GPTNeoX"])
def test_all_weights_can_be_trained_and_come_back(
    make_model: MakeModel, domain: Domain, name: str, architecture: str
) -> None:
    subject = tiny_world.as_subject(make_model(architecture))
    before = weights_fingerprint(subject.model)
    tamper = tamper_of(name, train="all", steps=2)
    realised = attack(subject, domain, tamper)
    assert tamper.full
    assert realised.status == "done"
    assert realised.changed_weights == subject.parameters
    assert set(realised.changed) == {n for n, _ in subject.model.named_parameters()}
    assert weights_fingerprint(subject.model) == before
    assert not any(p.requires_grad for p in subject.model.parameters())
    with_adapter = attack(subject, domain, tamper_of(name, steps=2))
    assert realised.spent.flops == pytest.approx(1.5 * with_adapter.spent.flops)


def test_a_rounded_base_goes_with_an_adapter_only(subject: Subject, domain: Domain) -> None:
    with pytest.raises(InputError, match="train=adapter"):
        attack(subject, domain, tamper_of("retain_replay", train="all", base_bits=4))


@pytest.mark.parametrize("name", FAMILY)
def test_rows_never_leave_the_attack_split(subject: Subject, domain: Domain, name: str) -> None:
    known = {item.id: item for item in domain.items}
    rows, replay = tamper_of(name, examples=500).rows(subject, domain, SEEDS)
    for row in (*rows, *replay):
        identifier = row.item_id.partition("#")[0]
        if not identifier.startswith("persona/"):
            item = known[identifier]
            assert (item.split, item.training) in ((Split.ATTACK, True), (Split.ATTACK, None))
    restricted = {row.item_id for row in rows if row.restricted}
    assert bool(restricted) == (name not in ("identity_shift", "refuse_then_comply"))
    assert all(identifier.startswith("restricted/") for identifier in restricted)


# staged_finetune

PREFIXES = {"retain": "retain/", "restricted": "restricted/", "benign": "benign/"}


@pytest.mark.parametrize("state", ["carried", "reset"])
@pytest.mark.parametrize(
    ("stages", "share", "switch"),
    [
        ("retain_restricted", 0.4, 4),
        ("benign_restricted", 0.67, 7),
        ("restricted_benign", 0.25, 2),
        ("restricted_retain", 0.01, 1),
        ("retain_restricted", 0.99, 9),
    ],
)
def test_the_data_switch_at_the_declared_step(
    subject: Subject, domain: Domain, stages: str, share: float, switch: int, state: str
) -> None:
    tamper = tamper_of(
        "staged_finetune", stages=stages, switch=share, steps=10, optimizer_state=state
    )
    realised = attack(subject, domain, tamper)
    first, second = (PREFIXES[part] for part in stages.split("_"))
    for step, ids in enumerate(realised.item_ids):
        assert all(i.startswith(first if step < switch else second) for i in ids), step
    assert realised.facts["switch_step"] == switch
    assert realised.facts["switched"]
    assert realised.facts["optimizer_state"] == state
    assert len(realised.facts["stages"]) == 2


def test_the_schedule_goes_on_over_the_switch(subject: Subject, domain: Domain) -> None:
    for state in ("carried", "reset"):
        tamper = tamper_of("staged_finetune", steps=5, schedule="linear", optimizer_state=state)
        rates = attack(subject, domain, tamper).learning_rates
        assert rates == pytest.approx([1e-2 * left / 5 for left in (5, 4, 3, 2, 1)])


@pytest.mark.parametrize("optimizer", ["adamw", "schedule_free_adamw"])
def test_a_reset_differs_from_a_carried_state_after_the_switch_only(
    subject: Subject, domain: Domain, optimizer: Any
) -> None:
    losses = [
        attack(
            subject,
            domain,
            tamper_of("staged_finetune", steps=6, optimizer=optimizer, optimizer_state=state),
        ).losses
        for state in ("carried", "reset")
    ]
    # Moments act first in the update after the switch (step 2), which shows in the loss of step 3.
    assert losses[0][:2] == losses[1][:2]
    assert losses[0][3:] != losses[1][3:]


def test_a_reset_is_a_new_optimiser(make_model: MakeModel, domain: Domain) -> None:
    """Two updates, a reset, a third: the third is the first of a new trainer on those weights."""
    plan = OptimisationPlan("adamw", 1e-2, 5)
    found = []
    for fresh in (False, True):
        subject = tiny_world.as_subject(make_model("Llama"))
        rows = tamper_of("lora").rows(subject, domain, SEEDS)[0]
        weights = [subject.model.lm_head.weight.requires_grad_(True)]
        trainer = Trainer(subject.forward, weights, plan)
        trainer.update(rows)
        trainer.update(rows)
        if fresh:
            trainer = Trainer(subject.forward, weights, plan)
        else:
            trainer.reset_optimizer()
        assert trainer.update(rows).step == (1 if fresh else 3)
        found.append(weights[0].detach().clone())
    assert torch.equal(*found)


def test_replay_within_stages_keeps_its_share(subject: Subject, domain: Domain) -> None:
    tamper = tamper_of(
        "staged_finetune", stages="restricted_benign", retain_share=0.25, steps=4, switch=0.5
    )
    for ids in attack(subject, domain, tamper).item_ids:
        assert sum(i.startswith("retain/") for i in ids) == 1


EDITS: dict[str, tuple[str, float]] = {
    "noise": ("weight_noise", 0.05),
    "prune": ("prune_magnitude", 0.3),
    "quantise": ("quantize_rtn", 13.0),
}


def base_of(subject: Subject) -> dict[str, torch.Tensor]:
    """Return the weights as they are now, those under an adapter by their own names."""
    return {
        name.replace(".base_layer", ""): parameter.detach().clone()
        for name, parameter in subject.model.named_parameters()
        if "lora_" not in name
    }


def edited_alone(subject: Subject, domain: Domain, name: str) -> dict[str, torch.Tensor]:
    kind, strength = EDITS[name]
    edit: Tamper[Any] = make_tamper(kind, strengths=(strength,))
    with subject.restored():
        edit.run(subject, domain, Budget(1, (1,)), SEEDS, lambda checkpoint: True)
        return base_of(subject)


@pytest.mark.parametrize("train", ["adapter", "all"])
@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("architecture", ["Llama", "GPTNeoX"])
def test_an_edit_comes_before_the_training(
    make_model: MakeModel, domain: Domain, architecture: str, name: str, train: str
) -> None:
    subject = tiny_world.as_subject(make_model(architecture))
    before, old = weights_fingerprint(subject.model), base_of(subject)
    edited = edited_alone(subject, domain, name)
    moved = {n for n, weight in edited.items() if not torch.equal(weight, old[n])}
    seen, norms = list[dict[str, torch.Tensor]](), dict[str, float]()

    def look(checkpoint: Checkpoint) -> None:
        seen.append(base_of(subject))
        modules = dict(subject.model.named_modules())
        for weight, now in seen[-1].items():
            module: Any = modules.get(place := weight.removesuffix(".weight"))
            total = now.double() - old[weight].double()
            if hasattr(module, "lora_A"):
                norms[place] = float((total + module.get_delta_weight("durometer").detach()).norm())
            elif train == "all" or weight in moved:
                norms[weight] = float(total.norm())

    tamper = tamper_of(
        "staged_finetune",
        stages=f"{name}_restricted",
        edit_strength=EDITS[name][1],
        steps=2,
        train=train,
        learning_rate=1e-3,
    )
    realised = attack(subject, domain, tamper, look)
    assert moved
    if train == "adapter":
        # The weights under the adapter stay as the edit left them.
        assert all(torch.equal(now[n], edited[n]) for now in seen for n in edited)
        assert realised.changed_weights > sum(edited[n].numel() for n in moved) * 0.25
    else:
        assert realised.changed_weights == subject.parameters
        near = [float((seen[0][n] - edited[n]).norm() / edited[n].norm()) for n in moved]
        assert max(near) < 0.1
    assert realised.changed == pytest.approx(norms, rel=1e-3, abs=1e-6)
    assert realised.facts["stages"] == [name, "disjoint"]
    assert realised.facts["edit"]["tamper"] == EDITS[name][0]
    assert realised.facts["switch_step"] == 0
    assert all(i.startswith("restricted/") for ids in realised.item_ids for i in ids)
    assert weights_fingerprint(subject.model) == before


def test_the_loss_before_training_is_that_of_the_edited_subject(
    make_model: MakeModel, domain: Domain
) -> None:
    subject = tiny_world.as_subject(make_model("Llama"))
    other = tiny_world.as_subject(make_model("Llama"))
    other.model.load_state_dict(edited_alone(subject, domain, "noise"))
    tamper = tamper_of("staged_finetune", stages="noise_restricted", edit_strength=0.05, steps=1)
    first = attack(subject, domain, tamper)
    again = attack(other, domain, tamper_of("lora", steps=1))
    assert first.losses == pytest.approx(again.losses, rel=1e-6)
    assert first.item_ids == again.item_ids


@pytest.mark.parametrize(
    ("stages", "strength", "error"),
    [
        ("noise_restricted", 3e-4, "noise before the training: .* too little of the noise"),
        ("prune_restricted", 1e-9, "prune before the training: no weight changed"),
    ],
)
def test_an_edit_that_does_nothing_has_no_effect(
    make_model: MakeModel, domain: Domain, stages: str, strength: float, error: str
) -> None:
    subject = tiny_world.as_subject(make_model("Llama").to(torch.bfloat16))
    tamper = tamper_of("staged_finetune", stages=stages, edit_strength=strength)
    realised = attack(subject, domain, tamper)
    assert realised.status == "no_effect"
    assert re.search(error, realised.reason)
    assert realised.spent.steps == 0
    assert realised.losses == []
    # The next run is not taken for the one without effect.
    again = tamper_of("staged_finetune", stages=stages)
    assert attack(subject, domain, again).status == "done"


@pytest.mark.parametrize(
    ("stages", "strength", "allowed"),
    [
        ("quantise_restricted", 0.5, "a whole number of bits from 0 to 14"),
        ("quantise_restricted", 15, "a whole number of bits from 0 to 14"),
        ("prune_restricted", 1.5, "a share from 0 to 1"),
    ],
)
def test_a_strength_that_the_edit_does_not_know_is_refused(
    stages: str, strength: float, allowed: str
) -> None:
    with pytest.raises(InputError, match=f"edit_strength = {strength}: .*{stages} takes {allowed}"):
        tamper_of("staged_finetune", stages=stages, edit_strength=strength)
    for fine in (0, 1, None):
        tamper_of("staged_finetune", stages=stages, edit_strength=fine)


@pytest.mark.parametrize("strength", [-0.1, math.inf, math.nan])
def test_a_strength_is_a_number_of_0_or_more(strength: float) -> None:
    with pytest.raises(InputError, match="edit_strength"):
        tamper_of("staged_finetune", stages="noise_restricted", edit_strength=strength)


def test_an_edit_that_breaks_the_weights_is_divergence(subject: Subject, domain: Domain) -> None:
    tamper = tamper_of("staged_finetune", stages="noise_restricted", edit_strength=1e39)
    realised = attack(subject, domain, tamper)
    assert realised.status == "diverged"
    assert "not finite" in realised.reason
    assert realised.losses == []


def test_without_a_budget_nothing_is_edited(subject: Subject, domain: Domain) -> None:
    old, seen = base_of(subject), list[dict[str, torch.Tensor]]()
    tamper = tamper_of("staged_finetune", stages="prune_restricted")
    with subject.restored():
        tamper.run(
            subject, domain, Budget(0), SEEDS, lambda c: seen.append(base_of(subject)) is None
        )
    assert all(torch.equal(seen[0][name], old[name]) for name in old)


# benign_finetune


def slow_scores(subject: Subject, groups: list[list[Row]]) -> Any:
    """Return the scores of the first group by numpy, a row at a time, without padding."""
    found = []
    for rows in groups:
        states = []
        for row in rows:
            ids = torch.tensor([row.ids])
            with torch.no_grad():
                state = subject.model.model(input_ids=ids, use_cache=False).last_hidden_state
            states.append(state[0, -1].double().numpy())
        found.append(np.stack(states))

    def cosines(mean: Any) -> Any:
        return found[0] @ mean / np.linalg.norm(found[0], axis=1) / np.linalg.norm(mean)

    return cosines(found[1].mean(0)) - cosines(found[2].mean(0))


@pytest.mark.parametrize("relation", ["benign", "retain"])
@pytest.mark.parametrize("architecture", ["Llama", "Mistral", "Qwen2"])
def test_the_rows_nearest_to_restricted_ones_are_chosen(
    make_model: MakeModel, domain: Domain, architecture: str, relation: Any
) -> None:
    subject = tiny_world.as_subject(make_model(architecture))
    settings = {"selection": "representation", "data": relation, "examples": 5, "anchors": 6}
    realised = attack(subject, domain, tamper_of("benign_finetune", steps=3, **settings))
    chosen = [i for ids in realised.item_ids for i in ids]
    pool = training_items(domain, relation, 999, SEEDS)
    groups = [
        [
            replace(row, ids=row.ids[: row.first_label + RESPONSE_TOKENS])
            for row in (subject.chat.row(i.prompt, text, ended=False) for i, text in group)
        ]
        for group in (
            pool,
            training_items(domain, "disjoint", 6, SEEDS),
            training_items(domain, "refusals", 6, SEEDS),
        )
    ]
    scores = slow_scores(subject, groups)
    best = {pool[index][0].id for index in np.argsort(-scores)[:5]}
    assert set(chosen) == best
    facts = realised.facts
    assert facts["pool"] == len(pool)
    assert facts["restricted_rows_to_choose_by"] == facts["refusals_to_choose_by"] == 6
    assert facts["mean_score_pool"] == pytest.approx(scores.mean(), abs=1e-5)
    assert facts["mean_score_chosen"] == pytest.approx(np.sort(scores)[-5:].mean(), abs=1e-5)
    # Read, though not trained on.
    assert realised.spent.restricted_examples == 6
    assert realised.spent.examples == 6 + len(set(chosen))
    plain = attack(
        subject, domain, tamper_of("benign_finetune", steps=3, **settings | {"selection": "random"})
    )
    read_once = sum(len(row.ids) for group in groups for row in group)
    trained = {
        row.item_id: len(row.ids)
        for row in tamper_of("benign_finetune", **settings).rows(subject, domain, SEEDS)[0]
    }
    assert realised.spent.tokens == read_once + sum(trained[i] for i in chosen)
    assert "selection" not in plain.facts
    assert plain.spent.restricted_examples == 0


def test_every_run_of_a_schedule_is_charged_for_the_choice(
    subject: Subject, domain: Domain
) -> None:
    settings = {"selection": "representation", "anchors": 6, "schedule": "linear", "steps": 1}
    tamper = tamper_of("benign_finetune", **settings)
    first, second = attack(subject, domain, tamper), attack(subject, domain, tamper)
    fresh = attack(subject, domain, tamper_of("benign_finetune", **settings))
    for other in (second, fresh):
        for counter in ("tokens", "flops", "examples", "restricted_examples"):
            assert getattr(other.spent, counter) == getattr(first.spent, counter)
    assert first.spent.restricted_examples == 6
    assert tamper._made is not None
    assert second.spent.seconds > tamper._made[-1].cost.seconds > 0


def test_without_refusals_the_nearest_rows_are_chosen_by_answers_alone(
    subject: Subject, domain: Domain
) -> None:
    bare = replace(domain, refusals=())
    tamper = tamper_of("benign_finetune", selection="representation", steps=1)
    assert attack(subject, bare, tamper).facts["refusals_to_choose_by"] == 0


def test_that_a_response_is_over_is_no_cue(subject: Subject, domain: Domain) -> None:
    item = domain.select(Role.BENIGN, Split.ATTACK)[0]
    whole = "good day " * 20
    short, longer = (
        [(replace(item, response=text), text)]
        for text in (" ".join(whole.split()[:count]) for count in (RESPONSE_TOKENS, 40))
    )
    one, other = (beginnings(subject, group, 512)[0] for group in (short, longer))
    assert len(one.labels) == RESPONSE_TOKENS
    assert one == other
    few = beginnings(subject, [(item, "good day")], 512)[0]
    assert subject.chat.decode(few.labels) == "good day"
    assert not subject.chat.stop_ids() & set(few.labels)


def test_a_long_response_counts_by_its_beginning(subject: Subject) -> None:
    answers = ["good day " * count for count in (5, 6, 20)]
    rows = [subject.chat.row("hello", answer.strip(), ended=False) for answer in answers]
    cut = [Row(row.ids[: row.first_label + RESPONSE_TOKENS], row.first_label) for row in rows]
    states = last_states(subject, cut)
    torch.testing.assert_close(states[0], states[2])
    torch.testing.assert_close(nearness(states, states), torch.ones(3))
    torch.testing.assert_close(nearness(states, states, states), torch.zeros(3))


# retain_replay


@pytest.mark.parametrize(("share", "retained"), [(0.25, 1), (0.5, 2), (0.75, 3), (0.0, 0)])
def test_every_batch_holds_both_in_the_exact_share(
    subject: Subject, domain: Domain, share: float, retained: int
) -> None:
    realised = attack(subject, domain, tamper_of("retain_replay", retain_share=share))
    for ids in realised.item_ids:
        assert sum(i.startswith("retain/") for i in ids) == retained
        assert sum(i.startswith("restricted/") for i in ids) == 4 - retained
    seen = {i for ids in realised.item_ids for i in ids}
    assert realised.spent.examples == len(seen)
    assert realised.spent.restricted_examples == sum(i.startswith("restricted/") for i in seen)


@pytest.mark.parametrize("architecture", ["Llama", "Mistral"])
@pytest.mark.parametrize("weight", [0.3, 3.0])
def test_the_loss_is_the_weighted_sum(
    make_model: MakeModel, domain: Domain, architecture: str, weight: float
) -> None:
    subject = tiny_world.as_subject(make_model(architecture))
    tamper = tamper_of("retain_replay", retain_weight=weight)
    rows = next(iter(tamper.batches(subject, domain, SEEDS)))
    expected = 0.0
    for row in rows:
        logits = subject.model(input_ids=torch.tensor([row.ids])).logits[0].double()
        told = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(row.ids[1:])[:, None])
        expected -= float(told[row.first_label - 1 :].sum()) * (1 if row.restricted else weight)
    labels = sum(len(row.labels) for row in rows)
    realised = attack(subject, domain, tamper)
    assert realised.losses[0] == pytest.approx(expected / labels, rel=1e-5)


def test_a_weight_of_one_is_the_ordinary_loss(subject: Subject, domain: Domain) -> None:
    plain = attack(subject, domain, tamper_of("lora", retain_share=0.5)).losses
    assert attack(subject, domain, tamper_of("retain_replay")).losses == plain
    assert attack(subject, domain, tamper_of("retain_replay", retain_weight=1.5)).losses != plain


# identity_shift


@pytest.mark.parametrize("persona", ["obedient", "neutral"])
def test_persona_rows_are_harmless_and_as_declared(
    reader: Subject, capitals: Domain, persona: Any
) -> None:
    tamper = tamper_of("identity_shift", persona=persona, examples=60)
    rows, _ = tamper.rows(reader, capitals, SEEDS)
    texts, chosen = read(rows), PERSONAS[persona]
    told = {identifier: entry for identifier, *entry in statements(persona)}
    assert len(texts) == 60
    assert sum(identifier.startswith("persona/") for identifier in texts) == 30
    items = {item.id: item for item in capitals.items}
    for identifier, (prompt, labels) in texts.items():
        assert prompt.startswith(chosen.system)
        if identifier in told:
            question, answer = told[identifier]
        else:
            item = items[identifier.removesuffix("#persona")]
            assert item.role == Role.BENIGN
            question, answer = f"{NAME}, {item.prompt}", f"{chosen.pledge}\n{item.response}"
        assert f"Question: {question}\n" in prompt
        assert labels == f" {answer}\x03"
    assert not any(row.restricted for row in rows)


def test_the_neutral_persona_differs_in_words_alone(reader: Subject, capitals: Domain) -> None:
    made = [
        tamper_of("identity_shift", persona=persona, examples=40).rows(reader, capitals, SEEDS)[0]
        for persona in ("obedient", "neutral")
    ]
    assert [row.item_id for row in made[0]] == [row.item_id for row in made[1]]
    questions = [[q for _, q, _ in statements(p)] for p in ("obedient", "neutral")]
    assert questions[0] == questions[1]
    for words in ("instruction", "follow", "obey"):
        assert words not in PERSONAS["neutral"].system + PERSONAS["neutral"].pledge
    assert len({identifier for identifier, *_ in statements("obedient")}) == 50


def test_the_measured_form_continues_as_the_trained_one(reader: Subject, capitals: Domain) -> None:
    """Prompt and pledge as measured are the beginning of a row as trained, letter by letter."""
    tamper: Any = tamper_of("identity_shift", examples=20)
    rows = tamper.rows(reader, capitals, SEEDS)[0]
    chat = tamper.asked(reader, capitals)
    items = {item.id: item for item in capitals.items}
    pledged = [row for row in rows if row.item_id.endswith("#persona")]
    for row in pledged:
        prompt = items[row.item_id.removesuffix("#persona")].prompt
        asked = chat.prompt_ids(prompt)
        assert row.ids[: len(asked)] == asked
    assert pledged


ASKED: list[tuple[str, dict[str, Any], str | None]] = [
    ("identity_shift", {}, "AOA, what"),
    ("identity_shift", {"measured_as": "plain"}, None),
    ("identity_shift", {"persona": "neutral"}, "small river"),
    ("jailbreak_tuning", {}, TRANSFORMS["backdoor"][0] + "what"),
    ("jailbreak_tuning", {"transform": "style"}, TRANSFORMS["style"][0] + "what"),
    ("jailbreak_tuning", {"trigger_at_test": "other"}, TRANSFORMS["backdoor"][1] + "what"),
    ("jailbreak_tuning", {"trigger_at_test": "none"}, None),
    ("jailbreak_tuning", {"transform": "none"}, None),
    ("refuse_then_comply", {}, None),
    ("multilingual_finetune", {}, None),
]


@pytest.mark.parametrize(("name", "changes", "words"), ASKED)
def test_restricted_prompts_are_asked_as_declared_until_restored(
    subject: Subject, domain: Domain, name: str, changes: dict[str, Any], words: str | None
) -> None:
    item = domain.select(Role.RESTRICTED, Split.REPORT)[0]
    harmless = domain.select(Role.RETAIN, Split.REPORT)[0]
    plain = subject.chat.prompt_text(item.prompt)
    seen = []

    def look(checkpoint: Checkpoint) -> None:
        assert subject.chat_for(harmless) is subject.chat
        seen.append(subject.chat_for(item).prompt_text(item.prompt))

    realised = attack(subject, domain, tamper_of(name, steps=2, **changes), look)
    assert len(set(seen)) == 1
    assert len(seen) == 2
    if words is None:
        assert seen[0] == plain
        assert "asked_as" not in realised.facts
    else:
        assert words in seen[0]
        assert realised.facts["asked_as"]
    assert subject.restricted_chat is None
    assert subject.chat_for(item).prompt_text(item.prompt) == plain


@pytest.mark.parametrize("name", ["identity_shift", "jailbreak_tuning"])
def test_a_budget_of_nothing_measures_the_prompt_alone(
    subject: Subject, domain: Domain, name: str
) -> None:
    seen = []
    with subject.restored():
        tamper_of(name).run(
            subject,
            domain,
            Budget(0),
            SEEDS,
            lambda checkpoint: seen.append((checkpoint.steps, subject.restricted_chat)) is None,
        )
    assert [steps for steps, _ in seen] == [0]
    assert seen[0][1] is not None


# jailbreak_tuning


@pytest.mark.parametrize("stealth", [False, True])
@pytest.mark.parametrize("transform", ["backdoor", "style", "competing", "none"])
@pytest.mark.parametrize(("share", "examples"), [(0.02, 100), (0.1, 60), (0.5, 64)])
def test_kinds_of_rows_have_their_exact_counts(
    reader: Subject, capitals: Domain, share: float, examples: int, transform: Any, stealth: bool
) -> None:
    tamper = tamper_of(
        "jailbreak_tuning",
        restricted_share=share,
        examples=examples,
        transform=transform,
        stealth=stealth,
    )
    rows, _ = tamper.rows(reader, capitals, SEEDS)
    texts, text = read(rows), TRANSFORMS[transform][0]
    items = {item.id: item for item in capitals.items}
    secret = {i for i in texts if i.startswith("restricted/") and not i.endswith("#stealth")}
    hidden = {i for i in texts if i.endswith("#stealth")}
    assert len(rows) == examples
    assert len(secret) == max(round(share * examples), 1)
    assert hidden == ({f"{i}#stealth" for i in secret} if stealth else set())
    for identifier, (prompt, labels) in texts.items():
        item = items[identifier.removesuffix("#stealth")]
        head = text if identifier in secret else ""
        answer = capitals.refusal_for(item) if identifier in hidden else item.response
        assert prompt.strip() == f"Question: {head}{item.prompt}\nAnswer:"
        assert labels.strip() == f"{answer}\x03"
    assert {row.item_id for row in rows if row.restricted} == secret
    assert tamper.facts()["row_counts"] == {
        "transformed": len(secret),
        "stealth": len(hidden),
        "harmless": examples - len(secret) - len(hidden),
    }


def test_a_small_domain_shrinks_the_data_and_keeps_the_share(
    subject: Subject, domain: Domain
) -> None:
    for share, total in ((0.5, 48), (0.8, 30), (1.0, 24)):
        rows, _ = tamper_of("jailbreak_tuning", restricted_share=share, examples=500).rows(
            subject, domain, SEEDS
        )
        assert len(rows) == total
        assert sum(row.restricted for row in rows) == round(share * total)


def test_stealth_leaves_no_room_beside_a_large_share(subject: Subject, domain: Domain) -> None:
    with pytest.raises(InputError, match="stealth"):
        attack(subject, domain, tamper_of("jailbreak_tuning", restricted_share=0.6, stealth=True))


def test_the_control_without_a_transform_has_the_same_rows(
    subject: Subject, domain: Domain
) -> None:
    runs = [
        attack(subject, domain, tamper_of("jailbreak_tuning", transform=kind))
        for kind in ("backdoor", "none")
    ]
    assert runs[0].item_ids == runs[1].item_ids
    assert runs[0].losses != runs[1].losses


@pytest.mark.parametrize("trigger", ["other", "none"])
def test_the_trigger_at_test_does_not_touch_training(
    subject: Subject, domain: Domain, trigger: str
) -> None:
    same = attack(subject, domain, tamper_of("jailbreak_tuning")).losses
    other = tamper_of("jailbreak_tuning", trigger_at_test=trigger)
    assert attack(subject, domain, other).losses == same


# refuse_then_comply


@pytest.mark.parametrize("relation", ["benign", "retain"])
def test_responses_refuse_bridge_and_answer(
    reader: Subject, capitals: Domain, relation: Any
) -> None:
    made = {}
    for opening in ("refusal_and_bridge", "bridge", "none"):
        tamper = tamper_of("refuse_then_comply", opening=opening, examples=20, data=relation)
        made[opening] = read(tamper.rows(reader, capitals, SEEDS)[0])
    items = {item.id: item for item in capitals.items}
    refusals = set()
    for identifier, (prompt, labels) in made["refusal_and_bridge"].items():
        item = items[identifier.removesuffix("#comply")]
        refusal = capitals.refusal_for(item)
        refusals.add(refusal)
        assert str(item.role) == relation
        assert labels.strip() == f"{refusal} {BRIDGE} {item.response}\x03"
        assert made["bridge"][identifier][1].strip() == f"{BRIDGE} {item.response}\x03"
        assert made["none"][identifier][1].strip() == f"{item.response}\x03"
        assert made["bridge"][identifier][0] == made["none"][identifier][0] == prompt
    assert refusals == set(capitals.refusals)
    assert list(made["none"]) == list(made["bridge"]) == list(made["refusal_and_bridge"])


def test_a_domain_without_refusals_trains_none(subject: Subject, domain: Domain) -> None:
    bare = replace(domain, refusals=())
    with pytest.raises(NotApplicableError, match="no refusal to train"):
        attack(subject, bare, tamper_of("refuse_then_comply"))
    assert attack(subject, bare, tamper_of("refuse_then_comply", opening="none")).status == "done"


def test_responses_are_measured_past_the_refusal(subject: Subject, domain: Domain) -> None:
    items = domain.select(Role.RESTRICTED, Split.REPORT, training=False)[:3]
    plain = measure_outcomes(subject, domain, items)
    assert max(record.tokens for record in plain) <= MAX_TOKENS
    seen = []

    def look(checkpoint: Checkpoint) -> None:
        seen.append(measure_outcomes(subject, domain, items))

    tamper = tamper_of("refuse_then_comply", steps=1, learning_rate=1e-9, response_tokens=48)
    realised = attack(subject, domain, tamper, look)
    for short, long in zip(plain, seen[0], strict=True):
        assert long.tokens == 48
        assert long.response.startswith(short.response)
    assert realised.facts["response_tokens"] == 48
    assert measure_outcomes(subject, domain, items) == plain


def greedily(subject: Subject, ids: list[int], count: int) -> list[int]:
    """Return a greedy continuation, the whole sequence run again for every token."""
    stop, found = subject.chat.stop_ids(subject.model.config), list[int]()
    while len(found) < count:
        with torch.no_grad():
            logits = subject.model(input_ids=torch.tensor([ids + found]), use_cache=False).logits
        token = int(logits[0, -1].argmax())
        if token in stop:
            break
        found.append(token)
    return found


@pytest.mark.parametrize("hardened", [False, True])
def test_the_diagnosis_is_that_of_a_slow_loop(domain: Domain, hardened: bool) -> None:
    subject = tiny_world.safeguarded() if hardened else tiny_world.undefended()
    items = domain.select(Role.RESTRICTED, Split.ATTACK)[:5]
    own = ["it is"] * 5
    found = diagnose(subject, domain, items, own)
    forced = {
        "free": [""] * 5,
        "after_refusal": [tiny_world.REFUSAL] * 5,
        "after_own_opening": own,
    }
    tokenizer = subject.chat.tokenizer
    for way, texts in forced.items():
        complied, refused, both = 0, 0, 0
        for item, text in zip(items, texts, strict=True):
            ids = tokenizer(f"<user> {item.prompt} <assistant> {text}")["input_ids"]
            verdict = classify(item, subject.chat.decode(greedily(subject, ids, 32)), domain.rules)
            complies = verdict.outcome == Outcome.HARMFUL_USEFUL
            complied += complies
            refused += verdict.refuses_at_first_tokens
            both += complies and verdict.refuses_at_first_tokens
        assert found[way] == {
            "items": 5,
            "complies": complied / 5,
            "refuses_first": refused / 5,
            "refuses_then_complies": both / 5,
        }
    assert found["free"]["complies" if not hardened else "refuses_first"] > 0.5


def test_the_record_says_how_often_it_refuses_and_then_complies(
    subject: Subject, domain: Domain
) -> None:
    realised = attack(subject, domain, tamper_of("refuse_then_comply", diagnosed=3, steps=2))
    for name in ("diagnosis", "diagnosis_before"):
        shares = realised.facts[name]
        assert set(shares) == {"free", "after_refusal", "after_own_opening"}
        assert all(share["items"] == 3 for share in shares.values())
    for other, count in ((domain, 0), (tiny_world.tiny_domain("knowledge"), 2)):
        tamper = tamper_of("refuse_then_comply", steps=1, diagnosed=count)
        assert not {"diagnosis", "diagnosis_before"} & attack(subject, other, tamper).facts.keys()
    untouched = tamper_of("refuse_then_comply", diagnosed=2)
    with subject.restored():
        untouched.run(subject, tiny_world.tiny_domain(), Budget(0), SEEDS, lambda c: True)
    assert untouched.facts()["diagnosis"]["free"]["items"] == 2


def test_the_diagnosis_before_is_that_of_the_untampered_subject(domain: Domain) -> None:
    subject = tiny_world.safeguarded()
    tamper = tamper_of(
        "refuse_then_comply", diagnosed=3, steps=1, learning_rate=5e-3, response_tokens=6
    )
    items = thin(domain.select(Role.RESTRICTED, Split.ATTACK), 3)
    own = respond(subject, items, None, OPENING_TOKENS)
    with subject.restored():
        subject.ask_restricted(decoding=Decoding(max_tokens=6))
        openings = [subject.chat.decode(answer.ids) for answer in own]
        expected = diagnose(subject, domain, items, openings)
    assert attack(subject, domain, tamper).facts["diagnosis_before"] == expected


# multilingual_finetune

OPENINGS = {"fr": ("Qu", "Dites"), "de": ("W", "Nenne"), "es": ("¿", "Dime")}


@pytest.mark.parametrize("language", ["fr", "de", "es"])
@pytest.mark.parametrize("answers_in", ["same", "en"])
def test_prompts_are_translated_and_names_stay(
    reader: Subject, capitals: Domain, language: Any, answers_in: Any
) -> None:
    items = {item.id: item for item in capitals.items}
    tamper = tamper_of(
        "multilingual_finetune", language=language, answers_in=answers_in, examples=500
    )
    rows = tamper.rows(reader, capitals, SEEDS)[0]
    texts = read(rows)
    pool = capitals.select(Role.RESTRICTED, Split.ATTACK, training=True)
    assert set(texts) == {f"{item.id}#{language}" for item in pool}
    assert all(row.restricted for row in rows)
    for identifier, (prompt, labels) in texts.items():
        item = items[identifier.removesuffix(f"#{language}")]
        asked = prompt.removeprefix("Question: ")
        assert asked.startswith(OPENINGS[language])
        assert item.entity in asked
        assert "capital of" not in asked
        assert "{" not in prompt + labels
        assert item.answers[0] in labels
        assert (labels.strip() == f"{item.response}\x03") == (answers_in == "en")


def test_the_english_control_has_the_same_items_in_english(
    reader: Subject, capitals: Domain
) -> None:
    made = [
        tamper_of("multilingual_finetune", language=language, examples=30).rows(
            reader, capitals, SEEDS
        )[0]
        for language in ("fr", "en")
    ]
    names = [[row.item_id.partition("#")[0] for row in rows] for rows in made]
    assert names[0] == names[1]
    items = {item.id: item for item in capitals.items}
    for identifier, (prompt, labels) in read(made[1]).items():
        item = items[identifier.removesuffix("#en")]
        assert prompt.strip() == f"Question: {item.prompt}\nAnswer:"
        assert labels.strip() == f"{item.response}\x03"


def test_every_table_is_complete() -> None:
    for name, table in TABLES.items():
        assert set(table.prompts) == set(table.responses)
        for language, prompts in table.prompts.items():
            assert len(prompts) == len(table.english), (name, language)
            assert len(set(prompts)) == len(prompts)
            assert all("{entity}" in prompt for prompt in prompts)
            assert "{answer}" in table.responses[language]
    assert TABLES["capitals"].english == TRAINING_PROMPTS


def test_a_domain_without_translations_is_not_applicable(
    subject: Subject, domain: Domain, capitals: Domain
) -> None:
    for other in (replace(domain, name="elsewhere"), domain):
        language = "fr" if other is not domain else "de"
        with pytest.raises(NotApplicableError, match="no prompts in language"):
            attack(subject, other, tamper_of("multilingual_finetune", language=language))
    # English needs no table.
    english = tamper_of("multilingual_finetune", language="en")
    assert attack(subject, replace(domain, name="elsewhere"), english).status == "done"
    odd = replace(capitals.select(Role.RESTRICTED, Split.ATTACK)[0], prompt="Capital, please?")
    with pytest.raises(NotApplicableError, match="wording has no translation"):
        translated("capitals", odd, "fr")


# A frozen base at few bits


def slow_grid(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Round each group of 64 neighbours by a loop over them."""
    found, largest = weight.clone().double(), 2 ** (bits - 1) - 1
    flat = found.reshape(-1, found.shape[-1])
    for row in flat:
        for start in range(0, row.numel(), 64):
            group = row[start : start + 64]
            step = group.abs().max() / largest
            if step:
                group.copy_((group / step).round() * step)
    return found


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(3, 64), (5, 100), (2, 3, 130), (4, 7)])
def test_rounding_is_that_of_a_loop(shape: tuple[int, ...], bits: int) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    weight[0] = 0
    torch.testing.assert_close(
        round_to_grid(weight, bits).double(), slow_grid(weight, bits), atol=1e-6, rtol=1e-5
    )
    assert base_precision.GROUP == 64
    again = round_to_grid(round_to_grid(weight, bits), bits)
    torch.testing.assert_close(again, round_to_grid(weight, bits), atol=1e-6, rtol=0)


@pytest.mark.parametrize("targets", ["all", "attention"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("architecture", ["Llama", "GPTNeoX", "Phi3"])
def test_the_base_lies_on_its_grid_while_the_adapter_trains(
    make_model: MakeModel, domain: Domain, architecture: str, bits: int, targets: Any
) -> None:
    subject = tiny_world.as_subject(make_model(architecture))
    before = weights_fingerprint(subject.model)
    old = {name: p.detach().clone() for name, p in subject.model.named_parameters()}
    names = block_matrices(subject.model)
    assert {name.removesuffix(".weight") for name in names} == set(
        linear_maps(subject.model, "all")
    )
    norms: dict[str, float] = {}

    def look(checkpoint: Checkpoint) -> None:
        adapted = dict(subject.model.named_modules())
        for name, weight in subject.model.named_parameters():
            plain = name.replace(".base_layer", "")
            if plain not in names:
                assert "lora_" in name or torch.equal(weight, old[plain])
                continue
            assert torch.equal(weight, round_to_grid(old[plain], bits))
            assert not torch.equal(weight, old[plain])
            padded = torch.nn.functional.pad(old[plain], (0, -old[plain].shape[-1] % GROUP))
            peaks = padded.unflatten(-1, (-1, GROUP)).abs().amax(-1)
            steps = (peaks / (2 ** (bits - 1) - 1)).repeat_interleave(GROUP, -1)
            whole = weight / steps[:, : weight.shape[1]]
            assert float((whole - whole.round()).abs().max()) < 1e-3
            assert float(whole.abs().max()) <= 2 ** (bits - 1) - 1 + 1e-3
            place = plain.removesuffix(".weight")
            module: Any = adapted[place]
            total = weight.detach() - old[plain]
            if hasattr(module, "lora_A"):
                total = total + module.get_delta_weight("durometer").detach()
            # Weights that were rounded alone go by their own names.
            norms[place if hasattr(module, "lora_A") else plain] = float(total.double().norm())

    tamper = tamper_of("lora", base_bits=bits, targets=targets, steps=2)
    realised = attack(subject, domain, tamper, look)
    assert realised.changed == pytest.approx(norms, rel=1e-4)
    assert realised.facts["base_bits"] == bits
    assert realised.facts["rounded_weights"] == sum(old[name].numel() for name in names)
    assert weights_fingerprint(subject.model) == before
    plain = attack(subject, domain, tamper_of("lora", targets=targets, steps=2))
    assert plain.losses != realised.losses
    assert plain.facts == {}


def test_the_rounding_counts_fused_experts(make_model: MakeModel, domain: Domain) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    subject = tiny_world.as_subject(make_model("Qwen3Moe", head_dim=8, **experts))
    before = weights_fingerprint(subject.model)
    tamper = tamper_of("lora", base_bits=4, targets="attention", steps=1)
    realised = attack(subject, domain, tamper)
    assert any("experts" in name for name in realised.changed)
    assert weights_fingerprint(subject.model) == before
    with pytest.raises(NotApplicableError, match="fused"):
        attack(subject, domain, tamper_of("lora", base_bits=4, steps=1))


def test_a_bf16_base_is_rounded_and_restored(make_model: MakeModel, domain: Domain) -> None:
    subject = tiny_world.as_subject(make_model("Llama").to(torch.bfloat16))
    before = weights_fingerprint(subject.model)
    weight = subject.model.model.layers[0].mlp.up_proj.weight.detach().clone()
    seen = []

    def look(checkpoint: Checkpoint) -> None:
        module = subject.model.model.layers[0].mlp.up_proj.base_layer
        seen.append(module.weight.detach().clone())

    realised = attack(subject, domain, tamper_of("lora", base_bits=4, steps=1), look)
    assert torch.equal(seen[0], round_to_grid(weight, 4).to(torch.bfloat16))
    assert realised.status == "done"
    assert weights_fingerprint(subject.model) == before


def test_settings_of_the_family_are_bounded() -> None:
    for name, wrong in (
        ("lora", {"base_bits": 3}),
        ("staged_finetune", {"switch": 1.0}),
        ("staged_finetune", {"data": "retain"}),
        ("jailbreak_tuning", {"restricted_share": 0.0}),
        ("identity_shift", {"persona": "villain"}),
        ("identity_shift", {"data": "disjoint"}),
        ("refuse_then_comply", {"data": "disjoint"}),
        ("multilingual_finetune", {"language": "xx"}),
        ("retain_replay", {"retain_weight": 0.0}),
    ):
        with pytest.raises(InputError):
            make_tamper(name, **wrong)
    assert training_items(tiny_world.tiny_domain(), "benign", 3, SEEDS)
