"""A stand-in for the HTTP end of the Hugging Face hub: as much as an adapter needs, in memory."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


class Hub:
    """Repositories by name, each a mapping from revision to the files of it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.requests: list[str] = []
        self.fetched: list[str] = []


def sha(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *args: Any) -> None:
        del args

    def answer(self, value: Any, status: int = 200, **headers: str) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for key, text in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, code: str) -> None:
        self.answer({"error": code}, 404, **{"X-Error-Code": code, "X-Error-Message": code})

    def files(self, repo: str, revision: str) -> dict[str, bytes] | None:
        revisions = self.hub.repos.get(repo)
        if revisions is None:
            return self.refuse("RepoNotFound")
        for name, files in revisions.items():
            if revision in (name, sha(files)):
                return files
        return self.refuse("RevisionNotFound")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:  # noqa: RET503 - a refusal has no value
        path = self.path.partition("?")[0]
        self.hub.requests.append(f"{self.command} {path}")
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repo, revision, name = found.groups()
            files = self.files(repo, revision)
            if files is None:
                return None
            if name not in files:
                return self.refuse("EntryNotFound")
            if self.command == "GET":
                self.hub.fetched.append(name)
            tag = hashlib.sha256(files[name]).hexdigest()
            self.answer(files[name], **{"X-Repo-Commit": sha(files), "ETag": f'"{tag}"'})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            files = self.files(found[1], found[2] or "main")
            if files is not None:
                names = [{"rfilename": name} for name in files]
                self.answer(
                    {"id": found[1], "sha": sha(files), "siblings": names, "private": False}
                )
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/.*)?", path):
            files = self.files(found[1], found[2])
            if files is not None:
                self.answer([
                    {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                    for n, d in files.items()
                ])  # fmt: skip
        elif path == "/api/whoami-v2":
            self.answer({"name": "user", "type": "user", "orgs": []})
        else:
            self.refuse("EntryNotFound")

    def do_POST(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.requests.append(f"POST {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if path == "/api/repos/create":
            said = json.loads(body)
            repo = f"{said.get('organization') or 'user'}/{said['name']}"
            self.hub.repos.setdefault(repo, {"main": {}})
            self.answer({"url": f"{self.hub.url}/{repo}", "id": repo})
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", path):
            branches = self.hub.repos[found[1]]
            branches.setdefault(found[2], dict(branches["main"]))
            self.answer({})
        elif found := re.fullmatch(r"/api/models/[^/]+/[^/]+/preupload/[^/]+", path):
            files = [
                {"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]
            ]
            self.answer({"files": [{**f, "shouldIgnore": False} for f in files]})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", path):
            files = self.hub.repos[found[1]][found[2]]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"{self.hub.url}/{found[1]}/commit/{sha(files)}"
            self.answer({"commitUrl": url, "commitOid": sha(files), "success": True})
        else:
            self.refuse("EntryNotFound")


@contextlib.contextmanager
def stand_in_hub(monkeypatch: pytest.MonkeyPatch, cache: Any) -> Iterator[Hub]:
    """Serve a hub on this machine, and let `huggingface_hub` take it for the real one."""
    from huggingface_hub import constants
    from transformers.utils import hf_api

    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    hub = _Handler.hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(hf_api(), "endpoint", hub.url)  # one client, which may be older than this
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
