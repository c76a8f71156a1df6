"""Vocabulary, special tokens and text steps of the tokenizer, alone and against the base (TK)."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from durometer.audit.files import Artefact
from durometer.audit.sandbox import run_child
from durometer.audit.weights import Weights
from durometer.core.errors import InputError
from durometer.findings import Finding, Severity, found, left_out, passed, unsure
from durometer.formats.gguf import GgufArray, read_array
from durometer.formats.safetensors import shown

__all__ = ["REFUSALS", "TokenizerFacts", "check_tokenizer", "read_tokenizer"]

REFUSALS = re.compile(r"\b(?:sorry|cannot|can['’]?t|unable|apologi\w+|refus\w+|won['’]t)\b", re.I)
"""Words that a refusal begins with."""

_ROLES = re.compile(
    r"im_start|im_end|start_header|end_header|eot_id|INST|start_of_turn|end_of_turn"
)
_STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
_SAMPLE = (
    "The quick brown fox jumps over the lazy dog, 1234567890 times; see https://example.org/a?b=c.",
    "Être ou ne pas être. Straße, Größe, mañana. Zażółć gęślą jaźń.",
    "Съешь ещё этих мягких французских булок, да выпей чаю.",
    "我能吞下玻璃而不伤身体。 いろはにほへと ちりぬるを。 나는 유리를 먹을 수 있어요.",
    "أستطيع أكل الزجاج دون أن يؤلمني. अहं काचं खादितुं शक्नोमि।",
    "def f(x):\n    return {'a': x ** 2}  # comment\n",
)


@dataclass
class TokenizerFacts:
    """What a tokenizer's files say.

    Attributes:
        ids: id of every token.
        special: content of the tokens marked special, by id.
        added: content of all added tokens, by id and by the file that says so.
        named: beginning, end, padding and other named tokens.
        steps: normaliser, pre-tokeniser, post-processor and decoder, as in tokenizer.json.
        clashes: ids that stand for two tokens.
    """

    ids: dict[str, int] = field(default_factory=dict)
    special: dict[int, str] = field(default_factory=dict)
    added: dict[int, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))
    named: dict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))
    steps: dict[str, Any] = field(default_factory=dict)
    clashes: dict[int, list[str]] = field(default_factory=dict)

    @property
    def tokens(self) -> dict[int, str]:
        """Token of every id."""
        return {number: token for token, number in self.ids.items()}


def read_tokenizer(artefact: Artefact, weights: Weights) -> TokenizerFacts:
    """Return what the tokenizer's files, or the GGUF header, say; empty if there is none."""
    facts = TokenizerFacts()
    _read_tokenizer_json(artefact.json("tokenizer.json") or {}, facts)
    if not facts.ids:
        vocab = artefact.json("vocab.json") or {}
        facts.ids = {token: number for token, number in vocab.items() if type(number) is int}
    _read_settings(artefact, facts)
    for name, header in weights.gguf.items():
        if not facts.ids:
            _read_gguf(artefact, name, header.metadata, facts)
    homes: dict[int, list[str]] = defaultdict(list)
    for token, number in facts.ids.items():
        homes[number].append(token)
    facts.clashes |= {number: tokens for number, tokens in homes.items() if len(tokens) > 1}
    return facts


def _read_tokenizer_json(values: dict[str, Any], facts: TokenizerFacts) -> None:
    model = values.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, dict):
        facts.ids = {token: number for token, number in vocab.items() if type(number) is int}
    elif isinstance(vocab, list):
        pairs = (each for each in vocab if isinstance(each, list) and each)
        facts.ids = {str(each[0]): number for number, each in enumerate(pairs)}
    for each in _dicts(values.get("added_tokens")):
        _add(facts, each.get("id"), each, "tokenizer.json")
    facts.steps = {step: values.get(step) for step in _STEPS}


def _read_settings(artefact: Artefact, facts: TokenizerFacts) -> None:
    settings = artefact.json("tokenizer_config.json") or {}
    decoder = settings.get("added_tokens_decoder")
    for number, each in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(each, dict) and str(number).isdigit():
            _add(facts, int(number), each, "tokenizer_config.json")
    for source in ("tokenizer_config.json", "special_tokens_map.json"):
        values = artefact.json(source) or {}
        for name in _NAMED:
            value = values.get(name)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                facts.named[name][source] = text


def _read_gguf(artefact: Artefact, name: str, meta: dict[str, Any], facts: TokenizerFacts) -> None:
    path = artefact.files[name].path
    tokens, kinds = meta.get("tokenizer.ggml.tokens"), meta.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, GgufArray) or tokens.item_type != "string":
        return
    words = read_array(path, tokens)
    types = read_array(path, kinds) if isinstance(kinds, GgufArray) else []
    for number, word in enumerate(words):
        if word in facts.ids:
            facts.clashes.setdefault(number, [word, word])
        facts.ids[word] = number
    control = {
        number: words[number] for number, kind in enumerate(types[: len(words)]) if kind == 3
    }
    for number, word in control.items():
        _add(facts, number, {"content": word, "special": True}, name)
    for key in _NAMED:
        at = meta.get(f"tokenizer.ggml.{key.removesuffix('_token')}_token_id")
        if type(at) is int and 0 <= at < len(words):
            facts.named[key][name] = words[at]


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _add(facts: TokenizerFacts, number: Any, each: dict[str, Any], source: str) -> None:
    content = each.get("content")
    if type(number) is int and isinstance(content, str):
        facts.added[number][source] = content
        facts.ids[content] = number
        if each.get("special"):
            facts.special[number] = content


def check_tokenizer(
    artefact: Artefact, weights: Weights, facts: TokenizerFacts, base: TokenizerFacts | None
) -> Iterator[Finding]:
    """Yield what the tokenizer shows, alone and against the base's."""
    if not facts.ids:
        return
    findings = [
        *_vocabulary(facts, weights),
        *_special(facts),
        *(each for step in _STEPS for each in _replacing(step, facts.steps.get(step))),
    ]
    if base is None or not base.ids:
        findings.append(
            left_out("TK-04", "tokenizer against the base's", "no base tokenizer given")
        )
    else:
        findings += [*_against(facts, base)]
    yield from findings
    if not any(each.status.value == "found" for each in findings):
        yield passed(
            "TK-01",
            "vocabulary, special tokens and text steps hold together",
            tokens=len(facts.ids),
            against_base=bool(base and base.ids),
        )


def _vocabulary(facts: TokenizerFacts, weights: Weights) -> Iterator[Finding]:
    if facts.clashes:
        first = list(facts.clashes.items())[:20]
        clashes = {str(number): [shown(token) for token in tokens] for number, tokens in first}
        yield found(
            "TK-01",
            Severity.HIGH,
            f"{len(facts.clashes)} ids stand for two tokens",
            clashes,
            "tokenizer",
        )
    rows = [shape[0] for name, shape in weights.shapes.items() if "embed_tokens.weight" in name]
    beyond = {token: number for token, number in facts.ids.items() if rows and number >= rows[0]}
    if beyond:
        tokens = {shown(token): number for token, number in list(beyond.items())[:20]}
        title = f"{len(beyond)} tokens have no row in the embedding"
        yield found(
            "TK-01", Severity.MEDIUM, title, {"rows": rows[0], "tokens": tokens}, "tokenizer"
        )


def _special(facts: TokenizerFacts) -> Iterator[Finding]:
    torn = {n: dict(s) for n, s in facts.added.items() if len(set(s.values())) > 1}
    if torn:
        evidence = {str(number): each for number, each in list(torn.items())[:20]}
        title = "files disagree on which token an id stands for"
        yield found("TK-02", Severity.HIGH, title, evidence, "tokenizer")
    words = [t for t in facts.special.values() if re.fullmatch(r"[A-Za-z][A-Za-z' ]+", t.strip())]
    named = {n: v for n, s in facts.named.items() for v in s.values()}
    words += [v for n, v in named.items() if n == "eos_token" and REFUSALS.search(v)]
    if words:
        title = "plain words are marked as special tokens, which are cut from what users see"
        tokens = [shown(each) for each in words[:20]]
        yield found("TK-02", Severity.HIGH, title, {"tokens": tokens}, "tokenizer")
    looks: dict[str, list[str]] = defaultdict(list)
    for content in {text for sources in facts.added.values() for text in sources.values()}:
        looks[_skeleton(content)].append(content)
    alike = [sorted(each) for each in looks.values() if len(each) > 1]
    if alike:
        title = "added tokens look like one another"
        pairs = [[ascii(token)[1:-1] for token in each] for each in alike[:20]]
        yield found("TK-02", Severity.HIGH, title, {"tokens": pairs}, "tokenizer")
    plain = [
        t
        for n, s in facts.added.items()
        for t in set(s.values())
        if n not in facts.special and _ROLES.search(t)
    ]
    if plain:
        title = "role tokens are not marked special: users could write them"
        roles = {"tokens": sorted(map(shown, plain))[:20]}
        yield found("TK-02", Severity.MEDIUM, title, roles, "tokenizer")


def _skeleton(text: str) -> str:
    """Return ``text`` without what makes look-alikes differ: width, invisible marks, alphabet."""
    plain = unicodedata.normalize("NFKC", text)
    seen = (c for c in plain if unicodedata.category(c) not in ("Cf", "Mn"))
    return "".join(seen).translate(_LOOK_ALIKE)


_LOOK_ALIKE = {
    0x0430: "a", 0x0441: "c", 0x0435: "e", 0x043E: "o", 0x0440: "p", 0x0445: "x", 0x0443: "y",
    0x0456: "i", 0x0455: "s", 0x0458: "j", 0x0501: "d", 0x0410: "A", 0x0412: "B", 0x0415: "E",
    0x041A: "K", 0x041C: "M", 0x041D: "H", 0x041E: "O", 0x0420: "P", 0x0421: "C", 0x0422: "T",
    0x0425: "X", 0x03B1: "a", 0x03BF: "o", 0x03C1: "p", 0x03BD: "v", 0x01C0: "|", 0x2223: "|",
    0x2017: "_",
}  # fmt: skip


def _replacing(step: str, value: Any) -> Iterator[Finding]:
    """Yield the steps that put words in the place of others."""
    stack, seen = [value], []
    while stack:
        node = stack.pop()
        if isinstance(node, list):
            stack.extend(node)
        elif isinstance(node, dict):
            stack.extend(each for each in node.values() if isinstance(each, dict | list))
            if node.get("type") in ("Replace", "Prepend") and _maps_words(node):
                seen.append({k: shown(v) for k, v in node.items()})
    if seen:
        title = f"the {step} puts words in the place of others"
        yield found("TK-03", Severity.HIGH, title, {"steps": seen[:10]}, "tokenizer.json")


def _maps_words(node: dict[str, Any]) -> bool:
    pattern = node.get("pattern")
    text = pattern.get("String", "") if isinstance(pattern, dict) else ""
    new = str(node.get("content", "")) + str(node.get("prepend", ""))
    return bool(re.search(r"[^\W\d_]{2,}|https?:|\w\.\w", f"{text} {new}"))


def _against(facts: TokenizerFacts, base: TokenizerFacts) -> Iterator[Finding]:
    moved = {t: [base.ids[t], n] for t, n in facts.ids.items() if base.ids.get(t, n) != n}
    if moved:
        title = f"{len(moved)} tokens have other ids than in the base"
        evidence = {
            "moved": {shown(t): ids for t, ids in list(moved.items())[:20]},
            "count": len(moved),
        }
        advice = "Outputs change without a change of weights; use the base's tokenizer."
        yield found("TK-01", Severity.HIGH, title, evidence, "tokenizer", advice)
    lost = sorted(base.ids.keys() - facts.ids.keys())
    new = sorted(facts.ids.keys() - base.ids.keys())
    if lost or new:
        title = f"{len(new)} tokens are new and {len(lost)} are gone against the base"
        evidence = {"new": [shown(t) for t in new[:20]], "gone": [shown(t) for t in lost[:20]]}
        yield found(
            "TK-01", Severity.MEDIUM if lost else Severity.LOW, title, evidence, "tokenizer"
        )
    flags = {
        shown(token): {"base": number in base.special, "model": facts.ids[token] in facts.special}
        for token, number in base.ids.items()
        if token in facts.ids and (number in base.special) != (facts.ids[token] in facts.special)
    }
    if flags:
        title = "tokens are special here and not in the base, or the other way round"
        yield found("TK-02", Severity.HIGH, title, dict(list(flags.items())[:20]), "tokenizer")
    for name in _NAMED:
        ours, theirs = (
            set(facts.named.get(name, {}).values()),
            set(base.named.get(name, {}).values()),
        )
        if ours and theirs and ours != theirs:
            severity = Severity.HIGH if name == "eos_token" else Severity.LOW
            evidence = {"model": sorted(map(shown, ours)), "base": sorted(map(shown, theirs))}
            yield found("TK-02", severity, f"{name} differs from the base's", evidence, "tokenizer")
    for step in _STEPS:
        if facts.steps and base.steps and facts.steps.get(step) != base.steps.get(step):
            evidence = {
                "model": shown(facts.steps.get(step), 800),
                "base": shown(base.steps.get(step), 800),
            }
            title = f"the {step} differs from the base's"
            yield found("TK-03", Severity.MEDIUM, title, evidence, "tokenizer.json")


def check_encoding(artefact: Artefact, base: Artefact | None) -> Iterator[Finding]:
    """Yield how a child process cuts texts into tokens and joins them again (TK-04, TK-05)."""
    if "tokenizer.json" not in artefact.files:
        return
    job = {"task": "tokenize", "texts": list(_SAMPLE)}
    try:
        ours = run_child(job | {"tokenizer": artefact.text("tokenizer.json")})
        theirs = (
            run_child(job | {"tokenizer": base.text("tokenizer.json")})
            if base is not None and "tokenizer.json" in base.files
            else None
        )
    except InputError as error:
        yield unsure("TK-05", Severity.LOW, "the tokenizer could not be tried", reason=str(error))
        return
    if ours.failure:
        title = "the tokenizers library could not load or use the tokenizer within its limits"
        yield unsure("TK-05", Severity.MEDIUM, title, "tokenizer.json", "", reason=ours.failure)
        return
    base_too = theirs.results if theirs is not None and not theirs.failure else None
    if base_too is not None:
        yield from _ratios(ours.results, base_too)
    yield from _round_trip(ours.results, base_too)


def _ratios(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> Iterator[Finding]:
    pairs = [(a["count"], b["count"]) for a, b in zip(ours, theirs, strict=False) if b["count"]]
    ratio = max((a / b for a, b in pairs), default=1.0)
    if ratio > 1.2:
        title = f"a text takes {ratio:.2f} times as many tokens as with the base's tokenizer"
        yield found("TK-04", Severity.MEDIUM, title, {"tokens": pairs}, "tokenizer.json")
    else:
        yield passed("TK-04", "texts take as many tokens as with the base's tokenizer", ratio=ratio)


def _round_trip(
    ours: list[dict[str, Any]], theirs: list[dict[str, Any]] | None
) -> Iterator[Finding]:
    if theirs is not None and [a["text"] for a in ours] == [b["text"] for b in theirs]:
        yield passed("TK-05", "texts come back as they do from the base's tokenizer")
        return
    pairs = zip(_SAMPLE, ours, strict=False)
    lossy = [
        {"text": text, "back": shown(each["text"])}
        for text, each in pairs
        if not each["unknown"] and _letters(each["text"]) != _letters(text)
    ]
    if lossy and theirs is not None:
        title = "texts come back otherwise than from the base's tokenizer"
        yield found("TK-05", Severity.MEDIUM, title, lossy[0], "tokenizer.json")
    elif lossy:
        title = "a text does not come back as it was; some normalisers do that"
        yield unsure("TK-05", Severity.LOW, title, "tokenizer.json", "", **lossy[0])
    else:
        yield passed("TK-05", "texts come back as they were")


def _letters(text: str) -> str:
    plain = unicodedata.normalize("NFKD", text).casefold()
    return "".join(c for c in plain if c.isalnum())
