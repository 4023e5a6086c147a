"""Publishing an adapter of a live model on the Hugging Face hub."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from lora_inject.core.layers.library import this_process_writes
from lora_inject.core.model.save import save_adapter
from lora_inject.core.roots.root import Injected
from lora_inject.formats.hub import upload


def push(
    model: nn.Module,
    repo: str,
    name: str = "default",
    *,
    revision: str | None = None,
    private: bool | None = None,
    message: str = "Upload adapter",
    token: str | None = None,
    **options: Any,
) -> str | None:
    """Upload an adapter with its card as one commit: what `save_adapter` writes.

    `load_adapter(model, repo)`, PEFT and vLLM read it there.

    Args:
        model: The root, or a module that holds it.
        repo: `user/name`; created if missing.
        name: The adapter.
        revision: A branch; created if missing.
        private: Whether a new repository is private.
        message: The message of the commit.
        token: The token; by default that of the login.
        **options: Options of `save_adapter` for PEFT's format, such as `trained_on`.

    Returns:
        The URL of the commit. Of several processes with shards one uploads; the others return None.

    Raises:
        StateError: There is no such adapter.
        FormatError: PEFT's format cannot express it, or the hub refuses or cannot be reached.

    Examples:
        >>> from lora_inject.core.model.inject import inject
        >>> net = inject(nn.Sequential(nn.Linear(4, 6)), {"rank": 2, "targets": ["0"]})
        >>> push(net, "adapter")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        lora_inject.errors.FormatError: push to 'adapter': it is not the id of a repository. ...
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "adapter")
        save_adapter(model, folder, name, published_as=repo, **options)
        if not this_process_writes(Injected(model, "push")):
            return None
        how: dict[str, Any] = {"revision": revision, "private": private, "token": token}
        return upload(folder, repo, message=message, **how)
