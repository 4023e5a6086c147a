"""Trials: many runs in one, each equal to a plain training loop of its adapter alone."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers.architectures import ARCHITECTURES
from helpers.experts import TURNED, expert_rule, experts
from helpers.models import tiny, tiny_llama
from helpers.modules import Picking, of_signs
from helpers.refusals import refused
from helpers.trials import (
    BERT_TRIALS,
    Forward,
    Loss,
    batches,
    check_each,
    check_equal,
    norms_in_their_dtype,
    of_bert,
    of_llama,
    plain_loop,
    square,
    values,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import BatchEncoding, GPT2ForSequenceClassification, GPT2LMHeadModel

import lora_inject as li
from lora_inject import Trial, Trials

pytestmark = pytest.mark.recent


class Run(NamedTuple):
    """What trials do together, and a plain loop with each of them alone."""

    make: Callable[[], nn.Module]
    trials: Mapping[str, Trial]
    data: Callable[[Iterable[str], int], dict[str, Any]]
    """The batch of each of these trials at a step."""
    loss: Loss | None = None
    forward: Forward | None = None
    plain: Callable[[], nn.Module] | None = None
    """The model of a plain loop, where it is another."""
    before: Callable[[Any, int], object] = lambda model, step: None
    options: Mapping[str, Any] = {}
    n_steps: int = 4
    within: float = 1e-12

    def how(self, model: nn.Module) -> dict[str, Any]:
        """What trials on a model are given besides: its forward and its loss."""
        given = {"forward": self.forward, "loss": self.loss}
        return {key: each and partial(each, model) for key, each in given.items()}


def hold(run: Run, stop_at: int = 0, folder: Path | None = None) -> None:
    """Train together, save and resume before one of the steps, and compare with plain loops."""
    model = run.make()
    running = Trials(model, run.trials, **run.how(model), **run.options)
    for step in range(run.n_steps):
        if stop_at and step == stop_at:
            model = run.make()
            path = running.save(folder / "run.pt")
            running = Trials.resume(model, path, **run.how(model))
        run.before(model, step)
        running.step(run.data(running.trials, step))
    for name, trial in run.trials.items():
        plain = (run.plain or run.make)()
        steps = [[run.data([name], step)[name]] for step in range(run.n_steps)]
        plain_loop(plain, name, trial, steps, run.loss, run.forward, run.before)
        check_equal(running.model, plain, name, run.within)


# ------------------------------------------------------------------------ models and their trials


def gpt2(cls: Any = GPT2LMHeadModel) -> Any:
    return tiny(cls, vocab_size=31, num_labels=3, pad_token_id=30)


def of_experts(family: str = "mixtral", how: str = "eager") -> Any:
    model = experts(family, how)[0]
    norms_in_their_dtype(model.model)
    return model


def of_a_class(_: nn.Module, out: Any, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(out.logits, batch["labels"][:, 0] % 3)


COSINE = {"schedule": "cosine", "steps": 6}
C_ATTN = {"match": "c_attn", "slices": ["q", "k", "v"], "adapt": ["q", "v"]}
GPT2_TRIALS = {
    "slices": Trial({"rank": 2, "dropout": 0.3, "targets": [C_ATTN]}, lr=1e-2, clip=0.05),
    "mlp": Trial(
        {"rank": 3, "dropout": 0.1, "targets": ["c_fc"]}, lr=3e-3, weight_decay=0.1, seed=1
    ),
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
BIASES = {"rank": 1, "targets": ["c_proj"], "bias": "all", "train": ["score"]}
OF_DORA = {"rank": 2, "targets": ["c_fc"], "variant": "dora", "bias": "adapted"}
TABLE = {"rank": 2, "targets": ["c_fc", "wte"], "train": ["ln_f", "score"]}
CLASSES = {
    "head": Trial({"rank": 2, "targets": [C_ATTN], "train": ["score"]}, lr=1e-2, clip=0.1),
    "low head": Trial({"rank": 2, "dropout": 0.2, "targets": ["score", "c_fc"]}, lr=1e-2),
    "biases": Trial(BIASES, lr=3e-3, weight_decay=0.1, seed=1),
    "own": Trial({"rank": 3, "targets": ["c_fc"], "bias": "adapted"}, lr=1e-2),
    "dora": Trial(OF_DORA, lr=1e-2),
    "dora dropped": Trial({**OF_DORA, "dropout": 0.3}, lr=1e-2, seed=4),
    "table": Trial(TABLE, lr=1e-2),
    "tables": Trial({"train": ["wte", "c_fc"]}, lr=1e-2),
}


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


ROWS = {"mlp": 3, "qv": 1, "lr 0.001": 1, "head": 1, "low head": 3, "up": 3, "none": 1}
UNEVEN = partial(batches, rows=ROWS)
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Trial], Loss | None]] = {
    "gpt2": (gpt2, GPT2_TRIALS, None),
    "llama": (of_llama, LLAMA_TRIALS | HEADS | {"dora": DORA}, None),
    "of one shape": (gpt2, ALIKE, None),
    "heads, biases and tables": (
        partial(gpt2, GPT2ForSequenceClassification), CLASSES, of_a_class,
    ),
}  # fmt: skip
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


def of_a_case(case: str, how: str = "kept", data: Any = UNEVEN) -> Run:
    make, trials, loss = CASES[case]
    return Run(partial(in_float64, make, how), trials, data, loss, plain=partial(in_float64, make))


def of_stacks(family: str, how: str, checkpoints: str) -> Run:
    """Stacked experts and their routers; grouped_mm has no float64."""
    latent = ("q_b_proj", "kv_b_proj") if family == "deepseek_v3" else ()
    trials = of_a_layout("in_out" if family in TURNED else "out_in", *latent)
    dtype, within = (torch.float32, 1e-3) if how == "grouped_mm" else (torch.float64, 1e-12)

    def make() -> Any:
        return in_float64(partial(of_experts, family, how), checkpoints).to(dtype)

    return Run(make, trials, UNEVEN, within=within)


WAYS_TO_MULTIPLY = [
    *((family, "eager", "kept") for family in ("mixtral", "deepseek_v3")),
    *(("mixtral", how, "kept") for how in ("batched_mm", "grouped_mm")),
    *(("gpt_oss", how, "recomputed") for how in ("eager", "batched_mm", "grouped_mm")),
]
RUNS = {case: of_a_case(case) for case in CASES}
RUNS["equal rows"] = of_a_case("of one shape", data=partial(batches, rows={}))
RUNS |= {
    f"{case}, {how}": of_a_case(case, how)
    for case in ("llama", "heads, biases and tables")
    for how in CHECKPOINTS
    if how != "kept"
}
RUNS |= {" ".join(way): of_stacks(*way) for way in WAYS_TO_MULTIPLY}

# --------------------------------------------------------------------- rows of unequal lengths

LENGTHS = {"slices": 5, "mlp": 7, "table": 6, "all": 4, "qv": 7, "pissa": 6, "more": 5}


def own_lengths(names: Iterable[str], step: int, masked: bool = False) -> dict[str, Any]:
    """Each trial's rows, of its own length, the first of them with padding of its own."""
    rows = {}
    for name, batch in batches(names, step, {"qv": 1}).items():
        rows[name] = {key: ids[:, : LENGTHS.get(name, 3)] for key, ids in batch.items()}
        if masked:
            rows[name]["attention_mask"] = torch.ones_like(rows[name]["input_ids"])
            rows[name]["attention_mask"][0, 3:] = 0
    return rows


def without_cache(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    return model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False)


def of_a_row(_: nn.Module, out: Any, batch: Any) -> Tensor:
    wide = out.logits if out.logits.dim() == 2 else out.logits[..., :3].mean(1)
    return nn.functional.cross_entropy(wide, batch["labels"][:, 0] % 2)


def of_lengths(make: Any, trials: Any, way: str, *, bert: bool = False) -> Run:
    """BERT has masks, and no loss of the next token."""
    checkpoints = "recomputed" if "recomputed" in way else "kept"
    data, forward = partial(own_lengths, masked=bert), None if bert else without_cache
    run = Run(partial(in_float64, make, checkpoints), trials, data, forward=forward, within=1e-11)
    return run._replace(loss=of_a_row if bert or "by row" in way else None)


ALL_OF_LLAMA, STACKS_AND_ROUTERS = LLAMA_TRIALS | HEADS, of_a_layout("out_in")
RUNS |= {
    "gpt2, padded": of_lengths(gpt2, GPT2_TRIALS, "padded"),
    "llama, padded by row": of_lengths(of_llama, ALL_OF_LLAMA, "padded, by row"),
    "experts, padded": of_lengths(of_experts, STACKS_AND_ROUTERS, "padded"),
    "llama, padded and recomputed": of_lengths(of_llama, ALL_OF_LLAMA, "padded, recomputed"),
    "bert, padded and recomputed": of_lengths(of_bert, BERT_TRIALS, "recomputed", bert=True),
}


# ------------------------------------------------------------------------ modules of one's own


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).double()


def same_for_each(*shape: int) -> Callable[[Iterable[str], int], dict[str, Any]]:
    return lambda names, step: dict.fromkeys(names, noise(*shape)[step])


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5, self.training) @ self.weight


class Images(nn.Module):
    """Convolutions and another weight that is read; they drop nothing in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.down, self.same = nn.Conv2d(3, 4, 3, stride=2), nn.Conv2d(4, 4, 3, padding=1)
        self.up, self.fc = nn.ConvTranspose2d(4, 2, 2), nn.Linear(2, 2)
        self.last = Own()
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.fc(self.up(self.same(self.down(x)).relu()).relu().mean((2, 3))))


READ = {
    "low": Trial({"rank": 2, "targets": ["down", "same", "up"]}, lr=1e-2, clip=0.1),
    "dora": Trial({"rank": 1, "targets": ["down", "fc"], "variant": "dora"}, lr=1e-2),
    "full": Trial({"rank": 1, "targets": ["same"], "train": ["down", "fc"]}, lr=1e-2),
    "bias": Trial({"rank": 1, "targets": ["same"], "bias": "all"}, lr=1e-2, weight_decay=0.1),
    "own": Trial({"rank": 1, "targets": [r"last\.weight", "fc"]}, lr=1e-2, seed=1),
}


class Channels(nn.Module):
    """Its tokens are the last dimension of what it returns, beside a number."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(4, 4).double()

    def forward(self, x: Tensor) -> tuple[int, Tensor]:
        return 7, self.fc(x).mT


def of_two_lengths(names: Iterable[str], step: int) -> dict[str, Tensor]:
    return {name: noise(4, 1, 3, 4)[step][:, : 2 + (name == "a")] for name in names}


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
DECAYING = {
    "decay": Trial(RULES, lr=1e-2, weight_decay=0.3, clip=0.5),
    "ratio": Trial(RULES, lr=1e-2, weight_decay=0.1, b_lr_ratio=4, seed=1),
}
CALLS_TWO = [True, False, True, False, True]


def of_all_heads(_: nn.Module, out: Any, __: Any) -> Tensor:
    return square(torch.cat(out))


# Which loss each trial has at each step.
BRANCHES = {"one": "aaaa", "two": "bbbb", "both": "cccc", "in turn": "abba", "own": "eede"}
BRANCHING = {
    name: Trial(RULES, lr=1e-2, weight_decay=0.3, clip=0.5, b_lr_ratio=1 + i % 2, seed=i)
    for i, name in enumerate(BRANCHES)
}


def of_branches(names: Iterable[str], step: int) -> dict[str, Any]:
    """Rows that say whose they are and which loss they have."""
    return {
        name: {
            "x": noise(4, 3, 4)[step],
            "of": torch.full((3,), list(BRANCHES).index(name)),
            "branch": torch.full((3,), ord(BRANCHES[name][step])),
        }
        for name in names
    }


def by_branch(model: nn.Module, out: Any, batch: Any) -> Tensor:
    """The loss of one head or of both, or a term of the trial's own adapter alone, or with one."""
    name = list(BRANCHES)[batch["of"][0]]
    own = sum(p.square().sum() for p in li.adapter_parameters(model, name).values())
    one, two = map(square, out)
    branches = {"a": one, "b": two, "c": one + two, "d": own, "e": one + own}
    return branches[chr(batch["branch"][0])]


def of_x(model: nn.Module, batch: Any) -> Any:
    return model(batch["x"])


class Whole(nn.Module):
    """Experts that get all tokens, behind some of the model's own, or one token of each row."""

    def __init__(self, n_own: int, one: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(4, 4).double() for _ in range(2))
        self.n_own, self.one = n_own, one

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x.new_ones(len(x), self.n_own, 4), x], 1)
        x = x[:, :1] + x.mean(1, keepdim=True) if self.one else x
        up, down = (expert(x.flatten(0, 1)) for expert in self.experts)
        return (up.sigmoid() * down).view_as(x)


def of_ranks(target: str) -> dict[str, Trial]:
    return {
        name: Trial({"rank": 2, "targets": [target]}, lr=1e-2, seed=i)
        for i, name in enumerate("ab")
    }


EXPERTS = of_ranks(r"experts\.\d")


def of_any_length(names: Iterable[str], step: int) -> dict[str, Tensor]:
    return {n: noise(2, 4, 4)[:, : (2, 3, 1, 2)[step]] * (1 + (n == "b")) for n in names}


def of_pictures(names: Iterable[str], step: int) -> dict[str, Any]:
    """Two rows of eight tokens, four of which stand for a picture of their own."""
    given = {}
    for name in names:
        generator = torch.Generator().manual_seed(10 * step + ord(name))
        ids = torch.randint(3, 60, (2, 8), generator=generator)
        ids[:, 1:5] = 63
        pixels = torch.randn(2, 3, 16, 16, generator=generator).double()
        labels = ids.masked_fill(ids == 63, 5)
        given[name] = {"input_ids": ids, "pixel_values": pixels, "labels": labels}
    return given


def first_square(_: nn.Module, out: Any, __: Any) -> Tensor:
    return square(out[1] if isinstance(out, tuple) else out)


RUNS |= {
    "weights that are read": Run(Images, READ, same_for_each(4, 3, 3, 7, 7), first_square),
    "outputs that are padded in any dimension": Run(
        Channels,
        {n: Trial({"rank": 1, "targets": ["fc"]}, lr=1e-2, seed=ord(n)) for n in "ab"},
        of_two_lengths, first_square,
    ),
    "a loss that branches by trial": Run(
        Heads, BRANCHING, of_branches, by_branch, of_x, within=1e-11
    ),
    "a loss that branches by trial, in turn": Run(
        Heads, BRANCHING, of_branches, by_branch, of_x, options={"max_tokens": 1}, within=1e-11
    ),
    "layers that a step leaves out": Run(
        Heads, DECAYING, same_for_each(5, 3, 4), of_all_heads,
        before=lambda model, step: setattr(model, "calls_two", CALLS_TWO[step]), n_steps=5,
    ),
    "pictures of each row": Run(
        lambda: ARCHITECTURES["llava"].build().double().eval(), of_ranks("[qv]_proj"), of_pictures,
        within=1e-7,
    ),
    "experts of all tokens": Run(partial(Whole, 0), EXPERTS, of_any_length, first_square),
    "experts of more tokens": Run(partial(Whole, 3), EXPERTS, of_any_length, first_square),
    "experts of one token a row": Run(
        partial(Whole, 0, one=True), EXPERTS, of_any_length, first_square
    ),
}  # fmt: skip


@pytest.mark.parametrize("run", RUNS)
def test_each_trial_equals_a_plain_loop(run: str) -> None:
    hold(RUNS[run])


def test_a_resumed_run_has_no_step_of_what_was_left_out(tmp_path: Path) -> None:
    hold(RUNS["layers that a step leaves out"], 3, tmp_path)


@pytest.mark.filterwarnings("ignore:trials run in turn")
@pytest.mark.parametrize(
    "steps",
    [
        [("++--", "+---")],
        [("++--", "++--"), ("+++-", "+---")],
        [("++--", "+--+"), ("+++-", "+---")],
        [("+-", "-+"), ("++", "--")],
        [("++", "++"), ("+++-", "+---")],
        [("++--", "--++"), ("++++", "----")],
        [("+-+- --++", "+--+ ++--"), ("++-- ++++", "---- +--+")],
    ],
)
def test_tokens_that_an_expert_picks_go_to_no_other_trial(steps: Any) -> None:
    """Each time the number of an expert's tokens is a multiple of the number of rows."""
    running, done = Trials(Picking(), EXPERTS, loss=square), []
    for step, each in enumerate(steps):
        batch = {n: of_signs(signs, step) for n, signs in zip(EXPERTS, each, strict=True)}
        running.step(batch)
        done.append(batch)
    assert {*running.n_steps.values()} == {len(done)}
    for name, trial in EXPERTS.items():
        of_each = [[batch[name]] for batch in done]
        plain = plain_loop(Picking(), name, trial, of_each, first_square)
        check_equal(running.model, plain, name)


class MeanPooled(nn.Module):
    """Each row's mean is over as many positions as the longest row of the batch has."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.fc = nn.Embedding(9, 6).double(), nn.Linear(6, 6).double()

    def forward(self, ids: Tensor) -> Tensor:
        longest = int((ids != 0).sum(1).max())
        return torch.tanh(self.fc(self.embed(ids)))[:, :longest].mean(1)


def of_a_shorter_row(names: Iterable[str], step: int) -> dict[str, Tensor]:
    rows = {n: batch["input_ids"] % 8 + 1 for n, batch in batches(names, step, {}).items()}
    if "a" in rows and step:
        rows["a"][:, 2:] = 0
    return rows


@pytest.mark.filterwarnings("ignore:trials run in turn")
def test_rows_that_mix_in_a_later_batch_only_train_as_alone() -> None:
    hold(Run(MeanPooled, of_ranks("fc"), of_a_shorter_row, first_square))


def layers(*between: nn.Module) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), *between, nn.Tanh(), nn.Linear(4, 2)).double().train()


def centered_if(mixes: Any, out: Tensor) -> Tensor:
    return out - out.mean(0) if mixes else out


ONES = torch.ones(3, 4)
# What of a batch says whether rows are mixed, and its further entries where they are and are not.
TOLD: dict[str, tuple[Callable[[Any], Any], Callable[[bool], dict[str, Any]]]] = {
    "a flag": (lambda b: b["flag"], lambda mixes: {"flag": mixes}),
    "a number": (lambda b: b["flag"], lambda mixes: {"flag": int(mixes)}),
    "a scalar": (lambda b: b["flag"], lambda mixes: {"flag": torch.tensor(mixes)}),
    "a name": (
        lambda b: "negatives" in b, lambda mixes: {"negatives" if mixes else "weights": ONES},
    ),
    "what is None": (
        lambda b: b["negatives"] is not None,
        lambda mixes: {"weights": None if mixes else ONES, "negatives": ONES if mixes else None},
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:trials run in turn")
@pytest.mark.parametrize("told_by", TOLD)
def test_what_may_tell_a_forward_to_mix_rows_is_looked_at_anew(told_by: str) -> None:
    """From the third step on it subtracts the mean of the batch."""
    model, trials, x = layers(), of_ranks("all-linear"), noise(4, 3, 4)
    mixes, further = TOLD[told_by]
    forward = lambda b: centered_if(mixes(b), model(b["x"]))  # noqa: E731
    running = Trials(model, trials, forward=forward, loss=square)
    for step, each in enumerate(x):
        running.step({n: {"x": i * each, **further(step > 1)} for i, n in enumerate("ab", 1)})
    for i, (name, trial) in enumerate(trials.items()):
        plain = plain_loop(
            layers(), name, trial, [[(1 + i) * each] for each in x], first_square,
            lambda m, x: centered_if(m.mixes, m(x)),
            lambda m, step: setattr(m, "mixes", step > 1),
        )  # fmt: skip
        check_equal(model, plain, name)


def test_a_step_after_the_first_is_one_forward_whatever_its_rows_hold() -> None:
    """It was eleven where the forward held an object of its step."""
    model, calls = layers(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    forward = lambda b: model(b["x"] + b["features"])  # noqa: E731
    running = Trials(model, of_ranks("all-linear"), forward=forward, loss=square)
    for step in range(3):
        rows = {n: {"x": noise(3, 4), "features": torch.full((3, 4), step + 1.0)} for n in "ab"}
        running.step(rows)
        assert step == 0 or len(calls) == 1
        calls.clear()


@pytest.mark.parametrize(("most", "sizes"), [(12, {3, 6}), (11, {3}), (None, {3, 6, 12})])
def test_no_forward_gets_more_tokens_than_a_pass_may_have(most: Any, sizes: set[int]) -> None:
    """The rows of all new trials were joined to look at them, whatever was allowed."""
    model, seen = layers(), set[int]()
    four = {n: of_ranks("all-linear")["a"] for n in "abcd"}
    running = Trials(model, four, loss=square, max_tokens=most)
    model.register_forward_pre_hook(lambda _, args: seen.add(len(args[0])) or None)
    for step in range(2):
        running.step({n: noise(2, 3, 2, 4)[step] for n in "abcd"})
    assert max(seen) == max(sizes)
    assert seen <= sizes
    lone = plain_loop(layers(), "a", four["a"], [[x] for x in noise(2, 3, 2, 4)], first_square)
    for name in four:
        check_equal(model, values(lone, "a"), name)


def test_a_lack_of_memory_is_told_and_lets_no_trial_run_in_turn() -> None:
    model, most = layers(), [3]

    def forward(x: Tensor) -> Tensor:
        if len(x) > most[0]:
            raise torch.OutOfMemoryError("no room")
        return model(x)

    running = Trials(model, of_ranks("all-linear"), forward=forward, loss=square)
    with pytest.raises(torch.OutOfMemoryError):
        running.step(noise(3, 4))
    most[0] = 6
    running.step(noise(3, 4))


class Complex(nn.Module):
    """Rows that meet in the imaginary part of what it returns."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.complex(x, x - x.mean(0))


def of_parts(_: nn.Module, out: Any, __: Any) -> Tensor:
    return square(torch.view_as_real(out))


@pytest.mark.filterwarnings("ignore:trials run in turn")
def test_outputs_of_complex_numbers_are_looked_at() -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4).double(), Complex())

    def rows(names: Iterable[str], step: int) -> dict[str, Tensor]:
        return {n: noise(4, 3, 4)[step] * (1 + (n == "b")) for n in names}

    hold(Run(make, of_ranks("0"), rows, of_parts))


def test_a_lone_trial_moves_the_statistics_of_batchnorm_as_a_plain_loop_does() -> None:
    trial, x = of_ranks("all-linear")["a"], noise(3, 5, 4)
    running = Trials(layers(nn.BatchNorm1d(4)), {"a": trial}, loss=square)
    for each in x:
        running.step({"a": each})
    steps = [[each] for each in x]
    alone = plain_loop(layers(nn.BatchNorm1d(4)), "a", trial, steps, first_square)
    check_equal(running.model, alone, "a")
    for key, value in alone[1].state_dict().items():
        torch.testing.assert_close(running.model[1].state_dict()[key], value, rtol=1e-12, atol=0)


class Generator(TorchDispatchMode):
    """Notes the operations during which the generator of the process is not where it was."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.moved = torch.get_rng_state(), list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not torch.equal(torch.get_rng_state(), self.before):
            self.moved.append(str(func))
        return func(*args, **(kwargs or {}))


def test_the_dropout_of_trials_leaves_the_generator_of_the_process_alone() -> None:
    """Another thread that draws meanwhile would get a trial's numbers, and move them."""
    rule = {"rank": 1, "dropout": 0.3, "targets": ["all-linear"]}
    two = {n: Trial(rule, lr=1e-2, seed=ord(n)) for n in "ab"}
    running = Trials(layers(), two, loss=square)
    running.step(noise(3, 4))
    with Generator() as seen:
        running.step(noise(3, 4))
    assert not seen.moved


# --------------------------------------------------------------- what changes no run, and what does


@pytest.mark.parametrize(("autocast", "compute"), [(True, "base"), (False, "float32")])
def test_in_16_bits_a_trial_equals_the_same_run_alone(autocast: bool, compute: str) -> None:
    trials = {
        name: replace(trial, config={**trial.config.to_dict(), "compute": compute})
        for name, trial in LLAMA_TRIALS.items()
        if name != "pissa"
    }

    def run(some: dict[str, Trial]) -> Trials:
        model = tiny_llama(vocab_size=31).train()

        def forward(batch: Any) -> Any:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return model(batch["input_ids"])

        running = Trials(model if autocast else model.bfloat16(), some, forward=forward)
        for step in range(3):
            running.step(batches(some, step, {}))
        return running

    check_each(run, trials, 0.05)


def test_a_derivative_within_a_loss_adds_to_no_gradient() -> None:
    models = []
    for inner in (False, True):
        rows = {n: torch.ones(2, 4, dtype=torch.float64, requires_grad=True) for n in "ab"}

        def loss(out: Any, batch: Tensor, inner: bool = inner) -> Tensor:
            if inner:
                torch.autograd.grad(out[0].sum(), batch, retain_graph=True)
            return square(torch.cat(out))

        running = Trials(Heads(), {n: Trial(RULES, lr=1e-2) for n in "ab"}, loss=loss)
        for _ in range(2):
            running.step(rows)
        models.append(running.model)
    for name in "ab":
        check_equal(models[0], models[1], name, 0.0)


def test_a_base_in_eval_mode_and_gradients_that_are_set_to_none_change_no_run() -> None:
    """Dropout of an adapter acts in any mode of the base."""
    trials, runs = LLAMA_TRIALS | HEADS | {"dora": DORA}, []
    for training in (True, False):
        running = Trials(of_llama().double().train(training), trials)
        for step in range(3):
            running.step(batches(trials, step, {}))
            if not training:
                running.model.zero_grad(set_to_none=True)
        runs.append(running.model)
    for name in trials:
        check_equal(*runs, name, 0.0)
    assert not any(module.training for module in runs[1].modules())


def test_the_batches_of_a_collator_train_as_dicts_in_any_order_of_entries() -> None:
    def run(kind: Any, names: list[str]) -> dict[str, float]:
        rows = batches(LLAMA_TRIALS, 0, {})
        given = {t: {k: b[k] for k in (names if t == "qv" else sorted(b))} for t, b in rows.items()}
        return Trials(of_llama(), LLAMA_TRIALS).step({t: kind(b) for t, b in given.items()})

    assert run(BatchEncoding, ["labels", "input_ids"]) == run(dict, ["input_ids", "labels"])


LOW = {
    n: Trial({"rank": 2, "dropout": 0.2, "targets": ["[qv]_proj"]}, lr=1e-2, seed=ord(n))
    for n in "abc"
}
STACKS = Trial({"rank": 2, "targets": [expert_rule("out_in")]}, lr=1e-2)
WITH_NAN = {
    "llama": (of_llama, LOW),
    "experts": (partial(of_experts, how="batched_mm"), {**LOW, "a": STACKS, "b": STACKS}),
}


@pytest.mark.parametrize("where", ["forward", "gradient"])
@pytest.mark.parametrize("case", WITH_NAN)
def test_a_trial_with_nan_is_stopped_and_changes_no_other(case: str, where: str) -> None:
    make, trials = WITH_NAN[case]

    def loss(out: Any, batch: Any) -> Tensor:
        """A root of zero at the sign that the step below puts into the labels of b."""
        wild = where == "gradient" and int(batch["labels"][0, 0]) == 7
        zero = (out.logits - out.logits.detach()).square().sum()
        return li.causal_loss(out, batch) + (zero.sqrt() if wild else 0)

    def run(some: dict[str, Trial]) -> Trials:
        model = in_float64(make)
        running = Trials(model, some, forward=partial(without_cache, model), loss=loss)
        for step in range(3):
            rows = batches(running.running, step, {})
            if "b" in rows and step == 1:
                rows["b"]["labels"] = rows["b"]["labels"].clone()
                rows["b"]["labels"][0, 0] = 7
                spoilt = li.adapter_parameters(running.model, "b").values()
                for parameter in spoilt if where == "forward" else ():
                    parameter.data.fill_(float("nan"))
            running.step(rows)
        return running

    together = check_each(run, trials, 1e-11)
    assert (list(together.stopped), list(together.running)) == (["b"], ["a", "c"])
    assert where == "gradient" or "loss is nan at step 1" in together.stopped["b"]
    assert together.stopped["b"] in together.table()


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
    running = Trials(model, LLAMA_TRIALS)
    running.step(batches(LLAMA_TRIALS, 0, {}))
    with refused(li.StateError, "evaluate"):
        running.best()
    losses = running.evaluate(batches(LLAMA_TRIALS, 5, {})["qv"])
    assert running.best() == min(losses, key=losses.get)
    running.drop("qv")
    running.step(batches(["all", "pissa"], 3, {}))
    for name in ("all", "pissa"):
        running.drop(name)
    assert model.state_dict().keys() == plain.keys()
    assert all(torch.equal(model.state_dict()[key], plain[key]) for key in plain)
    with refused(li.StateError, "trial"):
        running.step(batches(["all"], 3, {}))
