"""Inference with adapters: decode, switch, hot-swap, routed."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.measure import (
    AGAIN,
    BARE,
    Options,
    Result,
    interleave,
    many,
    paired,
    some_ids,
)
from benchmarks.models import (
    ALPHA,
    LLAMA,
    RANK,
    Stack,
    llama,
    quiet,
    randomise,
    with_bare,
    with_loralib,
    with_peft,
)
from lora_inject import (
    AdapterState,
    activate,
    adapter_parameters,
    adapter_state,
    disabled,
    eject,
    inject,
    merge,
    reserve,
    routed,
    swap_adapter,
)
from lora_inject.formats.exchange import write_adapter

OURS, OFF = "lora_inject", "lora_inject, disabled()"
# Targets, over the bare operations: what finding out which adapters take part may cost.
DECODE, ROUTED = 1.1, 1.3


# ------------------------------------------------------------------------------------- decode


def decode(options: Options) -> Result:
    """Time one token through a stack of linear layers: what an adapter adds to each of them."""
    result = Result()
    sizes = [(64, torch.float32, 100), (768, torch.float32, 5), (768, torch.bfloat16, 5)]
    if options.quick:
        sizes = [(64, torch.float32, 20)]
    else:
        sizes.append((2048, torch.bfloat16, 1))
    for width, dtype, calls in sizes:
        _decode(result, options, width, dtype, calls)
    return result


def _decode(
    result: Result, options: Options, width: int, dtype: torch.dtype, calls: int, depth: int = 24
) -> None:
    torch.manual_seed(0)
    plain = Stack(depth, width, dtype)
    x = torch.randn(1, 1, width, dtype=dtype)
    config = {"rank": RANK, "alpha": ALPHA, "targets": [r"layers\.\d+"]}

    def adapted() -> nn.Module:
        model = inject(copy.deepcopy(plain), config)
        randomise(adapter_parameters(model).values())
        return model

    after_eject = adapted()
    merge(after_eject, undo=False)
    eject(after_eject)
    off = adapted()
    activate(off, None)
    merged = adapted()
    merge(merged)
    peft = with_peft(copy.deepcopy(plain), target_modules=r"layers\.\d+", fan_in_fan_out=False)
    made = {
        "nn.Linear": plain,
        AGAIN: copy.deepcopy(plain),
        OURS: adapted(),
        "lora_inject, merged": merged,
        "lora_inject, merged and ejected": after_eject,
        "lora_inject, no adapter active": off,
        "PEFT": peft,
        BARE: with_bare(copy.deepcopy(plain), r"layers\.\d+"),
        "loralib": with_loralib(copy.deepcopy(plain), lambda name: name.startswith("layers.")),
    }

    def token(model: Any) -> Callable[[], None]:
        model.eval()

        def run() -> None:
            with torch.inference_mode():
                for _ in range(calls):
                    model(x)

        return run

    times = interleave({n: token(m) for n, m in made.items()}, options.n_rounds(25))
    case = f"{depth} layers of width {width}, {str(dtype).removeprefix('torch.')}"
    each = 1e6 / (calls * depth)
    result.add(case, "nn.Linear", "us a layer", [each * t for t in times["nn.Linear"]])
    for name in list(times)[1:]:
        over = [each * (t - f) for t, f in zip(times[name], times["nn.Linear"], strict=True)]
        result.add(case, name, "us a layer over nn.Linear", over)
    result.over_bare(case, times, {OURS: None if options.quick else DECODE})
    same = all(type(layer) is nn.Linear for layer in after_eject.layers)  # type: ignore[union-attr]
    result.add(
        case, "lora_inject, merged and ejected", "layers not nn.Linear", float(not same), 0.0
    )


# --------------------------------------------------------------------------- switch, hot swap


class _Tree(nn.Module):
    """Seven projections in each layer, as a Llama has; 80 layers have 560."""

    def __init__(self, n_layers: int, width: int) -> None:
        super().__init__()
        names = ("q", "k", "v", "o", "gate", "up", "down")
        self.layers = nn.ModuleList(
            nn.ModuleDict({f"{n}_proj": nn.Linear(width, width, bias=False) for n in names})
            for _ in range(n_layers)
        )


def switch(options: Options) -> Result:
    """Time a change of adapter, at 560 sites and at ten times as many."""
    result = Result()
    few, many_more = (8, 16) if options.quick else (80, 800)
    trees = {n: _Tree(n, 32) for n in (few, many_more)}
    runs: dict[str, Callable[[], Any]] = {}
    for n, tree in trees.items():
        for name in ("one", "two"):
            inject(tree, {"rank": 4, "targets": [r".*_proj"]}, name)
        runs[f"{OURS} {n}"] = many(_turns(lambda name, tree=tree: activate(tree, name)), 100)
        runs[f"{OFF} {n}"] = many(lambda tree=tree: _off(tree), 100)
    peft = with_peft(_Tree(few, 32), 4, target_modules=r".*_proj", fan_in_fan_out=False)
    with quiet():
        peft.add_adapter("two", peft.peft_config["default"])
    runs["PEFT"] = many(_turns(peft.set_adapter, ("default", "two")), 5)
    times = interleave(runs, options.n_rounds(9))
    for n in trees:
        for name in (OURS, OFF):
            result.add(f"{7 * n} sites", name, "ms", [10 * t for t in times[f"{name} {n}"]])
    each = {"PEFT": [t / 5 for t in times["PEFT"]]}
    each |= {n: [t / 100 for t in times[f"{OURS} {n}"]] for n in trees}
    case, goal = f"{7 * few} sites", None if options.quick else 0.01
    result.add(case, "PEFT", "ms", [1e3 * t for t in each["PEFT"]])
    result.add(case, OURS, "time / PEFT", paired(each[few], each["PEFT"]), goal)
    flat = paired(each[many_more], each[few])
    result.add(f"{7 * many_more} sites", OURS, f"time / {case}", flat, goal and 1.5)
    return result


def _off(tree: nn.Module) -> None:
    with disabled(tree):
        pass


def _turns(
    use: Callable[[str], Any], names: tuple[str, str] = ("one", "two")
) -> Callable[[], None]:
    """Return a function that uses the one name and the other, in turn."""
    turn = [0]

    def run() -> None:
        turn[0] += 1
        use(names[turn[0] % 2])

    return run


IN_SLOT = "lora_inject, into a slot of twice the rank"


def hot_swap(options: Options) -> Result:
    """Time new values into an adapter that is on the model, in place."""
    result = Result()
    n_layers, width = (8, 32) if options.quick else (80, 768)
    case = f"{7 * n_layers} sites"
    config = {"rank": 4, "targets": [r".*_proj"]}
    tree = inject(inject(_Tree(n_layers, width), config, "slot"), config, "next")
    slot = list(adapter_parameters(tree, "slot").values())
    randomise([*slot, *adapter_parameters(tree, "next").values()])
    following = _apart(adapter_state(tree, "next"))
    eject(tree, "next")
    new = [t for site in following.sites.values() for t in (site.A, site.B)]
    held = {key: value for key, value in tree.state_dict().items() if "lora_" in key}
    drawn = {key: torch.randn_like(value) for key, value in held.items() if "__slot" in key}
    state = held | drawn  # what the tensors mean is taken as it is
    room = reserve(_Tree(n_layers, width), "slot", rank=8, targets=[r".*_proj"])
    with torch.no_grad():
        for plain, same in zip(room.modules(), tree.modules(), strict=True):
            if isinstance(plain, nn.Linear):
                plain.get_parameter("weight").copy_(same.get_parameter("weight"))
    size = sum(t.numel() * t.element_size() for t in new) / 2**20
    result.add(case, OURS, "MiB of adapter", size)

    def values() -> None:
        with torch.no_grad():
            torch._foreach_copy_(list(adapter_parameters(tree, "slot").values()), new)

    with tempfile.TemporaryDirectory() as folder:
        path = write_adapter(following, Path(folder) / "next")
        runs = {
            "memcpy of the values": lambda: torch._foreach_copy_([p.data for p in slot], new),
            OURS: lambda: swap_adapter(tree, following, "slot"),
            'lora_inject, base="any"': lambda: swap_adapter(tree, following, "slot", base="any"),
            "lora_inject, from files": lambda: swap_adapter(tree, path, "slot"),
            IN_SLOT: lambda: swap_adapter(room, following, "slot"),
            "adapter_parameters, then copied": values,
            "load_state_dict": lambda: tree.load_state_dict(state, strict=False),
        }
        times = interleave(runs, options.n_rounds(9))
    for name in runs:
        result.add(case, name, "ms", [1e3 * t for t in times[name]])
    for name, bound in ((OURS, 1.0), (IN_SLOT, 1.3)):
        ratio = paired(times[name], times["load_state_dict"])
        result.add(case, name, "time / load_state_dict", ratio, None if options.quick else bound)
    moved = sum(p is not q for p, q in zip(slot, adapter_parameters(tree).values(), strict=True))
    result.add(case, OURS, "Parameters replaced", float(moved), 0.0)
    result.notes.append(
        "`swap_adapter` checks sites, ranks, scales, values and the base's fingerprint first; "
        "`load_state_dict` checks shapes, copying into what `adapter_parameters` returns as well."
    )
    return result


def _apart(state: AdapterState) -> AdapterState:
    """Return an adapter in memory of its own."""
    sites = {n: replace(s, A=s.A.clone(), B=s.B.clone()) for n, s in state.sites.items()}
    return replace(state, sites=sites)


# ------------------------------------------------------------------------------------- routed


def routed_batch(options: Options) -> Result:
    """Time a batch in which every row has its own adapter."""
    result = Result()
    sizes: dict[str, int] = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6}
    sizes |= {"num_attention_heads": 8, "vocab_size": 4096}
    if options.quick:
        sizes |= {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2}
    counts = (2, 8) if options.quick else (2, 8, 32)
    base = llama(**sizes).eval()
    ours = {n: _many(copy.deepcopy(base), [RANK] * n) for n in counts}
    unequal = _many(copy.deepcopy(base), [2, 4, 8, 8, 16, 4, 2, 16])
    peft = {n: _many_peft(copy.deepcopy(base), n) for n in counts[:2]}
    bare = with_bare(copy.deepcopy(base), rows=16)
    for length, label, calls in ((1, "decode", 10), (64, "length 64", 1)):
        ids = some_ids(16, length)
        again = copy.deepcopy(base)
        runs: dict[str, Callable[[], Any]] = {
            "no adapter": lambda ids=ids: base(ids, use_cache=False),
            AGAIN: lambda ids=ids, again=again: again(ids, use_cache=False),
            BARE: lambda ids=ids: bare(ids, use_cache=False),
        }
        contexts = {}
        for n, model in ours.items():
            name = f"lora_inject, {n} adapters"
            runs[name] = lambda ids=ids, model=model: model(ids, use_cache=False)
            contexts[name] = _routing(model, n)
        runs["lora_inject, 8 of unequal rank"] = lambda ids=ids: unequal(ids, use_cache=False)
        contexts["lora_inject, 8 of unequal rank"] = _routing(unequal, 8)
        activate(ours[2], "a0")
        runs["lora_inject, one for all rows"] = lambda ids=ids: ours[2](ids, use_cache=False)
        for n, model in peft.items():
            names = [f"a{i % n}" for i in range(16)]
            runs[f"PEFT, {n} adapters"] = lambda ids=ids, model=model, names=names: model(
                input_ids=ids, use_cache=False, adapter_names=names
            )
        loops = {
            name: _inference(run, calls, contexts.get(name, nullcontext))
            for name, run in runs.items()
        }
        times = interleave(loops, options.n_rounds(5))
        case, goal = f"16 rows, {label}", None if options.quick else ROUTED
        result.ratios(case, times, "time / no adapter", "no adapter")
        result.over_bare(case, times, dict.fromkeys(contexts, goal))
    result.notes.append(
        "With 32 adapters a batch of 16 rows names 16 of them, others being ready. Decode makes "
        "ten forwards in one `routed`; each gathers the factors anew, the bare operations none."
    )
    return result


def _many(model: Any, ranks: list[int]) -> Any:
    for i, rank in enumerate(ranks):
        inject(model, {"rank": rank, "alpha": ALPHA, "targets": [LLAMA]}, f"a{i}")
        randomise(adapter_parameters(model, f"a{i}").values())
    return model.eval()


def _many_peft(model: Any, n: int) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=f".*{LLAMA}")
    with quiet():
        made = get_peft_model(model, config, adapter_name="a0")
        for i in range(1, n):
            made.add_adapter(f"a{i}", config)
    return made.eval()


def _routing(model: Any, n: int) -> Callable[[], AbstractContextManager[None]]:
    return lambda: routed(model, [f"a{i % n}" for i in range(16)])


def _inference(
    run: Callable[[], Any], calls: int, context: Callable[[], AbstractContextManager[None]]
) -> Callable[[], None]:
    """Return a loop of calls, as a decoder makes them: in one context from first to last."""

    def loop() -> None:
        with torch.inference_mode(), context():
            for _ in range(calls):
                run()

    return loop
