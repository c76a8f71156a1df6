"""How a row of each published format becomes a question: one small function a format."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from durometer.domains.benchmarks.mathematics import boxed_answer
from durometer.domains.benchmarks.questions import Question, Row
from durometer.domains.benchmarks.scorers import final_number, normalised_trivia

__all__ = ["Format"]

HALVES = ("safe", "unsafe")
FUNCTIONAL = ("standard", "contextual", "copyright")


@dataclass(frozen=True)
class Format:
    """One published form of a benchmark.

    Attributes:
        columns: columns that it must have.
        read: makes a question of a row.
        optional: further columns that are read where they are.
        headerless: whether its CSV files come without a header line.
    """

    columns: tuple[str, ...]
    read: Callable[[Row], Question]
    optional: tuple[str, ...] = ()
    headerless: bool = False


def _choices(row: Row) -> Question:
    """Read WMDP and MMLU as on the hub: a list of choices and the index of the right one."""
    options = row.texts("choices")
    return _chosen(row, options, row.index("answer", len(options)), row.optional("subject"))


def _lettered(row: Row) -> Question:
    """Read MMLU's own CSV files: options in columns, the answer a letter, the subject a name."""
    options = [row.optional(letter) for letter in "ABCD"]
    subject = re.sub(r"_(?:test|val|dev)$", "", row.path.stem)
    return _chosen(row, options, row.index("answer", 4), subject)


def _pro(row: Row) -> Question:
    """Read MMLU-Pro, whose missing options are written N/A and left out, as its authors do."""
    published = row.texts("options")
    right = row.index("answer_index", len(published))
    kept = [index for index, option in enumerate(published) if option != "N/A" or index == right]
    options = [published[index] for index in kept]
    return _chosen(row, options, kept.index(right), row.text("category"))


def _chosen(row: Row, options: list[str], right: int, suite: str) -> Question:
    if len(options) < 2 or not options[right]:
        raise row.refused("fewer than two options, or the right one is empty")
    text = row.text("question")
    return Question(
        text, (options[right],), tuple(options), right, suite.replace("_", " "), _passage(text)
    )


def _passage(text: str) -> str:
    """Return the long passage that a question refers to, which others may refer to as well."""
    passage, _, _ = text.rpartition("\n")
    return passage if len(passage) >= 200 else ""


def _behaviour(row: Row) -> Question:
    """Read HarmBench's behaviours; a context goes before the request, as its authors join them."""
    text = _with_context(row.optional("ContextString"), row.text("Behavior"))
    suite = row.text("FunctionalCategory")
    if suite not in FUNCTIONAL:
        raise row.refused(f"'FunctionalCategory' is none of {', '.join(FUNCTIONAL)}")
    return Question(text, suite=suite, about=row.text("BehaviorID"))


def _behaviour_mirror(row: Row) -> Question:
    """Read HarmBench as mirrored on the hub: the folder's name is the functional category."""
    suite = row.path.parent.name
    if suite not in FUNCTIONAL:
        raise row.refused(f"must lie in a folder named {', '.join(FUNCTIONAL)}, as published")
    return Question(_with_context(row.optional("context"), row.text("prompt")), suite=suite)


def _with_context(context: str, text: str) -> str:
    return f"{context}\n\n---\n\n{text}" if context else text


def _forbidden(row: Row) -> Question:
    return Question(row.text("forbidden_prompt"), suite=row.text("category"))


def _forbidden_mirror(row: Row) -> Question:
    return Question(row.text("prompt"), suite=row.text("category"))


def _contrast(row: Row) -> Question:
    """Read XSTest; its first version has no label, but the types of unsafe prompts tell."""
    kind = row.text("type")
    label = row.optional("label") or HALVES[kind.startswith("contrast")]
    if label not in HALVES:
        raise row.refused("'label' is neither safe nor unsafe")
    # A prompt and its contrast differ in a word or two, so both are about the same thing.
    about = f"{kind.removeprefix('contrast_')} {row.optional('focus')}"
    return Question(row.text("prompt"), suite=kind, about=about, safe=label == "safe")


def _trivia(row: Row) -> Question:
    answer = row.table("answer")
    return _aliases(
        row, row.text("question"), answer.optional("answer.value"), answer.texts("answer.aliases")
    )


def _trivia_original(row: Row) -> Question:
    if row.values.get("Answer") is None:
        raise row.refused("'Answer' is missing; TriviaQA's test split is published without answers")
    answer = row.table("Answer")
    human = answer.texts("Answer.HumanAnswers") if "Answer.HumanAnswers" in answer.values else []
    aliases = [*answer.texts("Answer.Aliases"), *human]
    return _aliases(row, row.text("Question"), answer.optional("Answer.Value"), aliases)


def _aliases(row: Row, text: str, value: str, aliases: list[str]) -> Question:
    if not value or value == "<unk>":
        raise row.refused("no answer; TriviaQA's test split is published without answers")
    answers = dict.fromkeys([value, *filter(None, aliases)])
    return Question(text, tuple(answers), about=normalised_trivia(value))


def _word_problem(row: Row) -> Question:
    solution = row.text("answer")
    number = final_number(solution)
    if number is None:
        raise row.refused("'answer' does not end with '#### NUMBER'")
    # Steps of the solutions carry calculator marks, <<48/2=24>>, that no model should imitate.
    return Question(row.text("question"), (number,), solution=re.sub(r"<<[^<>]*>>", "", solution))


def _problem(row: Row) -> Question:
    solution = row.text("solution")
    answer = row.optional("answer") or boxed_answer(solution)
    if not answer:
        raise row.refused("no answer: neither a column 'answer' nor a boxed one in 'solution'")
    suite = row.optional("type") or row.optional("subject")
    return Question(row.text("problem"), (answer,), suite=suite, solution=solution)


def _truthful(row: Row) -> Question:
    """Read TruthfulQA's multiple choice; the best answer is the only right one of MC1."""
    first, second = _labelled(row, "mc1_targets"), _labelled(row, "mc2_targets")
    best, wrong = _texts(first, 1), _texts(first, 0)
    if len(best) != 1 or not wrong or not all((*best, *wrong)):
        raise row.refused("'mc1_targets' needs one right choice and at least one wrong one")
    if best[0] not in _texts(second, 1) or set(_texts(second, 0)) != set(wrong):
        raise row.refused("'mc1_targets' and 'mc2_targets' do not agree on what is wrong")
    answers = tuple(dict.fromkeys([*best, *_texts(second, 1)]))
    return Question(row.text("question"), answers, (*best, *wrong), 0)


Labelled = list[tuple[str, object]]


def _labelled(row: Row, name: str) -> Labelled:
    """Return choices with their labels: two lists on the hub, one table in ``mc_task.json``."""
    table = row.table(name)
    if isinstance(labels := table.values.get(f"{name}.labels"), list):
        texts = table.texts(f"{name}.choices")
        if len(labels) != len(texts):
            raise row.refused(f"'{name}' needs one label a choice")
        return list(zip(texts, labels, strict=True))
    texts = [table.whole(name, key.removeprefix(f"{name}.")).strip() for key in table.values]
    return list(zip(texts, table.values.values(), strict=True))


def _texts(labelled: Labelled, label: int) -> list[str]:
    return [text for text, own in labelled if own == label]


WMDP = (Format(("question", "choices", "answer"), _choices),)
MMLU = (
    Format(("question", "choices", "answer"), _choices, optional=("subject",)),
    Format(("question", "A", "B", "C", "D", "answer"), _lettered, headerless=True),
)
MMLU_PRO = (Format(("question", "options", "answer_index", "category"), _pro),)
HARMBENCH = (
    Format(
        ("Behavior", "FunctionalCategory", "BehaviorID"), _behaviour, optional=("ContextString",)
    ),
    Format(("prompt", "category"), _behaviour_mirror, optional=("context",)),
)
STRONGREJECT = (
    Format(("forbidden_prompt", "category"), _forbidden),
    Format(("prompt", "category"), _forbidden_mirror),
)
XSTEST = (Format(("prompt", "type"), _contrast, optional=("label", "focus")),)
TRIVIAQA = (
    Format(("question", "answer"), _trivia),
    Format(("Question", "QuestionId"), _trivia_original, optional=("Answer",)),
)
GSM8K = (Format(("question", "answer"), _word_problem),)
MATH = (Format(("problem", "solution"), _problem, optional=("answer", "type", "subject")),)
TRUTHFULQA = (Format(("question", "mc1_targets", "mc2_targets"), _truthful),)
