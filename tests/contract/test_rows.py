"""Rows with adapters of their own: a batch against each row alone, whatever the layers are."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from conftest import TOLERANCE, error, fill, same_bits
from helpers.architectures import ARCHITECTURES
from helpers.experts import experts
from helpers.modules import Picking, of_signs
from helpers.reference import config
from helpers.refusals import refused
from helpers.states import give_biases_of_b
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    FSMTConfig,
    MambaConfig,
    MixtralConfig,
    OPTConfig,
    T5Config,
    T5ForConditionalGeneration,
    XLNetConfig,
)
from transformers.models.mixtral import modeling_mixtral

import lora_inject as li
from contract.kinds import conv1d

Rows = list[str | None]
# Eight rows of two adapters of one rank, in their order too, or of three of unequal rank.
ROWS: dict[str, Rows] = {
    "few adapters": ["default", "wide", None, "default", "wide", "default", "wide", None],
    "in order": ["default"] * 4 + ["wide"] * 4,
    "many adapters": ["thin", "wide", None, "default", "thin", "wide", "default", "thin"],
}
SLICE = {"slices": {"q": 4, "k": 2, "v": 3}, "adapt": ["k"]}
LAYERS: dict[str, tuple[Callable[[], nn.Module], Mapping[str, Any]]] = {
    "linear": (lambda: nn.Linear(5, 6), {}),
    "one slice": (lambda: nn.Linear(5, 9), SLICE),
    "conv1d": (lambda: conv1d(6, 5), {}),
}


def crowded(kind: str, dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    layer, rule = LAYERS[kind]
    model = nn.Sequential(layer()).to(dtype)
    for name, rank in (("default", 2), ("wide", 2), ("thin", 1)):
        rules = {"alpha": 3.0, "rank": rank, "targets": [{"match": "0", **rule}], **options}
        fill(li.inject(model, rules, name), name)
    return model.eval()


def batch(dtype: torch.dtype, n_tokens: int | None) -> Tensor:
    return torch.randn((8, 5) if n_tokens is None else (8, n_tokens, 5)).to(dtype)


# ------------------------------------------------------------------------------- layers of a kind


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_tokens", [None, 1, 3], ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", LAYERS)
def test_with_and_without_gradients_alike(kind, rows, n_tokens, dtype) -> None:
    model, x = crowded(kind, dtype), batch(dtype, n_tokens)
    with li.routed(model, ROWS[rows]):
        wanted = model(x)
        with torch.no_grad():
            found = model(x)
    assert found.dtype == dtype
    assert same_bits(found, wanted.detach())
    with li.disabled(model):
        plain = model(x)
    base = [i for i, name in enumerate(ROWS[rows]) if name is None]
    assert same_bits(found[base], plain[base].detach())
    assert error(found, plain) > 1e-3


@pytest.mark.parametrize("rows", [["never", "half", "often"], ["often", None, "never", "half"]])
def test_each_row_drops_with_the_probability_of_its_adapter(rows: Rows) -> None:
    """Of an input of one feature the whole update of a token is dropped, or scaled."""
    probabilities = {"never": 0.0, "half": 0.5, "often": 0.75}
    model, n = nn.Sequential(nn.Linear(1, 2)).double(), 4000
    for name, p in probabilities.items():
        fill(li.inject(model, config("0", dropout=p), name), name)
    x = torch.ones(len(rows), n, 1).double()
    with li.disabled(model):
        plain = model(x)
    with li.routed(model, rows):
        whole, dropped = model.eval()(x) - plain, model.train()(x) - plain
    for name, all_of_it, left in zip(rows, whole, dropped, strict=True):
        p, kept = probabilities.get(name, 0.0), (left != 0).all(-1, keepdim=True)
        assert torch.allclose(left, kept * all_of_it / (1 - p), rtol=1e-9, atol=1e-12)
        assert name is None or abs(float(kept.double().mean()) - (1 - p)) < 0.05


@pytest.mark.parametrize("n_tokens", [1, 4])
@pytest.mark.parametrize(
    ("rows", "ranks"),
    [
        ([1, 2, 3, 4], (2, 2, 2, 2)),
        ([0, 2, 1, 2, 2, 1, 0, 2], (1, 3)),
        ([2, 2, 2, 2, 2, 2, 2, 1], (4, 1)),
        ([3, 3, 3, 3, 3, 3, 1, 2, 3], (2, 2, 2)),
        ([0, 0, 1], (2,)),
    ],
)
def test_any_distribution_of_rows_by_hand(rows: Any, ranks: Any, n_tokens: int) -> None:
    """Output against dense matrices row by row; two derivatives against finite differences."""
    model, deltas = nn.Sequential(nn.Linear(5, 7, bias=False)).double(), []
    W = model[0].weight.detach().clone()
    for i, rank in enumerate(ranks):
        fill(li.inject(model, {"rank": rank, "alpha": rank, "targets": ["0"]}, str(i)), str(i))
        A, B = li.adapter_parameters(model, str(i)).values()
        deltas.append((B @ A).detach())
    li.train_only(model, [str(i) for i in range(len(ranks))])
    x = torch.randn(len(rows), n_tokens, 5).double().requires_grad_()
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}

    def run(x: Tensor, *tensors: Tensor) -> Tensor:
        with li.routed(model, [str(row - 1) if row else None for row in rows]):
            given = dict(zip(trained, tensors, strict=True))
            return torch.func.functional_call(model, given, (x,))

    each = [W + deltas[row - 1] if row else W for row in rows]
    wanted = torch.stack([one @ matrix.T for one, matrix in zip(x, each, strict=True)])
    assert error(run(x, *trained.values()), wanted) < 1e-14
    inputs = (x, *(p.detach().requires_grad_() for p in trained.values()))
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


def fused_step(model: nn.Module) -> None:
    """Writes without a change of any version counter."""
    parameters = list(li.adapter_parameters(model, "wide").values())
    for p in parameters:
        p.grad = torch.ones_like(p)
    torch.optim.AdamW(parameters, lr=0.1, fused=True).step()


def replace(model: nn.Module) -> None:
    B = li.adapter_parameters(model, "wide")["0.lora_B"]
    (name,) = (n for n, p in model[0]._parameters.items() if p is B)
    model[0]._parameters[name] = nn.Parameter(B.detach() + 1)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", [fused_step, replace])
def test_new_values_are_seen_inside_the_context_and_a_backward_follows(change, mode) -> None:
    """Nothing is kept, and what layers share for the context may be of inference mode."""
    model, x = crowded("linear"), batch(torch.float64, 1)
    li.train_only(model, ["default", "wide"])
    with li.routed(model, ROWS["few adapters"]):
        with mode():
            before = model(x).clone()
        change(model)
        with mode():
            found = model(x).clone()
        wanted = model(x)
        wanted.sum().backward()
    assert error(found, wanted) < TOLERANCE[torch.float64]
    assert error(before, wanted) > 1e-3
    assert all(p.grad is not None for p in li.adapter_parameters(model, "wide").values())


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("n_tokens", [1, 3, 32])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_a_broken_adapter_spoils_its_own_rows_only(factor: str, rows: str, n_tokens: int) -> None:
    """Tenants share a batch, not their mistakes."""
    model, x = crowded("linear"), batch(torch.float64, n_tokens)
    with li.routed(model, ROWS[rows]), torch.no_grad():
        wanted = model(x)
        broken = [p for k, p in li.adapter_parameters(model, "wide").items() if factor in k]
        broken[0].fill_(torch.inf)
        found = model(x)
    for i, name in enumerate(ROWS[rows]):
        if name == "wide":
            assert not found[i].isfinite().any()
        else:
            assert error(found[i], wanted[i]) < TOLERANCE[torch.float64]


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d, circular": (lambda: nn.Conv1d(4, 6, 3, padding="same", padding_mode="circular"), (9,)),
    "2d, grouped": (lambda: nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, groups=2), (8, 7)),
    "3d, dilated": (lambda: nn.Conv3d(4, 6, 2, dilation=(1, 2, 1), bias=False), (4, 5, 4)),
}


def of_convolution(make: Callable[[], nn.Module]) -> nn.Module:
    model = nn.Sequential(make()).double()
    for name, rank, init in (("a", 2, "kaiming"), ("b", 1, "pissa"), ("idle", 3, "kaiming")):
        fill(li.inject(model, {"rank": rank, "init": init, "targets": ["0"]}, name), name)
    return model


def with_trained_layers() -> nn.Module:
    """Adapters that train a head, a norm or biases, and some that adapt the same layers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)).double()
    for name, rules in {
        "head": {"targets": ["0"], "train": ["2"]},
        "norm": {"targets": ["0"], "train": [r"1\.weight", r"2\.bias"]},
        "none": {"targets": ["0"]},
        "low": {"targets": ["2"], "bias": "adapted"},
        "of B": {"targets": ["0", "2"]},
        "dora": {"targets": ["0"], "variant": "dora", "bias": "adapted"},
    }.items():
        fill(li.inject(model, {"rank": 1, **rules}, name), name)
        for key, parameter in li.adapter_parameters(model, name).items():
            if "lora_A" not in key and "lora_B" not in key:
                torch.nn.init.normal_(parameter)
    return give_biases_of_b(model, "of B")


# A model, the adapters of the rows, and the shape of a row.
ALONE: dict[str, tuple[Callable[[], nn.Module], Rows, tuple[int, ...]]] = {
    **{
        f"16 bits, compute: {compute}": (
            partial(crowded, "linear", torch.bfloat16, compute=compute),
            ROWS["many adapters"], (3, 5),
        )
        for compute in ("base", "float32")
    },
    **{
        name: (partial(of_convolution, make), ["b", None, "a", "b"], (4, *size))
        for name, (make, size) in CONVOLUTIONS.items()
    },
    "layers and biases that their adapters train": (
        with_trained_layers,
        ["head", "head", "norm", None, "none", "low", "of B", "dora", "norm", "head"], (5, 4),
    ),
}  # fmt: skip


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("case", ALONE)
def test_outputs_and_gradients_are_those_of_each_row_alone(case: str, checkpointed: bool) -> None:
    make, rows, shape = ALONE[case]
    model: Any = make()
    dtype, names = model[0].weight.dtype, [n for n in dict.fromkeys(rows) if n is not None]
    li.train_only(model, [*li.adapters(model)])
    x = torch.randn(len(rows), *shape).to(dtype).requires_grad_()
    with li.routed(model, rows):
        y = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
    trained = [x, *(p for n in names for p in li.adapter_parameters(model, n).values())]
    idle = [p for p in model.parameters() if p.requires_grad and id(p) not in {*map(id, trained)}]
    g = torch.randn_like(y)
    gradients = torch.autograd.grad(y, [*trained, *idle], g, allow_unused=True)
    assert gradients[len(trained) :] == (None,) * len(idle)
    alone = []
    for i, name in enumerate(rows):
        li.activate(model, name)
        alone.append(model(x[i : i + 1]))
    wanted = torch.autograd.grad(torch.cat(alone), trained, g)
    for mine, due in zip((y, *gradients), (torch.cat(alone), *wanted), strict=False):
        assert error(mine, due) < TOLERANCE[dtype]


def test_compiled_rows_get_their_biases() -> None:
    model, x = with_trained_layers(), torch.randn(3, 5, 4, dtype=torch.float64)
    li.train_only(model, None)
    compiled = torch.compile(model, backend="eager")
    for rows in (["low", None, "of B"], ["of B", "of B", "low"]):
        with li.routed(model, rows):
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-12, atol=1e-13)


# ------------------------------------------------------------------------------------- experts

IDS = torch.arange(20).reshape(5, 4) % 13
OF_FIVE: Rows = ["one", None, "two", "one", "two"]
ROUTED = ["all-experts", "o_proj"]
FLAT = torch.arange(15) % 13


def of_experts(family: str, how: str = "eager", *further: Any, **options: Any) -> Any:
    model, _ = experts(family, how)
    model.config.use_cache = False
    torch.manual_seed(1)
    for name in ("one", "two"):
        fill(li.inject(model, config(*ROUTED, *further, **options), name), name)
    return model


def alone(model: nn.Module, rows: Rows = OF_FIVE) -> Tensor:
    """The logits of each sequence by itself, under its own adapter."""
    each = []
    for ids, name in zip(IDS, rows, strict=True):
        li.activate(model, name)
        each.append(model(ids[None]).logits)
    return torch.cat(each)


def together(model: nn.Module, rows: Rows = OF_FIVE) -> Tensor:
    with li.routed(model, rows):
        return model(IDS).logits


@pytest.mark.recent
@pytest.mark.parametrize("how", ["eager", "batched_mm", "default"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_each_sequence_has_its_own_experts(family: str, how: str) -> None:
    model = of_experts(family, how)
    with torch.no_grad():
        for rows in (OF_FIVE, ["two"] * 5):
            wanted = alone(model, rows)
            assert error(alone(model, [None] * 5), wanted) > 1e-2
            assert error(together(model, rows), wanted) < 2e-5
        plain = model(IDS).logits
        together(model)
        assert same_bits(model(IDS).logits, plain), "the active adapter's again"
        if (family, how) == ("mixtral", "eager"):
            wanted = alone(model)
            with li.routed(model, OF_FIVE, repeat=2):  # beams
                assert error(model(IDS.repeat_interleave(2, 0)).logits[::2], wanted) < 2e-5


def of_t5() -> Any:
    sizes = {"d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    return T5Config(d_model=16, vocab_size=13, decoder_start_token_id=0, **sizes)


def of_mamba() -> Any:
    return MambaConfig(
        hidden_size=16, state_size=4, num_hidden_layers=1, vocab_size=13, time_step_rank=2
    )


GENERATED: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "stacks of experts": (lambda: experts("mixtral", "eager")[0], ROUTED),
    "stacks alone": (lambda: experts("mixtral", "eager")[0], ["all-experts"]),
    "states of a convolution": (lambda: AutoModelForCausalLM.from_config(of_mamba()), ["conv1d"]),
    "an encoder": (lambda: T5ForConditionalGeneration(of_t5()), ["q", "relative_attention_bias"]),
}


@pytest.mark.recent
@pytest.mark.parametrize("case", GENERATED)
def test_each_sequence_is_generated_as_alone(case: str) -> None:
    """From a cache that each call extends: a prompt of as many tokens as rows, then one token."""
    make, targets = GENERATED[case]
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.4)
    for name in ("one", "two"):
        fill(li.inject(model, config(*targets), name), name)
    ids, rows = IDS[:4], ["one", "two", "two", "one"]
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    options |= {"eos_token_id": 12, "output_logits": True, "return_dict_in_generate": True}
    each = {name: li.activate(model, name).generate(ids, **options) for name in ("one", "two")}
    with li.routed(model, rows):
        made = model.generate(ids, **options)
    for i, name in enumerate(rows):
        assert torch.equal(made.sequences[i], each[name].sequences[i])
        for mine, due in zip(made.logits, each[name].logits, strict=True):
            torch.testing.assert_close(mine[i], due[i], rtol=1e-4, atol=1e-4)


@pytest.mark.recent
@pytest.mark.parametrize(
    ("family", "further", "options"),
    [
        ("mixtral", [], {}),
        ("gpt_oss", [], {}),
        ("qwen3_moe", ["q_proj", "embed_tokens"], {}),
        ("qwen3_moe", ["q_proj"], {"train": ["lm_head.weight"]}),
    ],
)
def test_each_sequence_trains_its_own_adapter(family, further, options) -> None:
    model = of_experts(family, "eager", *further, **options).double()
    li.train_only(model, ["one", "two"])
    trained = [p for name in ("one", "two") for p in li.adapter_parameters(model, name).values()]
    wanted, logits = alone(model), together(model)
    assert error(logits, wanted) < 1e-12
    weights = torch.randn_like(wanted)
    due = torch.autograd.grad(wanted, trained, weights)
    for grad, wanted_grad in zip(torch.autograd.grad(logits, trained, weights), due, strict=True):
        assert error(grad, wanted_grad) < 1e-10


# -------------------------------------------------------------------- where rows cannot be told


class TimeMajor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.fc = nn.LSTM(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.lstm(x)[0])


class Listed(nn.Module):
    """Experts that are layers, each of which may get just as many tokens as there are rows."""

    def __init__(self) -> None:
        super().__init__()
        self.top_k, self.gate = 1, nn.Linear(4, 2)
        self.experts = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 4)}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        chosen, out = self.gate(flat).argmax(1), torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            here = (chosen == number).nonzero()[:, 0]
            out = out.index_add(0, here, expert["up"](flat[here]))
        return x + out.view_as(x)


def one(model: Any, *targets: str) -> Any:
    return li.inject(model, config(*targets), "one")


THREE: Rows = ["one", None, "one"]
# The model, what `routed` is told, what the model gets, and names in the refusal of its forward.
IN_FORWARD: dict[str, tuple[Callable[[], Any], Rows, Any, list[str]]] = {
    "a convolution without a batch": (
        lambda: one(nn.Sequential(nn.Conv1d(2, 3, 1)), "0"), ["one", None],
        torch.randn(2, 5), ["Conv1d", "(2, 5)"],
    ),
    "another number of rows": (
        lambda: one(nn.Sequential(nn.Linear(4, 4)), "0"), THREE,
        torch.ones(5, 3, 4), ["3"],
    ),
    "a batch as long as time": (
        lambda: one(TimeMajor(), "fc"), THREE, torch.ones(3, 3, 4), ["batch"],
    ),
    # Ten tokens are no other than five rows of two to a stack of experts.
    "as many tokens as experts could get": (
        lambda: one(experts("qwen3_moe")[0], *ROUTED), ["one"] * 5,
        IDS[:2].repeat(1, 3)[:, :5], ["rows"],
    ),
    "sequences that are packed into one row": (
        lambda: one(experts("qwen3_moe")[0], *ROUTED), ["one"] * 5, FLAT[None], ["(1, 15"],
    ),
}  # fmt: skip


@pytest.mark.recent
@pytest.mark.parametrize("case", IN_FORWARD)
def test_a_batch_in_which_rows_cannot_be_told_is_refused(case: str) -> None:
    make, rows, x, names = IN_FORWARD[case]
    model = make()
    with li.routed(model, rows), refused(li.LayerError, *names):
        model(x)


@pytest.mark.recent
def test_a_part_that_is_called_by_itself_is_refused_where_rows_cannot_be_told() -> None:
    model, mixture = one(TimeMajor(), "fc"), one(experts("qwen3_moe")[0], *ROUTED)
    with li.routed(model, THREE), refused(li.LayerError, "batch"):
        model(torch.ones(3, 3, 4))
    with li.routed(mixture, ["one"] * 5), refused(li.LayerError, "5"):
        mixture.model.layers[0].mlp(torch.randn(1, 7, 8))


def test_a_batch_as_long_as_time_is_told_where_rows_come_first_and_in_no_graph() -> None:
    first = one(nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4, batch_first=True)), "0")
    with li.routed(first, THREE):
        first(torch.ones(3, 3, 4))
    model = one(TimeMajor(), "fc")
    with li.routed(model, THREE), pytest.raises((li.LayerError, RuntimeError), match="batch"):
        torch.compile(model, backend="eager")(torch.ones(3, 3, 4))


# ------------------------- an axis that is no row, or not only rows: what each row computes alone


def check_each_alone(model: nn.Module, rows: Any, run: Callable[[list[int]], Any]) -> None:
    """`run` computes those rows of a batch whose numbers it gets."""

    def outputs(numbers: list[int]) -> Tensor:
        y = run(numbers)
        return y if isinstance(y, Tensor) else y[0]

    with torch.no_grad():
        alone = []
        for i, name in enumerate(rows):
            li.activate(model, name)
            alone.append(outputs([i]))
        li.activate(model, None)
        every = [*range(len(rows))]
        assert error(outputs(every), torch.cat(alone)) > 1e-3, "the adapters act"
        with li.routed(model, rows):
            assert error(outputs(every), torch.cat(alone)) < 1e-9


class Read(nn.Module):
    """A layer whose weight is read, and a convolution of what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.conv = nn.Linear(4, 4), nn.Conv1d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.tanh(x @ self.fc.weight.T))


class Positions(nn.Module):
    """A decoder's start, as nanoGPT has it: positions are looked up once for all rows."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(11, 6), nn.Embedding(8, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))))


class Within(nn.Module):
    """A module around the start of a decoder, which a caller may call by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.head = Positions(), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.start(ids))


class Flattened(nn.Module):
    """Layers that get rows and positions as one axis, as in OPT."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.fc1 = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.q(x)
        return self.fc1(y.reshape(-1, 4)).relu().view(y.shape)


def encoder_of_t5() -> Any:
    sizes = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 2, "num_heads": 2}
    return AutoModel.from_config(T5Config(**sizes, vocab_size=31)).encoder


def xlnet() -> Any:
    sizes = {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24, "mem_len": None}
    return AutoModel.from_config(XLNetConfig(vocab_size=31, **sizes))


def encoder_of_fsmt() -> Any:
    """Its layers have time first."""
    sizes = {"d_model": 16, "encoder_layers": 1, "encoder_ffn_dim": 24}
    words = {"src_vocab_size": 31, "tgt_vocab_size": 31, "langs": ["en", "de"]}
    settings = FSMTConfig(**sizes, **words, encoder_attention_heads=2, decoder_attention_heads=2)
    return AutoModel.from_config(settings).encoder


def opt() -> Any:
    sizes = {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return AutoModel.from_config(OPTConfig(**sizes, vocab_size=31, word_embed_proj_dim=16))


SQUARE, LONGER = torch.arange(9).view(3, 3) + 2, torch.arange(60).reshape(3, 5, 4).sin().double()
CUBE = torch.arange(36).reshape(3, 3, 4).sin().double()
ELSEWHERE: dict[str, tuple[Callable[[], Any], list[str], Any]] = {
    "experts alone": (lambda: experts("mixtral")[0], ["all-experts"], IDS[:3]),
    "experts that sort the tokens of all rows": (
        lambda: experts("llama4")[0], ["all-experts"], IDS[:3],
    ),
    "experts that are layers": (
        lambda: nn.Sequential(nn.Linear(4, 4), Listed()), ["0", "all-experts"], CUBE,
    ),
    "a weight that is read": (Read, [r"fc\.weight", "conv"], CUBE),
    "as many positions as rows": (Positions, ["wte", "wpe", "head"], SQUARE % 8),
    "as many positions as rows, T5": (
        encoder_of_t5, ["relative_attention_bias", "[qv]"], SQUARE,
    ),
    "as many positions as rows, XLNet": (xlnet, ["all-linear"], SQUARE),
    "as many positions as rows, FSMT": (encoder_of_fsmt, ["all-linear"], SQUARE),
    "rows and positions in one axis, OPT": (opt, ["fc1", "fc2"], IDS[:3]),
    "rows and positions in one axis": (Flattened, ["q", "fc1"], LONGER),
    "rows and positions in one axis, nowhere else": (Flattened, ["fc1"], LONGER),
}  # fmt: skip


def of_two(model: nn.Module, *targets: Any, before: Any = None) -> nn.Module:
    """Two adapters, and what is routed to them before they are trained."""
    for name in ("one", "two"):
        li.inject(model, config(*targets), name)
    if before is not None:
        with li.routed(model, ["one", None, "two"]):
            model(before)
    return fill(fill(model, "one"), "two")


@pytest.mark.recent
@pytest.mark.parametrize("case", ELSEWHERE)
def test_what_takes_no_rows_computes_each_row_as_alone(case: str) -> None:
    """Also a second time, when what was seen of the layers is known.

    Of new adapters, which add nothing yet, nothing is seen.
    """
    make, targets, x = ELSEWHERE[case]
    torch.manual_seed(0)
    model = of_two(make().double().eval(), *targets, before=x)
    for given in (x, x.flip(0), x):
        check_each_alone(model, ["one", None, "two"], lambda rows, x=given: model(x[rows]))


def test_a_part_that_is_called_by_itself_computes_each_row_as_alone() -> None:
    model = of_two(Within().double().eval(), "all-linear", "wpe")
    check_each_alone(model, ["one", None, "two"], lambda rows: model.start(SQUARE[rows] % 8))
    check_each_alone(model, ["one", None, "two"], lambda rows: model.forward(SQUARE[rows] % 8))


def test_a_graph_refuses_a_layer_that_was_seen_to_take_no_rows() -> None:
    model = of_two(Positions().double().eval(), "wte", "wpe")
    with torch.no_grad(), li.routed(model, ["one", None, "two"]):
        model(SQUARE[:, :2] % 8)
        # dynamo of torch 2.8 fails at the line that raises, and shows that.
        words = r"first dimension|self\.misfit"
        with pytest.raises((li.LayerError, RuntimeError), match=words):
            torch.compile(model, backend="eager")(SQUARE % 8)


@pytest.mark.recent
@pytest.mark.parametrize("batches", [("+ +", "- -", "++ --"), ("+- -+", "++ --")])
def test_tokens_that_an_expert_picks_are_those_of_their_rows(batches: tuple[str, ...]) -> None:
    """Each time as many as there are rows, at first one of each."""
    model = of_two(Picking(), r"experts\.\d")
    for seed, signs in enumerate(batches):
        x = of_signs(signs, seed)
        check_each_alone(model, ["one", "two"], lambda rows, x=x: model(x[rows]))


class Widened(Picking):
    """The same for tokens in numbers of which a device may know less."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x.double() - 1)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bool], ids=str)
@pytest.mark.parametrize("batches", [("+ +", "- -", "++ --"), ("+- -+", "++ --")])
def test_tokens_that_a_device_cannot_sort_are_those_of_their_rows(
    batches: tuple[str, ...], dtype: torch.dtype
) -> None:
    model = of_two(Widened(), r"experts\.\d")
    for seed, signs in enumerate(batches):
        x = of_signs(signs, seed) > 0  # torch before 2.9 indexes no float8 either
        check_each_alone(model, ["one", "two"], lambda rows, x=x: model(x[rows].to(dtype)))


def test_a_row_s_pictures_go_through_its_own_adapter() -> None:
    """Two rows and two pictures of four tokens, both of the first row."""
    model = of_two(ARCHITECTURES["llava"].build().double().eval(), "all-linear")
    ids, pixels = torch.full((2, 10), 3), torch.randn(2, 3, 16, 16).double()
    ids[0, 1:-1] = model.config.image_token_id

    def run(rows: list[int]) -> Any:
        more = {"pixel_values": pixels} if 0 in rows else {}
        return model(input_ids=ids[rows], **more).logits

    check_each_alone(model, ["one", "two"], run)


class Pictured(nn.Module):
    """Features of pictures take the places of the tokens 9, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.see, self.head = nn.Embedding(10, 8), nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, ids: Tensor, pictures: Tensor) -> Tensor:
        here = (ids == 9)[..., None]
        x = self.embed(ids)
        x = x.masked_scatter(here.expand_as(x), torch.tanh(self.see(pictures)))
        return self.head(torch.tanh(x + x.cumsum(1)))


@pytest.mark.parametrize("at", [slice(1, 5), slice(6, 10)], ids=str)
def test_pictures_of_which_each_row_had_one_at_first_go_to_their_row(at: slice) -> None:
    model = of_two(Pictured().double().eval(), "all-linear")
    pictures = torch.randn(2, 4, 6).double()

    def check(ids: Tensor) -> None:
        n_before = [int((ids[:i] == 9).sum()) // 4 for i in range(3)]

        def run(rows: list[int]) -> Tensor:
            own = pictures[n_before[rows[0]] : n_before[rows[-1] + 1]]
            return model(ids[rows], own)

        check_each_alone(model, ["one", "two"], run)

    of_each, of_first = torch.full((2, 10), 3), torch.full((2, 10), 3)
    of_each[:, at] = of_first[0, :8] = 9
    check(of_each)
    check(of_first)


class OneModality(nn.Module):
    """A stack of experts that gets the tokens of one modality, as many or few as a row has."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 8, "intermediate_size": 6, "num_local_experts": 3}
        self.fc, self.router = nn.Linear(8, 8), nn.Linear(8, 3)
        config = MixtralConfig(**sizes, experts_implementation="eager")
        self.experts = modeling_mixtral.MixtralExperts(config)
        for parameter in self.experts.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x: Tensor, is_text: Tensor) -> Tensor:
        x = self.fc(x)
        picked = x[is_text]
        weights, index = self.router(picked).softmax(-1).topk(2)
        out = x.clone()
        out[is_text] = x[is_text] + self.experts(picked, index, weights)
        return out


@pytest.mark.recent
def test_tokens_of_one_modality_go_to_the_experts_of_their_row() -> None:
    """Six tokens of the first row and four of the second are no five of each."""
    model = of_two(OneModality().double(), "fc", "experts.gate_up_proj")
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    is_text = torch.arange(7) < torch.tensor([[6], [4]])
    check_each_alone(model, ["one", "two"], lambda rows: model(x[rows], is_text[rows]))


def test_a_row_has_a_mix_of_adapters() -> None:
    rows = [{"default": 0.7, "wide": -0.5}, "wide", None, {"thin": 2}]
    model, x = crowded("linear"), batch(torch.float64, 3)
    check_each_alone(model, rows, lambda numbers: model(x[numbers]))
