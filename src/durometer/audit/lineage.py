"""What model card and settings claim about the origin, against what was measured (PV-03 to 05)."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from durometer.audit.files import Artefact
from durometer.core.errors import InputError
from durometer.findings import Finding, Severity, Status, found, left_out, passed
from durometer.formats.safetensors import shown

__all__ = ["Claims", "check_lineage", "read_claims"]

_SIDE = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
_STAMPS = {"transformers_version", "_name_or_path", "torch_dtype", "dtype", "_commit_hash"}


@dataclass(frozen=True)
class Claims:
    """What the model says of itself.

    Attributes:
        bases: names of models that it says it comes from, by the file that says so.
        licence: of the model card.
        commit: revision that the downloader recorded.
        relation: ``finetune``, ``quantized``, ``merge``, ``adapter`` of the card, or empty.
    """

    bases: dict[str, list[str]]
    licence: str = ""
    commit: str = ""
    relation: str = ""


def read_claims(artefact: Artefact, metadata: dict[str, Any] | None = None) -> Claims:
    """Return the claims in the card's header, the settings and a GGUF header's ``metadata``."""
    card = _card(artefact)
    bases = {"README.md": card.get("base_model", [])}
    adapter = (artefact.json("adapter_config.json") or {}).get("base_model_name_or_path")
    config = (artefact.json("config.json") or {}).get("_name_or_path")
    for source, value in (("adapter_config.json", adapter), ("config.json", config)):
        bases[source] = [value] if isinstance(value, str) and value else []
    for key, value in (metadata or {}).items():
        if re.fullmatch(r"general\.base_model\.\d+\.(?:repo_url|name)", key):
            bases.setdefault("GGUF header", []).append(str(value))
    return Claims(
        {source: names for source, names in bases.items() if names},
        " ".join(card.get("license", [])),
        _commit(artefact),
        " ".join(card.get("base_model_relation", [])),
    )


def _card(artefact: Artefact) -> dict[str, list[str]]:
    """Return the flat fields of the card's header; a small part of YAML, read line by line."""
    if "README.md" not in artefact.files:
        return {}
    try:
        text = artefact.text("README.md")
    except InputError:
        return {}
    match = re.match(r"---\r?\n(.*?)\r?\n---", text, re.S)
    fields: dict[str, list[str]] = {}
    key = ""
    for line in match[1].splitlines() if match else ():
        if pair := re.fullmatch(r"([\w-]+):\s*(.*)", line):
            key = pair[1]
            values = [each.strip(" '\"[]") for each in pair[2].split(",")]
            fields[key] = [each for each in values if each]
        elif key and (item := re.fullmatch(r"\s*-\s+(.+)", line)):
            fields.setdefault(key, []).append(item[1].strip(" '\""))
    return fields


def _commit(artefact: Artefact) -> str:
    if artefact.root.parent.name == "snapshots":
        return artefact.root.name
    for name in artefact.files:
        if name.startswith(".cache/huggingface/download/") and name.endswith(".metadata"):
            try:
                return artefact.text(name).split("\n", 1)[0].strip()[:64]
            except InputError:
                continue
    return ""


def check_lineage(
    artefact: Artefact,
    claims: Claims,
    claim: str | None,
    base: Artefact | None,
    forensics: Sequence[Finding],
) -> Iterator[Finding]:
    """Yield how the claims fit each other, the user's ``--claim`` and the measured lineage."""
    if claim:
        yield from _pinned(claims, claim)
    else:
        yield left_out("PV-03", "origin against a claim", "no --claim ORG/NAME@SHA given")
    if base is not None:
        yield _side_files(artefact, base)
    yield _against_weights(claims, forensics)


def _against_weights(claims: Claims, forensics: Sequence[Finding]) -> Finding:
    what = "claimed base against the weights"
    measured = next((each for each in forensics if each.check == "WF-01"), None)
    if measured is None or measured.status in (Status.NOT_EXAMINED, Status.ERROR):
        reason = measured.evidence["reason"] if measured else "the weights were not compared"
        return left_out("PV-05", what, reason)
    if not claims.bases:
        return Finding("PV-05", Status.NOT_APPLICABLE, Severity.INFO, "the files name no base")
    evidence = {"claimed": claims.bases, "measured": measured.title}
    if measured.status is Status.FOUND:
        title = "the files name a base, and the weights do not come from the one that was given"
        return found("PV-05", Severity.MEDIUM, title, evidence, next(iter(claims.bases)))
    title = "nothing measured contradicts the base that the files name"
    return passed("PV-05", title, **evidence)


def _pinned(claims: Claims, claim: str) -> Iterator[Finding]:
    name, _, revision = claim.partition("@")
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", revision):
        title = "the claim names no commit: what it points to can be changed"
        yield found(
            "PV-03", Severity.LOW, title, {"claim": shown(claim)}, "", "Use ORG/NAME@COMMIT."
        )
    recorded = {"commit": claims.commit, "bases": claims.bases}
    if revision and claims.commit and revision != claims.commit:
        title = "the downloader recorded another commit than the one claimed"
        yield found("PV-03", Severity.MEDIUM, title, recorded | {"claim": shown(claim)})
    own = claims.bases.get("config.json", [""])[0]
    if name and "/" in own and own.split("/")[0].lower() != name.split("/")[0].lower():
        title = "config.json names another owner than the claim"
        yield found(
            "PV-03",
            Severity.MEDIUM,
            title,
            {"claim": shown(claim), "config": shown(own)},
            "config.json",
        )
    elif revision and revision == claims.commit:
        yield passed("PV-03", "the recorded commit is the one claimed", **recorded)


def _side_files(artefact: Artefact, base: Artefact) -> Finding:
    differing = []
    for name in _SIDE:
        if name not in artefact.files or name not in base.files:
            continue
        one, other = artefact.json(name), base.json(name)
        if one is None or other is None:
            same = artefact.files[name].sha256 == base.files[name].sha256
        else:
            same = _plain(one) == _plain(other)
        if not same:
            differing.append(name)
    if differing:
        return found(
            "PV-04",
            Severity.INFO,
            f"side files that differ from the base's: {', '.join(differing)}",
            {"files": differing},
        )
    return passed("PV-04", "side files that both have are equal")


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in _STAMPS}
