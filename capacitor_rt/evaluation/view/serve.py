"""A page on the loopback interface: its own files, to requests that name this very address, and nothing else."""

from __future__ import annotations

import errno
import shutil
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ...errors import InputError
from .folder import read_manifest
from .site import POLICY

LOOPBACK = "127.0.0.1"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".json": "application/json",
    ".webp": "image/webp",
}


class PageServer(ThreadingHTTPServer):
    """Serves the page in a folder to browsers on this machine.

    A request is refused unless its `Host` names the loopback address and our port, as one does not that a website made
    by pointing a name of its own at it.

    Args:
        folder: of a page.
        port: 0 for any free one.

    Raises:
        InputError: there is no page, or the port is taken.
    """

    daemon_threads = True

    def __init__(self, folder: Path, port: int = 0):
        files = read_manifest(folder)
        if files is None:
            raise InputError(f"{str(folder)!r} holds no page: make one with `capacitor-rt view IMAGES --out PAGE`")
        self.folder = folder.resolve()
        self.files = {f"/{name}": self.folder / name for name in files} | {"/": self.folder / "index.html"}
        try:
            super().__init__((LOOPBACK, port), _Handler)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            raise InputError(f"port {port} cannot be had: {error.strerror}: give another --port, or 0") from error

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.server_port}/"

    def is_ours(self, host: str | None) -> bool:
        """Whether a `Host` header names this server."""
        return host in (f"{LOOPBACK}:{self.server_port}", f"localhost:{self.server_port}")


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    server_version = "capacitor-rt"
    sys_version = ""
    # a connection that says nothing is let go
    timeout = 60

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or not self.server.is_ours(hosts[0]):
            self._refuse(HTTPStatus.MISDIRECTED_REQUEST)
            return
        asked = urlsplit(self.path).path
        if asked == "/favicon.ico":
            # every browser asks
            self.send_response(HTTPStatus.NO_CONTENT)
            self.end_headers()
            return
        path = self.server.files.get(asked)
        kind = TYPES.get(path.suffix) if path else None
        if path is None or kind is None or path.resolve() != path:
            self._refuse(HTTPStatus.NOT_FOUND)
            return
        try:
            file = path.open("rb")
        except OSError:
            self._refuse(HTTPStatus.NOT_FOUND)
            return
        with file:
            self.send_response(HTTPStatus.OK)
            self._headers(kind, path.stat().st_size)
            if body:
                shutil.copyfileobj(file, self.wfile)

    def _refuse(self, status: HTTPStatus) -> None:
        text = f"{status.value} {status.phrase}\n".encode()
        self.send_response(status)
        self._headers("text/plain; charset=utf-8", len(text))
        if self.command != "HEAD":
            self.wfile.write(text)

    def _headers(self, kind: str, length: int) -> None:
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length))
        self.send_header("Content-Security-Policy", f"{POLICY}; frame-ancestors 'none'")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: what a request says does not belong on the terminal."""
