"""Which experts to adapt: all, the most chosen quarter, others, or one A for all, on a small model.

A mixture of experts is trained on Python's library and its manual, and then adapted to a kind of
text that it has not seen (tables of code pages), each time with attention and some experts.
MoE-Sieve (arXiv:2603.24044) says that the most chosen quarter does as well as all.

    python scripts/sieve.py            # some ten minutes on two cores; prints a table in Markdown
"""

import argparse
import copy
import encodings
import os
import pydoc_data.topics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import lora_inject as li

LENGTH, ROWS = 64, 16
LIBRARY = Path(os.__file__).parent
EXPERTS = {"match": "all-experts", "rank": {"active": 16}}
CASES: dict[str, list[Any]] = {
    "attention only": [],
    "all experts": [EXPERTS],
    "the most chosen quarter": [EXPERTS | {"only": "sieve.yaml", "top": 0.25}],
    "the most chosen half": [EXPERTS | {"only": "sieve.yaml", "top": 0.5}],
    "the least chosen quarter": [EXPERTS | {"only": "least.yaml", "top": 0.25}],
    "a quarter by number": [EXPERTS | {"only": [0, 4, 8, 12]}],
    "all experts, one A": [EXPERTS | {"share": "A"}],
    "all experts, one B": [EXPERTS | {"share": "B"}],
}


def bytes_of(paths: list[Path]) -> torch.Tensor:
    """The text of some files, as numbers of bytes."""
    return torch.frombuffer(bytearray(b"".join(p.read_bytes() for p in paths)), dtype=torch.uint8)


def batches(text: torch.Tensor, n: int, seed: int) -> Iterator[torch.Tensor]:
    """Rows from random places."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n):
        starts = torch.randint(0, len(text) - LENGTH, (ROWS,), generator=generator)
        yield torch.stack([text[s : s + LENGTH] for s in starts]).long()


def train(model: Any, text: torch.Tensor, steps: int, rate: float, seed: int = 0) -> None:
    """Train what requires gradients."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    for ids in batches(text, steps, seed):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def loss(model: Any, text: torch.Tensor) -> float:
    """The loss on thirty batches."""
    with torch.no_grad():
        model.config.output_router_logits = False
        each = [float(model(input_ids=ids, labels=ids).loss) for ids in batches(text, 30, 99)]
        model.config.output_router_logits = True
    return sum(each) / len(each)


def pretrained(steps: int) -> Any:
    """A mixture of 16 experts, of which a token goes to 2."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 96, "num_hidden_layers": 2, "vocab_size": 256, "head_dim": 32}
    sizes |= {"num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 96}
    mixture = {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    mixture |= {"output_router_logits": True, "router_aux_loss_coef": 0.01}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **mixture))
    code = bytes_of(sorted(LIBRARY.glob("[a-m]*.py")))
    manual = bytes_of([Path(pydoc_data.topics.__file__)])
    train(model, torch.cat([code[:600_000], manual[:600_000]]), steps, 3e-3)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pretrain", type=int, default=1500, help="steps of the base")
    parser.add_argument("--steps", type=int, default=200, help="steps of each adapter")
    parser.add_argument("--seeds", type=int, default=2)
    given = parser.parse_args()
    tables = bytes_of(sorted(Path(encodings.__file__).parent.glob("cp*.py")))
    tuned, held_out = tables[: len(tables) * 3 // 4], tables[len(tables) * 3 // 4 :]
    base = pretrained(given.pretrain)
    profile = li.profile_experts(base, [{"input_ids": i} for i in batches(tuned, 20, 1)])
    profile.write("sieve.yaml")
    least = {name: [max(counts) - n for n in counts] for name, counts in profile.experts.items()}
    li.ExpertProfile(experts=least).write("least.yaml")
    print(profile.picture())
    print(f"the most chosen quarter gets {100 * profile.covered(0.25):.0f} % of the choices")
    print(f"\nbase: {loss(base, held_out):.4f}\n")
    print("| experts | parameters | held-out loss |\n|---|--:|--:|")
    for name, rules in CASES.items():
        losses = []
        for seed in range(given.seeds):
            torch.manual_seed(seed)
            model = copy.deepcopy(base)
            targets = [r"self_attn\..*", *rules]
            li.inject(model, {"rank": 8, "alpha": 32, "targets": targets})
            n = sum(p.numel() for p in li.adapter_parameters(model).values())
            train(model, tuned, given.steps, 3e-3, seed)
            losses.append(loss(model, held_out))
        print(f"| {name} | {n:,} | {' '.join(f'{each:.4f}' for each in losses)} |", flush=True)


if __name__ == "__main__":
    main()
