"""Adapters on experts in vLLM: log-probabilities of its engine beside ours, on a CPU.

    python scripts/served_experts.py prepare FOLDER          # with lora_inject and transformers
    python scripts/served_experts.py serve FOLDER qwen3_moe  # with vllm (its CPU build will do)
    python scripts/served_experts.py serve FOLDER qwen3_moe --shared  # factors for all experts

`prepare` writes a tiny base of random weights for each family, an adapter on its experts as vLLM
takes it (`vllm`) and as PEFT stacks it (`peft`), and our log-probabilities. `serve` starts vLLM's
engine with `enable_lora`, and prints how far its log-probabilities are from ours.

vLLM multiplies experts with adapters by a Triton kernel, which a CPU does not run. So its `apply`
is replaced by the same product in torch, from the A and B that vLLM's own loader has put into its
own buffers. What is shown is all but that kernel: names, packing, ranks, scales, the engine.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IDS = list(range(4, 20))
SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
SIZES |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 512, "qk_rope_head_dim": 64}  # as vLLM has kernels
LATENT |= {"qk_nope_head_dim": 128, "v_head_dim": 128}
# As DeepSeek-V3 is published. Without it vLLM 0.32's kernel for a CPU turns the wrong rows of
# queries with several heads (model_executor/layers/rotary_embedding/base.py, `forward_cpu`).
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40, "mscale": 1.0}
YARN |= {"mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1}
YARN |= {"original_max_position_embeddings": 4096}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 4, "moe_intermediate_size": 64, "head_dim": 32}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "head_dim": 32}),
    "gpt_oss": ("GptOss", {"num_local_experts": 4, "head_dim": 32}),
    "deepseek_v3": ("DeepseekV3", {
        "n_routed_experts": 4, "moe_intermediate_size": 64, "n_shared_experts": 1, "n_group": 1,
        "first_k_dense_replace": 1, "topk_group": 1, **LATENT, "rope_parameters": YARN,
    }),
}  # fmt: skip
SHARED = {"gate_up": "A", "down": "B"}
# What vLLM reads of a DeepSeek's config, and transformers' class does not write.
SAID = {"deepseek_v3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}}


def prepare(folder: Path, only: str | None) -> None:
    """Write bases, adapters and log-probabilities."""
    import transformers

    import lora_inject as li

    for family, (cls, own) in FAMILIES.items():
        if only not in (None, family):
            continue
        torch.manual_seed(0)
        config = getattr(transformers, f"{cls}Config")(**SIZES | own)
        model = getattr(transformers, f"{cls}ForCausalLM")(config).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.2)
        here = folder / family
        model.save_pretrained(here / "base")
        _tokenizer().save_pretrained(here / "base")
        said = json.loads((here / "base" / "config.json").read_text()) | SAID.get(family, {})
        (here / "base" / "config.json").write_text(json.dumps(said))
        ours = {"base": _log_probabilities(model)}
        li.inject(model, {"rank": 8, "alpha": 16, "targets": ["all-experts"]})
        for parameter in li.adapter_parameters(model).values():
            nn.init.normal_(parameter, std=0.1)
        ours["adapter"] = _log_probabilities(model)
        sites = li.adapter_state(model).sites.values()
        ours["deltas"] = [site.scale * site.B @ site.A for site in sites]
        torch.save(ours, here / "ours.pt")
        li.save_adapter(model, here / "peft")
        try:
            li.convert(here / "peft", here / "vllm", "vllm", base=here / "base")
        except li.FormatError as refused:
            print(f"{family}: {refused}")
        _prepare_shared(li, li.eject(model), here, ours)
        torch.save(ours, here / "ours.pt")
        for form in ("peft", "vllm", "sglang"):
            if (here / form).is_dir():
                found = li.check_adapter(here / form, "vllm", base=here / "base")
                print(f"{family}, {form}: check says {[each.problem for each in found]}")


def _prepare_shared(li: Any, model: Any, here: Path, ours: dict[str, Any]) -> None:
    """Write an adapter whose experts share a factor, where the base has experts singly."""
    from lora_inject.core.adapter.other_tensors import with_every_expert

    shared = [
        {"match": rf"experts\.{part}_proj", "share": factor} for part, factor in SHARED.items()
    ]
    li.inject(model, {"rank": 8, "alpha": 16, "targets": shared})
    for parameter in li.adapter_parameters(model).values():
        nn.init.normal_(parameter, std=0.1)
    ours["shared"] = _log_probabilities(model)
    sites = with_every_expert(li.adapter_state(model)).sites.values()
    ours["shared deltas"] = [site.scale * site.B @ site.A for site in sites]
    try:
        li.convert(li.adapter_state(model), here / "sglang", "sglang", base=here / "base")
    except li.FormatError as refused:
        print(f"{here.name}: {refused}")


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(SIZES["vocab_size"])}
    names = {f"{kind}_token": f"w{i}" for i, kind in enumerate(("bos", "eos", "pad", "unk"))}
    tokenizer = Tokenizer(models.WordLevel(words, names["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@torch.no_grad()
def _log_probabilities(model: Any) -> Tensor:
    """Return those of each token but the first."""
    logits = model(torch.tensor([IDS])).logits[0].log_softmax(-1)
    return logits[torch.arange(len(IDS) - 1), torch.tensor(IDS[1:])]


def serve(folder: Path, family: str, *, shared: bool) -> None:
    """Print how far vLLM's log-probabilities are from ours."""
    settings = {"CPU_KVCACHE_SPACE": "1", "CPU_OMP_THREADS_BIND": "nobind", "NO_USAGE_STATS": "1"}
    settings |= {"ENABLE_V1_MULTIPROCESSING": "0", "LOGGING_LEVEL": "ERROR", "MLA_DISABLE": "1"}
    os.environ.update({f"VLLM_{key}": value for key, value in settings.items()})
    import vllm
    from vllm.lora.request import LoRARequest
    from vllm.model_executor.layers.fused_moe.experts import triton_moe

    triton_moe.TritonExperts.apply = apply
    here = folder / family
    engine = vllm.LLM(
        model=str(here / "base"), dtype="float32", enforce_eager=True, max_model_len=32,
        enable_lora=True, max_lora_rank=8, max_loras=2, max_num_seqs=2, max_num_batched_tokens=32,
        num_gpu_blocks_override=64, enable_prefix_caching=False, enable_moe_shared_loras=shared,
    )  # fmt: skip
    ours = torch.load(here / "ours.pt")
    adapter = "shared" if shared else "adapter"
    moved = float((ours[adapter] - ours["base"]).abs().max())
    print(f"vllm {vllm.__version__}, {family}: the adapter moves log-probabilities by {moved:.1e}")
    layouts = ("sglang",) if shared else ("vllm", "peft")
    forms = [form for form in layouts if (here / form).is_dir()]
    for number, form in enumerate(["base", *forms]):
        wanted = ours["base" if form == "base" else adapter]
        request = LoRARequest(form, number, str(here / form)) if number else None
        try:
            off = float((_served(engine, request) - wanted).abs().max())
        except Exception as refused:  # noqa: BLE001 - what it says is what is shown
            print(f"{form}: {type(refused).__name__}: {str(refused)[:160]}")
        else:
            print(f"{form}: off by {off:.1e}")
            if _CONTEXTS and number:
                wanted = ours["shared deltas" if shared else "deltas"]
                pairs = zip(_deltas(number - 1), wanted, strict=True)
                furthest = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
                print(f"{form}: B A as vLLM holds it is off by {furthest:.1e}")


_CONTEXTS: dict[int, Any] = {}  # what vLLM hands to each block's product, in the order of blocks


def _deltas(slot: int) -> list[Tensor]:
    """Return B A of each stack of vLLM's buffers, block by block."""
    stacks_of_blocks = []
    for context in _CONTEXTS.values():
        for kind in ("w13", "w2"):
            stacks = (getattr(context, f"{kind}_lora_{f}_stacked") for f in "ba")
            parts = [b[slot] @ a[slot] for b, a in zip(*stacks, strict=True)]
            stacks_of_blocks.append(torch.cat(parts, 1))
    return stacks_of_blocks


def _served(engine: Any, request: Any) -> Tensor:
    from vllm import SamplingParams

    settings = SamplingParams(max_tokens=1, prompt_logprobs=1, temperature=0)
    prompt = {"prompt_token_ids": IDS}
    (answer,) = engine.generate([prompt], settings, lora_request=request, use_tqdm=False)
    each = answer.prompt_logprobs
    return torch.tensor([each[i][IDS[i]].logprob for i in range(1, len(IDS))])


def apply(
    self: Any,
    output: Tensor,
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    activation: Any,
    *_: Any,
    **__: Any,
) -> None:
    """Compute what vLLM's Triton kernels compute, token by token, from its own buffers."""
    context, total = self._lora_context, torch.zeros_like(hidden_states)
    slots = [-1] * len(total)
    if context is not None:
        _CONTEXTS[id(self)] = context
        of_tokens = context.punica_wrapper.token_lora_indices.tolist()
        slots = of_tokens[: len(total)] if len(of_tokens) >= len(total) else slots
    for t, x in enumerate(hidden_states):
        for e, share in zip(topk_ids[t].tolist(), topk_weights[t].tolist(), strict=True):
            inner = w1[e] @ x
            if self.w1_bias is not None:
                inner = inner + self.w1_bias[e]
            if slots[t] >= 0:
                stacks = (context.w13_lora_a_stacked, context.w13_lora_b_stacked)
                inner = inner + torch.cat(_updates(*stacks, slots[t], e, x))
            middle = _activated(inner, activation)
            y = w2[e] @ middle
            if self.w2_bias is not None:
                y = y + self.w2_bias[e]
            if slots[t] >= 0:
                stacks = (context.w2_lora_a_stacked, context.w2_lora_b_stacked)
                y = y + _updates(*stacks, slots[t], e, middle)[0]
            total[t] += share * y
    output.copy_(total)


def _updates(
    a_stacks: tuple[Tensor, ...], b_stacks: tuple[Tensor, ...], slot: int, expert: int, x: Tensor
) -> list[Tensor]:
    """Return the updates of an expert's matrices; a factor that all share stands once."""
    pairs = zip(a_stacks, b_stacks, strict=True)
    return [_of(b, slot, expert) @ (_of(a, slot, expert) @ x) for a, b in pairs]


def _of(stack: Tensor, slot: int, expert: int) -> Tensor:
    return stack[slot, min(expert, stack.shape[1] - 1)]


def _activated(x: Tensor, activation: Any) -> Tensor:
    if "oai" in str(getattr(activation, "value", activation)).lower():  # GPT-OSS: interleaved
        gate, up = x[::2].clamp(max=7.0), x[1::2].clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    gate, up = x.chunk(2)
    return F.silu(gate) * up


def main() -> None:
    """Run a step."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("step", choices=["prepare", "serve"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("family", nargs="?", choices=list(FAMILIES))
    parser.add_argument("--shared", action="store_true", help="experts that share a factor")
    given = parser.parse_args()
    if given.step == "prepare":
        prepare(given.folder, given.family)
    else:
        serve(given.folder, given.family, shared=given.shared)


if __name__ == "__main__":
    main()
