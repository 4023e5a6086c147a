"""Files of diffusers and of kohya's sd-scripts: diffusers itself reads and writes them alike."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fill
from helpers.models import denoised, tiny_unet
from helpers.refusals import refused
from helpers.states import SITES, effect, linear, state_of
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_inject as li

pytest.importorskip("diffusers", reason="pip install diffusers")
RULES = [
    {"match": r"attn\d\.to_(q|out\.0)", "rank": 3, "alpha": 1.0},
    {"match": "ff.net.2", "scaling": "rslora"},
    r"resnets\.0\.conv1",
]
pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers and PEFT about each other
CONFIG = {"rank": 2, "alpha": 5.0}
PIPELINE = "pytorch_lora_weights.safetensors"
PAIR = {"lora_A.weight": torch.ones(2, 4), "lora_B.weight": torch.ones(6, 2)}


@pytest.fixture(scope="module")
def unet() -> Any:
    return tiny_unet()


def adapted(plain: Any, targets: Any) -> Any:
    return fill(li.inject(copy.deepcopy(plain), {**CONFIG, "targets": targets}))


def assert_near(output: Tensor, due: Tensor) -> None:
    torch.testing.assert_close(output, due, rtol=1e-4, atol=2e-5)


def test_diffusers_computes_the_same_from_its_own_format(unet: Any, tmp_path: Path) -> None:
    model = adapted(unet, RULES)
    due = denoised(model)
    assert (due - denoised(unet)).abs().max() > 0.05
    li.save_adapter(model, tmp_path / "a", format="diffusers", component="unet")
    name = "pytorch_lora_weights.safetensors"
    theirs = copy.deepcopy(unet)
    theirs.load_lora_adapter(tmp_path / "a", prefix="unet", weight_name=name)
    assert_near(denoised(theirs), due)
    assert_near(denoised(li.load_adapter(copy.deepcopy(unet), tmp_path / "a")), due)


def test_diffusers_computes_the_same_from_a_file_of_kohya(unet: Any, tmp_path: Path) -> None:
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers

    model = adapted(unet, RULES[:2])  # their names know no convolutions
    due = denoised(model)
    path = tmp_path / "a.safetensors"
    li.save_adapter(model, path, format="kohya", component="unet")
    tensors, alphas = _convert_non_diffusers_lora_to_diffusers(load_file(path))
    theirs = copy.deepcopy(unet)
    theirs.load_lora_adapter(tensors, prefix="unet", network_alphas=alphas)
    assert_near(denoised(theirs), due)
    save_file(load_file(path), path)  # without the names in the metadata
    with refused(li.FormatError, "'_'"):
        li.read_adapter(path)
    assert_near(denoised(li.load_adapter(copy.deepcopy(unet), path)), due)


def clip(projection: bool) -> tuple[Any, Any]:
    """A text encoder and the mixin of the pipelines that load its files."""
    from diffusers.loaders import lora_pipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    sizes |= {"num_hidden_layers": 2, "vocab_size": 32, "max_position_embeddings": 8}
    config = CLIPTextConfig(**sizes, projection_dim=12, eos_token_id=2, initializer_factor=5.0)
    model = (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()
    name = "StableDiffusionXL" if projection else "StableDiffusion"
    return model, getattr(lora_pipeline, f"{name}LoraLoaderMixin")


def encoded(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([[1, 5, 9, 2]])).last_hidden_state  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("layout", "component", "start"),
    [
        ("kohya", "te1", "lora_te1_text_model_encoder_layers_0_"),
        ("kohya", "te2", "lora_te2_text_model_encoder_layers_0_"),
        ("diffusers", "text_encoder", "text_encoder.text_model.encoder.layers.0."),
        ("diffusers", "text_encoder_2", "text_encoder_2.text_model.encoder.layers.0."),
    ],
)
def test_text_encoders_have_the_names_that_other_programs_ask_for(
    layout: str, component: str, start: str, tmp_path: Path
) -> None:
    """With `text_model`, which CLIPTextModel has no more; ComfyUI ignores names without it."""
    plain, mixin = clip(projection=component.endswith("2"))
    model = adapted(plain, [r"self_attn\.(q|k|v|out)_proj", r"mlp\.fc[12]"])
    due = encoded(model)
    path = tmp_path / "a.safetensors"
    assert (due - encoded(plain)).abs().max() > 0.05
    li.save_adapter(model, path, format=layout, component=component)
    assert sorted(load_file(path))[0].startswith(start)
    save_file(load_file(path), path)  # without metadata
    prefix = "text_encoder_2" if component.endswith("2") else "text_encoder"
    tensors, alphas = mixin.lora_state_dict(tmp_path, weight_name=path.name)
    theirs = copy.deepcopy(plain)
    mixin.load_lora_into_text_encoder(tensors, alphas, theirs, prefix=prefix)
    ours = li.load_adapter(copy.deepcopy(plain), path)
    plain.save_pretrained(tmp_path / "base")
    folder = li.convert(path, tmp_path / "peft", "peft", base=tmp_path / "base")
    peft = li.load_adapter(copy.deepcopy(plain), folder)
    li.merge_checkpoint(tmp_path / "base", [path], tmp_path / "merged")
    merged = type(plain).from_pretrained(tmp_path / "merged").eval()
    for each in (theirs, ours, peft, merged):
        assert_near(encoded(each), due)
    assert set(li.read_adapter(folder).sites) == set(li.adapter_state(model).sites)


def test_what_diffusers_wrote_is_read_right(unet: Any, tmp_path: Path) -> None:
    theirs = copy.deepcopy(unet)
    patterns = {"rank_pattern": {"to_k": 3}, "alpha_pattern": {"to_k": 7}, "use_rslora": True}
    theirs.add_adapter(LoraConfig(r=2, lora_alpha=5, target_modules=["to_k", "conv1"], **patterns))
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    theirs.save_lora_adapter(tmp_path)
    assert_near(denoised(li.load_adapter(copy.deepcopy(unet), tmp_path)), denoised(theirs))


def test_older_names_of_diffusers(tmp_path: Path) -> None:
    pair = {"down": torch.randn(2, 4), "up": torch.randn(6, 2)}
    paths = {
        "unet.mid.attn1.processor.to_q_lora": "mid.attn1.to_q",
        "unet.mid.attn1.processor.to_out_lora": "mid.attn1.to_out.0",
        "unet.mid.ff.lora": "mid.ff",
        "unet.text.q_proj.lora_linear_layer": "text.q_proj",
        "unet.text.self_attn.to_k_lora": "text.self_attn.k_proj",
        "unet.text.self_attn.to_out_lora": "text.self_attn.out_proj",
    }
    tensors = {f"{path}.{end}.weight": t.clone() for path in paths for end, t in pair.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    state = li.read_adapter(tmp_path / "a.safetensors")
    assert set(state.sites) == set(paths.values())
    for site in state.sites.values():
        torch.testing.assert_close(effect(site).float(), pair["up"] @ pair["down"])


def test_a_part_of_a_file_is_asked_for_and_never_guessed(tmp_path: Path) -> None:
    def write(*modules: str, **numbers: int) -> Path:
        tensors = {f"{m}.{end}": t.clone() for m in modules for end, t in PAIR.items()}
        said = {"lora_adapter_metadata": json.dumps(numbers)} if numbers else None
        save_file(tensors, tmp_path / "a.safetensors", said)
        return tmp_path / "a.safetensors"

    file = write("unet.a", "b")  # with and without the name of a component
    with refused(li.FormatError, "'unet'", 'component=""'):
        li.read_adapter(file)
    assert list(li.read_adapter(file, component="unet").sites) == ["a"]
    assert list(li.read_adapter(file, component="").sites) == ["b", "unet.a"]
    file = write("unet.a", "decoder.a", **{"unet.r": 2, "unet.lora_alpha": 4})
    with refused(li.FormatError, "'unet.lora_alpha'"):
        li.read_adapter(file, component="")
    assert li.read_adapter(file, component="unet").sites["a"].scale == 2.0


class Gpt2(nn.Module):
    """Whose own names begin as those of a pipeline's component do."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict({"fc": nn.Linear(4, 6)})


@pytest.mark.parametrize("start", ["", "transformer."])
def test_the_alpha_of_a_lone_file_is_asked_for_and_never_guessed(start, run, tmp_path) -> None:
    """A scale of 1 is right for a part of a pipeline, and for other files their alpha is lost."""
    file, name = tmp_path / "a.safetensors", f"{start}fc"
    save_file({f"{name}.{end}": t.clone() for end, t in PAIR.items()}, file)
    model = Gpt2() if start else nn.ModuleDict({"fc": nn.Linear(4, 6)})
    part = "transformer" if start else ""
    asked = f'component="{part}"', "alpha=", 'format="diffusers"'
    for act in (lambda: li.read_adapter(file), lambda: li.load_adapter(model, file)):
        with refused(li.FormatError, str(file), *asked, model=model):
            act()
    assert f"--from-component {part or repr(part)}" in run("inspect", file).err
    assert li.read_adapter(file, alpha=32).sites[name].scale == 16.0
    assert li.adapter_state(li.load_adapter(model, file, alpha=32)).sites[name].scale == 16.0
    assert li.read_adapter(file, component="").sites[name].scale == 1.0
    (site,) = li.read_adapter(file, format="diffusers").sites.values()
    assert site.scale == 1.0
    if start:  # a model tells of which of the two it is
        inner = nn.ModuleDict({"fc": nn.Linear(4, 6)})
        assert li.adapter_state(li.load_adapter(inner, file)).sites["fc"].scale == 1.0
        assert run("inspect", file, "--from-component", "transformer").code == 0
    save_file({f"{name}.{end}": t.clone() for end, t in PAIR.items()}, tmp_path / PIPELINE)
    (site,) = li.read_adapter(tmp_path / PIPELINE, component=None).sites.values()
    assert site.scale == 1.0  # as diffusers calls it


def test_an_alpha_beside_that_of_the_file_is_refused(tmp_path: Path) -> None:
    tensors = {f"unet.fc.{end}": t.clone() for end, t in PAIR.items()}
    said = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 4})}
    save_file(tensors, tmp_path / "a.safetensors", said)
    with refused(li.FormatError, "alpha"):
        li.read_adapter(tmp_path / "a.safetensors", component="unet", alpha=8)


def vae() -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    sizes = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
    down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    return AutoencoderKL(down_block_types=down, up_block_types=up, **sizes).eval()


IMAGE = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("targets", [["to_q", "conv1"], r"decoder\..*\.to_q"])
def test_a_file_of_an_autoencoder_is_read_whole(targets: Any, tmp_path: Path) -> None:
    """Its child `decoder` has the name of a component of other pipelines."""
    theirs = vae()
    config = LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False)
    theirs.add_adapter(config)
    theirs.save_lora_adapter(tmp_path)
    due = theirs(IMAGE).sample
    assert (due - vae()(IMAGE).sample).abs().max() > 0.01
    file = tmp_path / "pytorch_lora_weights.safetensors"
    for _ in ("as it is", "without a header, as before diffusers 0.34"):
        for options in ({}, {"component": ""}):
            assert_near(li.load_adapter(vae(), tmp_path, **options)(IMAGE).sample, due)
        save_file(load_file(file), file)


def test_comfyui_computes_the_same(tmp_path: Path) -> None:
    """Its formula for a module's keys: up @ down, flattened, times alpha over the rank."""
    rows = [SITES[kind].by(init="pissa") for kind in ("conv", "slices", "linear")]
    state, known = state_of(*rows), {row.name: row for row in rows}
    path = li.write_adapter(state, tmp_path / "a.safetensors", "kohya", component="te1")
    tensors = load_file(path)
    for name, site in state.sites.items():
        key = f"lora_te1_{name.replace('.', '_')}"
        up, down, alpha = (
            tensors[f"{key}.{end}"] for end in ("lora_up.weight", "lora_down.weight", "alpha")
        )
        delta = float(alpha) / len(down) * (up.flatten(1) @ down.flatten(1))
        torch.testing.assert_close(delta, effect(site, known[name]).float(), rtol=1e-4, atol=1e-5)


DOWN_UP = {"lora_down.weight": torch.ones(2, 4), "lora_up.weight": torch.ones(6, 2)}


def kohya(tmp_path: Path, *modules: str, **further: Tensor) -> Path:
    tensors = {f"{m}.{end}": t.clone() for m in modules for end, t in DOWN_UP.items()}
    save_file(tensors | further, tmp_path / "k.safetensors")
    return tmp_path / "k.safetensors"


def test_names_of_kohya_are_resolved_against_the_model_or_refused(tmp_path: Path) -> None:
    path = kohya(tmp_path, "lora_unet_a_b_c")
    sites = li.read_adapter(path, module_names=["a.b_c", "a", "a.b"]).sites
    assert list(sites) == ["a.b_c"]
    assert sites["a.b_c"].scale == 1.0  # no alpha: the rank
    with refused(li.FormatError, "'a.b_c', 'a_b.c'"):
        li.read_adapter(path, module_names=["a.b_c", "a_b.c"])
    with refused(li.FormatError, "'a_b_d'"):
        li.read_adapter(path, module_names=["a.b.d"])
    path = kohya(tmp_path, "lora_unet_a", "lora_te2_b")
    names = ["a", "b"]
    with refused(li.FormatError, "'te2', 'unet'", "component="):
        li.read_adapter(path, module_names=names)
    assert list(li.read_adapter(path, component="te2", module_names=names).sites) == ["b"]
    with refused(li.FormatError, "'te1'"):
        li.read_adapter(path, component="te1", module_names=names)


A = "lora_unet_a"


@pytest.mark.parametrize(
    ("modules", "further", "named"),
    [
        ([A], {f"{A}.dora_scale": torch.ones(6)}, "DoRA"),
        ([A], {"x": torch.ones(6)}, "'x'"),
        (["lora_vae_a"], {}, "lora_vae_a"),
        ([A], {f"{A}.alpha": torch.tensor(float("nan"))}, "nan"),
    ],
)
def test_files_of_kohya_are_strict(modules, further, named, tmp_path) -> None:
    path = kohya(tmp_path, *modules, **further)
    with refused(li.FormatError, named):
        li.read_adapter(path, module_names=["a"])


def test_the_component_and_names_that_stay_apart_are_asked_for(tmp_path: Path) -> None:
    state = state_of(linear("a.b"), linear("a_b"))
    for layout, options, named in (
        ("kohya", {}, 'component="unet"'),
        ("diffusers", {"component": "vae"}, "'vae'"),
        ("kohya", {"component": "unet"}, "'lora_unet_a_b'"),
    ):
        with refused(li.FormatError, named):
            li.write_adapter(state, tmp_path / "a.safetensors", layout, **options)


def test_methods_of_diffusers_that_do_nothing_are_refused(unet: Any) -> None:
    model = adapted(unet, RULES)
    for method, args, instead in (
        ("disable_lora", (), "lora_inject.disabled"),
        ("set_adapters", ("default", 0.5), "lora_inject.activate"),
    ):
        for each in (model, copy.deepcopy(model)):
            with refused(li.StateError, method, instead, model=each):
                getattr(each, method)(*args)
    li.eject(model)
    assert "disable_lora" not in vars(model)
