"""Real runs through TLS and tokens, and everybody who must not get in: what they are told, and that nothing is sent."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from pathlib import Path

import grpc
import pytest
from authority import DAY, issue, shows
from secured import WRONG, digests, joins, refused, secured, with_token

import diloco_client
from diloco_client import probe
from diloco_client.connect import Connector
from diloco_client.transport import Transport
from diloco_proto import outer_pb2 as pb
from diloco_proto.channel import CLIENT_OPTIONS
from diloco_proto.errors import (
    CertificateError,
    PermissionDenied,
    PinMismatch,
    ServerUnreachable,
    TLSMismatch,
    Unauthenticated,
)

# -- those who get in --


def test_a_join_by_url_trains_and_both_ends_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with secured(tmp_path) as server:
        url = (tmp_path / "join-url").read_text().strip()
        assert url == server.join_url
        assert joins(url) == digests(f"file:{tmp_path / 'observer-url'}")
        monkeypatch.setenv("DILOCO_URL_FILE", str(tmp_path / "join-url"))
        assert joins(None) == digests((tmp_path / "admin-url").read_text())
        out = tmp_path / "theta.safetensors"
        assert diloco_client.export((tmp_path / "observer-url").read_text(), out) == 4
        # The plain address with the rest apart; the certificate holds for loopback.
        token, certificate = (tmp_path / "tokens" / "worker").read_text().strip(), tmp_path / "tls" / "cert.pem"
        assert joins(server.address, token=token, ca_cert=certificate) == digests(url)


def test_without_a_state_directory_the_secrets_last_as_long_as_the_server() -> None:
    with secured(None) as server:
        assert joins(server.join_url) == digests(server.join_url)


# -- those who do not --


def test_tokens_that_do_not_let_in(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with secured(tmp_path) as server:
        url = server.join_url
        observer = (tmp_path / "observer-url").read_text().strip()
        for attempt in (diloco_client.status, joins):
            with refused(Unauthenticated, "the server does not know this token", "join-url"):
                attempt(with_token(url, WRONG))
            with refused(Unauthenticated, "asks for a token and the call had none", "DILOCO_URL"):
                attempt(url.replace(url.partition("@")[0] + "@", "diloco://"))
        with refused(PermissionDenied, "Session is for workers", "this token is for observers", "tokens/worker"):
            joins(observer)
        transport = Transport(observer)
        with refused(PermissionDenied, "Push is for workers"):
            transport.push(pb.PushHeader(worker_id="w"), [])
        transport.close()
        connector = Connector(url)
        rollback = connector.line("session").channel.unary_unary("/diloco.v1.Outer/Rollback")
        with pytest.raises(grpc.RpcError, match="Rollback is for admins, and this token is for workers") as caught:
            rollback(b"", timeout=20)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        connector.close()
        assert server.engine.run.manifest is None, "nothing of a stranger's arrived"
        assert server.engine.bytes_in == 0
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("refused /diloco.v1.Outer/")]
    assert {line.split(": ")[1] for line in lines} == {"Unauthenticated", "PermissionDenied"}
    assert all(" from ipv4:127.0.0.1:" in line for line in lines)


def test_no_token_is_logged_shown_or_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), secured(tmp_path) as server:
        url = server.join_url
        joins(url)
        with refused(Unauthenticated):
            diloco_client.status(with_token(url, WRONG))
        told = str(diloco_client.status(url)) + repr(server) + repr(server.engine.run.config) + repr(vars(server))
    secrets = [(tmp_path / "tokens" / role).read_text().strip() for role in ("worker", "observer", "admin")]
    key = (tmp_path / "tls" / "key.pem").read_text().splitlines()[1]
    for secret in (*secrets, WRONG, key):
        assert secret not in caplog.text
        assert secret not in told


def test_another_certificate_than_the_pinned_one(tmp_path: Path) -> None:
    ours, theirs = issue("ours"), issue("theirs")
    with shows(theirs) as (port, handled):
        url = f"diloco://{WRONG}@127.0.0.1:{port}?pin=sha256:{ours.pin}"
        for attempt in (diloco_client.status, joins):
            with refused(PinMismatch, f"sha256:{theirs.pin}", "nothing was sent", "new join URL"):
                attempt(url)
        assert handled.calls == []
        # Several may be named while one is exchanged for the other.
        connector = Connector(f"{url},{theirs.pin}")
        connector.reach("x", 10, lambda: None)
        connector.close()


@pytest.mark.parametrize(
    ("begins", "ends", "says"),
    [(-2 * DAY, -DAY, "expired on "), (DAY, 2 * DAY, "is not valid before ")],
)
def test_a_pinned_certificate_whose_time_is_over(begins: object, ends: object, says: str) -> None:
    issued = issue("old", begins=begins, ends=ends)
    with (
        shows(issued) as (port, handled),
        refused(CertificateError, says, "Nothing was sent", "clock right", "new join URL"),
    ):
        diloco_client.status(f"diloco://{WRONG}@127.0.0.1:{port}?pin=sha256:{issued.pin}")
    assert handled.calls == []


def test_certificates_that_no_authority_vouches_for(tmp_path: Path) -> None:
    ours, theirs = issue("our authority"), issue("their authority")
    roots, _ = ours.write(tmp_path, "authority")
    here = ("127.0.0.1",)
    cases = {
        "expired": issue("a", by=ours, names=here, begins=-2 * DAY, ends=-DAY),
        "IP address mismatch": issue("b", by=ours, names=("run.example.org",)),
        "unable to get local issuer": issue("c", by=theirs, names=here),
    }
    for says, issued in cases.items():
        with shows(issued) as (port, handled):
            with refused(CertificateError, says, "Nothing was sent", "ca_cert"):
                diloco_client.status(f"diloco://{WRONG}@127.0.0.1:{port}?tls=1", ca_cert=roots)
            assert handled.calls == []
    with shows(issue("good", by=ours, names=here)) as (port, _):
        connector = Connector(f"diloco://{WRONG}@127.0.0.1:{port}?tls=1", ca_cert=roots)
        connector.reach("x", 10, lambda: None)
        connector.close()


def test_one_side_speaks_tls_and_the_other_does_not(tmp_path: Path) -> None:
    with secured(tmp_path) as server, refused(TLSMismatch, "speaks TLS", "join URL", "DILOCO_URL"):
        joins(server.address)
    with shows(None) as (port, handled):
        for known_by in (f"pin=sha256:{'ab' * 32}", "tls=1"):
            with refused(TLSMismatch, "does not speak TLS", "plain HOST:PORT"):
                diloco_client.status(f"diloco://{WRONG}@127.0.0.1:{port}?{known_by}")
        assert handled.calls == []


def test_a_server_that_is_not_there_is_waited_for_and_then_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    url = f"diloco://{WRONG}@127.0.0.1:{port}?pin=sha256:{'ab' * 32}"
    with refused(ServerUnreachable, f"no diloco-server answered at 127.0.0.1:{port} within 1 s"):
        diloco_client.status(url, timeout=1)


def test_mutual_tls(tmp_path: Path) -> None:
    ours, theirs = issue("our authority"), issue("their authority")
    roots, _ = ours.write(tmp_path, "authority")
    good = issue("worker", by=ours).write(tmp_path, "worker")
    bad = issue("stranger", by=theirs).write(tmp_path, "stranger")
    with secured(tmp_path, client_ca=roots) as server:
        url = server.join_url
        with refused(TLSMismatch, "hangs up right after the TLS handshake", "client_cert and client_key"):
            joins(url)
        with refused(TLSMismatch, "does not take the client certificate", bad[0].name):
            joins(url, client_cert=bad[0], client_key=bad[1])
        assert server.engine.run.manifest is None
        known = {"client_cert": good[0], "client_key": good[1]}
        assert joins(url, **known) == digests(url, **known)
        with refused(Unauthenticated):
            diloco_client.status(with_token(url, WRONG), **known)


# -- on the wire --


def test_whoever_says_nothing_or_nonsense_leaves_nothing_behind(tmp_path: Path) -> None:
    with secured(tmp_path) as server:
        for garbage in (b"", b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", os.urandom(4096)):
            with socket.create_connection(("127.0.0.1", server.port), 10) as raw:
                raw.sendall(garbage)
                raw.shutdown(socket.SHUT_WR)
                raw.settimeout(10)
                while raw.recv(4096):
                    pass
        assert joins(server.join_url) == digests(server.join_url)


def test_headers_larger_than_any_of_ours_are_refused(tmp_path: Path) -> None:
    with secured(tmp_path) as server:
        certificate = (tmp_path / "tls" / "cert.pem").read_bytes()
        options = (*CLIENT_OPTIONS, ("grpc.ssl_target_name_override", "diloco"))
        with grpc.secure_channel(
            f"127.0.0.1:{server.port}", grpc.ssl_channel_credentials(certificate), options
        ) as channel:
            status = channel.unary_unary("/diloco.v1.Outer/Status")
            with pytest.raises(grpc.RpcError) as caught:
                status(b"", metadata=(("authorization", "Bearer " + "x" * 12_000),), timeout=20)
            assert caught.value.code() is not grpc.StatusCode.UNAUTHENTICATED, "they were not even read"


def test_the_look_at_a_certificate_goes_through_the_proxy_that_grpc_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """An HTTP proxy that tunnels; the server's name means something only to it."""
    issued, asked = issue("far"), []
    with shows(issued) as (port, _), socket.create_server(("127.0.0.1", 0)) as proxy:

        def tunnel() -> None:
            while True:
                try:
                    near, _ = proxy.accept()
                except OSError:
                    return
                head = b""
                while not head.endswith(b"\r\n\r\n"):
                    head += near.recv(1)
                asked.append(head.split(b" ")[1])
                far = socket.create_connection(("127.0.0.1", port))
                near.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=carry, args=(source, sink), daemon=True).start()

        def carry(source: socket.socket, sink: socket.socket) -> None:
            with sink, contextlib.suppress(OSError):
                while data := source.recv(65536):
                    sink.sendall(data)

        for variable in ("grpc_proxy", "https_proxy", "http_proxy", "no_grpc_proxy", "no_proxy"):
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        threading.Thread(target=tunnel, daemon=True).start()
        connector = Connector(f"diloco://{WRONG}@run.invalid:50051?pin=sha256:{issued.pin}")
        connector.reach("x", 10, lambda: None)
        connector.close()
        assert set(asked) == {b"run.invalid:50051"}
        assert len(asked) >= 2, "the look, and gRPC's own connection"
        monkeypatch.setenv("no_proxy", "example.org,run.invalid")
        with pytest.raises(ConnectionError):
            probe.pinned_certificate(connector._place, 5)
