"""Headers, shards, declarations and values of the weight files, without a base (FF-05 to 13)."""

import math
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from durometer.audit.files import Artefact, ModelFile
from durometer.core.errors import InputError
from durometer.findings import Finding, Severity, found, passed, unsure
from durometer.formats.gguf import GGML_TYPES, GgufArray, GgufHeader, check_gguf
from durometer.formats.safetensors import (
    TensorEntry,
    open_regular,
    read_header,
    read_metadata,
    shown,
)

__all__ = ["Weights", "check_values", "check_weights", "read_weights"]

_PIECE = 1 << 24
_SUSPICIOUS = re.compile(
    r"https?://(?!huggingface\.co/|hf\.co/|github\.com/|arxiv\.org/)\S+|\b(?:eval|exec|__import__|"
    r"subprocess|os\.system|base64\.b64decode)\s*\(|[\u200b-\u200f\u202a-\u202e\u2066-\u2069]"
)
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block|layer)\.(\d+)\.")


@dataclass
class Weights:
    """The headers that were read: tensors of safetensors files and headers of GGUF files, by file.

    ``faults`` are findings about those that were refused.
    """

    safetensors: dict[str, dict[str, TensorEntry]] = field(default_factory=dict)
    gguf: dict[str, GgufHeader] = field(default_factory=dict)
    faults: list[Finding] = field(default_factory=list)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of the safetensors files, by name."""
        return {n: e.shape for entries in self.safetensors.values() for n, e in entries.items()}

    @property
    def tensor_count(self) -> int:
        """Number of tensors in all files."""
        return len(self.shapes) + sum(each.tensor_count for each in self.gguf.values())


def read_weights(artefact: Artefact) -> Weights:
    """Return the headers of all weight files; those that break the format become faults."""
    weights = Weights()
    for file in artefact.files.values():
        named = file.name.lower().endswith((".safetensors", ".gguf"))
        if file.kind not in ("safetensors", "gguf") and not named:
            continue
        is_gguf = file.kind == "gguf" or file.name.lower().endswith(".gguf")
        try:
            if is_gguf and file.kind != "safetensors":
                weights.gguf[file.name] = check_gguf(file.path)
            else:
                weights.safetensors[file.name] = read_header(file.path)
        except InputError as error:
            weights.faults.append(_refused("FF-09" if is_gguf else "FF-05", file, error))
    return weights


def _refused(check: str, file: ModelFile, error: InputError) -> Finding:
    reason = str(error).removeprefix(f"{shown(file.path)}: ")
    return found(
        check,
        Severity.HIGH,
        f"the file breaks its format: {reason}",
        {"violation": reason, "bytes": file.size},
        shown(file.name),
        "Do not load it: readers could see different models, or fail inside compiled code.",
    )


def check_weights(artefact: Artefact, weights: Weights) -> Iterator[Finding]:
    """Yield what headers, indexes and declarations show; tensor data is not read."""
    yield from weights.faults
    for check, headers in (("FF-05", weights.safetensors), ("FF-09", weights.gguf)):
        if headers:
            title = f"{len(headers)} headers keep to the format, in every field and byte range"
            yield passed(check, title)
    for name in weights.safetensors:
        yield from _safetensors_extras(artefact.files[name], weights.safetensors[name])
    for name, header in weights.gguf.items():
        yield from _strings(name, header.metadata.items())
        yield from _declared_gguf(name, header)
    yield from _split_gguf(weights)
    yield from _shards(artefact, weights)
    yield from _parallel(artefact, weights)
    yield from _declared_config(artefact, weights)


def _safetensors_extras(file: ModelFile, entries: dict[str, TensorEntry]) -> Iterator[Finding]:
    yield from _strings(file.name, read_metadata(file.path).items())
    start = min((entry.start for entry in entries.values()), default=file.size)
    with open_regular(file.path) as stream:
        raw = stream.read(start)
    padding = len(raw) - len(raw.rstrip(b" \n\r\t"))
    if padding > 4096:
        title = f"{padding} bytes of padding in the header"
        yield found("FF-05", Severity.LOW, title, {"padding": padding}, shown(file.name))
    odd = [name for name in entries if not re.fullmatch(r"[\x21-\x7e]+", name)]
    if odd:
        title = "tensor names with characters that can look like others"
        evidence = {"names": [ascii(name) for name in odd[:10]], "count": len(odd)}
        yield found("FF-05", Severity.HIGH, title, evidence, shown(file.name))


def _strings(name: str, items: Iterable[tuple[str, Any]]) -> Iterator[Finding]:
    for key, value in items:
        if not isinstance(value, str) or key.startswith("tokenizer.chat_template"):
            continue
        match = None if key.endswith((".url", ".repo_url")) else _SUSPICIOUS.search(value)
        if match or len(value) > 65536:
            snippet = match[0][:80] if match else f"{len(value)} characters"
            yield found(
                "FF-06",
                Severity.LOW,
                "metadata holds a web address, code, invisible characters or a long text",
                {"key": shown(key), "snippet": ascii(snippet)[1:-1]},
                f"{shown(name)}#{shown(key)}",
            )


# --- shards and parallel sets --------------------------------------------------------------------


def _shards(artefact: Artefact, weights: Weights) -> Iterator[Finding]:
    for name in artefact.files:
        if name.endswith(".safetensors.index.json"):
            yield from _index(artefact, weights, name)
    homes: dict[str, list[str]] = defaultdict(list)
    for name, entries in weights.safetensors.items():
        for tensor in entries:
            homes[tensor].append(name)
    shadowed = {tensor: files for tensor, files in homes.items() if len(files) > 1}
    if shadowed:
        yield from _shadowed(artefact, weights, shadowed)


def _index(artefact: Artefact, weights: Weights, name: str) -> Iterator[Finding]:
    values = artefact.json(name) or {}
    mapping = values.get("weight_map")
    if not isinstance(mapping, dict) or not all(isinstance(v, str) for v in mapping.values()):
        yield _fault("FF-07", Severity.HIGH, "the index names no shards", {}, name)
        return
    folder = name.rpartition("/")[0]
    shards = {s: f"{folder}/{s}".lstrip("/") for s in sorted(set(mapping.values()))}
    outside = [s for s in shards if "/" in s or "\\" in s or ":" in s]
    missing = [s for s, path in shards.items() if path not in artefact.files]
    if outside or missing:
        title = "the index names shards that are missing or lie elsewhere"
        evidence = {"missing": [shown(s) for s in missing[:20]], "outside": outside[:20]}
        yield _fault("FF-07", Severity.HIGH, title, evidence, name)
    homes = {t: s for s, path in shards.items() for t in weights.safetensors.get(path, ())}
    unread = any(path not in weights.safetensors for path in shards.values())
    wrong = [] if unread else sorted(t for t in mapping if homes.get(t) != mapping[t])
    orphans = sorted(homes.keys() - mapping.keys())
    if wrong or orphans:
        title = "index and shards disagree on where tensors are"
        evidence = {"not_in_their_shard": wrong[:20], "not_in_the_index": orphans[:20]}
        yield _fault("FF-07", Severity.HIGH, title, evidence, name)
    total = (values.get("metadata") or {}).get("total_size")
    real = sum(
        e.byte_count for p in shards.values() for e in weights.safetensors.get(p, {}).values()
    )
    if isinstance(total, int) and total != real and not unread:
        title = "the index states a wrong total size"
        yield _fault("FF-07", Severity.LOW, title, {"stated": total, "found": real}, name)


def _fault(
    check: str, severity: Severity, title: str, evidence: dict[str, Any], at: str
) -> Finding:
    return found(check, severity, title, evidence, shown(at))


def _shadowed(
    artefact: Artefact, weights: Weights, shadowed: dict[str, list[str]]
) -> Iterator[Finding]:
    """Compare tensors that several files hold: byte for byte, or as not comparable."""
    different = []
    for tensor, names in shadowed.items():
        entries = [weights.safetensors[name][tensor] for name in names]
        files = [artefact.files[name] for name in names]
        if any(
            not same_bytes(files[0], entries[0], f, e) for f, e in zip(files, entries, strict=True)
        ):
            different.append(tensor)
    title = f"{len(shadowed)} tensors are in several files, {len(different)} with other values"
    severity = Severity.HIGH if different else Severity.LOW
    evidence = {
        "files": sorted({n for names in shadowed.values() for n in names})[:20],
        "differing": [shown(each) for each in sorted(different)[:20]],
    }
    yield found(
        "FF-08",
        severity,
        title,
        evidence,
        "",
        "The loader decides which of them runs: keep one set.",
    )


def same_bytes(one: ModelFile, a: TensorEntry, other: ModelFile, b: TensorEntry) -> bool:
    """Say whether two tensors are equal byte for byte."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    with open_regular(one.path) as first, open_regular(other.path) as second:
        first.seek(a.start)
        second.seek(b.start)
        return all(first.read(size) == second.read(size) for size in _sizes(a.byte_count))


def _sizes(total: int) -> Iterator[int]:
    for at in range(0, total, _PIECE):
        yield min(_PIECE, total - at)


def _parallel(artefact: Artefact, weights: Weights) -> Iterator[Finding]:
    sets = {"safetensors": sorted(weights.safetensors), "gguf": sorted(weights.gguf)}
    carriers = (f.name for k in ("pickle", "zip") for f in artefact.of_kind(k))
    sets["pickle"] = [name for name in carriers if not name.endswith(".npz")]
    present = {kind: names[:10] for kind, names in sets.items() if names}
    if len(present) > 1 or (len(weights.gguf) > 1 and not _is_split(weights)):
        title = "several sets of weights, of which the loader picks one"
        advice = "Audit the file that will be served; the sets were not compared with each other."
        yield unsure("FF-08", Severity.MEDIUM, title, "", advice, **present)


def _is_split(weights: Weights) -> bool:
    return all("split.count" in header.metadata for header in weights.gguf.values())


def _split_gguf(weights: Weights) -> Iterator[Finding]:
    split = {n: h for n, h in weights.gguf.items() if h.metadata.get("split.count", 1) != 1}
    if not split:
        return
    counts = {h.metadata["split.count"] for h in split.values()}
    numbers = sorted(int(str(h.metadata.get("split.no", -1))) for h in split.values())
    totals = {h.metadata.get("split.tensors.count") for h in split.values()}
    tensors = sum(h.tensor_count for h in split.values())
    if counts != {len(split)} or numbers != list(range(len(split))) or totals != {tensors}:
        evidence = {"counts": sorted(map(str, counts)), "numbers": numbers, "tensors": tensors}
        title = "the parts of a split GGUF file do not fit together"
        yield _fault("FF-09", Severity.HIGH, title, evidence, min(split))


# --- what is declared against what is there ------------------------------------------------------

# llama.cpp's general.file_type, for those that name one encoding of the large matrices.
_FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K",
    11: "Q3_K", 12: "Q3_K", 13: "Q3_K", 14: "Q4_K", 15: "Q4_K", 16: "Q5_K", 17: "Q5_K",
    18: "Q6_K", 32: "BF16",
}  # fmt: skip


def _declared_gguf(name: str, header: GgufHeader) -> Iterator[Finding]:
    meta, shapes = header.metadata, {each.name: each.shape for each in header.tensors}
    if not shapes or "split.count" in meta:
        return
    prefix = str(meta.get("general.architecture", ""))
    blocks = {int(m[1]) for n in shapes if (m := re.match(r"blk\.(\d+)\.", n))}
    embedding = shapes.get("token_embd.weight", (None, None))
    tokens = meta.get("tokenizer.ggml.tokens")
    up = shapes.get("blk.0.ffn_up.weight", (None, None))
    heads, width = (
        meta.get(f"{prefix}.attention.head_count"),
        meta.get(f"{prefix}.embedding_length"),
    )
    sizes = _encodings(header).most_common(1)
    pairs = {
        "block_count": (meta.get(f"{prefix}.block_count"), len(blocks) or None),
        "embedding_length": (width, embedding[-1]),
        "feed_forward_length": (meta.get(f"{prefix}.feed_forward_length"), up[0]),
        "vocabulary": (tokens.length if isinstance(tokens, GgufArray) else None, embedding[0]),
    }
    if isinstance(heads, int) and heads and isinstance(width, int):
        pairs["head_count divides embedding_length"] = (0, width % heads)
    declared = _FILE_TYPES.get(int(str(meta.get("general.file_type", -1))))
    wrong = {
        what: {"declared": said, "found": seen}
        for what, (said, seen) in pairs.items()
        if None not in (said, seen) and isinstance(said, int) and said != seen
    }
    if wrong:
        title = "the header declares another model than its tensors"
        yield _fault("FF-10", Severity.MEDIUM, title, wrong, name)
    if declared and sizes and sizes[0][0] != declared:
        title = f"declared as {declared}, most values are {sizes[0][0]}"
        evidence = {"declared": declared, "found": dict(_encodings(header))}
        yield _fault("FF-10", Severity.LOW, title, evidence, name)


def _encodings(header: GgufHeader) -> Counter[str]:
    """Return the number of values in matrices by encoding."""
    counts: Counter[str] = Counter()
    for tensor in header.tensors:
        if len(tensor.shape) > 1:
            counts[tensor.type.name] += math.prod(tensor.shape)
    return counts


_LLAMA_LIKE = {
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3", "granite",
    "olmo", "olmo2", "phi3", "cohere", "stablelm", "starcoder2",
}  # fmt: skip
_ROLES = re.compile(
    r"(?:self_attn\.(?:q|k|v|o|qkv)_proj\.(?:weight|bias)|self_attn\.(?:q_norm|k_norm)\.weight"
    r"|self_attn\.rotary_emb\.inv_freq|mlp\.(?:gate|up|down|gate_up)_proj\.(?:weight|bias)"
    r"|mlp\.c_(?:fc|proj)\.(?:weight|bias)"
    r"|(?:input|post_attention|pre_feedforward|post_feedforward)_layernorm\.(?:weight|bias))"
)
_TOP = re.compile(
    r"(?:model\.)?(?:embed_tokens\.weight|norm\.(?:weight|bias)|rotary_emb\.inv_freq)"
    r"|lm_head\.(?:weight|bias)"
)
_EMBEDDINGS = re.compile(
    r"(?:^|\.)(?:embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)\.weight$"
)
_QUANTISED = re.compile(
    r"\.(?:qweight|qzeros|scales|g_idx|weight_scale\w*|input_scale|weight_packed|weight_shape|"
    r"weight_zero_point|(?:k|v)_scale|weight\.\w+)$"
)


def _declared_config(artefact: Artefact, weights: Weights) -> Iterator[Finding]:
    config = artefact.json("config.json")
    shapes = weights.shapes
    if not config or not shapes or artefact.is_adapter:
        return
    config = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    wrong = dict(_wrong_sizes(config or {}, shapes))
    if wrong:
        title = "config.json describes another model than its tensors"
        yield _fault("FF-11", Severity.HIGH, title, wrong, "config.json")
    yield from _unexplained(config or {}, shapes)


def _wrong_sizes(config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Iterator[Any]:
    """Yield what config.json says of sizes where the tensors say otherwise."""
    embedding = next((s for n, s in shapes.items() if _EMBEDDINGS.search(n) and len(s) == 2), None)
    layers = {int(m[1]) for n in shapes if (m := _LAYER.search(n))}
    gate = [s for n, s in shapes.items() if n.endswith("mlp.gate_proj.weight") and len(s) == 2]
    seen: dict[str, int | None] = {
        "num_hidden_layers": len(layers) or None,
        "vocab_size": embedding[0] if embedding else None,
        "hidden_size": embedding[1] if embedding else None,
        "intermediate_size": gate[0][0] if gate else None,
    }
    for key, real in seen.items():
        said = config.get(key)
        if type(said) is not int or real is None or said == real:
            continue
        if key == "num_hidden_layers" and config.get("model_type") not in _LLAMA_LIKE:
            continue  # encoders, decoders and prediction heads count apart
        yield key, {"declared": said, "found": real}


def _unexplained(config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Iterator[Finding]:
    kind = str(config.get("model_type", ""))
    if kind not in _LLAMA_LIKE:
        title = "no list of what tensors this architecture has: extra ones would not be noticed"
        yield unsure("FF-11", Severity.INFO, title, model_type=shown(kind))
        return
    roles: dict[str, set[int]] = defaultdict(set)
    extra = []
    for name in shapes:
        plain = _QUANTISED.sub(".weight", name)
        match = _LAYER.search(plain)
        role = plain[match.end() :] if match else ""
        if not (_ROLES.fullmatch(role) if match else _TOP.fullmatch(plain)):
            extra.append(name)
        elif match:
            roles[role].add(int(match[1]))
    layers = set().union(*roles.values()) if roles else set()
    missing = {
        role: sorted(layers - having)[:10] for role, having in roles.items() if having != layers
    }
    if extra:
        title = f"{len(extra)} tensors that the architecture {shown(kind)} does not have"
        evidence: dict[str, Any] = {"tensors": [shown(each) for each in extra[:20]]}
        yield _fault("FF-11", Severity.HIGH, title, evidence, "config.json")
    if missing:
        title = "tensors that some layers have and others lack"
        yield _fault("FF-11", Severity.MEDIUM, title, {"missing_in_layers": missing}, "config.json")
    if not extra and not missing:
        title = f"every tensor is one that the architecture {shown(kind)} has"
        yield passed("FF-11", title)


# --- values --------------------------------------------------------------------------------------

# Unsigned view, bits of magnitude, smallest magnitude that is no number.
_FLOATS = {
    "F64": ("<u8", (1 << 63) - 1, 0x7FF << 52),
    "F32": ("<u4", (1 << 31) - 1, 0xFF << 23),
    "F16": ("<u2", (1 << 15) - 1, 0x1F << 10),
    "BF16": ("<u2", (1 << 15) - 1, 0xFF << 7),
    "F8_E5M2": ("u1", 0x7F, 0x7C),
    "F8_E4M3": ("u1", 0x7F, 0x7F),
}
# Where the half-precision scales of a block are, in bytes.
_SCALES = {
    "Q4_0": (0, 2), "Q4_1": (0, 4), "Q5_0": (0, 2), "Q5_1": (0, 4), "Q8_0": (0, 2), "Q8_1": (0, 4),
    "Q2_K": (80, 84), "Q3_K": (108, 110), "Q4_K": (0, 4), "Q5_K": (0, 4), "Q6_K": (208, 210),
    "IQ2_XXS": (0, 2), "IQ2_XS": (0, 2), "IQ3_XXS": (0, 2), "IQ1_S": (0, 2), "IQ4_NL": (0, 2),
    "IQ3_S": (0, 2), "IQ2_S": (0, 2), "IQ4_XS": (0, 2), "TQ1_0": (52, 54), "TQ2_0": (64, 66),
    "Q1_0": (0, 2),
}  # fmt: skip


@dataclass(slots=True)
class _Values:
    """What one pass over a tensor's bytes shows."""

    not_numbers: int = 0
    largest: int = 0
    constant: bool = True
    start: int = 0


def check_values(artefact: Artefact, weights: Weights) -> Iterator[Finding]:
    """Yield what reading all values shows: no numbers, all zero or one value, repeated tensors."""
    bad: dict[str, int] = {}
    flat: list[str] = []
    prints: dict[tuple[Any, ...], list[tuple[ModelFile, TensorEntry]]] = defaultdict(list)
    unread: list[str] = []
    for name, kind, shape, start, count in _places(weights):
        where = f"{shown(name)}#{shown(start[0])}"
        values = _scan(artefact.files[name], kind, start[1], count)
        if values is None:
            unread.append(f"{where} ({kind})")
            continue
        if values.not_numbers:
            bad[where] = values.not_numbers
        elif values.constant and len(shape) > 1 and math.prod(shape) > 64:
            flat.append(where)
        elif len(shape) > 1 and name in weights.safetensors:
            entry = weights.safetensors[name][start[0]]
            prints[kind, shape, values.start].append((artefact.files[name], entry))
    yield from _value_findings(bad, flat, unread)
    yield from _repeated(prints)


def _places(weights: Weights) -> Iterator[tuple[str, str, tuple[int, ...], tuple[str, int], int]]:
    """Yield file, encoding, shape, (name, start) and number of bytes of every tensor."""
    for name, entries in weights.safetensors.items():
        for entry in entries.values():
            yield name, entry.dtype, entry.shape, (entry.name, entry.start), entry.byte_count
    for name, header in weights.gguf.items():
        for each in header.tensors:
            yield name, each.type.name, each.shape, (each.name, each.start), each.byte_count


def _scan(file: ModelFile, kind: str, start: int, count: int) -> _Values | None:
    """Return what the bytes show, None if there is no way to tell numbers from others."""
    if re.fullmatch(r"[IU]\d+|BOOL|MXFP4|NVFP4", kind):
        return _Values(constant=False)
    block = next((each.size for each in GGML_TYPES.values() if each.name == kind), 1)
    if kind not in _FLOATS and kind not in _SCALES:
        return None
    seen = _Values()
    first: int | None = None
    size = _PIECE - _PIECE % block if kind in _SCALES else _PIECE
    with open_regular(file.path) as stream:
        stream.seek(start)
        for at in range(0, count, size):
            raw = np.frombuffer(stream.read(min(size, count - at)), np.uint8)
            seen.start = seen.start or zlib.crc32(raw[:65536].tobytes())
            numbers, mask, limit = _numbers(raw, kind, block)
            if not numbers.size:
                continue
            first = int(numbers.flat[0]) if first is None else first
            magnitude = numbers & numbers.dtype.type(mask)
            largest = int(magnitude.max())
            seen.largest = max(seen.largest, largest)
            if largest >= limit:
                seen.not_numbers += int((magnitude >= limit).sum())
            if seen.constant:
                seen.constant = bool((numbers == first).all())
    seen.constant = seen.constant and (kind in _FLOATS or seen.largest == 0)
    return seen


def _numbers(raw: np.ndarray[Any, Any], kind: str, block: int) -> tuple[Any, int, int]:
    if kind in _FLOATS:
        view, mask, limit = _FLOATS[kind]
        return raw.view(view), mask, limit
    start, end = _SCALES[kind]
    scales = np.ascontiguousarray(raw.reshape(-1, block)[:, start:end]).view("<u2")
    return scales, *_FLOATS["F16"][1:]


def _value_findings(bad: dict[str, int], flat: list[str], unread: list[str]) -> Iterator[Finding]:
    if bad:
        title = f"{len(bad)} tensors hold values that are no numbers (NaN or infinity)"
        evidence = {"counts": dict(list(bad.items())[:20]), "tensors": len(bad)}
        yield found("FF-12", Severity.MEDIUM, title, evidence, next(iter(bad)))
    if flat:
        title = f"{len(flat)} matrices hold one value throughout"
        evidence = {"tensors": flat[:20], "count": len(flat)}
        yield found("FF-12", Severity.MEDIUM, title, evidence, flat[0])
    if unread:
        title = f"{len(unread)} tensors are in an encoding whose values were not examined"
        yield unsure("FF-12", Severity.LOW, title, tensors=unread[:20])
    elif not bad and not flat:
        title = "all values are numbers, and no matrix is constant"
        yield passed("FF-12", title)


def _repeated(
    prints: dict[tuple[Any, ...], list[tuple[ModelFile, TensorEntry]]],
) -> Iterator[Finding]:
    pairs = []
    for group in prints.values():
        for other in group[1:]:
            if group[0][1].name != other[1].name and same_bytes(*group[0], *other):
                pairs.append([group[0][1].name, other[1].name])
    if pairs:
        title = f"{len(pairs)} matrices repeat another one byte for byte"
        evidence = {"pairs": pairs[:20], "count": len(pairs)}
        yield found("FF-13", Severity.INFO, title, evidence)
