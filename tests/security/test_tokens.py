"""Tokens and roles: files, rotation, what each role may call, and that a refused call's body is not read."""

from __future__ import annotations

import asyncio
import hmac
import logging
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from diloco_proto import outer_pb2 as pb
from diloco_proto.errors import ConfigError, DilocoError, PermissionDenied, Unauthenticated
from diloco_proto.health import CHECK
from diloco_proto.wire import error_from_rpc
from diloco_server.auth import ALLOWED, Gate, Notices, Role, Tokens, allowed

GOOD = "a" * 20
FROZEN_CLOCK = 0.0


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_tokens_are_made_once_and_only_their_owner_may_read_them(tmp_path: Path) -> None:
    folder = tmp_path / "state" / "tokens"
    tokens = Tokens(folder)
    assert mode(folder) == 0o700
    assert {p.name: mode(p) for p in folder.iterdir()} == {"worker": 0o600, "observer": 0o600, "admin": 0o600}
    values = {role: tokens.newest(role) for role in Role}
    assert len({*values.values()}) == 3
    assert all(len(value) >= 43 for value in values.values()), "32 random bytes"
    again = Tokens(folder)
    assert {role: again.newest(role) for role in Role} == values
    for role, value in values.items():
        assert again.roles(value) == {role}


def test_a_token_is_exchanged_while_the_server_runs(tmp_path: Path) -> None:
    tokens = Tokens(tmp_path)
    told = []
    tokens.on_change = lambda: told.append(tokens.newest(Role.WORKER))
    path, first = tmp_path / "worker", tokens.newest(Role.WORKER)
    path.write_text(f"# of May\n{first}\n\n  {GOOD}  \n")
    assert tokens.roles(GOOD) == {Role.WORKER}
    assert tokens.roles(first) == {Role.WORKER}
    path.write_text(f"{GOOD}\n")
    assert tokens.roles(first) == frozenset()
    assert told == [GOOD, GOOD]
    path.write_text("")
    assert tokens.roles(GOOD) == frozenset()
    path.unlink()
    assert tokens.roles("") == frozenset()
    assert tokens.newest(Role.WORKER) == ""
    assert tokens.roles(tokens.newest(Role.ADMIN)) == {Role.ADMIN}


def test_one_token_in_two_files_has_both_roles(tmp_path: Path) -> None:
    tokens = Tokens(tmp_path)
    for name in ("worker", "admin"):
        (tmp_path / name).write_text(GOOD)
    assert tokens.roles(GOOD) == {Role.WORKER, Role.ADMIN}


@pytest.mark.parametrize("weak", ["short", "with a blank in it, sixteen", "ä" * 20, "x/" * 10])
def test_what_is_no_token_is_refused_and_not_shown(weak: str, tmp_path: Path) -> None:
    (tmp_path / "worker").write_text(f"{GOOD}\n{weak}\n", "utf-8")
    with pytest.raises(ConfigError, match=r"line 2 of .*worker is no token") as caught:
        Tokens(tmp_path)
    assert weak not in str(caught.value)


def test_a_broken_file_leaves_its_role_without_a_token(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokens = Tokens(tmp_path)
    first = tokens.newest(Role.WORKER)
    (tmp_path / "worker").write_text(f"{first}\nshort\n")
    assert tokens.roles(first) == frozenset()
    assert "nobody has the role worker any more" in caplog.text
    assert first not in caplog.text


def test_every_token_is_compared_wherever_the_right_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [f"{n:020}" for n in range(5)]
    (tmp_path / "worker").write_text("\n".join(lines))
    tokens = Tokens(tmp_path)
    compared: list[tuple[int, int]] = []
    real = hmac.compare_digest

    def counting(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return real(a, b)

    monkeypatch.setattr(hmac, "compare_digest", counting)
    for presented in (lines[0], lines[-1], "x", "y" * 10_000, "\udc80"):
        compared.clear()
        tokens.roles(presented)
        assert compared == [(32, 32)] * 7, "all, and all of one length"


def test_each_method_has_its_roles_and_a_new_one_is_for_admins() -> None:
    (service,) = pb.DESCRIPTOR.services_by_name.values()
    methods = {f"/{service.full_name}/{m.name}" for m in service.methods}
    assert methods == set(ALLOWED), "say in auth.ALLOWED who may call the new method"
    assert allowed("/diloco.v1.Outer/NotYetWritten") == {Role.ADMIN}
    for method in ("Session", "Push"):
        assert allowed(f"/diloco.v1.Outer/{method}") == {Role.WORKER}


def test_refusals_are_logged_with_the_peer_but_a_flood_does_not_fill_the_disk(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = 0.0
    notices = Notices(lambda: now)
    with caplog.at_level(logging.WARNING):
        for _ in range(10_000):
            notices.refused("ipv4:198.51.100.7:4711", "/x/Y", Unauthenticated("no token"))
        assert len(caplog.records) == Notices.PER_INTERVAL
        assert "refused /x/Y from ipv4:198.51.100.7:4711: Unauthenticated: no token" in caplog.text
        now = Notices.INTERVAL
        notices.refused("ipv4:198.51.100.8:1", "/x/Y", Unauthenticated("no token"))
    assert f"and {10_000 - Notices.PER_INTERVAL} more calls were refused" in caplog.text
    assert "198.51.100.8" in caplog.records[-1].getMessage()


# -- the gate before a service that counts what it reads --


class Counting:
    """A service of the protocol's methods that notes every message it reads."""

    def __init__(self) -> None:
        self.messages = 0
        self.calls: list[str] = []

    def read(self, data: bytes) -> bytes:
        self.messages += 1
        return data

    def handlers(self) -> list[grpc.GenericRpcHandler]:
        def unary(name: str) -> grpc.RpcMethodHandler:
            async def answer(request: bytes, context: object) -> bytes:
                self.calls.append(name)
                return b"answer"

            return grpc.unary_unary_rpc_method_handler(answer, self.read)

        def streaming(name: str) -> grpc.RpcMethodHandler:
            async def answer(requests: object, context: object):
                self.calls.append(name)
                async for request in requests:
                    yield request

            return grpc.stream_stream_rpc_method_handler(answer, self.read)

        def pull(name: str) -> grpc.RpcMethodHandler:
            async def answer(request: bytes, context: object):
                self.calls.append(name)
                yield request

            return grpc.unary_stream_rpc_method_handler(answer, self.read)

        make = {"Session": streaming, "Push": streaming, "Pull": pull, "Describe": unary, "Status": unary}
        make["Rollback"] = unary  # one that does not exist yet
        outer = grpc.method_handlers_generic_handler("diloco.v1.Outer", {n: m(n) for n, m in make.items()})
        check = grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": unary("Check")})
        return [outer, check]


@contextmanager
def gated(tokens: Tokens) -> Iterator[tuple[Counting, grpc.Channel]]:
    counting, ready = Counting(), threading.Event()
    loops: list[tuple[asyncio.AbstractEventLoop, asyncio.Event, int]] = []

    async def main() -> None:
        server = grpc.aio.server(interceptors=(Gate(tokens, lambda: FROZEN_CLOCK),))
        server.add_generic_rpc_handlers(tuple(counting.handlers()))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        over = asyncio.Event()
        loops.append((asyncio.get_running_loop(), over, port))
        ready.set()
        await over.wait()
        await server.stop(None)

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    assert ready.wait(30)
    loop, over, port = loops[0]
    channel = grpc.insecure_channel(f"127.0.0.1:{port}")
    try:
        yield counting, channel
    finally:
        channel.close()
        loop.call_soon_threadsafe(over.set)
        thread.join()


STREAMS = ("Session", "Push")


def call(channel: grpc.Channel, method: str, metadata: tuple[tuple[str, str], ...]) -> object:
    path = CHECK if method == "Check" else f"/diloco.v1.Outer/{method}"
    if method in STREAMS:
        return list(channel.stream_stream(path)(iter([b"body"]), metadata=metadata, timeout=30))
    if method == "Pull":
        return list(channel.unary_stream(path)(b"body", metadata=metadata, timeout=30))
    return channel.unary_unary(path)(b"body", metadata=metadata, timeout=30)


def refusal(channel: grpc.Channel, method: str, *metadata: tuple[str, str]) -> DilocoError:
    with pytest.raises(grpc.RpcError) as caught:
        call(channel, method, metadata)
    error = error_from_rpc(caught.value)
    assert error is not None
    assert caught.value.code() is error.status
    return error


METHODS = ("Session", "Push", "Pull", "Describe", "Status", "Rollback")


def bearer(token: str) -> tuple[str, str]:
    return "authorization", f"Bearer {token}"


def test_no_message_of_a_refused_call_is_read(tmp_path: Path) -> None:
    tokens = Tokens(tmp_path)
    worker = tokens.newest(Role.WORKER)
    strangers = (
        (),
        (("authorization", worker),),
        (("authorization", f"Basic {worker}"),),
        (("authorization", "Bearer "),),
        (bearer(worker), bearer(worker)),
        (bearer(worker[:-1]),),
        (bearer(worker + "x"),),
    )
    with gated(tokens) as (counting, channel):
        for method in (*METHODS, "NoSuchMethod"):
            for metadata in strangers:
                error = refusal(channel, method, *metadata)
                assert type(error) is Unauthenticated
                assert "join-url" in str(error)
                assert worker not in str(error)
        assert (counting.messages, counting.calls) == (0, [])


def test_each_role_may_do_its_own_and_no_more(tmp_path: Path) -> None:
    tokens = Tokens(tmp_path)
    looking = {"Pull", "Describe", "Status"}
    may = {Role.WORKER: looking | {"Session", "Push"}, Role.OBSERVER: looking, Role.ADMIN: looking | {"Rollback"}}
    with gated(tokens) as (counting, channel):
        for role in Role:
            mine = bearer(tokens.newest(role))
            for method in METHODS:
                before = counting.messages
                if method in may[role]:
                    assert call(channel, method, (mine,))
                    assert counting.messages == before + 1
                    continue
                error = refusal(channel, method, mine)
                assert type(error) is PermissionDenied
                assert f"this token is for {role.value}s" in str(error)
                wanted = "tokens/worker" if method in STREAMS else "tokens/admin"
                assert wanted in str(error), "it says which token would do"
                assert counting.messages == before
        assert call(channel, "Check", ()) == b"answer", "a container's probe has no token"


def test_a_stranger_who_streams_is_stopped_after_a_window(tmp_path: Path) -> None:
    sent = 0

    def flood() -> Iterator[bytes]:
        nonlocal sent
        while True:
            sent += 1
            yield bytes(1 << 20)

    with gated(Tokens(tmp_path)) as (counting, channel):
        for _ in range(20):
            with pytest.raises(grpc.RpcError) as caught:
                list(channel.stream_stream("/diloco.v1.Outer/Push")(flood(), timeout=30))
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert counting.messages == 0
    assert sent <= 20 * 16, "the client ran ahead of the refusal by a few messages at most"
