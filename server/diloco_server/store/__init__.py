"""What a run keeps on disk: a journal and snapshots in a state directory. Knows nothing of rounds or gRPC."""

from .draft import Draft
from .errors import CorruptJournal, CorruptSnapshot, NoSnapshot, StateInUse, StateMismatch, StorageFailed
from .faults import NO_FAULTS, FaultPoints
from .journal import Journal
from .runfile import RunInfo
from .snapshots import Snapshots
from .store import Store

__all__ = [
    "NO_FAULTS",
    "CorruptJournal",
    "CorruptSnapshot",
    "Draft",
    "FaultPoints",
    "Journal",
    "NoSnapshot",
    "RunInfo",
    "Snapshots",
    "StateInUse",
    "StateMismatch",
    "StorageFailed",
    "Store",
]
