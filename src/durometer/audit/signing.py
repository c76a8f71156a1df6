"""OpenSSF model signatures: who signed, what, and what the signature leaves out (PV-02).

The statement inside a bundle is read here and compared with the files; whether it was signed by
whom the user expects is decided by the ``model-signing`` package, an optional extra.
"""

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from durometer.audit.files import Artefact
from durometer.core.errors import InputError
from durometer.findings import Finding, Severity, found, left_out, passed, unsure
from durometer.formats.safetensors import open_regular, parse_json_object, shown

__all__ = ["check_signature", "parse_signature"]

_PARTS = re.compile(r":(?=(?:key|certificate|identity|issuer|trust)=)")
_NAMES = ("model.sig", "model.sigstore", "model.sigstore.json")


def parse_signature(text: str) -> tuple[Path, dict[str, str]]:
    """Return the bundle and what is expected of it.

    ``model.sig:key=signer.pub``, ``model.sig:certificate=root.pem`` or
    ``model.sig:identity=NAME,issuer=URL,trust=FILE``.
    """
    path, *rest = _PARTS.split(text, maxsplit=1)
    pairs = re.split(r",(?=(?:key|certificate|identity|issuer|trust)=)", rest[0]) if rest else []
    return Path(path), dict(pair.split("=", 1) for pair in pairs)


def check_signature(artefact: Artefact, signature: str | None) -> Iterator[Finding]:
    """Yield what the signature says and leaves out, and whether it is the expected signer's.

    Raises:
        InputError: the bundle cannot be read.
    """
    if signature is None:
        bundle = next((name for name in _NAMES if name in artefact.files), None)
        if bundle is None:
            yield left_out("PV-02", "signature", "no signature comes with the model")
            return
        yield left_out("PV-02", "signer", f"{bundle} is there, but --signature names no signer")
        signature = str(artefact.files[bundle].path)
    path, expected = parse_signature(signature)
    statement = _statement(path)
    resources, ignored, method = _contents(path, statement)
    yield from _coverage(artefact, path, resources, ignored, method)
    if expected:
        yield _verified(artefact, path, expected)


def _statement(path: Path) -> dict[str, Any]:
    with open_regular(path) as file:
        bundle = parse_json_object(file.read(64 << 20), shown(path))
    try:
        payload = base64.b64decode(bundle["dsseEnvelope"]["payload"], validate=True)
        return parse_json_object(payload, f"{shown(path)}: the statement")
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{shown(path)}: not a model-signing bundle") from None


def _contents(path: Path, statement: dict[str, Any]) -> tuple[dict[str, str], list[str], str]:
    """Return digests by name, the ignored paths and the hashing method."""
    try:
        predicate = statement["predicate"]
        how = predicate["serialization"]
        resources = {str(each["name"]): str(each["digest"]) for each in predicate["resources"]}
        algorithms = {str(each.get("algorithm")) for each in predicate["resources"]}
        ignored = [str(each) for each in how.get("ignore_paths", [])]
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"{shown(path)}: the statement lists no files") from None
    plain = algorithms <= {"sha256"} and how.get("method") == "files"
    return resources, ignored, "files" if plain else str(how.get("method"))


def _coverage(
    artefact: Artefact, path: Path, resources: dict[str, str], ignored: list[str], method: str
) -> Iterator[Finding]:
    if method != "files":
        title = f"the signature hashes by {shown(method)}; its files were not compared one by one"
        yield unsure("PV-02", Severity.LOW, title, shown(path.name))
        return
    hashes = artefact.hashes()
    own = {name for name, file in artefact.files.items() if file.path.resolve() == path.resolve()}
    differing = sorted(n for n, digest in resources.items() if hashes.get(n) != digest)
    outside = sorted(hashes.keys() - resources.keys() - own)
    if differing:
        title = f"{len(differing)} files are not those that the signature lists"
        evidence = {"files": [shown(name) for name in differing[:50]]}
        yield found(
            "PV-02", Severity.CRITICAL, title, evidence, shown(path.name), "Do not load it."
        )
    code = [
        name for name in outside if re.search(r"\.(?:py|bin|pt|safetensors|gguf|jinja|json)$", name)
    ]
    if outside or ignored:
        title = f"the signature leaves out {len(outside)} files and ignores {len(ignored)} paths"
        evidence = {
            "files": [shown(n) for n in outside[:50]],
            "ignores": [shown(n) for n in ignored],
        }
        severity = Severity.MEDIUM if code else Severity.INFO
        yield found("PV-02", severity, title, evidence, shown(path.name))


def _verified(artefact: Artefact, path: Path, expected: dict[str, str]) -> Finding:
    """Return whether the bundle is signed by whom the user expects; InputError without the key."""
    who = ", ".join(f"{key} {shown(value)}" for key, value in expected.items())
    for key in ("key", "certificate", "trust"):
        if key in expected:
            open_regular(Path(expected[key])).close()
    if "identity" in expected and "trust" not in expected:
        reason = "an audit uses no network: name the Sigstore trust configuration as trust=FILE"
        return left_out("PV-02", f"signer ({who})", reason)
    try:
        from model_signing import verifying  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        reason = f"pip install 'durometer[signing]' ({shown(error)})"
        return left_out("PV-02", f"signer ({who})", reason)
    from cryptography.exceptions import (  # type: ignore[import-not-found, unused-ignore]
        InvalidSignature,
    )
    from sigstore.errors import Error as SigstoreError  # type: ignore[import-not-found, unused-ignore]

    try:
        config = _configured(verifying.Config(), expected)
        config.verify(artefact.root, path)
    except (ValueError, InvalidSignature, SigstoreError, OSError, KeyError, TypeError) as error:
        title = f"the signature is not one of this model by {who}"
        return found(
            "PV-02",
            Severity.CRITICAL,
            title,
            {"reason": shown(error) or type(error).__name__},
            shown(path.name),
            "Do not load it.",
        )
    return passed(
        "PV-02", f"signed by {who}; see what it leaves out", signature=json.dumps(expected)
    )


def _configured(config: Any, expected: dict[str, str]) -> Any:
    if "key" in expected:
        return config.use_elliptic_key_verifier(public_key=Path(expected["key"]))
    if "certificate" in expected:
        return config.use_certificate_verifier(certificate_chain=[Path(expected["certificate"])])
    return config.use_sigstore_verifier(
        identity=expected["identity"],
        oidc_issuer=expected.get("issuer", ""),
        trust_config=Path(expected["trust"]),
    )
