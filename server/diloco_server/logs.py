"""How the daemon's log looks: lines for people, or one JSON object a line for machines.

The commands set it up; a program that uses `serve()` has its own logging, which is left alone.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import TextIO

FORMATS = ("text", "json")
LEVELS = ("debug", "info", "warning", "error")

FIELDS = ("worker", "fragment", "version", "peer", "error", "seconds", "rounds")
"""What a record may say of its subject (`extra={"worker": …}`), beside the message."""


def plain(text: str, most: int = 200) -> str:
    """Somebody else's words as they may stand in a line: cut to `most` characters, and all of these visible."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:most])


class JsonLines(logging.Formatter):
    """time (ISO 8601, UTC), level, logger, message, those of FIELDS that are known, and exception if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        values: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        values |= {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
        if record.exc_info:
            values["exception"] = self.formatException(record.exc_info)
        return json.dumps(values, default=str)


def configure(log_format: str, level: str, stream: TextIO | None = None) -> None:
    """Send what this process logs to `stream`, stderr by default. Replaces what was set up before."""
    handler = logging.StreamHandler(stream or sys.stderr)
    if log_format == "json":
        handler.setFormatter(JsonLines())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO if level == "debug" else level.upper())
    logging.getLogger("diloco").setLevel(level.upper())  # debug lines of ours only: asyncio's help nobody
