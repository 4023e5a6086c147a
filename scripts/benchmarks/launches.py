"""Launches: how many kernels one adapted layer starts, and how many bytes they move.

Counted on tensors without values, so the numbers are exact and need neither a GPU nor time. A
launch is any aten operation that computes: views and allocations start no kernel. The bytes of a
launch are what it reads and what it writes, as if no cache kept anything.

Without a GPU torch spells `F.dropout` as a draw, a division and two products, where a GPU has one
launch forward and one backward: PEFT's rows with dropout count two more here than there. Everything
else is the same on both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, Self
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.models import quiet
from lora_inject import activate, inject, train_only

OURS = "lora_inject"
GIB = 2**30
RANK = 16
ALLOCATES = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
VIEWS = ("_unsafe_view", "lift_fresh", "_reshape_alias")  # by their schema these are not views
OVERWRITES = ("copy_", "fill_", "zero_", "bernoulli_", "normal_", "uniform_")
SYNCS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")


class Counted(TorchDispatchMode):
    """Counts launches, bytes, and what makes the host wait for the device.

    It keeps no tensor. So an adapted layer may write to its products as if nobody counted.

    Attributes:
        launches: Name of each operation to how often it ran.
        moved: Bytes read and written.
        syncs: Names of the operations whose result the host has to wait for.
        on_cpu: Names of the operations that took or gave a tensor on the CPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.moved = 0
        self.syncs: list[str] = []
        self.on_cpu: list[str] = []
        self._unrecorded = patch("lora_inject.core.functional.torch_inside._n_modes", lambda: 0)

    def __enter__(self) -> Self:
        """Start to count."""
        self._unrecorded.start()
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        """Stop counting."""
        super().__exit__(*raised)
        self._unrecorded.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation, and count it."""
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        waits = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in SYNCS or waits or (name == "index" and _has_bool(args)):
            self.syncs.append(name)
        found = func(*args, **kwargs)
        if any(t.device.type == "cpu" for t in _tensors((args, kwargs, found))):
            self.on_cpu.append(name)
        computes = func.namespace == "aten" and not func.is_view and bool(_tensors(found))
        if computes and name not in (*ALLOCATES, *VIEWS):
            self.launches[name] += 1
            self.moved += _moved(func, name, args, kwargs, found)
        return found

    @property
    def total(self) -> int:
        """How many launches there were."""
        return sum(self.launches.values())


def _has_bool(args: Any) -> bool:
    indices = args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ()
    return any(isinstance(i, Tensor) and i.dtype == torch.bool for i in indices)


def _tensors(found: Any) -> list[Tensor]:
    return [t for t in tree_leaves(found) if isinstance(t, Tensor)]


def _moved(func: Any, name: str, args: Any, kwargs: Any, found: Any) -> int:
    total = sum(map(_size, _tensors(found)))
    for position, argument in enumerate(func._schema.arguments):
        given = args[position] if position < len(args) else kwargs.get(argument.name)
        overwritten = argument.is_out or (position == 0 and name in OVERWRITES)
        if name in ("embedding", "index_select") and position == 0:
            total += _size(found)  # the rows that are looked up, not the table
        elif not overwritten:
            total += sum(map(_size, _tensors(given)))
    return total


def _size(t: Tensor) -> int:
    """Return the bytes of a tensor; what is expanded is read once."""
    n = 1
    for length, stride in zip(t.shape, t.stride(), strict=True):
        n *= length if stride else min(length, 1)
    return n * t.element_size()


@dataclass(frozen=True)
class Row:
    """One row of the table, of a layer of width 4096 and rank 16.

    Attributes:
        layer: Makes the frozen layer.
        dtype: Of the layer.
        tokens: How many.
        training: Forward and backward; else forward alone, without gradients.
        autocast: Whether it runs in bfloat16 autocast.
        config: Of the adapter.
        peft: Of PEFT's adapter; None where it has no such layer.
        adapters: How many are active at once.
    """

    layer: Callable[[], nn.Module]
    dtype: torch.dtype = torch.bfloat16
    tokens: int = 8192
    training: bool = True
    autocast: bool = False
    config: dict[str, Any] | None = None
    peft: dict[str, Any] | None = None
    adapters: int = 1

    @property
    def settings(self) -> dict[str, Any]:
        """The config of the adapter."""
        return {"rank": RANK, "alpha": 32, "targets": ["0"]} | (self.config or {})


def _linear() -> nn.Module:
    return nn.Linear(4096, 4096, bias=False)


def _linear3() -> nn.Module:
    return nn.Linear(4096, 3 * 4096, bias=False)


def _conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(4096, 4096)


def _embedding() -> nn.Module:
    return nn.Embedding(32000, 4096)


class _Experts(nn.Module):
    """Stacked experts in a loop; every second one gets no tokens."""

    def __init__(self, n: int = 8) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n, 4096, 4096))

    def forward(self, x: Tensor) -> Tensor:
        used = range(0, len(self.weight), 2)
        tokens = x.view(len(used), -1, 4096).unbind()
        found = [F.linear(t, self.weight[i]) for t, i in zip(tokens, used, strict=True)]
        return torch.cat(found).view(x.shape)


class _Grouped(_Experts):
    """Stacked experts in one grouped product."""

    def forward(self, x: Tensor) -> Tensor:
        ends = torch.arange(1, 9, device=x.device, dtype=torch.int32) * (x.shape[1] // 8)
        return torch._grouped_mm(x[0], self.weight.mT, ends)[None]


_EXPERTS = {"targets": [{"match": r"0\.weight", "layout": "out_in"}]}
_QV = {"match": "0", "slices": {"q": 2048, "k": 1024, "v": 1024}, "adapt": ["q", "v"]}
_QKV = {"match": "0", "slices": dict.fromkeys("qkv", 4096), "adapt": ["q", "v"]}
_FLOAT32 = {"compute": "float32"}
_DORA = {"variant": "dora"}

ROWS: dict[str, Row] = {
    "bf16": Row(_linear, peft={}),
    "bf16, low rank in float32": Row(_linear, config=_FLOAT32, peft={}),
    "bf16, dropout": Row(_linear, config={"dropout": 0.05}, peft={"lora_dropout": 0.05}),
    "autocast over float32": Row(_linear, torch.float32, autocast=True, peft={}),
    "autocast, dropout": Row(
        _linear, torch.float32, autocast=True, config={"dropout": 0.05},
        peft={"lora_dropout": 0.05},
    ),
    "float32": Row(_linear, torch.float32, peft={}),
    "decode, 1 token": Row(_linear, tokens=1, training=False, peft={}),
    "decode, 32 tokens": Row(_linear, tokens=32, training=False, peft={}),
    "prefill, 4,096 tokens": Row(_linear, tokens=4096, training=False, peft={}),
    "prefill, low rank in float32": Row(
        _linear, tokens=4096, training=False, config=_FLOAT32, peft={}
    ),
    "bf16, two adapters": Row(_linear, adapters=2, peft={}),
    "bf16, DoRA": Row(_linear, config=_DORA, peft={"use_dora": True}),
    "decode, DoRA": Row(
        _linear, tokens=1, training=False, config=_DORA, peft={"use_dora": True}
    ),
    "bf16, Conv1D": Row(_conv1d, peft={"fan_in_fan_out": True}),
    "bf16, two slices of three": Row(_linear, config={"targets": [_QV]}),
    "bf16, two slices of three, equal": Row(_linear3, config={"targets": [_QKV]}),
    "bf16, 4 of 8 experts in a loop": Row(_Experts, config=_EXPERTS),
    "bf16, 4 of 8 experts in a loop, forward": Row(_Experts, training=False, config=_EXPERTS),
    "bf16, 8 experts in a grouped product": Row(_Grouped, config=_EXPERTS),
    "bf16, embedding": Row(_embedding, peft={}),
    "float32, embedding": Row(_embedding, torch.float32, peft={}),
    "bf16, embedding, low rank in float32": Row(_embedding, config=_FLOAT32, peft={}),
}  # fmt: skip


def count(row: Row, who: str) -> Counted:
    """Run one row on fake tensors.

    Args:
        row: What to run.
        who: `frozen`, `PEFT` or `lora_inject`.
    """
    with torch.device("meta"), quiet():
        model = _adapted(row, nn.Sequential(row.layer()).to(row.dtype), who)
        model.train(row.training)
    with ExitStack() as stack:
        if row.autocast:  # which knows no meta device
            _on_cpu(model)
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        x = _input(row, model)
        context: AbstractContextManager[Any] = (
            torch.autocast("cpu", torch.bfloat16) if row.autocast else nullcontext()
        )
        counted = Counted()
        with torch.set_grad_enabled(row.training):
            with counted, context:
                y = model(x)
            if row.training and y.requires_grad:
                g = torch.ones_like(y)
                with counted:
                    y.backward(g)
        return counted


def _on_cpu(model: nn.Module) -> None:
    """Give a module on the meta device parameters on the CPU, whose memory nobody touches."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                untouched = torch.empty(p.shape, dtype=p.dtype, device="cpu")
                module._parameters[name] = nn.Parameter(untouched, p.requires_grad)


def _input(row: Row, model: nn.Module) -> Tensor:
    device = next(model.parameters()).device
    if any(isinstance(m, nn.Embedding) for m in model.modules()):
        return torch.empty(1, row.tokens, dtype=torch.int64, device=device)
    x = torch.empty(1, row.tokens, 4096, dtype=row.dtype, device=device)
    return x.requires_grad_(row.training)


def _adapted(row: Row, model: nn.Module, who: str) -> nn.Module:
    model.requires_grad_(False)
    names = ["default", "second"][: row.adapters]
    if who == "PEFT":
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=RANK, lora_alpha=32, target_modules=["0"], init_lora_weights=False, **row.peft or {}
        )
        peft: Any = get_peft_model(model, config)
        if row.adapters > 1:
            peft.add_adapter("second", config)
            peft.base_model.set_adapter(names)
        return peft.base_model.model  # type: ignore[no-any-return]
    if who == OURS:
        for name in names:
            inject(model, row.settings, name)
        activate(model, dict.fromkeys(names, 1.0))
        train_only(model, names)
    return model
