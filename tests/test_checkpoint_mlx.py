"""A merged checkpoint served by MLX: `pip install 'mlx[cpu]' mlx-lm`, a minute."""

import copy

import peft
import pytest
import torch
from helpers.checkpoints import merged_on_disk
from helpers.models import tiny_llama

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
mlx_utils = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed")


def served(folder, prompt):
    """Return the logits of a folder that is loaded as MLX's server does."""
    model, _ = mlx_utils.load_model(folder)
    return torch.tensor(model(mx.array([prompt])).tolist())[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("tied", "targets"),
    [
        (False, ["q_proj", "v_proj", "down_proj", "lm_head"]),
        (True, ["q_proj", "lm_head"]),
        (True, ["up_proj", "embed_tokens"]),
    ],
)
def test_mlx_serves_the_merged_checkpoint(tmp_path, tied, targets):
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96}
    plain = tiny_llama(**sizes, max_position_embeddings=64, tie_word_embeddings=tied)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets)
    model = peft.get_peft_model(copy.deepcopy(plain), config).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "adapter")
    merged_on_disk(plain, tmp_path / "adapter", tmp_path)
    prompt = [1, 17, 42, 5, 9]
    with torch.no_grad():
        wanted = model(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(served(tmp_path / "merged", prompt), wanted, atol=1e-4, rtol=0)
    of_base = served(tmp_path / "base", prompt)
    assert float((of_base - wanted).abs().max()) > 0.1  # the adapter does something
