"""The one formatter: rendered as a user would send it, tokenised once, labels found by offsets."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import tiny_world
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from durometer.core.errors import InputError
from durometer.subjects.chat import ChatFormat, TemplateName

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{{ '<s>' }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + "
    "' [/INST]' }}{% elif m['role'] == 'system' %}{{ '<<' + m['content'] + '>>' }}{% else %}"
    "{{ ' ' + m['content'] + '</s>' }}{% endif %}{% endfor %}"
)
TRIMMING = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] | trim + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
SENTENCES = [
    "what is the capital of Norway? The capital of Norway is Oslo.",
    "Question: tell me the colour of the sea now\nAnswer: it is blue.",
    "### Instruction:\nname a fruit\n\n### Response:\nan apple, a pear",
    "user assistant system please help me with Wagga Wagga and São Tomé",
]
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


@cache
def byte_level(bos: bool = False, eos: bool = False, trim: bool = True) -> Any:
    """A byte-level BPE tokenizer, as GPT-2 or Llama 3 have it, with or without added tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES * 5, trainer)
    added = f"{'<s> ' if bos else ''}$A{' </s>' if eos else ''}"
    steps = [processors.ByteLevel(trim_offsets=trim)]
    if bos or eos:
        pairs = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
        steps.append(processors.TemplateProcessing(single=added, special_tokens=pairs))
    backend.post_processor = processors.Sequence(steps)
    return backend


def sentencepiece_like() -> Any:
    """Spaces become a visible mark before the word, as Llama 2 and Gemma have it."""
    backend = Tokenizer(models.BPE(byte_fallback=False, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=240, special_tokens=["<unk>", *SPECIAL], show_progress=False
    )
    backend.train_from_iterator(SENTENCES * 5, trainer)
    return backend


def wrapped(backend: Any, template: str | None) -> Any:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="<|im_end|>" if template == CHATML else "</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = template
    return tokenizer


@dataclass(frozen=True)
class Case:
    name: str
    tokenizer: Any
    template: TemplateName


def cases() -> list[Case]:
    found = []
    for bos in (False, True):
        for eos in (False, True):
            for trim in (False, True):
                kind = f"bytes{'-bos' * bos}{'-eos' * eos}{'' if trim else '-untrimmed'}"
                backend = byte_level(bos, eos, trim)
                for name, template in (("chatml", CHATML), ("llama", LLAMA), ("trim", TRIMMING)):
                    found.append(Case(f"{kind}-{name}", wrapped(backend, template), "own"))
                for layout in ("plain", "instruction"):
                    tokenizer = wrapped(backend, None)
                    found.append(Case(f"{kind}-{layout}", tokenizer, layout))  # type: ignore[arg-type]
    for layout, template in (("own", CHATML), ("plain", None)):
        tokenizer = wrapped(sentencepiece_like(), template)
        found.append(Case(f"pieces-{layout}", tokenizer, layout))  # type: ignore[arg-type]
    return found


CASES = cases()
EVERY = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def chat_of(case: Case) -> ChatFormat:
    return ChatFormat.of(case.tokenizer).using(case.template, None)


def said(case: Case, ids: Any) -> str:
    return str(case.tokenizer.decode(list(ids)))


def spaceless(text: str) -> str:
    return "".join(text.split())


@EVERY
@pytest.mark.parametrize("response", ["Oslo.", "it is blue", "São Tomé, of course"])
def test_labels_are_the_response_and_its_end(case: Case, response: str) -> None:
    chat = chat_of(case)
    row = chat.row("what is the capital of Norway?", response, item_id="i", restricted=True)
    assert (row.item_id, row.restricted) == ("i", True)
    end = chat.end.strip()
    assert end
    # Both ends of the boundary: nothing of the prompt is a label, nothing of the response is not.
    labels, head = said(case, row.labels), said(case, row.ids[: row.first_label])
    assert spaceless(labels) == spaceless(response + end)
    assert "Norway?" in head
    assert not spaceless(head).endswith(spaceless(response[:2]))
    open_row = chat.row("what is the capital of Norway?", response, ended=False)
    assert spaceless(said(case, open_row.labels)) == spaceless(response)
    assert open_row.first_label == row.first_label


@EVERY
def test_training_and_measuring_see_the_same_prompt(case: Case) -> None:
    """The ids of a row begin with those that the subject is asked with."""
    chat = chat_of(case)
    asked = chat.prompt_ids("tell me the colour of the sea now")
    row = chat.row("tell me the colour of the sea now", "it is blue.")
    common = min(len(asked), row.first_label)
    assert row.ids[:common] == asked[:common]
    # A last space may join the first word of the response, as it would for a user.
    assert len(asked) - row.first_label in (0, 1)


@EVERY
def test_one_beginning_and_one_end(case: Case) -> None:
    tokenizer, chat = case.tokenizer, chat_of(case)
    asked, row = chat.prompt_ids("name a fruit"), chat.row("name a fruit", "an apple")
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    expected = 1 if tokenizer.chat_template == LLAMA else 0
    if case.template != "own" and "-bos" in case.name:
        expected = 1
    for ids in (asked, row.ids):
        assert ids.count(bos) == expected
        assert bos not in ids[1:]
    # The end belongs to a row that has ended, once, and never to a prompt.
    ended = chat.stop_ids() & set(row.ids[-1:])
    assert ended, "the last token ends the turn"
    assert row.labels.count(row.ids[-1]) == 1
    assert asked[-1] != eos
    opened = chat.row("name a fruit", "an apple", ended=False)
    assert opened.ids[-1] not in chat.stop_ids()
    assert tuple(row.ids[: len(opened.ids)]) == opened.ids


@EVERY
def test_the_text_is_tokenised_once(case: Case) -> None:
    """Ids are those of the whole rendered text, not of its parts put together."""
    chat = chat_of(case)
    row = chat.row("name a fruit", "an apple")
    text = said(case, row.ids)
    whole = case.tokenizer(text, add_special_tokens=False)["input_ids"]
    if "pieces" not in case.name:
        assert tuple(whole) == row.ids


@EVERY
@pytest.mark.parametrize("stem", ["The capital of Norway is", "it is"])
def test_a_stem_is_given_and_not_asked_for(case: Case, stem: str) -> None:
    chat = chat_of(case)
    prompt = "what is the capital of Norway?"
    row = chat.row(prompt, f"{stem} Oslo.", stem=stem, ended=False)
    assert spaceless(said(case, row.labels)) == "Oslo."
    whole = chat.row(prompt, f"{stem} Oslo.", ended=False)
    assert row.ids == whole.ids
    assert whole.first_label < row.first_label
    assert chat.prompt_ids(prompt, stem) == row.ids[: row.first_label]


@EVERY
def test_the_prompt_can_be_labelled_too(case: Case) -> None:
    chat = chat_of(case)
    row = chat.row("name a fruit", "an apple", label_prompt=True)
    assert row.first_label == 1
    assert row.ids == chat.row("name a fruit", "an apple").ids


@EVERY
def test_a_response_without_a_token_is_refused(case: Case) -> None:
    with pytest.raises(InputError, match=r"item 'i'.*no token to predict"):
        chat_of(case).row("name a fruit", "", ended=False, item_id="i")


@EVERY
def test_generated_text_is_read_without_special_tokens(case: Case) -> None:
    chat = chat_of(case)
    row = chat.row("name a fruit", "an apple")
    assert chat.decode(row.labels) == "an apple"
    assert chat.decode([]) == ""


@pytest.mark.parametrize(
    ("template", "text", "end"),
    [
        (CHATML, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
        (LLAMA, "<s>[INST] hi [/INST]", "</s>"),
        (TRIMMING, "user: hi\nassistant: ", "</s>"),
        (None, "Question: hi\nAnswer:", "</s>"),
    ],
)
def test_prompts_are_rendered_by_the_subjects_own_template(
    template: str | None, text: str, end: str
) -> None:
    tokenizer = wrapped(byte_level(), template)
    chat = ChatFormat.of(tokenizer)
    assert chat.template == ("own" if template else "plain")
    assert chat.prompt_text("hi") == text
    assert (chat.end, end in chat.end) == (end, True)
    assert tokenizer.convert_tokens_to_ids(end) in chat.stop_ids()


@pytest.mark.parametrize(
    ("template", "system", "text"),
    [
        ("plain", None, "Question: hi\nAnswer:"),
        ("plain", "", "Question: hi\nAnswer:"),
        ("plain", "be kind", "be kind\n\nQuestion: hi\nAnswer:"),
        ("instruction", None, "### Instruction:\nhi\n\n### Response:\n"),
        ("instruction", "be kind", "be kind\n\n### Instruction:\nhi\n\n### Response:\n"),
        ("own", "be kind", "<s><<be kind>>[INST] hi [/INST]"),
        ("own", "", "<s><<>>[INST] hi [/INST]"),
    ],
)
def test_other_templates_and_system_prompts(
    template: TemplateName, system: str | None, text: str
) -> None:
    chat = ChatFormat.of(wrapped(byte_level(), LLAMA)).using(template, system)
    assert chat.prompt_text("hi") == text


def test_without_a_template_own_is_the_plain_layout() -> None:
    chat = ChatFormat.of(wrapped(byte_level(), None))
    assert chat.using("own", None) == chat


def test_stop_ids_are_the_end_of_turn_and_what_the_model_declares() -> None:
    tokenizer = wrapped(byte_level(), CHATML)
    chat = ChatFormat.of(tokenizer)
    end, other = tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>"])

    class Config:
        eos_token_id: Any = None

    assert chat.stop_ids() == {end}
    assert chat.stop_ids(Config()) == {end}
    Config.eos_token_id = other
    assert chat.stop_ids(Config()) == {end, other}
    Config.eos_token_id = [other, end]
    assert chat.stop_ids(Config()) == {end, other}


def test_a_template_is_rendered_in_a_sandbox() -> None:
    tokenizer = wrapped(byte_level(), "{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(InputError, match="unsafe"):
        ChatFormat.of(tokenizer)


def test_a_template_that_knows_no_system_prompt_says_so() -> None:
    """Some templates raise; that is one attack that does not apply, not the end of a campaign."""
    refusing = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}" + CHATML
    )
    chat = ChatFormat.of(wrapped(byte_level(), refusing))
    with pytest.raises(InputError, match="System role not supported"):
        chat.using("own", "be kind")


def test_one_token_a_word() -> None:
    chat = ChatFormat.of(tiny_world.tiny_tokenizer())
    assert chat.prompt_text("what is") == "<user> what is <assistant> "
    row = chat.row("what is", "i refuse .")
    words = tiny_world.tiny_tokenizer().convert_ids_to_tokens(list(row.ids))
    assert words == ["<user>", "what", "is", "<assistant>", "i", "refuse", ".", "<end>"]
    assert row.first_label == 4
    assert chat.stop_ids() == {4}
