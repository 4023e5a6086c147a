"""Files that an earlier version wrote mean today what they meant then.

Each archive holds a base, an adapter or a state as files, and what came out of it. Commit 2678fc8
wrote the files by a program that the history of this folder has, but those of trials, which were
renewed once: they hold each trial's tensors and AdamW. Outputs are held to those that it computed,
and to the dense reference in float64 of the tensors in the file.
"""

import shutil
import zipfile
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import error
from contract.kinds import KINDS, Host, dense_output
from golden import cases
from golden.cases import CASES, FILES, FORMATS, NOT_IN_PEFT, archive, output_of
from helpers.refusals import refused
from helpers.training import trainer
from safetensors.torch import load_file
from torch import Tensor, nn

import lora_inject as li
from lora_inject.core.adapter import native
from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.spec.sites import SiteSpec, Slices

EXACT = 1e-5  # float32 on any processor; what is lost or misread changes outputs by a hundredth
Unpack = Callable[..., Path]


@pytest.fixture
def unpack(tmp_path: Path) -> Unpack:
    """Lay out the files of a case in a folder of the test's own."""

    def unpack(*names: str) -> Path:
        with zipfile.ZipFile(archive(*names)) as packed:
            packed.extractall(tmp_path / "golden")
        return tmp_path / "golden"

    return unpack


def held(path: Path, part: str) -> dict[str, Tensor]:
    """What a case's file of expected tensors holds of one sort, by name."""
    tensors = load_file(path / "expected.safetensors")
    return {k.removeprefix(f"{part}/"): t for k, t in tensors.items() if k.startswith(f"{part}/")}


def with_base(model: nn.Module, path: Path) -> Any:
    """The model with the values of the case's base."""
    model.load_state_dict(held(path, "base"))
    return model.eval()


def expected_output(path: Path) -> Tensor:
    return load_file(path / "expected.safetensors")["output"]


# Of a site with all defaults, what else each field may be that files state.
OTHERWISE: dict[str, object] = {
    "kind": "conv1d", "in_features": 12, "out_features": 8, "weight_shape": (6, 4, 2, 1),
    "rank": 3, "alpha": 5.0, "transposed": True, "experts": 2, "scaling": "rslora", "dropout": 0.5,
    "init": ("normal", 0.5), "compute": "float32", "variant": "dora", "lora_bias": True,
    "slices": Slices((("q", 4), ("k", 2)), ("k",)), "update": "weight", "only": (1,), "share": "A",
}  # fmt: skip
FITTING = {"in_features": {"weight_shape": (6, 12)}, "out_features": {"weight_shape": (8, 4)},
           "weight_shape": {"in_features": 8}, "experts": {"weight_shape": (2, 6, 4)},
           "only": {"experts": 2, "weight_shape": (2, 6, 4)}}  # fmt: skip


def test_a_file_states_every_field_of_a_site() -> None:
    """A field that is added without a word in files would be lost in them."""
    stated = {field.name for field in fields(SiteSpec) if field.init}
    assert stated - {"name", "weight", "aliases", "rule"} == OTHERWISE.keys()
    plain = SiteSpec("h.0.fc", "linear", 4, 6, (6, 4), rank=2, alpha=4.0)
    for name, value in OTHERWISE.items():
        spec = replace(plain, **{name: value, **FITTING.get(name, {})})
        tensors = {role: torch.zeros(spec.shape_of(role)) for role in spec.roles}
        state = li.AdapterState({spec.name: SiteState.of(spec, tensors)})
        [read] = native.parse(native.describe(state, "native")).specs.values()
        assert getattr(read, name) == value
        assert read == spec


def test_no_archive_is_left_unread() -> None:
    due = {archive("kinds", name) for name in KINDS} | {archive("cases", name) for name in CASES}
    due |= {archive(n) for n in ("state dict", "trials", "proof", "trainer")}
    assert {*FILES.rglob("*.zip")} == due


# ------------------------------------------------------------------------- adapters of each kind


OF_KINDS = [(kind, layout) for kind in KINDS for layout in FORMATS]
OF_KINDS = [pair for pair in OF_KINDS if pair[1] == "native" or pair[0] not in NOT_IN_PEFT]


@pytest.mark.parametrize(("name", "layout"), OF_KINDS)
def test_an_adapter_of_each_kind_of_layer_computes_what_it_computed(
    name: str, layout: str, unpack: Unpack
) -> None:
    kind, path = KINDS[name], unpack("kinds", name)
    plain = with_base(Host(kind.layer()), path)
    inputs = [*held(path, "input").values()]
    factors = load_file(path / "adapter.safetensors")
    A, B = (factors[f"{role}/{kind.site}"].double() for role in "AB")
    dense = dense_output(kind, plain, A, B, inputs)
    model = li.load_adapter(plain, path / FORMATS[layout])
    for wanted in (expected_output(path), dense):
        assert error(output_of(model, inputs), wanted) < EXACT


OF_CASES = [(name, layout) for name, case in CASES.items() for layout in case.formats]


@pytest.mark.parametrize(("name", "layout"), OF_CASES)
def test_an_adapter_with_all_that_it_carries_computes_what_it_computed(
    name: str, layout: str, unpack: Unpack
) -> None:
    case, path = CASES[name], unpack("cases", name)
    plain = with_base(case.model().to(case.dtype), path)
    dense = cases.dense_output(case, plain, load_file(path / "adapter.safetensors"))
    model = li.load_adapter(plain, path / FORMATS[layout])
    for wanted in (expected_output(path), dense):
        assert error(output_of(model, case.inputs), wanted) < case.tolerance


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.spelled_out])
def test_both_formats_hold_one_adapter_with_its_config_and_its_base(
    name: str, unpack: Unpack
) -> None:
    """PEFT's folder has the text of the native file, so nothing is lost on the way through it."""
    path = unpack("cases", name)
    native, peft = (li.read_adapter(path / file) for file in FORMATS.values())
    assert native == peft
    assert native.fingerprint is not None
    wanted = CASES[name].config
    if wanted is not None:
        assert native.config == li.Config.from_dict(wanted).to_dict()


# ------------------------------------------------------------------------------ a model's own state


def of_two_adapters(path: Path) -> nn.Module:
    model = with_base(cases.Net(), path)
    for name, asked in cases.STATE_CONFIGS.items():
        li.inject(model, asked, name)
    return model


def test_a_state_dict_of_two_adapters_is_read_with_scales_slices_and_rows(unpack: Unpack) -> None:
    path = unpack("state dict")
    model = of_two_adapters(path)
    model.load_state_dict(torch.load(path / "two.pt", weights_only=True))
    for name, wanted in held(path, "output").items():
        li.activate(model, name)
        assert error(output_of(model, cases.IDS), wanted) < EXACT


def test_a_state_dict_says_for_which_scale_it_is(unpack: Unpack) -> None:
    path = unpack("state dict")
    model = with_base(cases.Net(), path)
    for name, asked in cases.STATE_CONFIGS.items():
        li.inject(model, {**asked, "alpha": 64}, name)
    with refused(li.StateError, "'fc.lora_A__first'", "1.5"):
        model.load_state_dict(torch.load(path / "two.pt", weights_only=True))


def test_a_merged_state_dict_is_refused_under_adapters_and_is_what_a_plain_model_computes(
    unpack: Unpack,
) -> None:
    path = unpack("state dict")
    state = torch.load(path / "merged.pt", weights_only=True)
    with refused(li.StateError, "'second'", "unmerge"):
        of_two_adapters(path).load_state_dict(state)
    plain = cases.Net().eval()
    plain.load_state_dict(state, strict=False)
    assert error(output_of(plain, cases.IDS), held(path, "output")["second"]) < EXACT


# ------------------------------------------------------------------- runs that were interrupted


def test_trials_that_were_saved_go_on_to_the_same_result(unpack: Unpack) -> None:
    path = unpack("trials")
    model = with_base(cases.regression(), path)
    trials = li.Trials.resume(model, path / "trials.pt", loss=cases.squared)
    for batch in held(path, "input")["0"][3:]:
        trials.step(batch)
    for name in cases.TRIALS:
        losses = torch.tensor(trials.losses[name]).double()
        assert error(losses, held(path, "losses")[name]) < EXACT
        for key, tensor in li.adapter_parameters(model, name).items():
            assert error(tensor, held(path, f"tensors/{name}")[key]) < EXACT


def test_an_interrupted_run_of_trainer_goes_on_to_the_same_adapter(unpack: Unpack) -> None:
    path = unpack("trainer")
    model = with_base(cases.small_llama(vocab_size=17), path)
    made = trainer(path / "run", li.inject(model, cases.TRAINED))
    shutil.move(path / "checkpoint-2", path / "run" / "checkpoint-2")
    made.train(resume_from_checkpoint=str(path / "run" / "checkpoint-2"))
    assert made.state.global_step == 6
    found = li.adapter_parameters(model)
    assert found.keys() == held(path, "tensors").keys()
    for name, wanted in held(path, "tensors").items():
        assert error(found[name], wanted) < 1e-3  # Adam divides by roots of small numbers


def test_a_checkpoint_of_trainer_is_an_adapter(unpack: Unpack) -> None:
    path = unpack("trainer")
    state = li.read_adapter(path / "checkpoint-2")
    assert len(state.sites) == 2
    assert [*state.trained] == ["model.norm.weight"]


# ------------------------------------------------------------------------------- proofs of behavior


@pytest.mark.parametrize("layout", FORMATS)
def test_a_proof_tells_the_adapter_from_its_absence(layout: str, unpack: Unpack) -> None:
    path = unpack("proof") / "tokens"
    model = with_base(cases.small_llama(), path)
    (inputs,) = held(path, "input").values()
    li.load_adapter(model, path / FORMATS[layout])
    assert error(output_of(model, [inputs]), expected_output(path)) < EXACT
    assert li.verify_loaded(model).ok
    doubled = li.verify_loaded(li.activate(model, {"default": 2.0}))
    assert (doubled.word, doubled.scale) == ("scaled", pytest.approx(2.0, rel=0.1))
    assert li.verify_loaded(li.activate(model, None)).word == "without"
