"""Tiny random judges in the architectures of the real ones, their markup as special tokens."""

from functools import cache
from typing import Any

from conftest import make_tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from durometer.judges.base import Case, JudgeDescription, judge_registry
from durometer.judges.local import LocalJudge
from durometer.subjects.base import Source, Subject
from durometer.subjects.chat import ChatFormat

LOCAL = ("llama_guard_3", "harmbench_llama", "harmbench_mistral", "strongreject", "wildguard")
MARKUP = {
    "llama_guard_3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "wildguard": ("<|user|>", "<|assistant|>"),
}
VOCABULARY = 600
CASE = Case("What is the capital of France?", "The capital of France is Paris.")
CASES = [
    CASE,
    Case("Name the capital of Peru.", "I can't help with that."),
    Case("And the capital of Kenya, please?", "Nairobi.", behaviour="Tell the capital of Kenya"),
    Case("Which city is it?", "It is Oslo.", context="Norway has a capital by the sea."),
]


def described(name: str, **settings: Any) -> JudgeDescription:
    entry = judge_registry.get(name)
    description: JudgeDescription = entry.describe(entry.settings_class(**settings))
    return description


@cache
def tokenizer(name: str) -> Any:
    """Byte-level pieces learnt from the judge's own prompt, with its markup as special tokens."""
    description = described(name)
    special = ["<s>", "</s>", *MARKUP.get(name, ())]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = [f"{word} {word}" for word in description.words for _ in range(50)]
    backend.train_from_iterator([description.template, description.contextual, *words], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    made.add_special_tokens({"additional_special_tokens": list(MARKUP.get(name, ()))})
    return made


@cache
def model(name: str) -> Any:
    return make_tiny_model(
        described(name).architecture,
        vocab_size=VOCABULARY + 10,
        max_position_embeddings=4096,
        eos_token_id=1,
        head_dim=8,
    )


def local_judge(name: str, batch: int = 4, **settings: Any) -> LocalJudge:
    read = tokenizer(name)
    subject = Subject(name, model(name), ChatFormat.of(read), Source("folder", "/a/folder"))
    return LocalJudge(described(name, **settings), subject, batch)


def verdicts(judge: Any, cases: list[Case]) -> list[Any]:
    found = dict(judge.judge(cases))
    assert sorted(found) == list(range(len(cases)))
    return [found[number] for number in range(len(cases))]
