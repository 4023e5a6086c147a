"""Stages `counting`, `memory`, `latency`, `switching` and `together` (sections 1, 4; Table 1)."""

from __future__ import annotations

import copy
import itertools
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from benchmarks import measure
from data.pairs import target_log_probs
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_inject as li

from . import sentences
from .lab import FAILS, HOLDS, OPEN, PARTLY, Claim, Lab, Result, n_bytes, table, verdict
from .methods import TARGETS, attach
from .sentences import Classifier

FUSED = {"match": r"attn\.c_attn", "slices": ["q", "k", "v"], "adapt": ["q", "v"]}

# ------------------------------------------------------------------------------------- counting

GPT3 = {f"qv, r{rank}": {"rank": rank, "targets": [FUSED]} for rank in (1, 4, 8)}
ADAM = (4, 12)  # bytes for each parameter: two moments at 16 bits; at 32 bits, and master weights


def counting(lab: Lab) -> tuple[list[str], list[Claim]]:
    """GPT-3 175B in GPT-2's layout on the meta device, planned; the rest is multiplication."""
    found = lab.run("counting/gpt3", {"configs": GPT3}, count)
    whole, adapters = found["parameters"], found["adapters"]
    small = adapters["qv, r4"]
    narrow, wide = (n_bytes(whole * (2 + 2 + adam)) for adam in ADAM)
    with_lora = n_bytes(whole * 2 + small * (2 + 2 + ADAM[0]))
    most, least = whole / adapters["qv, r1"], whole / adapters["qv, r8"]
    claims = [
        (
            "10,000 times fewer parameters train; 0.01 % of GPT-3 175B",
            "4.7 M (q, v, r = 1) to 37.7 M (r = 8)",
            (
                f"{adapters['qv, r1']:,} to {adapters['qv, r8']:,} of {whole:,}: {most:,.0f} to "
                f"{least:,.0f} times fewer"
            ),
            HOLDS if least < 10_000 < most else FAILS,
        ),
        (
            "A checkpoint shrinks from 350 GB to 35 MB (q, v at r = 4, 16 bits)",
            "350 GB; 35 MB",
            f"{n_bytes(2 * whole)}; {n_bytes(2 * small)} ({2 * small / 2**20:.0f} MiB)",
            HOLDS if abs(small / 2**19 - 35) < 3.5 else FAILS,
        ),
        (
            "Memory to train GPT-3 175B falls from 1.2 TB to 350 GB",
            "1.2 TB; 350 GB",
            f"{narrow} or {wide}, by how Adam is kept; {with_lora}; both without activations",
            PARTLY,
        ),
    ]
    return [], claims


def count() -> Result:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=96, n_embd=12288, n_head=96, n_positions=2048)
    with torch.device("meta"):
        model: Any = GPT2LMHeadModel(config)
    plans = {name: li.plan(model, config).n_trainable for name, config in GPT3.items()}
    return {"parameters": sum(p.numel() for p in model.parameters()), "adapters": plans}


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of some tensors."""
    return sum(t.nbytes for t in tensors)


# --------------------------------------------------------------------------------------- memory

VARIANTS: dict[str, dict[str, Any]] = {
    "full fine-tuning": {},
    "LoRA q, v, r = 4": {"rank": 4, "targets": [r"self_attn\.[qv]_proj"]},
    "LoRA all linears, r = 8": {"rank": 8, "targets": [r"(self_attn|mlp)\.\w+_proj"]},
}
PARTS = ("weights", "gradients", "optimizer", "without activations", "peak")


def memory(lab: Lab) -> tuple[list[str], list[Claim]]:
    """Bytes, counted and not sampled, and speed of a training step (section 4.2)."""
    result = lab.run("memory", lab.settings("memory_tokens", "rounds"), lambda: steps(lab))
    full, small, *_ = result.values()
    n_tokens = lab.sizes.memory_tokens[0] * lab.sizes.memory_tokens[1]
    rows = [
        (title, f"{v['trained']:,}", *(n_bytes(v[part]) for part in PARTS),
         f"{n_tokens / statistics.median(v['seconds']):.0f}")
        for title, v in result.items()
    ]  # fmt: skip
    static = [sum(v[part] for part in PARTS[:3]) for v in (full, small)]
    ratios = [a / b for a, b in zip(full["seconds"], small["seconds"], strict=True)]
    middle, least, most = statistics.median(ratios), min(ratios), max(ratios)
    share = small["peak"] / full["peak"]
    claims = [
        (
            "Training with Adam needs about a third of the memory", "1.2 TB to 350 GB: 0.29",
            f"{share:.2f} at the peak, {static[1] / static[0]:.2f} without activations",
            HOLDS if share < 0.4 else f"{FAILS} at this batch",
        ),
        (
            "Training is 25 % faster", "43.1 against 32.5 tokens/s on a GPU: 1.33",
            f"{middle:.2f} (rounds from {least:.2f} to {most:.2f})",
            verdict(middle, (most - least) / 2 / len(ratios) ** 0.5, 1.25),
        ),
    ]  # fmt: skip
    return [table(("", "trained", *PARTS, "tokens/s"), rows)], claims


def steps(lab: Lab) -> Result:
    """Each variant's bytes, then the times of all in turn."""
    shape = lab.sizes.memory_tokens
    tokens = torch.randint(2, 300, shape, generator=torch.Generator().manual_seed(0))
    labels = tokens.clone()
    labels[:, : shape[1] * 3 // 4] = -100  # the prompt's share in the pairs, near enough
    runs: dict[str, Callable[[], None]] = {}
    found: dict[str, Any] = {}
    for title, config in VARIANTS.items():
        model, _ = lab.decoder()
        if config:
            li.inject(model, config)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5)

        def loss(model: Any = model) -> Tensor:
            return -target_log_probs(model, tokens, labels).mean()

        def step(loss: Any = loss, optimizer: Any = optimizer) -> None:
            loss().backward()
            optimizer.step()
            optimizer.zero_grad()

        step()  # the optimizer makes its state in the first
        kept = [t for state in optimizer.state.values() for t in state.values()]
        state = size(t for t in kept if isinstance(t, Tensor))
        weights = size(model.parameters())
        found[title] = {
            "weights": weights, "gradients": size(trained), "optimizer": state,
            "without activations": measure.saved_bytes(model, loss),
            "peak": weights + state + measure.peak_bytes(step),
            "trained": sum(p.numel() for p in trained),
        }  # fmt: skip
        runs[title] = step
    for title, seconds in measure.interleave(runs, lab.sizes.rounds).items():
        found[title]["seconds"] = seconds
    return found


# -------------------------------------------------------------------------------------- latency

SHARE = 0.031  # of the parameters in adapter layers: 11 M of GPT-2 medium's 355 M
PLAIN, AGAIN, MERGED = "plain", "plain again", "LoRA merged"


def latency(lab: Lab) -> tuple[list[str], list[Claim]]:
    """What a forward costs, merged, not merged, and with adapter layers (Table 1)."""
    settings = lab.settings("latency_model", "latency", "rounds")
    found = lab.run("latency", settings, lambda: forwards(lab))
    names = [name for name in next(iter(found.values())) if name != PLAIN]
    rows = []
    for setting, times in found.items():
        cells = ["{:+.1f} % ± {:.1f}".format(*added(times, name)) for name in names]
        rows.append((setting, f"{1000 * statistics.median(times[PLAIN]):.1f}", *cells))
    merged = [added(times, MERGED) for times in found.values()]
    noise = [abs(added(t, AGAIN)[0]) + 2 * added(t, AGAIN)[1] for t in found.values()]
    quiet = all(abs(x) <= 2 * e + n and e < 3 for (x, e), n in zip(merged, noise, strict=True))
    claims = [(
        "A merged LoRA adds no latency, by construction (Table 1)", "0 %",
        ", ".join(f"{x:+.1f} %" for x, _ in merged) + "; the same classes and shapes as plain",
        HOLDS if quiet else OPEN,
    )]  # fmt: skip
    for name, paper in (("Adapter-L", 20.7), ("Adapter-H", 30.3)):
        middle, error = added(list(found.values())[-1], name)
        claims.append((
            f"{name} adds much to the latency of one short row (Table 1)", f"{paper:+.1f} %",
            f"{middle:+.1f} % ± {error:.1f} (more than 5 % counts as much)",
            verdict(middle, error, 5.0),
        ))  # fmt: skip
    return [table(("batch x length", "plain, ms", *names), rows)], claims


def forwards(lab: Lab) -> Result:
    """Seconds of every round, by setting and variant."""
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    layers, dim = lab.sizes.latency_model
    config = GPT2Config(n_layer=layers, n_embd=dim, n_head=max(2, dim // 64), vocab_size=1000)
    plain: Any = GPT2Model(config).eval()
    unmerged = copy.deepcopy(plain)
    li.inject(unmerged, {"rank": 4, "alpha": 32, "targets": [FUSED]})
    for parameter in li.adapter_parameters(unmerged).values():
        nn.init.normal_(parameter, std=0.02)
    merged = copy.deepcopy(unmerged)
    li.merge(merged, undo=False)
    li.eject(merged)
    body = sum(p.numel() for p in plain.h.parameters())
    wide = max(1, round(SHARE * body / (layers * 2 * dim)))
    one, two = copy.deepcopy(plain), copy.deepcopy(plain)
    after_mlp = [f"h.{i}.mlp.c_proj" for i in range(layers)]
    both = [f"h.{i}.attn.c_proj" for i in range(layers)] + after_mlp
    attach(one, after_mlp, dim, wide, normed=True)
    attach(two, both, dim, max(1, wide // 2), normed=False)
    models = {PLAIN: plain, AGAIN: plain, MERGED: merged, "LoRA not merged": unmerged}
    models |= {"Adapter-L": one, "Adapter-H": two}

    def forward(model: nn.Module, ids: Tensor) -> Callable[[], None]:
        def call() -> None:
            with torch.inference_mode():
                model(ids)

        return call

    times = {}
    for rows, length in lab.sizes.latency:
        ids = torch.randint(0, 1000, (rows, length), generator=torch.Generator().manual_seed(0))
        calls = {name: forward(model, ids) for name, model in models.items()}
        # short forwards are repeated, so that the clock's grain and its owner's switches even out
        rounds = lab.sizes.rounds * (4 if rows == 1 else 1)
        times[f"{rows} x {length}"] = measure.interleave(calls, rounds)
    return times


def added(times: Mapping[str, list[float]], name: str) -> tuple[float, float]:
    """Percent that a variant adds to the plain model, median over rounds, and its noise."""
    ratios = [100 * (a / b - 1) for a, b in zip(times[name], times[PLAIN], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return statistics.median(ratios), (high - low) / len(ratios) ** 0.5


# ------------------------------------------------------------------------------------ switching

TASKS = ("movies", "products", "editorials")


def switching(lab: Lab) -> tuple[list[str], list[Claim]]:
    """Three kinds of sentences on one base against three full copies (sections 1, 4.2)."""
    method = "lora-qv-r8"
    rate, head = sentences.rate_of(lab, method), sentences.rate_of(lab, "head")
    settings = {"rate": rate, "head": head, **lab.settings(*sentences.SHARED, "n_test")}
    for task in TASKS:
        args = (method, 0, rate, head, "test", f"{task}.safetensors", task)
        work = lambda args=args: sentences.fine_tune(lab, *args)  # noqa: E731
        lab.run(f"switching/{task}", settings, work)
    found = lab.run("switching/times", settings, lambda: switch(lab))
    adapter, full = found["adapter_bytes"], found["full_bytes"]
    activate, load, copied = (found["seconds"][way] for way in ("activate", "load", "copy"))
    claims = [
        (
            "Tasks are switched by swapping A and B, at a much lower cost than a full copy",
            "100 tasks: 354 GB instead of 35 TB",
            (f"{1e4 * activate:.0f} µs to activate, {1000 * load:.1f} ms to load from disk; a full "
            f"copy {1000 * copied:.1f} ms"),
            HOLDS if load < copied else PARTLY,
        ),
        (
            "Three tasks take one base and three small files", "350 GB and 35 MB for each",
            (f"{n_bytes(full + 3 * adapter)} instead of {n_bytes(3 * full)}: {n_bytes(adapter)} "
            f"for each task, {full / adapter:.0f} times smaller"),
            HOLDS,
        ),
        (
            "Inputs of several tasks can share a batch while nothing is merged",
            "section 4.2, in words",
            (f"a row for each task: its last states are within {found['mixed_off']:.0e} of "
            "those of the task alone"),
            HOLDS if found["mixed_off"] < 1e-5 else FAILS,
        ),
        (
            "W0 is recovered when another adapter is to go in", "by subtracting B A",
            *(("bit for bit", HOLDS) if found["exact"] else ("not bit for bit", FAILS)),
        ),
    ]  # fmt: skip
    return [], claims


def switch(lab: Lab) -> Result:
    """Bytes, and seconds of each way to switch."""
    encoder, tokenizer = lab.encoder()
    model = Classifier(encoder).eval()
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    full = lab.kept("full.safetensors")
    save_file(plain, full)
    paths = {task: lab.kept(f"{task}.safetensors") for task in TASKS}
    texts = {task: lab.sentences(task).test[:1] for task in TASKS}
    rows = {t: sentences.encode(tokenizer, r, lab.sizes.max_tokens) for t, r in texts.items()}
    for adapter, path in paths.items():
        li.load_adapter(model, path, adapter)
    mixed = mixed_off(model, lab, [r[0] for r in rows.values()])
    li.activate(model, TASKS[0])
    li.merge(model)
    li.unmerge(model)
    after = model.state_dict()
    exact = all(torch.equal(after[n], v) for n, v in plain.items() if not n.startswith("head."))
    tasks, names = itertools.cycle(TASKS), (f"again {n}" for n in itertools.count())
    ways = {
        "activate": measure.many(lambda: li.activate(model, next(tasks)), 100),
        "load": lambda: li.load_adapter(model, paths[next(tasks)], next(names)),
        "copy": lambda: model.load_state_dict(load_file(full)),
    }
    seconds = {way: statistics.median(s) for way, s in measure.interleave(ways, 15).items()}
    sizes = {"adapter_bytes": paths[TASKS[0]].stat().st_size, "full_bytes": full.stat().st_size}
    return {"mixed_off": mixed, "exact": exact, "seconds": seconds, **sizes}


def mixed_off(model: Classifier, lab: Lab, rows: list[Any]) -> float:
    """How far the states of a batch of mixed tasks are from those of each task alone, at most.

    The heads are left out: a head is a whole matrix for each task, which rows cannot share.
    """
    plain = Classifier(lab.encoder()[0]).eval()
    for task in TASKS:
        state = li.adapter_state(model, task)
        li.install(plain, li.AdapterState(state.sites), task)
    ids, mask, _ = sentences.collate(rows)
    with torch.inference_mode():
        with li.routed(plain, list(TASKS)):
            mixed = plain.encoder(ids, mask).last_hidden_state
        alone = []
        for row, task in enumerate(TASKS):
            li.activate(plain, task)
            alone.append(plain.encoder(ids, mask).last_hidden_state[row])
    return ((mixed - torch.stack(alone)).abs() * mask.unsqueeze(-1)).max().item()


# ------------------------------------------------------------------------------------- together

CHANGE = 0.5  # size of the arbitrary update, as a share of the weight's own size


def together(lab: Lab) -> tuple[list[str], list[Claim]]:
    """LoRA with prefix tuning, and LoRA of full rank (appendix E, section 4.1)."""
    found = lab.run("together/full-rank", {"change": CHANGE}, lambda: full_rank(lab))
    prefix, lora, both = sentences.scores(lab, ("prefix", "lora-qv-r8", "both")).values()
    over = [sentences.gap(both, s) for s in (prefix, lora)]
    claims = [
        (
            "With the rank of the matrices and all biases, LoRA reaches what full fine-tuning can",
            "section 4.1, in words",
            (f"outputs {found['full']:.0e} off those of an arbitrary dense update (the base "
            f"{found['base']:.2f}, half the rank {found['half']:.2f})"),
            HOLDS if found["full"] < 1e-9 else FAILS,
        ),
        (
            "LoRA and prefix tuning work on one model, and are better than the prefix alone",
            "appendix E: both together are best on WikiSQL",
            f"{over[0]} points over the prefix alone", verdict(*over[0]),
        ),
        (
            "LoRA and prefix tuning together are better than LoRA alone",
            "on WikiSQL, not on MNLI", f"{over[1]} points over LoRA alone", verdict(*over[1]),
        ),
    ]  # fmt: skip
    return [], claims


def full_rank(lab: Lab) -> Result:
    """Distance of outputs from an encoder whose every matrix and bias was changed at random.

    An adapter of full or half the rank and with `bias: all` gets the SVD of the changes.
    """
    encoder = lab.encoder()[0].double()
    rank = encoder.config.hidden_size
    target = copy.deepcopy(encoder)
    torch.manual_seed(0)
    matrices = {site.weight for site in li.plan(encoder, full_config(1)).sites}
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            if name in matrices or name.endswith("bias"):
                scale = CHANGE * parameter.std() if name in matrices else 0.1
                parameter.add_(scale * torch.randn_like(parameter))
    ids = torch.randint(2, 300, (4, 16), generator=torch.Generator().manual_seed(0))

    def off(model: Any) -> float:
        with torch.no_grad():
            found, wanted = model(ids).last_hidden_state, target(ids).last_hidden_state
        return float((found - wanted).norm() / wanted.norm())

    result = {"rank": rank, "base": off(encoder)}
    for name, r in (("full", rank), ("half", rank // 2)):
        model = copy.deepcopy(encoder)
        reach(model, target, r)
        result[name] = off(model)
    return result


def full_config(rank: int) -> dict[str, Any]:
    return {"rank": rank, "alpha": rank, "targets": TARGETS["all"], "bias": "all"}


def reach(model: Any, target: Any, rank: int) -> None:
    """Inject, and set factors and biases to the nearest that the rank allows."""
    base = {name: p.detach() for name, p in model.named_parameters()}
    li.inject(model, full_config(rank))
    values = dict(target.named_parameters())
    sites = li.adapter_state(model).sites
    parameters = li.adapter_parameters(model)
    with torch.no_grad():
        for name, site in sites.items():
            D = values[f"{name}.weight"] - base[f"{name}.weight"]
            U, S, Vh = torch.linalg.svd(D, full_matrices=False)
            parameters[f"{name}.lora_A"].copy_(S[:rank, None] * Vh[:rank] / site.scale)
            parameters[f"{name}.lora_B"].copy_(U[:, :rank])
        for name in parameters.keys() & values.keys():
            parameters[name].copy_(values[name])
