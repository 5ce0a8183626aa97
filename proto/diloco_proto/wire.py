"""Protobuf messages <-> the dataclasses that the rest of the code works with."""

from __future__ import annotations

from typing import cast

from . import outer_pb2 as pb
from .codec.formats import Format
from .errors import UnsupportedModel, error_from_rpc
from .manifest import Manifest, Role, TensorSpec

__all__ = ["codec_to_pb", "error_from_rpc", "manifest_from_pb", "manifest_to_pb"]

_ROLE_TO_PB = {Role.TRAINED: pb.ROLE_TRAINED, Role.BUFFER: pb.ROLE_BUFFER, Role.FROZEN: pb.ROLE_FROZEN}
_ROLE_FROM_PB = {number: role for role, number in _ROLE_TO_PB.items()}


def manifest_to_pb(manifest: Manifest) -> pb.Manifest:
    return pb.Manifest(
        tensors=[
            pb.Tensor(name=t.name, shape=t.shape, dtype=t.dtype, role=_ROLE_TO_PB[t.role], tied=t.tied)
            for t in manifest.tensors
        ]
    )


def manifest_from_pb(message: pb.Manifest) -> Manifest:
    """Raises UnsupportedModel for a manifest that no run can have."""
    tensors = []
    for t in message.tensors:
        if t.role not in _ROLE_FROM_PB:
            raise UnsupportedModel(f"tensor {t.name!r} has role {t.role}, which this server does not know")
        tensors.append(TensorSpec(t.name, tuple(t.shape), t.dtype, _ROLE_FROM_PB[t.role], tuple(t.tied)))
    return Manifest(tuple(tensors))


def codec_to_pb(fmt: Format) -> pb.Codec:
    """The wire's number of a format; they are the same."""
    return cast(pb.Codec, int(fmt))
