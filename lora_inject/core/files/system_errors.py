"""What to do about errors of the operating system."""

from __future__ import annotations

import errno

_REMEDIES = {
    errno.ENOSPC: "Free some space and run again",
    errno.EDQUOT: "Your quota is used up; free some space and run again",
    **dict.fromkeys((errno.EACCES, errno.EPERM), "Give a folder that you may write to"),
    errno.EROFS: "Give a folder on a disk that is not read-only",
}


def remedy_for(error: OSError) -> str:
    """Return what to do about an error of the system."""
    return _REMEDIES.get(error.errno or 0, "Check the disk and run again")
