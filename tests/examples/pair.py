"""Two workers that run an example, as processes."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
SETTINGS = {"OMP_NUM_THREADS": "1", "DILOCO_URL": "", "DILOCO_URL_FILE": ""}
"""Workers run side by side on few cores: intra-op threads would only fight."""


def outputs_of_two(example: str, folder: Path, *arguments: str, timeout: float = 280.0) -> list[str]:
    """What workers `a` and `b` print, run side by side in `folder`. Both must end well."""
    environment = os.environ | SETTINGS
    with ExitStack() as stack:
        processes = []
        for name in "ab":
            command = [sys.executable, str(EXAMPLES / example), "--name", name, *arguments]
            pipe = subprocess.PIPE
            process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=folder, env=environment)
            stack.enter_context(process)  # closes its pipes
            stack.callback(process.kill)
            processes.append(process)
        said = [process.communicate(timeout=timeout) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    return [output for output, _ in said]
