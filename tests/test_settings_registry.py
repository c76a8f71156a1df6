"""Settings, registries, seeds, budgets and the cache folder."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from pydantic import ValidationError
from torch.utils.flop_counter import FlopCounterMode

from durometer.core import cache, registry
from durometer.core.budget import Budget, Spent, matrix_entries, training_flops
from durometer.core.errors import ExitCode, InputError, StorageError, unknown_name
from durometer.core.forward import Forward
from durometer.core.registry import Registry
from durometer.core.rows import Row
from durometer.core.seeds import STREAMS, Seeds
from durometer.core.settings import Between, Levels, Settings, digest_of, setting

Model = Any


# Settings.


class Attack(Settings):
    learning_rate: float = setting(
        2e-5, "peak learning rate", search=Between(1e-6, 1e-3, log=True), gt=0
    )
    steps: int = setting(16, "planned updates", search=Levels((4, 16)), ge=1)
    optimizer: Literal["adamw", "sgd"] = setting("adamw", "optimiser")
    system: str | None = setting(None, "system prompt")
    layers: tuple[int, ...] = setting((), "layers")


class Needy(Settings):
    folder: str = setting(..., "where to", min_length=1)


def test_defaults_are_written_out_and_values_are_frozen() -> None:
    parsed = Attack.parse("tamper 'x'", {"steps": 4, "layers": [1, 2]})
    assert parsed.canonical() == {
        "learning_rate": 2e-5,
        "steps": 4,
        "optimizer": "adamw",
        "system": None,
        "layers": [1, 2],
    }
    with pytest.raises(ValidationError, match="frozen"):
        parsed.steps = 5


# Settings class, values, what the message must hold.
REFUSED: list[tuple[type[Settings], dict[str, Any], list[str]]] = [
    (
        Attack,
        {"learning_rat": 1},
        ["tamper 'x': unknown setting 'learning_rat'", "mean 'learning_rate'?"],
    ),
    (Attack, {"step": 1}, ["did you mean 'steps'?"]),
    (Attack, {"zzz": 1}, ["known: layers, learning_rate, optimizer, steps, system"]),
    (Attack, {"steps": 0}, ["tamper 'x': steps = 0", "greater than or equal to 1"]),
    (Attack, {"learning_rate": -1.0}, ["learning_rate = -1.0", "greater than 0"]),
    (Attack, {"learning_rate": "fast"}, ["learning_rate = 'fast'", "valid number"]),
    (Attack, {"optimizer": "adam"}, ["optimizer = 'adam'", "'adamw' or 'sgd'"]),
    (Attack, {"layers": [1, "a"]}, ["layers.1 = 'a'", "valid integer"]),
    (Needy, {}, ["folder", "required"]),
    (Needy, {"folder": ""}, ["folder = ''", "at least 1"]),
]


@pytest.mark.parametrize(("cls", "values", "parts"), REFUSED)
def test_refusals_name_the_setting_and_what_to_do(
    cls: type[Settings], values: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(InputError) as refused:
        cls.parse("tamper 'x'", values)
    message = str(refused.value)
    assert "\n" not in message
    assert refused.value.exit_code == ExitCode.INPUT_ERROR
    for part in parts:
        assert part in message


def test_descriptions_come_from_the_definition() -> None:
    shown = [(d.name, d.type, d.default, d.meaning, d.search) for d in Attack.describe()]
    assert shown == [
        ("learning_rate", "float", "2e-05", "peak learning rate", "1e-06 to 0.001 (log)"),
        ("steps", "int", "16", "planned updates", "4, 16"),
        ("optimizer", "adamw | sgd", "adamw", "optimiser", ""),
        ("system", "str | None", "None", "system prompt", ""),
        ("layers", "tuple[int, ...]", "()", "layers", ""),
    ]
    assert [d.default for d in Needy.describe()] == ["required"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=10,
)


@given(st.dictionaries(st.text(max_size=4), json_values, max_size=6), st.randoms())
@examples(max_examples=60, deadline=None, database=None)
def test_digests_ignore_the_order_of_keys(value: dict[str, Any], random: Any) -> None:
    keys = list(value)
    random.shuffle(keys)
    assert digest_of({key: value[key] for key in keys}) == digest_of(value)
    assert digest_of(json.loads(json.dumps(value))) == digest_of(value)


def test_digests_tell_values_apart_and_never_change() -> None:
    values: list[dict[str, Any]] = [
        {},
        {"steps": 4},
        {"learning_rate": 4.0},
        {"learning_rate": 2.0000001e-5},
        {"system": ""},
        {"layers": [1, 2]},
        {"layers": [2, 1]},
        {"layers": [12]},
        {"optimizer": "sgd"},
    ]
    digests = [Attack.parse("x", value).digest for value in values]
    assert len(set(digests)) == len(values)
    assert all(re.fullmatch("[0-9a-f]{12}", digest) for digest in digests)
    spelled_out = Attack.parse("x", {"layers": (), "steps": 16.0, "learning_rate": "2e-5"})
    assert spelled_out.digest == digests[0]
    # SHA-256 of this text by sha256sum: results already stored must stay findable
    assert digest_of({"b": [1, None], "a": "é"}).startswith("9b10bedce64e")


@pytest.mark.parametrize(
    ("name", "hint"),
    [("lor", "did you mean 'lora'?"), ("prun", "did you mean 'prune'?"), ("q", "known: lora, pru")],
)
def test_the_nearest_name_is_suggested(name: str, hint: str) -> None:
    assert hint in str(unknown_name("tamper", name, ["prune", "lora"]))


# Registries.


class Entry:
    """Something to register; compared by identity."""


@pytest.fixture
def shelf(monkeypatch: pytest.MonkeyPatch) -> Registry[Any]:
    """An empty registry that finds no entry points."""
    monkeypatch.setattr(registry, "entry_points", lambda group: [])
    return Registry("thing", "tests.things")


def test_entries_are_found_by_name_and_alias_in_order(shelf: Registry[Any]) -> None:
    first, second = Entry(), Entry()
    assert shelf.register("zeta", aliases=("z", "zz"))(first) is first
    shelf.register("alpha")(second)
    assert shelf.names() == ["zeta", "alpha"]
    assert list(shelf) == [("zeta", first), ("alpha", second)]
    assert shelf.get("zeta") is shelf.get("z") is shelf.get("zz") is first
    assert [shelf.canonical_name(name) for name in ("zz", "zeta", "alpha")] == [
        "zeta",
        "zeta",
        "alpha",
    ]


@pytest.mark.parametrize(
    ("name", "aliases"), [("a", ()), ("b", ()), ("c", ("a",)), ("c", ("d", "b"))]
)
def test_no_entry_shadows_another(
    shelf: Registry[Any], name: str, aliases: tuple[str, ...]
) -> None:
    first = Entry()
    shelf.register("a", aliases=("b",))(first)
    with pytest.raises(InputError, match=r"thing '[ab]' is registered twice"):
        shelf.register(name, aliases=aliases)(Entry())
    assert list(shelf) == [("a", first)]
    with pytest.raises(InputError, match="unknown thing 'd'"):
        shelf.get("d")


@pytest.mark.parametrize("ask", [Registry.get, Registry.canonical_name])
def test_unknown_names_get_a_suggestion(
    shelf: Registry[Any], ask: Callable[[Registry[Any], str], Any]
) -> None:
    shelf.register("finetune", aliases=("ft-full",))(Entry())
    with pytest.raises(InputError, match=r"unknown thing 'fine_tune'; did you mean 'finetune'\?"):
        ask(shelf, "fine_tune")
    with pytest.raises(InputError, match="did you mean 'ft-full'"):
        ask(shelf, "ft-ful")


class Plugin:
    """Stands in for an installed package with one entry point."""

    def __init__(self, name: str, entry: Any, on_load: Callable[[], Any] = lambda: None) -> None:
        self.name, self.entry, self.on_load = name, entry, on_load
        self.loads = 0

    def load(self) -> Any:
        self.loads += 1
        self.on_load()
        return self.entry


USES: list[Callable[[Registry[Any]], Any]] = [
    lambda shelf: shelf.get("plugged"),
    lambda shelf: shelf.canonical_name("plugged"),
    lambda shelf: shelf.names(),
    list,
]


@pytest.mark.parametrize("use", USES)
def test_entry_points_are_loaded_once_on_first_use(
    monkeypatch: pytest.MonkeyPatch, use: Callable[[Registry[Any]], Any]
) -> None:
    plugin, groups = Plugin("plugged", Entry()), []

    def entry_points(group: str) -> list[Plugin]:
        groups.append(group)
        return [plugin]

    monkeypatch.setattr(registry, "entry_points", entry_points)
    shelf: Registry[Any] = Registry("thing", "tests.things")
    shelf.register("own")(Entry())
    assert (groups, plugin.loads) == ([], 0)
    use(shelf)
    assert shelf.names() == ["own", "plugged"]
    assert shelf.get("plugged") is plugin.entry
    assert (groups, plugin.loads) == (["tests.things"], 1)


@pytest.mark.parametrize("alias", [False, True])
def test_a_plugin_may_use_the_decorator(monkeypatch: pytest.MonkeyPatch, alias: bool) -> None:
    """Its module registers the entry while it is imported, under the same name or as an alias."""
    shelf: Registry[Any] = Registry("thing", "tests.things")
    names: tuple[str, tuple[str, ...]] = ("full", ("plugged",)) if alias else ("plugged", ())
    entry = Entry()
    plugin = Plugin("plugged", entry, lambda: shelf.register(names[0], aliases=names[1])(entry))
    monkeypatch.setattr(registry, "entry_points", lambda group: [plugin])
    assert shelf.get("plugged") is entry
    assert shelf.names() == [names[0]]


@pytest.mark.parametrize("name", ["own", "other"])
def test_a_plugin_cannot_take_a_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(registry, "entry_points", lambda group: [Plugin(name, Entry())])
    shelf: Registry[Any] = Registry("thing", "tests.things")
    shelf.register("own", aliases=("other",))(Entry())
    with pytest.raises(InputError, match=f"thing '{name}' is registered twice"):
        shelf.names()


def test_real_entry_points_work(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("decoder", "json:JSONDecoder", "tests.things")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    assert Registry[Any]("thing", "tests.things").get("decoder") is json.JSONDecoder


# Seeds.


def test_streams_are_stable_and_apart() -> None:
    """Stored seeds must mean the same in every version, on every machine."""
    seeds = [Seeds.derive(base) for base in range(200)]
    assert tuple(seeds[0].as_dict()) == STREAMS
    everything = [value for s in seeds for value in s.as_dict().values()]
    assert len(set(everything)) == 4 * len(seeds)
    assert all(0 <= value < 2**63 for value in everything)
    for stream in STREAMS:
        bits = [format(s.as_dict()[stream], "063b") for s in seeds]
        share = [sum(b[i] == "1" for b in bits) / len(bits) for i in range(63)]
        assert 0.3 < min(share) < max(share) < 0.7
    # first eight bytes of printf 'data_order:0' | sha256sum, halved
    assert Seeds.derive(0).data_order == 0x1347F53D8EA74C24 >> 1


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_seeds_do_not_depend_on_the_process(hash_seed: str) -> None:
    code = "from durometer.core.seeds import Seeds; print(Seeds.derive(7))"
    path = str(Path(registry.__file__).parents[2])
    environment = {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": path}
    printed = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
    assert printed.strip() == str(Seeds.derive(7))


def test_seeds_fit_the_generators() -> None:
    for value in Seeds.derive(123).as_dict().values():
        torch.Generator().manual_seed(value)


# Budgets.


@pytest.mark.parametrize(
    ("steps", "rungs", "expected"),
    [
        (0, (0, 1, 4), ()),
        (4, (), (4,)),
        (4, (1, 2, 4, 8), (1, 2, 4)),
        (5, (8, 2, 1, 2, 0, -1), (1, 2, 5)),
        (1, (1,), (1,)),
    ],
)
def test_a_budget_keeps_the_rungs_it_can_reach(
    steps: int, rungs: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    assert Budget(steps).within(rungs) == Budget(steps, expected)


def test_a_budget_is_not_negative() -> None:
    with pytest.raises(InputError, match="steps = -1"):
        Budget(-1)


def test_spent_counts_from_nothing() -> None:
    counters = Spent().as_dict()
    assert set(counters) == {
        "steps",
        "examples",
        "restricted_examples",
        "tokens",
        "flops",
        "seconds",
    }
    assert not any(counters.values())


WIDTH, INNER, LAYERS, HEADS, KV = 32, 64, 2, 4, 2
QKVO = 2 * WIDTH * WIDTH + 2 * WIDTH * (WIDTH * KV // HEADS)
GATED = 3 * WIDTH * INNER
# Architecture, changes of its configuration, entries of its matrices that a token meets, by hand:
# of routed experts those that it goes to, with the router and shared experts.
ENTRIES: list[tuple[str, dict[str, Any], int]] = [
    ("Llama", {}, LAYERS * (QKVO + 3 * WIDTH * INNER)),
    ("Llama", {"tie_word_embeddings": True}, LAYERS * (QKVO + 3 * WIDTH * INNER)),
    ("Qwen2", {}, LAYERS * (QKVO + 3 * WIDTH * INNER)),  # its biases are no matrices
    ("GPTNeoX", {}, LAYERS * (4 * WIDTH * WIDTH + 2 * WIDTH * INNER)),
    (
        "Mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        LAYERS * (QKVO + 2 * GATED + 4 * WIDTH),
    ),
    (
        "Mixtral",
        {"num_local_experts": 8, "num_experts_per_tok": 1},
        LAYERS * (QKVO + GATED + 8 * WIDTH),
    ),
    (
        "Qwen2Moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 24,
        },
        LAYERS * (QKVO + 2 * 3 * WIDTH * 16 + 6 * WIDTH + 3 * WIDTH * 24 + WIDTH),
    ),
]


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize(("architecture", "changes", "expected"), ENTRIES)
def test_matrix_entries_by_hand(
    make_model: Callable[..., Model],
    architecture: str,
    changes: dict[str, Any],
    expected: int,
    adapted: bool,
) -> None:
    """Experts that a token does not go to cost nothing and are not counted."""
    model = make_model(architecture, **changes)
    if adapted:
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    assert matrix_entries(model) == expected


def test_experts_without_a_known_router_all_count(make_model: Callable[..., Model]) -> None:
    model = make_model("Mixtral", num_local_experts=4, num_experts_per_tok=2)
    for layer in model.model.layers:
        del layer.mlp.gate.top_k
    assert matrix_entries(model) == LAYERS * (QKVO + 4 * GATED + 4 * WIDTH)


def counted_flops(model: Model, rows: list[Row]) -> float:
    """FLOPs of the matrix products of one forward and backward pass, attention left out."""
    with FlopCounterMode(display=False) as counter:
        for loss in Forward(model, tree=True).loss_sums(rows):
            loss.backward()
    operations = counter.get_flop_counts()["Global"]
    return float(sum(n for name, n in operations.items() if str(name) in ("aten.mm", "aten.addmm")))


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("labels", [2, 20])
def test_flops_equal_what_torch_counts(
    make_model: Callable[..., Model], full: bool, tied: bool, labels: int
) -> None:
    model = make_model(
        "Llama", hidden_size=64, intermediate_size=256, tie_word_embeddings=tied, vocab_size=300
    )
    entries, head = matrix_entries(model), model.lm_head.weight.numel()
    if not full:
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=1, target_modules="all-linear"))
    # Nothing is shared, so a pack has as many nodes as there are tokens.
    rows = [Row(tuple((i + 30 * k) % 300 for i in range(24)), 24 - labels) for k in range(8)]
    predicted = training_flops(entries, 8 * 24, head, 8 * labels, full=full)
    assert predicted == pytest.approx(counted_flops(model, rows), rel=0.001 if full else 0.15)


# The cache folder.


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "a" / "cache"
    monkeypatch.setenv("DUROMETER_CACHE", str(folder))
    return folder


def write_two(folder: Path) -> None:
    (folder / "one").write_text("1")
    (folder / "deep").mkdir()
    (folder / "deep" / "two").write_text("22")


def test_a_folder_is_built_once_for_each_digest(root: Path) -> None:
    built: list[Path] = []

    def build(folder: Path) -> None:
        built.append(folder)
        assert not list(root.glob("micro-*"))  # not yet in its place
        write_two(folder)

    digest = digest_of("x")
    first = cache.cached_folder("micro", digest, build)
    assert first == root / f"micro-{digest[:16]}"
    assert cache.cached_folder("micro", digest, build) == first
    assert len(built) == 1
    assert (first / "deep" / "two").read_text() == "22"
    second = cache.cached_folder("micro", digest_of("y"), write_two)
    assert second != first
    assert sorted(root.iterdir()) == sorted([first, second])
    assert [(e.name, e.path, e.size) for e in cache.cache_entries()] == [
        (path.name, path, 3) for path in sorted([first, second])
    ]
    assert cache.clear_cache() == 6
    assert cache.cache_entries() == []
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError(28, "No space left")])
def test_a_failed_build_leaves_nothing(root: Path, error: Any) -> None:
    def fail(folder: Path) -> None:
        write_two(folder)
        raise error

    expected = StorageError if isinstance(error, OSError) else error
    with pytest.raises(expected) as raised:
        cache.cached_folder("micro", "d" * 64, fail)
    if isinstance(error, OSError):
        assert str(root) in str(raised.value)
        assert "No space left" in str(raised.value)
    assert list(root.iterdir()) == []
    assert (cache.cached_folder("micro", "d" * 64, write_two) / "one").exists()


def test_two_processes_may_build_at_once(root: Path) -> None:
    """Whoever comes second takes what the first has put there."""

    def build(folder: Path) -> None:
        final = cache.cached_folder("micro", "d" * 64, write_two)
        (final / "one").write_text("first")
        write_two(folder)

    final = cache.cached_folder("micro", "d" * 64, build)
    assert (final / "one").read_text() == "first"
    assert list(root.iterdir()) == [final]


def below_a_file(root: Path) -> Iterator[Path]:
    root.parent.write_text("")
    yield root


def read_only(root: Path) -> Iterator[Path]:
    root.mkdir(parents=True)
    root.chmod(0o500)
    try:
        if os.access(root, os.W_OK):
            pytest.skip("root may write everywhere")
        yield root
    finally:
        root.chmod(0o700)


@pytest.mark.parametrize("prepare", [below_a_file, read_only])
def test_a_cache_that_cannot_be_written_says_so(
    root: Path, prepare: Callable[[Path], Iterator[Path]]
) -> None:
    for folder in prepare(root):
        with pytest.raises(StorageError, match="DUROMETER_CACHE") as raised:
            cache.cached_folder("micro", "d" * 64, write_two)
        assert str(folder) in str(raised.value)
        assert cache.cache_entries() == []
        assert cache.clear_cache() == 0


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"DUROMETER_CACHE": "/x", "XDG_CACHE_HOME": "/y"}, Path("/x")),
        ({"DUROMETER_CACHE": "", "XDG_CACHE_HOME": "/y"}, Path("/y/durometer")),
        ({"HOME": "/z"}, Path("/z/.cache/durometer")),
        ({"HOME": "/z", "XDG_CACHE_HOME": ""}, Path("/z/.cache/durometer")),
    ],
)
def test_where_the_cache_is(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: Path
) -> None:
    for name in ("DUROMETER_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache.cache_root() == expected


def test_the_session_does_not_touch_the_users_cache() -> None:
    assert Path.home() / ".cache" not in cache.cache_root().parents
