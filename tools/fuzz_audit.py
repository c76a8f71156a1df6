"""Fuzz the readers of an audit: pickles, archives, safetensors, GGUF, numbers, templates.

    python tools/fuzz_audit.py --seconds 60 [--target NAME ...] [--seed N] [--corpus DIR]

Files that are right, hostile or were kept before are changed at random, and whatever brings out a
message not seen before is changed further. A case fails if a reader raises anything but an
``InputError``, takes over ``SECONDS`` of processor time or more than ``MEMORY``. Failures and one
small case of every message are kept in ``tests/corpus/audit``, as text, and replayed by the tests.
The exit code is 1 if anything failed.
"""

import argparse
import base64
import contextlib
import io
import json
import random
import re
import resource
import signal
import struct
import sys
import tempfile
import time
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import hostile  # noqa: E402
import hostile_templates  # noqa: E402
import numpy as np  # noqa: E402

from durometer.audit.files import check_files, read_artefact  # noqa: E402
from durometer.audit.forensics import alone  # noqa: E402
from durometer.audit.template import parse_template, static_findings  # noqa: E402
from durometer.audit.tensors import open_tensors  # noqa: E402
from durometer.audit.weights import check_values, check_weights, read_weights  # noqa: E402
from durometer.core.errors import InputError  # noqa: E402
from durometer.findings import Finding  # noqa: E402
from durometer.formats.pickles import PickleFacts, read_zip, walk_stream  # noqa: E402

CORPUS = ROOT / "tests" / "corpus" / "audit"
MEMORY = 96 << 20
"""Most bytes that a reader may take for a file of at most a few kilobytes."""
SECONDS = 5.0
"""Most processor time for one case."""
LARGEST = 4096
WORDS = 6
ADDRESS_SPACE = 8 << 30
Outcome = tuple[str, ...]


# ---- what is fuzzed ------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """One reader.

    Attributes:
        read: reads a case and returns what came out, details in words.
        seeds: files to start from.
    """

    name: str
    read: Callable[[bytes], Outcome]
    seeds: Callable[[], Sequence[bytes]]


def told(facts: PickleFacts) -> Outcome:
    """Return what a walk says of a pickle."""
    calls = {f"unlisted, {each.called or 'not called'}" for each in facts.unlisted}
    # What follows is text of the case.
    damage = {f"damage: {' '.join(each.split()[:WORDS])}" for each in facts.damage}
    ends = "stopped" if facts.stopped else "no end"
    return (ends, *sorted(calls), *sorted(damage))


def read_pickle(data: bytes) -> Outcome:
    """Walk a pickle."""
    return told(walk_stream(io.BytesIO(data), len(data)))


def read_archive(data: bytes) -> Outcome:
    """Read a zip archive."""
    with _folder(data, "a.zip") as folder:
        facts = read_zip(folder / "a.zip")
    inside = {each for pickled in facts.pickles.values() for each in told(pickled)}
    return (
        *sorted(f"damage: {each}" for each in facts.damage),
        *sorted({f"unread: {each.rpartition(' (')[2]}" for each in facts.unread}),
        *sorted(inside),
        *(["code"] if facts.code else []),
    )


@contextlib.contextmanager
def _folder(data: bytes, name: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_bytes(data)
        yield Path(folder)


def worded(findings: Sequence[Finding]) -> Outcome:
    """Return findings as texts, the violated rule among them."""
    return tuple(
        sorted(
            {
                f"{each.check} {each.status.value} {each.severity.label}: {each.title}"
                for each in findings
            }
        )
    )


def in_folder(name: str) -> Callable[[bytes], Outcome]:
    """Return the reader of a folder that holds the case alone, under ``name``."""

    def read(data: bytes) -> Outcome:
        with _folder(data, name) as folder:
            artefact = read_artefact(folder)
            weights = read_weights(artefact)
            return worded(
                [
                    *check_files(artefact),
                    *check_weights(artefact, weights),
                    *check_values(artefact, weights),
                ]
            )

    return read


def numbers(name: str) -> Callable[[bytes], Outcome]:
    """Return the reader of a weight file's numbers, without a base."""

    def read(data: bytes) -> Outcome:
        with _folder(data, name) as folder:
            try:
                return worded(alone(open_tensors(read_artefact(folder))))
            except InputError as error:
                return (f"refused: {str(error).replace(str(folder), '')}",)

    return read


def read_template(data: bytes) -> Outcome:
    """Parse a template and look for hidden constructs."""
    source = data.decode("utf-8", "replace")
    found = worded(list(static_findings(parse_template("t", "default", source))))
    # Names out of the template follow.
    return tuple(" ".join(each.partition(": names ")[0].split()[:WORDS]) for each in found)


def _small(files: Sequence[bytes]) -> list[bytes]:
    return [data for data in files if len(data) <= LARGEST]


def _layers(kind: str) -> bytes:
    """Return a safetensors file with a few matrices of blocks in one dtype."""
    values = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
    raw = {
        "F32": values.tobytes(),
        "F16": values.astype(np.float16).tobytes(),
        "BF16": (values.view(np.uint32) >> 16).astype(np.uint16).tobytes(),
    }[kind]
    size, names = len(raw), ("o_proj", "q_proj")
    header = {
        f"model.layers.0.self_attn.{name}.weight": hostile.entry(
            n * size, (n + 1) * size, kind, (8, 8)
        )
        for n, name in enumerate(names)
    }
    return bytes(hostile.st(header, raw * len(names)))


def _blocks(kind: int, size: int, columns: int = 32) -> bytes:
    """Return a GGUF file with matrices of one block type."""
    infos = [
        ("blk.0.attn_output.weight", (columns, 2), kind, 0),
        ("blk.0.ffn_down.weight", (columns, 2), kind, (2 * size + 31) // 32 * 32),
    ]
    return bytes(
        hostile.gguf(infos=infos, data=(b"\x11\x22" * size).ljust(2 * size + 32, b"\0") * 2)
    )


def _safetensors() -> list[bytes]:
    valid = [hostile.st({}), hostile.st({"a": hostile.entry()})]
    return _small([*valid, *map(_layers, ("F32", "F16", "BF16")), *hostile.SAFETENSORS.values()])


def _gguf() -> list[bytes]:
    blocks = [_blocks(2, 18), _blocks(8, 34), _blocks(0, 128), _blocks(1, 64)]
    return _small([hostile.gguf(), *blocks, *hostile.GGUFS.values()])


def _templates() -> list[bytes]:
    texts = [
        *hostile_templates.BENIGN.values(),
        *(t for _, _, t in hostile_templates.HOSTILE.values()),
    ]
    return _small([text.encode() for text in texts])


TARGETS = {
    target.name: target
    for target in (
        Target("pickle", read_pickle, lambda: _small([*hostile.PICKLES.values()])),
        Target("archive", read_archive, lambda: _small([*hostile.ZIPS.values()])),
        Target("safetensors", in_folder("model.safetensors"), _safetensors),
        Target("gguf", in_folder("model.gguf"), _gguf),
        Target("safetensors-numbers", numbers("model.safetensors"), _safetensors),
        Target("gguf-numbers", numbers("model.gguf"), _gguf),
        Target("file", in_folder("file"), lambda: [*_safetensors(), *_gguf(), hostile.call()]),
        Target("template", read_template, _templates),
    )
}


# ---- one case ------------------------------------------------------------------------------


class TooSlowError(Exception):
    """A case took over ``SECONDS``."""


def _stop(number: int, frame: FrameType | None) -> None:
    raise TooSlowError(f"over {SECONDS:g} s")


class TooLargeError(Exception):
    """A case took over ``MEMORY``."""


def bounded(target: Target, data: bytes) -> Outcome:
    """Return the outcome of one case.

    Raises:
        TooSlowError, TooLargeError: beyond the bounds; anything else is the reader's own failure.
    """
    before = signal.signal(signal.SIGPROF, _stop)
    tracemalloc.start()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        found = target.read(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        tracemalloc.stop()
        signal.signal(signal.SIGPROF, before)
    if peak > MEMORY:
        raise TooLargeError(f"{peak >> 20} MiB")
    return found


# From the first quote or bracket to the last: what stands in between comes from the case.
_NAMED = re.compile(
    r"'.*'|\".*\"|\(.*\)|0x[0-9a-f]+|(?<![A-Z]-)(?<!\d)\d+"
    r"|(?<=header says ).*|(?<=calls ).*|(?<=imports ).*|(?<=attribute ).*",
    re.DOTALL,
)
_TEXT_OF_THE_CASE = re.compile(r"b?['\"\\(].*|[^ -~].*", re.DOTALL)


def outline(found: Outcome) -> Outcome:
    """Return an outcome without numbers, names and texts out of the case: its messages."""
    plain = (_TEXT_OF_THE_CASE.sub("#", _NAMED.sub("#", each)) for each in found)
    return tuple(sorted({each[:100] for each in plain}))


def classes(found: Outcome) -> Outcome:
    """Return what does not depend on how messages are worded."""
    return tuple(sorted({each.partition(":")[0] for each in found}))


# What a reader may fail with; anything else ends the fuzzer, with its traceback.
FAILURES = (
    TooSlowError,
    TooLargeError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    BufferError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    NameError,
    OSError,
    RuntimeError,
    StopIteration,
    SyntaxError,
    SystemError,
    TypeError,
    ValueError,
    Warning,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
)


def tried(target: Target, data: bytes) -> tuple[Outcome, str]:
    """Return the class of a case's outcome and, if it failed, how."""
    try:
        return outline(bounded(target, data)), ""
    except FAILURES as error:
        name = type(error).__name__
        return (f"FAILED {name}",), f"{name}: {error}"


# ---- changing cases ------------------------------------------------------------------------

_ODD = (0, 1, 127, 128, 255, 256, 65535, 65536, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 62,
        (1 << 63) - 1, 1 << 63, (1 << 64) - 1)  # fmt: skip
_WORDS = (
    b"{{", b"}}", b"{%", b"%}", b"(", b")", b"[", b"]", b'"', b"'", b",", b":", b"{", b"}", b"null",
    b"-1", b"1e999", b"NaN", b"\\u0000", b"\\ud800", b"F64", b"I8", b"BOOL", b"~", b"|attr(", b"|",
    b"range(", b"**", b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"cos\nsystem\n", b"\x93", b"R",
    b"\x81", b"b", b".", b"\x85", b"}", b"(", b"t", b"u", b"\x94", b"h\x00", b"GGUF",
)  # fmt: skip


def changed(data: bytes, pool: Sequence[bytes], rng: random.Random) -> bytes:
    """Return ``data`` with one to four random changes, no longer than ``LARGEST``."""
    new = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        place = rng.randrange(len(new) + 1)
        size = rng.choice((1, 1, 2, 4, 8, 32))
        kind = rng.randrange(7)
        if kind == 0:
            new[place : place + size] = rng.randbytes(size)
        elif kind == 1:
            del new[place : place + size]
        elif kind == 2:
            width = rng.choice((1, 2, 4, 8))
            value = rng.choice(_ODD) % (1 << 8 * width)
            new[place : place + width] = value.to_bytes(width, "little")
        elif kind == 3:
            new[place : place + rng.choice((0, 1, 2))] = rng.choice(_WORDS)
        elif kind == 4 and place < len(new):
            new[place] ^= 1 << rng.randrange(8)
        elif kind == 5:
            new[place:place] = new[place : place + size] * rng.choice((1, 2, 8))
        else:
            other = rng.choice(pool)
            start = rng.randrange(len(other) + 1)
            new[place : place + size] = other[start : start + rng.choice((size, LARGEST))]
    return bytes(new[:LARGEST])


def smaller(target: Target, data: bytes, message: str, seconds: float) -> bytes:
    """Return a shorter case that still brings out ``message``, as far as ``seconds`` reach."""
    end, step = time.process_time() + seconds, max(len(data) // 2, 1)
    while step and time.process_time() < end:
        place = 0
        while place < len(data) and time.process_time() < end:
            shorter = data[:place] + data[place + step :]
            if message in tried(target, shorter)[0]:
                data = shorter
            else:
                place += step
        step //= 2
    return data


# ---- a run ---------------------------------------------------------------------------------


@dataclass
class Kept:
    """The cases of one target: the shortest seen for each message."""

    target: Target
    cases: dict[str, bytes] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    tries: int = 0

    def take(self, data: bytes) -> None:
        """Try one case; keep it for the messages that are new, or had twice as long a case."""
        found, failure = tried(self.target, data)
        self.tries += 1
        if failure and found[0] not in self.cases:
            self.failures.append(failure)
        for message in found:
            if message not in self.cases or len(data) < len(self.cases[message]) // 2:
                self.cases[message] = data


def corpus(name: str, folder: Path = CORPUS) -> list[dict[str, Any]]:
    """Return the kept cases of a target: ``data`` as bytes, classes of the ``outcome``."""
    path = folder / f"{name}.jsonl"
    if not path.is_file():
        return []
    lines = map(json.loads, path.read_text("utf-8").splitlines())
    return [line | {"data": base64.b85decode(line["data"])} for line in lines]


def fuzz(target: Target, seconds: float, rng: random.Random, folder: Path) -> Kept:
    """Fuzz one target for ``seconds`` of processor time and keep what it found."""
    kept = Kept(target)
    end = time.process_time() + seconds
    for data in (*(case["data"] for case in corpus(target.name, folder)), *target.seeds()):
        kept.take(data)
    while time.process_time() < end:
        pool = list(kept.cases.values())
        kept.take(changed(rng.choice(pool), pool, rng))
    return kept


def write(kept: Kept, folder: Path, seconds: float) -> int:
    """Write the kept cases, made shorter within ``seconds``; return how many there are."""
    folder.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    lines = set()
    for message, data in sorted(kept.cases.items()):
        if message in seen:
            continue
        short = smaller(kept.target, data, message, seconds / len(kept.cases))
        outcome = tried(kept.target, short)[0]
        seen.update(outcome)
        text = base64.b85encode(short).decode()
        lines.add(json.dumps({"outcome": list(classes(outcome)), "data": text}))
    (folder / f"{kept.target.name}.jsonl").write_text("\n".join(sorted(lines)) + "\n", "utf-8")
    return len(lines)


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="processor time in all")
    parser.add_argument("--target", nargs="*", choices=sorted(TARGETS), default=list(TARGETS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--corpus", type=Path, default=CORPUS, help="folder of the kept cases")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    share, failed = options.seconds / len(options.target), False
    for name in options.target:
        rng = random.Random(f"{options.seed}/{name}")
        kept = fuzz(TARGETS[name], share * 0.75, rng, options.corpus)
        count = write(kept, options.corpus, share * 0.25)
        failed = failed or bool(kept.failures)
        counts = f"{kept.tries} cases, {len(kept.cases)} messages, {count} kept"
        print(f"{name}: {counts}", *kept.failures, sep="\n  ", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
