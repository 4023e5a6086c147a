"""Trials of tests: models, the rows of each trial, and the plain loop that they are held to."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from helpers.models import tiny, tiny_llama
from torch import Tensor, nn
from transformers import BertForSequenceClassification
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import lora_inject as li
from lora_inject import Trial, Trials

Loss = Callable[[nn.Module, Any, Any], Tensor]  # of the model, its output and the batch
Forward = Callable[[nn.Module, Any], Any]


def norms_in_their_dtype(decoder: Any) -> None:
    """Replace Llama's norms, which compute in float32: that makes a last bit 1e-8."""
    for layer in (decoder, *decoder.layers):
        for name, norm in list(layer.named_children()):
            if isinstance(norm, LlamaRMSNorm):
                setattr(layer, name, nn.RMSNorm(len(norm.weight), norm.variance_epsilon))


def of_llama() -> Any:
    model = tiny_llama(vocab_size=31)
    norms_in_their_dtype(model.model)
    return model


def of_bert() -> Any:
    return tiny(BertForSequenceClassification, vocab_size=31)


DENSE = "query|value|dense"
BERT_TRIALS = {
    "all": Trial({"rank": 2, "dropout": 0.3, "targets": [DENSE]}, lr=1e-2, clip=0.1),
    "qv": Trial({"rank": 2, "targets": ["query|value"], "train": ["classifier"]}, lr=2e-2),
    "more": Trial({"rank": 2, "dropout": 0.1, "targets": [DENSE]}, lr=1e-2, seed=3),
}


def batches(names: Iterable[str], step: int, rows: Mapping[str, int]) -> dict[str, Any]:
    """Each trial's own rows, which depend on its name and the step alone."""
    given = {}
    for name in names:
        generator = torch.Generator().manual_seed(step * 1000 + sum(map(ord, name)))
        ids = torch.randint(0, 13, (rows.get(name, 2), 7), generator=generator)
        given[name] = {"input_ids": ids, "labels": ids}
    return given


def square(out: Any, _: Any = None) -> Tensor:
    return (out - 1).square().mean()


def values(model: nn.Module, name: str) -> dict[str, Tensor]:
    return {k: p.detach().clone() for k, p in li.adapter_parameters(model, name).items()}


def check_equal(found: nn.Module, wanted: Any, name: str, within: float = 1e-12) -> None:
    """An adapter of one model has the values of another's, or those that are given."""
    mine = values(found, name)
    theirs = values(wanted, name) if isinstance(wanted, nn.Module) else wanted
    for key, value in theirs.items():
        error = (mine[key] - value).norm()
        assert error <= within * value.norm(), (name, key, error / value.norm())


def check_each(run: Any, trials: Mapping[str, Trial], within: float = 1e-12) -> Trials:
    """All trials of one run equal the same run of each alone."""
    together: Trials = run(trials)
    for name in together.running:
        check_equal(together.model, run({name: trials[name]}).model, name, within)
    return together


def called(model: nn.Module, batch: Any) -> Any:
    """The output of a batch: its entries by name, but for the labels, or the tensor itself."""
    if isinstance(batch, Tensor):
        return model(batch)
    return model(**{key: value for key, value in batch.items() if key != "labels"})


def next_token(_: nn.Module, out: Any, batch: Any) -> Tensor:
    return li.causal_loss(out, batch)


def plain_loop(
    model: nn.Module,
    name: str,
    trial: Trial,
    steps: Iterable[Iterable[Any]],
    loss: Loss | None = None,
    forward: Forward | None = None,
    before: Callable[[nn.Module, int], object] | None = None,
) -> nn.Module:
    """Train one adapter as anybody would; each step adds the gradients of its batches.

    One with dropout trains alone in `Trials`, as no loop by hand draws the same numbers.
    """
    loss, forward = loss or next_token, forward or called
    if "'dropout': 0." in str(trial.config.to_dict()):
        how = {"forward": partial(forward, model), "loss": partial(loss, model)}
        lone = Trials(model, {name: trial}, **how)
        for step, given in enumerate(steps):
            if before is not None:
                before(model, step)
            for batch in given:
                lone.forward_backward({name: batch})
            lone.optimizer_step(name)
        return model
    torch.manual_seed(trial.seed)
    li.inject(model, trial.config, name)
    torch.manual_seed(trial.seed)
    groups = li.parameter_groups(model, trial.lr, trial.b_lr_ratio)
    rates = [group["lr"] for group in groups]
    optimizer = torch.optim.AdamW(groups, betas=trial.betas, weight_decay=trial.weight_decay)
    for step, given in enumerate(steps):
        if before is not None:
            before(model, step)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * trial.factor(step)
        optimizer.zero_grad()
        for batch in given:
            loss(model, forward(model, batch), batch).backward()
        if trial.clip:
            nn.utils.clip_grad_norm_(li.adapter_parameters(model, name).values(), trial.clip)
        optimizer.step()
    return model
