"""Suites and what a request makes of them."""

import itertools
from typing import Any

import pytest

import durometer.catalogue  # noqa: F401  (fills the registries)
from durometer.core.errors import InputError
from durometer.tampers.base import make_tamper, tamper_registry
from durometer.trials.campaign import FIRST_SEED, Request, chosen_suite, not_tested
from durometer.trials.suites import (
    NOT_TESTED,
    SUITES,
    Attack,
    dense_ladder,
    describe_suite,
    doubling_ladder,
    make_suite,
)


@pytest.mark.parametrize("name", SUITES)
@pytest.mark.parametrize("parameters", [1_000, 10**9])
def test_suites_hold_sound_attacks_each_once(name: str, parameters: int) -> None:
    suite = make_suite(name, parameters)
    digests = [attack.digest for attack in (*suite.attacks, *suite.matched_controls)]
    assert len(set(digests)) == len(digests)
    assert suite.claim_grade == (name == "full")
    assert suite.seeds >= (6 if suite.claim_grade else 3)
    assert all(attack.settings.get("steps", 0) <= max(suite.steps, 16) for attack in suite.attacks)
    assert not any(
        attack.settings.get("batch_size", 8) < 2
        for attack in suite.attacks
        if attack.settings.get("retain_share")
    )


@pytest.mark.parametrize("steps", [0, 1, 2, 5, 8, 16, 17, 20, 64, 1000])
def test_ladders_rise_to_the_last_step(steps: int) -> None:
    for ladder in (doubling_ladder(steps), dense_ladder(steps)):
        assert list(ladder) == sorted(set(ladder))
        assert ladder[-1:] == ((steps,) if steps else ())
        assert not ladder or ladder[0] == 1
    dense = dense_ladder(steps)
    assert dense[:16] == tuple(range(1, min(steps, 16) + 1))
    assert all(b / a <= 1.25 for a, b in itertools.pairwise(dense[15:]))
    assert all(b <= 2 * a for a, b in itertools.pairwise(doubling_ladder(steps)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"suite": "quik"}, "did you mean 'quick'"),
        ({"seeds": 0}, "--seeds 0"),
        ({"budget_steps": 0}, "--budget-steps 0"),
        ({"tampers": ("lorra",)}, "did you mean 'lora'"),
        ({"tampers": ("lora:rnk=3",)}, "did you mean 'rank'"),
        ({"tampers": ("lora:rank",)}, "needs a value"),
        ({"tampers": ("lora:rank=many",)}, "rank"),
        ({"tampers": ("lora:rank=0",)}, "rank"),
    ],
)
def test_a_wrong_request_is_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        chosen_suite(Request("x", "y", **changes), 1_000)
    assert "\n" not in str(caught.value)


def test_a_request_overrides_the_suite() -> None:
    suite = chosen_suite(Request("x", "y", seeds=7, budget_steps=3), 1_000)
    assert (suite.seeds, suite.steps) == (7, 3)
    assert {attack.settings["steps"] for attack in suite.attacks} == {3}
    own = make_suite("quick", 1_000)
    suite = chosen_suite(Request("x", "y", tampers=("ft-lora",)), 1_000)
    assert suite.attacks == tuple(a for a in own.attacks if a.tamper == "lora")
    spelled = Request("x", "y", tampers=("lora:rank=3,learning_rate=1e-3", "finetune", "none"))
    first, second = chosen_suite(spelled, 1_000).attacks
    assert (first.settings["rank"], first.settings["learning_rate"]) == (3, 1e-3)
    assert second.tamper == "finetune"


def test_an_attack_named_twice_runs_once() -> None:
    request = Request("x", "y", tampers=("lora", "ft-lora", "lora:rank=16", "lora:rank=3"))
    attacks = chosen_suite(request, 1_000).attacks
    assert [attack.settings.get("rank", 16) for attack in attacks] == [16, 3]


@pytest.mark.parametrize("name", SUITES)
def test_no_suite_has_so_many_seeds_that_they_meet_the_fresh_ones(name: str) -> None:
    for parameters in (1_000, 10**9):
        suite = make_suite(name, parameters)
        assert FIRST_SEED["screen"] + max(suite.seeds, suite.control_seeds) < FIRST_SEED["fresh"]


@pytest.mark.parametrize("name", SUITES)
def test_what_a_suite_leaves_out_is_named(name: str) -> None:
    suite = make_suite(name, 10**9)
    told = not_tested(suite)
    attacked = {attack.tamper for attack in suite.attacks}
    for tamper in tamper_registry.names():
        named = any(line.startswith(f"{tamper} ") for line in told)
        assert named == (tamper not in attacked and tamper != "none")
    assert set(NOT_TESTED) <= set(told)
    assert describe_suite(suite).startswith("claim-grade" if name == "full" else "a screen")


def test_every_attack_that_looks_for_something_has_one_matched_control() -> None:
    suite = make_suite("standard", 10**9)
    assert [attack.tamper for attack in suite.matched_controls] == [
        "ablate_direction", "prune_wanda", "quantize_rtn", "prefill", "soft_prompt", "gcg",
        "base_reversion",
    ]  # fmt: skip
    for attack, control in itertools.product(suite.attacks, suite.matched_controls):
        if attack.tamper == control.tamper:
            random = tamper_registry.get(attack.tamper).matched_control
            assert random is not None
            assert control.settings == attack.settings | dict([random]) != attack.settings
    request = Request("x", "y", tampers=("steer:vector=random", "lora"))
    assert chosen_suite(request, 1_000).matched_controls == ()
    assert chosen_suite(Request("x", "y", tampers=("steer",)), 1_000).matched_controls == (
        Attack("steer", {"vector": "random"}),
    )


@pytest.mark.parametrize("name", tamper_registry.names())
def test_matched_controls_are_settings_that_differ_from_the_defaults(name: str) -> None:
    control = tamper_registry.get(name).matched_control
    random = dict([control]) if control else {}
    plain = make_tamper(name).settings.canonical()
    settings = make_tamper(name, **random).settings.canonical()
    assert {key for key in plain if plain[key] != settings[key]} == set(random)


def test_a_screen_resolves_its_limit_with_fewer_items_than_a_claim() -> None:
    limits = {name: make_suite(name, 10**9).plan for name in SUITES}
    assert limits["full"].utility_limit == 5.0
    assert limits["quick"].utility_limit == limits["standard"].utility_limit == 10.0
    assert limits["full"].always
    assert limits["full"].retain_report == limits["full"].select_entities == 0
    assert not limits["full"].stop_when_broke
    assert all(plan.retain_report == 0 or plan.retain_report >= 200 for plan in limits.values())
