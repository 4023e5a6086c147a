"""The model types that cannot meet every step, each with its reason, which is about the model.

An exception is a claim that a test checks. `dead` names the sites without effect, and the
test shows that the model's own weights there have none either; `untying` says that the model may
not be untied, and the test shows that merge refuses and changes nothing. All other steps hold.
"""

from typing import NamedTuple

# Verdicts on an exchange with PEFT.
SAME = "same outputs"
MERGED = "refused: PEFT's own layers contradict PEFT's merge, which has our outputs"
BY_NAMES = "same outputs, with names: PEFT raises at all-linear"
RAISES = "PEFT raises"
REFUSED = "our writer refuses: PEFT would compute something else"


class Exemption(NamedTuple):
    """What a model type is excused from, and why, in the model."""

    reason: str
    dead: str | None = None  # regex of all sites, and only those, that cannot have an effect
    untying: bool = False  # the model may not be untied, so that its head cannot be merged


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


class Exchanged(NamedTuple):
    """What comes of an exchange with PEFT other than the same outputs, and why: `zoo.exchange`."""

    reason: str
    by_us: str = SAME  # the verdict on PEFT's adapter read by us
    by_peft: str = SAME  # the verdict on our adapter read by PEFT


_READ = "a layer's weight is read by its parent, where PEFT's adapter of the layer has no effect"
_ROUTER = "PEFT takes a Linear whose forward is another for a plain one, and fails in forward"
_RENAMED = (
    "transformers renames keys of this model's checkpoints, and PEFT renames those of the adapter "
    "likewise, some of which have the new names already"
)
_GROUPS = "PEFT needs a rank that a convolution's groups divide, and these have more groups"

EXCHANGED: dict[str, Exchanged] = {
    "aria": Exchanged(_READ, MERGED, REFUSED),
    "bit": Exchanged("the convolution standardizes its weight, PEFT's does not", MERGED, REFUSED),
    "deepseek_v4": Exchanged(_ROUTER, BY_NAMES),
    "flava": Exchanged("the model has no get_input_embeddings, which PEFT calls", RAISES, RAISES),
    "hgnet_v2": Exchanged(_GROUPS, RAISES, REFUSED),
    "inkling2": Exchanged(_RENAMED, by_peft=REFUSED),
    "inkling2_loop": Exchanged(_RENAMED, by_peft=REFUSED),
    "inkling2_loop_text": Exchanged(_RENAMED, by_peft=REFUSED),
    "inkling2_text": Exchanged(_RENAMED, by_peft=REFUSED),
    "laguna": Exchanged(_RENAMED, by_peft=REFUSED),
    "llama4": Exchanged(_ROUTER, BY_NAMES),
    "llama4_text": Exchanged(_ROUTER, BY_NAMES),
    "maskformer": Exchanged(_RENAMED, by_peft=REFUSED),
    "mobilebert": Exchanged(_READ, MERGED, REFUSED),
    "mobilenet_v1": Exchanged(_GROUPS, RAISES, REFUSED),
    "mobilenet_v2": Exchanged(_GROUPS, RAISES, REFUSED),
    "nemotron_h": Exchanged("PEFT refuses out_proj of Mamba layers", RAISES, REFUSED),
    "phi4_multimodal": Exchanged(_READ, MERGED, REFUSED),
    "phimoe": Exchanged(_ROUTER, BY_NAMES),
    "qwen3_omni_moe_thinker": Exchanged(
        "PEFT's all-linear takes a layer of the audio tower for a Linear by its name", BY_NAMES
    ),
    "siglip_vision_model": Exchanged(_READ, MERGED, REFUSED),
    "wavlm": Exchanged(_READ, MERGED, REFUSED),
}
