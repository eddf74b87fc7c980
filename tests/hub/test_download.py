"""`from_pretrained` of a hub id, against a local server that speaks the hub's file protocol."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from golden_cases import GOLDEN

COMMIT = "c0ffee" + "0" * 34
OLD_COMMIT = "beef" + "0" * 36
REPO = "data-archetype/full_capacitor"
REVISIONS = {"main": COMMIT, COMMIT: COMMIT, "v0": OLD_COMMIT, OLD_COMMIT: OLD_COMMIT}


class Hub(BaseHTTPRequestHandler):
    """`/{repo}/resolve/{revision}/{file}` with the headers that huggingface_hub asks for."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool):
        self.server.requests.append(f"{self.command} {self.path}")
        parts = self.path.strip("/").split("/")
        if "/".join(parts[:2]) == "data-archetype/private" and "Bearer hf_secret" not in self.headers.get(
            "Authorization", ""
        ):
            return self.fail(401, "RepoNotFound", "Invalid username or password.")
        if "/".join(parts[:2]) not in (REPO, "data-archetype/private") or len(parts) < 5 or parts[2] != "resolve":
            return self.fail(404, "RepoNotFound", "Repository not found")
        if parts[3] not in REVISIONS:
            return self.fail(404, "RevisionNotFound", "Invalid rev id")
        path = self.server.root / REVISIONS[parts[3]] / "/".join(parts[4:])
        if not path.is_file():
            return self.fail(404, "EntryNotFound", "Entry not found", commit=REVISIONS[parts[3]])
        data = path.read_bytes()
        self.send_response(200)
        self.send_header("X-Repo-Commit", REVISIONS[parts[3]])
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def fail(self, status: int, code: str, message: str, commit: str | None = None):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.root, server.requests = tmp_path / "served", []
    for commit, name in ((COMMIT, "p16"), (OLD_COMMIT, "p8")):
        folder = server.root / commit
        folder.mkdir(parents=True)
        for file in ("config.json", "model.safetensors"):
            (folder / file).write_bytes((GOLDEN / name / file).read_bytes())
    (server.root / COMMIT / "sub").mkdir()
    (server.root / COMMIT / "sub" / "model.safetensors").write_bytes((GOLDEN / "p8" / "model.safetensors").read_bytes())
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


SCRIPT = """
import json, sys, warnings
warnings.simplefilter("ignore")
from capacitor_rt import CapacitorError, FullCapacitor
answers = []
for id, kwargs in json.load(sys.stdin):
    try:
        model = FullCapacitor.from_pretrained(id, **kwargs)
        answers.append([model.config.patch_size, model.source.revision, model.source.latent_space])
    except CapacitorError as error:
        history = "no history" if error.__cause__ is None and error.__suppress_context__ else "history"
        answers.append([type(error).__name__, str(error), history])
print(json.dumps(answers))
"""


def environment_of(hub, home: Path) -> dict[str, str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    return environment | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_address[1]}",
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }


def ask(hub, home: Path, *calls, stderr: list[str] | None = None, **env) -> list:
    """Run `from_pretrained` calls in a fresh process: the hub's address and modes are read at import."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps(calls),
        capture_output=True,
        text=True,
        env=environment_of(hub, home) | env,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    if stderr is not None:
        stderr += done.stderr.splitlines()
    return json.loads(done.stdout.splitlines()[-1])


def test_hub(hub, tmp_path):
    home, other = tmp_path / "home", str(tmp_path / "other-cache")
    answers = ask(
        hub,
        home,
        (REPO, {"local_files_only": True}),
        (REPO, {}),
        (REPO, {"revision": "v0"}),
        (REPO, {"revision": COMMIT, "cache_dir": other}),
        (REPO, {"subfolder": "sub"}),
        (REPO, {"revision": "v9"}),
        ("data-archetype/nothing", {}),
        ("data-archetype/private", {}),
        ("data-archetype/private", {"token": "hf_secret"}),
        (REPO, {"subfolder": "nowhere"}),
        (REPO, {"local_files_only": True}),
    )
    assert answers[0][0] == "CheckpointError" and "not in the local cache" in answers[0][1]
    assert answers[1] == [16, COMMIT, f"full_capacitor/whitened@{COMMIT}"]
    assert answers[2][:2] == [8, OLD_COMMIT]
    assert answers[3][:2] == [16, COMMIT] and Path(other).is_dir()
    assert answers[4][:2] == [8, COMMIT]
    assert answers[5][:2] == ["CheckpointError", f"{REPO} has no revision 'v9': name a branch, a tag or a commit"]
    assert answers[6][0] == "CheckpointError" and "not on the hub, or is private" in answers[6][1]
    assert answers[7][0] == "CheckpointError" and "pass token=" in answers[7][1]
    assert answers[8][:2] == [16, COMMIT]
    assert answers[9][0] == "CheckpointError" and "holds no model.safetensors" in answers[9][1]
    assert answers[10][:2] == [16, COMMIT]
    weights = [r for r in hub.requests if r.startswith("GET") and f"{REPO}/resolve/{COMMIT}/model.safetensors" in r]
    # the weights were asked for by commit, once for each cache
    assert len(weights) == 2, hub.requests

    # offline, what is cached loads without a single request, and what is not is explained
    hub.requests.clear()
    answers = ask(hub, home, (REPO, {}), ("data-archetype/other", {}), HF_HUB_OFFLINE="1")
    assert answers[0][:2] == [16, COMMIT]
    assert "not in the local cache" in answers[1][1]
    assert hub.requests == []

    # force_download fetches again
    ask(hub, home, (REPO, {"force_download": True}))
    assert any(r.startswith("GET") and r.endswith("model.safetensors") for r in hub.requests)


def test_hub_that_does_not_answer(tmp_path, hub):
    ask(hub, tmp_path, (REPO, {}))
    hub.shutdown()
    hub.server_close()
    noise: list[str] = []
    calls = (REPO, {}), (REPO, {"force_download": True}), ("data-archetype/x", {})
    cached, forced, other = ask(hub, tmp_path, *calls, stderr=noise)
    assert cached[:2] == [16, COMMIT]
    assert forced[0] == "CheckpointError" and "cannot be downloaded again: 127.0.0.1 cannot be reached" in forced[1]
    assert other[0] == "CheckpointError"
    assert "data-archetype/x is not in the local cache, and 127.0.0.1 cannot be reached" in other[1]
    # what huggingface_hub and its HTTP client raised on the way is not the user's
    assert other[2] == "no history"
    # nor is the hub asked for again and again, for half a minute; what comes from the cache is logged, once
    (line,) = noise
    assert line.startswith("127.0.0.1 cannot be reached") and line.endswith("as it was last seen")
