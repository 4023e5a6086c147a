"""The model card of an adapter: README.md with the front matter that model hubs read.

Whoever finds the directory learns from it what it is, for which base, and how to load it
with PEFT and with this package. Nothing is claimed that the adapter itself does not say.
"""

from __future__ import annotations

from collections import Counter

from lora_inject.adapter.state import AdapterState, SiteState
from lora_inject.version import __version__


def model_card(state: AdapterState, *, base_model: str | None = None) -> str:
    """Return the text of README.md: YAML front matter and Markdown.

    Examples:
        >>> print(model_card(AdapterState({}), base_model="org/base").splitlines()[1])
        base_model: org/base
    """
    import yaml  # reading an adapter, as merging does, must not wait for it

    front = {"library_name": "peft", "tags": ["lora", "lora-inject"]}
    if base_model:
        front = {"base_model": base_model, **front}
    n_parameters = sum(site.spec.n_parameters for site in state.sites.values())
    counts = f"{len(state.sites):,} sites, {n_parameters:,} parameters"
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=True, allow_unicode=True).rstrip(),
        "---",
        "",
        "# LoRA adapter",
        "",
        f"{counts}, written by lora-inject {__version__}.",
        "",
        *_table(state),
        *_trained(state),
        "## Use",
        "",
        "```python",
        "from peft import PeftModel",
        "",
        "model = PeftModel.from_pretrained(base, path)",
        "```",
        "",
        "```python",
        "import lora_inject",
        "",
        "lora_inject.load_adapter(base, path)",
        "```",
        "",
    ]
    return "\n".join(lines)


def _table(state: AdapterState) -> list[str]:
    """One row for all sites of one kind and the same numbers."""
    rows = Counter(_row(site) for site in state.sites.values())
    if not rows:
        return []
    examples: dict[tuple[str, int, float, float], str] = {}
    for name, site in state.sites.items():
        examples.setdefault(_row(site), name)
    lines = ["| sites | kind | rank | alpha | scale | first |", "|---|---|---|---|---|---|"]
    for row, count in rows.items():
        kind, rank, alpha, scale = row
        name = examples[row].replace("|", "\\|").replace("`", "'")
        lines.append(f"| {count:,} | {kind} | {rank} | {alpha:g} | {scale:g} | `{name}` |")
    return [*lines, ""]


def _row(site: SiteState) -> tuple[str, int, float, float]:
    spec = site.spec
    return spec.kind, spec.rank, spec.alpha, spec.scale


def _trained(state: AdapterState) -> list[str]:
    if not state.trained:
        return []
    numel = sum(tensor.numel() for tensor in state.trained.values())
    return [f"{len(state.trained):,} tensors of the base travel in full ({numel:,} values).", ""]
