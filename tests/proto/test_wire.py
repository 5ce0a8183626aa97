"""What travels between the two ends arrives as it was."""

from __future__ import annotations

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diloco_proto import outer_pb2 as pb
from diloco_proto.codec import Format
from diloco_proto.errors import ERROR_KEY, DilocoError, NotMember, UnsupportedModel
from diloco_proto.manifest import DTYPES, Manifest, Role, TensorSpec
from diloco_proto.wire import codec_to_pb, error_from_rpc, manifest_from_pb, manifest_to_pb

names = st.text(min_size=1, max_size=12)
tensors = st.builds(
    TensorSpec,
    names,
    st.lists(st.integers(1, 1 << 40), max_size=4).map(tuple),
    st.sampled_from(DTYPES),
    st.sampled_from(Role),
    st.lists(names, max_size=2).map(tuple),
)
one_trained = TensorSpec("", (), "float32", Role.TRAINED)


@settings(deadline=None)
@given(st.lists(tensors, max_size=6, unique_by=lambda t: t.name))
def test_a_manifest_arrives_as_it_was(found: list[TensorSpec]) -> None:
    manifest = Manifest((one_trained, *found))
    message = pb.Manifest.FromString(manifest_to_pb(manifest).SerializeToString())
    assert manifest_from_pb(message) == manifest


@pytest.mark.parametrize("role", Role)
def test_roles_have_their_names_on_the_wire(role: Role) -> None:
    manifest = Manifest((one_trained, TensorSpec("a", (1,), "float32", role)))
    assert pb.Role.Name(manifest_to_pb(manifest).tensors[1].role) == f"ROLE_{role.name}"


def test_a_role_from_the_future_is_refused() -> None:
    message = pb.Manifest(tensors=[pb.Tensor(name="a", shape=[1], dtype="float32", role=9)])
    with pytest.raises(UnsupportedModel, match="'a' has role 9"):
        manifest_from_pb(message)


@pytest.mark.parametrize("fmt", Format)
def test_formats_have_the_numbers_of_the_wire(fmt: Format) -> None:
    assert pb.Codec.Name(codec_to_pb(fmt)) == f"CODEC_{fmt.name}"


class Refusal(grpc.RpcError):
    """What the client's gRPC raises."""

    def __init__(self, *metadata: tuple[str, str], details: str | None = "why") -> None:
        self._metadata, self._details = metadata, details

    def trailing_metadata(self) -> tuple[tuple[str, str], ...] | None:
        return self._metadata or None

    def details(self) -> str | None:
        return self._details


def errors_of_a_server() -> list[type[DilocoError]]:
    """Every error class that has a gRPC status of its own."""
    classes: list[type[DilocoError]] = [DilocoError]
    for cls in classes:
        classes += cls.__subclasses__()
    return [c for c in classes if "status" in vars(c) and c is not DilocoError]


@pytest.mark.parametrize("cls", errors_of_a_server())
def test_a_typed_error_arrives_with_its_class_and_message(cls: type[DilocoError]) -> None:
    found = error_from_rpc(Refusal(("other", "x"), (ERROR_KEY, cls.__name__)))
    assert type(found) is cls
    assert str(found) == "why"
    assert cls.status is not grpc.StatusCode.UNKNOWN


def test_an_error_from_the_future_is_at_least_a_diloco_error() -> None:
    assert type(error_from_rpc(Refusal((ERROR_KEY, "Newfangled")))) is DilocoError


@pytest.mark.parametrize("name", ["Exception", "KeyboardInterrupt", "Manifest", "__import__"])
def test_only_our_own_classes_are_made_from_names(name: str) -> None:
    assert type(error_from_rpc(Refusal((ERROR_KEY, name)))) is DilocoError


def test_a_broken_connection_is_no_typed_error() -> None:
    assert error_from_rpc(Refusal()) is None
    assert error_from_rpc(Refusal(("grpc-status", "14"))) is None


def test_a_typed_error_without_details() -> None:
    found = error_from_rpc(Refusal((ERROR_KEY, "NotMember"), details=None))
    assert type(found) is NotMember
    assert str(found) == ""
