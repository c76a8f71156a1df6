"""A small server on this machine, which stands for one that the user names."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

# Answers a request, with a body or (HEAD) without.
Answer = Callable[..., None]


@contextmanager
def served(answer: Answer) -> Iterator[str]:
    """Serve GET and HEAD by ``answer(request, with_body=...)``; yield the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self, with_body=True)

        def do_HEAD(self) -> None:
            answer(self, with_body=False)

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def hub_served(answer: Answer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Let huggingface_hub take this server for the hub, with a cache folder of its own."""
    constants = huggingface_hub.constants
    with served(answer) as address:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        huggingface_hub.close_session()
        yield address
        huggingface_hub.close_session()
