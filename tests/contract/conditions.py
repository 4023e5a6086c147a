"""The table of conditions: circumstances in which an adapted layer is its dense float64 twin."""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from conftest import COPIES, fill
from helpers.states import with_biases_of_b
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import lora_inject as li
from contract.kinds import KINDS, SCALE, Kind

Refusals = Mapping[str, type[li.LoraInjectError]]  # by kind


@dataclass(frozen=True)
class Condition:
    """What is done to an adapted model, and what its dense twin has to know of it."""

    config: Mapping[str, Any] = field(default_factory=dict)  # besides the kind's
    dtype: torch.dtype = torch.float64  # of the base and of its inputs when it runs
    born: torch.dtype | None = None  # of the base when it is adapted
    given: Callable[[Any], li.AdapterState] | None = None  # what is installed in its place
    # The model, the plain one and an empty folder, once the adapter has values.
    after: Callable[[Any, nn.Module, Path], nn.Module] = lambda model, plain, folder: model
    around: Callable[[nn.Module], AbstractContextManager[Any]] = lambda model: nullcontext()
    inputs: Callable[[Tensor], Tensor] = lambda x: x
    call: Callable[[Any, Kind, Sequence[Tensor]], Tensor] = lambda model, kind, x: model(*x)
    scale: float = SCALE
    weight: float = 1.0  # of the adapter
    beside: float = 0.0  # weight of another one with the same values
    rows: tuple[bool, ...] | None = None  # which rows meet the adapter
    trains: Literal["adapter", "adapter and base", "inputs", "nothing"] = "adapter"
    rounds: torch.dtype | None = None  # as this dtype does, where another one is computed in
    kinds: Collection[str] = tuple(KINDS)
    refused: Refusals = field(default_factory=dict)  # kinds that have not got it


# ------------------------------------------------------------------------- what is done to a model


def at_weight(weight: float) -> Any:
    return lambda model, *_: li.activate(model, {"default": weight})


def merged(model: Any, *_: Any) -> nn.Module:
    li.merge(model)
    return model


def merged_for_good(model: Any, *_: Any) -> nn.Module:
    li.merge(model, undo=False, eject=True)
    return model


def merged_and_unmerged(model: Any, *_: Any) -> nn.Module:
    for _ in range(2):
        li.merge(model)
        li.unmerge(model)
    return model


def given_merged_weights(model: Any, plain: nn.Module, folder: Path) -> nn.Module:
    received = {name: t.clone() for name, t in li.merged_weights(model)}
    plain.load_state_dict(received, strict=False)
    return plain


def from_file(layout: str, file: str) -> Any:
    def after(model: Any, plain: nn.Module, folder: Path) -> nn.Module:
        path = li.save_adapter(model, folder / file, format=layout)
        return li.load_adapter(plain, path, trainable=True)

    return after


def training(model: Any) -> nn.Module:
    li.train_only(model, "default")
    return model


def swapped_in(model: Any, *_: Any) -> nn.Module:
    state = copy.deepcopy(li.adapter_state(model))
    return li.swap_adapter(fill(model), state)


def shallow(model: Any, *_: Any) -> nn.Module:
    other = copy.copy(model)
    other._modules = dict(model._modules, layer=copy.copy(model.layer))
    return other


def copied(copy_of: Callable[[Any], Any]) -> Any:
    return lambda model, *_: copy_of(model)


def config_of(model: nn.Module) -> Any:
    return li.adapter_state(model).config


def from_state_dict(model: Any, plain: nn.Module, folder: Path) -> nn.Module:
    other = fill(li.inject(plain, config_of(model)))
    other.load_state_dict(model.state_dict())
    return other


def born_on_meta(model: Any, plain: nn.Module, folder: Path) -> nn.Module:
    other = li.inject(plain.to("meta"), config_of(model)).to_empty(device="cpu")
    other.load_state_dict(model.state_dict())
    return other


def ejected_and_installed(model: Any, *_: Any) -> nn.Module:
    state = copy.deepcopy(li.adapter_state(model))
    return training(li.install(li.eject(model), state))


def with_a_second(model: Any, *_: Any) -> nn.Module:
    """Which was the one that was active and trained, and is neither any more."""
    fill(li.inject(model, {**config_of(model), "rank": 1}, "second"), "second")
    return training(li.activate(model, "default"))


def after_another_left(model: Any, *_: Any) -> nn.Module:
    return li.eject(with_a_second(model), "second")


def mixed(default: float, second: float) -> Any:
    def after(model: Any, *_: Any) -> nn.Module:
        li.install(model, copy.deepcopy(li.adapter_state(model)), "second")
        return training(li.activate(model, {"default": default, "second": second}))

    return after


def cast(dtype: torch.dtype) -> Any:
    return lambda model, *_: model.to(dtype)


def with_a_base_that_trains(model: Any, *_: Any) -> nn.Module:
    for parameter in model.layer.parameters():
        parameter.requires_grad_()
    return model


# --------------------------------------------------------------------------------- how it is called


def checkpointed(reentrant: bool) -> Any:
    return lambda model, kind, x: checkpoint(model, *x, use_reentrant=reentrant)


def by_functional_call(model: Any, kind: Kind, x: Sequence[Tensor]) -> Tensor:
    """With the model's parameters in a copy that has other values."""
    other = fill(copy.deepcopy(model))
    return torch.func.functional_call(other, dict(model.named_parameters()), tuple(x))


def row_by_row(model: Any, kind: Kind, x: Sequence[Tensor]) -> Tensor:
    one = lambda *row: model(*(t.unsqueeze(0) for t in row)).squeeze(0)  # noqa: E731
    return torch.func.vmap(one)(*x)


def read_by_another(model: Any, kind: Kind, x: Sequence[Tensor]) -> Tensor:
    """Who reads the attribute gets W + delta, whatever is done with it."""
    plain = li.eject(copy.deepcopy(model))
    owner, _, name = kind.key.rpartition(".")
    weight = getattr(model.get_submodule(owner), name)
    return torch.func.functional_call(plain, {kind.key: weight}, tuple(x))


def compiled(model: Any, kind: Kind, x: Sequence[Tensor]) -> Tensor:
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend="aot_eager")(*x)


def traced(model: Any, kind: Kind, x: Sequence[Tensor]) -> Tensor:
    return make_fx(model)(*x)(*x)


def autocast(_: nn.Module) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


def strided(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, -1)[..., ::2]


# ------------------------------------------------------------------------------ what a kind has not

FORWARD = [name for name, kind in KINDS.items() if kind.update == "forward"]
READ = [name for name in KINDS if name not in FORWARD]
PARAMETERS = [name for name in READ if KINDS[name].site != "layer"]
TABLES = [name for name in KINDS if "embedding" in name]
STACKS = ["experts", "turned experts"]
TRANSPOSED_CONVOLUTIONS = ["conv_transpose 1d", "conv_transpose 2d"]
BIASED = ["linear", "stock subclass", "own linear forward", "activation inside", "conv1d"]
BIASED += ["conv 1d", "conv 2d"]
IN_PEFT = [*FORWARD, "own linear forward", "activation inside", "slices of own forward"]
IN_PEFT += ["slices of activation inside", "conv 3d", *PARAMETERS]
# A kind of each way to compute.
COMPILED = ["linear", "conv1d", "embedding", "unequal slices", "conv 2d", "own linear forward"]
COMPILED += ["turned experts", "scaled embedding"]


def only(names: Collection[str], otherwise: type[li.LoraInjectError]) -> Refusals:
    return {name: otherwise for name in KINDS if name not in names}


NO_GAIN = dict.fromkeys([*STACKS, *TRANSPOSED_CONVOLUTIONS], li.MatchError)
CONDITIONS: dict[str, Condition] = {
    "plain": Condition(),
    "float32": Condition(dtype=torch.float32),
    "bfloat16": Condition(dtype=torch.bfloat16),
    "float32 arithmetic over bfloat16": Condition(
        {"compute": "float32"},
        dtype=torch.bfloat16,
        kinds=[name for name in KINDS if name not in PARAMETERS],  # they are read in float32
    ),
    "cast to bfloat16": Condition(
        born=torch.float32, dtype=torch.bfloat16, after=cast(torch.bfloat16)
    ),
    "autocast": Condition(dtype=torch.float32, around=autocast, rounds=torch.bfloat16),
    "autocast over bfloat16": Condition(dtype=torch.bfloat16, around=autocast),
    "strided inputs": Condition(inputs=strided),
    "many rows": Condition(inputs=lambda x: x.repeat(12, *[1] * (x.dim() - 1))),
    "without gradients": Condition(around=lambda _: torch.no_grad(), trains="nothing"),
    "inference mode, in eval": Condition(
        after=lambda model, *_: model.eval(),
        around=lambda _: torch.inference_mode(),
        trains="nothing",
    ),
    "a base that trains": Condition(after=with_a_base_that_trains, trains="adapter and base"),
    "dropout, in eval": Condition(
        {"dropout": 0.5},
        after=lambda model, *_: model.eval(),
        refused=only(FORWARD, li.MatchError),
    ),
    "rslora": Condition({"scaling": "rslora"}, scale=3.0 / 2**0.5),
    "pissa": Condition({"init": "pissa"}),
    "olora": Condition({"init": "olora"}),
    "DoRA": Condition({"variant": "dora"}, refused=NO_GAIN),
    "DoRA over bfloat16": Condition({"variant": "dora"}, dtype=torch.bfloat16, refused=NO_GAIN),
    "DoRA, merged": Condition({"variant": "dora"}, after=merged, trains="inputs", refused=NO_GAIN),
    "bias of B": Condition(given=with_biases_of_b, refused=only(BIASED, li.LayerError)),
    "half of it": Condition(after=at_weight(0.5), weight=0.5),
    "disabled": Condition(around=li.disabled, weight=0.0, trains="inputs"),
    "routed": Condition(
        around=lambda model: li.routed(model, ["default", None, "default", None]),
        rows=(True, False, True, False),
    ),
    "a second beside": Condition(after=with_a_second),
    "another has left": Condition(after=after_another_left),
    "two mixed": Condition(after=mixed(0.25, -0.5), weight=0.25, beside=-0.5),
    "merged": Condition(after=merged, trains="inputs"),
    "merged for good": Condition(after=merged_for_good, trains="inputs"),
    "merged and unmerged": Condition(after=merged_and_unmerged),
    "merged weights": Condition(after=given_merged_weights, trains="inputs"),
    "native file": Condition({"init": "pissa"}, after=from_file("native", "a.safetensors")),
    "PEFT's file": Condition(after=from_file("peft", "a"), refused=only(IN_PEFT, li.FormatError)),
    "ejected and installed": Condition(after=ejected_and_installed),
    "swapped in": Condition({"init": "pissa"}, after=swapped_in),
    "state dict": Condition(after=from_state_dict),
    "born on meta": Condition(after=born_on_meta),
    "copy.copy of the layer": Condition(after=shallow),
    **{name: Condition(after=copied(COPIES[name])) for name in ("deepcopy", "pickle")},
    "checkpointed": Condition(call=checkpointed(False)),
    "checkpointed, reentrant": Condition(
        call=checkpointed(True), refused=dict.fromkeys(TABLES, li.LayerError)
    ),
    "functional call": Condition(call=by_functional_call),
    "vmap": Condition(call=row_by_row),
    "read by another": Condition(call=read_by_another),
    "traced": Condition(call=traced, trains="nothing"),
    "compiled": Condition(call=compiled, kinds=COMPILED),
}
