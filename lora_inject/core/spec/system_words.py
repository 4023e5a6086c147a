"""What the system says of a file that cannot be read, in the words of other messages."""

from __future__ import annotations

import errno


def system_words(error: OSError) -> str:
    """Return what is wrong with a file or a folder.

    Examples:
        >>> system_words(IsADirectoryError(errno.EISDIR, "Is a directory", "runs"))
        'it is a folder'
    """
    words = {errno.ENOENT: "there is no such file", errno.EISDIR: "it is a folder"}
    return words.get(error.errno or 0) or error.strerror or str(error)
