"""A proxy before an S3 server that does with chosen requests what a busy or broken service and its network do."""

from __future__ import annotations

import http.client
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from waiting import HANG_SECONDS

FAULTS = ("SlowDown", "InternalError", "AccessDenied", "NoSuchKey", "reset", "short", "refused")
_STATUS = {"SlowDown": 503, "InternalError": 500, "AccessDenied": 403, "NoSuchKey": 404}
_BODY = "<?xml version='1.0'?><Error><Code>{0}</Code><Message>{0}</Message></Error>"


class Faults:
    """What goes wrong.

    Attributes:
        url: of the proxy.
        next: of a path such as `/bucket/key`, what goes wrong with the next GETs of it.
        always: of a path, what goes wrong with every GET of it, but for the first of them that `spared` gives a number.
        gets: how often the bytes of each path were asked for.
    """

    def __init__(self, url: str):
        self.url = url
        self.next: dict[str, list[str]] = {}
        self.always: dict[str, str] = {}
        self.spared: Counter[str] = Counter()
        self.gets: Counter[str] = Counter()

    def fault(self, path: str) -> str:
        self.gets[path] += 1
        if self.next.get(path):
            return self.next[path].pop(0)
        return self.always.get(path, "") if self.gets[path] > self.spared[path] else ""


@contextmanager
def proxy(port: int) -> Iterator[Faults]:
    """A proxy before the server at `port` of the loopback interface, until the end of the block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            # a listing has a query
            fault = held.fault(self.path) if self.command == "GET" and "?" not in self.path else ""
            if fault == "refused":
                self.close_connection = True
                return
            if fault in _STATUS:
                self.reply(_STATUS[fault], [("Content-Type", "application/xml")], _BODY.format(fault).encode())
                return
            server = http.client.HTTPConnection("127.0.0.1", port, timeout=HANG_SECONDS)
            server.request(self.command, self.path, body, dict(self.headers))
            found = server.getresponse()
            data = found.read()
            server.close()
            cut = len(data) // 2 if fault in ("reset", "short") else None
            self.reply(found.status, found.getheaders(), data, cut, is_told=fault == "short")

        def reply(self, status, headers, data: bytes, cut: int | None = None, is_told: bool = False) -> None:
            self.send_response(status)
            length = next((v for k, v in headers if k.lower() == "content-length"), str(len(data)))
            for name, value in headers:
                if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(cut) if is_told else length)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data[:cut])
            if cut is not None:
                self.close_connection = True

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    held = Faults(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield held
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
