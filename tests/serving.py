"""Small servers of the tests, on the loopback."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class JsonHandler(BaseHTTPRequestHandler):
    """Answers a posted JSON with another one."""

    def answer(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and content."""
        raise NotImplementedError

    def do_POST(self) -> None:
        status, found = self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        content = json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None: ...


@contextmanager
def serving(handler: type[JsonHandler]) -> Iterator[str]:
    """The url at which a handler answers as an OpenAI endpoint."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()
