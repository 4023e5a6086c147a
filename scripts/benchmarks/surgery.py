"""Putting adapters on and folding them in: inject, load, merge."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from benchmarks.measure import AGAIN, BARE, Options, Result, Variant, interleave, paired
from benchmarks.models import ALPHA, RANK, Grove, llama, quiet, randomise, with_lora, with_peft
from lora_inject import adapter_parameters, eject, inject, load_adapter, merge, save_adapter
from lora_inject import unmerge as unmerged

OURS = "lora_inject"
KEEPING = f"{BARE}, undo=True"
# Targets, over the bare operations: what checking, counting and taking back may cost.
INJECT, LOAD, MERGE = 5.0, 8.0, {"fp32": 1.3, "bf16": 2.0}
GROVE = r"[a-z]+_proj"


# ------------------------------------------------------------------------------------- inject


def injection(options: Options) -> Result:
    """Time inject: by the site, in trees of small layers, and for the shape of a 70B Llama."""
    result = Result()
    sizes = (100, 200, 400) if options.quick else (1000, 5000, 10000, 20000)
    for n_sites in sizes:
        _grove(result, options, n_sites, peft=options.full or n_sites <= 5000)
    layers = 4 if options.quick else 80
    big = {"hidden_size": 8192, "intermediate_size": 28672, "num_key_value_heads": 8}
    shape = {**big, "num_attention_heads": 64, "num_hidden_layers": layers}
    model = llama(torch.bfloat16, device="meta", **shape, vocab_size=32000)
    peft_base = llama(torch.bfloat16, device="meta", **shape, vocab_size=32000)
    case = f"Llama of {7 * layers} sites, 70B shape, meta"
    runs = {
        OURS: Variant(lambda: with_lora(model), after=lambda: eject(model)),
        BARE: Variant(lambda: _bare_injection(model)),
        "PEFT": _peft_injection(peft_base, {}),
    }
    times = interleave(runs, options.n_rounds(5))
    for name in runs:
        result.add(case, name, "s", times[name])
    result.over_bare(case, times, {OURS: None if options.quick else INJECT})
    return result


def _grove(result: Result, options: Options, n_sites: int, *, peft: bool) -> None:
    grove = Grove(n_sites)
    config = {"rank": RANK, "alpha": ALPHA, "targets": [GROVE], "expect": {"sites": n_sites}}
    runs = {
        OURS: Variant(lambda: inject(grove, config), after=lambda: eject(grove)),
        BARE: Variant(lambda: _bare_injection(grove)),
    }
    if peft:
        only = {"target_modules": f".*{GROVE}", "fan_in_fan_out": False}
        runs["PEFT"] = _peft_injection(Grove(n_sites), only)
    times = interleave(runs, options.n_rounds(3))
    case = f"{n_sites:,} sites of width 32"
    for name in runs:
        result.add(case, name, "s", times[name])
        each = [1e3 * t / n_sites for t in times[name]]
        result.add(case, name, "ms a site", each)
    result.over_bare(case, times, {OURS: None if options.quick else INJECT})


def _bare_injection(model: nn.Module) -> list[nn.Parameter]:
    """Make two factors for each layer, the one drawn, the other zero."""
    made = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            device = module.weight.device
            A = nn.Parameter(torch.empty(RANK, module.in_features, device=device))
            nn.init.kaiming_uniform_(A, a=5**0.5)
            made += [A, nn.Parameter(torch.zeros(module.out_features, RANK, device=device))]
    return made


def _peft_injection(base: nn.Module, config: dict[str, Any]) -> Variant:
    made: list[Any] = []
    return Variant(
        lambda: made.append(with_peft(base, **config)), after=lambda: made.pop().unload()
    )


# --------------------------------------------------------------------------------------- load


def load(options: Options) -> Result:
    """Time loading a second adapter from a file."""
    result = Result()
    for n_sites in (100, 200) if options.quick else (5000, 20000):
        with tempfile.TemporaryDirectory() as folder:
            _load(result, options, n_sites, Path(folder) / "adapter")
    return result


def _load(result: Result, options: Options, n_sites: int, path: Path) -> None:
    grove = inject(Grove(n_sites), {"rank": RANK, "alpha": ALPHA, "targets": [GROVE]}, "first")
    save_adapter(grove, path, "first")
    case = f"{n_sites:,} sites of width 32"
    size = sum(file.stat().st_size for file in path.iterdir()) / 2**20
    result.add(case, "the file", "MiB", size)
    second = Variant(
        lambda: load_adapter(grove, path, "second"), after=lambda: eject(grove, "second")
    )
    weights = next(path.glob("*.safetensors"))
    bare = Variant(lambda: [nn.Parameter(t) for t in load_file(weights).values()])
    times = interleave({OURS: second, BARE: bare}, options.n_rounds(3))
    for name in times:
        result.add(case, name, "s", times[name])
        result.add(case, name, "ms a site", [1e3 * t / n_sites for t in times[name]])
    result.over_bare(case, times, {OURS: None if options.quick else LOAD})
    if options.full or n_sites <= 5000:
        peft = with_peft(Grove(n_sites), target_modules=f".*{GROVE}", fan_in_fan_out=False)

        def run() -> None:
            with quiet():
                peft.load_adapter(str(path), "second")

        result.add(case, "PEFT", "s", interleave({"PEFT": run}, 1, warm_up=0)["PEFT"])


# -------------------------------------------------------------------------------------- merge


class _Weights(nn.Module):
    """The 56 linear layers of eight blocks of a 134M model."""

    def __init__(self, n: int, hidden: int, inner: int) -> None:
        super().__init__()
        square = dict.fromkeys(("q", "k", "v", "o"), (hidden, hidden))
        shapes = square | {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {f"{k}_proj": nn.Linear(i, o, bias=False) for k, (o, i) in shapes.items()}
            )
            for _ in range(n)
        )


def merging(options: Options) -> Result:
    """Time merge against a copy of the weights that it writes."""
    result = Result()
    sizes = (2, 64, 176) if options.quick else (8, 1152, 3328)
    for dtype, label in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        _merge(result, options, label, _Weights(*sizes).to(dtype))
    result.notes.append(
        "memcpy copies the merged weights into tensors that exist. `undo=True` also keeps the "
        "originals, in fresh memory. Over bf16, merge measures what rounding leaves of each delta "
        "before it writes; PEFT and memcpy report nothing."
    )
    return result


def _merge(result: Result, options: Options, label: str, base: nn.Module) -> None:
    config = {"rank": 16, "alpha": ALPHA, "targets": [GROVE]}
    kept = inject(copy.deepcopy(base), config)
    bare = inject(copy.deepcopy(base), config)
    peft = with_peft(copy.deepcopy(base), 16, target_modules=f".*{GROVE}", fan_in_fan_out=False)
    for model in (kept, bare):
        randomise(adapter_parameters(model).values())
    randomise(p for p in peft.parameters() if p.requires_grad)
    source = [p.detach() for p in base.parameters()]
    target = [torch.empty_like(p) for p in source]

    def restore() -> None:
        eject(bare)
        with torch.no_grad():
            torch._foreach_copy_(list(bare.parameters()), source)
        inject(bare, config)
        randomise(adapter_parameters(bare).values())

    def copied() -> None:
        for into, value in zip(target, source, strict=True):
            into.copy_(value)

    factors = [(torch.randn(len(p), 16), torch.randn(16, p.shape[1]) / 1e3) for p in source]

    def formed(keep: bool) -> list[torch.Tensor]:
        kept = [p.clone() for p in target] if keep else []
        for p, (left, right) in zip(target, factors, strict=True):
            p.copy_(p.float().addmm_(left, right)) if label == "bf16" else p.addmm_(left, right)
        return kept

    times = interleave(
        {
            "memcpy": copied,
            AGAIN: copied,
            BARE: Variant(lambda: formed(keep=False), after=copied),
            KEEPING: Variant(lambda: formed(keep=True), after=copied),
            "lora_inject, undo=False": Variant(lambda: merge(bare, undo=False), after=restore),
            "lora_inject, undo=True": Variant(lambda: merge(kept), after=lambda: unmerged(kept)),
            "PEFT": Variant(peft.merge_adapter, after=peft.unmerge_adapter),
        },
        options.n_rounds(5),
        warm_up=1,
    )
    n = sum(p.numel() for p in source)
    case = f"{n / 1e6:.0f}M weights, r = 16, {label}"
    names = ("lora_inject, undo=False", "lora_inject, undo=True")
    result.ratios(case, times, "time / memcpy", "memcpy")
    goal = None if options.quick else MERGE[label]
    for name, bound in zip(names, (BARE, KEEPING), strict=True):
        result.add(case, name, f"time / {bound}", paired(times[name], times[bound]), goal)
    same = all(torch.equal(p, q) for p, q in zip(source, _base(kept), strict=True))
    result.add(case, "lora_inject, undo=True", "weights not restored", float(not same), 0.0)


def _base(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach() for n, p in model.named_parameters() if "lora_" not in n]
