"""Adapters on the Hugging Face hub: safetensors and small JSON only, through `huggingface_hub`."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_inject.core.spec.names import nearest
from lora_inject.errors import FormatError

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_PEFT = ("adapter_config.json", "adapter_model*.safetensors", "adapter_model*.json")


def is_repo(path: str | os.PathLike[str], revision: str | None = None) -> bool:
    """Return whether a path is `user/name`, as of a repository, and no existing file.

    Where a folder `user` is here, a path in it was meant, unless there is a revision: the network
    is not asked then.

    Raises:
        FormatError: There is such a folder, and no such name in it.
    """
    if not isinstance(path, str) or not _REPO.fullmatch(path) or os.path.lexists(path):
        return False
    folder, _, name = path.partition("/")
    if revision is None and Path(folder).is_dir():
        near = nearest(name, [each.name for each in Path(folder).iterdir()], 1)
        meant = f"Nearest there: '{near[0]}'" if near else "Check the path"
        remedy = f'{meant}. If a repository of the hub is meant, say revision="main"'
        raise FormatError(f"load {path!r}", f"the folder '{folder}' has no '{name}'", remedy)
    return True


def on_disk(place: Path, path: str | os.PathLike[str], revision: str | None, asked: str) -> Path:
    """Return where an adapter's files are, downloaded if they are on the hub.

    Raises:
        FormatError: A revision is given, and `path` is not on the hub; or as `download` raises.
    """
    if not os.path.lexists(place) and is_repo(path, revision):
        return download(str(path), revision)
    if revision is not None:
        problem = "a revision is for repositories, and this is a path"
        raise FormatError(f"{asked} at {revision!r}", problem, "Leave the revision out")
    return place


def download(repo: str, revision: str | None) -> Path:
    """Fetch an adapter from the hub, or from its cache, and return its folder or file."""
    asked = f"load {repo!r}" + (f" at {revision!r}" if revision is not None else "")
    hub = _hub(asked)
    with _in_plain_words(asked):
        try:
            files = hub.HfApi().list_repo_files(repo, revision=revision)
        except _unreachable():
            known = hub.try_to_load_from_cache(repo, _PEFT[0], revision=revision)
            wanted = list(_PEFT) if isinstance(known, str) else ["*.safetensors"]
            how = {"revision": revision, "allow_patterns": wanted, "local_files_only": True}
            files = [path.name for path in Path(hub.snapshot_download(repo, **how)).iterdir()]
        wanted = _adapter_among(files, asked)
        folder = Path(hub.snapshot_download(repo, revision=revision, allow_patterns=wanted))
    return folder if wanted == list(_PEFT) else folder / wanted[0]


def _adapter_among(files: list[str], asked: str) -> list[str]:
    """Return patterns of the files to fetch: PEFT's, or the only safetensors file."""
    if "adapter_config.json" in files:
        if "adapter_model.bin" in files and not any(f.endswith(".safetensors") for f in files):
            problem = (
                "it holds only a pickle (adapter_model.bin), which can run code and is not read"
            )
            raise FormatError(asked, problem, "Ask its author for safetensors")
        return list(_PEFT)
    tensors = [file for file in files if file.endswith(".safetensors")]
    if len(tensors) != 1:
        held = f"it holds no adapter_config.json and {len(tensors)} safetensors files, not one"
        problem = f"{held}: {', '.join(files[:8]) or 'nothing'}"
        raise FormatError(asked, problem, "Download one of the files and give its path")
    return tensors


def upload(
    folder: Path, repo: str, *, revision: str | None, private: bool | None, message: str, token: Any
) -> str:
    """Upload a folder in one commit, create a missing repository; return the commit's URL."""
    asked = f"push to {repo!r}"
    if not _REPO.fullmatch(repo):
        raise FormatError(asked, "it is not the id of a repository", "Give 'user/name'")
    api = _hub(asked).HfApi(token=token)
    with _in_plain_words(asked):
        api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        return str(
            api.upload_folder(
                repo_id=repo, folder_path=folder, revision=revision, commit_message=message
            ).commit_url
        )


_REACH = "Check the name, the network and HF_HUB_OFFLINE, and log in: hf auth login"


def _hub(asked: str) -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        absent = "there is no such folder here, and " if asked.startswith("load") else ""
        problem = f"{absent}huggingface_hub is not installed"
        raise FormatError(asked, problem, "Run pip install huggingface_hub") from error
    return huggingface_hub


def _unreachable() -> tuple[type[Exception], ...]:
    """Return what is raised where the hub cannot be reached; its client is one of several."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    clients = [sys.modules[name] for name in ("httpx", "httpx2") if name in sys.modules]
    return (OfflineModeIsEnabled, ConnectionError, *(c.TransportError for c in clients))


@contextlib.contextmanager
def _in_plain_words(asked: str) -> Iterator[None]:
    """Raise what the hub refuses, or that it cannot be reached, as a `FormatError`."""
    failures: tuple[type[Exception], ...] = (
        OSError,
        *_unreachable(),
    )  # the hub's refusals are of OSError
    try:
        yield
    except failures as error:
        told = " ".join(str(error).split())[:300]
        problem = f"there is no such folder here, or the hub refuses the repository: {told}"
        raise FormatError(asked, problem, _REACH) from error
