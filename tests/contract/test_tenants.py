"""Many tenants on one base: each on its own clock, with the same results as a plain loop alone."""

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fill
from helpers.refusals import refused
from helpers.trials import batches, check_equal, of_llama, plain_loop, values
from torch import nn

import lora_inject as li
from lora_inject import Trial, Trials

pytestmark = pytest.mark.recent

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
    of_steps = [[rows(name, i) for i in each] for each in steps]
    return plain_loop(base(), name, TENANTS[name], of_steps)


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


def test_tenants_have_losses_of_their_own_in_one_pass() -> None:
    losses: dict[str, Any] = {
        "ann": lambda out, _: out.logits.square().mean(),
        "bob": lambda out, _: out.logits[:, -1].abs().mean(),
        "cy": li.causal_loss,
    }
    run = tenants("ann", "bob", loss={name: losses[name] for name in ("ann", "bob")})
    with refused(li.StateError, "loss of trial 'cy'", model=run.model):
        run.add("cy", TENANTS["cy"])
    run.add("cy", TENANTS["cy"], loss=losses["cy"])
    for step in range(3):
        run.forward_backward({name: rows(name, step) for name in losses})
        run.optimizer_step(list(losses))
    held_out = run.evaluate({name: rows(name, 9) for name in losses})
    for name, loss in losses.items():
        single = tenants(name, loss=loss)
        for step in range(3):
            single.forward_backward({name: rows(name, step)})
            single.optimizer_step(name)
        check_equal(run.model, values(single.model, name), name)
        assert run.losses[name] == pytest.approx(single.losses[name], rel=1e-12)
        alone_again = single.evaluate({name: rows(name, 9)})
        assert held_out[name] == pytest.approx(alone_again[name], rel=1e-12)


def test_gradients_of_several_calls_add_up() -> None:
    run, other = tenants("ann", "bob", "cy"), tenants("cy")
    for i in range(3):
        run.forward_backward({"cy": rows("cy", i)})
    run.forward_backward({"ann": rows("ann", 0), "cy": rows("cy", 3)})
    norms = run.optimizer_step(["cy", "ann"])
    each = [other.forward_backward({"cy": rows("cy", i)})["cy"] for i in range(4)]
    assert run.losses["cy"] == pytest.approx([sum(each)], rel=1e-12)
    assert other.optimizer_step("cy")["cy"] == pytest.approx(norms["cy"], rel=1e-12)
    check_equal(run.model, alone("cy", [[0, 1, 2, 3]]), "cy")
    check_equal(run.model, alone("ann", [[0]]), "ann")
    check_equal(run.model, values(tenants("bob").model, "bob"), "bob", 0.0)


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
    for where in (run, elsewhere):
        assert where.load(file) == ["cy"]
        assert where.n_steps["cy"] == 3
        if not waits:
            where.forward_backward({"cy": rows("cy", 3)})
        where.optimizer_step("cy")
        go(where, "cy", 4)
        check_equal(where.model, alone("cy", [[0], [1], [2], [3], [4]]), "cy")
        assert len(where.losses["cy"]) == 5
    check_equal(elsewhere.model, values(run.model, "cy"), "cy", 0.0)
    check_equal(run.model, before["dee"], "dee", 0.0)
    check_equal(run.model, alone("ann", [[0], [1], [2], [3]]), "ann")


def test_a_tenant_starts_at_an_adapter_trained_elsewhere_and_leaves_active_what_was() -> None:
    model = li.inject(base(), LINEAR, "there")
    there = copy.deepcopy(li.adapter_state(fill(model, "there", 0.1), "there"))
    run = tenants("ann", "bob", model=li.eject(model))
    li.activate(model, "ann")
    run.forward_backward({"bob": rows("bob", 0)})
    other = Trials(base(), {"eve": Trial(LINEAR, lr=1e-2)})
    run.add("eve", Trial(LINEAR, lr=1e-2))
    assert [name for name, one in li.adapters(model).items() if one.active] == ["ann"]
    assert {n for n, one in li.adapters(model).items() if one.trainable} == {*run.running}
    for each in (run, other):
        li.swap_adapter(each.model, there, "eve", base="any")
        each.forward_backward({"eve": rows("ann", 0)})
    run.optimizer_step(["eve", "bob"])
    other.optimizer_step("eve")
    check_equal(model, other.model, "eve")
    check_equal(model, alone("bob", [[0]]), "bob")


def test_a_rate_for_one_step_takes_the_place_of_the_schedule() -> None:
    moved = []
    for lr in (None, TENANTS["cy"].lr * TENANTS["cy"].factor(0), 0.5):
        run = tenants("cy")
        run.forward_backward({"cy": rows("cy", 0)})
        run.optimizer_step("cy", lr=lr)
        moved.append(torch.cat([t.flatten() for t in values(run.model, "cy").values()]))
    assert torch.equal(moved[0], moved[1])
    assert not torch.equal(moved[0], moved[2])


def test_an_evaluation_and_a_pass_that_fails_leave_the_gradients_that_wait_as_they_were() -> None:
    fails = [True]

    def loss(out: Any, batch: Any) -> torch.Tensor:
        if fails and len(batch["labels"]) == ROWS["bob"]:
            raise RuntimeError(f"of bob: {fails.pop()}")
        return li.causal_loss(out, batch)

    run = tenants("ann", "bob", max_tokens=8, loss=loss)  # a group for each
    run.forward_backward({"ann": rows("ann", 0)})
    with pytest.raises(RuntimeError, match="of bob"):
        run.forward_backward({"ann": rows("ann", 5), "bob": rows("bob", 5)})
    run.forward_backward({"bob": rows("bob", 0)})
    losses = run.evaluate({"bob": rows("bob", 5)})
    assert run.held_out == losses
    assert [*losses] == ["bob"]
    run.optimizer_step(["ann", "bob"])
    for name in ("ann", "bob"):
        check_equal(run.model, alone(name, [[0]]), name)


def test_a_tenant_that_diverges_is_stopped_and_what_waits_of_others_is_kept() -> None:
    run = tenants("ann", "bob")
    run.forward_backward({name: rows(name, 0) for name in ("ann", "bob")})
    with torch.no_grad():
        for parameter in li.adapter_parameters(run.model, "bob").values():
            parameter.fill_(torch.nan)
    losses = run.forward_backward({name: rows(name, 1) for name in ("ann", "bob")})
    assert losses["bob"] != losses["bob"]
    assert run.running == ["ann"]
    run.optimizer_step("ann")
    check_equal(run.model, alone("ann", [[0, 1]]), "ann")
    with refused(li.StateError, "'bob'", "nan"):
        run.forward_backward({"bob": rows("bob", 2)})
    run.drop("bob")
    run.add("bob", TENANTS["bob"])
    run.forward_backward({name: rows(name, 0) for name in ("ann", "bob")})
    run.optimizer_step(["ann", "bob"])
    check_equal(run.model, alone("bob", [[0]]), "bob")


WRONG: dict[str, tuple[Any, list[str]]] = {
    "no such tenant": (lambda run: run.forward_backward({"eve": rows("ann", 0)}), ["'eve'"]),
    "nobody": (lambda run: run.forward_backward({}), ["trial"]),
    "a step without a gradient": (lambda run: run.optimizer_step("ann"), ["'ann'", "gradient"]),
    "no rate": (lambda run: run.optimizer_step("bob", lr=0.0), ["lr"]),
    "a name in use": (lambda run: run.add("ann", TENANTS["ann"]), ["'ann'"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused_and_gradients_that_wait_stay(case: str) -> None:
    run, (wrong, names) = tenants("ann", "bob"), WRONG[case]
    run.forward_backward({"bob": rows("bob", 0)})
    with refused(li.StateError, *names):
        wrong(run)
    run.optimizer_step("bob")
    check_equal(run.model, alone("bob", [[0]]), "bob")


@pytest.mark.parametrize(
    ("target", "names"),
    [
        ("nothing", ["nothing"]),
        ({"match": "embed_tokens", "dropout": 0.1}, ["dropout"]),
    ],
    ids=["no match", "dropout of tokens"],
)
def test_a_tenant_that_cannot_join_leaves_all_as_it_was(target: Any, names: list[str]) -> None:
    model = li.inject(base(), LINEAR, "mine")
    run = tenants("ann", model=model)
    li.activate(model, "mine")
    model.extra = nn.Linear(4, 4)
    run.forward_backward({"ann": rows("ann", 0)})
    with refused(li.LoraInjectError, *names, model=model):
        run.add("eve", Trial({"rank": 2, "targets": [target]}, lr=1e-2))
    assert [n for n, one in li.adapters(model).items() if one.active] == ["mine"]
    run.optimizer_step("ann")
    check_equal(model, alone("ann", [[0]]), "ann")


def test_a_file_of_another_base_adds_no_tenant(tmp_path: Path) -> None:
    run, model = tenants("ann"), base()
    file = run.save(tmp_path / "ann.pt")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(1.0)
    other = tenants("bob", model=model)
    other.forward_backward({"bob": rows("bob", 0)})
    with refused(li.FormatError, str(file)):
        other.load(file)
    assert [*other.trials] == [*li.adapters(model)] == ["bob"]
    other.optimizer_step("bob")
    with refused(li.StateError, "'ann'"):
        run.load(file)


def test_threads_wait_for_each_other() -> None:
    run = tenants("ann", "bob", "cy")

    def train(name: str) -> None:
        for step in range(3):
            go(run, name, step)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(train, run.running))
    for name in run.running:
        check_equal(run.model, alone(name, [[0], [1], [2]]), name)


def test_tenants_that_were_frozen_or_moved_can_leave() -> None:
    model = base()
    run = tenants("ann", "bob", model=model)
    go(run, "ann", 0)
    Trials(model, {"eve": Trial(LINEAR, lr=1e-2)}).drop("eve")  # which freezes the others
    run.drop("bob")
    li.train_only(model, "ann")
    go(run, "ann", 1)
    check_equal(model, alone("ann", [[0], [1]]), "ann")
    run.add("cy", TENANTS["cy"])
    moved = values(model.float(), "ann")
    run.drop("cy")
    check_equal(model, moved, "ann", 0.0)
    run.drop("ann")
    assert not li.adapters(model)
