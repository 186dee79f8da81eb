"""The Hugging Face hub without a network: its cache as a download leaves it, and a small server in its place."""

import base64
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml
from huggingface_hub import constants

from perfusion.hub import offline

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def put_in_hub_cache(name: str, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `cache` the hub's cache, with the files of `folder` in it as the latest of the repository `name`."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copytree(folder, repository / "snapshots" / COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    assert constants.HF_HUB_OFFLINE, "no test may ask the hub itself"


class LocalHub:
    """A stand-in for the hub, for models: the HTTP endpoints that making, committing to and reading a repository call.

    Files are taken as part of a commit; those that the hub would have stored elsewhere (LFS, Xet) are not told apart.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.commits: list[tuple[str, str, str]] = []  # repository, revision, message
        self.members = {"Bearer right"}  # what a login sends that may do all there is
        self.received: list[tuple[str, str]] = []  # path and Authorization of every request
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                hub.answer(self)

            do_GET = do_POST = do_HEAD

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(request.path.partition("?")[0])
        login = request.headers.get("Authorization", "")
        self.received.append((path, login))
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        if request.headers.get("Transfer-Encoding") == "chunked":
            while size := int(request.rfile.readline(), 16):
                body += request.rfile.read(size)
                request.rfile.readline()
            request.rfile.readline()
        status, headers, content = self.reply(request.command, path, body, login in self.members)
        request.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(content)

    def reply(self, command: str, path: str, body: bytes, member: bool) -> tuple[int, dict[str, str], bytes]:
        if path in ("", "/"):
            return 200, {}, b""
        if command == "POST":
            if not member:
                return 401, {"X-Error-Message": "Invalid username or password."}, b"{}"
            return self.post(path, body)
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        name = found[1] if found else ""
        if not found or name not in self.repositories or (name in self.private and not member):
            return 401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository Not Found"}, b""
        content = self.repositories[name].get(found[3])
        if content is None:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", **_commit(name)}, b""
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        return 200, {"ETag": etag, **_commit(name)}, content

    def post(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.repositories:
                return 409, {}, _json(error="You already created this model repo", url=f"{self.address}/{name}")
            self.repositories[name] = {}
            if asked.get("visibility") == "private" or asked.get("private"):
                self.private.add(name)
            return 200, {}, _json(url=f"{self.address}/{name}", name=name)
        if path == "/api/validate-yaml":
            yaml.safe_load(json.loads(body)["content"].split("---")[1])
            return 200, {}, _json(errors=[], warnings=[])
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/([^/]+)", path)
        assert found, path
        files = self.repositories[found[1]]
        if found[2] == "preupload":
            asked = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in asked]
            return 200, {}, _json(files=modes)
        header, *parts = (json.loads(line) for line in body.splitlines() if line)
        files |= {part["value"]["path"]: base64.b64decode(part["value"]["content"]) for part in parts}
        self.commits.append((found[1], found[3], header["value"]["summary"]))
        return 200, {}, _json(commitUrl=f"{self.address}/{found[1]}/commit/{COMMIT}", commitOid=COMMIT)


def _commit(name: str) -> dict[str, str]:
    return {"X-Repo-Commit": hashlib.sha1(name.encode()).hexdigest()}


def _json(**content: object) -> bytes:
    return json.dumps(content).encode()


@contextmanager
def local_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """Have huggingface_hub talk to a `LocalHub`, as `HF_ENDPOINT` has it do in a new process, with an empty cache and
    no login."""
    hub = LocalHub()
    values = {
        "ENDPOINT": hub.address,
        "HUGGINGFACE_CO_URL_TEMPLATE": f"{hub.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(cache),
        "HF_TOKEN_PATH": str(cache / "no-token"),
        "HF_STORED_TOKENS_PATH": str(cache / "no-tokens"),
    }
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    offline.cache_clear()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
        offline.cache_clear()
