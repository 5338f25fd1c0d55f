"""A chat-completions server in a thread, with the faults of real ones."""

import json
import socket
import struct
import time
from collections.abc import Callable, Iterable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from types import MappingProxyType, TracebackType
from typing import Any, NamedTuple, Self


class Reply(NamedTuple):
    """What the server does with a request."""

    status: int
    body: str = ""
    headers: Mapping[str, str] = MappingProxyType({})
    delay_s: float = 0.0
    is_reset: bool = False


def completion(content: str | None) -> Reply:
    return Reply(200, json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]}))


class ChatServer:
    """Answers the first requests with ``faults``, one after the other, and all others with ``answer``.

    Attributes:
        bodies: of the requests, in the order of their arrival.
        headers: likewise.
        times: likewise, in seconds.
    """

    def __init__(self, answer: Callable[[str], str | Reply | None], faults: Iterable[Reply] = ()) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        waiting = iter(faults)
        lock = Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler) -> None:  # noqa: N805
                body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                with lock:
                    self.times.append(time.monotonic())
                    self.bodies.append(body)
                    self.headers.append({"path": handler.path, **dict(handler.headers.items())})
                    fault = next(waiting, None)
                said = answer(body["messages"][0]["content"]) if fault is None else fault
                reply = said if isinstance(said, Reply) else completion(said)
                time.sleep(reply.delay_s)
                if reply.is_reset:
                    # Closing with unsent data to linger for no time sends a reset.
                    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    handler.connection.close()
                    return
                handler.send_response(reply.status)
                for name, value in {**reply.headers, "Content-Length": str(len(reply.body.encode()))}.items():
                    handler.send_header(name, value)
                handler.end_headers()
                handler.wfile.write(reply.body.encode())

            def log_message(handler, *_: object) -> None:  # noqa: N805
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(server, *_: object) -> None:  # noqa: N805
                """Says nothing: clients that left are part of the tests."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.005})

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
