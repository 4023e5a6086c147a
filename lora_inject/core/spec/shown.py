"""Values that show themselves at a prompt, and at the end of a notebook's cell."""

from __future__ import annotations

from html import escape


class Shown:
    """A value whose `repr` is what `print` shows; in a notebook it keeps its columns."""

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        """Return the text for a notebook, which would set it in a proportional font otherwise."""
        return f"<pre>{escape(str(self))}</pre>"
