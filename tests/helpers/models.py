"""Small models that several tests adapt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import conv1d
from torch import Tensor, nn

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
        found: Tensor = self.head(self.norm(torch.tanh(self.fc(self.embed(ids)))))
        return found


class Tied(nn.Module):
    """A head that shares its tensor with the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.head(torch.tanh(self.embed(ids)))
        return found


class Several(nn.Module):
    """Every way to carry: forward update, weight updates, a trained head, biases, a tied tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.fc = nn.Linear(4, 6)
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

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.c(self.fc(self.embed(ids)))
        x = self.conv(x.transpose(1, 2)).transpose(1, 2) @ self.mix
        return self.lm_head(x), self.head(x)


SEVERAL = {
    "rank": 2,
    "targets": ["embed", "fc", {"match": "c", "slices": ["a", "b"], "adapt": ["b"]}, "conv", "mix"],
    "train": ["head"],
    "bias": "all",
}
OTHER = {"rank": 1, "targets": ["fc", "lm_head"], "train": ["head.bias"], "init": "pissa"}


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
        found: Tensor = unet(image, 3, text).sample
    return found
