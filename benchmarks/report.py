"""Run the benchmarks of speed and size, and write down what they find.

    python benchmarks/report.py [NAME ...] [--list]

Without names all of `PARTS`, one after the other; the machine should have nothing else to do. Of each
its JSON object goes to results/NAME.json, and what it prints into docs/performance.md, between the lines

    <!-- NAME -->
    <!-- end -->

The crash test (chaos.py), the server under load (load.py) and the comparison with synchronous training (parity.py) are
about other things than speed, and are run by themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
DOCUMENT = HERE.parent / "docs" / "performance.md"
COLUMNS = "110"

PARTS = {
    "kernels": "",
    "transport": "",
    "round": "--large",
    "overhead": "",
    "wire": "",
    "wan": "",
    "scale": "",
}
"""By name: the options."""


def machine() -> str:
    """What it ran on, in a line."""
    model = re.search(r"^model name\s*: (.*)$", _text(Path("/proc/cpuinfo")), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s*(\d+)", _text(Path("/proc/meminfo")), re.MULTILINE)
    parts = [f"{os.cpu_count()} cores", model[1] if model else platform.machine()]
    if memory:
        parts.append(f"{int(memory[1]) / 1e6:.0f} GB")
    return ", ".join(parts)


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def run(name: str) -> tuple[str, dict[str, object]]:
    """What the benchmark prints, and its last line. Raises CalledProcessError."""
    command = [sys.executable, str(HERE / f"{name}.py"), *PARTS[name].split(), "--json"]
    environment = os.environ | {"COLUMNS": COLUMNS, "NO_COLOR": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    *printed, last = done.stdout.rstrip().splitlines()
    return "\n".join(line.rstrip() for line in printed), json.loads(last)


def put(document: str, name: str, printed: str, when: str) -> str:
    """The document with this between the lines of that name. Raises ValueError if it has none."""
    block = f"<!-- {name} -->\n`python benchmarks/{name}.py {PARTS[name]}".rstrip()
    block += f"`, {when}, {machine()}:\n\n```text\n{printed}\n```\n<!-- end -->"
    found, count = re.subn(rf"<!-- {name} -->.*?<!-- end -->", lambda _: block, document, count=1, flags=re.DOTALL)
    if not count:
        raise ValueError(f"{DOCUMENT} has no place for {name}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PARTS))
    parser.add_argument("--list", action="store_true", help="only print the commands")
    options = parser.parse_args()
    names = options.names or list(PARTS)
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        parser.error(f"no benchmark is called {unknown[0]!r}; there are {', '.join(PARTS)}")
    for name in names:
        if options.list:
            print(f"python benchmarks/{name}.py {PARTS[name]}".rstrip())
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        printed, values = run(name)
        (HERE / "results" / f"{name}.json").write_text(json.dumps(values, indent=1) + "\n")
        DOCUMENT.write_text(put(DOCUMENT.read_text(), name, printed, time.strftime("%Y-%m-%d")))
        print(printed, flush=True)


if __name__ == "__main__":
    main()
