"""README.md as a package index shows it: links that lead somewhere, and the name to install.

An index shows the page without the files around it, so links and pictures get the address of the
repository at this version. The release workflow runs this before it builds; GitHub says there whose
repository it is.

    python scripts/index_readme.py README.md
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

TARGET = re.compile(r"\]\((?!https?://|#)([^)\s]+)\)")


def for_index(text: str, repository: str, version: str) -> str:
    """Return a README whose links and commands work where its repository is not.

    Args:
        text: The README in a checkout.
        repository: The address of the repository, without a slash at the end.
        version: The tag or commit that links lead to.
    """

    def absolute(link: re.Match[str]) -> str:
        target = link[1]
        if target.startswith("../../"):  # a page of the host beside the files
            return f"]({repository}/{target.removeprefix('../../')})"
        kind = "raw" if target.endswith((".svg", ".png")) else "blob"
        return f"]({repository}/{kind}/{version}/{target})"

    text = TARGET.sub(absolute, text)
    text = text.replace("pip install .\n", "pip install lora-inject\n")
    text = text.replace("pip install '.[", "pip install 'lora-inject[")
    return text.replace(" From a checkout:\n", "\n")


def main() -> int:
    """Rewrite the file in place."""
    path = Path(sys.argv[1])
    server = os.environ.get("GITHUB_SERVER_URL", "https://github.com")
    repository = f"{server}/{os.environ['GITHUB_REPOSITORY']}"
    text = for_index(path.read_text(encoding="utf-8"), repository, os.environ["GITHUB_REF_NAME"])
    path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
