"""All verbs in any order on random models, against a dense float64 model that is kept with them.

A verb that is refused must leave everything as it was; only rules that say so may be refused.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import torch
from conftest import COPIES, refusal, same_bits
from helpers.states import give_biases_of_b
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

import lora_inject as li
from contract import trees

# The examples are the same each time, unless a longer search among others is asked for.
N_EXAMPLES = int(os.environ.get("LORA_MACHINE_EXAMPLES", "45"))
N_STEPS = int(os.environ.get("LORA_MACHINE_STEPS", "25"))
ROWS = 3
FURTHER: list[set[str]] = [set(), set(), {"dora"}, {"lora_bias"}, {"lora_bias", "dora"}]
TOKENS = (3, 1)
NAMES = ("a", "b.c", "weight")
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.5}
LARGEST_IN_16_BITS = 16.0
SUMS = ("add", "svd")
COMPUTED = (*SUMS, "scale", "truncate")
Mix = dict[str, float]


@dataclass
class Site:
    """A, B and scale; m with DoRA, b with `lora_bias`, where A and B started with pissa."""

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
        delta = self.of.delta(self.A, self.B)
        if self.start is not None:
            delta = delta - self.of.delta(*self.start)
        return self.scale * delta.reshape(W.shape)


@dataclass
class Adapter:
    """Sites, copies, and the rows that a copy is of, by their names in the whole model."""

    sites: dict[str, Site] = field(default_factory=dict)
    copies: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        roles = [(f"{n}.lora_{r}", getattr(s, r)) for n, s in self.sites.items() for r in "ABm"]
        return {key: value for key, value in roles if value is not None} | self.copies

    def put(self, key: str, value: Tensor) -> None:
        name, _, role = key.rpartition(".lora_")
        if name:
            setattr(self.sites[name], role, value)
        else:
            self.copies[key] = value

    def part(self, keep: Callable[[str], bool]) -> Adapter:
        tables: list[dict[str, Any]] = [self.sites, self.copies, self.rows]
        return Adapter(*({n: v for n, v in table.items() if keep(n)} for table in tables))

    def take(self, other: Adapter) -> None:
        self.sites |= other.sites
        self.copies |= other.copies
        self.rows |= other.rows

    def changes(self, base: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for key, T in self.copies.items():
            rows = torch.tensor(self.rows.get(key, range(len(base[key]))))
            yield key, torch.zeros_like(base[key]).index_copy(0, rows, T - base[key][rows])
        for site in self.sites.values():
            yield site.weight, site.delta(base[site.weight])
            if site.b is not None:
                yield site.bias, site.scale * site.b

    def reads(self) -> dict[str, bool]:
        """The tensors that are not the base's with it, and whether DoRA scales what there is."""
        sites = self.sites.values()
        plain = [*self.copies, *(site.bias for site in sites if site.b is not None)]
        return dict.fromkeys(plain, False) | {site.weight: site.m is not None for site in sites}

    def routes(self) -> bool:
        return not self.copies and all(
            s.of.routed and s.b is None and (s.m is None or s.of.name != "conv")
            for s in self.sites.values()
        )


class Truth:
    """A plain model, adapters as numbers, and what is active where; nothing of the package.

    A weight is `W + sum of weight * (T - W) + sum of weight * scale * B @ A`, and with DoRA that
    with the norms m; a bias is `bias + sum of weight * scale * b`.
    """

    def __init__(self, plain: trees.Tree) -> None:
        self.plain = plain
        self.adapters: dict[str, Adapter] = {}
        self.active: Mix = {}
        self.trainable: set[str] = set()
        self.frozen = False  # since an adapter trains
        self.merged: Mix | None = None  # what was active before

    @property
    def dtype(self) -> torch.dtype:
        return next(self.plain.parameters()).dtype

    def forms(self) -> list[tuple[str, trees.Form]]:
        modules = self.plain.named_modules()
        return [(f"{path}.", m.form) for path, m in modules if isinstance(m, trees.Branch)]

    def sites(self) -> dict[str, trees.SiteOf]:
        return {at + of.name: of for at, form in self.forms() for of in form.sites}

    def copied(self) -> list[str]:
        return [at + name for at, form in self.forms() for name in form.copied]

    def drop(self, name: str) -> None:
        del self.adapters[name]
        self.active.pop(name, None)
        self.trainable.discard(name)
        self.frozen = self.frozen and bool(self.adapters)

    def base(self) -> dict[str, Tensor]:
        """W in float64, by one name in each module."""
        modules = self.plain.named_modules()
        own = ((f"{path}.{key}", p) for path, m in modules for key, p in m._parameters.items())
        return {name: p.detach().double() for name, p in own if p is not None}

    def weights(self, mix: Mix | None = None) -> dict[str, Tensor]:
        """Every weight that is not the base's, under a mix or what is active."""
        base, weights = self.base(), dict[str, Tensor]()
        for name, adapter in self.adapters.items():
            for key, change in adapter.changes(base):
                weights[key] = weights.get(key, base[key]) + self.weight(name, key, mix) * change
        for name, adapter in self.adapters.items():
            for site in adapter.sites.values():  # with a gain they are alone at their weight
                if site.m is not None and self.weight(name, site.weight, mix):
                    weights[site.weight] = site.of.gained(weights[site.weight], site.m)
        return weights

    def may_mix(self, mix: Mix) -> bool:
        """Whether each weight that DoRA scales has one adapter, with weight 1."""
        taking: dict[str, list[tuple[float, bool]]] = {}
        for name in mix.keys() & self.adapters.keys():
            for key, is_gained in self.adapters[name].reads().items():
                taking.setdefault(key, []).append((mix[name], is_gained))
        scaled = [each for each in taking.values() if any(is_gained for _, is_gained in each)]
        return all(len(each) == 1 and each[0][0] == 1.0 for each in scaled)

    def weight(self, adapter: str, key: str, mix: Mix | None) -> float:
        return (self.active if mix is None else mix).get(adapter, 0.0)

    def changed_by(self, mix: Mix) -> set[str]:
        return {key for name in mix for key in self.adapters[name].reads()}

    def run(self, x: Tensor, ids: Tensor, mix: Mix | None = None) -> Tensor:
        tensors, inputs = {**self.base(), **self.weights(mix)}, (x.double(), ids)
        return torch.func.functional_call(self.plain, tensors, inputs, tie_weights=False)

    def load(self, base: dict[str, Tensor], assign: bool) -> None:
        """Load values of its own: with `assign` the model keeps those that it is given."""
        own = {key: base[key].clone() for key in self.plain.state_dict()}
        self.plain.load_state_dict(own, assign=assign)


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters by all their names, as everybody but a forward reads them."""
    return dict(model.named_parameters(remove_duplicate=False))


def allowed(further: set[str], of: trees.SiteOf) -> dict[str, Any]:
    if "lora_bias" in further and of.bias:
        return {}
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
    return must, how == "svd" and bool(gained or biased)


def computed_value(how: str, values: list[Any], factor: float) -> Any:
    if how == "scale":
        return li.combine(values[:1], [factor])
    if how == "add":
        return li.combine([values[0], values[-1]])
    if how == "truncate":
        return li.truncate(values[0], energy=1.0).state
    return li.combine(values, method="svd", rank=20)


def exactly(name: str) -> str:
    return f"^{re.escape(name)}$"


def assert_close(actual: Tensor, due: Tensor, dtype: torch.dtype) -> None:
    error = (actual.detach().double() - due.detach()).abs().max()
    error = error / due.detach().abs().max().clamp(1)
    assert error < TOLERANCE[dtype], f"off by {error:.1e}"


def add_one(module: nn.Module, args: Any, output: Any) -> Any:
    return (output[0] + 1, *output[1:]) if isinstance(output, tuple) else output + 1


forms = st.sampled_from(sorted(trees.FORMS))
has_adapters = precondition(lambda self: self.truth.adapters)
is_merged = precondition(lambda self: self.truth.merged is not None)
is_unmerged = precondition(lambda self: self.truth.merged is None)


class Machine(RuleBasedStateMachine):
    """The verbs, each as a rule that does the same to the model and to the truth."""

    @initialize(
        left=st.lists(forms, min_size=1, max_size=3),
        right=st.lists(forms, min_size=1, max_size=2),
        tie=st.sampled_from(sorted(trees.TIES)),
        dtype=st.sampled_from([torch.float64, torch.float32]),
        data=st.data(),
    )
    def start(self, left: Any, right: Any, tie: str, dtype: Any, data: Any) -> None:
        torch.manual_seed(0)
        model: Any = trees.Tree(left, right).to(dtype).eval()
        trees.TIES[tie](model)
        for parameter in list(model.parameters())[::3]:
            parameter.requires_grad_(False)
        self.model = model
        self.truth = Truth(copy.deepcopy(model))
        self.x = torch.randn(ROWS, trees.LENGTH, trees.WIDTH, dtype=torch.float64)
        self.ids = torch.randint(0, trees.VOCABULARY, (ROWS, trees.LENGTH))
        self.undo, self.untied = True, False  # of what is merged
        for rank in (2, 1):
            further = data.draw(st.sampled_from(FURTHER), "further")
            self.inject(data, rank, 3.0, "kaiming", further, True)
        if self.truth.adapters:  # of the rules, hypothesis chooses this one seldom
            self.compute_a_value(data, data.draw(st.sampled_from(COMPUTED), "first"))

    def out(self) -> Tensor:
        return self.model(self.x.to(self.truth.dtype), self.ids)

    def close(self, actual: Tensor, due: Tensor) -> None:
        assert_close(actual, due, self.truth.dtype)

    def refused(self, run: Callable[[], Any], *, must: bool = False, may: bool = False) -> bool:
        """Call a verb, and return whether it was refused, which it must be, may be, or neither."""
        raised = refusal(run, li.LoraInjectError)
        assert raised is None or must or may, raised
        assert raised is not None or not must, "it was not refused"
        return raised is not None

    def some_adapter(self, data: Any) -> str:
        return data.draw(st.sampled_from(sorted(self.truth.adapters)), "name")

    def some_free_name(self, data: Any, name: str) -> str:
        """A name that no adapter has, or that of one which is to be ejected."""
        return data.draw(
            st.sampled_from(sorted({name, *NAMES} - self.truth.adapters.keys() | {name}))
        )

    def some_mix(self, data: Any) -> Mix:
        weights, names = st.sampled_from([1.0, 0.5, -1.0]), sorted(self.truth.adapters)
        return data.draw(st.dictionaries(st.sampled_from(names), weights), "mix")

    def tied(self, name: str) -> list[str]:
        """Every name of the memory of a base tensor."""
        tensors = named(self.model)
        return [n for n, t in tensors.items() if t.data_ptr() == tensors[name].data_ptr()]

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """An adapter's Parameters; a copy of a tied tensor by each name that the tensor had."""
        listed, base = li.adapter_parameters(self.model, name), self.truth.base()
        known = self.truth.adapters[name].copies if name in self.truth.adapters else {}
        further = {
            same: listed[key]
            for key in listed.keys() & base.keys()
            for same in (*self.tied(key), *(n for n in known if known[n] is known.get(key)))
            if same in base
        }
        return {**further, **listed}

    def adopt(self, name: str) -> None:
        """Take over the values of an adapter; a copy under several names is one tensor."""
        made: dict[int, Tensor] = {}
        for key, parameter in self.parameters(name).items():
            value = made.setdefault(id(parameter), parameter.detach().double().clone())
            self.truth.adapters[name].put(key, value)
        if self.truth.merged is None:
            for key, site in li.adapter_state(self.model, name).sites.items():
                if site.A0 is not None and site.B0 is not None:
                    start = (site.A0.double().clone(), site.B0.double().clone())
                    self.truth.adapters[name].sites[key].start = start
                if "b" in site.further:
                    b = site.further["b"].double().clone()
                    self.truth.adapters[name].sites[key].b = b

    def adopt_base(self, name: str) -> None:
        """Take over a weight of the base that a verb has changed for good."""
        path, _, key = name.rpartition(".")
        plain, value = self.truth.plain.get_submodule(path), named(self.model)[name].detach()
        flag = plain._parameters[key].requires_grad  # type: ignore[union-attr]
        plain._parameters[key] = nn.Parameter(value.clone(), flag)

    @torch.no_grad()
    def fill(self, name: str, data: Any) -> None:
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 3), "seed"))
        for parameter in self.parameters(name).values():
            parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator))
        self.adopt(name)

    @staticmethod
    @torch.no_grad()
    def ruin(model: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.fill_(torch.nan)

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
        truth = self.truth
        name, sites = data.draw(st.sampled_from(NAMES), "name"), truth.sites()
        weights = {n: n.removesuffix(of.name) + of.weight for n, of in sites.items()}
        places = sorted([*sites, *truth.copied()])
        chosen = data.draw(st.sets(st.sampled_from(places), min_size=1)) if places else set()
        adapted = {n: sites[n] for n in chosen if n in sites}
        taken = {weights[n] for n in adapted}
        train = {n for n in chosen if n not in sites and not taken.intersection(self.tied(n))}
        tables = {n for n in train if rows and n.endswith("emb.weight")}
        if not taken and not train:
            return

        rules = [{"match": exactly(n), **o.rule, **allowed(further, o)} for n, o in adapted.items()]
        config = {
            "rank": rank,
            "alpha": alpha,
            "init": init,
            "targets": rules,
            "train": [exactly(n) for n in train - tables],
            "tokens": {exactly(n): TOKENS for n in tables},
        }
        biased = [n for n, of in adapted.items() if "lora_bias" in further and of.bias]
        twice = any(n.removesuffix(sites[n].name) + sites[n].bias in train for n in biased)
        in_use = name in truth.adapters or truth.merged is not None
        li.plan(self.model, config)
        if self.refused(lambda: li.inject(self.model, config, name), must=in_use):
            return
        truth.active = {}
        if truth.dtype != torch.bfloat16:
            self.close(self.out(), truth.run(self.x, self.ids))
        truth.active, truth.trainable, truth.frozen = {name: 1.0}, {name}, True
        adapter = truth.adapters.setdefault(name, Adapter())
        adapter.sites |= {n: Site(of, weights[n], alpha / rank) for n, of in adapted.items()}
        adapter.rows |= {same: TOKENS for n in tables for same in self.tied(n)}
        if biased and not twice:  # as PEFT's files may have them
            give_biases_of_b(self.model, name, biased)
        self.fill(name, data)

    @has_adapters
    @rule(data=st.data(), all_of_it=st.booleans())
    def eject(self, data: Any, all_of_it: bool) -> None:
        name = None if all_of_it else self.some_adapter(data)
        weights, is_merged = self.truth.weights(), self.truth.merged is not None
        must, may = is_merged and not all_of_it, is_merged and self.untied
        if self.refused(lambda: li.eject(self.model, name), must=must, may=may):
            return
        if is_merged:  # leaves the merged weights
            self.truth.merged = None
            for key in weights:
                self.adopt_base(key)
        for gone in [name] if name is not None else [*self.truth.adapters]:
            self.truth.drop(gone)

    @has_adapters
    @rule(
        data=st.data(),
        how=st.sampled_from(["peft", "native"]),
        leave=st.sampled_from([False, False, True]),
    )
    def leave_and_return(self, data: Any, how: str, leave: bool) -> None:
        """Save, eject, and load under another name, all of it or without one site or copy."""
        name, model = self.some_adapter(data), self.model
        new, due = self.some_free_name(data, name), self.parameters(name)
        moved = copy.deepcopy(self.truth.adapters[name])
        parts = sorted([*moved.sites, *moved.copies]) if leave else []
        gone = {data.draw(st.sampled_from(parts), "gone")} if len(parts) > 1 else set[str]()
        # A pattern of a module lets go of what trains inside it, too.
        gone |= {key for key in moved.copies for site in gone if key.startswith(f"{site}.")}
        gone.update(*(self.tied(key) for key in gone & moved.copies.keys()))
        # Files have a module that stands in two places under its first name.
        first = {f"{p}.{key}" for p, m in self.model.named_modules() for key in m._parameters}
        out = [exactly(key) for key in gone & {*moved.sites, *first}]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "a.safetensors"

            def save() -> None:
                li.save_adapter(model, path, name, format=how)

            def load() -> None:
                li.load_adapter(model, path, new, leave_out=out)

            if self.refused(save, must=self.truth.merged is not None, may=how == "peft"):
                return
            moved = moved.part(lambda key: key not in gone)
            if self.replaced(name, new, moved, load):
                for key in moved.tensors():
                    assert same_bits(self.parameters(new)[key], due[key])

    def replaced(self, name: str, new: str, adapter: Adapter, load: Callable[[], Any]) -> bool:
        """Eject an adapter and load another; whether it was, and not refused."""
        li.eject(self.model, name)
        self.truth.drop(name)
        load()
        self.truth.adapters[new] = adapter
        self.truth.active = self.truth.active or {new: 1.0}
        return True

    @is_unmerged
    @has_adapters
    @rule(data=st.data(), first=st.sampled_from(COMPUTED))
    def compute_a_value(self, data: Any, first: str) -> None:
        """Compute with adapters as values, and put the result in the place of one."""
        any(self.computed(data, how) for how in (first, *COMPUTED))

    def computed(self, data: Any, how: str) -> bool:
        truth, model, made = self.truth, self.model, list[Any]()
        name, other = self.some_adapter(data), self.some_adapter(data)
        factor, new = data.draw(st.sampled_from([0.5, -1.0])), self.some_free_name(data, name)
        names = [name, other] if how in SUMS else [name]
        parts = [copy.deepcopy(truth.adapters[n]) for n in names]
        values = [copy.deepcopy(li.adapter_state(model, n)) for n in names]
        if sum(site.spec.rank for value in values for site in value.sites.values()) > 20:
            return False

        def compute() -> None:
            made.append(computed_value(how, values, factor))

        must, may = refused_value(how, parts)
        if self.refused(compute, must=must, may=may):
            return False
        weights = {name: factor if how == "scale" else 1.0}
        due = truth.weights(dict.fromkeys(names, 1.0 + (name == other)) if how in SUMS else weights)
        result = Adapter()
        for part in parts:
            result.take(part)
        for key, site in result.sites.items():
            scale = made[0].sites[key].scale
            result.sites[key] = Site(site.of, site.weight, scale)
        if self.replaced(name, new, result, lambda: li.install(model, made[0], new)):
            self.adopt(new)
            actual, base = truth.weights({new: 1.0}), named(truth.plain)
            dtype = torch.float64 if truth.dtype == torch.float64 else torch.float32
            for key in {**actual, **due}:
                W = base[key].double()
                assert_close(actual.get(key, W), due.get(key, W), dtype)
        return True

    @has_adapters
    @rule(data=st.data())
    def swap(self, data: Any) -> None:
        name, model = self.some_adapter(data), self.model
        if self.truth.merged is not None:
            assert self.refused(lambda: li.adapter_state(model, name), must=True)
            return
        state = copy.deepcopy(li.adapter_state(model, name))
        for site in state.sites.values():
            for role in set(site.tensors) - {"A0", "B0"}:
                site.tensors[role].mul_(-0.5)
        li.swap_adapter(model, state, name)
        before = self.truth.adapters[name].tensors()
        for key, value in self.parameters(name).items():
            due = before[key] * (-0.5 if ".lora_" in key else 1)
            assert_close(value, due, torch.float32)
        self.adopt(name)

    @has_adapters
    @rule(data=st.data())
    def activate(self, data: Any) -> None:
        mix = self.some_mix(data)
        must = self.truth.merged is not None or not self.truth.may_mix(mix)
        if not self.refused(lambda: li.activate(self.model, mix), must=must):
            self.truth.active = dict(mix)

    @has_adapters
    @rule(data=st.data())
    def train_only(self, data: Any) -> None:
        names = data.draw(st.sets(st.sampled_from(sorted(self.truth.adapters))), "names")
        must = self.truth.merged is not None
        if not self.refused(lambda: li.train_only(self.model, names), must=must):
            self.truth.trainable, self.truth.frozen = names, True

    @has_adapters
    @rule(data=st.data())
    def contexts(self, data: Any) -> None:
        """`disabled` and `routed` hold for their own thread, while others run."""
        there, truth = sorted(self.truth.adapters), self.truth
        able = [name for name in there if truth.adapters[name].routes()]
        names = st.sampled_from([None, *data.draw(st.sampled_from([able, able, there]))])
        rows = data.draw(st.lists(names, min_size=ROWS, max_size=ROWS), "rows")
        if truth.merged is not None or not {*rows} <= {None, *able}:
            enter = li.routed(self.model, rows).__enter__
            assert self.refused(enter, may=True) or truth.merged is None
            return
        together = threading.Barrier(3)

        def run_in(context: Any) -> Tensor:
            with context, torch.no_grad():
                together.wait(60)
                y = self.out()
                together.wait(60)
                return y

        contexts = [contextlib.nullcontext(), li.disabled(self.model), li.routed(self.model, rows)]
        each: list[Mix] = [{} if name is None else {name: 1.0} for name in rows]
        dues = [
            truth.run(self.x, self.ids),
            truth.run(self.x, self.ids, {}),
            torch.cat([truth.run(self.x[[i]], self.ids[[i]], mix) for i, mix in enumerate(each)]),
        ]
        with ThreadPoolExecutor(3) as pool:
            for actual, due in zip(pool.map(run_in, contexts), dues, strict=True):
                self.close(actual, due)

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
        with li.disabled(model), torch.no_grad():
            self.refused(verbs[verb], must=True)
            self.close(self.out(), self.truth.run(self.x, self.ids, {}))

    @has_adapters
    @rule()
    def looks(self) -> None:
        """What only looks at a model: every active site takes part, and the base is the base."""
        must = self.truth.merged is not None or not self.truth.active
        missed: list[str] = []
        if not self.refused(lambda: missed.extend(li.unreached(self.model, self.out)), must=must):
            assert not missed
        assert all(repr(name)[1:-1] in li.summary(self.model) for name in self.truth.adapters)
        if self.truth.merged is None:
            with torch.no_grad():
                base = li.reference(self.model)(self.x.to(self.truth.dtype), self.ids)
            self.close(base, self.truth.run(self.x, self.ids, {}))

    @has_adapters
    @rule(
        data=st.data(),
        how=st.sampled_from([{}, {}, {"undo": False}, {"eject": True}]),
        named_mix=st.booleans(),
    )
    def merge(self, data: Any, how: dict[str, bool], named_mix: bool) -> None:
        truth, eject = self.truth, how.get("eject", False)
        mix = self.some_mix(data) if named_mix else None
        folded = truth.active if mix is None else mix
        weights = truth.changed_by(folded)
        is_tied = any(len(self.tied(key)) > 1 for key in weights)
        must = truth.merged is not None or not folded or not truth.may_mix(folded)

        def merge() -> None:
            li.merge(self.model, name=mix, **how)

        if self.refused(merge, must=must, may=eject and is_tied):
            return
        truth.merged, truth.active = truth.active, dict(folded)
        self.undo, self.untied = how.get("undo", True), is_tied
        if eject:
            self.computes_the_dense_model()
            truth.merged = None
            for key in weights:
                self.adopt_base(key)
            for name in [*truth.adapters]:
                truth.drop(name)

    @is_unmerged
    @has_adapters
    @rule()
    def merged_weights(self) -> None:
        if self.truth.active:
            due = {**named(self.truth.plain), **self.truth.weights()}
            for key, value in li.merged_weights(self.model):
                self.close(value, due[key].double())

    @is_unmerged
    @has_adapters
    @rule(data=st.data(), how=st.sampled_from(sorted(COPIES)))
    def merge_and_unmerge(self, data: Any, how: str) -> None:
        mix = self.some_mix(data) or {self.some_adapter(data): 1.0}
        must = not self.truth.may_mix(mix)
        if self.refused(lambda: li.merge(self.model, name=mix), must=must):
            return
        before, self.truth.active = self.truth.active, mix
        self.computes_the_dense_model()
        self.model = COPIES[how](self.model)
        self.computes_the_dense_model()
        li.unmerge(self.model)
        self.truth.active = before

    @is_merged
    @rule(spoil=st.booleans())
    def unmerge(self, spoil: bool) -> None:
        changed = sorted(self.truth.changed_by(self.truth.active))
        if spoil and self.undo and changed:  # anybody writes to a merged weight
            with torch.no_grad():
                named(self.model)[changed[0]].flatten()[0].add_(64)
            self.refused(lambda: li.unmerge(self.model), must=True)
            li.unmerge(self.model, discard=True)
        elif self.refused(lambda: li.unmerge(self.model), must=not self.undo):
            return
        assert self.truth.merged is not None
        self.truth.active, self.truth.merged = self.truth.merged, None

    @rule(how=st.sampled_from(sorted(COPIES)))
    def copies(self, how: str) -> None:
        """Go on with a copy, while the original is ruined."""
        old, self.model = self.model, COPIES[how](self.model)
        self.ruin(old)
        if self.truth.adapters and self.truth.merged is None:
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
        """A file of the state, read into the model, and into another with the same adapters.

        Neither has any values by then. A merged one's would count its adapters twice.
        """
        file = io.BytesIO()
        torch.save(self.model.state_dict(), file)
        file.seek(0)
        held, other = torch.load(file), copy.deepcopy(self.model)
        if self.truth.merged is not None:
            self.refused(lambda: self.model.load_state_dict(held, assign=assign), must=True)
            if self.undo:
                li.unmerge(other)
                self.refused(lambda: other.load_state_dict(held, assign=assign), must=True)
            return
        for model in (self.model, other):
            self.ruin(model)
            model.load_state_dict(held, assign=assign)
            self.model = model
            self.truth.load(held, assign)
            for name, adapter in self.truth.adapters.items():
                for key, due in adapter.tensors().items():
                    assert_close(self.parameters(name)[key], due, torch.float32)
                self.adopt(name)  # `assign` cuts the ties among copies, as it does with the base's
            self.computes_the_dense_model()

    @rule(data=st.data())
    def reads(self, data: Any) -> None:
        """Whoever reads a parameter, in a thread of its own too, gets that of the dense model."""
        due = {**self.truth.base(), **self.truth.weights()}
        name = data.draw(st.sampled_from(sorted(due)), "read")
        owner, _, parameter = name.rpartition(".")

        @torch.no_grad()
        def read() -> Tensor:
            return getattr(self.model.get_submodule(owner), parameter).clone()

        # Dropout on a layer's input is not seen by who reads.
        if not self.refused(read, may=self.model.training):
            with ThreadPoolExecutor(1) as pool:
                self.close(pool.submit(read).result(), due[name])

    @rule(seed=st.integers(0, 3), assign=st.booleans())
    def load_another_base(self, seed: int, assign: bool) -> None:
        generator = torch.Generator().manual_seed(seed)
        base: dict[str, Tensor] = {}
        for key, value in self.truth.plain.state_dict().items():
            twin = next((base[n] for n in self.tied(key) if n in base), None)
            new = torch.randn(value.shape, generator=generator).to(value.dtype)
            base[key] = (new if twin is None else twin).clone()
        if self.truth.merged is not None:  # torch has written the modules before a refused one
            other = copy.deepcopy(self.model)
            self.refused(lambda: other.load_state_dict(base, assign=assign), must=True)
            return
        self.model.load_state_dict(base, assign=assign)
        self.truth.load(base, assign)

    @is_unmerged
    @has_adapters
    @rule(fused=st.booleans())
    def optimizer_step(self, fused: bool) -> None:
        if self.truth.dtype == torch.bfloat16 or not self.truth.trainable:
            return
        for adapter in self.truth.adapters.values():
            for tensor in adapter.tensors().values():
                tensor.requires_grad_()
        direction = torch.linspace(-1, 1, self.x.numel(), dtype=torch.float64).view_as(self.x)
        due = (self.truth.run(self.x, self.ids) * direction).sum()
        actual = (self.out() * direction.to(self.truth.dtype)).sum()
        for total in (due, actual):
            if total.requires_grad:
                total.backward()
        groups = li.parameter_groups(self.model, 0.01)
        torch.optim.SGD(groups, 0.01, fused=fused).step()
        for name, adapter in self.truth.adapters.items():
            for key, parameter in self.parameters(name).items():
                tensor = adapter.tensors()[key]
                grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
                step = grad if parameter.requires_grad else torch.zeros_like(tensor)
                self.close(torch.zeros(1) if parameter.grad is None else parameter.grad, step)
                self.close(parameter, tensor.detach() - 0.01 * step)
        self.model.zero_grad()
        for name in self.truth.adapters:
            self.adopt(name)

    @invariant()
    def computes_the_dense_model(self) -> None:
        """Compare outputs; not in 16 bits of weights so large that a softmax flips by rounding."""
        weights = self.truth.weights().values()
        largest = max((float(w.detach().abs().max()) for w in weights), default=0.0)
        if self.truth.dtype is not torch.bfloat16 or largest <= LARGEST_IN_16_BITS:
            with torch.no_grad():
                self.close(self.out(), self.truth.run(self.x, self.ids))

    @invariant()
    def holds_its_base(self) -> None:
        truth, plain, held = self.truth, named(self.truth.plain), named(self.model)
        assert [key for key in held if key in plain] == list(plain)
        keys = list(truth.plain.state_dict())
        assert [key for key in self.model.state_dict() if key in plain] == keys
        merged = set[str]() if truth.merged is None else truth.changed_by(truth.active)
        changed = {id(held[key]) for key in merged}
        for key, parameter in plain.items():
            assert id(held[key]) in changed or same_bits(held[key], parameter), key
            due = parameter.requires_grad and not truth.frozen
            assert held[key].requires_grad == due, key

    @invariant()
    def lists_its_adapters(self) -> None:
        assert li.adapters(self.model).keys() == self.truth.adapters.keys()
        for name, adapter in self.truth.adapters.items():
            parameters = self.parameters(name)
            assert parameters.keys() == adapter.tensors().keys()
            for key, parameter in parameters.items():
                trains = name in self.truth.trainable and self.truth.merged is None
                assert parameter.requires_grad == trains, key

    def teardown(self) -> None:
        if not hasattr(self, "truth"):
            return
        truth = self.truth
        if truth.merged is not None and self.undo:
            li.unmerge(self.model)
            truth.active, truth.merged = truth.merged, None
            self.computes_the_dense_model()
        for key in () if truth.merged is None else truth.changed_by(truth.active):
            self.adopt_base(key)
        may = truth.merged is not None and self.untied
        if self.refused(lambda: li.eject(self.model), may=may):
            return
        truth.adapters, truth.merged, truth.frozen = {}, None, False
        self.holds_its_base()
        assert list(named(self.model)) == list(named(truth.plain))
        for path, module in truth.plain.named_modules():
            assert type(self.model.get_submodule(path)) is type(module)


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=N_EXAMPLES,
    stateful_step_count=N_STEPS,
    deadline=None,
    derandomize="LORA_MACHINE_EXAMPLES" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
