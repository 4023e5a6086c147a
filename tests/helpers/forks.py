"""Processes that begin with all imports done: forked from pytest after collection.

A function of a test module runs in a child of its own, in which no test has run. Where forks are
not safe, on macOS, each child imports for itself.
"""

from __future__ import annotations

import os
import pickle
import runpy
import signal
import socket
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, NoReturn

# Which warnings Python does not show unless told.
UNSHOWN = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)


class Forks:
    """The server that forks each run from what pytest was when it was made."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._n = 0
        self._server: Connection | None = None
        if sys.platform != "linux":
            return
        self._server, theirs = Pipe()
        with warnings.catch_warnings(action="ignore"):  # xdist's threads do not matter to it
            self._pid = os.fork()
        if not self._pid:
            self._server.close()
            _serve(theirs)
        theirs.close()

    def start(
        self,
        function: Callable[..., object],
        *arguments: object,
        environment: Mapping[str, str] | None = None,
    ) -> Fork:
        """Begin a run of a function of a module."""
        self._n += 1
        place = Path(self._folder.name) / str(self._n)
        for suffix in (".out", ".err"):
            place.with_suffix(suffix).touch()
        asked = (function, arguments, dict(environment or {}), place)
        if self._server is None:
            process = get_context("spawn").Process(target=_run, args=asked)
            process.start()
            return Fork(process.pid, lambda: process.join() or process.exitcode, place)
        pid = self._ask(asked)
        return Fork(pid, lambda: self._ask(pid), place)

    def _ask(self, asked: object) -> int:
        self._server.send(asked)
        return int(self._server.recv())

    def start_ranks(
        self, world: int, function: Callable[..., object], *arguments: object
    ) -> list[Fork]:
        """Begin a run of several processes, with the variables that torchrun sets."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        shared |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        shared |= {"TORCHELASTIC_RUN_ID": "none"}
        ranks = [shared | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(world)]
        return [self.start(function, *arguments, environment=rank) for rank in ranks]

    def close(self) -> None:
        """End the server."""
        if self._server is not None:
            self._server.close()
            os.waitpid(self._pid, 0)
        self._folder.cleanup()


class Fork:
    def __init__(self, pid: Any, wait: Callable[[], Any], place: Path) -> None:
        self.pid, self._wait, self._place = pid, wait, place

    def wait(self) -> int:
        """Return the exit code; negative after a signal, 1 after an exception."""
        return int(self._wait())

    def result(self) -> Any:
        """Return what the function returned."""
        assert self.wait() == 0, self.err()
        return pickle.loads(self._place.with_suffix(".result").read_bytes())

    def out(self) -> str:
        """Return what it has printed up to now."""
        return self._place.with_suffix(".out").read_text()

    def err(self) -> str:
        """Return what it has printed to stderr up to now."""
        return self._place.with_suffix(".err").read_text()


def _serve(connection: Connection) -> NoReturn:
    """Fork a child for each request until pytest has gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: pytest's to answer
    while True:
        try:
            asked = connection.recv()
        except EOFError:
            os._exit(0)
        if isinstance(asked, int):
            connection.send(os.waitstatus_to_exitcode(os.waitpid(asked, 0)[1]))
            continue
        pid = os.fork()
        if not pid:
            _run(*asked)
        connection.send(pid)


def _run(
    function: Callable[..., object],
    arguments: Sequence[object],
    environment: Mapping[str, str],
    place: Path,
) -> NoReturn:
    """Call a function as a program of its own would."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(place.with_suffix(suffix), os.O_WRONLY), number)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
    warnings.resetwarnings()
    for kind in UNSHOWN:
        warnings.simplefilter("ignore", kind)
    os.environ.update(environment)
    code = 1
    try:
        place.with_suffix(".result").write_bytes(pickle.dumps(function(*arguments)))
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:  # noqa: BLE001 - as the interpreter's own
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def program(*arguments: object) -> None:
    """Be the command line in a process of its own, which it ends."""
    sys.argv = ["lora-inject", *map(str, arguments)]
    runpy.run_module("lora_inject", run_name="__main__")
