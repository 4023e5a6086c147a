"""`check`: what each program would refuse, ignore or scale wrong, with the way out."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import safetensors.torch
import torch
from helpers.reference import llama
from helpers.refusals import refused
from helpers.states import SITES, Site, edit_config, linear, spoil, state_of
from zoo.build import build

import lora_inject as li

CLIENTS = ("vllm==0.32", "sglang", "llama.cpp", "mlx", "peft", "diffusers", "comfyui")


def layer(n: int, name: str, rank: int = 8, alpha: float = 16.0) -> Site:
    return linear(f"model.layers.{n}.self_attn.{name}", rank=rank, alpha=alpha)


PLAIN = [layer(n, name) for n in (0, 1) for name in ("q_proj", "v_proj")]
EMBEDDING = SITES["embedding"].by(rank=8, alpha=16.0)
LAST = {"alpha": layer(1, "v_proj", alpha=8.0), "rank": layer(1, "v_proj", rank=16, alpha=32.0)}


def alike(**numbers: Any) -> li.AdapterState:
    return state_of(*(row.by(**numbers) for row in PLAIN))


def beside(name: str) -> li.AdapterState:
    return state_of(*PLAIN, trained={name: torch.ones(3)})


LINEAR = {"vllm==0.32", "llama.cpp", "peft", "diffusers"}
NOT_LLAMA_CPP = LINEAR - {"llama.cpp"}
CASES: dict[str, tuple[li.AdapterState, set[str]]] = {  # who takes it; scripts/interop/ asks
    "plain": (state_of(*PLAIN), LINEAR | {"sglang"}),
    "rslora": (alike(scaling="rslora"), NOT_LLAMA_CPP),
    "one alpha differs": (state_of(*PLAIN[:-1], LAST["alpha"]), NOT_LLAMA_CPP),
    "one rank differs": (state_of(*PLAIN[:-1], LAST["rank"]), NOT_LLAMA_CPP),
    "one layer only": (state_of(*PLAIN[:2], layer(1, "q_proj")), LINEAR),
    "q without v": (state_of(layer(0, "q_proj")), LINEAR),
    "up without gate": (state_of(layer(0, "up_proj")), LINEAR),
    "an embedding": (state_of(*PLAIN, EMBEDDING), LINEAR | {"sglang"}),
    "a norm": (beside("model.norm.weight"), {"peft", "diffusers"}),
    "a head": (beside("score.weight"), NOT_LLAMA_CPP),
    "rank 24": (alike(rank=24, alpha=48.0), LINEAR | {"sglang"}),
}
STATES = {case: state for case, (state, _) in CASES.items()}


@pytest.mark.parametrize("case", CASES)
def test_who_takes_what(case: str, tmp_path: Path) -> None:
    state, takers = CASES[case]
    path = li.write_adapter(state, tmp_path / "a")
    findings = {client: li.check_adapter(path, client) for client in CLIENTS}
    taken = {client for client, of in findings.items() if not any(f.stops for f in of)}
    assert taken == takers, findings
    assert all(finding.fix for of in findings.values() for finding in of)


def test_portable_and_the_formats_of_their_own_are_taken(tmp_path: Path) -> None:
    for case in ("rslora", "one alpha differs", "one rank differs"):
        path = li.convert(STATES[case], tmp_path / case, "portable")
        for client in ("vllm", "vllm==0.30", "sglang", "llama.cpp", "peft"):
            assert not li.check_adapter(path, client), (case, client)
    mine = {"mlx": "mlx", "comfyui": "kohya", "diffusers": "diffusers"}
    for client, layout in mine.items():
        options = {} if layout == "mlx" else {"component": "unet"}
        path = tmp_path / f"{layout}.safetensors"
        path = li.convert(STATES["rslora"], path, layout, **options)
        assert not li.check_adapter(path, client)
    assert "not of the" not in li.check_adapter(path, "vllm")[0].problem


@pytest.mark.parametrize(
    ("change", "client", "named"),
    [
        ({"use_dora": True}, "vllm", "DoRA"),
        ({"bias": "all"}, "sglang", "biases"),
        ({"init_lora_weights": "pissa"}, "vllm", "init_lora_weights 'pissa'"),
        ({"modules_to_save": ["embed_tokens"]}, "vllm", "'modules_to_save' 'embed_tokens'"),
        ({"target_modules": ".*q_proj"}, "sglang", "list"),
        ({"r": 4}, "peft", "ranks"),
        ({"peft_type": None}, "peft", "'peft_type'"),
        ({"peft_type": "IA3"}, "vllm", "'IA3'"),
        ({"target_modules": ...}, "vllm", "'target_modules'"),
    ],
)
def test_what_a_config_says_is_checked(change, client, named, tmp_path) -> None:
    path = edit_config(li.write_adapter(STATES["plain"], tmp_path / "a"), **change)
    findings = li.check_adapter(path, client)
    assert any(f.stops and named in f.problem for f in findings), findings


OF_VERSIONS = {  # what each version does of vLLM's own sources
    "one alpha differs": {"0.30": True, "0.31": True, "0.31.1": True, "0.32": False, "1.0": False},
    "rslora": {"0.30": False, "0.32": False},
    "a head": {"0.30": True, "0.31": False, "0.31.0": False, "0.32": False},
}


@pytest.mark.parametrize("case", OF_VERSIONS)
def test_a_fact_about_a_program_holds_in_some_of_its_versions(case, run, tmp_path) -> None:
    path = li.write_adapter(STATES[case], tmp_path / "a")
    edit_config(path, **({"modules_to_save": ["score"]} if case == "a head" else {}))
    for version, stops in OF_VERSIONS[case].items():
        found = [f for f in li.check_adapter(path, f"vllm=={version}") if f.stops]
        assert bool(found) is stops, (version, found)
        assert run("check", path, "--for", f"vllm=={version}").code == stops
    found = [f.problem for f in li.check_adapter(path, "vllm") if f.stops]
    assert all("up to 0.3" in problem for problem in found)  # of any version, which is named
    assert bool(found) is any(OF_VERSIONS[case].values())


@pytest.mark.parametrize(
    ("client", "named"),
    [("vllm==0.29.1", "0.30"), ("vllm==new", "'new'"), ("vllm==", "''"), ("mlx==0.1", "0.32.2")],
)
def test_a_version_of_which_nothing_is_known_is_refused(client, named, tmp_path) -> None:
    path = li.write_adapter(STATES["plain"], tmp_path / "a")
    with refused(li.FormatError, named, repr(client)):
        li.check_adapter(path, client)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"target_modules": ["mlp"]}, "'target_modules'"),
        ({"lora_alpha": ...}, "'lora_alpha' is missing"),
        ({"new_method": {"a": 1}}, "'new_method'"),
    ],
)
def test_what_our_own_reader_refuses_no_program_takes(change, named, tmp_path) -> None:
    path = edit_config(li.write_adapter(STATES["plain"], tmp_path / "a"), **change)
    with refused(li.FormatError, named.split(" ")[0]):
        li.read_adapter(path)
    for client in ("vllm", "vllm==0.32", "sglang", "llama.cpp", "diffusers", "peft"):
        found = [f.problem for f in li.check_adapter(path, client) if f.stops]
        assert any(named in problem for problem in found), (client, found)


@pytest.mark.parametrize(("rank", "option"), [(16, 0), (17, 32), (24, 32), (129, 256), (321, 512)])
def test_the_rank_that_vllm_is_to_be_started_with_is_one_that_it_takes(
    rank: int, option: int, tmp_path: Path
) -> None:
    path = li.write_adapter(alike(rank=rank, alpha=2.0 * rank), tmp_path / "a")
    said = [(f.stops, f.fix) for f in li.check_adapter(path, "vllm")]
    assert said == ([(False, f"Start it with --max-lora-rank {option}")] if option else [])


def test_a_rank_above_all_that_vllm_takes_stops_it(tmp_path: Path) -> None:
    (finding,) = li.check_adapter(li.write_adapter(alike(rank=513), tmp_path / "a"), "vllm")
    assert (finding.stops, finding.fix) == (True, "Run lora-inject truncate")


def test_names_that_the_base_lacks_are_found(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    state = state_of(PLAIN[1], layer(0, "v_porj"))
    path = li.write_adapter(state, tmp_path / "a")
    assert not li.check_adapter(path, "vllm")
    (finding,) = li.check_adapter(path, "vllm", base=tmp_path / "base")
    assert "'model.layers.0.self_attn.v_porj'" in finding.problem
    assert "'model.layers.0.self_attn.v_proj'" in finding.fix


def test_a_tower_beside_the_language_model_is_for_a_server_with_an_option(tmp_path: Path) -> None:
    model = build("llava")
    model.save_pretrained(tmp_path / "base")
    li.inject(model, {"rank": 2, "targets": ["q_proj", "multi_modal_projector.linear_1"]})
    path = li.write_adapter(li.adapter_state(model), tmp_path / "a")
    found = li.check_adapter(path, "vllm==0.32", base=tmp_path / "base")
    (finding,) = [f for f in found if "--enable-tower-connector-lora" in f.fix]
    assert not finding.stops
    assert "vision_tower" in finding.problem
    assert "language_model" not in finding.problem
    path = li.convert(li.algebra.subset(path, "language_model.*"), tmp_path / "b", "peft")
    assert li.check_adapter(path, "vllm==0.32", base=tmp_path / "base") == []


@pytest.mark.parametrize(("client", "fix"), [("sglang", "--to vllm"), ("llama.cpp", "merge")])
def test_stacks_of_experts_are_refused(client: str, fix: str, tmp_path: Path) -> None:
    stack = linear("model.layers.0.mlp.experts", rank=8, alpha=16.0)
    path = li.write_adapter(state_of(stack), tmp_path / "a")
    stops = [finding for finding in li.check_adapter(path, client) if finding.stops]
    assert any("'model.layers.0.mlp.experts'" in f.problem and fix in f.fix for f in stops)


def test_a_tied_head_is_none_for_mlx(tmp_path: Path) -> None:
    base = llama()
    base.save_pretrained(tmp_path / "base")
    state = state_of(linear("lm_head", 8, 13, rank=8, alpha=16.0))
    said = base.config.to_dict()
    path = li.write_adapter(state, tmp_path / "a", "mlx", config=said)
    for tied in (False, True):
        config = said | {"tie_word_embeddings": tied}
        (tmp_path / "base/config.json").write_text(json.dumps(config))
        findings = li.check_adapter(path, "mlx", base=tmp_path / "base")
        assert ["tied" in f.problem for f in findings if f.stops] == [True] * tied


TO_OUT = "down_blocks.0.attn1.to_out.0"
Q = "encoder.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("client", "layout", "component", "sites", "stops"),
    [
        ("comfyui", "diffusers", "transformer", ["transformer_blocks.0.attn.to_q"], True),
        ("comfyui", "kohya", "unet", [TO_OUT], False),
        ("comfyui", "kohya", "unet", ["transformer_blocks.0.attn.to_q"], True),
        ("comfyui", "kohya", "transformer", ["transformer_blocks.0.attn.to_q"], False),
        ("comfyui", "kohya", "te1", [Q], False),
        ("comfyui", "kohya", "te", ["text_projection"], True),
        ("diffusers", "kohya", "unet", [TO_OUT], True),
        ("diffusers", "diffusers", "text_encoder", [Q], False),
    ],
)
def test_files_of_image_models(client, layout, component, sites, stops, tmp_path) -> None:
    path = tmp_path / "a.safetensors"
    li.write_adapter(state_of(*map(linear, sites)), path, layout, component=component)
    assert any(finding.stops for finding in li.check_adapter(path, client)) is stops


def test_kohya_files_of_a_transformer_are_for_some_only(tmp_path: Path) -> None:
    state = state_of(linear("transformer_blocks.0.attn.to_q"))
    path = tmp_path / "a.safetensors"
    li.write_adapter(state, path, "kohya", component="transformer")
    safetensors.torch.save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    for client, kind, stops in (
        ("comfyui", "SD3Transformer2DModel", False),
        ("comfyui", "SanaTransformer2DModel", True),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"_class_name": kind}))
        findings = li.check_adapter(path, client, base=tmp_path)
        assert any(f.stops and "only" in f.problem for f in findings) is stops
        (noted,) = [f for f in li.check_adapter(path, client) if "only" in f.problem]
        assert not noted.stops


def test_magnitudes_are_lost_on_a_text_encoder(tmp_path: Path) -> None:
    """Transformers 5.24 looks for them under another key, in PEFT's own files as well."""
    llama().save_pretrained(tmp_path / "base")
    path = li.write_adapter(alike(variant="dora"), tmp_path / "a")
    findings = li.check_adapter(path, "diffusers", base=tmp_path / "base")
    assert any(f.stops and "magnitudes of DoRA" in f.problem for f in findings)
    assert not any(f.stops for f in li.check_adapter(path, "diffusers"))


def test_every_program_that_check_knows_has_been_asked_here(tmp_path: Path) -> None:
    path = li.write_adapter(STATES["plain"], tmp_path / "a")
    names = [client.partition("==")[0] for client in CLIENTS]
    with refused(li.FormatError, "'nobody'", *names) as raised:
        li.check_adapter(path, "nobody")
    assert str(raised.value).count(",") == len(CLIENTS) - 1, "one more has no row"


@pytest.mark.parametrize(
    ("layout", "options", "end", "clients"),
    [
        ("peft", {}, "lora_B.weight", CLIENTS),
        ("mlx", {}, "lora_b", ["mlx"]),
        ("kohya", {"component": "unet"}, "lora_up.weight", ["comfyui"]),
        ("gguf", {"config": {"model_type": "qwen2"}}, "", ["llama.cpp"]),
    ],
)
def test_nan_stops_every_program(layout, options, end, clients, run: Any, tmp_path: Path) -> None:
    path = tmp_path / {"kohya": "a.safetensors", "gguf": "a.gguf"}.get(layout, "a")
    li.write_adapter(state_of(PLAIN[1]), path, layout, **options)
    for client in clients:
        assert not [f for f in li.check_adapter(path, client) if "NaN" in f.problem]
    if end:
        spoil(path, end, torch.nan)
    else:
        gguf.GGUFReader(path, "r+").tensors[0].data.flat[0] = torch.nan
    for client in clients:
        (finding,) = (f for f in li.check_adapter(path, client) if "NaN" in f.problem)
        assert (finding.stops, "v_proj" in finding.problem) == (True, bool(end))
    assert run("check", path, "--for", client).code == 1
