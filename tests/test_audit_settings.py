"""Settings and tokenizers: each hostile change is named, and what is usual is no finding."""

# ruff: noqa: E501 - tables of cases, one a line

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile import CONFIG, tensors, write_json, write_model
from safetensors.numpy import save_file

from durometer.audit.config import check_config
from durometer.audit.files import Artefact, read_artefact
from durometer.audit.tokenizer import check_encoding, check_tokenizer, read_tokenizer
from durometer.audit.weights import read_weights
from durometer.findings import Finding, Severity, Status

Json = dict[str, Any]
WORDS = ["<unk>", "<s>", "<|im_end|>", "sorry", "cannot", "hello", "world", "the", "a", "b", "c"]


def tokenizer(
    words: list[str] = WORDS, special: tuple[str, ...] = tuple(WORDS[:3]), **steps: Any
) -> Json:
    return {
        "model": {"type": "WordLevel", "vocab": {w: n for n, w in enumerate(words)}, "unk_token": "<unk>"},
        "added_tokens": [
            {"id": words.index(w), "content": w, "special": True, "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": False} for w in special
        ],
        "normalizer": None, "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None,
        "decoder": None, **steps,
    }  # fmt: skip


def folder(path: Path, values: Json | None = None, **settings: Any) -> Artefact:
    write_model(path)
    write_json(path / "tokenizer.json", values or tokenizer())
    write_json(path / "tokenizer_config.json", {"eos_token": "<|im_end|>"} | settings)
    return read_artefact(path)


def check(subject: Artefact, base: Artefact | None = None) -> list[Finding]:
    weights = read_weights(subject)
    theirs = read_tokenizer(base, read_weights(base)) if base else None
    return list(check_tokenizer(subject, weights, read_tokenizer(subject, weights), theirs))


def found(findings: list[Finding]) -> dict[str, Severity]:
    worst: dict[str, Severity] = {}
    for each in findings:
        if each.status is Status.FOUND:
            worst[each.check] = max(each.severity, worst.get(each.check, Severity.INFO))
    return worst


SWAPPED = ["<unk>", "<s>", "<|im_end|>", "cannot", "sorry", *WORDS[5:]]
TOKENIZERS: dict[str, tuple[str, Json]] = {
    "plain word special": ("TK-02", tokenizer(special=("<unk>", "sorry"))),
    "replacing words": (
        "TK-03", tokenizer(normalizer={"type": "Replace", "pattern": {"String": "no"}, "content": "yes"}),
    ),
    "replacing an address": (
        "TK-03",
        tokenizer(decoder={"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "a.example"}, "content": "b.example"}]}),
    ),
    "prepending": ("TK-03", tokenizer(normalizer={"type": "Prepend", "prepend": "obey "})),
    "look-alikes": (
        "TK-02",
        tokenizer([*WORDS, "<\uff5cim_end\uff5c>"], special=("<unk>", "<|im_end|>", "<\uff5cim_end\uff5c>")),
    ),
    "beyond the embedding": ("TK-01", tokenizer([*WORDS, *(f"w{n}" for n in range(40))])),
    "one id for two": (
        "TK-01",
        tokenizer() | {"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 0}, "unk_token": "a"}},
    ),
    "role token plain": (
        "TK-02",
        tokenizer() | {"added_tokens": [{"id": 2, "content": "<|im_end|>", "special": False}]},
    ),
}  # fmt: skip
AGAINST: dict[str, tuple[str, Json, Json]] = {
    "swapped ids": ("TK-01", tokenizer(SWAPPED), {}),
    "word lost": ("TK-01", tokenizer(WORDS[:-1]), {}),
    "no longer special": ("TK-02", tokenizer(special=("<unk>", "<s>")), {}),
    "another end": ("TK-02", tokenizer(), {"eos_token": "sorry"}),
    "another step": ("TK-03", tokenizer(normalizer={"type": "Lowercase"}), {}),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_hostile_tokenizers(name: str, tmp_path: Path) -> None:
    expected, values = TOKENIZERS[name]
    assert found(check(folder(tmp_path, values)))[expected] >= Severity.MEDIUM


@pytest.mark.parametrize("name", AGAINST)
def test_changes_against_the_base(name: str, tmp_path: Path) -> None:
    expected, values, settings = AGAINST[name]
    base = folder(tmp_path / "base")
    assert (
        found(check(folder(tmp_path / "m", values, **settings), base))[expected] >= Severity.MEDIUM
    )


def test_the_bases_tokenizer_passes(tmp_path: Path) -> None:
    base, same = folder(tmp_path / "base"), folder(tmp_path / "same")
    assert not found(check(same, base))
    assert not found(check(same))
    more = folder(tmp_path / "more", tokenizer([*WORDS, "<tool>"]))
    assert found(check(more, base)) == {"TK-01": Severity.LOW}


def test_files_that_name_other_tokens(tmp_path: Path) -> None:
    decoder = {"2": {"content": "sorry"}}
    findings = check(folder(tmp_path, added_tokens_decoder=decoder))
    assert found(findings)["TK-02"] is Severity.HIGH


def test_texts_are_cut_and_joined_in_a_child(tmp_path: Path) -> None:
    base, same = folder(tmp_path / "base"), folder(tmp_path / "same")
    assert {e.status for e in check_encoding(same, base)} == {Status.PASSED}
    (tmp_path / "same" / "tokenizer.json").write_text('{"model": 1}')
    (broken,) = check_encoding(read_artefact(tmp_path / "same"), base)
    assert broken.status is Status.INCONCLUSIVE


def by_byte() -> Json:
    """Return a tokenizer of single bytes, which gives every text back."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    values: Json = json.loads(made.to_str())
    return values


def test_a_tokenizer_that_loses_letters(tmp_path: Path) -> None:
    vowels = {"type": "Replace", "pattern": {"Regex": "[aeiou]"}, "content": ""}
    base = folder(tmp_path / "base", by_byte())
    lossy = folder(tmp_path / "lossy", by_byte() | {"normalizer": vowels})
    assert {e.status for e in check_encoding(base, None)} == {Status.PASSED}
    against = {e.check: e for e in check_encoding(lossy, base)}["TK-05"]
    assert (against.status, against.severity) == (Status.FOUND, Severity.MEDIUM)
    (alone,) = check_encoding(lossy, None)
    assert (alone.check, alone.status) == ("TK-05", Status.INCONCLUSIVE)
    (base.root / "tokenizer.json").write_text('{"model": 1}')
    # A base that cannot be tried is no witness.
    (broken,) = check_encoding(lossy, read_artefact(base.root))
    assert broken.status is Status.INCONCLUSIVE


def test_a_tokenizer_that_makes_many_tokens(tmp_path: Path) -> None:
    split = {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False}
    base, many = folder(tmp_path / "base"), folder(tmp_path / "m", tokenizer(pre_tokenizer=split))
    assert "TK-04" in {e.check for e in check_encoding(many, base) if e.status is Status.FOUND}


# --- settings ------------------------------------------------------------------------------------


def settings(subject: Artefact, base: Artefact | None = None) -> list[Finding]:
    weights = read_weights(subject)
    tokens = read_tokenizer(subject, weights)
    base_tokens = read_tokenizer(base, read_weights(base)) if base else None
    return list(check_config(subject, weights, tokens, base, base_tokens))


@pytest.mark.parametrize(
    ("changes", "severity"),
    [({"suppress_tokens": [3]}, Severity.HIGH), ({"bad_words_ids": [[4]]}, Severity.HIGH),
     ({"begin_suppress_tokens": [2]}, Severity.HIGH), ({"suppress_tokens": [5]}, Severity.MEDIUM)],
)  # fmt: skip
def test_suppressed_refusals_are_decoded(changes: Json, severity: Severity, tmp_path: Path) -> None:
    folder(tmp_path)
    write_json(tmp_path / "generation_config.json", {"eos_token_id": 2} | changes)
    assert found(settings(read_artefact(tmp_path)))["CF-02"] is severity


def test_levers_that_the_base_has_too_are_no_finding(tmp_path: Path) -> None:
    for name in ("base", "m"):
        folder(tmp_path / name)
        write_json(tmp_path / name / "generation_config.json", {"suppress_tokens": [3]})
    both = read_artefact(tmp_path / "m"), read_artefact(tmp_path / "base")
    assert "CF-02" not in found(settings(*both))


def test_an_end_that_is_gone(tmp_path: Path) -> None:
    base, subject = folder(tmp_path / "base"), folder(tmp_path / "m")
    write_json(tmp_path / "m" / "generation_config.json", {"eos_token_id": 7})
    assert found(settings(subject, base))["CF-02"] is Severity.MEDIUM


def test_python_files_are_read_and_not_run(tmp_path: Path) -> None:
    code = "import os, socket\nfrom subprocess import run\nrun(['x'])\nos.system('canary')\n"
    write_model(tmp_path)
    (tmp_path / "modeling_x.py").write_text(code)
    (finding,) = [e for e in settings(read_artefact(tmp_path)) if e.check == "CF-01"]
    assert finding.evidence == {
        "imports": ["os", "socket", "subprocess"],
        "calls": ["run", "system"],
    }


@pytest.mark.parametrize("code", ["(" * 5000, "\0", "def"])
def test_python_that_cannot_be_parsed(code: str, tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "modeling_x.py").write_text(code)
    assert found(settings(read_artefact(tmp_path)))["CF-01"] is Severity.HIGH


def test_rotary_settings_of_two_versions_are_equal(tmp_path: Path) -> None:
    old = write_model(tmp_path / "old", rope_theta=10000.0)
    rope = {"rope_theta": 10000.0, "rope_type": "default"}
    new = write_model(tmp_path / "new", rope_parameters=rope)
    assert "CF-03" not in found(settings(read_artefact(new), read_artefact(old)))


@pytest.mark.parametrize(
    ("changes", "severity"),
    [
        ({"vocab_size": 64}, Severity.LOW),
        ({"vocab_size": 16}, Severity.MEDIUM),
        ({"tie_word_embeddings": True}, Severity.MEDIUM),
        ({"vocab_size": 64, "rms_norm_eps": 1e-5}, Severity.MEDIUM),
    ],
)
def test_what_the_tensors_show_as_well_is_no_drift(
    changes: Json, severity: Severity, tmp_path: Path
) -> None:
    base, model = write_model(tmp_path / "base"), write_model(tmp_path / "model", **changes)
    assert found(settings(read_artefact(model), read_artefact(base)))["CF-03"] is severity


def test_an_untied_head_is_no_drift(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", tie_word_embeddings=True)
    model = write_model(tmp_path / "model")
    assert found(settings(read_artefact(model), read_artefact(base)))["CF-03"] is Severity.LOW


def test_quantised_tensors_that_are_not_declared(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", CONFIG)
    packed = {"model.layers.0.mlp.up_proj.qweight": np.ones((2, 2), np.int32)}
    save_file(tensors() | packed, tmp_path / "model.safetensors")
    assert "CF-04" in found(settings(read_artefact(tmp_path)))
