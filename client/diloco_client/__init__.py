"""diloco-client: joins a torch training loop to a run that a diloco-server owns.

>>> with diloco_client.join("127.0.0.1:50051", model, optimizer) as outer:  # doctest: +SKIP
...     for batch in data:
...         loss = model(batch); loss.backward(); optimizer.step(); optimizer.zero_grad()
"""

from typing import TYPE_CHECKING, Any

from diloco_client.stats import Stats
from diloco_proto.errors import (
    CertificateError,
    ConfigError,
    ConnectionClosed,
    DamagedFrame,
    DilocoError,
    InvalidAddress,
    IslandBroken,
    ManifestMismatch,
    MasterWeights,
    NonFiniteParameter,
    NotReady,
    PermissionDenied,
    PinMismatch,
    ProtocolMismatch,
    RunMismatch,
    ServerUnreachable,
    StateMismatch,
    Superseded,
    TLSMismatch,
    Unauthenticated,
    UnclearIsland,
    UnsupportedModel,
)

if TYPE_CHECKING:
    from diloco_client.data import ShardedSampler, shard_stream
    from diloco_client.hook import Outer
    from diloco_client.joining import join
    from diloco_client.observe import export, snapshots, status

__all__ = [
    "CertificateError",
    "ConfigError",
    "ConnectionClosed",
    "DamagedFrame",
    "DilocoError",
    "InvalidAddress",
    "IslandBroken",
    "ManifestMismatch",
    "MasterWeights",
    "NonFiniteParameter",
    "NotReady",
    "Outer",
    "PermissionDenied",
    "PinMismatch",
    "ProtocolMismatch",
    "RunMismatch",
    "ServerUnreachable",
    "ShardedSampler",
    "StateMismatch",
    "Stats",
    "Superseded",
    "TLSMismatch",
    "Unauthenticated",
    "UnclearIsland",
    "UnsupportedModel",
    "export",
    "join",
    "shard_stream",
    "snapshots",
    "status",
]


def __getattr__(name: str) -> Any:
    # What needs torch is imported when it is used: `diloco-client status` runs where no torch is. So are the kernels,
    # which a probe of the server's health can do without.
    if name in ("Outer", "join"):
        from diloco_client import joining

        return getattr(joining, name)
    if name in ("ShardedSampler", "shard_stream"):
        from diloco_client import data

        return getattr(data, name)
    if name in ("export", "snapshots", "status"):
        from diloco_client import observe

        return getattr(observe, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
