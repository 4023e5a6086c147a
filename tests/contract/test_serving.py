"""A small server: batches of several tenants on a thread pool."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from conftest import fill
from helpers.models import tiny_llama
from torch import Tensor
from transformers import GenerationConfig, OPTConfig, OPTForCausalLM

import lora_inject as li

TENANTS = ("sql", "style", None)


def tiny_opt(**changes: Any) -> Any:
    """Its MLPs get rows and positions as one axis."""
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 24, "num_hidden_layers": 2}
    return OPTForCausalLM(OPTConfig(**sizes, num_attention_heads=2, **changes))


@pytest.fixture(scope="module", params=[tiny_llama, tiny_opt])
def server(request: Any) -> Any:
    torch.manual_seed(0)
    model = request.param(vocab_size=50, pad_token_id=0, eos_token_id=None).double().eval()
    for name in ("sql", "style"):
        fill(li.inject(model, {"rank": 2, "alpha": 16, "targets": ["all-linear"]}, name), name)
    return li.activate(model, None)


def generate(model: Any, ids: Tensor, tenants: list[str | None], beams: int) -> Tensor:
    how = GenerationConfig(max_new_tokens=9, num_beams=beams, do_sample=False, pad_token_id=0)
    with torch.no_grad(), li.routed(model, tenants, repeat=beams):
        mask = torch.ones_like(ids)
        return model.generate(ids, attention_mask=mask, generation_config=how)  # type: ignore[no-any-return]


@pytest.mark.parametrize("beams", [1, 3])
def test_batches_of_several_tenants_generate_what_each_alone_does(server: Any, beams: int) -> None:
    ids = torch.randint(1, 50, (3, 4))

    def alone(row: Tensor, tenant: str | None) -> Tensor:
        return generate(server, row[None], [tenant], beams)[0]

    wanted = [alone(row, name) for row, name in zip(ids, TENANTS, strict=True)]
    assert len({tuple(alone(ids[0], name).tolist()) for name in TENANTS}) == 3
    with ThreadPoolExecutor(3) as pool:
        batches = [pool.submit(generate, server, ids, list(TENANTS), beams) for _ in range(3)]
        for batch in batches:
            assert torch.equal(batch.result(), torch.stack(wanted))
