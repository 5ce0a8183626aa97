"""How close the codec's kernels come to the speed of memory.

    python benchmarks/kernels.py [--json] [--threads N] [--params MILLIONS] [--repeats N]

Every figure is a fraction of memcpy's bandwidth (bytes read and written, np.copyto of arrays far larger than the
caches), measured in the same run and interleaved with it, by the bytes that the work has to touch:

    encode_F    reads 4 bytes a parameter, writes the encoded ones (0.516 for 4-bit formats, 0.266 for 2-bit ones)
    feedback_F  the same with error feedback: also writes the residual, reads and writes theta, 16 bytes
    decode_F    decode and accumulate: reads the encoded bytes and 4, writes 4
    commit4_F   the outer step on four contributions: theta, momentum and residual read and written, 24 bytes;
                four times the encoded bytes, and once those of the update, which is in F, or in int4 where F is
                for contributions only

for F = int4, e3m0, int2, ternary. With --json the last line is one JSON object with the keys encode_int4,
feedback_int4, decode_int4, commit4_int4, encode_e3m0 and so on (fractions, medians over the repeats), memcpy_gb_s
(the median bandwidth in GB/s) and threads. Writing also reads the lines to be written, which memcpy avoids with
streaming stores for large arrays on some machines and not on others; the fractions do not correct for that.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from diloco_proto.codec import BLOCK, Encoded, Format, accumulate, encode, encode_feedback, encode_fragment
from diloco_server.outer import FragmentState, OuterSettings, commit

CONTRIBUTIONS = 4
FORMATS = (Format.INT4, Format.E3M0, Format.INT2, Format.TERNARY)
UPLINK_ONLY = (Format.INT2, Format.TERNARY)


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


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
        self.contributions = [Encoded(fmt, np.roll(first.scales, i), first.codes.copy()) for i in range(CONTRIBUTIONS)]
        zeros = [np.zeros(self.x.size, np.float32) for _ in range(2)]
        self.state = FragmentState(self.x.copy(), *zeros)
        self.acc = np.zeros(self.x.size, np.float32)
        self.downlink = Format.INT4 if fmt in UPLINK_ONLY else fmt
        encoded = fmt.spec.bits / 8
        self.touched = {
            "encode": 4 + encoded,
            "feedback": 16 + encoded,
            "decode": 8 + encoded,
            "commit4": 24 + encoded * CONTRIBUTIONS + self.downlink.spec.bits / 8,
        }

    def encode(self) -> None:
        """All values, into `target`."""
        spread(self.pool, self.threads, self.blocks, self._encode)

    def feedback(self) -> None:
        """All values, into `target`, with the state's residual and theta."""
        spread(self.pool, self.threads, self.blocks, self._feedback)

    def decode(self) -> None:
        """Accumulate one contribution."""
        spread(self.pool, self.threads, self.blocks, self._decode)

    def commit4(self) -> None:
        """One outer step."""
        settings = OuterSettings(optimizer="nesterov", lr=0.7, momentum=0.9, downlink=self.downlink)
        commit(self.state, self.contributions, [1.0] * CONTRIBUTIONS, settings, self.pool)

    def _part(self, encoded: Encoded, first: int, end: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        spec = self.fmt.spec
        scales = encoded.scales[first * spec.scale_bytes : end * spec.scale_bytes]
        return scales, encoded.codes[first * spec.code_bytes : end * spec.code_bytes]

    def _encode(self, first: int, end: int) -> None:
        scales, codes = self._part(self.target, first, end)
        assert encode(self.fmt, self.x[first * BLOCK : end * BLOCK], scales, codes) < 0

    def _feedback(self, first: int, end: int) -> None:
        scales, codes = self._part(self.target, first, end)
        part = slice(first * BLOCK, end * BLOCK)
        residual, theta = self.state.residual[part], self.state.theta[part]
        assert encode_feedback(self.fmt, self.x[part], scales, codes, residual, theta) < 0

    def _decode(self, first: int, end: int) -> None:
        scales, codes = self._part(self.contributions[0], first, end)
        accumulate(self.fmt, scales, codes, 0.25, self.acc[first * BLOCK : end * BLOCK])


def measure(params: int, threads: int, repeats: int) -> dict[str, Any]:
    """The figures described above, with the speeds in G parameters a second under `speeds`."""
    pool = ThreadPoolExecutor(threads) if threads > 1 else None
    source, sink = np.ones(1 << 26, np.float32), np.zeros(1 << 26, np.float32)

    def copy(first: int, end: int) -> None:
        np.copyto(sink[first * BLOCK : end * BLOCK], source[first * BLOCK : end * BLOCK])

    def memcpy() -> None:
        spread(pool, threads, source.size // BLOCK, copy)

    memcpy()
    bandwidths: list[float] = []
    result: dict[str, Any] = {}
    speeds: dict[str, float] = {}
    for fmt in FORMATS:
        bench = Bench(fmt, params, threads, pool)
        works = {
            "encode": bench.encode,
            "feedback": bench.feedback,
            "decode": bench.decode,
            "commit4": bench.commit4,
        }
        fractions: dict[str, list[float]] = {name: [] for name in works}
        times: dict[str, list[float]] = {name: [] for name in works}
        for work in works.values():
            work()
        for _ in range(repeats):
            for name, work in works.items():
                bandwidth = 8 * source.size / seconds(memcpy)
                took = seconds(work)
                bandwidths.append(bandwidth)
                times[name].append(took)
                fractions[name].append(bench.touched[name] * bench.x.size / took / bandwidth)
        for name in works:
            result[f"{name}_{fmt.label}"] = round(statistics.median(fractions[name]), 3)
            speeds[f"{name}_{fmt.label}"] = bench.x.size / statistics.median(times[name]) / 1e9
    result["memcpy_gb_s"] = round(statistics.median(bandwidths) / 1e9, 2)
    result["threads"] = threads
    result["speeds"] = speeds
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Speed of the codec's kernels against memcpy.")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--params", type=int, default=32, help="millions of parameters")
    parser.add_argument("--repeats", type=int, default=11)
    options = parser.parse_args()
    result = measure(options.params << 20, options.threads, options.repeats)
    speeds = result.pop("speeds")
    console = Console()
    table = Table(title=f"memcpy {result['memcpy_gb_s']} GB/s, threads: {options.threads}")
    table.add_column("kernel")
    table.add_column("of memcpy", justify="right")
    table.add_column("G parameters/s", justify="right")
    for name, speed in speeds.items():
        table.add_row(name, f"{result[name]:.2f}", f"{speed:.2f}")
    console.print(table)
    if options.json:
        console.out(json.dumps(result), highlight=False)


if __name__ == "__main__":
    main()
