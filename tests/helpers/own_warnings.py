"""Which warnings fail a test: on the pinned versions all, on others those of our own code.

Whose a warning is says the module that Python attributes it to. So the package must not use what
another library warns of, on any version. The tests and scripts stand for a user: what a newer
library announces to them is no defect.
"""

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ANNOUNCEMENTS = ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning")


def filters(*, pinned: bool) -> list[str]:
    """Return filters in pytest's notation; a later one wins."""
    if pinned:
        return ["error"]
    package, users = "lora_inject(\\.|$)", f"({'|'.join(top_level_modules())})(\\.|$)"
    return [
        "default",
        f"error:::{users}",
        *(f"default::{category}:{users}" for category in ANNOUNCEMENTS),
        f"error:::{package}",
    ]


def top_level_modules() -> list[str]:
    """The modules and packages of tests/ and scripts/, as they are imported."""
    folders = (TESTS, TESTS.parent / "scripts")
    paths = [path for folder in folders for path in folder.iterdir()]
    return sorted(p.stem for p in paths if p.suffix == ".py" or (p.is_dir() and p.stem.isalpha()))
