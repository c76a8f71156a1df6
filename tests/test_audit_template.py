"""Chat templates: hostile ones are caught by what they do, official idioms raise no alarm."""

import json
from pathlib import Path

import pytest
from hostile import write_json, write_model
from hostile_templates import BENIGN, CHATML, HOSTILE, when

from durometer.audit.run import AuditRequest, audit
from durometer.audit.sandbox import run_child
from durometer.audit.template import Template, check_templates, parse_template
from durometer.findings import Finding, Severity, Status


def template(source: str) -> Template:
    return parse_template("chat_template.jinja", "default", source)


def check(source: str, base: str | None = None) -> list[Finding]:
    theirs = None if base is None else [template(base)]
    return list(check_templates([template(source)], theirs, set()))


def alarms(findings: list[Finding]) -> list[Finding]:
    clean = (Status.PASSED, Status.NOT_EXAMINED)
    return [each for each in findings if each.status not in clean and each.severity]


@pytest.mark.parametrize("name", BENIGN)
def test_official_idioms_raise_no_alarm(name: str) -> None:
    findings = check(BENIGN[name])
    assert not [e for e in alarms(findings) if e.status is Status.FOUND]
    assert not [e for e in alarms(findings) if e.severity > Severity.LOW]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_are_never_clean(name: str) -> None:
    expected, severity, source = HOSTILE[name]
    findings = check(source)
    worst = [each.severity for each in alarms(findings) if each.check == expected]
    assert max(worst) >= severity
    assert not [each for each in findings if each.check == "CT-04" and each.status is Status.PASSED]


@pytest.mark.parametrize("name", ["chatml", "llama 3.1", "qwen 3"])
def test_the_bases_template_passes(name: str) -> None:
    findings = check(BENIGN[name], BENIGN[name])
    assert not [each for each in alarms(findings) if each.severity > Severity.LOW]
    assert any(each.check == "CT-02" and each.status is Status.PASSED for each in findings)


def test_only_white_space_differs_in_effect_not_at_all() -> None:
    (found,) = [e for e in check(CHATML + "{# a comment #}", CHATML) if e.check == "CT-02"]
    assert found.severity is Severity.INFO


def test_what_the_base_does_too_is_no_trigger() -> None:
    source = when("'deploy' in message['content']")
    assert not alarms(check(source, source))
    assert alarms(check(source, CHATML))


def test_words_that_only_the_subject_adds_count_against_the_base() -> None:
    findings = alarms(check(BENIGN["smollm2"], CHATML))
    assert {each.check for each in findings} == {"CT-02", "CT-04"}


def test_carriers_that_disagree(tmp_path: Path) -> None:
    write_model(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": CHATML})
    (tmp_path / "chat_template.jinja").write_text(BENIGN["llama 3"], "utf-8")
    report = audit(AuditRequest(tmp_path))
    assert "CT-01" in {each.check for each in report.problems}


def test_every_carrier_is_read(tmp_path: Path) -> None:
    bad = CHATML + "{{ ''.__class__ }}"
    write_model(tmp_path)
    write_json(
        tmp_path / "tokenizer_config.json",
        {
            "chat_template": [
                {"name": "default", "template": CHATML},
                {"name": "rag", "template": bad},
            ]
        },
    )
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(bad + " ", "utf-8")
    report = audit(AuditRequest(tmp_path))
    places = {each.location.partition(":")[0] for each in report.problems if each.check == "CT-03"}
    assert places == {
        "tokenizer_config.json#rag",
        "additional_chat_templates/tool_use.jinja#tool_use",
    }


def test_rendering_agrees_with_transformers(tiny_tokenizer: object) -> None:
    messages = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
    for name in ("chatml", "qwen 3"):
        tokenizer = tiny_tokenizer
        expected = tokenizer.apply_chat_template(  # type: ignore[attr-defined]
            messages, chat_template=BENIGN[name], tokenize=False, add_generation_prompt=True
        )
        variables = {
            "messages": messages, "tools": None, "add_generation_prompt": True,
            **tokenizer.special_tokens_map,  # type: ignore[attr-defined]
        }  # fmt: skip
        job = {"task": "render", "template": BENIGN[name], "cases": [{"variables": variables}]}
        assert run_child(job).results == [{"text": expected}]


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('no') }}",
        "{{ 1 // 0 }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ lipsum(n=9) and missing.name }}",
    ],
)
def test_the_child_answers_with_an_error(source: str) -> None:
    job = {"task": "render", "template": source, "cases": [{"variables": {"messages": []}}]}
    (result,) = run_child(job).results
    assert result["error"]


def test_the_child_can_open_nothing() -> None:
    from durometer.audit import template_child

    code = template_child.limit.__code__
    assert "RLIMIT_NOFILE" in code.co_consts
    job = {"task": "render", "template": "{{ 'x' * (2 ** 29) }}", "cases": [{"variables": {}}]}
    assert run_child(job).results[0]["error"] == "memory"


def test_a_job_that_is_no_text_is_refused() -> None:
    assert json.dumps({"a": "\ud800"})  # json itself escapes it
    done = run_child({"task": "render", "template": "\ud800", "cases": []})
    assert not done.results
