"""torch's own random number generators, of the CPU and of devices: found, seeded and put back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lora_inject.private import needed


def generators_of(devices: Iterable[torch.device]) -> list[torch.Generator]:
    """Return the CPU's generator, and after it that of each other device."""
    generators = [torch.default_generator]
    for device in dict.fromkeys(devices):
        if device.type in ("cpu", "meta"):
            continue
        module: Any = torch.get_device_module(device)
        if device.type == "mps":
            generators.append(needed("torch.mps._get_default_mps_generator", "a seed on MPS")())
        else:
            index = module.current_device() if device.index is None else device.index
            generators.append(module.default_generators[index])
    return generators


@contextmanager
def seeded_generators(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from a seed on a device; afterwards the generators go on where they were.

    `torch.manual_seed` would seed every device that there is.
    """
    generators = generators_of([device])
    before = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)
