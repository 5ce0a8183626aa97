"""The server dies at each point at which it touches the disk or publishes; what comes out is the same to the bit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import grpc
import numpy as np
import pytest
from raw_worker import RawWorker, frames_of, manifest_of
from server_process import ServerProcess

from diloco_proto import outer_pb2 as pb
from diloco_proto.codec import Format

T = TypeVar("T")

SIZES = (3000, 1700)
MANIFEST = manifest_of(*SIZES)
NAMES = ("a", "b")
ROUNDS = 8
SETTINGS = ("--sync-every=4", "--num-fragments=2", "--overlap-steps=1", "--min-workers=2", "--grace-seconds=inf")
KEEPING = ("--snapshot-every=2", "--keep-snapshots=2")

KEPT = (pb.OUTCOME_ALREADY_HAVE, pb.OUTCOME_COUNTED)


def values(fragment: int, version: int, name: str) -> np.ndarray:
    """What a worker contributes; the same in every play."""
    rng = np.random.default_rng([fragment, version, ord(name)])
    return rng.standard_normal(SIZES[fragment]).astype(np.float32)


class Play:
    """Two workers push what the script says, to a server that dies and is started again."""

    def __init__(self, state: Path, faults: tuple[str, ...] = ()) -> None:
        self._state = state
        self._faults = list(faults)
        self._server: ServerProcess | None = None
        self._workers: dict[str, RawWorker] = {}
        self._versions: dict[int, int] = {}
        self._pushed: dict[tuple[int, str], tuple[int, list[bytes]]] = {}
        """Base version and frames of each worker's last acknowledged contribution, by fragment."""
        self.died: list[str] = []

    def run(self) -> dict[int, tuple[int, int]]:
        """Fragment -> version and digest, at the end of the script."""
        try:
            for version in range(ROUNDS):
                for fragment in range(len(SIZES)):
                    for name in NAMES:
                        self._surely(lambda f=fragment, v=version, n=name: self._push(f, v, n))
                    self._surely(lambda f=fragment, v=version: self._until(f, v + 1))
            status = self._surely(lambda: self._workers["a"].stub.Status(pb.StatusRequest(), timeout=60))
            return {f.index: (f.version, f.digest) for f in status.fragments}
        finally:
            self._leave()
            if self._server is not None:
                self._server.kill()

    def _surely(self, action: Callable[[], T]) -> T:
        """Again, as often as the server dies meanwhile."""
        while True:
            try:
                if self._server is None:
                    self._start()
                return action()
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
                self._bury()

    def _start(self) -> None:
        fault = self._faults[0] if self._faults else ""
        self._server = ServerProcess(self._state, *SETTINGS, *KEEPING, fault=fault)
        if not self._server.port:
            self._bury()
            self._start()
            return
        self._workers = {name: RawWorker(self._server.address, name) for name in NAMES}
        for worker in self._workers.values():
            welcome = worker.join(MANIFEST).expect("welcome")
            if not welcome.seeded:
                worker.expect("seed_wanted")
                worker.seed(np.linspace(-1, 1, size, dtype=np.float32) for size in SIZES)
                welcome = worker.expect("seeded")
            self._versions = {v.fragment: v.version for v in welcome.versions}
            worker.say(ready=pb.Ready())
        for worker in self._workers.values():
            worker.expect("opened")
        for (fragment, name), (version, frames) in self._pushed.items():
            if version < self._versions[fragment] - 1:
                continue  # a later one has been counted, whose acknowledgement never came
            outcome = self._workers[name].push(fragment, frames, **self._header(fragment, version))
            assert outcome.kind in KEPT, "what was acknowledged is lost"

    def _push(self, fragment: int, version: int, name: str) -> None:
        frames = frames_of(values(fragment, version, name), Format.INT4)
        outcome = self._workers[name].push(fragment, frames, **self._header(fragment, version))
        assert outcome.kind in (pb.OUTCOME_STAGED, *KEPT)
        self._pushed[fragment, name] = version, frames

    def _header(self, fragment: int, version: int) -> dict[str, object]:
        return {"base_version": version, "since_version": version, "codec": pb.CODEC_INT4, "tokens": 5 + version % 3}

    def _until(self, fragment: int, version: int) -> None:
        while self._versions[fragment] < version:
            event = self._workers["a"].expect("committed")
            self._versions[event.fragment] = event.version

    def _leave(self) -> None:
        for worker in self._workers.values():
            with suppress(grpc.RpcError):
                worker.__exit__()
        self._workers = {}

    def _bury(self) -> None:
        """The server has died; the next one has another fault, or none."""
        assert self._server is not None
        code = self._server.process.wait(30)
        assert self._faults, f"it ended with {code}: {self._server.said()}"
        assert code == -9, self._server.said()
        self._server.kill()
        self._leave()
        self._server = None
        self.died.append(self._faults.pop(0))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[int, int]]:
    """What comes out when nothing goes wrong."""
    end = Play(tmp_path_factory.mktemp("undisturbed") / "state").run()
    assert {version for version, _ in end.values()} == {ROUNDS}
    return end


@pytest.mark.parametrize(
    "faults",
    [
        ("before_append:4", "after_append:5", "before_fsync:3", "after_fsync:4"),
        ("mid_snapshot:1", "before_rename:1", "after_rename:1", "before_publish:3", "before_append:1"),
        ("mid_snapshot:4", "before_rename:1", "after_rename:1", "before_publish:2"),
    ],
    ids=["journal", "beginning", "snapshots"],
)
def test_a_server_that_dies_at_any_point_comes_to_the_same_bits(
    faults: tuple[str, ...], tmp_path: Path, undisturbed: dict[int, tuple[int, int]]
) -> None:
    play = Play(tmp_path / "state", faults)
    assert play.run() == undisturbed
    assert tuple(play.died) == faults
