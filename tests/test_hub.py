"""Subjects by hub id, against a small hub on this machine: pinned, one-line errors, no pickle."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import cli_world
import huggingface_hub.constants
import loopback
import pytest
import tiny_world

from durometer.cli import main
from durometer.core.errors import InputError, UnsafeInputError
from durometer.subjects.load import load_subject

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Repositories by name, each a mapping of file names to contents.

    ``limit``: bytes of a file after which the connection breaks; ``asked``: paths of all requests.
    """

    repos: dict[str, dict[str, bytes]]
    limit: int | None = None
    asked: list[str] = field(default_factory=list)

    def answer(self, request: BaseHTTPRequestHandler, *, with_body: bool) -> None:
        path = request.path.partition("?")[0]
        self.asked.append(path)
        headers, body, status = {"X-Repo-Commit": COMMIT}, b"", 200
        api, _, rest = path.removeprefix("/api/models/").partition("/revision/")
        tree = path.removeprefix("/api/models/").partition("/tree/")[0]
        name, _, file = path.removeprefix("/").partition(f"/resolve/{COMMIT}/")
        if rest in ("main", "v1", COMMIT) and api in self.repos:
            body = json.dumps({"id": api, "sha": COMMIT, "siblings": self.siblings(api)}).encode()
        elif rest and api in self.repos:
            status, headers["X-Error-Code"] = 404, "RevisionNotFound"
        elif "/tree/" in path and tree in self.repos:
            body = json.dumps(self.tree(tree)).encode()
        elif file in self.repos.get(name, {}):
            body = self.repos[name][file]
            headers["ETag"] = f'"{hashlib.sha1(body).hexdigest()}"'
        else:
            status, headers["X-Error-Code"] = 404, "RepoNotFound"
            headers["X-Error-Message"] = "Repository not found"
        self.send(request, status, headers, body, with_body=with_body)

    def send(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        headers: dict[str, str],
        body: bytes,
        *,
        with_body: bool,
    ) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if with_body:
            request.wfile.write(body[: self.limit])
        request.close_connection = True

    def siblings(self, name: str) -> list[dict[str, str]]:
        return [{"rfilename": file} for file in self.repos[name]]

    def tree(self, name: str) -> list[dict[str, Any]]:
        return [
            {
                "type": "file",
                "path": file,
                "size": len(body),
                "oid": hashlib.sha1(body).hexdigest(),
            }
            for file, body in self.repos[name].items()
        ]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a tiny random model, and one that nobody needs."""
    folder = cli_world.write_model(tmp_path_factory.mktemp("model"), tiny_world.fresh_model())
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return files | {"pytorch_model.bin": b"pickle", "code.py": b"raise SystemExit"}


@pytest.fixture
def hub(model: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    pickled = {n: b for n, b in model.items() if not n.endswith(".safetensors")}
    found = Hub({"org/tiny": model, "org/pickled": pickled})
    with loopback.hub_served(found.answer, tmp_path / "hub", monkeypatch):
        yield found


def test_a_hub_id_is_loaded_and_its_revision_pinned(hub: Hub) -> None:
    subject = load_subject("org/tiny")
    assert subject.name == "org/tiny"
    assert (subject.source.kind, subject.source.location) == ("hub", "org/tiny")
    assert subject.source.revision == COMMIT
    local = tiny_world.as_subject(tiny_world.fresh_model())
    assert subject.fingerprint == local.fingerprint
    fetched = {path.rpartition("/")[2] for path in hub.asked if "/resolve/" in path}
    assert "model.safetensors" in fetched
    assert not fetched & {"pytorch_model.bin", "code.py"}


def test_a_campaign_records_the_revision(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = cli_world.write_files(tmp_path / "files")
    out = tmp_path / "out"
    words = ["stress", "org/tiny", "--domain", str(files.easy), "--out", str(out), "--json"]
    assert main([*words, "--tamper", "lora:steps=1", "--seeds", "1"]) == 0
    source = json.loads(capsys.readouterr().out)["subject"]["source"]
    assert source == {
        "kind": "hub",
        "location": "org/tiny",
        "revision": COMMIT,
        "undefended": "",
        "reference": "",
    }


def test_a_revision_can_be_named(hub: Hub) -> None:
    assert load_subject("org/tiny@v1").source.revision == COMMIT
    with pytest.raises(
        InputError, match="hub id 'org/tiny@v2' could not be fetched: no such revision"
    ) as caught:
        load_subject("org/tiny@v2")
    assert "\n" not in str(caught.value)


def test_what_was_fetched_once_is_there_without_a_network(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_subject("org/tiny")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    again = load_subject("org/tiny")
    assert hub.asked == []
    assert again.fingerprint == first.fingerprint
    assert again.source == first.source


def test_a_repository_with_pickles_alone_is_refused(hub: Hub) -> None:
    with pytest.raises(UnsafeInputError, match="no safetensors weights there; a pickle can run"):
        load_subject("org/pickled")
    assert not any(path.endswith(".bin") for path in hub.asked)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("org/none", "hub id 'org/none' could not be fetched: no such repository, or a private"),
        ("org/--bad--", "hub id 'org/--bad--' could not be fetched: "),
    ],
)
def test_a_repository_that_is_not_there_is_one_line(
    hub: Hub, spec: str, expected: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    assert main(["stress", spec, "--domain", "world", "--out", out]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith(f"error: {expected}")
    assert "Traceback" not in "".join(lines)
    assert len(lines) == 2


def test_a_hub_that_is_away_is_one_line(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda _: None)  # between two tries
    with pytest.raises(InputError, match="hub id 'org/tiny' could not be fetched: ") as caught:
        load_subject("org/tiny")
    assert "\n" not in str(caught.value)


def test_a_download_that_breaks_off_is_one_line(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.limit = 5000
    with pytest.raises(InputError, match="hub id 'org/tiny' could not be fetched: ") as caught:
        load_subject("org/tiny")
    assert "\n" not in str(caught.value)


def test_without_a_network_the_line_says_what_to_do(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"a local folder needs './' or an absolute path"):
        load_subject("org/tiny")
    assert hub.asked == []
