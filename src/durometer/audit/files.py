"""What files there are, what each is by its content, and which of them can run code (FF-01 to 04).

Nothing is left out by name, size or type: what is not understood is listed as not examined.
"""

import hashlib
import os
import re
import stat
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from durometer.core.errors import InputError
from durometer.findings import Finding, Severity, failed, found, passed, unsure
from durometer.formats.pickles import (
    PickleFacts,
    ZipFacts,
    npy_pickle_start,
    read_zip,
    walk_file,
)
from durometer.formats.safetensors import open_regular, parse_json_object, shown

__all__ = ["Artefact", "ModelFile", "check_files", "read_artefact"]

MAX_TEXT_BYTES = 64 << 20
"""Largest text file read: a tokenizer of half a million tokens takes 40 MB."""

_MAGIC: tuple[tuple[bytes, str], ...] = (
    (rb"GGUF", "gguf"),
    (rb"PK\x03\x04|PK\x05\x06", "zip"),
    (rb"\x80[\x02-\x05]", "pickle"),
    (rb"\x93NUMPY", "npy"),
    (rb"\x89HDF\r\n\x1a\n", "hdf5"),
    (rb"\x7fELF|MZ|\xcf\xfa\xed\xfe|\xca\xfe\xba\xbe|#!", "program"),
    (rb"version https://git-lfs", "lfs pointer"),
    (rb"\x1f\x8b|\x28\xb5\x2f\xfd|BZh[1-9]|\xfd7zXZ|7z\xbc\xaf|Rar!", "archive"),
    (rb"(?s).{257}ustar", "archive"),
    (rb"(?s).{4}TFL3", "tflite"),
    (rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF....WEBP|%PDF|PAR1|OggS|ID3|(?s:.{4})ftyp", "media"),
    (rb"(?s).{8}\{", "safetensors"),
)
_CAN_RUN = {
    "pickle": "a pickle",
    "zip": "a zip archive with a pickle or code",
    "npy": "a NumPy file of pickled objects",
    "hdf5": "an HDF5 file, whose layers may hold code",
    "program": "a program or script",
    "archive": "a packed archive, which was not opened",
    "python": "Python code",
    "saved model": "a TensorFlow graph, which may hold code",
}
_EXTENSIONS = {
    ".safetensors": {"safetensors"},
    ".gguf": {"gguf"},
    ".json": {"json"},
    ".jinja": {"text", "json"},
    ".txt": {"text", "json"},
    ".md": {"text", "json"},
    ".bin": {"pickle", "zip"},
    ".pt": {"pickle", "zip"},
    ".pth": {"pickle", "zip"},
    ".ckpt": {"pickle", "zip"},
    ".pkl": {"pickle", "zip"},
    ".npy": {"npy"},
    ".npz": {"zip"},
    ".h5": {"hdf5"},
    ".keras": {"zip"},
    ".py": {"text", "python"},
    ".png": {"media"},
    ".jpg": {"media"},
    ".jpeg": {"media"},
    ".gif": {"media"},
    ".pdf": {"media"},
}
_DATA_BY_NAME = {".model": "sentencepiece", ".spm": "sentencepiece", ".onnx": "onnx"}
_CODE_NAMES = (".py", ".pyc", ".so", ".dll", ".dylib", ".exe", ".sh", ".bat", ".ps1", ".ipynb")
_USUAL_HIDDEN = (".gitattributes", ".gitignore", ".cache/huggingface/", ".git/")
_CACHE_LINK = re.compile(r"(?:\.\./)+blobs/([0-9a-f]{40}|[0-9a-f]{64})")
_EDIT_TERMS = re.compile(
    r"abliterat\w*|uncensored|heretic|\bderestrict\w*|mergekit\w*|merge_method|\bunfiltered\b", re.I
)
_SECRETS = re.compile(
    r"\bhf_[A-Za-z0-9]{30,}|\bsk-[A-Za-z0-9_-]{20,}|\bghp_[A-Za-z0-9]{30,}|\bAKIA[A-Z0-9]{16}\b"
    r"|-----BEGIN (?:RSA |EC |OPENSSH )?PRIVATE KEY-----"
)
_HIDDEN_CHARACTERS = re.compile(
    "[\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff\U000e0000-\U000e007f]"
)


@dataclass(slots=True)
class ModelFile:
    """One regular file; ``kind`` is what its content says, ``name`` the path in the folder.

    ``link`` is the target of a link into the Hugging Face cache, else empty.
    """

    name: str
    path: Path
    size: int
    kind: str
    link: str = ""
    hashed: "Future[str] | None" = None

    @property
    def sha256(self) -> str:
        """SHA-256 of the content, in hexadecimal."""
        return self.hashed.result() if self.hashed else _sha256(self.path)


@dataclass
class Artefact:
    """The files of one model; ``faults`` are findings made while walking the folder."""

    root: Path
    files: dict[str, ModelFile] = field(default_factory=dict)
    faults: list[Finding] = field(default_factory=list)

    @cached_property
    def is_adapter(self) -> bool:
        """Whether this is an adapter alone, meant for another model."""
        return (
            "adapter_config.json" in self.files
            and not self.of_kind("gguf")
            and not any(re.fullmatch(r"model.*\.safetensors", name) for name in self.files)
        )

    def of_kind(self, kind: str) -> list[ModelFile]:
        """Return the files of one kind."""
        return [each for each in self.files.values() if each.kind == kind]

    def text(self, name: str) -> str:
        """Return a file's text; InputError if it is too large or not UTF-8."""
        path = self.files[name].path
        with open_regular(path) as file:
            raw = file.read(MAX_TEXT_BYTES + 1)
        if len(raw) > MAX_TEXT_BYTES:
            raise InputError(f"{shown(path)}: over {MAX_TEXT_BYTES} bytes of text")
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{shown(path)}: not UTF-8 (byte {error.start})") from None

    def json(self, name: str) -> dict[str, Any] | None:
        """Return the JSON object of a file, None if there is no such file or it is damaged.

        Damage is reported by ``check_files``; here the file then counts as absent.
        """
        if name not in self.files:
            return None
        try:
            return parse_json_object(self.text(name).encode(), name)
        except InputError:
            return None

    def hashes(self) -> dict[str, str]:
        """Return the SHA-256 of every file by name."""
        return {name: self.files[name].sha256 for name in sorted(self.files)}


def _sha256(path: Path) -> str:
    open_regular(path).close()  # refuses what is no readable, regular file
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_artefact(path: Path, pool: ThreadPoolExecutor | None = None) -> Artefact:
    """Return the files of a folder, or of a GGUF or safetensors file with its shards.

    Args:
        pool: where files are hashed meanwhile.

    Raises:
        InputError: there is nothing at ``path``.
    """
    if not path.exists():
        raise InputError(f"{shown(path)}: no such file or folder; check the path")
    root = path if path.is_dir() else path.parent
    artefact = Artefact(root)
    for entry in _entries(path, artefact):
        _add(artefact, entry)
    if pool is not None:
        for file in artefact.files.values():
            file.hashed = pool.submit(_sha256, file.path)
    return artefact


def _entries(path: Path, artefact: Artefact) -> Iterator[Path]:
    """Yield what lies under ``path``, links not followed; a file brings its shards along."""
    if not path.is_dir():
        shard = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})(\.gguf|\.safetensors)", path.name)
        pattern = rf"{re.escape(shard[1])}-\d{{5}}-of-{shard[2]}{shard[3]}" if shard else None
        yield from sorted(
            each
            for each in path.parent.iterdir()
            if each == path or (pattern and re.fullmatch(pattern, each.name))
        )
        return
    for folder, folders, names in os.walk(path, onerror=lambda error: _unreadable(artefact, error)):
        here = Path(folder)
        links = [name for name in folders if (here / name).is_symlink()]
        folders[:] = sorted(set(folders) - set(links))
        yield from (here / name for name in sorted([*names, *links]))


def _unreadable(artefact: Artefact, error: OSError) -> None:
    artefact.faults.append(
        failed(
            "FF-00", "a folder could not be read", error.strerror or error, shown(error.filename)
        )
    )


def _add(artefact: Artefact, path: Path) -> None:
    """Add one entry to the files, or what is wrong with it to the faults."""
    name = path.relative_to(artefact.root).as_posix()
    link = ""
    try:
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            link = str(path.readlink())
            if problem := _bad_link(artefact.root, path, link):
                artefact.faults.append(_link_finding(name, link, problem))
                return
            mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            artefact.faults.append(_not_regular(name))
            return
        artefact.files[name] = ModelFile(name, path, path.stat().st_size, kind_of(path), link)
    except (OSError, RuntimeError, InputError) as error:
        artefact.faults.append(
            failed("FF-00", "a file could not be read", shown(error), shown(name))
        )


def _bad_link(root: Path, path: Path, link: str) -> str:
    """Return what is wrong with a link; a link into the Hugging Face cache's blobs is right."""
    try:
        target, home = path.resolve(strict=True), root.resolve()
    except (OSError, RuntimeError):
        return "leads nowhere"
    cached = _CACHE_LINK.fullmatch(link)
    in_cache = cached and home.parent.name == "snapshots" and target.parent.name == "blobs"
    if in_cache and target.parent.parent == home.parent.parent:
        return ""
    if not target.is_relative_to(home):
        return "leads out of the folder"
    return "" if target.is_file() else "leads to a folder"


def _link_finding(name: str, link: str, problem: str) -> Finding:
    return found(
        "FF-16",
        Severity.HIGH if "out of" in problem else Severity.MEDIUM,
        f"a link {problem}; what it names was not read",
        {"target": shown(link)},
        shown(name),
        "Replace the link by a copy of the file, or remove it.",
    )


def _not_regular(name: str) -> Finding:
    title = "neither a file nor a folder (a pipe, socket or device); not read"
    return found("FF-16", Severity.HIGH, title, {}, shown(name), "Remove it.")


def kind_of(path: Path) -> str:
    """Return what a file is by its first bytes; the name decides only between harmless kinds."""
    with open_regular(path) as file:
        head = file.read(1 << 16)
    if not head:
        return "empty"
    for pattern, kind in _MAGIC:
        if re.match(pattern, head) and (kind != "safetensors" or _is_header(head)):
            return kind
    if path.name == "saved_model.pb":
        return "saved model"
    if not head.strip(b"\0"):
        return "zero bytes"
    if path.suffix in _DATA_BY_NAME and head[:1] in b"\x08\x0a":
        return _DATA_BY_NAME[path.suffix]
    if _is_old_pickle(path):
        return "pickle"
    if b"\0" in head or not _is_text(head):
        return "unknown"
    if path.suffix == ".py":
        return "python"
    return "json" if head.lstrip()[:1] in (b"{", b"[") and path.suffix != ".jinja" else "text"


def _is_old_pickle(path: Path) -> bool:
    """Say whether a file that may be a pickle by its name is one of protocol 0 or 1, all of it.

    They begin with no mark. Whatever does not end where the file ends is no such file.
    """
    suffix = path.suffix.lower()
    if suffix and "pickle" not in _EXTENSIONS.get(suffix, ()):
        return False
    facts = walk_file(path)
    told = bool(facts.imports or facts.calls)
    return told and facts.stopped and not facts.damage and facts.end == path.stat().st_size


def _is_header(head: bytes) -> bool:
    return int.from_bytes(head[:8], "little") < 1 << 40


def _is_text(head: bytes) -> bool:
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start > len(head) - 4
    return True


# --- checks --------------------------------------------------------------------------------------


def check_files(artefact: Artefact) -> Iterator[Finding]:
    """Yield what the files' kinds, names, pickles and archives show."""
    yield from artefact.faults
    judged = {name: list(_judge(artefact, file)) for name, file in artefact.files.items()}
    for findings in judged.values():
        yield from findings
    for file in artefact.files.values():
        yield from _names(file)
        if file.kind in ("text", "json", "python"):
            yield from _texts(artefact, file)
    everything = [each for findings in judged.values() for each in findings]
    if not any(each.check in ("FF-01", "FF-02", "FF-03") for each in everything):
        yield passed("FF-01", "no file of a kind that runs code when it is loaded")


def _judge(artefact: Artefact, file: ModelFile) -> Iterator[Finding]:
    yield from _extension(file)
    if file.kind in ("pickle", "npy"):
        yield from _pickle_file(artefact, file)
    elif file.kind == "zip":
        yield from _zip_file(artefact, file)
    else:
        yield from _disguised(file)
    if file.kind in ("hdf5", "program", "archive", "python", "saved model") or (
        file.name.endswith(_CODE_NAMES)
    ):
        yield _can_run(artefact, file, _CAN_RUN.get(file.kind, "code by its name"))
    if file.kind in ("unknown", "onnx", "tflite"):
        title = f"content of {file.kind} kind, which was not examined"
        yield unsure("FF-17", Severity.LOW, title, shown(file.name), bytes=file.size)
    if file.kind in ("zero bytes", "lfs pointer"):
        title = f"an unfinished download ({file.kind})"
        yield found(
            "FF-03",
            Severity.MEDIUM,
            title,
            {"bytes": file.size},
            shown(file.name),
            "Download it again.",
        )


def _can_run(artefact: Artefact, file: ModelFile, what: str) -> Finding:
    safe = artefact.of_kind("safetensors") or artefact.of_kind("gguf")
    weights = file.kind in ("pickle", "zip", "hdf5", "saved model")
    severity = Severity.MEDIUM if safe and file.kind != "archive" else Severity.HIGH
    return found(
        "FF-01",
        severity,
        f"{what}: of a kind that can run code when it is loaded or opened",
        {"kind": file.kind, "bytes": file.size, "only_weights": weights and not safe},
        shown(file.name),
        "Use safetensors or GGUF files; convert on an isolated machine, or delete this file.",
    )


def _extension(file: ModelFile) -> Iterator[Finding]:
    expected = _EXTENSIONS.get(Path(file.name).suffix.lower())
    if expected is None or file.kind in expected or file.kind in ("empty", "lfs pointer"):
        return
    code = file.kind in _CAN_RUN
    yield found(
        "FF-04",
        Severity.HIGH if code else Severity.LOW,
        f"the name says {' or '.join(sorted(expected))}, the content is {file.kind}",
        {"name_says": sorted(expected), "content": file.kind},
        shown(file.name),
        "Find out what wrote the file; do not load it under this name.",
    )


def _disguised(file: ModelFile) -> Iterator[Finding]:
    """Look for a pickle or an archive in a file that is something else at first sight."""
    facts = walk_file(file.path)
    if facts.calls or (facts.imports and facts.stopped):
        yield from _pickle_findings(facts, file.name)
        yield _polyglot(file, "a pickle")
    if file.size >= 22 and _ends_as_zip(file):
        yield _polyglot(file, "a zip archive at its end")


def _ends_as_zip(file: ModelFile) -> bool:
    with open_regular(file.path) as stream:
        stream.seek(max(0, file.size - 22 - 65535))
        tail = stream.read()
    at = tail.rfind(b"PK\x05\x06")
    return at >= 0 and at + 22 + int.from_bytes(tail[at + 20 : at + 22], "little") == len(tail)


def _polyglot(file: ModelFile, also: str) -> Finding:
    return found(
        "FF-04",
        Severity.HIGH,
        f"the file reads as {file.kind} and as {also}",
        {"content": file.kind, "also": also},
        shown(file.name),
        "Do not load it; readers would disagree on what it is.",
    )


def _pickle_file(artefact: Artefact, file: ModelFile) -> Iterator[Finding]:
    start = 0
    if file.kind == "npy":
        with open_regular(file.path) as stream:
            start = npy_pickle_start(stream.read(1 << 16))
        if not start:
            return
    yield _can_run(artefact, file, _CAN_RUN[file.kind])
    yield from _pickle_findings(walk_file(file.path, start), file.name)


def _zip_file(artefact: Artefact, file: ModelFile) -> Iterator[Finding]:
    facts = read_zip(file.path)
    if facts.pickles or facts.code or facts.damage or facts.unread:
        yield _can_run(artefact, file, _CAN_RUN["zip"])
    for member, pickled in facts.pickles.items():
        yield from _pickle_findings(pickled, f"{file.name}#{member}")
    yield from _zip_findings(facts, file.name)


def _zip_findings(facts: ZipFacts, name: str) -> Iterator[Finding]:
    if facts.damage:
        title = "the archive is damaged or ambiguous; a loader may still read it"
        yield _damage(title, facts.damage, name)
    for member in facts.code[:20]:
        title = "an archive member is code"
        yield found("FF-01", Severity.HIGH, title, {}, f"{shown(name)}#{member}")
    if facts.unread:
        title = f"{len(facts.unread)} archive members could not be examined"
        yield failed("FF-00", title, ", ".join(facts.unread[:20]), shown(name))


def _damage(title: str, problems: list[str], name: str) -> Finding:
    evidence = {"problems": problems[:20], "count": len(problems)}
    advice = "Download the file again and compare its hash; never load it as it is."
    return found("FF-03", Severity.HIGH, title, evidence, shown(name), advice)


def _pickle_findings(facts: PickleFacts, name: str) -> Iterator[Finding]:
    if facts.unlisted:
        called = [each for each in facts.unlisted if each.called]
        names = sorted({each.name for each in facts.unlisted})
        verb = "calls" if called else "imports"
        first = shown((called or facts.unlisted)[0].name)
        yield found(
            "FF-02",
            Severity.CRITICAL if called else Severity.HIGH,
            f"unpickling {verb} {first}, which is not on the list of harmless names",
            {
                "names": [shown(each) for each in names[:50]],
                "called": [[shown(e.name), e.called, e.position] for e in called[:20]],
                "imported": [[shown(e.name), e.position] for e in facts.unlisted[:20]],
            },
            shown(name),
            "Do not unpickle it. Optimiser states and custom classes are named here as well.",
        )
    if facts.damage:
        yield _damage(
            "the pickle is damaged; what comes first runs all the same", facts.damage, name
        )
    if not facts.unlisted and not facts.damage:
        yield passed(
            "FF-02",
            "the pickle names nothing but what tensors are made of",
            imports=len(facts.imports),
        )


def _names(file: ModelFile) -> Iterator[Finding]:
    hidden = file.name.startswith(".") or "/." in file.name
    if hidden and not file.name.startswith(_USUAL_HIDDEN):
        yield found(
            "FF-17",
            Severity.LOW,
            "a hidden file",
            {"kind": file.kind},
            shown(file.name),
            "Find out what it is for.",
        )
    if not file.name.isascii() or not file.name.isprintable():
        title = "a file name of characters that can look like others"
        evidence = {"name": ascii(file.name)}
        yield found("FF-17", Severity.MEDIUM, title, evidence, shown(file.name))
    if match := _EDIT_TERMS.search(file.name):
        yield _declared_edit(file.name, match[0], "the file's name")


def _declared_edit(name: str, term: str, where: str) -> Finding:
    title = f"{where} says that the model was edited ({shown(term)})"
    return found("FF-15", Severity.INFO, title, {"term": shown(term)}, shown(name))


def _texts(artefact: Artefact, file: ModelFile) -> Iterator[Finding]:
    try:
        text = artefact.text(file.name)
        if file.name.endswith(".json") and text.lstrip()[:1] != "[":
            parse_json_object(text.encode(), shown(file.name))
    except InputError as error:
        if "names the key" in str(error):
            title = "JSON that names a key twice: readers take the one or the other value"
            evidence = {"reason": shown(error)}
            yield found("FF-18", Severity.HIGH, title, evidence, shown(file.name))
        else:
            title = "a file could not be read as what it is"
            yield failed("FF-00", title, shown(error), shown(file.name))
        return
    if match := _SECRETS.search(text):
        key: dict[str, Any] = {"starts_with": match[0][:6], "characters": len(match[0])}
        yield found("FF-14", Severity.LOW, "what looks like a secret key", key, shown(file.name))
    if not file.name.endswith(("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt")):
        if match := _EDIT_TERMS.search(text):
            yield _declared_edit(file.name, match[0], "the text")
        if match := _HIDDEN_CHARACTERS.search(text.removeprefix("\ufeff")):
            place = {"character": f"U+{ord(match[0]):04X}", "position": match.start()}
            title = "invisible or direction-changing characters"
            yield found("FF-06", Severity.LOW, title, place, shown(file.name))
