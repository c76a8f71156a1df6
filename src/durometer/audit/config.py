"""Settings by which a loader runs code, other weights or other text steps (CF)."""

import ast
import re
from collections.abc import Iterator
from typing import Any

from durometer.audit.files import Artefact
from durometer.audit.tokenizer import REFUSALS, TokenizerFacts
from durometer.audit.weights import Weights
from durometer.core.errors import InputError
from durometer.findings import Finding, Severity, found, left_out, passed, unsure
from durometer.formats.safetensors import nested_items, shown

__all__ = ["check_config"]

_CODE_FIELDS = {
    "auto_map", "trust_remote_code", "custom_pipelines", "custom_pipeline", "custom_generate",
    "_attn_implementation_internal", "kernel_config", "use_kernels", "hub_kernels",
}  # fmt: skip
_WEIGHT_FIELDS = {("config.json", "transformers_weights"), ("adapter_config.json", "adapters")}
_SKIPPED = re.compile(r"(?:^|/)(?:tokenizer|vocab|added_tokens|.*\.index)\.json$")
_SUPPRESSING = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")
_FORCING = (
    "forced_bos_token_id",
    "forced_eos_token_id",
    "forced_decoder_ids",
    "sequence_bias",
    "force_words_ids",
    "constraints",
    "logits_processor",
)
_USUAL = {"temperature": (0.0, 2.0), "repetition_penalty": (0.8, 1.5), "top_p": (0.05, 1.0)}
_SHAPING = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "head_dim",
    "num_key_value_heads", "hidden_act", "rms_norm_eps", "layer_norm_eps", "rope_theta",
    "rope_scaling", "max_position_embeddings", "sliding_window", "use_sliding_window",
    "attention_bias", "mlp_bias", "tie_word_embeddings", "num_experts_per_tok", "num_local_experts",
    "final_logit_softcapping", "attn_logit_softcapping", "model_type", "vocab_size",
)  # fmt: skip


def check_config(
    artefact: Artefact,
    weights: Weights,
    tokens: TokenizerFacts,
    base: Artefact | None,
    base_tokens: TokenizerFacts | None,
) -> Iterator[Finding]:
    """Yield what the settings show, alone and against the base's."""
    code = [*_code(artefact), *_python(artefact)]
    yield from code
    if not code:
        yield passed("CF-01", "no setting makes a loader fetch or run code")
    yield from _generation(artefact, tokens, base, base_tokens)
    yield from _drift(artefact, base)
    yield from _quantisation(artefact, weights)
    yield from _adapter_beside(artefact)


def _settings(artefact: Artefact) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, file in artefact.files.items():
        if name.endswith(".json") and file.size < 4 << 20 and not _SKIPPED.search(name):
            values = artefact.json(name)
            if values:
                yield name, values


def _code(artefact: Artefact) -> Iterator[Finding]:
    for name, values in _settings(artefact):
        for key, value in nested_items(values):
            if value and (severity := _severity(name, key, value)) is not None:
                title = f"the setting {shown(key)} makes a loader run code or read other weights"
                yield found(
                    "CF-01",
                    severity,
                    title,
                    {"field": shown(key), "value": shown(value)},
                    shown(name),
                    "It counts whatever flags the loader is given: use a model "
                    "of an architecture that the library has itself.",
                )
    yield from _modules(artefact)


def _severity(name: str, key: str, value: Any) -> Severity | None:
    """Return how much a setting matters, None if it runs nothing."""
    file = name.rpartition("/")[2]
    if key == "_attn_implementation_internal" or (key == "auto_map" and "--" in str(value)):
        return Severity.CRITICAL
    if key in _CODE_FIELDS or (file, key) in _WEIGHT_FIELDS:
        return Severity.HIGH
    if key.endswith("implementation") and isinstance(value, str) and re.search(r"[/:]", value):
        return Severity.HIGH
    return None


def _modules(artefact: Artefact) -> Iterator[Finding]:
    """Yield classes outside their own package in the modules.json of sentence-transformers."""
    if "modules.json" not in artefact.files:
        return
    try:
        text = artefact.text("modules.json")
    except InputError:
        return  # reported with the files
    kinds = re.findall(r'"type"\s*:\s*"([^"]*)"', text)
    foreign = [kind for kind in kinds if not kind.startswith("sentence_transformers.models.")]
    if foreign:
        title = "modules.json names classes that are loaded as code"
        evidence = {"types": [shown(each) for each in foreign[:10]]}
        yield found("CF-01", Severity.HIGH, title, evidence, "modules.json")


def _python(artefact: Artefact) -> Iterator[Finding]:
    for file in artefact.files.values():
        if file.name.endswith(".py"):
            evidence = _summary(artefact, file.name)
            title = "Python code that a loader may run"
            yield found(
                "CF-01",
                Severity.HIGH,
                title,
                evidence,
                shown(file.name),
                "Read it before any loader does.",
            )


def _summary(artefact: Artefact, name: str) -> dict[str, Any]:
    """Return what a Python file imports and calls, from its syntax tree alone."""
    try:
        text = artefact.text(name)
        if len(text) > 1 << 20:
            return {"reason": f"{len(text)} characters, not parsed"}
        tree = ast.parse(text)
    except (InputError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return {"reason": shown(error)}
    imports, calls = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imports.add(str(node.module or "."))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            calls.add(node.func.id if isinstance(node.func, ast.Name) else node.func.attr)
    return {"imports": sorted(imports)[:50], "calls": sorted(calls)[:50]}


# --- generation ----------------------------------------------------------------------------------


def _generation(
    artefact: Artefact,
    tokens: TokenizerFacts,
    base: Artefact | None,
    base_tokens: TokenizerFacts | None,
) -> Iterator[Finding]:
    findings = []
    for name in ("generation_config.json", "config.json"):
        values = artefact.json(name)
        if values is None:
            continue
        theirs = (base.json(name) if base else None) or {}
        findings += [*_levers(name, values, theirs, tokens), *_extremes(name, values, theirs)]
        if base is not None and theirs:
            findings += [*_ends(name, values, theirs)]
    yield from findings
    if not findings and any(n in artefact.files for n in ("generation_config.json", "config.json")):
        yield passed("CF-02", "no setting suppresses, forces or biases tokens")


def _levers(
    name: str, values: dict[str, Any], theirs: dict[str, Any], tokens: TokenizerFacts
) -> Iterator[Finding]:
    words, ends = tokens.tokens, _ids(values.get("eos_token_id"))
    for key in (*_SUPPRESSING, *_FORCING):
        value = values.get(key)
        if not value or value == theirs.get(key):
            continue
        ids = _ids(value)
        texts = [words.get(number, "?") for number in ids[:200]]
        plain = " ".join(re.sub(r"[▁Ġ]", " ", text).strip() for text in texts)
        against = key in _SUPPRESSING and bool(REFUSALS.search(plain) or set(ends) & set(ids))
        title = f"{key} steers which tokens can be generated"
        title += ", among them refusals or the end of the answer" if against else ""
        evidence = {"ids": ids[:50], "texts": [shown(text) for text in texts[:50]]}
        yield found(
            "CF-02", Severity.HIGH if against else Severity.MEDIUM, title, evidence, f"{name}#{key}"
        )


def _ids(value: Any) -> list[int]:
    """Return every integer in a setting, nested lists and keys such as "[1, 2]" included."""
    if type(value) is int:
        return [value]
    if isinstance(value, dict):
        return [int(n) for key in value for n in re.findall(r"\d{1,9}", str(key))]
    return [n for each in value for n in _ids(each)] if isinstance(value, list) else []


def _extremes(name: str, values: dict[str, Any], theirs: dict[str, Any]) -> Iterator[Finding]:
    for key, (low, high) in _USUAL.items():
        value = values.get(key)
        if isinstance(value, int | float) and value != theirs.get(key) and not low <= value <= high:
            title = f"{key} is far from what models use"
            yield found(
                "CF-02",
                Severity.MEDIUM,
                title,
                {"value": value, "usual": [low, high]},
                f"{name}#{key}",
            )


def _ends(name: str, values: dict[str, Any], theirs: dict[str, Any]) -> Iterator[Finding]:
    ours, base = set(_ids(values.get("eos_token_id"))), set(_ids(theirs.get("eos_token_id")))
    if base - ours:
        title = "tokens that end the base's answers do not end this model's"
        evidence = {"model": sorted(ours), "base": sorted(base)}
        yield found("CF-02", Severity.MEDIUM, title, evidence, f"{name}#eos_token_id")


# --- the rest ------------------------------------------------------------------------------------


def _drift(artefact: Artefact, base: Artefact | None) -> Iterator[Finding]:
    ours = artefact.json("config.json")
    if ours is None:
        return
    theirs = base.json("config.json") if base else None
    if theirs is None:
        yield left_out("CF-03", "architecture settings against the base's", "no base given")
        return
    one, other = _flat(ours), _flat(theirs)
    pairs = {
        key: {"model": one[key], "base": other[key]}
        for key in _SHAPING
        if key in one and key in other and one[key] != other[key]
    }
    if pairs:
        title = f"{len(pairs)} settings of the architecture differ from the base's"
        seen = all(map(_seen_in_weights, pairs, pairs.values()))
        yield found("CF-03", Severity.LOW if seen else Severity.MEDIUM, title, pairs, "config.json")
    else:
        yield passed("CF-03", "the settings of the architecture are the base's")


def _seen_in_weights(key: str, values: dict[str, Any]) -> bool:
    """Say whether the tensors show what a setting did: rows that were added, a head of its own."""
    ours, theirs = values["model"], values["base"]
    if key == "vocab_size":
        return type(ours) is type(theirs) is int and ours > theirs
    return key == "tie_word_embeddings" and ours is False


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """Return the text model's settings; rotary ones are where older versions have them."""
    nested = config.get("text_config")
    values = {**config, **nested} if isinstance(nested, dict) else dict(config)
    rope = values.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        values.setdefault("rope_theta", rope["rope_theta"])
        rest = {k: v for k, v in rope.items() if k not in ("rope_theta", "rope_type")}
        values.setdefault("rope_scaling", rest or None)
    return values


_PACKED = {
    "gptq": r"\.qweight$",
    "awq": r"\.qweight$",
    "fp8": r"weight_scale",
    "compressed-tensors": r"weight_(packed|scale)",
    "bitsandbytes": r"\.weight\.(absmax|quant_map)|\.SCB$",
}


def _quantisation(artefact: Artefact, weights: Weights) -> Iterator[Finding]:
    config = artefact.json("config.json")
    names = weights.shapes
    if config is None or not names:
        return
    block = config.get("quantization_config")
    method = str(block.get("quant_method", "")) if isinstance(block, dict) else ""
    pattern = _PACKED.get(method)
    packed = any(re.search(r"\.qweight$|weight_packed$", name) for name in names)
    if pattern and not any(re.search(pattern, name) for name in names):
        title = f"declared as quantised by {shown(method)}, but no tensor is"
        yield found("CF-04", Severity.MEDIUM, title, {"method": shown(method)}, "config.json")
    elif packed and not method:
        title = "tensors are packed by a quantisation that config.json does not declare"
        yield found("CF-04", Severity.MEDIUM, title, {}, "config.json")
    elif method and not pattern:
        title = f"no rule for what tensors the method {shown(method)} leaves"
        yield unsure("CF-04", Severity.INFO, title, "config.json")


def _adapter_beside(artefact: Artefact) -> Iterator[Finding]:
    config = artefact.json("adapter_config.json")
    if config is None or artefact.is_adapter:
        return
    evidence = {
        key: shown(config.get(key)) for key in ("r", "target_modules", "base_model_name_or_path")
    }
    title = "an adapter lies beside full weights; common loaders apply it unasked"
    yield found(
        "CF-05",
        Severity.HIGH,
        title,
        evidence,
        "adapter_config.json",
        "Audit model and adapter in folders of their own.",
    )
