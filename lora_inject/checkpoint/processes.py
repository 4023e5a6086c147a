"""Several processes that share one merge, as torchrun starts them."""

from __future__ import annotations

import atexit
import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import distributed

from lora_inject.errors import CheckpointError


class Processes:
    """This process, number `rank` of `world`, among those that share a merge.

    Joins the existing process group, or the one that torchrun's variables describe; otherwise the
    process is alone. A group created here serves every later merge and is destroyed when the
    process ends.
    """

    def __init__(self) -> None:
        self.rank, self.world = 0, 1
        self._group: Any = None
        if not distributed.is_available():
            return
        if not distributed.is_initialized():
            if not distributed.is_torchelastic_launched():
                return
            distributed.init_process_group("gloo")
            atexit.register(_destroy_group)
        self.rank, self.world = distributed.get_rank(), distributed.get_world_size()
        if distributed.get_backend() != "gloo":
            self._group = distributed.new_group(backend="gloo")

    def close(self) -> None:
        """Destroy the resources of this merge; the process group stays."""
        if self._group is not None:
            distributed.destroy_process_group(self._group)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Wait at the end until every process has left the block; if one failed, all fail."""
        mine: Exception | None = None
        try:
            yield
        except Exception as error:
            if self.world == 1:
                raise
            mine = error
        if self.world > 1:
            said: list[str | None] = [None] * self.world
            text = None if mine is None else str(mine)
            distributed.all_gather_object(said, text, group=self._group)
            if mine is not None:
                raise mine
            for rank, other in enumerate(said):
                if other is not None:
                    asked = f"merge with {self.world} processes"
                    found = f"process {rank} failed: {other}"
                    raise CheckpointError(asked, found, "Mend that and start all of them again")


def _destroy_group() -> None:  # if it lives until exit, gloo's threads abort the process
    if distributed.is_initialized():
        distributed.destroy_process_group()


def deal(sizes: Sequence[int], world: int) -> list[int]:
    """Return the process of each file: largest file first, to the process with least so far."""
    loads, dealt = [0] * world, [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        dealt[i] = min(range(world), key=lambda rank: (loads[rank], rank))
        loads[dealt[i]] += sizes[i]
    return dealt
