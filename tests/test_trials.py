"""Trials: many runs in one, each equal to the same run alone."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.experts import MOE, expert_rule, experts
from helpers.trials import (
    BERT_TRIALS,
    Mixing,
    batches,
    by_hand,
    check_equal,
    norms_in_their_dtype,
    of_bert,
    of_llama,
    values,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from training_models import llama
from transformers import (
    BatchEncoding,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
)

import lora_inject as li
from lora_inject import Trial, Trials
from lora_inject.trials import drawing

COSINE = {"schedule": "cosine", "steps": 6}


GPT2 = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 16, "vocab_size": 31}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**GPT2))


C_ATTN = {"match": "c_attn", "slices": ["q", "k", "v"], "adapt": ["q", "v"]}
C_FC = {"rank": 3, "dropout": 0.1, "targets": ["c_fc"]}
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


def train(
    model: nn.Module, trials: dict[str, Trial], n: int, rows: dict[str, int], **options: Any
) -> Trials:
    running = Trials(model, trials, **options)
    for step in range(n):
        running.step(batches(trials, step, rows))
    return running


DORA = Trial({"rank": 2, "variant": "dora", "targets": ["o_proj", "q_proj"]}, lr=1e-2)
FOUR = {**LLAMA_TRIALS, "dora": DORA}


ALIKE = {
    f"lr {lr}": Trial({"rank": 2, "targets": ["c_attn", "c_fc"]}, lr=lr, clip=0.1, seed=i)
    for i, lr in enumerate((1e-3, 3e-3, 1e-2))
}


@pytest.mark.parametrize(
    ("make", "trials"),
    [(gpt2, GPT2_TRIALS), (of_llama, FOUR), (gpt2, ALIKE)],
    ids=["gpt2", "llama", "of one shape"],
)
@pytest.mark.parametrize("rows", [{}, {"mlp": 3, "qv": 1}], ids=["equal rows", "unequal rows"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_each_trial_equals_the_same_run_alone(make, trials, rows, checkpointing) -> None:
    together = train(in_float64(make, checkpointing), trials, 4, rows)
    for name in trials:
        alone = trained_alone(make, checkpointing, name, rows.get(name, 2))
        check_equal(together.model, alone, name)


def in_float64(make: Callable[[], Any], checkpointing: bool) -> Any:
    return in_training(make().double(), checkpointing)


def in_training(model: Any, checkpointing: bool) -> Any:
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model.train()


@cache
def trained_alone(
    make: Callable[[], Any], checkpointing: bool, name: str, n_rows: int
) -> dict[str, torch.Tensor]:
    trial = (GPT2_TRIALS | FOUR | ALIKE)[name]
    model = in_float64(make, checkpointing)
    return values(train(model, {name: trial}, 4, {name: n_rows}).model, name)


@pytest.mark.parametrize("rows", [{}, {"mlp": 3, "qv": 1}], ids=["equal rows", "unequal rows"])
@pytest.mark.parametrize(("make", "trials"), [(gpt2, GPT2_TRIALS), (of_llama, FOUR), (gpt2, ALIKE)])
def test_selective_checkpoints_change_no_trial(make, trials, rows) -> None:
    products = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    contexts = partial(create_selective_checkpoint_contexts, products)
    model = make().double().train()
    model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})
    together = train(model, trials, 4, rows)
    for name in trials:
        check_equal(together.model, trained_alone(make, False, name, rows.get(name, 2)), name)


HEADS = {
    "full": Trial({"rank": 2, "targets": ["q_proj"], "train": ["norm", "lm_head"]}, lr=1e-2),
    "low": Trial(
        {"rank": 2, "targets": [{"match": "lm_head", "dropout": 0.2}, "embed_tokens"]}, lr=1e-2
    ),
}


def of_experts(family: str, how: str) -> Any:
    model = experts(family, how)[0]
    norms_in_their_dtype(model.model)
    return model


def experts_trials(layout: str, q: str = "q_proj", v: str = "v_proj") -> dict[str, Trial]:
    stacks, router = expert_rule(layout), r"(gate|router)\.weight"
    up = {**stacks, "match": r"experts\.gate_up_proj"}
    return {
        "all": Trial({"rank": 2, "targets": [stacks, router, q, v]}, lr=1e-2, clip=0.1),
        "up": Trial({"rank": 3, "targets": [up]}, lr=3e-3, weight_decay=0.1),
        "router": Trial({"rank": 1, "targets": [q, router]}, lr=1e-2, **COSINE),
        "none": Trial({"rank": 2, "dropout": 0.2, "targets": [v]}, lr=1e-2),
        "full": Trial({"rank": 1, "targets": [stacks], "train": [router]}, lr=1e-2, seed=2),
    }


def of_mixtral() -> nn.Module:
    return of_experts("mixtral", "eager")


EXPERTS = experts_trials("out_in")
LENGTHS = {"slices": 5, "mlp": 7, "table": 6, "all": 4, "qv": 7, "pissa": 6, "more": 5}


def own_lengths(names: Any, step: int, masked: bool) -> dict[str, Any]:
    """Each trial's rows, of its own length, the first of them with padding of its own."""
    found = {}
    for name, batch in batches(names, step, {"qv": 1}).items():
        found[name] = {key: ids[:, : LENGTHS.get(name, 3)] for key, ids in batch.items()}
        if masked:
            found[name]["attention_mask"] = torch.ones_like(found[name]["input_ids"])
            found[name]["attention_mask"][0, 3:] = 0
    return found


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    ("make", "trials"),
    [
        (gpt2, GPT2_TRIALS),
        (of_llama, LLAMA_TRIALS | HEADS),
        (of_bert, BERT_TRIALS),
        (of_mixtral, EXPERTS),
    ],
    ids=["gpt2", "llama", "bert", "mixtral"],
)
def test_rows_of_unequal_lengths_give_each_trial_the_same_run_as_alone(
    make, trials, checkpointing
) -> None:
    def run(some: dict[str, Trial]) -> Trials:
        running, bert = Trials(in_float64(make, checkpointing), some), make is of_bert

        def loss(out: Any, batch: Any) -> torch.Tensor:
            wide = out.logits if bert else out.logits[..., :3].mean(1)
            return nn.functional.cross_entropy(wide, batch["labels"][:, 0] % 2)

        for step in range(4):
            rows = own_lengths(some, step, bert)
            running.step(rows, loss=loss if step % 2 or bert else None)
        return running

    def held_out(running: Trials) -> dict[str, float]:
        rows = own_lengths(running.trials, 9, make is of_bert)
        return running.evaluate(rows, loss=lambda out, _: out.logits.sum())

    together = run(trials)
    losses = held_out(together)
    for name, trial in trials.items():
        alone = run({name: trial})
        assert abs(held_out(alone)[name] - losses[name]) < 1e-11
        check_equal(together.model, alone.model, name)


def test_padding_that_changes_an_output_is_refused() -> None:
    """Without a mask; or since there are as many output tensors as rows."""
    running = Trials(of_bert().double(), BERT_TRIALS)

    def by_row(batch: Any) -> tuple[torch.Tensor, ...]:
        logits = running.model(batch["input_ids"], batch["attention_mask"]).logits
        return (logits,) * len(logits)

    for masked, forward in ((False, None), (True, by_row)):
        rows = own_lengths(BERT_TRIALS, 0, masked)
        with pytest.raises(li.StateError, match="changes the outputs of 'all'"):
            running.step(rows, forward=forward, loss=lambda out, _: out[0].sum())
        assert not any(running.n_steps.values())


def test_labels_of_another_length_than_the_tokens_of_one_trial_are_refused() -> None:
    running = Trials(of_llama(), LLAMA_TRIALS)
    rows = batches(LLAMA_TRIALS, 0, {})
    rows["qv"]["labels"] = rows["qv"]["labels"][:, 1:]
    words = r"batch of 'qv': its labels have the shape \(2, 6\), and its input_ids \(2, 7\)"
    with pytest.raises(li.StateError, match=words):
        running.step(rows)
    assert not any(running.n_steps.values())


def test_the_batches_of_a_collator_train_as_dicts_in_any_order_of_entries() -> None:
    def run(kind: Any, names: list[str]) -> dict[str, float]:
        rows = batches(LLAMA_TRIALS, 0, {})
        given = {t: {k: b[k] for k in (names if t == "qv" else sorted(b))} for t, b in rows.items()}
        return Trials(of_llama(), LLAMA_TRIALS).step({t: kind(b) for t, b in given.items()})

    assert run(BatchEncoding, ["labels", "input_ids"]) == run(dict, ["input_ids", "labels"])


def test_outputs_of_a_class_that_hides_its_tensors_are_refused() -> None:
    running = Trials(of_llama(), LLAMA_TRIALS)
    hidden = lambda b: SimpleNamespace(logits=running.model(b["input_ids"]).logits)  # noqa: E731
    with pytest.raises(li.StateError, match=r"a SimpleNamespace, in which there is no tensor"):
        running.step(batches(LLAMA_TRIALS, 0, {}), forward=hidden)
    assert not any(running.n_steps.values())


@pytest.mark.parametrize(
    ("make", "trials"),
    [(of_llama, LLAMA_TRIALS | HEADS), (gpt2, GPT2_TRIALS), (of_mixtral, EXPERTS)],
    ids=["llama", "gpt2", "mixtral"],
)
def test_packed_rows_give_each_trial_the_same_run_as_alone(make, trials) -> None:
    def run(some: dict[str, Trial], packed: bool) -> Trials:
        running = Trials(make().double().train(), some, packed=packed)
        for step in range(4):
            rows = own_lengths(some, step, False)
            if packed:
                for batch in rows.values():
                    n, length = batch["input_ids"].shape
                    batch["labels"] = batch["labels"].clone()
                    batch["labels"][:, 0] = -100
                    batch.update({key: t.reshape(1, -1) for key, t in batch.items()})
                    batch["position_ids"] = torch.arange(length).repeat(n)[None]
            running.step(
                rows,
                forward=lambda b: running.model(
                    **{k: v for k, v in b.items() if k != "labels"}, use_cache=False
                ),
            )
        return running

    together = run(trials, True)
    for name, trial in trials.items():
        check_equal(together.model, run({name: trial}, packed=False).model, name, 1e-11)


def test_packed_rows_that_meet_are_refused() -> None:
    running = Trials(of_llama(), LLAMA_TRIALS, packed=True)
    rows = {"input_ids": torch.ones(1, 4, dtype=torch.int64)}
    with pytest.raises(li.StateError, match=r"does not keep packed .*use_cache"):
        running.step(rows, loss=lambda out, _: out.logits.sum())
    with pytest.raises(li.StateError, match=r"\(2, 4\).*Packed, each is \(1, tokens, ...\)"):
        running.step(torch.ones(2, 4))


@pytest.mark.parametrize("compute", ["base", "float32"])
def test_in_16_bits_a_trial_equals_the_same_run_alone(compute) -> None:
    rules = {"rank": 2, "dropout": 0.1, "compute": compute, "targets": ["all-linear"]}
    trials = {f"lr {lr}": Trial(rules, lr=lr, seed=i) for i, lr in enumerate((1e-3, 1e-2))}
    together = train(llama(vocab=31).bfloat16().train(), trials, 3, {})
    assert len(together.losses["lr 0.001"]) == 3
    for name, trial in trials.items():
        alone = train(llama(vocab=31).bfloat16().train(), {name: trial}, 3, {})
        check_equal(together.model, alone.model, name, 0.05)


@pytest.mark.parametrize("compute", ["base", "float32"])
def test_under_autocast_a_trial_equals_the_same_run_alone(compute: str) -> None:
    all_trials = {
        name: replace(trial, config={**trial.config.to_dict(), "compute": compute})
        for name, trial in LLAMA_TRIALS.items()
    }

    def run(trials: dict[str, Trial]) -> Trials:
        model = llama(vocab=31).train()
        running = Trials(model, trials)

        def forward(batch: Any) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                return model(batch["input_ids"])

        for step in range(3):
            running.step(batches(trials, step, {}), forward=forward)
        return running

    together = run(all_trials)
    for name in ("all", "qv"):
        alone = run({name: all_trials[name]})
        check_equal(together.model, alone.model, name, 0.05)


def test_a_derivative_within_a_loss_adds_to_no_gradient() -> None:
    def run(inner: bool) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        rules = {"rank": 2, "targets": ["all-linear"]}
        running = Trials(model, {n: Trial(rules, lr=1e-2) for n in "ab"})
        x = torch.ones(2, 4, dtype=torch.float64, requires_grad=True)

        def loss(out: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
            if inner:
                torch.autograd.grad(out.sum(), batch, retain_graph=True)
            return out.square().mean()

        for _ in range(2):
            rows = {"a": x, "b": x.detach().requires_grad_()}
            running.step(rows, loss=loss, by_name=True)
        return model

    plain, penal = run(False), run(True)
    for name in "ab":
        check_equal(penal, plain, name, 0.0)


def test_a_model_that_was_moved_since_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    running = Trials(model, {"a": Trial({"rank": 1, "targets": ["0"]}, lr=1e-3)})
    model.double()
    with pytest.raises(li.StateError, match="moved, cast or sharded since the trials were made"):
        running.step(torch.ones(3, 4), loss=lambda out, _: out.double().sum())


def of_gpt2_classes() -> nn.Module:
    torch.manual_seed(0)
    return GPT2ForSequenceClassification(GPT2Config(**GPT2, num_labels=3, pad_token_id=30))


def of_llama_classes() -> nn.Module:
    config = of_llama().config
    config.num_labels, config.pad_token_id = 3, 30
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config)
    norms_in_their_dtype(model.model)
    return model


BIASES = {"rank": 1, "targets": ["c_proj"], "bias": "all", "train": ["score"]}
OF_DORA = {"rank": 2, "targets": ["c_fc"], "variant": "dora", "bias": "adapted"}
TABLE = {"rank": 2, "targets": ["c_fc", "wte"], "train": ["ln_f", "score"]}
CLASSIFIERS = {
    "gpt2": {
        "head": Trial({"rank": 2, "targets": [C_ATTN], "train": ["score"]}, lr=1e-2, clip=0.1),
        "low head": Trial({"rank": 2, "dropout": 0.2, "targets": ["score", "c_fc"]}, lr=1e-2),
        "biases": Trial(BIASES, lr=3e-3, weight_decay=0.1, seed=1),
        "of B": Trial({"rank": 2, "targets": ["c_fc"], "lora_bias": True}, lr=1e-2, **COSINE),
        "own": Trial({"rank": 3, "targets": ["c_fc"], "bias": "adapted"}, lr=1e-2),
        "dora": Trial(OF_DORA, lr=1e-2),
        "table": Trial(TABLE, lr=1e-2),
        "tables": Trial({"train": ["wte", "c_fc"]}, lr=1e-2),
    },
    "llama": {
        "head": Trial({"rank": 2, "targets": ["[qv]_proj"], "train": ["score"]}, lr=1e-2),
        "norms": Trial({"rank": 2, "targets": ["[qv]_proj"], "train": ["norm", "score"]}, lr=1e-2),
        "low head": Trial({"rank": 2, "dropout": 0.2, "targets": ["score", "o_proj"]}, lr=1e-2),
        "layers": Trial({"rank": 2, "targets": ["o_proj"], "train": ["q_proj"]}, lr=1e-2, clip=0.1),
    },
}


def classes(out: Any, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(out.logits, batch["labels"][:, 0] % 3)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("make", [of_gpt2_classes, of_llama_classes], ids=["gpt2", "llama"])
def test_trained_heads_norms_tables_and_biases_equal_a_plain_loop(make, checkpointing) -> None:
    trials = CLASSIFIERS["gpt2" if make is of_gpt2_classes else "llama"]
    running = Trials(in_float64(make, checkpointing), trials)
    data = [batches(trials, step, {"head": 1, "low head": 3}) for step in range(4)]
    for batch in data:
        running.step(batch, loss=classes)
    for name, trial in trials.items():
        alone = in_float64(make, checkpointing)
        by_hand(alone, name, trial, [batch[name] for batch in data], classes)
        check_equal(running.model, alone, name)


@pytest.mark.parametrize(
    ("family", "how", "checkpointing"),  # grouped_mm has no float64
    [(family, "eager", False) for family in ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")]
    + [("mixtral", how, False) for how in ("batched_mm", "grouped_mm")]
    + [("gpt_oss", how, True) for how in ("eager", "batched_mm", "grouped_mm")]
    + [("qwen3_moe", "batched_mm", True), ("deepseek_v3", "grouped_mm", False)],
)
def test_stacked_experts_and_their_routers_equal_a_plain_loop(family, how, checkpointing) -> None:
    deepseek = ("q_b_proj", "kv_b_proj") if family == "deepseek_v3" else ()
    trials = experts_trials(MOE[family][2], *deepseek)
    dtype, within = (torch.float32, 1e-3) if how == "grouped_mm" else (torch.float64, 1e-12)

    def model() -> Any:
        return in_training(of_experts(family, how).to(dtype), checkpointing)

    def run(some: dict[str, Trial], leave: str = "") -> Trials:
        running = Trials(model(), some)
        for step in range(4):
            if step == 2 and leave in running.trials:
                running.drop(leave)
            running.step(batches(running.trials, step, {"up": 3, "none": 1}))
        return running

    together = run(trials, "router")
    for name, trial in trials.items():
        if name == "router":
            continue
        alone = run({name: trial}).model
        if name != "none":  # which has dropout
            alone = model()
            data = [batches([name], s, {"up": 3, "none": 1})[name] for s in range(4)]
            by_hand(alone, name, trial, data, li.causal_loss)
        check_equal(together.model, alone, name, within)


def test_experts_with_nan_change_no_other_trial() -> None:
    trials = experts_trials("out_in")

    def run(some: dict[str, Trial]) -> Trials:
        running = Trials(of_experts("mixtral", "batched_mm").double(), some)
        for step in range(2):
            running.step(batches(some, step, {}))
            if "all" in some:
                for key, parameter in li.adapter_parameters(running.model, "all").items():
                    if "experts" in key:
                        parameter.data.fill_(float("nan"))
        return running

    found = run(trials)
    assert "all" in found.stopped
    others = run({name: trial for name, trial in trials.items() if name != "all"})
    for name in others.trials:
        check_equal(found.model, others.model, name)


class Products(TorchDispatchMode):
    """Counts grouped products."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += "grouped_mm" in str(func)
        return func(*args, **(kwargs or {}))


def test_grouped_products_of_experts_are_as_many_for_any_number_of_trials() -> None:
    def products(n: int) -> int:
        rules = {"rank": 2, "targets": [expert_rule("out_in")]}
        trials = {str(i): Trial(rules, lr=1e-3) for i in range(n)}
        running = Trials(of_experts("mixtral", "grouped_mm"), trials)
        running.step(batches(trials, 0, {}))
        with Products() as counted:
            running.step(batches(trials, 1, {}))
        return counted.n

    assert 0 < products(2) == products(5)


def test_a_stack_whose_tokens_are_sorted_by_expert_is_refused() -> None:
    model = experts("llama4")[0]
    with pytest.raises(li.StateError, match=r"'a': it changes .*gate_up_proj.* Llama4TextExperts"):
        Trials(model, {"a": Trial({"rank": 1, "targets": [expert_rule("in_out")]}, lr=1e-2)})
    assert not li.adapters(model)


class Images(nn.Module):
    """Convolutions, whose weights are read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.down, self.same = nn.Conv2d(3, 4, 3, stride=2), nn.Conv2d(4, 4, 3, padding=1)
        self.up, self.fc = nn.ConvTranspose2d(4, 2, 2), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.up(self.same(self.down(x)).relu()).relu().mean((2, 3)))


def test_convolutions_equal_a_plain_loop() -> None:
    trials = {
        "low": Trial({"rank": 2, "targets": ["down", "same", "up"]}, lr=1e-2, clip=0.1),
        "dora": Trial({"rank": 1, "targets": ["down", "fc"], "variant": "dora"}, lr=1e-2),
        "full": Trial({"rank": 1, "targets": ["same"], "train": ["down", "fc"]}, lr=1e-2),
        "bias": Trial({"rank": 1, "targets": ["same"], "bias": "all"}, lr=1e-2, weight_decay=0.1),
    }
    running = Trials(Images().double(), trials)
    xs = torch.randn(4, 3, 3, 7, 7, generator=torch.Generator().manual_seed(1)).double()
    for x in xs:
        running.step(x, loss=lambda out, _: (out - 1).square().mean())
    for name, trial in trials.items():
        alone = Images().double()
        by_hand(alone, name, trial, [{"x": x} for x in xs], lambda o, _: (o - 1).square().mean())
        check_equal(running.model, alone, name)


@pytest.mark.parametrize(
    ("layer", "target"),
    [(nn.LSTM(4, 4), "0.weight_ih_l0"), (nn.Bilinear(4, 4, 4), "0")],
    ids=["LSTM", "Bilinear"],
)
def test_weights_of_layers_whose_rows_cannot_run_apart_are_refused(layer, target) -> None:
    model = nn.Sequential(layer)
    with pytest.raises(li.StateError, match=f"'a': it changes '0.weight.*{type(layer).__name__}"):
        Trials(model, {"a": Trial({"rank": 1, "targets": [target]}, lr=1e-2)})
    assert not li.adapters(model)


class Branches(nn.Module):
    """A forward that leaves layers out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(4, 4).double() for _ in "abc")
        self.norm = nn.LayerNorm(4).double()
        self.calls_b = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        return self.norm(self.b(x)) if self.calls_b else x


@pytest.mark.parametrize("resumed", [False, True], ids=["in one go", "resumed"])
def test_layers_that_a_step_leaves_out_are_left_as_they_are(resumed, tmp_path: Path) -> None:
    rules = {"rank": 1, "targets": ["[abc]"], "train": ["norm"]}
    trials = {
        "decay": Trial(rules, lr=1e-2, weight_decay=0.3, clip=0.5),
        "ratio": Trial(rules, lr=1e-2, weight_decay=0.1, b_lr_ratio=4, seed=1),
    }
    calls, running = [True, False, True, False, True], Trials(Branches(), trials)
    xs = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(1)).double()
    for step, (call, x) in enumerate(zip(calls, xs, strict=True)):
        if resumed and step == 3:
            running = Trials.resume(Branches(), running.save(tmp_path / "run.pt"))
        running.model.calls_b = call
        running.step(x, loss=lambda out, x: (out - x).square().mean())
    for name, trial in trials.items():
        alone = Branches()
        data = [{"x": x} for x in xs]
        before = partial(lambda model, i: setattr(model, "calls_b", calls[i]), alone)
        by_hand(alone, name, trial, data, lambda out, b: (out - b["x"]).square().mean(), before)
        check_equal(running.model, alone, name)


def test_dropout_of_the_adapter_acts_over_a_base_in_eval_mode() -> None:
    of_eval = train(of_llama().double().eval(), {"all": LLAMA_TRIALS["all"]}, 3, {})
    of_train = train(of_llama().double().train(), {"all": LLAMA_TRIALS["all"]}, 3, {})
    check_equal(of_eval.model, of_train.model, "all", 0.0)
    assert not any(module.training for module in of_eval.model.modules())


def test_a_trial_that_diverges_is_stopped_and_changes_no_other() -> None:
    wild = dict(LLAMA_TRIALS, wild=Trial({"rank": 1, "targets": ["v_proj"]}, lr=1.0))
    model = of_llama().double()
    running = Trials(model, wild)
    for name, parameter in li.adapter_parameters(model, "wild").items():
        if "lora_B" in name:
            parameter.data.fill_(float("inf"))
    for step in range(3):
        running.step(batches(wild, step, {}))
    assert running.running == list(LLAMA_TRIALS)
    assert "loss is nan at step 0" in running.stopped["wild"]
    others = train(of_llama().double(), LLAMA_TRIALS, 3, {})
    for name in LLAMA_TRIALS:
        check_equal(model, others.model, name)
    assert "loss is nan" in running.table()


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    running = train(gpt2().train(), GPT2_TRIALS, 2, {})
    running.evaluate(batches(GPT2_TRIALS, 9, {}))
    path = running.save(tmp_path / "run.pt")
    again = Trials.resume(gpt2().train(), path)
    assert {*again.n_steps.values()} == {2}
    assert again.table() == running.table()
    for step in (2, 3):
        assert again.step(batches(GPT2_TRIALS, step, {})) == running.step(
            batches(GPT2_TRIALS, step, {})
        )
    for name in GPT2_TRIALS:
        check_equal(again.model, running.model, name, 0.0)
    other = gpt2()
    with torch.no_grad():
        other.transformer.h[0].attn.c_attn.weight.add_(1.0)
    with pytest.raises(li.FormatError, match="other values"):
        Trials.resume(other, path)
    assert not li.adapters(other)


def test_groups_of_few_tokens_give_the_same_run() -> None:
    whole = train(of_llama().double(), LLAMA_TRIALS, 2, {})
    grouped = Trials(of_llama().double(), LLAMA_TRIALS, max_tokens=20)
    for step in range(2):
        grouped.step(batches(LLAMA_TRIALS, step, {}))
    for name in LLAMA_TRIALS:
        check_equal(grouped.model, whole.model, name)


def test_the_best_is_the_least_held_out_loss_and_a_dropped_trial_leaves_nothing() -> None:
    model = of_llama()
    plain = {key: value.clone() for key, value in model.state_dict().items()}
    running = train(model, LLAMA_TRIALS, 2, {})
    with pytest.raises(li.StateError, match="evaluate"):
        running.best()
    losses = running.evaluate(batches(LLAMA_TRIALS, 5, {})["qv"])
    assert running.best() == min(losses, key=losses.get)
    running.drop("qv")
    assert list(li.adapters(model)) == ["all", "pissa"]
    running.step(batches(["all", "pissa"], 3, {}))
    for name in ("all", "pissa"):
        running.drop(name)
    assert model.state_dict().keys() == plain.keys()
    assert all(torch.equal(model.state_dict()[key], plain[key]) for key in plain)
    with pytest.raises(li.StateError, match="no trial is running"):
        running.step(batches(["all"], 3, {}))


FC = {"rank": 1, "targets": ["fc"]}


@pytest.mark.parametrize(
    ("make", "batch", "message"),
    [
        (Mixing, torch.ones(2, 4), "the rows of 'a' change the outputs of 'b'"),
        (
            lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4)),
            torch.ones(2, 4),
            "draws random numbers",
        ),
        (Mixing, {"a": (torch.ones(2, 4),)}, "there is no batch for 'b'"),
        (Mixing, {"typo": (torch.ones(2, 4),)}, "there is no trial 'typo'"),
        (Mixing, {n: (torch.ones(2, w),) for n, w in (("a", 4), ("b", 5))}, "4, 5 features"),
        (Mixing, (torch.ones(2, 4), torch.ones(3, 4)), r"its tensors have \[2, 3\] rows"),
    ],
)
def test_what_would_leak_or_does_not_fit_is_refused_before_a_step(make, batch, message) -> None:
    model = make().train()
    running = Trials(model, {n: Trial(FC | {"targets": ["all-linear"]}, lr=1e-2) for n in "ab"})
    before = {n: values(model, n) for n in "ab"}
    with pytest.raises(li.StateError, match=message):
        running.step(batch, loss=lambda out, _: out.sum())
    assert not any(running.n_steps.values())
    for name in "ab":
        check_equal(model, before[name], name, 0.0)


def test_a_base_that_draws_from_its_devices_own_generator_is_refused(monkeypatch) -> None:
    own = torch.Generator()

    class Noisy(Mixing):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x) + torch.rand(4, generator=own)

    monkeypatch.setattr(drawing, "generators_of", lambda _: [torch.default_generator, own])
    running = Trials(Noisy().train(), {n: Trial(FC, lr=1e-2) for n in "ab"})
    before = own.get_state()
    with pytest.raises(li.StateError, match="draws random numbers"):
        running.step(torch.ones(2, 4), loss=lambda out, _: out.sum())
    assert torch.equal(own.get_state(), before)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda out, b: 1.0, "loss of trial 'a': it is a float. Return a scalar tensor"),
        (lambda out, b: out[:, 0], r"it has the shape \(3,\). Return its mean"),
        (lambda out, b: out.detach().sum(), "no gradient leads from it to A and B"),
    ],
)
def test_a_loss_that_is_not_a_scalar_with_a_gradient_is_refused(loss, message) -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    trials = Trials(net, {"a": Trial({"rank": 1, "targets": ["0"]}, lr=1e-3)})
    with pytest.raises(li.StateError, match=message):
        trials.step(torch.ones(3, 4), forward=net, loss=loss)
    with pytest.raises(li.StateError, match=r"its tensors have \[0\] rows"):
        trials.step(torch.ones(0, 4), forward=net, loss=loss)


def test_a_mean_over_the_batch_is_refused() -> None:
    model = of_llama()
    running = Trials(model, LLAMA_TRIALS)
    with pytest.raises(li.StateError, match="a mean over the batch would mix the trials"):
        running.step(batches(LLAMA_TRIALS, 0, {}), forward=lambda batch: model(**batch))


@pytest.mark.parametrize(
    ("trials", "error"),
    [
        ({}, "no trial is given"),
        ({"a": Trial(FC, lr=1e-2), "b": Trial({"targets": ["fd"]}, lr=1e-2)}, "matched none"),
    ],
)
def test_trials_that_cannot_run_leave_nothing_behind(trials, error) -> None:
    model = Mixing()
    with pytest.raises(li.LoraInjectError, match=error):
        Trials(model, trials)
    assert list(model.state_dict()) == list(Mixing().state_dict())
    assert type(model.fc) is nn.Linear


@pytest.mark.parametrize(
    "settings", [{"lr": 0}, {"lr": 1, "clip": -1}, {"lr": 1, "schedule": "cosine"}]
)
def test_settings_out_of_range_are_refused(settings) -> None:
    with pytest.raises(li.ConfigError, match="Trial"):
        Trial(FC, **settings)


def test_advice_is_the_largest_rank_that_fits_and_says_what_fits_below_one() -> None:
    with torch.device("meta"):
        model = of_llama()
    one = li.plan(model, {"rank": 1, "targets": ["all-linear"]}).n_lora
    config = li.advise(model, 3 * one + one // 2)
    assert (config.rank, config.alpha) == (3, 32.0)
    assert config.expect == li.Expect(sites=14, lora=3 * one)
    assert li.plan(model, config).n_lora == 3 * one
    with pytest.raises(li.MatchError, match=r"there is no rule for less.*layers\.\*\.self_attn"):
        li.advise(model, one - 1)
    assert li.advise(model, 10**12).rank == 16


@pytest.mark.parametrize(("purpose", "rank"), [("sft", 256), ("rl", 32), ("classify", 16)])
def test_advice_ends_at_the_rank_that_helps_a_purpose(purpose: str, rank: int) -> None:
    model = nn.Sequential(nn.Linear(512, 512, device="meta"))
    config = li.advise(model, 10**9, purpose=purpose)  # type: ignore[arg-type]
    assert (config.rank, config.alpha) == (rank, 32.0)
    with pytest.raises(li.ConfigError, match=r"no purpose 'rI'\. .*(rl|sft)"):
        li.advise(model, 10**9, purpose="rI")  # type: ignore[arg-type]
