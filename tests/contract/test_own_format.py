"""A format from outside the package may know less than an adapter holds, and never loses it."""

import json
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fill
from helpers.refusals import refused
from helpers.states import SITES, Site, same_effects, state_of, with_biases_of_b
from torch import Tensor, nn

import lora_inject as li
from lora_inject.extending import Files, Format, ModelFacts, SiteSpec, register_format
from lora_inject.formats import FORMATS  # noqa: TID251 - a public name

Cast = Callable[[Tensor], Tensor]


def of_text(cast: Cast = lambda tensor: tensor, alpha: Callable[[float], float] = float) -> Format:
    """Pairs of linear layers with their alpha as JSON, by somebody who knows nothing else."""

    def write(state: li.AdapterState, path: Path, facts: ModelFacts) -> bytes:
        sites = {
            name: [cast(site.A).tolist(), cast(site.B).tolist(), alpha(site.spec.alpha)]
            for name, site in state.sites.items()
        }
        return json.dumps({"lora": sites}).encode()

    def read(path: Path, facts: ModelFacts) -> li.AdapterState:
        sites = {}
        for name, (a, b, its_alpha) in json.loads(path.read_bytes())["lora"].items():
            A, B = cast(torch.tensor(a)), cast(torch.tensor(b))
            shape = (len(B), A.shape[1])
            spec = SiteSpec(name, "linear", shape[1], shape[0], shape, len(A), its_alpha)
            sites[name] = li.classes.SiteState(spec, A, B)
        return li.AdapterState(sites)

    def detects(files: Files) -> bool:
        return files.path.is_file() and files.path.read_bytes()[:8] == b'{"lora":'

    return Format(write, read, detects, deltas_only=True)


def of_pickle(read: Callable[[li.AdapterState], li.AdapterState], **row: Any) -> Format:
    """A folder with a pickle of the whole value, of which `read` gives back what it likes."""
    return Format(
        lambda state, path, facts: {"adapter.pkl": pickle.dumps(state)},
        lambda path, facts: read(pickle.loads((path / "adapter.pkl").read_bytes())),
        lambda files: files.has("adapter.pkl"),
        **row,
    )


@pytest.fixture
def register() -> Iterator[Callable[[Format], str]]:
    """Register a row for one test, and return its name."""
    before = {*FORMATS}

    def registered(row: Format) -> str:
        name = f"own-{len(FORMATS)}"
        assert register_format(name, row) is row
        return name

    yield registered
    for name in {*FORMATS} - before:
        del FORMATS[name]


FC = SITES["linear"]
BASE = state_of(FC)


def on_site(state: li.AdapterState, **fields: Any) -> li.AdapterState:
    """The adapter with other fields of its first site's spec."""
    (name, site), *others = state.sites.items()
    sites = {name: replace(site, spec=replace(site.spec, **fields)), **dict(others)}
    return replace(state, sites=sites)


def halved(state: li.AdapterState) -> li.AdapterState:
    """The adapter with half of each further tensor."""
    sites = {
        name: replace(site, further={role: tensor / 2 for role, tensor in site.further.items()})
        for name, site in state.sites.items()
    }
    return replace(state, sites=sites)


def swapped(state: li.AdapterState) -> li.AdapterState:
    """The adapter with the experts' factors A in another order."""
    return replace(
        state, sites={n: replace(site, A=site.A.flip(0)) for n, site in state.sites.items()}
    )


LOST: dict[str, tuple[li.AdapterState, Format, list[str]]] = {
    "rslora": (state_of(FC.by(scaling="rslora")), of_text(), ["h.0.fc", "'rslora'", "off by"]),
    "pissa": (state_of(FC.by(init="pissa")), of_text(), ["h.0.fc", "'pissa'", "off by"]),
    "dora": (state_of(FC.by(variant="dora")), of_text(), ["h.0.fc", "variant", "'dora'"]),
    "lora_bias": (with_biases_of_b(BASE), of_text(), ["h.0.fc", "lora_bias"]),
    "slices": (state_of(SITES["slices"]), of_text(), ["h.0.qkv", "(7, 2)"]),
    "alpha": (state_of(FC.by(alpha=4.1)), of_text(alpha=int), ["h.0.fc", "alpha is 4,", "4.1"]),
    "alpha of 16 bits": (
        li.algebra.as_dtype(state_of(FC.by(alpha=16.01)), torch.bfloat16),
        of_text(lambda tensor: tensor.bfloat16(), alpha=int),
        ["h.0.fc", "alpha is 16,"],
    ),
    "overflow": (state_of(FC, size=1e4), of_text(lambda tensor: 1e4 * tensor.half()), ["h.0.fc"]),
    "trained": (
        replace(BASE, trained={"h.1.bias": torch.ones(3)}),
        of_text(),
        ["trained tensor", "h.1.bias"],
    ),
    "values of trained": (
        replace(BASE, trained={"h.1.bias": torch.ones(3)}),
        of_pickle(lambda state: replace(state, trained={"h.1.bias": torch.zeros(3)})),
        ["h.1.bias", "off by up to 1"],
    ),
    "rows": (
        replace(BASE, trained={"wte.weight": torch.ones(2, 3)}, rows={"wte.weight": (1, 4)}),
        of_pickle(lambda state: replace(state, rows={"wte.weight": (0, 1)})),
        ["wte.weight", "(0, 1)", "(1, 4)"],
    ),
    "a site": (BASE, of_pickle(lambda state: replace(state, sites={})), ["lacks", "h.0.fc"]),
    "magnitudes": (
        state_of(FC.by(variant="dora")),
        of_pickle(halved),
        ["h.0.fc", "m", "off by"],
    ),
    "which way round": (
        state_of(SITES["turned parameter"]),
        of_pickle(lambda state: on_site(state, transposed=False, weight_shape=(7, 5))),
        ["mix.table", "orientation"],
    ),
    "experts": (
        state_of(SITES["experts"]),
        of_pickle(swapped),
        ["moe.up", "off by"],
    ),
    "dropout": (
        on_site(BASE, dropout=0.1),
        of_pickle(lambda state: on_site(state, dropout=0.0)),
        ["h.0.fc", "dropout", "0.1", "deltas_only=True"],
    ),
    "config": (
        replace(BASE, config={"rank": 2}),
        of_pickle(lambda state: replace(state, config=None)),
        ["config", "deltas_only=True"],
    ),
}


@pytest.mark.parametrize("case", LOST)
def test_what_a_format_loses_is_refused_before_anything_is_there(
    case: str, register: Any, tmp_path: Path
) -> None:
    state, row, named = LOST[case]
    name = register(row)
    (tmp_path / "there").write_bytes(b"of somebody")
    for target in (tmp_path / "new" / "adapter", tmp_path / "there"):
        with refused(li.FormatError, name, *named):
            li.write_adapter(state, target, name, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there").read_bytes() == b"of somebody"


TEXT = of_text()
KEPT: dict[str, tuple[Format, list[Site], float]] = {
    "pairs": (TEXT, [FC, FC.at("h.1.fc").by(rank=3, alpha=0.3)], 1e-6),
    "16 bits": (of_text(lambda tensor: tensor.bfloat16()), [FC], 2e-2),
    "everything": (
        of_pickle(lambda state: state),
        [*SITES.values(), FC.at("p").by(init="pissa")],
        0,
    ),
    "no slices": (
        of_pickle(
            lambda state: li.read_adapter(
                li.write_adapter(state, Path.cwd() / "plain", "portable", overwrite=True)
            ),
            deltas_only=True,
        ),
        [SITES["slices"], FC.by(init="pissa", scaling="rslora")],
        1e-6,
    ),
}


@pytest.mark.parametrize("case", KEPT)
def test_what_a_format_holds_is_written(
    case: str, register: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    row, rows, within = KEPT[case]
    if case == "everything":  # no two sites of one name
        rows = [row for row in rows if "turned" not in row.name]
        rows = list({row.name: row for row in rows}.values())
    state = state_of(*rows)
    path = li.write_adapter(state, tmp_path / "adapter", register(row))
    same_effects(li.read_adapter(path), state, *rows, within=within)


def test_a_live_model_is_not_saved_as_another(register: Any, tmp_path: Path) -> None:
    name = register(TEXT)
    model = li.inject(nn.Sequential(nn.Linear(4, 6)), {"rank": 2, "targets": ["0"]})
    fill(model)
    path = li.save_adapter(model, tmp_path / "plain.json", format=name)
    x = torch.randn(3, 4)
    outputs = model(x)
    li.load_adapter(li.eject(model), path)
    torch.testing.assert_close(model(x), outputs)
    fill(li.inject(li.eject(model), {"rank": 2, "scaling": "rslora", "targets": ["0"]}))
    with refused(li.FormatError, "site '0'", "'rslora'", model=model):
        li.save_adapter(model, tmp_path / "other.json", format=name)
    assert [path.name for path in tmp_path.iterdir()] == ["plain.json"]


def test_what_cannot_be_read_back_is_not_written(register: Any, tmp_path: Path) -> None:
    def read(path: Path, facts: ModelFacts) -> li.AdapterState:
        raise li.FormatError("", "it is only written", "Read it elsewhere")

    name = register(replace(TEXT, read=read))
    with refused(li.FormatError, name, "it is only written"):
        li.write_adapter(BASE, tmp_path / "adapter", name)
    assert not any(tmp_path.iterdir())


def test_options_and_facts_of_the_write_are_those_of_the_reading(
    register: Any, tmp_path: Path
) -> None:
    seen = []

    def write(
        state: li.AdapterState, path: Path, facts: ModelFacts, *, key: int, level: int
    ) -> bytes:
        return bytes(each ^ key for each in pickle.dumps(state))

    def read(path: Path, facts: ModelFacts, *, key: int) -> li.AdapterState:
        seen.append((path.name, facts.base_model))
        return pickle.loads(bytes(each ^ key for each in path.read_bytes()))

    name = register(Format(write, read, lambda files: False, endings=(".x",)))
    options = {"key": 7, "level": 1, "base_model": "gpt2"}
    path = li.write_adapter(BASE, tmp_path / "adapter", name, **options)
    assert seen == [("adapter.x", "gpt2")]
    assert li.read_adapter(path, name, key=7) == BASE


@pytest.fixture
def often() -> Iterator[None]:
    """Let threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("often")
def test_a_format_is_found_while_another_is_registered(register: Any, tmp_path: Path) -> None:
    """Registering emptied the table for a moment."""
    path = li.write_adapter(BASE, tmp_path / "adapter", "native")
    stop, failed = threading.Event(), []

    def reading() -> None:
        while not stop.is_set():
            try:
                li.read_adapter(path)
            except (li.FormatError, RuntimeError) as error:
                failed.append(error)
                return

    thread = threading.Thread(target=reading)
    thread.start()
    try:
        for _ in range(100):
            register(TEXT)
    finally:
        stop.set()
        thread.join()
    assert not failed
