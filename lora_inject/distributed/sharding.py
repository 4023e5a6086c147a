"""Models whose tensors are spread over processes: what is refused, and what becomes shards.

An adapter that is put onto a model that is spread over processes would be plain Parameters among
shards, whose gradients nobody reduces. So adapters come first, and are spread with their layers.

FSDP2 alone takes them afterwards. Its parameter groups take no new parameters: `fully_shard` is
called on each layer that gets an adapter, with the mesh of its weight. The new Parameters become a
separate group; the layer's other Parameters are `ignored_params` of this call and stay in theirs.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Hashable, Iterable, Iterator, Sequence, Set
from itertools import repeat
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lora_inject.core.layers.library import Library
from lora_inject.core.layers.survey import Carried, Survey, memory_of
from lora_inject.core.layers.weight_kinds import sharded_by
from lora_inject.core.roots.root import entries
from lora_inject.distributed.movers import groups, held_by_group, is_moved
from lora_inject.errors import LayerError


class Sharding(Library):
    """What torch.distributed and DeepSpeed do to the tensors of a model."""

    modules = ("deepspeed",)

    def is_there(self) -> bool:
        """Return whether there is DeepSpeed, or was ever a group of processes.

        Whether FSDP is loaded tells nothing: an optimizer of torch loads it.
        """
        return super().is_there() or _group_was_made()

    def moves(self, module: nn.Module, param: str, held: Tensor) -> bool:
        """Return whether torch.distributed moves a parameter."""
        return _group_was_made() and is_moved(module, param, held)

    def before_attach(self, survey: Survey, asked: str, *, trains: bool) -> None:
        """Refuse a model that is spread over processes, but by FSDP2."""
        if not fsdp2_modules(survey):
            _refuse_spread(survey, asked, trains=trains)

    def before_train(self, survey: Survey, parameters: Iterable[nn.Parameter], asked: str) -> None:
        """Raise if parameters are to train that a wrapper around them would not reduce.

        What trains at the first call did so when the wrapper was made.
        """
        training = {id(parameter) for parameter in parameters}
        for wrapper in replicating(survey):
            inside = list(wrapper.module.parameters())
            trained = {id(parameter) for parameter in inside if parameter.requires_grad}
            reduced = _REDUCED.setdefault(wrapper, trained)
            if any(id(p) in training and id(p) not in reduced for p in inside):
                raise LayerError(
                    asked,
                    "DistributedDataParallel reduces what trained when it wrapped the model, and "
                    "the gradients of this adapter would stay different in each process",
                    "Call train_only first, then wrap the model (again)",
                )

    def writes_here(self, survey: Survey) -> bool:
        """Return whether this process writes a model's files: one of several with shards.

        That is the first of those that have a part of it, which need not be all processes.
        """
        members = {rank for mesh in meshes(survey) for rank in mesh.mesh.flatten().tolist()}
        return not members or torch.distributed.get_rank() == min(members)

    def after_save(self, survey: Survey) -> None:
        """Wait until the process that writes has written."""
        for mesh in meshes(survey):
            for dim in range(mesh.ndim):
                torch.distributed.barrier(group=mesh.get_group(dim))

    def before_read(self, survey: Survey) -> None:
        """Reshard FSDP2 modules: parameters that a forward left gathered are copies."""
        for module in fsdp2_modules(survey):
            module.reshard()

    def before_load(self, survey: Survey, name: str, wanted: Sequence[Carried]) -> None:
        """Check that a new adapter can be sharded with its layers."""
        if fsdp2_modules(survey):
            _check_shardable(survey, f"adapter {name!r}", wanted)

    def before_eject(self, survey: Survey, gone: Set[str]) -> None:
        """Refuse to eject an adapter in FSDP2's groups: each forward would put it back."""
        self.before_read(survey)
        for path, module, entry in entries(survey) if fsdp2_modules(survey) else ():
            if entry.adapter in gone and any(map(sharded_by, entry.tensors(module).values())):
                raise LayerError(
                    f"eject {entry.adapter!r} of {path!r}",
                    "fully_shard holds its tensors, and each forward would put them back",
                    "Call activate(model, None) to compute the base, or eject before fully_shard",
                )

    def after_load(self, survey: Survey, name: str) -> None:
        """Shard the tensors of an adapter that was just put on, layer by layer."""
        if fsdp2_modules(survey):
            _shard_adapter(survey, name)


_groups: list[bool] = []  # a group that is gone may have left its shards


def _group_was_made() -> bool:
    distributed = sys.modules.get("torch.distributed")
    if not _groups and distributed is not None and distributed.is_available():
        _groups[:] = [True] if distributed.is_initialized() else []
    return bool(_groups)


def _refuse_spread(survey: Survey, asked: str, *, trains: bool) -> None:
    """Check that a model is not spread over processes yet.

    DistributedDataParallel does so with gradients alone, and an adapter that does not train has
    none. Before it trains, `before_train` asks again.
    """
    wrapper: Any = type(survey.given)
    engine = wrapper.__module__ == "deepspeed.runtime.engine"
    if engine or (trains and replicating(survey)):
        name = wrapper.__name__ if engine else "DistributedDataParallel"
        raise LayerError(
            asked,
            f"the model is wrapped in {name}, which would not reduce its gradients",
            "Inject into the model first, then wrap it",
        )
    for path, how in _spread(survey):
        raise LayerError(
            asked,
            f"{path or 'the model'!r} is sharded by {how}, and the adapter's gradients would "
            "not be reduced",
            "Inject or load first, then shard: fully_shard, parallelize_module and DeepSpeed "
            "distribute an adapter with its layer; inject and load_adapter also work after "
            "fully_shard, and swap_adapter after each",
        )


def _spread(survey: Survey) -> Iterator[tuple[str, str]]:
    """Yield what of a model is spread over processes, and by whom."""
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", ())
    for path, module in survey.modules:
        if isinstance(module, fsdp):
            yield path, "FullyShardedDataParallel"
        # What DeepSpeed's optimizer has: others come too late.
        if any(map(hasattr, module._parameters.values(), repeat("_hp_mapping"))):
            yield path, "DeepSpeed ZeRO (its gradients)"
        # Older releases of transformers keep each process's part as a plain tensor.
        if "_hf_tp_plan" in module.__dict__:
            yield path, "tp_plan"
    for holder in survey.holders:
        if how := sharded_by(holder.tensor):
            yield holder.name, how


def replicating(survey: Survey) -> list[nn.parallel.DistributedDataParallel]:
    """Return DistributedDataParallel's wrappers around any module of a model.

    The wrapped model does not know its wrapper. So the interpreter is asked for all that there are,
    which takes a moment, in processes of a group only.
    """
    given = survey.given
    if isinstance(given, nn.parallel.DistributedDataParallel):
        return [given]
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return []
    if _wrappers_around(survey):
        gc.collect()  # a wrapper that nobody holds any more may wait for it
    return _wrappers_around(survey)


def _wrappers_around(survey: Survey) -> list[nn.parallel.DistributedDataParallel]:
    ddp = nn.parallel.DistributedDataParallel
    wrappers = [each for each in gc.get_objects() if issubclass(type(each), ddp)]
    return [w for w in wrappers if any(id(m) in survey.paths for m in w.module.modules())]


# What each wrapper of DistributedDataParallel reduces: what required a gradient when it was made.
_REDUCED: WeakKeyDictionary[nn.Module, set[int]] = WeakKeyDictionary()


def meshes(survey: Survey) -> list[Any]:
    """Return the meshes of processes over which tensors of the model are spread, each once."""
    tensors: list[Any] = [t for _, m in survey.modules for t in m._parameters.values()]
    return list(dict.fromkeys(t.device_mesh for t in tensors if hasattr(t, "full_tensor")))


def fsdp2_modules(survey: Survey) -> list[Any]:
    """Return the modules that `fully_shard` was called with."""
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    return [module for _, module in survey.modules if isinstance(module, fsdp)]


def _check_shardable(survey: Survey, asked: str, wanted: Iterable[Carried]) -> None:
    called_with = set(map(id, fsdp2_modules(survey)))
    held = {(id(m), name) for group in groups() for m, name, _ in held_by_group(group)}
    copies: dict[Hashable, nn.Module] = {}
    for place in wanted:
        module, memory = place.module, memory_of(place.weight)
        *replicated, shard = getattr(place.weight, "placements", (None,))
        along_one = shard is not None and shard.is_shard()
        if id(module) in called_with:
            reason = "fully_shard was called with this very layer, whose group takes no parameters"
        elif type(module).forward is nn.Module.forward or isinstance(
            module, NonDynamicallyQuantizableLinear
        ):
            reason = "it is never called, before which FSDP2 could gather the adapter"
        elif place.entry.spec is None and copies.setdefault(memory, module) is not module:
            reason = "its trained copy is tied to that of another layer"
        elif not (along_one and (id(module), place.entry.param) in held) or any(
            p.is_shard() for p in replicated
        ):
            reason = "it is not sharded by fully_shard alone"
        else:
            continue
        remedy = "Inject or load the adapter first, then shard the model"
        raise LayerError(f"{asked}, {place.name!r}", reason, remedy)


def _shard_adapter(survey: Survey, name: str) -> None:
    from torch.distributed.fsdp import fully_shard

    new: dict[nn.Module, set[Any]] = {}
    meshes: dict[nn.Module, Any] = {}
    depths: dict[nn.Module, int] = {}
    for item in entries(survey, name):
        path, module, entry = item
        new.setdefault(module, set()).update(entry.tensors(module).values())
        meshes[module] = item.weight.device_mesh  # type: ignore[attr-defined]
        depths[module] = path.count(".")
    of_bases = {id(m): (group, kept) for group in groups() for m, _, kept in held_by_group(group)}
    for module in sorted(new, key=depths.__getitem__, reverse=True):  # as fully_shard asks
        old = {parameter for parameter in module.parameters() if parameter not in new[module]}
        of_base, kept = of_bases[id(module)]  # from torch 2.15 on each parameter has its policy
        how = {"mp_policy": kept.mp_policy, "offload_policy": of_base.offload_policy}
        fully_shard(
            module, mesh=meshes[module], reshard_after_forward=True, ignored_params=old, **how
        )
        if (factor := getattr(of_base, "gradient_divide_factor", None)) is not None:
            module.set_gradient_divide_factor(factor)  # type: ignore[operator]
        _let_mean_be_mean(module)


def _let_mean_be_mean(module: Any) -> None:
    """Let FSDP2 add gradients and divide: gloo of torch 2.8 adds where it is to take the mean."""
    force = getattr(module, "set_force_sum_reduction_for_comms", None)
    if force is not None and torch.distributed.get_backend() == "gloo":
        force(True)
