"""The public way in: `join` reads what it is given, reaches the server, and hooks a training loop into its run."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from diloco_proto.errors import DilocoError

from .binding import Binding
from .connect import Connector
from .hook import Outer
from .network import Network
from .resume import read
from .transport import Transport


def join(
    address: str | None,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    *,
    worker_id: str | None = None,
    connect_timeout: float = 120.0,
    token: str | None = None,
    ca_cert: str | Path | None = None,
    client_cert: str | Path | None = None,
    client_key: str | Path | None = None,
    data_connections: int | None = None,
    upload_limit: float | None = None,
    download_limit: float | None = None,
    state: Mapping[str, Any] | None = None,
    sigterm_seconds: float | None = None,
) -> Outer:
    """Join the run that the diloco-server at `address` owns, and hook `optimizer.step()`.

    `address` is the join URL that the server wrote (diloco://TOKEN@HOST:PORT?pin=…), `file:` and the path of a file
    that holds it, or a plain HOST:PORT; None takes DILOCO_URL or the file that DILOCO_URL_FILE names. `token`
    overrides the URL's, `ca_cert` (PEM) stands in for the public authorities, `client_cert` and `client_key` (PEM) are
    shown to a server that asks for them.

    Blocks until the run is open (its `min_workers` have joined); then the model's parameters are the global ones.
    The first worker's parameters become the run's, unless the server was given some. With several optimizers an
    inner step is over when the last one in the list has stepped.

    `worker_id` names this worker; the same name in two live processes makes the older one stop. It defaults to
    host name, process id and a random suffix. `connect_timeout` (seconds) bounds the wait for the server to answer.

    `data_connections` (1) share each transfer, for links on which one TCP stream is slow; `upload_limit` and
    `download_limit` (none) are bytes a second over all of them. Where they are not given, DILOCO_DATA_CONNECTIONS,
    DILOCO_UPLOAD_LIMIT and DILOCO_DOWNLOAD_LIMIT count. The session has a connection of its own, without a limit.

    `state` is what `Outer.state_dict` gave to a former process of this worker: load model and optimizer from the same
    checkpoint before; the model then keeps its local parameters where they still hold (see `Outer.load_state_dict`).

    `sigterm_seconds` is for machines that are taken away with a notice of so many seconds: on SIGTERM the worker
    finishes its inner step, pushes what was not counted yet, leaves the run once the server has it or most of the time
    is over, and then does what SIGTERM did before. Only in the main thread; without it signals are left alone.

    Raises InvalidAddress, PinMismatch, CertificateError, TLSMismatch, Unauthenticated, ServerUnreachable,
    UnsupportedModel, MasterWeights, ManifestMismatch (naming the first tensor that differs) or another DilocoError.
    Use the result in a `with` block; leaving it flushes.
    """
    optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
    if not optimizers or not all(isinstance(o, torch.optim.Optimizer) for o in optimizers):
        raise TypeError("join(address, model, optimizer): optimizer must be a torch optimizer or a list of them")
    try:
        binding = Binding(model, optimizers)
        server = Connector(address, token=token, ca_cert=ca_cert, client_cert=client_cert, client_key=client_key)
        network = Network.chosen(
            data_connections=data_connections, upload_limit=upload_limit, download_limit=download_limit
        )
        saved = None if state is None else read(state)
        if saved is not None:
            worker_id = worker_id or saved.worker_id
        transport = Transport(server, network=network)
        return Outer(
            transport, binding, optimizers, worker_id or _default_id(), connect_timeout, saved, sigterm_seconds
        )
    except DilocoError as error:
        # What it says is for whoever runs the script: the way it took through threads and gRPC only hides it.
        raise error.with_traceback(None) from None


def _default_id() -> str:
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"
