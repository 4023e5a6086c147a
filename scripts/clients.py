"""What other programs make of the files of this package: run where they are installed.

    python scripts/clients.py            # what can be imported
    python scripts/clients.py --llama-cpp DIR   # also llama.cpp's own converter, of its sources

Each line compares an output, or a tensor, of the other program with this package's. The log is
kept in docs/clients.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lora_inject as li

IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "tie_word_embeddings": False,
    "initializer_range": 0.3,
}
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RULES: dict[str, list[Any]] = {
    "plain": LAYERS,
    "rsLoRA": [{"match": name, "scaling": "rslora"} for name in LAYERS],
    "unequal ranks and alphas": [
        {"match": name, "rank": 2 + n % 3, "alpha": 1.0 + n} for n, name in enumerate(LAYERS)
    ],
    "head": [*LAYERS, "lm_head"],
}


def plain() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def adapted(case: str) -> Any:
    model = li.inject(plain(), {"rank": 4, "alpha": 6.0, "targets": RULES[case]})
    torch.manual_seed(1)
    for parameter in li.adapter_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def of_peft(model: Any, place: Path) -> float:
    from peft import PeftModel

    path = li.convert(li.adapter_state(model), place / "portable", "portable")
    return difference(logits(PeftModel.from_pretrained(plain(), path)), logits(model))


def of_mlx(model: Any, place: Path) -> float:
    import mlx.core as mx
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    plain().save_pretrained(place / "base")
    li.save_adapter(model, place / "mlx", format="mlx")
    theirs = load_adapters(load_model(place / "base")[0], str(place / "mlx"))
    theirs.eval()
    return difference(torch.tensor(theirs(mx.array(IDS.numpy())).tolist()), logits(model))


def of_torchtune(model: Any, place: Path) -> float:
    # Its package wants an older torchao; this file of it needs torch only.
    package = importlib.util.find_spec("torchtune")
    assert package is not None
    assert package.origin is not None
    file = Path(package.origin).parent / "models/convert_weights.py"
    spec = importlib.util.spec_from_file_location("convert_weights", file)
    assert spec is not None
    assert spec.loader is not None
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    li.save_adapter(model, place / "tune", format="torchtune")
    tensors = torch.load(place / "tune/adapter_model.pt", weights_only=True)
    found = theirs.tune_to_peft_adapter_weights(tensors, num_heads=4, num_kv_heads=2, dim=32)
    back = li.read_adapter(place / "tune", config=model.config.to_dict(), allow_pickle=True)
    return max(
        difference(found[f"base_model.model.{name}.lora_{role}.weight"], getattr(site, role))
        for name, site in back.sites.items()
        for role in "AB"
    )


def of_litgpt(model: Any, place: Path) -> float:
    import yaml
    from litgpt.lora import GPT, Config, merge_lora_weights
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama

    li.save_adapter(model, place / "lit", format="litgpt")
    said = yaml.safe_load((place / "lit/hyperparameters.yaml").read_text())
    config = Config(
        n_layer=2, n_embd=32, n_head=4, n_query_groups=2, intermediate_size=48, vocab_size=320,
        padded_vocab_size=320, bias=False, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP",
        rotary_percentage=1.0, parallel_residual=False, norm_eps=1e-6, block_size=64,
        **{k: v for k, v in said.items() if k.startswith("lora_")},
    )  # fmt: skip
    state: dict[str, torch.Tensor] = {}
    copy_weights_hf_llama(config, {}, state, dict(plain().state_dict()))
    theirs = GPT(config)
    tensors = torch.load(place / "lit/lit_model.pth.lora", weights_only=True)["model"]
    theirs.load_state_dict({**state, **tensors}, strict=True)
    theirs.eval()
    with torch.no_grad():
        live = difference(theirs(IDS), logits(model))
        merge_lora_weights(theirs)
        return max(live, difference(theirs(IDS), logits(model)))


def of_llama_cpp(sources: Path) -> Callable[[Any, Path], float]:
    """Its converter on our portable folder, against our own GGUF file."""

    def run(model: Any, place: Path) -> float:
        import gguf

        plain().save_pretrained(place / "base")
        path = li.convert(li.adapter_state(model), place / "portable", "portable")
        converter = [sys.executable, str(sources / "convert_lora_to_gguf.py"), str(path)]
        files = ["--base", str(place / "base"), "--outfile", str(place / "theirs.gguf")]
        subprocess.run([*converter, *files, "--outtype", "f32"], check=True, capture_output=True)
        li.save_adapter(model, place / "ours.gguf", format="gguf")
        deltas = []
        for name in ("theirs", "ours"):
            reader = gguf.GGUFReader(place / f"{name}.gguf")
            alpha = reader.fields["adapter.lora.alpha"].contents()
            tensors = {t.name: torch.tensor(t.data) for t in reader.tensors}
            pairs = {key.removesuffix(".lora_a") for key in tensors if key.endswith(".lora_a")}
            deltas.append(
                {
                    key: alpha / len(a) * tensors[f"{key}.lora_b"] @ a
                    for key in pairs
                    for a in [tensors[f"{key}.lora_a"]]
                }
            )
        assert deltas[0].keys() == deltas[1].keys()
        return max(difference(deltas[0][key], deltas[1][key]) for key in deltas[0])

    return run


def difference(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one.float() - two.float()).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama-cpp", type=Path, help="llama.cpp's sources")
    sources = parser.parse_args().llama_cpp
    clients: dict[str, tuple[str, Callable[[Any, Path], float]]] = {
        "peft": ("peft", of_peft),
        "mlx-lm": ("mlx_lm", of_mlx),
        "torchtune": ("torchtune", of_torchtune),
        "litgpt": ("litgpt", of_litgpt),
    }
    print("| program | adapter | largest difference | effect of the adapter |\n|---|---|---|---|")
    for name, (module, run) in clients.items():
        if importlib.util.find_spec(module) is None:
            print(f"| {name} | - | not installed | - |")
            continue
        for case in RULES:
            report(f"{name} {version(name)}", case, run)
    if sources is not None:
        for case in RULES:
            report("llama.cpp's converter", case, of_llama_cpp(sources))


def report(name: str, case: str, run: Callable[[Any, Path], float]) -> None:
    model = adapted(case)
    effect = difference(logits(model), logits(plain()))
    with tempfile.TemporaryDirectory() as place:
        print(f"| {name} | {case} | {run(model, Path(place)):.1e} | {effect:.2f} |", flush=True)


if __name__ == "__main__":
    main()
