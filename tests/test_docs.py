"""The documentation: it builds, its examples run, its references are complete, its paths exist."""

import ast
import importlib.util
import json
import re
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny_world
import torch
import typer
from mkdocs.commands.build import build
from mkdocs.config import load_config

import durometer.catalogue  # noqa: F401  (fills the registries)
from durometer.cli import app
from durometer.core.budget import Budget
from durometer.core.registry import Registry
from durometer.core.seeds import Seeds
from durometer.domains.base import Role, domain_registry, require_sound
from durometer.measures.base import measure_registry
from durometer.measures.responses import MAX_TOKENS, OVER_REFUSAL_TOKENS
from durometer.options import read_config
from durometer.safeguards.base import make_safeguard, safeguard_registry
from durometer.safeguards.data import DefenceData
from durometer.safeguards.train import TrainingRun
from durometer.subjects.base import Source, Subject
from durometer.subjects.builtin import subject_registry
from durometer.tampers.base import make_tamper, tamper_registry
from durometer.trials.campaign import Request, chosen_suite
from durometer.trials.suites import SUITES

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
SOURCE = ROOT / "src" / "durometer"
PAGES = sorted(DOCS.rglob("*.md"))
REGISTRIES: dict[str, Registry[Any]] = {
    "tampers": tamper_registry,
    "safeguards": safeguard_registry,
    "measures": measure_registry,
    "subjects": subject_registry,
    "domains": domain_registry,
}
# Imports that do not go down, each explained on the architecture page.
EXCEPTIONS = {("subjects", "domains"), ("trials", ""), ("report", ""), ("audit", "")}


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.S | re.M)


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a broken link or anchor fails the build, as it is strict."""
    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))
    return folder


class Tags(HTMLParser):
    """Collects identifiers, and addresses that a browser would load."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.loaded: list[str] = []
        self.feed(page.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if found.get("id"):
            self.ids.add(str(found["id"]))
        if tag == "link" and found.get("rel") != "canonical":
            self.loaded.append(str(found.get("href")))
        elif tag != "a" and found.get("src"):
            self.loaded.append(str(found["src"]))


# The site


def test_every_page_is_built_and_no_source_is_published(site: Path) -> None:
    built = {path.relative_to(site).with_suffix(".md") for path in site.rglob("*.html")}
    assert {page.relative_to(DOCS) for page in PAGES} <= built
    assert not list(site.rglob("*.py"))


def test_nothing_is_left_to_generate(site: Path) -> None:
    assert not [page for page in site.rglob("*.html") if "<!-- generated" in page.read_text()]


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert not [a for a in Tags(page).loaded if re.match(r"(https?:)?//", a)], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", sheet.read_text()), sheet


@pytest.mark.parametrize("kind", ["tampers", "measures", "domains"])
def test_the_reference_has_a_section_on_everything(site: Path, kind: str) -> None:
    assert set(REGISTRIES[kind].names()) <= Tags(site / "reference" / f"{kind}.html").ids


def test_the_reference_lists_subjects_suites_settings_and_commands(
    site: Path, hooks: ModuleType
) -> None:
    subjects = hooks.subjects()
    assert all(f"`{name}`" in subjects for name in subject_registry.names())
    assert set(SUITES) <= Tags(site / "reference" / "suites.html").ids
    for name, entry in tamper_registry:
        section = re.split(r"^## ", hooks.tampers(), flags=re.M)[
            tamper_registry.names().index(name) + 1
        ]
        assert all(f"`{s.name}`" in section for s in entry.settings_class.describe())
    told = hooks.command_line()
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        assert f"`durometer {name}`" in told
        assert all(p.opts[0] in told for p in command.params if p.param_type_name == "option")


# What the pages name


def test_files_that_are_named_exist() -> None:
    named = {
        (page.name, path)
        for page in PAGES
        for path in re.findall(r"`((?:[\w-]+/)*[\w-]+\.py)`", page.read_text("utf-8"))
    }
    places = (ROOT, SOURCE, SOURCE / "core", ROOT / "tests")
    assert len(named) > 30
    assert not [entry for entry in named if not any((p / entry[1]).is_file() for p in places)]


def test_each_of_the_ten_rules_names_where_it_is_tested() -> None:
    rows = re.findall(r"^\| (\d+)\. .*\| (.*) \|$", (DOCS / "architecture.md").read_text(), re.M)
    assert [int(number) for number, _ in rows] == list(range(1, 11))
    for _, tested in rows:
        files = re.findall(r"`(test_\w+\.py)`", tested)
        assert files
        assert all((ROOT / "tests" / name).is_file() for name in files)


def imports(path: Path) -> Iterator[str]:
    """Yield the rooms that a module imports from; '' is a module of no room."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        for name in names:
            if name.split(".")[0] == "durometer":
                room = f"{name}.".split(".")[1]
                yield room if (SOURCE / room).is_dir() else ""


def test_an_arrow_of_imports_goes_down_only(hooks: ModuleType) -> None:
    depth = {room: at for at, layer in enumerate(hooks.LAYERS) for room in layer}
    rooms = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    assert rooms == set(depth)
    wrong = {
        (room, other)
        for room in rooms
        for path in (SOURCE / room).glob("*.py")
        for other in imports(path)
        if other != room and depth.get(other, -1) <= depth[room]
    }
    assert wrong <= EXCEPTIONS


# Examples


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_snippets_can_be_parsed(page: Path) -> None:
    for text in blocks(page, "toml"):
        assert tomllib.loads(text)
    for text in blocks(page, "json"):
        assert [json.loads(line) for line in text.splitlines()]
    for text in blocks(page, "python"):
        if not text.rstrip().endswith("..."):
            ast.parse(text)


def test_the_configuration_file_is_one_that_is_taken(tmp_path: Path) -> None:
    (text,) = blocks(DOCS / "reference" / "cli.md", "toml")
    file = tmp_path / "F.toml"
    file.write_text(text, "utf-8")
    command = typer.main.get_command(app).commands["stress"]  # type: ignore[attr-defined]
    known = {str(p.name): bool(getattr(p, "is_flag", False)) for p in command.params}
    options = read_config(file, known)
    request = Request(options["subject"], "world", options["suite"], tampers=options["tamper"])
    attacks = chosen_suite(request, 0).attacks
    assert [attack.tamper for attack in attacks] == ["lora", "finetune"]
    assert attacks[0].settings["rank"] == 4


@pytest.fixture
def tiny_subjects(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Stand-ins for the built-in subjects and domain, so that nothing is trained for a minute."""

    def load(spec: str, **_: Any) -> Subject:
        if spec == "micro":
            return tiny_world.undefended()
        subject = tiny_world.safeguarded()
        subject.source = Source("builtin", spec, "", "micro", "micro-refusal")
        return subject

    for module in ("durometer.subjects.load", "durometer.trials.campaign"):
        monkeypatch.setattr(f"{module}.load_subject", load)
    for module in ("durometer.domains.load", "durometer.trials.campaign"):
        monkeypatch.setattr(f"{module}.load_domain", lambda spec, **_: tiny_world.tiny_domain())
    monkeypatch.chdir(tmp_path)


def test_the_api_examples_run(tiny_subjects: None, capsys: pytest.CaptureFixture[str]) -> None:
    first, records, by_hand = blocks(DOCS / "api.md", "python")[:3]
    names: dict[str, Any] = {"__name__": "api_example"}
    exec(first, names)
    shown = capsys.readouterr().out
    assert names["result"].summary["verdict"] in shown
    assert names["result"].complete
    exec(records, names)
    shown = capsys.readouterr().out
    assert "undefended" in shown
    assert names["again"].summary == names["result"].summary
    exec(by_hand, names)
    assert len(capsys.readouterr().out.splitlines()) == 8
    assert names["subject"].fingerprint == tiny_world.safeguarded().fingerprint


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the page on adding a method defines; the registries forget it afterwards."""
    for registry in REGISTRIES.values():
        registry.names()
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    names: dict[str, Any] = {"__name__": "extending_example"}
    for text in blocks(DOCS / "extending.md", "python"):
        exec(text, names)
    return names


@pytest.mark.usefixtures("example")
def test_the_example_safeguard_is_trained() -> None:
    subject, domain = tiny_world.undefended(), tiny_world.tiny_domain("knowledge")
    made = make_safeguard("example_ascent", steps=3, learning_rate=1e-3, batch_size=4)
    outcome = TrainingRun(made, subject, DefenceData(subject, domain), Seeds.derive(1)).run()
    assert outcome.status == "done"
    assert outcome.losses[-1]["forget"] < outcome.losses[0]["forget"] < 0


def test_the_example_tamper_keeps_the_rules(example: dict[str, Any], hooks: ModuleType) -> None:
    subject, domain = tiny_world.safeguarded(), tiny_world.tiny_domain()
    seen: list[int] = []

    def drift(seed: int) -> tuple[Any, dict[str, Any]]:
        tamper = make_tamper("example_drift", steps=6, scale=0.05)
        with subject.restored():
            realised = tamper.run(
                subject,
                domain,
                Budget(4, (1, 4)),
                Seeds.derive(seed),
                lambda checkpoint: not seen.append(checkpoint.steps),  # type: ignore[func-returns-value]
            )
            weights = {n: p.detach().clone() for n, p in subject.model.named_parameters()}
        return realised, weights

    realised, weights = drift(1)
    assert (realised.status, realised.spent.steps, seen) == ("done", 4, [1, 4])
    assert all(realised.changed.values())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in drift(1)[1].items())
    other = drift(2)[1]
    assert not any(torch.equal(other[name], weights[name]) for name in realised.changed)
    assert "## `example_drift`" in hooks.tampers()


def test_the_example_tamper_can_be_asked_for(example: dict[str, Any]) -> None:
    request = Request("micro-refusal", "world", tampers=("example_drift:scale=0.02",))
    (attack,) = chosen_suite(request, 0).attacks
    assert attack.settings["scale"] == 0.02


def test_the_example_measure_domain_and_subject_are_registered(example: dict[str, Any]) -> None:
    subject, domain = tiny_world.safeguarded(), tiny_world.tiny_domain()
    items = domain.select(Role.BENIGN)[:3]
    registered = measure_registry.get("example_length")
    assert registered == example["LENGTH"]
    records = registered.run(subject, domain, items)
    assert [record.item_id for record in records] == [item.id for item in items]
    assert all(record.tokens for record in records)
    for kind in ("refusal", "knowledge"):
        assert require_sound(domain_registry.get("example_letters").build(kind)).items
    assert subject_registry.get("example_model") is example["MY_MODEL"]


# Result files


def test_a_missing_result_is_told(
    hooks: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(hooks, "RESULTS", tmp_path)
    assert "Not measured yet" in hooks.benchmark("training")
    assert hooks.other_benchmarks() == ""


def test_results_are_shown_as_they_are(
    hooks: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(hooks, "RESULTS", tmp_path)
    result = {
        "machine": {"cpu": "A <fast> one", "cores": 2, "versions": {"torch": "2.13.0"}},
        "what": "a job",
        "ratio": 2.5,
        "peak_memory_gib": 1.25,
        "exact": True,
        "losses": [0.5, 0.25],
        "cases": [{"subject": "micro", "seconds": 1234.5}, {"subject": "smollm2"}],
    }
    (tmp_path / "extra.json").write_text(json.dumps(result), "utf-8")
    shown = hooks.other_benchmarks()
    assert "## Extra" in shown
    for part in (
        "| 2.5 |",
        "peak memory, GiB | 1.25",
        "| yes |",
        "| micro | 1,234 |",
        "&lt;fast&gt;",
    ):
        assert part in shown
    assert "0.25" not in shown.replace("1.25", "")


def test_text_stays_text(hooks: ModuleType) -> None:
    assert hooks.text("a|b <c> *d* ``e_f``\n g_h") == r"a\|b &lt;c&gt; \*d\* `e_f` g\_h"


def test_the_lengths_of_responses_are_those_of_the_code() -> None:
    said = f"at most {MAX_TOKENS} tokens for restricted prompts and {OVER_REFUSAL_TOKENS} for"
    assert said in " ".join((DOCS / "statistics.md").read_text("utf-8").split())
