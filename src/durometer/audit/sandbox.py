"""The child process in which templates are rendered and tokenizers are tried."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from durometer.core.errors import InputError
from durometer.formats.safetensors import shown

__all__ = ["ChildResult", "run_child"]

_CHILD = Path(__file__).with_name("template_child.py")


@dataclass(frozen=True, slots=True)
class ChildResult:
    """What the child answered: one object a case; fewer if it was ended, as ``failure`` says."""

    results: list[dict[str, Any]]
    failure: str


def run_child(job: dict[str, Any], *, wall_seconds: float = 30.0) -> ChildResult:
    """Return the child's answers to ``job``; it has no environment, no files and little memory.

    Raises:
        InputError: the job cannot be written as JSON text (lone surrogates).
    """
    try:
        text = json.dumps(job).encode()
    except (ValueError, RecursionError) as error:
        raise InputError(f"a template or tokenizer cannot be passed on: {error}") from None
    # Isolated: neither the environment nor the working folder says what is imported.
    command = [sys.executable, "-I", "-X", "utf8", str(_CHILD)]
    failure = ""
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, timeout=wall_seconds, env={}, check=False
        )
        output = done.stdout
        if done.returncode:
            last = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
            failure = shown(last) or f"ended by signal or with status {done.returncode}"
    except subprocess.TimeoutExpired as expired:
        output, failure = expired.stdout or b"", f"took over {wall_seconds:g} s"
    except OSError as error:
        raise InputError(f"no child process could be started: {error}") from None
    results = []
    for line in output.splitlines():
        try:
            results.append(json.loads(line))
        except ValueError:
            failure = failure or "answered in part"
    if results and "failure" in results[-1]:
        failure = results.pop()["failure"]
    return ChildResult(results, failure)
