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
from lora_inject.errors import FormatError, user_path

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_PEFT = ["adapter_config.json", "adapter_model.safetensors"]


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


def located(path: str | os.PathLike[str], asked: str) -> Path:
    """Return where an adapter's files are: a path, or the files of `user/name` on the hub.

    Raises:
        FormatError: It is no path, or as `on_disk` raises.
    """
    return on_disk(user_path(asked, path), path, None, asked)


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
    """Fetch an adapter from the hub, or from its cache, and return its folder or its only file."""
    asked = f"load {repo!r}" + (f" at {revision!r}" if revision is not None else "")
    hub = _hub(asked)
    with _in_plain_words(asked):
        folder = Path(hub.snapshot_download(repo, revision=revision, allow_patterns=_PEFT))
        if (folder / _PEFT[0]).is_file():
            if not (folder / _PEFT[1]).is_file():
                problem = f"it holds no {_PEFT[1]}, and a pickle (adapter_model.bin) is not read"
                raise FormatError(asked, problem, "Ask its author for safetensors")
            return folder
        info = hub.HfApi().model_info(repo, revision=revision)
        files = [file.rfilename for file in info.siblings]
        tensors = [file for file in files if file.endswith(".safetensors")]
        if len(tensors) == 1:  # of the commit that was listed
            return Path(hub.hf_hub_download(repo, tensors[0], revision=info.sha))
    held = f"it holds no adapter_config.json and {len(tensors)} safetensors files, not one"
    problem = f"{held}: {', '.join(files[:8]) or 'nothing'}"
    raise FormatError(asked, problem, "Download one of the files and give its path")


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


@contextlib.contextmanager
def _in_plain_words(asked: str) -> Iterator[None]:
    """Raise what the hub refuses, or that it cannot be reached, as a `FormatError`."""
    # The hub's refusals are of OSError, and its client is one of several.
    clients = [sys.modules[name] for name in ("httpx", "httpx2") if name in sys.modules]
    failures = (OSError, *(client.TransportError for client in clients))
    try:
        yield
    except failures as error:
        told = " ".join(str(error).split())[:300]
        problem = f"there is no such folder here, or the hub refuses the repository: {told}"
        raise FormatError(asked, problem, _REACH) from error
