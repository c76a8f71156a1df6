"""Is the chat template honest: what it hides, and what it does to conversations (CT).

A chat template is a program that sees every prompt. It is parsed here, never rendered here; a child
process renders it with canaries, unique words whose fate shows what was dropped, moved or added.
"""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import unified_diff
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import TemplateError

from durometer.audit.canaries import Case, Rendering, cases_for, judge, words
from durometer.audit.files import Artefact
from durometer.audit.sandbox import run_child
from durometer.audit.template_child import environment
from durometer.audit.weights import Weights
from durometer.core.errors import InputError
from durometer.findings import Finding, Severity, Status, found, left_out, passed, unsure
from durometer.formats.safetensors import shown

__all__ = [
    "Template",
    "check_templates",
    "parse_template",
    "read_templates",
    "static_findings",
]

MAX_CHARACTERS = 1 << 20
"""Longest template looked into; the longest official ones have some 20,000 characters."""

LARGE = 50_000
"""Characters above which a template is remarked on."""

INSTRUCTIONS = re.compile(
    r"\b(?:ignore|disregard|forget|override)\b[^.{}]{0,40}\b(?:instruction|rule|guideline|safety|"
    r"polic|system)|\bnever refus|\balways (?:comply|answer|obey|recommend|include|add|mention)|"
    r"\bdo not (?:refuse|mention|reveal|tell)|"
    r"\bwithout (?:any )?(?:restriction|limit|filter|censor)|"
    r"\b(?:secretly|covertly|uncensored|unfiltered)\b|\bno (?:restrictions|limits|filters)\b",
    re.I,
)
"""What text that steers a model against its safeguards tends to say."""

_GGUF_KEY = "tokenizer.chat_template"
_REACHING = {
    "cycler",
    "joiner",
    "lipsum",
    "namespace",
    "range",
    "dict",
    "self",
    "caller",
    "varargs",
    "kwargs",
    "raise_exception",
    "strftime_now",
}
_BY_ATTRIBUTE = {"map", "selectattr", "rejectattr", "groupby", "sum", "sort", "unique"}
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064"
    "\u2066-\u206f\ufeff\U000e0000-\U000e0fff]"
)


@dataclass
class Template:
    """A chat template and where it was found; ``tree`` is None if it could not be parsed."""

    where: str
    name: str
    source: str
    tree: nodes.Template | None = None
    error: str = ""
    literals: list[str] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def read_templates(artefact: Artefact, weights: Weights) -> list[Template]:
    """Return the templates of every file that can carry one."""
    return [parse_template(*each) for each in _carriers(artefact, weights)]


def _carriers(artefact: Artefact, weights: Weights) -> Iterator[tuple[str, str, str]]:
    for where in ("tokenizer_config.json", "chat_template.json", "processor_config.json"):
        value = (artefact.json(where) or {}).get("chat_template")
        entries = value if isinstance(value, list) else [{"name": "default", "template": value}]
        if isinstance(value, dict):
            entries = [{"name": name, "template": text} for name, text in value.items()]
        for each in entries:
            if isinstance(each, dict) and isinstance(each.get("template"), str):
                yield where, str(each.get("name", "default")), each["template"]
    for where in sorted(artefact.files):
        folder, _, file = where.rpartition("/")
        if file.endswith((".jinja", ".jinja2", ".j2")):
            name = file.rsplit(".", 1)[0] if folder else "default"
            try:
                yield where, name, artefact.text(where)
            except InputError:
                continue  # reported with the files
    for where, header in weights.gguf.items():
        for key, value in header.metadata.items():
            if key.startswith(_GGUF_KEY) and isinstance(value, str):
                yield (
                    where,
                    key.removeprefix("tokenizer.chat_template").lstrip(".") or "default",
                    value,
                )


def parse_template(where: str, name: str, source: str) -> Template:
    """Return a template as far as it can be parsed; nothing of it is run."""
    template = Template(where, name, source)
    if len(source) > MAX_CHARACTERS:
        template.error = f"{len(source)} characters, over {MAX_CHARACTERS}"
        return template
    try:
        tree = environment().parse(source)
        template.unknown = _given(tree)
        _literals(template, tree)
        template.tree = tree
    except (TemplateError, RecursionError, ValueError, MemoryError) as error:
        template.error = shown(error) or type(error).__name__
    return template


def _given(tree: nodes.Template) -> list[str]:
    """Return the variables that a template reads and never sets.

    ``jinja2.meta`` has a function for it, which folds constants: it would build what a bomb names.
    """
    names = list(tree.find_all(nodes.Name))
    return sorted(
        {n.name for n in names if n.ctx == "load"} - {n.name for n in names if n.ctx != "load"}
    )


def _literals(template: Template, tree: nodes.Template) -> None:
    """Collect the constants that conditions, calls and filters look at."""
    texts: dict[str, None] = {}
    for node in tree.find_all((nodes.Compare, nodes.Test, nodes.Call, nodes.Filter, nodes.Getitem)):
        for const in node.find_all((nodes.Const, nodes.Concat, nodes.Add)):
            value = _folded(const)
            if isinstance(value, str) and value.strip():
                texts[value] = None
            elif type(value) is int:
                template.numbers.append(value)
    template.literals = list(texts)[:200]


def _folded(node: nodes.Node) -> Any:
    """Return the value of a constant, or of constants put together; None for all else."""
    if isinstance(node, nodes.Const):
        return node.value
    parts = (
        node.nodes
        if isinstance(node, nodes.Concat)
        else [node.left, node.right]
        if isinstance(node, nodes.Add)
        else []
    )
    values = [_folded(part) for part in parts]
    if values and all(isinstance(value, str) for value in values):
        return "".join(values)
    return None


def check_templates(
    templates: list[Template], base: list[Template] | None, specials: set[str]
) -> Iterator[Finding]:
    """Yield what the templates show, alone and against the base's.

    Args:
        specials: contents of the tokenizer's special tokens, which a template may react to.
    """
    yield from _disagreeing(templates)
    seen: set[str] = set()
    for template in templates:
        if template.source in seen:
            continue
        seen.add(template.source)
        findings = [*static_findings(template)]
        if template.tree is not None:
            findings += _dynamic(template, _partner(template, base), specials)
        yield from findings
        clean = (Status.PASSED, Status.NOT_EXAMINED)
        if all(each.status in clean or not each.severity for each in findings):
            title = "the conversations tried come through as they are, and nothing is hidden"
            yield passed("CT-04", title, where=template.where, name=template.name)
    if templates and base is None:
        yield left_out("CT-02", "template against the base's", "no base given")


def _partner(template: Template, base: list[Template] | None) -> Template | None:
    return next((each for each in base or () if each.name == template.name and each.tree), None)


def _place(template: Template, line: int | None = None) -> str:
    where = f"{shown(template.where)}#{shown(template.name)}"
    return f"{where}:{line}" if line else where


def _normal(source: str) -> str:
    return "\n".join(line.strip() for line in source.strip().splitlines())


def _disagreeing(templates: list[Template]) -> Iterator[Finding]:
    for name in sorted({each.name for each in templates}):
        same = [each for each in templates if each.name == name]
        for other in same[1:]:
            if _normal(same[0].source) != _normal(other.source):
                title = "two files carry different templates; the loader picks one"
                evidence = {"files": [same[0].where, other.where], "diff": _diff(same[0], other)}
                yield found("CT-01", Severity.MEDIUM, title, evidence, _place(other))


def _diff(one: Template, other: Template) -> list[str]:
    lines = unified_diff(one.source.splitlines(), other.source.splitlines(), lineterm="", n=0)
    return [shown(line, 200) for line in lines][:40]


# --- static --------------------------------------------------------------------------------------


def static_findings(template: Template) -> Iterator[Finding]:
    """Yield what a template shows without being rendered."""
    source = template.source
    if template.tree is None:
        title = f"the template cannot be parsed: {template.error}"
        yield found(
            "CT-03",
            Severity.HIGH,
            title,
            {"reason": template.error},
            _place(template),
            "An engine with other rules may still run it.",
        )
        return
    for line, what, severity in sorted(set(_constructs(template.tree))):
        yield found(
            "CT-03",
            severity,
            what,
            {"line": line},
            _place(template, line),
            "Do not render it; use the base's template.",
        )
    if match := _INVISIBLE.search(source):
        evidence = {"character": f"U+{ord(match[0]):04X}", "position": match.start()}
        yield found(
            "CT-03",
            Severity.HIGH,
            "invisible or direction-changing characters",
            evidence,
            _place(template, source.count("\n", 0, match.start()) + 1),
        )
    mixed = [word for word in re.findall(r"\w+", source) if _mixed(word)]
    if mixed:
        title = "words of letters from two alphabets, which look like other words"
        evidence = {"words": [ascii(word)[1:-1] for word in mixed[:10]]}
        yield found("CT-03", Severity.HIGH, title, evidence, _place(template))
    if len(source) > LARGE:
        title = f"a template of {len(source)} characters"
        yield found("CT-07", Severity.MEDIUM, title, {"characters": len(source)}, _place(template))
    yield from _bombs(template)
    if match := INSTRUCTIONS.search(source):
        title = "text that reads like an instruction against safeguards"
        yield found("CT-08", Severity.MEDIUM, title, {"snippet": shown(match[0])}, _place(template))


def _mixed(word: str) -> bool:
    if word.isascii():
        return False
    scripts = {unicodedata.name(c, "?").split()[0] for c in word if c.isalpha()}
    return "LATIN" in scripts and bool(scripts & {"CYRILLIC", "GREEK", "ARMENIAN", "CHEROKEE"})


def _constructs(tree: nodes.Template) -> Iterator[tuple[int, str, Severity]]:
    """Yield line, description and severity of everything that reaches for Python's insides."""
    known = environment()
    for node in tree.find_all(nodes.Node):
        line = getattr(node, "lineno", 0) or 0
        if isinstance(node, nodes.Getattr) and node.attr.startswith("_"):
            yield line, f"reaches for the attribute {shown(node.attr)}", Severity.CRITICAL
        elif isinstance(node, nodes.Getitem):
            yield from ((line, *each) for each in _item(node))
        elif isinstance(node, nodes.Filter | nodes.Test):
            kinds = known.filters if isinstance(node, nodes.Filter) else known.tests
            yield from ((line, *each) for each in _filtered(node, kinds))
        elif isinstance(node, nodes.Include | nodes.Import | nodes.FromImport | nodes.Extends):
            yield line, "takes in another template", Severity.HIGH
        elif isinstance(node, nodes.Const) and re.search(r"__\w+__", str(node.value)):
            yield line, f"names {shown(node.value, 60)}", Severity.HIGH
        elif isinstance(node, nodes.Compare) and any(
            _computed(part) for part in (node.expr, *(op.expr for op in node.ops))
        ):
            yield line, "compares with a text that it first puts together", Severity.HIGH
        if (name := _reached(node)) in _REACHING:
            yield line, f"reaches into {name}", Severity.CRITICAL


def _reached(node: nodes.Node) -> str:
    """Return the name of the plain variable that an attribute or item is taken of."""
    owner = node.node if isinstance(node, nodes.Getattr | nodes.Getitem) else None
    return owner.name if isinstance(owner, nodes.Name) else ""


def _item(node: nodes.Getitem) -> Iterator[tuple[str, Severity]]:
    key = node.arg
    value = _folded(key)
    if isinstance(value, str) and value.startswith("_"):
        yield f"reaches for the item {shown(value)}", Severity.CRITICAL
    elif not isinstance(key, nodes.Const | nodes.Slice | nodes.Name) and any(
        isinstance(each.value, str) and "_" in each.value for each in key.find_all(nodes.Const)
    ):
        yield "reaches for an item whose name it puts together", Severity.CRITICAL


def _filtered(node: nodes.Filter | nodes.Test, kinds: Any) -> Iterator[tuple[str, Severity]]:
    if node.name not in kinds:
        yield f"uses the unknown filter or test {shown(node.name)}", Severity.MEDIUM
    arguments = [*node.args, *(each.value for each in node.kwargs)]
    if node.name == "attr":
        first = arguments[0] if arguments else None
        harmless = isinstance(first, nodes.Const) and not str(first.value).startswith("_")
        yield "takes an attribute by filter", Severity.MEDIUM if harmless else Severity.CRITICAL
    elif node.name in _BY_ATTRIBUTE and any(
        str(_folded(each) or "").startswith("_") for each in arguments
    ):
        yield f"takes an underscore attribute by {node.name}", Severity.CRITICAL


def _computed(node: nodes.Node) -> bool:
    """Say whether an operand is a text made of constants alone, but not written as one."""
    if isinstance(node, nodes.Const | nodes.Name | nodes.List | nodes.Tuple | nodes.Neg):
        return False
    has_text = any(isinstance(each.value, str) for each in node.find_all(nodes.Const))
    return has_text and next(node.find_all((nodes.Name, nodes.Call)), None) is None


def _bombs(template: Template) -> Iterator[Finding]:
    assert template.tree is not None
    for node in template.tree.find_all((nodes.For, nodes.Mul, nodes.Pow)):
        if isinstance(node, nodes.For):
            inner = [each for each in node.find_all(nodes.For) if _ranges(each)]
            hit = _ranges(node) and (len(inner) > 1 or _longest(node) > 10_000)
        else:
            sides = [_folded(each) for each in node.iter_child_nodes()]
            hit = any(type(side) is int and side > 1000 for side in sides)
        if hit:
            title = "a loop or product whose size only a constant bounds"
            yield found(
                "CT-07",
                Severity.MEDIUM,
                title,
                {"line": node.lineno},
                _place(template, node.lineno),
            )
            return


def _ranges(node: nodes.For) -> bool:
    call = node.iter
    return isinstance(call, nodes.Call) and getattr(call.node, "name", "") == "range"


def _longest(node: nodes.For) -> int:
    return max(
        (c.value for c in node.iter.find_all(nodes.Const) if type(c.value) is int), default=0
    )


# --- rendered ------------------------------------------------------------------------------------


def _render(template: Template, cases: list[Case]) -> tuple[list[Rendering], str]:
    """Return what the child made of every case, and why it ended if it did before the last."""
    job = {
        "task": "render",
        "template": template.source,
        "cases": [{"variables": case.variables, "date": case.date} for case in cases],
    }
    done = run_child(job)
    results = [
        Rendering(each.get("text"), each.get("error", ""), each.get("message", ""))
        for each in done.results
    ]
    return results, done.failure or ("" if len(results) == len(cases) else "answered in part")


def _dynamic(template: Template, base: Template | None, specials: set[str]) -> list[Finding]:
    numbers = template.numbers + (base.numbers if base else [])
    literals = list(dict.fromkeys(template.literals + (base.literals if base else [])))
    try:
        for system in (True, False):
            cases = cases_for(literals, numbers, template.unknown, system)
            results, failure = _render(template, cases)
            if failure or any(r.text for c, r in zip(cases, results, strict=True) if c.system):
                break  # else the template refuses system messages: tried without
        theirs = _render(base, cases)[0] if base else None
    except InputError as error:
        return [
            unsure(
                "CT-04",
                Severity.MEDIUM,
                "the template could not be rendered",
                _place(template),
                "",
                reason=str(error),
            )
        ]
    findings = [*_limits(template, results, failure)]
    judged = judge(cases, results, theirs, specials, _place(template), INSTRUCTIONS)
    findings += judged
    findings += _against(template, base, results, theirs)
    findings += _unreached(template, results)
    return findings


def _limits(template: Template, results: list[Rendering], failure: str) -> Iterator[Finding]:
    by_kind = {each.error: each.message for each in results if each.error}
    limits = failure or by_kind.keys() & {"time", "memory"}
    if limits:
        reason = failure or by_kind.get("time") or by_kind.get("memory")
        title = "rendering went over its limits of time or memory, or ended the process"
        yield found("CT-07", Severity.MEDIUM, title, {"reason": shown(reason)}, _place(template))
        if not any(each.text for each in results):
            title = "no conversation could be rendered: what the template does is not known"
            yield unsure("CT-04", Severity.HIGH, title, _place(template))
    if "security" in by_kind:
        title = "rendering asked for what the sandbox refuses"
        evidence = {"reason": shown(by_kind["security"])}
        yield found("CT-03", Severity.CRITICAL, title, evidence, _place(template))
    if results and not any(each.text for each in results) and not limits:
        evidence = {kind: shown(message) for kind, message in by_kind.items()}
        yield unsure(
            "CT-04",
            Severity.MEDIUM,
            "no conversation could be rendered",
            _place(template),
            "",
            **evidence,
        )


def _against(
    template: Template,
    base: Template | None,
    results: list[Rendering],
    theirs: list[Rendering] | None,
) -> Iterator[Finding]:
    if base is None or theirs is None:
        return
    if template.source == base.source:
        yield passed("CT-02", "the template is the base's, character by character")
        return
    pairs = list(zip(results, theirs, strict=False))
    differing = sum(a.text != b.text for a, b in pairs)
    evidence = {
        "renders_compared": len(pairs),
        "renders_differing": differing,
        "diff": _diff(base, template),
    }
    severity = Severity.MEDIUM if differing or not pairs else Severity.INFO
    yield found(
        "CT-02",
        severity,
        f"the template differs from the base's, in {differing} of "
        f"{len(pairs)} conversations also in effect",
        evidence,
        _place(template),
    )


def _unreached(template: Template, results: list[Rendering]) -> Iterator[Finding]:
    """Yield sentences in the template that no conversation brought out."""
    assert template.tree is not None
    rendered = "\n".join(each.text or "" for each in results)
    quiet = {
        id(each)
        for test in template.tree.find_all((nodes.Compare, nodes.Test, nodes.Filter))
        for each in test.find_all(nodes.Const)
    }
    raised = {
        id(each)
        for call in template.tree.find_all(nodes.Call)
        if getattr(call.node, "name", "") == "raise_exception"
        for each in call.find_all(nodes.Const)
    }
    texts = [each.data for each in template.tree.find_all(nodes.TemplateData)]
    texts += [
        each.value
        for each in template.tree.find_all(nodes.Const)
        if isinstance(each.value, str) and id(each) not in quiet | raised
    ]
    hidden = [
        text.strip() for text in texts if len(words(text)) >= 4 and text.strip() not in rendered
    ]
    if hidden:
        title = f"{len(hidden)} sentences of the template came up in no conversation tried"
        yield unsure(
            "CT-05",
            Severity.LOW,
            title,
            _place(template),
            "Read them in the template.",
            texts=[shown(text, 160) for text in hidden[:10]],
        )
