"""DataLoader workers, forked and spawned, beside the threads and connections of a worker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import diloco_client
from diloco_server import RunConfig, serve

SCRIPT = Path(__file__).with_name("forks_script.py")


def test_dataloader_workers_of_every_kind_leave_the_run_alone() -> None:
    with serve(RunConfig(sync_every=4, num_fragments=2, overlap_steps=1)) as server:
        command = [sys.executable, str(SCRIPT), server.address]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as script:
            try:
                output, errors = script.communicate(timeout=100)
            except BaseException:
                os.killpg(script.pid, signal.SIGKILL)  # its DataLoader workers too
                raise
        assert (script.returncode, errors) == (0, "")
        fragments = diloco_client.status(server.address, rounds=64)["fragments"]
    report = json.loads(output)
    steps = 3 * 2 * 3
    assert report["steps"] == steps
    assert report["fork"] == {
        "shard": 1,
        "id": "w",
        "steps": steps,
        "stop": False,
        "flush": True,
        "state_dict": True,
        "base_digests": True,
        "global_state_dict": True,
        "steps after": steps,
        "exit": 0,
    }
    assert report["terminated"] == -15
    assert "hand" in report["pickle"].lower()
    assert report["copied"] == 1e-3
    assert report["digests"] == {str(f["index"]): int(f["digest"], 16) for f in fragments}
    for fragment in fragments:
        members = [m for record in fragment["rounds"] for m in record["members"]]
        assert sum(m["steps"] for m in members) == steps + 3, "every step of the trainer, and none of a child's"
    assert report["counted"] == sum(len(f["rounds"]) for f in fragments)
