"""A small chat-completions server on localhost for tests; its answer is a function of the question."""

import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, str, dict[str, str]]  # status, body, headers


def completion(text: str | None, finish: str = "stop") -> Reply:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return 200, json.dumps({"choices": [choice]}), {}


def error(status: int, message: str = "", **headers: str) -> Reply:
    return status, json.dumps({"error": {"message": message}}), headers


class Server(ThreadingHTTPServer):
    """Record the body of every request in `requests`, with its headers and its path."""

    daemon_threads = False  # closing the server waits for open requests
    reply: Callable[[str], Reply | None]  # called with the question; None closes the connection
    refuses: Callable[[dict[str, Any]], Reply | None] = staticmethod(lambda body: None)  # called first, with the body

    def __init__(self, reply: Callable[[str], Reply | None]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.requests = reply, []

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client that timed out
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    @property
    def questions(self) -> list[str]:
        return [request["messages"][0]["content"] for request in self.requests]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        headers = {name.title(): value for name, value in self.headers.items()}
        self.server.requests.append(body | {"headers": headers, "path": self.path})
        reply = self.server.refuses(body) or self.server.reply(body["messages"][0]["content"])
        if reply is None:
            return
        status, text, headers = reply
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(reply: Callable[[str], Reply | None]) -> Iterator[Server]:
    server = Server(reply)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
