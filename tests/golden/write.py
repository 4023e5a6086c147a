"""Write the golden files. Run once, by the code of commit 2678fc8, and never again.

It need not run on later code: the files are what stays.

    PYTHONPATH=.:tests python tests/golden/write.py
"""

import copy
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from conftest import fill
from contract.kinds import KINDS, Host
from golden import cases
from golden.cases import CASES, FILES, FORMATS, NOT_IN_PEFT, archive, config, output_of
from helpers.training import trainer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback

import lora_inject as li
from lora_inject.trials import search as search_module


def write_expected(path: Path, plain: nn.Module, inputs: Sequence[Tensor], **others: Any) -> None:
    """The base, the inputs and whatever should come out."""
    tensors = {f"base/{key}": t for key, t in plain.state_dict().items()}
    tensors |= {f"input/{i}": x for i, x in enumerate(inputs)}
    tensors |= others
    save_file({k: t.detach().clone().contiguous() for k, t in tensors.items()}, path)


@contextmanager
def packed(*names: str) -> Iterator[Path]:
    """A folder that becomes the archive of a case."""
    target = archive(*names)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as made, zipfile.ZipFile(target, "x") as file:
        yield Path(made)
        for path in sorted(p for p in Path(made).rglob("*") if p.is_file()):
            entry = zipfile.ZipInfo(path.relative_to(made).as_posix())
            file.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)


def save(model: nn.Module, path: Path, layout: str) -> None:
    li.save_adapter(model, path / FORMATS[layout], format=layout)
    (path / "peft" / "README.md").unlink(missing_ok=True)  # for people: nothing reads it


def write_adapter(
    path: Path, plain: nn.Module, asked: Any, inputs: Sequence[Tensor], formats: Sequence[str]
) -> None:
    """An adapter in each format, with what the model computes."""
    model = fill(li.inject(copy.deepcopy(plain), asked), std=0.5)
    for layout in formats:
        save(model, path, layout)
    output = output_of(model, inputs)
    write_expected(path / "expected.safetensors", plain, inputs, output=output)
    assert (output - output_of(plain, inputs)).abs().max() > 0.01


def write_kinds() -> None:
    for name, kind in KINDS.items():
        torch.manual_seed(0)
        formats = ["native"] if name in NOT_IN_PEFT else [*FORMATS]
        plain, inputs = Host(kind.layer()), kind.inputs(torch.float32)
        with packed("kinds", name) as path:
            write_adapter(path, plain, kind.config, inputs, formats)


def write_cases() -> None:
    for name, case in CASES.items():
        torch.manual_seed(0)
        asked = case.config() if callable(case.config) else case.config
        plain = case.model().to(case.dtype).eval()
        with packed("cases", name) as path:
            write_adapter(path, plain, asked, case.inputs, case.formats)


def write_state_dicts(path: Path) -> None:
    torch.manual_seed(0)
    plain = cases.Net()
    model = copy.deepcopy(plain)
    outputs = {}
    for name, asked in cases.STATE_CONFIGS.items():
        fill(li.inject(model, asked, name), name)
        li.activate(model, name)
        outputs[f"output/{name}"] = output_of(model, cases.IDS)
    write_expected(path / "expected.safetensors", plain, cases.IDS, **outputs)
    torch.save(model.state_dict(), path / "two.pt")
    li.activate(model, "second")
    li.merge(model)
    torch.save(model.state_dict(), path / "merged.pt")


def write_trials(path: Path) -> None:
    """Saved after three steps; five more are what must come out."""
    torch.manual_seed(0)
    plain = cases.regression()
    batches = torch.randn(8, 6, 4).double()
    model = copy.deepcopy(plain)
    trials = li.Trials(model, {n: li.Trial(**asked) for n, asked in cases.TRIALS.items()})
    for i, batch in enumerate(batches):
        if i == 3:
            trials.save(path / "trials.pt")
        trials.step(batch, loss=cases.squared, forward=model)
    tensors = {
        f"tensors/{trial}/{name}": t
        for trial in cases.TRIALS
        for name, t in li.adapter_parameters(model, trial).items()
    }
    losses = {f"losses/{n}": torch.tensor(v).double() for n, v in trials.losses.items()}
    write_expected(path / "expected.safetensors", plain, [batches], **tensors, **losses)


def write_search(path: Path) -> None:
    """Interrupted in its second rung."""
    search_module.SAVE_SECONDS = 0.0
    torch.manual_seed(0)
    plain = cases.regression()
    batches, held_out = torch.randn(5, 6, 4).double(), torch.randn(3, 6, 4).double()

    def searched(**options: Any) -> li.classes.Search:
        model = copy.deepcopy(plain)
        given = {"loss": cases.squared, "forward": model, **options}
        return li.search(model, cases.SPACE, [*batches], [*held_out], **given)

    def stop(search: li.classes.Search) -> None:
        if len(search.rungs) == 2 and len(next(iter(search.rungs[1].losses.values()))) == 5:
            raise KeyboardInterrupt

    whole = searched()
    try:
        searched(folder=path / "folder", watch=stop)
    except KeyboardInterrupt:
        pass
    else:
        raise AssertionError
    losses = {
        f"held_out/{i}/{name}": torch.tensor(values).double()
        for i, rung in enumerate(whole.rungs)
        for name, values in rung.held_out.items()
    }
    write_expected(path / "expected.safetensors", plain, [batches, held_out], **losses)
    assert whole.adapter is not None
    li.write_adapter(whole.adapter, path / "best.safetensors", "native")


def write_proofs(path: Path) -> None:
    torch.manual_seed(0)
    inputs, plain, part = torch.arange(16).view(2, 8), cases.small_llama(), path / "tokens"
    part.mkdir()
    model = fill(li.inject(copy.deepcopy(plain), config("all-linear")), std=0.3)
    for layout, file in FORMATS.items():
        li.save_adapter(model, part / file, format=layout, probe=inputs)
    (part / "peft" / "README.md").unlink()
    output = output_of(model, [inputs])
    write_expected(part / "expected.safetensors", plain, [inputs], output=output)


class Keep(TrainerCallback):
    """Copies a checkpoint of a run that goes on."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            (checkpoint,) = Path(args.output_dir).glob("checkpoint-2")
            shutil.copytree(checkpoint, self.path)


def write_checkpoint(path: Path) -> None:
    """Of a run of six steps after the second, with what the whole run comes to."""
    plain = cases.small_llama(vocab_size=17)
    model = li.inject(copy.deepcopy(plain), cases.TRAINED)
    made = trainer(Path("/tmp/golden-trainer"), model, Keep(path / "checkpoint-2"))
    made.train()
    for left_out in ("README.md", "training_args.bin", "rng_state.pth"):
        (path / "checkpoint-2" / left_out).unlink()
    tensors = {f"tensors/{n}": t for n, t in li.adapter_parameters(model).items()}
    write_expected(path / "expected.safetensors", plain, [], **tensors)


WRITERS: dict[str, Callable[[Path], None]] = {
    "state dict": write_state_dicts,
    "trials": write_trials,
    "search": write_search,
    "proof": write_proofs,
    "trainer": write_checkpoint,
}

if __name__ == "__main__":
    FILES.mkdir()  # never over what is there
    write_kinds()
    write_cases()
    for name, write in WRITERS.items():
        with packed(name) as folder:
            write(folder)
