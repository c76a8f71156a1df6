"""Run as a script, in a process of its own: renders templates and tries tokenizers under limits.

Nothing of durometer is imported here. One JSON job on stdin, one line of JSON a case on stdout.
The environment is that of transformers (utils/chat_template_utils.py): jinja2's immutable sandbox.
"""

import json
import signal
import sys
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

CASE_SECONDS = 2.0
"""Processor time for one case: on a busy machine nothing harmless is taken for a bomb."""
MEMORY_BYTES = {"render": 256 << 20, "tokenize": 3 << 30}
CPU_SECONDS = 20
MAX_TEXT = 1 << 20


class TookTooLongError(BaseException):
    """A case took over its seconds; no template can catch it."""


def limit(task: str) -> None:
    """Take away memory, time, files and processes, where the system can."""
    try:
        import resource
    except ImportError:
        return
    statm = Path("/proc/self/statm")
    pages = int(statm.read_text().split()[0]) if statm.exists() else 0
    used = pages * resource.getpagesize()
    limits = {
        "RLIMIT_AS": used + MEMORY_BYTES[task],
        "RLIMIT_CPU": CPU_SECONDS,
        "RLIMIT_FSIZE": 0,
        "RLIMIT_CORE": 0,
    }
    if task == "render":
        limits["RLIMIT_NOFILE"] = 3  # nothing can be opened, no socket either
    for name, value in limits.items():
        with suppress(OSError, ValueError):  # not every system has every limit
            resource.setrlimit(getattr(resource, name), (value, value))


def answer(value: dict[str, Any]) -> None:
    """Write one line of the answer."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def _too_long(number: int, frame: FrameType | None) -> None:
    raise TookTooLongError


def environment() -> Any:
    """Return the sandbox, with the functions and tags that transformers adds."""
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **_: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    return made


def render(job: dict[str, Any]) -> None:
    """Render the template with every case."""
    made = environment()
    with suppress(ZeroDivisionError):
        # Imports now what jinja2 needs for texts and errors: nothing can be opened later.
        made.from_string(r"{{ '\n\u00e9' ~ [1] | tojson ~ 1 // 0 }}").render()
    limit("render")
    template = made.from_string(job["template"])
    for case in job["cases"]:
        day = datetime.fromisoformat(case.get("date", "2025-06-15"))
        made.globals["strftime_now"] = day.strftime
        signal.setitimer(signal.ITIMER_PROF, CASE_SECONDS)
        result = _rendered(template, case)
        signal.setitimer(signal.ITIMER_PROF, 0)
        answer(result)
        if result.get("error") == "time":
            return  # the others would take as long


def _rendered(template: Any, case: dict[str, Any]) -> dict[str, Any]:
    from jinja2.exceptions import SecurityError, TemplateError

    try:
        text = template.render(**case["variables"])
    except TookTooLongError:
        return {"error": "time", "message": f"over {CASE_SECONDS} s"}
    except SecurityError as error:
        return {"error": "security", "message": str(error)[:500]}
    except TemplateError as error:
        return {"error": "raised", "message": str(error)[:500]}
    except (MemoryError, OverflowError) as error:
        return {"error": "memory", "message": str(error)[:500]}
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, OSError) as error:
        return {"error": "failed", "message": f"{type(error).__name__}: {error}"[:500]}
    except RecursionError:
        return {"error": "memory", "message": "recursion"}
    if len(text) > MAX_TEXT:
        return {"error": "memory", "message": f"{len(text)} characters"}
    return {"text": text}


def tokenize(job: dict[str, Any]) -> None:
    """Encode and decode every text."""
    from tokenizers import Tokenizer

    limit("tokenize")
    tokenizer = Tokenizer.from_str(job["tokenizer"])
    unknown = tokenizer.token_to_id("<unk>")
    for text in job["texts"]:
        encoded = tokenizer.encode(text, add_special_tokens=False)
        back = tokenizer.decode(encoded.ids, skip_special_tokens=False)
        lost = unknown is not None and unknown in encoded.ids
        answer({"count": len(encoded.ids), "text": back[:MAX_TEXT], "unknown": lost})


def main() -> int:
    """Answer the job on stdin; what goes wrong is the last line of the answer."""
    job = json.load(sys.stdin)
    signal.signal(signal.SIGPROF, _too_long)
    signal.setitimer(signal.ITIMER_PROF, CASE_SECONDS * 4)
    try:
        {"render": render, "tokenize": tokenize}[job["task"]](job)
    except TookTooLongError:
        answer({"failure": "took too long to be read"})
    except MemoryError:
        answer({"failure": "took too much memory"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
