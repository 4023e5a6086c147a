"""The rows of `scripts/bench.py`: each a function from options to a result."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks import launches as counts
from benchmarks.measure import (
    AGAIN,
    BARE,
    Options,
    Result,
    Variant,
    interleave,
    many,
    peak_bytes,
    saved_bytes,
    some_ids,
)
from benchmarks.models import (
    ALPHA,
    LLAMA,
    RANK,
    Grove,
    Stack,
    frozen,
    gpt2,
    llama,
    quiet,
    randomise,
    training_step,
    with_bare,
    with_lora,
    with_peft,
)
from lora_inject import (
    Trial,
    Trials,
    activate,
    adapter_parameters,
    eject,
    inject,
    load_adapter,
    merge,
    routed,
    save_adapter,
    unmerge,
)

OURS = "lora_inject"
MIB = 2**20
GROVE = r"[a-z]+_proj"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CONFIG = {"rank": RANK, "alpha": ALPHA}


def _models(options: Options) -> dict[str, Callable[[torch.dtype], Any]]:
    if options.quick:
        sizes = {"num_hidden_layers": 2, "hidden_size": 96, "intermediate_size": 256}
        return {"Llama tiny": lambda dtype: llama(dtype, vocab_size=512, **sizes)}
    return {"Llama 124M": llama, "GPT-2 124M": gpt2}


def _small(options: Options) -> dict[str, int]:
    """Sizes of a Llama for what takes many models or many steps."""
    sizes = {"num_hidden_layers": 4, "hidden_size": 512, "intermediate_size": 1376}
    if options.quick:
        sizes = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 176}
    return {**sizes, "vocab_size": 4096, "num_attention_heads": 8}


# ------------------------------------------------------------------------------------ training


def step(options: Options) -> Result:
    """Time a training step."""
    result = Result()
    ids = some_ids(2, 16) if options.quick else some_ids(4, 128)
    for name, make in _models(options).items():
        for label, dtype in DTYPES.items():
            base = make(dtype)
            made = {
                "floor": frozen(copy.deepcopy(base)),
                AGAIN: frozen(copy.deepcopy(base)),
                OURS: with_lora(copy.deepcopy(base)),
                "PEFT": with_peft(copy.deepcopy(base)),
                BARE: with_bare(base),
            }
            runs = {name: training_step(model, ids) for name, model in made.items()}
            result.ratios(f"{name} {label}", interleave(runs, options.n_rounds(3)))
            if torch.get_default_device().type == "cuda":
                for who, run in runs.items():
                    result.add(f"{name} {label}", who, "peak, MiB", peak_bytes(run) / MIB)
    return result


def saved(options: Options) -> Result:
    """Count the bytes that are kept for the backward, over those of the floor."""
    result = Result()
    ids = some_ids(2, 16) if options.quick else some_ids(4, 128)
    makers: dict[str, Callable[[Any], Any]] = {
        "floor": frozen,
        OURS: with_lora,
        "lora_inject, compute: float32": lambda m: with_lora(m, compute="float32"),
        "lora_inject, dropout 0.05": lambda m: with_lora(m, dropout=0.05),
        "PEFT": with_peft,
        "PEFT, dropout 0.05": lambda m: with_peft(m, lora_dropout=0.05),
    }
    for name, make in _models(options).items():
        for label, dtype in DTYPES.items():
            base, floor = make(dtype), 0
            for who, maker in makers.items():
                model = maker(copy.deepcopy(base)).train()
                run = lambda model=model: model(input_ids=ids, labels=ids, use_cache=False)  # noqa: E731
                kept = saved_bytes(model, run)
                floor = floor or kept
                over = kept - floor if who != "floor" else kept
                result.add(f"{name} {label}", who, "MiB over floor", over / MIB)
    return result


def experts(options: Options) -> Result:
    """Time adapters on the stacked weights of a Mixtral block, and measure their peak memory."""
    from peft import LoraConfig, get_peft_model
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    result = Result()
    hidden, inner, n_tokens = (64, 224, 32) if options.quick else (1024, 3584, 512)
    names = ["experts.gate_up_proj", "experts.down_proj"]
    for label, dtype in DTYPES.items():
        torch.manual_seed(0)
        base = MixtralSparseMoeBlock(MixtralConfig(hidden_size=hidden, intermediate_size=inner))
        randomise(base.parameters())
        base.to(dtype).requires_grad_(False)
        x = torch.randn(1, n_tokens, hidden, dtype=dtype, requires_grad=True)
        theirs = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=[], target_parameters=names)
        with quiet():
            peft = get_peft_model(copy.deepcopy(base), theirs)
        made = {
            "floor": base,
            AGAIN: copy.deepcopy(base),
            OURS: inject(copy.deepcopy(base), {**CONFIG, "targets": names}),
            "PEFT": peft,
        }

        def run(model: Any, x: Tensor = x) -> None:
            model(x).float().square().mean().backward()
            x.grad = None
            model.zero_grad(set_to_none=True)

        steps = {name: lambda model=model, run=run: run(model) for name, model in made.items()}
        case = f"8 experts, {hidden} to {inner}, {n_tokens} tokens, {label}"
        result.ratios(case, interleave(steps, options.n_rounds(3)))
        for name, one in steps.items():
            result.add(case, name, "peak, MiB", peak_bytes(one) / MIB)
    return result


def trials(options: Options) -> Result:
    """Time a step of many trials at once against the same runs in turn."""
    result = Result()
    rules = {**CONFIG, "targets": [LLAMA]}
    for n, label in ((8, "fp32"), (8, "bf16"), (32, "fp32")):
        base = llama(DTYPES[label], **_small(options))
        alone, peft = with_lora(copy.deepcopy(base)), with_peft(copy.deepcopy(base))
        together = Trials(base.train(), {f"t{i}": Trial(rules, lr=1e-4) for i in range(n)})
        for n_tokens in (8,) if options.quick else (8, 32, 128):
            ids = some_ids(n, n_tokens)
            rows = zip(together.trials, ids.split(1), strict=True)
            batches = {name: {"input_ids": row, "labels": row} for name, row in rows}
            runs = {
                "in turn": _in_turn(alone, ids),
                "in turn again": _in_turn(alone, ids),
                OURS: lambda batches=batches, together=together: together.step(batches),
                "PEFT": _in_turn(peft, ids),
            }
            case = f"{n} trials {label}, {n_tokens} tokens each"
            times = interleave(runs, options.n_rounds(3))
            result.ratios(case, times, "time / in turn", "in turn")
    return result


def _in_turn(model: Any, ids: Tensor) -> Callable[[], None]:
    """Return a step of each row's run, one after the other."""
    steps = [training_step(model, row) for row in ids.split(1)]

    def run() -> None:
        for step in steps:
            step()

    return run


def launches_of_trials(n: int) -> float:
    """Count what a step of trials starts on any device but the CPU, on a tiny model."""
    tiny = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 31}
    model = llama(**tiny, num_attention_heads=2, device="cpu").train()
    rules = {"rank": 2, "targets": [LLAMA]}
    several = Trials(model, {f"t{i}": Trial(rules, lr=1e-4) for i in range(n)})
    ids = some_ids(1, 6).cpu() % 31
    batch = {"input_ids": ids, "labels": ids}
    several.step(batch)
    with counts.Counted() as counted:
        several.step(batch)
    return float(counted.total)


# ----------------------------------------------------------------------------------- inference


def decode(options: Options) -> Result:
    """Time one token through a stack of linear layers: what an adapter adds to each of them."""
    result = Result()
    sizes = [(64, torch.float32, 100), (768, torch.float32, 5), (768, torch.bfloat16, 5)]
    depth, targets = 24, r"layers\.\d+"
    for width, dtype, calls in sizes[: 1 if options.quick else None]:
        torch.manual_seed(0)
        plain = Stack(depth, width, dtype)
        x = torch.randn(1, 1, width, dtype=dtype)
        adapted = inject(copy.deepcopy(plain), {**CONFIG, "targets": [targets]})
        randomise(adapter_parameters(adapted).values())
        made = {
            "nn.Linear": plain,
            AGAIN: copy.deepcopy(plain),
            OURS: adapted,
            "PEFT": with_peft(copy.deepcopy(plain), target_modules=targets, fan_in_fan_out=False),
            BARE: with_bare(copy.deepcopy(plain), targets),
        }
        runs = {
            name: _inference(lambda model=model, x=x: model(x), calls)
            for name, model in made.items()
        }
        times = interleave(runs, options.n_rounds(25))
        case = f"{depth} layers of width {width}, {str(dtype).removeprefix('torch.')}"
        each = 1e6 / (calls * depth)
        for name in list(times)[1:]:
            over = zip(times[name], times["nn.Linear"], strict=True)
            result.add(case, name, "us a layer over nn.Linear", [each * (t - f) for t, f in over])
    return result


def routing(options: Options) -> Result:
    """Time a batch in which every row has its own adapter."""
    from peft import LoraConfig

    result = Result()
    base = llama(**_small(options)).eval()
    adapters = ["default", *(f"a{i}" for i in range(1, 8))]
    names = 2 * adapters
    ours, bare = copy.deepcopy(base), with_bare(copy.deepcopy(base), rows=16)
    peft = with_peft(copy.deepcopy(base)).eval()
    for name in adapters:
        inject(ours, {**CONFIG, "targets": [LLAMA]}, name)
        randomise(adapter_parameters(ours, name).values())
    with quiet():
        for name in adapters[1:]:
            rules = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=f".*{LLAMA}")
            peft.add_adapter(name, rules)
    for length, label, calls in ((1, "decode", 10), (64, "length 64", 1)):
        ids = some_ids(16, length)
        models = {"no adapter": base, AGAIN: copy.deepcopy(base), OURS: ours, BARE: bare}
        runs = {
            name: _inference(
                lambda model=model, ids=ids: model(ids, use_cache=False),
                calls,
                (lambda: routed(ours, names)) if name == OURS else nullcontext,
            )
            for name, model in models.items()
        }
        runs["PEFT"] = _inference(
            lambda ids=ids: peft(input_ids=ids, use_cache=False, adapter_names=names), calls
        )
        times = interleave(runs, options.n_rounds(5))
        result.ratios(f"16 rows, 8 adapters, {label}", times, "time / no adapter", "no adapter")
    return result


def _inference(
    run: Callable[[], Any],
    calls: int,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Callable[[], None]:
    """Return a loop of calls, as a decoder makes them: in one context from first to last."""

    def loop() -> None:
        with torch.inference_mode(), context():
            for _ in range(calls):
                run()

    return loop


def switch(options: Options) -> Result:
    """Time a change of adapter, at 560 sites and at ten times as many."""
    result = Result()
    few = 56 if options.quick else 560
    trees = {n: Grove(n) for n in (few, 10 * few)}
    peft = with_peft(Grove(few), target_modules=f".*{GROVE}", fan_in_fan_out=False)
    with quiet():
        peft.add_adapter("two", peft.peft_config["default"])
    runs: dict[str, Callable[[], Any]] = {}
    for n, tree in trees.items():
        for name in ("one", "two"):
            inject(tree, {"rank": 4, "targets": [GROVE]}, name)
        runs[f"{OURS} {n}"] = _turns(lambda name, tree=tree: activate(tree, name), "one", "two")
    runs["PEFT"] = _turns(peft.set_adapter, "default", "two")
    times = interleave({n: many(run, 10) for n, run in runs.items()}, options.n_rounds(9))
    for n in trees:
        result.add(f"{n} sites", OURS, "ms", [100 * t for t in times[f"{OURS} {n}"]])
    result.add(f"{few} sites", "PEFT", "ms", [100 * t for t in times["PEFT"]])
    return result


def _turns(use: Callable[[str], Any], *names: str) -> Callable[[], None]:
    """Return a function that uses the one name and the other, in turn."""
    turn = [0]

    def run() -> None:
        turn[0] += 1
        use(names[turn[0] % 2])

    return run


# ------------------------------------------------------------------------------------- surgery


def injection(options: Options) -> Result:
    """Time inject by the site, in trees of small layers, as a mixture of experts has."""
    result = Result()
    for n_sites in (100, 200) if options.quick else (1000, 5000):
        grove, theirs = Grove(n_sites), Grove(n_sites)
        config = {**CONFIG, "targets": [GROVE]}
        made: list[Any] = []
        only = {"target_modules": f".*{GROVE}", "fan_in_fan_out": False}
        runs = {
            OURS: Variant(
                lambda grove=grove, config=config: inject(grove, config),
                after=lambda grove=grove: eject(grove),
            ),
            BARE: Variant(lambda grove=grove: _factors(grove)),
            "PEFT": Variant(
                lambda made=made, theirs=theirs, only=only: made.append(with_peft(theirs, **only)),
                after=lambda made=made: made.pop().unload(),
            ),
        }
        for name, seconds in interleave(runs, options.n_rounds(3)).items():
            result.add(f"{n_sites:,} sites of width 32", name, "s", seconds)
    return result


def _factors(model: nn.Module) -> list[nn.Parameter]:
    """Make two factors for each layer, the one drawn, the other zero."""
    made = []
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            A = nn.Parameter(torch.empty(RANK, layer.in_features))
            nn.init.kaiming_uniform_(A, a=5**0.5)
            made += [A, nn.Parameter(torch.zeros(layer.out_features, RANK))]
    return made


def load(options: Options) -> Result:
    """Time loading a second adapter from a file."""
    result = Result()
    n_sites = 100 if options.quick else 5000
    grove = inject(Grove(n_sites), {**CONFIG, "targets": [GROVE]}, "first")
    peft = with_peft(Grove(n_sites), target_modules=f".*{GROVE}", fan_in_fan_out=False)
    case = f"{n_sites:,} sites of width 32"
    with tempfile.TemporaryDirectory() as folder:
        path = save_adapter(grove, Path(folder) / "adapter", "first")
        weights = next(path.glob("*.safetensors"))
        runs = {
            OURS: Variant(
                lambda: load_adapter(grove, path, "second"), after=lambda: eject(grove, "second")
            ),
            BARE: Variant(lambda: [nn.Parameter(t) for t in load_file(weights).values()]),
        }
        for name, seconds in interleave(runs, options.n_rounds(3)).items():
            result.add(case, name, "s", seconds)
        with quiet():
            theirs = {"PEFT": lambda: peft.load_adapter(str(path), "second")}
            result.add(case, "PEFT", "s", interleave(theirs, 1, warm_up=0)["PEFT"])
    return result


def merging(options: Options) -> Result:
    """Time merge against a copy of the weights that it writes."""
    result = Result()
    width, depth = (64, 4) if options.quick else (1152, 96)
    targets = r"layers\.\d+"
    for label, dtype in DTYPES.items():
        base = Stack(depth, width, dtype)
        ours = inject(copy.deepcopy(base), {"rank": 16, "targets": [targets]})
        peft = with_peft(copy.deepcopy(base), 16, target_modules=targets, fan_in_fan_out=False)
        for model in (ours, peft):
            randomise(p for p in model.parameters() if p.requires_grad)
        source = [p.detach() for p in base.parameters()]
        target = [torch.empty_like(p) for p in source]
        factors = [(torch.randn(len(p), 16), torch.randn(16, p.shape[1]) / 1e3) for p in source]

        def copied(source: Sequence[Tensor] = source, target: Sequence[Tensor] = target) -> None:
            torch._foreach_copy_(list(target), list(source))

        def formed(target: Sequence[Tensor] = target, factors: Any = factors) -> None:
            for p, (left, right) in zip(target, factors, strict=True):
                p.copy_(p.float().addmm_(left, right))

        runs = {
            "memcpy": copied,
            AGAIN: copied,
            BARE: Variant(formed, after=copied),
            OURS: Variant(lambda ours=ours: merge(ours), after=lambda ours=ours: unmerge(ours)),
            "PEFT": Variant(peft.merge_adapter, after=peft.unmerge_adapter),
        }
        case = f"{sum(p.numel() for p in source) / 1e6:.0f}M weights, r = 16, {label}"
        result.ratios(case, interleave(runs, options.n_rounds(5)), "time / memcpy", "memcpy")
    return result


# ------------------------------------------------------------------------------------- compile


class _Block(nn.Module):
    """A Llama block in plain torch."""

    def __init__(self, hidden: int, inner: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(hidden, hidden, bias=False))
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm1(x)
        q, k, v = (
            p(n).view(*n.shape[:2], self.heads, -1).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(mixed.transpose(1, 2).flatten(2))
        n = self.norm2(x)
        return x + self.down_proj(F.silu(self.gate_proj(n)) * self.up_proj(n))


def compiled(options: Options) -> Result:
    """Time compiled steps against the compiled floor."""
    result = Result()
    depth, hidden, inner, heads = (1, 64, 176, 2) if options.quick else (3, 768, 2048, 12)
    for label, dtype in DTYPES.items():
        torch.manual_seed(0)
        base = nn.Sequential(*(_Block(hidden, inner, heads) for _ in range(depth))).to(dtype)
        base.requires_grad_(False)
        x = torch.randn(4, 16 if options.quick else 128, hidden, dtype=dtype, requires_grad=True)
        only = {"target_modules": f".*{LLAMA}", "fan_in_fan_out": False}
        made = {
            "floor": base,
            AGAIN: copy.deepcopy(base),
            OURS: inject(copy.deepcopy(base), {**CONFIG, "targets": [LLAMA]}),
            "PEFT": with_peft(copy.deepcopy(base), **only),
        }

        def run(call: Any, x: Tensor = x) -> None:
            call(x).float().square().mean().backward()
            x.grad = None

        calls = {name: torch.compile(model, fullgraph=True) for name, model in made.items()}
        runs = {name: lambda call=call, run=run: run(call) for name, call in calls.items()}
        times = interleave(runs, options.n_rounds(5), warm_up=2)
        case = f"{depth} blocks of width {hidden} {label}, compiled"
        result.ratios(case, times, "time / compiled floor")
        torch.compiler.reset()
    return result


def launches(options: Options) -> Result:  # noqa: ARG001 - counts have no smaller size
    """Count launches and bytes of one layer of width 4096, rank 16, forward and backward."""
    result = Result()
    for name, row in counts.ROWS.items():
        for who in ("floor", *(["PEFT"] if row.peft is not None else []), OURS):
            counted = counts.count(row, who)
            result.add(name, who, "launches", float(counted.total))
            result.add(name, who, "GiB moved", counted.moved / counts.GIB)
    return result


ROWS: dict[str, Callable[[Options], Result]] = {
    "step": step,
    "saved-bytes": saved,
    "launches": launches,
    "experts": experts,
    "trials": trials,
    "decode": decode,
    "routed": routing,
    "switch": switch,
    "inject": injection,
    "load": load,
    "merge": merging,
    "compile": compiled,
}
