"""Sharing a merge among several processes, on one machine or many.

Shards are independent, so each rank takes its share of them, dealt so that every rank
computes the same deal by itself. Who finds all of them finished publishes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_inject.errors import CheckpointError

_VARIABLES = (
    ("RANK", "WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
)


@dataclass(frozen=True)
class Ranks:
    """This process among those that share a merge.

    Attributes:
        rank: Its number.
        world: How many there are.
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Ranks:
        """Read the variables that torchrun, Slurm and MPI set; alone where none is set.

        Raises:
            CheckpointError: They contradict each other.

        Example:
            >>> Ranks.from_environment({"RANK": "1", "WORLD_SIZE": "4"})
            Ranks(rank=1, world=4)
        """
        environment = os.environ if environment is None else environment
        for of_rank, of_world in _VARIABLES:
            if of_rank in environment and of_world in environment:
                try:
                    rank, world = int(environment[of_rank]), int(environment[of_world])
                except ValueError:
                    rank, world = -1, 0
                if not 0 <= rank < world:
                    raise CheckpointError(
                        f"share the merge by {of_rank} and {of_world}",
                        f"they are {environment[of_rank]!r} and {environment[of_world]!r}",
                        "Set a number from 0 and how many there are, or unset both",
                    )
                return cls(rank, world)
        return cls()

    def mine(self, sizes: Sequence[tuple[str, int]]) -> list[str]:
        """Return this rank's share: the largest first, each to the rank with the least so far.

        Args:
            sizes: `(name, bytes)` of every shard.

        Example:
            >>> shards = [("a", 5), ("b", 3), ("c", 3)]
            >>> Ranks(0, 2).mine(shards), Ranks(1, 2).mine(shards)
            (['a'], ['b', 'c'])
        """
        loads = [0] * self.world
        dealt: list[str] = []
        for name, size in sorted(sizes, key=lambda row: (-row[1], row[0])):
            least = min(range(self.world), key=lambda rank: (loads[rank], rank))
            loads[least] += size
            if least == self.rank:
                dealt.append(name)
        order = [name for name, _ in sizes]
        return sorted(dealt, key=order.index)
