"""What the tests of the core share: a table of layer kinds, and the dense layer each must equal.

From what a `Kind` says, and from nothing of the package, `dense_output` forms `W + scale * B @ A`
in float64 and runs the plain layer with it, differentiably.
"""

import copy
import gc
import importlib
import io
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from helpers import own_warnings
from helpers.forks import Forks
from hypothesis import settings
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lora_inject as li
from lora_inject.cli import app

# A busy machine must not fail a test by a deadline, and CI must find the same examples each time.
settings.register_profile("suite", deadline=None, derandomize="CI" in os.environ, max_examples=60)
settings.load_profile("suite")

# No test ends in a power cut, and waiting for the disk takes a tenth of the suite's time.
os.fsync = lambda _: None
gc.disable()  # until all is imported

RANK, ALPHA = 2, 3.0
SCALE = 1.5  # alpha / rank, by hand


def script(name: str) -> ModuleType:
    """Import a module of scripts/, which is not a package."""
    scripts = str(Path(__file__).parents[1] / "scripts")
    sys.path.insert(0, scripts)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(scripts)


def pytest_configure(config: pytest.Config) -> None:
    """Decide which warnings fail a test, before the filters that pyproject.toml has for some."""
    pinned = not script("versions").differences()
    config.getini("filterwarnings")[:0] = own_warnings.filters(pinned=pinned)


FORKS = pytest.StashKey[Forks]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Leave what is imported by now out of every later garbage collection: it costs most of one."""
    gc.collect()
    gc.freeze()
    gc.enable()
    if any("forks" in getattr(item, "fixturenames", ()) for item in session.items):
        session.config.stash[FORKS] = forks = Forks()
        session.config.add_cleanup(forks.close)


@pytest.fixture(autouse=True, scope="module")
def _what_modules_leave() -> Iterator[None]:
    """Likewise of what a module leaves: Trainer collects in each run, up to a second a time."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def forks(pytestconfig: pytest.Config) -> Forks:
    """Runs functions of tests in processes of their own that have all imports done."""
    return pytestconfig.stash[FORKS]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class StockSubclass(nn.Linear):
    """A subclass that leaves `forward` alone, as attention's output projection is."""


class OwnForward(nn.Linear):
    """A subclass with a forward of its own, which happens to be linear in W."""

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight.t() + self.bias).contiguous()


class ActivationInside(nn.Linear):
    """A subclass that is not linear in W."""

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(super().forward(x))


class ScaledEmbedding(nn.Embedding):
    """Multiplies what it looks up, as Gemma's and Bart's embeddings do."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embedding_dim**0.5


class Mix(nn.Module):
    """A raw matrix, read and never called."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix.t()


class Experts(nn.Module):
    """Stacked experts, `(E, out, in)` as in Mixtral or `(E, in, out)` as in GPT-OSS."""

    def __init__(self, equation: str, *shape: int) -> None:
        super().__init__()
        self.equation = equation
        self.up = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum(self.equation, x, self.up)


def conv1d(n_out: int, n_in: int) -> Conv1D:
    layer = Conv1D(n_out, n_in)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


@dataclass(frozen=True)
class Kind:
    """One kind of layer and what its weight means."""

    layer: Callable[[], nn.Module]
    sizes: tuple[int, int]  # `(in, out)` of the low-rank update
    shapes: Sequence[tuple[int, ...] | str] = ((4, 3, 5),)  # of its inputs; `ids`: below `in`
    weight: str = "weight"  # the adapted parameter in the layer
    site: str = "layer"  # its name in a `Host`
    rule: Mapping[str, Any] = field(default_factory=dict)  # besides the match
    spans: tuple[tuple[int, int], ...] = ()  # of each adapted slice along the output
    transposed: bool = False  # the weight is `(in, out)`
    experts: int | None = None  # length of a leading dimension
    update: str = "forward"  # or `weight`
    formula: Callable[[Tensor, Tensor], Tensor] | None = None  # where the layer has side effects

    @property
    def config(self) -> dict[str, Any]:
        rule = {"match": self.site.replace(".", r"\."), **self.rule}
        return {"rank": RANK, "alpha": ALPHA, "targets": [rule]}

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        ids = torch.randint(0, self.sizes[0], (4, 3))
        ids[0, :2] = torch.tensor([1, 0])  # 1 is the padding index of one kind
        return tuple(
            ids if shape == "ids" else torch.randn(shape).to(dtype) for shape in self.shapes
        )

    @property
    def key(self) -> str:
        return f"layer.{self.weight}"


def renormalized(weight: Tensor, ids: Tensor) -> Tensor:
    """Rows of norm at most 1: what a lookup with max_norm=1 returns."""
    rows = weight[ids]
    norm = rows.norm(dim=-1, keepdim=True)
    return torch.where(norm > 1.0, rows / (norm + 1e-7), rows)


def _slices(*adapt: str) -> dict[str, Any]:
    """Options of a kind with slices of 4, 2 and 3 outputs."""
    spans = {"q": (0, 4), "k": (4, 6), "v": (6, 9)}
    rule = {"slices": {"q": 4, "k": 2, "v": 3}, "adapt": list(adapt)}
    return {"rule": rule, "spans": tuple(span for name, span in spans.items() if name in adapt)}


EQUAL: dict[str, Any] = {"slices": ["q", "k", "v"], "adapt": ["q", "v"]}
THIRDS: dict[str, Any] = {"rule": EQUAL, "spans": ((0, 3), (6, 9))}
TABLE: dict[str, Any] = {"shapes": ["ids"], "transposed": True}
READ: dict[str, Any] = {"update": "weight"}
MATRIX: dict[str, Any] = {"weight": "matrix", "site": "layer.matrix", **READ}
STACK: dict[str, Any] = {
    "shapes": [(4, 5)], "weight": "up", "site": "layer.up", "experts": 3, **READ,
}  # fmt: skip

KINDS: dict[str, Kind] = {
    "linear": Kind(lambda: nn.Linear(5, 6), (5, 6)),
    "linear without bias": Kind(lambda: nn.Linear(5, 6, bias=False), (5, 6)),
    "stock subclass": Kind(lambda: StockSubclass(5, 6), (5, 6)),
    "own linear forward": Kind(lambda: OwnForward(5, 6), (5, 6), **READ),
    "activation inside": Kind(lambda: ActivationInside(5, 6), (5, 6), **READ),
    "conv1d": Kind(lambda: conv1d(6, 5), (5, 6), transposed=True),
    "embedding": Kind(lambda: nn.Embedding(7, 5), (7, 5), **TABLE),
    "embedding padding": Kind(lambda: nn.Embedding(7, 5, padding_idx=1), (7, 5), **TABLE),
    "embedding max_norm": Kind(
        lambda: nn.Embedding(7, 5, max_norm=1.0), (7, 5), **TABLE, formula=renormalized
    ),
    "scaled embedding": Kind(lambda: ScaledEmbedding(7, 5), (7, 5), **TABLE, **READ),
    "equal slices": Kind(lambda: nn.Linear(5, 9), (5, 9), **THIRDS),
    "unequal slices": Kind(lambda: nn.Linear(5, 9), (5, 9), **_slices("v", "q")),
    "one slice": Kind(lambda: nn.Linear(5, 9), (5, 9), **_slices("k")),
    "all slices": Kind(lambda: nn.Linear(5, 9), (5, 9), **_slices("q", "k", "v")),
    "slices of own forward": Kind(lambda: OwnForward(5, 9), (5, 9), **THIRDS, **READ),
    "slices of activation inside": Kind(lambda: ActivationInside(5, 9), (5, 9), **THIRDS, **READ),
    "equal slices of conv1d": Kind(lambda: conv1d(9, 5), (5, 9), **THIRDS, transposed=True),
    "unequal slices of conv1d": Kind(
        lambda: conv1d(9, 5), (5, 9), **_slices("k", "v"), transposed=True
    ),
    "conv 1d": Kind(
        lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, padding_mode="circular"),
        (12, 6), [(2, 4, 9)], **READ,
    ),
    "conv 2d": Kind(
        lambda: nn.Conv2d(4, 6, (3, 2), groups=2, padding="same", padding_mode="reflect"),
        (12, 6), [(2, 4, 6, 5)], **READ,
    ),
    "conv 3d": Kind(
        lambda: nn.Conv3d(2, 3, (1, 2, 3), bias=False), (12, 3), [(1, 2, 3, 4, 5)], **READ
    ),
    "conv_transpose 2d": Kind(
        lambda: nn.ConvTranspose2d(4, 6, (2, 3), stride=2, output_padding=1, groups=2),
        (4, 18), [(2, 4, 3, 3)], transposed=True, **READ,
    ),
    "conv_transpose 1d": Kind(
        lambda: nn.ConvTranspose1d(4, 3, 2), (4, 6), [(2, 4, 3)], transposed=True, **READ
    ),
    "bilinear": Kind(lambda: nn.Bilinear(3, 4, 5), (12, 5), [(4, 3), (4, 4)], **READ),
    "parameter": Kind(Mix, (5, 6), **MATRIX),
    "turned parameter": Kind(Mix, (6, 5), rule={"layout": "in_out"}, transposed=True, **MATRIX),
    "slices of a parameter": Kind(Mix, (5, 6), rule=EQUAL, spans=((0, 2), (4, 6)), **MATRIX),
    "weight of a linear": Kind(lambda: nn.Linear(5, 6), (5, 6), site="layer.weight", **READ),
    "experts": Kind(
        lambda: Experts("bi,eoi->beo", 3, 6, 5), (5, 6), rule={"layout": "out_in"}, **STACK
    ),
    "turned experts": Kind(
        lambda: Experts("bi,eio->beo", 3, 5, 6),
        (5, 6), rule={"layout": "in_out"}, transposed=True, **STACK,
    ),
}  # fmt: skip


class Host(nn.Module):
    """A layer between siblings, so that names, keys, order and flags can be seen to stay."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.before = nn.Linear(2, 2)
        self.layer = layer
        self.after = nn.LayerNorm(2)
        self.register_buffer("steps", torch.arange(3.0))
        self.before.weight.requires_grad_(False)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.layer(*inputs)


def host(kind: Kind, dtype: torch.dtype = torch.float32) -> Host:
    return Host(kind.layer()).to(dtype)


def injected(kind: Kind, dtype: torch.dtype = torch.float32, name: str = "default") -> Host:
    """A host with one adapter, none of whose tensors is zero."""
    return fill(li.inject(host(kind, dtype), kind.config, name), name)


def fill(model: Any, name: str = "default", std: float = 0.5) -> Any:
    """Give an adapter random values."""
    with torch.no_grad():
        for parameter in li.adapter_parameters(model, name).values():
            parameter.normal_(0.0, std)
    return model


def dense_delta(kind: Kind, A: Tensor, B: Tensor, scale: float = SCALE) -> Tensor:
    """`scale * B @ A` as a matrix `(E, out, in)` or its transpose, zero outside the slices."""
    n_in, n_out = kind.sizes
    spans = kind.spans or ((0, n_out),)
    A = A.reshape(kind.experts or 1, len(spans), RANK, n_in)
    B = B.reshape(kind.experts or 1, -1, RANK)
    delta, row = A.new_zeros(len(A), n_out, n_in), 0
    for part, (start, stop) in enumerate(spans):
        block = scale * torch.einsum("eor,eri->eoi", B[:, row : row + stop - start], A[:, part])
        delta = delta + F.pad(block, (0, 0, start, n_out - stop))
        row += stop - start
    return delta.transpose(1, 2) if kind.transposed else delta


def dense_weight(kind: Kind, W: Tensor, A: Tensor, B: Tensor, scale: float = SCALE) -> Tensor:
    return W + dense_delta(kind, A, B, scale).reshape(W.shape)


def dense_output(
    kind: Kind, plain: Host, A: Tensor, B: Tensor, inputs: Sequence[Tensor], scale: float = SCALE
) -> Tensor:
    """The plain layer in float64 with the dense weight; A, B and inputs may require gradients."""
    W = dict(plain.named_parameters())[kind.key].detach().double()
    return output_with(kind, plain, dense_weight(kind, W, A, B, scale), inputs)


def output_with(kind: Kind, plain: nn.Module, weight: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """The plain layer in float64 with another weight."""
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    if kind.formula is not None:
        return kind.formula(weight, *inputs)
    wide = copy.deepcopy(plain).double()
    return torch.func.functional_call(wide, {kind.key: weight}, inputs)


# float64: what rounding may leave, with a margin. float32 and bfloat16: sums here have at most 20
# terms, so the accumulated rounding of a float32 sum stays under 16 eps of the largest value; in
# bfloat16 sums are formed in float32, and a result passes through h, the update, the output, and in
# the backward the gradient of h: each rounds by half an eps of its own largest value.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 16 * torch.finfo(torch.float32).eps,
    torch.bfloat16: 3 * torch.finfo(torch.bfloat16).eps,
}
DTYPES = list(TOLERANCE)


def error(found: Tensor, wanted: Tensor) -> float:
    """The largest difference over the largest value."""
    assert found.shape == wanted.shape
    assert torch.isfinite(found).all()
    worst = (found.detach().double() - wanted.detach().double()).abs().max()
    return float(worst / wanted.detach().double().abs().max())


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits: unlike `torch.equal`, 0.0 is not -0.0."""
    return (a.shape, a.dtype) == (b.shape, b.dtype) and torch.equal(_bits(a), _bits(b))


def _bits(t: Tensor) -> Tensor:
    return t.detach().contiguous().view(-1).view(torch.uint8)


def snapshot(model: nn.Module) -> list[Any]:
    """All that a model is: objects, classes, keys, order, values, flags, hooks, of each module."""
    return [
        (name, id(module), type(module), [*_attributes(module)])
        for name, module in model.named_modules(remove_duplicate=False)
    ]


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for key, value in module.__dict__.items():
        if key in ("_parameters", "_buffers"):
            yield key, [(name, *_tensor(t)) for name, t in value.items()]
        elif isinstance(value, Mapping):
            yield key, [(name, id(item)) for name, item in value.items()]
        else:
            yield key, id(value)


def _tensor(t: Tensor | None) -> tuple[Any, ...]:
    if t is None:
        return (None,)
    bits = _bits(t).numpy().tobytes()
    grad = None if t.grad is None else id(t.grad)
    return id(t), type(t), t.dtype, tuple(t.shape), t.requires_grad, t.is_leaf, grad, bits


def through_torch_save(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "torch.save": through_torch_save,
}


def refusal(run: Callable[[], Any], *classes: type[Exception]) -> Exception | None:
    """Run, and return the refusal, or None where it went through: for `right, or refused`."""
    try:
        run()
    except classes as raised:
        return raised
    return None


class Ran(NamedTuple):
    """What a command left."""

    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run a command in the test's own process."""

    def run(*args: object) -> Ran:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            app([str(arg) for arg in args], prog_name="lora-inject")
        return Ran(left.value.code or 0, *capsys.readouterr())

    return run
