"""Small models that several tests adapt."""

from typing import Any

import pytest
import torch
from contract.kinds import OwnForward, conv1d
from torch import Tensor, nn
from transformers import LlamaForCausalLM

IDS = torch.arange(6).view(2, 3)


class Net(nn.Module):
    """An embedding, a layer, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.fc = nn.Linear(5, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(torch.tanh(self.fc(self.embed(ids)))))


class Tied(nn.Module):
    """A head that shares its tensor with the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(ids)))


class TiedDecoder(nn.Module):
    """A layer between an embedding and the head that shares its tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.Embedding(9, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.fc(self.embed(ids)))


class Several(nn.Module):
    """Every way to carry: forward update, weight updates, a trained head, biases, a tied tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.fc = nn.Linear(4, 6)
        self.own = OwnForward(6, 6)
        self.c = conv1d(4, 6)
        self.conv = nn.Conv1d(4, 4, 1)
        self.mix = nn.Parameter(torch.randn(4, 4))
        self.lm_head = nn.Linear(4, 7, bias=False)
        self.lm_head.weight = self.embed.weight
        self.head = nn.Linear(4, 2)
        self.fc.weight.requires_grad_(False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def resize_token_embeddings(self) -> None:
        raise NotImplementedError

    def forward(self, ids: Tensor) -> Tensor:
        x = self.c(torch.tanh(self.own(torch.tanh(self.fc(self.embed(ids))))))
        x = self.conv(x.transpose(1, 2)).transpose(1, 2) @ self.mix
        return torch.cat([self.lm_head(x), self.head(x)], dim=-1)


SEVERAL = {
    "rank": 2,
    "targets": ["embed", "fc", {"match": "c", "slices": ["a", "b"], "adapt": ["b"]}, "conv", "mix"],
    "train": ["head"],
    "bias": "all",
}
OTHER = {"rank": 1, "targets": ["fc", "lm_head"], "train": ["head.bias"], "init": "pissa"}


BLOCKS = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
BLOCKS |= {"num_attention_heads": 2, "vocab_size": 17}
# The sizes of a tiny model, by model type. The hidden size of this GPT-OSS is its intermediate
# size: the shape of down_proj says nothing.
SIZES: dict[str, dict[str, Any]] = {
    "llama": {**BLOCKS, "num_key_value_heads": 1},
    "bert": {**BLOCKS, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "gpt2": {
        "n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 16, "vocab_size": 17,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        "bos_token_id": 0, "eos_token_id": 0,
    },
    "gpt_oss": {
        **BLOCKS, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32, "head_dim": 8,
        "num_key_value_heads": 1, "num_local_experts": 2, "num_experts_per_tok": 1,
    },
}  # fmt: skip


def tiny(cls: Any, **changes: Any) -> Any:
    """A tiny model of a class of transformers, with the same random weights each time."""
    torch.manual_seed(0)
    settings = cls.config_class
    return cls(settings(**SIZES[settings.model_type] | changes))


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    return tiny(LlamaForCausalLM, **changes)


def tiny_unet() -> Any:
    """A UNet of diffusers with cross attention; the test is skipped where diffusers is missing."""
    diffusers = pytest.importorskip("diffusers", reason="pip install diffusers")
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        norm_num_groups=4,
        attention_head_dim=4,
    ).eval()


def denoised(unet: nn.Module) -> Tensor:
    """One step of `tiny_unet` on the same noise and text each time."""
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(1, 4, 8, 8, generator=generator)
    text = torch.randn(1, 5, 8, generator=generator)
    with torch.no_grad():
        return unet(image, 3, text).sample
