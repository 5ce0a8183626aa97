"""What several benchmarks share: processes that act together, servers, bare workers, raw gRPC, links."""

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[2] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "abuse")]  # for their server process and bare workers
