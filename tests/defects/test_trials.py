"""Trials: each one is the same run as alone, and leaves the base and the process as they were."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.architectures import ARCHITECTURES
from helpers.trials import check_equal, plain_loop
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lora_inject as li
from lora_inject import Trial, Trials

NAMES = ("a", "b")


def squared(outputs: Any, batch: Any) -> Tensor:
    return F.mse_loss(outputs, batch["y"])


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def given(n_rows: int, *shape: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_rows, *shape, generator=generator, dtype=torch.float64)
    return {"x": x, "y": x.flatten(1)[:, :2].contiguous()}


def trained_alone(
    make: Callable[[], nn.Module], name: str, trial: Trial, batches: list[Any], calls: list[Any]
) -> nn.Module:
    """A plain loop of one trial: forward, loss, backward, AdamW."""
    model = make()
    torch.manual_seed(trial.seed)
    li.inject(model, trial.config, name)
    optimizer = torch.optim.AdamW(
        li.adapter_parameters(model, name).values(), lr=trial.lr, weight_decay=0.0
    )
    for batch, call in zip(batches, calls, strict=True):
        optimizer.zero_grad()
        squared(call(model, batch), batch).backward()
        optimizer.step()
    return model


def check_as_alone(
    make: Callable[[], nn.Module], steps: list[dict[str, Any]], calls: list[Any], **options: Any
) -> Trials:
    """Trials on one model equal plain loops, each on a model of its own."""
    all_layers = {"rank": 2, "targets": ["all-linear"]}
    runs = {name: Trial(all_layers, lr=1e-2, seed=i) for i, name in enumerate(NAMES)}
    trials = Trials(make(), runs, **options)
    for batches, call in zip(steps, calls, strict=True):
        trials.step(batches, forward=lambda b, call=call: call(trials.model, b), loss=squared)
    for name, trial in runs.items():
        own = [batches[name] for batches in steps]
        check_equal(trials.model, trained_alone(make, name, trial, own, calls), name, 1e-10)
    return trials


@pytest.mark.filterwarnings("ignore:trials run in turn")
def test_another_closure_of_the_same_code_is_another_forward() -> None:
    """Of two closures that differ in what they hold, one subtracts the mean of the batch."""

    def forward(mixes: bool) -> Callable[[nn.Module, Any], Tensor]:
        return lambda m, b: m(b["x"]) - (m(b["x"]).mean(0) if mixes else 0)

    steps = [{n: given(3, 4, seed=7 * i + len(n)) for n in NAMES} for i in range(4)]
    steps = [{n: given(3, 4, seed=9 * i + j) for j, n in enumerate(NAMES)} for i in range(4)]
    check_as_alone(net, steps, [forward(mixes=step > 1) for step in range(4)])


class MeanPooled(nn.Module):
    """Classifies rows by the mean over all positions of the batch, padding included."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, ids: Tensor) -> Tensor:
        longest = int((ids != 0).sum(1).max())
        return self.head(torch.tanh(self.fc(self.embed(ids)))[:, :longest].mean(1))


@pytest.mark.filterwarnings("ignore:trials run in turn")
def test_rows_that_mix_in_a_later_batch_only_train_as_alone() -> None:
    """The longest row of the batch decides over how many positions each row is averaged."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        return MeanPooled().double()

    def batch(length: int, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(1, 9, (2, 6), generator=generator)
        ids[:, length:] = 0
        return {"x": ids, "y": torch.randn(2, 2, generator=generator, dtype=torch.float64)}

    full = {"a": batch(6, 1), "b": batch(6, 2)}
    uneven = {"a": batch(2, 3), "b": batch(6, 4)}
    check_as_alone(make, [full, uneven, uneven], [lambda m, b: m(b["x"])] * 3)


def with_batchnorm() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))
    return nn.Sequential(*layers).double().train()


def test_a_lone_trial_moves_the_statistics_of_batchnorm_as_a_plain_loop_does() -> None:
    trial = Trial({"rank": 2, "targets": ["all-linear"]}, lr=1e-2)
    batches = [given(5, 4, seed=i) for i in range(3)]
    calls = [lambda m, b: m(b["x"])] * 3
    trials = Trials(with_batchnorm(), {"a": trial})
    for batch in batches:
        trials.step({"a": batch}, forward=lambda b: trials.model(b["x"]), loss=squared)
    alone = trained_alone(with_batchnorm, "a", trial, batches, calls)
    check_equal(trials.model, alone, "a", 1e-10)
    for key, value in alone[1].state_dict().items():
        torch.testing.assert_close(trials.model[1].state_dict()[key], value, rtol=1e-12, atol=0)


def test_a_dora_with_dropout_trains_beside_others() -> None:
    dora = {"rank": 2, "targets": ["all-linear"], "variant": "dora", "dropout": 0.3}
    runs = {"a": Trial(dora, lr=1e-2), "b": Trial({**dora, "rank": 1}, lr=1e-2, seed=1)}

    def after(some: dict[str, Trial]) -> nn.Module:
        trials = Trials(net(), some)
        for i in range(3):
            batches = {n: given(3, 4, seed=2 * i + (n == "b")) for n in some}
            trials.step(batches, forward=lambda b: trials.model(b["x"]), loss=squared)
        return trials.model

    together = after(runs)
    for name, trial in runs.items():
        check_equal(together, after({name: trial}), name, 1e-10)
        plain = Trial({**trial.config.to_dict(), "dropout": 0.0}, lr=1e-2, seed=trial.seed)
        without = li.adapter_parameters(after({name: plain}), name)
        moved = [not torch.equal(p, without[k]) for k, p in values_of(together, name)]
        assert any(moved), "its dropout acts"


def values_of(model: nn.Module, name: str) -> list[tuple[str, Tensor]]:
    return [*li.adapter_parameters(model, name).items()]


class Generator(TorchDispatchMode):
    """Notes the operations during which the generator of the process is not where it was."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.moved = torch.get_rng_state(), list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not torch.equal(torch.get_rng_state(), self.before):
            self.moved.append(str(func))
        return func(*args, **(kwargs or {}))


def test_the_dropout_of_trials_leaves_the_generator_of_the_process_alone() -> None:
    """Another thread that draws meanwhile would get a trial's numbers, and move them."""
    config = {"rank": 2, "targets": ["all-linear"], "dropout": 0.3}
    trials = Trials(net(), {n: Trial(config, lr=1e-2, seed=i) for i, n in enumerate(NAMES)})
    how: dict[str, Any] = {"forward": lambda b: trials.model(b["x"]), "loss": squared}
    trials.step(given(3, 4, seed=0), **how)
    with Generator() as seen:
        trials.step(given(3, 4, seed=1), **how)
    assert not seen.moved


def test_pictures_of_each_row_train_as_alone() -> None:
    """LLaVA with a picture for each row: the rows of a batch are those of all its tensors."""
    plain = ARCHITECTURES["llava"].build().double().eval()
    n = len(plain.model.get_image_features(torch.randn(1, 3, 16, 16).double()).pooler_output[0])
    token = plain.config.image_token_id

    def batch(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, 60, (2, n + 4), generator=generator)
        ids[:, 1 : 1 + n] = token
        pixels = torch.randn(2, 3, 16, 16, generator=generator, dtype=torch.float64)
        return {
            "input_ids": ids,
            "pixel_values": pixels,
            "labels": ids.masked_fill(ids == token, 5),
        }

    config = {"rank": 2, "targets": ["[qv]_proj"]}
    runs = {name: Trial(config, lr=1e-2, seed=i) for i, name in enumerate(NAMES)}
    steps = [{name: batch(3 * i + len(runs) * (name == "b")) for name in runs} for i in range(3)]
    trials = Trials(copy.deepcopy(plain), runs)
    for batches in steps:
        trials.step(batches)
    for name, trial in runs.items():
        alone = copy.deepcopy(plain)
        plain_loop(alone, name, trial, [[batches[name]] for batches in steps])
        check_equal(trials.model, alone, name, 1e-7)
