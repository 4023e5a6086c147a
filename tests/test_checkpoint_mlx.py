"""A merged checkpoint served by a program that is not transformers: MLX, which runs on CPUs too.

Skipped where mlx-lm is not installed: `pip install 'mlx[cpu]' mlx-lm`, a minute.
"""

import copy

import peft
import pytest
import torch
from helpers.checkpoints import merged_on_disk
from helpers.models import tiny_llama

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
mlx_utils = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed")

N_NEW = 12
PROMPT = [1, 17, 42, 5, 9]


def made(tmp_path, *, tied, targets):
    """Save a tiny Llama and an adapter of PEFT, merge on disk; returns the adapted model."""
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "eos_token_id": 95}
    plain = tiny_llama(**sizes, max_position_embeddings=64, tie_word_embeddings=tied)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets)
    model = peft.get_peft_model(copy.deepcopy(plain), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "adapter")
    merged_on_disk(plain, tmp_path / "adapter", tmp_path)
    return model.eval()


def served(folder):
    """Load a folder as MLX's server does and return a function from token ids to logits."""
    model, _ = mlx_utils.load_model(folder)
    return lambda ids: torch.tensor(model(mx.array([ids])).tolist())[0]


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
    model = made(tmp_path, tied=tied, targets=targets)
    logits, of_base = served(tmp_path / "merged"), served(tmp_path / "base")
    with torch.no_grad():
        wanted = model(torch.tensor([PROMPT])).logits[0]
        tokens = model.generate(
            input_ids=torch.tensor([PROMPT]), max_new_tokens=N_NEW, do_sample=False
        )
    torch.testing.assert_close(logits(PROMPT), wanted, atol=1e-4, rtol=0)
    assert float((of_base(PROMPT) - wanted).abs().max()) > 0.1  # the adapter does something
    ids = list(PROMPT)
    while len(ids) < tokens.shape[1]:
        ids.append(int(logits(ids)[-1].argmax()))
    assert ids == tokens[0].tolist()
