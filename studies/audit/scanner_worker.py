"""Runs one scanner's own command line on many folders; started with that scanner's Python.

Reads a list of jobs from standard input, ``{"code", "argv", "folder"}``, and writes one JSON line
a job: its exit code (null where it was stopped) and what it printed. Modules named as arguments are
imported once; every job then is a process of its own with a limit on time and memory.
"""

import importlib
import json
import os
import resource
import signal
import sys
import tempfile
from typing import Any

SECONDS, MEMORY = 60, 4 << 30


def run(job: dict[str, Any], output: int) -> None:
    """Run one job in this process, which ends with its exit code."""
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(job["folder"])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.alarm(SECONDS)
    sys.argv = job["argv"]
    code = 1
    try:
        exec(job["code"], {"__name__": "job"})
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException as error:
        print(f"Traceback: {type(error).__name__}: {error}")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Run all jobs."""
    for name in sys.argv[1:]:
        importlib.import_module(name)
    for job in json.load(sys.stdin):
        with tempfile.TemporaryFile() as output:
            child = os.fork()
            if child == 0:
                run(job, output.fileno())
            status = os.waitpid(child, 0)[1]
            code = os.waitstatus_to_exitcode(status)
            output.seek(0)
            said = output.read(1 << 16).decode("utf-8", "replace")
        print(json.dumps({"code": None if code < 0 else code, "output": said}), flush=True)


if __name__ == "__main__":
    main()
