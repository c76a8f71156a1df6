"""SHA-256 manifests, and what the download itself says about its files (PV-01)."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from durometer.audit.files import Artefact, ModelFile
from durometer.core.errors import InputError
from durometer.findings import Finding, Report, Severity, found, left_out, passed
from durometer.formats.safetensors import open_regular, shown

__all__ = ["check_manifest", "format_manifest", "read_manifest"]

_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
_MATTERS = re.compile(r"\.(?:safetensors|gguf|bin|pt|pth|py|jinja|json|model)$")


def format_manifest(hashes: Mapping[str, str]) -> str:
    """Return a manifest that ``sha256sum -c`` understands, one file a line."""
    odd = [name for name in hashes if not name.isprintable()]
    if odd:
        raise InputError(f"{shown(odd[0])}: a name that no manifest can hold; rename the file")
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(hashes.items()))


def read_manifest(path: Path) -> dict[str, str]:
    """Return the SHA-256 by file name of a manifest, or of the JSON report of an earlier audit.

    Raises:
        InputError: it is neither.
    """
    with open_regular(path) as file:
        text = file.read(64 << 20).decode("utf-8", "replace")
    if text.lstrip().startswith("{"):
        return dict(Report.from_json(text, shown(path)).inputs.get("files", {}))
    hashes = {}
    for number, line in enumerate(text.splitlines(), 1):
        match = _LINE.fullmatch(line)
        if not match:
            raise InputError(f"{shown(path)}: line {number} is not '<sha256>  <name>'")
        hashes[match[2].removeprefix("./")] = match[1]
    if not hashes:
        raise InputError(f"{shown(path)}: names no files")
    return hashes


def check_manifest(artefact: Artefact, manifest: Path | None) -> Iterator[Finding]:
    """Yield how the files compare with a manifest, and with the names of their cache blobs.

    A manifest that does not exist is written; nothing is verified then.
    """
    yield from _blobs(artefact)
    if manifest is None:
        yield left_out("PV-01", "hashes against a manifest", "no --manifest given")
        return
    if not manifest.exists():
        try:
            manifest.write_text(format_manifest(artefact.hashes()), "utf-8")
        except OSError as error:
            raise InputError(f"{shown(manifest)}: cannot be written ({error.strerror})") from None
        reason = f"{shown(manifest)} did not exist: it was written from the files as they are"
        yield left_out("PV-01", "hashes against a manifest", reason)
        return
    expected, hashes = read_manifest(manifest), artefact.hashes()
    inside = artefact.root.resolve()
    if manifest.resolve().is_relative_to(inside):
        hashes.pop(manifest.resolve().relative_to(inside).as_posix(), None)
    changed = sorted(n for n in hashes.keys() & expected.keys() if hashes[n] != expected[n])
    extra, missing = (
        sorted(hashes.keys() - expected.keys()),
        sorted(expected.keys() - hashes.keys()),
    )
    if not (changed or extra or missing):
        yield passed("PV-01", f"{len(hashes)} files have the hashes of the manifest")
        return
    matters = [name for name in (*changed, *extra, *missing) if _MATTERS.search(name)]
    title = f"{len(changed)} files changed, {len(extra)} added, {len(missing)} missing"
    evidence = {"changed": changed[:50], "added": extra[:50], "missing": missing[:50]}
    yield found(
        "PV-01",
        Severity.HIGH if matters else Severity.LOW,
        f"{title} against the manifest",
        evidence,
        shown(manifest.name),
    )


def _blobs(artefact: Artefact) -> Iterator[Finding]:
    """Compare links into the Hugging Face cache with their targets, which are named by hash."""
    linked = [file for file in artefact.files.values() if file.link]
    wrong = [file.name for file in linked if _named_hash(file) != Path(file.link).name]
    if wrong:
        title = f"{len(wrong)} files of the cache are not what their names say"
        yield found(
            "PV-01",
            Severity.HIGH,
            title,
            {"files": wrong[:20]},
            wrong[0],
            "Delete them and download again.",
        )
    elif linked:
        yield passed("PV-01", f"{len(linked)} files of the cache have the hashes they are named by")


def _named_hash(file: ModelFile) -> str:
    """Return what the Hugging Face cache names a file by: SHA-256, or git's hash of a blob."""
    if len(Path(file.link).name) == 64:
        return file.sha256
    data = file.path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
