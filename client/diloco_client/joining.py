"""The public way in: `join` reads what it is given, reaches the server, and hooks a training loop into its run."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from diloco_proto.errors import DilocoError, UnclearIsland

from .binding import Binding
from .connect import Connector
from .hook import Outer
from .link import Link
from .network import Network
from .optimizers import inner_optimizer
from .resume import Saved, new_generation, read
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
    island: dist.ProcessGroup | bool | None = None,
) -> Outer:
    """Join the run that the diloco-server at `address` owns, and hook `optimizer.step()`.

    `address` is the join URL that the server wrote (diloco://TOKEN@HOST:PORT?pin=…), `file:` and the path of a file
    that holds it, or a plain HOST:PORT; None takes DILOCO_URL or the file that DILOCO_URL_FILE names. `token`
    overrides the URL's, `ca_cert` (PEM) stands in for the public authorities, `client_cert` and `client_key` (PEM) are
    shown to a server that asks for them.

    Blocks until the run is open (its `min_workers` have joined); then the model's parameters are the global ones.
    The first worker's parameters become the run's, unless the server was given some. With several optimizers an
    inner step is over when the last one in the list has stepped. What accelerate and Lightning make of an optimizer
    will do as well.

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

    Where several processes (ranks) train one model together they are one worker, and every rank calls join: with a
    model that `fully_shard` or tensor parallelism has sharded, or one wrapped in DistributedDataParallel. Of a plain
    model in a process group of several ranks `island` must say whether it is a replica that the ranks of this group
    keep equal by other means (a process group), or each process is a worker of its own (False). Worker id and
    `sigterm_seconds` count as the first rank has them; its id defaults to DILOCO_WORKER_ID, or under torchrun to host
    name and run id, which a restart keeps. docs/islands.md has the rest.

    Raises InvalidAddress, PinMismatch, CertificateError, TLSMismatch, Unauthenticated, ServerUnreachable,
    UnsupportedModel, MasterWeights, ManifestMismatch (naming the first tensor that differs), UnclearIsland or another
    DilocoError; in an island the same on all ranks.
    Use the result in a `with` block; leaving it flushes.
    """
    optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
    optimizers = [inner_optimizer(o) for o in optimizers]
    if not optimizers or not all(isinstance(o, torch.optim.Optimizer) for o in optimizers):
        raise TypeError("join(address, model, optimizer): optimizer must be a torch optimizer or a list of them")

    def reach() -> Transport:
        server = Connector(address, token=token, ca_cert=ca_cert, client_cert=client_cert, client_key=client_key)
        network = Network.chosen(
            data_connections=data_connections, upload_limit=upload_limit, download_limit=download_limit
        )
        return Transport(server, network=network)

    try:
        link, saved = _link(island, model, optimizers, reach, worker_id, state)
        return Outer(link, optimizers, connect_timeout, saved, sigterm_seconds)
    except DilocoError as error:
        # What it says is for whoever runs the script: the way it took through threads and gRPC only hides it.
        raise error.with_traceback(None) from None


def _link(
    island: dist.ProcessGroup | bool | None,
    model: torch.nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    reach: Callable[[], Transport],
    worker_id: str | None,
    state: Mapping[str, Any] | None,
) -> tuple[Link, Saved | None]:
    """The link to join by, and the state of a former process that is taken up."""
    if dist.is_available() and dist.is_initialized():
        from .island.entry import find, island_link  # what these import of torch takes long: not for plain workers

        found = find(model, island)
        if found is not None:
            return island_link(found, model, optimizers, reach, worker_id, state)
    elif island:
        raise UnclearIsland("join(island=group), but torch.distributed is not initialised in this process")
    binding = Binding(model, optimizers)
    saved = None if state is None else read(state)
    name = worker_id or (saved.worker_id if saved else _default_id())
    return Link(reach(), binding, name, new_generation(saved), saved.run_id if saved else ""), saved


def _default_id() -> str:
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"
