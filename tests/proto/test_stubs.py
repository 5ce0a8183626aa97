"""The committed gRPC stubs are what `make stubs` makes of outer.proto."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import diloco_proto

PACKAGE = Path(diloco_proto.__file__).parent


def test_the_committed_stubs_are_those_of_the_proto_file(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(PACKAGE.parent)]
    command += [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run([*command, str(PACKAGE / "outer.proto")], check=True, timeout=60)
    for name in ("outer_pb2.py", "outer_pb2.pyi", "outer_pb2_grpc.py"):
        made, committed = tmp_path / "diloco_proto" / name, PACKAGE / name
        assert made.read_bytes() == committed.read_bytes(), f"{name} is stale: run `make stubs`"
