"""Writes to what a graph has read of an adapted weight, which would be lost, end in an error.

While dynamo traces, a value has a stand-in without values, a fake tensor. Tensors that share its
memory share its storage, and each counts the writes to it. So each value that a traced read gives
is noted, and when the graph is complete nothing in it may have written there. A write behind a
graph break is not seen.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lora_inject.core.functional.read_only import refuse_change
from lora_inject.private import look_up

_at_compile_time = look_up("torch._dynamo.comptime.comptime")  # dynamo is at work by now


def watch(value: Tensor) -> None:  # noqa: ARG001 - dynamo looks it up by its name
    """Note a value that is read while dynamo traces; nothing of it stays in the graph."""
    if _at_compile_time is not None:
        _at_compile_time(_note)


def _note(context: Any) -> None:
    stand_in = context.get_local("value").as_fake()
    storage, before = stand_in.untyped_storage(), stand_in._version

    def check(module: Any) -> None:
        sharing = set()
        for node in module.graph.nodes:
            other = node.meta.get("example_value")
            if isinstance(other, Tensor) and other.untyped_storage() is storage:
                sharing.add(node)
                if other._version not in (0, before):  # `.data` counts from 0
                    refuse_change("a write in a compiled graph")
            elif sharing.intersection(_written_in_lists(node)):
                refuse_change("a write in a compiled graph")

    tracer = getattr(context, "_i_will_not_complain_if_bc_breaks_InstructionTranslator", None)
    if tracer is not None:
        tracer().output.add_graph_finalizer(check)


def _written_in_lists(node: Any) -> list[Any]:
    """Return what an operation like `torch._foreach_mul_` writes to, which counts no writes."""
    name = getattr(node.target, "__name__", "")
    first = node.args[0] if node.args else None
    return list(first) if name.endswith("_") and isinstance(first, list | tuple) else []
