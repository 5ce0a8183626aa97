"""The crash test: one server and four workers, killed, cut off and stalled at random, and what they agree on then.

    python benchmarks/chaos.py [--seconds N] [--seed S] [--workers N] [--asynchronous] [--json] [--keep FOLDER]

All are processes of their own that train a small byte-level GPT, with TLS and tokens, each worker over a link of its
own. For `--seconds` (120) the server and workers are killed (SIGKILL, the server also at points within its store),
stopped in order, put to sleep; links are cut, also within a frame, stalled, slowed down, closed on one side. Workers
come back from their last checkpoint or with nothing, the server on another port. Then all is mended, the workers
finish together and the server is stopped. What must hold then, or the exit code is 1:

- each contribution that was acknowledged to a worker is in exactly one round of the journal (lost 0), and no inner step
  that any process took is in two counted contributions to one fragment (counted_twice 0);
- what each worker was told of the fate of its contributions is what the journal says;
- θ is the same to the bit in all workers, in the server's status, in its last snapshot, and in what the whole journal
  gives when it is replayed from the first snapshot (identical);
- the loss of θ went down, no process is left behind, and nobody ended or stood still who should not have.

With --json the last line is one JSON object: kills, cuts, acknowledged, lost, counted_twice, identical, loss_start,
loss_end (nats a byte, on text that nobody trains on), longest_standstill_s (no outer step, though the server and a
worker were up), rounds, troubles by kind, seed, seconds, asynchronous, problems.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))  # for its proxy

from crash_test import ledger  # noqa: E402
from crash_test.stage import BrokenRun, Options, Stage  # noqa: E402
from crash_test.training import validation_loss  # noqa: E402
from crash_test.trouble import Trouble  # noqa: E402

STANDSTILL_SECONDS = 60.0
"""No outer step for so long, though the server and a worker are up, is a fault. The longest wait that the settings
ask for is a lease of 9 s and a grace; on a busy machine a worker's start takes as long again."""

JOIN_SECONDS = 180.0
FLUSH_SECONDS = 180.0


def play(stage: Stage) -> tuple[Trouble, list[str]]:
    """From the start of the server to its end; returns the digests of θ that it had then."""
    options = stage.options
    stage.start_server()
    stage.until(lambda: stage.server_up, "the server to start", JOIN_SECONDS)
    trouble = Trouble(stage)
    deadline = time.monotonic() + options.seconds
    while time.monotonic() < deadline:
        stage.look()
        trouble.go_on()
        time.sleep(0.02)
    stage.say("mend everything")
    trouble.end()
    for player in stage.team.workers:
        if player.frozen:
            stage.freeze(player, False)
    everybody = len(stage.team.workers)
    stage.until(stage.all_train, "all to be back", JOIN_SECONDS)
    stage.finish.touch()
    stage.say("all are back; they finish")
    stage.until(lambda: len(stage.ended) == everybody, "the workers to finish", FLUSH_SECONDS)
    digests = [f"{int(f['digest'], 16):016x}" for f in stage.status()["fragments"] if f["kind"] != "frozen"]
    stage.on_server_down = lambda: None
    stage.drain_server()
    stage.until(lambda: stage.team.server.process is None, "the server to end", 60.0)
    return trouble, digests


def chaos(folder: Path, options: Options) -> dict[str, Any]:
    """One test; its result."""
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {text}", flush=True)

    with ExitStack() as stack:
        stage = Stage(folder, options, stack, say)
        trouble, digests = play(stage)
    problems = [f"process {pid} was left behind" for pid in stage.team.guard.left_behind()]
    kept = ledger.read_state(stage.state)
    records = ledger.read_records(folder, [p.name for p in stage.team.workers])
    verdict = ledger.judge(kept, records, digests)
    start, end = (validation_loss(path, options.workers) for path in (kept.first, kept.last))
    if end >= start:
        problems.append(f"the loss did not go down: {start:.4f} to {end:.4f}")
    steps = ledger.times_of_steps(folder.glob("server.*.log"))
    finished = max(e["time"] for events in records.values() for e in events if e["event"] == "finished")
    standstill = stage.timeline.longest_standstill(steps, finished)
    if standstill > STANDSTILL_SECONDS:
        problems.append(f"no outer step for {standstill:.1f} s, though the server and a worker were up")
    return {
        "kills": stage.kills,
        "cuts": trouble.cuts,
        "acknowledged": verdict.acknowledged,
        "lost": verdict.lost,
        "counted_twice": verdict.counted_twice,
        "identical": verdict.identical,
        "loss_start": round(start, 4),
        "loss_end": round(end, 4),
        "longest_standstill_s": round(standstill, 1),
        "rounds": len(kept.rounds),
        "troubles": dict(sorted(trouble.counts.items())),
        "seed": options.seed,
        "seconds": options.seconds,
        "asynchronous": options.asynchronous,
        "problems": problems + verdict.problems,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120.0, help="of trouble")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--asynchronous", action="store_true", help="delayed Nesterov")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--keep", metavar="FOLDER", type=Path, help="put everything there and leave it")
    given = parser.parse_args()
    options = Options(given.seconds, given.seed, given.workers, given.asynchronous)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through all `with` blocks
    folder = given.keep or Path(tempfile.mkdtemp(prefix="diloco-chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    broken = True
    try:
        result = chaos(folder, options)
        broken = bool(result["problems"])
    except BrokenRun as error:
        result = {"seed": options.seed, "seconds": options.seconds, "problems": [str(error)]}
    finally:
        if not broken and given.keep is None:
            shutil.rmtree(folder)
    for problem in result["problems"]:
        print(f"BROKEN: {problem}")
    if broken:
        print(f"all logs are in {folder}")
    if given.json:
        print(json.dumps(result))
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
