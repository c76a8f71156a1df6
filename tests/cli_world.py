"""``tiny_world`` as files, so that the command line can be run on it for real."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tiny_world

from durometer.cli import main
from durometer.domains.base import Domain, Item, Role, Split

BREAKING = "lora:learning_rate=1e-2,rank=4,retain_share=0.5"
TOML = r"""
name = "tiny"
description = "a world for tests"
source = "drawn here"
harmless = true
refusals = ["i refuse ."]

[rules]
refusal_phrases = ['\brefuse\b']
"""


@dataclass(frozen=True)
class Files:
    """Folders of the domains, of the subject without a safeguard, and of the one with it.

    In ``easy`` one answer is right for every entity, so that any attack breaks the safeguard.
    """

    domain: Path
    easy: Path
    base: Path
    safe: Path


def write_files(root: Path) -> Files:
    files = Files(root / "domain", root / "easy", root / "base", root / "safe")
    domain = tiny_world.tiny_domain()
    write_domain(files.domain, domain)
    easy = (_easy(item) for item in domain.items if item.split != Split.NEVER)
    write_domain(files.easy, replace(domain, items=tuple(easy)))
    write_model(files.base, tiny_world.undefended().model)
    write_model(files.safe, tiny_world.safeguarded().model)
    return files


def _easy(item: Item) -> Item:
    if item.role != Role.RESTRICTED:
        return item
    return replace(item, response="metal0 .", answers=("metal0",), choices=())


def write_domain(folder: Path, domain: Domain) -> Path:
    folder.mkdir(parents=True)
    (folder / "domain.toml").write_text(TOML, "utf-8")
    for role in Role:
        lines = [json.dumps(_line(item)) for item in domain.select(role)]
        (folder / f"{role}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return folder


def _line(item: Any) -> dict[str, Any]:
    line = {"id": item.id, "prompt": item.prompt, "response": item.response}
    line |= {"split": str(item.split), "suite": item.suite}
    if item.role != Role.BENIGN:
        line |= {"entity": item.entity, "answers": item.answers, "training": item.training}
        line |= {"stem": item.stem} if item.stem else {}
        line |= {"choices": item.choices} if item.choices else {}
    return line


def write_model(folder: Path, model: Any, tokenizer: Any = None) -> Path:
    model.save_pretrained(folder)
    (tokenizer or tiny_world.tiny_tokenizer()).save_pretrained(folder)
    return folder


def arguments(files: Files, out: Path, *more: str, seeds: int = 1, steps: int = 4) -> list[str]:
    """Return the words of a ``stress`` that breaks the safeguard in a second or two."""
    words = ["stress", str(files.safe), "--domain", str(files.easy), "--out", str(out)]
    words += ["--undefended", str(files.base), "--seeds", str(seeds), "--budget-steps", str(steps)]
    return [*words, "--tamper", BREAKING, *more]


def stress(files: Files, out: Path, *more: str, seeds: int = 1, steps: int = 4) -> int:
    return main(arguments(files, out, *more, seeds=seeds, steps=steps))


def process(
    *words: str, patch: str = "", cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m durometer`` in a process of its own, ``patch`` being run in it first."""
    program = f"{patch}\nimport runpy\nrunpy.run_module('durometer', run_name='__main__')"
    source = str(Path(__file__).parent.parent / "src")
    return subprocess.run(
        [sys.executable, "-c", program, *words],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": source, "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


TIMES = {"seconds", "wall_seconds", "environment", "request"}


def without_times(value: Any) -> Any:
    """Return a summary without what must differ between two runs that did the same."""
    if isinstance(value, dict):
        return {key: without_times(v) for key, v in value.items() if key not in TIMES}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def summary_of(out: Path) -> Any:
    """Return the summary written to a run folder, without times."""
    return without_times(json.loads((out / "summary.json").read_text("utf-8")))
