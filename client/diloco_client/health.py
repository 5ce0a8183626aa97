"""Whether a server takes contributions now, for probes of containers. Imports no kernels: it starts fast."""

from __future__ import annotations

import time
from typing import Unpack

import grpc

from diloco_proto.errors import ServerUnreachable, error_from_rpc
from diloco_proto.health import CHECK, Health, HealthCheckRequest, HealthCheckResponse

from .connect import Connector, Credentials

__all__ = ["Health", "health"]


def health(address: str | None = None, timeout: float = 5.0, **credentials: Unpack[Credentials]) -> Health:
    """SERVING, or NOT_SERVING while the server drains or cannot write its state. Needs no token.

    Raises ServerUnreachable after `timeout` seconds, InvalidAddress, or what is wrong with the connection
    (PinMismatch, CertificateError, TLSMismatch).
    """
    deadline = time.monotonic() + timeout
    connector = Connector(address, **credentials)
    try:
        connector.reach("health", timeout, lambda: None)
        channel = connector.line("health", timeout).channel
        check = channel.unary_unary(CHECK, HealthCheckRequest.SerializeToString, HealthCheckResponse.FromString)
        answer = check(HealthCheckRequest(), timeout=max(0.1, deadline - time.monotonic()))
        return Health(answer.status)
    except grpc.RpcError as error:
        named = error_from_rpc(error)
        if named is not None:
            raise named from error
        raise ServerUnreachable(
            f"what listens at {connector.target} gave no health within {timeout:.0f} s ({error.code().name}: "
            f"{error.details()})"
        ) from error
    except ConnectionError as error:
        raise ServerUnreachable(str(error)) from error
    finally:
        connector.close()
