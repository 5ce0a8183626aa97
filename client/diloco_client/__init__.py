"""diloco-client: joins a torch training loop to a run that a diloco-server owns.

>>> with diloco_client.join("127.0.0.1:50051", model, optimizer) as outer:  # doctest: +SKIP
...     for batch in data:
...         loss = model(batch); loss.backward(); optimizer.step(); optimizer.zero_grad()
"""

from typing import TYPE_CHECKING, Any

from diloco_client.observe import export, status
from diloco_client.stats import Stats
from diloco_proto.errors import (
    ConfigError,
    ConnectionClosed,
    DilocoError,
    InvalidAddress,
    ManifestMismatch,
    MasterWeights,
    NonFiniteParameter,
    NotReady,
    ProtocolMismatch,
    RunMismatch,
    ServerUnreachable,
    Superseded,
    UnsupportedModel,
)

if TYPE_CHECKING:
    from diloco_client.hook import Outer, join

__all__ = [
    "ConfigError",
    "ConnectionClosed",
    "DilocoError",
    "InvalidAddress",
    "ManifestMismatch",
    "MasterWeights",
    "NonFiniteParameter",
    "NotReady",
    "Outer",
    "ProtocolMismatch",
    "RunMismatch",
    "ServerUnreachable",
    "Stats",
    "Superseded",
    "UnsupportedModel",
    "export",
    "join",
    "status",
]


def __getattr__(name: str) -> Any:
    # What needs torch is imported when it is used: `diloco-client status` runs where no torch is.
    if name in ("Outer", "join"):
        from diloco_client import hook

        return getattr(hook, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
