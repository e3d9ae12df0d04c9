"""Ask a chat model on an OpenAI-compatible server.

Failures that may pass are retried: no connection, a timeout, HTTP 429 and 5xx, a body that is not a chat completion.
Any other status, such as a wrong key or an unknown model, ends the run. The key is sent in one header and removed from
everything that the server returns. Redirects are refused, because they would carry the key to another host.
"""

import email.utils
import json
import os
import random
import re
import threading
import time
import urllib.parse
from collections.abc import Mapping
from typing import Any, NamedTuple

from exo.cli import console
from exo.cli.errors import ConfigError, RunError

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds; the wait doubles with each retry
LONGEST_RETRY_AFTER = 300.0
TRUNCATED = ("length", "max_tokens", "content_filter")  # finish reasons of an incomplete answer
RESERVED = ("messages", "model", "n", "stream")  # request parameters that --judge_options may not set
SUBSTITUTES = {"max_tokens": "max_completion_tokens", "temperature": ""}  # of parameters that a server may refuse


class Answer(NamedTuple):
    """The text that a server returned; `truncated` if it was cut off."""

    text: str
    truncated: bool


class NoAnswer(Exception):
    """All attempts failed; the message is the reason of the last."""


class _Retryable(Exception):
    """One attempt failed; `after` is how many seconds the server asks to wait."""

    def __init__(self, reason: str, after: float = 0.0) -> None:
        super().__init__(reason)
        self.after = after


def check(endpoint: str) -> None:
    """Raise ConfigError unless the endpoint is a plain address. It may hold no secret, because run.json records it."""
    expected = "--endpoint: expected http://host:port/v1, without a password or a query"
    try:
        parts = urllib.parse.urlsplit(endpoint)
        has_secret = parts.username is not None or bool(parts.query or parts.fragment)
        host = parts.hostname or ""
        is_valid = parts.scheme in ("http", "https") and bool(host) and host.isascii() and parts.port != 0
        host.encode("idna")  # raises for a name with an empty or too long label
    except ValueError:  # also if the port is not a number
        has_secret, is_valid = "@" in endpoint, False
    if has_secret or not endpoint.isprintable() or " " in endpoint:
        raise ConfigError(expected)
    if not is_valid:
        raise ConfigError(f"{expected}; got {endpoint!r}")


def parse_options(text: str | None) -> dict[str, Any]:
    """Parse further request parameters from a JSON object; ConfigError if they are invalid."""
    expected = f"--judge_options: expected a JSON object of request parameters, without {', '.join(RESERVED)}"
    try:
        options = json.loads(text or "{}")
        json.dumps(options, ensure_ascii=False, allow_nan=False).encode()  # raises if no request can hold it
    except (ValueError, RecursionError):
        raise ConfigError(expected) from None
    if not isinstance(options, dict) or set(RESERVED) & options.keys():
        raise ConfigError(expected)
    return options


def read_key(variable: str, default: str) -> str:
    """Return the API key in an environment variable, "" if it is the default one and is not set.

    The error messages quote neither the name nor the value, because either may be the key.
    """
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
        raise ConfigError("--api_key_env: expected the name of an environment variable, not the key itself")
    key = os.environ.get(variable, "").strip()
    if not key and variable != default:
        raise ConfigError("--api_key_env: the environment variable is not set; export it, or name another")
    if not (key.isascii() and key.isprintable()):
        raise ConfigError("--api_key_env: the variable's value has characters that an HTTP header cannot carry")
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
        """Make the client; `options` go into each request, and one that is None removes a default."""
        try:
            import openai
        except ModuleNotFoundError:
            raise ConfigError("--endpoint: needs openai; pip install 'exo-kernels[judge]'") from None
        self.url, self._key, self.retries = endpoint, key, retries
        settings = {"model": model, "temperature": 0, "max_tokens": max_tokens} | dict(options or {})
        self._settings = {name: value for name, value in settings.items() if value is not None}
        self._refused: set[str] = set()  # parameters that the server does not accept
        self._stopped = threading.Event()
        # Every request sets the header, so that openai sends no key of another variable.
        self._headers: dict[str, Any] = {"Authorization": f"Bearer {key}" if key else openai.Omit()}
        self._client = openai.OpenAI(
            base_url=endpoint,
            api_key=key or "none",
            max_retries=0,  # the client's retries ignore a long Retry-After and cannot be interrupted
            timeout=timeout,
            http_client=openai.DefaultHttpxClient(follow_redirects=False),
        )

    def request(self, question: str) -> dict[str, Any]:
        """Return the parameters of the request, the same for the same question."""
        return self._settings | {"messages": [{"role": "user", "content": question}]}

    def ask(self, question: str) -> Answer:
        """Return the answer. NoAnswer if all attempts fail, RunError if another attempt would fail too."""
        for attempt in range(self.retries + 1):
            try:
                return self._try(self.request(question))
            except _Retryable as error:
                reason, after = str(error), error.after
            wait = min(FIRST_WAIT * 2**attempt, LONGEST_WAIT) * random.uniform(0.5, 1.5)
            if attempt == self.retries or self._stopped.wait(max(wait, after)):
                break
        raise NoAnswer(reason)

    def stop(self) -> None:
        """Interrupt the threads that wait before another attempt."""
        self._stopped.set()

    def _try(self, request: dict[str, Any]) -> Answer:
        import openai

        accepted = self._without_refused(request)
        settings = {name: value for name, value in accepted.items() if name not in RESERVED}
        try:
            response = self._client.chat.completions.with_raw_response.create(
                model=accepted["model"], messages=accepted["messages"], extra_body=settings, extra_headers=self._headers
            )
            answer = _parse_answer(response.http_response.text)
            return answer._replace(text=self._without_key(answer.text))
        except openai.APIStatusError as error:
            status, message = error.status_code, self._server_message(error.body)
            if status in (400, 422) and self._record_refused(error.response.text, accepted):
                return self._try(request)
            if status == 429 or status >= 500:
                after = retry_after_seconds(error.response.headers.get("Retry-After", ""))
                raise _Retryable(f"HTTP {status}{message}", after) from None
            raise RunError(f"--endpoint {self.url}: HTTP {status}{message}; {_advice(status)}") from None
        except openai.APITimeoutError:
            raise _Retryable("timed out") from None
        except openai.APIConnectionError as error:
            reason = str(error.__cause__ or error) or type(error.__cause__).__name__
            raise _Retryable(self._without_key(reason)) from None

    def _without_refused(self, request: dict[str, Any]) -> dict[str, Any]:
        """Replace the parameters that the server does not accept."""
        renamed = {SUBSTITUTES[name] if name in self._refused else name: value for name, value in request.items()}
        renamed.pop("", None)
        return renamed

    def _record_refused(self, text: str, accepted: Mapping[str, Any]) -> bool:
        """Return whether the server refused a parameter that is optional; later requests omit it."""
        for name, substitute in SUBSTITUTES.items():
            if name in accepted and (substitute or name) in text:
                used = f"; {substitute} is sent instead" if substitute else ""
                console.warn(f"--endpoint {self.url}: the judge does not take {name}={accepted[name]}{used}")
                self._refused.add(name)
                return True
        return False

    def _server_message(self, body: object) -> str:
        """Return the server's reason in parentheses, on one line."""
        if isinstance(body, dict):
            body = body.get("message") or body.get("detail")
        text = " ".join(self._without_key(str(body or "")).split())
        return f" ({text[:200]})" if text else ""

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def _parse_answer(text: str) -> Answer:
    try:
        choice = json.loads(text)["choices"][0]
        content, truncated = choice["message"]["content"], choice.get("finish_reason") in TRUNCATED
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        content, truncated = 0, False
    if content is None:  # a refusal, or thoughts that used up all tokens
        return Answer("", truncated)
    if not isinstance(content, str):
        raise _Retryable("HTTP 200, but the body is not a chat completion")
    # JSON may hold half of a surrogate pair
    return Answer(content.encode("utf-8", errors="replace").decode("utf-8"), truncated)


def retry_after_seconds(value: str) -> float:
    """Parse a Retry-After header, a number of seconds or a date; at most LONGEST_RETRY_AFTER, 0 if it is neither."""
    value = value.strip()
    if value.isascii() and value.isdigit():
        seconds = float(value[:9])
    else:
        date = email.utils.parsedate_tz(value)
        seconds = email.utils.mktime_tz(date) - time.time() if date else 0.0
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER)


def _advice(status: int) -> str:
    if status in (401, 403):
        return "check the key in the variable that --api_key_env names"
    if status == 404 or 300 <= status < 400:
        return "check --endpoint and --model"
    return "the server refuses this request; change its options"
