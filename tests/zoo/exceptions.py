"""The model types that cannot meet every step, each with its reason, which is about the model.

An exception is a claim that a test checks. `dead` names the sites without effect, and the
test shows that the model's own weights there have none either; `untying` says that the model may
not be untied, and the test shows that merge refuses and changes nothing. All other steps hold.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Exemption:
    """What a model type is excused from.

    Attributes:
        reason: Why, in the model.
        dead: Regex of all sites, and only those, that cannot have an effect.
        untying: Whether the head cannot be merged because the model may not be untied.
    """

    reason: str
    dead: str | None = None
    untying: bool = False


EXEMPTIONS: dict[str, Exemption] = {
    "emu3": Exemption(
        "the picture tokeniser (a VQ-VAE) answers in discrete codes, and its decoder runs only "
        "when pictures are made",
        dead=r"model\.vqmodel\..*",
    ),
    "markuplm": Exemption(
        "the layer xpath_unitseq2_embeddings is made and never used",
        dead=r"embeddings\.xpath_embeddings\.xpath_unitseq2_embeddings",
    ),
    "maskformer": Exemption(
        "the first decoder layer attends over queries of zero, so that its values are its bias",
        dead=r"transformer_module\.decoder\.layers\.0\.self_attn\.v_proj",
    ),
    "mra": Exemption(
        "its attention is a CUDA kernel; without a GPU transformers answers zeros in its place",
        dead=r"mra\.encoder\.layer\.\d\.attention\.(self\.(query|key|value)|output\.dense)",
    ),
    "phi4_multimodal": Exemption(
        "the pooling head of the picture tower is made and its output never used",
        dead=r"model\.embed_tokens_extend\.image_embed\.img_processor\.head\..*",
    ),
    "switch_transformers": Exemption(
        "its forward scales the head's input by config.tie_word_embeddings, so that the model with "
        "an untied head would be another one: merge refuses that head",
        untying=True,
    ),
}
