"""What ``harden`` and ``chat`` do once their arguments are known."""

import functools
import io
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import durometer.catalogue  # noqa: F401  (fills the registries)
from durometer.commands import run_stress
from durometer.console import interruptible, say
from durometer.core.errors import ExitCode, InputError
from durometer.core.generation import generate
from durometer.options import free_folder
from durometer.progress import CampaignProgress
from durometer.report.figures import visible
from durometer.safeguards.attacks import recorded_digests, require_disjoint
from durometer.safeguards.base import Safeguard
from durometer.safeguards.card import PLAIN, compared
from durometer.safeguards.harden import (
    REFERENCE,
    Hardened,
    HardenRequest,
    finished,
    name_reference,
    parse_safeguards,
    run_harden,
)
from durometer.safeguards.place import is_begun, is_finished
from durometer.safeguards.train import Report
from durometer.subjects.base import Subject
from durometer.subjects.load import DtypeName, load_subject
from durometer.subjects.record import facts_in
from durometer.trials.campaign import Request
from durometer.trials.store import FILE
from durometer.trials.suites import make_suite

STRESS = "stress"  # folder of the attack that follows, in that of the model
SHOWN = 20  # lines a stage, where there is no terminal


class HardenProgress(CampaignProgress):
    """Shows how a training goes on: bars on a terminal, else some twenty lines a stage."""

    def stage(self, text: str, steps: int = 0) -> None:
        """Say what begins."""
        self._what = text
        self.begin(text, steps)
        if self._live is None:
            self.say(text)

    def trained(self, report: Report) -> None:
        """Show the loss of every term."""
        step, steps = report.update.step, self._steps
        self.updated(step, steps, sum(report.losses.values()))
        terms = "  ".join(f"{name} {loss:.3f}" for name, loss in report.losses.items())
        self._stage = f"{self._what}: {terms}"
        if self._live is None and (step % max(steps // SHOWN, 1) == 0 or step == steps):
            self.say(f"  {step}/{steps}  {terms}")


def harden_request(
    subject: str | None, domain: str | None, safeguards: list[str], **options: Any
) -> HardenRequest:
    """Return the request of ``harden``.

    Raises:
        InputError: no subject, domain or safeguard, or an unknown one.
    """
    if not subject:
        raise InputError("name a subject: durometer harden SUBJECT (durometer list subjects)")
    if not domain:
        raise InputError("say what to safeguard, with --domain (durometer list domains)")
    steps = options.get("budget_steps")
    if steps is not None and steps < 1:
        raise InputError(f"--budget-steps {steps}: at least 1")
    return HardenRequest(subject, domain, parse_safeguards(safeguards), **options)


def run(request: HardenRequest, out: Path | None, *, resume: bool, then_stress: str = "") -> int:
    """Harden with the progress on stderr, print where the model is, and attack it if asked to."""
    if then_stress:
        make_suite(then_stress, 1)  # a misspelt one is told before an hour of training
    if out is None and resume:
        raise InputError("--resume: name the folder to go on with, as --out DIR")
    names = [text.partition(":")[0] for text in request.safeguards]
    folder = out or free_folder("harden", request.subject, *names)
    try:
        with interruptible(), HardenProgress(f"loading {request.subject}") as progress:
            made = _hardened(request, folder, resume, then_stress, progress)
            stress = None
            if then_stress and not made.diverged:
                _plain_control(request, made, progress)
                stress = stress_request(request, made, then_stress)
    except KeyboardInterrupt:
        say(f"interrupted; go on with: {resume_command(request, folder, then_stress)}")
        return ExitCode.INTERRUPTED
    if made.diverged:
        say(f"error: {made.diverged}")
        return ExitCode.INCOMPLETE
    for line in summary(made):
        print(line)
    return ExitCode.COMPLETE if stress is None else _attacked(request, folder, stress)


def _hardened(
    request: HardenRequest, folder: Path, resume: bool, suite: str, progress: HardenProgress
) -> Hardened:
    """Harden, or take what an earlier run of the same command finished and was to attack."""
    if resume and suite and is_finished(folder):
        return finished(request, folder)
    accept = functools.partial(_accept, suite) if suite else None
    return run_harden(request, folder, resume=resume, observer=progress, accept=accept)


def _accept(suite: str, subject: Subject, stages: Sequence[Safeguard[Any]]) -> None:
    """Refuse stages that would train against an attack of the suite that is to follow."""
    trained = [d for s in stages for d in s.trained_against()]
    attacks = make_suite(suite, subject.parameters).attacks
    require_disjoint(trained, [(attack.tamper, attack.settings) for attack in attacks])


def _attacked(request: HardenRequest, folder: Path, stress: Request) -> int:
    run = folder / STRESS
    code = run_stress(stress, run, resume=True, fail_on=None, as_json=False)
    if code == ExitCode.INTERRUPTED and not (run / FILE).exists():
        say(f"go on with: {resume_command(request, folder, stress.suite)}")
    return code


def summary(made: Hardened) -> list[str]:
    """Return what was made, in a few lines."""
    found = compared(made.record["before_any_tamper"])
    lines = [f"{label}: {before} without, {after} with it" for label, before, after in found]
    return [*lines, f"hardened model: {made.folder}"]


def _plain_control(request: HardenRequest, made: Hardened, progress: HardenProgress) -> None:
    """Train the plain safeguard of the same kind beside the result, if it is not there."""
    plain = PLAIN[made.record["domain"]["kind"]]
    names = [stage["name"] for stage in made.record["safeguards"]]
    if made.record["reference"] or names == [plain] or facts_in(made.record)["unchanged"]:
        return
    place = made.folder / REFERENCE
    if not is_finished(place):
        control = replace(request, safeguards=(plain,))
        ended = run_harden(control, place, resume=is_begun(place), observer=progress)
        if ended.diverged:
            progress.say(f"note: no plain control to compare with: {ended.diverged}")
            return
    name_reference(made)


def stress_request(request: HardenRequest, made: Hardened, suite: str) -> Request:
    """Return the attack on the hardened model, beside the undefended one and the plain control.

    Raises:
        InputError: the suite has an attack that the safeguard was trained against.
    """
    subject = load_subject(str(made.folder), dtype=request.dtype, device=request.device)
    attacks = make_suite(suite, subject.parameters).attacks
    evaluated = [(attack.tamper, attack.settings) for attack in attacks]
    require_disjoint(recorded_digests(made.record), evaluated)
    reference = made.folder / made.record["reference"] if made.record["reference"] else ""
    return Request(
        str(made.folder),
        request.domain,
        suite,
        request.subject,
        str(reference),
        dtype=request.dtype,
        device=request.device,
    )


def resume_command(request: HardenRequest, folder: Path, then_stress: str = "") -> str:
    """Return the shell command that goes on with a request where it was left."""
    words = ["durometer", "harden", request.subject, "--domain", request.domain]
    for text in request.safeguards:
        words += ["--safeguard", text]
    options = {
        "--budget-steps": request.budget_steps,
        "--seed": request.seed if request.seed != 7 else None,
        "--dtype": request.dtype,
        "--device": request.device,
        "--then-stress": then_stress,
    }
    for name, value in options.items():
        if value not in ("", None, "auto"):
            words += [name, str(value)]
    going = ["--resume"] if is_begun(folder) or is_finished(folder) else []
    return shlex.join([*words, "--out", str(folder), *going])


def run_chat(
    spec: str, prompt: str, max_tokens: int, *, dtype: DtypeName = "auto", device: str = "auto"
) -> int:
    """Answer one prompt, or prompts from stdin until its end."""
    if max_tokens < 1:
        raise InputError(f"--max-tokens {max_tokens}: at least 1")
    subject = load_subject(spec, dtype=dtype, device=device)
    if prompt:
        _show_answer(subject, prompt, max_tokens)
        return ExitCode.COMPLETE
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a file that is not UTF-8, say
    asked = sys.stdin.isatty()
    if asked:
        say("every prompt is a conversation of its own; Ctrl-D ends")
    while True:
        if asked:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return ExitCode.COMPLETE
        if line.strip():
            _show_answer(subject, line.strip(), max_tokens)


def _show_answer(subject: Subject, prompt: str, max_tokens: int) -> None:
    """Print an answer with nothing in it that a terminal would act on or cannot show."""
    given = prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    text = visible(answer(subject, given, max_tokens))
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), flush=True)


def answer(subject: Subject, prompt: str, max_tokens: int) -> str:
    """Return the subject's greedy answer to ``prompt``."""
    (made,) = generate(
        subject.model,
        [subject.chat.prompt_ids(prompt)],
        max_tokens=max_tokens,
        stop_ids=subject.chat.stop_ids(subject.model.config),
    )
    return subject.chat.decode(made.ids)
