"""All verbs in any order on random models, against a dense float64 model that is kept with them.

`Truth` knows W and, for each adapter, A, B and copies T of a tensor or of rows, and nothing of the
package: a weight is `W + sum of weight * (T - W) + sum of weight * scale * B @ A`, and with DoRA
that with the norms m; a bias is `bias + sum of weight * scale * b`. After every rule the model must
compute what the dense model does and hold its base bit for bit, also where a verb was refused; only
rules that say so may be. The examples are the same each time; LORA_MACHINE_EXAMPLES and
LORA_MACHINE_STEPS make a longer search among others.
"""

from __future__ import annotations

import copy
import io
import math
import os
import re
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import torch
from conftest import COPIES, same_bits
from helpers import trees
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

import lora_inject as li

N_EXAMPLES = int(os.environ.get("LORA_MACHINE_EXAMPLES", "45"))
N_STEPS = int(os.environ.get("LORA_MACHINE_STEPS", "25"))
ROWS = 3
FURTHER: list[set[str]] = [set(), set(), {"dora"}, {"lora_bias"}, {"lora_bias", "dora"}]
TOKENS = (3, 1)
NAMES = ("a", "b.c", "weight")
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.5}
ON_FACTORS = ("linear", "ties", "dare_linear", "magnitude_prune")
SUMS = ("add", "svd", "dare_linear_svd", *ON_FACTORS)
COMPUTED = (*SUMS, "scale", "truncate", "cut")
LARGEST_IN_16_BITS = 16.0
DENSITY = 0.5  # of the methods that keep the largest values; dare drops none here
Mix = dict[str, float]


# ------------------------------------------------------------------------------ the model of truth


@dataclass
class Site:
    """A, B and scale at one weight, in float64, and what A and B started from with pissa.

    With DoRA also the magnitudes m, with `lora_bias` the bias b of B.
    """

    of: trees.SiteOf
    weight: str
    scale: float
    A: Tensor | None = None
    B: Tensor | None = None
    m: Tensor | None = None
    b: Tensor | None = None
    start: tuple[Tensor, Tensor] | None = None

    @property
    def bias(self) -> str:
        return self.weight.removesuffix(self.of.weight) + self.of.bias

    def delta(self, W: Tensor) -> Tensor:
        found = self.of.delta(self.A, self.B)
        if self.start is not None:
            found = found - self.of.delta(*self.start)
        return self.scale * found.reshape(W.shape)


@dataclass
class Adapter:
    """Sites, copies, and the rows that a copy is of, by the names that the whole model has."""

    sites: dict[str, Site] = field(default_factory=dict)
    copies: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, by the names of `adapter_parameters`."""
        pairs = ((name, role) for name in self.sites for role in "ABmb")
        found = {f"{n}.lora_{r}": getattr(self.sites[n], r) for n, r in pairs}
        return {key: value for key, value in found.items() if value is not None} | self.copies

    def put(self, key: str, value: Tensor) -> None:
        name, _, role = key.rpartition(".lora_")
        if name:
            setattr(self.sites[name], role, value)
        else:
            self.copies[key] = value

    def part(self, keep: Callable[[str], bool]) -> Adapter:
        """What of it has such names."""
        tables = (self.sites, self.copies, self.rows)
        return Adapter(*({n: v for n, v in table.items() if keep(n)} for table in tables))  # type: ignore[attr-defined]

    def take(self, other: Adapter) -> None:
        self.sites.update(other.sites)
        self.copies.update(other.copies)
        self.rows.update(other.rows)

    def reads(self) -> dict[str, bool]:
        """The tensors that are not the base's with it, and whether DoRA scales what there is."""
        of_sites = {site.weight: site.m is not None for site in self.sites.values()}
        biases = {site.bias: False for site in self.sites.values() if site.b is not None}
        return {**dict.fromkeys(self.copies, False), **biases, **of_sites}

    def routes(self) -> bool:
        """Whether each row of a batch can have its own."""
        whole = (
            s.b is not None or (s.m is not None and s.of.name == "conv")
            for s in self.sites.values()
        )
        routed = all(site.of.routed for site in self.sites.values())
        return not self.copies and routed and not any(whole)


class Truth:
    """What the model must be: a plain model, adapters as numbers, and what is active where."""

    def __init__(self, plain: trees.Tree, roots: tuple[str, ...]) -> None:
        self.plain = plain
        self.adapters: dict[str, Adapter] = {}
        self.active: dict[str, Mix] = {root: {} for root in roots}
        self.trainable: dict[str, set[str]] = {root: set() for root in roots}
        self.merged: dict[str, Mix] = {}  # root to what was active before

    @property
    def dtype(self) -> torch.dtype:
        return next(self.plain.parameters()).dtype

    def sites(self) -> dict[str, trees.SiteOf]:
        branches = [(p, b) for p, b in self.plain.named_modules() if isinstance(b, trees.Branch)]
        return {f"{path}.{of.name}": of for path, b in branches for of in b.sites}

    def copied(self) -> list[str]:
        branches = [(p, b) for p, b in self.plain.named_modules() if isinstance(b, trees.Branch)]
        return [f"{path}.{name}" for path, b in branches for name in b.copied]

    def on(self, root: str) -> list[str]:
        """The adapters that have a tensor under a root."""
        return sorted(n for n, a in self.adapters.items() if any(map(under(root), a.tensors())))

    def drop(self, name: str, root: str) -> None:
        adapter, gone = self.adapters[name], under(root)
        holders = [at for at in self.active if gone(at) and name in self.on(at)]
        left = self.adapters[name] = adapter.part(lambda n: not gone(n))
        if not left.tensors():
            del self.adapters[name]
        for at in holders:
            self.active[at].pop(name, None)
            self.trainable[at].discard(name)
            if not self.on(at):  # a mix may name adapters of the other tower
                self.active[at] = {}

    def base(self) -> dict[str, Tensor]:
        """W in float64, by one name in each module."""
        modules = self.plain.named_modules()
        own = ((f"{path}.{key}", p) for path, m in modules for key, p in m._parameters.items())
        return {name: p.detach().double() for name, p in own if p is not None}

    def weights(self, mix: Mix | None = None) -> dict[str, Tensor]:
        """Every weight that is not the base's, under a mix or what is active."""
        base = self.base()
        found: dict[str, Tensor] = {}

        def add(key: str, change: Tensor) -> None:
            found[key] = found.get(key, base[key]) + change

        for name, adapter in self.adapters.items():
            for key, T in adapter.copies.items():
                rows = torch.tensor(adapter.rows.get(key, range(len(base[key]))))
                change = self.weight(name, key, mix) * (T - base[key][rows])
                add(key, torch.zeros_like(base[key]).index_copy(0, rows, change))
            for site in adapter.sites.values():
                weight = self.weight(name, site.weight, mix)
                add(site.weight, weight * site.delta(base[site.weight]))
                if site.b is not None:
                    add(site.bias, weight * site.scale * site.b)
        for name, adapter in self.adapters.items():
            for site in adapter.sites.values():  # with a gain they are alone at their weight
                if site.m is not None and self.weight(name, site.weight, mix):
                    found[site.weight] = site.of.gained(found[site.weight], site.m)
        return found

    def may_mix(self, mix: Mix, root: str = "") -> bool:
        """Whether each weight that DoRA scales has one adapter, with weight 1."""
        taking: dict[str, list[tuple[float, bool]]] = {}
        for name in mix.keys() & self.adapters.keys():
            for key, gained in self.adapters[name].reads().items():
                if key.startswith(root):
                    taking.setdefault(key, []).append((mix[name], gained))
        found = [each for each in taking.values() if any(gained for _, gained in each)]
        return all(len(each) == 1 and each[0][0] == 1.0 for each in found)

    def weight(self, adapter: str, key: str, mix: Mix | None) -> float:
        root = next(root for root in self.active if key.startswith(root))
        return (self.active[root] if mix is None else mix).get(adapter, 0.0)

    def largest(self) -> float:
        """The largest value of a weight that is not the base's."""
        return max((float(w.detach().abs().max()) for w in self.weights().values()), default=0.0)

    def run(self, x: Tensor, ids: Tensor, mix: Mix | None = None) -> Tensor:
        tensors, inputs = {**self.base(), **self.weights(mix)}, (x.double(), ids)
        return torch.func.functional_call(self.plain, tensors, inputs, tie_weights=False)


def under(root: str) -> Callable[[str], bool]:
    return lambda name: name.startswith(root)


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters by all their names, as everybody but a forward reads them."""
    return dict(model.named_parameters(remove_duplicate=False))


def allowed(further: set[str], of: trees.SiteOf) -> dict[str, Any]:
    """What of the further settings a site can have."""
    if "lora_bias" in further and of.bias:
        return {"lora_bias": True}
    return {"variant": "dora"} if "dora" in further and of.delta is not trees.stack else {}


def refused_value(how: str, parts: list[Adapter]) -> tuple[bool, bool]:
    """Whether a value cannot be computed of adapters, or may be refused."""
    one, two, reads = parts[0], parts[-1], [part.reads() for part in parts]
    gained = {key for read in reads for key, is_gained in read.items() if is_gained}
    if how not in SUMS:
        return bool(gained or (how == "scale" and one.copies)), False
    shared, copies = reads[0].keys() & reads[1].keys(), one.copies.keys() & two.copies.keys()
    overlap = shared & {*one.copies, *two.copies}
    must = bool(one.rows or two.rows or gained & shared or copies or overlap)
    biased = any(site.b is not None for part in parts for site in part.sites.values())
    return must, how in ON_FACTORS or (how != "add" and bool(gained or biased))


def of_mixed_factors(parts: list[Adapter], base: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    """The weights of the methods that mix the A and the B, by the roots of scales."""
    due = {}
    for key in {key for part in parts for key in part.sites}:
        there = [part.sites[key] for part in parts if key in part.sites]
        A, B = (mixed_factors([getattr(s, r) for s in there], there, how) for r in "AB")
        W = base[there[0].weight]
        due[there[0].weight] = W + there[0].of.delta(A, B).reshape(W.shape)
    return due


def mixed_factors(tensors: list[Any], sites: list[Site], how: str) -> Tensor:
    """One factor of TIES (arXiv:2306.01708) or of a plain sum, of the largest values."""
    if how in ("ties", "magnitude_prune"):
        places = [t.abs().flatten().argsort(descending=True).argsort() for t in tensors]
        kept = [
            place.view(t.shape) < int(DENSITY * t.numel())
            for t, place in zip(tensors, places, strict=True)
        ]
        tensors = [t * keep for t, keep in zip(tensors, kept, strict=True)]
    found = torch.zeros_like(tensors[0])
    elected = torch.where(sum(tensors) >= 0, 1.0, -1.0)
    agree = [t.sign() == elected if how == "ties" else torch.ones_like(t) for t in tensors]
    for t, site, mine in zip(tensors, sites, agree, strict=True):
        found = found + mine * t * math.sqrt(site.scale)
    return found / sum(agree).clamp(min=1) if how == "ties" else found


def exactly(name: str) -> str:
    return f"^{re.escape(name)}$"


def assert_close(found: Tensor, due: Tensor, dtype: torch.dtype) -> None:
    error = (found.detach().double() - due.detach()).abs().max() / due.detach().abs().max().clamp(1)
    assert error < TOLERANCE[dtype], f"off by {error:.1e}"


def assert_nearest(found: list[Tensor], due: list[Tensor], dtype: torch.dtype) -> None:
    """Each matrix has rank 1, and is as near as one can be: off by the other singular values."""
    for one, wanted in zip(found, due, strict=True):
        rest, least = (torch.linalg.svdvals(matrix)[1:].norm() for matrix in (one, wanted))
        assert_close(rest, torch.zeros_like(rest), dtype)
        assert_close((wanted - one).norm(), least, dtype)


def add_one(module: nn.Module, args: Any, output: Any) -> Any:
    """A hook, as anybody may put one onto a layer."""
    return (output[0] + 1, *output[1:]) if isinstance(output, tuple) else output + 1


TIES: dict[str, Callable[[trees.Tree], None]] = {
    "no": lambda tree: None,
    "share": trees.share_branch,
    "object": trees.tie_objects,
    "memory": trees.tie_memory,
}
kinds = st.sampled_from(sorted(trees.BRANCHES))
has_adapters = precondition(lambda self: self.truth.adapters)
is_merged = precondition(lambda self: self.truth.merged)
is_unmerged = precondition(lambda self: not self.truth.merged)


class Machine(RuleBasedStateMachine):
    """The verbs, each as a rule that does the same to the model and to the truth."""

    @initialize(
        left=st.lists(kinds, min_size=1, max_size=3),
        right=st.lists(kinds, min_size=1, max_size=2),
        tie=st.sampled_from(sorted(TIES)),
        roots=st.sampled_from([("",), ("left.", "right.")]),
        dtype=st.sampled_from([torch.float64, torch.float32]),
        data=st.data(),
    )
    def start(
        self, left: Any, right: Any, tie: str, roots: Any, dtype: torch.dtype, data: Any
    ) -> None:
        torch.manual_seed(0)
        model: Any = trees.Tree(left, right).to(dtype).eval()
        TIES[tie](model)
        for parameter in list(model.parameters())[::3]:
            parameter.requires_grad_(False)
        self.model = model
        self.truth = Truth(copy.deepcopy(model), roots)
        self.x = torch.randn(ROWS, trees.LENGTH, trees.WIDTH, dtype=torch.float64)
        self.ids = torch.randint(0, trees.VOCABULARY, (ROWS, trees.LENGTH))
        self.undo: dict[str, bool] = {}  # of what is merged
        for rank in (2, 1):
            further = data.draw(st.sampled_from(FURTHER), "further")
            self.inject(data, rank, 3.0, "kaiming", further, True)
        if self.truth.adapters:  # of the rules, hypothesis chooses this one seldom
            self.compute_a_value(data, data.draw(st.sampled_from(COMPUTED), "first"))

    # What rules use ------------------------------------------------------------------------------

    def out(self) -> Tensor:
        return self.model(self.x.to(self.truth.dtype), self.ids)

    def at(self, root: str) -> Any:
        return self.model.get_submodule(root.removesuffix("."))

    def refused(self, run: Callable[[], Any], *, must: bool = False, may: bool = False) -> bool:
        """Call a verb, and return whether it was refused, which it must be, may be, or neither."""
        try:
            run()
        except li.LoraInjectError:
            assert must or may
            return True
        assert not must, "it was not refused"
        return False

    def some_root(self, data: Any) -> str:
        return data.draw(st.sampled_from(sorted(self.truth.active)), "root")

    def some_adapted_root(self, data: Any) -> str:
        return data.draw(st.sampled_from(sorted(filter(self.truth.on, self.truth.active))), "root")

    def some_adapter(self, data: Any, root: str = "") -> str:
        return data.draw(st.sampled_from(self.truth.on(root)), "name")

    def some_mix(self, data: Any, root: str = "") -> Mix:
        weights = st.sampled_from([1.0, 0.5, -1.0])
        return data.draw(st.dictionaries(st.sampled_from(self.truth.on(root)), weights), "mix")

    def tied(self, name: str) -> list[str]:
        """Every name of the memory of a base tensor."""
        tensors = named(self.model)
        return [n for n, t in tensors.items() if t.data_ptr() == tensors[name].data_ptr()]

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """An adapter's Parameters; a copy of a tied tensor by each name that the tensor had."""
        found, base = li.adapter_parameters(self.model, name), self.truth.base()
        known = self.truth.adapters[name].copies if name in self.truth.adapters else {}
        further = {
            same: found[key]
            for key in found.keys() & base.keys()
            for same in (*self.tied(key), *(n for n in known if known[n] is known.get(key)))
            if same in base
        }
        return {**further, **found}

    def adopt(self, name: str) -> None:
        """Take over the values of an adapter; a copy under several names is one tensor."""
        made: dict[int, Tensor] = {}
        for key, parameter in self.parameters(name).items():
            value = made.setdefault(id(parameter), parameter.detach().double().clone())
            self.truth.adapters[name].put(key, value)
        for root in self.truth.active:
            if name in self.truth.on(root) and root not in self.truth.merged:
                for key, site in li.adapter_state(self.at(root), name).sites.items():
                    if site.A0 is not None and site.B0 is not None:
                        start = (site.A0.double().clone(), site.B0.double().clone())
                        self.truth.adapters[name].sites[root + key].start = start

    def adopt_base(self, name: str) -> None:
        """Take over a weight of the base that a verb has changed for good."""
        path, _, key = name.rpartition(".")
        plain, value = self.truth.plain.get_submodule(path), named(self.model)[name].detach()
        flag = plain._parameters[key].requires_grad  # type: ignore[union-attr]
        plain._parameters[key] = nn.Parameter(value.clone(), flag)

    @torch.no_grad()
    def fill(self, name: str, data: Any) -> None:
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 3), "seed"))
        for key, parameter in self.parameters(name).items():
            if not any(key.startswith(root) for root in self.truth.merged):  # what is folded stays
                parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator))
        self.adopt(name)

    # Adapters come and go ------------------------------------------------------------------------

    @rule(
        data=st.data(),
        rank=st.integers(1, 2),
        alpha=st.sampled_from([1.0, 3.0]),
        init=st.sampled_from(["kaiming", "kaiming", "pissa"]),
        further=st.sampled_from(FURTHER),
        rows=st.sampled_from([True, True, False]),
    )
    def inject(
        self, data: Any, rank: int, alpha: float, init: str, further: set[str], rows: bool
    ) -> None:
        root = data.draw(st.sampled_from(sorted({"", *self.truth.active})), "root")
        name = data.draw(st.sampled_from(NAMES), "name")
        sites = {n: of for n, of in self.truth.sites().items() if n.startswith(root)}
        weights = {n: n.removesuffix(of.name) + of.weight for n, of in sites.items()}
        places = sorted([*sites, *filter(under(root), self.truth.copied())])
        chosen = data.draw(st.sets(st.sampled_from(places), min_size=1)) if places else set()
        taken = {weights[n] for n in chosen if n in sites}
        train = {n for n in chosen if n not in sites and not taken.intersection(self.tied(n))}
        rules = [
            {"match": exactly(n.removeprefix(root)), **sites[n].rule, **allowed(further, sites[n])}
            for n in chosen & sites.keys()
        ]
        tables = {n for n in train if rows and n.endswith("emb.weight")}
        config = {
            "rank": rank,
            "alpha": alpha,
            "init": init,
            "targets": rules,
            "train": [exactly(n.removeprefix(root)) for n in train - tables],
            "tokens": {exactly(n.removeprefix(root)): TOKENS for n in tables},
        }
        if not chosen or (not taken and not train):
            return
        biased = [n for n in chosen & sites.keys() if "lora_bias" in allowed(further, sites[n])]
        twice = any(n.removesuffix(sites[n].name) + sites[n].bias in train for n in biased)
        in_use = name in self.truth.on(root) or any(r.startswith(root) for r in self.truth.merged)
        around = root not in self.truth.active and any(map(self.truth.on, self.truth.active))
        must = in_use or twice or around
        li.plan(self.at(root), config)
        if self.refused(lambda: li.inject(self.at(root), config, name), must=must):
            return
        if root not in self.truth.active:  # no tower has an adapter, and the whole is the root
            self.truth.active, self.truth.trainable = {root: {}}, {root: set()}
        self.truth.active[root] = {}
        if self.truth.dtype != torch.bfloat16:
            assert_close(self.out(), self.truth.run(self.x, self.ids), self.truth.dtype)
        self.truth.active[root] = {name: 1.0}
        self.truth.trainable[root] = {name}
        adapter = self.truth.adapters.setdefault(name, Adapter())
        for n in chosen & sites.keys():
            adapter.sites[n] = Site(sites[n], weights[n], alpha / rank)
        adapter.rows.update({same: TOKENS for n in tables for same in self.tied(n)})
        self.fill(name, data)

    @has_adapters
    @rule(data=st.data(), all_of_it=st.booleans())
    def eject(self, data: Any, all_of_it: bool) -> None:
        where = data.draw(st.sampled_from(sorted({"", *self.truth.active})), "where")
        if not self.truth.on(where):
            return
        name = None if all_of_it else self.some_adapter(data, where)
        merged = [root for root in self.truth.merged if root.startswith(where)]
        weights = self.truth.weights()
        must = any(name in self.truth.on(root) for root in merged)
        if self.refused(lambda: li.eject(self.at(where), name), must=must):
            return
        for root in merged if name is None else ():  # leaves the merged weights
            del self.truth.merged[root]
            for key in filter(under(root), weights):
                self.adopt_base(key)
        for gone in [name] if name is not None else self.truth.on(where):
            self.truth.drop(gone, where)

    @has_adapters
    @rule(
        data=st.data(),
        how=st.sampled_from(["peft", "native", "value"]),
        leave=st.sampled_from([False, False, True]),
    )
    def leave_and_return(self, data: Any, how: str, leave: bool) -> None:
        """Save, eject, and load under another name, all of it or without one site or copy."""
        root = self.some_adapted_root(data)
        name, model = self.some_adapter(data, root), self.at(root)
        new, due = self.some_free_name(data, name), self.parameters(name)
        moved = copy.deepcopy(self.truth.adapters[name]).part(under(root))
        parts = sorted([*moved.sites, *moved.copies]) if leave else []
        gone = {data.draw(st.sampled_from(parts), "gone")} if len(parts) > 1 else set[str]()
        # A pattern of a module lets go of what trains inside it, too.
        gone |= {key for key in moved.copies for site in gone if key.startswith(f"{site}.")}
        gone.update(*(self.tied(key) for key in gone & moved.copies.keys()))
        # Files have a module that stands in two places under its first name.
        first = {f"{p}.{key}" for p, m in self.model.named_modules() for key in m._parameters}
        out = [exactly(key.removeprefix(root)) for key in gone & {*moved.sites, *first}]
        state: Any = None
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "a.safetensors"

            def save() -> None:
                nonlocal state
                if how == "value":
                    state = copy.deepcopy(li.adapter_state(model, name))
                else:
                    li.save_adapter(model, path, name, format=how)

            def load() -> None:
                if how == "value":
                    li.install(model, state, new, leave_out=out)
                else:
                    li.load_adapter(model, path, new, leave_out=out)

            if self.refused(save, must=root in self.truth.merged, may=how == "peft"):
                return
            moved = moved.part(lambda key: key not in gone)
            if self.replaced(root, name, new, moved, load):
                for key in moved.tensors():
                    assert same_bits(self.parameters(new)[key], due[key])

    def some_free_name(self, data: Any, name: str) -> str:
        """A name that no adapter has, or that of one which is to be ejected."""
        return data.draw(st.sampled_from(sorted({name, *NAMES} - {*self.truth.on("")} | {name})))

    def replaced(
        self, root: str, name: str, new: str, adapter: Adapter, load: Callable[[], Any]
    ) -> bool:
        """Eject an adapter and load another; whether it was, and not refused."""
        li.eject(self.at(root), name)
        self.truth.drop(name, root)
        before = copy.deepcopy(self.truth.adapters), copy.copy(self.truth.active)
        self.truth.adapters.setdefault(new, Adapter()).take(adapter)
        mix = self.truth.active[root]
        if not mix.keys() & {*self.truth.on(root), new}:  # beside adapters of the other tower
            self.truth.active[root] = {**mix, new: 1.0}
        # A mix that names adapters of the other tower may name this one.
        if self.refused(load, must=not self.truth.may_mix(self.truth.active[root], root)):
            self.truth.adapters, self.truth.active = before
            return False
        return True

    @is_unmerged
    @has_adapters
    @rule(data=st.data(), first=st.sampled_from(COMPUTED))
    def compute_a_value(self, data: Any, first: str) -> None:
        """Compute with adapters as values, and put the result in the place of one."""
        root = self.some_adapted_root(data)
        for how in (first, *COMPUTED):
            if self.computed(data, root, how):
                return

    def computed(self, data: Any, root: str, how: str) -> bool:
        """Do one of these, if it is not refused."""
        name, other = self.some_adapter(data, root), self.some_adapter(data, root)
        factor, new = data.draw(st.sampled_from([0.5, -1.0])), self.some_free_name(data, name)
        names = [name, other] if how in SUMS else [name]
        parts = [copy.deepcopy(self.truth.adapters[n]).part(under(root)) for n in names]
        values = [copy.deepcopy(li.adapter_state(self.at(root), n)) for n in names]
        if self.leaves_out(how, [site.spec for value in values for site in value.sites.values()]):
            return False
        must, may = refused_value(how, parts)
        compute = {
            "scale": lambda: values[0] * factor,
            "add": lambda: values[0] + values[-1],
            "truncate": lambda: values[0].truncate(energy=1.0),
            "cut": lambda: values[0].truncate(rank=1),
            "svd": lambda: li.combine(values, method="svd", rank=20),
            "linear": lambda: li.combine(values, method="linear"),
            "ties": lambda: li.combine(values, method="ties", density=DENSITY),
            "dare_linear": lambda: li.combine(values, method="dare_linear", density=1.0),
            "dare_linear_svd": lambda: li.combine(
                values, method="dare_linear_svd", density=1.0, rank=20
            ),
            "magnitude_prune": lambda: li.combine(
                values, method="magnitude_prune", density=DENSITY
            ),
        }[how]
        made: Any = None

        def make() -> None:
            nonlocal made
            made = compute()

        if self.refused(make, must=must, may=may):
            return False
        weights = {name: factor} if how == "scale" else {name: 1.0}
        weights = dict.fromkeys(names, 1.0 + (name == other)) if how in SUMS else weights
        due = self.truth.weights(weights)
        if how in ON_FACTORS:
            due |= of_mixed_factors(parts, self.truth.base(), how)
        result = Adapter()
        for part in parts:
            result.take(part)
        for key, site in result.sites.items():
            scale = made.sites[key.removeprefix(root)].scale
            result.sites[key] = Site(site.of, site.weight, scale)
        model = self.at(root)
        if self.replaced(root, name, new, result, lambda: li.install(model, made, new)):
            self.adopt(new)
            found, base = self.truth.weights({new: 1.0}), named(self.truth.plain)
            exact = self.truth.dtype == torch.float64
            dtype = torch.float64 if exact else torch.float32
            cut = {s.weight: s.of for s in result.sites.values()} if how == "cut" else {}
            for key in filter(under(root), {**found, **due}):
                W = base[key].double()
                pair = [w.get(key, W) for w in (found, due)]
                if key in cut:
                    assert_nearest(*(cut[key].matrices(w - W) for w in pair), dtype)
                else:
                    assert_close(*pair, dtype)
        return True

    def leaves_out(self, how: str, specs: list[Any]) -> bool:
        """Whether ranks are high, or slices would become one matrix, which the truth has not."""
        sliced = any(spec.slices is not None for spec in specs)
        return sum(spec.rank for spec in specs) > 20 or (how == "dare_linear_svd" and sliced)

    @has_adapters
    @rule(data=st.data())
    def swap(self, data: Any) -> None:
        root = self.some_adapted_root(data)
        name, model = self.some_adapter(data, root), self.at(root)
        if root in self.truth.merged:
            assert self.refused(lambda: li.adapter_state(model, name), must=True)
            return
        state = copy.deepcopy(li.adapter_state(model, name))
        for site in state.sites.values():
            for role in set(site.tensors) - {"A0", "B0"}:
                site.tensors[role].mul_(-0.5)
        li.swap_adapter(model, state, name)
        for key, value in filter(
            lambda item: item[0].startswith(root), self.parameters(name).items()
        ):
            due = self.truth.adapters[name].tensors()[key]
            assert_close(value, due * (-0.5 if ".lora_" in key else 1), torch.float32)
        self.adopt(name)

    # Which take part, and which train ------------------------------------------------------------

    @has_adapters
    @rule(data=st.data())
    def activate(self, data: Any) -> None:
        mix = self.some_mix(data)
        must = bool(self.truth.merged) or not self.truth.may_mix(mix)
        if not self.refused(lambda: li.activate(self.model, mix), must=must):
            self.truth.active = {root: dict(mix) for root in self.truth.active}

    @has_adapters
    @rule(data=st.data())
    def train_only(self, data: Any) -> None:
        names = data.draw(st.sets(st.sampled_from(self.truth.on(""))), "names")
        if not self.refused(lambda: li.train_only(self.model, names), must=bool(self.truth.merged)):
            for root, trainable in self.truth.trainable.items():
                trainable.clear()
                trainable.update(names.intersection(self.truth.on(root)))

    @has_adapters
    @rule(data=st.data(), threads=st.booleans())
    def contexts(self, data: Any, threads: bool) -> None:
        """`disabled` and `routed` hold for their own thread, while others run."""
        there = self.truth.on("")
        able = [name for name in there if self.truth.adapters[name].routes()]
        names = st.sampled_from([None, *data.draw(st.sampled_from([able, able, there]))])
        rows = data.draw(st.lists(names, min_size=ROWS, max_size=ROWS), "rows")
        routes = {*rows} <= {None, *able}
        merged = bool(self.truth.merged)
        together = threading.Barrier(3) if threads else None

        def plain() -> Tensor:
            return self.in_step(together)

        def in_disabled() -> Tensor:
            with li.disabled(self.model):
                return self.in_step(together)

        def in_routed() -> Tensor:
            with li.routed(self.model, rows):
                return self.in_step(together)

        if merged or not routes:
            enter = li.routed(self.model, rows).__enter__
            assert self.refused(enter, may=True) or not merged
            return
        each: list[Mix] = [{} if name is None else {name: 1.0} for name in rows]
        dues = [
            self.truth.run(self.x, self.ids),
            self.truth.run(self.x, self.ids, {}),
            torch.cat([self.truth.run(self.x[[i]], self.ids[[i]], m) for i, m in enumerate(each)]),
        ]
        for found, due in zip(run_all([plain, in_disabled, in_routed], threads), dues, strict=True):
            assert_close(found, due, self.truth.dtype)

    @is_unmerged
    @has_adapters
    @rule(data=st.data(), verb=st.sampled_from(["activate", "eject", "merge", "inject"]))
    def verbs_inside_a_context(self, data: Any, verb: str) -> None:
        name, model = self.some_adapter(data), self.model
        verbs = {
            "activate": lambda: li.activate(model, name),
            "eject": lambda: li.eject(model, name),
            "merge": lambda: li.merge(model, name=name),
            "inject": lambda: li.inject(model, {"targets": ["fc"]}, "new"),
        }
        with li.disabled(model):
            self.refused(verbs[verb], must=True)
            with torch.no_grad():
                assert_close(self.out(), self.truth.run(self.x, self.ids, {}), self.truth.dtype)

    @has_adapters
    @rule()
    def looks(self) -> None:
        """What only looks at a model: every active site takes part, and the base is the base."""
        must = bool(self.truth.merged) or not any(self.truth.active.values())
        missed: list[str] = []
        if not self.refused(lambda: missed.extend(li.unreached(self.model, self.out)), must=must):
            assert not missed
        assert all(repr(name)[1:-1] in li.summary(self.model) for name in self.truth.on(""))
        if not self.truth.merged:
            base = li.reference(self.model)
            with torch.no_grad():
                found = base(self.x.to(self.truth.dtype), self.ids)
                assert_close(found, self.truth.run(self.x, self.ids, {}), self.truth.dtype)

    def in_step(self, together: threading.Barrier | None) -> Tensor:
        if together is not None:
            together.wait(60)
        with torch.no_grad():
            found = self.out()
        if together is not None:
            together.wait(60)
        return found

    # Merging -------------------------------------------------------------------------------------

    @has_adapters
    @rule(
        data=st.data(),
        how=st.sampled_from([{}, {}, {"undo": False}, {"eject": True}]),
        named_mix=st.booleans(),
    )
    def merge(self, data: Any, how: dict[str, bool], named_mix: bool) -> None:
        root, eject = self.some_root(data), how.get("eject", False)
        mix = self.some_mix(data, root) if named_mix and self.truth.on(root) else None
        folded = self.truth.active[root] if mix is None else mix
        must = root in self.truth.merged or not {*folded}.intersection(self.truth.on(root))
        must = must or not self.truth.may_mix(folded, root)
        weights = self.changed_by(root, folded)
        is_tied = any(len(self.tied(key)) > 1 for key in weights)
        partial = not set(folded) <= set(self.truth.on(root))

        def run() -> None:
            li.merge(self.at(root), name=mix, **how)

        if self.refused(run, must=must, may=(eject and is_tied) or partial):
            return
        self.truth.merged[root] = self.truth.active[root]
        self.truth.active[root] = dict(folded)
        self.undo[root] = how.get("undo", True)
        if eject:
            self.computes_the_dense_model()
            del self.truth.merged[root]
            for key in weights:
                self.adopt_base(key)
            for name in self.truth.on(root):
                self.truth.drop(name, root)

    @is_unmerged
    @has_adapters
    @rule(data=st.data())
    def merged_weights(self, data: Any) -> None:
        """What a server is given, while nothing is written."""
        root = self.some_root(data)
        names, due = self.truth.on(root), self.truth.weights()
        mix = self.truth.active[root]
        if not set(mix) <= set(names) or not mix:
            return
        found = {f"{root}{key}": value for key, value in li.merged_weights(self.at(root))}
        base = {key: p for key, p in named(self.truth.plain).items() if key.startswith(root)}
        assert found.keys() <= base.keys()
        for key, value in found.items():
            assert_close(value, due.get(key, base[key].double()), self.truth.dtype)

    def changed_by(self, root: str, mix: Mix) -> set[str]:
        """The weights under a root that a mix changes."""
        adapters = [self.truth.adapters[name] for name in mix if name in self.truth.adapters]
        return {key for a in adapters for key in a.reads() if key.startswith(root)}

    @is_unmerged
    @has_adapters
    @rule(data=st.data(), how=st.sampled_from(sorted(COPIES)))
    def merge_and_unmerge(self, data: Any, how: str) -> None:
        """There and back, of a copy that was made in between."""
        root = self.some_adapted_root(data)
        mix = self.some_mix(data, root) or {self.truth.on(root)[0]: 1.0}
        if self.refused(
            lambda: li.merge(self.at(root), name=mix), must=not self.truth.may_mix(mix, root)
        ):
            return
        before, self.truth.active[root] = self.truth.active[root], mix
        self.computes_the_dense_model()
        self.model = COPIES[how](self.model)
        self.computes_the_dense_model()
        li.unmerge(self.at(root))
        self.truth.active[root] = before

    @is_merged
    @rule(data=st.data(), spoil=st.booleans())
    def unmerge(self, data: Any, spoil: bool) -> None:
        root = data.draw(st.sampled_from(sorted(self.truth.merged)), "root")
        changed = sorted(self.changed_by(root, self.truth.active[root]))
        if spoil and self.undo[root] and changed:  # anybody writes to a merged weight
            with torch.no_grad():
                named(self.model)[changed[0]].flatten()[0].add_(64)
            self.refused(lambda: li.unmerge(self.at(root)), must=True)
            li.unmerge(self.at(root), discard=True)
            self.truth.active[root] = self.truth.merged.pop(root)
            return
        if not self.refused(lambda: li.unmerge(self.at(root)), must=not self.undo[root]):
            self.truth.active[root] = self.truth.merged.pop(root)

    # What anybody does with a model --------------------------------------------------------------

    @rule(how=st.sampled_from(sorted(COPIES)))
    def copies(self, how: str) -> None:
        """Go on with a copy, while the original is ruined."""
        old, self.model = self.model, COPIES[how](self.model)
        with torch.no_grad():
            for parameter in old.parameters():
                parameter.fill_(torch.nan)
        if self.truth.adapters and not self.truth.merged:
            li.eject(li.activate(old, None))

    @is_unmerged
    @rule(dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    def cast(self, dtype: torch.dtype) -> None:
        before = {name: self.truth.adapters[name].tensors() for name in self.truth.adapters}
        self.model.to(dtype)
        self.truth.plain.to(dtype)
        for name, tensors in before.items():
            for key, value in self.parameters(name).items():
                assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
                assert same_bits(value.float(), tensors[key].float())
            self.adopt(name)

    @rule(train=st.booleans())
    def mode(self, train: bool) -> None:
        self.model.train(train)
        self.truth.plain.train(train)

    @rule(data=st.data(), on=st.booleans())
    def hooks(self, data: Any, on: bool) -> None:
        paths = sorted(path for path, _ in self.truth.plain.named_modules())
        path = data.draw(st.sampled_from(paths), "path")
        for model in (self.model, self.truth.plain):
            module = model.get_submodule(path)
            for key in [k for k, hook in module._forward_hooks.items() if hook is add_one]:
                del module._forward_hooks[key]
            if on:
                module.register_forward_hook(add_one)

    @rule(assign=st.booleans())
    def state_dict_round_trip(self, assign: bool) -> None:
        values = {key: value.clone() for key, value in self.model.state_dict().items()}
        if not self.truth.merged:
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.fill_(torch.nan)
        if not self.refused(
            lambda: self.model.load_state_dict(values, assign=assign), must=bool(self.truth.merged)
        ):
            self.load_into_truth(values, assign)
            for name, adapter in self.truth.adapters.items():
                for key, due in adapter.tensors().items():
                    assert_close(self.parameters(name)[key], due, torch.float32)
                self.adopt(name)  # `assign` cuts the ties among copies, as it does with the base's

    @rule(assign=st.booleans())
    def resumed(self, assign: bool) -> None:
        """A file of the state, read into a model with the same adapters and no values of its own.

        That of a merged model would count its adapters twice where they are not merged.
        """
        file = io.BytesIO()
        torch.save(self.model.state_dict(), file)
        file.seek(0)
        held = torch.load(file)
        if self.truth.merged:
            if not all(self.undo[root] for root in self.truth.merged):
                return
            other = copy.deepcopy(self.model)
            for root in self.truth.merged:
                li.unmerge(other.get_submodule(root.removesuffix(".")))
            self.refused(lambda: other.load_state_dict(held), must=True)
            return
        fresh = copy.deepcopy(self.model)
        with torch.no_grad():
            for parameter in fresh.parameters():
                parameter.fill_(torch.nan)
        fresh.load_state_dict(held, assign=assign)
        self.model = fresh
        self.load_into_truth(held, assign)
        for name in self.truth.adapters:
            self.adopt(name)

    @rule(data=st.data(), threads=st.booleans())
    def reads(self, data: Any, threads: bool) -> None:
        """Whoever reads a parameter, in a thread of its own too, gets that of the dense model."""
        due = {**self.truth.base(), **self.truth.weights()}
        name = data.draw(st.sampled_from(sorted(due)), "read")
        owner, _, parameter = name.rpartition(".")

        def read() -> Tensor:
            with torch.no_grad():
                return getattr(self.model.get_submodule(owner), parameter).clone()

        if self.model.training:  # dropout on a layer's input is not seen by who reads its weight
            threads = False
        if not self.refused(read, may=self.model.training):
            (found,) = run_all([read], threads)
            assert_close(found, due[name], self.truth.dtype)

    @rule(seed=st.integers(0, 3), assign=st.booleans())
    def load_another_base(self, seed: int, assign: bool) -> None:
        generator = torch.Generator().manual_seed(seed)
        base: dict[str, Tensor] = {}
        for key, value in self.truth.plain.state_dict().items():
            twin = next((base[n] for n in self.tied(key) if n in base), None)
            new = torch.randn(value.shape, generator=generator).to(value.dtype)
            base[key] = (new if twin is None else twin).clone()
        if not self.refused(
            lambda: self.model.load_state_dict(base, assign=assign), must=bool(self.truth.merged)
        ):
            self.load_into_truth(base, assign)

    def load_into_truth(self, base: dict[str, Tensor], assign: bool) -> None:
        """Load values of its own: with `assign` the model keeps those that it is given."""
        own = {key: base[key].clone() for key in self.truth.plain.state_dict()}
        self.truth.plain.load_state_dict(own, assign=assign)

    @is_unmerged
    @has_adapters
    @rule(fused=st.booleans())
    def optimizer_step(self, fused: bool) -> None:
        if self.truth.dtype == torch.bfloat16 or not any(self.truth.trainable.values()):
            return
        leaves = {id(t): t for a in self.truth.adapters.values() for t in a.tensors().values()}
        for tensor in leaves.values():
            tensor.requires_grad_()
        direction = torch.linspace(-1, 1, self.x.numel(), dtype=torch.float64).view_as(self.x)
        due = (self.truth.run(self.x, self.ids) * direction).sum()
        found = (self.out() * direction.to(self.truth.dtype)).sum()
        if due.requires_grad:
            due.backward()
        if found.requires_grad:
            found.backward()
        groups = li.parameter_groups(self.model, 0.01)
        torch.optim.SGD(groups, 0.01, fused=fused).step()
        for name, adapter in self.truth.adapters.items():
            for key, parameter in self.parameters(name).items():
                tensor = adapter.tensors()[key]
                grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
                step = grad if parameter.requires_grad else torch.zeros_like(tensor)
                has = torch.zeros_like(tensor) if parameter.grad is None else parameter.grad
                assert_close(has, step, self.truth.dtype)
                assert_close(parameter, tensor.detach() - 0.01 * step, self.truth.dtype)
        self.model.zero_grad()
        for name in self.truth.adapters:
            self.adopt(name)

    # What must hold after each rule --------------------------------------------------------------

    @invariant()
    def computes_the_dense_model(self) -> None:
        """Compare outputs; not in 16 bits of weights so large that a softmax flips by rounding."""
        if self.truth.dtype is torch.bfloat16 and self.truth.largest() > LARGEST_IN_16_BITS:
            return
        with torch.no_grad():
            assert_close(self.out(), self.truth.run(self.x, self.ids), self.truth.dtype)

    @invariant()
    def holds_its_base(self) -> None:
        plain, found = named(self.truth.plain), named(self.model)
        assert [key for key in found if key in plain] == list(plain)
        assert [k for k in self.model.state_dict() if k in plain] == list(
            self.truth.plain.state_dict()
        )
        changed = {
            id(found[key])
            for root in self.truth.merged
            for key in self.changed_by(root, self.truth.active[root])
        }
        for key, parameter in plain.items():
            if id(found[key]) not in changed:
                assert same_bits(found[key], parameter), key
            root = next(root for root in self.truth.active if key.startswith(root))
            frozen = bool(self.truth.on(root))
            assert found[key].requires_grad == (parameter.requires_grad and not frozen), key

    @invariant()
    def lists_its_adapters(self) -> None:
        assert sorted(li.adapters(self.model)) == self.truth.on("")
        for name, adapter in self.truth.adapters.items():
            parameters = self.parameters(name)
            assert parameters.keys() == adapter.tensors().keys()
            for key, parameter in parameters.items():
                root = next(root for root in self.truth.active if key.startswith(root))
                trains = name in self.truth.trainable[root] and root not in self.truth.merged
                assert parameter.requires_grad == trains, key

    def teardown(self) -> None:
        if not hasattr(self, "truth"):
            return
        for root in [root for root in self.truth.merged if self.undo[root]]:
            li.unmerge(self.at(root))
            self.truth.active[root] = self.truth.merged.pop(root)
            self.computes_the_dense_model()
        for root in self.truth.merged:
            for key in self.changed_by(root, self.truth.active[root]):
                self.adopt_base(key)
        li.eject(self.model)
        plain, found = named(self.truth.plain), named(self.model)
        assert list(found) == list(plain)
        for key, parameter in plain.items():
            assert same_bits(found[key], parameter), key
            assert found[key].requires_grad == parameter.requires_grad
        for path, module in self.truth.plain.named_modules():
            assert type(self.model.get_submodule(path)) is type(module)


def run_all(functions: list[Callable[[], Tensor]], threads: bool) -> list[Tensor]:
    """Call each, in turn or each in a thread of its own."""
    found: dict[int, Tensor] = {}

    def call(i: int) -> None:
        found[i] = functions[i]()

    if not threads:
        return [function() for function in functions]
    running = [threading.Thread(target=call, args=(i,)) for i in range(len(functions))]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return [found[i] for i in range(len(functions))]


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=N_EXAMPLES,
    stateful_step_count=N_STEPS,
    deadline=None,
    derandomize="LORA_MACHINE_EXAMPLES" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
