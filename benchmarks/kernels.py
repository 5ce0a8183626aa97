"""How close the codec's kernels come to the speed of memory.

    python benchmarks/kernels.py [--json] [--threads N] [--params MILLIONS] [--repeats N]

Every figure is a fraction of memcpy's bandwidth (bytes read and written, np.copyto of arrays far larger than the
caches), measured in the same run and interleaved with it, by the bytes that the work has to touch:

    encode_F      reads 4 bytes a parameter, writes the encoded ones (0.516 for 4-bit formats, 0.266 for 2-bit ones)
    difference_F  encodes base - local without storing it: reads 8 bytes
    feedback_F    encodes, with error feedback: also writes the residual, reads and writes theta, 16 bytes
    decode_F      decode and accumulate: reads the encoded bytes and 4, writes 4
    apply_F       out = base - decoded and the digest of out: reads the encoded bytes and 4, writes 4
    commit4_F     the outer step on four contributions: theta, momentum and residual read and written, 24 bytes;
                  four times the encoded bytes, and once those of the update, which is in F, or in int4 where F is
                  for contributions only; with the digest of theta
    commit16_F    the same on sixteen

for each format F. Times are those that the process computed, over the number of threads, so that other work on the
machine counts less; each figure is that of the fastest of the repeats, of memcpy as of the kernel. Writing also reads
the lines to be written, which memcpy avoids with streaming stores for large arrays on some machines and not on others;
the fractions do not correct for that. A second table has the same work against copies of 1 MiB one after the other.

With --json the last line is one JSON object:

    encode_F, decode_F              fractions, as above; at least 0.5 is wanted
    difference_F, feedback_F        likewise
    apply_F                         likewise
    commit4_F, commit16_F           at least 0.7 is wanted
    least_codec, least_commit       the least of encode and decode; of the commits of formats that have scales
    memcpy_gb_s, copy_gb_s          of all threads together; of copies of 1 MiB, the latter
    threads                         that were used
    compile_seconds, load_seconds   what a process computes until the kernels of the default formats are compiled in an
                                    empty cache, at most 5 is wanted, and until they are loaded from it
    compile_all_seconds             until those of all formats are compiled
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from common.steps import placing
from rich.console import Console
from rich.table import Table

from diloco_proto.codec import (
    BLOCK,
    Encoded,
    Format,
    accumulate,
    encode,
    encode_difference,
    encode_feedback,
    encode_fragment,
    subtract_into,
)
from diloco_server.outer import FragmentState, OuterSettings, commit

UPLINK_ONLY = (Format.INT2, Format.TERNARY)
MOST = 16
"""Contributions."""
PIECE = 1 << 12
"""Blocks of a piece: 1 MiB."""

WARM_UP = """
from diloco_proto.codec import Format
from diloco_server.config import RunConfig
from diloco_server.outer import warm_up
default = RunConfig()
warm_up({formats})
"""


def seconds(work: Callable[[], object], threads: int) -> float:
    """Of computing, on each of the threads."""
    begin = time.process_time()
    work()
    return (time.process_time() - begin) / threads


def spread(pool: ThreadPoolExecutor | None, threads: int, blocks: int, work: Callable[[int, int], object]) -> None:
    """Call work(first, end) on equal ranges of blocks, one a thread."""
    if pool is None:
        work(0, blocks)
        return
    cuts = [blocks * i // threads for i in range(threads + 1)]
    list(pool.map(work, cuts[:-1], cuts[1:]))


class Bench:
    """The arrays of one format and the operations on them."""

    def __init__(self, fmt: Format, params: int, threads: int, pool: ThreadPoolExecutor | None) -> None:
        self.fmt, self.threads, self.pool = fmt, threads, pool
        rng = np.random.default_rng(0)
        self.blocks = params // BLOCK
        self.x = rng.standard_normal(self.blocks * BLOCK, np.float32) * np.float32(1e-3)
        first = encode_fragment(fmt, self.x)
        self.target = encode_fragment(fmt, self.x)
        self.contributions = [Encoded(fmt, np.roll(first.scales, i), first.codes.copy()) for i in range(MOST)]
        zeros = [np.zeros(self.x.size, np.float32) for _ in range(2)]
        self.state = FragmentState(self.x.copy(), *zeros)
        self.acc = np.zeros(self.x.size, np.float32)
        self.downlink = Format.INT4 if fmt in UPLINK_ONLY else fmt
        self.update = encode_fragment(self.downlink, self.x)
        encoded, update = fmt.spec.bits / 8, self.downlink.spec.bits / 8
        self.works: dict[str, tuple[float, Callable[[], object]]] = {
            "encode": (4 + encoded, lambda: self._spread(self._encode)),
            "difference": (8 + encoded, lambda: self._spread(self._difference)),
            "feedback": (16 + encoded, lambda: self._spread(self._feedback)),
            "decode": (8 + encoded, lambda: self._spread(self._decode)),
            "apply": (8 + encoded, lambda: self._spread(self._apply)),
            "commit4": (24 + encoded * 4 + update, lambda: self._commit(4)),
            "commit16": (24 + encoded * 16 + update, lambda: self._commit(16)),
        }
        """By name: the bytes a parameter that it has to touch, and the work."""

    def _spread(self, work: Callable[[int, int], None]) -> None:
        spread(self.pool, self.threads, self.blocks, work)

    def _commit(self, count: int) -> None:
        settings = OuterSettings(optimizer="nesterov", lr=0.7, momentum=0.9, downlink=self.downlink)
        step = (self.state, self.contributions[:count], [1.0] * count, settings, placing(self.update), self.pool)
        commit(*step, blocks=self.downlink.spec.frame_blocks)

    def _encode(self, first: int, end: int) -> None:
        to = self.target.part(first, end)
        assert encode(self.fmt, self.x[first * BLOCK : end * BLOCK], to.scales, to.codes) < 0

    def _difference(self, first: int, end: int) -> None:
        to, part = self.target.part(first, end), slice(first * BLOCK, end * BLOCK)
        assert encode_difference(self.fmt, self.x[part], self.state.theta[part], to.scales, to.codes) < 0

    def _feedback(self, first: int, end: int) -> None:
        to, part = self.target.part(first, end), slice(first * BLOCK, end * BLOCK)
        residual, theta = self.state.residual[part], self.state.theta[part]
        assert encode_feedback(self.fmt, self.x[part], to.scales, to.codes, residual, theta) < 0

    def _decode(self, first: int, end: int) -> None:
        part = self.contributions[0].part(first, end)
        accumulate(self.fmt, part.scales, part.codes, 0.25, self.acc[first * BLOCK : end * BLOCK])

    def _apply(self, first: int, end: int) -> None:
        update, part = self.contributions[0].part(first, end), slice(first * BLOCK, end * BLOCK)
        subtract_into(self.fmt, update.scales, update.codes, self.x[part], self.acc[part], first)


def measure(params: int, threads: int, repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """The fractions described above with memcpy_gb_s, and by the same names nanoseconds a parameter."""
    pool = ThreadPoolExecutor(threads) if threads > 1 else None
    source, sink = np.ones(1 << 26, np.float32), np.zeros(1 << 26, np.float32)

    def copy(first: int, end: int) -> None:
        np.copyto(sink[first * BLOCK : end * BLOCK], source[first * BLOCK : end * BLOCK])

    def memcpy() -> None:
        spread(pool, threads, source.size // BLOCK, copy)

    def copy_pieces(first: int, end: int) -> None:
        for piece in range(first, end, PIECE):
            copy(piece, min(piece + PIECE, end))

    memcpy()
    copies: list[float] = []
    in_pieces = [
        seconds(lambda: spread(pool, threads, source.size // BLOCK, copy_pieces), threads) for _ in range(repeats)
    ]
    fractions: dict[str, float] = {}
    times: dict[str, float] = {}
    for fmt in Format:
        bench = Bench(fmt, params, threads, pool)
        for name, (touched, work) in bench.works.items():
            work()
            took, beside = [], []
            for _ in range(repeats):
                beside.append(seconds(memcpy, threads))
                took.append(seconds(work, threads))
            bandwidth = 8 * source.size / min(beside)
            times[f"{name}_{fmt.label}"] = min(took) / bench.x.size * 1e9
            fractions[f"{name}_{fmt.label}"] = round(touched * bench.x.size / min(took) / bandwidth, 3)
            copies += beside
    fractions["copy_gb_s"] = round(8 * source.size / min(in_pieces) / 1e9, 2)
    fractions["memcpy_gb_s"] = round(8 * source.size / min(copies) / 1e9, 2)
    return fractions, times


def compile_times() -> dict[str, float]:
    """Seconds that a process of its own computes until the kernels are there."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="diloco-kernels-") as folder:
        default = "{default.uplink, default.downlink, Format.FP32}"
        for key, formats, cache in (
            ("compile_seconds", default, "default"),
            ("load_seconds", default, "default"),
            ("compile_all_seconds", "Format", "all"),
        ):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            environment = os.environ | {"NUMBA_CACHE_DIR": f"{folder}/{cache}"}
            subprocess.run([sys.executable, "-c", WARM_UP.format(formats=formats)], env=environment, check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            found[key] = round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 2)
    return found


def show(found: dict[str, float], times: dict[str, float], threads: int) -> None:
    console = Console(width=100)
    names = list(dict.fromkeys(key.partition("_")[0] for key in times))
    memcpy, copy = found["memcpy_gb_s"], found["copy_gb_s"]
    ordinary = {key: found[key] * memcpy / copy for key in times}
    for title, values in (
        (f"of memcpy, {memcpy} GB/s", found),
        (f"of copies of 1 MiB, {copy} GB/s", ordinary),
        ("ns a parameter", times),
    ):
        table = Table("kernel", *names, title=f"{title}; threads: {threads}")
        for fmt in Format:
            table.add_row(fmt.label, *(f"{values[f'{name}_{fmt.label}']:.2f}" for name in names))
        console.print(table)
    console.print(
        f"compilation: {found['compile_seconds']} s, of all formats {found['compile_all_seconds']} s; "
        f"loading: {found['load_seconds']} s"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Speed of the codec's kernels against memcpy.")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--params", type=int, default=8, help="millions of parameters")
    parser.add_argument("--repeats", type=int, default=11)
    options = parser.parse_args()
    found, times = measure(options.params << 20, options.threads, options.repeats)
    scaled = {f.label for f in Format if f.spec.scale_bytes}
    found["least_commit"] = min(v for k, v in found.items() if k.startswith("commit") and k.split("_")[1] in scaled)
    found["least_codec"] = min(v for k, v in found.items() if k.startswith(("encode", "decode")))
    found["threads"] = options.threads
    found |= compile_times()
    show(found, times, options.threads)
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
