"""One server under load: many workers, a large model, slow readers, many rounds. Its time, memory, files and threads.

    python benchmarks/load.py [--part crowd|large|long|all] [--json]

The server is a process of its own with a journal, as by default. The workers are bare messages from this process: they
push int4, wait for the fates, pull the updates, and compute nothing.

- crowd: 64 workers at once, 4 M parameters, 10 rounds; then 10 more beside 8 readers that take one message of a
  snapshot a second. Seconds a round, without and with them.
- large: 4 workers, 100 M parameters in 4 fragments, 6 rounds, a snapshot every second one. The most memory that the
  server ever had, against 12 bytes a parameter, what all workers have staged, and 200 MB.
- long: 2 workers, 1000 parameters, 2000 rounds after 300 to warm up. What memory, files and threads have grown by.

The exit code is 1 if memory is beyond the bound, or something grows over the long run. With --json the last line is one
JSON object, a key a part.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE.parent / "tests" / "abuse")]  # for their bare workers

from crowd import Crowd, settings  # noqa: E402
from memory import MIB, memory_bound, open_files, rss, threads, tree_bytes  # noqa: E402
from server_process import ServerProcess  # noqa: E402

from diloco_proto import outer_pb2 as pb  # noqa: E402

WORKERS, READERS = 64, 8
GROWN = 16 * MIB
"""That the allocator may keep over the long run."""


@contextmanager
def running(sizes: Sequence[int], workers: int, **changes: object) -> Iterator[tuple[ServerProcess, Crowd, Path]]:
    """A server and its workers."""
    with tempfile.TemporaryDirectory(prefix="diloco-load-") as folder:
        state = Path(folder) / "state"
        with (
            ServerProcess(state, *settings(sizes, workers, **changes)) as server,
            Crowd(server.address, sizes, workers) as crowd,
        ):
            yield server, crowd, state


@contextmanager
def slow_readers(crowd: Crowd, count: int) -> Iterator[list[int]]:
    """Readers that pull θ over and over, a message a second; yields what each has read so far."""
    ended, read = threading.Event(), [0] * count

    def body(index: int) -> None:
        while not ended.is_set():
            for _ in crowd.workers[index].stub.Pull(pb.PullRequest(snapshot=True)):
                read[index] += 1
                if ended.wait(1.0):
                    return

    pulling = [threading.Thread(target=body, args=(i,)) for i in range(count)]
    with ExitStack() as stack:
        for thread in pulling:
            thread.start()
            stack.callback(thread.join)
        stack.callback(ended.set)
        yield read


def crowd_part(rounds: int) -> dict[str, Any]:
    sizes = (1_000_000,) * 4
    with running(sizes, WORKERS) as (server, crowd, _):
        crowd.round()
        alone = [crowd.round() for _ in range(rounds)]
        with slow_readers(crowd, READERS) as read:
            beside = [crowd.round() for _ in range(rounds)]
            messages = sum(read)
        return {
            "workers": WORKERS,
            "parameters": sum(sizes),
            "round_seconds": round(statistics.median(alone), 3),
            "slow_readers": READERS,
            "slow_messages": messages,
            "round_seconds_beside_them": round(statistics.median(beside), 3),
            "rss_peak_mb": rss(server.process.pid, "VmHWM") / 1e6,
            "good": True,
        }


def large_part(parameters: int, workers: int, rounds: int) -> dict[str, Any]:
    sizes = (parameters // 4,) * 4
    with running(sizes, workers, snapshot_every=2) as (server, crowd, state):
        seconds = [crowd.round() for _ in range(rounds)]
        peak, bound = rss(server.process.pid, "VmHWM"), memory_bound(sizes, workers)
        return {
            "workers": workers,
            "parameters": parameters,
            "round_seconds": round(statistics.median(seconds), 3),
            "rss_mb": rss(server.process.pid) / 1e6,
            "rss_peak_mb": peak / 1e6,
            "bound_mb": bound / 1e6,
            "disk_mb": tree_bytes(state) / 1e6,
            "good": peak <= bound,
        }


def long_part(rounds: int, warm: int) -> dict[str, Any]:
    with running((1000,), 2) as (server, crowd, state):
        pid = server.process.pid
        for _ in range(warm):
            crowd.round()
        before = {"rss": rss(pid), "files": open_files(pid), "threads": threads(pid), "disk": tree_bytes(state)}
        seconds = [crowd.round() for _ in range(rounds)]
        after = {"rss": rss(pid), "files": open_files(pid), "threads": threads(pid), "disk": tree_bytes(state)}
        grown = {name: after[name] - before[name] for name in before}
        return {
            "rounds": rounds,
            "round_seconds": round(statistics.median(seconds), 4),
            "grown": grown,
            "good": grown["rss"] < GROWN and grown["files"] <= 2 and grown["threads"] <= 0,
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("crowd", "large", "long", "all"), default="all")
    parser.add_argument("--parameters", type=int, default=100_000_000, help="of the large model")
    parser.add_argument("--rounds", type=int, default=2000, help="of the long run")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    options = parser.parse_args()
    parts = {
        "crowd": lambda: crowd_part(10),
        "large": lambda: large_part(options.parameters, 4, 6),
        "long": lambda: long_part(options.rounds, 300),
    }
    found = {}
    for name, part in parts.items():
        if options.part in (name, "all"):
            found[name] = part()
            print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in found[name].items()), flush=True)
    if options.json:
        print(json.dumps(found))
    return 0 if all(result["good"] for result in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
