"""The server of a page: loopback, its own files, requests that name it."""

from __future__ import annotations

import socket
import threading
from http.client import HTTPConnection

import pytest
from view_pages import make_page, shown

from capacitor_rt.errors import InputError
from capacitor_rt.evaluation.view.serve import PageServer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    (folder / "secret.txt").write_text("secret")
    page = make_page(folder / "page", [shown(0)]).index.parent
    # added after the page was made
    (page / "later.html").write_text("later")
    # listed, and now a link to the outside
    (page / "thumbs/000000.webp").unlink()
    (page / "thumbs/000000.webp").symlink_to(folder / "secret.txt")
    return page


@pytest.fixture(scope="module")
def server(folder):
    with PageServer(folder) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server, path, host=None, method="GET"):
    connection = HTTPConnection("127.0.0.1", server.server_port, timeout=600)
    connection.putrequest(method, path, skip_host=True)
    for value in [f"127.0.0.1:{server.server_port}"] if host is None else host:
        connection.putheader("Host", value)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer, body


def test_files_of_the_page(server, folder):
    for path, kind in (("/", "text/html"), ("/data.js", "text/javascript"), ("/images/000000-0.webp", "image/webp")):
        answer, body = ask(server, path)
        assert answer.status == 200 and answer.headers["Content-Type"].startswith(kind)
        assert body == (folder / (path[1:] or "index.html")).read_bytes()
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
    answer, body = ask(server, "/data.js?x=1", method="HEAD")
    assert answer.status == 200 and body == b"" and int(answer.headers["Content-Length"]) > 0


@pytest.mark.parametrize(
    "path",
    [
        "/later.html",
        "/thumbs/000000.webp",
        "/images/",
        "/../secret.txt",
        "/%2e%2e/secret.txt",
        "/images/../../secret.txt",
        "//etc/passwd",
        "http://127.0.0.1/../secret.txt",
        "/data.js%00",
    ],
)
def test_nothing_else(server, path):
    answer, body = ask(server, path)
    assert answer.status == 404 and b"secret" not in body


@pytest.mark.parametrize(
    "host",
    [
        [],
        ["evil.example"],
        ["evil.example:{port}"],
        ["127.0.0.1"],
        ["127.0.0.1:1"],
        ["127.0.0.1:{port}", "evil.example"],
        ["127.0.0.1:{port}.evil.example"],
    ],
)
def test_another_name_is_refused(server, host):
    names = [name.format(port=server.server_port) for name in host]
    answer, body = ask(server, "/", names)
    assert answer.status in (400, 421) and b"<html" not in body


def test_our_names_are_not(server):
    for name in ("127.0.0.1", "localhost"):
        assert ask(server, "/", [f"{name}:{server.server_port}"])[0].status == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_only_reading(server, method):
    assert ask(server, "/", method=method)[0].status == 501


def test_loopback_alone(server):
    assert server.server_address[0] == "127.0.0.1"


def test_a_port_that_is_taken_is_said_in_words(folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InputError, match=f"port {taken.getsockname()[1]} cannot be had"):
            PageServer(folder, taken.getsockname()[1])


def test_no_page_no_server(tmp_path):
    with pytest.raises(InputError, match="holds no page"):
        PageServer(tmp_path)
