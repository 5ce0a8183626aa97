"""diloco-client: joins a torch training loop to a run that a diloco-server owns.

import diloco_client

with diloco_client.join("127.0.0.1:50051", model, optimizer) as outer:
    for batch in data:
        loss = model(batch); loss.backward(); optimizer.step(); optimizer.zero_grad()
"""

from diloco_proto.errors import (
    ConfigError,
    ConnectionClosed,
    DilocoError,
    InvalidAddress,
    ManifestMismatch,
    MasterWeights,
    NonFiniteParameter,
    NotReady,
    RunMismatch,
    ServerUnreachable,
    Superseded,
    UnsupportedModel,
)

from diloco_client.hook import Outer, join
from diloco_client.observe import export, status
from diloco_client.stats import Stats

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
    "RunMismatch",
    "ServerUnreachable",
    "Stats",
    "Superseded",
    "UnsupportedModel",
    "export",
    "join",
    "status",
]
