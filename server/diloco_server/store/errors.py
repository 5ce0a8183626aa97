"""What can go wrong with a state directory.

DilocoError
├── StateInUse        another server works in this directory
├── StateMismatch     the directory holds another run, or one of another version of diloco
├── CorruptJournal    the journal is damaged where it had been on disk
├── CorruptSnapshot   a snapshot is damaged
├── NoSnapshot        asked for a snapshot that is not kept
└── StorageFailed     the disk does not take what must be kept
"""

from __future__ import annotations

import errno

from diloco_proto.errors import DilocoError


class StateInUse(DilocoError):
    """Another server works in this state directory."""


class StateMismatch(DilocoError):
    """The state directory holds something else than what was asked for."""


class CorruptJournal(DilocoError):
    """The journal is damaged in a place that had been on disk."""


class CorruptSnapshot(DilocoError):
    """A snapshot does not hold what was written."""


class NoSnapshot(DilocoError, LookupError):
    """There is no such snapshot."""


class StorageFailed(DilocoError, OSError):
    """The disk does not take what must be kept."""


_WHAT_TO_DO = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "the disk quota is used up: free some space, or raise the quota",
    errno.EROFS: "the file system is read-only: see the system's log, and mount it for writing",
    errno.EIO: "the disk reports an error: see the system's log",
    errno.EACCES: "this user may not write there: change the owner, or choose another --state-dir",
    errno.EPERM: "this user may not write there: change the owner, or choose another --state-dir",
    errno.ENOTDIR: "a file is in the way: choose another --state-dir",
    errno.EFBIG: "the file has become larger than the system allows: see ulimit -f",
}


def explain(action: str, error: OSError, free_bytes: int | None = None) -> str:
    """One sentence: what could not be done, why, and what to do."""
    advice = _WHAT_TO_DO.get(error.errno or 0, "see the system's log")
    free = "" if free_bytes is None else f", {free_bytes / 1e6:.0f} MB free"
    return f"cannot {action} ({error.strerror or error}{free}); {advice}"
