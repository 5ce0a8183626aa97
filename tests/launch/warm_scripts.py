"""Runs scripts as the command of `diloco-client run` runs them, each in a fork of this one process, which has torch.

Jobs come as lines of JSON on stdin; the exit code of each goes to stdout.
"""

from __future__ import annotations

import json
import os
import runpy
import sys

import torch._dynamo  # noqa: F401  # with torch itself, all that a script's first step imports

import diloco_client.launch.script  # noqa: F401
from diloco_proto.codec import Format, warm_up


def in_a_fork(job: dict[str, str]) -> bool:
    """True in the fork, which is to run the script; False in the parent, when that is over."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()
        return False
    for number, name in ((1, "out"), (2, "err")):
        descriptor = os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ["DILOCO_LAUNCH"] = job["launch"]
    os.chdir(job["folder"])
    return True


warm_up({Format.INT4, Format.FP32})
for line in sys.stdin:
    job = json.loads(line)
    if in_a_fork(job):
        runpy.run_path(job["script"], run_name="__main__")
        break
