"""Tables in the text of a test: one row a case, `what is given => what comes of it`."""

import re


def rows(text: str) -> list[tuple[str, str]]:
    """Return the two sides of each row; indented lines go on with the row above."""
    lines = re.sub(r"\n +", " ", text.strip()).splitlines()
    return [(given, due) for given, _, due in (line.partition(" => ") for line in lines)]
