"""What the daemon logs: for people, or as one JSON object a line."""

from __future__ import annotations

import io
import json
import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import numpy as np
import pytest
from raw_worker import RawWorker, frames_of, manifest_of
from server_process import ServerProcess

from diloco_proto import outer_pb2 as pb
from diloco_proto.errors import ERROR_KEY
from diloco_server.logs import FIELDS, JsonLines, configure


def line(message: str, *arguments: object, **extra: object) -> dict[str, object]:
    record = logging.getLogger("diloco.server").makeRecord(
        "diloco.server", logging.INFO, "f.py", 1, message, arguments, None, extra=extra
    )
    return json.loads(JsonLines().format(record))


def test_a_line_has_its_time_level_logger_message_and_what_is_known_of_its_subject() -> None:
    values = line("worker %r joined", "wörker", worker="wörker", version=3, other="left out")
    told = datetime.fromisoformat(str(values.pop("time")))
    assert told.utcoffset() == timedelta(0)
    assert abs(datetime.now(UTC) - told) < timedelta(minutes=1)
    assert values == {
        "level": "info",
        "logger": "diloco.server",
        "message": "worker 'wörker' joined",
        "worker": "wörker",
        "version": 3,
    }


def test_a_traceback_stays_on_its_line() -> None:
    stream = io.StringIO()
    configure("json", "info", stream)
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logging.getLogger("diloco.server").exception("failed")
    (text,) = stream.getvalue().splitlines()
    assert "ValueError: two\nlines" in json.loads(text)["exception"]


def test_levels_hold_for_our_lines_and_debug_is_for_them_alone() -> None:
    stream = io.StringIO()
    configure("text", "warning", stream)
    logging.getLogger("diloco.server").info("no")
    logging.getLogger("diloco.server").warning("yes")
    configure("text", "debug", stream)
    logging.getLogger("diloco.server").debug("ours")
    logging.getLogger("asyncio").debug("theirs")
    assert [text.split(" ", 2)[2] for text in stream.getvalue().splitlines()] == ["WARNING yes", "DEBUG ours"]


def test_a_server_that_logs_json_says_who_joins_trains_leaves_and_is_refused(tmp_path: Path) -> None:
    arguments = ["--log-format", "json", "--log-level", "debug", "--uplink-codec", "fp32", "--num-fragments", "1"]
    with ServerProcess(tmp_path / "state", *arguments) as server:
        with RawWorker(server.address, "alice") as worker:
            worker.enter(manifest_of(100), [np.zeros(100)])
            worker.push(0, frames_of(np.ones(100)))
            worker.expect("committed")
            worker.say(leave=pb.Leave(reason="had enough"))
            worker.end_session()
            list(worker.events)
            with RawWorker(server.address, "alice") as other:
                other.join(manifest_of(70))
                assert dict(_failure(other))[ERROR_KEY] == "ManifestMismatch"
        server.terminate()
        lines = [json.loads(text) for text in server.said().splitlines()]
    always = {"time", "level", "logger", "message"}
    assert all(always <= entry.keys() <= always | {"exception", *FIELDS} for entry in lines)

    def one(part: str) -> dict[str, object]:
        (found,) = [entry for entry in lines if part in entry["message"]]
        return found

    joined = one("'alice' joined")
    assert joined["worker"] == "alice"
    assert str(joined["peer"]).startswith("ipv4:127.0.0.1:")
    assert one("had enough")["worker"] == "alice"
    assert (one("fragment 0 is at version 1")["level"], one("fragment 0 is at version 1")["fragment"]) == ("debug", 0)
    assert one("refused")["error"] == "ManifestMismatch"
    assert one("the run is open")["level"] == "info"
    assert "100 in 1 fragments" in one("the run has parameters")["message"]
    assert one("shutting down")["level"] == "warning"


def _failure(worker: RawWorker) -> object:
    with pytest.raises(grpc.RpcError) as caught:
        list(worker.events)
    return caught.value.trailing_metadata()
