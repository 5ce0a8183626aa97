"""Tokens and certificates are exchanged while a run goes on, and strange ones met on the way."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from authority import issue, shows
from secured import digests, net, refused, secured, train, with_token

import diloco_client
from diloco_proto.errors import (
    PinMismatch,
    Unauthenticated,
)


class Cut(threading.Thread):
    """A relay of one port to another, whose connections can all be cut."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self._upstream = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._sockets: list[socket.socket] = []
        self.start()

    def run(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._upstream))
            except OSError:
                return
            self._sockets += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
        except OSError:
            pass
        self._end(sink)

    def _end(self, sock: socket.socket) -> None:
        try:
            sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            return

    def cut(self) -> None:
        for sock in self._sockets:
            self._end(sock)

    def close(self) -> None:
        self._end(self._listener)
        self._listener.close()
        self.cut()
        for sock in self._sockets:
            sock.close()


def until(condition: Callable[[], bool], act: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        act()
        assert time.monotonic() < deadline


def test_a_worker_lives_through_the_exchange_of_token_and_certificate(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It was given a file, and the file is kept up to date: as the server itself does with its join-url."""
    own = issue("first"), issue("second")
    files = own[0].write(tmp_path, "own")
    with secured(tmp_path / "state", tls_cert=files[0], tls_key=files[1]) as server:
        relay = Cut(server.port)
        path = tmp_path / "url"

        def hand_out() -> None:
            path.write_text(server.join_url.replace(f":{server.port}?", f":{relay.port}?"))

        def goes_on() -> None:
            counted = outer.stats.counted
            until(lambda: outer.stats.counted > counted, lambda: train(model, optimizer, 1))

        hand_out()
        first, tokens = server.join_url, tmp_path / "state" / "tokens" / "worker"
        model, optimizer = net()
        with diloco_client.join(f"file:{path}", model, optimizer, connect_timeout=20) as outer:
            goes_on()
            with tokens.open("a") as file:
                file.write("n" * 43 + "\n")
            until(lambda: "n" * 43 in server.join_url, lambda: train(model, optimizer, 1))
            own[1].write(tmp_path, "own")
            with refused(PinMismatch):  # a new connection meets the new certificate
                diloco_client.status(first)
            goes_on()  # by its connections, and the token that is still valid
            hand_out()
            only_new = tmp_path / "only-new"
            only_new.write_text("n" * 43)
            only_new.replace(tokens)  # whole: an empty file would let nobody in
            goes_on()
            assert "back in run" not in caplog.text, "its session was not touched"
            with refused(Unauthenticated):
                diloco_client.status(with_token(server.join_url, first[9:52]))
            relay.cut()
            until(lambda: "back in run" in caplog.text, lambda: train(model, optimizer, 1))
            goes_on()
            second = server.join_url
            own[0].write(tmp_path, "own")
            with refused(PinMismatch):
                diloco_client.status(second)
            hand_out()
            caplog.clear()
            relay.cut()
            until(lambda: "back in run" in caplog.text, lambda: train(model, optimizer, 1))
            outer.flush()
            assert outer.base_digests() == digests(server.join_url)
        relay.close()


def test_the_file_with_the_url_tells_of_a_new_token_and_certificate_though_nobody_calls(tmp_path: Path) -> None:
    own = issue("first"), issue("second")
    certificate, key = own[0].write(tmp_path, "own")
    with secured(tmp_path / "state", tls_cert=certificate, tls_key=key):
        url = tmp_path / "state" / "join-url"
        with (tmp_path / "state" / "tokens" / "worker").open("a") as file:
            file.write("n" * 43 + "\n")
        until(lambda: "n" * 43 in url.read_text(), lambda: time.sleep(0.01))
        former = url.read_text()
        own[1].write(tmp_path, "own")
        until(lambda: url.read_text() != former, lambda: time.sleep(0.01))


def test_a_worker_whose_token_was_withdrawn_ends_with_an_error(tmp_path: Path) -> None:
    with secured(tmp_path) as server:
        relay = Cut(server.port)
        url = server.join_url.replace(f":{server.port}?", f":{relay.port}?")
        model, optimizer = net()
        with (
            refused(Unauthenticated, "does not know this token", seconds=30),
            diloco_client.join(url, model, optimizer, connect_timeout=20),
        ):
            train(model, optimizer, 4)
            (tmp_path / "tokens" / "worker").write_text("n" * 43)
            relay.cut()
            until(lambda: False, lambda: train(model, optimizer, 1))
        relay.close()


def test_a_gate_on_the_way_does_not_end_a_run_that_has_begun(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A laptop wakes in a hotel's network, whose gate answers for everybody, with a certificate of its own."""
    with secured(tmp_path) as server, shows(issue("hotel")) as (gate, handled):
        relay = Cut(server.port)
        model, optimizer = net()
        url = server.join_url.replace(f":{server.port}?", f":{relay.port}?")
        with diloco_client.join(url, model, optimizer, connect_timeout=20) as outer:
            train(model, optimizer, 4)
            relay._upstream = gate
            relay.cut()
            until(lambda: "shows another certificate" in caplog.text, lambda: train(model, optimizer, 1))
            assert handled.calls == []
            relay._upstream = server.port
            until(lambda: "back in run" in caplog.text, lambda: train(model, optimizer, 1))
            outer.flush()
            assert outer.base_digests() == digests(server.join_url)
        relay.close()
