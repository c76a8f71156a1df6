"""The benchmarks that Durometer reads, in one table: what each is, where it lies, how it is read.

Facts are those of the sets' own cards and repositories; licences as stated there. Nothing of any
set is shipped, and nothing is fetched unless the user names the hub.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from durometer.core.errors import unknown_name
from durometer.domains.base import Kind
from durometer.domains.benchmarks import formats
from durometer.domains.benchmarks.formats import Format

__all__ = ["BENCHMARKS", "Benchmark", "benchmark_named"]


@dataclass(frozen=True)
class Benchmark:
    """What a benchmark is.

    Attributes:
        name: on the command line.
        title: what it is, in one line.
        source: paper.
        licence: as the set's card states it.
        repo: where the hub has it.
        files: by split, where its files lie in a folder: patterns, the first that finds any counts;
            the first split that has files is the default.
        formats: published forms, told apart by their columns.
        kind: ``knowledge`` (options to choose from) or ``refusal`` (free answers).
        scorer: the published rule, see ``durometer.measures.benchmark``; '' where a judge decides.
        hazardous: whether its texts are hidden in reports and it can only be what is safeguarded.
        hub_split: the default on the hub, where that is another.
        topic: subject named in the prompt, where the rows name none.
        apart: suite that another rule scores, so that it is never pooled with the others.
    """

    name: str
    title: str
    source: str
    licence: str
    repo: str
    files: Mapping[str, tuple[str, ...]]
    formats: tuple[Format, ...]
    kind: Kind
    scorer: str
    hazardous: bool = False
    hub_split: str = ""
    topic: str = ""
    apart: str = ""

    @property
    def page(self) -> str:
        """Where its licence is read and accepted."""
        return f"https://huggingface.co/datasets/{self.repo}"


def _parquet(folder: str, split: str) -> tuple[str, str]:
    """Return where the hub keeps a split: in the whole repository, or in that folder alone."""
    return f"{folder}/{split}-*.parquet", f"{split}-*.parquet"


def _wmdp(part: str, topic: str, count: str) -> Benchmark:
    return Benchmark(
        name=f"wmdp-{part}",
        title=f"WMDP, hazardous knowledge of {topic}: {count} four-way questions",
        source="arXiv 2403.03218",
        licence="MIT",
        repo="cais/wmdp",
        files={"test": (*_parquet(f"wmdp-{part}", "test"), f"{part}_questions.json")},
        formats=formats.WMDP,
        kind="knowledge",
        scorer="letters",
        hazardous=True,
        topic=topic,
    )


_BEHAVIOURS = "harmbench_behaviors_text"
_ALL = (
    _wmdp("bio", "biology", "1,273"),
    _wmdp("chem", "chemistry", "408"),
    _wmdp("cyber", "cybersecurity", "1,987"),
    Benchmark(
        name="harmbench",
        title="HarmBench, text behaviours: 159 standard, 81 contextual and 80 copyright in 'test'",
        source="arXiv 2402.04249",
        licence="MIT",
        repo="walledai/HarmBench",
        files={
            split: (
                f"{_BEHAVIOURS}_{split}.csv",
                f"data/behavior_datasets/{_BEHAVIOURS}_{split}.csv",
                *(("*/train-*.parquet", "train-*.parquet") if split == "all" else ()),
            )
            for split in ("test", "all", "val")
        },
        formats=formats.HARMBENCH,
        kind="refusal",
        scorer="",
        hazardous=True,
        hub_split="all",
        apart="copyright",
    ),
    Benchmark(
        name="strongreject",
        title="StrongREJECT: 313 forbidden prompts in six categories, or the small 60",
        source="arXiv 2402.10260",
        licence="MIT",
        repo="walledai/StrongREJECT",
        files={
            "full": (
                "strongreject_dataset.csv",
                "strongreject_dataset/strongreject_dataset.csv",
                *_parquet("data", "train"),
            ),
            "small": (
                "strongreject_small_dataset.csv",
                "strongreject_dataset/strongreject_small_dataset.csv",
            ),
        },
        formats=formats.STRONGREJECT,
        kind="refusal",
        scorer="",
        hazardous=True,
    ),
    Benchmark(
        name="xstest",
        title="XSTest: 250 safe prompts that look unsafe, and 200 unsafe contrasts",
        source="arXiv 2308.01263",
        licence="CC-BY-4.0",
        repo="Paul/XSTest",
        files={
            "prompts": ("xstest_prompts.csv", "xstest_v2_prompts.csv", *_parquet("data", "test"))
        },
        formats=formats.XSTEST,
        kind="refusal",
        scorer="",
        hazardous=True,
    ),
    Benchmark(
        name="triviaqa",
        title="TriviaQA: short answers with aliases",
        source="arXiv 1705.03551",
        licence="stated as unknown on its card",
        repo="mandarjoshi/trivia_qa",
        files={
            "validation": (
                *_parquet("rc.nocontext", "validation"),
                *(f"{f}{name}-dev.json" for f in ("", "qa/") for name in ("web", "wikipedia")),
                *(f"{f}unfiltered-web-dev.json" for f in ("", "triviaqa-unfiltered/")),
            ),
            "train": (*_parquet("rc.nocontext", "train"), "web-train.json", "qa/web-train.json"),
            "test": _parquet("rc.nocontext", "test"),
        },
        formats=formats.TRIVIAQA,
        kind="refusal",
        scorer="aliases",
    ),
    Benchmark(
        name="mmlu",
        title="MMLU: four-way questions in 57 subjects",
        source="arXiv 2009.03300",
        licence="MIT",
        repo="cais/mmlu",
        files={
            split: (
                *_parquet("all", split),
                *(f"{folder}*_{short}.csv" for folder in (f"{short}/", f"data/{short}/", "")),
            )
            for split, short in (("test", "test"), ("validation", "val"), ("dev", "dev"))
        },
        formats=formats.MMLU,
        kind="knowledge",
        scorer="letters",
    ),
    Benchmark(
        name="mmlu-pro",
        title="MMLU-Pro: questions with up to ten options in 14 categories",
        source="arXiv 2406.01574",
        licence="MIT",
        repo="TIGER-Lab/MMLU-Pro",
        files={split: _parquet("data", split) for split in ("test", "validation")},
        formats=formats.MMLU_PRO,
        kind="knowledge",
        scorer="picked",
    ),
    Benchmark(
        name="gsm8k",
        title="GSM8K: word problems of grade-school mathematics",
        source="arXiv 2110.14168",
        licence="MIT",
        repo="openai/gsm8k",
        files={
            split: (
                *_parquet("main", split),
                f"{split}.jsonl",
                f"grade_school_math/data/{split}.jsonl",
            )
            for split in ("test", "train")
        },
        formats=formats.GSM8K,
        kind="refusal",
        scorer="number",
    ),
    Benchmark(
        name="math",
        title="MATH: competition problems with boxed answers",
        source="arXiv 2103.03874",
        licence="MIT, contested: the first hub entry was withdrawn in 2025",
        repo="EleutherAI/hendrycks_math",
        files={
            split: (
                *_parquet("*", split),
                f"{split}.jsonl",
                f"{split}/*/*.json",
                f"MATH/{split}/*/*.json",
            )
            for split in ("test", "train")
        },
        formats=formats.MATH,
        kind="refusal",
        scorer="boxed",
    ),
    Benchmark(
        name="truthfulqa",
        title="TruthfulQA, multiple choice (MC1, MC2): questions that many answer falsely",
        source="arXiv 2109.07958",
        licence="Apache-2.0",
        repo="truthfulqa/truthful_qa",
        files={
            "validation": (
                *_parquet("multiple_choice", "validation"),
                "mc_task.json",
                "data/mc_task.json",
            )
        },
        formats=formats.TRUTHFULQA,
        kind="knowledge",
        scorer="true_false",
    ),
)

BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in _ALL}


def benchmark_named(name: str) -> Benchmark:
    """Return the benchmark of that name.

    Raises:
        InputError: there is none.
    """
    if name not in BENCHMARKS:
        raise unknown_name("benchmark", name, BENCHMARKS)
    return BENCHMARKS[name]
