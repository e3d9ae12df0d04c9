"""One question to a chat model: any server that speaks OpenAI's chat completions, over the standard library.

What may pass is tried again: no connection, a time-out, HTTP 429 and 5xx, a body that is no chat completion. What will
not pass stops the run: any other status, such as a wrong key or an unknown model. The key comes from the environment,
goes into one header, and is cut out of whatever the server says. Left out: streaming, and redirects, which would carry
the key to another host.
"""

import email.utils
import http.client
import json
import os
import random
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any, NamedTuple

from exo.cli import console
from exo.cli.errors import ConfigError, RunError

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds; doubled from try to try
LONGEST_RETRY_AFTER = 300.0
_LARGEST = 1 << 24  # bytes of an answer


CUT = ("length", "max_tokens", "content_filter")  # finish reasons of an answer that is not whole
OURS = ("messages", "model", "n", "stream")  # parts of a request that are not for the user to set


class Answer(NamedTuple):
    """What a server answered; `cut` if it stopped before the end."""

    text: str
    cut: bool


class NoAnswer(Exception):
    """No answer after all tries; one line says why."""


class _Transient(Exception):
    """What went wrong with one try, and how long the server wants to be left alone."""

    def __init__(self, reason: str, after: float = 0.0) -> None:
        super().__init__(reason)
        self.after = after


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None  # urllib then reports the 3xx as it is


def check(endpoint: str) -> None:
    """ConfigError unless it is the plain address of a server. Secrets in it would end up in run.json."""
    expected = "--endpoint: expected http://host:port/v1, without a password or a query"
    try:
        parts = urllib.parse.urlsplit(endpoint)
        plain = parts.username is None and not parts.query and not parts.fragment
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        plain, whole = "@" not in endpoint, False
    if not plain or not endpoint.isprintable() or " " in endpoint:
        raise ConfigError(expected)
    if not whole:
        raise ConfigError(f"{expected}; got {endpoint!r}")


def options_from(text: str | None) -> dict[str, Any]:
    """Further parts of each request, from a JSON object."""
    expected = f"--judge_options: expected a JSON object of request parameters, without {', '.join(OURS)}"
    try:
        options = json.loads(text or "{}")
    except (ValueError, RecursionError):
        raise ConfigError(expected) from None
    if not isinstance(options, dict) or set(OURS) & options.keys():
        raise ConfigError(expected)
    return options


def key_from(variable: str, default: str) -> str:
    """The key in an environment variable, "" where the default one is not set. Never quotes what it was given."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
        raise ConfigError("--api_key_env: expected the name of an environment variable, not the key itself")
    key = os.environ.get(variable, "").strip()
    if not key and variable != default:
        raise ConfigError("--api_key_env: the environment variable that it names is not set")
    if not (key.isascii() and key.isprintable()):
        raise ConfigError("--api_key_env: the variable's value holds characters that no HTTP header can")
    return key


class JudgeClient:
    """A model behind an endpoint. Threads may share it."""

    def __init__(
        self,
        endpoint: str,
        model: str,
        key: str,
        *,
        retries: int,
        timeout: float,
        max_tokens: int | None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """`options` go into each request; one that is None takes the default out of it."""
        self.url, self._key, self._retries, self._timeout = endpoint, key, retries, timeout
        settings = {"model": model, "temperature": 0, "max_tokens": max_tokens} | dict(options or {})
        self._settings = {name: value for name, value in settings.items() if value is not None}
        self._refused: set[str] = set()  # names of settings that the server does not take
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._stopped = threading.Event()

    def body(self, question: str) -> bytes:
        """The request, byte for byte the same for the same question."""
        messages = [{"role": "user", "content": question}]
        return json.dumps(self._settings | {"messages": messages}, sort_keys=True).encode()

    def ask(self, body: bytes) -> Answer:
        """The answer. Unanswered when all tries failed, RunError when another would fail too."""
        for attempt in range(self._retries + 1):
            try:
                return self._try(body)
            except _Transient as error:
                reason, after = str(error), error.after
            wait = min(FIRST_WAIT * 2**attempt, LONGEST_WAIT) * random.uniform(0.5, 1.5)
            if attempt == self._retries or self._stopped.wait(max(wait, after)):
                break
        raise NoAnswer(reason)

    def stop(self) -> None:
        """Let the threads that wait for another try give up."""
        self._stopped.set()

    def _try(self, body: bytes) -> Answer:
        while True:
            sent = self._accepted(json.loads(body))
            status, text, after = self._send(sent)
            if status not in (400, 422) or not self._refuses(text, sent):
                break
        if status == 429 or status >= 500:
            raise _Transient(f"HTTP {status}{self._said(text)}", _seconds(after))
        if status != 200:
            raise RunError(f"--endpoint {self.url}: HTTP {status}{self._said(text)}; {_advice(status)}")
        answer = _answer(text)
        return answer._replace(text=self._clean(answer.text))

    def _accepted(self, request: dict[str, Any]) -> dict[str, Any]:
        """The request as the server takes it."""
        if "temperature" in self._refused:
            request.pop("temperature", None)
        if "max_tokens" in self._refused and "max_tokens" in request:
            request["max_completion_tokens"] = request.pop("max_tokens")
        return request

    def _refuses(self, text: str, sent: Mapping[str, Any]) -> bool:
        """Whether the server refused a setting that a request can do without; it is then left out of all."""
        for name, word in (("max_tokens", "max_completion_tokens"), ("temperature", "temperature")):
            if name in sent and word in text:
                instead = "" if name == "temperature" else f"; {word} is sent instead"
                console.warn(f"--endpoint {self.url}: the judge does not take {name}={sent[name]}{instead}")
                self._refused.add(name)
                return True
        return False

    def _send(self, body: Mapping[str, Any]) -> tuple[int, str, str]:
        """(status, text, Retry-After)"""
        data = json.dumps(body, sort_keys=True).encode()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        request = urllib.request.Request(self.url.rstrip("/") + "/chat/completions", data=data, headers=headers)
        try:
            try:
                response = self._opener.open(request, timeout=self._timeout)
            except urllib.error.HTTPError as error:
                response = error  # an answer too
            with response:
                text = response.read(_LARGEST).decode("utf-8", errors="replace")
                return response.status, text, response.headers.get("Retry-After", "")
        except (OSError, http.client.HTTPException) as error:
            raise _Transient(self._clean(str(getattr(error, "reason", "") or error) or type(error).__name__)) from None

    def _said(self, text: str) -> str:
        """What the server gave as the reason, on one line."""
        try:
            said = json.loads(text)
            said = said.get("error", said)
            said = said if isinstance(said, str) else str(said.get("message") or said.get("detail") or "")
        except (ValueError, AttributeError, RecursionError):
            said = text
        said = " ".join(self._clean(said).split())
        return f" ({said[:200]})" if said else ""

    def _clean(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def _answer(text: str) -> Answer:
    try:
        choice = json.loads(text)["choices"][0]
        content, cut = choice["message"]["content"], choice.get("finish_reason") in CUT
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        content, cut = 0, False
    if content is None:
        return Answer("", cut)  # a refusal, or thoughts that took all the tokens
    if not isinstance(content, str):
        raise _Transient("HTTP 200, but the body is no chat completion")
    return Answer(content.encode("utf-8", errors="replace").decode("utf-8"), cut)  # JSON may hold half a character


def _seconds(retry_after: str) -> float:
    """Retry-After is a number of seconds or a date."""
    value = retry_after.strip()
    if value.isascii() and value.isdigit():
        wanted = float(value[:9])
    else:
        date = email.utils.parsedate_tz(value)
        wanted = email.utils.mktime_tz(date) - time.time() if date else 0.0
    return min(max(wanted, 0.0), LONGEST_RETRY_AFTER)


def _advice(status: int) -> str:
    if status in (401, 403):
        return "check the key in the variable that --api_key_env names"
    if status == 404 or 300 <= status < 400:
        return "check --endpoint and --model"
    return "the request was refused, and would be again"
