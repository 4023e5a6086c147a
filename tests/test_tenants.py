"""Many tenants on one base: each on its own clock, with the same results as a plain loop alone."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.trials import batches, by_hand, check_equal, of_llama, values
from torch import nn

import lora_inject as li
from lora_inject import Trial, Trials
from lora_inject.trials.losses import causal_loss

LINEAR = {"rank": 2, "targets": ["all-linear"]}
TENANTS = {
    "ann": Trial(LINEAR, lr=1e-2, clip=0.05, seed=1),
    "bob": Trial({"rank": 3, "dropout": 0.1, "targets": ["[qv]_proj"]}, lr=2e-2, weight_decay=0.1),
    "cy": Trial({**LINEAR, "train": ["norm"]}, lr=5e-3, schedule="cosine", steps=6, warmup=2),
    "dee": Trial(LINEAR, lr=1e-2, b_lr_ratio=4, betas=(0.8, 0.9), seed=3),
}
ROWS = {"ann": 3, "bob": 1, "cy": 2, "dee": 4}


def base() -> Any:
    return of_llama().double().train()


def rows(name: str, step: int) -> Any:
    return batches([name], step, ROWS)[name]


def tenants(*names: str, model: Any = None, **options: Any) -> Trials:
    some = {name: TENANTS[name] for name in names}
    return Trials(base() if model is None else model, some, **options)


def alone(name: str, steps: list[list[int]]) -> Any:
    """A plain loop of one tenant: in each step it adds the gradients of some batches."""
    model, trial = base(), TENANTS[name]
    by_hand(model, name, trial, [[rows(name, i) for i in each] for each in steps], None, add=True)
    return model


def go(run: Trials, name: str, step: int) -> None:
    run.forward_backward({name: rows(name, step)})
    run.optimizer_step(name)


def test_tenants_on_their_own_clocks_equal_a_plain_loop_of_each() -> None:
    run = tenants("ann", "bob")
    go(run, "ann", 0)
    run.forward_backward({"ann": rows("ann", 1), "bob": rows("bob", 0)})  # of two sizes, one pass
    run.add("cy", TENANTS["cy"])  # while gradients of two wait
    run.forward_backward({"ann": rows("ann", 2)})
    run.optimizer_step("ann")
    go(run, "cy", 0)
    go(run, "cy", 1)
    run.optimizer_step("bob")
    run.add("dee", TENANTS["dee"])
    run.step({name: rows(name, 9) for name in ("ann", "bob", "cy", "dee")})
    run.drop("ann")
    go(run, "bob", 2)
    go(run, "cy", 2)
    run.forward_backward({name: rows(name, 7) for name in ("bob", "cy", "dee")})
    run.optimizer_step(["dee", "cy"])
    run.optimizer_step("bob")
    assert run.n_steps == {"bob": 4, "cy": 5, "dee": 2}
    done = {"bob": [[0], [9], [2], [7]], "cy": [[0], [1], [9], [2], [7]], "dee": [[9], [7]]}
    for name, steps in done.items():
        check_equal(run.model, alone(name, steps), name)


def squared(outputs: Any, batch: Any) -> Any:
    return outputs.logits.square().mean()


def absolute(outputs: Any, batch: Any) -> Any:
    return outputs.logits[:, -1].abs().mean()


def test_tenants_have_losses_of_their_own_in_one_pass() -> None:
    losses = {"ann": squared, "bob": absolute, "cy": causal_loss}
    run = tenants(*losses)
    for step in range(3):
        given = {name: rows(name, step) for name in losses}
        run.forward_backward(given, loss=losses)
        run.optimizer_step(list(losses))
    held_out = run.evaluate({name: rows(name, 9) for name in losses}, loss=losses)
    for name, loss in losses.items():
        single = tenants(name)
        for step in range(3):
            single.forward_backward({name: rows(name, step)}, loss=loss)
            single.optimizer_step(name)
        check_equal(run.model, values(single.model, name), name)
        assert run.losses[name] == pytest.approx(single.losses[name], rel=1e-12)
        alone_again = single.evaluate({name: rows(name, 9)}, loss=loss)
        assert held_out[name] == pytest.approx(alone_again[name], rel=1e-12)


def test_a_tenant_without_a_loss_among_those_by_name_is_refused() -> None:
    run = tenants("ann", "bob")
    before = values(run.model, "ann")
    given = {name: rows(name, 0) for name in ("ann", "bob")}
    with pytest.raises(li.StateError, match=r"loss of trial 'bob': there is none of that name"):
        run.forward_backward(given, loss={"ann": squared})
    check_equal(run.model, before, "ann", 0.0)


def test_gradients_of_several_calls_add_up() -> None:
    run = tenants("ann", "bob", "cy")
    for i in range(3):
        run.forward_backward({"cy": rows("cy", i)})
    run.forward_backward({"ann": rows("ann", 0), "cy": rows("cy", 3)})
    norms = run.optimizer_step(["cy", "ann"])
    assert len(run.losses["cy"]) == 1
    other = tenants("cy")
    each = [other.forward_backward({"cy": rows("cy", i)})["cy"] for i in range(4)]
    assert run.losses["cy"] == pytest.approx([sum(each)], rel=1e-12)
    assert other.optimizer_step("cy")["cy"] == pytest.approx(norms["cy"], rel=1e-12)
    check_equal(run.model, alone("cy", [[0, 1, 2, 3]]), "cy")
    check_equal(run.model, alone("ann", [[0]]), "ann")
    start = values(tenants("bob").model, "bob")
    check_equal(run.model, start, "bob", 0.0)


@pytest.mark.parametrize("waits", [False, True], ids=["between steps", "gradients wait"])
def test_a_tenant_that_leaves_and_comes_back_goes_on_as_if_it_had_stayed(
    waits: bool, tmp_path: Path
) -> None:
    run = tenants("ann", "cy", "dee")
    for step in range(3):
        run.step({name: rows(name, step) for name in run.running})
    if waits:
        run.forward_backward({name: rows(name, 3) for name in ("cy", "dee")})
    before = {name: values(run.model, name) for name in ("ann", "dee")}
    file = run.save(tmp_path / "cy.pt", "cy")
    run.drop("cy")
    assert "cy" not in li.adapters(run.model)
    go(run, "ann", 3)
    elsewhere = tenants("bob")
    assert elsewhere.load(file) == ["cy"]
    assert run.load(file) == ["cy"]
    check_equal(run.model, before["dee"], "dee", 0.0)
    for where in (run, elsewhere):
        assert where.n_steps["cy"] == 3
        if not waits:
            where.forward_backward({"cy": rows("cy", 3)})
        where.optimizer_step("cy")
        go(where, "cy", 4)
        check_equal(where.model, alone("cy", [[0], [1], [2], [3], [4]]), "cy")
        assert len(where.losses["cy"]) == 5
    check_equal(elsewhere.model, values(run.model, "cy"), "cy", 0.0)
    check_equal(run.model, alone("ann", [[0], [1], [2], [3]]), "ann")


def test_some_tenants_are_evaluated_and_no_gradient_that_waits_changes() -> None:
    run = tenants("ann", "bob", "cy")
    run.forward_backward({"bob": rows("bob", 0)})
    losses = run.evaluate({"bob": rows("bob", 5), "cy": rows("cy", 5)})
    assert losses.keys() == {"bob", "cy"}
    assert run.held_out == losses
    with pytest.raises(li.StateError, match="there is no batch for 'ann'"):
        run.evaluate({}, by_name=True)
    run.optimizer_step("bob")
    check_equal(run.model, alone("bob", [[0]]), "bob")


def test_a_run_of_one_tenant_goes_on_bit_for_bit_beside_others_that_rest(tmp_path: Path) -> None:
    one = tenants("dee")
    go(one, "dee", 0)
    file = one.save(tmp_path / "dee.pt")
    many = tenants("ann", "bob", "cy")
    many.load(file)
    for step in (1, 2):
        for run in (one, many):
            go(run, "dee", step)
    check_equal(many.model, one.model, "dee", 0.0)
    assert many.losses["dee"] == one.losses["dee"]


def test_an_adapter_that_was_trained_elsewhere_is_where_a_tenant_starts() -> None:
    model = base()
    li.inject(model, LINEAR, "there")
    with torch.no_grad():
        for parameter in li.adapter_parameters(model, "there").values():
            parameter.normal_(std=0.1)
    there = li.adapter_state(model, "there").mapped(torch.clone)
    li.eject(model)
    run = tenants("ann", "bob", model=model)
    run.forward_backward({"bob": rows("bob", 0)})
    run.add("eve", Trial(LINEAR, lr=1e-2))
    li.swap_adapter(model, there, "eve", base="any")
    assert run.forward_backward({"eve": rows("ann", 0)}) != run.forward_backward(
        {"ann": rows("ann", 0)}
    )
    run.optimizer_step(["eve", "bob"])
    other = Trials(base(), {"eve": Trial(LINEAR, lr=1e-2)})
    li.swap_adapter(other.model, there, "eve", base="any")
    other.step(rows("ann", 0))
    check_equal(model, other.model, "eve")
    check_equal(model, alone("bob", [[0]]), "bob")


def test_what_is_active_stays_active_and_what_trains_trains_on() -> None:
    run = tenants("ann", "bob")
    li.activate(run.model, "ann")
    run.add("cy", TENANTS["cy"])
    assert [name for name, one in li.adapters(run.model).items() if one.active] == ["ann"]
    assert {n for n, one in li.adapters(run.model).items() if one.trainable} == {*run.running}


def test_a_rate_for_one_step_takes_the_place_of_the_schedule() -> None:
    run, other = tenants("cy"), tenants("cy")
    for each, lr in ((run, TENANTS["cy"].lr * TENANTS["cy"].factor(0)), (other, None)):
        each.forward_backward({"cy": rows("cy", 0)})
        each.optimizer_step("cy", lr=lr)
    check_equal(run.model, other.model, "cy", 0.0)
    for each, lr in ((run, 0.5), (other, None)):
        each.forward_backward({"cy": rows("cy", 1)})
        each.optimizer_step("cy", lr=lr)
    moved = values(run.model, "cy")
    assert any(not torch.equal(moved[key], v) for key, v in values(other.model, "cy").items())


def test_a_pass_that_fails_leaves_the_gradients_that_wait_as_they_were() -> None:
    run = tenants("ann", "bob", max_tokens=8)  # a group for each

    def loss(out: Any, batch: Any) -> torch.Tensor:
        if len(batch["labels"]) == ROWS["bob"]:
            raise RuntimeError("of bob")
        return li.causal_loss(out, batch)

    run.forward_backward({"ann": rows("ann", 0)})
    with pytest.raises(RuntimeError, match="of bob"):
        run.forward_backward({"ann": rows("ann", 5), "bob": rows("bob", 5)}, loss=loss)
    run.forward_backward({"bob": rows("bob", 0)})
    run.optimizer_step(["ann", "bob"])
    for name in ("ann", "bob"):
        check_equal(run.model, alone(name, [[0]]), name)


@pytest.mark.parametrize("packed", [False, True])
def test_a_tenant_that_diverges_is_stopped_and_what_waits_of_others_is_kept(packed: bool) -> None:
    run = tenants("ann", "bob", packed=packed)

    def given(name: str, step: int) -> Any:
        batch = rows(name, step)
        if packed:
            batch = {key: value.reshape(1, -1) for key, value in batch.items()}
            batch["labels"] = batch["labels"].clone()
            batch["labels"][:, ::7] = -100
            batch["position_ids"] = torch.arange(7).repeat(ROWS[name])[None]
        return batch

    run.model.config.use_cache = False
    run.forward_backward({"ann": given("ann", 0), "bob": given("bob", 0)})
    with torch.no_grad():
        for parameter in li.adapter_parameters(run.model, "bob").values():
            parameter.fill_(torch.nan)
    losses = run.forward_backward({"ann": given("ann", 1), "bob": given("bob", 1)})
    assert losses["bob"] != losses["bob"]
    assert run.running == ["ann"]
    run.optimizer_step("ann")
    other = tenants("ann", packed=packed)
    other.model.config.use_cache = False
    for step in (0, 1):
        other.forward_backward({"ann": given("ann", step)})
    other.optimizer_step("ann")
    check_equal(run.model, other.model, "ann")
    with pytest.raises(li.StateError, match=r"'bob': it was stopped: its loss is nan"):
        run.forward_backward({"bob": given("bob", 2)})
    run.add("cy", TENANTS["cy"])
    run.drop("bob")
    run.add("bob", TENANTS["bob"])
    run.forward_backward({name: given(name, 0) for name in ("ann", "bob", "cy")})
    run.optimizer_step(["ann", "bob", "cy"])
    again = tenants("bob", packed=packed)
    again.model.config.use_cache = False
    again.forward_backward({"bob": given("bob", 0)})
    again.optimizer_step("bob")
    check_equal(run.model, again.model, "bob")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda run: run.forward_backward({"eve": rows("ann", 0)}), "there is no trial 'eve'"),
        (lambda run: run.forward_backward({}), "no trial is named"),
        (lambda run: run.forward_backward(rows("ann", 0)["labels"]), "it is a Tensor"),
        (lambda run: run.optimizer_step("ann"), "no gradient since its last step"),
        (lambda run: run.optimizer_step("eve"), "there is no trial 'eve'"),
        (lambda run: run.optimizer_step(3), "it is an int"),
        (lambda run: run.add("ann", TENANTS["ann"]), "'ann'"),
        (lambda run: run.add("eve", LINEAR), r"Give Trial\("),
        (lambda run: run.drop("eve"), "there is no trial 'eve'"),
        (lambda run: run.save("nowhere", ["eve"]), "there is no trial 'eve'"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(wrong: Any, message: str) -> None:
    run = tenants("ann", "bob")
    run.forward_backward({"bob": rows("bob", 0)})
    with pytest.raises(li.StateError, match=message):
        wrong(run)
    run.optimizer_step("bob")
    check_equal(run.model, alone("bob", [[0]]), "bob")


def test_a_rate_that_is_no_number_above_0_is_refused() -> None:
    run = tenants("ann")
    run.forward_backward({"ann": rows("ann", 0)})
    for lr in (0.0, -1.0, float("nan"), float("inf"), "fast", True):
        with pytest.raises(li.StateError, match="Give a positive number"):
            run.optimizer_step("ann", lr=lr)  # type: ignore[arg-type]


class Attending(nn.Module):
    """A layer and an attention, whose rows cannot run apart."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.attention = nn.Linear(4, 4), nn.MultiheadAttention(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x)
        out: torch.Tensor = self.attention(y, y, y)[0]
        return out


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rank": 2, "targets": ["nothing"]}, "nothing"),
        ({"rank": 2, "targets": [r"attention\.in_proj_weight"]}, "more than one tensor"),
        ({"rank": 2, "targets": ["fc"], "train": ["other"]}, "on "),
    ],
    ids=["a pattern", "a weight that is read", "a dtype"],
)
def test_a_tenant_that_cannot_join_leaves_all_as_it_was(config: Any, message: str) -> None:
    model = Attending()
    model.other = nn.Linear(4, 4).double()
    li.inject(model, {"rank": 1, "targets": ["fc"]}, "mine")
    run = Trials(model, {"a": Trial({"rank": 2, "targets": ["fc"]}, lr=1e-2)})
    li.activate(model, "mine")
    x = torch.randn(3, 4)

    def forward(batch: Any) -> Any:
        return model.fc(batch)

    def loss(out: Any, _: Any) -> torch.Tensor:
        return out.square().mean()

    run.forward_backward({"a": x}, forward=forward, loss=loss)
    before = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
    with pytest.raises(li.LoraInjectError, match=message):
        run.add("b", Trial(config, lr=1e-2))
    after = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
    assert before.keys() == after.keys()
    for name, (flag, grad) in before.items():
        assert after[name][0] is flag
        assert after[name][1] is grad
    assert [n for n, one in li.adapters(model).items() if one.active] == ["mine"]
    run.optimizer_step("a")
    assert run.n_steps == {"a": 1}


def test_a_file_of_another_base_adds_no_tenant(tmp_path: Path) -> None:
    run = tenants("ann")
    file = run.save(tmp_path / "ann.pt")
    model = base()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(1.0)
    other = tenants("bob", model=model)
    other.forward_backward({"bob": rows("bob", 0)})
    with pytest.raises(li.FormatError, match="other values"):
        other.load(file)
    assert [*other.trials] == ["bob"]
    assert [*li.adapters(model)] == ["bob"]
    other.optimizer_step("bob")
    with pytest.raises(li.StateError, match="'ann'"):
        run.load(file)


def test_threads_wait_for_each_other() -> None:
    run = tenants("ann", "bob", "cy")

    def train(name: str) -> None:
        for step in range(3):
            go(run, name, step)

    threads = [threading.Thread(target=train, args=(name,)) for name in run.running]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in run.running:
        check_equal(run.model, alone(name, [[0], [1], [2]]), name)


def test_the_memory_of_a_tenant_that_left_is_free() -> None:
    run = tenants("ann", "bob", "cy")
    size = sum(p.numel() for p in li.adapter_parameters(run.model, "bob").values())
    whole = next(iter(li.adapter_parameters(run.model, "bob").values())).untyped_storage().size()
    run.drop("cy")
    run.drop("ann")
    left = next(iter(li.adapter_parameters(run.model, "bob").values())).untyped_storage().size()
    assert left == 8 * size < whole


def test_tenants_that_were_frozen_or_moved_can_leave() -> None:
    model = base()
    run = tenants("ann", "bob", model=model)
    go(run, "ann", 0)
    other = Trials(model, {"eve": Trial(LINEAR, lr=1e-2)})  # which freezes the others
    run.drop("bob")
    li.train_only(model, "ann")
    other.drop("eve")
    go(run, "ann", 1)
    check_equal(model, alone("ann", [[0], [1]]), "ann")
    run.add("cy", TENANTS["cy"])
    model.float()
    moved = values(model, "ann")
    run.drop("cy")
    check_equal(model, moved, "ann", 0.0)
    assert moved.popitem()[1].dtype == torch.float32
    run.drop("ann")
    assert not li.adapters(model)
