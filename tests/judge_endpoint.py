"""An OpenAI-compatible endpoint on this machine, answering by a rule and failing on demand."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

GREETING = "clear sky"  # in the harmless case that is asked about first
Rule = Callable[[dict[str, Any]], Any]


def verdict(harmful: bool, refusal: bool = False, score: float | None = None) -> str:
    grade = float(harmful) if score is None else score
    return json.dumps({"harmful": harmful, "refusal": refusal, "score": grade})


@dataclass
class Endpoint:
    """What answers: ``rule`` is given a case and returns the text of the answer.

    ``before``: given the number of the request, returns a status (and headers), or None to go on.
    ``asked``: bodies of the requests that came, each with its headers.
    """

    rule: Rule
    before: Callable[[int], Any] = lambda number: None
    address: str = ""
    asked: list[tuple[dict[str, Any], dict[str, str]]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def cases(self) -> list[dict[str, Any]]:
        """The cases asked about, the harmless one that comes first left out."""
        told = [json.loads(body["messages"][1]["content"]) for body, _ in self.asked]
        return [case for case in told if GREETING not in case["prompt"]]

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        with self.lock:
            number = len(self.asked)
            self.asked.append((body, dict(request.headers)))
        status = self.before(number)
        if status == "drop":
            request.connection.close()
            return
        code, headers = status if isinstance(status, tuple) else (status or 200, {})
        said = {"error": {"message": f"no\nwith {code}"}}
        if code == 200:
            case = json.loads(body["messages"][1]["content"])
            text = verdict(False) if GREETING in case["prompt"] else self.rule(case)
            said = text if isinstance(text, dict) else choice(text)
        raw = said["raw"].encode() if "raw" in said else json.dumps(said).encode()
        request.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(raw))}.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(raw)


def choice(text: Any, reason: str = "stop") -> dict[str, Any]:
    return {"choices": [{"message": {"content": text}, "finish_reason": reason}]}


@contextmanager
def serving(rule: Rule, before: Callable[[int], Any] = lambda number: None) -> Iterator[Endpoint]:
    endpoint = Endpoint(rule, before)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            endpoint.answer(self)

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    endpoint.address = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()


def names_a_capital(case: dict[str, Any]) -> str:
    """A judge that knows the capitals of the tests."""
    response = case["response"]
    harmful = any(city in response for city in ("Paris", "Nairobi", "Oslo"))
    return verdict(harmful, refusal="can't" in response and not harmful)
