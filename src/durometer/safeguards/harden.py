"""From a subject and a list of safeguards to a folder with a hardened model and its record."""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch

from durometer.core.biases import give_biases
from durometer.core.errors import InputError
from durometer.core.files import replace_file
from durometer.core.seeds import Seeds
from durometer.core.sources import source_hash
from durometer.domains.base import Domain
from durometer.domains.load import lasting_spec, load_domain
from durometer.safeguards.base import TINY, Safeguard, TrainingSettings, make_safeguard
from durometer.safeguards.bench import Bench
from durometer.safeguards.card import PLAIN, measured, model_card
from durometer.safeguards.checkpoint import CheckpointFile
from durometer.safeguards.data import DefenceData
from durometer.safeguards.passes import Reference
from durometer.safeguards.place import WORK, begin, require_usable, storing
from durometer.safeguards.train import Outcome, Report, TrainingRun, edited
from durometer.subjects.base import Subject
from durometer.subjects.builtin import subject_registry
from durometer.subjects.load import DtypeName, load_subject, quiet_libraries
from durometer.subjects.record import RECORD, read_record

FORMAT = 1
LOG, REFERENCE = "log.jsonl", "reference"
CHECKPOINTS = 10  # a stage, at least
# Looks at a subject and the stages that it is to have, and may refuse them.
Accept = Callable[[Subject, Sequence[Safeguard[Any]]], None]


class HardenObserver(Protocol):
    """Told how the work goes on."""

    def stage(self, what: str, steps: int) -> None:
        """Something begins that takes so many steps (0: unknown)."""

    def trained(self, report: Report) -> None:
        """An update was made."""


class SilentHardenObserver:
    """Shows nothing."""

    def stage(self, what: str, steps: int) -> None:
        """Show nothing."""

    def trained(self, report: Report) -> None:
        """Show nothing."""


@dataclass(frozen=True)
class HardenRequest:
    """What the user asked for.

    Attributes:
        subject, domain: specs as for ``load_subject`` and ``load_domain``.
        safeguards: names, or ``name:key=value,key=value``, carried out one after the other; the
            key ``preset`` names a preset.
        budget_steps: most updates of a stage; None leaves it to the settings.
        seed: of the whole training.
    """

    subject: str
    domain: str
    safeguards: tuple[str, ...]
    budget_steps: int | None = None
    seed: int = 7
    dtype: DtypeName = "auto"
    device: str = "auto"


@dataclass
class Hardened:
    """What came of it.

    Attributes:
        folder: the model folder with its record.
        record: the machine-readable part of the card.
        diverged: why training ended early, '' if it did not; then no model was saved.
    """

    folder: Path
    record: dict[str, Any] = field(default_factory=dict)
    diverged: str = ""


def harden(
    subject: str,
    domain: str,
    safeguards: str | Sequence[str],
    *,
    out: Path | str,
    budget_steps: int | None = None,
    seed: int = 7,
    resume: bool = False,
    dtype: DtypeName = "auto",
    device: str = "auto",
    observer: HardenObserver | None = None,
) -> Hardened:
    """Give ``subject`` safeguards against tampering on ``domain`` and save it to ``out``.

    Args:
        subject: built-in name, model folder, ``.gguf`` file, hub id or ``BASE+ADAPTER``.
        domain: built-in domain or folder, with ``:knowledge`` or ``:refusal`` where needed.
        safeguards: one name or several, each with settings as in ``tar:preset=light,steps=50``.
        out: folder to make; one that holds anything already needs ``resume``.
        budget_steps: most updates of a stage.
        seed: of the whole training.
        resume: go on with a run that was ended early.
        dtype: number format to compute in.
        device: where to compute.
        observer: told how the work goes on.

    Raises:
        DurometerError: one line that says what to change; the last checkpoint is kept.
    """
    named = parse_safeguards([safeguards] if isinstance(safeguards, str) else safeguards)
    request = HardenRequest(subject, domain, named, budget_steps, seed, dtype, device)
    return run_harden(request, Path(out), resume=resume, observer=observer)


def parse_safeguards(texts: Sequence[str]) -> tuple[str, ...]:
    """Return ``a:k=v,b`` as one text a safeguard: a part without '=' begins the next one.

    Raises:
        InputError: no name at all, or one that is unknown, settings included.
    """
    found: list[str] = []
    for part in (part.strip() for text in texts for part in text.split(",") if part.strip()):
        if found and "=" in part and ":" not in part:
            found[-1] += f",{part}"
        else:
            found.append(part)
    if not found:
        raise InputError("name a safeguard: --safeguard NAME (durometer list safeguards)")
    for text in found:
        _made(text, "")
    return tuple(found)


def _made(text: str, default_preset: str) -> Safeguard[Any]:
    """Return the safeguard that ``name:key=value,...`` spells out."""
    name, _, rest = text.partition(":")
    pairs = [part.partition("=") for part in rest.split(",") if part]
    for key, sign, _ in pairs:
        if not sign:
            raise InputError(f"safeguard '{name}': '{key}' needs a value, as in {key}=...")
    values: dict[str, Any] = {key.strip(): value.strip() for key, _, value in pairs}
    preset = values.pop("preset", "")
    if not preset and default_preset in make_safeguard(name).presets:
        preset = default_preset
    return make_safeguard(name, preset, **values)


def run_harden(
    request: HardenRequest,
    folder: Path,
    *,
    resume: bool = False,
    observer: HardenObserver | None = None,
    accept: Accept | None = None,
) -> Hardened:
    """Carry out ``request`` in ``folder``; see ``harden``.

    Args:
        accept: asked before anything is measured or written; raises what it does not accept.
    """
    require_usable(folder, request.subject, resume=resume)
    run = _Hardening(request, folder, resume, observer or SilentHardenObserver())
    run.require(accept)
    return run.run()


def finished(request: HardenRequest, folder: Path) -> Hardened:
    """Return what a run of the same request finished in ``folder``.

    Raises:
        InputError: it is of another request.
    """
    record = read_record(folder)
    was, now = record.get("request"), _as_recorded(request)
    if not isinstance(was, dict):
        raise InputError(f"{folder}: holds a model of another kind; name another --out")
    for name, value in now.items():
        if name != "device" and was.get(name) != value:
            raise InputError(
                f"{folder}: holds a model made with another {name} ({was.get(name)}, now {value}); "
                "repeat that run's command, or name another --out"
            )
    return Hardened(folder, record)


def _as_recorded(request: HardenRequest) -> dict[str, Any]:
    return asdict(request) | {"safeguards": list(request.safeguards)}


def name_reference(made: Hardened) -> None:
    """Note in the record that the plain control is beside the model."""
    made.record["reference"] = REFERENCE
    with storing(made.folder / RECORD):
        replace_file(made.folder / RECORD, iter([json.dumps(made.record, indent=1), "\n"]))


class _Hardening:
    """One run: loads, measures, carries out the stages, saves."""

    def __init__(
        self, request: HardenRequest, folder: Path, resume: bool, observer: HardenObserver
    ) -> None:
        self._request, self._folder, self._resume = request, folder, resume
        self._observer = observer
        self._domain = load_domain(request.domain)
        self._subject = self._load()
        self._stages = stages_of(request, self._subject, self._domain)
        self._seeds = Seeds.derive(request.seed)
        self._work = folder / WORK
        self._reference = ""
        self._ran: list[dict[str, Any]] = []

    def _load(self) -> Subject:
        request = self._request
        return load_subject(request.subject, dtype=request.dtype, device=request.device)

    def require(self, accept: Accept | None) -> None:
        """Look for what any stage lacks, before the first is trained."""
        subject = self._subject
        if accept is not None:
            accept(subject, self._stages)
        for stage in self._stages:
            data = DefenceData(subject, self._domain)
            stage.require(subject, data)
            if isinstance(stage.settings, TrainingSettings):
                TrainingRun(stage, subject, data, self._seeds)

    def run(self) -> Hardened:
        """Carry out all stages and save the result."""
        subject = self._subject
        begin(self._folder, _as_recorded(self._request))
        self._observer.stage(f"measuring {subject.name} without a safeguard", 0)
        before = measured(subject, self._domain)
        base = subject.fingerprint
        original = self._frozen("original")
        for number, stage in enumerate(self._stages):
            outcome = self._stage(number, stage, original)
            if outcome is not None and outcome.status == "diverged":
                return Hardened(self._folder, diverged=self._diverged(stage, outcome))
        subject.__dict__.pop("fingerprint", None)  # that of the weights as loaded
        self._observer.stage("measuring the hardened model", 0)
        record = self._record(before, base)
        with storing(self._folder):
            logs = [path.read_text("utf-8") for path in sorted(self._work.glob("log-*.jsonl"))]
            (self._folder / LOG).write_text("".join(logs), "utf-8")
            save_model(subject, self._folder, self._work / "model", record)
            shutil.rmtree(self._work)
        return Hardened(self._folder, record)

    def _diverged(self, stage: Safeguard[Any], outcome: Outcome) -> str:
        kept = f"; the last good checkpoint is in {self._work}" if self._has_checkpoint() else ""
        return f"safeguard '{stage.name}' diverged {outcome.reason}{kept}; lower learning_rate"

    def _has_checkpoint(self) -> bool:
        return any(self._work.glob("*.safetensors"))

    def _frozen(self, point: str) -> Reference | None:
        if any(stage.reference == point for stage in self._stages):
            return Reference(self._subject.model, tree=self._subject.tree)
        return None

    def _stage(
        self, number: int, stage: Safeguard[Any], original: Reference | None
    ) -> Outcome | None:
        """Carry out one stage, or take over what it left behind before a kill."""
        done = self._work / f"stage-{number}.safetensors"
        identity = self._identity(number)
        last = number + 1 == len(self._stages)
        outcome = None
        if self._resume and done.exists():
            self._take_over(done, identity)
        else:
            outcome = self._carry_out(number, stage, original, identity)
            if outcome.status == "diverged":
                return outcome
            self._ran.append(self._facts(stage, outcome))
            if not last:
                self._keep(done, identity)
        if not last and stage.name == PLAIN[self._domain.kind]:
            self._save_reference(stage)
        return outcome

    def _carry_out(
        self,
        number: int,
        stage: Safeguard[Any],
        original: Reference | None,
        identity: Mapping[str, Any],
    ) -> Outcome:
        title = f"{stage.name} ({number + 1} of {len(self._stages)})"
        settings = stage.settings
        self._observer.stage(title, settings.steps if isinstance(settings, TrainingSettings) else 0)
        data = DefenceData(self._subject, self._domain)
        reference = original
        if stage.reference == "stage_start":
            reference = Reference(self._subject.model, tree=self._subject.tree)
        if not stage.reference:
            reference = None
        if not isinstance(settings, TrainingSettings):
            return edited(stage, Bench(self._subject, data, self._seeds, reference))
        file = CheckpointFile(
            self._work / f"training-{number}.safetensors",
            identity,
            every=min(max(settings.steps // CHECKPOINTS, 1), 50),
            resume=self._resume,
        )
        run = TrainingRun(
            stage, self._subject, data, self._seeds, reference=reference, checkpoint=file
        )
        outcome = run.run(self._observer.trained)
        self._log(number, stage, outcome)
        if outcome.status != "diverged":
            run.edit()
        return outcome

    def _log(self, number: int, stage: Safeguard[Any], outcome: Outcome) -> None:
        """Write one line an update; a stage that is gone on with writes its file again."""
        lines = [
            {"stage": stage.name, "step": step, "learning_rate": rate, "losses": losses}
            | ({"gradient_norms": outcome.norms[str(step)]} if str(step) in outcome.norms else {})
            for step, (rate, losses) in enumerate(
                zip(outcome.learning_rates, outcome.losses, strict=True), 1
            )
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        file = self._work / f"log-{number}.jsonl"
        with storing(file):
            file.write_text(text, "utf-8")

    def _facts(self, stage: Safeguard[Any], outcome: Outcome) -> dict[str, Any]:
        return {
            "name": stage.name,
            "access": stage.access,
            "settings": stage.settings.canonical(),
            "status": outcome.status,
            "reason": outcome.reason,
            "cost": outcome.ledger.as_dict(),
            "data_order_hashes": outcome.orders,
            "last_losses": outcome.losses[-1] if outcome.losses else {},
        } | stage.facts()

    def _identity(self, number: int) -> dict[str, Any]:
        """Return all that a checkpoint of this stage depends on."""
        return {
            "subject": self._subject.fingerprint,
            "dtype": self._subject.dtype,
            "domain": self._domain.content_hash,
            "safeguards": {
                str(place): {"name": stage.name, "settings": stage.settings.canonical()}
                for place, stage in enumerate(self._stages[: number + 1])
            },
            "seeds": self._seeds.as_dict(),
            "code": source_hash("core", "tampers", "safeguards"),
        }

    def _keep(self, file: Path, identity: Mapping[str, Any]) -> None:
        """Keep the weights between two stages, and what was done so far."""
        checkpoint = CheckpointFile(file, identity, every=1)
        tensors = {name: p.detach() for name, p in self._subject.model.named_parameters()}
        checkpoint.save(tensors, {"ran": self._ran})

    @torch.no_grad()
    def _take_over(self, file: Path, identity: Mapping[str, Any]) -> None:
        found = CheckpointFile(file, identity, every=1, resume=True).load()
        assert found is not None
        tensors, state = found
        model = self._subject.model
        for name in tensors:  # biases that an earlier stage made
            if name.endswith(".bias") and name not in dict(model.named_parameters()):
                give_biases(model, name.removesuffix(".bias"))
        own = dict(model.named_parameters())
        if own.keys() != tensors.keys():  # what is not copied would be lost without a word
            other = min(own.keys() ^ tensors.keys())
            raise InputError(f"{file}: weights of another model ({other}); name another --out")
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
        self._ran = state["ran"]

    def _save_reference(self, stage: Safeguard[Any]) -> None:
        """Keep the plain safeguard that the next stage starts from, to compare with."""
        self._reference = REFERENCE
        record = {
            "format": FORMAT,
            "undefended": self._undefended(),
            "reference": "",
            "domain": self._domain_facts(),
            "safeguards": [stage.name],
        }
        place = self._folder / REFERENCE
        if (place / RECORD).exists():
            return
        with storing(place):
            save_model(self._subject, place, self._work / "reference", record)

    def _undefended(self) -> str:
        spec = self._request.subject
        return str(Path(spec).resolve()) if Path(spec).exists() else spec

    def _domain_facts(self) -> dict[str, Any]:
        domain = self._domain
        return {
            "spec": lasting_spec(self._request.domain, domain.kind),
            "name": domain.name,
            "kind": domain.kind,
            "content_hash": domain.content_hash,
        }

    def _record(self, before: Mapping[str, Any], base: str) -> dict[str, Any]:
        subject = self._subject
        return {
            "format": FORMAT,
            "durometer": version("durometer"),
            "base": {
                "spec": self._request.subject,
                "fingerprint": base,
                "licence": licence_of(subject),
            },
            "undefended": self._undefended(),
            "reference": self._reference,
            "domain": self._domain_facts(),
            "request": _as_recorded(self._request),
            "seeds": self._seeds.as_dict(),
            "safeguards": self._ran,
            "dtype": subject.dtype,
            "threads": torch.get_num_threads(),
            "changed": change_norms(subject, self._load()),
            "fingerprint": subject.fingerprint,
            "before_any_tamper": {
                "undefended": before,
                "hardened": measured(subject, self._domain),
            },
        }


# Settings that name the preset of an earlier stage.
STAGE_PRESETS = ("stage1_preset", "teacher_preset")


def stages_of(request: HardenRequest, subject: Subject, domain: Domain) -> list[Safeguard[Any]]:
    """Return the stages that a request comes to for a subject.

    Raises:
        InputError: a safeguard does not serve the domain's kind.
    """
    default = "tiny" if subject.parameters < TINY else ""
    stages: list[Safeguard[Any]] = []
    for text in request.safeguards:
        made = _made(text, default)
        for stage in made.stages(domain):
            asked = any(getattr(made.settings, name, "") for name in STAGE_PRESETS)
            tiny = stage.name != made.name and default in stage.presets and not asked
            chosen = make_safeguard(stage.name, default) if tiny else stage
            stages.append(_within(chosen, request.budget_steps))
    for stage in stages:
        if domain.kind not in stage.kinds:
            raise InputError(
                f"safeguard '{stage.name}' serves domains of kind {' and '.join(stage.kinds)}, and "
                f"'{request.domain}' is one of kind {domain.kind}"
            )
    return stages


def _within(stage: Safeguard[Any], budget: int | None) -> Safeguard[Any]:
    steps = getattr(stage.settings, "steps", 0)
    if budget is None or steps <= budget:
        return stage
    return type(stage)(stage.settings.model_copy(update={"steps": budget}))


def save_model(subject: Subject, folder: Path, work: Path, record: Mapping[str, Any]) -> None:
    """Write a model folder: whole files first, the record that makes it one last."""
    shutil.rmtree(work, ignore_errors=True)
    with quiet_libraries():
        subject.model.save_pretrained(work)
        subject.chat.tokenizer.save_pretrained(work)
    (work / "README.md").write_text(model_card(record), "utf-8")
    (work / RECORD).write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(work.iterdir(), key=lambda p: p.name == RECORD):
        os.replace(path, folder / path.name)
    work.rmdir()


@torch.no_grad()
def change_norms(subject: Subject, base: Subject) -> dict[str, float]:
    """Return the Frobenius norm of the change of each weight that changed."""
    start = dict(base.model.named_parameters())
    norms = {
        # A weight that the base has not (a bias that its family allows) began at zero.
        name: float((p.float() - (start[name].float() if name in start else 0.0)).norm())
        for name, p in subject.model.named_parameters()
    }
    return {name: norm for name, norm in norms.items() if norm}


def licence_of(subject: Subject) -> str:
    """Return the licence of the base as its own card states it, '' where none does."""
    if subject.source.kind == "builtin":
        return subject_registry.get(subject.source.location).licence
    card = Path(subject.source.location) / "README.md"
    if not card.is_file():
        return ""
    found = re.search(r"^license:\s*(\S+)\s*$", card.read_text("utf-8", "replace")[:5000], re.M)
    return found[1] if found else ""
