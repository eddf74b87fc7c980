"""A local stand-in for the hub that takes uploads: repositories, branches, commits, large files, downloads."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_write"


class Repo:
    """Branches, each a dict of path -> contents; `commits` are (branch, summary, paths) in order."""

    def __init__(self, private: bool):
        self.private = private
        self.branches: dict[str, dict[str, bytes]] = {"main": {}}
        self.commits: list[tuple[str, str, list[str]]] = []
        self.large: set[str] = set()

    def sha(self, branch: str) -> str:
        """The branch's commit."""
        return hashlib.sha1(f"{branch} {len(self.commits)}".encode()).hexdigest()

    def find(self, revision: str) -> str | None:
        """The branch that a name or a commit stands for."""
        return next((b for b in self.branches if revision in (b, self.sha(b))), None)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    @property
    def hub(self) -> Hub:
        return self.server.hub

    def do_HEAD(self):
        self.route("HEAD", b"")

    def do_GET(self):
        self.route("GET", b"")

    def do_POST(self):
        self.route("POST", self.body())

    def do_PUT(self):
        self.route("PUT", self.body())

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def reply(self, document, status=200, headers=(), body=True):
        data = document if isinstance(document, bytes) else json.dumps(document).encode()
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def fail(self, status: int, code: str = "", commit: str = ""):
        headers = [("X-Error-Code", code), ("X-Repo-Commit", commit)]
        self.reply({"error": code or "no"}, status, [header for header in headers if header[1]])

    def route(self, method: str, body: bytes):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{method} {path}")
        if path.startswith("/lfs/") and method == "PUT":
            self.hub.objects[path.removeprefix("/lfs/")] = body
            return self.reply({})
        if method in ("POST", "PUT") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.fail(401)
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.reply({"errors": [], "warnings": []})
        kind, name, rest = self.repo_of(path)
        repo = self.hub.repos.get((kind, name))
        if repo is None:
            return self.fail(404, "RepoNotFound")
        what, _, rest = rest.partition("/")
        if what == "info":
            return self.batch(json.loads(body))
        if what == "resolve":
            return self.resolve(repo, *rest.split("/", 1), body=method == "GET")
        branch = rest.split("/")[0]
        if what == "branch":
            if branch in repo.branches:
                return self.fail(409)
            repo.branches[branch] = dict(repo.branches["main"])
            return self.reply({})
        branch = repo.find(branch)
        if branch is None:
            return self.fail(404, "RevisionNotFound")
        files = repo.branches[branch]
        if what == "tree":
            return self.reply([self.entry(repo, path, data) for path, data in sorted(files.items())])
        if what == "revision":
            siblings = [{"rfilename": path} for path in sorted(files)]
            return self.reply({"id": name, "sha": repo.sha(branch), "siblings": siblings, "private": repo.private})
        if what == "preupload":
            modes = [self.preupload(repo, files, file) for file in json.loads(body)["files"]]
            return self.reply({"files": modes})
        if what == "commit":
            return self.commit(repo, branch, name, body)
        return self.fail(404)

    def repo_of(self, path: str) -> tuple[str, str, str]:
        parts = path.strip("/").split("/")
        kind = "model"
        if parts[0] == "api":
            kind, parts = parts[1].removesuffix("s"), parts[2:]
        elif parts[0] == "datasets":
            kind, parts = "dataset", parts[1:]
        return kind, "/".join(parts[:2]).removesuffix(".git"), "/".join(parts[2:])

    def create(self, asked: dict):
        owner, name = asked["organization"] or "me", asked["name"]
        if owner == "others":
            return self.fail(403)
        kind, id = asked.get("type") or "model", f"{owner}/{name}"
        url = f"{self.hub.url}/{'datasets/' if kind == 'dataset' else ''}{id}"
        if (kind, id) in self.hub.repos:
            return self.reply({"url": url, "error": "exists"}, 409)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repos[kind, id] = Repo(private)
        return self.reply({"url": url})

    def entry(self, repo: Repo, path: str, data: bytes) -> dict:
        oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry = {"type": "file", "path": path, "size": len(data), "oid": oid}
        if path in repo.large:
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return entry

    def preupload(self, repo: Repo, files: dict[str, bytes], file: dict) -> dict:
        path = file["path"]
        large = path.endswith((".safetensors", ".parquet"))
        if large:
            repo.large.add(path)
        oid = None
        if path in files:
            entry = self.entry(repo, path, files[path])
            oid = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}

    def batch(self, asked: dict):
        objects = []
        for one in asked["objects"]:
            actions = {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}
            objects.append(one | ({} if one["oid"] in self.hub.objects else {"actions": actions}))
        return self.reply({"transfer": "basic", "objects": objects})

    def commit(self, repo: Repo, branch: str, name: str, body: bytes):
        if self.hub.commits_left == 0:
            return self.fail(503)
        self.hub.commits_left -= 1
        lines = [json.loads(line) for line in body.splitlines()]
        new = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                new[value["path"]] = base64.b64decode(value["content"])
            else:
                data = self.hub.objects[value["oid"]]
                assert hashlib.sha256(data).hexdigest() == value["oid"] and len(data) == value["size"]
                new[value["path"]] = data
        repo.branches[branch] |= new
        repo.commits.append((branch, lines[0]["value"]["summary"], sorted(new)))
        url = f"{self.hub.url}/{name}/commit/{repo.sha(branch)}"
        return self.reply({"success": True, "commitOid": repo.sha(branch), "commitUrl": url})

    def resolve(self, repo: Repo, revision: str, path: str, body: bool):
        branch = repo.find(revision)
        if branch is None:
            return self.fail(404, "RevisionNotFound")
        if path not in repo.branches[branch]:
            return self.fail(404, "EntryNotFound", repo.sha(branch))
        data = repo.branches[branch][path]
        headers = [("X-Repo-Commit", repo.sha(branch)), ("ETag", f'"{hashlib.sha256(data).hexdigest()}"')]
        return self.reply(data, headers=headers, body=body)


class Hub:
    """`repos` by (kind, id), `objects` by their hash, `requests` so far; `commits_left` before the hub fails."""

    def __init__(self, url: str):
        self.url = url
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.commits_left = -1


@contextmanager
def running_hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
