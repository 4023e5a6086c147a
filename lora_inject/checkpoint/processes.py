"""Several processes that share one merge, as torchrun starts them."""

from __future__ import annotations

import atexit
import contextlib
from collections.abc import Iterator

from torch import distributed

from lora_inject.errors import CheckpointError


class Processes:
    """This process, number `rank` of `world`, among those that share a merge.

    Joins the existing process group, or makes the one that torchrun's variables describe and
    destroys it when the process ends; otherwise the process is alone.
    """

    def __init__(self) -> None:
        self.rank, self.world = 0, 1
        if not distributed.is_available():
            return
        if not distributed.is_initialized() and distributed.is_torchelastic_launched():
            distributed.init_process_group("gloo")
            atexit.register(_destroy_group)
        if distributed.is_initialized():
            self.rank, self.world = distributed.get_rank(), distributed.get_world_size()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Wait at the end until every process has left the block; if one failed, all fail."""
        try:
            yield
        except Exception as error:
            self._gathered(str(error))
            raise
        for rank, failure in enumerate(self._gathered(None)):
            if failure is not None:
                asked, found = f"merge with {self.world} processes", f"process {rank} failed"
                remedy = "Mend that and start all of them again"
                raise CheckpointError(asked, f"{found}: {failure}", remedy)

    def _gathered(self, failure: str | None) -> list[str | None]:
        """Return what failed in each process; waits for all of them."""
        failures = [failure] * self.world
        if self.world > 1:
            distributed.all_gather_object(failures, failure)
        return failures


def _destroy_group() -> None:  # if it lives until exit, gloo's threads abort the process
    if distributed.is_initialized():
        distributed.destroy_process_group()
