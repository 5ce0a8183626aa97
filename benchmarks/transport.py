"""Pushing and pulling one large fragment, against raw gRPC streams of as many bytes.

    python benchmarks/transport.py [--mib 64] [--repeats 11] [--codec fp32] [--line clear|tls|both] [--json]

The server is a process of its own, once with the default journal and once with --durability snapshots; the client's
transport is in this process. What is pushed is encoded beforehand: in fp32 frames of 1 MiB, stored as they are, so that
no codec is measured; with --codec int4 in the frames of a real run, which the server decompresses. A push lasts until
its outcome is here: every frame checked and kept, the norm computed and, with the journal, all of it synced to the
disk, which is not the transport's. A pull brings the update of a round, every frame checked.

The raw server is a process of its own too, gRPC's asyncio server on the same event loop, that reads or writes random
bytes in messages of 1 MiB; its client is the synchronous one, in this process, and keeps what it pulls. Both have
gRPC's own channel options. Through TLS it shows the certificate that the diloco-server has made.

All take turns. A ratio is the median over the repeats of the speed in bytes against the raw one of the same turn. With
--json the last line is one JSON object; WAY is push or pull, LINE is clear or tls:

    WAY_LINE            speed against raw, with --durability snapshots; at least 0.8 is wanted
    WAY_journal_LINE    likewise with the journal
    WAY_mb_s_LINE       MB/s with --durability snapshots
    WAY_raw_mb_s_LINE   MB/s of the raw stream
    WAY_bytes_LINE      of each transfer
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from common.pair import SETTINGS, Pair
from common.raw import RawClient, raw_server
from common.server import serving
from rich.console import Console
from rich.table import Table

from diloco_proto.codec import Format

RAW = "raw"
KEPT = ("snapshots", "journal")
WAYS = ("push", "pull")


@dataclass
class Taken:
    """One way over one line: bytes a second, by contestant, of each turn."""

    speeds: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in (RAW, *KEPT)})
    nbytes: int = 0
    """Of a transfer."""

    def note(self, name: str, nbytes: int, seconds: float) -> None:
        self.nbytes = nbytes
        self.speeds[name].append(nbytes / seconds)

    def of_raw(self, name: str) -> float:
        turns = zip(self.speeds[name], self.speeds[RAW], strict=True)
        return statistics.median(ours / raw for ours, raw in turns)

    def mb_s(self, name: str) -> float:
        return statistics.median(self.speeds[name]) / 1e6


@contextmanager
def contestants(mib: int, fmt: Format, secure: bool) -> Iterator[tuple[RawClient, dict[str, Pair]]]:
    """The raw client, and the pairs of workers by the durability of their servers."""
    blocks = (mib << 20) // (fmt.spec.code_bytes + fmt.spec.scale_bytes)
    given = (
        *SETTINGS,
        f"--uplink-codec={fmt.label}",
        f"--downlink-codec={fmt.label}",
        *(["--secure"] if secure else []),
    )
    with ExitStack() as stack:
        pairs = {}
        for name in KEPT:
            server, state = stack.enter_context(serving(f"--durability={name}", *given))
            address = f"file:{state / 'join-url'}" if secure else server.address
            pairs[name] = stack.enter_context(Pair(address, blocks, fmt))
        yield stack.enter_context(raw_client(state / "tls" if secure else None)), pairs


@contextmanager
def raw_client(tls: Path | None) -> Iterator[RawClient]:
    """Connected to a raw server; through TLS with the key and certificate of this folder."""
    pair = None if tls is None else ((tls / "key.pem").read_bytes(), (tls / "cert.pem").read_bytes())
    with raw_server(pair) as port, RawClient(port, pair and pair[1]) as client:
        yield client


def measure(mib: int, fmt: Format, repeats: int, secure: bool) -> dict[str, Taken]:
    """By way."""
    taken: dict[str, Taken] = {}
    with contestants(mib, fmt, secure) as (raw, pairs):
        for repeat in range(repeats + 1):
            if repeat < 2:  # the first turn is there to warm up
                taken = {way: Taken() for way in WAYS}
            turn(raw, pairs, taken["push"], taken["pull"])
    return taken


def turn(raw: RawClient, pairs: dict[str, Pair], push: Taken, pull: Taken) -> None:
    """All push; the rounds end; all pull."""
    for name, pair in pairs.items():
        push.note(name, pair.push_bytes, pair.push())
    push.note(RAW, push.nbytes, raw.push(push.nbytes))
    for pair in pairs.values():
        pair.end_round()
    for name, pair in pairs.items():
        seconds = pair.pull()
        pull.note(name, pair.pull_bytes, seconds)
    pull.note(RAW, pull.nbytes, raw.pull(pull.nbytes))


def flat(line: str, taken: dict[str, Taken]) -> dict[str, float]:
    found: dict[str, float] = {}
    for way, its in taken.items():
        found |= {
            f"{way}_{line}": its.of_raw("snapshots"),
            f"{way}_journal_{line}": its.of_raw("journal"),
            f"{way}_mb_s_{line}": its.mb_s("snapshots"),
            f"{way}_raw_mb_s_{line}": its.mb_s(RAW),
            f"{way}_bytes_{line}": its.nbytes,
        }
    return found


def show(lines: dict[str, dict[str, Taken]]) -> None:
    table = Table("", "raw, MB/s", "diloco, MB/s", "of raw", "with the journal, of raw", title="one large fragment")
    for line, taken in lines.items():
        for way, its in taken.items():
            ratios = (f"{its.of_raw(name):.2f}" for name in KEPT)
            table.add_row(f"{way}, {line}", f"{its.mb_s(RAW):.0f}", f"{its.mb_s('snapshots'):.0f}", *ratios)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=64, help="of the encoded fragment")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument(
        "--codec", choices=[f.label for f in Format if f.label not in ("int2", "ternary")], default="fp32"
    )
    parser.add_argument("--line", choices=("clear", "tls", "both"), default="both")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    options = parser.parse_args()
    fmt = next(f for f in Format if f.label == options.codec)
    lines = {
        line: measure(options.mib, fmt, options.repeats, secure=line == "tls")
        for line in ("clear", "tls")
        if options.line in (line, "both")
    }
    show(lines)
    if options.json:
        print(json.dumps({key: value for line, taken in lines.items() for key, value in flat(line, taken).items()}))


if __name__ == "__main__":
    main()
