"""A server that has imported what is slow and runs each request in a child of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

TESTS = Path(__file__).parents[1]

SERVER = """
import json, os, signal, sys, traceback
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
{code}
for line in sys.stdin:
    asked = json.loads(line)
    if "wait" in asked:
        status = os.waitpid(asked["wait"], 0)[1]
        print(os.waitstatus_to_exitcode(status), flush=True)
        continue
    pid = os.fork()
    if pid:
        print(pid, flush=True)
        continue
    log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(asked["environment"])
    code = 1
    try:
        code = run(*asked["arguments"]) or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
"""


class Forks:
    """Runs of `run(*arguments)`, which `code` defines after its imports: the exit code.

    Children end without Python's clean-up, so what `run` leaves behind at exit is not shown.
    """

    def __init__(self, code: str, folder: Path) -> None:
        self.folder, self._n = folder, 0
        paths = [str(TESTS), str(TESTS.parent), str(TESTS.parent / "scripts"), *sys.path]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        program = [sys.executable, "-c", SERVER.replace("{code}", code)]
        pipe = subprocess.PIPE
        self._server = subprocess.Popen(
            program, stdin=pipe, stdout=pipe, text=True, env=environment
        )

    def start(self, *arguments: str, environment: Mapping[str, str] | None = None) -> Fork:
        """Begin a run."""
        self._n += 1
        log = self.folder / f"fork{self._n}.log"
        asked = {"arguments": arguments, "environment": dict(environment or {}), "log": str(log)}
        return Fork(self, int(self._ask(asked)), log)

    def start_ranks(self, world: int, *arguments: str) -> Sequence[Fork]:
        """Begin a run of several processes, with the variables that torchrun sets."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        shared |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        shared |= {"TORCHELASTIC_RUN_ID": "none"}
        return [
            self.start(*arguments, environment={**shared, "RANK": str(i), "LOCAL_RANK": str(i)})
            for i in range(world)
        ]

    def _ask(self, asked: object) -> str:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        print(json.dumps(asked), file=self._server.stdin, flush=True)
        return self._server.stdout.readline()

    def close(self) -> None:
        """End the server."""
        self._server.communicate()


class Fork:
    """One run."""

    def __init__(self, forks: Forks, pid: int, log: Path) -> None:
        self.forks, self.pid, self.log = forks, pid, log

    def wait(self) -> int:
        """Return the exit code; negative after a signal."""
        return int(self.forks._ask({"wait": self.pid}))

    def said(self) -> str:
        """Return what it has printed up to now."""
        return self.log.read_text()
