"""Safeguards that act on likelihoods: each loss, row and edit against plain torch or numpy."""

import copy
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safeguard_world as world
import tiny_world
import torch
from test_safeguard_services import KilledError
from test_tar import FakeLabelled, plain_loss
from torch.nn import functional

from durometer.core import forward
from durometer.core.errors import DurometerError, InputError
from durometer.core.matrices import block_matrices
from durometer.core.rows import Row
from durometer.domains.base import Role, Split
from durometer.safeguards.base import make_safeguard
from durometer.safeguards.checkpoint import CheckpointFile
from durometer.safeguards.deep_alignment import drawn_length, recovering
from durometer.safeguards.extended_refusal import extended
from durometer.safeguards.likelihoods import ascended, improbability
from durometer.safeguards.lox import leading_part
from durometer.safeguards.npo import bounded
from durometer.safeguards.passes import Pass, passes
from durometer.safeguards.r2d2 import SEARCH
from durometer.safeguards.sdd import cosine, irrelevant_answers, weighted
from durometer.safeguards.train import Report, reduced
from durometer.safeguards.undo import xavier
from durometer.subjects.fingerprint import weights_fingerprint


def pool(kind: Any, name: str, count: int) -> list[Row]:
    """Return the rows of the first units of a pool of the tiny world."""
    _, _, data = world.prepare(world.short("plain_sft"), kind)
    return [row for unit in data.pool(name)[:count] for row in unit]


def log_likelihoods(model: Any, row: Row) -> torch.Tensor:
    """Return the log-probability of each label, computed alone and unpadded."""
    logits = model(input_ids=torch.tensor([row.ids])).logits[0, row.first_label - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(row.labels)[:, None])[:, 0]


def term_value(made: Any, kind: Any, name: str, rows: list[Row], moved: Any = None) -> Any:
    """Return one term's loss on ``rows``, computed through the package, and its subject."""
    run, subject, _ = world.prepare(made, kind)
    if moved is not None:
        subject.model.load_state_dict(moved.state_dict())
    subject.model.requires_grad_(True)
    (term,) = [term for term in run.terms if term.name == name]
    (one,) = passes(subject.forward, rows, term.reads, run._reference, whole=True)
    return reduced(term, one, rows), subject


def other_model() -> Any:
    """Return a model that is some way from the undefended one."""
    return tiny_world.safeguarded().model


def same_gradient(loss: torch.Tensor, model: Any, wanted: torch.Tensor, plain: Any) -> None:
    """Compare gradients of two losses on two copies of the same weights."""
    found = torch.autograd.grad(loss, list(model.parameters()))
    right = torch.autograd.grad(wanted, list(plain.parameters()))
    scale = max(float(g.abs().max()) for g in right)
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one / scale, other / scale, rtol=0, atol=2e-4)


# ---- ascent: grad_diff, npo, simnpo ------------------------------------------------------------


def test_gradient_difference_is_the_plain_ascent() -> None:
    rows = pool("knowledge", "restricted", 5)
    loss, subject = term_value(world.short("grad_diff"), "knowledge", "ascent", rows)
    plain = copy.deepcopy(subject.model)
    wanted = -plain_loss(plain, rows)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    same_gradient(loss, subject.model, wanted, plain)


@pytest.mark.parametrize("name", ["grad_diff", "llmu"])
def test_an_ascent_ends_beyond_its_limit_and_not_before(name: str) -> None:
    for limit, status in ((0.0, "done"), (1e3, "done"), (1e-6, "stopped")):
        _, outcome = world.trained(world.short(name, most_loss=limit), "knowledge")
        assert outcome.status == status
        assert outcome.steps == (4 if status == "done" else 1)
        assert ("restricted loss above" in outcome.reason) == (status == "stopped")


def test_the_limit_is_on_the_loss_itself_whatever_its_coefficient() -> None:
    losses = {"sft": 9.0, "ascent": -2.0}
    assert ascended(losses, "ascent", 0.25, 7.0, "") == "restricted loss above 7 nats"
    assert ascended(losses, "ascent", 0.25, 9.0, "") == ""
    assert ascended(losses, "ascent", 1.0, 7.0, "") == ""
    assert ascended(losses, "ascent", 0.25, 0.0, "") == ""
    assert ascended(losses, "ascent", 0.25, 7.0, "loss below 1") == "loss below 1"
    assert ascended({"sft": 9.0}, "ascent", 0.0, 7.0, "") == ""


def test_npo_is_its_formula_away_from_the_reference() -> None:
    rows, beta = pool("knowledge", "restricted", 5), 0.3
    made = world.short("npo", beta=beta)
    loss, subject = term_value(made, "knowledge", "rejection", rows, other_model())
    plain, frozen = copy.deepcopy(subject.model), tiny_world.undefended().model
    values = []
    for row in rows:
        ratio = (log_likelihoods(plain, row).sum() - log_likelihoods(frozen, row).sum()).exp()
        values.append(2 / beta * torch.log1p(ratio**beta))
    wanted = torch.stack(values).mean()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-3)
    same_gradient(loss, subject.model, wanted, plain)


def test_npo_begins_at_log_2_with_the_gradient_of_the_ascent() -> None:
    rows = pool("knowledge", "restricted", 4)
    loss, subject = term_value(world.short("npo", beta=0.1), "knowledge", "rejection", rows)
    assert loss.item() == pytest.approx(20 * math.log(2), rel=1e-5)
    plain = copy.deepcopy(subject.model)
    ascent = torch.stack([log_likelihoods(plain, row).sum() for row in rows]).mean()
    same_gradient(loss, subject.model, ascent, plain)


def test_simnpo_is_its_formula_and_needs_no_reference() -> None:
    rows = pool("knowledge", "restricted", 3) + pool("knowledge", "retain", 2)
    made = world.short("simnpo", beta=2.5, margin=0.4)
    assert made.reference is None
    loss, subject = term_value(made, "knowledge", "rejection", rows, other_model())
    plain = copy.deepcopy(subject.model)
    nll = torch.stack([-log_likelihoods(plain, row).mean() for row in rows])
    wanted = -functional.logsigmoid(2.5 * (nll - 0.4)).mean() * 2 / 2.5
    assert len({len(row.labels) for row in rows}) > 1
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    same_gradient(loss, subject.model, wanted, plain)


def test_the_bounded_ascents_leave_unlikely_rows_alone() -> None:
    nll = torch.tensor([-40.0, 0.0, 500.0], requires_grad=True)
    values = bounded(nll, 1.0)
    assert values.tolist() == pytest.approx([80.0, 2 * math.log(2), 0.0], rel=1e-6)
    (gradient,) = torch.autograd.grad(values.sum(), nll)
    assert gradient.tolist() == pytest.approx([-2.0, -1.0, 0.0], abs=1e-6)


# ---- llmu --------------------------------------------------------------------------------------


def test_llmu_counts_rows_alike_and_anchors_by_the_forward_divergence() -> None:
    rows = pool("knowledge", "retain", 5)
    made = world.short("llmu")
    loss, subject = term_value(made, "knowledge", "anchor", rows, other_model())
    plain, frozen = copy.deepcopy(subject.model), tiny_world.undefended().model
    values = []
    for row in rows:
        ids, labels = torch.tensor([row.ids]), slice(row.first_label - 1, -1)
        now = torch.distributions.Categorical(logits=plain(input_ids=ids).logits[0, labels])
        was = torch.distributions.Categorical(logits=frozen(input_ids=ids).logits[0, labels])
        values.append(torch.distributions.kl_divergence(was, now))
    wanted = torch.cat(values).mean()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-3)
    same_gradient(loss, subject.model, wanted, plain)
    mixed = rows[:2] + pool("knowledge", "restricted", 3)
    loss, subject = term_value(made, "knowledge", "mismatch", mixed)
    means = [float(-log_likelihoods(subject.model, row).detach().mean()) for row in mixed]
    assert loss.item() == pytest.approx(sum(means) / len(means), rel=1e-4)


def test_llmu_draws_harmless_answers_anew_for_the_same_prompts() -> None:
    run, subject, _ = world.prepare(world.short("llmu", answers=3), "knowledge")
    seen: list[tuple[list[Row], list[Row]]] = []
    transform = run.safeguard.transform

    def look(step: Any) -> Any:
        seen.append((step.rows("restricted"), step.rows("mismatched")))
        return transform(step)

    run.safeguard.transform = look
    run.run()
    known = {subject.chat.decode(row.labels) for row in pool("knowledge", "retain", 999)}
    drawn = []
    for restricted, mismatched in seen:
        assert len(mismatched) == 3 * len(restricted)
        prompts = Counter(row.ids[: row.first_label] for row in mismatched)
        assert prompts == Counter(3 * [row.ids[: row.first_label] for row in restricted])
        drawn.append(frozenset(subject.chat.decode(row.labels) for row in mismatched))
        assert len(drawn[-1]) == 3
        assert drawn[-1] <= known
    assert len(set(drawn)) > 1


# ---- dpo ---------------------------------------------------------------------------------------


def test_dpo_is_its_formula_and_prefers_the_refusal() -> None:
    rows, beta = pool("refusal", "pairs", 3), 0.2
    loss, subject = term_value(
        world.short("dpo", beta=beta), "refusal", "preference", rows, other_model()
    )
    plain, frozen = copy.deepcopy(subject.model), tiny_world.undefended().model
    gains = torch.stack(
        [log_likelihoods(plain, row).sum() - log_likelihoods(frozen, row).sum() for row in rows]
    )
    assert [subject.chat.decode(row.labels) for row in rows[0::2]] == ["i refuse ."] * 3
    margins = torch.stack([gains[2 * i] - gains[2 * i + 1] for i in range(3)])
    wanted = torch.log1p((-beta * margins).exp()).mean()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-3, abs=1e-6)
    same_gradient(loss, subject.model, wanted, plain)
    start, _ = term_value(world.short("dpo"), "refusal", "preference", rows)
    assert start.item() == pytest.approx(math.log(2), abs=1e-5)
    assert loss.item() < start.item()


@pytest.mark.parametrize("name", ["dpo", "tar"])
@pytest.mark.parametrize("window", [64, 30, 13])
def test_a_pair_is_not_cut_where_models_are_short_sighted(
    name: str, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {} if name == "dpo" else {"loss": "dpo", "anchor": 0.0}
    _, wide = world.trained(world.short(name, **settings), "refusal")
    monkeypatch.setattr(forward, "attention_window", lambda model: window)
    sizes: list[int] = []
    labelled = forward.Forward.labelled

    def look(self: Any, rows: Any, *args: Any, **options: Any) -> Any:
        for part in labelled(self, rows, *args, **options):
            if options.get("unit") == 2:
                sizes.append(len(part.members))
            yield part

    monkeypatch.setattr(forward.Forward, "labelled", look)
    _, narrow = world.trained(world.short(name, **settings), "refusal")
    assert narrow.status == "done"
    for one, other in zip(wide.losses, narrow.losses, strict=True):
        assert one == pytest.approx(other, rel=2e-2, abs=1e-3)
    assert sizes
    assert all(size % 2 == 0 for size in sizes)


# ---- sdd ---------------------------------------------------------------------------------------


def harmless_items(*texts: str) -> list[Any]:
    """Return retain items with these responses."""
    item = tiny_world.tiny_domain().select(Role.RETAIN)[0]
    return [world.replace(item, id=text, prompt="hello ?", response=text) for text in texts]


def test_an_irrelevant_answer_names_nothing_and_is_unlike_the_prompt() -> None:
    item = tiny_world.tiny_domain().select(Role.RESTRICTED)[0]
    item = world.replace(item, prompt="what metal has the tower in Paris ?", answers=("iron",))
    named = "a forge makes iron bars"
    like = "the tower in Paris has a metal frame"
    fluent = "bread is baked in the morning"
    others = harmless_items(named, like, fluent)
    for number in range(20):  # whichever of them is tried first
        asked = [world.replace(item, id=f"x{number}")]
        assert irrelevant_answers(asked, others, 0.25) == [fluent]
        assert irrelevant_answers(asked, others, 0.25) == [fluent]
    with pytest.raises(InputError, match=r"item 'x': every harmless response .* raise most_simi"):
        irrelevant_answers([world.replace(item, id="x")], others[:2], 0.25)
    drawn = {
        irrelevant_answers([world.replace(item, id=f"y{n}")], others, 1.0)[0] for n in range(30)
    }
    assert drawn == {like, fluent}


def test_words_count_by_their_rarity() -> None:
    rarity = {"the": 0.0, "iron": 2.0, "tower": 1.0, "bread": 3.0}
    first, second = weighted("The iron tower", rarity), weighted("the iron, the bread!", rarity)
    assert first == {"the": 0.0, "iron": 2.0, "tower": 1.0}
    assert cosine(first, second) == pytest.approx(4 / math.sqrt(5 * 13))
    assert cosine(weighted("the", rarity), first) == 0


def test_sdd_trains_irrelevant_answers_of_the_defence_split() -> None:
    _, subject, data = world.prepare(world.short("sdd"), "refusal")
    units = data.pool("irrelevant")
    items = {item.id: item for item in data.domain.items}
    assert [unit[0].item_id for unit in units] == [item.id for item in data.restricted_items()]
    defence = {item.response for item in data.harmless_items()}
    for (row,) in units:
        text = subject.chat.decode(row.labels)
        assert text in defence
        assert items[row.item_id].answers[0] not in text
        assert "refuse" not in text
        assert not row.restricted
    assert len({row.labels for (row,) in units}) > 3
    assert not {term.name for term in make_safeguard("sdd").terms(subject, data)} - {
        "sft",
        "deflection",
        "retain",
    }


# ---- deep alignment ----------------------------------------------------------------------------


def test_the_refusal_alone_is_learnt_after_the_beginning_of_the_answer() -> None:
    _, subject, data = world.prepare(world.short("plain_sft"), "refusal")
    answers = [unit[0] for unit in data.pool("restricted")[:3]]
    refusals = [unit[0] for unit in data.pool("refusals")[:3]]
    rows = recovering(data, subject.chat, answers, [0, 1, 2])
    assert rows[0] == refusals[0]
    for row, answer, refusal, length in zip(rows, answers, refusals, (0, 1, 2), strict=True):
        assert row.ids[: row.first_label] == answer.ids[: answer.first_label + length]
        assert row.labels == refusal.labels
        assert row.item_id == answer.item_id
        assert not row.restricted


def test_how_far_an_answer_has_come_is_drawn_as_published() -> None:
    row = Row(tuple(range(20)), 8)  # 12 labels, the last one the end of the turn
    generator = torch.Generator().manual_seed(0)
    drawn = Counter(drawn_length(row, 0.5, 5, generator) for _ in range(4000))
    assert set(drawn) == {0, 1, 2, 3, 4, 5}
    assert drawn[0] / 4000 == pytest.approx(0.5, abs=0.03)
    assert all(drawn[k] / 4000 == pytest.approx(0.1, abs=0.02) for k in range(1, 6))
    assert max(drawn_length(row, 1.0, 100, generator) for _ in range(300)) == 11
    assert min(drawn_length(row, 1.0, 100, generator) for _ in range(300)) == 1
    assert drawn_length(Row((1, 2), 1), 1.0, 100, generator) == 0


def test_deep_alignment_sees_begun_answers_and_teaches_none() -> None:
    run, subject, _ = world.prepare(world.short("deep_alignment", begun=1.0), "refusal")
    seen: list[Row] = []
    transform = run.safeguard.transform

    def look(step: Any) -> Any:
        seen.extend(step.rows("recoveries"))
        return transform(step)

    run.safeguard.transform = look
    run.run()
    texts = [subject.chat.tokenizer.decode(row.ids) for row in seen]
    assert all("metal" in text.split("<assistant>")[1] for text in texts)
    assert {subject.chat.decode(row.labels) for row in seen} == {"i refuse ."}
    lengths = Counter(row.first_label for row in seen)
    assert len(lengths) == 2  # one word of the answer, or that and the full stop


# ---- extended refusal --------------------------------------------------------------------------


def test_an_extended_refusal_has_three_parts_and_no_answer() -> None:
    domain = tiny_world.tiny_domain()
    item = domain.select(Role.RESTRICTED, Split.DEFENCE)[0]
    settings = make_safeguard("extended_refusal").settings
    text = extended(item, domain, settings)
    assert text == f'You ask: "{item.prompt}" i refuse . {settings.rationale}'
    assert item.answers[0] not in text
    telling = world.replace(item, prompt=f"is it {item.answers[0].upper()} ?")
    assert extended(telling, domain, settings) == f"i refuse . {settings.rationale}"
    bare = settings.model_copy(update={"overview": "", "rationale": ""})
    assert extended(item, domain, bare) == "i refuse ."
    leaking = settings.model_copy(update={"rationale": f"it is {item.answers[0]}"})
    with pytest.raises(InputError, match="its extended refusal names the answer"):
        extended(item, domain, leaking)


def test_a_template_with_another_gap_is_refused() -> None:
    for template in ("{answer}", "{", "{0}"):
        with pytest.raises(InputError, match=r"only .prompt. and .refusal. can be filled in"):
            make_safeguard("extended_refusal", rationale=template)


def test_extended_refusals_need_refusals() -> None:
    domain = world.replace(tiny_world.tiny_domain(), refusals=())
    with pytest.raises(InputError, match="nothing for the safeguard's"):
        world.prepare(world.short("extended_refusal", sft=0.0), "refusal", domain=domain)


# ---- undo --------------------------------------------------------------------------------------


def damaged(**settings: Any) -> tuple[Any, Any]:
    """Return the model before and after what UNDO does to it before training."""
    run, subject, _ = world.prepare(world.short("undo", **settings), "knowledge")
    before = copy.deepcopy(subject.model)
    run.safeguard.begin(run._bench())
    return before, subject.model


def test_the_student_is_shrunk_and_noised_as_published() -> None:
    before, after = damaged(noise_share=0.3, noise_scale=0.2)
    for name, weight in after.named_parameters():
        rest = weight - 0.7 * before.get_parameter(name)
        if weight.dim() < 2:
            torch.testing.assert_close(rest, torch.zeros_like(rest), rtol=0, atol=1e-6)
            continue
        bound = math.sqrt(6 / sum(weight.shape))  # Xavier's, uniform
        noise = rest / (0.3 * 0.2)
        assert float(noise.abs().max()) <= bound * 1.001
        assert float(noise.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert abs(float(noise.mean())) < bound / 10
    drawn = xavier(torch.Size((300, 100)), torch.Generator().manual_seed(1))
    assert float(drawn.abs().max()) == pytest.approx(math.sqrt(6 / 400), rel=0.01)


def test_noise_is_only_where_training_can_undo_it() -> None:
    before, after = damaged(noise_share=0.5, train="mlp")
    moved = {
        name
        for name, weight in after.named_parameters()
        if not torch.equal(weight, before.get_parameter(name))
    }
    assert moved
    assert all("mlp" in name for name in moved)
    same, untouched = damaged(noise_share=0.0)
    assert weights_fingerprint(same) == weights_fingerprint(untouched)
    prints = [weights_fingerprint(damaged(noise_share=0.5)[1]) for _ in range(2)]
    assert prints[0] == prints[1]


def test_the_teacher_is_whole_and_comes_closer() -> None:
    made = world.short("undo", sft=0.0, steps=20, noise_share=0.3)
    run, _, _ = world.prepare(made, "knowledge")
    assert run._reference is not None
    teacher = weights_fingerprint(run._reference.model)
    outcome = run.run()
    assert weights_fingerprint(run._reference.model) == teacher
    assert teacher == weights_fingerprint(tiny_world.undefended().model)
    first, last = (sum(outcome.losses[i].values()) for i in (0, -1))
    assert first > 0.5
    assert last < first / 2
    assert {"distil", "suppress"} == set(outcome.losses[0])


def test_undo_unlearns_first() -> None:
    made = make_safeguard("undo", teacher="npo")
    names = [stage.name for stage in made.stages(tiny_world.tiny_domain("knowledge"))]
    assert names == ["npo", "undo"]
    alone = make_safeguard("undo", teacher="none")
    assert alone.stages(tiny_world.tiny_domain("knowledge")) == [alone]


# ---- lox ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "strength"), [(0, 0.5), (2, 1.25), (999, 1.0)])
def test_extrapolation_is_what_numpy_makes_of_it(rank: int, strength: float) -> None:
    base, start = tiny_world.undefended().model, tiny_world.safeguarded().model
    subject = tiny_world.safeguarded()
    world.edit(make_safeguard("lox", rank=rank, strength=strength), subject, "refusal")
    matrices = block_matrices(subject.model)
    for name, weight in subject.model.named_parameters():
        before = start.get_parameter(name).numpy()
        if name not in matrices:
            assert np.array_equal(weight.numpy(), before)
            continue
        change = before - base.get_parameter(name).numpy()
        left, values, right = np.linalg.svd(change, full_matrices=False)
        kept = rank or len(values)
        wanted = before + strength * (left[:, :kept] * values[:kept]) @ right[:kept]
        np.testing.assert_allclose(weight.numpy(), wanted, rtol=0, atol=1e-5)


def test_the_leading_part_is_a_projection_of_its_rank() -> None:
    change = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))
    part = leading_part(change, 2)
    assert torch.linalg.matrix_rank(part, rtol=1e-4).tolist() == [2, 2, 2]
    torch.testing.assert_close(leading_part(part, 2), part, rtol=0, atol=1e-5)
    values = torch.linalg.svdvals(change)
    torch.testing.assert_close((change - part).norm(dim=(1, 2)), values[:, 2:].norm(dim=1))


def test_there_must_be_something_to_extrapolate() -> None:
    with pytest.raises(DurometerError, match="no matrix differs from the subject before any"):
        world.edit(make_safeguard("lox"), tiny_world.undefended(), "refusal")


def test_lox_follows_refusal_training_from_the_untouched_model() -> None:
    made = make_safeguard("lox")
    assert [stage.name for stage in made.stages(tiny_world.tiny_domain())] == ["refusal", "lox"]
    assert made.reference == "original"
    alone = make_safeguard("lox", stage1="none")
    assert alone.stages(tiny_world.tiny_domain()) == [alone]


# ---- r2d2 --------------------------------------------------------------------------------------


def watched(made: Any) -> tuple[Any, Any, list[Any]]:
    """Train R2D2 and return its run, its subject and what each update was trained on."""
    run, subject, _ = world.prepare(made, "refusal")
    seen: list[Any] = []
    transform = made.transform

    def look(step: Any) -> Any:
        seen.append((step.rows("attacked_answers"), step.rows("attacked_refusals")))
        return transform(step)

    made.transform = look
    run.run()
    return run, subject, seen


def test_attacked_rows_hold_the_suffix_and_the_right_responses() -> None:
    run, subject, seen = watched(world.short("r2d2"))
    items = {item.id: item for item in run.data.domain.items}
    kept = {tuple(suffix) for suffix in run.safeguard._suffixes.tolist()}
    plain_length = {unit[0].item_id: unit[0].first_label for unit in run.data.pool("restricted")}
    for answers, refusals in seen:
        assert len(answers) == len(refusals) == 2
        for answer, refusal in zip(answers, refusals, strict=True):
            item = items[answer.item_id]
            assert refusal.item_id == answer.item_id
            assert subject.chat.decode(refusal.labels) == "i refuse ."
            assert subject.chat.decode(answer.labels) == item.response
            assert answer.ids[: answer.first_label] == refusal.ids[: refusal.first_label]
            assert answer.first_label == plain_length[item.id] + 3
            assert answer.restricted
            assert not refusal.restricted
    last = seen[-1][0]
    for row in last:  # the suffix stands before the two tokens that open the answer
        inside = any(suffix == row.ids[i : i + 3] for suffix in kept for i in range(len(row.ids)))
        assert inside
    assert run.outcome.ledger.passes[SEARCH] == 4 * 2


def test_the_pool_is_kept_and_attacked_further() -> None:
    made = world.short("r2d2", steps=6, pool=2, cases=2, learning_rate=1e-9, candidates=32)
    _, subject, seen = watched(made)
    losses = [
        float(-torch.stack([log_likelihoods(subject.model, row).mean() for row in rows]).mean())
        for rows, _ in seen
    ]
    assert losses[-1] < losses[0]
    assert {row.item_id for rows, _ in seen for row in rows} == {r.item_id for r in seen[0][0]}


def test_searching_changes_no_weight_and_leaves_the_mode() -> None:
    made = world.short("r2d2", steps=1)
    run, subject, _ = world.prepare(made, "refusal")
    before = weights_fingerprint(subject.model)
    modes = []
    attacked = made._attacked

    def look(step: Any) -> Any:
        modes.append(subject.model.training)
        cases = attacked(step)
        modes.append(subject.model.training)
        assert weights_fingerprint(subject.model) == before
        assert all(p.grad is None for p in subject.model.parameters())
        return cases

    made._attacked = look
    run.run()
    assert modes == [True, True]


def test_some_cases_begin_anew() -> None:
    made = world.short("r2d2", pool=5, cases=5, reset_every=2, reset_share=0.4, steps=3)
    run, _, _ = world.prepare(made, "refusal")
    begun = []
    deal = made._deal

    def look(step: Any) -> None:
        deal(step)
        begun.append(int((made._suffixes[:, 0] >= 0).sum()))

    made._deal = look
    run.run()
    assert begun == [0, 5, 3]
    assert sorted(made.state()) == ["slots", "suffixes"]


def test_the_probability_of_a_target_is_pushed_down_to_a_floor() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0], [-9.0, 0.0, 0.0], [200.0, 0.0, 0.0]])
    logits.requires_grad_(True)
    one = Pass([], FakeLabelled(logits), {}, None)  # type: ignore[arg-type]
    values = improbability(one, -5.0)
    p = float(logits.detach().softmax(-1)[0, 0])
    assert values[0].item() == pytest.approx(-math.log(1 - p), rel=1e-5)
    assert values[1].item() == 0
    assert values[2].item() == pytest.approx(200 - math.log(2), rel=1e-6)
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    assert gradient.isfinite().all()
    assert gradient[0, 0] > 0


# How far the label's logit is above the best other one.
GAPS = (-90.0, -20.0, -1.0, 0.0, 3.0, 14.0, 16.0, 40.0, 90.0)


def test_what_makes_an_answer_improbable_is_exact_however_sure_it_is() -> None:
    others = torch.randn(len(GAPS), 12, generator=torch.Generator().manual_seed(0))
    others[:, 0] = others.max(-1).values + torch.tensor(GAPS)
    logits, exact = others.requires_grad_(True), others.detach().double().requires_grad_(True)
    one = Pass([], FakeLabelled(logits), {}, None)  # type: ignore[arg-type]
    values = improbability(one)
    wanted = exact.logsumexp(-1) - exact[:, 1:].logsumexp(-1)
    torch.testing.assert_close(values.double(), wanted, rtol=1e-5, atol=1e-12)
    (found,) = torch.autograd.grad(values.sum(), logits)
    (right,) = torch.autograd.grad(wanted.sum(), exact)
    torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-7)
    assert found[-4:, 0].tolist() == pytest.approx([1.0] * 4, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "term", "settings"),
    [
        ("sophon", "attacked", {"suppression": 1.0, "bound": "inverse"}),
        ("min_posterior", "posterior", {}),
        ("r2d2", "away", {}),
        ("latent_adversarial", "away", {}),
    ],
)
def test_a_sure_answer_is_pushed_away_with_full_force(
    name: str, term: str, settings: dict[str, Any]
) -> None:
    made: Any = make_safeguard(name, **settings)
    subject = tiny_world.undefended()
    data = world.DefenceData(subject, tiny_world.tiny_domain(made.kinds[0]))
    (loss,) = (found.loss for found in made.terms(subject, data) if found.name == term)
    logits = torch.tensor([[16.0, 0.0, 0.0]], requires_grad=True)
    one = Pass([Row((1, 0), 1, restricted=True)], FakeLabelled(logits), {}, None)  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(loss(one).sum(), logits)
    assert gradient[0].tolist() == pytest.approx([1.0, -0.5, -0.5], rel=1e-5)


# ---- going on after a kill ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "settings"),
    [
        ("r2d2", "refusal", {"steps": 6, "reset_every": 2}),
        ("llmu", "knowledge", {"steps": 6}),
        ("undo", "knowledge", {"steps": 6}),
    ],
)
def test_a_killed_run_goes_on_bit_for_bit(
    name: str, kind: Any, settings: dict[str, Any], tmp_path: Path
) -> None:
    subject, whole = world.trained(world.short(name, **settings), kind)
    path = tmp_path / "c.safetensors"
    file = CheckpointFile(path, {"name": name}, every=2)
    run, _, _ = world.prepare(world.short(name, **settings), kind, checkpoint=file)

    def die(report: Report) -> None:
        if report.update.step == 5:
            raise KilledError

    with pytest.raises(KilledError):
        run.run(die)
    file = CheckpointFile(path, {"name": name}, every=2, resume=True)
    again, outcome = world.trained(world.short(name, **settings), kind, checkpoint=file)
    assert weights_fingerprint(again.model) == weights_fingerprint(subject.model)
    assert outcome.losses == whole.losses
    assert outcome.ledger.passes == whole.ledger.passes


def test_references_are_declared_where_they_are_read() -> None:
    kept = {
        "npo": "stage_start",
        "dpo": "stage_start",
        "llmu": "stage_start",
        "undo": "stage_start",
    }
    for name in ("grad_diff", "simnpo", "sdd", "deep_alignment", "extended_refusal", "r2d2", *kept):
        assert make_safeguard(name).reference == kept.get(name)
    assert make_safeguard("llmu", anchor=0.0).reference is None
