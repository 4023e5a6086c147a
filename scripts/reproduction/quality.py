"""Stage `quality`: all ways to fine-tune on the same sentences (the paper's section 5)."""

from __future__ import annotations

from pathlib import Path

from . import trials
from .classifier import WARM_UP
from .document import Claim, Section, picture, table, verdict_above
from .lab import Lab
from .methods import METHODS, RANKS, TUNED
from .trials import Scores

CORE = (
    "head", "full", "lora-qv-r8", "lora-qv-r1", "bitfit", "lora-qv-r64", "lora-qv-r2", "lora-qv-r4",
)  # fmt: skip
SHOWN = (
    "full", "top2", "head", "bitfit", "prefix", "adapter-h", "adapter-l",
    *(f"lora-{sites}-r{rank}" for sites in ("q", "qv", "qkvo", "all") for rank in RANKS),
)  # fmt: skip
CURVES = {
    **{
        f"LoRA {title}": tuple(f"lora-{sites}-r{rank}" for rank in RANKS)
        for sites, title in (
            ("q", "q"),
            ("qv", "q, v"),
            ("qkvo", "q, k, v, o"),
            ("all", "all linears"),
        )
    },
    **{METHODS[name].title: (name,) for name in SHOWN[:7]},
}
MARGIN = 0.01  # of accuracy: what counts as on par


def do(lab: Lab) -> None:
    """The most telling methods; the others are of the stages `rivals`, `matrices` and `ranks`."""
    trials.do(lab, CORE)


def section(lab: Lab, document: Path) -> Section | None:
    """What came out."""
    found = {name: scores for name in SHOWN if (scores := trials.scores(lab, name))}
    if "full" not in found:
        return None
    sizes = lab.sizes
    what = (
        f"{sizes.n_train:,} movie snippets, one pass, batches of {sizes.batch}, at most "
        f"{sizes.max_tokens} tokens; the task is good or bad; {sizes.n_test:,} other "
        "snippets are the test part. The model is all-MiniLM-L6-v2 (6 layers of 384), its mean "
        "over tokens, and a linear head. AdamW, "
        f"linear schedule with {WARM_UP:.0%} warm-up, weight decay 0.01, no dropout. "
        f"Seeds {', '.join(map(str, sizes.seeds))} set the head, A and the order of the rows. "
        "LoRA: alpha 16 for every rank."
    )
    how = (
        "*Against full* is the accuracy minus that of full fine-tuning, in points, ± one standard "
        "error. The error has two sources: the test rows, each compared with full fine-tuning of "
        "the same seed, and the seeds. "
        "Time is processor time of one thread. Memory is the peak of the process during training, "
        "without the loaded model."
    )
    drawn = draw(found, document.parent / "pictures" / "quality.png")
    return Section(
        "Quality at equal data: sentences (section 5)",
        claims(found),
        [
            what,
            results(found),
            how,
            picture(drawn, document, "Accuracy against the number of trained parameters"),
            (
                "Learning rates, chosen by accuracy on "
                f"{sizes.n_dev:,} further snippets with a separate seed:"
            ),
            rates(lab),
        ],
        [
            (
                "These numbers are of one task, one small encoder and one pass over few rows. They "
                "cannot show a difference below a point."
            ),
            (
                "Methods that were not tuned use the rate of the nearest tuned method: "
                "ranks 1 and 2 that of q, v r = 1, ranks 4 and 8 that of r = 8, other sites "
                "likewise."
            ),
            (
                "Adapter layers are written in `scripts/reproduction/adapter_layers.py`, because "
                "no maintained library of them runs with transformers 5. Prefix tuning is PEFT's."
            ),
        ],
    )


def claims(found: dict[str, Scores]) -> list[Claim]:
    """The paper's claims about quality, for the rank that the paper's GLUE runs use."""
    full, made = found["full"], []
    for name, title in (("lora-qv-r8", "q, v"), ("lora-all-r8", "all linears")):
        if name in found and (gap := trials.gap(found[name], full)):
            made.append(
                Claim(
                    f"LoRA on {title} is on par with full fine-tuning, or better",
                    "RoBERTa-base GLUE mean 87.2 against 86.4 (q, v)",
                    f"r = 8: {100 * found[name].mean:.1f} against {100 * full.mean:.1f} "
                    f"({gap} points)",
                    verdict_above(gap.difference, gap.error, -MARGIN),
                )
            )
    return made


def draw(found: dict[str, Scores], path: Path) -> Path:
    """Accuracy against trained parameters, the paper's figure 2; bars are one deviation."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for title, names in CURVES.items():
        points = [found[name] for name in names if name in found and name != "head"]
        if points:
            axes.errorbar(
                [scores.middle("parameters") for scores in points],
                [100 * scores.mean for scores in points],
                [100 * (scores.deviation or 0) for scores in points],
                marker="o", capsize=2, linestyle="-" if len(points) > 1 else "", label=title,
            )  # fmt: skip
    if "head" in found:
        axes.axhline(100 * found["head"].mean, color="gray", linestyle=":", label="head only")
    axes.set(xscale="log", xlabel="trainable besides the head", ylabel="test accuracy, %")
    figure.legend(fontsize="small", loc="outside right upper")
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path)
    return path


def results(found: dict[str, Scores]) -> str:
    """The table of all methods."""
    rows = []
    for scores in found.values():
        gap = trials.gap(scores, found["full"])
        deviation = scores.deviation
        peak = scores.middle("peak_bytes")
        rows.append(
            (
                scores.method.title,
                f"{scores.middle('parameters'):,.0f}",
                f"{100 * scores.mean:.1f}",
                "" if deviation is None else f"{100 * deviation:.1f}",
                len(scores.results),
                "" if scores.method.name == "full" or gap is None else str(gap),
                f"{scores.middle('cpu_seconds'):.0f}",
                "" if peak is None else f"{peak / 1e6:.0f}",
            )
        )
    head = ("method", "trainable besides the head", "accuracy, %", "deviation", "seeds")
    return table((*head, "against full", "s", "MB"), rows)


def rates(lab: Lab) -> str:
    """The table of learning rates."""
    rows = []
    for method in TUNED:
        tried = {}
        for rate in method.rates:
            record = lab.record(f"sentences/tuning/{method.name}/{rate:g}")
            if record is not None:
                tried[rate] = record["result"]["accuracy"]
        if tried:
            best = max(tried, key=lambda rate: tried[rate])
            cells = [
                f"**{rate:g}: {100 * a:.1f}**" if rate == best else f"{rate:g}: {100 * a:.1f}"
                for rate, a in tried.items()
            ]
            rows.append((METHODS[method.name].title, *cells, *[""] * (4 - len(cells))))
    return table(("method", "", "", "", ""), rows)
