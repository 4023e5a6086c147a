"""LoRA on a diffusion UNet, and the file that diffusers' `load_lora_adapter` reads.

    python scripts/examples/diffusion.py --model runwayml/stable-diffusion-v1-5 [--steps 100]

The attention projections get an adapter, as in diffusers' own training scripts. The data here is
noise, so that the example runs anywhere: put your latents and text embeddings into `batch`.
"""

import argparse

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

import lora_inject as li

CONFIG = {"rank": 4, "alpha": 4, "targets": ["to_q", "to_k", "to_v", r"to_out\.0"]}


def batch(unet: UNet2DConditionModel, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (rows, channels, height, width) and text embeddings (rows, words, features)."""
    shape = unet.config
    latents = torch.randn(rows, shape.in_channels, shape.sample_size, shape.sample_size)
    return latents, torch.randn(rows, 7, shape.cross_attention_dim)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="a folder or a name on the hub")
    parser.add_argument("--subfolder", default="unet", help="'' when the folder is the UNet's own")
    parser.add_argument("--out", default="unet-adapter")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=2)
    asked = parser.parse_args(arguments)

    torch.manual_seed(0)
    load = UNet2DConditionModel.from_pretrained
    unet = load(asked.model, subfolder=asked.subfolder or None)
    li.inject(unet, CONFIG)
    noise_of = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(li.parameter_groups(unet, lr=1e-4))
    for step in range(asked.steps):
        latents, text = batch(unet, asked.rows)
        noise, when = torch.randn_like(latents), torch.randint(0, 1000, (asked.rows,))
        predicted = unet(noise_of.add_noise(latents, noise, when), when, text).sample
        loss = torch.nn.functional.mse_loss(predicted, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step + 1}: loss {loss.item():.4f}")

    li.save_adapter(unet, asked.out)
    latents, text = batch(unet, 1)
    with torch.no_grad():
        ours = unet(latents, 10, text).sample
        theirs = load(asked.model, subfolder=asked.subfolder or None)
        file = "adapter_model.safetensors"
        theirs.load_lora_adapter(asked.out, prefix="base_model.model", weight_name=file)
        difference = (theirs(latents, 10, text).sample - ours).abs().max().item()
    print(f"diffusers reads {asked.out} with outputs that differ by {difference:.1e}")


if __name__ == "__main__":
    main()
