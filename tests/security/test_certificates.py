"""The server's certificate: made once, read again when it changes, refused when it cannot work; and the settings."""

from __future__ import annotations

import datetime
import logging
import stat
from pathlib import Path

import pytest
from authority import DAY, Issued, issue
from cryptography import x509

from diloco_proto.errors import ConfigError
from diloco_server import ServerConfig
from diloco_server.entrance import Entrance
from diloco_server.tls import Certificate, load


def test_one_is_made_on_the_first_start_and_kept(tmp_path: Path) -> None:
    folder = tmp_path / "tls"
    made = Certificate.own(folder, ("203.0.113.7", "run.example.org")).pair
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {p.name: stat.S_IMODE(p.stat().st_mode) for p in folder.iterdir()} == {"cert.pem": 0o600, "key.pem": 0o600}
    assert Certificate.own(folder, ()).pair.pin == made.pin
    names = made.leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert {"diloco", "run.example.org"} <= set(names.get_values_for_type(x509.DNSName))
    assert "203.0.113.7" in map(str, names.get_values_for_type(x509.IPAddress))
    left = made.leaf.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    assert datetime.timedelta(days=3600) < left
    assert made.key.decode() not in repr(made)


def test_what_cannot_work_is_refused_at_the_start(tmp_path: Path) -> None:
    good, other = issue("a"), issue("b")
    certificate, key = good.write(tmp_path, "good")
    for files, says in (
        ((tmp_path / "missing.pem", key), "cannot read .*missing.pem"),
        ((key, key), "must hold a certificate and its key"),
        ((certificate, certificate), "must hold a certificate and its key"),
        ((certificate, other.write(tmp_path, "other")[1]), "does not belong to the certificate"),
        (issue("c", begins=-2 * DAY, ends=-DAY).write(tmp_path, "old"), "expired on .*put a new one there"),
        (issue("d", begins=DAY, ends=2 * DAY).write(tmp_path, "early"), "not valid before"),
    ):
        with pytest.raises(ConfigError, match=says):
            load(*files)


def test_a_new_pair_is_taken_up_whole_or_not_at_all(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = issue("a"), issue("b")
    certificate = Certificate.of_user(*first.write(tmp_path, "x"))
    told = []
    certificate.on_change = lambda: told.append(certificate.pair.pin)
    (tmp_path / "x.pem").write_bytes(second.certificate)
    certificate.refresh()
    certificate.refresh()
    assert certificate.pair.pin == first.pin, "the key is still the former one"
    assert caplog.text.count("the new TLS certificate is not taken") == 1
    second.write(tmp_path, "x")
    certificate.refresh()
    assert (certificate.pair.pin, told) == (second.pin, [second.pin])


def test_a_key_that_others_can_read_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    certificate, key = issue("a").write(tmp_path, "x")
    key.chmod(0o644)
    Certificate.of_user(certificate, key)
    assert f"{key} can be read by others (mode 644): chmod go= {key}" in caplog.text


def test_one_that_ends_soon_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load(*issue("a", ends=400 * DAY).write(tmp_path, "x"))
        assert not caplog.records
        load(*issue("a", ends=DAY).write(tmp_path, "y"))
    assert "y.pem expires on" in caplog.text


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"insecure": True, "secure": True}, "insecure turns TLS and tokens off, and secure asks for them"),
        ({"insecure": True, "client_ca": Path("x")}, "and client_ca asks for them"),
        ({"tls_cert": Path("x")}, "tls_cert and tls_key go together"),
        ({"tls_key": Path("x")}, "tls_cert and tls_key go together"),
        ({"advertise": "diloco://host"}, "write HOST or HOST:PORT"),
        ({"advertise": "2001:db8::1"}, "an IPv6 address in brackets"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ServerConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "guarded"),
    [
        ({}, False),
        ({"host": "::1"}, False),
        ({"secure": True}, True),
        ({"tls_cert": Path("x"), "tls_key": Path("y")}, True),
        ({"client_ca": Path("x")}, True),
        ({"host": "0.0.0.0"}, True),
        ({"host": "203.0.113.7"}, True),
        ({"host": "run.example.org"}, True),
        ({"host": "0.0.0.0", "insecure": True}, False),
    ],
)
def test_beyond_loopback_tls_and_tokens_are_on_unless_refused_aloud(settings: dict, guarded: bool) -> None:
    assert ServerConfig(**settings).guarded is guarded


def entrance(tmp_path: Path, **settings: object) -> Entrance:
    made = Entrance(ServerConfig(state_dir=tmp_path, **settings))
    made._port = 4711
    return made


def test_the_join_url_names_the_outside_address(tmp_path: Path) -> None:
    def where(**settings: object) -> str:
        return entrance(tmp_path, **settings).url().partition("@")[2].partition("?")[0]

    assert where(host="203.0.113.7") == "203.0.113.7:4711"
    assert where(host="0.0.0.0", advertise="run.example.org") == "run.example.org:4711"
    assert where(host="0.0.0.0", advertise="run.example.org:443") == "run.example.org:443"
    assert where(host="::", advertise="[2001:db8::1]") == "[2001:db8::1]:4711"
    assert where(host="::", advertise="[2001:db8::1]:443") == "[2001:db8::1]:443"
    assert "0.0.0.0" not in where(host="0.0.0.0")


def test_a_certificate_of_an_authority_is_not_pinned(tmp_path: Path) -> None:
    def known_by(issued: Issued) -> str:
        certificate, key = issued.write(tmp_path, "own")
        return entrance(tmp_path, tls_cert=certificate, tls_key=key).url().partition("?")[2]

    ours = issue("self")
    assert known_by(ours) == f"pin=sha256:{ours.pin}"
    assert known_by(issue("run", by=issue("authority"))) == "tls=1"


def test_the_urls_are_written_for_each_role_and_follow_what_changes(tmp_path: Path) -> None:
    made = entrance(tmp_path, secure=True)
    made.write_urls()
    urls = {name: tmp_path / name for name in ("join-url", "observer-url", "admin-url")}
    for (name, path), role in zip(urls.items(), ("worker", "observer", "admin"), strict=True):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, name
        assert path.read_text().startswith(
            f"diloco://{(tmp_path / 'tokens' / role).read_text().strip()}@127.0.0.1:4711?"
        )
    (tmp_path / "tokens" / "worker").write_text("b" * 20)
    made._tokens.roles("whatever a caller shows")
    assert urls["join-url"].read_text().startswith(f"diloco://{'b' * 20}@")


def test_insecure_is_said_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = entrance(tmp_path, host="0.0.0.0", insecure=True, advertise="10.0.0.1")
    assert "INSECURE: no TLS and no token at 0.0.0.0. Whoever reaches it can join" in caplog.text
    assert made.url() == "diloco://10.0.0.1:4711"
    assert not made.guarded
    assert [p.name for p in tmp_path.iterdir()] == []
