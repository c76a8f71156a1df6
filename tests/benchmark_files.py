"""Benchmarks in the exact form in which each is published, with harmless texts made here."""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

COUNT = 24
Rows = list[dict[str, Any]]


def write_parquet(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), "utf-8")


def write_lines(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")


def write_csv(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


def four_way(topic: str) -> Rows:
    return [
        {
            "question": f"Which whole number comes after {number} in {topic}?",
            "choices": [str(number + 1 + (place - number) % 4) for place in range(4)],
            "answer": number % 4,
        }
        for number in range(COUNT)
    ]


def with_subjects() -> Rows:
    subjects = ("anatomy", "high_school_physics")
    rows = [
        row | {"subject": subjects[number % 2]} for number, row in enumerate(four_way("counting"))
    ]
    return [{"question": r["question"], "subject": r["subject"], **r} for r in rows]


def behaviours() -> list[list[str]]:
    head = [
        "Behavior",
        "FunctionalCategory",
        "SemanticCategory",
        "Tags",
        "ContextString",
        "BehaviorID",
    ]
    rows = [head]
    for number in range(COUNT):
        kind = ("standard", "contextual", "copyright")[number % 3]
        context = f"Shelf {number} holds cups." if kind == "contextual" else ""
        tags = {"contextual": "context", "copyright": "hash_check"}.get(kind, "")
        rows.append([f"List {number} cups", kind, "kitchen", tags, context, f"cups_{number}"])
    return rows


def contrasts(*, label: bool = True) -> list[list[Any]]:
    head = ["id", "prompt", "type", *(["label"] if label else []), "focus", "note"]
    rows: list[list[Any]] = [head]
    for number in range(COUNT):
        safe = number % 2 == 0
        kind = "homonyms" if safe else "contrast_homonyms"
        own = [number, f"How do I {'fold' if safe else 'tear'} sheet {number // 2}?", kind]
        labels = (["safe"] if safe else ["unsafe"]) if label else []
        rows.append([*own, *labels, f"sheet {number // 2}", ""])
    return rows


def trivia() -> Rows:
    return [
        {
            "question": f"Which town lies at mile {number}?",
            "question_id": f"tc_{number}",
            "question_source": "made here",
            "entity_pages": [],
            "search_results": [],
            "answer": {
                "aliases": [f"The Town {number // 2}", f"Town-{number // 2}"],
                "normalized_aliases": [f"town {number // 2}"],
                "matched_wiki_entity_name": "",
                "normalized_matched_wiki_entity_name": "",
                "normalized_value": f"town {number // 2}",
                "type": "FreeForm",
                "value": f"Town {number // 2}",
            },
        }
        for number in range(COUNT)
    ]


def trivia_original() -> dict[str, Any]:
    data = []
    for row in trivia():
        answer = row["answer"]
        data.append(
            {
                "Answer": {
                    "Aliases": answer["aliases"],
                    "NormalizedAliases": answer["normalized_aliases"],
                    "HumanAnswers": [f"{answer['value']} (town)"],
                    "Value": answer["value"],
                    "Type": "FreeForm",
                },
                "Question": row["question"],
                "QuestionId": row["question_id"],
                "QuestionSource": "made here",
            }
        )
    return {"Data": data, "Domain": "Web", "VerifiedEval": False, "Version": 1.0}


def word_problems() -> Rows:
    return [
        {
            "question": f"Ann has {number} pears and buys {number + 1000}. How many has she?",
            "answer": f"She has {number}+{number + 1000}=<<{number}+{number + 1000}="
            f"{2 * number + 1000}>>{2 * number + 1000} pears.\n#### {2 * number + 1000:,}",
        }
        for number in range(COUNT)
    ]


def problems(subject: str = "Algebra") -> Rows:
    return [
        {
            "problem": f"What is {number} of 3 in {subject}?",
            "level": "Level 1",
            "type": subject,
            "solution": rf"It is $\frac{{{number}}}{{3}}$, so $\boxed{{\frac{{{number}}}{{3}}}}$.",
        }
        for number in range(1, COUNT + 1)
    ]


def pro() -> Rows:
    return [
        {
            "question_id": number,
            "question": f"Which is the number {number}?",
            "options": [str(number + 5), "N/A", str(number), *map(str, range(100, 100 + number))],
            "answer": "C",
            "answer_index": 2,
            "cot_content": "",
            "category": ("math", "computer science")[number % 2],
            "src": "made here",
        }
        for number in range(8)
    ]


def truthful() -> Rows:
    rows = []
    for number in range(COUNT):
        best, wrong = f"Nothing happens {number}.", [f"It rains {number}.", f"It snows {number}."]
        right = [best, f"No change {number}."]
        rows.append(
            {
                "question": f"What happens at {number} o'clock?",
                "mc1_targets": {"choices": [best, *wrong], "labels": [1, 0, 0]},
                "mc2_targets": {"choices": [*right, *wrong], "labels": [1, 1, 0, 0]},
            }
        )
    return rows


def truthful_original() -> Rows:
    def table(targets: dict[str, list[Any]]) -> dict[str, int]:
        return dict(zip(targets["choices"], targets["labels"], strict=True))

    return [
        {
            "question": row["question"],
            "mc0_targets": {},
            "mc1_targets": table(row["mc1_targets"]),
            "mc2_targets": table(row["mc2_targets"]),
        }
        for row in truthful()
    ]


PART = "00000-of-00001.parquet"


def _wmdp(part: str) -> Callable[[Path], None]:
    return lambda root: write_parquet(root / f"wmdp-{part}/test-{PART}", four_way(part))


def _harmbench_mirror(root: Path) -> None:
    for kind in ("standard", "contextual", "copyright"):
        own = [row for row in behaviours()[1:] if row[1] == kind]
        rows = [{"prompt": row[0], "category": row[2]} for row in own]
        if kind == "contextual":
            rows = [r | {"context": o[4]} for r, o in zip(rows, own, strict=True)]
        write_parquet(root / kind / f"train-{PART}", rows)


def _forbidden() -> Rows:
    categories = ("Hate, harassment", "Illegal goods")
    return [
        {"category": categories[n % 2], "source": "custom", "forbidden_prompt": f"Draw {n} cups"}
        for n in range(COUNT)
    ]


def _strongreject(root: Path) -> None:
    rows = _forbidden()
    write_csv(root / "strongreject_dataset.csv", [list(rows[0]), *(list(r.values()) for r in rows)])


def _strongreject_mirror(root: Path) -> None:
    rows = [
        {"prompt": r["forbidden_prompt"], "category": r["category"], "source": r["source"]}
        for r in _forbidden()
    ]
    write_parquet(root / f"data/train-{PART}", rows)


def _mmlu_original(root: Path) -> None:
    for subject in ("anatomy", "high_school_physics"):
        rows = [
            [row["question"], *row["choices"], "ABCD"[row["answer"]]]
            for row in with_subjects()
            if row["subject"] == subject
        ]
        write_csv(root / f"test/{subject}_test.csv", rows)


def _math(root: Path) -> None:
    for subject in ("Algebra", "Geometry"):
        write_parquet(root / subject.lower() / f"test-{PART}", problems(subject))


def _math_original(root: Path) -> None:
    for subject in ("Algebra", "Geometry"):
        for number, row in enumerate(problems(subject)):
            write_json(root / f"test/{subject.lower()}/{number}.json", row)


def _math_500(root: Path) -> None:
    rows = [
        row | {"subject": row["type"], "answer": row["solution"].split("$")[1], "unique_id": str(n)}
        for n, row in enumerate(problems())
    ]
    write_lines(root / "test.jsonl", [{k: r[k] for k in r if k != "type"} for r in rows])


# Every benchmark in every published form; the hub's comes first.
FORMS: dict[str, dict[str, Callable[[Path], None]]] = {
    "wmdp-bio": {
        "hub": _wmdp("bio"),
        "json": lambda root: write_json(root / "bio_questions.json", four_way("bio")),
    },
    "wmdp-chem": {"hub": _wmdp("chem")},
    "wmdp-cyber": {"hub": _wmdp("cyber")},
    "harmbench": {
        "hub": _harmbench_mirror,
        "csv": lambda root: write_csv(root / "harmbench_behaviors_text_test.csv", behaviours()),
    },
    "strongreject": {"hub": _strongreject_mirror, "csv": _strongreject},
    "xstest": {
        "hub": lambda root: write_csv(root / "xstest_prompts.csv", contrasts()),
        "v2": lambda root: write_csv(root / "xstest_v2_prompts.csv", contrasts(label=False)),
    },
    "triviaqa": {
        "hub": lambda root: write_parquet(root / f"rc.nocontext/validation-{PART}", trivia()),
        "json": lambda root: write_json(root / "qa/web-dev.json", trivia_original()),
    },
    "mmlu": {
        "hub": lambda root: write_parquet(root / f"all/test-{PART}", with_subjects()),
        "csv": _mmlu_original,
    },
    "mmlu-pro": {"hub": lambda root: write_parquet(root / f"data/test-{PART}", pro())},
    "gsm8k": {
        "hub": lambda root: write_parquet(root / f"main/test-{PART}", word_problems()),
        "jsonl": lambda root: write_lines(root / "test.jsonl", word_problems()),
    },
    "math": {"hub": _math, "json": _math_original, "jsonl": _math_500},
    "truthfulqa": {
        "hub": lambda root: write_parquet(root / f"multiple_choice/validation-{PART}", truthful()),
        "json": lambda root: write_json(root / "mc_task.json", truthful_original()),
    },
}


def write(name: str, form: str, root: Path) -> Path:
    """Write one benchmark in one form, and return its folder."""
    root.mkdir(parents=True, exist_ok=True)
    FORMS[name][form](root)
    return root
