"""What all tests share: the session's settings, values for an adapter, and comparisons."""

import copy
import gc
import importlib
import io
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import transformers
from helpers import own_warnings, versions
from helpers.forks import Forks
from helpers.ranks import failures
from hypothesis import settings
from torch import Tensor, nn

import lora_inject as li
from lora_inject.cli import app

# A busy machine must not fail a test by a deadline, and CI must find the same examples each time.
settings.register_profile("suite", deadline=None, derandomize="CI" in os.environ, max_examples=60)
settings.load_profile("suite")

# No test ends in a power cut, and waiting for the disk takes a tenth of the suite's time.
os.fsync = lambda _: None
gc.disable()  # until all is imported


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
    pinned = not versions.differences()
    config.getini("filterwarnings")[:0] = own_warnings.filters(pinned=pinned)


def pytest_report_header() -> list[str]:
    """Say what differs from the versions that the tests passed on."""
    here = f"torch {torch.__version__}, transformers {transformers.__version__}"
    pairs = versions.differences().items()
    return [here, *(f"{name} {got}, tested with {due}" for name, (due, got) in pairs)]


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


@pytest.fixture(scope="module")
def failed(
    request: pytest.FixtureRequest, forks: Forks, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """What failed in each of a module's JOBS, which two processes do that start once."""
    return failures(forks, 2, request.module.JOBS, tmp_path_factory.mktemp("ranks"))


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def fill(model: Any, name: str = "default", std: float = 0.5) -> Any:
    """Give an adapter random values; magnitudes of DoRA such that are near their start."""
    with torch.no_grad():
        for key, parameter in li.adapter_parameters(model, name).items():
            if key.endswith(".lora_m"):
                parameter.mul_(0.5 + torch.rand_like(parameter))
            else:
                parameter.normal_(0.0, std)
    return model


# float64: what rounding may leave, with a margin. float32 and bfloat16: sums here have at most 20
# terms, so the accumulated rounding of a float32 sum stays under 16 eps of the largest value; in
# bfloat16 sums are formed in float32, and a result passes through h, the update, the output, and in
# the backward the gradient of h: each rounds by half an eps of its own largest value.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 16 * torch.finfo(torch.float32).eps,
    torch.float16: 3 * torch.finfo(torch.float16).eps,
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
