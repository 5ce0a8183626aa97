"""Ways to spoil a push's header: each must be refused."""

from __future__ import annotations

from collections.abc import Callable

from diloco_proto import outer_pb2 as pb
from diloco_proto.codec import Format


def _set(**values: int) -> Callable[[pb.PushHeader], None]:
    def spoil(header: pb.PushHeader) -> None:
        for name, value in values.items():
            setattr(header, name, value)

    return spoil


def _other_codec(header: pb.PushHeader) -> None:
    header.codec = pb.CODEC_INT8 if int(header.codec) != Format.INT8 else pb.CODEC_FP32


def _future(header: pb.PushHeader) -> None:
    header.base_version += 10_000


def _steps_of_the_future(header: pb.PushHeader) -> None:
    header.since_version = header.base_version + 1


def _beyond(header: pb.PushHeader) -> None:
    header.parts[0].first_block = 10_000


def _unknown_worker(header: pb.PushHeader) -> None:
    header.worker_id = "nobody"


def _other_run(header: pb.PushHeader) -> None:
    header.run_id = "another run"


SPOILT = (
    _other_codec,
    _future,
    _steps_of_the_future,
    _beyond,
    _unknown_worker,
    _other_run,
    _set(steps=0),
    _set(tokens=0),
    _set(fragment=1000),
    _set(purpose=0),
    _set(generation=0),
)
"""Ways to spoil a header."""
