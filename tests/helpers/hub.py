"""A stand-in for the HTTP end of the Hugging Face hub: as much as an adapter needs, in memory."""

import base64
import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from helpers.servers import Answering, running

Files = dict[str, bytes]


class Hub:
    """Repositories by name, each a mapping from revision to the files of it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.repos: dict[str, dict[str, Files]] = {}
        self.fetched: list[str] = []


class AbsentError(Exception):
    """What is asked for is not there; holds the hub's code for it."""


def sha(files: Files) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class _Handler(Answering):
    hub: Hub

    def do_GET(self) -> None:
        asked = f"{self.command} {self.path.partition('?')[0]}"
        try:
            for route, give in ROUTES.items():
                if match := re.fullmatch(route.replace("REPO", "[^/]+/[^/]+"), asked):
                    return give(self, *match.groups())
            raise AbsentError("EntryNotFound")
        except AbsentError as error:
            (code,) = error.args
            self.answer({"error": code}, 404, **{"X-Error-Code": code})

    do_HEAD = do_POST = do_GET  # noqa: N815

    def files(self, repo: str, revision: str | None) -> Files:
        if repo not in self.hub.repos:
            raise AbsentError("RepoNotFound")
        for name, files in self.hub.repos[repo].items():
            if (revision or "main") in (name, sha(files)):
                return files
        raise AbsentError("RevisionNotFound")

    def file(self, repo: str, revision: str, name: str) -> None:
        files = self.files(repo, revision)
        if name not in files:
            raise AbsentError("EntryNotFound")
        if self.command == "GET":
            self.hub.fetched.append(name)
        tag = hashlib.sha256(files[name]).hexdigest()
        self.answer(files[name], **{"X-Repo-Commit": sha(files), "ETag": f'"{tag}"'})

    def model(self, repo: str, revision: str | None) -> None:
        files = self.files(repo, revision)
        names = [{"rfilename": name} for name in files]
        self.answer({"id": repo, "sha": sha(files), "siblings": names, "private": False})

    def tree(self, repo: str, revision: str) -> None:
        self.answer([
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in self.files(repo, revision).items()
        ])  # fmt: skip

    def create(self) -> None:
        said = json.loads(self.body())
        repo = f"{said.get('organization') or 'user'}/{said['name']}"
        self.hub.repos.setdefault(repo, {"main": {}})
        self.answer({"url": f"{self.hub.url}/{repo}", "id": repo})

    def branch(self, repo: str, name: str) -> None:
        branches = self.hub.repos[repo]
        branches.setdefault(name, dict(branches["main"]))
        self.answer({})

    def preupload(self) -> None:
        asked = [file["path"] for file in json.loads(self.body())["files"]]
        how = {"uploadMode": "regular", "shouldIgnore": False}
        self.answer({"files": [{"path": path, **how} for path in asked]})

    def commit(self, repo: str, branch: str) -> None:
        files = self.hub.repos[repo][branch]
        for line in map(json.loads, self.body().splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        url = f"{self.hub.url}/{repo}/commit/{sha(files)}"
        self.answer({"commitUrl": url, "commitOid": sha(files), "success": True})


ROUTES: dict[str, Any] = {
    r"(?:GET|HEAD) /(REPO)/resolve/([^/]+)/(.+)": _Handler.file,
    r"GET /api/models/(REPO)(?:/revision/([^/]+))?": _Handler.model,
    r"GET /api/models/(REPO)/tree/([^/]+)(?:/.*)?": _Handler.tree,
    "POST /api/repos/create": _Handler.create,
    "POST /api/validate-yaml": lambda h: h.answer({"errors": [], "warnings": []}),
    r"POST /api/models/(REPO)/branch/([^/]+)": _Handler.branch,
    r"POST /api/models/REPO/preupload/[^/]+": _Handler.preupload,
    r"POST /api/models/(REPO)/commit/([^/]+)": _Handler.commit,
}


@contextlib.contextmanager
def stand_in_hub(monkeypatch: pytest.MonkeyPatch, cache: Any) -> Iterator[Hub]:
    """Serve a hub on this machine, and let `huggingface_hub` take it for the real one."""
    from huggingface_hub import constants
    from transformers.utils import hf_api

    with running(_Handler) as url:
        monkeypatch.setattr(hf_api(), "endpoint", url)  # one client, which may be older than this
        for name, value in {
            "ENDPOINT": url,
            "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_CACHE": str(cache),
            "HF_TOKEN_PATH": str(cache / "token"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
        _Handler.hub = Hub(url)
        yield _Handler.hub
