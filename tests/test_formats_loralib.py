"""loralib's own layers write what is read here, and read what is written here."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapter_states import KIND_SPECS, dense, make_site, make_state
from safetensors.torch import save_file
from torch import nn

from lora_inject.core.adapter.state import AdapterState
from lora_inject.errors import FormatError
from lora_inject.formats import read_adapter, write_adapter

lora = pytest.importorskip("loralib")


def linear(**options: Any) -> Any:
    return lambda: lora.Linear(5, 7, r=2, lora_alpha=6, **options)


def fused(*parts: bool, **options: Any) -> Any:
    return lambda: lora.MergedLinear(5, 9, r=2, lora_alpha=6, enable_lora=[*parts], **options)


TURNED = {"fan_in_fan_out": True}
LAYERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "linear": (linear(), {}),
    "fan_in_fan_out": (linear(**TURNED), TURNED),
    "by name": (linear(**TURNED), {"fan_in_fan_out": ["layer"]}),
    "embedding": (lambda: lora.Embedding(11, 4, r=2, lora_alpha=6), {"embeddings": ["layer"]}),
    "merged": (fused(True, False, True), {"enable_lora": [True, False, True]}),
    "merged, one part": (
        fused(False, True, False), {"enable_lora": {"layer": [False, True, False]}},
    ),
    "merged, (in, out)": (
        fused(True, True, False, **TURNED), {"enable_lora": [True, True, False], **TURNED},
    ),
}  # fmt: skip


def loralib_delta(layer: nn.Module) -> torch.Tensor:
    """What loralib adds to the weight when it merges: `eval()` folds, `train()` takes out again."""
    layer.train()
    with torch.no_grad():
        layer.weight.zero_()
    layer.eval()
    delta = layer.weight.detach().clone()
    layer.train()
    return delta


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors"])
@pytest.mark.parametrize("case", LAYERS)
def test_what_loralib_writes_is_read_right(case: str, suffix: str, tmp_path: Path) -> None:
    build, options = LAYERS[case]
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": build(), "head": nn.Linear(2, 2)})
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    tensors = lora.lora_state_dict(model)
    tensors |= {k: v for k, v in model.state_dict().items() if k.startswith("head.")}
    path = tmp_path / f"a{suffix}"
    if suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
        options = {**options, "allow_pickle": True}
    state = read_adapter(path, alpha=6, **options)
    delta = loralib_delta(model["layer"])
    torch.testing.assert_close(dense(state.sites["layer"]).float(), delta, rtol=1e-5, atol=1e-6)
    assert set(state.trained) == {"head.weight", "head.bias"}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_loralib_reads_what_is_written(suffix: str, tmp_path: Path) -> None:
    spec = KIND_SPECS["slices of conv1d"]
    state = AdapterState({spec.name: make_site(spec)}, {"ln.weight": torch.ones(2)})
    path = write_adapter(state, tmp_path / f"a{suffix}", format="loralib")
    back = read_adapter(
        path,
        alpha=spec.alpha,
        allow_pickle=True,
        fan_in_fan_out=True,
        enable_lora=[True, False, True],
    )
    assert torch.equal(dense(back.sites[spec.name]), dense(state.sites[spec.name]))

    layer = lora.MergedLinear(
        4, 6, r=2, lora_alpha=32, enable_lora=[True, False, True], fan_in_fan_out=True
    )
    model = nn.ModuleDict({"h": nn.ModuleList([nn.ModuleDict({"c_attn": layer})])})
    tensors = {
        f"{spec.name}.lora_A": back.sites[spec.name].A,
        f"{spec.name}.lora_B": back.sites[spec.name].B,
    }
    assert not model.load_state_dict(tensors, strict=False).unexpected_keys
    torch.testing.assert_close(
        loralib_delta(layer), dense(state.sites[spec.name]).float(), rtol=1e-5, atol=1e-5
    )


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_pickles_are_read_only_when_allowed_and_run_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"x.lora_A": torch.ones(2, 2), "x.lora_B": torch.ones(2, 2)}, path)
    with pytest.raises(FormatError, match="allow_pickle=True"):
        read_adapter(path, alpha=1)
    torch.save({"x.lora_A": Evil(tmp_path / "was here")}, path)
    with pytest.raises(FormatError, match="cannot be loaded"):
        read_adapter(path, alpha=1, allow_pickle=True)
    assert not (tmp_path / "was here").exists()
    for content in (b"", b"not a pickle", [1], {"a": 1}):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with pytest.raises(FormatError):
            read_adapter(path, alpha=1, allow_pickle=True)


PAIR, ALPHA = {"fc.lora_A": torch.ones(2, 4), "fc.lora_B": torch.ones(6, 2)}, {"alpha": 1}
BAD: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any], str]] = {
    "no alpha": (PAIR, {}, "do not hold alpha"),
    "alpha 0": (PAIR, {"alpha": 0}, "do not hold alpha"),
    "no B": (
        {f"{name}.lora_A": PAIR["fc.lora_A"] for name in ("fc", "x")}, ALPHA, "lora_B is missing",
    ),
    "no A": (
        {"fc.lora_B": PAIR["fc.lora_B"], **{f"x.{k}": v for k, v in PAIR.items()}}, ALPHA,
        "lora_A is missing",
    ),
    "fused": (PAIR | {"fc.lora_A": torch.ones(4, 4)}, ALPHA, "fused layer with 2"),
    "too many parts": (
        PAIR | {"fc.lora_A": torch.ones(4, 4)}, {**ALPHA, "enable_lora": [True] * 3},
        "of 2 adapted parts",
    ),
    "one part, unnamed": (
        PAIR, {**ALPHA, "enable_lora": [True, False]}, "cannot be distinguished from a plain layer",
    ),
    "ranks": (PAIR | {"fc.lora_A": torch.ones(3, 4)}, ALPHA, "do not fit"),
    "name": (PAIR, {**ALPHA, "embeddings": ["wte"]}, "no site is called 'wte'"),
    "shapes": (PAIR | {"fc.lora_A": torch.ones(2)}, ALPHA, "shapes"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_read_right_is_refused(case: str, tmp_path: Path) -> None:
    tensors, options, words = BAD[case]
    save_file({key: t.clone() for key, t in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(FormatError, match=words):
        read_adapter(tmp_path / "a.safetensors", format="loralib", **options)


def test_what_loralib_cannot_express_is_refused(tmp_path: Path) -> None:
    linear = KIND_SPECS["linear"]
    unequal = dataclasses.replace(KIND_SPECS["slices"], rank=2, alpha=4.0)
    states = {
        "one rank, one alpha": make_state(linear, dataclasses.replace(linear, name="b", alpha=1.0)),
        "standard scaling": make_state(dataclasses.replace(linear, scaling="rslora")),
        "has no conv": make_state(KIND_SPECS["conv"]),
        "derived from the base": make_state(linear, derived=True),
        "unequal widths": make_state(unequal),
    }
    for words, state in states.items():
        with pytest.raises(FormatError, match=words):
            write_adapter(state, tmp_path / "a.pt", format="loralib")
    with pytest.raises(FormatError, match="does not end in"):
        write_adapter(make_state(linear), tmp_path / "a.txt", format="loralib")
    assert not list(tmp_path.iterdir())
