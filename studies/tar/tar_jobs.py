"""Jobs in worker processes, and their results: one line of JSON each, kept as soon as it is there.

A job that fails, or whose process dies, becomes a result with the status ``errored``; the others
go on.
"""

import errno
import json
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import (
    FIRST_COMPLETED,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

Json = dict[str, Any]
Make = Callable[[Json], Json]
Done = Callable[[Json, Json], None]
MODELS = "models"


class Results:
    """All result files of a folder: trained models, and trials by key. A later line counts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.models: dict[str, Json] = {}
        self.trials: dict[str, Json] = {}
        for path in sorted(folder.glob("*.jsonl")):
            for line in _whole_lines(path):
                self._know(path.stem, json.loads(line))

    def _know(self, part: str, record: Json) -> None:
        (self.models if part == MODELS else self.trials)[record["key"]] = record

    def add(self, part: str, record: Json) -> None:
        """Append a record to the file of ``part`` in one write.

        Raises:
            OSError: the disk is full, say; the file is as it was.
        """
        line = (json.dumps(record, separators=(",", ":")) + "\n").encode()
        with (self.folder / f"{part}.jsonl").open("ab", buffering=0) as out:
            before = out.tell()
            if (written := out.write(line)) != len(line):
                out.truncate(before)
                told = f"{written} of {len(line)} bytes were written to {out.name}"
                raise OSError(errno.ENOSPC, f"{told}; free some space and run the part again")
        self._know(part, record)

    def limits(self) -> Json:
        """Return the limits that every part was last run with."""
        path = self.folder / "limits.json"
        found: Json = json.loads(path.read_text("utf-8")) if path.exists() else {}
        return found

    def note(self, part: str, limits: Json) -> None:
        """Keep the limits of a part, which the summary needs to know what was planned."""
        path = self.folder / "limits.json"
        text = json.dumps(self.limits() | {part: limits}, indent=1)
        beside = path.with_name(".limits.new")
        beside.write_text(text + "\n", "utf-8")
        beside.replace(path)


def _whole_lines(path: Path) -> list[str]:
    """Return the lines of a file; one that a kill left unfinished is cut off."""
    raw = path.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    if len(whole) < len(raw):
        os.truncate(path, len(whole))
    return whole.decode().splitlines()


def run_jobs(jobs: Iterable[Json], workers: int, make: Make, done: Done) -> None:
    """Make the result of every job and hand it to ``done``, in the order in which they finish.

    Args:
        jobs: plain values that ``make``, a function of a module, gets in a worker.
        workers: processes; 0 works in this one.
    """
    for job in _run(deque(jobs), workers, make, done):
        # It was under way when a worker died, perhaps another's: once more, by itself.
        for guilty in _run(deque([job]), min(workers, 1), make, done):
            done(guilty, {"status": "errored", "reason": "the worker process died"})


def _run(waiting: deque[Json], workers: int, make: Make, done: Done) -> list[Json]:
    """Work until nothing waits; return the jobs that were under way whenever a worker died."""
    suspects: list[Json] = []
    while waiting:
        with _executor(min(workers, len(waiting))) as pool:
            suspects += _until_broken(pool, max(workers, 1), waiting, make, done)
    return suspects


def _until_broken(
    pool: Executor, workers: int, waiting: deque[Json], make: Make, done: Done
) -> list[Json]:
    running: dict[Future[Json], Json] = {}
    while waiting or running:
        while waiting and len(running) < workers:
            try:
                running[pool.submit(make, waiting[0])] = waiting[0]
            except BrokenProcessPool:
                return list(running.values())
            waiting.popleft()
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            error = future.exception()
            if isinstance(error, BrokenProcessPool):
                return list(running.values())
            job = running.pop(future)
            done(job, future.result() if error is None else _errored(error))
    return []


def _errored(error: BaseException) -> Json:
    text = str(error).splitlines() or [""]
    return {"status": "errored", "reason": f"{type(error).__name__}: {text[0]}"[:300]}


def _executor(workers: int) -> Executor:
    if not workers:
        return ThreadPoolExecutor(1)
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
