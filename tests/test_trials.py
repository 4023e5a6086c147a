"""Trials: many runs in one, each equal to a plain training loop of its adapter alone."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers.experts import expert_rule, experts
from helpers.trials import (
    BERT_TRIALS,
    batches,
    by_hand,
    check_each,
    check_equal,
    norms_in_their_dtype,
    of_bert,
    of_llama,
    values,
)
from torch import Tensor, nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from training_models import llama
from transformers import BatchEncoding, GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

import lora_inject as li
from lora_inject import Trial, Trials

GPT2 = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 16, "vocab_size": 31}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def gpt2(cls: Any = GPT2LMHeadModel) -> nn.Module:
    torch.manual_seed(0)
    return cls(GPT2Config(**GPT2, num_labels=3, pad_token_id=30))


def of_experts(family: str = "mixtral", how: str = "eager") -> Any:
    model = experts(family, how)[0]
    norms_in_their_dtype(model.model)
    return model


def classes(out: Any, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(out.logits, batch["labels"][:, 0] % 3)


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    trials: dict[str, Trial]
    loss: Any = None


COSINE = {"schedule": "cosine", "steps": 6}
C_ATTN = {"match": "c_attn", "slices": ["q", "k", "v"], "adapt": ["q", "v"]}
C_FC = {"rank": 3, "dropout": 0.1, "targets": ["c_fc"]}
BIASES = {"rank": 1, "targets": ["c_proj"], "bias": "all", "train": ["score"]}
OF_DORA = {"rank": 2, "targets": ["c_fc"], "variant": "dora", "bias": "adapted"}
TABLE = {"rank": 2, "targets": ["c_fc", "wte"], "train": ["ln_f", "score"]}
GPT2_TRIALS = {
    "slices": Trial({"rank": 2, "dropout": 0.3, "targets": [C_ATTN]}, lr=1e-2, clip=0.05),
    "mlp": Trial(C_FC, lr=3e-3, weight_decay=0.1, seed=1),
    "table": Trial({"rank": 1, "targets": ["wte", "c_proj"]}, lr=1e-2, b_lr_ratio=4, **COSINE),
    "tied": Trial({"rank": 1, "targets": ["c_fc"], "train": ["wte"]}, lr=1e-2),
}
LLAMA_TRIALS = {
    "all": Trial({"rank": 2, "dropout": 0.05, "targets": ["all-linear"]}, lr=1e-2, **COSINE),
    "qv": Trial({"rank": 4, "scaling": "rslora", "targets": ["[qv]_proj"]}, lr=2e-2, warmup=2),
    "pissa": Trial({"rank": 2, "init": "pissa", "targets": ["q_proj", "down_proj"]}, lr=1e-3),
}
DORA = Trial({"rank": 2, "variant": "dora", "targets": ["o_proj", "q_proj"]}, lr=1e-2)
LOW_HEAD = {"match": "lm_head", "dropout": 0.2}
HEADS = {
    "full": Trial({"rank": 2, "targets": ["q_proj"], "train": ["norm", "lm_head"]}, lr=1e-2),
    "low": Trial({"rank": 2, "targets": [LOW_HEAD, "embed_tokens"]}, lr=1e-2),
    "layers": Trial({"rank": 2, "targets": ["o_proj"], "train": ["q_proj"]}, lr=1e-2, clip=0.1),
}
ALIKE = {
    f"lr {lr}": Trial({"rank": 2, "targets": ["c_attn", "c_fc"]}, lr=lr, clip=0.1, seed=i)
    for i, lr in enumerate((1e-3, 3e-3, 1e-2))
}
GPT2_CLASSES = {
    "head": Trial({"rank": 2, "targets": [C_ATTN], "train": ["score"]}, lr=1e-2, clip=0.1),
    "low head": Trial({"rank": 2, "dropout": 0.2, "targets": ["score", "c_fc"]}, lr=1e-2),
    "biases": Trial(BIASES, lr=3e-3, weight_decay=0.1, seed=1),
    "of B": Trial({"rank": 2, "targets": ["c_fc"], "lora_bias": True}, lr=1e-2, **COSINE),
    "own": Trial({"rank": 3, "targets": ["c_fc"], "bias": "adapted"}, lr=1e-2),
    "dora": Trial(OF_DORA, lr=1e-2),
    "table": Trial(TABLE, lr=1e-2),
    "tables": Trial({"train": ["wte", "c_fc"]}, lr=1e-2),
}
CASES = {
    "gpt2": Case(gpt2, GPT2_TRIALS),
    "llama": Case(of_llama, LLAMA_TRIALS | HEADS | {"dora": DORA}),
    "of one shape": Case(gpt2, ALIKE),
    "heads, biases and tables": Case(
        partial(gpt2, GPT2ForSequenceClassification), GPT2_CLASSES, classes
    ),
}
PRODUCTS = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
SELECTIVE = partial(create_selective_checkpoint_contexts, PRODUCTS)
CHECKPOINTS = {
    "kept": {},
    "recomputed": {"use_reentrant": False},
    "selective": {"use_reentrant": False, "context_fn": SELECTIVE},
    "reentrant": {"use_reentrant": True},
}


def in_float64(make: Callable[[], Any], checkpoints: str = "kept") -> Any:
    model = make().double().train()
    if how := CHECKPOINTS[checkpoints]:
        model.activation_checkpointing_enable(how)
        model.enable_input_require_grads()
    return model


def train(model: nn.Module, trials: dict[str, Trial], n: int) -> Trials:
    running = Trials(model, trials)
    for step in range(n):
        running.step(batches(trials, step, {}))
    return running


@cache
def alone(case: str, name: str, n_rows: int) -> dict[str, Tensor]:
    make, trials, loss = CASES[case]
    model = in_float64(make)
    data = [batches([name], step, {name: n_rows})[name] for step in range(4)]
    by_hand(model, name, trials[name], data, loss)
    return values(model, name)


UNEQUAL = {"mlp": 3, "qv": 1, "lr 0.001": 1, "head": 1, "low head": 3}


@pytest.mark.parametrize("rows", [{}, UNEQUAL], ids=["equal rows", "unequal rows"])
@pytest.mark.parametrize("checkpoints", CHECKPOINTS)
@pytest.mark.parametrize("case", CASES)
def test_each_trial_equals_a_plain_loop(case: str, checkpoints: str, rows: dict[str, int]) -> None:
    make, trials, loss = CASES[case]
    running = Trials(in_float64(make, checkpoints), trials)
    for step in range(4):
        running.step(batches(trials, step, rows), loss=loss)
    for name in trials:
        check_equal(running.model, alone(case, name, rows.get(name, 2)), name)


def of_a_layout(layout: str, q: str = "q_proj", v: str = "v_proj") -> dict[str, Trial]:
    stacks, router = expert_rule(layout), r"(gate|router)\.weight"
    up = {**stacks, "match": r"experts\.gate_up_proj"}
    return {
        "all": Trial({"rank": 2, "targets": [stacks, router, q, v]}, lr=1e-2, clip=0.1),
        "up": Trial({"rank": 3, "targets": [up]}, lr=3e-3, weight_decay=0.1),
        "router": Trial({"rank": 1, "targets": [q, router]}, lr=1e-2, **COSINE),
        "none": Trial({"rank": 2, "dropout": 0.2, "targets": [v]}, lr=1e-2),
        "full": Trial({"rank": 1, "targets": [stacks], "train": [router]}, lr=1e-2, seed=2),
    }


@pytest.mark.parametrize(
    ("family", "how", "checkpoints"),  # grouped_mm has no float64
    [(family, "eager", "kept") for family in ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")]
    + [("mixtral", how, "kept") for how in ("batched_mm", "grouped_mm")]
    + [("gpt_oss", how, "recomputed") for how in ("eager", "batched_mm", "grouped_mm")]
    + [("qwen3_moe", "batched_mm", "recomputed"), ("deepseek_v3", "grouped_mm", "kept")],
)
def test_stacked_experts_and_their_routers_equal_a_plain_loop(family, how, checkpoints) -> None:
    latent = ("q_b_proj", "kv_b_proj") if family == "deepseek_v3" else ()
    trials, rows = of_a_layout(experts(family)[1], *latent), {"up": 3, "none": 1}
    dtype, within = (torch.float32, 1e-3) if how == "grouped_mm" else (torch.float64, 1e-12)

    def model() -> Any:
        return in_float64(partial(of_experts, family, how), checkpoints).to(dtype)

    running = Trials(model(), trials)
    for step in range(4):
        if step == 2:
            running.drop("router")
        running.step(batches(running.trials, step, rows))
    for name in running.trials:
        plain = model()
        data = [batches([name], step, rows)[name] for step in range(4)]
        by_hand(plain, name, trials[name], data, None)
        check_equal(running.model, plain, name, within)


class Images(nn.Module):
    """Convolutions and another weight that is read; they drop nothing in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.down, self.same = nn.Conv2d(3, 4, 3, stride=2), nn.Conv2d(4, 4, 3, padding=1)
        self.up, self.fc = nn.ConvTranspose2d(4, 2, 2), nn.Linear(2, 2)
        self.last = Own()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.fc(self.up(self.same(self.down(x)).relu()).relu().mean((2, 3))))


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5, self.training) @ self.weight


READ = {
    "low": Trial({"rank": 2, "targets": ["down", "same", "up"]}, lr=1e-2, clip=0.1),
    "dora": Trial({"rank": 1, "targets": ["down", "fc"], "variant": "dora"}, lr=1e-2),
    "full": Trial({"rank": 1, "targets": ["same"], "train": ["down", "fc"]}, lr=1e-2),
    "bias": Trial({"rank": 1, "targets": ["same"], "bias": "all"}, lr=1e-2, weight_decay=0.1),
    "own": Trial({"rank": 1, "targets": [r"last\.weight", "fc"]}, lr=1e-2, seed=1),
}


def square(out: Tensor, _: Any = None) -> Tensor:
    return (out - 1).square().mean()


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).double()


def test_weights_that_are_read_equal_a_plain_loop() -> None:
    xs = noise(4, 3, 3, 7, 7)
    running = Trials(Images().double().eval(), READ)
    for x in xs:
        running.step(x, loss=square)
    for name, trial in READ.items():
        plain = Images().double().eval()
        by_hand(plain, name, trial, [{"x": x} for x in xs], square)
        check_equal(running.model, plain, name)


LENGTHS = {"slices": 5, "mlp": 7, "table": 6, "all": 4, "qv": 7, "pissa": 6, "more": 5}
OF_LENGTHS = {
    "gpt2": Case(gpt2, GPT2_TRIALS),
    "llama": Case(of_llama, LLAMA_TRIALS | HEADS),
    "experts": Case(of_experts, of_a_layout("out_in")),
    "bert": Case(of_bert, BERT_TRIALS),
}
WAYS = ("padded", "padded and recomputed", "packed")


def own_lengths(names: Any, step: int, masked: bool = False) -> dict[str, Any]:
    """Each trial's rows, of its own length, the first of them with padding of its own."""
    rows = {}
    for name, batch in batches(names, step, {"qv": 1}).items():
        rows[name] = {key: ids[:, : LENGTHS.get(name, 3)] for key, ids in batch.items()}
        if masked:
            rows[name]["attention_mask"] = torch.ones_like(rows[name]["input_ids"])
            rows[name]["attention_mask"][0, 3:] = 0
    return rows


def packed(rows: dict[str, Any]) -> dict[str, Any]:
    """The rows of each trial one after the other; no label crosses from one to the next."""
    for batch in rows.values():
        n, length = batch["input_ids"].shape
        batch["labels"] = batch["labels"].clone()
        batch["labels"][:, 0] = -100
        batch.update({key: t.reshape(1, -1) for key, t in batch.items()})
        batch["position_ids"] = torch.arange(length).repeat(n)[None]
    return rows


def without_labels(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    return model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False)


def of_a_row(out: Any, batch: Any) -> Tensor:
    wide = out.logits if out.logits.dim() == 2 else out.logits[..., :3].mean(1)
    return nn.functional.cross_entropy(wide, batch["labels"][:, 0] % 2)


@pytest.mark.parametrize(
    ("case", "way"),
    [(case, way) for case in OF_LENGTHS for way in WAYS if (case, way) != ("bert", "packed")],
)
def test_rows_of_unequal_lengths_give_each_trial_the_same_run_as_alone(case, way) -> None:
    bert = case == "bert"  # which has masks, and no loss of the next token
    make, trials, _ = OF_LENGTHS[case]

    def run(some: dict[str, Trial]) -> Trials:
        is_packed = way == "packed" and len(some) > 1
        model = in_float64(make, "recomputed" if "recomputed" in way else "kept")
        running = Trials(model, some, packed=is_packed)
        forward = None if bert else partial(without_labels, model)
        for step in range(4):
            rows = own_lengths(some, step, bert)
            loss = of_a_row if bert or (step % 2 and way != "packed") else None
            running.step(packed(rows) if is_packed else rows, forward=forward, loss=loss)
        return running

    check_each(run, trials, 1e-11 if way == "packed" else 1e-12)


class Channels(nn.Module):
    def __init__(self, stride: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.stride = nn.Linear(4, 4).double(), stride

    def forward(self, x: Tensor) -> tuple[int, Tensor]:
        return 7, self.fc(x).mT[..., :: self.stride]


def test_outputs_are_without_padding_in_any_dimension() -> None:
    trials = {n: Trial({"rank": 1, "targets": ["fc"]}, lr=1e-2, seed=ord(n)) for n in "ab"}

    def run(some: dict[str, Trial], stride: int = 1) -> Trials:
        running = Trials(Channels(stride), some)
        for x in noise(4, 1, 3, 4):
            rows = {name: x[:, : 2 + (name == "a")] for name in some}
            running.step(rows, loss=lambda out, _: square(out[1]), by_name=True)
        return running

    check_each(run, trials)
    with pytest.raises(li.StateError, match="padding to one length changes the outputs of 'b'"):
        run(trials, stride=2)


@pytest.mark.parametrize("compute", ["base", "float32"])
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bfloat16"])
def test_in_16_bits_a_trial_equals_the_same_run_alone(autocast: bool, compute: str) -> None:
    trials = {
        name: replace(trial, config={**trial.config.to_dict(), "compute": compute})
        for name, trial in LLAMA_TRIALS.items()
        if name != "pissa"
    }

    def run(some: dict[str, Trial]) -> Trials:
        model = llama(vocab=31).train()
        running = Trials(model if autocast else model.bfloat16(), some)

        def forward(batch: Any) -> Any:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return model(batch["input_ids"])

        for step in range(3):
            running.step(batches(some, step, {}), forward=forward)
        return running

    check_each(run, trials, 0.05)


class Heads(nn.Module):
    """Two heads on one trunk, of which it may leave one out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.one, self.two = (nn.Linear(4, 4).double() for _ in range(3))
        self.norm, self.calls_two = nn.LayerNorm(4).double(), True

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.fc(x)
        return (self.one(x), self.norm(self.two(x))) if self.calls_two else (self.one(x),)


RULES = {"rank": 1, "targets": ["fc|one|two"], "train": ["norm"]}
BRANCHES = {"one": [0] * 4, "two": [1] * 4, "both": [2] * 4, "in turn": [0, 1, 1, 0]}
BRANCHES |= {"own": [4, 4, 3, 4]}


def by_branch(model: nn.Module, name: str, branch: int, out: Any) -> Tensor:
    """The loss of one head or of both, or a term of the trial's own adapter alone, or with one."""
    own = sum(p.square().sum() for p in li.adapter_parameters(model, name).values())
    terms = [square(out[0]), square(out[1]), square(out[0]) + square(out[1]), own]
    return [*terms, square(out[0]) + own][branch]


@pytest.mark.parametrize("max_tokens", [None, 1], ids=["at once", "in turn"])
def test_a_loss_that_branches_by_trial_leaves_other_branches_as_they_are(max_tokens) -> None:
    trials = {
        name: Trial(RULES, lr=1e-2, weight_decay=0.3, clip=0.5, b_lr_ratio=1 + i % 2, seed=i)
        for i, name in enumerate(BRANCHES)
    }
    running, xs, names = Trials(Heads(), trials, max_tokens=max_tokens), noise(4, 3, 4), [*trials]
    for step, x in enumerate(xs):
        rows = {n: {"x": x, "of": torch.full((3,), i)} for i, n in enumerate(names)}

        def loss(out: Any, batch: Any, step: int = step) -> Tensor:
            name = names[batch["of"][0]]
            return by_branch(running.model, name, BRANCHES[name][step], out)

        running.step(rows, forward=lambda b: running.model(b["x"]), loss=loss)
    for name, trial in trials.items():
        plain, branches = Heads(), iter(BRANCHES[name])
        of_step = lambda out, _, m=plain, n=name, b=branches: by_branch(m, n, next(b), out)  # noqa: E731
        by_hand(plain, name, trial, [{"x": x} for x in xs], of_step)
        check_equal(running.model, plain, name, 1e-11)


def of_all_heads(out: Any, _: Any) -> Tensor:
    return square(torch.cat(out))


@pytest.mark.parametrize("resumed", [False, True], ids=["in one go", "resumed"])
def test_layers_that_a_step_leaves_out_are_left_as_they_are(resumed, tmp_path: Path) -> None:
    trials = {
        "decay": Trial(RULES, lr=1e-2, weight_decay=0.3, clip=0.5),
        "ratio": Trial(RULES, lr=1e-2, weight_decay=0.1, b_lr_ratio=4, seed=1),
    }
    calls, running, xs = [True, False, True, False, True], Trials(Heads(), trials), noise(5, 3, 4)
    for step, x in enumerate(xs):
        if resumed and step == 3:
            running = Trials.resume(Heads(), running.save(tmp_path / "run.pt"))
        running.model.calls_two = calls[step]
        running.step(x, loss=of_all_heads)
    for name, trial in trials.items():
        plain = Heads()
        before = lambda step, model=plain: setattr(model, "calls_two", calls[step])  # noqa: E731
        by_hand(plain, name, trial, [{"x": x} for x in xs], of_all_heads, before)
        check_equal(running.model, plain, name)


def test_a_derivative_within_a_loss_adds_to_no_gradient() -> None:
    models = []
    for inner in (False, True):
        running = Trials(Heads(), {n: Trial(RULES, lr=1e-2) for n in "ab"})
        rows = {n: torch.ones(2, 4, dtype=torch.float64, requires_grad=True) for n in "ab"}

        def loss(out: Any, batch: Tensor, inner: bool = inner) -> Tensor:
            if inner:
                torch.autograd.grad(out[0].sum(), batch, retain_graph=True)
            return of_all_heads(out, batch)

        for _ in range(2):
            running.step(rows, loss=loss, by_name=True)
        models.append(running.model)
    for name in "ab":
        check_equal(models[0], models[1], name, 0.0)


def test_a_base_in_eval_mode_and_gradients_that_are_set_to_none_change_no_run() -> None:
    """Dropout of an adapter acts in any mode of the base."""
    trials = LLAMA_TRIALS | HEADS | {"dora": DORA}
    plain = train(of_llama().double().train(), trials, 3)
    running = Trials(of_llama().double().eval(), trials)
    for step in range(3):
        running.step(batches(trials, step, {}))
        running.model.zero_grad(set_to_none=True)
    for name in trials:
        check_equal(running.model, plain.model, name, 0.0)
    assert not any(module.training for module in running.model.modules())


def test_the_batches_of_a_collator_train_as_dicts_in_any_order_of_entries() -> None:
    def run(kind: Any, names: list[str]) -> dict[str, float]:
        rows = batches(LLAMA_TRIALS, 0, {})
        given = {t: {k: b[k] for k in (names if t == "qv" else sorted(b))} for t, b in rows.items()}
        return Trials(of_llama(), LLAMA_TRIALS).step({t: kind(b) for t, b in given.items()})

    assert run(BatchEncoding, ["labels", "input_ids"]) == run(dict, ["input_ids", "labels"])


def test_a_forward_may_change_the_batch_that_it_gets() -> None:
    model, data = nn.Sequential(nn.Linear(4, 4)), {"x": torch.ones(3, 4)}
    running = Trials(model, {n: Trial({"targets": ["0"]}, lr=1e-2) for n in "ab"})
    for _ in range(2):
        running.step(data, forward=lambda batch: model(batch.pop("x").mul_(2)), loss=square)
    assert torch.equal(data["x"], torch.ones(3, 4))


QV = {"rank": 2, "dropout": 0.2, "targets": ["[qv]_proj"]}
LOW = {n: Trial(QV, lr=1e-2, seed=ord(n)) for n in "abc"}


@pytest.mark.parametrize("where", ["forward", "gradient"])
@pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "rows"])
@pytest.mark.parametrize("make", [of_llama, partial(of_experts, how="batched_mm")])
def test_a_trial_with_nan_is_stopped_and_changes_no_other(make, is_packed, where) -> None:
    stacks = Trial({"rank": 2, "targets": [expert_rule("out_in")]}, lr=1e-2)
    trials = LOW if make is of_llama else {**LOW, "a": stacks, "b": stacks}

    def run(some: dict[str, Trial]) -> Trials:
        running = Trials(in_float64(make), some, packed=is_packed)

        def loss(out: Any, batch: Any) -> Tensor:
            wild = where == "gradient" and int(batch["labels"][0, 0]) == 7
            zero = (out.logits - out.logits.detach()).square().sum()
            return li.causal_loss(out, batch) + (zero.sqrt() if wild else 0)

        for step in range(3):
            rows = batches(running.running, step, {})
            rows = packed(rows) if is_packed else rows
            if "b" in rows and step == 1:
                rows["b"]["labels"] = rows["b"]["labels"].clone()
                rows["b"]["labels"][0, 0] = 7
                spoilt = li.adapter_parameters(running.model, "b").values()
                for parameter in spoilt if where == "forward" else ():
                    parameter.data.fill_(float("nan"))
            running.step(rows, forward=partial(without_labels, running.model), loss=loss)
        return running

    together = run(trials)
    assert list(together.stopped) == ["b"]
    assert where == "gradient" or "loss is nan at step 1" in together.stopped["b"]
    assert together.stopped["b"] in together.table()
    for name in "ac":
        check_equal(together.model, run({name: trials[name]}).model, name, 1e-11)


def test_a_killed_run_goes_on_bit_for_bit_without_the_trial_that_was_dropped(tmp_path) -> None:
    running = Trials(gpt2().train(), GPT2_TRIALS)
    running.step(batches(GPT2_TRIALS, 0, {}))
    running.drop("mlp")
    running.step(batches(running.trials, 1, {}))
    running.evaluate(batches(running.trials, 9, {}))
    path = running.save(tmp_path / "run.pt")
    again = Trials.resume(gpt2().train(), path)
    assert {*again.n_steps.values()} == {2}
    assert again.table() == running.table()
    for step in (2, 3):
        rows = batches(running.trials, step, {})
        assert again.step(rows) == running.step(rows)
    for name in running.trials:
        check_equal(again.model, running.model, name, 0.0)


def test_the_best_is_the_least_held_out_loss_and_a_dropped_trial_leaves_nothing() -> None:
    model = of_llama()
    plain = {key: value.clone() for key, value in model.state_dict().items()}
    running = train(model, LLAMA_TRIALS, 2)
    with pytest.raises(li.StateError, match="evaluate"):
        running.best()
    losses = running.evaluate(batches(LLAMA_TRIALS, 5, {})["qv"])
    assert running.best() == min(losses, key=losses.get)
    running.drop("qv")
    running.step(batches(["all", "pissa"], 3, {}))
    for name in ("all", "pissa"):
        running.drop(name)
    assert model.state_dict().keys() == plain.keys()
    assert all(torch.equal(model.state_dict()[key], plain[key]) for key in plain)
    with pytest.raises(li.StateError, match="no trial is running"):
        running.step(batches(["all"], 3, {}))


def test_advice_is_the_largest_rank_that_fits_and_helps_its_purpose() -> None:
    with torch.device("meta"):
        model, wide = of_llama(), nn.Sequential(nn.Linear(512, 512))
    one = li.plan(model, {"rank": 1, "targets": ["all-linear"]}).n_lora
    config = li.advise(model, 3 * one + one // 2)
    assert (config.rank, config.alpha) == (3, 32.0)
    assert config.expect == li.Expect(sites=14, lora=3 * one)
    with pytest.raises(li.MatchError, match=r"there is no rule for less.*layers\.\*\.self_attn"):
        li.advise(model, one - 1)
    for purpose, rank in (("sft", 256), ("rl", 32), ("classify", 16)):
        assert li.advise(wide, 10**9, purpose=purpose).rank == rank  # type: ignore[arg-type]
