"""Files over HTTP on the loopback interface, with ranges, listings, and what goes wrong on a network."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = ("404", "500", "reset", "short")


class HttpFiles:
    """Files by their path.

    Attributes:
        url: of the server.
        faults: of a path, what is to go wrong with the next requests for its bytes: see FAULTS.
        sent: bytes that were sent of each path; `requests`: how often they were asked for.
    """

    def __init__(self, url: str):
        self.url = url
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[str]] = {}
        self.sent: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()


@contextmanager
def serving() -> Iterator[HttpFiles]:
    """A server until the end of the block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(head=True)

        def do_GET(self) -> None:
            self.answer(head=False)

        def answer(self, head: bool) -> None:
            path = self.path.rstrip("/")
            data = held.files.get(path)
            if data is None:
                self.list_or_404(path, head)
                return
            fault = held.faults[path].pop(0) if not head and held.faults.get(path) else ""
            if fault in ("404", "500"):
                self.send_error(int(fault))
                return
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            first, last = (int(wanted[1]), int(wanted[2] or len(data) - 1)) if wanted else (0, len(data) - 1)
            part = data[first : last + 1]
            if fault == "short":
                part = part[: len(part) // 2]
            self.send_response(206 if wanted else 200)
            if wanted:
                self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(data)}")
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            if head:
                return
            if fault == "reset":
                self.wfile.write(part[: len(part) // 2])
                self.close_connection = True
                return
            held.requests[path] += 1
            held.sent[path] += len(part)
            self.wfile.write(part)

        def list_or_404(self, path: str, head: bool) -> None:
            below = sorted(
                {name.removeprefix(path + "/").split("/")[0] for name in held.files if name.startswith(path + "/")}
            )
            if not below:
                self.send_error(404)
                return
            links = "".join(f'<a href="{path}/{name}">{name}</a>' for name in below).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(links)))
            self.end_headers()
            if not head:
                self.wfile.write(links)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    held = HttpFiles(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield held
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
