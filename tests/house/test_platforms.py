"""Files on a platform without the calls that only POSIX has: as Windows is, simulated."""

import ctypes
import importlib
import os
import pathlib
import pkgutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.forks import Forks
from safetensors.torch import load_file, save_file
from torch import nn

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at open files in /proc")


def take_away_posix() -> None:
    sys.modules["fcntl"] = None  # type: ignore[assignment]
    for name in ("preadv", "pwrite", "copy_file_range", "posix_fallocate"):
        if hasattr(os, name):
            delattr(os, name)


def refuse_as_windows_does() -> None:
    """Let calls refuse what they refuse on Windows."""
    rename, replace, load, open_file = os.rename, os.replace, ctypes.CDLL, os.open

    def renamed(source: Any, target: Any) -> None:
        if Path(target).exists():
            raise FileExistsError(17, "exists", str(target))
        refuse_open(source)
        rename(source, target)

    def replaced(source: Any, target: Any) -> None:
        refuse_open(source, target)
        replace(source, target)

    def loaded(name: Any, *args: Any, **kwargs: Any) -> Any:
        if name is None:
            raise TypeError("bad argument type for built-in operation")
        return load(name, *args, **kwargs)

    def opened(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if not kwargs and Path(path).is_dir():  # what removes a tree here gives dir_fd
            raise PermissionError(13, "Permission denied", str(path))
        return open_file(path, flags, *args, **kwargs)

    os.rename, os.replace, os.open, ctypes.CDLL = renamed, replaced, opened, loaded


def import_as_on_windows() -> None:
    for module in [m for m in sys.modules if m.partition(".")[0] == "lora_inject"]:
        del sys.modules[module]
    windows, pathlib.WindowsPath = pathlib.WindowsPath, pathlib.PosixPath  # of this system
    name, os.name = os.name, "nt"
    try:
        import lora_inject

        for module in pkgutil.walk_packages(lora_inject.__path__, "lora_inject."):
            if "__main__" not in module.name:
                importlib.import_module(module.name)
    finally:
        os.name, pathlib.WindowsPath = name, windows


def refuse_open(*paths: Any) -> None:
    held = {os.path.realpath(descriptor) for descriptor in Path("/proc/self/fd").iterdir()}
    for path in map(os.path.realpath, paths):
        if any(file == path or file.startswith(f"{path}/") for file in held):
            raise PermissionError(13, "used by another process", path)


def live_there(_: str) -> str:
    """Save, load, save again over it, and merge on disk; compare with the dense weight."""
    take_away_posix()
    refuse_as_windows_does()
    import_as_on_windows()
    import lora_inject as li

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = nn.Sequential(nn.Linear(8, 8))
        base = {key: value.clone() for key, value in model.state_dict().items()}
        li.inject(model, {"rank": 2, "targets": ["0"]})
        nn.init.normal_(li.adapter_parameters(model)["0.lora_B"])
        x = torch.randn(3, 8)
        adapted = model(x)
        adapter, file = folder / "adapter", folder / "adapter.safetensors"
        adapter.mkdir()  # an empty folder is a free name
        for format, path in (("peft", adapter), ("native", file)):  # noqa: A001
            li.save_adapter(model, path, format=format)
            read = li.read_adapter(path)
            li.save_adapter(model, path, format=format, overwrite=True)
            del read
        li.load_adapter(li.eject(model), file)
        torch.testing.assert_close(model(x), adapted)
        (folder / "base").mkdir()
        save_file(base, folder / "base" / "model.safetensors")
        li.merge_checkpoint(folder / "base", [file], folder / "merged")
        merged = load_file(next((folder / "merged").glob("*.safetensors")))
        torch.testing.assert_close(x @ merged["0.weight"].T + merged["0.bias"], adapted.detach())
    return str(hasattr(os, "preadv"))


def test_files_work_where_only_windows_calls_are_there(forks: Forks) -> None:
    assert forks.start(live_there, "").result() == "False"
