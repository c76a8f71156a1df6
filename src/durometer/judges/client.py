"""Asking an OpenAI-compatible endpoint: one POST, retried with growing pauses where that may help.

Only the address that the user named is contacted: redirects are not followed, so that a key never
reaches another host, and a key is not sent in the clear to another machine.
"""

import http.client
import ipaddress
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from durometer.core.errors import InputError

__all__ = ["Client", "EndpointDownError", "EndpointRefusedError", "checked_url", "is_loopback"]

MOST_BYTES = 4_000_000
LONGEST_PAUSE = 60.0
RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529})
# Answers that are about the one request and not about address, key or model.
ABOUT_REQUEST = frozenset({400, 413, 422})


class EndpointDownError(Exception):
    """The endpoint does not answer, however often it is asked, or turns everything down."""


class EndpointRefusedError(Exception):
    """The endpoint turned one request down."""


def checked_url(url: str, *, with_key: bool) -> str:
    """Return the address of the chat completions under ``url``.

    Raises:
        InputError: no http(s) address, one that holds a password, or a key to be sent in the clear.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise InputError(f"judge 'endpoint': url: {error}") from None
    if parts.scheme not in ("http", "https") or not host:
        raise InputError(f"judge 'endpoint': url = {url!r}: not an address such as https://HOST/v1")
    if parts.username or parts.password:
        raise InputError(
            "judge 'endpoint': url: holds a name or password; name a variable with key=NAME"
        )
    if with_key and parts.scheme == "http" and not is_loopback(url):
        raise InputError(f"judge 'endpoint': url: a key would go to {host} unencrypted; use https")
    base = url.rstrip("/")
    return base if base.endswith("/chat/completions") else f"{base}/chat/completions"


def is_loopback(url: str) -> bool:
    """Say whether an address is this machine's own."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Follow nothing: the answer is then the redirect itself, an error."""


@dataclass(frozen=True)
class Client:
    """One endpoint.

    Attributes:
        url: of the chat completions.
        key: sent as bearer token; '' sends none.
        tries: times that a request is sent at most.
        pause: seconds before the second try, doubled every time.
        sleep: waits; a test need not.
    """

    url: str
    key: str
    timeout: float
    tries: int
    pause: float
    sleep: Callable[[float], None] = time.sleep

    def post(self, body: dict[str, Any]) -> Any:
        """Return the decoded answer to ``body``; None where it is not JSON.

        Raises:
            EndpointRefusedError: the request itself was turned down.
            EndpointDownError: no answer after all tries, or one that no further try would change.
        """
        problem = ""
        for number in range(self.tries):
            try:
                return self._once(body)
            except urllib.error.HTTPError as error:
                with error:
                    said = _said(error)
                if error.code in ABOUT_REQUEST:
                    raise EndpointRefusedError(said) from error
                if error.code not in RETRIED:
                    raise EndpointDownError(said) from error
                problem, asked = said, _retry_after(error)
            except (OSError, http.client.HTTPException) as error:
                problem, asked = _reason(error), 0.0
            if number + 1 < self.tries:
                self.sleep(min(max(self.pause * 2**number, asked), LONGEST_PAUSE))
        raise EndpointDownError(f"{problem}, after {self.tries} tries")

    def _once(self, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json", "User-Agent": "durometer"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.url, data, headers, method="POST")
        # What runs on this machine is asked directly, whatever proxy there is for the rest.
        direct = [urllib.request.ProxyHandler({})] if is_loopback(self.url) else []
        opener = urllib.request.build_opener(_NoRedirects, *direct)
        with opener.open(request, timeout=self.timeout) as answer:
            raw = answer.read(MOST_BYTES + 1)
        if len(raw) > MOST_BYTES:
            return None
        try:
            return json.loads(raw)
        except (ValueError, RecursionError):
            return None


def _retry_after(error: urllib.error.HTTPError) -> float:
    try:
        return max(0.0, float(error.headers.get("Retry-After", "")))
    except ValueError:
        return 0.0


def _said(error: urllib.error.HTTPError) -> str:
    """Return the status, and what the endpoint says of it in its own words, in short."""
    try:
        body = json.loads(error.read(10_000))
        told = body["error"]["message"] if isinstance(body["error"], dict) else body["error"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError, http.client.HTTPException):
        told = error.reason
    return f"HTTP {error.code}: {' '.join(str(told).split())[:200]}"


def _reason(error: Exception) -> str:
    inner = getattr(error, "reason", None) or error
    return getattr(inner, "strerror", None) or str(inner) or type(inner).__name__
