"""Check the house rules of src/: `python tools/check_functions.py`.

A function is at most 80 lines long, a public name has a docstring, a function is annotated in
full, and no handler catches every exception. Exit status 1 when a rule is broken, 2 when there is
nothing to check.
"""

import ast
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

MAX_LINES = 80
TOO_BROAD = {"Exception", "BaseException"}
DOCUMENTED_ELSEWHERE = {"overload", "override", "setter", "deleter"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, order=True)
class Fault:
    """One broken rule: where it is, and what is wrong."""

    path: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.message}"


@dataclass(frozen=True)
class Definition:
    """A class or function of a module, and where it stands."""

    node: ast.ClassDef | Function
    in_class: bool
    public: bool


def definitions(scope: ast.AST, public: bool, in_class: bool = False) -> Iterator[Definition]:
    """Walk all classes and functions below `scope`; one inside a function is never public."""
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, ast.ClassDef | Function):
            named = public and not node.name.startswith("_")
            yield Definition(node, in_class, named)
            is_class = isinstance(node, ast.ClassDef)
            yield from definitions(node, public=named and is_class, in_class=is_class)
        else:
            yield from definitions(node, public, in_class)


def decorator_names(node: ast.ClassDef | Function) -> set[str]:
    """Last part of each decorator's name: `x.setter` gives `setter`."""
    called = (d.func if isinstance(d, ast.Call) else d for d in node.decorator_list)
    return {ast.unparse(name).rpartition(".")[2] for name in called}


def length(node: Function) -> int:
    """Lines from `def` to the last statement, docstring included, decorators not."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def missing_annotations(node: Function, in_class: bool) -> list[str]:
    """Names of the parameters without annotation, and `return`; `self` and `cls` need none."""
    spec = node.args
    parameters = [*spec.posonlyargs, *spec.args]
    if in_class and "staticmethod" not in decorator_names(node):
        parameters = parameters[1:]
    parameters += [*spec.kwonlyargs, *(p for p in (spec.vararg, spec.kwarg) if p)]
    bare = [p.arg for p in parameters if p.annotation is None]
    return bare if node.returns else [*bare, "return"]


def definition_faults(found: Definition) -> Iterator[tuple[int, str]]:
    """Line and message of each rule that one class or function breaks."""
    node = found.node
    undocumented = found.public and ast.get_docstring(node) is None
    if undocumented and not decorator_names(node) & DOCUMENTED_ELSEWHERE:
        yield node.lineno, f"{node.name} has no docstring"
    if isinstance(node, ast.ClassDef):
        return
    if length(node) > MAX_LINES:
        yield node.lineno, f"{node.name} is {length(node)} lines long, over {MAX_LINES}"
    if bare := missing_annotations(node, found.in_class):
        yield node.lineno, f"{node.name} lacks annotations: {', '.join(bare)}"


def is_broad(handler: ast.expr | None) -> bool:
    """Whether `except HANDLER` catches every exception."""
    if handler is None:
        return True
    kinds = handler.elts if isinstance(handler, ast.Tuple) else [handler]
    return any(ast.unparse(kind).rpartition(".")[2] in TOO_BROAD for kind in kinds)


def suppressed(node: ast.AST) -> list[ast.expr]:
    """The arguments of a call of `contextlib.suppress`; none for any other node."""
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
        return node.args
    return []


def broad_catches(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and message of each handler or `suppress` that catches every exception."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and is_broad(node.type):
            yield node.lineno, "catches every exception: name those that are meant"
        for kind in suppressed(node):
            if is_broad(kind):
                yield kind.lineno, "suppresses every exception: name those that are meant"


def check(source: str, path: Path) -> tuple[list[Fault], list[int]]:
    """Check one module.

    Returns:
        Its faults in line order, and the length in lines of each of its functions.
    """
    tree = ast.parse(source, filename=str(path))
    public = path.name == "__init__.py" or not path.name.startswith("_")
    found = list(definitions(tree, public))
    faults = [fault for definition in found for fault in definition_faults(definition)]
    faults += broad_catches(tree)
    if public and ast.get_docstring(tree) is None:
        faults.append((1, "the module has no docstring"))
    lengths = [length(d.node) for d in found if not isinstance(d.node, ast.ClassDef)]
    return sorted(Fault(str(path), line, message) for line, message in faults), lengths


def main(arguments: Sequence[str]) -> int:
    """Check every module below the folders named (by default src) and print what was found.

    Returns:
        0 when all rules hold, 1 when one is broken, 2 when no module was found.
    """
    modules = sorted(p for root in arguments or ["src"] for p in Path(root).rglob("*.py"))
    if not modules:
        print("check_functions: no module found", file=sys.stderr)
        return 2
    checked = [check(path.read_text(encoding="utf-8"), path) for path in modules]
    faults = [fault for found, _ in checked for fault in found]
    lengths = [lines for _, found in checked for lines in found]
    for fault in faults:
        print(fault)
    print(
        f"{len(lengths)} functions in {len(modules)} modules: "
        f"median {statistics.median(lengths or [0]):g} lines, longest {max(lengths, default=0)}"
    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
