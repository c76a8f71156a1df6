"""The override study of arXiv 2409.19476 on a small model, with the control that it lacks.

    python studies/override/run.py [--subject smollm2] [--seeds 5] [--ranks 16] [--threads 2]
    python studies/override/run.py --pages

Every finished cell (way, rank, seed) is a line of results/SUBJECT/cells.jsonl at once; the same
command goes on where it was stopped. Then results/SUBJECT/drift.json and the figures of
docs/override.md are made, which --pages alone does from what is committed.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import override_pages

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
DOMAIN = "capitals:refusal"
LEAST_SEEDS = 5


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--subject", default="smollm2", choices=list(override_pages.SUBJECTS))
    parser.add_argument("--seeds", type=int, default=LEAST_SEEDS)
    parser.add_argument("--ranks", default="16", help="with commas; 16 is the paper's")
    parser.add_argument("--steps", type=int, default=50, help="updates; 50 is the paper's")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--pages", action="store_true", help="make figures from results alone")
    return parser.parse_args(arguments)


def run(args: argparse.Namespace, results: Path, drift: Callable[..., Any]) -> int:
    """Run what is missing and return the exit code of ``drift``."""
    from durometer.drifting import DriftProgress, ranks_of
    from durometer.override.store import RUN

    folder = results / args.subject
    with DriftProgress(f"loading {args.subject}") as progress:
        made = drift(
            args.subject,
            DOMAIN,
            out=folder,
            resume=(folder / RUN).is_file(),
            watcher=progress,
            seeds=args.seeds,
            ranks=ranks_of(args.ranks),
            steps=args.steps,
        )
    return int(made.exit_code())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study, or make its figures; return the exit code."""
    from durometer.console import ErrorLine

    args, code = parsed(arguments), 0
    with ErrorLine() as caught:
        if not args.pages:
            from durometer import drift
            from durometer.commands import set_threads

            set_threads(args.threads)
            code = run(args, RESULTS, drift)
        for path in override_pages.write_figures(RESULTS):
            print(path.relative_to(HERE.parents[1]))
    return code if caught.code is None else caught.code


if __name__ == "__main__":
    raise SystemExit(main())
