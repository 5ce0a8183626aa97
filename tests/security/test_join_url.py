"""Join URLs: their forms, where they come from, and that no error shows a token."""

from __future__ import annotations

from pathlib import Path

import pytest

from diloco_client.address import URL_FILE_VARIABLE, URL_VARIABLE, find, read_place, shown
from diloco_client.connect import Connector
from diloco_proto.errors import ConfigError, InvalidAddress

TOKEN = "Zq3vJ8-mT_x0LwKcY5nR7bHdPf2sGaUe9iVoXj4kQyM"
PIN = "ab" * 32
OTHER = "cd" * 32


@pytest.fixture(autouse=True)
def _no_server_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (URL_VARIABLE, URL_FILE_VARIABLE):
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.parametrize(
    ("text", "target", "token", "pins", "tls"),
    [
        ("10.0.0.1:50051", "10.0.0.1:50051", "", (), False),
        ("[::1]:50051", "[::1]:50051", "", (), False),
        (f"diloco://{TOKEN}@host:1?pin=sha256:{PIN}", "host:1", TOKEN, (PIN,), True),
        (f"diloco://{TOKEN}@host:1/?pin=SHA256:{PIN.upper()}", "host:1", TOKEN, (PIN,), True),
        (f"diloco://{TOKEN}@[2001:db8::1]:7?pin=sha256:{PIN},{OTHER}", "[2001:db8::1]:7", TOKEN, (PIN, OTHER), True),
        (f"diloco://{TOKEN}@run.example.org:443?tls=1", "run.example.org:443", TOKEN, (), True),
        (f"diloco://{TOKEN}@127.0.0.1:9", "127.0.0.1:9", TOKEN, (), False),
        ("diloco://host:50051", "host:50051", "", (), False),
    ],
)
def test_the_forms_of_an_address(text: str, target: str, token: str, pins: tuple[str, ...], tls: bool) -> None:
    place = read_place(text)
    assert (place.target, place.token, place.pins, place.tls) == (target, token, pins, tls)
    assert TOKEN not in repr(place)
    assert TOKEN not in repr(find(text))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"dilco://{TOKEN}@host:1?pin=sha256:{PIN}", "is no join URL"),
        (f"diloco://{TOKEN}@host?pin=sha256:{PIN}", "is not a server address"),
        (f"diloco://{TOKEN}@host:99999?tls=1", "is not a server address"),
        (f"diloco://{TOKEN}@host:1?pin=sha256:{PIN[:-1]}", "64 hexadecimal digits; was it cut off?"),
        (f"diloco://{TOKEN}@host:1?pin={PIN}", "64 hexadecimal digits"),
        (f"diloco://{TOKEN}@host:1?tls=yes", "must be 0 or 1"),
        (f"diloco://{TOKEN}@host:1?tls=1&token={TOKEN}", "`pin` and `tls`, not token"),
        (f"diloco://{TOKEN}@host:1?{TOKEN}=1&tls=1", "`pin` and `tls`, not"),
        (f"diloco://user:{TOKEN}@host:1?tls=1", "is no join URL"),
        (f"diloco://{TOKEN}@host:1/{TOKEN}?tls=1", "is no join URL"),
        (f"diloco://{TOKEN}@host:1?tls", "cannot be read"),
        (f"diloco://{TOKEN}@[::1:1?tls=1", "cannot be read"),
        (f"diloco://{TOKEN}", "is not a server address"),
        (f"{TOKEN}@host:1", "is not a server address"),
        (TOKEN, "is not a server address"),
        (f"diloco://{TOKEN}@198.51.100.7:50051", "would cross the network in the clear"),
        (f"diloco://{TOKEN}@host:1?tls=0", "would cross the network in the clear"),
    ],
)
def test_what_cannot_be_read_is_refused_without_showing_the_token(text: str, says: str) -> None:
    with pytest.raises(InvalidAddress) as caught:
        read_place(text)
    assert says in str(caught.value)
    error: BaseException | None = caught.value
    while error is not None:  # what a traceback would print, causes included
        assert TOKEN not in repr(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def test_what_is_shown_still_helps() -> None:
    assert shown("nonsense") == "nonsense"
    assert shown(f"diloco://{TOKEN}@host:1?tls=1") == "diloco://…@host:1?tls=1"


def test_where_the_address_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "join-url"
    path.write_text(f"diloco://{TOKEN}@host:3?tls=1\n")
    with pytest.raises(InvalidAddress, match="or set DILOCO_URL or DILOCO_URL_FILE"):
        find(None)
    monkeypatch.setenv(URL_FILE_VARIABLE, str(path))
    assert find(None).read().target == "host:3"
    monkeypatch.setenv(URL_VARIABLE, "host:2")
    assert find(None).read().target == "host:2"
    assert find("host:1").read().target == "host:1"
    for text in (f"file:{path}", f"file://{path}"):
        assert find(text).read().token == TOKEN
    path.write_text(f"{TOKEN}\n{TOKEN}\n")
    with pytest.raises(InvalidAddress, match="must hold one join URL") as caught:
        find(f"file:{path}").read()
    assert TOKEN not in str(caught.value)
    with pytest.raises(InvalidAddress, match="cannot read the join URL in .*missing"):
        find(f"file:{tmp_path / 'missing'}").read()


def test_a_token_given_apart_asks_for_tls_beyond_loopback(tmp_path: Path) -> None:
    assert Connector("198.51.100.7:1", token=TOKEN)._place.tls
    assert not Connector("127.0.0.1:1", token=TOKEN)._place.tls
    assert Connector(f"diloco://{'x' * 43}@h:1?tls=1", token=TOKEN)._place.token == TOKEN
    assert TOKEN not in repr(Connector("127.0.0.1:1", token=TOKEN))


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.pem"
    broken.write_text("no certificate")
    for options, says in (
        ({"ca_cert": broken}, "broken.pem holds no certificate"),
        ({"ca_cert": tmp_path / "missing.pem"}, "missing.pem holds no certificate"),
        ({"client_cert": broken, "client_key": broken}, "broken.pem cannot be used"),
        ({"client_cert": broken}, "one is given without the other"),
    ):
        with pytest.raises(ConfigError, match=says):
            Connector("host:1", **options)
