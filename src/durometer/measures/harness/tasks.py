"""Loading tasks of lm-eval: by their own names, or from a YAML file that runs no code.

A task file of the user's may come from anywhere. Python that it names is not run, its templates are
rendered in a sandbox, and nothing is fetched for it unless that was asked for.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

from durometer.core.errors import InputError, UnsafeInputError, unknown_name
from durometer.core.settings import digest_of
from durometer.formats.safetensors import shown
from durometer.measures.harness.spec import FAMILY, HarnessSpec

INSTALL = "pip install 'durometer[benchmarks]'"
# Seed of the examples before a question: the harness's own default.
SHOTS_SEED = 1234
_FIELD = re.compile(r"[A-Za-z_]\w*")


@dataclass(frozen=True)
class Document:
    """One row of a task.

    Attributes:
        task: name of the task, without a group's.
        number: its place in the task's data set.
        text_hash: of the row and its right answer.
    """

    task: str
    number: int
    text_hash: str


@dataclass(frozen=True)
class HarnessTasks:
    """The tasks of one spec, loaded.

    Attributes:
        spec: what was named.
        tasks: the harness's own objects, by name.
        documents: all rows of all tasks.
    """

    spec: HarnessSpec
    tasks: dict[str, Any]
    documents: tuple[Document, ...]

    @property
    def digest(self) -> str:
        """Return a hash of the harness's version, the tasks' settings and their rows."""
        # The address of a function says nothing of what it does, and is another in every process.
        configs = [re.sub(r" at 0x[0-9a-f]+", "", str(t.dump_config())) for t in self._ordered]
        rows = [(d.task, d.number, d.text_hash) for d in self.documents]
        shots = [_shots(task) for task in self._ordered]
        return digest_of([version("lm_eval"), self.spec.rest, configs, rows, shots])[:16]

    @property
    def _ordered(self) -> list[Any]:
        return list(self.tasks.values())

    def evaluate(self, model: Any, chosen: dict[str, list[int]]) -> dict[str, list[dict[str, Any]]]:
        """Return what the harness logs of each row, by task: its requests, answers and metrics.

        Args:
            model: a language model of lm-eval.
            chosen: numbers of the rows to ask, ascending, by task.

        Raises:
            InputError: a template, the task's or the subject's, that cannot be rendered.
        """
        from jinja2 import TemplateError
        from lm_eval.evaluator import evaluate

        for name in chosen:
            self.tasks[name].set_fewshot_seed(seed=SHOTS_SEED)
        own: Any = {"tasks": {n: self.tasks[n] for n in chosen}, "groups": {}, "group_map": {}}
        try:
            with quiet():
                found: Any = evaluate(
                    model,
                    own,
                    samples=chosen,
                    bootstrap_iters=0,
                    apply_chat_template=self.spec.chat,
                    fewshot_as_multiturn=self.spec.chat,
                    log_samples=True,
                )
        except TemplateError as error:
            raise InputError(f"{FAMILY}:{self.spec.task}: {_reason(error)}") from error
        return dict(found["samples"])


def _shots(task: Any) -> list[str]:
    """Return the rows that examples before a question are drawn from, none where there are none."""
    return [str(row) for row in task.fewshot_docs()] if task.config.num_fewshot else []


def load_tasks(spec: HarnessSpec) -> HarnessTasks:
    """Return the task, or the tasks of a group.

    Raises:
        InputError: lm-eval is not installed, no such task or file, columns that are missing, no
            rows, a data set that is not here; one line.
        UnsafeInputError: a file that names Python to be run.
    """
    require_harness()
    path = spec.path
    _require_named(spec)
    config = _read_file(spec, path, set()) if path is not None else None
    with quiet(), _network(spec), _guarded(spec, "cannot be loaded"):
        if config is not None:
            _sandbox_templates()
            _require_columns(spec, config)
        loaded = _manager(defaults=path is None).load([str(path or spec.task)])["tasks"]
        for task in loaded.values():
            _set_shots(task, spec.shots)
        documents = tuple(chain.from_iterable(_documents(spec, task) for task in loaded.values()))
    return HarnessTasks(spec, dict(loaded), documents)


def require_harness() -> None:
    """Refuse to go on without lm-eval.

    Raises:
        InputError: it, or something that it needs, is not installed.
    """
    try:
        import lm_eval.evaluator
        import lm_eval.tasks  # noqa: F401
    except ImportError as error:
        missing = (error.name or "lm_eval").partition(".")[0]
        raise InputError(
            f"--measure {FAMILY}: the package '{missing}' is not installed; {INSTALL}"
        ) from error


@lru_cache(maxsize=2)
def _manager(*, defaults: bool) -> Any:
    """Return the harness's own loader; its index of thousands of tasks takes seconds to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=defaults)


def _require_named(spec: HarnessSpec) -> None:
    """Refuse what is neither a file nor one of the harness's names; the nearest one is told."""
    if spec.path is not None:
        if not spec.path.is_file():
            raise InputError(f"{FAMILY}:{shown(spec.task)}: no such file")
        return
    known = _manager(defaults=True).all_tasks
    if spec.task not in known:
        raise unknown_name(f"task of {FAMILY}", spec.task, known)


def _set_shots(task: Any, shots: int | None) -> None:
    """Set the number of examples as the harness does: a task that fixes none at all keeps that."""
    own = task.get_config("num_fewshot")
    if own is None or (shots is not None and own != 0):
        task.set_config(key="num_fewshot", value=shots or 0)


def _documents(spec: HarnessSpec, task: Any) -> Iterator[Document]:
    """Yield the rows of a task, with right answers that can be found among the choices."""
    if getattr(task, "MULTIMODAL", False) or getattr(task, "UNSAFE_CODE", False):
        raise InputError(
            f"{FAMILY}:{spec.task}: '{task.task_name}' needs pictures, sound or code to be run"
        )
    rows = list(task.eval_docs)
    if not rows:
        raise InputError(f"{FAMILY}:{spec.task}: '{task.task_name}' has no rows")
    for number, row in enumerate(rows):
        target = task.doc_to_target(row)
        if task.OUTPUT_TYPE == "multiple_choice" and not task.multiple_input:
            _require_answer(spec, task.doc_to_choice(row), target, number)
        yield Document(task.task_name, number, digest_of([str(row), str(target)])[:16])


def _require_answer(spec: HarnessSpec, choices: list[str], target: Any, number: int) -> None:
    answers = target if isinstance(target, list) else [target]
    known = [
        0 <= answer < len(choices) if isinstance(answer, int) else answer in choices
        for answer in answers
    ]
    if not known or not all(known):
        raise InputError(
            f"{FAMILY}:{spec.task}: row {number + 1}: its right answer is not among its "
            f"{len(choices)} choices"
        )


def _require_columns(spec: HarnessSpec, config: dict[str, Any]) -> None:
    """Refuse a name that is no column: the harness would ask the name itself, every time."""
    import datasets

    used = [config.get(f"{part}_split") for part in ("test", "validation", "training")]
    split = next((name for name in used if name), None)
    if "group" in config or split is None:
        return
    source, part = config.get("dataset_path"), config.get("dataset_name")
    found = datasets.load_dataset(source, part, split=split, **config.get("dataset_kwargs", {}))
    if not len(found):
        raise InputError(f"{FAMILY}:{spec.task}: its split '{shown(split, 40)}' has no rows")
    for key in ("doc_to_text", "doc_to_target", "doc_to_choice"):
        value = config.get(key)
        if isinstance(value, str) and _FIELD.fullmatch(value) and value not in found.column_names:
            raise InputError(
                f"{FAMILY}:{spec.task}: {key} names column '{shown(value, 40)}', which its data "
                f"set does not have; found: {', '.join(shown(n, 40) for n in found.column_names)}"
            )


def _read_file(spec: HarnessSpec, path: Path, seen: set[Path]) -> dict[str, Any]:
    """Return what a task file says, with what it includes.

    Raises:
        UnsafeInputError: it names Python functions, classes or metrics to be run.
        InputError: it cannot be read.
    """
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        pass

    def refuse(loader: Any, node: Any) -> None:
        raise UnsafeInputError(
            f"{path}: names Python code (!function), which is not run; write the task with "
            "templates, or install it among lm-eval's own tasks"
        )

    Loader.add_constructor("!function", refuse)
    try:
        config = yaml.load(path.read_text("utf-8"), Loader=Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read as a task: {_reason(error)}") from error
    if not isinstance(config, dict):
        raise InputError(f"{path}: not a task: it must be a YAML table with the key 'task'")
    _refuse_foreign(spec, path, config)
    seen.add(path.resolve())
    includes = config.get("include", [])
    merged: dict[str, Any] = {}
    for name in includes if isinstance(includes, list) else [includes]:
        included = path.parent / str(name)
        if included.resolve() not in seen:
            merged |= _read_file(spec, included, seen)
    return merged | config


def _refuse_foreign(spec: HarnessSpec, named: Path, config: dict[str, Any]) -> None:
    from lm_eval.api import metrics, registry  # noqa: F401  (metrics fills the registry)

    if "class" in config or config.get("unsafe_code"):
        raise UnsafeInputError(f"{named}: names Python code (class, unsafe_code), which is not run")
    if "://" in str(config.get("dataset_kwargs")) and not spec.hub:
        raise InputError(f"{named}: its data set lies on the network; hub=yes fetches it")
    for one in config.get("metric_list") or []:
        name = one.get("metric") if isinstance(one, dict) else None
        if not isinstance(name, str) or name not in registry.metric_registry:
            raise InputError(f"{named}: metric '{shown(str(name), 40)}' is none of lm-eval's own")
        if one.get("hf_evaluate"):
            raise UnsafeInputError(
                f"{named}: metric '{name}' is code from the hub (hf_evaluate), which is not run"
            )


def _sandbox_templates() -> None:
    """Render templates of tasks in jinja2's sandbox from now on; they may come from anywhere."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lm_eval import utils

    own: Any = utils.env
    if not isinstance(own, ImmutableSandboxedEnvironment):
        safe = ImmutableSandboxedEnvironment(
            undefined=own.undefined, keep_trailing_newline=own.keep_trailing_newline
        )
        safe.filters.update(own.filters)
        utils.env = safe


@contextmanager
def _network(spec: HarnessSpec) -> Iterator[None]:
    """Keep the clients of the hub offline unless its data set may be fetched; never load code."""
    import datasets
    import evaluate
    from huggingface_hub import constants

    modules: list[tuple[Any, str]] = [(evaluate.config, "HF_EVALUATE_OFFLINE")]
    if not spec.hub:
        modules += [(constants, "HF_HUB_OFFLINE"), (datasets.config, "HF_HUB_OFFLINE")]
    before = [getattr(module, name) for module, name in modules]
    for module, name in modules:
        setattr(module, name, True)
    try:
        yield
    finally:
        for (module, name), value in zip(modules, before, strict=True):
            setattr(module, name, value)


@contextmanager
def _guarded(spec: HarnessSpec, what: str) -> Iterator[None]:
    """Make one line of whatever the harness raises over a task that it cannot use."""
    try:
        yield
    except InputError:
        raise
    except _faults() as error:
        raise InputError(f"{FAMILY}:{spec.task}: {what}: {_why(spec, error)}") from error


def _faults() -> tuple[type[Exception], ...]:
    """Return what the harness and its libraries raise over a task; nothing is measured then."""
    from datasets.exceptions import DatasetsError
    from jinja2 import TemplateError
    from yaml import YAMLError

    values = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, AssertionError)
    others = (RuntimeError, ImportError, OSError, SyntaxError, StopIteration)
    return (*values, *others, DatasetsError, TemplateError, YAMLError)


def _why(spec: HarnessSpec, error: BaseException) -> str:
    causes = list(_causes(error))
    kinds = {type(cause).__name__ for cause in causes}
    told = next((c for c in causes if type(c).__name__ == "UndefinedError"), None)
    offline = kinds & {"OfflineModeIsEnabled", "ConnectionError", "LocalEntryNotFoundError"}
    if offline and not spec.hub:
        return "its data set is not on this machine; hub=yes fetches it, with your own access"
    if "StopIteration" in kinds:  # what the reader of JSON lines makes of an empty file
        return "its data set has no rows"
    if told is not None:
        return f"a column that its templates name is missing: {_reason(told)}"
    while error.__cause__ is not None:
        error = error.__cause__
    return _reason(error)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {shown(lines[0], 200)}"


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the harness's log and progress bars out of the terminal."""
    import datasets
    from lm_eval.api import task

    bars: Any = task.tqdm
    logger, level = logging.getLogger("lm_eval"), logging.getLogger("lm_eval").level
    shown_before = datasets.is_progress_bar_enabled()
    logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    task.tqdm = lambda rows, **_: rows
    try:
        yield
    finally:
        task.tqdm = bars
        logger.setLevel(level)
        if shown_before:
            datasets.enable_progress_bars()
